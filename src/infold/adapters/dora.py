"""DoRA (Liu et al. 2024, arXiv 2402.09353): LoRA with a learned length for each output.

    W' = m / ||W + s B A||  *  (W + s B A),    the norm over each row of the logical matrix

`lora_magnitude_vector` is m, one element per output. The norm is a reduction, so it is summed in
the fixed order of `exact.squares`; square root and division are correctly rounded everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from infold.adapters.exact import Index, squares
from infold.adapters.lora import LowRank
from infold.adapters.settings import Settings

PARTS: tuple[str, ...] = ("lora_A", "lora_B", "lora_magnitude_vector")


class _Directed(LowRank):
    observes = True

    def __init__(self, parts: Mapping[str, Tensor], settings: Settings) -> None:
        super().__init__(parts, settings)
        self.magnitude = parts["lora_magnitude_vector"].double().flatten()
        self.total = torch.zeros_like(self.magnitude)  # sum of squares of each row
        self.factor: Tensor | None = None

    def observe(self, x: Tensor, rows: Index, cols: Index) -> None:
        updated = x.clone()
        super().weight(updated, rows, cols)
        total = self.total[rows]
        squares(updated, total)
        self.total[rows] = total

    def weight(self, x: Tensor, rows: Index, cols: Index) -> None:
        if self.factor is None:
            self.factor = self.magnitude / self.total.sqrt()
        super().weight(x, rows, cols)
        x.mul_(self.factor[rows, None])


def prepare(parts: Mapping[str, Tensor], settings: Settings) -> _Directed:
    return _Directed(parts, settings)
