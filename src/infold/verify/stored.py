"""What the stored parts of quantized modules mean, stated anew: codes, zero points and scales.

Nothing of `formats/values` is used but the names of formats and the scheme that the plan found.
Codes are taken out of their words as bits, by NumPy, and floats from their tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from infold.formats.values import Matrix, Scheme
from infold.ggml import BLOCKS
from infold.verify.ggml import codes_of, half_at, values_of

__all__ = ["FLOATS8", "Grid", "decode", "grid"]

_ALL = slice(None)


@dataclass(frozen=True)
class Grid:
    """Rows of a module as it is stored: W[o, i] = (level[code] - zero[o, g]) * scale[o, g] with
    g = group[i].

    codes: (rows, in), numbers into `levels`, which ascend, unless `order` tells otherwise.
    zero, scale: (rows, groups), float64. scale_part, code_part, zero_part: where they are stored.
    """

    codes: Tensor
    levels: Tensor
    scale: Tensor
    zero: Tensor | None
    group: Tensor
    code_part: str
    scale_part: str
    zero_part: str = ""

    def values(self) -> Tensor:
        """float64 (rows, in)."""
        levels = self.levels[self.codes]
        if self.zero is not None:
            levels = levels - self.zero[:, self.group]
        return levels * self.scale[:, self.group]


def decode(form: str, parts: Mapping[str, Matrix], scheme: Scheme, rows: slice) -> Tensor:
    """float64 (rows, in) of a module, or of its nested scales."""
    if form == "bitsandbytes_absmax":
        return _absmax(parts, scheme, torch.arange(rows.start, rows.stop)).double()[:, None]
    if form == "ggml":
        size = BLOCKS[scheme.kind][1]
        data = parts[""][rows, _ALL].numpy()
        values = values_of(scheme.kind, data.reshape(-1, size))
        return torch.from_numpy(values.reshape(len(data), -1))
    return grid(form, parts, scheme, rows).values()


def grid(form: str, parts: Mapping[str, Matrix], scheme: Scheme, rows: slice) -> Grid:
    """Rows of a module. `parts` by their names in the format."""
    return _GRIDS[form](parts, scheme, rows)


def _bits(words: Tensor, bits: int, count: int) -> Tensor:
    """(n, words) -> (n, count): the words' bits in one row, the lowest first, cut into codes."""
    raw = np.ascontiguousarray(words.contiguous().numpy()).view(np.uint8)
    single = np.unpackbits(raw.reshape(len(words), -1), axis=1, bitorder="little")
    cut = single[:, : count * bits].reshape(len(words), count, bits)
    numbers = cut.astype(np.int64) @ (1 << np.arange(bits, dtype=np.int64))
    return torch.from_numpy(numbers)


def _across(words: Matrix, bits: int, rows: slice, along_rows: bool) -> Tensor:
    """Codes of some outputs that are packed along the outputs -> (rows, n).

    along_rows: the outputs' words lie below one another, not beside.
    """
    first, last = rows.start // 32, -(-rows.stop // 32)  # 32 codes end with a word
    size = words.shape[0 if along_rows else 1]
    there = slice(first * bits, min(last * bits, size))
    packed = words[there, _ALL].t() if along_rows else words[_ALL, there]
    count = (there.stop - there.start) * 32 // bits
    codes = _bits(packed.contiguous(), bits, count)
    return codes[:, rows.start - 32 * first : rows.stop - 32 * first].t()


def _even(scheme: Scheme, groups: int) -> Tensor:
    """The group of each input, where they follow each other."""
    inputs = scheme.shape[1]
    return torch.arange(inputs) // (-(-inputs // max(groups, 1)))


def _gptq(parts: Mapping[str, Matrix], scheme: Scheme, rows: slice) -> Grid:
    inputs, bits = scheme.shape[1], scheme.bits
    scale = parts["scales"][_ALL, rows].double().t()
    zero = _across(parts["qzeros"], bits, rows, False).double()
    group = _even(scheme, scale.shape[1])
    if "g_idx" in parts:
        group = parts["g_idx"][_ALL, _ALL].flatten().long()
    codes = _bits(parts["qweight"][_ALL, rows].t().contiguous(), bits, inputs)
    zero = zero + (1 if scheme.plus_one else 0)
    levels = torch.arange(1 << bits).double()
    return Grid(codes, levels, scale, zero, group, "qweight", "scales", "qzeros")


_SLOT = [0, 4, 1, 5, 2, 6, 3, 7]  # AWQ: which nibble of a word holds output 0, 1, ... of eight


