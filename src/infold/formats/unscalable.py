"""Formats that are known, and known to have no place for a factor of a row.

Their weights are the product of codebooks, lattices or shared exponents, or their row scales are
quantized together with others; each is recognised to be refused by its name.
"""

from __future__ import annotations

from infold.formats.stored import NoFold, Scale, Stored

_NAMES = {
    "q_weight": "EXL2",
    "trellis": "EXL3",
    "codes": "AQLM",
    "Qidxs": "QuIP#",
    "indices": "VPTQ",
    "weight._data": "Quanto",
    "dense_weights": "SpQR",
    "weight_blocks": "MXFP4",
}
NAME = "a format without scales by rows"
CORE: tuple[str, ...] = tuple(_NAMES)


def accepts(stored: Stored) -> bool:
    return any(part in stored.tensors for part in CORE) and "weight" not in stored.tensors


def shape(stored: Stored) -> tuple[int, int]:
    raise NoFold(f"{words(stored)} has no scales by rows that a factor fits into")


def words(stored: Stored) -> str:
    return next(name for part, name in _NAMES.items() if part in stored.tensors)


def scales(stored: Stored) -> tuple[Scale, ...]:
    raise NoFold(f"{words(stored)} has no scales by rows that a factor fits into")
