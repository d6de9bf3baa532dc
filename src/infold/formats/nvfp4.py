"""NVFP4: 4-bit floats in blocks of 16, whose scales are E4M3 under one scale for the whole weight.

compressed-tensors    weight_packed U8 [out, in / 2], weight_scale F8_E4M3 [out, in / 16],
                      weight_global_scale F32 [1], which divides
ModelOpt              weight U8 [out, in / 2], weight_scale F8_E4M3 [out, in / 16],
                      weight_scale_2 F32, which multiplies

W[o, i] = weight_scale[o, i / 16] * code[o, i], times or over the whole weight's. A row has scales
of its own, but of four bits: multiplying them rounds each by up to 6 %, 2.6 % in the mean square.
Kernels take them for numbers without a sign. Quantizers give the largest block of a weight the
largest scale, 448, so a power of two must go to the scale of the whole before it can grow.
"""

from __future__ import annotations

import math

from infold.formats.e4m3 import DTYPE
from infold.formats.stored import NoFold, Scale, Stored

NAME = "NVFP4"
CORE: tuple[str, ...] = ("weight_packed", "weight")
PARTS: tuple[str, ...] = (
    "weight_packed", "weight", "weight_scale", "weight_global_scale", "weight_scale_2",
    "input_scale", "input_global_scale",
)  # fmt: skip
_WHOLE = {"weight_packed": "weight_global_scale", "weight": "weight_scale_2"}
_DIVIDES = "weight_global_scale"
_BLOCK = 16  # elements of a block


def accepts(stored: Stored) -> bool:
    return "weight_scale" in stored.tensors and any(
        stored.dtype(codes) == "U8" and whole in stored.tensors for codes, whole in _WHOLE.items()
    )


def shape(stored: Stored) -> tuple[int, int]:
    packed = stored.shape(next(codes for codes in CORE if codes in stored.tensors))
    if packed is None or len(packed) != 2:
        raise NoFold("its weight is no matrix")
    return packed[0], 2 * packed[1]


def words(stored: Stored) -> str:
    return NAME


def scales(stored: Stored) -> tuple[Scale, ...]:
    rows, inputs = shape(stored)
    kind, found = stored.dtype("weight_scale"), stored.shape("weight_scale")
    if kind != DTYPE or found != (rows, -(-inputs // _BLOCK)):
        told = None if found is None else list(found)
        raise NoFold(f"its scales are {kind} {told}, not E4M3 for blocks of {_BLOCK} in each row")
    over = next(over for codes, over in _WHOLE.items() if {codes, over} <= stored.tensors.keys())
    if (whole := stored.tensors[over]).dtype != "F32" or math.prod(whole.shape) != 1:
        raise NoFold(f"its {over} is {whole.dtype} {list(whole.shape)}, not one F32")
    return (Scale("weight_scale", lossy=True, over=over, below=over == _DIVIDES),)
