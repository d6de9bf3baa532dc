"""E4M3, as scales of blocks are stored: 4 bits of exponent, 3 of mantissa, up to 448, no infinity.

Only scales that the user has agreed to round (`--lossy`) are edited in this dtype; a weight of it
is no weight that `Format` is for. What the hardware and libraries do beyond 448 differs (the
largest number, or NaN). Here it is NaN, which the merge refuses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from infold.dtypes import SCALE_DTYPES
from infold.formats.dense import round_to_odd

__all__ = [
    "DTYPE",
    "LARGEST",
    "MIDDLE",
    "accepts",
    "decode",
    "encode",
    "finish",
    "narrow",
    "staging",
    "torch_dtype",
]

DTYPE = "F8_E4M3"
LARGEST = 448.0
MIDDLE = 464.0  # between 448 and the next number, if there were one; a tie goes to the even 448


def accepts(dtype: str) -> bool:
    return dtype == DTYPE


def torch_dtype(dtype: str) -> torch.dtype:
    return SCALE_DTYPES[dtype]


def decode(stored: Tensor, out: Tensor) -> None:
    """Stored elements into float64 `out`, exactly."""
    out.copy_(stored)


def encode(values: Tensor, dtype: str) -> Tensor:
    """float64 values, rounded once, ties to even. NaN where they are beyond 448."""
    odd = round_to_odd(values)  # its second rounding is then no rounding of a rounded value
    return odd.masked_fill_(odd.abs() > MIDDLE, torch.nan).to(SCALE_DTYPES[dtype])


def staging(dtype: str) -> torch.dtype:
    """The stored dtype: `narrow` reaches it."""
    return SCALE_DTYPES[dtype]


def narrow(values: Tensor, out: Tensor) -> None:
    """float64 `values` into `out`, as `encode`."""
    out.copy_(encode(values, DTYPE))


def finish(staged: Tensor, out: Tensor) -> Tensor:
    raise AssertionError("nothing is staged on the way to E4M3")
