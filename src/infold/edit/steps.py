"""The steps of one edit on a block: decode, float64, each step in order, round once.

Where it can, `compiled` does this. Here PyTorch does: tiles of the block stay in the processor's
cache, and all buffers are reused, since fresh ones would cost as much in page faults as the
arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from infold.adapters import Prepared
from infold.adapters.exact import Index
from infold.edit import compiled
from infold.edit.blocks import Block, strips, tiles, within
from infold.errors import NotFinite
from infold.formats import FORMATS, Format

__all__ = [
    "Step",
    "Target",
    "Workspace",
    "backward",
    "check_finite",
    "compute",
    "exact",
    "guess",
    "observers",
    "show",
]

TILE = 288 << 10  # elements; smaller ones cost more in calls than they gain in the cache
TILE_COLUMNS = 1536
_LARGEST = torch.finfo(torch.float8_e4m3fn).max


@dataclass(frozen=True, slots=True)
class Step:
    """One prepared method, and how the tensor it changes is stored."""

    prepared: Prepared
    transposed: bool = False  # stored as (in, out): Conv1D, embeddings
    on_bias: bool = False  # the tensor is the bias (out,), seen as a column

    def logical(self, x: Tensor, rows: Index, columns: Index) -> tuple[Tensor, Index, Index]:
        """A stored block as a block of the method's logical (out, in) matrix."""
        return (x.t(), columns, rows) if self.transposed else (x, rows, columns)

    def change(self, x: Tensor, rows: Index, columns: Index) -> None:
        """Change stored rows and columns, float64, in place."""
        x, outputs, inputs = self.logical(x, rows, columns)
        if self.on_bias:
            self.prepared.bias(x[:, 0], outputs)
        else:
            self.prepared.weight(x, outputs, inputs)


@dataclass(frozen=True, slots=True)
class Target:
    """What is computed: the tensor's name for messages, its stored dtype and that one's format."""

    name: str
    dtype: str
    form: Format


