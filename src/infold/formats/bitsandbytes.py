"""bitsandbytes, as transformers saves it.

int8      weight I8 [out, in], SCB F32 [out], weight_format U8 []
          W[o, i] = weight[o, i] * SCB[o] / 127

NF4, FP4  weight U8 [out * in / 2, 1], two codes a byte, the first in the high half; the same bytes
          may be called another dtype (bnb_4bit_quant_storage, as FSDP wants it)
          weight.absmax F32 [out * in / blocksize]; weight.quant_map F32 [16]
          weight.quant_state.bitsandbytes__nf4 (or __fp4) U8: JSON with shape, blocksize, dtype
          W.flatten()[n] = quant_map[code[n]] * absmax[n // blocksize]

With nested quantization absmax is U8 itself, with weight.nested_absmax F32 and
weight.nested_quant_map F32 [256]; see `unnested`. A factor of single absmax does not fit into codes
that share a nested_absmax, so absmax becomes F32, which readers take as well.
"""

from __future__ import annotations

import json
import math
from typing import Any

from infold.formats.stored import NoFold, Scale, Stored, Unnested

NAME = "bitsandbytes"
CORE: tuple[str, ...] = ("weight",)
_STATE = "weight.quant_state.bitsandbytes__"
STATES = (f"{_STATE}nf4", f"{_STATE}fp4")
PARTS: tuple[str, ...] = (
    "weight", "SCB", "weight_format", "weight.absmax", "weight.quant_map", "weight.nested_absmax",
    "weight.nested_quant_map", *STATES,
)  # fmt: skip


def accepts(stored: Stored) -> bool:
    weight = stored.tensors.get("weight")
    if weight is None:
        return False
    if _state_name(stored) is not None:
        return True
    return weight.dtype == "I8" and len(weight.shape) == 2 and "SCB" in stored.tensors


def shape(stored: Stored) -> tuple[int, int]:
    if not is_4bit(stored):
        out, inputs = stored.tensors["weight"].shape
        return out, inputs
    told = state(stored).get("shape")
    if not (isinstance(told, list) and len(told) == 2 and all(type(n) is int for n in told)):
        raise NoFold("its quant_state tells no shape of a matrix")
    return told[0], told[1]


def words(stored: Stored) -> str:
    if not is_4bit(stored):
        return "bitsandbytes, int8"
    name = _state_name(stored)
    assert name is not None
    nested = ", double quantization" if stored.dtype("weight.absmax") == "U8" else ""
    return f"bitsandbytes, {name.removeprefix(_STATE).upper()}{nested}"


def scales(stored: Stored) -> tuple[Scale, ...]:
    if not is_4bit(stored):
        return (Scale("SCB"),)
    block, (out, inputs) = state(stored).get("blocksize"), shape(stored)
    absmax = stored.tensors.get("weight.absmax")
    if type(block) is not int or block < 1 or absmax is None:
        raise NoFold("its quant_state tells no blocksize, or absmax is missing")
    if inputs % block:
        raise NoFold(f"its rows of {inputs} elements share blocks of {block}")
    if math.prod(absmax.shape) != out * inputs // block:
        raise NoFold(f"absmax of shape {list(absmax.shape)} does not suit blocks of {block}")
    return (Scale("weight.absmax", repeat=inputs // block, nested=absmax.dtype == "U8"),)


def unnested(stored: Stored) -> Unnested:
    """A module with absmax in F32: readers go by whether there is a nested_absmax."""
    name, told = _state_name(stored), state(stored)
    assert name is not None
    kept = {key: value for key, value in told.items() if not key.startswith("nested_")}
    removed = ("weight.nested_absmax", "weight.nested_quant_map")
    return Unnested(removed, {name: json.dumps(kept).encode()})


def state(stored: Stored) -> dict[str, Any]:
    """What `quant_state` tells. Raises NoFold where it is no JSON object."""
    name = _state_name(stored)
    assert name is not None
    try:
        told = json.loads(bytes(stored.read(name).flatten().tolist()))
    except (TypeError, ValueError, RecursionError):
        told = None
    if not isinstance(told, dict):
        raise NoFold("its quant_state is no JSON object")
    return told


def is_4bit(stored: Stored) -> bool:
    """Whether a module is NF4 or FP4, and not int8."""
    return _state_name(stored) is not None


def _state_name(stored: Stored) -> str | None:
    return next((name for name in stored.tensors if name.startswith(_STATE)), None)
