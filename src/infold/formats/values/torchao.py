"""torchao's tensors of 8-bit codes: W = (qdata - zero_point) * scale.

Int8Tensor                _weight_qdata I8 (out, in), _weight_scale (out, 1), () or groups
IntxUnpackedToInt8Tensor  the same, one scale for some inputs
Float8Tensor              _weight_qdata F8_E4M3 (out, in), _weight_scale (out, 1) or ()
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from infold.dtypes import TORCH_DTYPES
from infold.formats import torchao
from infold.formats.stored import Field, NoFold, Stored
from infold.formats.values import integers
from infold.formats.values.scheme import (
    FLOATS,
    NoValues,
    Parts,
    Scheme,
    need,
    to_e4m3,
)

__all__ = ["PARTS", "decode", "encode", "encoded", "scheme"]

PARTS = torchao.PARTS
_ALL = slice(None)
_CODES, _SCALE, _ZERO = PARTS[:3]


def scheme(stored: Stored) -> Scheme:
    """Raises NoValues for tensors whose codes lie in a kernel's order."""
    try:
        outputs, inputs = torchao.shape(stored)
    except NoFold as error:
        raise NoValues(str(error)) from None
    codes, scale = stored.tensors[_CODES], stored.shape(_SCALE)
    if codes.shape != (outputs, inputs) or codes.dtype not in ("I8", "F8_E4M3") or scale is None:
        raise NoValues(f"the codes of {torchao.words(stored)} are not known here")
    if "_weight_act_pre_scale" in stored.tensors:
        raise NoValues("its activations are scaled before the weight (act_pre_scale)")
    count = scale if len(scale) == 2 else (math.prod(scale), 1)
    whole = count == (1, 1) or (count[0] == outputs and count[1] > 0 and inputs % count[1] == 0)
    if not whole or stored.dtype(_SCALE) not in TORCH_DTYPES:
        raise NoValues(f"its scales {list(scale)} do not suit its shape {[outputs, inputs]}")
    if len(scale) > 2:
        raise NoValues(f"its scales {list(scale)} are no matrix")
    need(stored, _ZERO, (*FLOATS, "I8", "I32", "I64"), scale, there=False)
    kind = "fp8" if codes.dtype == "F8_E4M3" else "int"
    return Scheme((outputs, inputs), group=inputs // count[1], kind=kind)


def encoded(stored: Stored) -> dict[str, Field | None]:
    """The tensors that `encode` writes anew."""
    how = scheme(stored)
    if math.prod(stored.tensors[_SCALE].shape) < how.shape[0]:
        raise NoValues("one scale belongs to the whole tensor, so its rows cannot be rounded apart")
    if "IntxUnpacked" in torchao.words(stored):
        raise NoValues("how many of its 8 bits are used is not known here")
    written = (_CODES, _SCALE, _ZERO)
    return {part: stored.tensors[part] for part in written if part in stored.tensors}


def decode(parts: Parts, scheme: Scheme, rows: slice) -> Tensor:
    """float64 (rows, in)."""
    codes = parts[_CODES][rows, _ALL]
    scale = _rows(parts, _SCALE, rows)
    if scheme.kind == "fp8":
        codes = codes.to(torch.float32)
    zero = _rows(parts, _ZERO, rows) if _ZERO in parts else None
    return integers.decode(codes, scale, zero, scheme.group)


def _rows(parts: Parts, name: str, rows: slice) -> Tensor:
    stored = parts[name]
    return stored[rows if stored.shape[0] > 1 else _ALL, _ALL]


def encode(
    values: Tensor, scheme: Scheme, parts: Parts, rows: slice, out: dict[str, Tensor]
) -> None:
    """Round float64 rows under the absmax of each row or group: to 127, or for FP8 to 448."""
    top = 448 if scheme.kind == "fp8" else 127
    target = out[_SCALE]
    spread, scales = integers.spread_scales(values, scheme.group, top, target.dtype)
    if scheme.kind == "fp8":
        out[_CODES][rows] = to_e4m3(values / spread)
    else:
        out[_CODES][rows] = torch.round(values / spread).clamp(-top, top).to(torch.int8)
    target[rows] = scales
    if _ZERO in out:
        out[_ZERO][rows] = 0
