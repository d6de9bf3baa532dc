"""Whole embeddings beside an adapter's own tensors: PEFT's `save_embedding_layers`.

PEFT writes the base's embeddings into the file where they are targets, or where the vocabulary has
another size than the base had. They are not trained. Mostly the model has the same values, and
nothing is kept of them; otherwise they are in force while the adapter is.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from infold.checkpoint.adapter import Adapter as AdapterFile
from infold.tuners.vocabulary import INPUT, OUTPUT, end_of

if TYPE_CHECKING:
    from infold.tuners.config import TunerConfig
    from infold.tuners.model import AdaptedModel, Attached

__all__ = [
    "Swapped",
    "bring",
    "brought",
    "embedding_of",
    "embeddings",
    "unrounded",
    "untrained",
]

_NAMES = ("embed_tokens", "lm_head")  # the targets that PEFT saves without being asked
_WRAPPERS = (".base_layer", ".token_adapter")
_COPIES = (".original_module.", ".modules_to_save.")


@dataclass(eq=False)
class Swapped:
    """Parameters of the base that have other values while an adapter is in force. Adapters that
    bring the same values share one."""

    parameters: dict[str, nn.Parameter]
    others: dict[str, Tensor]  # the values that are not in force now
    on: bool = False
    paths: frozenset[str] = field(default_factory=frozenset)  # of the modules that have them
    wide: dict[str, Tensor] = field(default_factory=dict)  # the file's, where a dtype rounds them

    def switch(self, on: bool) -> None:
        if on == self.on:
            return
        for name, parameter in self.parameters.items():
            # the model may have been moved since, of which these values know nothing
            new = self.others[name].to(parameter.device, parameter.dtype)
            parameter.data, self.others[name] = new, parameter.data
        self.on = on

    def holds(self, parameter: Tensor) -> bool:
        return any(own is parameter for own in self.parameters.values())

    def values(self, own: bool = True) -> dict[str, Tensor]:
        """The adapter's own values, not rounded, or the base's."""
        found = self.others
        if self.on is own:
            found = {name: parameter.data for name, parameter in self.parameters.items()}
        return found | self.wide if own else found

    def has(self, values: Mapping[int, Tensor]) -> bool:
        """Whether these are the adapter's own values, of the parameters with these ids."""
        own = {id(self.parameters[name]): value for name, value in self.values().items()}
        return own.keys() == values.keys() and all(_same(own[i], values[i]) for i in own)


def bring(embeddings: Mapping[str, Swapped], names: Collection[str]) -> None:
    """Put the embeddings of these adapters in force, and no others."""
    wanted = [embeddings[name] for name in names if name in embeddings]
    for swapped in embeddings.values():
        swapped.switch(swapped in wanted)


def unrounded(embeddings: Mapping[str, Swapped], names: Collection[str]) -> dict[int, Tensor]:
    """The ids of parameters into whose dtype these adapters' values were rounded -> the values: a
    merge starts from them, and rounds once."""
    wanted = [embeddings[name] for name in names if name in embeddings]
    return {id(own.parameters[name]): v for own in wanted for name, v in own.wide.items()}


def _same(one: Tensor, two: Tensor) -> bool:
    """Whether all values are equal, in whatever dtypes."""
    dtype = torch.promote_types(one.dtype, two.dtype)
    return torch.equal(one.to(dtype), two.to(one.device, dtype))


# --- saving --------------------------------------------------------------------------------------


def embeddings(
    model: AdaptedModel, modules: Mapping[str, nn.Module], name: str, wanted: bool | str
) -> Iterator[tuple[str, str, Tensor]]:
    """(key without its prefix, parameter, value) of each embedding tensor in an adapter's file.

    wanted: True, False, or "auto": if a target is called embed_tokens or lm_head, or if the
    vocabulary has another size than the base that the config names.
    """
    attached = model._attached
    own = attached.embeddings.get(name)
    ends = [p for get in (INPUT, OUTPUT) if (p := end_of(model, modules, get)) is not None]
    rows = attached.tokens.get(name)
    targets = [p for p in ends if _has(attached, p, name) and (rows is None or p not in rows)]
    targeted = any(path.rpartition(".")[2] in _NAMES for path in targets)
    if wanted == "auto":
        wanted = (targeted and rows is None) or _resized(model, attached.configs[name])
    for path in dict.fromkeys(ends):
        if path in attached.whole and name in attached.whole[path].adapters:
            continue  # the copy that is trained is there
        wrapper = ""
        if _has(attached, path, name):
            wrapper = ".base_layer" if path in targets else ".token_adapter.base_layer"
        for part, parameter in _base_parameters(attached, modules[path]).items():
            mine = own is not None and own.holds(parameter)
            if mine or (wanted and (path in targets or not targeted)):
                value = _value(attached, name, parameter)
                yield f"{path}{wrapper}.{part}", f"{path}.{part}", value


def _has(attached: Attached, path: str, name: str) -> bool:
    return path in attached.layers and name in attached.layers[path].adapters


