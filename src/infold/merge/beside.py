"""The base's side files in an undo record. Of those that the merge leaves as they are it keeps the
digests, and of small ones the bytes: a tokenizer or a model card that is changed, or lost, in the
merged folder is no reason to lose the base's."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import zstandard
from blake3 import blake3

from infold.checkpoint.files import digest_of, safe_child
from infold.checkpoint.record import Record
from infold.checkpoint.shards import INDEX, SINGLE, Checkpoint, is_foreign, is_lone, kept_name
from infold.disk import storage_errors
from infold.errors import CorruptFile, Refusal
from infold.plan.unconverted import QUANT_CONFIGS

__all__ = ["LABEL", "Beside", "pack", "read_beside", "side_sizes", "smallest"]

LABEL = "side/"  # of their frames in the manifest's `files`
_MOST = 64 << 20  # bytes that a record keeps of them, before they are compressed
_LEVEL = 9  # Zstandard's: they are text, and small


@dataclass(frozen=True)
class Beside:
    """What to do about the base's side files on the way back.

    rewritten: content by name, of those that the merge changed, and of those in `changed`.
    copied: names of those that lie in the merged folder as the base had them.
    changed: those that were changed or lost after the merge, with what happened.
    """

    rewritten: Mapping[str, bytes]
    copied: tuple[str, ...]
    changed: Mapping[str, str]


def smallest(sizes: Mapping[str, int]) -> list[str]:
    """The side files that a record keeps: the smallest first, as many as may be kept together."""
    kept, total = [], 0
    for name in sorted(sizes, key=lambda name: (sizes[name], name)):
        total += sizes[name]
        if total > _MOST:
            break
        kept.append(name)
    return kept


def side_sizes(base: Checkpoint, names: Iterable[str]) -> dict[str, int]:
    """Bytes of side files of a base, of those that lie there: what does not comes from a record."""
    files = {name: base.path / name for name in names}
    with storage_errors(base.path):
        return {name: file.stat().st_size for name, file in files.items() if file.exists()}


def pack(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=_LEVEL).compress(data)


def read_beside(
    merged: Checkpoint,
    shards: Collection[str],
    record: Record,
    files: Mapping[str, int],
    told: Mapping[str, Any],
    checked: bool,
) -> Beside:
    """shards: names of the base's; files: numbers of the record's frames by label; told: digests of
    the side files that the merge left as they were, by name. checked: whether to look at those in
    the folder.

    Raises Refusal where one was changed or lost of which the record has no bytes, CorruptFile for
    what infold does not write.
    """
    folder, room = merged.path, _MOST
    mine = [
        n for n in ("config.json", INDEX, *QUANT_CONFIGS) if LABEL + n in files and n not in told
    ]
    if odd := _odd(merged, shards, {*told, *mine}):
        raise CorruptFile(f"{record.path}: tells of side files that no base has: {', '.join(odd)}")
    rewritten = {name: _unpack(record, files[LABEL + name], _MOST) for name in mine}
    copied, changed, lost = [], {}, []
    for name, digest in told.items():
        there = kept_name(folder, name)
        kept = safe_child(folder, there)
        lies = os.path.lexists(kept)
        if not checked or (kept.is_file() and digest_of(safe_child(folder, there)) == digest):
            copied.append(name)
            continue
        what = "was changed after it was merged" if lies else "is gone"
        if LABEL + name not in files:
            lost.append(
                f"{kept}: {what}, and the undo record has only the digest of so large a file; put "
                "the base's back"
            )
            continue
        data = _unpack(record, files[LABEL + name], room)
        room -= len(data)
        if blake3(data).hexdigest() != digest:
            raise CorruptFile(f"{record.path}: keeps another {name} than the base had")
        rewritten[name], changed[name] = data, what
    if lost:
        raise Refusal(lost)
    return Beside(rewritten, tuple(copied), changed)


def _odd(merged: Checkpoint, shards: Collection[str], names: Collection[str]) -> list[str]:
    """Of these names those that no side file has. What a record tells is written into the restored
    base, where git would run its hooks, and infold and loaders believe what it is called."""
    if is_lone(merged.path):
        return sorted(names)
    taken = {*shards, *(shard.name for shard in merged.shards)}
    if INDEX not in names:
        taken.add(SINGLE)  # which would be opened instead
    every = {*taken, *names}
    return sorted(
        name
        for name in names
        if name in taken
        or is_foreign(name, merged.shards[0].name)
        or any(str(folder) in every for folder in PurePosixPath(name).parents)
    )


def _unpack(record: Record, number: int, most: int) -> bytes:
    payload = record.file(number)
    try:
        told = zstandard.frame_content_size(payload)
        if not 0 <= told <= most:
            raise CorruptFile(
                f"{record.path}: its file {number} would unpack to {told:,} bytes, and a record "
                f"keeps at most {_MOST:,} of side files"
            )
        return zstandard.ZstdDecompressor().decompress(payload)
    except zstandard.ZstdError as error:
        raise CorruptFile(f"{record.path}: its file {number} does not unpack: {error}") from None
