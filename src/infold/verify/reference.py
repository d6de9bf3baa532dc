"""Every method's formula, stated anew from the parts, with a bound on what the merge may differ.

Each formula has a plain form: full factors, an ordinary float64 product, whole tiles, and a bound
on what the merge may differ. Where that cannot decide, the contract of the exact product is asked,
as `adapters/exact.py` tells it: for single elements the factors are integers on their grids,
multiplied and summed as int64. DoRA's norms need whole rows of such values; there the product is
float64, which is exact on the grid.

Weights are logical matrices (out, in), float64, as in `adapters`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from infold.adapters import Settings
from infold.errors import Refusal
from infold.plan.edits import Operation
from infold.verify.experts import Experts
from infold.verify.values import STEP, Values

__all__ = [
    "LowRank",
    "PowerOfTwo",
    "Reference",
    "Sums",
    "alpha_of",
    "rank_of",
    "reference_of",
    "scaling_of",
]


class Sums:
    """For each output: the sum of squares of its row, and of the squares of the row's bounds."""

    def __init__(self, out: int) -> None:
        self.total = torch.zeros(out, dtype=torch.float64)
        self.error = torch.zeros(out, dtype=torch.float64)
        self.tiles = torch.zeros(out, dtype=torch.int64)  # that were added, one after the other
        self.depth = 0  # additions that a term went through within its tile

    def add(self, values: Values, rows: slice) -> None:
        """See a tile: some columns of these rows. All tiles come once."""
        squares = values.x.square()
        while (count := squares.shape[1]) > 1:  # in pairs: few roundings for each term
            half = count // 2
            folded = squares[:, :half] + squares[:, half : 2 * half]
            if count % 2:
                folded[:, 0] += squares[:, -1]
            squares = folded
        self.total[rows] += squares[:, 0]
        self.tiles[rows] += 1
        self.depth = max(self.depth, 2 * values.x.shape[1].bit_length())
        if not values.exact:
            bound = values.x.abs() * values.relative
            if values.error is not None:
                bound = bound + values.error
            self.error[rows] += bound.square().sum(1)

    def doubt(self, columns: int) -> float:
        """A bound on the relative difference of the norms from those that the merge computes.

        The merge adds columns as trees of 256, then from left to right. A sum of squares is off by
        no more than its longest chain of roundings, and a norm is half as sensitive.
        """
        share = (self.error / self.total).sqrt()
        share = share[share.isfinite()]
        worst = share.max().item() if len(share) else 0.0
        chain = self.depth + int(self.tiles.max()) + columns / 256 + 16
        return worst + chain * 2.0**-53


class Reference(Protocol):
    """One operation on one tensor. Rows are outputs, columns inputs; a bias is one column."""

    def estimate(self, values: Values, rows: slice, columns: slice) -> None:
        """Change a tile by plain float64 arithmetic, and its bounds."""

    def contract(self, values: Values, rows: slice, columns: slice) -> None:
        """Change a tile as the contract tells."""

    def settle(self, values: Values, i: Tensor, j: Tensor) -> None:
        """Change the single elements [i, j], of shape (n,), as the contract tells."""


# --- IA³ -----------------------------------------------------------------------------------------


class _OutputScale:
    """l * W for each output, and l * b. Stored row i belongs to element `element(i)` of l."""

    def __init__(self, vector: Tensor, settings: Settings) -> None:
        self.vector = torch.from_numpy(np.sqrt(vector.numpy())) if settings.root == 2 else vector
        self.map = settings

    def estimate(self, values: Values, rows: slice, columns: slice) -> None:
        values.multiply(self._factor(torch.arange(rows.start, rows.stop))[:, None])

    contract = estimate  # one rounding of IEEE arithmetic is the contract

    def settle(self, values: Values, i: Tensor, j: Tensor) -> None:
        values.multiply(self._factor(i))

    def _factor(self, i: Tensor) -> Tensor:
        place = i // self.map.repeat - self.map.first
        inside = (place >= 0) & (place < len(self.vector))
        element = _elements(place.clamp(0, len(self.vector) - 1), self.map)
        return torch.where(inside, self.vector[element], 1.0)


