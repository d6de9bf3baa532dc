"""Scores of held-out problems, with their intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["score", "wilson"]

_Z = 1.959963984540054  # two-sided 95 %


def wilson(right: int, of: int) -> tuple[float, float]:
    """The 95 % interval of a share, by Wilson's score method: it stays within 0 and 1."""
    if of == 0:
        return 0.0, 1.0
    share, square = right / of, _Z * _Z
    middle = (share + square / (2 * of)) / (1 + square / of)
    half = _Z / (1 + square / of) * math.sqrt(share * (1 - share) / of + square / (4 * of * of))
    low = middle - half if right else 0.0  # where rounding would miss it by a hair
    high = middle + half if right < of else 1.0
    return max(0.0, low), min(1.0, high)


def score(problems: Sequence[Any], right: Sequence[bool]) -> dict[str, Any]:
    """right, of, share, low, high (a 95 % interval); `levels` the same for each level."""
    found = _share(right)
    levels: dict[str, list[bool]] = {}
    for problem, good in zip(problems, right, strict=True):
        if isinstance(problem, Mapping) and "level" in problem:
            levels.setdefault(str(problem["level"]), []).append(good)
    return found | {"levels": {name: _share(levels[name]) for name in sorted(levels)}}


def _share(right: Sequence[bool]) -> dict[str, Any]:
    low, high = wilson(sum(right), len(right))
    share = sum(right) / len(right) if right else 0.0
    return {"right": sum(right), "of": len(right), "share": share, "low": low, "high": high}