def _awq(parts: Mapping[str, Matrix], scheme: Scheme, rows: slice) -> Grid:
    def natural(words: Matrix) -> Tensor:
        found = []
        for output in range(rows.start, rows.stop):
            word = words[_ALL, slice(output // 8, output // 8 + 1)].flatten().long() & 0xFFFFFFFF
            found.append(word >> 4 * _SLOT[output % 8] & 15)
        return torch.stack(found)

    scale = parts["scales"][_ALL, rows].double().t()
    zero = natural(parts["qzeros"]).double()
    codes = natural(parts["qweight"])
    levels = torch.arange(16).double()
    group = _even(scheme, scale.shape[1])
    return Grid(codes, levels, scale, zero, group, "qweight", "scales", "qzeros")


_I8 = torch.arange(-128, 128).double()


def _int8(codes: Tensor) -> Tensor:
    """Numbers into _I8."""
    return codes.long() + 128


def _bitsandbytes(parts: Mapping[str, Matrix], scheme: Scheme, rows: slice) -> Grid:
    inputs = scheme.shape[1]
    if not scheme.kind:
        scale = parts["SCB"][rows, _ALL].double() / 127
        group = torch.zeros(inputs, dtype=torch.int64)
        return Grid(_int8(parts["weight"][rows, _ALL]), _I8, scale, None, group, "weight", "SCB")
    first, count = rows.start * inputs, (rows.stop - rows.start) * inputs
    stored = parts["weight"]  # its elements may be called floats, of several bytes
    size = max(1, (scheme.shape[0] * inputs + 1) // 2 // max(1, stored.shape[0] * stored.shape[1]))
    begin, end = first // 2, -(-(first + count) // 2)
    held = stored[slice(begin // size, -(-end // size)), _ALL].contiguous()
    packed = held.view(torch.uint8).flatten().numpy()[begin % size :][: end - begin]
    codes = np.empty(2 * len(packed), dtype=np.int64)
    codes[0::2], codes[1::2] = packed // 16, packed % 16
    there = torch.from_numpy(codes[first % 2 : first % 2 + count]).view(-1, inputs)
    table = parts["weight.quant_map"][_ALL, _ALL].flatten().double()
    size = scheme.group
    blocks = torch.arange(first // size, -(-(first + count) // size))
    absmax = _absmax(parts, scheme, blocks)
    if inputs % size == 0:
        scale = absmax.double().view(-1, inputs // size)
        group = torch.arange(inputs) // size
    else:  # blocks go over the ends of rows: a scale for each element
        each = (torch.arange(first, first + count) // size) - blocks[0]
        scale, group = absmax.double()[each].view(-1, inputs), torch.arange(inputs)
    return Grid(there, table, scale, None, group, "weight", "weight.absmax")


def _absmax(parts: Mapping[str, Matrix], scheme: Scheme, blocks: Tensor) -> Tensor:
    """float32 absmax of successive blocks."""
    absmax = parts["weight.absmax"][slice(int(blocks[0]), int(blocks[-1]) + 1), _ALL].flatten()
    if absmax.dtype == torch.uint8:
        outer = parts["weight.nested_absmax"][_ALL, _ALL].flatten()[blocks // scheme.nested_block]
        inner = parts["weight.nested_quant_map"][_ALL, _ALL].flatten()[absmax.long()]
        absmax = inner * outer + np.float32(scheme.offset)  # float32, as it is done there
    return absmax


def _floats8() -> Tensor:
    """The value of every byte as E4M3: 4 bits of exponent, 3 of mantissa; 127 and 255 are NaN."""
    values = []
    for byte in range(256):
        exponent, mantissa = byte >> 3 & 15, byte & 7
        size = (
            mantissa / 8 * 2.0**-6 if not exponent else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        )
        size = float("nan") if byte & 127 == 127 else size
        values.append(-size if byte > 127 else size)
    return torch.tensor(values, dtype=torch.float64)


FLOATS8 = _floats8()


def _fp8(parts: Mapping[str, Matrix], scheme: Scheme, rows: slice) -> Grid:
    name = "weight_scale_inv" if "weight_scale_inv" in parts else "weight_scale"
    stored = parts[name]
    tall, wide = (b or n for b, n in zip(scheme.block, scheme.shape, strict=True))
    lines = torch.arange(rows.start, rows.stop) // max(tall, 1)
    raw = stored[slice(int(lines[0]), int(lines[-1]) + 1), _ALL]
    if raw.dtype == torch.float8_e8m0fnu:
        scale = torch.from_numpy(np.ldexp(1.0, raw.view(torch.uint8).numpy().astype(int) - 127))
    else:
        scale = raw.double()
    group = torch.arange(scheme.shape[1]) // max(wide, 1)
    codes = parts["weight"][rows, _ALL].view(torch.uint8).long()
    return Grid(codes, FLOATS8, scale[lines - lines[0]], None, group, "weight", name)


def _of_rows(stored: Matrix, rows: slice) -> Tensor:
    """Rows of scales or zero points; one for all rows is repeated."""
    count = rows.stop - rows.start
    found = stored[rows if stored.shape[0] > 1 else _ALL, _ALL].double()
    return found if len(found) == count else found.expand(count, -1)


def _compressed_tensors(parts: Mapping[str, Matrix], scheme: Scheme, rows: slice) -> Grid:
    if scheme.kind == "fp8":
        return _fp8(parts, scheme, rows)
    scale = _of_rows(parts["weight_scale"], rows)
    group = _even(scheme, scale.shape[1])
    if "weight_g_idx" in parts:
        told = parts["weight_g_idx"][_ALL, _ALL].flatten().long()
        group = told if bool((told >= 0).all()) else group
    half, zero = 1 << (scheme.bits - 1), None
    packed = "weight_packed" in parts
    if "weight_zero_point" in parts:
        stored = parts["weight_zero_point"]
        if packed and stored.shape[0] != scheme.shape[0]:
            zero = _across(stored, scheme.bits, rows, True).double() - half
        else:
            zero = _of_rows(stored, rows)
    if not packed:
        codes, levels, name = _int8(parts["weight"][rows, _ALL]), _I8, "weight"
    else:
        codes = _bits(parts["weight_packed"][rows, _ALL], scheme.bits, scheme.shape[1])
        levels, name = torch.arange(-half, half).double(), "weight_packed"
    return Grid(codes, levels, scale, zero, group, name, "weight_scale", "weight_zero_point")


def _torchao(parts: Mapping[str, Matrix], scheme: Scheme, rows: slice) -> Grid:
    scale = _of_rows(parts["_weight_scale"], rows)
    zero = parts.get("_weight_zero_point")
    raw = parts["_weight_qdata"][rows, _ALL]
    floats = scheme.kind == "fp8"
    codes, levels = (raw.view(torch.uint8).long(), FLOATS8) if floats else (_int8(raw), _I8)
    return Grid(
        codes, levels, scale, None if zero is None else _of_rows(zero, rows),
        _even(scheme, scale.shape[1]), "_weight_qdata", "_weight_scale", "_weight_zero_point",
    )  # fmt: skip


def _hqq(parts: Mapping[str, Matrix], scheme: Scheme, rows: slice) -> Grid:
    """A scale for each element here: groups go over rows, or down columns."""
    inputs, bits, size = scheme.shape[1], scheme.bits, scheme.group
    number = torch.arange(rows.start * inputs, rows.stop * inputs)
    width = size if scheme.axis == 1 else scheme.shape[0] * inputs // size  # of the codes' matrix
    line, column = number // width, number % width
    stored = parts["W_q"]
    step, top = stored.shape[0], 27 if bits == 3 else 8 - bits
    codes = torch.empty(len(number), dtype=torch.int64)
    for one in range(int(line[0]), int(line[-1]) + 1):
        mine = line == one
        packed = stored[slice(one % step, one % step + 1), _ALL].flatten().long()
        codes[mine] = (packed >> (top - bits * (one // step)) & ((1 << bits) - 1))[column[mine]]
    group = line if scheme.axis == 1 else column
    least = int(group.min())
    here = slice(least, int(group.max()) + 1)

    def each(name: str) -> Tensor:
        matrix = parts[name]
        where = (_ALL, here) if matrix.shape[0] == 1 else (here, _ALL)
        return matrix[where].flatten().double()[group - least].view(-1, inputs)

    levels = torch.arange(1 << bits).double()
    return Grid(
        codes.view(-1, inputs), levels, each("scale"), each("zero"), torch.arange(inputs),
        "W_q", "scale", "zero",
    )  # fmt: skip


def _ggml(parts: Mapping[str, Matrix], scheme: Scheme, rows: slice) -> Grid:
    """Of the plain types. Their minimum is told as a zero point, in steps."""
    kind, (elements, size) = scheme.kind, BLOCKS[scheme.kind]
    data = parts[""][rows, _ALL].numpy()
    blocks = data.reshape(-1, size)
    codes = torch.from_numpy(codes_of(kind, blocks)).reshape(len(data), -1)
    scale = torch.from_numpy(half_at(blocks, 0)).reshape(len(data), -1)
    bits = int(kind[1])
    levels, zero = torch.arange(1 << bits).double(), None
    if kind == "Q8_0":
        codes, levels = codes + 128, _I8
    elif kind.endswith("_0"):
        levels = levels - (1 << (bits - 1))
    else:
        zero = -torch.from_numpy(half_at(blocks, 2)).reshape(len(data), -1) / scale
    group = torch.arange(codes.shape[1]) // elements
    return Grid(codes, levels, scale, zero, group, "", "")


_GRIDS = {
    "gptq": _gptq,
    "awq": _awq,
    "bitsandbytes": _bitsandbytes,
    "compressed_tensors": _compressed_tensors,
    "fp8": _fp8,
    "torchao": _torchao,
    "hqq": _hqq,
    "ggml": _ggml,
}
