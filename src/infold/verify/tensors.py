"""One tensor of the output against what it must be.

An edited tensor goes through three sieves, each for what the one before could not decide:

    1  whole tiles: is the stored element nearer to the plain float64 estimate than to the middle
       between it and its neighbours, by more than the bound of the estimate?
    2  single elements: both ends of the bound, rounded from their bits
    3  single elements: the value that the contract asks for, by integer arithmetic
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from infold.checkpoint.adapter import Adapter
from infold.checkpoint.inputs import InputFiles
from infold.checkpoint.safetensors import TensorInfo
from infold.checkpoint.shards import Checkpoint
from infold.checkpoint.stored import stored_matrix
from infold.dtypes import SCALE_DTYPES
from infold.plan.edits import BaseTensor, Decoded, Edit, Operation, Original, Replacement
from infold.verify.blocks import Blocks, blocks_of
from infold.verify.experts import parts_of
from infold.verify.reference import (
    LowRank,
    PowerOfTwo,
    Reference,
    Sums,
    rank_of,
    reference_of,
)
from infold.verify.rounding import LINES
from infold.verify.stored import decode
from infold.verify.values import STEP, Values

__all__ = ["COPIED", "BaseCheck", "EditCheck", "Tally", "Workspace"]

BLOCK = 1 << 20  # elements that are read at once: whole rows, or a part of one that has more
COPIED = 4 << 20  # bytes of an unedited tensor that are compared at once
TILE = 192 << 10  # elements; larger ones leave the cache, smaller ones cost more calls
TILE_COLUMNS = 2048
JUDGED = 128 << 10  # elements that are decided one by one at once
WIDER = 1 + 2.0**-10  # for what the bounds leave out, being first order


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
        self.neighbours = 0  # wrong ones that are next to the right value
        self.first: tuple[int, str, str] | None = None  # number of the element, stored, expected
        self._lock = threading.Lock()

    def add(
        self,
        wrong: int = 0,
        first: tuple[int, str, str] | None = None,
        like_base: int = 0,
        neighbours: int = 0,
        undecided: int = 0,
    ) -> None:
        with self._lock:
            self.wrong += wrong
            self.undecided += undecided
            self.like_base += like_base
            self.neighbours += neighbours
            if first is not None and (self.first is None or first[0] < self.first[0]):
                self.first = first


class BaseCheck:
    """A tensor that must be byte-equal to the base's, which lies in the file `path`."""

    def __init__(self, path: Path, info: TensorInfo, files: InputFiles) -> None:
        self.tally = Tally()
        self.path, self.info, self.files = path, info, files

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
    if dtype in SCALE_DTYPES and len(element) == SCALE_DTYPES[dtype].itemsize:
        return repr(torch.frombuffer(bytearray(element), dtype=SCALE_DTYPES[dtype]).item())
    return f"0x{element[::-1].hex()}"


