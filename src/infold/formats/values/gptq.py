"""GPTQ: W[o, i] = scales[g, o] * (q[i, o] - zero[g, o]) with g = g_idx[i].

    qweight  I32 (in * bits / 32, out)       codes, packed along the inputs
    qzeros   I32 (groups, out * bits / 32)   zero points, packed along the outputs
    scales   F16 (groups, out)
    g_idx    I32 (in)                        the group of each input; in any order (act-order)

Bits lie as in `bits`, 3-bit codes included. The first version of the format stores each zero point
less one (`plus_one`), the second as it is. Source: the files of AutoGPTQ and GPTQModel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from infold.errors import Refusal
from infold.formats import gptq
from infold.formats.stored import Field, Stored
from infold.formats.values.bits import pack, unpack, words
from infold.formats.values.scheme import (
    FLOATS,
    NoValues,
    Parts,
    Scheme,
    affine,
    need,
    span,
    stored_scales,
)

__all__ = ["PARTS", "decode", "encode", "encoded", "scheme"]

PARTS = gptq.PARTS

_ALL = slice(None)


def scheme(stored: Stored) -> Scheme:
    """Raises NoValues where the files do not tell how they are to be read."""
    told = [str(stored.config.get(field, "")) for field in ("checkpoint_format", "format")]
    if any("marlin" in kind for kind in told) or stored.config.get("is_marlin_format"):
        raise NoValues(
            "its codes lie in the order of Marlin kernels; use the plain GPTQ checkpoint"
        )
    bits, (outputs, inputs) = gptq.bits(stored), gptq.shape(stored)
    groups = stored.tensors["scales"].shape[0]
    if bits not in (2, 3, 4, 8) or not groups:
        raise NoValues(f"GPTQ of {bits} bits in {groups} groups is not known here")
    need(stored, "qweight", ("I32",), (words(inputs, bits), outputs))
    need(stored, "qzeros", ("I32",), (groups, words(outputs, bits)))
    need(stored, "scales", FLOATS, (groups, outputs))
    need(stored, "g_idx", ("I32", "I64"), (inputs,), there=False)
    symmetric = stored.config.get("sym") is not False
    plus_one = "gptq_v2" not in told
    group = -(-inputs // max(groups, 1))
    return Scheme((outputs, inputs), bits, group, symmetric, plus_one)


def encoded(stored: Stored) -> dict[str, Field | None]:
    """The tensors that `encode` writes anew."""
    return {part: stored.tensors[part] for part in ("qweight", "qzeros", "scales")}


def decode(parts: Parts, scheme: Scheme, rows: slice) -> Tensor:
    """float64 (rows, in). Raises Refusal for a zero point on whose meaning the kernels disagree."""
    inputs = scheme.shape[1]
    packed = parts["qweight"][_ALL, rows].t().contiguous()
    codes = unpack(packed, scheme.bits, inputs)
    groups = _groups(parts, scheme)
    scales = parts["scales"][_ALL, rows].t().to(torch.float64)
    zeros = _zeros(parts, scheme, rows).to(torch.float64)
    return affine(codes, zeros[:, groups], scales[:, groups])


def _groups(parts: Parts, scheme: Scheme) -> Tensor:
    """The group of each input."""
    inputs = scheme.shape[1]
    if "g_idx" in parts:
        groups = parts["g_idx"][_ALL, _ALL].flatten().to(torch.int64)
        if (
            len(groups)
            and not 0 <= int(groups.min()) <= int(groups.max()) < parts["scales"].shape[0]
        ):
            raise Refusal("g_idx names a group that has no scale")
        return groups
    return torch.arange(inputs) // (scheme.group or inputs)


def _zeros(parts: Parts, scheme: Scheme, rows: slice) -> Tensor:
    """Zero points (rows, groups)."""
    wide, mine = span(rows, scheme.shape[0], 32)
    columns = slice(wide.start * scheme.bits // 32, -(-wide.stop * scheme.bits // 32))
    zeros = unpack(parts["qzeros"][_ALL, columns].contiguous(), scheme.bits, wide.stop - wide.start)
    zeros = zeros[:, mine].t()
    if not scheme.plus_one:
        return zeros
    if (zeros == (1 << scheme.bits) - 1).any():
        raise Refusal(
            "a zero point of the first GPTQ version is stored as all ones, which some kernels "
            f"read as {1 << scheme.bits} and others as 0"
        )
    return zeros + 1


def encode(
    values: Tensor, scheme: Scheme, parts: Parts, rows: slice, out: dict[str, Tensor]
) -> None:
    """Round float64 rows to the nearest codes, with the group scales that their extremes ask for.

    Symmetric: scale = 2 max|w| / (2^bits - 1), zero = 2^(bits - 1), as GPTQ's own grid. Otherwise
    from min(w, 0) to max(w, 0). `g_idx` stays: groups keep their inputs.
    `out`: the parts as they will be stored, of which these rows are written.
    """
    groups = _groups(parts, scheme)
    count, top = parts["scales"].shape[0], (1 << scheme.bits) - 1
    index = groups.expand(len(values), -1)
    shape = (len(values), count)
    if scheme.symmetric:
        least = values.new_zeros(shape).scatter_reduce(1, index, values.abs(), "amax")
        scales, zeros = stored_scales(2 * least / top, out["scales"].dtype), None
    else:
        low = values.new_zeros(shape).scatter_reduce(1, index, values, "amin")
        high = values.new_zeros(shape).scatter_reduce(1, index, values, "amax")
        scales = stored_scales((high - low) / top, out["scales"].dtype)
        # a stored zero point of the first version is one less, so it must be at least 1
        zeros = torch.round(-low / scales).clamp(int(scheme.plus_one), top)
    middle = scales.new_full(shape, (top + 1) // 2) if zeros is None else zeros
    codes = torch.round(values / scales[:, groups]) + middle[:, groups]
    codes = codes.clamp_(0, top).to(torch.int64)
    out["qweight"][:, rows] = pack(codes, scheme.bits).t()
    out["scales"][:, rows] = scales.t().to(out["scales"].dtype)
    columns = slice(rows.start * scheme.bits // 32, -(-rows.stop * scheme.bits // 32))
    stored = middle.to(torch.int64) - int(scheme.plus_one)
    out["qzeros"][:, columns] = pack(stored.t().contiguous(), scheme.bits)
