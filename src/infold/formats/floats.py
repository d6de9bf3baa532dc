"""The floats of a stored tensor as a matrix: what a merge computes on, whatever lies between."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from infold.dtypes import SCALE_DTYPES
from infold.formats.gguf import PACKINGS, Packing

__all__ = ["Floats", "floats_of"]


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
    if dtype in SCALE_DTYPES:
        rows, columns = (shape[0], math.prod(shape[1:])) if shape else (1, 1)
        return Floats(rows, columns, dtype, SCALE_DTYPES[dtype].itemsize, 1, None)
    packing = PACKINGS.get(dtype)
    if packing is None or not shape:
        return None
    per_row, count = shape[-1] // packing.elements, len(packing.offsets)
    rows = math.prod(shape) // packing.elements
    return Floats(rows, count, packing.dtype, packing.size // count, per_row, packing)
