"""AWQ, gemm order: W[o, i] = scales[i // g, o] * (q[i, o] - zero[i // g, o]), 4 bits.

    qweight  I32 (in, out / 8)      eight outputs a word
    qzeros   I32 (in / g, out / 8)  in the same order
    scales   F16 (in / g, out)      in the natural order

A word holds outputs 0, 2, 4, 6, 1, 3, 5, 7, the first in its lowest bits. Source: AutoAWQ's files.
"""

from __future__ import annotations

import torch
from torch import Tensor

from infold.formats import awq
from infold.formats.stored import Field, Stored
from infold.formats.values.bits import pack, unpack
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

PARTS = awq.PARTS

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_PLACE = torch.tensor([ORDER.index(output) for output in range(8)])  # where each output lies
_ORDER = torch.tensor(ORDER)
_ALL = slice(None)


def _natural(packed: Tensor) -> Tensor:
    """Words (n, outputs / 8) -> codes (outputs, n)."""
    codes = unpack(packed.contiguous(), 4, 8 * packed.shape[1])
    return codes.view(len(packed), -1, 8)[:, :, _PLACE].reshape(len(packed), -1).t()


def _stored(codes: Tensor) -> Tensor:
    """Codes (outputs, n) -> words (n, outputs / 8)."""
    ordered = codes.t().reshape(codes.shape[1], -1, 8)[:, :, _ORDER]
    return pack(ordered.reshape(codes.shape[1], -1), 4)


def scheme(stored: Stored) -> Scheme:
    """Raises NoValues for the other orders of AWQ."""
    told = [str(stored.config.get(field, "")).lower() for field in ("version", "format")]
    (inputs, packed), scales = stored.tensors["qweight"].shape, stored.tensors["scales"].shape
    plain = stored.dtype("qweight") == "I32" and packed * 8 == scales[1]
    if not plain or any("marlin" in kind or "gemv" in kind for kind in told):
        raise NoValues("only AWQ's gemm order is known here")
    if stored.config.get("bits", 4) != 4 or not scales[0] or inputs % scales[0]:
        raise NoValues("only AWQ of 4 bits in whole groups is known here")
    need(stored, "qzeros", ("I32",), (scales[0], packed))
    need(stored, "scales", FLOATS, (scales[0], packed * 8))
    return Scheme((packed * 8, inputs), 4, inputs // scales[0], symmetric=False)


def encoded(stored: Stored) -> dict[str, Field | None]:
    """The tensors that `encode` writes anew."""
    return {part: stored.tensors[part] for part in PARTS}


def decode(parts: Parts, scheme: Scheme, rows: slice) -> Tensor:
    """float64 (rows, in)."""
    outputs, inputs = scheme.shape
    wide, mine = span(rows, outputs, 8)
    words = slice(wide.start // 8, wide.stop // 8)
    codes = _natural(parts["qweight"][_ALL, words])[mine]
    zeros = _natural(parts["qzeros"][_ALL, words])[mine].to(torch.float64)
    scales = parts["scales"][_ALL, rows].t().to(torch.float64)
    group = scheme.group or inputs
    return affine(
        codes,
        zeros.repeat_interleave(group, 1)[:, :inputs],
        scales.repeat_interleave(group, 1)[:, :inputs],
    )


def encode(
    values: Tensor, scheme: Scheme, parts: Parts, rows: slice, out: dict[str, Tensor]
) -> None:
    """Round float64 rows to the nearest of 16 steps from min(w, 0) to max(w, 0) of each group."""
    group = scheme.group or scheme.shape[1]
    grouped = values.view(len(values), -1, group)
    low, high = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
    scales = stored_scales((high - low) / 15, out["scales"].dtype)
    zeros = torch.round(-low / scales).clamp(0, 15)
    codes = (torch.round(grouped / scales[:, :, None]) + zeros[:, :, None]).clamp(0, 15)
    words = slice(rows.start // 8, rows.stop // 8)
    out["qweight"][:, words] = _stored(codes.view(values.shape).to(torch.int64))
    out["qzeros"][:, words] = _stored(zeros.to(torch.int64))
    out["scales"][:, rows] = scales.t().to(out["scales"].dtype)
