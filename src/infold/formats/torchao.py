"""torchao, as transformers saves it: a tensor subclass, flattened.

    _weight_qdata, _weight_scale and others, by the class that the file's metadata names:

    Int8Tensor                qdata I8 [out, in], scale [out, 1] or [];   zero_point a code
    Float8Tensor              qdata F8 [out, in], scale [out, 1] or []
    IntxUnpackedToInt8Tensor  qdata I8 [out, in], scale [out, in / group]; zero_point a code
    Int4PlainInt32Tensor      qdata I32 [out, in / 8], scale [in / group, out]; zero_point a code
    Int4Tensor                qdata [out, in / 2], scale and zero_point [in / group, out]
    Int4TilePackedTo4dTensor  qdata, in tiles, scale_and_zero [in / group, out, 2], padded

Beside them may lie factors of the inputs (_weight_act_pre_scale), and a static scale and zero point
of activations (_weight_act_quant_scale, _weight_act_quant_zero_point), which are no part of W.

W = (code - zero_point) * scale. In the last two the zero is a value: W = code * scale + zero, with
codes around 0, and a fold multiplies both.
"""

from __future__ import annotations

import json
from typing import Any

from infold.formats.compressed_tensors import check_rows
from infold.formats.stored import NoFold, Scale, Stored

NAME = "torchao"
CORE: tuple[str, ...] = ("_weight_qdata",)
PARTS: tuple[str, ...] = (
    "_weight_qdata", "_weight_scale", "_weight_zero_point", "_weight_scale_and_zero",
    "_weight_act_pre_scale", "_weight_act_quant_scale", "_weight_act_quant_zero_point",
)  # fmt: skip
_SCALE, _ZERO, _BOTH = "_weight_scale", "_weight_zero_point", "_weight_scale_and_zero"
_BY_ROWS = ("Int8Tensor", "Float8Tensor", "IntxUnpackedToInt8Tensor")
_BY_COLUMNS = ("Int4PlainInt32Tensor", "Int4Tensor")


def accepts(stored: Stored) -> bool:
    return _SCALE in stored.tensors or _BOTH in stored.tensors


def _told(stored: Stored) -> dict[str, Any]:
    """What the metadata says of the weight; empty where it does not."""
    try:
        told = json.loads(stored.metadata.get(f"{stored.name}.weight", ""))
    except (ValueError, RecursionError):
        told = None
    return told if isinstance(told, dict) else {}


def _class(stored: Stored) -> str:
    return str(_told(stored).get("_type"))


def shape(stored: Stored) -> tuple[int, int]:
    data = _told(stored).get("_data")
    told = data.get("shape") if isinstance(data, dict) else None
    if isinstance(told, list) and len(told) == 2 and all(type(n) is int for n in told):
        return told[0], told[1]
    codes = stored.tensors["_weight_qdata"].shape
    if _class(stored) not in _BY_ROWS or len(codes) != 2:
        raise NoFold(f"a {_class(stored)}, the shape of which its metadata does not tell")
    return codes[0], codes[1]


def words(stored: Stored) -> str:
    return f"torchao, {_class(stored)}"


def scales(stored: Stored) -> tuple[Scale, ...]:
    kind, (out, _), scale = _class(stored), shape(stored), stored.shape(_SCALE)
    if kind in _BY_ROWS and scale is not None:
        return (Scale(_SCALE, rows=check_rows(scale, out)),)
    if kind in _BY_COLUMNS and scale is not None:
        if len(scale) != 2 or scale[1] != out:
            raise NoFold(f"scales {list(scale)} do not belong to {out} rows")
        found = (Scale(_SCALE, transposed=True),)
        return found if kind != "Int4Tensor" else (*found, Scale(_ZERO, transposed=True))
    both = stored.shape(_BOTH)
    if kind == "Int4TilePackedTo4dTensor" and both is not None:
        if len(both) != 3 or both[1] < out or both[2] != 2:
            raise NoFold(f"scale_and_zero {list(both)} does not belong to {out} rows")
        return (Scale(_BOTH, transposed=True, repeat=2, rows=both[1]),)
    raise NoFold(f"a {kind} has no scales by rows that a factor fits into")
