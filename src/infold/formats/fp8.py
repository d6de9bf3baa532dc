"""FP8 weights with scales beside them: fine-grained (DeepSeek's), FBGEMM's, ModelOpt's.

    weight            F8_E4M3 [out, in]
    weight_scale_inv  [out / 128, in / 128], one for each block, which is multiplied all the same
    weight_scale      F32 [out, 1], one for each row (FBGEMM), or [] for the whole (ModelOpt)

W[o, i] = weight[o, i] * the scale of its place.
"""

from __future__ import annotations

from infold.formats.compressed_tensors import check_rows
from infold.formats.stored import NoFold, Scale, Stored

NAME = "FP8"
CORE: tuple[str, ...] = ("weight",)
PARTS: tuple[str, ...] = (
    "weight", "weight_scale_inv", "weight_scale", "activation_scale", "input_scale",
    "input_scale_ub",
)  # fmt: skip
_SCALES = ("weight_scale_inv", "weight_scale")
_FLOATS = ("F64", "F32", "F16", "BF16")


def accepts(stored: Stored) -> bool:
    if stored.dtype("weight") not in ("F8_E4M3", "F8_E5M2"):
        return False
    return _scale(stored) is not None


def _scale(stored: Stored) -> str | None:
    return next((name for name in _SCALES if name in stored.tensors), None)


def shape(stored: Stored) -> tuple[int, int]:
    weight = stored.tensors["weight"].shape
    if len(weight) != 2:
        raise NoFold("its weight is no matrix")
    return weight[0], weight[1]


def words(stored: Stored) -> str:
    name = _scale(stored)
    assert name is not None
    scales, out = stored.tensors[name].shape, shape(stored)[0]
    if not scales or scales in ((1,), (1, 1)):
        return "FP8, one scale a tensor"
    return "FP8, a scale for each row" if scales[0] == out else "FP8, a scale for each block"


def scales(stored: Stored) -> tuple[Scale, ...]:
    name = _scale(stored)
    assert name is not None
    if stored.dtype(name) not in _FLOATS:
        raise NoFold("its scales are powers of two, so they cannot take a factor")
    return (Scale(name, rows=check_rows(stored.tensors[name].shape, shape(stored)[0])),)
