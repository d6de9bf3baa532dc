"""Which modules of a model an adapter's config means."""

from __future__ import annotations

import difflib
import os
import re
import sys
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from infold.errors import Refusal
from infold.tuners.classes import replaced_forward
from infold.tuners.config import (
    HEADS,
    READ_INITS,
    IA3Config,
    LoraConfig,
    Names,
    TunerConfig,
    is_ending,
    matches,
    within,
)
from infold.tuners.layers import KINDS, Adapted, AdaptedConv1D, AdaptedOpaque, is_dense, kind_of
from infold.tuners.parameters import Holder, find_parameters, named, unfit
from infold.tuners.quantized import is_readable
from infold.tuners.targets import find_targets, fused_experts
from infold.tuners.vocabulary import (
    FIELD,
    TokenRows,
    find_rows,
    followers,
    misfits,
    uncalled_tables,
    untied,
)
from infold.tuners.whole import Whole

__all__ = ["Selection", "modules_of", "select", "targeted", "uncalled"]

# Mixers like Mamba's that call all of their projections but dt_proj: no kernel has the others.
_CALLING = ("JambaMambaMixer", "ZambaMambaMixer")


@dataclass(frozen=True)
class Selection:
    """The modules of one adapter. `config` has all names that were found filled in."""

    config: TunerConfig
    layers: dict[str, nn.Module]
    feedforward: frozenset[str]  # IA³: paths of layers whose inputs are scaled
    whole: dict[str, nn.Module]  # modules_to_save
    rows: TokenRows = field(default_factory=TokenRows)
    tables: dict[str, nn.Module] = field(default_factory=dict)  # the modules of `rows.tokens`
    parameters: dict[str, tuple[nn.Module, str]] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)  # path -> that whose adapter it has too


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> module of the model itself: what adapters brought is left out."""
    own: dict[str, nn.Module] = {}
    inside: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, Adapted | Holder | Whole):
            inside.append(f"{path}.adapters" if path else "adapters")
        if not any(path == i or path.startswith(f"{i}.") for i in inside[-2:]) and path:
            own[path] = module
    return own


def select(model: nn.Module, config: TunerConfig) -> Selection:
    """Resolve a config on a model. Raises Refusal with all that does not fit."""
    modules = modules_of(model)
    config = _with_targets(model, modules, config)
    problems: list[str] = []
    if isinstance(config, LoraConfig) and config.init_lora_weights in READ_INITS:
        problems.append(
            f"init_lora_weights = {config.init_lora_weights!r} is not known here; adapters that "
            "began so can be loaded"
        )
    problems += _unmatched("target_modules", config.target_modules, modules)
    problems += _unmatched("exclude_modules", config.exclude_modules, modules)
    whole = {p: m for p, m in modules.items() if matches(config.modules_to_save, p)}
    problems += _unmatched("modules_to_save", config.modules_to_save, modules)
    layers = targeted(modules, config, whole)
    replaced = ((path, replaced_forward(module)) for path, module in whole.items())
    problems += [f"modules_to_save: {path}: {why}" for path, why in replaced if why]
    for path, module in layers.items():
        problems += _unfit(model, path, module, config)
    parameters = find_parameters(modules, config)
    problems += _unmatched_parameters(config, modules, parameters)
    for path, (module, name) in parameters.items():
        owner = path.rpartition(".adapters.")[0]
        if owner in layers or within(owner, whole):
            field_name = "target_modules" if owner in layers else "modules_to_save"
            problems.append(f"{named(path)}: its module is one of {field_name}, too")
        elif problem := unfit(path, module, name):
            problems.append(problem)
    problems += _idle(config, modules, (*layers, *map(named, parameters)))
    if not layers and not parameters and not problems:
        problems.append("no module is left: every target is excluded, or in no wanted layer")
    rows, strangers = find_rows(model, modules, config)
    problems += _unmatched(FIELD, strangers, modules) + misfits(rows, modules, layers, whole)
    problems += untied(model, modules, config, rows, (*layers, *whole))
    tied = followers(modules, layers)
    problems += uncalled_tables(modules, layers, whole, tied)
    feedforward: frozenset[str] = frozenset()
    if isinstance(config, IA3Config):
        feedforward = frozenset(p for p in layers if matches(config.feedforward_modules, p))
        problems += _unmatched("feedforward_modules", config.feedforward_modules, layers)
        if isinstance(config.feedforward_modules, str):  # of a list, the config has seen to it
            problems += [
                f"feedforward_modules means {path}, which is no target"
                for path, module in modules.items()
                if matches(config.feedforward_modules, path)
                and path not in layers
                and kind_of(module) is not None
            ]
    if problems:
        raise Refusal(f"{type(config).__name__}: {problem}" for problem in problems)
    if sentence := _tied_layers(layers):
        warnings.warn(sentence, UserWarning, stacklevel=3)
    tables = {path: modules[path] for path in rows.tokens}
    config = _by_layout(config, layers)
    tied |= rows.tied
    return Selection(config, layers, feedforward, whole, rows, tables, parameters, tied)


def targeted(
    modules: Mapping[str, nn.Module], config: TunerConfig, whole: Mapping[str, nn.Module]
) -> dict[str, nn.Module]:
    """The modules that target_modules means. What lies in one that is trained whole is trained with
    it, as in PEFT."""
    return {
        path: module
        for path, module in modules.items()
        if matches(config.target_modules, path)
        and not matches(config.exclude_modules, path)
        and _in_wanted_layer(config, path)
        and not within(path, whole)
    }


def _with_targets(
    model: nn.Module, modules: dict[str, nn.Module], config: TunerConfig
) -> TunerConfig:
    """The config with targets, feed-forward modules and trained heads filled in."""
    if config.task_type in ("SEQ_CLS", "TOKEN_CLS"):
        heads = [h for h in HEADS if any(matches([h], path) for path in modules)]
        saved = list(config.modules_to_save or [])
        config = replace(config, modules_to_save=[*saved, *(h for h in heads if h not in saved)])
    if config.target_modules is None and getattr(config, "target_parameters", None):
        return replace(config, target_modules=[])
    if config.target_modules is None:
        found = find_targets(model, config.METHOD)
        config = replace(config, target_modules=list(found.modules))
        if isinstance(config, IA3Config):
            config = replace(config, feedforward_modules=list(found.feedforward))
        told = ", ".join(n + " (its inputs)" * (n in found.feedforward) for n in found.modules)
        if os.environ.get("RANK", "0") == "0":
            print(f"infold: {config.METHOD} on {told}", file=sys.stderr)
        return config
    if config.target_modules == "all-linear":
        output = _output_heads(model, modules)
        saved = [path for path in modules if matches(config.modules_to_save, path)]
        paths = [
            path
            for path, module in modules.items()
            if kind_of(module) is not None
            and not isinstance(module, nn.Embedding | nn.MultiheadAttention)
            and not _is_conv(module)
            and path.rpartition(".")[2] not in _read_by(_parent(model, path))
            and not isinstance(_parent(model, path), nn.MultiheadAttention)
            and path not in output
            and not within(path, saved)
        ]
        config = replace(config, target_modules=_shortest(paths, modules))
        if sentence := fused_experts(modules):
            way = "; target_parameters names them" if isinstance(config, LoraConfig) else ""
            warnings.warn(f"all-linear: {sentence}{way}", UserWarning, stacklevel=2)
    if isinstance(config, IA3Config) and config.feedforward_modules is None:
        try:
            found = find_targets(model, config.METHOD)
        except Refusal:
            raise Refusal(
                f"IA3Config: the structure of a {type(model).__name__} does not tell which targets "
                "are feed-forward layers, whose inputs are scaled; give feedforward_modules ([] "
                "for none)"
            ) from None
        inner = [
            path
            for path in modules
            if matches(list(found.feedforward), path) and matches(config.target_modules, path)
        ]
        config = replace(config, feedforward_modules=_shortest(inner, modules))
    return config


def _by_layout(config: TunerConfig, layers: dict[str, nn.Module]) -> TunerConfig:
    """fan_in_fan_out as the layers store their weights; here nothing depends on it, but in PEFT."""
    kinds = {kind_of(module) is AdaptedConv1D for module in layers.values()}
    stored = kinds == {True}
    if len(kinds) > 1 or config.fan_in_fan_out == stored:
        return config
    what = "Conv1D" if stored else "no Conv1D"
    warnings.warn(
        f"fan_in_fan_out is set to {stored}, since the targets are {what}",
        UserWarning,
        stacklevel=3,
    )
    return replace(config, fan_in_fan_out=stored)


def _parent(model: nn.Module, path: str) -> nn.Module:
    return model.get_submodule(path.rpartition(".")[0])


def _read_by(parent: nn.Module) -> tuple[str, ...]:
    """The children of a module whose weights it reads without calling them, at least on a GPU.

    State-space mixers are known by their structure: A_log beside a convolution; D, where it is not
    linear attention. Mamba's kernels take the weights of all that comes after the convolution.
    """
    names = [cls.__name__ for cls in type(parent).__mro__]
    if "WavLMAttention" in names:
        return ("q_proj", "k_proj", "v_proj", "out_proj")
    own, children = parent._parameters, parent._modules
    if "A_log" not in own:
        return ()
    read = tuple(name for name in children if name.endswith("conv1d"))
    if "D" not in own or "conv1d" not in children:
        return read
    inner = ("dt_proj",) if set(_CALLING) & set(names) else ("x_proj", "dt_proj", "out_proj")
    return (*read, *inner)


def uncalled(parent: nn.Module, path: str) -> str | None:
    """Why an adapter would do nothing on the module at a path, whose weight its parent reads."""
    if path.rpartition(".")[2] not in _read_by(parent):
        return None
    return (
        f"{type(parent).__name__} reads this weight without calling the module, so that an adapter "
        "on it would do nothing"
    )


def _stored(module: nn.Embedding) -> str:
    """How a weight lies there that is no plain tensor of floats."""
    own = module.weight.data
    held = "" if type(own) is Tensor else f"{type(own).__name__}, "
    return held + str(own.dtype).removeprefix("torch.")


def _is_conv(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)


def _output_heads(model: nn.Module, modules: dict[str, nn.Module]) -> set[str]:
    """The paths of the output embedding and of classifiers."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return {
        path
        for path, module in modules.items()
        if (head is not None and module is head)
        or path.rpartition(".")[2] in ("lm_head", "embed_out", *HEADS)
    }


