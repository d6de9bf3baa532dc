"""The values of ggml's blocks, stated anew: for the number of an element, where its bits lie.

Every function gets blocks of bytes (n, size) and gives the float64 values (n, elements). Types that
consist of tables are read by the gguf package here too: there is nothing that could be stated anew.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from infold.ggml import BLOCKS

__all__ = ["codes_of", "half_at", "values_of"]

Bytes = NDArray[np.uint8]
Values = NDArray[np.float64]
Numbers = NDArray[np.int64]

_E = np.arange(256)
_HALF, _QUARTER, _LANE = _E // 128, _E % 128 // 32, _E % 32  # of 256 elements in two halves
_TABLE = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.float64
)


def values_of(kind: str, blocks: Bytes) -> Values:
    if kind in _VALUES:
        return _VALUES[kind](blocks)
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    values: Values = dequantize(blocks, GGMLQuantizationType[kind]).astype(np.float64)
    return values


def half_at(blocks: Bytes, place: int) -> Values:
    """The float16 that begins at a byte, (n, 1)."""
    return np.ascontiguousarray(blocks[:, place : place + 2]).view(np.float16).astype(np.float64)


def _at(blocks: Bytes, places: Numbers) -> Numbers:
    return blocks[:, places].astype(np.int64)


def codes_of(kind: str, blocks: Bytes) -> Numbers:
    """The codes of the plain types (n, 32), as they are stored: not below zero; Q8_0 with sign."""
    e = np.arange(32)
    if kind == "Q8_0":
        return blocks[:, 2:].view(np.int8).astype(np.int64)
    head = 4 if kind.endswith("_1") else 2
    fifths = 4 if kind.startswith("Q5") else 0
    codes = _at(blocks, head + fifths + e % 16) >> 4 * (e // 16) & 15
    if fifths:
        codes = codes + ((_at(blocks, head + e // 8) >> e % 8 & 1) << 4)
    return codes


def _plain(kind: str) -> Callable[[Bytes], Values]:
    def values(blocks: Bytes) -> Values:
        codes = codes_of(kind, blocks)
        if kind.endswith("_1"):
            return half_at(blocks, 0) * codes + half_at(blocks, 2)
        middle = {"Q4_0": 8, "Q5_0": 16, "Q8_0": 0}[kind]
        return half_at(blocks, 0) * (codes - middle)

    return values


def _pair(blocks: Bytes, begin: int) -> Numbers:
    """Two bits each: 32 bytes for every half, a quarter of it after the other."""
    return _at(blocks, begin + 32 * _HALF + _LANE) >> 2 * _QUARTER & 3


def _q2_k(blocks: Bytes) -> Values:
    both = _at(blocks, _E // 16)
    steps = half_at(blocks, 80) * ((both & 15) * _pair(blocks, 16))
    return steps - half_at(blocks, 82) * (both >> 4)


def _q3_k(blocks: Bytes) -> Values:
    high = _at(blocks, _LANE) >> _E // 32 & 1
    codes = _pair(blocks, 32) - 4 * (1 - high)
    sub = _E // 16
    low = _at(blocks, 96 + sub % 8) >> 4 * (sub // 8) & 15
    scale = (low | (_at(blocks, 104 + sub % 4) >> 2 * (sub // 4) & 3) << 4) - 32
    return half_at(blocks, 108) * (scale * codes)


def _six(blocks: Bytes) -> tuple[Numbers, Numbers]:
    """Scale and minimum of each element, from the twelve bytes at 4."""
    sub = _E // 32
    late = sub >= 4
    first, last = sub % 4, 8 + sub % 4
    scale = np.where(
        late, _at(blocks, 4 + last) & 15 | _at(blocks, 4 + first) >> 6 << 4,
        _at(blocks, 4 + first) & 63,
    )  # fmt: skip
    least = np.where(
        late, _at(blocks, 4 + last) >> 4 | _at(blocks, 8 + first) >> 6 << 4,
        _at(blocks, 8 + first) & 63,
    )  # fmt: skip
    return scale, least


def _q45_k(begin: int, fifths: int) -> Callable[[Bytes], Values]:
    def values(blocks: Bytes) -> Values:
        within = _E % 64
        codes = _at(blocks, begin + 32 * (_E // 64) + within % 32) >> 4 * (within // 32) & 15
        if fifths:
            codes = codes + ((_at(blocks, fifths + _LANE) >> _E // 32 & 1) << 4)
        scale, least = _six(blocks)
        return half_at(blocks, 0) * (scale * codes) - half_at(blocks, 2) * least

    return values


def _q6_k(blocks: Bytes) -> Values:
    low = _at(blocks, 64 * _HALF + _LANE + 32 * (_QUARTER % 2)) >> 4 * (_QUARTER // 2) & 15
    codes = (low | _pair(blocks, 128) << 4) - 32
    scale = blocks[:, 192:208].view(np.int8).astype(np.int64)[:, _E // 16]
    return half_at(blocks, 208) * (scale * codes)


def _iq4_nl(blocks: Bytes) -> Values:
    e = np.arange(32)
    values: Values = _TABLE[_at(blocks, 2 + e % 16) >> 4 * (e // 16) & 15]
    return half_at(blocks, 0) * values


def _iq4_xs(blocks: Bytes) -> Values:
    sub = _E // 32
    low = _at(blocks, 4 + sub // 2) >> 4 * (sub % 2) & 15
    scale = (low | (_at(blocks, 2 + sub // 4) >> 2 * (sub % 4) & 3) << 4) - 32
    codes = _at(blocks, 8 + 16 * sub + _E % 16) >> 4 * (_LANE // 16) & 15
    values: Values = _TABLE[codes]
    return half_at(blocks, 0) * scale * values


def _tq2_0(blocks: Bytes) -> Values:
    return half_at(blocks, 64) * (_pair(blocks, 0) - 1)


def _q1_0(blocks: Bytes) -> Values:
    e = np.arange(128)
    positive = _at(blocks, 2 + e // 8) >> e % 8 & 1
    return half_at(blocks, 0) * np.where(positive, 1, -1)


_VALUES: dict[str, Callable[[Bytes], Values]] = {
    **{kind: _plain(kind) for kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")},
    "Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q45_k(16, 0), "Q5_K": _q45_k(48, 16), "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl, "IQ4_XS": _iq4_xs, "TQ2_0": _tq2_0, "Q1_0": _q1_0,
}  # fmt: skip
assert _VALUES.keys() <= BLOCKS.keys()
