"""LoRA on the experts of a layer, whose weights are one parameter (PEFT's `target_parameters`).

The parameter is (experts, out, in), and the factors of all experts lie in two matrices,

    lora_A (experts * r, in)     an expert's rows are together
    lora_B (out, r * experts)    an expert's columns are `experts` apart

so that  W'_e = W_e + s B_e A_e. Where the model stores (experts, in, out), each W_e is that
transposed. As a matrix the parameter has a row for each expert. On disk the experts can be weights
of their own, and parts of the outputs too, gate before up: each of these is like any other weight.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from infold.adapters.exact import Index
from infold.adapters.operations import Operation
from infold.adapters.settings import Settings

if TYPE_CHECKING:
    from infold.adapters.lora import LowRank

__all__ = ["KEPT", "Stacked", "apart", "updated"]

KEPT = 8  # experts whose factors are kept on their grid; blocks come in the order of the experts


def apart(parts: Mapping[str, Tensor], settings: Settings) -> tuple[Tensor, Tensor]:
    """The factors by expert: A (experts, r, in), B (experts, out, r)."""
    a, b = parts["lora_A"], parts["lora_B"]
    return (
        a.reshape(settings.experts, -1, a.shape[1]),
        b.reshape(b.shape[0], -1, settings.experts).permute(2, 0, 1),
    )


def updated(weight: Tensor, parts: Mapping[str, Tensor], settings: Settings) -> Tensor:
    """The activation side: a parameter with its update, in its own dtype, as it is to be used.
    One of two dimensions is a matrix like any other."""
    a, b = (parts[name].to(weight.dtype) for name in ("lora_A", "lora_B"))
    with torch.autocast(weight.device.type, enabled=False):
        if not settings.experts:
            return torch.addmm(weight, b, a, alpha=settings.scaling)
        a, b = apart({"lora_A": a, "lora_B": b}, settings)
        left, right = (a.mT, b.mT) if settings.flipped else (b, a)
        return torch.baddbmm(weight, left, right, alpha=settings.scaling)


class Stacked:
    """W_e + s B_e A_e of all experts, each a stored row."""

    observes = False
    observed: Tensor | None = None

    def __init__(
        self,
        a: Tensor,
        b: Tensor,
        settings: Settings,
        make: Callable[[Tensor, Tensor], LowRank],
    ) -> None:
        """make: the update of one expert, from its factors."""
        self.a, self.b, self.make = a, b, make
        self.width, self.flipped = settings.width, settings.flipped
        self.sign = 1
        self._made: dict[int, LowRank] = {}
        self._lock = threading.Lock()

    def inverse(self) -> Stacked:
        back = copy.copy(self)  # it shares what was made of the factors
        back.sign = -self.sign
        return back

    def observe(self, x: Tensor, rows: Index, cols: Index) -> None: ...

    def recall(self, observed: Tensor) -> None: ...

    def weight(self, x: Tensor, rows: Index, cols: Index) -> None:
        assert isinstance(rows, slice) and isinstance(cols, slice)
        columns = range(*cols.indices(self.a.shape[2] * self.b.shape[1]))
        for number, expert in enumerate(range(*rows.indices(len(self.a)))):
            update = self._expert(expert)
            for here, outer, inner in pieces(columns.start, columns.stop, self.width):
                part = x[number, here].view(outer.stop - outer.start, -1)
                if self.flipped:
                    update.weight(part.t(), inner, outer)
                else:
                    update.weight(part, outer, inner)

    def _expert(self, number: int) -> LowRank:
        with self._lock:
            update = self._made.get(number)
            if update is None:
                if len(self._made) == KEPT:
                    del self._made[next(iter(self._made))]
                update = self._made[number] = self.make(self.a[number], self.b[number])
        return update if self.sign > 0 else update.inverse()

    def operations(self, rows: slice, cols: slice) -> Sequence[Operation] | None:
        return None

    def bias(self, x: Tensor, rows: Index) -> None:
        raise AssertionError("an update of experts changes no bias")


def pieces(start: int, stop: int, width: int) -> Iterator[tuple[slice, slice, slice]]:
    """Elements start to stop of a matrix that is stored row after row of `width`, as rectangles:
    their place from `start` on, their rows and their columns."""
    place = start
    while place < stop:
        row, column = divmod(place, width)
        count = (stop - place) // width if not column else 0
        if count:
            end = place + count * width
            yield slice(place - start, end - start), slice(row, row + count), slice(0, width)
        else:
            end = min(stop, place - column + width)
            columns = slice(column, column + end - place)
            yield slice(place - start, end - start), slice(row, row + 1), columns
        place = end
