"""One shard of the output on its way: its digests, in the order of its bytes; and who keeps it."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Protocol

from blake3 import blake3

from infold.checkpoint.direct import OutputFile, Pace
from infold.checkpoint.inputs import InputFiles
from infold.checkpoint.shards import read_exactly
from infold.checkpoint.staging import Progress
from infold.merge.convert import reads_elsewhere
from infold.merge.recording import Recording
from infold.plan.edits import OutputShard, Plan
from infold.workers import Worker

__all__ = ["HASH_PIECE", "Chain", "Keeper", "Target"]

HASH_PIECE = 1 << 20  # bytes that are read and hashed while they are in the cache
_WAITING = 32  # finished stretches that the disk has not got yet


class Target(Protocol):
    """Where shards go: what `Staging` offers to the stream."""

    output: Path
    resumed: dict[str, Progress]
    writes: bool  # False: all is computed and hashed, and goes nowhere

    def open_file(self, name: str, size: int) -> int:
        """A descriptor of a file that will have `size` bytes."""

    def record(self, shard: str, fd: int, progress: Progress) -> None:
        """So much of a shard is written."""


class Chain:
    """One shard of the output: its files, its digests, and which chunk is to be hashed next.

    In the same layout the base's bytes pass by in order too, and are hashed on the way. Up to the
    first edit one digest serves for both.
    """

    def __init__(
        self, plan: Plan, shard: OutputShard, staging: Target, files: InputFiles, pace: Pace
    ) -> None:
        self.shard, self.files = shard, files
        self.path = staging.output / shard.name
        self.source_path = plan.base.shards[shard.source].path
        fd = staging.open_file(shard.name, shard.header.file_size)
        self.target = OutputFile(fd, self.path, pace)
        self.in_step = shard.same_layout
        self.forget()
        self.lock = threading.Lock()  # of the three below
        self.turn = 0  # number of the next chunk to be hashed
        self.waiting: dict[int, Callable[[], None]] = {}
        self.hashing = False  # whether somebody hashes right now
        self.writes: list[Future[None]] = []  # of what is hashed
        self.kept = 0  # bytes that were waited for, which in step the journal tells or will tell
        foreign = any(
            reads_elsewhere(plan, edit.source, shard.source)
            for name in shard.header.tensors
            if (edit := plan.edits.get(name))
        )  # the digests of this shard do not tell whether that other one is still the same
        try:
            self.start = self.resume(None if foreign else staging.resumed.get(shard.name))
        except BaseException:
            self.close()
            raise

    def forget(self) -> None:
        """Begin the digests anew. No `output_hash`: all bytes so far are the base's."""
        self.base_hash = blake3()
        self.output_hash = None if self.in_step else blake3()

    def resume(self, done: Progress | None) -> int:
        """Bytes of the output that an earlier run left and that were checked again; at least the
        header, which is written here where nothing was left."""
        raw, size = self.shard.header.raw, self.shard.header.file_size
        if done is not None and len(raw) <= done.position <= size:
            whole = done.position == size
            base, output = blake3(), blake3()
            if self.in_step:
                self._hash_source(base, done.position)
            elif whole:
                self._hash_source(base)
            _hash_file(self.target.fd, self.path, output, done.position)
            checked = base.hexdigest() == done.base and output.hexdigest() == done.output
            if checked and (self.in_step or whole):
                self.base_hash = base
                self.output_hash = None if self.in_step and done.base == done.output else output
                self.kept = done.position
                return done.position
        header = memoryview(raw)
        self.target.write(header, 0)
        self.hash(header, header)
        return len(raw)

    def _hash_source(self, hasher: blake3, count: int | None = None) -> None:
        """The first bytes of the base's shard, or all of it."""
        with self.files.use(self.source_path) as fd:
            size = os.fstat(fd).st_size if count is None else count
            _hash_file(fd, self.source_path, hasher, size)

    def leave(self, number: int, work: Callable[[], None]) -> None:
        """Hash chunk `number`, by `work`, when all before it are hashed: now, with those that wait
        for it, or in the thread that comes with the one before."""
        with self.lock:
            self.waiting[number] = work
            if self.hashing:
                return
            self.hashing = True
        while True:
            with self.lock:
                next_ = self.waiting.pop(self.turn, None)
                if next_ is None:
                    self.hashing = False
                    return
            next_()
            with self.lock:
                self.turn += 1

    def hash(self, base: memoryview, output: memoryview) -> None:
        """The next bytes of both sides; `base` only counts where both are in step."""
        if self.in_step:
            if self.output_hash is None and output is not base:
                self.output_hash = self.base_hash.copy()
            self.base_hash.update(base)
        if self.output_hash is not None:
            self.output_hash.update(output)

    def written(self, end: int) -> None:
        """Wait until all that is hashed, the first `end` bytes, is written. Raises what a write
        raises."""
        for write in self.writes:
            write.result()
        self.writes.clear()
        self.target.flush(end)

    def progress(self, position: int) -> Progress:
        size = self.shard.header.file_size
        if not self.in_step and position == size:
            self.base_hash = blake3()
            self._hash_source(self.base_hash)
        base = self.base_hash.hexdigest()
        output = base if self.output_hash is None else self.output_hash.hexdigest()
        return Progress(position, base, output)

    def close(self) -> None:
        self.target.close()


def _hash_file(fd: int, path: Path, hasher: blake3, count: int) -> None:
    buffer = memoryview(bytearray(HASH_PIECE))
    for offset in range(0, count, HASH_PIECE):
        piece = buffer[: min(HASH_PIECE, count - offset)]
        read_exactly(fd, piece, offset, path)
        hasher.update(piece)


class Keeper:
    """Brings finished stretches to the disk, so that little is left to wait for at the end."""

    def __init__(self, staging: Target, recording: Recording | None) -> None:
        self.staging, self.recording = staging, recording
        self.thread = Worker(self._work, "infold-keeper")
        self.queue: queue.SimpleQueue[tuple[Chain, Progress] | None] = queue.SimpleQueue()
        self.room = threading.Semaphore(_WAITING)  # each shard in the queue is open
        self.error: BaseException | None = None

    def _work(self) -> None:
        while (item := self.queue.get()) is not None:
            chain, progress = item
            try:
                if self.error is None:
                    if self.recording is not None:
                        self.recording.writer.sync()  # before the journal tells of these blocks
                    self.staging.record(chain.shard.name, chain.target.fd, progress)
            except BaseException as error:
                self.error = error
            if progress.position == chain.shard.header.file_size:
                chain.close()
            self.room.release()

    def give(self, chain: Chain, progress: Progress) -> None:
        """Waits where too much is waiting already."""
        self.room.acquire()
        self.queue.put((chain, progress))

    def finish(self) -> None:
        self.queue.put(None)
        try:
            self.thread.wait()
        except BaseException:  # an interrupt: still, its descriptors are closed after its last use
            self.thread.wait()
            raise
