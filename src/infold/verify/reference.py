"""Every method's formula, stated anew from the parts, with a bound on what the merge may differ.

Each formula has two forms. `estimate` is the plain one: full factors, an ordinary float64 product,
whole tiles. `settle` is the contract of the exact product, told in `adapters/exact.py`, for single
elements: the factors as integers on their grids, multiplied and summed as int64.

Weights are logical matrices (out, in), float64, as in `adapters`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from infold.errors import Refusal
from infold.plan.edits import Operation

__all__ = ["Reference", "Sums", "Values", "reference_of", "scaling_of"]

STEP = 2.0**-52  # two float64 roundings, one on either side
TINY = 2.0**-1074


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
        self.spare = spare  # memory for `error`, float32 or float64

    @property
    def exact(self) -> bool:
        return self.error is None and self.relative == 0.0

    def t(self) -> Values:
        """The same memory, transposed. Bounds that are set on it stay its own: see `share`."""
        view = Values(self.x.t(), None if self.spare is None else self.spare.t())
        view.error = None if self.error is None else self.error.t()
        view.relative = self.relative
        return view

    def share(self, view: Values) -> None:
        """Take over the bounds of a transposed view."""
        self.error = None if view.error is None else view.error.t()
        self.relative = view.relative

    def settle_relative(self) -> None:
        """Make the relative bound an absolute one, before x changes by a sum."""
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

    def widen_by_product(self, rows: Tensor, columns: Tensor) -> None:
        """error += rows * columns', as an outer product."""
        if self.error is None and self.spare is not None:
            kind = self.spare.dtype
            self.error = torch.mul(rows[:, None].to(kind), columns.to(kind), out=self.spare)
        else:
            self.widen(rows[:, None] * columns)

    def add(self, delta: Tensor) -> None:
        """x += delta, where delta is the merge's own float64 value."""
        inexact = not self.exact
        self.settle_relative()
        self.x.add_(delta)
        self.relative = STEP if inexact else 0.0

    def multiply(self, factor: Tensor, doubt: float = 0.0) -> None:
        """x *= factor, where the merge's factor is known but for `doubt`, relative."""
        inexact = doubt > 0 or not self.exact
        self.x.mul_(factor)
        if self.error is not None:
            self.error.mul_(factor.abs())
        if inexact:
            self.relative += doubt + STEP


class Sums:
    """For each output: the sum of squares of its row, and of the squares of the row's bounds."""

    def __init__(self, out: int) -> None:
        self.total = torch.zeros(out, dtype=torch.float64)
        self.error = torch.zeros(out, dtype=torch.float64)
        self.additions = 0  # the longest chain of float64 additions so far

    def add(self, values: Values, rows: slice) -> None:
        """See a tile of whole rows or of a part of them; all tiles come once."""
        self.total[rows] += values.x.square().sum(1)
        bound = values.x.abs() * values.relative
        if values.error is not None:
            bound = bound + values.error
        if values.error is not None or values.relative:
            self.error[rows] += bound.square().sum(1)
        self.additions += values.x.shape[1] + 1

    def doubt(self, columns: int) -> float:
        """A bound on the relative difference of the norms from those that the merge computes.

        The merge's sums follow trees of 256 columns, then run from left to right; sums of n terms
        are within n roundings of the truth, and a norm is half as sensitive as its square.
        """
        roundings = self.additions + columns / 256 + 16
        share = (self.error / self.total).sqrt()
        worst = share[share.isfinite()].max().item() if len(share) else 0.0
        return worst + roundings * 2.0**-53


class Reference(Protocol):
    """One operation on one tensor."""

    def estimate(self, values: Values, rows: slice, columns: slice) -> None:
        """Change a tile by plain float64 arithmetic, and its bounds."""

    def settle(self, values: Values, i: Tensor, j: Tensor) -> None:
        """Change single elements (n,) at outputs `i` and inputs `j`, as the contract tells."""


# --- IA³ -----------------------------------------------------------------------------------------


class _OutputScale:
    """l * W for each output, and l * b."""

    def __init__(self, vector: Tensor) -> None:
        self.vector = vector

    def estimate(self, values: Values, rows: slice, columns: slice) -> None:
        values.multiply(self.vector[rows, None])

    def settle(self, values: Values, i: Tensor, j: Tensor) -> None:
        values.multiply(self.vector[i])


