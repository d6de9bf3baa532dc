"""Dense storage: F64, F32, F16, BF16. Widening is exact; narrowing rounds once, ties to even.

float64 -> float32 -> 16 bits rounds twice, and is wrong where the first step lands on a midpoint of
the second. Two ways out, which give the same bits:
  encode    makes the first step round to odd, so that it never lands on a midpoint by rounding;
  midpoints finds the columns with float32 elements halfway between two bfloat16, after `narrow`
            to float32 and before the second step; they are few. `encode` then settles those from
            the float64 values. This is the fast way for blocks of bfloat16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from infold.dtypes import TORCH_DTYPES

__all__ = [
    "accepts",
    "decode",
    "encode",
    "finish",
    "midpoints",
    "narrow",
    "round_to_odd",
    "staging",
    "torch_dtype",
]

_DROPPED = (1 << 29) - 1  # float64 has 29 more bits of significand than float32
_MIDPOINT = -(1 << 15)  # the low half of a float32, as int16, halfway between two bfloat16


def accepts(dtype: str) -> bool:
    return dtype in TORCH_DTYPES


def torch_dtype(dtype: str) -> torch.dtype:
    return TORCH_DTYPES[dtype]


def decode(stored: Tensor, out: Tensor) -> None:
    """Stored elements into float64 `out`; float16 twice as fast through float32."""
    out.copy_(stored.float() if stored.dtype == torch.float16 else stored)


def encode(values: Tensor, dtype: str) -> Tensor:
    """float64 values, rounded once to `dtype`. Overflow gives inf; the caller refuses it."""
    if dtype in ("F64", "F32"):
        return values.to(TORCH_DTYPES[dtype], copy=True)
    odd = round_to_odd(values)
    if dtype == "F16":
        return odd.to(torch.float16)  # float32's subnormals lie far below float16's smallest
    rounded = odd.to(torch.bfloat16)
    subnormal = values.abs() < 2.0**-126  # for float32 too: its last bit is then no longer sticky
    if subnormal.any():
        # bfloat16's subnormals are multiples of 2^-133: round those multiples as integers
        multiples = torch.round(values * 2.0**133) * 2.0**-133
        rounded = torch.where(subnormal, multiples.to(torch.bfloat16), rounded)
    return rounded


def round_to_odd(values: Tensor) -> Tensor:
    """float32, where an inexact result has its last bit set."""
    bits = values.contiguous().view(torch.int64)
    odd = bits & _DROPPED
    odd += _DROPPED  # carries into float32's last bit unless all are zero
    odd |= bits
    odd &= ~_DROPPED
    return odd.view(torch.float64).to(torch.float32)


def staging(dtype: str) -> torch.dtype:
    """bfloat16 is reached through float32, which is kept to find the midpoints in."""
    return torch.float32 if dtype == "BF16" else TORCH_DTYPES[dtype]


def narrow(values: Tensor, out: Tensor) -> None:
    """float64 `values` into `out` (F64, F32 or F16), rounded once; overflow gives inf."""
    out.copy_(round_to_odd(values) if out.dtype == torch.float16 else values)


def finish(staged: Tensor, out: Tensor) -> Tensor:
    """float32 `staged` into bfloat16 `out`; returns the columns that hold midpoints."""
    out.copy_(staged)
    return midpoints(staged)


def midpoints(staged: Tensor) -> Tensor:
    """The columns with float32 elements that lie halfway between two bfloat16."""
    smallest = torch.amin(staged.view(torch.int16), 0)[0::2]  # one fast pass over all columns
    return (smallest == _MIDPOINT).nonzero().view(-1)
