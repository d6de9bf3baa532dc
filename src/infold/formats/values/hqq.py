"""HQQ: W = ((codes - zero) * scale).reshape(out, in).

axis 1   codes (out * in / group, group): a group is a piece of a row, scale (groups, 1)
axis 0   codes (group, out * in / group): a group is a column here, scale (1, groups)

W_q packs codes along their first dimension, which is cut into as many equal parts as codes go into
a byte (3 bits: into ten parts of an int32), the first part in the highest bits.
Source: hqq.core.bitpack and hqq.core.quantize.
"""

from __future__ import annotations

import torch
from torch import Tensor

from infold.formats import hqq
from infold.formats.stored import Field, NoFold, Stored
from infold.formats.values.scheme import (
    FLOATS,
    NoValues,
    Parts,
    Scheme,
    need,
)

__all__ = ["PARTS", "decode", "encoded", "scheme"]

PARTS = hqq.PARTS

_ALL = slice(None)
_PER = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}  # codes in one stored element


def scheme(stored: Stored) -> Scheme:
    """Raises NoValues where the settings beside the codes do not suit them."""
    try:
        outputs, inputs = hqq.shape(stored)
    except NoFold as error:
        raise NoValues(str(error)) from None
    bits, group, axis = (_number(stored, part) for part in ("nbits", "group_size", "axis"))
    packed = stored.tensors["W_q"]
    if bits not in _PER or group < 1 or axis not in (0, 1) or outputs * inputs % group:
        raise NoValues(f"{bits} bits, groups of {group} and axis {axis} are not known here")
    if "scale" not in stored.tensors or "zero" not in stored.tensors:
        raise NoValues("its scales are quantized themselves")
    if packed.dtype != ("I32" if bits == 3 else "U8"):
        raise NoValues(f"its codes are viewed as {packed.dtype}")
    many = outputs * inputs // group
    rows, columns = (many, group) if axis else (group, many)
    if packed.shape != (-(-rows // _PER[bits]), columns):
        raise NoValues(f"its codes {list(packed.shape)} do not suit its shape {[outputs, inputs]}")
    for part in ("scale", "zero"):
        need(stored, part, FLOATS, (many, 1), (1, many), (many,))
    return Scheme((outputs, inputs), bits, group, False, axis=axis, kind="hqq")


def _number(stored: Stored, part: str) -> int:
    """-1 for what is no whole number."""
    found = float(stored.read(part).item()) if stored.shape(part) in ((), (1,)) else -1.0
    return int(found) if found.is_integer() else -1


def encoded(stored: Stored) -> dict[str, Field | None]:
    raise NoValues("HQQ optimizes its zero points, which plain rounding does not")


def decode(parts: Parts, scheme: Scheme, rows: slice) -> Tensor:
    """float64 (rows, in)."""
    inputs = scheme.shape[1]
    total, group = scheme.shape[0] * inputs, scheme.group
    first, last = rows.start * inputs, rows.stop * inputs
    if scheme.axis == 1:
        # a row of codes is a group; take whole groups around what is asked for
        top, bottom = first // group, -(-last // group)
        numbers = torch.arange(top, bottom)
        values = _codes(parts, scheme, numbers, _ALL, total // group).to(torch.float64)
        values -= _vector(parts, "zero", slice(top, bottom))[:, None]
        values *= _vector(parts, "scale", slice(top, bottom))[:, None]
        flat = values.flatten()[first - top * group : last - top * group]
        return flat.view(-1, inputs)
    width = total // group  # of the matrix of codes; its rows, one after another, are W
    top, bottom = first // width, -(-last // width)
    numbers = torch.arange(top, bottom)
    values = _codes(parts, scheme, numbers, _ALL, group).to(torch.float64)
    values -= _vector(parts, "zero", _ALL)
    values *= _vector(parts, "scale", _ALL)
    return values.flatten()[first - top * width : last - top * width].view(-1, inputs)


def _vector(parts: Parts, name: str, where: slice) -> Tensor:
    """Scales or zero points as a vector, however they are shaped."""
    stored = parts[name]
    if stored.shape[0] == 1:
        return stored[_ALL, where].flatten().to(torch.float64)
    return stored[where, _ALL].flatten().to(torch.float64)


def _codes(parts: Parts, scheme: Scheme, numbers: Tensor, columns: slice, count: int) -> Tensor:
    """Rows `numbers` (ascending, without a gap) of the `count` rows of codes."""
    stored, per = parts["W_q"], _PER[scheme.bits]
    step = stored.shape[0]
    found = []
    for part in range(per):
        inside = numbers[(numbers >= part * step) & (numbers < (part + 1) * step)]
        if len(inside):
            at = slice(int(inside[0]) - part * step, int(inside[-1]) + 1 - part * step)
            shift = (per - 1 - part) * scheme.bits
            packed = stored[at, columns].to(torch.int32)
            found.append((packed >> shift) & ((1 << scheme.bits) - 1))
    return torch.cat(found)
