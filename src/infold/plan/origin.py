"""Whether adapters were trained, and on this base, and whether that is all of a model, as far as
names tell. A doubt is a note: shapes are what decides, and local copies have any name."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from infold.checkpoint.adapter import Adapter
from infold.checkpoint.files import exists
from infold.checkpoint.shards import Checkpoint
from infold.checkpoint.untrained import untrained
from infold.names import kin, same

__all__ = ["misfit", "origin_notes"]

# How a GGUF file's name ends: -Q4_K_M, .UD-IQ3_XXS, -f16-00001-of-00002
_TYPE = re.compile(
    r"([-._](ud|i1))?([-._](i?q\d\w*|tq\d_\d|mxfp4|b?f16|f32))?(-\d{5}-of-\d{5})?$", re.IGNORECASE
)
_SHARD = re.compile(r".*-\d{5}-of-(\d{5})\.safetensors")


def origin_notes(base: Checkpoint, adapters: Sequence[Adapter]) -> list[str]:
    """Notes on what the base lacks, on adapters of another one, on those that are as new, and on
    adapters that are given more than once."""
    notes = []
    if part := _part(base):
        notes.append(f"{part}; the output is the base's one file, and no whole model")
    elif base.config is None and not base.is_gguf:
        notes.append(_without_config(base))
    names = _names(base)
    for adapter in adapters:
        told = adapter.config.get("base_model_name_or_path")
        if isinstance(told, str) and told and _other(told, base, names):
            notes.append(
                f"{adapter.path} was trained on {told}, and the base is {names[0]}: the shapes "
                "fit, but is it the same model?"
            )
        if doubt := untrained(adapter):
            notes.append(f"{adapter.path}: {doubt}")
    places = [adapter.path.resolve() for adapter in adapters]
    for number, place in enumerate(places):
        if (count := places.count(place)) > 1 and places.index(place) == number:
            path = adapters[number].path
            notes.append(f"{path} is given {count} times, so its change is made {count} times")
    return notes


def misfit(
    base: Checkpoint, adapter: Adapter, modules: Sequence[str], found: bool
) -> Iterator[str]:
    """Of an adapter that does not fit the base, the plain fact in one line, before all the names
    and shapes; nothing where none can be told. found: whether the base has any of its modules."""
    if part := _part(base):
        yield part
    told = adapter.config.get("base_model_name_or_path")
    names = _names(base)
    facts = []
    if not found:
        count = len(modules)
        facts.append(
            f"none of its {count} modules is in {base.path}"
            if count > 1
            else f"its only module is not in {base.path}"
        )
    other = isinstance(told, str) and told and not any(same(told, name) for name in names)
    ours, theirs = _layers(modules), _layers(base.where)
    # an adapter can be for the first layers only
    if 0 < theirs < ours or (0 < ours < theirs and other):
        facts.append(f"it has {ours} layers, the base {theirs}")
    if other:
        facts.append(f"it was trained on {told}, and the base is {names[0]}")
    if facts:
        yield f"{adapter.path}: does not fit {base.path}: {'; '.join(facts)}"


def _part(base: Checkpoint) -> str:
    """Of a base that is one shard of a checkpoint, what to give instead; else empty."""
    found = None if base.is_folder else _SHARD.fullmatch(base.path.name)
    if found is None or int(found[1]) < 2:
        return ""
    return (
        f"{base.path}: is one shard of {int(found[1])}, and the base is all of them: give their "
        f"folder, {base.home}"
    )


def _without_config(base: Checkpoint) -> str:
    """What is not known of a base whose config.json is not there, or beside the file."""
    beside = not base.is_folder and exists(base.home / "config.json")
    where = f"; give {base.home}, which has one" if beside else ""
    return (
        f"{base.path}: there is no config.json, so names and shapes alone tell what its tensors "
        "are. Not known: the type of model, of which some store weights transposed, and whether "
        f"head and embedding are tied, so that a change of one changes both{where}"
    )


def _layers(names: Iterable[str]) -> int:
    """How many layers the names of modules or tensors count; 0 where they count none, or several
    stacks of them (an encoder and a decoder, towers)."""
    found: dict[str, int] = {}
    for name in names:
        if layer := re.match(r"((?:[^.]+\.)*?)(\d{1,9})\.", name):
            found[layer[1]] = max(int(layer[2]) + 1, found.get(layer[1], 0))
    return next(iter(found.values())) if len(found) == 1 else 0


def _names(base: Checkpoint) -> list[str]:
    """What the base is called: as a Hub id, by its folder, by its config."""
    there = Path(base.called) if base.called else base.path
    alone = there.suffix in (".gguf", ".safetensors") if base.called else not base.is_folder
    path = there.parent if alone else there
    names = []
    for place in dict.fromkeys((path, path.resolve())):
        if place.parent.name == "snapshots" and place.parent.parent.name.startswith("models--"):
            names.append(place.parent.parent.name.removeprefix("models--").replace("--", "/"))
        else:
            names.append(place.name)
    if base.is_gguf:  # people call the folder anything, and the file by model and type
        names.insert(0, _TYPE.sub("", there.stem if alone else Path(base.shards[0].name).stem))
    elif alone:
        names.append(there.stem)
    own = (base.config or {}).get("_name_or_path")
    return [*names, own] if isinstance(own, str) and own else names


def _other(told: str, base: Checkpoint, names: Sequence[str]) -> bool:
    """Whether the names speak of two models. Names such as `base` or `checkpoint-9` say nothing."""
    if "\0" not in told and os.path.exists(told) and Path(told).resolve() == base.path.resolve():
        return False
    comparable = [name for name in names if same(told, name) or kin(told, name)]
    return bool(comparable) and not any(same(told, name) for name in comparable)
