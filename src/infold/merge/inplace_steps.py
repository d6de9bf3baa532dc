"""The writing half of an edit in place: which blocks, in which steps, from the records alone."""

from __future__ import annotations

import errno
import os
import struct
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import torch
from blake3 import blake3

from infold.checkpoint.files import safe_child
from infold.checkpoint.inputs import InputFiles
from infold.checkpoint.staging import sync_data, write_fully
from infold.disk import storage_errors
from infold.edit.steps import Workspace
from infold.edit.threads import take_one_core
from infold.errors import CorruptFile
from infold.merge.apply import EditRun, Run
from infold.merge.source import Buffers
from infold.merge.stream import Compute, chunks_of
from infold.merge.undo import Merged
from infold.plan.edits import OutputShard, Plan

__all__ = [
    "Crew",
    "Piece",
    "Places",
    "Work",
    "grouped",
    "pack_step",
    "program",
    "read_step",
    "reserve",
    "step_memory",
    "step_room",
    "write_file",
]

_CPU = torch.device("cpu")
_MAGIC = b"infold step 1\n\0\0"
_STEP = struct.Struct("<16sQQ32s")  # magic, number, bytes that follow, their BLAKE3
_NO_CALL = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.EBADF)  # of file systems
_WRITE = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
_PLACE = struct.Struct("<IQQ")  # number of the shard, offset, bytes


@dataclass(frozen=True, slots=True)
class Piece:
    """New bytes, and where they go."""

    shard: int
    offset: int
    data: bytes | bytearray


@dataclass(frozen=True, slots=True)
class Work:
    shard: int
    chunk: Compute
    count: int  # bytes


def program(old: Merged | None, new: Merged | None) -> tuple[Plan, dict[str, Run], int]:
    """The plan over what lies there, what computes it, and the elements of a block: all from the
    records alone."""
    if new is None:
        assert old is not None
        return old.undo_plan(), old.undo_runs(_CPU), old.limit
    forward = {
        name: EditRun(edit, new.adapters, _CPU, new.observed(name))
        for name, edit in new.edits.items()
    }
    undo = new.undo_plan()
    plan = replace(undo, edits=new.edits, rewritten={}, copied=())
    if old is None:
        return plan, dict(forward), new.limit
    both = replace(old.swap_plan(plan), adapters=new.adapters)
    return both, old.swap_runs(plan, _CPU, forward), new.limit


def grouped(
    plan: Plan, runs: Mapping[str, Run], files: InputFiles, limit: int, size: int
) -> Iterator[list[Work]]:
    """The blocks of every step, in file order."""
    works: list[Work] = []
    total = 0
    for shard in plan.shards:
        for end, chunk in chunks_of(plan, shard, runs, files, limit):
            if not isinstance(chunk, Compute):
                continue
            works.append(Work(shard.source, chunk, end - chunk.target))
            total += end - chunk.target
            if total >= size:
                yield works
                works, total = [], 0
    if works:
        yield works


class Crew:
    """Threads that compute the blocks of one step side by side."""

    def __init__(self, workers: int, limit: int, plan: Plan, files: InputFiles) -> None:
        self.limit, self.own = limit, threading.local()
        self.pool = ThreadPoolExecutor(workers, "infold-in-place", take_one_core)

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(cancel_futures=True)

    def compute(self, steps: Iterable[list[Work]]) -> Iterator[list[Piece]]:
        """The pieces of each step. While the caller writes one, the next is computed: no block
        reads a byte that another one writes."""
        waiting: list[tuple[Work, Future[Piece]]] = []
        for works in chain(steps, [list[Work]()]):
            ready, waiting = waiting, [(w, self.pool.submit(self._compute, w)) for w in works]
            if ready:
                pieces = [future.result() for _, future in ready]
                for work, _ in ready:
                    if work.chunk.last:
                        work.chunk.run.release()
                del ready  # the futures hold their results
                yield pieces
                del pieces

    def _compute(self, work: Work) -> Piece:
        if not hasattr(self.own, "buffers"):
            self.own.workspace, self.own.buffers = Workspace(_CPU, self.limit), Buffers()
        workspace, buffers, chunk = self.own.workspace, self.own.buffers, work.chunk
        run, block = chunk.run, chunk.block
        run.prepare(workspace, lambda piece: chunk.source.read(piece, buffers), self.limit)
        raw = chunk.source.read(block, buffers)
        data = bytearray(block.count * run.floats.width)
        out = chunk.source.room(run.floats, block, memoryview(data))
        run.run(raw, out, block, workspace)
        chunk.source.fill(run.floats, out, memoryview(data), buffers)
        return Piece(work.shard, chunk.target, data)