class _InputScale:
    """W * l for each input channel. With groups, output i sees the channels of its group only."""

    def __init__(self, vector: Tensor, kernel: int, groups: int, out: int) -> None:
        self.vector, self.kernel = vector, kernel
        self.channels, self.outputs = len(vector) // groups, out // groups  # of one group

    def estimate(self, values: Values, rows: slice, columns: slice) -> None:
        i = torch.arange(rows.start, rows.stop)[:, None]
        j = torch.arange(columns.start, columns.stop)
        if self.channels == len(self.vector):
            i = i[:1] * 0  # one group: the same factors for every output
        values.multiply(self._factor(i, j))

    def settle(self, values: Values, i: Tensor, j: Tensor) -> None:
        values.multiply(self._factor(i, j))

    def _factor(self, i: Tensor, j: Tensor) -> Tensor:
        return self.vector[i // max(self.outputs, 1) * self.channels + j // self.kernel]


# --- trainable tokens ----------------------------------------------------------------------------


class _Tokens:
    """Columns of the logical matrix (rows of the table) that are replaced."""

    def __init__(self, delta: Tensor, tokens: tuple[int, ...]) -> None:
        self.delta = delta  # (tokens, out)
        self.place = dict(zip(tokens, range(len(tokens)), strict=True))

    def estimate(self, values: Values, rows: slice, columns: slice) -> None:
        mine = [token for token in self.place if columns.start <= token < columns.stop]
        if not mine:
            return
        values.settle_relative()
        here = torch.tensor(mine) - columns.start
        values.x[:, here] = self.delta[[self.place[t] for t in mine]][:, rows].double().t()
        if values.error is not None:
            values.error[:, here] = 0
            values.relative = STEP

    def settle(self, values: Values, i: Tensor, j: Tensor) -> None:
        values.settle_relative()
        for number, token in enumerate(j.tolist()):
            if token in self.place:
                values.x[number] = self.delta[self.place[token], i[number]].double()
                if values.error is not None:
                    values.error[number] = 0


# --- LoRA and DoRA -------------------------------------------------------------------------------


def power(exponent: Tensor) -> Tensor:
    """2^exponent as float64, from its bits."""
    return ((exponent.to(torch.int64) + 1023) << 52).view(torch.float64)


class _LowRank:
    """W + B A, with the scaling in B. Several groups (convolutions): each has its rows of A."""

    def __init__(
        self, a: Tensor, b: Tensor, scaling: float, dtype: str, groups: int, magnitude: Tensor | None
    ) -> None:
        self.rank = b.shape[1]  # of one group
        self.a = a.view(groups, self.rank, -1)  # (group, rank, in)
        self.b, self.scaling = b, scaling  # (out, rank)
        self.outputs = len(b) // groups  # of one group
        self.bits = (53 - math.ceil(math.log2(self.rank))) // 2
        self.slices = 1 if dtype in ("BF16", "F16") and self.bits >= 22 else 2
        self.magnitude = magnitude
        self.factor: Tensor | None = None  # of each output, once the norms are known
        self.doubt = 0.0

    # --- the norms of DoRA

    def observe(self, values: Values, rows: slice, columns: slice, sums: Sums) -> None:
        """See a tile of W as it is before this operation; `values` is used up.

        The sum must be of the contract's values, or its doubt would outweigh all else. On the grid
        the float64 product is exact, so it is those.
        """
        for group, mine, part in self._parts(values, rows):
            b, a = self._factors(mine, columns, group)
            whole, rest = self._grid(b, 1), self._grid(a, 0)
            delta = whole[0] @ rest[0]
            if self.slices == 2:
                delta += torch.cat(whole, 1) @ torch.cat(rest[::-1], 0)
            part.add(delta)
            sums.add(part, mine)

    def finish(self, sums: Sums, columns: int) -> None:
        assert self.magnitude is not None
        self.factor = self.magnitude / sums.total.sqrt()
        self.doubt = sums.doubt(columns)

    def _grid(self, x: Tensor, dim: int) -> list[Tensor]:
        """x as terms of `bits` bits each."""
        _, exponent = torch.frexp(x.abs().amax(dim, keepdim=True))
        terms = []
        for number in range(1, self.slices + 1):
            shift = number * self.bits - exponent
            terms.append(torch.round(x * power(shift)) * power(-shift))
            x = x - terms[-1]
        return terms

    # --- whole tiles, plain

    def estimate(self, values: Values, rows: slice, columns: slice) -> None:
        values.settle_relative()
        bounds = []
        for group, mine, part in self._parts(values, rows):
            b, a = self._factors(mine, columns, group)
            part.x.addmm_(b, a)
            bounds.append((self._units(b, 1) * self._tolerance(), self._units(a, 0)))
        if len(bounds) == 1:
            values.widen_by_product(*bounds[0])
        else:
            values.widen(torch.cat([p[:, None] * q for p, q in bounds]))
        values.relative = (self.rank + 4) * 2.0**-53
        if self.factor is not None:
            values.multiply(self.factor[rows, None], self.doubt)

    def _units(self, x: Tensor, dim: int) -> Tensor:
        """The unit of the first slice of each row or column; 0 where there is nothing but zeros."""
        largest = x.abs().amax(dim)
        _, exponent = torch.frexp(largest)
        return power(exponent - self.bits).where(largest > 0, torch.zeros(()).double())

    def _tolerance(self) -> float:
        """A bound on |plain - contract| in units of row times units of column.

        One slice: |B - B1| is at most half a unit and |A| below 2^bits units, so each of the r
        terms is off by less than 2^bits + 1/4. Two slices: what is left out is B2 A2 and the rest
        of either factor, below 2 units. The plain product of r terms, added to W, is within r + 2
        roundings of at most |W + B A| + 2 r 2^(2 bits) units, and r 2^(2 bits) is at most 2^53.
        """
        truncated = 2.0**self.bits + 1 if self.slices == 1 else 2.0
        return self.rank * truncated + 2 * (self.rank + 2) + 2

    def _factors(self, rows: slice, columns: slice, group: int) -> tuple[Tensor, Tensor]:
        return self.b[rows].double() * self.scaling, self.a[group, :, columns].double()

    def _parts(self, values: Values, rows: slice) -> list[tuple[int, slice, Values]]:
        """(group, its rows, their values) for every group that the rows belong to."""
        if len(self.a) == 1:
            return [(0, rows, values)]
        found = []
        for group in range(rows.start // self.outputs, -(-rows.stop // self.outputs)):
            start = max(rows.start, group * self.outputs)
            stop = min(rows.stop, (group + 1) * self.outputs)
            here = slice(start - rows.start, stop - rows.start)
            part = Values(values.x[here])
            part.error = None if values.error is None else values.error[here]
            part.relative = values.relative
            found.append((group, slice(start, stop), part))
        return found

    # --- single elements, by the contract

    def settle(self, values: Values, i: Tensor, j: Tensor) -> None:
        delta = torch.cat(
            [
                self._delta(*part)
                for part in zip(i.split(self._at_once), j.split(self._at_once), strict=True)
            ]
        )
        # the sign of a zero product is the BLAS's own, and shows where W is -0
        negative = (values.x == 0) & values.x.signbit() & (delta == 0)
        values.add(delta)
        if negative.any():
            values.widen(negative.double() * TINY)
        if self.factor is not None:
            values.multiply(self.factor[i], self.doubt)

    @property
    def _at_once(self) -> int:
        return max(1, (1 << 19) // self.rank)

    def _delta(self, i: Tensor, j: Tensor) -> Tensor:
        b = self.b[i].double() * self.scaling  # (n, rank)
        a = self.a[i // self.outputs, :, j].double()
        b1, b2, b_unit = self._integers(b)
        a1, a2, a_unit = self._integers(a)
        delta = (b1 * a1).sum(1).double() * b_unit * a_unit
        if self.slices == 1:
            return delta
        cross = (b1 * a2 + b2 * a1).sum(1).double()
        return delta + cross * (b_unit * 2.0**-self.bits) * a_unit

    def _integers(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each row of x as integers n1, n2 and a unit: x = (n1 + n2 2^-bits) unit + the rest."""
        _, exponent = torch.frexp(x.abs().amax(1, keepdim=True))
        scaled = x * power(self.bits - exponent)
        first = torch.round(scaled)
        second = torch.round((scaled - first) * 2.0**self.bits)
        return first.to(torch.int64), second.to(torch.int64), power(exponent - self.bits)[:, 0]


class _LowRankBias:
    """b + s b_B."""

    def __init__(self, bias: Tensor, scaling: float) -> None:
        self.delta = bias * scaling

    def estimate(self, values: Values, rows: slice, columns: slice) -> None:
        values.add(self.delta[rows, None])

    def settle(self, values: Values, i: Tensor, j: Tensor) -> None:
        values.add(self.delta[i])


# --- from the plan's matching and the adapter's config -------------------------------------------


def scaling_of(config: Mapping[str, Any], module: str) -> tuple[int, float]:
    """(rank, scaling) of a module, by PEFT's rules: alpha / r, with rsLoRA alpha / sqrt(r); of the
    patterns the first that matches the end of the module's path, at a dot, counts."""

    def choose(field: str, default: str) -> Any:
        for pattern, value in (config.get(field) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        return config.get(default, 8)

    rank, alpha = int(choose("rank_pattern", "r")), float(choose("alpha_pattern", "lora_alpha"))
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def reference_of(
    operation: Operation, config: Mapping[str, Any], parts: Mapping[str, Tensor], dtype: str
) -> Reference | None:
    """The formula of one operation. None: this method leaves the bias as it is.

    Of the plan it takes which tensor, its layout, side, kernel, groups and tokens; the numbers are
    the adapter's own. Raises Refusal where file and config contradict each other.
    """
    settings = operation.settings
    if operation.method == "ia3":
        vector = parts["ia3_l"].double().flatten()
        if settings.side == "out":
            return _OutputScale(vector)
        if operation.on_bias:
            return None
        return _InputScale(vector, settings.kernel, settings.groups, settings.out)
    if operation.method == "trainable_tokens":
        return _Tokens(parts["trainable_tokens_delta"], settings.tokens)
    rank, scaling = scaling_of(config, operation.module)
    if len(parts["lora_A"]) != rank:
        raise Refusal(
            f"{operation.module}: rank {len(parts['lora_A'])} in the adapter, {rank} by its config"
        )
    if operation.on_bias:
        if operation.method == "dora" or "lora_bias" not in parts:
            return None
        return _LowRankBias(parts["lora_bias"].double().flatten(), scaling)
    magnitude = None
    if operation.method == "dora":
        magnitude = parts["lora_magnitude_vector"].double().flatten()
    a, b = parts["lora_A"].flatten(1), parts["lora_B"].flatten(1)
    return _LowRank(a, b, scaling, dtype, settings.groups, magnitude)
