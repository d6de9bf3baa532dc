"""GGUF's block types: a row is a sequence of blocks, each with its own scales.

`decode_rows` gives the float64 values of rows; `encode_rows`, for the plain types, their bytes. The
layouts are those of ggml's block structs; all multi-byte numbers are little-endian.

    Q4_0, Q5_0, Q8_0   w = d * q                 32 weights a block, q around zero
    Q4_1, Q5_1         w = d * q + m             32 weights a block
    Q2_K, Q4_K, Q5_K   w = d * s * q - dmin * m  256 weights a block, s and m of 16 or 32 weights
    Q3_K, Q6_K         w = d * s * q             256 weights a block, s of 16 weights
    IQ4_NL, IQ4_XS     w = d * s * table[q]      32 and 256 weights a block
    TQ2_0              w = d * q                 256 weights a block, q in -1, 0, 1
    Q1_0               w = d * q                 128 weights a block, q in -1, 1

The other IQ types look their codes up in tables of hundreds of vectors, and TQ1_0 packs five codes
into a byte. The gguf package has those (`BORROWED`). It computes in float32, which holds their
values exactly: a float16 times a scale of five bits times an entry of seven at most.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor

from infold.dtypes import TORCH_DTYPES
from infold.formats.dense import encode as encode_dense
from infold.formats.stored import Field, Stored
from infold.formats.values.scheme import NoValues, Parts, Scheme, stored_scales
from infold.ggml import BLOCKS

__all__ = [
    "BORROWED",
    "ENCODES",
    "PARTS",
    "TYPES",
    "decode",
    "decode_rows",
    "encode",
    "encode_rows",
    "encoded",
    "scheme",
]

PARTS: tuple[str, ...] = ("",)  # the tensor is the weight
_ALL = slice(None)

ENCODES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
_OTHERS = ", ".join(kind.lower() for kind in ENCODES[:-1])
_IQ4 = torch.tensor(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=torch.float64
)


def scheme(stored: Stored) -> Scheme:
    """Raises NoValues for types whose tables are not known here, and for what is no matrix."""
    field = stored.tensors[""]
    if field.dtype not in _DECODERS:
        raise NoValues(f"values of the type {field.dtype} are not known here")
    if field.dtype in BORROWED and find_spec("gguf") is None:
        raise NoValues(
            f"values of the type {field.dtype} are read by the gguf package, which is not "
            "installed: pip install gguf"
        )
    if len(field.shape) != 2:
        raise NoValues(f"its shape {list(field.shape)} is no matrix")
    return Scheme((field.shape[0], field.shape[1]), kind=field.dtype)


def encoded(stored: Stored) -> dict[str, Field | None]:
    """The tensor itself, where its type is of ENCODES."""
    field = stored.tensors[""]
    if field.dtype not in ENCODES:
        raise NoValues(
            f"{field.dtype} is not made by plain rounding; --dtype q8_0 (or {_OTHERS}) writes it "
            "in a type that is"
        )
    return {"": field}


def decode(parts: Parts, scheme: Scheme, rows: slice) -> Tensor:
    """float64 (rows, in)."""
    return decode_rows(scheme.kind, parts[""][rows, _ALL])


def encode(
    values: Tensor, scheme: Scheme, parts: Parts, rows: slice, out: dict[str, Tensor]
) -> None:
    """Round float64 rows into the type of `out`, which `scheme.kind` names."""
    out[""][rows] = encode_rows(scheme.kind, values)


def decode_rows(kind: str, rows: Tensor) -> Tensor:
    """Bytes (rows, row bytes) of a type -> float64 (rows, in). KeyError for an unknown type."""
    if kind in TORCH_DTYPES:
        return rows.contiguous().view(TORCH_DTYPES[kind]).to(torch.float64)
    elements, size = BLOCKS[kind]
    blocks = rows.reshape(-1, size)
    return _DECODERS[kind](blocks).view(len(rows), rows.shape[1] // size * elements)


def encode_rows(kind: str, values: Tensor) -> Tensor:
    """float64 (rows, in) -> bytes (rows, row bytes), by plain absmax (or minimum and maximum)
    rounding: codes are the nearest for the scale as it is stored. KeyError where that is no type
    of ENCODES and no dense one."""
    if kind in TORCH_DTYPES:
        name = kind
        return encode_dense(values, name).contiguous().view(torch.uint8).view(len(values), -1)
    if kind not in ENCODES:
        raise KeyError(kind)
    elements, size = BLOCKS[kind]
    blocks = values.reshape(-1, elements)
    return _encode(kind, blocks).view(len(values), values.shape[1] // elements * size)


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at a byte offset of each block, (blocks, 1)."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).to(torch.float64)


def _nibbles(packed: Tensor) -> Tensor:
    """The low halves of all bytes of a block, then the high halves."""
    return torch.cat((packed & 15, packed >> 4), 1)


def _fifth(blocks: Tensor, at: int) -> Tensor:
    """The fifth bits of 32 codes, as 0 or 16."""
    bits = blocks[:, at : at + 4, None] >> torch.arange(8, dtype=torch.uint8)
    return (bits & 1).reshape(len(blocks), 32) << 4


def _q4_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:]).to(torch.float64) - 8)


def _q4_1(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:]).to(torch.float64) + _half(blocks, 2)


def _q5_0(blocks: Tensor) -> Tensor:
    codes = _nibbles(blocks[:, 6:]) | _fifth(blocks, 2)
    return _half(blocks, 0) * (codes.to(torch.float64) - 16)


def _q5_1(blocks: Tensor) -> Tensor:
    codes = _nibbles(blocks[:, 8:]) | _fifth(blocks, 4)
    return _half(blocks, 0) * codes.to(torch.float64) + _half(blocks, 2)


def _q8_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * blocks[:, 2:].contiguous().view(torch.int8).to(torch.float64)


def _pairs(packed: Tensor) -> Tensor:
    """Codes of 2 bits: each 32 bytes hold 128, the lowest bits of all first. (blocks, n, 128)"""
    halves = packed.view(len(packed), -1, 1, 32)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]
    return ((halves >> shifts) & 3).view(len(packed), -1)


def _fourfold(packed: Tensor) -> Tensor:
    """Codes of 4 bits: each 32 bytes hold 64, the low halves of all first."""
    quarters = packed.view(len(packed), -1, 1, 32)
    shifts = torch.tensor([0, 4], dtype=torch.uint8)[:, None]
    return ((quarters >> shifts) & 15).view(len(packed), -1)


def _sub(codes: Tensor, scales: Tensor, size: int) -> Tensor:
    """Codes times the scale of each `size` of them."""
    values = codes.to(torch.float64).view(len(codes), -1, size)
    return (values * scales.to(torch.float64)[:, :, None]).view(len(codes), -1)


def _affine(codes: Tensor, scales: Tensor, minima: Tensor, size: int) -> Tensor:
    values = codes.to(torch.float64).view(len(codes), -1, size)
    return (values * scales[:, :, None] - minima[:, :, None]).view(len(codes), -1)


def _q2_k(blocks: Tensor) -> Tensor:
    both, codes = blocks[:, :16], _pairs(blocks[:, 16:80])
    scales = _half(blocks, 80) * (both & 15).to(torch.float64)
    minima = _half(blocks, 82) * (both >> 4).to(torch.float64)
    return _affine(codes, scales, minima, 16)


def _q3_k(blocks: Tensor) -> Tensor:
    low = _pairs(blocks[:, 32:96]).to(torch.int32)
    mask = blocks[:, None, :32] >> torch.arange(8, dtype=torch.uint8)[:, None]
    codes = low - 4 * (1 - (mask & 1).view(len(blocks), 256).to(torch.int32))
    packed = blocks[:, 96:108]
    fours = torch.cat((packed[:, :8] & 15, packed[:, :8] >> 4), 1)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]
    twos = ((packed[:, None, 8:] >> shifts) & 3).view(len(blocks), 16)
    scales = (fours | (twos << 4)).to(torch.float64) - 32
    return _sub(codes, _half(blocks, 108) * scales, 16)


def _six_bits(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Eight scales and eight minima of 6 bits from 12 bytes, as float64."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat((first & 63, (third & 15) | ((first >> 6) << 4)), 1)
    minima = torch.cat((second & 63, (third >> 4) | ((second >> 6) << 4)), 1)
    return scales.to(torch.float64), minima.to(torch.float64)


def _q4_k(blocks: Tensor) -> Tensor:
    scales, minima = _six_bits(blocks[:, 4:16])
    codes = _fourfold(blocks[:, 16:])
    return _affine(codes, _half(blocks, 0) * scales, _half(blocks, 2) * minima, 32)


def _q5_k(blocks: Tensor) -> Tensor:
    scales, minima = _six_bits(blocks[:, 4:16])
    bits = blocks[:, None, 16:48] >> torch.arange(8, dtype=torch.uint8)[:, None]
    codes = _fourfold(blocks[:, 48:]) | ((bits & 1) << 4).view(len(blocks), 256)
    return _affine(codes, _half(blocks, 0) * scales, _half(blocks, 2) * minima, 32)


def _q6_k(blocks: Tensor) -> Tensor:
    low = blocks[:, :128].view(-1, 2, 1, 64) >> torch.tensor([0, 4], dtype=torch.uint8)[:, None]
    fours = (low & 15).view(len(blocks), 256)
    twos = _pairs(blocks[:, 128:192])
    codes = (fours | (twos << 4)).to(torch.int32) - 32
    scales = blocks[:, 192:208].contiguous().view(torch.int8).to(torch.float64)
    return _sub(codes, _half(blocks, 208) * scales, 16)


def _iq4_nl(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * _IQ4[_nibbles(blocks[:, 2:]).to(torch.int64)]


def _iq4_xs(blocks: Tensor) -> Tensor:
    high = blocks[:, 2:4].contiguous().view(torch.int16).to(torch.int32)
    twos = (high >> torch.arange(0, 16, 2)) & 3
    fours = torch.stack((blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4), 2).view(len(blocks), 8)
    scales = (fours.to(torch.int32) | (twos << 4)).to(torch.float64) - 32
    packed = blocks[:, 8:].reshape(-1, 16)
    codes = _nibbles(packed).view(len(blocks), 256).to(torch.int64)
    return _sub(_IQ4[codes], _half(blocks, 0) * scales, 32)


def _tq2_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 64) * (_pairs(blocks[:, :64]).to(torch.float64) - 1)


def _q1_0(blocks: Tensor) -> Tensor:
    bits = (blocks[:, 2:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return _half(blocks, 0) * (2 * bits.view(len(blocks), 128).to(torch.float64) - 1)


def _borrowed(kind: str, blocks: Tensor) -> Tensor:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    values = dequantize(blocks.contiguous().numpy(), GGMLQuantizationType[kind])
    return torch.from_numpy(values).to(torch.float64)


BORROWED = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "TQ1_0")
_DECODERS: dict[str, Callable[[Tensor], Tensor]] = {
    **{kind: partial(_borrowed, kind) for kind in BORROWED},
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0,
    "Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl, "IQ4_XS": _iq4_xs, "TQ2_0": _tq2_0, "Q1_0": _q1_0,
}  # fmt: skip


TYPES = tuple(_DECODERS)


def _encode(kind: str, blocks: Tensor) -> Tensor:
    half = torch.float16
    if kind == "Q8_0":
        scale = stored_scales(blocks.abs().amax(1) / 127, half)[:, None]
        codes = torch.round(blocks / scale).clamp(-127, 127).to(torch.int8)
        return torch.cat((_bytes(scale), codes.view(torch.uint8)), 1)
    bits = int(kind[1])
    top = (1 << bits) - 1
    if kind.endswith("_1"):
        least, most = blocks.amin(1), blocks.amax(1)
        scale = stored_scales((most - least) / top, half)[:, None]
        # the minimum is stored too, and codes are counted from it as it is stored
        minimum = encode_dense(least, "F16")[:, None]
        codes = torch.round((blocks - minimum.to(torch.float64)) / scale).clamp(0, top)
        head = torch.cat((_bytes(scale), minimum.view(torch.uint8)), 1)
    else:
        # the weight that is farthest from zero gets the lowest code, whichever its sign
        where = blocks.abs().argmax(1, keepdim=True)
        extreme = blocks.gather(1, where)[:, 0]
        scale = stored_scales(extreme / -((top + 1) // 2), half)[:, None]
        codes = (torch.round(blocks / scale) + (top + 1) // 2).clamp(0, top)
        head = _bytes(scale)
    whole = codes.to(torch.uint8)
    low = whole & 15
    packed = low[:, :16] | low[:, 16:] << 4
    if bits == 4:
        return torch.cat((head, packed), 1)
    fifth = (whole >> 4).view(len(blocks), 4, 8) << torch.arange(8, dtype=torch.uint8)
    return torch.cat((head, fifth.sum(2, dtype=torch.int64).to(torch.uint8), packed), 1)


def _bytes(scale: Tensor) -> Tensor:
    """Scales (blocks, 1) as the bytes of float16."""
    return scale.to(torch.float16).contiguous().view(torch.uint8)
