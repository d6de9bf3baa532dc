"""An adapter of a model in memory <-> a folder in PEFT's layout."""

from __future__ import annotations

import difflib
import math
import os
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import safetensors.torch
import torch
from torch import Tensor, nn

from infold.adapters import METHODS
from infold.checkpoint.adapter import Adapter as AdapterFile
from infold.checkpoint.adapter import open_adapter
from infold.errors import Refusal
from infold.patience import patience
from infold.tuners.config import IA3Config, LoraConfig, TunerConfig, matches, read_config
from infold.tuners.embeddings import brought, embedding_of, embeddings, untrained
from infold.tuners.layers import Adapted, AdaptedEmbedding, Adapter, kind_of
from infold.tuners.parameters import (
    Parameter,
    depth,
    find_parameters,
    misfit,
    named,
    places_of,
)
from infold.tuners.select import Selection, modules_of, targeted, uncalled
from infold.tuners.vocabulary import (
    FIELD,
    INPUT,
    OUTPUT,
    TokenRows,
    end_of,
    find_rows,
    followers,
    misfits,
    uncalled_tables,
    untied,
)

if TYPE_CHECKING:
    from infold.tuners.model import AdaptedModel

__all__ = ["load", "refuse_others", "save"]

PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"
_TOKENS = "trainable_tokens_delta"
_INSIDE = ".base_layer.out_proj"  # PEFT's path of what MultiheadAttention holds


# --- saving --------------------------------------------------------------------------------------


def save(
    model: AdaptedModel,
    folder: str | os.PathLike[str],
    names: Sequence[str],
    state: Mapping[str, Tensor] | None = None,
    with_embeddings: bool | str = "auto",
) -> None:
    """Write adapters: "default" into the folder, each other one into a folder of its name."""
    for name in names:
        place = Path(folder) / ("" if name == "default" else name)
        place.mkdir(parents=True, exist_ok=True)
        draft = place / f".{WEIGHTS}.{os.getpid()}"
        tensors = tensors_of(model, name, state, with_embeddings)
        safetensors.torch.save_file(tensors, draft, metadata={"format": "pt"})
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        draft.replace(place / WEIGHTS)
        _as_saved(model, model._attached.configs[name]).save_pretrained(place)


def tensors_of(
    model: AdaptedModel,
    name: str,
    state: Mapping[str, Tensor] | None = None,
    with_embeddings: bool | str = "auto",
) -> dict[str, Tensor]:
    """What an adapter's file holds: key -> tensor on the CPU."""
    attached = model._attached
    found: dict[str, Tensor] = {}

    def put(key: str, parameter: str, own: Tensor) -> None:
        value = own if state is None or parameter not in state else state[parameter]
        found[PREFIX + key] = value.detach().to("cpu").contiguous().clone()

    for path, layer in attached.layers.items():
        if name not in layer.adapters or path in attached.tied[name]:
            continue
        adapter = cast(Adapter, layer.adapters[name])
        table = isinstance(layer, AdaptedEmbedding)
        for part, value in adapter.parts.items():
            put(
                key_path(attached.layers, path, name) + _ending(adapter.method, part, table),
                f"{path}.adapters.{name}.{part}",
                value,
            )
    for path, module in attached.whole.items():
        if name in module.adapters:
            for part, value in module.adapters[name].state_dict().items():
                put(f"{path}.{part}", f"{path}.adapters.{name}.{part}", value)
    for key, path, value in embeddings(model, modules_of(model), name, with_embeddings):
        put(key, path, value)
    biases = attached.biases.get(name)
    for path, value in biases.values().items() if biases else ():
        module_path = path.rpartition(".")[0]
        wrapped = ".base_layer" if module_path in attached.layers else ""
        put(f"{module_path}{wrapped}.bias" if path.endswith(".bias") else path, path, value)
    return found


def _ending(method: str, part: str, table: bool) -> str:
    """How the key of a part ends; for an embedding some parts have names of their own."""
    facts = METHODS[method]
    if method == "trainable_tokens":  # beside LoRA; alone, as a type of PEFT's own, it is shorter
        return max(facts.KEYS, key=len)
    names = {own: name for name, own in facts.TABLE.items()} if table else {}
    wanted = names.get(part, part)
    return min((key for key, name in facts.KEYS.items() if name == wanted), key=len)


def key_path(layers: Mapping[str, nn.Module], path: str, name: str) -> str:
    """A layer's path as PEFT writes it for an adapter."""
    layer = layers[path]
    if isinstance(layer, Parameter):
        return path.rpartition(".adapters.")[0] + ".base_layer" * depth(layer, name)
    parent, _, last = path.rpartition(".")
    inner = last == "out_proj" and isinstance(layers.get(parent), nn.MultiheadAttention)
    return parent + _INSIDE if inner else path


