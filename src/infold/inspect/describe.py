"""Adapters, checkpoints and merged folders as JSON-ready values."""

from __future__ import annotations

import math
import os
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infold.checkpoint.adapter import CONFIG, PICKLE, WEIGHTS, Adapter, open_adapter
from infold.checkpoint.files import locate
from infold.checkpoint.record import FILE, ORIGINAL, SEEN, UNDO, open_record
from infold.checkpoint.shards import (
    GGUF,
    INDEX,
    RECEIPT,
    SECOND_COPIES,
    SINGLE,
    Checkpoint,
    companion,
    is_lone,
    open_checkpoint,
    refuse_unfinished,
    renamed,
    without_owner,
)
from infold.checkpoint.untrained import untrained
from infold.disk import storage_errors
from infold.errors import CorruptFile, Refusal
from infold.formats import NoFold, floats_of
from infold.ggml import BLOCKS
from infold.inspect.receipt import checked_receipt
from infold.plan.build import plan_merge
from infold.plan.config import read_config
from infold.plan.edits import Replacement
from infold.plan.gguf import GgufModules
from infold.plan.match import Names, group_keys
from infold.plan.quantized import StoredModules, words_of

__all__ = ["describe_path"]

_SETTINGS = (
    "base_model_name_or_path", "task_type", "r", "lora_alpha", "use_rslora", "use_dora",
    "lora_bias", "bias", "rank_pattern", "alpha_pattern", "target_modules", "feedforward_modules",
    "modules_to_save", "trainable_token_indices", "token_indices", "init_lora_weights",
    "peft_version",
)  # fmt: skip


def describe_path(
    path: str | os.PathLike[str], base: str | os.PathLike[str] | None = None
) -> dict[str, Any]:
    """What lies at `path`, by its `kind`: adapter, checkpoint or merged.

    Raises Refusal when it is none of them, or when `base` is given and the adapter does not fit.
    """
    place = locate(path, never=SECOND_COPIES)
    if place.is_dir() and (place / CONFIG).exists():
        return _adapter(open_adapter(place), None if base is None else open_checkpoint(base))
    if base is not None:
        raise Refusal(f"{path}: --base is for adapters, and this is none")
    refuse_unfinished(place)
    _check_kind(place, path)
    if (place.is_dir() or is_lone(place)) and companion(place, RECEIPT).exists():
        receipt = checked_receipt(place)
        undo = _checked(place, receipt) if os.path.lexists(companion(place, UNDO)) else None
        return {"kind": "merged", "path": str(place), "receipt": receipt, "undo": undo}
    return _checkpoint(open_checkpoint(path))  # which tells what is not fetched of a Hub repository


def _check_kind(place: Path, path: str | os.PathLike[str]) -> None:
    """Refuse a part of an adapter, and a folder with nothing of an adapter or a model."""
    if not place.is_dir():
        if place.name.startswith("adapter_model."):
            raise Refusal(f"{path}: holds an adapter's weights; give its folder, {place.parent}")
        return
    with storage_errors(place):
        names = {file.name for file in place.iterdir()}
    if not names & {INDEX, SINGLE} and (own := names & {WEIGHTS, PICKLE}):
        raise Refusal(f"{path}: holds {min(own)} and no {CONFIG}, without which it is no adapter")
    of_models = (".safetensors", INDEX, ".bin", GGUF, RECEIPT)
    # of a Hub repository not all of it was fetched
    if place == Path(path) and not any(name.endswith(of_models) for name in names):
        raise Refusal(
            f"{path}: neither an adapter nor a model: {CONFIG} is not there, nor {SINGLE}, {INDEX} "
            "or a GGUF file"
        )


def _checked(folder: Path, receipt: dict[str, Any]) -> dict[str, Any]:
    """The undo record, or {damaged: why} of one that gives no base back: all else is there."""
    try:
        return _record(folder, receipt)
    except CorruptFile as error:
        return {"damaged": str(error)}


