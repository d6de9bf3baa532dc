"""Parameters that are adapted without being a layer's weight: PEFT's `target_parameters`.

transformers holds the experts of a layer as parameters (experts, out, in) of one module, which uses
them in a way of its own. So while such a module runs, it finds the updated values under the names
of its parameters. Each parameter is a layer for its adapters: a child `adapters.<parameter>` of the
module, beside which the module stays what it was but for its class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn

from infold.adapters import Geometry, experts
from infold.errors import Refusal
from infold.tuners.classes import Front, put_before, replaced_forward, take_away
from infold.tuners.config import LoraConfig, TunerConfig, matches
from infold.tuners.layers import DENSE, Adapted
from infold.tuners.rows import Rows

__all__ = [
    "Holder",
    "Parameter",
    "adapt_parameter",
    "depth",
    "find_parameters",
    "misfit",
    "named",
    "places_of",
    "unfit",
]

_INSIDE = ".adapters."


def named(path: str) -> str:
    """PEFT's name of the parameter that such a layer stands for."""
    owner, _, own = path.rpartition(_INSIDE)
    return f"{owner}.{own}" if owner else own


def find_parameters(
    modules: Mapping[str, nn.Module], config: TunerConfig
) -> dict[str, tuple[nn.Module, str]]:
    """Path of the layer -> module and parameter, of those that a config means; in the order in
    which the modules have them, in which PEFT nests its wrappers."""
    wanted = config.target_parameters if isinstance(config, LoraConfig) else None
    if not wanted:
        return {}
    return {
        f"{path}{_INSIDE}{name}": (module, name)
        for path, module in modules.items()
        for name, own in module._parameters.items()
        if own is not None and matches(wanted, f"{path}.{name}")
    }


def unfit(path: str, module: nn.Module, name: str) -> str | None:
    """Why a parameter takes no adapter."""
    own, where = cast(Tensor, module._parameters[name]), named(path)
    if own.dim() not in (2, 3):
        return f"{where} has {own.dim()} dimensions; a matrix has 2, and that of experts 3"
    if own.dtype not in DENSE:
        return f"{where} is {own.dtype}, which is not a plain float"
    if isinstance(module, nn.MultiheadAttention) or _is_inner(module):
        return f"{where}: give the name of the whole MultiheadAttention in target_modules"
    if isinstance(module, Adapted):
        return f"{where}: its module has an adapter of its own; leave it out of target_modules"
    if not isinstance(module, Holder) and hasattr(module, "adapters"):
        return f"{where}: {type(module).__name__} has an attribute `adapters` of its own"
    if problem := replaced_forward(module):
        return f"{where}: {problem}"
    return None


def _is_inner(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)


class Parameter(Adapted):
    """One parameter of a module, as the layer that its adapters sit on. It is never called."""

    METHODS = ("lora",)

    def __init__(self, holder: nn.Module, name: str, rows: Rows) -> None:
        nn.Module.__init__(self)
        self.adapters = nn.ModuleDict()
        self._runs, self._rows = (), rows
        self._of, self.weight_name = (holder,), name  # in a tuple: it is no child of this
        self.flipped = bool(getattr(holder, "is_transposed", False)) and self.weight.dim() == 3

    @property
    def holder(self) -> nn.Module:
        return self._of[0]

    @property
    def weight(self) -> Tensor:
        return cast(Tensor, self.holder._parameters[self.weight_name])

    @property
    def experts(self) -> int:
        """0: it is one matrix."""
        return self.weight.shape[0] if self.weight.dim() == 3 else 0

    def geometry(self) -> Geometry:
        outputs, inputs = self.weight.shape[-2:]
        return Geometry(inputs, outputs) if self.flipped else Geometry(outputs, inputs)

    def updated(self) -> Tensor:
        """The values that the module is to use."""
        weight = self.weight
        for run in self._runs:
            weight = experts.updated(weight, run.parts, run.settings)
        return weight

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a parameter is not called")

    def leave(self) -> None:
        holder = cast(Holder, self.holder)
        del holder.adapters[self.weight_name]
        if not len(holder.adapters):
            del holder.adapters
            take_away(holder)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return object.__reduce_ex__(self, protocol)


class Holder(Front):
    """A module with adapted parameters."""

    adapters: nn.ModuleDict

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        layers = [cast(Parameter, layer) for layer in self.adapters.children()]
        rows = layers[0]._rows
        if rows.index is not None:
            mixed = {n for n in rows.names for layer in layers if n in layer.adapters}
            if mixed:
                raise Refusal(
                    f"adapter_names: {', '.join(sorted(mixed))} changes experts or other parameters"
                    ", which all rows share"
                )
            return super().forward(*args, **kwargs)
        running = [layer for layer in layers if layer._runs]
        for layer in running:  # found before the parameter, which stays where it is
            self.__dict__[layer.weight_name] = layer.updated()
        try:
            return super().forward(*args, **kwargs)
        finally:
            for layer in running:
                self.__dict__.pop(layer.weight_name, None)


def adapt_parameter(module: nn.Module, name: str, path: str, rows: Rows) -> Parameter:
    """The layer at a path of a parameter, without adapters where it is new."""
    if not isinstance(module, Holder):
        if hasattr(module, "adapters"):
            kind = type(module).__name__
            raise Refusal(f"{named(path)}: {kind} has adapters, or an attribute of that name")
        if problem := replaced_forward(module):
            raise Refusal(f"{named(path)}: {problem}")
        put_before(Holder, module)
        cast(Holder, module).adapters = nn.ModuleDict()
    holder = cast(Holder, module)
    if name not in holder.adapters:
        holder.adapters[name] = Parameter(holder, name, rows)
    return cast(Parameter, holder.adapters[name])


def depth(layer: Parameter, name: str) -> int:
    """How many of PEFT's wrappers are around that of an adapter's parameter."""
    holder = cast(Holder, layer.holder)
    mine = [
        own
        for own in holder._parameters
        if own in holder.adapters and name in cast(Parameter, holder.adapters[own]).adapters
    ]
    return len(mine) - 1 - mine.index(layer.weight_name)


def places_of(parameters: Mapping[str, tuple[nn.Module, str]]) -> dict[str, str]:
    """A wrapper's path in a file of PEFT's -> path of the layer."""
    by_owner: dict[str, list[str]] = {}
    for path in parameters:
        by_owner.setdefault(path.rpartition(_INSIDE)[0], []).append(path)
    return {
        owner + ".base_layer" * around: path
        for owner, paths in by_owner.items()
        for around, path in enumerate(reversed(paths))
    }


def misfit(
    path: str, module: nn.Module, name: str, shapes: Mapping[str, Sequence[int]], rank: int
) -> str | None:
    """Why the tensors of a file do not suit a parameter."""
    if problem := unfit(path, module, name):
        return problem
    own = Parameter(module, name, Rows())
    size, rank = own.geometry(), rank * max(own.experts, 1)
    wanted = {"lora_A": (rank, size.inputs), "lora_B": (size.outputs, rank)}
    if {part: tuple(shape) for part, shape in shapes.items()} != wanted:
        told = ", ".join(f"{part} {list(shape)}" for part, shape in sorted(shapes.items()))
        need = ", ".join(f"{part} {list(shape)}" for part, shape in wanted.items())
        return f"{told}; {named(path)} needs {need}"
    return None