def _tied_layers(layers: Mapping[str, nn.Module]) -> str | None:
    """A sentence about layers that share a weight, as Zamba's blocks do; None where none are."""
    users: dict[int, list[str]] = {}
    for path, module in layers.items():
        own = module._parameters.get("weight")
        if own is not None and not isinstance(module, nn.Embedding):
            users.setdefault(id(own), []).append(path)
    tied = [paths for paths in users.values() if len(paths) > 1]
    if not tied:
        return None
    more = f", and {len(tied) - 1:,} more weights have several layers" if len(tied) > 1 else ""
    return (
        f"{' and '.join(tied[0])} share a weight{more}: each gets an adapter of its own, for which "
        "a checkpoint has no tensor, so that `infold merge` will refuse them; merge in memory"
    )


def _shortest(paths: Iterable[str], modules: dict[str, nn.Module]) -> list[str]:
    """For each path the shortest ending that means no module outside of `paths`: that of a layer
    in a list is a number, as blocks and whole lists have one."""
    wanted = set(paths)
    others: dict[str, list[str]] = {}
    for path in modules:
        if path not in wanted:
            others.setdefault(path.rpartition(".")[2], []).append(path)
    endings: dict[str, None] = {}
    for path in wanted:
        components = path.split(".")
        for count in range(1, len(components) + 1):
            ending = ".".join(components[-count:])
            if not any(matches([ending], other) for other in others.get(components[-1], ())):
                break
        endings[ending] = None
    return sorted(endings)