class EditCheck:
    """An edited tensor: its stored elements against the edit, computed anew. Of a quantized tensor
    these are the floats of its blocks, and all its other bits must be the base's.

    `scalings` tells another scaling of LoRA (of the operation and its rank), to find out what went
    wrong elsewhere.
    """

    def __init__(
        self,
        edit: Edit,
        base: Checkpoint,
        adapters: tuple[Adapter, ...],
        files: InputFiles,
        scalings: Callable[[Operation, int], float] | None = None,
        original: Checkpoint | None = None,
    ) -> None:
        self.tally = Tally()
        self.edit, self.adapters, self.files, self.scalings = edit, adapters, files, scalings
        self.blocks = blocks = blocks_of(edit.dtype)  # a row is one of them, its floats columns
        self.dtype = edit.dtype if blocks is None else "F16"
        self.line = LINES[self.dtype]
        shape = edit.shape
        if blocks is not None:
            self.rows, self.columns = math.prod(shape) // blocks.elements, len(blocks.places)
            self.row_bytes = blocks.size
        else:
            self.rows, self.columns = (shape[0], math.prod(shape[1:])) if shape else (1, 1)
            if any(op.settings.experts and op.settings.expert < 0 for op in edit.operations):
                self.rows, self.columns = math.prod(shape[:-1]), shape[-1]
            self.row_bytes = self.columns * self.line.dtype.itemsize
        self.left = self.rows * self.row_bytes  # that are not checked yet
        self.loaded: Tensor | None = None
        self.decoded: Callable[[slice], Tensor] | None = None
        self.in_place = False
        if isinstance(edit.source, Decoded):
            self.decoded, self.kind = _decoder(edit.source, base, files), torch.float64
        elif isinstance(edit.source, BaseTensor | Original):
            whence = base
            if isinstance(edit.source, Original):
                assert original is not None
                whence = original
            info = whence.info(edit.source.name)
            self.path, self.begin = whence.shards[whence.where[info.name]].path, info.begin
            self.kind = SCALE_DTYPES[info.dtype if blocks is None else self.dtype]
            self.in_place = edit.source == BaseTensor(edit.tensor)
        else:
            assert isinstance(edit.source, Replacement)
            adapter = adapters[edit.source.adapter]
            part = adapter.tensors[edit.source.key]
            self.path, self.begin = adapter.weights, part.begin
            self.kind = SCALE_DTYPES[part.dtype]
            if part.end == part.begin:  # from a pickle, which is in memory already
                self.loaded = adapter.read(edit.source.key).view(self.rows, -1)
        self._references: list[Reference] | None = None
        self._lock = threading.Lock()

    @property
    def step(self) -> int:
        """Bytes that are checked at once."""
        if self.blocks is not None:
            return COPIED // self.row_bytes * self.row_bytes
        if self.columns > BLOCK:
            return BLOCK * self.line.dtype.itemsize
        return BLOCK // max(self.columns, 1) * self.row_bytes

    @property
    def unit(self) -> int:
        """Bytes whose end no such piece goes across: a row that is larger than a piece, or all."""
        return self.row_bytes if self.step < self.row_bytes else self.rows * self.row_bytes

    @property
    def grid(self) -> tuple[int, ...]:
        """The shape that the elements are numbered in."""
        return self.edit.shape if self.blocks is None else (self.rows, self.columns)

    def check(
        self, merged: memoryview, offset: int, own: memoryview | None, workspace: Workspace
    ) -> None:
        """Check whole rows, or a part of one, that begin at byte `offset`; `own` are the base's
        bytes there, if at hand."""
        references = self._prepare(workspace)
        row, count = offset // self.row_bytes, max(1, len(merged) // self.row_bytes)
        left, width = 0, self.columns
        if len(merged) < self.row_bytes:
            size = self.line.dtype.itemsize
            left, width = offset % self.row_bytes // size, len(merged) // size
        if own is None or not self.in_place:
            own = None
        if self.blocks is not None:
            stored, raw = self._unpack(self.blocks, merged, own, row, workspace)
        else:
            stored = torch.frombuffer(merged, dtype=self.line.dtype).view(count, width)
            raw = (
                self._read(row, count, workspace, left, width)
                if own is None
                else torch.frombuffer(own, dtype=self.kind).view(count, width)
            )
        doubts = []
        for rows, columns in _tiles(count, width, TILE, TILE_COLUMNS):
            there = slice(row + rows.start, row + rows.stop)
            across = slice(left + columns.start, left + columns.stop)
            source, found = raw[rows, columns], stored[rows, columns]
            x = workspace.tile("x", source, torch.float64)
            values = Values(_widen(source, x, workspace), workspace.tile("e", x, self._kind))
            for number, reference in enumerate(references):
                self._on_logical(number, reference.estimate, values, there, across)
            doubts.append(self._sieve(values, found, workspace, rows.start, columns.start))
        for doubt in _pieces(doubts):
            self._judge(references, doubt, raw, stored, (row, left))

    def exact(self, rows: slice, workspace: Workspace) -> Tensor:
        """float64 values of whole rows, as the contract tells them."""
        references = self._prepare(workspace)
        values = Values(self._read(rows.start, rows.stop - rows.start, workspace).double())
        for number, reference in enumerate(references):
            self._on_logical(number, reference.contract, values, rows, slice(0, self.columns))
        return values.x

    def done(self, count: int) -> None:
        """`count` bytes are checked: after the last of them the parts are forgotten."""
        with self._lock:
            self.left -= count
            if self.left <= 0:
                self._references = None

    # --- what the values are made of

    def _unpack(
        self,
        blocks: Blocks,
        merged: memoryview,
        own: memoryview | None,
        row: int,
        workspace: Workspace,
    ) -> tuple[Tensor, Tensor]:
        """The floats of the output's and of the base's blocks from `row` on. All other bits must be
        the same; the tally is told of those that are not."""
        if own is None:
            own = workspace.bytes("source", len(merged))
            self.files.read(self.path, own, self.begin + row * self.row_bytes)
        wrong = blocks.differ(merged, own)
        if len(wrong):
            at = (row + int(wrong[0])) * self.columns
            self.tally.add(len(wrong), (at, "other codes", "the base's codes"))
        return blocks.floats(merged), blocks.floats(own)

    def _read(
        self, row: int, count: int, workspace: Workspace, left: int = 0, width: int | None = None
    ) -> Tensor:
        """Stored rows of the source, or `width` columns of one from `left` on; of a quantized
        module their float64 values."""
        width = self.columns if width is None else width
        if self.decoded is not None:
            return self.decoded(slice(row, row + count))[:, left : left + width]
        if self.loaded is not None:
            return self.loaded[row : row + count, left : left + width]
        size = self.kind.itemsize
        view = workspace.bytes("source", count * width * size)
        self.files.read(self.path, view, self.begin + (row * self.columns + left) * size)
        return torch.frombuffer(view, dtype=self.kind).view(count, width)

    def _prepare(self, workspace: Workspace) -> list[Reference]:
        """The operations in order; the first worker that comes reads their parts."""
        with self._lock:
            if self._references is None:
                found: list[Reference] = []
                for number, operation in enumerate(self.edit.operations):
                    adapter = self.adapters[operation.adapter]
                    parts = parts_of(operation, adapter)
                    scaling = None
                    if self.scalings is not None and "lora_A" in parts:
                        rows = adapter.tensors[operation.parts["lora_A"]].shape[0]
                        rank = rank_of(operation, rows)
                        scaling = self.scalings(operation, rank)
                    reference = reference_of(operation, adapter.config, parts, self.dtype, scaling)
                    if isinstance(reference, LowRank) and reference.magnitude is not None:
                        self._norms(number, [*found, reference], workspace)
                    found.append(reference)
                if self.edit.exponent:
                    found.append(PowerOfTwo(self.edit.exponent))
                self._references = found
            return self._references

    def _norms(self, number: int, references: list[Reference], workspace: Workspace) -> None:
        """Tell DoRA, the last of the references, how long the rows are. Reads the whole source."""
        dora = references[-1]
        assert isinstance(dora, LowRank) and dora.magnitude is not None
        transposed = self.edit.operations[number].transposed
        sums = Sums(len(dora.magnitude))
        step = max(1, self.step // self.row_bytes)
        for row in range(0, self.rows, step):
            raw = self._read(row, min(step, self.rows - row), workspace)
            for rows, columns in _tiles(len(raw), self.columns, 4 * TILE, self.columns):
                there = slice(row + rows.start, row + rows.stop)
                values = Values(raw[rows].double())
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
        if number == len(self.edit.operations):
            return False
        operation = self.edit.operations[number]
        return operation.transposed and not operation.on_bias

    # --- the sieves

    @property
    def _kind(self) -> torch.dtype:
        """The dtype of bounds and distances: float32 resolves them for 16-bit elements."""
        return torch.float32 if self.line.width == 16 else torch.float64

    def _sieve(
        self, values: Values, found: Tensor, workspace: Workspace, row: int, column: int
    ) -> _Doubt:
        """The elements of a tile that are not surely right; its place in the block is given."""
        x, precision = values.x, self.line.precision
        # |x| is less than 2^(precision + 2) times the least distance
        margin = 2.0**-12 + values.relative * 2.0 ** (precision + 3)
        if margin >= 1:
            return _doubt(values, torch.arange(x.numel()), row, column)
        distance = _widen(found, workspace.tile("d", x, torch.float64), workspace)
        torch.sub(x, distance, out=distance)
        if self._kind != distance.dtype:
            distance = workspace.tile("t", x, self._kind).copy_(distance)
        distance.abs_()
        if values.error is not None:
            distance.add_(values.error, alpha=WIDER)
        limit = workspace.tile("h", x, self._kind)
        scratch = workspace.tile("s", x, self.line.integer)
        self.line.half_spacings(found, scratch, limit)
        limit.mul_(2.0**-precision * (1 - margin))
        # NumPy's comparison and search are several times faster than PyTorch's; NaN is not less
        near = np.less(distance.numpy(), limit.numpy(), out=workspace.flags(x).numpy())
        return _doubt(values, torch.from_numpy(np.flatnonzero(~near)), row, column)

    def _judge(
        self,
        references: list[Reference],
        doubt: _Doubt,
        raw: Tensor,
        stored: Tensor,
        corner: tuple[int, int],
    ) -> None:
        """Decide the doubtful elements of a block by its first row and column; tell the tally."""
        rows, columns = doubt.i, doubt.j
        places = self.line.stored(stored[rows, columns])
        low, high = self._ends(doubt.x, doubt.error, doubt.relative)
        if doubt.error is not None or doubt.relative:  # only the contract tells the sign of a zero
            zero = doubt.x == 0
            low, high = low.where(~zero, low.clamp(max=-1)), high.where(~zero, high.clamp(min=0))
        finite = self.line.finite(places)
        open_ = ((low <= places) & (places <= high) & (low != high) & finite).nonzero().flatten()
        if len(open_):
            i, j = rows[open_], columns[open_]
            places_there = i + corner[0], j + corner[1]
            low[open_], high[open_] = exact = self._settled(references, raw[i, j], *places_there)
            self.tally.add(undecided=int((exact[0] != exact[1]).sum()))
        wrong = ((places < low) | (places > high) | ~finite).nonzero().flatten()
        if len(wrong):
            i, j = rows[wrong], columns[wrong]
            self._report(references, raw, stored, i, j, corner, low[wrong], high[wrong])

    def _report(
        self,
        references: list[Reference],
        raw: Tensor,
        stored: Tensor,
        i: Tensor,
        j: Tensor,
        corner: tuple[int, int],
        low: Tensor,
        high: Tensor,
    ) -> None:
        """Tell the tally of the elements [i, j] of a block, which lie outside of low and high."""
        places = self.line.stored(stored[i, j])
        nearest = torch.minimum(torch.maximum(places, low), high)
        like_base = 0
        if isinstance(self.edit.source, BaseTensor) and raw.dtype == stored.dtype:
            like_base = int((self.line.stored(raw[i, j]) == places).sum())
        at = int((i * self.columns + j).argmin())
        one = slice(at, at + 1)
        there = i + corner[0], j + corner[1]
        must = self._settled(references, raw[i[one], j[one]], there[0][one], there[1][one])[0]
        first = (
            int(there[0][at]) * self.columns + int(there[1][at]),
            repr(self.line.number(int(places[at]))),
            repr(self.line.number(int(must))),
        )
        self.tally.add(len(i), first, like_base, int(((places - nearest).abs() == 1).sum()))

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
        place = self.line.rounded(x)
        if error is None and not relative:
            return place, place.clone()
        bound = x.abs() * relative if error is None else x.abs() * relative + error
        bound = bound * WIDER + x.abs() * STEP  # x -+ bound is rounded too
        known = bound == 0
        low, high = self.line.rounded(x - bound), self.line.rounded(x + bound)
        return torch.where(known, place, low), torch.where(known, place, high)


def _decoder(source: Decoded, base: Checkpoint, files: InputFiles) -> Callable[[slice], Tensor]:
    parts = {part: stored_matrix(base, files, name) for part, name in source.parts}
    return lambda rows: decode(source.form, parts, source.scheme, rows)


@dataclass(frozen=True)
class _Doubt:
    """Elements of a block that one sieve could not decide, with their values and bounds."""

    i: Tensor  # rows and columns, within the block
    j: Tensor
    x: Tensor
    error: Tensor | None
    relative: float


def _doubt(values: Values, numbers: Tensor, row: int, column: int) -> _Doubt:
    """Elements of a tile by their numbers; they are kept while the next tile takes its buffers."""
    width = values.x.shape[1]
    i, j = numbers // width, numbers % width
    error = None if values.error is None else values.error[i, j]
    return _Doubt(i + row, j + column, values.x[i, j], error, values.relative)


def _pieces(doubts: list[_Doubt]) -> Iterator[_Doubt]:
    """The doubts of all tiles of a block, at most JUDGED elements at once."""
    i, j, x = (torch.cat([getattr(d, name) for d in doubts]) for name in ("i", "j", "x"))
    errors = [doubt.error for doubt in doubts if doubt.error is not None]
    error = torch.cat(errors) if errors else None  # all tiles have bounds, or none has
    relative = max(doubt.relative for doubt in doubts)
    for start in range(0, len(x), JUDGED):
        part = slice(start, start + JUDGED)
        yield _Doubt(i[part], j[part], x[part], None if error is None else error[part], relative)


def _tiles(rows: int, columns: int, size: int, width: int) -> Iterator[tuple[slice, slice]]:
    """A block of whole rows in tiles of at most `size` elements and `width` columns, or more of
    these where it has too few rows to fill a tile."""
    width = max(1, min(columns, max(width, size // max(rows, 1))))
    height = max(1, size // width)
    for row in range(0, rows, height):
        for column in range(0, columns, width):
            yield (
                slice(row, min(row + height, rows)),
                slice(column, min(column + width, columns)),
            )


def _widen(source: Tensor, out: Tensor, workspace: Workspace) -> Tensor:
    """Stored elements as float64, into `out`. float16 by way of float32, which is faster."""
    if source.dtype == torch.float16:
        source = workspace.tile("t", source, torch.float32).copy_(source)
    return out.copy_(source)
