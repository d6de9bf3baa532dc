"""float64 -> a stored dtype, from the bits: round to nearest, ties to even. Stated anew for verify.

Rounded and stored elements are compared as places on the dtype's number line, int64: the finite
numbers in ascending order, -0 at -1 and +0 at 0, so neighbours differ by one. E4M3 has no infinity:
its NaN takes that place.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LINES", "Line"]

_SIGN = torch.iinfo(torch.int64).min
_INTEGERS = {8: torch.int8, 16: torch.int16, 32: torch.int32, 64: torch.int64}


@dataclass(frozen=True)
class Line:
    """The numbers that one dtype can hold."""

    dtype: torch.dtype
    width: int  # bits of an element
    precision: int  # bits of the significand, with the hidden one
    lowest: int  # exponent of the smallest normal number

    @property
    def integer(self) -> torch.dtype:
        """The integers as wide as an element."""
        return _INTEGERS[self.width]

    @property
    def infinity(self) -> int:
        """The place of +inf; finite numbers lie below."""
        return self._exponent | ((1 << (self.precision - 1)) - 1 if self.width == 8 else 0)

    @property
    def _exponent(self) -> int:
        """The bits of the exponent."""
        return ((1 << (self.width - self.precision)) - 1) << (self.precision - 1)

    def stored(self, elements: Tensor) -> Tensor:
        """Places of stored elements; NaN lies beyond infinity."""
        bits = elements.contiguous().view(self.integer).to(torch.int64)
        return _ordered(bits & ((1 << (self.width - 1)) - 1), bits < 0)

    def rounded(self, values: Tensor) -> Tensor:
        """Places of float64 values, each rounded once. Overflow goes to infinity, NaN beyond."""
        bits = values.contiguous().view(torch.int64)
        magnitude = bits & ~_SIGN
        if self.width < 64:
            magnitude = self._narrowed(magnitude)
        return _ordered(magnitude, bits < 0)

    def _narrowed(self, magnitude: Tensor) -> Tensor:
        """Bits of |float64| -> bits of the nearest magnitude here."""
        exponent = (magnitude >> 52) - 1023
        significand = (magnitude & ((1 << 52) - 1)) | 1 << 52
        # below the smallest normal number more bits fall away; from 54 on nothing is left
        below = (self.lowest - exponent).clamp(min=0)
        drop = (53 - self.precision + below).clamp(max=55)
        kept = significand >> drop
        rest = significand & ((torch.ones_like(drop) << drop) - 1)
        half = torch.ones_like(drop) << (drop - 1)
        kept += ((rest > half) | ((rest == half) & (kept & 1 == 1))).to(torch.int64)
        # the hidden bit of `kept` counts one into the exponent field
        field = (exponent - self.lowest).clamp(min=0)
        bits = (kept + (field << (self.precision - 1))).clamp(max=self.infinity)
        beyond = 1 + (magnitude > 0x7FF << 52).to(torch.int64)
        return torch.where(magnitude >= 0x7FF << 52, self.infinity - 1 + beyond, bits)

    def finite(self, places: Tensor) -> Tensor:
        return (places < self.infinity) & (places >= -self.infinity)

    def number(self, place: int) -> float:
        """The number at a place, for messages."""
        magnitude = place if place >= 0 else -1 - place
        if self.width == 8:
            exponent, mantissa = magnitude >> 3, magnitude & 7
            value = math.ldexp(mantissa + (8 if exponent else 0), max(exponent, 1) - 10)
            value = math.nan if magnitude == self.infinity else value
        elif self.width == 16:
            kind = "e" if self.dtype == torch.float16 else "f"
            bits = magnitude if kind == "e" else magnitude << 16
            value = struct.unpack(f"<{kind}", bits.to_bytes(2 if kind == "e" else 4, "little"))[0]
        else:
            kind = "f" if self.width == 32 else "d"
            value = struct.unpack(f"<{kind}", magnitude.to_bytes(self.width // 8, "little"))[0]
        return -float(value) if place < 0 else float(value)

    def half_spacings(self, elements: Tensor, scratch: Tensor, out: Tensor) -> None:
        """2^precision times a lower bound of how far an element may move to either side and still
        be the nearest, into the float tensor `out`; 0 for zeros and subnormals.

        `scratch` is an integer tensor as wide as the elements. Within a binade the distance is half
        of a unit in the last place; toward zero from a power of two it is half of that.
        """
        bits = elements.view(self.integer)
        torch.bitwise_and(bits, (1 << (self.width - 1)) - 1, out=scratch)
        scratch.sub_(1).clamp_(min=0)  # a power of two steps down into the finer binade
        scratch.bitwise_and_(self._exponent)
        out.copy_(scratch.view(self.dtype))


def _ordered(magnitude: Tensor, negative: Tensor) -> Tensor:
    return torch.where(negative, -1 - magnitude, magnitude)


LINES = {
    "F8_E4M3": Line(torch.float8_e4m3fn, 8, 4, -6),
    "BF16": Line(torch.bfloat16, 16, 8, -126),
    "F16": Line(torch.float16, 16, 11, -14),
    "F32": Line(torch.float32, 32, 24, -126),
    "F64": Line(torch.float64, 64, 53, -1022),
}
