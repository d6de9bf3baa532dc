"""Formats that are known by their tensors, and refused by their names.

Most have no place for a factor of a row: their weights are made of codebooks or lattices, or of
groups that share exponents of two or scales of eight bits. EXL3 and AQLM do have a vector by rows;
nothing here was tried on them.
"""

from __future__ import annotations

from infold.formats.stored import NoFold, Scale, Stored

_NAMES = {
    "q_weight": "EXL2",
    "trellis": "EXL3",
    "codes": "AQLM",
    "Qidxs": "QuIP#",
    "indices": "VPTQ",
    "dense_weights": "SpQR",
    "B": "Marlin",
}
# The codes of gpt-oss, and the exponents beside them: by transformers, all experts of a layer as
# one tensor each; and as OpenAI wrote them.
_MXFP4 = {
    "gate_up_proj_blocks": "gate_up_proj_scales",
    "down_proj_blocks": "down_proj_scales",
    "blocks": "scales",
}
NAME = "a format without scales by rows"
CORE: tuple[str, ...] = (*_NAMES, *_MXFP4, "weight")
PARTS: tuple[str, ...] = ()  # it is refused whatever it stores


def accepts(stored: Stored) -> bool:
    if "weight" in stored.tensors:  # several codes a byte
        return stored.dtype("weight") == "U8" and "weight_scale" in stored.tensors
    return _is_mxfp4(stored) or any(part in stored.tensors for part in _NAMES)


def _is_mxfp4(stored: Stored) -> bool:
    return any(stored.tensors.keys() >= {codes, scales} for codes, scales in _MXFP4.items())


def shape(stored: Stored) -> tuple[int, int]:
    raise NoFold(_why(stored))


def words(stored: Stored) -> str:
    if "weight" in stored.tensors:  # under floats: BitNet's, ModelOpt's integers
        mx = stored.dtype("weight_scale") in ("U8", "F8_E8M0")
        return "MXFP4" if mx else "packed codes under a weight_scale"
    if _is_mxfp4(stored):
        return "MXFP4"
    return next(name for part, name in _NAMES.items() if part in stored.tensors)


def scales(stored: Stored) -> tuple[Scale, ...]:
    raise NoFold(_why(stored))


def _why(stored: Stored) -> str:
    return f"{words(stored)} is not supported: a factor of a row has no place in it that is known"
