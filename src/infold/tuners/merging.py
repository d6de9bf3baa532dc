"""Adapters into the weights of a model in memory, and out again.

It stands on the same methods and the same arithmetic as the merge of checkpoints, so both give the
same bytes. The base's parameters are not written to: merged ones take their place in the modules,
and unmerging puts them back.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from infold.adapters import METHODS, Settings
from infold.adapters.exact import slices_for
from infold.dtypes import NAMES
from infold.edit import Step, edit_tensor
from infold.errors import Refusal
from infold.tuners.layers import Adapted, AdaptedAttention, AdaptedOpaque, Adapter, plain_class
from infold.tuners.quantized import dequantized

if TYPE_CHECKING:
    from infold.tuners.model import AdaptedModel

__all__ = ["Merged", "merged"]


@dataclass
class _Place:
    """One parameter of the base, and what the merge made of it."""

    module: nn.Module
    name: str
    base: nn.Parameter
    merged: nn.Parameter


@dataclass
class Merged:
    """The adapters that are merged into a model's weights at present, in order."""

    names: tuple[str, ...] = ()
    places: list[_Place] = field(default_factory=list)
    dense: dict[str, nn.Linear] = field(default_factory=dict)  # in the place of quantized layers

    def show(self, merged: bool) -> None:
        """Put the merged parameters into the modules, or the base's."""
        for place in self.places:
            place.module._parameters[place.name] = place.merged if merged else place.base

    def commit(self, model: nn.Module) -> None:
        """What a merge for good changes beside parameters: quantized layers, and ties."""
        shared = {id(place.base) for place in self.places}
        left = [name for name, parameter in model.named_parameters() if id(parameter) in shared]
        if left:
            config = getattr(model, "config", None)
            for holder in (config, getattr(config, "text_config", None)):
                if holder is not None and getattr(holder, "tie_word_embeddings", False):
                    holder.tie_word_embeddings = False
            warnings.warn(
                f"untied: {', '.join(left)} shared a tensor that the adapter changed at its other "
                "end; they are now two tensors",
                stacklevel=3,
            )
        for path, linear in self.dense.items():
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, linear)


def merged(
    model: AdaptedModel,
    current: Merged,
    names: tuple[str, ...],
    keep: bool = True,
    dequantize: torch.dtype | None = None,
) -> Merged:
    """The base with `names` merged in this order, in force. Raises Refusal, and changes nothing.

    keep: the base's tensors stay, so quantized layers cannot be merged.
    """
    if names == current.names and keep:
        return current
    current.show(False)
    try:
        result = _merge(model, names, keep, dequantize)
    except BaseException:
        current.show(model._attached.enabled)
        raise
    result.show(True)
    return result


def _merge(
    model: AdaptedModel, names: tuple[str, ...], keep: bool, dequantize: torch.dtype | None
) -> Merged:
    result = Merged(names)
    layers = {
        path: layer
        for path, layer in model._attached.layers.items()
        if any(name in layer.adapters for name in names)
    }
    _check_storage(layers, keep, dequantize)
    for path, layer in layers.items():
        chosen = [cast(Adapter, layer.adapters[n]) for n in names if n in layer.adapters]
        if isinstance(layer, AdaptedOpaque):
            assert dequantize is not None
            result.dense[path] = _dense(path, layer, chosen, dequantize)
            continue
        for name, parameter, steps in _edits(layer, chosen):
            values = edit_tensor(parameter, steps, f"{path}.{name}")
            new = nn.Parameter(values, requires_grad=parameter.requires_grad)
            result.places.append(_Place(layer, name, parameter, new))
    return result


def _check_storage(layers: dict[str, Adapted], keep: bool, dequantize: torch.dtype | None) -> None:
    opaque = {p: layer for p, layer in layers.items() if isinstance(layer, AdaptedOpaque)}
    problems = []
    for path, layer in opaque.items():
        name = plain_class(layer).__name__
        if dequantized(layer) is None:
            problems.append(f"{path}: the weight of a {name} cannot be read as numbers")
        elif keep:
            problems.append(
                f"{path}: a {name} holds its weight in few bits; merge it for good with "
                "merge_and_unload(dequantize=torch.bfloat16)"
            )
        elif dequantize is None:
            problems.append(
                f"{path}: a {name} holds its weight in few bits; give merge_and_unload the dtype "
                "that it shall become: dequantize=torch.bfloat16"
            )
    if problems:
        raise Refusal(problems)


def _edits(
    layer: Adapted, adapters: list[Adapter]
) -> Iterator[tuple[str, nn.Parameter, list[Step]]]:
    """The parameters of a layer that change, each with its steps."""
    name = "in_proj_weight" if isinstance(layer, AdaptedAttention) else "weight"
    weight = cast(nn.Parameter, layer._parameters[name])
    yield name, weight, [_step(a, weight, layer.transposed) for a in adapters]
    bias = layer._parameters.get("bias")
    on_bias = [a for a in adapters if _is_on_bias(a)]
    if bias is not None and on_bias:
        yield "bias", bias, [_step(a, bias, on_bias=True) for a in on_bias]


def _is_on_bias(adapter: Adapter) -> bool:
    """Whether an adapter changes the bias; one that scales inputs leaves it."""
    parts = METHODS[adapter.method].ON_BIAS
    return adapter.settings.side == "out" and not adapter.parts.keys().isdisjoint(parts)


def _step(
    adapter: Adapter, stored: Tensor, transposed: bool = False, on_bias: bool = False
) -> Step:
    settings: Settings = adapter.settings
    if "lora_A" in adapter.parts:
        rank = adapter.parts["lora_A"].shape[0]
        slices = slices_for(NAMES.get(stored.dtype, "F32"), rank)
        settings = replace(settings, slices=slices)
    parts = {name: part.detach().to(stored.device) for name, part in adapter.parts.items()}
    return Step(METHODS[adapter.method].prepare(parts, settings), transposed, on_bias)


def _dense(path: str, layer: AdaptedOpaque, adapters: list[Adapter], dtype: torch.dtype) -> Any:
    """A quantized layer as a Linear of `dtype`, merged."""
    weight = layer.matrix().to(dtype)
    out, inputs = weight.shape
    old = cast("Tensor | None", getattr(layer, "bias", None))
    linear = nn.Linear(inputs, out, bias=old is not None, device="meta", dtype=dtype)
    steps = [_step(a, weight) for a in adapters]
    linear.weight = nn.Parameter(edit_tensor(weight, steps, f"{path}.weight"), requires_grad=False)
    if old is not None:
        bias = old.detach().to(dtype)
        on_bias = [a for a in adapters if _is_on_bias(a)]
        steps = [_step(a, bias, on_bias=True) for a in on_bias]
        linear.bias = nn.Parameter(edit_tensor(bias, steps, f"{path}.bias"), requires_grad=False)
    return linear
