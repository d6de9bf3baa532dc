"""MATH. Tensors in, tensors out: one file a method, and the exact product that they share.

Every method sees a weight as its *logical* matrix W of shape (out, in), whatever its storage: for
convolutions `in` is (in_channels / groups) * kernel elements, for an embedding W is the transposed
table. A block of W is float64; a method changes it in place. Rounding is not done here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from infold.adapters import dora, ia3, lora, trainable_tokens
from infold.adapters.exact import Index
from infold.adapters.layer import Base, Dropout, Geometry
from infold.adapters.operations import Operation
from infold.adapters.settings import Settings

__all__ = [
    "METHODS",
    "Base",
    "Geometry",
    "Index",
    "Method",
    "Parts",
    "Prepared",
    "Settings",
    "merge",
    "methods_of",
]

Parts = Mapping[str, Tensor]


class Prepared(Protocol):
    """One method with the parts of one module, ready to be applied to blocks of its weight."""

    @property
    def observes(self) -> bool:
        """Whether `observe` must see the whole weight before `weight` may be called."""

    def observe(self, x: Tensor, rows: Index, cols: Index) -> None:
        """See a block of W, unchanged. For each row the columns come in ascending order, in
        pieces that start at multiples of `exact.LEAF`."""

    def weight(self, x: Tensor, rows: Index, cols: Index) -> None:
        """Change x = W[rows][:, cols], float64, in place."""

    def bias(self, x: Tensor, rows: Index) -> None:
        """Change x = bias[rows], float64, in place."""

    def operations(self, rows: slice, cols: slice) -> Sequence[Operation] | None:
        """What `weight` does to that block, for compiled code; None where it cannot be told so."""

    def inverse(self) -> Prepared | None:
        """What takes a merged block near to what it was, or None. Undo stores the rest, so nothing
        depends on how near but the size of its record."""

    @property
    def observed(self) -> Tensor | None:
        """What `observe` has learnt of the whole weight, float64; None where there is nothing."""

    def recall(self, observed: Tensor) -> None:
        """Instead of observing: what `observed` told when the same weight was merged."""


class Method(Protocol):
    """A way to train an adapter: facts about it, its weight side and its activation side."""

    PARTS: tuple[str, ...]  # all its tensors, by the names that `prepare` and `forward` know
    REQUIRED: tuple[str, ...]  # those that a module must have, all of which enter the weight
    ON_BIAS: tuple[str, ...]  # those that enter the bias
    TABLE: Mapping[str, str]  # what an embedding's parts are called -> the part that it is
    KEYS: Mapping[str, str]  # how a key of an adapter file ends -> name in PARTS or TABLE
    PEFT_TYPES: Mapping[str, frozenset[str]]  # peft_type -> fields of such a config it goes by
    REFUSED: Mapping[str, str]  # fields of the config that cannot be merged -> why
    OBSERVES: bool  # whether it must see all of a weight before it changes any of it

    def owns(self, parts: Collection[str], fields: Mapping[str, Any]) -> bool:
        """Whether a module that has these parts, in an adapter of this config, is of this method;
        some of the required parts may be missing."""

    def describe(self, settings: Settings) -> dict[str, Any]:
        """The settings that a user wants to see, JSON-ready."""

    def prepare(self, parts: Parts, settings: Settings) -> Prepared:
        """The weight side, for merging."""

    def bound(self, peak: float, parts: Parts, settings: Settings) -> float:
        """A magnitude that no element of the merged weight or bias exceeds where none of theirs
        exceeds `peak`; infinite or NaN where the parts do not tell. It may be too large."""

    def init(self, geometry: Geometry, settings: Settings, base: Base) -> dict[str, Tensor]:
        """Parts to begin a training with, float32 on the CPU, that change nothing as a rule."""

    def forward(
        self,
        x: Tensor,
        base: Base,
        parts: Parts,
        settings: Settings,
        dropout: Dropout | None = None,
    ) -> Tensor:
        """The activation side: what the layer with the merged weight would make of x."""


METHODS: dict[str, Method] = {
    "ia3": ia3,
    "lora": lora,
    "dora": dora,
    "trainable_tokens": trainable_tokens,
}


def methods_of(peft_type: str) -> dict[str, Method]:
    """The methods that an adapter of this peft_type may hold; none if the type is unknown."""
    return {name: method for name, method in METHODS.items() if peft_type in method.PEFT_TYPES}


@dataclass(frozen=True)
class Merged:
    """What `merge` returns: float64, not yet rounded."""

    weight: Tensor
    bias: Tensor | None


def merge(
    method: str, weight: Tensor, bias: Tensor | None, parts: Parts, settings: Settings
) -> Merged:
    """The whole weight (out, in) and bias (out,) of one module, merged in float64."""
    prepared = METHODS[method].prepare(parts, settings)
    weight, bias = (
        weight.to(torch.float64, copy=True),
        bias if bias is None else bias.double().clone(),
    )
    everything = slice(None)
    if prepared.observes:
        prepared.observe(weight, everything, everything)
    prepared.weight(weight, everything, everything)
    if bias is not None:
        prepared.bias(bias, everything)
    return Merged(weight, bias)
