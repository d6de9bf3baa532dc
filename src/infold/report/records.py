"""The JSON records that a report shows, by their kind, as plain dicts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from infold.errors import CorruptFile, Refusal, StorageFailure

__all__ = ["KINDS", "Records", "collect"]

Records = dict[str, dict[str, Any]]
KINDS = ("receipt", "training", "deployment", "update", "bench", "outputs", "smoke", "checklist")
_NAMED = {  # records that are files of their own, without a kind in them
    "infold-receipt.json": "receipt",
    "infold-training.json": "training",
    "deployment_config.json": "deployment",
}
_LIMIT = 64 << 20


def collect(folder: Path, more: Sequence[Path] = ()) -> Records:
    """The records of a folder, of its `records/`, and of other files, by kind; later ones win.

    Raises Refusal where there is none, CorruptFile for what is no JSON object, with all offenders.
    """
    if not folder.is_dir():
        raise Refusal(f"{folder}: no such folder")
    paths = [folder / name for name in _NAMED if (folder / name).is_file()]
    paths += sorted((folder / "records").glob("*.json"))
    known = {*paths}
    found: Records = {}
    broken = []
    for path in [*paths, *sorted(folder.glob("*.json")), *more]:
        asked = path in known or path in more
        try:
            record = _read(path)
        except ValueError as error:
            broken += [f"{path}: {error}"] if asked else []
            continue
        kind = _NAMED.get(path.name, str(record.get("kind")))
        if kind in KINDS and (asked or path not in known):
            found[kind] = record
        elif path in more:
            broken.append(f"{path}: has no kind that a report shows: {', '.join(KINDS)}")
    if broken:
        raise CorruptFile(broken)
    if not found:
        raise Refusal(f"{folder}: holds no records: neither a receipt nor others of {KINDS}")
    return found


def _read(path: Path) -> dict[str, Any]:
    """The object in a file. Raises ValueError for what is none."""
    try:
        if path.stat().st_size > _LIMIT:
            raise ValueError(f"larger than {_LIMIT:,} bytes")
        record = json.loads(path.read_bytes())
    except OSError as error:
        raise StorageFailure(f"{path}: {error.strerror}") from error
    except (RecursionError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError("must hold a JSON object")
    return record
