"""What rounding costs where the floats are scales of a quantized weight.

float16 has full precision from 6.1e-5 on only. Scales are often smaller: those of six-bit blocks
are subnormal as a rule. There the step is 6e-8 whatever the value, so that a product keeps fewer
bits, or falls to zero and takes a whole block of weights with it. So they are counted, and the
error of a tensor's scales is measured; beyond `MOST` it is refused. The E4M3 scales of NVFP4 have
four bits at best: there the error is what the user has agreed to, and is always told.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from infold.edit.blocks import Block
from infold.edit.steps import Step, Target, Workspace, exact

__all__ = ["MOST", "Loss", "measure", "measures"]

# Relative error of a tensor's scales. Four bits of weights lose about 0.08 to begin with. A normal
# E4M3 is rounded by 2^-4 at most, so that more comes from scales below.
MOST = {"F16": 2.0**-5, "F8_E4M3": 2.0**-4}
_NORMAL = {"F16": 2.0**-14, "F8_E4M3": 2.0**-6}  # the least normal number


def measures(dtype: str) -> bool:
    """Whether the rounding of scales of this dtype is measured: they can lie below its normal
    range."""
    return dtype in _NORMAL


@dataclass
class Loss:
    """Sums over the scales of one tensor. zero: those that became 0, and were not to be.
    off, size: sums of squares of the rounding errors and of the exact scales."""

    count: int = 0
    subnormal: int = 0
    zero: int = 0
    off: float = 0.0
    size: float = 0.0

    def add(self, other: Loss) -> None:
        self.count += other.count
        self.subnormal += other.subnormal
        self.zero += other.zero
        self.off += other.off
        self.size += other.size

    @property
    def error(self) -> float:
        """The relative rounding error, in the Frobenius norm."""
        return (self.off / self.size) ** 0.5 if self.size else 0.0

    def describe(self) -> dict[str, Any]:
        """As the receipt tells it."""
        error = float(f"{self.error:.4g}")
        told = {"scales": self.count, "subnormal": self.subnormal, "zero": self.zero}
        return {**told, "error": error}


def measure(
    steps: Sequence[Step],
    raw: Tensor,
    out: Tensor,
    block: Block,
    target: Target,
    workspace: Workspace,
) -> Loss:
    """The loss of one block: `raw` as it was stored, `out` as it was rounded."""
    x = exact(steps, raw, block, target, workspace)
    rounded = out.double()
    low = (x.abs() < _NORMAL[target.dtype]) & (x != 0)
    fell = low & (rounded == 0)
    off = (rounded - x).square_().sum()
    size = x.square_().sum()
    counts = torch.stack([low.sum(), fell.sum()]).tolist()
    return Loss(x.numel(), counts[0], counts[1], float(off), float(size))