def _elements(place: Tensor, settings: Settings) -> Tensor:
    """Which output of the module a place in the stored order is, digit by digit."""
    if not settings.order:
        return place
    element, sizes = torch.zeros_like(place), settings.view
    for axis in reversed(settings.order):
        element += place % sizes[axis] * math.prod(sizes[axis + 1 :])
        place = place // sizes[axis]
    return element


class _ExpertScale:
    """l * W for each output of one expert of several, (experts, out * in) as it is stored."""

    def __init__(self, vector: Tensor, settings: Settings) -> None:
        self.scale = _OutputScale(vector, replace(settings, width=0))
        self.out, self.width = settings.out, settings.width

    def estimate(self, values: Values, rows: slice, columns: slice) -> None:
        if not rows.start <= self.scale.map.first // self.out < rows.stop:
            return  # it multiplies the others by 1
        i = torch.arange(rows.start, rows.stop)[:, None]
        self.settle(values, i, torch.arange(columns.start, columns.stop))

    contract = estimate  # one rounding of IEEE arithmetic is the contract

    def settle(self, values: Values, i: Tensor, j: Tensor) -> None:
        values.multiply(self.scale._factor(i * self.out + j // self.width))


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

    contract = estimate  # one rounding of IEEE arithmetic is the contract

    def settle(self, values: Values, i: Tensor, j: Tensor) -> None:
        values.multiply(self._factor(i, j))

    def _factor(self, i: Tensor, j: Tensor) -> Tensor:
        return self.vector[i // max(self.outputs, 1) * self.channels + j // self.kernel]


class PowerOfTwo:
    """2^exponent for all of a tensor."""

    def __init__(self, exponent: int) -> None:
        self.factor = torch.tensor(2.0, dtype=torch.float64) ** exponent

    def estimate(self, values: Values, rows: slice, columns: slice) -> None:
        values.multiply(self.factor)

    contract = estimate

    def settle(self, values: Values, i: Tensor, j: Tensor) -> None:
        values.multiply(self.factor)


# --- trainable tokens ----------------------------------------------------------------------------


class _Tokens:
    """Columns of the logical matrix (rows of the table) that are replaced."""

    def __init__(self, delta: Tensor, tokens: tuple[int, ...]) -> None:
        self.tokens, order = torch.tensor(tokens, dtype=torch.int64).sort()
        self.delta = delta[order]  # (tokens, out)

    def estimate(self, values: Values, rows: slice, columns: slice) -> None:
        inside = (self.tokens >= columns.start) & (self.tokens < columns.stop)
        here = self.tokens[inside] - columns.start
        values.fix()
        values.x[:, here] = self.delta[inside][:, rows].double().t()
        if values.error is not None:
            values.error[:, here] = 0

    contract = estimate  # one rounding of IEEE arithmetic is the contract

    def settle(self, values: Values, i: Tensor, j: Tensor) -> None:
        values.fix()
        place = torch.searchsorted(self.tokens, j).clamp(max=len(self.tokens) - 1)
        hit = self.tokens[place] == j
        values.x[hit] = self.delta[place[hit], i[hit]].double()
        if values.error is not None:
            values.error[hit] = 0


# --- LoRA and DoRA -------------------------------------------------------------------------------


_AT_ONCE = 1 << 19  # integers of one factor that are gathered at once
_WHOLE = 2 << 20  # elements up to which a factor is kept in float64 as a whole


def _power(exponent: Tensor) -> Tensor:
    """2^exponent as float64, from its bits; within the normal range."""
    return ((exponent.to(torch.int64) + 1023) << 52).view(torch.float64)


def _exponent(x: Tensor, dim: int) -> Tensor:
    """The smallest e with |x| < 2^e along `dim`; 0 where all are zero."""
    exponent: Tensor = torch.frexp(x.abs().amax(dim, keepdim=True))[1]
    return exponent.clamp(min=-900)  # what lies below only float64 could store


class Factor:
    """One factor, (out, rank) or (rank, in) by `dim`, the dimension of the rank."""

    def __init__(self, raw: Tensor, dim: int, scaling: float, bits: int) -> None:
        self.raw, self.dim, self.scaling, self.bits = raw, dim, scaling, bits
        small = raw.numel() <= _WHOLE
        self.whole = self._values(raw) if small else None
        self.units = None if self.whole is None else self._units(self.whole)

    def _values(self, raw: Tensor) -> Tensor:
        return raw.double() * self.scaling

    def _units(self, x: Tensor) -> Tensor:
        unit = _power(_exponent(x, self.dim) - self.bits).squeeze(self.dim)
        return unit * (x != 0).any(self.dim)

    def take(self, index: slice) -> Tensor:
        """Some rows (dim 1) or columns (dim 0), float64."""
        where = index if self.dim else (slice(None), index)
        return self.whole[where] if self.whole is not None else self._values(self.raw[where])

    def units_of(self, index: slice, taken: Tensor) -> Tensor:
        """The unit of the first slice for each of them; 0 where there is nothing but zeros."""
        return self._units(taken) if self.units is None else self.units[index]

    def pick(self, index: Tensor) -> Tensor:
        """(n, rank): the row or column of each index."""
        return self._values(self.raw[index] if self.dim else self.raw[:, index].t())

    def grid(self, taken: Tensor, slices: int) -> list[Tensor]:
        """Its values as terms of `bits` bits each."""
        exponent, terms = _exponent(taken, self.dim), []
        for number in range(1, slices + 1):
            shift = number * self.bits - exponent
            terms.append(torch.round(taken * _power(shift)) * _power(-shift))
            taken = taken - terms[-1]
        return terms


class LowRank:
    """W + B A, with the scaling in B. Several groups (convolutions): each has its rows of A."""

    def __init__(
        self,
        a: Tensor,
        b: Tensor,
        scaling: float,
        dtype: str,
        groups: int = 1,
        magnitude: Tensor | None = None,
    ) -> None:
        self.rank = b.shape[1]  # of one group
        self.bits = (53 - math.ceil(math.log2(self.rank))) // 2
        self.slices = 2 if dtype != "BF16" or self.rank > 16 else 1
        self.outputs = len(b) // groups  # of one group
        self.b = Factor(b, 1, scaling, self.bits)
        self.a = [Factor(part, 0, 1.0, self.bits) for part in torch.split(a, self.rank)]  # by group
        self.magnitude = magnitude
        self.factor: Tensor | None = None  # of each output, once the norms are known
        self.doubt = 0.0

    def finish(self, sums: Sums, columns: int) -> None:
        """DoRA: `sums` has seen all tiles of the contract's values; `columns` are the inputs."""
        assert self.magnitude is not None
        self.factor = self.magnitude / sums.total.sqrt()
        self.doubt = sums.doubt(columns)

    # --- whole tiles

    def estimate(self, values: Values, rows: slice, columns: slice) -> None:
        values.fix()
        bounds = []
        for a, mine, x in self._parts(values.x, rows):
            left, right = self.b.take(mine), a.take(columns)
            x.addmm_(left, right)
            units = self.b.units_of(mine, left), a.units_of(columns, right)
            bounds.append((units[0] * self._tolerance, units[1]))
        if len(bounds) == 1:
            values.widen_by_product(*bounds[0])
        else:
            values.widen(torch.cat([p[:, None] * q for p, q in bounds]))
        values.relative = (self.rank + 4) * 2.0**-53
        self._direct(values, rows)

    def contract(self, values: Values, rows: slice, columns: slice) -> None:
        values.fix()
        for a, mine, x in self._parts(values.x, rows):
            left = self.b.grid(self.b.take(mine), self.slices)
            right = a.grid(a.take(columns), self.slices)
            delta = left[0] @ right[0]  # exact, whatever the order of its sums
            if self.slices == 2:
                delta += torch.cat(left, 1) @ torch.cat(right[::-1], 0)
            x.add_(delta)
        values.relative = 0.0 if values.error is None else STEP
        self._direct(values, rows)

    def _direct(self, values: Values, rows: slice | Tensor) -> None:
        """DoRA, once the norms are known: give each output its length."""
        if self.factor is not None:
            factor = self.factor[rows]
            values.multiply(factor[:, None] if values.x.dim() == 2 else factor, self.doubt)

    @property
    def _tolerance(self) -> float:
        """A bound on |plain - contract|, in units of the row times units of the column.

        One slice: |B - B1| is at most half a unit and |A| at most 2^bits units, so each of the r
        terms is off by at most 2^bits + 1/4. Two slices: what is left out is B2 A2 and the rest of
        either factor, less than 2. The plain product of r terms, added to W, is within r + 2
        roundings of at most |W + B A| + 2 r 2^(2 bits) units, and r 2^(2 bits) is at most 2^53.
        """
        left_out = 2.0**self.bits + 1 if self.slices == 1 else 2.0
        return self.rank * left_out + 2 * (self.rank + 2) + 2

    def _parts(self, x: Tensor, rows: slice) -> list[tuple[Factor, slice, Tensor]]:
        """(A, rows, x) of every group that the rows belong to."""
        if len(self.a) == 1:
            return [(self.a[0], rows, x)]
        found = []
        for group in range(rows.start // self.outputs, -(-rows.stop // self.outputs)):
            start = max(rows.start, group * self.outputs)
            stop = min(rows.stop, (group + 1) * self.outputs)
            mine = x[start - rows.start : stop - rows.start]
            found.append((self.a[group], slice(start, stop), mine))
        return found

    # --- single elements, by the contract

    def settle(self, values: Values, i: Tensor, j: Tensor) -> None:
        values.add(self.update(i, j))
        self._direct(values, i)

    def update(self, i: Tensor, j: Tensor) -> Tensor:
        """What is added to single elements. An update of zero is +0, from the integer."""
        step = max(1, _AT_ONCE // self.rank)
        pieces = [slice(start, start + step) for start in range(0, len(i), step)]
        return torch.cat([i.new_zeros(0).double(), *(self._delta(i[p], j[p]) for p in pieces)])

    def _delta(self, i: Tensor, j: Tensor) -> Tensor:
        a = self.a[0].pick(j)
        group = i // max(self.outputs, 1)
        for number in range(1, len(self.a)):
            mine = group == number
            a[mine] = self.a[number].pick(j[mine])
        b1, b2, b_unit = self._integers(self.b.pick(i))
        a1, a2, a_unit = self._integers(a)
        delta = (b1 * a1).sum(1).double() * b_unit * a_unit
        if self.slices == 1:
            return delta
        cross = (b1 * a2 + b2 * a1).sum(1).double()
        return delta + cross * (b_unit * 2.0**-self.bits) * a_unit

    def _integers(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each row of x as integers n1, n2 and a unit: x = (n1 + n2 2^-bits) unit + the rest."""
        exponent = _exponent(x, 1)
        scaled = x * _power(self.bits - exponent)
        first = torch.round(scaled)
        second = torch.round((scaled - first) * 2.0**self.bits)
        return first.to(torch.int64), second.to(torch.int64), _power(exponent - self.bits)[:, 0]


class _LowRankBias:
    """b + s b_B."""

    def __init__(self, bias: Tensor, scaling: float) -> None:
        self.delta = bias * scaling

    def estimate(self, values: Values, rows: slice, columns: slice) -> None:
        values.add(self.delta[rows, None])

    contract = estimate  # one rounding of IEEE arithmetic is the contract

    def settle(self, values: Values, i: Tensor, j: Tensor) -> None:
        values.add(self.delta[i])


# --- from the plan's matching and the adapter's config -------------------------------------------


def scaling_of(config: Mapping[str, Any], module: str, rank: int) -> float:
    """LoRA's factor by PEFT's rules: alpha / r, with rsLoRA alpha / sqrt(r).

    The output projection of a MultiheadAttention, which PEFT keeps in a `base_layer`, is updated
    twice; see `plan/config.py`.
    """
    own = alpha_of(config, module) / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return 2 * own if "base_layer" in module.split(".") else own


def alpha_of(config: Mapping[str, Any], module: str) -> float:
    """The alpha of a module. Raises Refusal where patterns contradict each other."""
    values = {float(value) for value in _matching(config, "alpha_pattern", "lora_alpha", module)}
    if len(values) > 1:
        raise Refusal(f"{module}: alpha_pattern gives {', '.join(map(str, sorted(values)))}")
    return values.pop()


def _matching(config: Mapping[str, Any], patterns: str, default: str, module: str) -> list[Any]:
    """The values of the patterns that match a module's path, or the end of it after a dot.

    PEFT takes the first, but saves them in another order, so all have to be looked at.
    """
    path = module.split(".base_layer")[0]
    found = [
        value
        for pattern, value in (config.get(patterns) or {}).items()
        if re.match(rf"(.*\.)?({pattern})$", path)
    ]
    return found or [config.get(default, 8)]


def rank_of(operation: Operation, rows: int) -> int:
    """The rank of a LoRA whose lora_A has so many rows."""
    return rows // max(operation.settings.experts, 1)


def reference_of(
    operation: Operation,
    config: Mapping[str, Any],
    parts: Mapping[str, Tensor],
    dtype: str,
    scaling: float | None = None,
) -> Reference:
    """The formula of one operation on a tensor that is stored as `dtype`. parts: of an expert that
    is a weight of its own, its own.

    Of the plan it takes which tensor, its layout, side, kernel, groups and tokens; the numbers are
    the adapter's own, `scaling` too unless it is given. Raises Refusal where the adapter's file and
    config contradict each other.
    """
    settings = operation.settings
    if operation.method == "ia3":
        vector = parts["ia3_l"].double().flatten()
        if settings.side == "out":
            kind = _ExpertScale if settings.width else _OutputScale
            return kind(vector, settings)
        return _InputScale(vector, settings.kernel, settings.groups, settings.out)
    if operation.method == "trainable_tokens":
        return _Tokens(parts["trainable_tokens_delta"], settings.tokens)
    alone, rank = settings.expert >= 0, len(parts["lora_A"])
    if not alone:
        rank = rank_of(operation, rank)
    ranks = _matching(config, "rank_pattern", "r", operation.module)
    if rank not in ranks:
        raise Refusal(f"{operation.module}: rank {rank} in the adapter, {ranks[0]} by its config")
    if scaling is None:
        scaling = scaling_of(config, operation.module, rank)
    a, b = parts["lora_A"].flatten(1), parts["lora_B"].flatten(1)
    if alone:
        return LowRank(a, b, scaling, dtype)
    if settings.experts:
        return Experts(a, b, rank, settings, partial(LowRank, scaling=scaling, dtype=dtype))
    outputs = _elements(torch.arange(len(b)), settings)
    if operation.on_bias:
        return _LowRankBias(parts["lora_bias"].double().flatten()[outputs], scaling)
    magnitude = None
    if operation.method == "dora":
        magnitude = parts["lora_magnitude_vector"].double().flatten()[outputs]
    b = b[outputs]
    return LowRank(a, b, scaling, dtype, settings.groups, magnitude)
