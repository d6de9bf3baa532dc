"""One tensor of the output against what it must be.

An edited tensor goes through three sieves, each for what the one before could not decide:

    1  whole tiles: is the stored element nearer to the plain float64 estimate than to the middle
       between it and its neighbours, by more than the bound of the estimate?
    2  single elements: both ends of the bound, rounded from their bits
    3  single elements: the value that the contract asks for, by integer arithmetic
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from infold.checkpoint.adapter import TORCH_DTYPES, Adapter
from infold.checkpoint.safetensors import TensorInfo
from infold.checkpoint.shards import Checkpoint, read_exactly
from infold.errors import StorageFailure
from infold.plan.edits import BaseTensor, Edit
from infold.verify.reference import STEP, TINY, LowRank, Reference, Sums, Values, reference_of
from infold.verify.rounding import LINES

__all__ = ["BaseCheck", "EditCheck", "Files", "Tally", "Workspace"]

BLOCK = 1 << 20  # elements that are read at once, but whole rows
COPIED = 4 << 20  # bytes of an unedited tensor that are compared at once
TILE = 96 << 10  # elements, so that the buffers of a tile stay in the cache
TILE_COLUMNS = 1536
WIDER = 1 + 2.0**-10  # for what the bounds leave out, being first order


class Files:
    """Files that are read, each opened once."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}
        self._lock = threading.Lock()

    def read(self, path: Path, view: memoryview, offset: int) -> None:
        """Fill `view` from `offset` of a file."""
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
        self._tiles = {name: torch.empty(TILE, dtype=torch.float64) for name in "xedths"}
        self._flags = torch.empty(TILE, dtype=torch.bool)

    def bytes(self, name: str, count: int) -> memoryview:
        have = self._bytes.get(name)
        if have is None or len(have) < count:
            self._bytes[name] = have = bytearray(count)
        return memoryview(have)[:count]

    def tile(self, name: str, like: Tensor, dtype: torch.dtype) -> Tensor:
        """A buffer of the shape of `like`, a tile."""
        return self._tiles[name].view(dtype)[: like.numel()].view(like.shape)

    def flags(self, like: Tensor) -> Tensor:
        return self._flags[: like.numel()].view(like.shape)


class Tally:
    """What was found in one tensor. Shared by the workers."""

    def __init__(self) -> None:
        self.wrong = 0
        self.undecided = 0
        self.like_base = 0  # wrong ones that are as in the base
        self.furthest = 0  # of a wrong one from its value, in units in the last place
        self.first: tuple[int, str, str] | None = None  # number of the element, stored, expected
        self._lock = threading.Lock()

    def add(
        self,
        wrong: int = 0,
        first: tuple[int, str, str] | None = None,
        like_base: int = 0,
        furthest: int = 0,
        undecided: int = 0,
    ) -> None:
        with self._lock:
            self.wrong += wrong
            self.undecided += undecided
            self.like_base += like_base
            self.furthest = max(self.furthest, furthest)
            if first is not None and (self.first is None or first[0] < self.first[0]):
                self.first = first


