"""STORAGE OF ONE WEIGHT: stored parts <-> values. One file a format, one line here."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from infold.formats import dense

__all__ = ["FORMATS", "Format", "format_of"]


class Format(Protocol):
    """How the elements of a weight are stored.

    `encode` rounds any values. Blocks take the fast way, which gives the same bits: `narrow` from
    float64 to the dtype of `staging`, and if that is not the stored one yet, `finish`.
    """

    def accepts(self, dtype: str) -> bool:
        """Whether a safetensors dtype is of this format."""

    def torch_dtype(self, dtype: str) -> torch.dtype:
        """The torch dtype of the stored elements."""

    def decode(self, stored: Tensor, out: Tensor) -> None:
        """Stored elements into float64 `out`, exactly."""

    def encode(self, values: Tensor, dtype: str) -> Tensor:
        """float64 values, rounded once to the stored dtype, ties to even."""

    def staging(self, dtype: str) -> torch.dtype:
        """What `narrow` writes: the stored dtype, or one on the way to it."""

    def narrow(self, values: Tensor, out: Tensor) -> None:
        """float64 `values` into `out` of the dtype of `staging`, rounded once."""

    def finish(self, staged: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        """A staged block (rows, columns) into `out`; returns the (rows, columns) of the elements
        that may be rounded twice now, which `encode` must settle from their float64 values."""


FORMATS: dict[str, Format] = {"dense": dense}


def format_of(dtype: str) -> Format | None:
    """The format that stores `dtype`, or None."""
    return next((form for form in FORMATS.values() if form.accepts(dtype)), None)
