"""The JSON records that a report shows, by their kind, as plain dicts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from infold.errors import CorruptFile, Refusal, StorageFailure

__all__ = ["Records", "collect"]

Records = dict[str, dict[str, Any]]
KINDS = ("receipt", "training", "deployment", "update", "bench", "outputs", "smoke", "checklist")
_NAMED = {  # records that are files of their own, without a kind in them
    "infold-receipt.json": "receipt",
    "infold-training.json": "training",
    "deployment_config.json": "deployment",
}
_LIMIT = 64 << 20


def collect(folder: Path, more: Sequence[Path] = ()) -> Records:
    """The records of a folder, of its `records/`, and of other files, by kind; later ones win. Of a
    merged GGUF file, which has no folder of its own, the receipt beside it.

    Raises Refusal where there is none, CorruptFile for what is no JSON object, with all offenders.
    """
    if folder.suffix == ".gguf" and folder.is_file():
        receipt = folder.with_name(f"{folder.name}.infold-receipt.json")
        if not receipt.is_file():
            raise Refusal(
                f"{folder}: has no {receipt.name} beside it, so it is no output of `infold merge`, "
                "or was renamed; a report is made of records"
            )
        return _read_all({receipt: "receipt"}, [], more)
    if not folder.is_dir():
        raise Refusal(f"{folder}: no such folder, and no merged GGUF file")
    named = {folder / name: kind for name, kind in _NAMED.items() if (folder / name).is_file()}
    known = {**named, **dict.fromkeys(sorted((folder / "records").glob("*.json")), "")}
    found = _read_all(known, sorted(folder.glob("*.json")), more)
    if not found:
        raise Refusal(f"{folder}: holds no records: none of {', '.join(KINDS)}")
    return found


def _read_all(known: Mapping[Path, str], others: Sequence[Path], more: Sequence[Path]) -> Records:
    """The records in files, by kind. known: with their kinds, where their names tell them; others:
    what only lies there, and may be no record."""
    found: Records = {}
    broken = []
    for path in [*known, *others, *more]:
        asked = path in known or path in more
        try:
            record = _read(path)
        except ValueError as error:
            broken += [f"{path}: {error}"] if asked else []
            continue
        kind = known.get(path) or _NAMED.get(path.name, str(record.get("kind")))
        if kind in KINDS and (asked or path not in known):
            found[kind] = record
        elif path in more:
            broken.append(f"{path}: has no kind that a report shows: {', '.join(KINDS)}")
    if broken:
        raise CorruptFile(broken)
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
