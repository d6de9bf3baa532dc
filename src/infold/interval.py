"""Medians with intervals that assume no distribution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from statistics import median

__all__ = ["Interval", "median_interval", "paired_ratio"]


@dataclass(frozen=True)
class Interval:
    """A median, and an interval that holds the true one with probability `coverage`."""

    median: float
    low: float
    high: float
    coverage: float
    count: int

    @property
    def holds_one(self) -> bool:
        """Of a ratio: whether the two may be equal."""
        return self.low <= 1 <= self.high


def median_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """The median with the narrowest symmetric pair of order statistics that reaches `confidence`.

    The pair that leaves out k values at each end holds the median with probability
    1 - 2 P(Binomial(n, 1/2) <= k) (David and Nagaraja, Order Statistics, 7.1). Below 6 values not
    even the extremes reach 0.95: `coverage` tells what they do reach.
    Raises ValueError for no values.
    """
    if not values:
        raise ValueError("no values")
    ordered, n = sorted(values), len(values)
    left_out, coverage = 0, 1 - 2 / 2**n
    while True:
        k = left_out + 1
        reached = 1 - 2 * sum(comb(n, i) for i in range(k + 1)) / 2**n
        if 2 * k >= n or reached < confidence:
            break
        left_out, coverage = k, reached
    low, high = ordered[left_out], ordered[n - 1 - left_out]
    return Interval(median(ordered), low, high, coverage, n)


ENOUGH = 6  # values whose extremes are an interval of 0.95


def paired_ratio(values: Sequence[float], base: Sequence[float], starts: int = 1) -> Interval:
    """The median of value / base, each pair measured side by side, in so many equal groups.

    The pairs of one start are more alike than those of two, so an interval over all pairs is too
    narrow: with 6 starts or more it is that of the medians of the starts.
    Raises ValueError for other counts, ZeroDivisionError for a base of 0.
    """
    ratios = [v / b for v, b in zip(values, base, strict=True)]
    if starts >= ENOUGH and len(ratios) % starts == 0:
        size = len(ratios) // starts
        ratios = [median(ratios[i : i + size]) for i in range(0, len(ratios), size)]
    return median_interval(ratios)
