"""IA³ (Liu et al. 2022, arXiv 2205.05638): learned vectors l that scale activations.

    side "out":   y = l * (W x + b)      W' = diag(l) W,   b' = l * b
    side "in":    y = W (l * x) + b      W' = W diag(l),   b' = b         (PEFT: feed-forward)

`ia3_l` has one element per output or input channel, in any shape. A convolution's input vector
repeats over the kernel; with groups, each group of outputs sees its own part of the vector.

On the output side a *row map* (the fields of `Settings` from `view` to `repeat`) tells which stored
row gets which element: rows in another order, a part of a fused tensor, or the float scales of a
quantized weight, several for each of its rows. What is multiplied is then the stored row; or a part
of it, where one dense tensor (experts, out, in) is a matrix with a row for each expert.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from infold.adapters.exact import Index, root
from infold.adapters.layer import Base, Dropout, Geometry
from infold.adapters.operations import Operation, ScaleInputs, ScaleOutputs
from infold.adapters.settings import Settings

PARTS: tuple[str, ...] = ("ia3_l",)
REQUIRED: tuple[str, ...] = PARTS
TABLE: Mapping[str, str] = {}
ON_BIAS: tuple[str, ...] = PARTS
KEYS: Mapping[str, str] = {".ia3_l": "ia3_l"}
PEFT_TYPES: Mapping[str, frozenset[str]] = {"IA3": frozenset(("feedforward_modules",))}
REFUSED: Mapping[str, str] = {}
OBSERVES = False
_ROW_MAP = ("view", "order", "root", "first", "rows", "repeat", "width")


def owns(parts: Collection[str], fields: Mapping[str, Any]) -> bool:
    return "ia3_l" in parts


def describe(settings: Settings) -> dict[str, Any]:
    told: dict[str, Any] = {"side": settings.side}
    plain = Settings()
    for name in _ROW_MAP:
        value = getattr(settings, name)
        if value != getattr(plain, name):
            told[name] = list(value) if isinstance(value, tuple) else value
    return told


class _Scale:
    observes = False
    observed: Tensor | None = None

    def observe(self, x: Tensor, rows: Index, cols: Index) -> None: ...

    def recall(self, observed: Tensor) -> None: ...

    def operations(self, rows: slice, cols: slice) -> Sequence[Operation] | None:
        return None


def _inverted(scale: Tensor) -> Tensor:
    """1 / scale; 1 where that is not finite, since nothing is left to scale back."""
    inverse = 1 / scale
    return torch.where(inverse.isfinite(), inverse, 1.0)


class _Output(_Scale):
    def __init__(self, scale: Tensor, repeat: int) -> None:
        self.scale = scale  # (out,)
        self.repeat = repeat  # stored rows that share an element

    def inverse(self) -> _Output:
        return _Output(_inverted(self.scale), self.repeat)

    def weight(self, x: Tensor, rows: Index, cols: Index) -> None:
        x.mul_(self._of(rows)[:, None])

    def operations(self, rows: slice, cols: slice) -> Sequence[Operation] | None:
        return [ScaleOutputs(self._of(rows))]

    def bias(self, x: Tensor, rows: Index) -> None:
        x.mul_(self._of(rows))

    def _of(self, rows: Index) -> Tensor:
        """The factors of stored rows."""
        if self.repeat == 1:
            return self.scale[rows]
        if isinstance(rows, slice):
            bounds = rows.indices(len(self.scale) * self.repeat)
            rows = torch.arange(*bounds, device=self.scale.device)
        return self.scale[rows // self.repeat]


class _Stacked(_Scale):
    """The outputs of one expert, which lie one after the other in a stored row."""

    def __init__(self, scale: Tensor, row: int, begin: int, width: int) -> None:
        self.scale, self.row = scale, row
        self.begin, self.width = begin, width  # the first output in the row; elements of each

    def inverse(self) -> _Stacked:
        return _Stacked(_inverted(self.scale), self.row, self.begin, self.width)

    def weight(self, x: Tensor, rows: Index, cols: Index) -> None:
        mine = (self._numbers(rows, x.shape[0]) == self.row).nonzero().flatten().tolist()
        if not mine:
            return
        place = self._numbers(cols, x.shape[1]) // self.width - self.begin
        inside = (place >= 0) & (place < len(self.scale))
        factors = torch.where(inside, self.scale[place.clamp(0, len(self.scale) - 1)], 1.0)
        for row in mine:
            x[row].mul_(factors)

    def bias(self, x: Tensor, rows: Index) -> None:
        raise AssertionError("a bias has a row for each output")

    def _numbers(self, index: Index, count: int) -> Tensor:
        if isinstance(index, slice):
            return torch.arange(count, device=self.scale.device) + (index.start or 0)
        return index


class _Input(_Scale):
    def __init__(self, scale: Tensor, per_group: int) -> None:
        self.scale = scale  # (groups, in * kernel)
        self.per_group = per_group  # outputs that share a row of `scale`

    def inverse(self) -> _Input:
        return _Input(_inverted(self.scale), self.per_group)

    def weight(self, x: Tensor, rows: Index, cols: Index) -> None:
        if self.scale.shape[0] == 1:
            x.mul_(self.scale[0, cols])
            return
        outputs = torch.arange(self.per_group * self.scale.shape[0], device=x.device)[rows]
        x.mul_(self.scale[outputs // self.per_group][:, cols])

    def operations(self, rows: slice, cols: slice) -> Sequence[Operation] | None:
        return [ScaleInputs(self.scale[0, cols])] if self.scale.shape[0] == 1 else None

    def bias(self, x: Tensor, rows: Index) -> None: ...


def prepare(parts: Mapping[str, Tensor], settings: Settings) -> _Output | _Stacked | _Input:
    scale = parts["ia3_l"].double().flatten()
    if settings.width:
        row, begin = divmod(settings.first, settings.out)
        return _Stacked(_rooted(scale, settings), row, begin, settings.width)
    if settings.side == "out":
        return _Output(_by_rows(scale, settings), settings.repeat)
    rows = scale.view(settings.groups, -1).repeat_interleave(settings.kernel, 1)
    return _Input(rows, settings.out // settings.groups)


def _by_rows(scale: Tensor, settings: Settings) -> Tensor:
    """The factors of the rows, before each stands for `repeat` of them."""
    scale = _rooted(settings.arranged(scale), settings)
    if not settings.rows:
        return scale
    whole = scale.new_ones(settings.rows)
    whole[settings.first : settings.first + len(scale)] = scale
    return whole


def _rooted(scale: Tensor, settings: Settings) -> Tensor:
    return root(scale) if settings.root == 2 else scale


def bound(peak: float, parts: Mapping[str, Tensor], settings: Settings) -> float:
    most = float(parts["ia3_l"].detach().abs().max())
    return float(peak * max(1.0, most ** (1 / settings.root)))


def init(geometry: Geometry, settings: Settings, base: Base) -> dict[str, Tensor]:
    """Ones, which change nothing; standard normal with `start=False` (PEFT's init_ia3_weights)."""
    out = settings.side == "out"
    length = geometry.outputs if out else geometry.inputs
    if geometry.kernel:
        shape: tuple[int, ...] = (1, length, *(1 for _ in geometry.kernel))
    else:
        shape = (length, 1) if out else (1, length)
    return {"ia3_l": torch.ones(shape) if settings.start else torch.randn(shape)}


def forward(
    x: Tensor,
    base: Base,
    parts: Mapping[str, Tensor],
    settings: Settings,
    dropout: Dropout | None = None,
) -> Tensor:
    vector = parts["ia3_l"].flatten()
    if settings.side == "out":
        return base.scale_outputs(base(x), vector)
    return base(base.scale_inputs(x, vector))