def _as_saved(model: nn.Module, config: TunerConfig) -> TunerConfig:
    """The config for the file: the base's name, and patterns that PEFT reads as we do."""
    base = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    config = replace(
        config,
        base_model_name_or_path=config.base_model_name_or_path or base,
        inference_mode=True,
    )
    if isinstance(config, IA3Config) and isinstance(config.feedforward_modules, list):
        targets = [p for p in modules_of(model) if matches(config.target_modules, p)]
        inner = tuple(config.feedforward_modules)
        if any(p.endswith(inner) != matches(config.feedforward_modules, p) for p in targets):
            # PEFT takes `v` for an ending of `kv` too; of a pattern it asks a full match
            pattern = "|".join(inner).replace(".", r"\.")
            config = replace(config, target_modules=_pattern(config.target_modules))
            config.feedforward_modules = rf"(.*\.)?({pattern})"
    return config


def _pattern(names: Any) -> Any:
    if isinstance(names, list):
        return r"(.*\.)?({})".format("|".join(names).replace(".", r"\."))
    return names


# --- loading -------------------------------------------------------------------------------------


def load(
    model: AdaptedModel, path: str | os.PathLike[str], name: str, trainable: bool = False
) -> None:
    """Add the adapter of a folder or Hub id. Raises Refusal for any tensor without a place; a part
    of the adapter may be there then, for delete_adapter."""
    file = open_adapter(path)
    with patience(str(file.path)):
        _load(model, file, name, trainable)


def _load(model: AdaptedModel, file: AdapterFile, name: str, trainable: bool) -> None:
    from infold.tuners.model import insert

    config = read_config(file.config, f"{file.path}/adapter_config.json")
    config = replace(config, inference_mode=not trainable)
    modules = modules_of(model)
    wrapped = find_parameters(modules, config)
    parts, plain = _group(file, places_of(wrapped))
    rows, strangers = find_rows(model, modules, config)
    problems = [f"{file.path}: {FIELD}: the model has no module {name}" for name in strangers]
    layers: dict[str, nn.Module] = {}
    inner: set[str] = set()
    problems += _missing(rows, parts, file)
    for place, (module, name_there) in wrapped.items():
        if place not in parts:
            problems.append(f"{file.path}: holds no update of {named(place)}")
            continue
        keys = parts[place]
        shapes = {part: file.tensors[key].shape for part, key in keys.items()}
        assert isinstance(config, LoraConfig)
        if told := misfit(place, module, name_there, shapes, config.rank(named(place))):
            problems.append(f"{file.path}: {next(iter(keys.values()))}: {told}")
    for place, keys in parts.items():
        if place in wrapped:
            continue
        problem = _misfit(place, keys, modules, file, config, rows)
        if problem:
            problems.append(f"{file.path}: {next(iter(keys.values()))}: {problem}")
            continue
        layers[place] = modules[place]
        if "ia3_l" in keys and _side(place, file.tensors[keys["ia3_l"]].shape, config) == "in":
            inner.add(place)
    idle = [
        f"{file.path}: {place}: {told}"
        for place in layers
        if (told := uncalled(modules.get(place.rpartition(".")[0], model), place))
    ]
    problems += idle if trainable else []
    whole = {p: m for p, m in modules.items() if matches(config.modules_to_save, p)}
    ends = {p: modules[p] for get in (INPUT, OUTPUT) if (p := end_of(model, modules, get))}
    biased = isinstance(config, LoraConfig) and config.bias != "none"
    parameters = dict(model.named_parameters())
    copies: dict[str, str] = {}
    biases: dict[str, str] = {}
    saved: dict[str, str] = {}
    for key in plain:
        target = key.removeprefix(PREFIX).replace(".base_layer", "")
        if untrained(key, file):
            continue
        owner = next((p for p in whole if target.startswith(f"{p}.")), None)
        if owner is not None:
            copies[key] = target
        elif biased and target.endswith("bias") and target in parameters:
            biases[key] = target
        elif embedding := embedding_of(key.removeprefix(PREFIX), ends):
            saved[key] = embedding
        else:
            problems.append(
                f"{file.path}: {key}: has no place in the model{_near(target, modules)}"
            )
    problems += [
        f"{file.path}: holds no tensors of {path}, which modules_to_save names, so the model would "
        "have the base's there; save the adapter again"
        for path, module in whole.items()
        if any(True for _ in module.parameters())
        and not any(target.startswith(f"{path}.") for target in copies.values())
    ]
    if not parts and not problems:
        problems.append(f"{file.path}: holds no adapter tensors")
    swapped, wrong = brought(model, file, saved)
    problems += wrong
    if problems:
        raise Refusal(problems)
    tables = {path: layers.pop(path) for path in rows.tokens}
    wrong = misfits(rows, modules, layers, whole)
    wrong += untied(model, modules, config, rows, (*layers, *whole))
    tied = followers(modules, layers)
    wrong += uncalled_tables(modules, layers, whole, tied)
    if wrong:
        raise Refusal(f"{file.path}: {problem}" for problem in wrong)
    selection = Selection(
        config,
        {p: m for p, m in layers.items() if not _is_inner(p, modules)},
        frozenset(inner),
        whole,
        rows,
        tables,
        wrapped,
        tied | rows.tied,
    )
    loaded = {
        place: {part: file.read(key) for part, key in keys.items()} for place, keys in parts.items()
    }
    insert(model, name, selection, loaded)
    if swapped is not None:
        model._attached.embeddings[name] = swapped
    _fill(model, name, file, copies, biases)
    if idle:
        more = f", and {len(idle) - 1:,} more like it" if len(idle) > 1 else ""
        warnings.warn(f"{idle[0]} until it is merged{more}", UserWarning, stacklevel=4)
    if left := _left(modules, config, whole, parts):
        more = f" and {len(left) - 1:,} more" if len(left) > 1 else ""
        warnings.warn(
            f"{file.path}: holds no tensors for {left[0]}{more}, which target_modules means: what "
            "the base does there stays",
            UserWarning,
            stacklevel=4,
        )


