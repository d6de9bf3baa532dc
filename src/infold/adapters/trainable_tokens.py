"""Trainable tokens (PEFT): some rows of an embedding are trained; the file holds their new values.

The logical matrix of an embedding is its transposed table, so a token is a column here:
W'[:, tokens[k]] = trainable_tokens_delta[k]. In spite of its name the part is a value. A head is
such a table too, with a row for each token that it scores: there W is the transposed weight.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from infold.adapters.exact import Index
from infold.adapters.layer import Base, Dropout, Geometry
from infold.adapters.operations import Operation
from infold.adapters.settings import Settings

PARTS: tuple[str, ...] = ("trainable_tokens_delta",)
REQUIRED: tuple[str, ...] = PARTS
TABLE: Mapping[str, str] = {}
ON_BIAS: tuple[str, ...] = ()
KEYS: Mapping[str, str] = {
    ".trainable_tokens_delta": "trainable_tokens_delta",
    ".token_adapter.trainable_tokens_delta": "trainable_tokens_delta",
}
PEFT_TYPES: Mapping[str, frozenset[str]] = {
    "TRAINABLE_TOKENS": frozenset(("token_indices",)),
    "LORA": frozenset(("trainable_token_indices",)),
}
REFUSED: Mapping[str, str] = {}
OBSERVES = False


def owns(parts: Collection[str], fields: Mapping[str, Any]) -> bool:
    return "trainable_tokens_delta" in parts


def describe(settings: Settings) -> dict[str, Any]:
    return {}


class _Rows:
    observes = False

    def __init__(self, values: Tensor, tokens: tuple[int, ...]) -> None:
        order = sorted(range(len(tokens)), key=tokens.__getitem__)
        chosen = [tokens[i] for i in order]
        self.tokens = torch.tensor(chosen, dtype=torch.int64, device=values.device)
        self.values = values[order].double()  # (tokens, out)

    def inverse(self) -> _Rows:
        """Nothing: the old values are in nobody's hands, all others are as they were."""
        return _Rows(self.values[:0], ())

    @property
    def observed(self) -> Tensor | None:
        return None

    def observe(self, x: Tensor, rows: Index, cols: Index) -> None: ...

    def recall(self, observed: Tensor) -> None: ...

    def weight(self, x: Tensor, rows: Index, cols: Index) -> None:
        if isinstance(cols, slice):
            start = cols.start or 0
            stop = start + x.shape[1]
            bounds = torch.tensor([start, stop], device=self.tokens.device)
            low, high = torch.searchsorted(self.tokens, bounds).tolist()
            x[:, self.tokens[low:high] - start] = self.values[low:high, rows].t()
            return
        for number, token in enumerate(self.tokens.tolist()):
            x[:, cols == token] = self.values[number, rows][:, None]

    def operations(self, rows: slice, cols: slice) -> Sequence[Operation] | None:
        return None

    def bias(self, x: Tensor, rows: Index) -> None: ...


def prepare(parts: Mapping[str, Tensor], settings: Settings) -> _Rows:
    return _Rows(parts["trainable_tokens_delta"], settings.tokens)


def bound(peak: float, parts: Mapping[str, Tensor], settings: Settings) -> float:
    return max(peak, parts["trainable_tokens_delta"].detach().abs().max().item())


def init(geometry: Geometry, settings: Settings, base: Base) -> dict[str, Tensor]:
    """The values that the base has."""
    rows = base.table()[list(settings.tokens)]
    dtype = torch.promote_types(rows.dtype, torch.float32)
    return {"trainable_tokens_delta": rows.to(dtype, copy=True)}


def forward(
    x: Tensor,
    base: Base,
    parts: Mapping[str, Tensor],
    settings: Settings,
    dropout: Dropout | None = None,
) -> Tensor:
    """x: token numbers (...) for an embedding, activations (..., width) for a head."""
    tokens = torch.tensor(settings.tokens, device=x.device)
    return base.replace_rows(x, base(x), tokens, parts["trainable_tokens_delta"])
