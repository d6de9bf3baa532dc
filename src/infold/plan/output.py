"""The files of the output: headers, index and config.json, decided before anything is written."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from infold.checkpoint.gguf import with_types
from infold.checkpoint.safetensors import DTYPE_BITS, Header, build_header
from infold.checkpoint.shards import GGUF, Checkpoint, is_lone
from infold.errors import Refusal
from infold.formats import format_of
from infold.plan.edits import Edit, OutputShard, Plan
from infold.plan.layouts import is_end, text_keys

__all__ = [
    "config_changes",
    "index_bytes",
    "json_file",
    "output_shards",
    "placed",
    "uneven_vocabulary",
    "usual_dtype",
    "with_changes",
]


def usual_dtype(base: Checkpoint) -> str:
    """The dtype of most of the base's elements, among those that can be written."""
    count: Counter[str] = Counter()
    for shard in base.shards:
        for info in shard.header.tensors.values():
            if format_of(info.dtype):
                count[info.dtype] += info.nbytes
    return count.most_common(1)[0][0] if count else "F32"


def output_shards(
    base: Checkpoint,
    edits: Mapping[str, Edit],
    removed: Collection[str] = (),
    place: Mapping[str, str] = MappingProxyType({}),
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> tuple[OutputShard, ...]:
    """The output's files: the base's own headers, but where a tensor is added, resized or removed.

    place: tensors that come in the place of another one's. metadata: entries that change in files
    that have them. Where dtypes change, wider ones come first, so that each is aligned.
    """
    added = [name for name in edits if name not in base.where and name not in place]
    instead = {old: new for new, old in place.items()}
    home = len(base.shards) - 1
    result = []
    for number, shard in enumerate(base.shards):
        header: Header = shard.header
        if base.is_gguf:
            types = {
                name: edits[name].dtype
                for name, info in header.tensors.items()
                if name in edits and edits[name].dtype != info.dtype
            }
            header = with_types(header, types) if types else header
            result.append(OutputShard(shard.name, header, number, not types))
            continue
        resized = any(
            n in edits and (edits[n].dtype, edits[n].shape) != (t.dtype, t.shape)
            for n, t in header.tensors.items()
        )
        mine = added if number == home else []
        moved = not header.tensors.keys().isdisjoint(removed) or any(
            name in edits and edits[name].dtype != info.dtype
            for name, info in header.tensors.items()
        )
        if resized or mine or moved:
            entries = []
            for name, info in header.tensors.items():
                new = instead.get(name, name)
                if name in removed and name not in instead:
                    continue
                if new in edits:
                    entries.append((new, edits[new].dtype, edits[new].shape))
                else:
                    entries.append((name, info.dtype, info.shape))
            entries += [(n, edits[n].dtype, edits[n].shape) for n in mine]
            if moved or removed:
                entries.sort(key=lambda entry: -DTYPE_BITS[entry[1]])
            changed = {k: metadata.get(k, v) for k, v in header.metadata.items()}
            header = build_header(entries, changed)
        result.append(OutputShard(shard.name, header, number, header is shard.header))
    return tuple(result)


def placed(plan: Plan, out: Path) -> Plan:
    """The plan of an output at `out`: where that is a single GGUF file, its shard has that name.

    Raises Refusal where there can be no such file.
    """
    base = plan.base
    if not is_lone(out):
        if not base.is_gguf or base.is_folder or len(plan.shards) > 1 or out.is_dir():
            return plan
        told = f"{out} is a folder, with {plan.shards[0].name} in it; for a file write {out}{GGUF}"
        return replace(plan, notes=(*plan.notes, told))
    if not base.is_gguf:
        raise Refusal(
            f"{out}: the base is no GGUF file, and merging does not convert it; give a folder, as "
            f"{out.with_suffix('')}"
        )
    if len(plan.shards) > 1:
        raise Refusal(
            f"{out}: the base has {len(plan.shards)} parts; give a folder for them, as "
            f"{out.with_suffix('')}"
        )
    notes = plan.notes
    if plan.copied:
        notes += (f"not copied, since the output is a single file: {', '.join(plan.copied)}",)
    return replace(plan, shards=(replace(plan.shards[0], name=out.name),), copied=(), notes=notes)


def index_bytes(base: Checkpoint, shards: tuple[OutputShard, ...]) -> bytes:
    """The index with the new tensors, and the sizes that it told before brought up to date."""
    assert base.index is not None
    tensors = [(n, t, s.name) for s in shards for n, t in s.header.tensors.items()]
    told = base.index.get("metadata")
    metadata = dict(told) if isinstance(told, dict) else {}
    metadata["total_size"] = sum(t.nbytes for _, t, _ in tensors)
    if "total_parameters" in metadata:
        metadata["total_parameters"] = sum(math.prod(t.shape) for _, t, _ in tensors)
    where = {n: s for n, _, s in sorted(tensors, key=lambda item: item[0])}
    index = {**base.index, "metadata": metadata, "weight_map": where}
    return json_file(index)


def uneven_vocabulary(base: Checkpoint, edits: dict[str, Edit]) -> list[str]:
    """Reasons to refuse a new number of tokens that not all of embedding and head would have."""
    old, new = {}, {}
    for name in base.where:
        if is_end(base, name) and base.info(name).shape:
            old[name] = base.info(name).shape[0]
            new[name] = edits[name].shape[0] if name in edits else old[name]
    resized = {old[name]: new[name] for name in old if new[name] != old[name]}
    return [
        f"{name}: has {new[name]} tokens, but the adapter brings {resized[old[name]]} for the "
        "model's other end, and no resized values for this one; train it with modules_to_save"
        for name in old
        if old[name] in resized and new[name] != resized[old[name]]
    ]


def config_changes(
    base: Checkpoint, edits: dict[str, Edit], untied: bool, labels: int | None
) -> dict[str, object]:
    """The fields of config.json that the merge must change, so that the result loads as meant."""
    changes: dict[str, object] = {}
    if untied:
        changes["tie_word_embeddings"] = False
    for name, edit in edits.items():
        if name not in base.where or not is_end(base, name):
            continue
        if edit.shape[:1] != base.info(name).shape[:1]:
            changes["vocab_size"] = edit.shape[0]
    named = (base.config or {}).get("id2label")
    if labels is not None and not (isinstance(named, dict) and len(named) == labels):
        changes["id2label"] = {str(n): f"LABEL_{n}" for n in range(labels)}
        changes["label2id"] = {f"LABEL_{n}": n for n in range(labels)}
    return changes


def with_changes(config: dict[str, object], changes: dict[str, object]) -> bytes:
    """config.json with fields changed where they stand: at the top, in text_config, or in both."""
    config = dict(config)
    for key, value in changes.items():
        inside = False
        for name in text_keys(config):
            text = config[name]
            if isinstance(text, dict) and key in text:
                config[name], inside = {**text, key: value}, True
        if key in config or not inside:
            config[key] = value
    return json_file(config)


def json_file(value: dict[str, object]) -> bytes:
    """A JSON file. Half of a surrogate pair, which JSON can escape and UTF-8 not hold, stays an
    escape."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    return text.encode(errors="backslashreplace")
