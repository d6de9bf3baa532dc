"""The kinds of layers that an adapter can sit on: what each makes of a method's few operations.

An adapted layer stays the module that it was: same object, same parameters under the same names.
Only its class becomes a subclass, made here, of the class it had (as FSDP2 does it), whose
`forward` puts the adapters after one another. The adapters are a child, `adapters.<name>`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infold.adapters import METHODS, Geometry, Settings, lora, merge
from infold.errors import Refusal
from infold.tuners.classes import Front, put_before, replaced_forward, take_away
from infold.tuners.quantized import dequantized, is_bitsandbytes
from infold.tuners.rows import Rows

__all__ = [
    "DENSE",
    "KINDS",
    "Adapted",
    "AdaptedConv1D",
    "AdaptedEmbedding",
    "AdaptedOpaque",
    "Adapter",
    "Stage",
    "adapt",
    "is_dense",
    "kind_of",
]


_GATHERED = 4  # rows for each adapter of a batch, up to which a table of all rows is kept


class Adapter(nn.Module):
    """The parts of one method at one layer, as parameters that have the parts' names."""

    def __init__(
        self, method: str, parts: dict[str, Tensor], settings: Settings, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.method, self.settings = method, settings
        for name, value in parts.items():
            self.register_parameter(name, nn.Parameter(value))
        self.dropout = nn.Dropout(dropout) if dropout else None

    @property
    def parts(self) -> dict[str, Tensor]:
        return cast("dict[str, Tensor]", self._parameters)

    @property
    def is_table(self) -> bool:
        """Whether the method's matrix is the transposed table of an embedding or a head."""
        return self.method == "trainable_tokens"

    @property
    def on_bias(self) -> bool:
        """Whether it changes the bias; one that scales inputs leaves it."""
        changing = METHODS[self.method].ON_BIAS
        return self.settings.side == "out" and not self.parts.keys().isdisjoint(changing)

    def extra_repr(self) -> str:
        shapes = ", ".join(f"{name} {list(part.shape)}" for name, part in self.parts.items())
        return f"{self.method}: {shapes}"


@dataclass(frozen=True)
class Mixture:
    """What one layer does with the rows of a batch.

    inputs, outputs: tables of scales, (names + 1, channels), or of each row's already, (rows,
    channels); index: the row's place in the first kind. others: row numbers of other adapters.
    """

    index: Tensor
    inputs: Tensor | None
    outputs: Tensor | None
    others: tuple[tuple[Tensor, Adapter], ...]
    gathered: bool

    def of_rows(self, table: Tensor) -> Tensor:
        return table if self.gathered else table[self.index]


class Stage:
    """A layer's output after some of its adapters: what a method sees as its base."""

    __slots__ = ("args", "kwargs", "layer", "runs")

    def __init__(
        self,
        layer: Adapted,
        runs: Sequence[Adapter],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        self.layer, self.runs, self.args, self.kwargs = layer, runs, args, kwargs

    def __call__(self, x: Tensor) -> Tensor:
        if not self.runs:
            return self.layer.plain(x, *self.args, **self.kwargs)
        last = self.runs[-1]
        before = Stage(self.layer, self.runs[:-1], self.args, self.kwargs)
        return METHODS[last.method].forward(x, before, last.parts, last.settings, last.dropout)

    def map(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.layer.map(x, weight)

    def add(self, y: Tensor, h: Tensor, weight: Tensor, scale: float) -> Tensor:
        return self.layer.add(y, h, weight, scale)

    def add_vector(self, y: Tensor, vector: Tensor) -> Tensor:
        return (y + self.layer.broadcast(vector)).to(y.dtype)

    def scale_outputs(self, y: Tensor, vector: Tensor) -> Tensor:
        return (y * self.layer.broadcast(vector)).to(y.dtype)

    def scale_inputs(self, x: Tensor, vector: Tensor) -> Tensor:
        return (x * self.layer.broadcast(vector)).to(x.dtype)

    def replace_rows(self, x: Tensor, y: Tensor, numbers: Tensor, values: Tensor) -> Tensor:
        return self.layer.replace_rows(x, y, numbers, values)

    def table(self) -> Tensor:
        weight = self.matrix()
        return weight.t() if self.layer.transposed else weight

    def matrix(self) -> Tensor:
        return self._merged()[0]

    def bias(self) -> Tensor | None:
        return self._merged()[1]

    @torch.no_grad()
    def _merged(self) -> tuple[Tensor, Tensor | None]:
        weight = self.layer.matrix()
        bias = getattr(self.layer, "bias", None)
        for run in self.runs:
            turned = run.is_table and not self.layer.transposed
            seen = weight.t() if turned else weight
            done = merge(run.method, seen, bias, run.parts, run.settings)
            weight, bias = done.weight.t() if turned else done.weight, done.bias
        return weight, bias


class _Known(Stage):
    """A stage whose output for one input is already there."""

    __slots__ = ("x", "y")

    def __init__(self, layer: Adapted, x: Tensor, y: Tensor) -> None:
        super().__init__(layer, (), (), {})
        self.x, self.y = x, y

    def __call__(self, x: Tensor) -> Tensor:
        return self.y if x is self.x else super().__call__(x)


class Adapted(Front):
    """A layer with adapters."""

    METHODS: tuple[str, ...] = ("ia3", "lora", "dora")
    transposed = False  # whether the weight is stored as (in, out[, ...])

    adapters: nn.ModuleDict
    weight_name = "weight"  # of the parameter that the adapters change
    _runs: tuple[Adapter, ...]  # those in force, in order; empty: as the base
    _rows: Rows
    _path: str  # in the model

    @property
    def holder(self) -> nn.Module:
        """The module that has the parameters."""
        return self

    def leave(self) -> None:
        """Make the module what it was before `adapt`."""
        del self.adapters
        for name in ("_runs", "_rows", "_path"):
            self.__dict__.pop(name, None)
        take_away(self)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._rows.index is not None:
            return self._mixed(x, args, kwargs)
        if not self._runs:
            return super().forward(x, *args, **kwargs)
        return Stage(self, self._runs, args, kwargs)(x)

    def plain(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base's own output."""
        y: Tensor = super().forward(x, *args, **kwargs)
        return y

    def _mixed(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Each row through its own adapter."""
        mix = self._mixture(self.row_count(x), x.device)
        scaled = x
        if mix.inputs is not None:
            scaled = (x * self.broadcast_rows(mix.of_rows(mix.inputs), x)).to(x.dtype)
        y = self.plain(scaled, *args, **kwargs)
        if mix.outputs is not None:
            y = (y * self.broadcast_rows(mix.of_rows(mix.outputs), y)).to(y.dtype)
        for rows, adapter in mix.others:
            part = x[rows]
            known = _Known(self, part, y[rows])
            method = METHODS[adapter.method]
            own = method.forward(part, known, adapter.parts, adapter.settings, adapter.dropout)
            y = y.index_copy(0, rows, own.to(y.dtype))
        return y

    def _mixture(self, count: int, device: torch.device) -> Mixture:
        if torch.is_grad_enabled():  # its tables belong to one graph
            return self._mix(count, device)
        kept, key = self._rows.kept, (self, count, device)
        if key not in kept:
            kept[key] = self._mix(count, device)
        found: Mixture = kept[key]
        return found

    def _mix(self, count: int, device: torch.device) -> Mixture:
        index, names = self._rows.spread(count, device, self._path), self._rows.names
        own = self.adapters._modules
        used = {n: cast(Adapter, own[n]) for n in names if n in own}
        scales: dict[str, dict[str, Tensor]] = {"in": {}, "out": {}}
        others = []
        for name, adapter in used.items():
            if adapter.method == "ia3":
                scales[adapter.settings.side][name] = adapter.parts["ia3_l"]
            else:
                rows = (index == names.index(name)).nonzero().flatten()
                others.append((rows, adapter))
        # tokens come one at a time, and gathering for each takes longer than the multiplication
        gathered = not torch.is_grad_enabled() and count <= _GATHERED * (len(names) + 1)
        tables = [
            None if table is None else table.index_select(0, index) if gathered else table
            for table in (self._table(scales[side]) for side in ("in", "out"))
        ]
        return Mixture(index, tables[0], tables[1], tuple(others), gathered)

    def _table(self, vectors: Mapping[str, Tensor]) -> Tensor | None:
        """A row for each of the batch's adapters, and one of ones for the base: (names + 1, n)."""
        if not vectors:
            return None
        ones = torch.ones_like(next(iter(vectors.values())))
        rows = [*(vectors.get(name, ones) for name in self._rows.names), ones]
        if any(row.shape != ones.shape for row in rows):
            rows = [row.flatten() for row in rows]
        return torch.cat(rows).view(len(rows), -1)  # a vector has one dimension besides ones

    # --- what the kinds differ in; these are of Linear -----------------------------------------

    def geometry(self) -> Geometry:
        return Geometry(int(self.out_features), int(self.in_features))  # type: ignore[arg-type]

    def matrix(self) -> Tensor:
        """The logical weight (out, in * kernel)."""
        return cast(Tensor, self.weight)

    def map(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x.to(weight.dtype), weight)

    def add(self, y: Tensor, h: Tensor, weight: Tensor, scale: float) -> Tensor:
        if y.dtype == h.dtype == weight.dtype and not torch.is_autocast_enabled(y.device.type):
            flat = y.reshape(-1, y.shape[-1])
            h = h.reshape(-1, h.shape[-1])
            return torch.addmm(flat, h, weight.t(), alpha=scale).view(y.shape)
        return (y + scale * F.linear(h, weight.to(h.dtype))).to(y.dtype)

    def broadcast(self, vector: Tensor) -> Tensor:
        """A vector over channels, in a shape that multiplies activations."""
        return vector

    def broadcast_rows(self, table: Tensor, like: Tensor) -> Tensor:
        """A vector for each row of a batch (rows, channels), in a shape that multiplies `like`."""
        return table.view(len(table), *(1 for _ in like.shape[2:]), table.shape[1])

    def replace_rows(self, x: Tensor, y: Tensor, numbers: Tensor, values: Tensor) -> Tensor:
        raise NotImplementedError

    def row_count(self, x: Tensor) -> int:
        return x.shape[0]


class AdaptedLinear(Adapted):
    """torch.nn.Linear."""

    METHODS = (*Adapted.METHODS, "trainable_tokens")

    def replace_rows(self, x: Tensor, y: Tensor, numbers: Tensor, values: Tensor) -> Tensor:
        new = F.linear(x.to(values.dtype), values)
        bias = cast("Tensor | None", self.bias)
        if bias is not None:
            new = new + bias[numbers]
        # logits are large: y is this layer's own output, which no backward pass reads
        return y.index_copy_(-1, numbers, new.to(y.dtype))


class AdaptedConv1D(Adapted):
    """transformers' Conv1D: a Linear that stores (in, out)."""

    transposed = True

    def geometry(self) -> Geometry:
        return Geometry(int(self.nf), int(self.nx))  # type: ignore[arg-type]

    def matrix(self) -> Tensor:
        return cast(Tensor, self.weight).t()


class AdaptedEmbedding(Adapted):
    """torch.nn.Embedding; its logical weight is the transposed table."""

    METHODS = ("lora", "dora", "trainable_tokens")
    transposed = True

    def geometry(self) -> Geometry:
        rows, width = cast(Tensor, self.weight).shape
        return Geometry(width, rows, table=True)

    def matrix(self) -> Tensor:
        return cast(Tensor, self.weight).t()

    def map(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.lookup(x, weight.t())

    def replace_rows(self, x: Tensor, y: Tensor, numbers: Tensor, values: Tensor) -> Tensor:
        known, order = numbers.sort()
        x = x.to(known.dtype).contiguous()  # of int32 and of slices too, which it compares
        place = torch.searchsorted(known, x).clamp_(max=len(known) - 1)
        mine = (known[place] == x)[..., None]
        return torch.where(mine, self.lookup(order[place], values).to(y.dtype), y)

    def lookup(self, numbers: Tensor, table: Tensor) -> Tensor:
        """Rows of table (tokens, width) as this embedding would give them."""
        found = F.embedding(numbers, table)
        scale = getattr(self, "embed_scale", None)  # Gemma and others scale what they look up
        return found if scale is None else found * scale


class AdaptedConv(Adapted):
    """torch.nn.Conv1d, Conv2d, Conv3d."""

    def geometry(self) -> Geometry:
        module = cast(nn.Conv2d, self)
        return Geometry(module.out_channels, module.in_channels, tuple(module.kernel_size))

    def matrix(self) -> Tensor:
        return cast(Tensor, self.weight).flatten(1)

    def map(self, x: Tensor, weight: Tensor) -> Tensor:
        module = cast(nn.Conv2d, self)
        y: Tensor = module._conv_forward(x.to(weight.dtype), weight, None)
        return y

    def add(self, y: Tensor, h: Tensor, weight: Tensor, scale: float) -> Tensor:
        mix = (F.conv1d, F.conv2d, F.conv3d)[weight.dim() - 3]
        return (y + scale * mix(h, weight)).to(y.dtype)

    def broadcast(self, vector: Tensor) -> Tensor:
        return vector.view(-1, *(1 for _ in cast(nn.Conv2d, self).kernel_size))

    def broadcast_rows(self, table: Tensor, like: Tensor) -> Tensor:
        return table.view(*table.shape, *(1 for _ in cast(nn.Conv2d, self).kernel_size))

    def row_count(self, x: Tensor) -> int:
        return x.shape[0] if x.dim() == 2 + len(cast(nn.Conv2d, self).kernel_size) else 1


class AdaptedOpaque(Adapted):
    """A linear layer whose weight is stored in a way of its own: 4 or 8 bits, GPTQ, AWQ, FP8.

    DoRA needs the weight as numbers, so it exists only where `quantized` knows them.
    """

    def geometry(self) -> Geometry:
        inputs, outputs = _features(self)
        return Geometry(outputs, inputs)

    def matrix(self) -> Tensor:
        weight = dequantized(self)
        if weight is None:
            raise Refusal(f"the weight of a {self._plain.__name__} cannot be read as numbers")
        return weight


class AdaptedAttention(Adapted):
    """torch.nn.MultiheadAttention, whose weights go into one function, so that they must change.

    Its own adapter is that of in_proj; out_proj is a layer beside it, whose forward never runs.
    """

    METHODS = ("lora",)
    weight_name = "in_proj_weight"

    def geometry(self) -> Geometry:
        width = int(self.embed_dim)  # type: ignore[arg-type]
        return Geometry(3 * width, width)

    def matrix(self) -> Tensor:
        return cast(Tensor, self.in_proj_weight)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._rows.index is not None:
            raise Refusal("adapter_names is not supported by MultiheadAttention")
        inner = cast(Adapted, self.out_proj)
        places = ((self, "in_proj_weight"), (inner, "weight"))
        for layer, name in places:
            weight = cast(Tensor, getattr(layer, name))
            for run in layer._runs:
                weight = (weight + lora.update(run.parts, run.settings)).to(weight.dtype)
            layer.__dict__[name] = weight  # found before the parameter, which stays where it is
        try:
            return super(Adapted, self).forward(*args, **kwargs)
        finally:
            for layer, name in places:
                del layer.__dict__[name]


def _is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D, without importing transformers."""
    names = ((cls.__module__, cls.__name__) for cls in type(module).__mro__)
    return ("transformers.pytorch_utils", "Conv1D") in names


def _looks_up(module: nn.Module) -> bool:
    """Whether an embedding gives rows of its table, scaled at most, for the numbers it gets; those
    of positions often count for themselves."""
    scaled = hasattr(module, "embed_scale") and set(module._parameters) == {"weight"}
    return scaled or type(module).forward is nn.Embedding.forward


def is_dense(module: nn.Module) -> bool:
    """Whether the weight lies there as it is. torchao's tensors tell the dtype that they stand for;
    FSDP's are parts of plain ones."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dtype not in DENSE:
        return False
    return type(weight.data) is Tensor or type(weight.data).__name__ == "DTensor"


def _features(module: nn.Module) -> tuple[int, ...]:
    """(inputs, outputs) of whatever says that it maps the one to the other, else ()."""
    for names in (("in_features", "out_features"), ("infeatures", "outfeatures")):  # AutoGPTQ
        found = tuple(getattr(module, name, None) for name in names)
        if all(isinstance(number, int) for number in found):
            return cast("tuple[int, ...]", found)
    return ()


DENSE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

# The first that accepts a module is its kind.
KINDS: tuple[tuple[type[Adapted], Callable[[nn.Module], bool]], ...] = (
    (AdaptedAttention, lambda m: isinstance(m, nn.MultiheadAttention)),
    (AdaptedConv1D, _is_conv1d),
    (AdaptedEmbedding, lambda m: isinstance(m, nn.Embedding) and is_dense(m) and _looks_up(m)),
    (
        AdaptedConv,
        lambda m: isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d),
    ),
    (
        AdaptedLinear,
        lambda m: isinstance(m, nn.Linear) and not is_bitsandbytes(m) and is_dense(m),
    ),
    (AdaptedOpaque, lambda m: bool(_features(m))),
)


def kind_of(module: nn.Module) -> type[Adapted] | None:
    """The kind of layer that a module is, or None."""
    if isinstance(module, Adapted):
        return next((kind for kind, _ in KINDS if isinstance(module, kind)), None)
    return next((kind for kind, accepts in KINDS if accepts(module)), None)


def adapt(module: nn.Module, path: str, rows: Rows) -> Adapted:
    """Make the module at a path an adapted one, without adapters yet; nothing else changes."""
    if isinstance(module, Adapted):
        return module
    kind = kind_of(module)
    assert kind is not None
    if hasattr(module, "adapters"):
        raise Refusal(f"{path}: {type(module).__name__} has an attribute `adapters` of its own")
    if problem := replaced_forward(module):
        raise Refusal(f"{path}: {problem}")
    put_before(kind, module)
    layer = cast(Adapted, module)
    layer.adapters = nn.ModuleDict()
    layer._runs, layer._rows, layer._path = (), rows, path
    return layer
