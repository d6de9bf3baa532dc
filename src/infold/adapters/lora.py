"""LoRA (Hu et al. 2021, arXiv 2106.09685): a low-rank update.

    W' = W + s B A,   s = alpha / r  (rsLoRA, arXiv 2312.03732: alpha / sqrt(r))
    b' = b + s b_B                   (`lora_bias`: the bias of lora_B)

`lora_A` (r, in[, kernel...]), `lora_B` (out, r[, 1...]), for embeddings `lora_embedding_A` (r, in)
and `lora_embedding_B` (out, r) of the transposed table. A grouped convolution has `lora_B` of
(out, r / groups): each group of outputs uses its own rows of A.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from infold.adapters.exact import Factors, Index
from infold.adapters.settings import Settings

PARTS: tuple[str, ...] = ("lora_A", "lora_B", "lora_bias")


class LowRank:
    """W + s B A."""

    observes = False

    def __init__(self, parts: Mapping[str, Tensor], settings: Settings) -> None:
        self.groups = _groups(parts, settings)
        self.per_group = settings.out // settings.groups
        bias = parts.get("lora_bias")
        self.delta_bias = None if bias is None else bias.double().flatten() * settings.scaling

    def observe(self, x: Tensor, rows: Index, cols: Index) -> None: ...

    def weight(self, x: Tensor, rows: Index, cols: Index) -> None:
        if len(self.groups) == 1:
            self.groups[0].add_to(x, rows, cols)
            return
        outputs = torch.arange(self.per_group * len(self.groups), device=x.device)[rows]
        for number, factors in enumerate(self.groups):
            mine = (outputs // self.per_group == number).nonzero().flatten()
            if len(mine):
                part = x[mine]
                factors.add_to(part, outputs[mine] - number * self.per_group, cols)
                x[mine] = part

    def bias(self, x: Tensor, rows: Index) -> None:
        if self.delta_bias is not None:
            x.add_(self.delta_bias[rows])


def _groups(parts: Mapping[str, Tensor], settings: Settings) -> list[Factors]:
    a, b = parts["lora_A"].flatten(1), parts["lora_B"].flatten(1)
    return [
        Factors(a_group, b_group, settings.scaling, settings.slices)
        for a_group, b_group in zip(a.chunk(settings.groups), b.chunk(settings.groups), strict=True)
    ]


def prepare(parts: Mapping[str, Tensor], settings: Settings) -> LowRank:
    return LowRank(parts, settings)
