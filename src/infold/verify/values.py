"""Values of a tile with bounds on what the merge may differ from them."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["STEP", "Values"]

STEP = 2.0**-52  # two float64 roundings, one on either side


class Values:
    """float64 `x`, where the merge's value m of each element is within

    |m - x| <= error + relative * |x|,    error a tensor of x's shape or None for zero.

    Every bound is first order in float64's roundings; whoever uses it widens it by 2^-10.
    """

    __slots__ = ("error", "relative", "spare", "x")

    def __init__(self, x: Tensor, spare: Tensor | None = None) -> None:
        self.x = x
        self.error: Tensor | None = None
        self.relative = 0.0
        self.spare = spare  # memory for `error`, of x's shape, float32 or float64

    @property
    def exact(self) -> bool:
        return self.error is None and self.relative == 0.0

    def t(self) -> Values:
        """The same elements, transposed. Its bounds are its own until `share` takes them over."""
        view = Values(self.x.t(), None if self.spare is None else self.spare.t())
        view.error = None if self.error is None else self.error.t()
        view.relative = self.relative
        return view

    def share(self, view: Values) -> None:
        """Take over the bounds of a transposed view."""
        self.error = None if view.error is None else view.error.t()
        self.relative = view.relative

    def fix(self) -> None:
        """Make the relative bound absolute, before x changes other than by a factor."""
        if self.relative:
            self.widen(self.x.abs() * self.relative)
            self.relative = 0.0

    def widen(self, error: Tensor) -> None:
        if self.error is not None:
            self.error.add_(error)
        elif self.spare is not None:
            self.error = self.spare.copy_(error)
        else:
            self.error = error.expand_as(self.x).clone()
        _above_zero(self.error)

    def widen_by_product(self, rows: Tensor, columns: Tensor) -> None:
        """error += rows * columns', as an outer product."""
        if self.error is None and self.spare is not None:
            kind = self.spare.dtype
            self.error = torch.mul(rows[:, None].to(kind), columns.to(kind), out=self.spare)
            _above_zero(self.error)
        else:
            self.widen(rows[:, None] * columns)

    def add(self, delta: Tensor) -> None:
        """x += delta, where delta is the merge's own float64 value."""
        inexact = not self.exact
        self.fix()
        self.x.add_(delta)
        self.relative = STEP if inexact else 0.0

    def multiply(self, factor: Tensor, doubt: float = 0.0) -> None:
        """x *= factor, where the merge's factor is known but for `doubt`, relative."""
        inexact = doubt > 0 or not self.exact
        self.x.mul_(factor)
        if self.error is not None:
            _above_zero(self.error.mul_(factor.abs()))
        if inexact:
            self.relative += doubt + STEP


def _above_zero(error: Tensor) -> None:
    """A bound that is too small for its dtype is not zero: zero would mean that x is known, and so
    the sign of a zero that it is rounded to."""
    error.clamp_(min=torch.finfo(error.dtype).tiny)
