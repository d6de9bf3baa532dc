"""compressed-tensors: packed integers, plain integers, and FP8 by tensor, row or block.

    weight_packed      I32 (out, in * bits / 32)       codes + 2^(bits - 1), see `bits`
    weight             I8 or F8_E4M3 (out, in)         codes
    weight_scale       (out, groups), (out, 1), (1) or, for FP8, blocks
    weight_zero_point  packed I32 (out * bits / 32, groups), or I8 like the scale; none: symmetric
    weight_g_idx       I32 (in)                        the group of each input, with act-order

W = (code - zero) * scale. Source: the files that the compressed-tensors package writes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from infold.formats.values import fp8, integers
from infold.formats.values.bits import pack, unpack
from infold.formats.values.scheme import Parts, Scheme, affine, span, spread, stored_scales

__all__ = ["ALIGN", "decode", "encode"]

ALIGN = 32
_ALL = slice(None)


def decode(parts: Parts, scheme: Scheme, rows: slice) -> Tensor:
    """float64 (rows, in)."""
    if scheme.kind == "fp8":
        return fp8.decode(parts, scheme, rows)
    scale = parts["weight_scale"]
    mine = scale[rows if scale.shape[0] > 1 else _ALL, _ALL].to(torch.float64)
    zero = _zeros(parts, scheme, rows)
    if "weight_packed" not in parts:
        return integers.decode(parts["weight"][rows, _ALL], mine, zero, scheme.group)
    inputs = scheme.shape[1]
    codes = unpack(parts["weight_packed"][rows, _ALL], scheme.bits, inputs)
    codes -= 1 << (scheme.bits - 1)
    groups = _groups(parts)
    each = spread(mine, scheme.group, inputs) if groups is None else mine[:, groups]
    if zero is None:
        return affine(codes, 0.0, each)
    middle = spread(zero, scheme.group, inputs) if groups is None else zero[:, groups]
    return affine(codes, middle, each)


def _groups(parts: Parts) -> Tensor | None:
    if "weight_g_idx" not in parts:
        return None
    groups = parts["weight_g_idx"][_ALL, _ALL].flatten().to(torch.int64)
    return None if (groups < 0).any() else groups  # -1: not initialized, so groups lie in order


def _zeros(parts: Parts, scheme: Scheme, rows: slice) -> Tensor | None:
    """Zero points (rows, groups) as float64."""
    if "weight_zero_point" not in parts:
        return None
    stored = parts["weight_zero_point"]
    if "weight_packed" in parts and stored.shape[0] != scheme.shape[0]:
        wide, mine = span(rows, scheme.shape[0], 32)
        words = slice(wide.start * scheme.bits // 32, -(-wide.stop * scheme.bits // 32))
        packed = stored[words, _ALL].t().contiguous()
        zeros = unpack(packed, scheme.bits, wide.stop - wide.start).t()[mine]
        return (zeros - (1 << (scheme.bits - 1))).to(torch.float64)
    return stored[rows if stored.shape[0] > 1 else _ALL, _ALL].to(torch.float64)


def encode(
    values: Tensor, scheme: Scheme, parts: Parts, rows: slice, out: dict[str, Tensor]
) -> None:
    """Round float64 rows to the nearest codes: symmetric 2 max|w| / (2^bits - 1) for a step, else
    from min(w, 0) to max(w, 0), as the package's own observers have it. FP8: see `fp8`."""
    if scheme.kind == "fp8":
        fp8.encode(values, scheme, parts, rows, out)
        return
    least, most = -(1 << (scheme.bits - 1)), (1 << (scheme.bits - 1)) - 1
    groups = _groups(parts)
    inputs = scheme.shape[1]
    if groups is None:
        groups = torch.arange(inputs) // (scheme.group or inputs)
    count = parts["weight_scale"].shape[1]
    index, shape = groups.expand(len(values), -1), (len(values), count)
    dtype = out["weight_scale"].dtype
    if "weight_zero_point" in parts:
        low = values.new_zeros(shape).scatter_reduce(1, index, values, "amin")
        high = values.new_zeros(shape).scatter_reduce(1, index, values, "amax")
        scales = stored_scales((high - low) / (most - least), dtype)
        zeros = torch.round(least - low / scales).clamp(least, most)
    else:
        reach = values.new_zeros(shape).scatter_reduce(1, index, values.abs(), "amax")
        scales = stored_scales(2 * reach / (most - least), dtype)
        zeros = torch.zeros_like(scales)
    codes = (torch.round(values / scales[:, groups]) + zeros[:, groups]).clamp(least, most)
    out["weight_scale"][rows] = scales.to(dtype)
    if "weight_packed" not in out:
        out["weight"][rows] = codes.to(torch.int8)
        if "weight_zero_point" in out:
            out["weight_zero_point"][rows] = zeros.to(out["weight_zero_point"].dtype)
        return
    out["weight_packed"][rows] = pack(codes.to(torch.int64) - least, scheme.bits)
    if "weight_zero_point" in out:
        target = out["weight_zero_point"]
        if target.shape[0] == scheme.shape[0]:
            target[rows] = zeros.to(target.dtype)
        else:
            words = slice(rows.start * scheme.bits // 32, -(-rows.stop * scheme.bits // 32))
            target[words] = pack((zeros - least).to(torch.int64).t(), scheme.bits).t()