def _in_wanted_layer(config: TunerConfig, path: str) -> bool:
    wanted = _wanted_layers(config)
    return wanted is None or _layer_number(config, path) in wanted


def _wanted_layers(config: TunerConfig) -> list[int] | None:
    """PEFT's layers_to_transform; None: all."""
    if not isinstance(config, LoraConfig) or config.layers_to_transform is None:
        return None
    wanted = config.layers_to_transform
    return [wanted] if isinstance(wanted, int) else list(wanted)


def _layer_number(config: TunerConfig, path: str) -> int | None:
    """The number in a path that follows layers_pattern; without one, the first number."""
    assert isinstance(config, LoraConfig)
    patterns = config.layers_pattern or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    if patterns:
        found = (re.match(rf".*\.{pattern}\.(\d+)\.", path) for pattern in patterns)
        number = next((m for m in found if m), None)
    else:
        number = re.match(r".*\.[^.]*\.(\d+)\.", path)
    return None if number is None else int(number[1])


def _idle(config: TunerConfig, modules: Iterable[str], targets: Collection[str]) -> Iterator[str]:
    """Patterns that mean no target, and numbers of layers that have none."""
    if not isinstance(config, LoraConfig):
        return
    for field_name in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, field_name):
            if not targets or any(is_ending(pattern, path) for path in targets):
                continue
            near = _near(pattern, {path.rpartition(".")[2] for path in targets})
            yield f"{field_name}: {pattern!r} means no target of the adapter; {near}"
    there = {
        _layer_number(config, path)
        for path in modules
        if matches(config.target_modules, path) and not matches(config.exclude_modules, path)
    }
    numbers = {number for number in there if number is not None}
    strangers = sorted(set(_wanted_layers(config) or ()) - numbers)
    if numbers and strangers:
        yield (
            f"layers_to_transform: no target is in layer {', '.join(map(str, strangers))}; they "
            f"are in {', '.join(map(str, sorted(numbers)))}"
        )