def _base_parameters(attached: Attached, module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a module as they are without what is merged."""
    found = {name: own for name, own in module._parameters.items() if own is not None}
    merged = {place.name: place.base for place in attached.merged.places if place.module is module}
    return found | merged


def _value(attached: Attached, name: str, parameter: nn.Parameter) -> Tensor:
    """A parameter's value for an adapter: its own, or the base's."""
    for swapped in attached.embeddings.values():
        for path, other in swapped.parameters.items():
            if other is parameter:
                return swapped.values(swapped is attached.embeddings.get(name))[path]
    return parameter.data


def _resized(model: nn.Module, config: TunerConfig) -> bool:
    """Whether the vocabulary has another size than that of the base on the disk."""
    own = getattr(model, "config", None)
    base = config.base_model_name_or_path or getattr(own, "_name_or_path", None)
    size = getattr(own, "vocab_size", None)
    if own is None or not base or not size:
        return False
    try:
        before = type(own).from_pretrained(base, local_files_only=True)
    except (OSError, ValueError):
        warnings.warn(
            f"there is no config of {base} here, so nothing tells whether the vocabulary was "
            "resized; if it was, save with save_embedding_layers=True",
            UserWarning,
            stacklevel=2,
        )
        return False
    return bool(before.vocab_size != size)


# --- loading -------------------------------------------------------------------------------------


def embedding_of(key: str, ends: Mapping[str, nn.Module]) -> str | None:
    """The parameter of an embedding or a head that a key of a file means, without its prefix."""
    for wrapper in _WRAPPERS:
        key = key.replace(wrapper, "")
    path, _, part = key.rpartition(".")
    module = ends.get(path)
    return key if module is not None and module._parameters.get(part) is not None else None


def untrained(key: str, file: AdapterFile) -> bool:
    """Whether a key repeats what another one holds, or holds values from before the training: of a
    resized vocabulary PEFT writes all that its wrappers have."""
    mark = next((mark for mark in _COPIES if mark in key), None)
    trained = key.replace(mark or ".", ".")
    if mark is None or trained not in file.tensors:
        return False
    return mark == _COPIES[0] or torch.equal(file.read(key), file.read(trained))


def brought(
    model: AdaptedModel, file: AdapterFile, keys: Mapping[str, str]
) -> tuple[Swapped | None, list[str]]:
    """The embeddings of a file that are not the model's, and why others have no place in it.

    keys: key -> the parameter that it means.
    """
    attached, problems = model._attached, []
    bases = {id(place.merged): place.base for place in attached.merged.places}
    named = model.named_parameters(remove_duplicate=False)
    parameters = {path: bases.get(id(own), own) for path, own in named}
    found: dict[int, tuple[str, str, Tensor]] = {}
    for key, path in keys.items():
        parameter = parameters[path]
        if parameter.is_meta:  # as accelerate leaves what it offloads
            problems.append(
                f"{file.path}: {key}: the model's own has no values to compare it with; load the "
                "model without offloading"
            )
            continue
        shape = file.tensors[key].shape
        if shape != tuple(parameter.shape):
            told = f"{file.path}: {key}: shape {list(shape)}, the model has "
            told += f"{list(parameter.shape)}"
            if shape[1:] == tuple(parameter.shape)[1:] and path.endswith(".weight"):
                told += f"; call model.resize_token_embeddings({shape[0]}) before"
            problems.append(told)
            continue
        value = file.read(key)
        before = found.setdefault(id(parameter), (path, key, value))
        if before[1] != key and not _same(before[2], value):
            problems.append(
                f"{file.path}: {key}: differs from {before[1]}, but the model ties the two"
            )
    new = {
        number: told
        for number, told in found.items()
        if not _same(_value(attached, "", parameters[told[0]]), told[2])
    }
    if problems or not new:
        return None, problems
    values = {number: value for number, (_, _, value) in new.items()}
    for swapped in attached.embeddings.values():
        if swapped.has(values):
            return swapped, []
    problems = [
        f"{file.path}: {key}: is not what the model has, and {why}"
        for path, key, _ in new.values()
        if (why := _taken(attached, parameters[path]))
    ]
    if problems:
        return None, problems
    return _swapped(parameters, {path: value for path, _, value in new.values()}), []


def _taken(attached: Attached, parameter: nn.Parameter) -> str | None:
    """Why a parameter cannot have other values while an adapter is in force."""
    for name, swapped in attached.embeddings.items():
        if swapped.holds(parameter):
            return (
                f"{name} has values of its own there already; delete_adapter({name!r}) before, or "
                "take another copy of the model"
            )
    merged = ", ".join(attached.merged.names)
    return f"{merged} is merged; unmerge it first" if merged else None


def _swapped(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> Swapped:
    """A record of the values that a file brings, in the dtypes of the parameters."""
    chosen = {path: parameters[path] for path in values}
    others = {path: v.to(chosen[path].device, chosen[path].dtype) for path, v in values.items()}
    wide = {path: value for path, value in values.items() if not _same(others[path], value)}
    record = Swapped(chosen, others, wide=wide)
    alike = (path for path, own in parameters.items() if record.holds(own))
    record.paths = frozenset(path.rpartition(".")[0] for path in alike)
    return record
