"""The base's side files in an undo record. Of those that the merge leaves as they are it keeps the
digests, and of small ones the bytes: a tokenizer or a model card that is changed, or lost, in the
merged folder is no reason to lose the base's."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zstandard
from blake3 import blake3

from infold.checkpoint.files import digest_of, safe_child
from infold.checkpoint.record import Record
from infold.checkpoint.shards import INDEX, kept_name
from infold.checkpoint.staging import storage_errors
from infold.errors import CorruptFile, Refusal

__all__ = ["LABEL", "Beside", "digest_file", "pack", "read_beside", "smallest"]

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


def pack(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=_LEVEL).compress(data)


def digest_file(folder: Path, name: str) -> str:
    """BLAKE3 of a side file."""
    path = safe_child(folder, name)
    with storage_errors(path):
        return digest_of(path)


def read_beside(
    folder: Path, record: Record, files: Mapping[str, int], told: Mapping[str, Any], checked: bool
) -> Beside:
    """files: numbers of the record's frames by label; told: digests of the side files that the
    merge left as they were, by name. checked: whether to look at those in the folder.

    Raises Refusal where one was changed or lost of which the record has no bytes, CorruptFile for
    what infold does not write.
    """
    rewritten = {
        name: _unpack(record, files[LABEL + name])
        for name in ("config.json", INDEX)
        if LABEL + name in files and name not in told
    }
    copied, changed, lost = [], {}, []
    for name, digest in told.items():
        there = kept_name(folder, name)
        kept = safe_child(folder, there)
        lies = os.path.lexists(kept)
        if not checked or (lies and digest_file(folder, there) == digest):
            copied.append(name)
            continue
        what = "was changed after it was merged" if lies else "is gone"
        if LABEL + name not in files:
            lost.append(
                f"{kept}: {what}, and the undo record has only the digest of so large a file; put "
                "the base's back"
            )
            continue
        data = _unpack(record, files[LABEL + name])
        if blake3(data).hexdigest() != digest:
            raise CorruptFile(f"{record.path}: keeps another {name} than the base had")
        rewritten[name], changed[name] = data, what
    if lost:
        raise Refusal(lost)
    return Beside(rewritten, tuple(copied), changed)


def _unpack(record: Record, number: int) -> bytes:
    payload = record.file(number)
    try:
        told = zstandard.frame_content_size(payload)
        if not 0 <= told <= _MOST:
            raise CorruptFile(f"{record.path}: its file {number} would unpack to {told:,} bytes")
        return zstandard.ZstdDecompressor().decompress(payload)
    except zstandard.ZstdError as error:
        raise CorruptFile(f"{record.path}: its file {number} does not unpack: {error}") from None