def _near(name: str, there: Collection[str]) -> str:
    near = difflib.get_close_matches(name.rpartition(".")[2], sorted(there), n=4, cutoff=0.5)
    return f"near it: {', '.join(near)}" if near else f"there are: {', '.join(sorted(there)[:20])}"


def _unmatched(field: str, names: Names, modules: Iterable[str]) -> list[str]:
    """The names that mean no module, with those that look like them."""
    paths = list(modules)
    if not names or names == "all-linear":
        return []
    wanted = [names] if isinstance(names, str) else names
    problems = []
    for name in wanted:
        if any(matches(name if isinstance(names, str) else [name], path) for path in paths):
            continue
        holder = _holder(name, modules)
        if holder:
            problems.append(
                f"{field}: {name!r} is a parameter of {holder}, not a module; LoRA takes it in "
                "target_parameters"
            )
            continue
        kind = "the pattern" if isinstance(names, str) else "the name"
        leaves = sorted({path.rpartition(".")[2] for path in paths} - {str(n) for n in range(999)})
        hint = _near(name, leaves)
        problems.append(f"{field}: {kind} {name!r} means no module of the model; {hint}")
    return problems


def _unmatched_parameters(
    config: TunerConfig, modules: dict[str, nn.Module], found: Iterable[str]
) -> list[str]:
    """The names that mean no parameter, with those that look like them."""
    there = {named(path) for path in found}
    problems = []
    for name in getattr(config, "target_parameters", None) or ():
        if any(matches([name], path) for path in there):
            continue
        known = {
            own
            for module in modules.values()
            for own, p in module.named_parameters(recurse=False)
            if p.dim() > 1
        }
        hint = _near(name, known)
        problems.append(f"target_parameters: {name!r} means no parameter of the model; {hint}")
    return problems


def _holder(name: str, modules: Iterable[str]) -> str | None:
    """The first module that has a parameter of this name, of three dimensions or more."""
    if not isinstance(modules, dict):  # only paths
        return None
    path: str
    for path, module in modules.items():
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 2 and matches([name], f"{path}.{own}"):
                return path
    return None


def _unfit(model: nn.Module, path: str, module: nn.Module, config: TunerConfig) -> list[str]:
    kind = kind_of(module)
    name = type(module).__name__
    if kind is None and isinstance(module, nn.Embedding) and not is_dense(module):
        return [
            f"{path}: the weight of this {name} is not dense ({_stored(module)}), and an adapter "
            "on a table needs rows of plain floats"
        ]
    if kind is None and isinstance(module, nn.Embedding):
        return [
            f"{path}: the forward of a {name} is not Embedding's, so nobody knows what an adapter "
            "on its table would do"
        ]
    if kind is None:
        known = ", ".join(k.__name__.removeprefix("Adapted") for k, _ in KINDS)
        return [
            f"{path} is a {name}, which takes no adapter (kinds that do: {known}). Choose names "
            "that end at its inner layers, or give exclude_modules"
        ]
    if problem := replaced_forward(module):
        return [f"{path}: {problem}"]
    method = getattr(config, "method", config.METHOD)
    if method not in kind.METHODS:
        return [f"{path}: {method} does not exist for a {name}; it takes {', '.join(kind.METHODS)}"]
    if method == "dora" and kind is AdaptedOpaque and not is_readable(module):
        return [f"{path}: DoRA needs the weight, and that of a {name} cannot be read as numbers"]
    groups = getattr(module, "n_groups", 1)  # DeepSeek-V4's grouped linear layer
    if isinstance(groups, int) and groups > 1:
        return [f"{path}: a {name} is {groups} layers side by side, not one matrix"]
    parent = _parent(model, path)
    if isinstance(parent, nn.MultiheadAttention):
        return [
            f"{path}: MultiheadAttention reads this weight without calling the module; give the "
            "name of the whole, whose in_proj and out_proj then both get an adapter"
        ]
    if isinstance(module, nn.MultiheadAttention):
        if not module._qkv_same_embed_dim:
            return [f"{path}: query, key and value of different sizes"]
        if isinstance(config, LoraConfig) and (config.lora_dropout or config.lora_bias):
            return [f"{path}: no lora_dropout and no lora_bias in MultiheadAttention"]
    if problem := uncalled(parent, path):
        return [f"{path}: {problem}"]
    if isinstance(config, LoraConfig):
        if _is_conv(module) and getattr(module, "groups", 1) > 1:
            return [
                f"{path}: LoRA on a convolution of {module.groups} groups would cross the groups, "
                "which no weight of it can hold"
            ]
        if config.lora_bias and getattr(module, "bias", None) is None:
            return [f"{path}: lora_bias needs a layer with a bias, to merge into"]
    return []
