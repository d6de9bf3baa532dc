"""What rounding does to the scales of quantized tensors.

A scale of ggml's types is a float16, and those of K-quants and IQ4_XS are often below its smallest
normal number, where fewer than eleven bits are left: for weights of deviation 0.002, the rounded
scales of Q6_K are off by 1.2 %, about as much as its codes. That is counted and told; above LIMIT
nothing is written.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from infold.errors import Refusal

__all__ = ["LIMIT", "Scales", "scale_notes"]

LIMIT = 2.0**-6  # of the root of the mean square of a tensor's scales, each kind by itself
_NORMAL = {torch.float16: 2.0**-14, torch.bfloat16: 2.0**-126, torch.float32: 2.0**-126}


class Scales:
    """The scales of one tensor as they are rounded, block by block, from any thread."""

    def __init__(self) -> None:
        self.count = self.subnormal = self.zeroed = 0
        self._lost: Tensor | float = 0.0
        self._whole: Tensor | float = 0.0
        self._lock = threading.Lock()

    def add(self, exact: Tensor, stored: Tensor) -> None:
        """Scales (blocks, kinds): float64, and rounded."""
        wide = stored.double()
        small = (wide != exact) & (wide.abs() < _NORMAL[stored.dtype])
        zeroed = int((small & (wide == 0)).sum())
        lost, whole = ((wide - exact).square().sum(0), exact.square().sum(0))
        with self._lock:
            self.count += stored.numel()
            self.zeroed += zeroed
            self.subnormal += int(small.sum()) - zeroed
            self._lost, self._whole = self._lost + lost.cpu(), self._whole + whole.cpu()

    @property
    def error(self) -> float:
        """The norm of what was lost over the norm of the scales; the worst kind counts."""
        if isinstance(self._lost, float) or isinstance(self._whole, float):
            return 0.0
        return float((self._lost / self._whole).nan_to_num(0.0).max().sqrt())

    def describe(self) -> dict[str, Any]:
        """JSON-ready, for the receipt."""
        return {
            "count": self.count,
            "subnormal": self.subnormal,
            "zeroed": self.zeroed,
            "error": float(f"{self.error:.3g}"),
        }


def scale_notes(found: Mapping[str, Scales]) -> list[str]:
    """What a user should know of the scales that a merge has rounded, by tensor.

    Raises Refusal where a tensor lost more than LIMIT.
    """
    if bad := {name: scales for name, scales in found.items() if scales.error > LIMIT}:
        raise Refusal(
            [
                f"{name}: its scales are so small that their own dtype cannot hold the merged "
                f"ones: {s.error:.1%} would be lost, {s.zeroed:,} of {s.count:,} become zero"
                for name, s in bad.items()
            ]
            + [f"the limit is {LIMIT:.1%}; use a base of another type, or merge before quantizing"]
        )
    lost = sum(s.subnormal + s.zeroed for s in found.values())
    if not lost:
        return []
    count, zeroed = sum(s.count for s in found.values()), sum(s.zeroed for s in found.values())
    worst = max(found, key=lambda name: found[name].error)
    return [
        f"{lost:,} of {count:,} scales are subnormal float16 and lost bits, {zeroed:,} of them "
        f"became zero; at most {found[worst].error:.2%} of a tensor's scales ({worst})"
    ]
