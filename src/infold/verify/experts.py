"""LoRA on experts that are one tensor, a stored row each, stated anew."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from infold.adapters import Settings
from infold.verify.values import STEP, Values

if TYPE_CHECKING:
    from infold.verify.reference import LowRank

__all__ = ["Experts", "factors_of"]

_KEPT = 8  # references of experts


def factors_of(expert: int, a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(r, in) and (out, r): an expert's rows of A are together, its columns of B are not."""
    return a[expert * rank : (expert + 1) * rank], b[:, expert :: len(a) // rank]


class Experts:
    """W_e + s B_e A_e for each of them. A tile of stored rows is cut into rectangles of experts."""

    def __init__(
        self,
        a: Tensor,
        b: Tensor,
        rank: int,
        settings: Settings,
        make: Callable[[Tensor, Tensor], LowRank],
    ) -> None:
        self.a, self.b, self.rank, self.make = a, b, rank, make
        self.width, self.flipped = settings.width, settings.flipped
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
        outputs, inputs = j // self.width, j % self.width
        if self.flipped:
            outputs, inputs = inputs, outputs
        delta = torch.zeros_like(values.x)
        for expert in sorted(set(i.tolist())):
            mine = i == expert
            delta[mine] = self._of(expert).update(outputs[mine], inputs[mine])
        values.add(delta)

    def _parts(
        self, values: Values, rows: slice, columns: slice
    ) -> Iterator[tuple[LowRank, Values, slice, slice]]:
        """Rectangles of single experts in a tile, whose values and bounds are the tile's memory."""
        for number, expert in enumerate(range(rows.start, rows.stop)):
            edges = [columns.start, columns.stop]
            first, last = -(-edges[0] // self.width), edges[1] // self.width
            if first <= last:  # a part of a row, whole rows, and a part again
                edges[1:1] = [first * self.width, last * self.width]
            for begin, end in pairwise(edges):
                if begin == end:
                    continue
                here = slice(begin - columns.start, end - columns.start)
                height = max(1, (end - begin) // self.width)
                part = Values(values.x[number, here].view(height, -1))
                if values.error is not None:
                    part.error = values.error[number, here].view(height, -1)
                outer = slice(begin // self.width, begin // self.width + height)
                column = begin % self.width
                inner = slice(column, column + (end - begin) // height)
                if self.flipped:
                    yield self._of(expert), part.t(), inner, outer
                else:
                    yield self._of(expert), part, outer, inner

    def _of(self, expert: int) -> LowRank:
        with self._lock:
            if expert not in self._made:
                if len(self._made) == _KEPT:
                    del self._made[next(iter(self._made))]
                self._made[expert] = self.make(*factors_of(expert, self.a, self.b, self.rank))
            return self._made[expert]
