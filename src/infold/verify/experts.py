"""LoRA on experts that are one tensor, or share the tensors of an adapter, stated anew."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from infold.adapters import Settings
from infold.checkpoint.adapter import Adapter
from infold.plan.edits import Operation
from infold.verify.values import STEP, Values

if TYPE_CHECKING:
    from infold.verify.reference import LowRank

__all__ = ["Experts", "parts_of"]

_KEPT = 8  # references of experts


def _factors_of(expert: int, a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(r, in) and (out, r): an expert's rows of A are together, its columns of B are not."""
    return a[expert * rank : (expert + 1) * rank], b[:, expert :: len(a) // rank]


def parts_of(operation: Operation, adapter: Adapter) -> dict[str, Tensor]:
    """What `reference_of` takes: the parts, and for a weight of one expert what is its own."""
    settings, keys = operation.settings, operation.parts
    if settings.expert < 0:
        return {part: adapter.read(key) for part, key in keys.items()}
    rank = adapter.tensors[keys["lora_A"]].shape[0] // settings.experts
    columns = torch.arange(rank) * settings.experts + settings.expert
    b = adapter.kept(keys["lora_B"])[:, columns]
    return {
        "lora_A": adapter.rows(keys["lora_A"], rank * settings.expert, rank),
        "lora_B": b[settings.first : settings.first + settings.out].clone(),
    }


class Experts:
    """W_e + s B_e A_e for each of them, one below the other as they are stored."""

    def __init__(
        self,
        a: Tensor,
        b: Tensor,
        rank: int,
        settings: Settings,
        make: Callable[[Tensor, Tensor], LowRank],
    ) -> None:
        self.a, self.b, self.rank, self.make = a, b, rank, make
        self.flipped = settings.flipped
        self.height = a.shape[1] if self.flipped else len(b)  # stored rows of one
        self._made: dict[int, LowRank] = {}
        self._lock = threading.Lock()

    def estimate(self, values: Values, rows: slice, columns: slice) -> None:
        values.fix()
        if values.error is None:
            spare = values.spare
            values.error = torch.zeros_like(values.x) if spare is None else spare.zero_()
        for one, part, outputs, inputs in self._parts(values, rows, columns):
            one.estimate(part, outputs, inputs)
            values.relative = part.relative

    def contract(self, values: Values, rows: slice, columns: slice) -> None:
        values.fix()
        for one, part, outputs, inputs in self._parts(values, rows, columns):
            one.contract(part, outputs, inputs)
        values.relative = 0.0 if values.error is None else STEP

    def settle(self, values: Values, i: Tensor, j: Tensor) -> None:
        experts, rows = i // self.height, i % self.height
        outputs, inputs = (j, rows) if self.flipped else (rows, j)
        delta = torch.zeros_like(values.x)
        for expert in sorted(set(experts.tolist())):
            mine = experts == expert
            delta[mine] = self._of(expert).update(outputs[mine], inputs[mine])
        values.add(delta)

    def _parts(
        self, values: Values, rows: slice, columns: slice
    ) -> Iterator[tuple[LowRank, Values, slice, slice]]:
        """The experts of a tile, whose values and bounds are the tile's memory."""
        row = rows.start
        while row < rows.stop:
            expert, first = divmod(row, self.height)
            count = min(self.height - first, rows.stop - row)
            here = slice(row - rows.start, row - rows.start + count)
            part = Values(values.x[here])
            if values.error is not None:
                part.error = values.error[here]
            mine = slice(first, first + count)
            if self.flipped:
                yield self._of(expert), part.t(), columns, mine
            else:
                yield self._of(expert), part, mine, columns
            row += count

    def _of(self, expert: int) -> LowRank:
        with self._lock:
            if expert not in self._made:
                if len(self._made) == _KEPT:
                    del self._made[next(iter(self._made))]
                self._made[expert] = self.make(*_factors_of(expert, self.a, self.b, self.rank))
            return self._made[expert]