def _left(
    modules: Mapping[str, nn.Module],
    config: TunerConfig,
    whole: Mapping[str, nn.Module],
    parts: Collection[str],
) -> list[str]:
    """Paths of the modules that are targets by the config, and have no tensors in the file."""
    if config.target_modules in (None, "all-linear"):
        return []
    meant = targeted(modules, config, whole)
    return [p for p, m in meant.items() if kind_of(m) is not None and p not in parts]


def _fill(
    model: AdaptedModel,
    name: str,
    file: AdapterFile,
    copies: dict[str, str],
    biases: dict[str, str],
) -> None:
    """Put the plain tensors of the file into copies of modules and into trained biases."""
    attached = model._attached
    with torch.no_grad():
        for key, target in copies.items():
            owner = next(p for p in attached.whole if target.startswith(f"{p}."))
            state = attached.whole[owner].adapters[name].state_dict()
            own = state.get(target.removeprefix(f"{owner}."))
            value = file.read(key)
            if own is None or own.shape != value.shape:
                shape = "none" if own is None else list(own.shape)
                raise Refusal(
                    f"{file.path}: {key}: shape {list(value.shape)}, the model has {shape}"
                )
            own.copy_(value)
        for key, target in biases.items():
            record = attached.biases[name]
            record.values()[target].copy_(file.read(key))


# What transformers' and accelerate's callers pass to every model; an adapter is one small file.
_HARMLESS = ("max_shard_size", "token", "save_peft_format")
_DONE = ("autocast_adapter_dtype",)  # adapters are float32 where the base has 16 bits


def refuse_others(method: str, given: Mapping[str, Any]) -> None:
    """Refuse options that would be ignored. None asks for nothing; nor does False, but of what is
    done here anyway, of which True does not."""
    unknown = [
        name
        for name, value in given.items()
        if value not in (None, name in _DONE) and name not in _HARMLESS
    ]
    if unknown:
        hint = "; give the folder in it as the path" if "subfolder" in unknown else ""
        raise Refusal(f"{method}: {', '.join(unknown)}: not known here{hint}")


def _group(
    file: AdapterFile, wrappers: Mapping[str, str]
) -> tuple[dict[str, dict[str, str]], list[str]]:
    """The keys of a file: {module path: {part: key}}, and those of plain tensors. wrappers: those
    of parameters, by the paths in the file."""
    parts: dict[str, dict[str, str]] = {}
    plain: list[str] = []
    endings = {
        key: method.TABLE.get(name, name)
        for method in METHODS.values()
        for key, name in method.KEYS.items()
    }
    for key in file.tensors:
        # of `.token_adapter.trainable_tokens_delta` and `.trainable_tokens_delta` the longer one
        ending = max((e for e in endings if key.endswith(e)), key=len, default=None)
        if ending is None or not key.startswith(PREFIX):
            plain.append(key)
            continue
        place = key.removeprefix(PREFIX).removesuffix(ending)
        place = wrappers.get(place, place.replace(".base_layer", ""))
        parts.setdefault(place, {})[endings[ending]] = key
    return parts, plain


def _is_inner(path: str, modules: Mapping[str, nn.Module]) -> bool:
    return isinstance(modules.get(path.rpartition(".")[0]), nn.MultiheadAttention)