def _record(folder: Path, receipt: dict[str, Any]) -> dict[str, Any]:
    """The undo record, all of which is read and checked. Sizes are bytes; `share`: of the edited
    ones, without what the record keeps of adapters and side files."""
    path = companion(folder, UNDO)
    with open_record(path.parent, path.name) as record:
        blocks = [f for (tensor, _), f in record.frames.items() if tensor < SEEN]
        files = record.manifest.get("files")
        if not isinstance(files, dict):
            raise CorruptFile(f"{record.path}: its manifest is none that infold writes")

        def inside(kind: str) -> int:
            numbers = [n for label, n in files.items() if label.startswith(kind)]
            found = [record.frames.get((FILE, n)) for n in numbers if type(n) is int]
            return sum(frame.length for frame in found if frame is not None)

        adapters, sides = inside("adapter/"), inside("side/")
        if record.manifest.get("shards") != receipt["shards"]:
            raise CorruptFile(f"{record.path}: belongs to another output, not to that of {RECEIPT}")
        return {
            "bytes": record.nbytes,
            "blocks": len(blocks),
            "originals": sum(frame.kind == ORIGINAL for frame in blocks),
            "adapters": adapters,
            "side_files": sides,
            "share": (record.nbytes - adapters - sides) / max(1, receipt["edited_bytes"]),
        }


def _adapter(adapter: Adapter, base: Checkpoint | None) -> dict[str, Any]:
    config, problems = read_config(adapter)
    grouped = group_keys(adapter.tensors)
    targets: dict[str, list[str]] = defaultdict(list)
    notes = list(problems)
    found: dict[str, Any] = {}
    if base is not None:
        plan = plan_merge(base, [adapter])
        for edit in plan.edits.values():
            keys = {key for op in edit.operations for key in op.parts.values()}
            if isinstance(edit.source, Replacement):
                keys.add(edit.source.key)
            for key in keys:
                targets[key].append(edit.tensor)
        notes += plan.notes  # which have the doubt below, too
        found["base"] = str(base.path)
    elif doubt := untrained(adapter):
        notes.append(doubt)
    parameters = sum(math.prod(t.shape) for t in adapter.tensors.values())
    if base is not None:
        found["share_of_parameters"] = parameters / max(1, _parameters(base))
    listed = [
        {
            "module": module,
            "parts": [_part(adapter, part, key) for part, key in parts.items()],
            **({"edits": targets[next(iter(parts.values()))]} if base is not None else {}),
        }
        for module, parts in grouped.modules.items()
    ]
    listed += [
        {
            "module": parameter,
            "parts": [_part(adapter, "value", key)],
            **({"edits": targets[key]} if base is not None else {}),
        }
        for parameter, key in grouped.plain.items()
    ]
    return {
        "kind": "adapter",
        "path": str(adapter.path),
        "method": config.method,
        "settings": {k: adapter.config[k] for k in _SETTINGS if adapter.config.get(k)},
        "tensors": len(adapter.tensors),
        "parameters": parameters,
        "bytes": adapter.weights.stat().st_size,
        **found,
        "modules": sorted(listed, key=lambda entry: _natural(entry["module"])),
        "notes": notes,
    }


def _natural(name: str) -> list[tuple[int, str]]:
    """A sort key that puts layer 2 before layer 10."""
    return [
        (int(word), "") if word.isdecimal() else (-1, word) for word in re.split(r"(\d+)", name)
    ]


def _part(adapter: Adapter, part: str, key: str) -> dict[str, Any]:
    info = adapter.tensors[key]
    return {
        "part": part,
        "key": key,
        "shape": list(info.shape),
        "dtype": info.dtype,
        "statistics": _statistics(part, adapter.pieces(key)),
    }


