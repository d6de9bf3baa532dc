"""FP8 E4M3 weights with scales per tensor, row or block: W = weight * scale.

    weight            F8_E4M3 (out, in)
    weight_scale_inv  F32, BF16 or F8_E8M0, () or (out / rows, in / columns), rounded up
    weight_scale      the same by FBGEMM and compressed-tensors: (), (1), (out, 1) or blocks

Despite its name weight_scale_inv is multiplied. Source: DeepSeek-V3's files, transformers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from infold.errors import Refusal
from infold.formats.values.scheme import (
    E4M3_MAX,
    Matrix,
    Parts,
    Scheme,
    e8m0,
    stored_scales,
    to_e4m3,
)

__all__ = ["decode", "encode", "scale_part"]

_ALL = slice(None)


def scale_part(parts: Parts) -> str:
    """The name of the scale's tensor."""
    return next(n for n in ("weight_scale_inv", "weight_scale") if n in parts)


def decode(parts: Parts, scheme: Scheme, rows: slice) -> Tensor:
    """float64 (rows, in)."""
    values = parts["weight"][rows, _ALL].to(torch.float32).to(torch.float64)
    scale = parts[scale_part(parts)]
    values *= _spread(scale, scheme, rows)
    return values


def _spread(scale: Matrix, scheme: Scheme, rows: slice) -> Tensor:
    """Scales that broadcast over rows."""
    outputs, inputs = scheme.shape
    tall, wide = _block(scheme)
    first, last = rows.start // tall, -(-rows.stop // tall)
    taken = _wide(scale[slice(first, last), _ALL])
    tallied = taken.repeat_interleave(min(tall, outputs), 0)
    tallied = tallied[rows.start - first * tall : rows.stop - first * tall]
    if taken.shape[1] > 1:
        tallied = tallied.repeat_interleave(wide, 1)[:, :inputs]
    return tallied


def _wide(scale: Tensor) -> Tensor:
    return e8m0(scale) if scale.dtype == torch.float8_e8m0fnu else scale.to(torch.float64)


def _block(scheme: Scheme) -> tuple[int, int]:
    """Outputs and inputs that share a scale; (0, 0) in the scheme is the whole matrix."""
    return scheme.block[0] or max(1, scheme.shape[0]), scheme.block[1] or max(1, scheme.shape[1])


def encode(
    values: Tensor, scheme: Scheme, parts: Parts, rows: slice, out: dict[str, Tensor]
) -> None:
    """Round float64 rows to FP8 with scale = max|w| / 448 of each block; for UE8M0 the next power
    of two above. Rows are whole blocks."""
    name = scale_part(parts)
    tall, wide = _block(scheme)
    if tall >= scheme.shape[0] > 1 and len(values) < scheme.shape[0]:
        raise Refusal("one scale for the whole tensor: its rows cannot be quantized apart")
    down, across = -(-len(values) // tall), -(-scheme.shape[1] // wide)
    padded = values.new_zeros(down * tall, across * wide)
    padded[: len(values), : scheme.shape[1]] = values.abs()
    most = padded.view(down, tall, across, wide).amax(dim=(1, 3))
    target = out[name]
    if target.dtype == torch.float8_e8m0fnu:
        exponents = torch.where(most > 0, torch.ceil(torch.log2(most / E4M3_MAX)), 0.0)
        # log2 of a power of two may be off by its last bit: settle by comparing
        exponents += (most > E4M3_MAX * torch.exp2(exponents)).to(torch.float64)
        exponents -= (most <= E4M3_MAX * torch.exp2(exponents - 1)).to(torch.float64)
        exponents = torch.where(most > 0, exponents, 0.0).clamp(-127, 127)
        scales = torch.exp2(exponents)
        stored = (exponents + 127).to(torch.uint8).view(torch.float8_e8m0fnu)
    else:
        scales = stored_scales(most / E4M3_MAX, target.dtype)
        stored = scales.to(target.dtype)
    spread = scales.repeat_interleave(tall, 0)[: len(values)]
    spread = spread.repeat_interleave(wide, 1)[:, : scheme.shape[1]]
    out["weight"][rows] = to_e4m3(values / spread)
    first = rows.start // tall
    target[first : first + down] = stored
