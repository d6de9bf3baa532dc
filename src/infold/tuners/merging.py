"""Adapters into the weights of a model in memory, and out again.

It stands on the same methods and the same arithmetic as the merge of checkpoints, so both give the
same bytes. A merge that can be undone does not write to the base's parameters: merged ones take
their place in the modules, and unmerging puts them back. A merge for good writes into them, where
it is certain beforehand that no result can overflow.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from infold.adapters import METHODS, Settings
from infold.adapters.exact import slices_for
from infold.dtypes import NAMES
from infold.edit import Step, TensorEdit, edit_tensor, edit_tensors, on_all_cores
from infold.errors import Refusal
from infold.tuners.embeddings import bring, unrounded
from infold.tuners.layers import Adapted, AdaptedOpaque, Adapter, kind_of
from infold.tuners.quantized import exact_values, exclude_from_quantization, is_readable
from infold.tuners.select import modules_of

if TYPE_CHECKING:
    from infold.tuners.model import AdaptedModel

__all__ = ["Merged", "merged", "shared_parameters", "untie"]


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
        """Put the dense layers into the places of quantized ones."""
        for path, linear in self.dense.items():
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, linear)
        if self.dense:
            exclude_from_quantization(model, self.dense)


_Users = list[tuple[str, nn.Module, str]]


def shared_parameters(model: AdaptedModel) -> list[_Users]:
    """The base's parameters that several modules use: (path, module, the name there) of each."""
    bases = {(id(p.module), p.name): p.base for p in model._attached.merged.places}
    users: dict[int, _Users] = {}
    for path, module in modules_of(model).items():
        for name, own in module._parameters.items():
            if own is not None:
                base = bases.get((id(module), name), own)
                users.setdefault(id(base), []).append((path, module, name))
    return [group for group in users.values() if len(group) > 1]


def untie(model: nn.Module, shared: Iterable[_Users]) -> None:
    """Tell the model's config, and the user, of shared parameters that are several now.

    In transformers the config's one flag is for all that a model ties. So it stays while anything
    is tied, or that would be missing in a saved model; ends that differ are loaded as they are.
    """
    shared = list(shared)
    counts = [len({id(module._parameters[name]) for _, module, name in group}) for group in shared]
    apart = [
        f"{path}.{name}"
        for group, count in zip(shared, counts, strict=True)
        if count > 1
        for path, _, name in group
    ]
    if not apart:
        return
    config = getattr(model, "config", None)
    some_tied = any(count < len(group) for group, count in zip(shared, counts, strict=True))
    for holder in () if some_tied else (config, getattr(config, "text_config", None)):
        if holder is not None and getattr(holder, "tie_word_embeddings", False):
            holder.tie_word_embeddings = False
    warnings.warn(
        f"untied: {', '.join(apart)} shared a tensor, which the adapter does not change alike for "
        "all of them; they are several tensors now",
        stacklevel=4,
    )


def merged(
    model: AdaptedModel,
    current: Merged,
    names: tuple[str, ...],
    keep: bool = True,
    dequantize: torch.dtype | None = None,
) -> Merged:
    """The base with `names` merged in this order, in force. Raises Refusal, and changes nothing.

    keep: the base's tensors stay, so quantized layers cannot be merged. Without it an adapter
    leaves a layer when its weight holds it: interrupted, the model is still the same function.
    """
    if names == current.names:
        return current
    swaps = (model._attached.embeddings, model._attached.biases)
    before = [[name for name, swapped in own.items() if swapped.on] for own in swaps]
    current.show(False)
    try:
        for own in swaps:
            bring(own, names)  # what is merged is merged into the adapter's own
        result = _merge(model, names, keep, dequantize)
    except BaseException:
        for own, on in zip(swaps, before, strict=True):
            bring(own, on)
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
    _check_storage(model, layers, keep, dequantize)
    wide = unrounded(model._attached.embeddings, names)
    dense: dict[tuple[int, ...], _Change] = {}
    for path, layer in layers.items():
        chosen = [cast(Adapter, layer.adapters[n]) for n in names if n in layer.adapters]
        if isinstance(layer, AdaptedOpaque):
            assert dequantize is not None
            result.dense[path] = _dense(path, layer, chosen, dequantize)
        else:
            change = _Change(path, layer, chosen, wide)
            # both ends of a tie share trained tokens; what each has for itself unties them
            key = (id(next(change.parameters())[1]), *map(id, chosen))
            if dense.setdefault(key, change) is not change:
                dense[key].tied.append(layer)
    changes = list(dense.values())
    safe = set() if keep else _safe(model, changes)
    edit_tensors((c.edits(), partial(c.place, result)) for c in changes if c.path not in safe)
    # nothing can be refused from here on
    edit_tensors(
        ((c.edits(), partial(c.write, names)) for c in changes if c.path in safe), borrowed=True
    )
    return result


