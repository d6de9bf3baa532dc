"""Whether adapters were trained on this base, as far as names tell. A doubt is a note: shapes are
what decides, and local copies have any name."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from infold.checkpoint.adapter import Adapter
from infold.checkpoint.shards import Checkpoint

__all__ = ["is_called", "origin_notes"]

# Words that a copy's name gains or loses without its being another model.
_HARMLESS = frozenset(
    "hf safetensors bf16 fp16 fp32 f16 f32 bfloat16 float16 float32 copy local main merged sharded "
    "snapshot model gguf quantized bnb nf4 fp4 fp8 int8 int4 4bit 8bit gptq awq hqq eetq w4a16 "
    "w8a16 w8a8".split()
)
# How a GGUF file's name ends: -Q4_K_M, .UD-IQ3_XXS, -f16-00001-of-00002
_TYPE = re.compile(
    r"([-._](ud|i1))?([-._](i?q\d\w*|tq\d_\d|mxfp4|b?f16|f32))?(-\d{5}-of-\d{5})?$", re.IGNORECASE
)
_SIZE = re.compile(r"\d+(\.\d+)?[bm]", re.IGNORECASE)  # 7B, 135M: the name of a model


def origin_notes(base: Checkpoint, adapters: Sequence[Adapter]) -> list[str]:
    """Notes on adapters of another base, and on adapters that are given more than once."""
    notes = []
    names = _names(base)
    for adapter in adapters:
        told = adapter.config.get("base_model_name_or_path")
        if isinstance(told, str) and told and _other(told, base, names):
            notes.append(
                f"{adapter.path} was trained on {told}, and the base is {names[0]}: the shapes "
                "fit, but is it the same model?"
            )
    places = [adapter.path.resolve() for adapter in adapters]
    for number, place in enumerate(places):
        if (count := places.count(place)) > 1 and places.index(place) == number:
            path = adapters[number].path
            notes.append(f"{path} is given {count} times, so its change is made {count} times")
    return notes


def is_called(told: object, base: Checkpoint) -> bool:
    """Whether the base has the name of what an adapter was trained on."""
    return isinstance(told, str) and any(_same(told, name) for name in _names(base))


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
    comparable = [name for name in names if _same(told, name) or _kin(told, name)]
    return bool(comparable) and not any(_same(told, name) for name in comparable)


def _words(name: str) -> set[str]:
    return set(re.split(r"[-_.\s/]+", name.rstrip("/").casefold())) - {""}


def _model(name: str) -> str:
    """The last component of a path or a Hub id, without the revision."""
    return name.rstrip("/").rpartition("/")[2].partition("@")[0]


def _same(one: str, two: str) -> bool:
    """Whether two names differ by nothing but harmless words, or by the organisation's: some
    copies are called `org_model` or `org--model`."""
    organisation = _words(one.rpartition("/")[0]) | _words(two.rpartition("/")[0])
    return (_words(_model(one)) ^ _words(_model(two))) <= _HARMLESS | organisation


def _kin(one: str, two: str) -> bool:
    """Whether both are names of models: they begin alike, or both tell a size."""
    first, second = _model(one), _model(two)
    if _SIZE.search(first) and _SIZE.search(second):
        return True
    begins = [re.split(r"[-_.\s]+", name.casefold())[0] for name in (first, second)]
    return begins[0] == begins[1] and begins[0] not in ("", "base", "checkpoint", *_HARMLESS)