def _statistics(part: str, pieces: Iterable[Tensor]) -> dict[str, float]:
    """Few numbers that tell whether a part was trained, and how far it went: of its finite values;
    `not_finite` tells how many others there are.

    pieces: its elements, of which a saved embedding has more than should be in memory at once.
    """
    identity = 1.0 if part == "ia3_l" else 0.0  # what matters of a vector is the distance from 1
    lost = count = 0
    total = distances = squares = farthest = 0.0
    least, most = math.inf, -math.inf
    for piece in pieces:
        values = piece.to(torch.float64)
        finite = values[values.isfinite()]
        lost += values.numel() - finite.numel()
        if finite.numel():
            count += finite.numel()
            least, most = min(least, float(finite.min())), max(most, float(finite.max()))
            total, squares = total + float(finite.sum()), squares + float(finite.square().sum())
            distance = (finite - identity).abs()
            distances += float(distance.sum())
            farthest = max(farthest, float(distance.max()))
    told: dict[str, float] = {"not_finite": lost} if lost else {}
    if not count:
        return told
    if part == "ia3_l":
        return {
            "min": least,
            "max": most,
            "mean": total / count,
            "mean|l-1|": distances / count,
            "max|l-1|": farthest,
            **told,
        }
    return {"rms": math.sqrt(squares / count), "max": farthest, **told}


def _parameters(base: Checkpoint) -> int:
    return sum(math.prod(t.shape) for s in base.shards for t in s.header.tensors.values())


def _quantization(base: Checkpoint) -> list[dict[str, Any]]:
    """The formats of quantized modules in words, with the number of modules; and whether IA³
    vectors fold into the scales of all of them: if not, why, of the first that has none."""
    found: dict[str, dict[str, Any]] = {}
    if base.is_gguf:
        return _blocks(base)
    for stored, form in StoredModules(base, Names(base.where)).all():
        why = None
        try:
            form.scales(stored)
        except (NoFold, CorruptFile) as error:
            why = str(error)
        words = words_of(form, stored)
        entry = found.setdefault(words, {"format": words, "modules": 0, "no_fold": None})
        entry["modules"] += 1
        entry["no_fold"] = entry["no_fold"] or why
    return list(found.values())


def _blocks(base: Checkpoint) -> list[dict[str, Any]]:
    """As `_quantization`, of the tensors of a GGUF file by their types."""
    why = None
    try:
        GgufModules(base)
    except CorruptFile:
        raise
    except Refusal:
        kind = base.shards[0].header.metadata.get("general.architecture")
        why = f"infold does not know the names and orders of llama.cpp's {kind!r}"
    found: dict[str, dict[str, Any]] = {}
    for info in (info for shard in base.shards for info in shard.header.tensors.values()):
        if info.dtype in BLOCKS:
            no_fold = why
            if floats_of(info.dtype, info.shape) is None:
                no_fold = "the scales of this type are no floats"
            words = f"GGUF {info.dtype}"
            entry = found.setdefault(words, {"format": words, "modules": 0, "no_fold": no_fold})
            entry["modules"] += 1
    return list(found.values())


def _checkpoint(base: Checkpoint) -> dict[str, Any]:
    dtypes: dict[str, dict[str, int]] = {}
    for shard in base.shards:
        for info in shard.header.tensors.values():
            entry = dtypes.setdefault(info.dtype, {"tensors": 0, "parameters": 0, "bytes": 0})
            entry["tensors"] += 1
            entry["parameters"] += math.prod(info.shape)
            entry["bytes"] += info.nbytes
    return {
        "kind": "checkpoint",
        "path": str(base.path),
        "model_type": (base.config or {}).get("model_type")
        or base.shards[0].header.metadata.get("general.architecture"),
        "tensors": len(base.where),
        "parameters": _parameters(base),
        "bytes": base.nbytes,
        "dtypes": dtypes,
        "quantization": _quantization(base),
        "shards": [
            {"name": s.name, "tensors": len(s.header.tensors), "bytes": s.header.file_size}
            for s in base.shards
        ],
        "side_files": list(base.side_files),
        "left_out": list(base.left_out),
        "notes": _lost_receipt(base.path),
    }


def _lost_receipt(path: Path) -> list[str]:
    """A note where a GGUF file may be a merged one that was renamed."""
    if not is_lone(path) or not without_owner(path, RECEIPT):
        return []
    return [f"{companion(path, RECEIPT).name} is not there{renamed(path, RECEIPT)}"]