class BaseCheck:
    """A tensor that must be byte-equal to the base's."""

    def __init__(self, base: Checkpoint, info: TensorInfo, files: Files) -> None:
        self.tally = Tally()
        self.info, self.files = info, files
        self.path = base.shards[base.where[info.name]].path

    @property
    def step(self) -> int:
        """Bytes that are checked at once."""
        return COPIED

    def check(
        self, merged: memoryview, offset: int, own: memoryview | None, workspace: Workspace
    ) -> None:
        """Check bytes that begin at `offset` in the tensor; `own` are the base's, if at hand."""
        if own is None:
            own = workspace.bytes("base", len(merged))
            self.files.read(self.path, own, self.info.begin + offset)
        if _equal(merged, own):
            return
        elements = math.prod(self.info.shape)
        width = self.info.nbytes // elements if self.info.nbytes % elements == 0 else 1
        ours, theirs = (np.frombuffer(view, np.uint8).reshape(-1, width) for view in (merged, own))
        wrong = np.flatnonzero((ours != theirs).any(1))
        at = int(wrong[0])
        stored, expected = (_show(side[at].tobytes(), self.info.dtype) for side in (ours, theirs))
        self.tally.add(len(wrong), (offset // width + at, stored, expected))

    def done(self, count: int) -> None: ...


def _equal(one: memoryview, two: memoryview) -> bool:
    """Whether bytes are equal; unlike == on memory views this lets other threads run."""
    words = len(one) // 8
    if words and not torch.equal(
        torch.frombuffer(one, dtype=torch.int64, count=words),
        torch.frombuffer(two, dtype=torch.int64, count=words),
    ):
        return False
    return bytes(one[8 * words :]) == bytes(two[8 * words :])


def _show(element: bytes, dtype: str) -> str:
    if dtype in TORCH_DTYPES and len(element) == TORCH_DTYPES[dtype].itemsize:
        return repr(torch.frombuffer(bytearray(element), dtype=TORCH_DTYPES[dtype]).item())
    return f"0x{element[::-1].hex()}"


class EditCheck:
    """An edited tensor: its stored elements against the edit, computed anew.

    `scalings` replaces the scaling of LoRA modules, to find out what went wrong elsewhere.
    """

    def __init__(
        self,
        edit: Edit,
        base: Checkpoint,
        adapters: tuple[Adapter, ...],
        files: Files,
        scalings: Callable[[int, str], float] | None = None,
    ) -> None:
        self.tally = Tally()
        self.edit, self.adapters, self.files, self.scalings = edit, adapters, files, scalings
        self.line = LINES[edit.dtype]
        shape = edit.shape
        self.rows, self.columns = (shape[0], math.prod(shape[1:])) if shape else (1, 1)
        self.row_bytes = self.columns * self.line.dtype.itemsize
        self.left = self.rows  # that are not checked yet
        self.loaded: Tensor | None = None
        if isinstance(edit.source, BaseTensor):
            info = base.info(edit.source.name)
            self.path, self.begin = base.shards[base.where[info.name]].path, info.begin
            self.kind = TORCH_DTYPES[info.dtype]
            self.in_place = info.name == edit.tensor
        else:
            adapter = adapters[edit.source.adapter]
            part = adapter.tensors[edit.source.key]
            self.path, self.begin = adapter.weights, part.begin
            self.kind, self.in_place = TORCH_DTYPES[part.dtype], False
            if part.end == part.begin:  # from a pickle, which is in memory already
                self.loaded = adapter.read(edit.source.key).view(self.rows, -1)
        self._references: list[Reference] | None = None
        self._lock = threading.Lock()

    @property
    def step(self) -> int:
        """Bytes that are checked at once."""
        return max(1, BLOCK // max(self.columns, 1)) * self.row_bytes

    def check(
        self, merged: memoryview, offset: int, own: memoryview | None, workspace: Workspace
    ) -> None:
        """Check whole rows that begin at byte `offset`; `own` are the base's bytes there, if at
        hand."""
        references = self._prepare(workspace)
        row, count = offset // self.row_bytes, len(merged) // self.row_bytes
        stored = torch.frombuffer(merged, dtype=self.line.dtype).view(count, self.columns)
        if own is not None and self.in_place:
            raw = torch.frombuffer(own, dtype=self.kind).view(count, self.columns)
        else:
            raw = self._read(row, count, workspace)
        for rows, columns in _tiles(count, self.columns, TILE, TILE_COLUMNS):
            there = slice(row + rows.start, row + rows.stop)
            source, found = raw[rows, columns], stored[rows, columns]
            x = workspace.tile("x", source, torch.float64)
            values = Values(_widen(source, x, workspace), workspace.tile("e", x, self._kind))
            for number, reference in enumerate(references):
                self._on_logical(number, reference.estimate, values, there, columns)
            doubtful = self._sieve(values, found, workspace)
            if len(doubtful):
                self._judge(references, values, source, found, doubtful, there, columns)

    def done(self, count: int) -> None:
        """`count` bytes are checked: after the last of them the parts are forgotten."""
        with self._lock:
            self.left -= count // self.row_bytes
            if self.left <= 0:
                self._references = None

    # --- what the values are made of

    def _read(self, row: int, count: int, workspace: Workspace) -> Tensor:
        """Stored rows of the source."""
        if self.loaded is not None:
            return self.loaded[row : row + count]
        size = self.columns * self.kind.itemsize
        view = workspace.bytes("source", count * size)
        self.files.read(self.path, view, self.begin + row * size)
        return torch.frombuffer(view, dtype=self.kind).view(count, self.columns)

    def _prepare(self, workspace: Workspace) -> list[Reference]:
        """The operations in order; the first worker that comes reads their parts."""
        with self._lock:
            if self._references is None:
                found: list[Reference] = []
                for number, operation in enumerate(self.edit.operations):
                    adapter = self.adapters[operation.adapter]
                    parts = {part: adapter.read(key) for part, key in operation.parts.items()}
                    scaling = None
                    if self.scalings is not None and operation.method in ("lora", "dora"):
                        scaling = self.scalings(operation.adapter, operation.module)
                    reference = reference_of(
                        operation, adapter.config, parts, self.edit.dtype, scaling
                    )
                    if isinstance(reference, LowRank) and reference.magnitude is not None:
                        self._norms(number, [*found, reference], workspace)
                    found.append(reference)
                self._references = found
            return self._references

    def _norms(self, number: int, references: list[Reference], workspace: Workspace) -> None:
        """Tell DoRA, the last of the references, how long the rows are. Reads the whole source."""
        dora = references[-1]
        assert isinstance(dora, LowRank) and dora.magnitude is not None
        transposed = self.edit.operations[number].transposed
        sums = Sums(len(dora.magnitude))
        step = self.step // self.row_bytes
        narrow = self.kind.itemsize == 2
        for row in range(0, self.rows, step):
            raw = self._read(row, min(step, self.rows - row), workspace)
            for rows, columns in _tiles(len(raw), self.columns, 4 * TILE, self.columns):
                there = slice(row + rows.start, row + rows.stop)
                values = Values(raw[rows].float().double() if narrow else raw[rows].double())
                for n, reference in enumerate(references):
                    self._on_logical(n, reference.contract, values, there, columns)
                sums.add(values.t() if transposed else values, columns if transposed else there)
        dora.finish(sums, self.rows if transposed else self.columns)

    def _on_logical(
        self,
        number: int,
        change: Callable[[Values, slice, slice], None],
        values: Values,
        rows: slice,
        columns: slice,
    ) -> None:
        """Change a stored tile as a tile of the logical matrix of operation `number`."""
        if self._swaps(number):
            view = values.t()
            change(view, columns, rows)
            values.share(view)
        else:
            change(values, rows, columns)

    def _swaps(self, number: int) -> bool:
        """Whether stored rows are inputs. A bias has one column, however its weight is stored."""
        operation = self.edit.operations[number]
        return operation.transposed and not operation.on_bias

    # --- the sieves

    @property
    def _kind(self) -> torch.dtype:
        """The dtype of bounds and distances: float32 resolves them for 16-bit elements."""
        return torch.float32 if self.line.width == 16 else torch.float64

    def _sieve(self, values: Values, found: Tensor, workspace: Workspace) -> Tensor:
        """Numbers, within the tile, of the elements that are not surely right."""
        x, precision = values.x, self.line.precision
        # |x| is less than 2^(precision + 2) times the least distance; WIDER takes another 2^-10
        margin = 2.0**-9 + values.relative * 2.0 ** (precision + 4)
        if margin >= 1:
            return torch.arange(x.numel())
        distance = _widen(found, workspace.tile("d", x, torch.float64), workspace)
        torch.sub(x, distance, out=distance)
        if self._kind != distance.dtype:
            distance = workspace.tile("t", x, self._kind).copy_(distance)
        distance.abs_()
        if values.error is not None:
            distance.add_(values.error)
        limit = workspace.tile("h", x, self._kind)
        scratch = workspace.tile("s", x, self.line.integer)
        self.line.half_spacings(found, scratch, limit)
        limit.mul_(2.0**-precision * (1 - margin))
        # NumPy's comparison and search are several times faster than PyTorch's; NaN is not less
        near = np.less(distance.numpy(), limit.numpy(), out=workspace.flags(x).numpy())
        return torch.from_numpy(np.flatnonzero(~near))

    def _judge(
        self,
        references: list[Reference],
        values: Values,
        source: Tensor,
        found: Tensor,
        doubtful: Tensor,
        rows: slice,
        columns: slice,
    ) -> None:
        """Decide single elements of a tile, and tell the tally."""
        i, j = doubtful // found.shape[1], doubtful % found.shape[1]
        x, raw, stored = values.x[i, j], source[i, j], self.line.stored(found[i, j])
        error = None if values.error is None else values.error[i, j]
        low, high = self._ends(x, error, values.relative)
        finite = self.line.finite(stored)
        open_ = ((low <= stored) & (stored <= high) & (low != high) & finite).nonzero().flatten()
        if len(open_):
            exact = self._settled(
                references, raw[open_], i[open_] + rows.start, j[open_] + columns.start
            )
            low[open_], high[open_] = exact
            self.tally.add(undecided=int((exact[0] != exact[1]).sum()))
        wrong = ((stored < low) | (stored > high) | ~finite).nonzero().flatten()
        if not len(wrong):
            return
        places = stored[wrong]
        nearest = torch.minimum(torch.maximum(places, low[wrong]), high[wrong])
        same = 0
        if isinstance(self.edit.source, BaseTensor) and source.dtype == found.dtype:
            same = int((self.line.stored(raw[wrong]) == places).sum())
        first = int(wrong[0])
        row, column = int(i[first]) + rows.start, int(j[first]) + columns.start
        must = self._settled(
            references, raw[first : first + 1], torch.tensor([row]), torch.tensor([column])
        )
        self.tally.add(
            len(wrong),
            (
                row * self.columns + column,
                repr(self.line.number(int(places[0]))),
                repr(self.line.number(int(must[0]))),
            ),
            same,
            int((places - nearest).abs().max()),
        )

    def _settled(
        self, references: list[Reference], raw: Tensor, rows: Tensor, columns: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The places of single elements by the contract: the least and the greatest."""
        values = Values(raw.double())
        for number, reference in enumerate(references):
            swaps = self._swaps(number)
            reference.settle(values, columns if swaps else rows, rows if swaps else columns)
        return self._ends(values.x, values.error, values.relative)

    def _ends(self, x: Tensor, error: Tensor | None, relative: float) -> tuple[Tensor, Tensor]:
        """The places of x less and plus its bound."""
        if error is None and not relative:
            place = self.line.rounded(x)
            return place, place.clone()
        bound = x.abs() * (relative * WIDER + STEP) + TINY
        if error is not None:
            bound += error.double() * WIDER
        return self.line.rounded(x - bound), self.line.rounded(x + bound)


def _tiles(rows: int, columns: int, size: int, width: int) -> Iterator[tuple[slice, slice]]:
    """A block of whole rows in tiles of at most `size` elements and `width` columns."""
    width = max(1, min(columns, width))
    height = max(1, size // width)
    for row in range(0, rows, height):
        for column in range(0, columns, width):
            yield (
                slice(row, min(row + height, rows)),
                slice(column, min(column + width, columns)),
            )


def _widen(source: Tensor, out: Tensor, workspace: Workspace) -> Tensor:
    """Stored elements as float64, into `out`. 16 bits by way of float32: that has fast paths."""
    if source.element_size() == 2:
        source = workspace.tile("t", source, torch.float32).copy_(source)
    return out.copy_(source)
