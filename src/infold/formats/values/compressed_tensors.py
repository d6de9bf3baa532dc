"""compressed-tensors: packed integers, plain integers, and FP8 by tensor, row or block.

    weight_packed      I32 (out, in * bits / 32)       codes + 2^(bits - 1), see `bits`
    weight             I8 or F8_E4M3 (out, in)         codes
    weight_scale       (out, groups), (out, 1), (1) or, for FP8, blocks
    weight_zero_point  packed I32 (out * bits / 32, groups), or I8 like the scale; none: symmetric
    weight_g_idx       I32 (in)                        the group of each input, with act-order

W = (code - zero) * scale. Source: the files that the compressed-tensors package writes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from infold.dtypes import TORCH_DTYPES
from infold.formats import compressed_tensors
from infold.formats.stored import Field, NoFold, Stored
from infold.formats.values import fp8, integers
from infold.formats.values.bits import pack, unpack, words
from infold.formats.values.scheme import (
    NoValues,
    Parts,
    Scheme,
    affine,
    need,
    span,
    spread,
    stored_scales,
)

__all__ = ["PARTS", "decode", "encode", "encoded", "scheme"]

PARTS = compressed_tensors.PARTS

_ALL = slice(None)


def scheme(stored: Stored) -> Scheme:
    """Raises NoValues for what is not known here: NVFP4, MX formats, sparsity."""
    if stored.dtype("weight") == "F8_E4M3":
        return fp8.scheme(stored)
    try:
        outputs, inputs = compressed_tensors.shape(stored)
    except NoFold as error:
        raise NoValues(str(error)) from None
    scale = stored.shape("weight_scale")
    floats = stored.dtype("weight_packed") == "U8" or "weight_global_scale" in stored.tensors
    if scale is None or floats:
        raise NoValues("its 4-bit floats (NVFP4, MXFP4) are not known here")
    if "weight_packed" in stored.tensors:
        need(stored, "weight_shape", ("I64", "I32"), (2,))
    count = scale if len(scale) == 2 else (math.prod(scale), 1)
    rows = count[0] == outputs and count[1] > 0 and inputs % count[1] == 0
    if stored.dtype("weight_scale") not in TORCH_DTYPES or not (count == (1, 1) or rows):
        raise NoValues(f"its scales {list(scale)} do not suit its shape {[outputs, inputs]}")
    bits, packed = 8, stored.shape("weight_packed")
    if packed is not None:
        fitting = [b for b in range(1, 9) if words(inputs, b) == packed[1]]
        if len(fitting) != 1 or packed[0] != outputs:
            raise NoValues(f"how many bits its codes have is not clear from {list(packed)}")
        bits = fitting[0]
    if len(scale) > 2 or (count[0] == 1) != (math.prod(scale) == 1):
        raise NoValues(f"its scales {list(scale)} do not suit its shape {[outputs, inputs]}")
    zero = stored.tensors.get("weight_zero_point")
    if zero is not None and packed is not None and zero.dtype == "I32":
        need(stored, "weight_zero_point", ("I32",), (words(outputs, bits), count[1]))
    need(
        stored,
        "weight_zero_point",
        ("I32", "I8"),
        zero.shape if zero else scale,
        scale,
        there=False,
    )
    need(stored, "weight_g_idx", ("I32", "I64"), (inputs,), there=False)
    return Scheme((outputs, inputs), bits, inputs // count[1], zero is None, kind="int")


def encoded(stored: Stored) -> dict[str, Field | None]:
    """The tensors that `encode` writes anew."""
    if stored.dtype("weight") == "F8_E4M3":
        return fp8.encoded(stored)
    how = scheme(stored)
    if math.prod(stored.tensors["weight_scale"].shape) < how.shape[0]:
        raise NoValues("one scale belongs to the whole tensor, so its rows cannot be rounded apart")
    changed = ("weight_packed", "weight", "weight_scale", "weight_zero_point")
    return {part: stored.tensors[part] for part in changed if part in stored.tensors}


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
        there = slice(wide.start * scheme.bits // 32, words(wide.stop, scheme.bits))
        packed = stored[there, _ALL].t().contiguous()
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
            there = slice(rows.start * scheme.bits // 32, words(rows.stop, scheme.bits))
            target[there] = pack((zeros - least).to(torch.int64).t(), scheme.bits).t()
