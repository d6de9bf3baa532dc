"""Reads the shards of the output once, in file order, and hands every piece to its tensor's check.

A worker takes the next piece under a lock: it reads the bytes and adds them to the shard's digest,
which needs them in order. What is slow, the computing, happens outside of the lock, beside the
other worker's.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from blake3 import blake3

from infold.checkpoint.inputs import InputFiles
from infold.checkpoint.safetensors import Header
from infold.verify.amended import AmendedCheck
from infold.verify.parts import PartCheck
from infold.verify.tensors import COPIED, BaseCheck, EditCheck, Workspace
from infold.workers import Worker, run_all

__all__ = ["Check", "Found", "reread"]

Check = BaseCheck | EditCheck | PartCheck | AmendedCheck

_WORKERS = 4  # at most; each holds about 15 MB of buffers


@dataclass(frozen=True)
class Found:
    """One shard of the output, as it lies there."""

    name: str
    path: Path
    header: Header
    checks: Mapping[str, Check]  # by tensor; one that has none is only hashed
    base: Path | None  # the base's shard, where its digest is wanted and all offsets are the same
    between: BaseCheck | None  # what lies between tensors, by offsets in the file


@dataclass(frozen=True, slots=True)
class _Piece:
    """Bytes of one tensor."""

    shard: Found
    check: Check | None
    begin: int  # in the file
    offset: int  # in the tensor
    count: int


def _cut(check: Check | None, nbytes: int) -> Iterator[tuple[int, int]]:
    """The pieces of a tensor: (offset, count)."""
    step = COPIED if check is None else check.step
    unit = check.unit if isinstance(check, EditCheck) else nbytes
    for first in range(0, nbytes, unit or 1):
        end = min(first + unit, nbytes)
        for offset in range(first, end, step or 1):
            yield offset, min(step, end - offset)


class _Reread:
    def __init__(
        self,
        shards: Sequence[Found],
        files: InputFiles,
        hashed: bool,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.shards, self.files, self.hashed, self.progress = shards, files, hashed, progress
        self.total = sum(shard.header.file_size for shard in shards)
        self.finished = 0
        self.output: dict[str, str] = {}  # digests by shard
        self.base: dict[str, str] = {}
        self.hashes = blake3(), blake3()  # of the output's and the base's shard that is being read
        self.pieces = self._pieces()
        self.taking, self.telling = threading.Lock(), threading.Lock()
        self.stopped = threading.Event()
        self.error: BaseException | None = None

    def _pieces(self) -> Iterator[_Piece]:
        """All pieces, in order. Runs under the lock `taking`, with the digests of its shard."""
        for shard in self.shards:
            self.hashes = blake3(shard.header.raw), blake3(shard.header.raw)
            self._tell(len(shard.header.raw))
            position = len(shard.header.raw)
            for name, info in shard.header.tensors.items():
                yield from self._between(shard, position, info.begin)
                position = info.end
                check = shard.checks.get(name)
                for offset, count in _cut(check, info.nbytes):
                    yield _Piece(shard, check, info.begin + offset, offset, count)
            yield from self._between(shard, position, shard.header.file_size)
            if self.hashed:
                self.output[shard.name] = self.hashes[0].hexdigest()
            if shard.base is not None:
                self.base[shard.name] = self.hashes[1].hexdigest()

    @staticmethod
    def _between(shard: Found, begin: int, end: int) -> Iterator[_Piece]:
        for offset in range(begin, end, COPIED):
            yield _Piece(shard, shard.between, offset, offset, min(COPIED, end - offset))

    def run(self) -> None:
        count = max(1, min(os.cpu_count() or 1, _WORKERS))
        workers = [Worker(self._work, f"infold-verify-{n}") for n in range(count)]
        before = torch.get_num_threads()
        torch.set_num_threads(1)  # the workers are the threads
        try:
            run_all(workers, self.stopped.set)
        finally:
            torch.set_num_threads(before)
        if self.error is not None:
            raise self.error

    def _work(self) -> None:
        torch.set_num_threads(1)
        torch.set_flush_denormal(False)
        workspace = Workspace()
        try:
            while not self.stopped.is_set():
                with self.taking:
                    taken = self._take(workspace)
                if taken is None:
                    return
                piece, merged, own = taken
                if piece.check is not None:
                    piece.check.check(merged, piece.offset, own, workspace)
                    piece.check.done(piece.count)
                self._tell(piece.count)
        except BaseException as error:
            with self.telling:
                self.error = self.error or error
            self.stopped.set()

    def _take(self, workspace: Workspace) -> tuple[_Piece, memoryview, memoryview | None] | None:
        """The next piece, with its bytes in the output and, where they were hashed, in the base."""
        piece = next(self.pieces, None)
        if piece is None:
            return None
        merged, own = workspace.bytes("merged", piece.count), None
        if piece.check is not None or self.hashed:
            self.files.read(piece.shard.path, merged, piece.begin)
        if self.hashed:
            self.hashes[0].update(merged)
        if piece.shard.base is not None:
            own = workspace.bytes("base", piece.count)
            self.files.read(piece.shard.base, own, piece.begin)
            self.hashes[1].update(own)
        return piece, merged, own

    def _tell(self, count: int) -> None:
        with self.telling:
            self.finished += count
            if self.progress is not None:
                self.progress(self.finished, self.total)


def reread(
    shards: Sequence[Found],
    files: InputFiles,
    *,
    hashed: bool,
    progress: Callable[[int, int], None] | None,
) -> tuple[dict[str, str], dict[str, str]]:
    """Check all shards. Returns the BLAKE3 of the output's shards, if `hashed`, and of the base's
    where that was asked for, by name. `progress` is called with (bytes done, bytes in all)."""
    work = _Reread(shards, files, hashed, progress)
    work.run()
    return work.output, work.base
