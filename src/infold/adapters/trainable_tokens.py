"""Trainable tokens (PEFT): some rows of an embedding are trained; the file holds their new values.

The logical matrix of an embedding is its transposed table, so a token is a column here:
W'[:, tokens[k]] = trainable_tokens_delta[k]. In spite of its name the part is a value.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from infold.adapters.exact import Index
from infold.adapters.settings import Settings

PARTS: tuple[str, ...] = ("trainable_tokens_delta",)


class _Rows:
    observes = False

    def __init__(self, values: Tensor, tokens: tuple[int, ...]) -> None:
        order = sorted(range(len(tokens)), key=tokens.__getitem__)
        self.tokens = torch.tensor([tokens[i] for i in order], device=values.device)
        self.values = values[order].double()  # (tokens, out)

    def observe(self, x: Tensor, rows: Index, cols: Index) -> None: ...

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

    def bias(self, x: Tensor, rows: Index) -> None: ...


def prepare(parts: Mapping[str, Tensor], settings: Settings) -> _Rows:
    return _Rows(parts["trainable_tokens_delta"], settings.tokens)
