"""EETQ: int8 by rows, for a kernel that takes the weight transposed.

    weight         I8 [in, out]
    weight_scales  F16 [out]

W[o, i] = weight[i, o] * weight_scales[o]. The codes lie in the order of the kernel, which is no
matter for a fold.
"""

from __future__ import annotations

from infold.formats.stored import Scale, Stored

NAME = "EETQ"
CORE: tuple[str, ...] = ("weight",)
PARTS: tuple[str, ...] = ("weight", "weight_scales")


def accepts(stored: Stored) -> bool:
    weight = stored.shape("weight")
    if weight is None or len(weight) != 2 or stored.dtype("weight") != "I8":
        return False
    return stored.shape("weight_scales") == weight[1:]


def shape(stored: Stored) -> tuple[int, int]:
    inputs, out = stored.tensors["weight"].shape
    return out, inputs


def words(stored: Stored) -> str:
    return "EETQ, int8, a scale for each row"


def scales(stored: Stored) -> tuple[Scale, ...]:
    return (Scale("weight_scales"),)
