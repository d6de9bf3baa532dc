"""What a quantized format's numbers mean beyond their bytes, and steps that formats share."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from infold.dtypes import NAMES
from infold.errors import Refusal
from infold.formats.dense import encode as encode_dense
from infold.formats.dense import round_to_odd
from infold.formats.stored import Stored

__all__ = [
    "E4M3_MAX",
    "FLOATS",
    "Matrix",
    "NoValues",
    "Parts",
    "Scheme",
    "affine",
    "e8m0",
    "need",
    "span",
    "spread",
    "stored_scales",
    "to_e4m3",
]


class NoValues(ValueError):
    """A module's values cannot be told, or not written again. Tells why, as a sentence."""


class Matrix(Protocol):
    """A stored tensor as a matrix of which rows and columns can be taken: a Tensor, or a file's."""

    @property
    def shape(self) -> torch.Size | tuple[int, ...]: ...

    def __getitem__(self, where: tuple[slice, slice], /) -> Tensor: ...


Parts = Mapping[str, Matrix]  # by name, as the format's file tells; a vector is a column (n, 1)


@dataclass(frozen=True)
class Scheme:
    """How one module is quantized.

    shape: (out, in). bits: of a code. group: inputs that share a scale; 0: a whole row.
    symmetric: codes are around a fixed zero. plus_one: stored zero points are one too small (GPTQ,
    first version). block: outputs and inputs that share a scale (fine-grained FP8).
    axis: HQQ's. kind: the format's own name of a variant: "nf4", "fp4", "fp8", "int".
    offset: of doubly quantized scales; nested_block: how many of those share one.
    """

    shape: tuple[int, int]
    bits: int = 8
    group: int = 0
    symmetric: bool = True
    plus_one: bool = False
    block: tuple[int, int] = (0, 0)
    axis: int = 1
    kind: str = ""
    offset: float = 0.0
    nested_block: int = 256

    @property
    def align(self) -> int:
        """Rows are encoded in multiples of this: of what shares words, blocks or scales."""
        return math.lcm(32, self.block[0] or 1)


FLOATS = ("F64", "F32", "F16", "BF16")


def need(
    stored: Stored, part: str, dtypes: Collection[str], *shapes: tuple[int, ...], there: bool = True
) -> None:
    """Raises NoValues where a part is not of one of these dtypes and shapes. there: it must be."""
    field = stored.tensors.get(part)
    if field is None and not there:
        return
    if field is None or field.dtype not in dtypes or field.shape not in shapes:
        told = "missing" if field is None else f"{field.dtype} {list(field.shape)}"
        wanted = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
        raise NoValues(f"its {part} is {told}, not {'/'.join(dtypes)} {wanted}")


def affine(codes: Tensor, zero: Tensor | float, scale: Tensor) -> Tensor:
    """(codes - zero) * scale in float64; exact, since integers times short floats are."""
    values = codes.to(torch.float64)
    values -= zero
    values *= scale
    return values


def span(rows: slice, size: int, step: int) -> tuple[slice, slice]:
    """Rows widened to multiples of `step` within `size`, and where the rows lie in that."""
    first = rows.start // step * step
    last = min(size, -(-rows.stop // step) * step)
    return slice(first, last), slice(rows.start - first, rows.stop - first)


def spread(scale: Tensor, group: int, inputs: int) -> Tensor:
    """(rows, groups) for every input (rows, inputs); one for the whole row stays (rows, 1)."""
    if scale.shape[1] == 1:
        return scale
    return scale.repeat_interleave(group, 1)[:, :inputs]


def stored_scales(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 of the scales as `dtype` will hold them, rounded once.

    Codes are chosen for these, not for the ones before rounding. Where all weights of a group are
    zero, or so small that their scale would be, any scale serves, and 1 does.
    """
    rounded = encode_dense(scales, NAMES[dtype]).to(torch.float64)
    return torch.where(rounded == 0, 1.0, rounded)


def e8m0(codes: Tensor) -> Tensor:
    """float64 of UE8M0 scales: 2^(code - 127); 255 is NaN."""
    exponents = codes.view(torch.uint8).to(torch.int64)
    values = ((exponents + (1023 - 127)) << 52).view(torch.float64)
    return torch.where(exponents == 255, torch.nan, values)


E4M3_MAX = 448.0


def to_e4m3(values: Tensor) -> Tensor:
    """float64 rounded once to FP8 E4M3, ties to even; beyond 448 saturates."""
    if values.isnan().any():
        raise Refusal("NaN cannot be quantized")
    clamped = values.clamp(-E4M3_MAX, E4M3_MAX)
    return round_to_odd(clamped).to(torch.float8_e4m3fn)
