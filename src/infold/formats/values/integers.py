"""Plain 8-bit integers with scales: bitsandbytes int8, compressed-tensors int-quantized, torchao.

    W[o, i] = (codes[o, i] - zero[o, g]) * scale[o, g] * step

codes I8 (out, in); scale (out, groups), (1, 1) for the whole tensor; zero the same, or none.
bitsandbytes stores max|w| in place of the scale: step = 1 / 127.
"""

from __future__ import annotations

import torch
from torch import Tensor

from infold.formats.values.scheme import spread, stored_scales

__all__ = ["decode", "encode", "spread_scales"]


def decode(
    codes: Tensor, scale: Tensor, zero: Tensor | None, group: int, divisor: float = 1.0
) -> Tensor:
    """float64 (rows, in) of rows of codes, with the scales and zero points of the same rows."""
    inputs = codes.shape[1]
    values = codes.to(torch.float64)
    if zero is not None:
        values -= spread(zero.to(torch.float64), group, inputs)
    values *= spread(scale.to(torch.float64), group, inputs)
    if divisor != 1.0:
        values /= divisor
    return values


def spread_scales(
    values: Tensor, group: int, top: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(scales that broadcast over the values, scales (rows, groups) of `dtype`) with which the
    absmax of each group of inputs goes to +-top."""
    rows, inputs = values.shape
    scales = stored_scales(values.view(rows, -1, group or inputs).abs().amax(2) / top, dtype)
    return spread(scales, group or inputs, inputs), scales.to(dtype)


def encode(
    values: Tensor, group: int, top: int, dtype: torch.dtype, divisor: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(codes in -top..top as float64 integers, scales (rows, groups) of `dtype`): the absmax of
    each group of inputs goes to +-top."""
    rows, inputs = values.shape
    grouped = values.view(rows, -1, group or inputs)
    scales = stored_scales(grouped.abs().amax(2) * (divisor / top), dtype)
    codes = torch.round(grouped / (scales / divisor)[:, :, None]).clamp(-top, top)
    return codes.view(rows, inputs), scales.to(dtype)
