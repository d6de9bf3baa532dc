"""DoRA (Liu et al. 2024, arXiv 2402.09353): LoRA with a learned length for each output.

    W' = m / ||W + s B A||  *  (W + s B A),    the norm over each row of the logical matrix

`lora_magnitude_vector` is m, one element per output. The norm is a reduction, so it is summed in
the fixed order of `exact.squares`; `exact.root` and division are correctly rounded everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from infold.adapters import lora
from infold.adapters.exact import Index, root, squares
from infold.adapters.layer import Base, Dropout, Geometry
from infold.adapters.lora import LowRank
from infold.adapters.operations import Operation, ScaleOutputs
from infold.adapters.settings import Settings

PARTS: tuple[str, ...] = ("lora_A", "lora_B", "lora_magnitude_vector")
REQUIRED: tuple[str, ...] = PARTS
ON_BIAS: tuple[str, ...] = ()
TABLE: Mapping[str, str] = lora.TABLE
KEYS: Mapping[str, str] = {
    key: part for key, part in lora.KEYS.items() if part in (*PARTS, *TABLE)
} | {
    ".lora_magnitude_vector": "lora_magnitude_vector",
    ".lora_magnitude_vector.weight": "lora_magnitude_vector",
}
PEFT_TYPES: Mapping[str, frozenset[str]] = lora.PEFT_TYPES
REFUSED: Mapping[str, str] = lora.REFUSED
OBSERVES = True
describe = lora.describe


def owns(parts: Collection[str], fields: Mapping[str, Any]) -> bool:
    directed = "lora_magnitude_vector" in parts or bool(fields.get("use_dora"))
    return directed and not {*PARTS, *TABLE}.isdisjoint(parts)


class _Directed(LowRank):
    observes = True

    def __init__(self, parts: Mapping[str, Tensor], settings: Settings) -> None:
        super().__init__(*lora.factors(parts, settings))
        magnitude = parts["lora_magnitude_vector"].double().flatten()
        self.magnitude = settings.arranged(magnitude)
        self.total = torch.zeros_like(self.magnitude)  # sum of squares of each row
        self.factor: Tensor | None = None

    def observe(self, x: Tensor, rows: Index, cols: Index) -> None:
        updated = x.clone()
        super().weight(updated, rows, cols)
        total = self.total[rows]
        squares(updated, total)
        self.total[rows] = total

    @property
    def observed(self) -> Tensor:
        return self.total

    def recall(self, observed: Tensor) -> None:
        self.total = observed

    def inverse(self) -> _Undirected:
        return _Undirected(self)

    def weight(self, x: Tensor, rows: Index, cols: Index) -> None:
        super().weight(x, rows, cols)
        x.mul_(self._factor()[rows, None])

    def operations(self, rows: slice, cols: slice) -> Sequence[Operation] | None:
        added = super().operations(rows, cols)
        return None if added is None else [*added, ScaleOutputs(self._factor()[rows])]

    def _factor(self) -> Tensor:
        if self.factor is None:
            self.factor = self.magnitude / root(self.total)
        return self.factor


class _Undirected(LowRank):
    """W' / f - s B A, with the f that the norms of the merge gave."""

    def __init__(self, merged: _Directed) -> None:
        super().__init__(merged.groups, merged.per_group, merged.delta_bias)
        self.sign = -merged.sign
        back = root(merged.total) / merged.magnitude
        self.back = torch.where(back.isfinite(), back, 1.0)

    def weight(self, x: Tensor, rows: Index, cols: Index) -> None:
        x.mul_(self.back[rows, None])
        super().weight(x, rows, cols)

    def operations(self, rows: slice, cols: slice) -> Sequence[Operation] | None:
        added = super().operations(rows, cols)
        return None if added is None else [ScaleOutputs(self.back[rows]), *added]


def prepare(parts: Mapping[str, Tensor], settings: Settings) -> _Directed:
    return _Directed(parts, settings)


def bound(peak: float, parts: Mapping[str, Tensor], settings: Settings) -> float:
    """Not known: a row of length 0 cannot be given another one."""
    return math.inf


def init(geometry: Geometry, settings: Settings, base: Base) -> dict[str, Tensor]:
    """LoRA's factors, and as magnitude the length that the rows have, so that nothing changes."""
    parts = lora.init(geometry, settings, base)
    length = _lengths(base, parts, settings).to("cpu")
    shape = (1, -1, *(1 for _ in geometry.kernel)) if geometry.kernel else (-1,)
    parts["lora_magnitude_vector"] = length.view(shape)
    return parts


def forward(
    x: Tensor,
    base: Base,
    parts: Mapping[str, Tensor],
    settings: Settings,
    dropout: Dropout | None = None,
) -> Tensor:
    """y = base(x) - W d + f * (W d + s B A d) with f = m / ||W + s B A|| and d the dropped-out x.

    The norm is a constant for the gradient, as in section 4.3 of the paper.
    """
    y, bias = base(x), base.bias()
    factor = parts["lora_magnitude_vector"].flatten() / _lengths(base, parts, settings)
    kept = x if dropout is None else dropout(x)
    plain = y if kept is x else base(kept)
    if bias is not None:
        plain = base.add_vector(plain, -bias)
    hidden = base.map(kept, parts["lora_A"])
    changed = base.add(
        plain if kept is x else plain.clone(), hidden, parts["lora_B"], settings.scaling
    )
    changed = base.scale_outputs(changed, factor)
    if kept is not x:
        return y - plain + changed
    return changed if bias is None else base.add_vector(changed, bias)


@torch.no_grad()
def _lengths(base: Base, parts: Mapping[str, Tensor], settings: Settings) -> Tensor:
    """||W + s B A|| of each row, (out,), float32."""
    weight = base.matrix()
    update = lora.update({name: part.to(weight.device) for name, part in parts.items()}, settings)
    lengths: Tensor = torch.linalg.vector_norm(weight.to(update.dtype) + update, dim=1)
    return lengths
