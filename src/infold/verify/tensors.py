"""One tensor of the output against what it must be.

An edited tensor goes through three sieves, each for what the one before could not decide:

    1  whole tiles: the plain float64 estimate, and whether the stored element is nearer to it by
       more than the bound than to the midpoints of its neighbours
    2  single elements: both ends of the bound, rounded from their bits
    3  single elements: the value that the contract asks for, by integer arithmetic
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from infold.checkpoint.adapter import TORCH_DTYPES, Adapter
from infold.checkpoint.safetensors import TensorInfo
from infold.checkpoint.shards import Checkpoint, read_exactly
from infold.errors import StorageFailure
from infold.plan.edits import BaseTensor, Edit
from infold.verify.reference import STEP, TINY, Reference, Sums, Values, _LowRank, reference_of
from infold.verify.rounding import LINES

__all__ = ["BaseCheck", "EditCheck", "Files", "Tally", "Workspace", "matrix", "rows_at_once"]

TILE = 96 << 10  # elements, so that a tile's buffers stay in the cache
TILE_COLUMNS = 1536
BLOCK = 1 << 20  # elements that are read at once, but at least a row
WIDER = 1 + 2.0**-10  # what the bounds leave out, being first order


def matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """A stored shape as (rows, columns); a vector is a column."""
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


def rows_at_once(columns: int) -> int:
    return max(1, BLOCK // max(columns, 1))


class Files:
    """Files that are read, each opened once."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}
        self._lock = threading.Lock()

    def read(self, path: Path, view: memoryview, offset: int) -> None:
        with self._lock:
            if path not in self._open:
                try:
                    self._open[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    raise StorageFailure(f"{path}: {error.strerror}") from error
            fd = self._open[path]
        read_exactly(fd, view, offset, path)

    def close(self) -> None:
        for fd in self._open.values():
            os.close(fd)


class Workspace:
    """The buffers of one worker."""

    def __init__(self) -> None:
        self._bytes: dict[str, bytearray] = {}
        self._floats = {name: torch.empty(TILE, dtype=torch.float64) for name in "xdtes"}
        self._integers = torch.empty(TILE, dtype=torch.int64)
        self._flags = torch.empty(TILE, dtype=torch.bool)

    def bytes(self, name: str, count: int) -> memoryview:
        have = self._bytes.get(name)
        if have is None or len(have) < count:
            self._bytes[name] = have = bytearray(count)
        return memoryview(have)[:count]

    def tile(self, name: str, like: Tensor, dtype: torch.dtype) -> Tensor:
        """A float or integer buffer of the shape of `like`, which may exceed TILE (long rows no)."""
        buffer = self._integers if name == "i" else self._floats[name]
        return buffer.view(dtype)[: like.numel()].view(like.shape)

    def flags(self, like: Tensor) -> Tensor:
        return self._flags[: like.numel()].view(like.shape)


@dataclass
class Tally:
    """What was found in one tensor. Its places are on the line of the stored dtype."""

    elements: int = 0
    wrong: int = 0
    undecided: int = 0
    like_base: int = 0  # wrong ones that are as in the base
    furthest: int = 0  # of a wrong one from its value, in units in the last place
    first: tuple[int, str, str] | None = None  # element, stored, expected
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(
        self,
        wrong: int,
        first: tuple[int, str, str] | None,
        like_base: int = 0,
        furthest: int = 0,
    ) -> None:
        with self._lock:
            self.wrong += wrong
            self.like_base += like_base
            self.furthest = max(self.furthest, furthest)
            if first is not None and (self.first is None or first[0] < self.first[0]):
                self.first = first

    def add_undecided(self, count: int) -> None:
        with self._lock:
            self.undecided += count


class BaseCheck:
    """A tensor that must be byte-equal to the base's."""

    def __init__(self, base: Checkpoint, info: TensorInfo, files: Files) -> None:
        self.tally = Tally()
        self.info, self.files = info, files
        self.path = base.shards[base.where[info.name]].path
        self.row_bytes = 1

    def stored(self, offset: int, count: int, workspace: Workspace) -> memoryview:
        """Bytes of the base's tensor."""
        view = workspace.bytes("base", count)
        self.files.read(self.path, view, self.info.begin + offset)
        return view

    def check(self, merged: memoryview, base: memoryview, offset: int) -> None:
        """Compare bytes that begin at `offset` in the tensor."""
        if _equal(merged, base):
            return
        shape, count = self.info.shape, math.prod(self.info.shape)
        width = self.info.nbytes // count if self.info.nbytes % count == 0 else 1
        ours, theirs = (np.frombuffer(view, np.uint8).reshape(-1, width) for view in (merged, base))
        wrong = np.flatnonzero((ours != theirs).any(1))
        at = int(wrong[0])
        shown = [_show(bytes(x[at]), self.info.dtype) for x in (ours, theirs)]
        element = offset // width + at
        self.tally.add(len(wrong), (element, shown[0], shown[1]))
        del shape

    def matches(self, merged: memoryview, row: int, workspace: Workspace) -> float:
        return 0.0


def _equal(one: memoryview, two: memoryview) -> bool:
    """Whether bytes are equal; unlike == on memory views it lets other threads run."""
    whole = len(one) // 8 * 8
    if whole:
        words = [torch.frombuffer(v, dtype=torch.int64, count=whole // 8) for v in (one, two)]
        if not torch.equal(*words):
            return False
    return bytes(one[whole:]) == bytes(two[whole:])


def _show(element: bytes, dtype: str) -> str:
    if dtype in TORCH_DTYPES:
        value = torch.frombuffer(bytearray(element), dtype=TORCH_DTYPES[dtype])
        return repr(value.item())
    return f"0x{element[::-1].hex()}"
