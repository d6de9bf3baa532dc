"""How far the logits of two models lie apart. Pure functions over (positions, vocabulary)."""

from __future__ import annotations

import math

from torch import Tensor, split

from infold.verify.verdict import Difference

__all__ = ["Distance", "cross_entropy", "margin"]

_ROWS = 64  # positions at a time: in float64 a row of a large vocabulary has 2 MB


class Distance:
    """Collects a Difference, sequence by sequence."""

    def __init__(self) -> None:
        self.largest = self.total = self.kl = self.largest_kl = self.widest = 0.0
        self.count = self.same = self.positions = 0

    def add(self, first: Tensor, second: Tensor) -> None:
        """Logits (positions, vocabulary) of both. A value that is not finite is inf apart."""
        for a, b in zip(split(first, _ROWS), split(second, _ROWS), strict=True):
            a, b = a.double(), b.double()
            apart = (a - b).abs().nan_to_num(nan=math.inf)
            p, q = a.log_softmax(-1), b.log_softmax(-1)
            kl = (p.exp() * (p - q)).sum(-1).nan_to_num(nan=math.inf).clamp(min=0)
            other = a.argmax(-1) != b.argmax(-1)
            self.largest = max(self.largest, float(apart.max()))
            self.total += float(apart.sum())
            self.kl += float(kl.sum())
            self.largest_kl = max(self.largest_kl, float(kl.max()))
            if bool(other.any()):
                self.widest = max(self.widest, float(margin(a[other]).max()))
            self.same += int((~other).sum())
            self.count += apart.numel()
            self.positions += len(a)

    def result(self) -> Difference:
        return Difference(
            largest=self.largest,
            mean=self.total / self.count,
            kl=self.kl / self.positions,
            largest_kl=self.largest_kl,
            agreement=self.same / self.positions,
            widest=self.widest,
            positions=self.positions,
        )


def margin(logits: Tensor) -> Tensor:
    """By how much the best token leads the second, in logits: (positions,)."""
    best = logits.topk(2, dim=-1).values
    return best[..., 0] - best[..., 1]


def cross_entropy(logits: Tensor, ids: Tensor) -> float:
    """The sum of -log p of each token after the first, in nats; logits: (tokens, vocabulary)."""
    total = 0.0
    for rows, wanted in zip(split(logits[:-1], _ROWS), split(ids[1:], _ROWS), strict=True):
        chosen = rows.double().log_softmax(-1).gather(-1, wanted[:, None].to(rows.device))
        total -= float(chosen.sum())
    return total