class Workspace:
    """The buffers of one worker. `limit` is the number of elements of its largest block."""

    def __init__(self, device: torch.device, limit: int) -> None:
        self.device = device
        self.tile = TILE if device.type == "cpu" else limit
        self.tile_columns = TILE_COLUMNS if device.type == "cpu" else limit
        self.values = torch.empty(self.tile, dtype=torch.float64, device=device)
        self.staged = torch.empty(0, dtype=torch.float32, device=device)
        self.flags = torch.zeros(0, dtype=torch.int64, device=device)
        self.blocks: dict[str, Tensor] = {}

    def stage(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """A buffer of that shape for what is on its way to the stored dtype."""
        count = shape.numel()
        if self.staged.numel() < count or self.staged.dtype != dtype:
            self.staged = torch.empty(max(count, self.tile), dtype=dtype, device=self.device)
        return self.staged[:count].view(shape)

    def block(self, name: str, block: Block, dtype: torch.dtype) -> Tensor:
        """A named buffer for a whole block, on the CPU; valid until it is asked for again."""
        size = block.count * dtype.itemsize
        kept = self.blocks.get(name)
        if kept is None or kept.numel() < size:
            kept = self.blocks[name] = torch.empty(size, dtype=torch.uint8)
        return kept[:size].view(dtype).view(block.rows, block.columns)

    def floats(self, shape: torch.Size) -> Tensor:
        """A float64 buffer of any shape; one that is larger than a tile is not kept."""
        count = shape.numel()
        if count > self.values.numel():
            return torch.empty(shape, dtype=torch.float64, device=self.device)
        return self.values[:count].view(shape)

    def count_changed(self, new: Tensor, old: Tensor) -> int:
        """How many elements of two equally typed matrices differ in their bits."""
        if new.element_size() != 2:
            return int(torch.count_nonzero(new != old))
        # comparing into 16-bit flags, and adding four of them at a time, is several times faster
        count = new.numel()
        lanes = -(-count // 4)
        if self.flags.numel() < lanes:
            self.flags = torch.zeros(lanes, dtype=torch.int64, device=self.device)
        flags = self.flags.view(torch.int16)
        torch.ne(new.view(torch.int16), old.view(torch.int16), out=flags[:count].view(new.shape))
        flags[count : 4 * lanes] = 0
        total = 0
        for start in range(0, lanes, 0xFFFF):  # so that no sixteen bits overflow
            packed = int(self.flags[start : min(start + 0xFFFF, lanes)].sum())
            total += sum(packed >> shift & 0xFFFF for shift in (0, 16, 32, 48))
        return total


def observers(steps: Sequence[Step]) -> Iterator[tuple[Step, Sequence[Step]]]:
    """The steps that must see the whole weight first, each with the steps before it.

    In this order, and before any block is computed, the whole weight is to be passed to `show`.
    """
    for number, step in enumerate(steps):
        if step.prepared.observes and not step.on_bias:
            yield step, steps[:number]


def show(
    step: Step,
    before: Sequence[Step],
    raw: Tensor,
    block: Block,
    target: Target,
    workspace: Workspace,
) -> None:
    """Let a step observe one block of the stored tensor, as the steps before it leave it.

    Blocks that share outputs come in the order of their inputs, cut at multiples of LEAF there.
    """
    for rows, columns in strips(block, workspace.tile, workspace.tile_columns):
        here = within(block, rows, columns)
        x = _values(before, raw[here], rows, columns, target, workspace)
        step.prepared.observe(*step.logical(x, rows, columns))


def compute(
    steps: Sequence[Step],
    raw: Tensor,
    out: Tensor,
    block: Block,
    target: Target,
    workspace: Workspace,
    back: Sequence[Step] = (),
    near: Tensor | None = None,
) -> int | None:
    """Compute one block: `raw` (rows, columns) as it is stored, into `out` of the same shape.

    `near`, where given, gets what `guess` makes of `out` by the steps `back`. Tile by tile that is
    cheaper, since what a step has computed for a tile is still there on the way back.

    Returns how many elements of `out` differ from `raw`, where that was counted on the way. Raises
    NotFinite where a value of `out` is not finite.
    """
    if _plain(target):
        changed = compiled.edit(steps, back, raw, out, near, *_numbers(block))
        if changed is not None:
            return changed
    late: list[_Late] = []
    for rows, columns in tiles(block, workspace.tile, workspace.tile_columns):
        here = within(block, rows, columns)
        x = _values(steps, raw[here], rows, columns, target, workspace)
        late += _store(x, out[here], target, workspace)
        if near is not None or sum(one.values.numel() for one in late) >= workspace.tile // 4:
            _settle(late, target)
        if near is not None:
            x = _values(back, out[here], rows, columns, target, workspace)
            _store_nearly(x, near[here], workspace)
    _settle(late, target)
    if near is not None:
        _all_finite(near)
    check_finite(raw, out, block, target)
    return None


def exact(
    steps: Sequence[Step], raw: Tensor, block: Block, target: Target, workspace: Workspace
) -> Tensor:
    """float64 values of a block after the steps, which nothing has rounded; in their own memory."""
    x = torch.empty(raw.shape, dtype=torch.float64, device=raw.device)
    for rows, columns in tiles(block, workspace.tile, workspace.tile_columns):
        here = within(block, rows, columns)
        x[here] = _values(steps, raw[here], rows, columns, target, workspace)
    return x


def check_finite(raw: Tensor, out: Tensor, block: Block, target: Target) -> None:
    """Refuse where a value of `out` is not finite. `raw`: what it was made of."""
    if not math.isfinite(_summed(out)):  # inf and NaN survive a sum; see below
        _refuse_non_finite(raw, out, block, target)


def backward(steps: Sequence[Step]) -> list[Step] | None:
    """The steps that take a merged tensor near to its base; None where a method knows none.

    Methods that observe must have seen the weight.
    """
    back = []
    for step in reversed(steps):
        inverse = step.prepared.inverse()
        if inverse is None:
            return None
        back.append(replace(step, prepared=inverse))
    return back


def guess(
    back: Sequence[Step],
    merged: Tensor,
    out: Tensor,
    block: Block,
    target: Target,
    workspace: Workspace,
) -> None:
    """The base's block, or nearly, into `out`, by the steps of `backward`. As with `compute`, the
    bits are the same everywhere; but they are rounded twice, and what is not finite becomes 0."""
    if _plain(target) and compiled.edit((), back, merged, None, out, *_numbers(block)) is not None:
        return
    for rows, columns in tiles(block, workspace.tile, workspace.tile_columns):
        here = within(block, rows, columns)
        x = _values(back, merged[here], rows, columns, target, workspace)
        _store_nearly(x, out[here], workspace)
    _all_finite(out)


def _all_finite(near: Tensor) -> None:
    if not math.isfinite(_summed(near)):
        near.copy_(torch.where(_wide(near).isfinite(), _wide(near), 0))  # NaN has many bit patterns


def _plain(target: Target) -> bool:
    return target.form is FORMATS["dense"]


def _numbers(block: Block) -> tuple[slice, slice]:
    """The rows and columns of the tensor that a block holds."""
    return (
        slice(block.row, block.row + block.rows),
        slice(block.column, block.column + block.columns),
    )


def _wide(x: Tensor) -> Tensor:
    """Elements of one byte as float32, since PyTorch computes nothing on them."""
    return x.float() if x.element_size() == 1 else x


def _summed(x: Tensor) -> float:
    return _wide(x).sum().item()


class _Late(NamedTuple):
    """Columns of a tile that may be rounded twice, and their float64 values."""

    out: Tensor
    columns: Tensor
    values: Tensor


def _store(x: Tensor, out: Tensor, target: Target, workspace: Workspace) -> list[_Late]:
    """float64 values of a tile into its stored elements, rounded once but for what is returned."""
    form = target.form
    staging = form.staging(target.dtype)
    if staging == out.dtype:
        form.narrow(x, out)
        return []
    staged = workspace.stage(out.shape, staging)
    form.narrow(x, staged)
    columns = form.finish(staged, out)
    return [_Late(out, columns, x.index_select(1, columns))] if len(columns) else []


def _settle(late: list[_Late], target: Target) -> None:
    """Round what `_store` returned. For several tiles together: the few elements of one cost as
    many calls of PyTorch as all the others."""
    if late:
        values = torch.cat([one.values.flatten() for one in late])
        rounded = target.form.encode(values, target.dtype)
        sizes = [one.values.numel() for one in late]
        for one, part in zip(late, torch.split(rounded, sizes), strict=True):
            one.out.index_copy_(1, one.columns, part.view(one.values.shape))
        late.clear()


def _store_nearly(x: Tensor, out: Tensor, workspace: Workspace) -> None:
    """As `_store`, by the quickest way whose bits are the same everywhere."""
    if out.element_size() == 2:
        staged = workspace.stage(out.shape, torch.float32)
        staged.copy_(x)
        x = staged
    elif out.element_size() == 1:
        x.clamp_(-_LARGEST, _LARGEST)  # beyond, it depends on PyTorch's version
    out.copy_(x)


def _values(
    steps: Sequence[Step],
    stored: Tensor,
    rows: Index,
    columns: Index,
    target: Target,
    workspace: Workspace,
) -> Tensor:
    """float64 values of the rows and columns (numbered in the tensor) after the steps."""
    x = workspace.floats(stored.shape)
    target.form.decode(stored, x)
    for step in steps:
        step.change(x, rows, columns)
    return x


def _refuse_non_finite(raw: Tensor, out: Tensor, block: Block, target: Target) -> None:
    bad = ~torch.isfinite(_wide(out))
    if not bad.any():
        return  # only the sum overflowed
    row, column = bad.nonzero()[0].tolist()
    was = float(raw[row, column])
    why = (
        f"the base holds {was} there"
        if not math.isfinite(was)
        else f"the merged value does not fit {target.dtype}"
    )
    place = block.row + row, block.column + column
    way = "use a base in F32"
    if out.element_size() == 1:  # quantizers give the largest block of a weight the largest scale
        way = "merge into the unquantized model: the largest blocks have no room above them"
    where = f"{target.name}[{place[0]}, {place[1]}]"
    raise NotFinite(target.name, place, where, why, f"check the adapter's scale, or {way}")