class Places:
    """The shards that lie there, which may have other names than a plan's output."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths

    def write(self, pieces: Sequence[Piece]) -> None:
        """All pieces to their places, and on the disk."""
        for number in dict.fromkeys(piece.shard for piece in pieces):
            path = self.paths[number]
            with storage_errors(path):
                fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
                try:
                    for piece in pieces:
                        if piece.shard == number:
                            write_fully(fd, memoryview(piece.data), piece.offset)
                    sync_data(fd)
                finally:
                    os.close(fd)


def pack_step(number: int, pieces: Sequence[Piece]) -> bytearray:
    """A step as its file holds it."""
    length = sum(_PLACE.size + len(piece.data) for piece in pieces)
    step = bytearray(_STEP.size + length)
    position = _STEP.size
    for piece in pieces:
        end = position + _PLACE.size + len(piece.data)
        _PLACE.pack_into(step, position, piece.shard, piece.offset, len(piece.data))
        step[position + _PLACE.size : end] = piece.data
        position = end
    with memoryview(step) as whole:
        digest = blake3(whole[_STEP.size :]).digest()
    _STEP.pack_into(step, 0, _MAGIC, number, length, digest)
    return step


def read_step(path: Path, wanted: int, shards: Sequence[OutputShard]) -> list[Piece] | None:
    """The pieces of step `wanted`; None where the file is missing, of another step or torn: then
    none of its bytes has gone to its place.

    Raises CorruptFile for pieces that lie outside of the shards' data, which infold never writes.
    """
    if not os.path.lexists(path):
        return None
    with storage_errors(path):
        data = safe_child(path.parent, path.name).read_bytes()
    if len(data) < _STEP.size:
        return None
    magic, number, length, digest = _STEP.unpack_from(data)
    body = data[_STEP.size : _STEP.size + length]
    if magic != _MAGIC or number != wanted or blake3(body).digest() != digest:
        return None
    pieces, position = [], 0
    while position < len(body):
        try:
            shard, offset, count = _PLACE.unpack_from(body, position)
            header = shards[shard].header
        except (struct.error, IndexError):
            header, offset, count = None, 0, 0
        position += _PLACE.size
        if (
            header is None
            or offset < len(header.raw)
            or offset + count > header.file_size
            or position + count > len(body)
        ):
            raise CorruptFile(f"{path}: holds bytes that belong to no tensor; nothing was written")
        pieces.append(Piece(shard, offset, body[position : position + count]))
        position += count
    return pieces


def step_memory(size: int) -> int:
    """Bytes that steps take, which end after `size` bytes: the next one is computed while one is
    written, which is also held as its file will be. The block that a step may be longer by lies in
    what the rehearsal had for blocks."""
    return 3 * size


def step_room(plan: Plan, limit: int, size: int) -> int:
    """The most bytes that the file of a step can have. limit: elements of a block; size: after so
    many bytes a step ends."""
    widest = 8  # bytes of an element; a block may begin just before the step's end
    body = min(plan.edited_bytes, size + widest * limit)
    pieces = len(plan.edits) + 16 * body // limit + 1  # more than there ever are, of a few bytes
    return _STEP.size + pieces * _PLACE.size + body


def reserve(path: Path, size: int) -> None:
    """Take so much of the disk for a file, so that a full one shows now."""
    # the C library reads what it makes room for, where the file system does not do it
    fd = os.open(path, _WRITE & ~os.O_WRONLY | os.O_RDWR | os.O_TRUNC, 0o644)
    try:
        try:
            os.posix_fallocate(fd, 0, size)
            return
        except AttributeError:  # macOS has no such call
            pass
        except OSError as error:
            if error.errno not in _NO_CALL:
                raise
        zeros = memoryview(bytes(1 << 20))
        for offset in range(0, size, len(zeros)):
            write_fully(fd, zeros[: size - offset], offset)
        sync_data(fd)
    finally:
        os.close(fd)


def write_file(path: Path, data: bytes | bytearray, *, cut: bool = True) -> None:
    """A whole file, on the disk. A link in its place is not followed, wherever it leads. Without
    `cut` a longer file keeps its length, and with it its room on the disk."""
    fd = os.open(path, _WRITE | (os.O_TRUNC if cut else 0), 0o644)
    try:
        write_fully(fd, memoryview(data), 0)
        os.fsync(fd)
    finally:
        os.close(fd)
