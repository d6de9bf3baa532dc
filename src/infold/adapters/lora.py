"""LoRA (Hu et al. 2021, arXiv 2106.09685): a low-rank update.

    W' = W + s B A,   s = alpha / r  (rsLoRA, arXiv 2312.03732: alpha / sqrt(r))
    b' = b + s b_B                   (`lora_bias`: the bias of lora_B)

`lora_A` (r, in[, kernel...]), `lora_B` (out, r[, 1...]), for embeddings `lora_embedding_A` (r, in)
and `lora_embedding_B` (out, r) of the transposed table. A grouped convolution has `lora_B` of
(out, r / groups): each group of outputs uses its own rows of A. Factors of several experts are told
in `experts.py`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from infold.adapters import experts
from infold.adapters.exact import Factors, Index
from infold.adapters.layer import Base, Dropout, Geometry
from infold.adapters.operations import Operation
from infold.adapters.settings import Settings

PARTS: tuple[str, ...] = ("lora_A", "lora_B", "lora_bias")
REQUIRED: tuple[str, ...] = ("lora_A", "lora_B")
ON_BIAS: tuple[str, ...] = ("lora_bias",)
TABLE: Mapping[str, str] = {"lora_embedding_A": "lora_A", "lora_embedding_B": "lora_B"}
KEYS: Mapping[str, str] = {
    ".lora_A.weight": "lora_A",
    ".lora_B.weight": "lora_B",
    ".lora_B.bias": "lora_bias",
    ".lora_embedding_A": "lora_embedding_A",
    ".lora_embedding_B": "lora_embedding_B",
}
PEFT_TYPES: Mapping[str, frozenset[str]] = {
    "LORA": frozenset(
        "r lora_alpha use_rslora rank_pattern alpha_pattern use_dora lora_bias bias "
        "init_lora_weights ensure_weight_tying target_parameters".split()
    )
}
OBSERVES = False
REFUSED: Mapping[str, str] = {
    "alora_invocation_tokens": "activated LoRA depends on the prompt, so it has no merged weight",
    "use_qalora": "QALoRA pools the inputs; PEFT cannot merge it either",
    "arrow_config": "Arrow routes between adapters at run time, so it has no merged weight",
    "layer_replication": "the adapter runs on a model with repeated layers; PEFT merges it wrongly",
    "kasa_config": "KaSA truncates the base weight by SVD when it is loaded",
    "use_bdlora": "block-diagonal LoRA is not supported",
    "velora_config": "VeLoRA is not supported",
    "monteclora_config": "MonteCLoRA is not supported",
    "megatron_config": "Megatron's parallel layers are not supported",
    "corda_config": "CorDA changes the base weight when it is loaded",
    "lora_ga_config": "LoRA-GA changes the base weight when it is loaded",
}


def owns(parts: Collection[str], fields: Mapping[str, Any]) -> bool:
    plain = "lora_magnitude_vector" not in parts and not fields.get("use_dora")
    return plain and not {*PARTS, *TABLE}.isdisjoint(parts)


def describe(settings: Settings) -> dict[str, Any]:
    told: dict[str, Any] = {"scaling": settings.scaling}
    if settings.experts:
        number = settings.expert
        told |= {"experts": settings.experts} if number < 0 else {"expert": number}
    return told


class LowRank:
    """W + s B A."""

    observes = False

    def __init__(self, groups: Sequence[Factors], per_group: int, bias: Tensor | None) -> None:
        """groups: of outputs, each of `per_group`. bias: (out,), float64, scaled."""
        self.groups, self.per_group, self.delta_bias = groups, per_group, bias
        self.sign = 1

    def inverse(self) -> LowRank:
        """W' - s B A, and the like of the bias."""
        back = LowRank(self.groups, self.per_group, self.delta_bias)
        back.sign = -self.sign
        return back

    @property
    def observed(self) -> Tensor | None:
        return None

    def observe(self, x: Tensor, rows: Index, cols: Index) -> None: ...

    def recall(self, observed: Tensor) -> None: ...

    def weight(self, x: Tensor, rows: Index, cols: Index) -> None:
        if len(self.groups) == 1:
            self.groups[0].add_to(x, rows, cols, self.sign)
            return
        outputs = torch.arange(self.per_group * len(self.groups), device=x.device)[rows]
        for number, factors in enumerate(self.groups):
            mine = (outputs // self.per_group == number).nonzero().flatten()
            if len(mine):
                part = x[mine]
                factors.add_to(part, outputs[mine] - number * self.per_group, cols, self.sign)
                x[mine] = part

    def operations(self, rows: slice, cols: slice) -> Sequence[Operation] | None:
        if len(self.groups) > 1:
            return None
        return [self.groups[0].operation(rows, cols, self.sign)]

    def bias(self, x: Tensor, rows: Index) -> None:
        if self.delta_bias is not None:
            x.add_(self.delta_bias[rows], alpha=self.sign)


def factors(
    parts: Mapping[str, Tensor], settings: Settings
) -> tuple[Sequence[Factors], int, Tensor | None]:
    """What `LowRank` is made of."""
    a, b = parts["lora_A"].flatten(1), settings.arranged(parts["lora_B"].flatten(1))
    groups = [
        Factors(a_group, b_group, settings.scaling, settings.slices)
        for a_group, b_group in zip(a.chunk(settings.groups), b.chunk(settings.groups), strict=True)
    ]
    bias = parts.get("lora_bias")
    if bias is not None:
        bias = settings.arranged(bias.double().flatten()) * settings.scaling
    return groups, settings.out // settings.groups, bias


def prepare(parts: Mapping[str, Tensor], settings: Settings) -> LowRank | experts.Stacked:
    if not settings.experts:
        return LowRank(*factors(parts, settings))

    def low_rank(a: Tensor, b: Tensor) -> LowRank:
        one = Factors(a, b, settings.scaling, settings.slices)
        return LowRank([one], len(b), None)

    return experts.Stacked(*experts.apart(parts, settings), settings, low_rank)


def bound(peak: float, parts: Mapping[str, Tensor], settings: Settings) -> float:
    """The sum over the rank of what the largest elements of both factors make."""
    if settings.experts:
        one, two = (part.detach().abs().double() for part in experts.apart(parts, settings))
        added = (one.amax(dim=2) * two.amax(dim=1)).sum(dim=1).max()
        return peak + abs(settings.scaling) * added.item()
    a = parts["lora_A"].detach().flatten(1).abs().amax(dim=1).double()
    b = parts["lora_B"].detach().flatten(1).abs().amax(dim=0).double()
    added = a @ b.repeat(settings.groups)
    extra = parts["lora_bias"].detach().abs().max().item() if "lora_bias" in parts else 0.0
    return peak + abs(settings.scaling) * (added.item() + extra)


def init(geometry: Geometry, settings: Settings, base: Base) -> dict[str, Tensor]:
    """An update of zero: one factor is random, the other 0.

    start=True: A is Kaiming-uniform (a = sqrt 5), as PEFT's and Microsoft's; "gaussian": normal of
    deviation 1 / r. Embeddings: B is standard normal. start=False: no factor is 0 (for tests).
    """
    rank, start = settings.rank * max(settings.experts, 1), settings.start
    a = torch.empty(rank, geometry.inputs, *geometry.kernel)
    b = torch.zeros(geometry.outputs, rank, *(1 for _ in geometry.kernel))
    if geometry.table:
        a.zero_() if start else a.normal_()
        b.normal_()
    else:
        if start == "gaussian":
            a.normal_(std=1 / settings.rank)
        else:
            torch.nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        if not start:
            torch.nn.init.kaiming_uniform_(b, a=math.sqrt(5))
    parts = {"lora_A": a, "lora_B": b}
    if settings.with_bias:
        parts["lora_bias"] = torch.zeros(geometry.outputs)
    return parts


def forward(
    x: Tensor,
    base: Base,
    parts: Mapping[str, Tensor],
    settings: Settings,
    dropout: Dropout | None = None,
) -> Tensor:
    y = base(x)
    hidden = base.map(x if dropout is None else dropout(x), parts["lora_A"])
    y = base.add(y, hidden, parts["lora_B"], settings.scaling)
    bias = parts.get("lora_bias")
    return y if bias is None else base.add_vector(y, bias * settings.scaling)


def update(parts: Mapping[str, Tensor], settings: Settings) -> Tensor:
    """s B A, (out, in * kernel), in the factors' dtype and rounded as a product of it is."""
    return settings.scaling * (parts["lora_B"].flatten(1) @ parts["lora_A"].flatten(1))
