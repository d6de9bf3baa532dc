"""Records of other verbs: JSON objects with a `kind`, in `records/` of the merged folder."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from infold.checkpoint.files import exists, locate, read_object, safe_child
from infold.checkpoint.shards import RECEIPT
from infold.deploy.facts import receipt_digest
from infold.disk import write_whole
from infold.errors import StorageFailure
from infold.version import __version__

__all__ = ["keep_record", "read_records", "save_record", "without_infinity"]

RECORDS = "records"


def save_record(folder: Path, record: Mapping[str, Any]) -> Path:
    """Write a record as records/KIND.json, whole or not at all; the last one of a kind stays."""
    path = safe_child(folder, f"{RECORDS}/{record['kind']}.json")
    text = json.dumps(without_infinity(record), indent=1, ensure_ascii=False) + "\n"
    write_whole(path, text.encode(errors="backslashreplace"))
    return path


def without_infinity(value: Any) -> Any:
    """The same with null for infinity and NaN, which JSON does not have: a wrong merge can be
    infinitely far from the right one."""
    if isinstance(value, Mapping):
        return {name: without_infinity(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_infinity(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def keep_record(
    merged: str | os.PathLike[str], record: Mapping[str, Any], told: Callable[[str], object]
) -> None:
    """Save a record of what is at `merged` with its receipt's digest, for checklist and report.

    Without a receipt (another tool's merge, a GGUF file) nothing is saved. Where the folder cannot
    be written, `told` hears why: what was found is worth more than its record.
    """
    folder = locate(merged)
    if not exists(folder / RECEIPT):
        return
    try:
        facts = {"infold": __version__, "receipt": receipt_digest(folder)}
        save_record(folder, {**record, **facts})
    except StorageFailure as error:
        told(f"the {record['kind']} record was not kept: {error}")


def read_records(folder: Path) -> dict[str, dict[str, Any]]:
    """The records of a folder by their kind. Raises CorruptFile for files that are no JSON."""
    place = folder / RECORDS
    if not exists(place):
        return {}
    found = {}
    for path in sorted(place.glob("*.json")):
        record = read_object(safe_child(folder, f"{RECORDS}/{path.name}"))
        found[str(record.get("kind", path.stem))] = record
    return found