@dataclass(eq=False)
class _Change:
    """What a merge does with one layer. Its tensors change together, or not at all."""

    path: str
    layer: Adapted
    adapters: list[Adapter]
    wide: dict[int, Tensor]  # by ids of parameters: values that were not rounded yet
    tied: list[Adapted] = field(default_factory=list)  # that share the tensors and the adapters

    def parameters(self) -> Iterator[tuple[str, nn.Parameter, list[Adapter]]]:
        """Those that change, each with the adapters that change it."""
        own, name = self.layer.holder._parameters, self.layer.weight_name
        yield name, cast(nn.Parameter, own[name]), self.adapters
        bias = own.get("bias")
        on_bias = [a for a in self.adapters if a.on_bias]
        if bias is not None and on_bias:
            yield "bias", bias, on_bias

    def edits(self) -> list[TensorEdit]:
        return [
            TensorEdit(
                self.wide.get(id(parameter), parameter).to(parameter.device),
                partial(self._steps, name, on),
                f"{self.path.rpartition('.adapters.')[0] or self.path}.{name}",
                parameter.dtype,
            )
            for name, parameter, on in self.parameters()
        ]

    def _steps(self, name: str, adapters: Iterable[Adapter]) -> list[Step]:
        stored = cast(Tensor, self.layer.holder._parameters[name])
        if name == "bias":
            return [_step(a, stored, on_bias=True) for a in adapters]
        return [_step(a, stored, self.layer.transposed or a.is_table) for a in adapters]

    def place(self, result: Merged, values: list[Tensor]) -> None:
        """Remember the merged values beside the base's."""
        for (name, parameter, _), value in zip(self.parameters(), values, strict=True):
            new = nn.Parameter(value, requires_grad=parameter.requires_grad)
            for layer in (self.layer, *self.tied):
                result.places.append(_Place(layer.holder, name, parameter, new))

    def write(self, names: Iterable[str], values: list[Tensor]) -> None:
        """Write the merged values into the base's memory; the adapters leave the layer."""
        for (_, parameter, _), value in zip(self.parameters(), values, strict=True):
            parameter.data.copy_(value)
        for layer in (self.layer, *self.tied):
            layer._runs = tuple(run for run in layer._runs if run not in self.adapters)
            for name in names:
                if name in layer.adapters:
                    del layer.adapters[name]


def _safe(model: nn.Module, changes: Sequence[_Change]) -> set[str]:
    """The paths of the layers that can be written to at once: nothing else uses their memory, and
    no element can leave the range of its dtype."""
    users = _users(model)
    own = [c for c in changes if all(users[id(p)] == 1 + len(c.tied) for _, p, _ in c.parameters())]
    found: set[str] = set()

    def look(change: _Change) -> None:
        if all(_is_safe(parameter, on) for _, parameter, on in change.parameters()):
            found.add(change.path)

    on_cpu: dict[bool, list[_Change]] = {True: [], False: []}
    for change in own:
        on_cpu[next(change.parameters())[1].device.type == "cpu"].append(change)
    on_all_cores(look, on_cpu[True])
    for change in on_cpu[False]:
        look(change)
    return found


def _users(model: nn.Module) -> dict[int, int]:
    """The ids of parameters and buffers, and how many places in the model use their memory."""
    found: dict[int, int] = {}
    spans = []
    for _, tensor in [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]:
        found[id(tensor)] = found.get(id(tensor), 0) + 1
        if tensor.is_contiguous() and type(tensor.data) is Tensor:
            begin = tensor.data_ptr()
            spans.append((begin, begin + tensor.nbytes, id(tensor)))
        else:
            found[id(tensor)] += 1
    end, before = 0, 0
    for begin, stop, key in sorted(set(spans)):
        if begin < end:
            found[key] += 1
            found[before] += 1
        if stop > end:
            end, before = stop, key
    return found


