"""STORAGE OF ONE WEIGHT: stored parts <-> values. One file a format, one line here."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from infold.formats import dense

__all__ = ["FORMATS", "Format", "format_of"]


class Format(Protocol):
    """How the elements of a weight are stored."""

    def accepts(self, dtype: str) -> bool:
        """Whether a safetensors dtype is of this format."""

    def torch_dtype(self, dtype: str) -> torch.dtype:
        """The torch dtype of the stored elements."""

    def encode(self, values: Tensor, dtype: str) -> Tensor:
        """float64 values, rounded once to the stored dtype, ties to even."""


FORMATS: dict[str, Format] = {"dense": dense}


def format_of(dtype: str) -> str | None:
    """The name of the format that stores `dtype`, or None."""
    return next((name for name, form in FORMATS.items() if form.accepts(dtype)), None)
