"""STORAGE OF ONE WEIGHT: stored parts <-> values. One file a format, one line here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from infold.dtypes import TORCH_DTYPES
from infold.formats import dense
from infold.formats.gguf import PACKINGS, Packing

__all__ = ["FORMATS", "Floats", "Format", "Packing", "floats_of", "format_of"]


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


@dataclass(frozen=True, slots=True)
class Floats:
    """The floats of a stored tensor, as the matrix that a merge computes on.

    Of a dense tensor these are its elements, in rows and columns as they are stored; a vector is a
    column. Of a quantized one a row is a block, and the codes of the block are left alone: only
    what multiplies whole rows of the weight can be done to it.
    """

    rows: int
    columns: int
    dtype: str  # of each float
    width: int  # bytes of the tensor for each float: its own, and its share of the codes
    per_row: int  # rows of this matrix that are one row of the weight
    packing: Packing | None

    def share(self, limit: int) -> int:
        """How many floats a block of a tensor has, if `limit` is right for dense elements: about
        as many bytes, so that no worker needs more memory than it would for those."""
        if self.packing is None:
            return limit
        return max(self.columns, 4 * limit // self.width)


def floats_of(dtype: str, shape: Sequence[int]) -> Floats | None:
    """The floats of a tensor of such a dtype and shape; None where no format knows them."""
    if format_of(dtype) is not None:
        rows, columns = (shape[0], math.prod(shape[1:])) if shape else (1, 1)
        return Floats(rows, columns, dtype, TORCH_DTYPES[dtype].itemsize, 1, None)
    packing = PACKINGS.get(dtype)
    if packing is None or not shape:
        return None
    per_row, count = shape[-1] // packing.elements, len(packing.offsets)
    rows = math.prod(shape) // packing.elements
    return Floats(rows, count, packing.dtype, packing.size // count, per_row, packing)