def _is_safe(parameter: Tensor, adapters: Iterable[Adapter]) -> bool:
    """Whether no element can leave the range of the parameter's dtype."""
    if parameter.dtype not in NAMES or parameter.is_meta or not parameter.numel():
        return False
    low, high = torch.aminmax(parameter.detach())
    peak = max(-low.item(), high.item())
    for adapter in adapters:
        peak = METHODS[adapter.method].bound(peak, adapter.parts, adapter.settings)
    # half of it: room for the roundings of the bound itself; NaN compares as not safe
    return not math.isnan(low.item()) and peak <= torch.finfo(parameter.dtype).max / 2


def _check_storage(
    model: nn.Module, layers: dict[str, Adapted], keep: bool, dequantize: torch.dtype | None
) -> None:
    problems = []
    for path, layer in layers.items():
        if not isinstance(layer, AdaptedOpaque):
            if layer.weight_name not in layer.holder._parameters:
                problems.append(
                    f"{path}: its weight is computed from others (weight_norm or the like), so "
                    "nothing can be merged into it; torch.nn.utils.parametrize."
                    "remove_parametrizations makes it one"
                )
            continue
        name = layer._plain.__name__
        if not is_readable(layer):
            problems.append(
                f"{path}: the weight of a {name} cannot be read as numbers; attach the adapter to "
                "a base that is not quantized, and merge it there"
            )
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
    if dequantize is None:
        return
    if dequantize not in NAMES:
        raise Refusal(f"dequantize={dequantize}: give one of {', '.join(map(str, NAMES))}")
    others = {
        parameter.dtype
        for module in model.modules()
        if not isinstance(module, Adapter) and kind_of(module) is not AdaptedOpaque
        for parameter in module.parameters(recurse=False)
        if parameter.dtype in NAMES
    }
    opaque = any(isinstance(layer, AdaptedOpaque) for layer in layers.values())
    if opaque and others and dequantize not in others:
        computes = " and ".join(sorted(str(dtype) for dtype in others))
        raise Refusal(
            f"dequantize={dequantize}: the rest of the model is {computes}, and layers of another "
            "dtype could not be called with its activations"
        )


def _step(
    adapter: Adapter,
    stored: Tensor,
    transposed: bool = False,
    on_bias: bool = False,
    dtype: torch.dtype | None = None,
) -> Step:
    settings: Settings = adapter.settings
    if "lora_A" in adapter.parts:
        rank = adapter.parts["lora_A"].shape[0] // max(settings.experts, 1)
        slices = slices_for(NAMES.get(dtype or stored.dtype, "F32"), rank)
        settings = replace(settings, slices=slices)
    parts = {name: part.detach().to(stored.device) for name, part in adapter.parts.items()}
    return Step(METHODS[adapter.method].prepare(parts, settings), transposed, on_bias)


def _dense(path: str, layer: AdaptedOpaque, adapters: list[Adapter], dtype: torch.dtype) -> Any:
    """A quantized layer as a Linear of `dtype`, merged; nothing is rounded before that."""
    weight = exact_values(layer)
    if weight is None:
        raise Refusal(f"{path}: the weight of a {layer._plain.__name__} cannot be read")
    out, inputs = weight.shape
    old = cast("Tensor | None", getattr(layer, "bias", None))
    linear = nn.Linear(inputs, out, bias=old is not None, device="meta", dtype=dtype)
    steps = [_step(a, weight, dtype=dtype) for a in adapters]
    merged = edit_tensor(weight, steps, f"{path}.weight", dtype=dtype)
    linear.weight = nn.Parameter(merged, requires_grad=False)
    if old is not None:
        steps = [_step(a, old, on_bias=True, dtype=dtype) for a in adapters if a.on_bias]
        merged = edit_tensor(old, steps, f"{path}.bias", dtype=dtype)
        linear.bias = nn.Parameter(merged, requires_grad=False)
    return linear.train(layer.training)
