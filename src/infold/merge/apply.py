"""One edit on blocks of one tensor: decode, float64, the operations in order, round once.

Blocks are cut into tiles that stay in the processor's cache, and all buffers are reused: fresh
ones would cost as much in page faults as the arithmetic.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from infold.adapters import METHODS, Prepared
from infold.adapters.exact import LEAF, Index
from infold.checkpoint.adapter import Adapter
from infold.errors import Refusal
from infold.formats import dense
from infold.plan.edits import Edit

__all__ = ["Block", "EditRun", "Workspace", "matrix"]

TILE = 192 << 10  # elements; smaller ones cost more in calls than they gain in the cache
TILE_COLUMNS = 1536
_FEW = 64  # midpoints of a block that are settled one by one; more means a pattern in the data


def matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """A stored shape as (rows, columns) of a matrix; a vector is a column."""
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


@dataclass(frozen=True, slots=True)
class Block:
    """Rows and columns of a stored matrix. Columns are all of them unless a row is very long."""

    row: int
    rows: int
    column: int
    columns: int

    @property
    def count(self) -> int:
        return self.rows * self.columns


def cut(rows: int, columns: int, limit: int) -> Iterator[Block]:
    """Blocks of at most `limit` elements, in storage order."""
    if columns > limit:
        step = limit // LEAF * LEAF
        for row in range(rows):
            for column in range(0, columns, step):
                yield Block(row, 1, column, min(step, columns - column))
        return
    step = max(1, limit // max(columns, 1))
    if step >= LEAF:
        step = step // LEAF * LEAF
    for row in range(0, rows, step):
        yield Block(row, min(step, rows - row), 0, columns)


class Workspace:
    """The buffers of one worker."""

    def __init__(self, device: torch.device, limit: int) -> None:
        self.device = device
        self.tile = TILE if device.type == "cpu" else limit
        self.tile_columns = TILE_COLUMNS if device.type == "cpu" else limit
        self.values = torch.empty(self.tile, dtype=torch.float64, device=device)
        self.staged = torch.empty(0, dtype=torch.float32, device=device)
        self.flags = torch.zeros(0, dtype=torch.int64, device=device)

    def stage(self, block: Block) -> Tensor:
        """A float32 buffer in the shape of the block."""
        if self.staged.numel() < block.count:
            self.staged = torch.empty(block.count, dtype=torch.float32, device=self.device)
        return self.staged[: block.count].view(block.rows, block.columns)

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


class EditRun:
    """One edit with its parts in memory, shared by the workers; the first that comes prepares."""

    def __init__(self, edit: Edit, adapters: tuple[Adapter, ...], device: torch.device) -> None:
        self.edit, self.adapters, self.device = edit, adapters, device
        self.shape = matrix(edit.shape)
        self.changed = 0
        self._ready: list[Prepared] | None = None
        self._lock = threading.Lock()

    def prepare(self, workspace: Workspace, read: Callable[[Block], Tensor], limit: int) -> None:
        """Load the parts; where a method asks for it, show it the whole weight first."""
        with self._lock:
            if self._ready is not None:
                return
            ready: list[Prepared] = []
            for op in self.edit.operations:
                parts = {
                    part: self.adapters[op.adapter].read(key).to(self.device)
                    for part, key in op.parts.items()
                }
                prepared = METHODS[op.method].prepare(parts, op.settings)
                if prepared.observes and not op.on_bias:
                    # a transposed weight shows its inputs as rows: whole leaves of them at once
                    whole = max(limit, LEAF * self.shape[1]) if op.transposed else limit
                    for block in cut(*self.shape, whole):
                        raw = read(block).to(self.device)
                        for rows, columns in self._strips(block, workspace):
                            x = self._values(raw, block, rows, columns, workspace, ready)
                            prepared.observe(*self._logical(x, rows, columns, len(ready)))
                ready.append(prepared)
            self._ready = ready

    def release(self) -> None:
        """Forget the parts."""
        self._ready = None

    def run(self, raw: Tensor, out: Tensor, block: Block, workspace: Workspace) -> None:
        """Compute one block: `raw` as it is stored in the source, `out` as it will be stored."""
        assert self._ready is not None
        target = out if out.device == self.device else torch.empty_like(out, device=self.device)
        # bfloat16 is reached through float32, which is kept to find the midpoints in
        through = workspace.stage(block) if target.dtype == torch.bfloat16 else target
        for rows, columns in _tiles(block, workspace):
            x = self._values(raw, block, rows, columns, workspace, self._ready)
            dense.narrow(x, through[_within(block, rows, columns)])
        if through is not target:
            target.copy_(through)
            self._settle(raw, target, through, block, workspace)
        changed = block.count
        if raw.dtype == target.dtype:
            changed = workspace.count_changed(target, raw)
        if not math.isfinite(target.sum().item()):  # inf and NaN survive a sum; see below
            self._refuse_non_finite(raw, target, block)
        if target is not out:
            out.copy_(target)
        with self._lock:
            self.changed += changed

    def _values(
        self,
        raw: Tensor,
        block: Block,
        rows: Index,
        columns: Index,
        workspace: Workspace,
        ready: list[Prepared],
    ) -> Tensor:
        """float64 values of the rows and columns (numbered in the tensor) after `ready`."""
        if isinstance(rows, slice) and isinstance(columns, slice):
            source = raw[_within(block, rows, columns)]
        else:
            assert isinstance(rows, Tensor) and isinstance(columns, Tensor)
            source = raw[rows - block.row][:, columns - block.column]
        count = source.numel()
        buffer = workspace.values[:count] if count <= workspace.values.numel() else None
        x = (
            torch.empty(count, dtype=torch.float64, device=self.device)
            if buffer is None
            else buffer
        )
        x = x.view(source.shape)
        x.copy_(source)
        for number, prepared in enumerate(ready):
            logical, out_index, in_index = self._logical(x, rows, columns, number)
            if self.edit.operations[number].on_bias:
                for vector in logical.unbind(1):  # one, but a grid of midpoints repeats it
                    prepared.bias(vector, out_index)
            else:
                prepared.weight(logical, out_index, in_index)
        return x

    def _logical(
        self, x: Tensor, rows: Index, columns: Index, number: int
    ) -> tuple[Tensor, Index, Index]:
        """A stored block as a block of the logical (out, in) matrix of one operation."""
        if self.edit.operations[number].transposed:
            return x.t(), columns, rows
        return x, rows, columns

    def _strips(self, block: Block, workspace: Workspace) -> Iterator[tuple[slice, slice]]:
        """Tiles for `observe`: cut at multiples of LEAF in either direction, inputs ascending."""
        columns = min(block.columns, max(LEAF, workspace.tile_columns // LEAF * LEAF))
        rows = max(LEAF, workspace.tile // columns // LEAF * LEAF)
        for row in range(block.row, block.row + block.rows, rows):
            for column in range(block.column, block.column + block.columns, columns):
                yield (
                    slice(row, min(row + rows, block.row + block.rows)),
                    slice(column, min(column + columns, block.column + block.columns)),
                )

    def _settle(
        self, raw: Tensor, target: Tensor, staged: Tensor, block: Block, workspace: Workspace
    ) -> None:
        """Round the elements right whose float32 step came to lie halfway between two bfloat16."""
        assert self._ready is not None
        rows, columns = dense.midpoints(staged)
        if not len(rows):
            return
        if len(rows) > _FEW:
            for tile_rows, tile_columns in _tiles(block, workspace):
                x = self._values(raw, block, tile_rows, tile_columns, workspace, self._ready)
                target[_within(block, tile_rows, tile_columns)] = dense.encode(x, self.edit.dtype)
            return
        grid = self._values(
            raw, block, rows + block.row, columns + block.column, workspace, self._ready
        )
        target[rows, columns] = dense.encode(grid.diagonal(), self.edit.dtype)

    def _refuse_non_finite(self, raw: Tensor, target: Tensor, block: Block) -> None:
        bad = ~torch.isfinite(target)
        if not bad.any():
            return  # only the sum overflowed
        row, column = bad.nonzero()[0].tolist()
        was = float(raw[row, column])
        why = (
            f"the base holds {was} there"
            if not math.isfinite(was)
            else f"the merged value does not fit {self.edit.dtype}"
        )
        where = f"{self.edit.tensor}[{block.row + row}, {block.column + column}]"
        raise Refusal(
            f"{where}: {why}. Nothing was written; check the adapter's scale, or use a base in F32"
        )


def _tiles(block: Block, workspace: Workspace) -> Iterator[tuple[slice, slice]]:
    columns = max(1, min(block.columns, workspace.tile_columns))
    rows = max(1, workspace.tile // columns)
    for row in range(block.row, block.row + block.rows, rows):
        for column in range(block.column, block.column + block.columns, columns):
            yield (
                slice(row, min(row + rows, block.row + block.rows)),
                slice(column, min(column + columns, block.column + block.columns)),
            )


def _within(block: Block, rows: slice, columns: slice) -> tuple[slice, slice]:
    """Rows and columns of the tensor as rows and columns of the block."""
    return (
        slice(rows.start - block.row, rows.stop - block.row),
        slice(columns.start - block.column, columns.stop - block.column),
    )