def _misfit(
    place: str,
    keys: Mapping[str, str],
    modules: Mapping[str, nn.Module],
    file: AdapterFile,
    config: TunerConfig,
    rows: TokenRows,
) -> str | None:
    """Why the tensors for one module do not suit the model."""
    module = modules.get(place)
    kind = None if module is None else kind_of(module)
    if module is None:
        return f"the model has no module {place}{_near(place, modules)}"
    if kind is None:
        return f"{place} is a {type(module).__name__}, which takes no adapter"
    if _TOKENS in keys and "trainable_tokens" not in kind.METHODS:
        return f"{place} is a {type(module).__name__}, not an embedding"
    if _TOKENS in keys:
        return _misfit_rows(place, keys, cast(Tensor, module.weight).shape, file, rows)
    method = getattr(config, "method", config.METHOD)
    if method not in kind.METHODS:
        return f"{method} does not exist for a {type(module).__name__}"
    wanted = set(METHODS[method].REQUIRED)
    if isinstance(config, LoraConfig) and config.lora_bias:
        wanted = wanted | {"lora_bias"}
    if set(keys) != wanted:
        return f"{place} has {', '.join(sorted(keys))}; {method} needs {', '.join(sorted(wanted))}"
    geometry = kind.geometry(cast(Adapted, module))
    shapes = {part: file.tensors[key].shape for part, key in keys.items()}
    if "ia3_l" in shapes:
        side = _side(place, shapes["ia3_l"], config)
        length = geometry.outputs if side == "out" else geometry.inputs
        if math.prod(shapes["ia3_l"]) != length:
            return f"shape {list(shapes['ia3_l'])} for {length} {side}puts of {place}"
        return None
    assert isinstance(config, LoraConfig)
    named = place.rpartition(".")[0] if _is_inner(place, modules) else place
    rank = config.rank(named)
    ones = tuple(1 for _ in geometry.kernel)
    expected = {
        "lora_A": (rank, geometry.inputs, *geometry.kernel),
        "lora_B": (geometry.outputs, rank, *ones),
    }
    for part, shape in expected.items():
        if shapes[part] != shape:
            return f"{part} has shape {list(shapes[part])}; {place} needs {list(shape)}"
    for part in ("lora_magnitude_vector", "lora_bias"):
        if part in shapes and math.prod(shapes[part]) != geometry.outputs:
            return f"{part} has not {geometry.outputs} elements"
    return None


def _misfit_rows(
    place: str,
    keys: Mapping[str, str],
    table: tuple[int, ...],
    file: AdapterFile,
    rows: TokenRows,
) -> str | None:
    """Why trained rows do not suit a module's table (tokens, width)."""
    if set(keys) != {_TOKENS}:
        others = ", ".join(sorted(set(keys) - {_TOKENS}))
        return f"{place} has trained tokens and {others}; infold's tuners take one of them"
    tokens = rows.tokens.get(place)
    if tokens is None:
        return f"the config does not tell which tokens of {place} were trained"
    shape, wanted = file.tensors[keys[_TOKENS]].shape, (len(tokens), *table[1:])
    if shape != wanted:
        return f"shape {list(shape)}; {len(tokens)} tokens of {place} need {list(wanted)}"
    return None


def _missing(rows: TokenRows, parts: dict[str, dict[str, str]], file: AdapterFile) -> list[str]:
    """What the file lacks of the rows that its config tells of. A copy of a tied end leaves
    `parts`: some versions of PEFT write it."""
    problems = [
        f"{file.path}: holds no trained tokens of {path}, which the config tells of"
        for path in rows.tokens
        if _TOKENS not in parts.get(path, ())
    ]
    for path, owner in rows.tied.items():
        if _TOKENS not in parts.get(path, ()) or problems:
            continue
        copy, own = (parts[p][_TOKENS] for p in (path, owner))
        if torch.equal(file.read(copy), file.read(own)):
            del parts[path][_TOKENS]
            if not parts[path]:  # what else there is of the end has a place, or is refused
                del parts[path]
        else:
            problems.append(f"{file.path}: {copy}: differs from {own}, but the model ties the two")
    return problems


def _side(place: str, shape: tuple[int, ...], config: TunerConfig) -> str:
    """(out, 1) scales outputs, (1, in) inputs; where that says nothing, PEFT's own test does."""
    if len(shape) == 2 and shape != (1, 1):
        return "out" if shape[1] == 1 else "in"
    wanted = getattr(config, "feedforward_modules", None) or []
    if isinstance(wanted, str):
        return "in" if matches(wanted, place) else "out"
    return "in" if place.endswith(tuple(wanted)) else "out"


def _near(path: str, modules: Mapping[str, nn.Module]) -> str:
    close = difflib.get_close_matches(path, list(modules)[:4000], n=2, cutoff=0.5)
    return f"; near it: {', '.join(close)}" if close else ""
