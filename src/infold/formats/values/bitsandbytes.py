"""bitsandbytes: int8 rows, and NF4 or FP4 in blocks.

int8      weight I8 (out, in), SCB F32 (out): W = weight * SCB / 127
NF4, FP4  weight U8, two codes a byte, the first in the high half; quant_map F32 (16). The same
          bytes may be called floats (bnb_4bit_quant_storage)
          W.flatten()[n] = quant_map[code[n]] * absmax[n // blocksize]

absmax is F32, or doubly quantized: U8 codes of nested_quant_map, times nested_absmax of every
nested_block blocks, plus nested_offset; in float32, as bitsandbytes computes it.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from infold.formats import bitsandbytes
from infold.formats.stored import Field, NoFold, Stored
from infold.formats.values import integers
from infold.formats.values.scheme import (
    Matrix,
    NoValues,
    Parts,
    Scheme,
    need,
    stored_scales,
)

__all__ = ["PARTS", "absmax_of", "decode", "encode", "encoded", "scheme"]

PARTS = bitsandbytes.PARTS

_ALL = slice(None)
_STORAGE = {"U8": 1, "I8": 1, "BF16": 2, "F16": 2, "F32": 4}  # bytes of what holds the codes


def scheme(stored: Stored) -> Scheme:
    """Raises NoValues where quant_state does not tell what is needed."""
    try:
        outputs, inputs = bitsandbytes.shape(stored)
        if not bitsandbytes.is_4bit(stored):
            need(stored, "SCB", ("F32",), (outputs,), (outputs, 1))
            return Scheme((outputs, inputs))
        told = bitsandbytes.state(stored)
    except NoFold as error:
        raise NoValues(str(error)) from None
    block, kind = told.get("blocksize"), told.get("quant_type")
    count, absmax = outputs * inputs, stored.shape("weight.absmax")
    if type(block) is not int or block < 1 or kind not in ("nf4", "fp4"):
        raise NoValues("its quant_state tells no blocksize or no type that is known here")
    if stored.shape("weight.quant_map") != (16,) or absmax != (-(-count // block),):
        raise NoValues("its quant_map or absmax does not suit its weight")
    held, rest = divmod(-(-count // 2), _STORAGE.get(stored.dtype("weight") or "", 1))
    if rest:
        raise NoValues(f"its weight is {stored.dtype('weight')}, which {count} codes do not fill")
    need(stored, "weight", _STORAGE, (held, 1), (held,))
    need(stored, "weight.quant_map", ("F32",), (16,))
    offset, nested = 0.0, 256
    if stored.dtype("weight.absmax") == "U8":
        size, shift = told.get("nested_blocksize"), told.get("nested_offset")
        outer = stored.shape("weight.nested_absmax")
        if type(size) is not int or size < 1 or not isinstance(shift, int | float):
            raise NoValues("its quant_state does not tell how absmax is quantized")
        need(stored, "weight.nested_absmax", ("F32",), outer or ())
        need(stored, "weight.nested_quant_map", ("F32",), (256,))
        if outer != (-(-absmax[0] // size),):
            raise NoValues("its nested_absmax does not suit its absmax")
        offset, nested = float(shift), size
    elif stored.dtype("weight.absmax") != "F32":
        raise NoValues(f"its absmax is {stored.dtype('weight.absmax')}")
    return Scheme((outputs, inputs), 4, block, kind=kind, offset=offset, nested_block=nested)


def encoded(stored: Stored) -> dict[str, Field | None]:
    """The tensors that `encode` writes anew. Scales that are quantized themselves become plain: the
    tensors of their quantization are dropped, and loaders go by which of them are there."""
    if not bitsandbytes.is_4bit(stored):
        return {part: stored.tensors[part] for part in ("weight", "SCB")}
    how = scheme(stored)
    if how.shape[1] % how.group:
        raise NoValues(f"its rows of {how.shape[1]} elements share blocks of {how.group}")
    absmax = stored.tensors["weight.absmax"]
    nested = ("weight.nested_absmax", "weight.nested_quant_map")
    return {
        "weight": stored.tensors["weight"],
        "weight.absmax": replace(absmax, dtype="F32"),
        **{part: None for part in nested if part in stored.tensors},
    }


def decode(parts: Parts, scheme: Scheme, rows: slice) -> Tensor:
    """float64 (rows, in)."""
    if not scheme.kind:
        return integers.decode(parts["weight"][rows, _ALL], parts["SCB"][rows, _ALL], None, 0, 127)
    inputs = scheme.shape[1]
    first, last = rows.start * inputs, rows.stop * inputs
    packed = _codes(parts["weight"], scheme, first // 2, -(-last // 2))
    codes = torch.stack((packed >> 4, packed & 15), 1).flatten()
    codes = codes[first % 2 : first % 2 + last - first].to(torch.int64)
    table = parts["weight.quant_map"][_ALL, _ALL].flatten().to(torch.float64)
    size = scheme.group
    top, bottom = first // size, -(-last // size)
    absmax = absmax_of(parts, scheme, slice(top, bottom)).to(torch.float64)
    values = table[codes]
    values *= absmax.repeat_interleave(size)[first - top * size : last - top * size]
    return values.view(rows.stop - rows.start, inputs)


def _codes(stored: Matrix, scheme: Scheme, first: int, last: int) -> Tensor:
    """Some bytes of the codes, whatever the elements that hold them are called."""
    width = max(1, -(-math.prod(scheme.shape) // 2) // max(1, math.prod(stored.shape)))
    held = stored[slice(first // width, -(-last // width)), _ALL].contiguous().view(torch.uint8)
    return held.flatten()[first % width : first % width + last - first]


def absmax_of(parts: Parts, scheme: Scheme, blocks: slice) -> Tensor:
    """float32 absmax of some blocks, unnested as bitsandbytes does it."""
    stored = parts["weight.absmax"][blocks, _ALL].flatten()
    if stored.dtype != torch.uint8:
        return stored
    table = parts["weight.nested_quant_map"][_ALL, _ALL].flatten()
    size = scheme.nested_block
    first = blocks.start // size
    outer = parts["weight.nested_absmax"][slice(first, -(-blocks.stop // size)), _ALL].flatten()
    spread = outer.repeat_interleave(size)[blocks.start - first * size : blocks.stop - first * size]
    return table[stored.to(torch.int64)] * spread + torch.tensor(scheme.offset, dtype=torch.float32)


def encode(
    values: Tensor, scheme: Scheme, parts: Parts, rows: slice, out: dict[str, Tensor]
) -> None:
    """Round float64 rows to the nearest codes under each row's or block's absmax.

    absmax is written plain, not quantized itself. For 4 bits rows are whole blocks.
    """
    if not scheme.kind:
        codes, scales = integers.encode(values, 0, 127, torch.float32, 127)
        out["weight"][rows] = codes.to(torch.int8)
        out["SCB"][rows] = scales
        return
    first, last = rows.start * scheme.shape[1], rows.stop * scheme.shape[1]
    blocks = values.view(-1, scheme.group)
    absmax = stored_scales(blocks.abs().amax(1), torch.float32)
    table = parts["weight.quant_map"][_ALL, _ALL].flatten().to(torch.float64)
    levels, order = table.sort()
    middles = (levels[1:] + levels[:-1]) / 2
    codes = order[torch.bucketize(blocks / absmax[:, None], middles)].flatten().to(torch.uint8)
    packed = out["weight"].view(-1).view(torch.uint8)
    packed[first // 2 : last // 2] = codes[0::2] << 4 | codes[1::2]
    start = first // scheme.group
    out["weight.absmax"].view(-1)[start : start + len(absmax)] = absmax.float()
