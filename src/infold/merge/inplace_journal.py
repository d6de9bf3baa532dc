"""The journal of an edit in place, read as if it were hostile.

JSON lines in this order: {"what": verb}; {"result": of the edit, "step_bytes": count, "workers":
count}, from which on the edit will be completed; {"step": number} for each finished one;
{"written": true}.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from infold.checkpoint.safetensors import parse_json
from infold.errors import CorruptFile
from infold.merge.receipt import Receipt
from infold.merge.restore import Undone

__all__ = ["read_journal"]

VERBS = {"merge": Receipt, "undo": Undone, "swap": Receipt}


def read_journal(path: Path, data: bytes) -> tuple[list[dict[str, Any]], int]:
    """Its lines, and how many bytes they take: what follows the last newline was cut off by a kill.

    Raises CorruptFile where a whole line is not one that infold writes. Whether bytes of the shards
    have changed cannot be told then, so nothing may be rolled back, nor completed.
    """
    whole = data.rfind(b"\n") + 1
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(data[:whole].split(b"\n")[:-1], 1):
        line = None
        with suppress(CorruptFile):
            line = parse_json(text, str(path))
        if not isinstance(line, dict) or not _fits(line, lines):
            raise CorruptFile(
                f"{path}: line {number} is none that infold writes; how far the edit has come "
                "cannot be told, so the folder is left as it lies: take its weights from a copy"
            )
        lines.append(line)
    return lines, whole


def _fits(line: Mapping[str, Any], before: Iterable[Mapping[str, Any]]) -> bool:
    """Whether a line may follow those before it."""
    known = {key: value for earlier in before for key, value in earlier.items()}
    if not known:
        return line.keys() == {"what"} and line["what"] in tuple(VERBS)
    if "written" in known:
        return False
    if "result" not in known:
        counts = [line.get(name) for name in ("step_bytes", "workers")]
        return (
            line.keys() == {"result", "step_bytes", "workers"}
            and all(type(count) is int and count > 0 for count in counts)
            and _is_result(line["result"], VERBS[known["what"]])
        )
    return line == {"step": known.get("step", 0) + 1} or line == {"written": True}


def _is_result(value: Any, kind: type[Receipt | Undone]) -> bool:
    """Whether a value has the fields that `kind` needs, and no others."""
    if not isinstance(value, dict) or not value.keys() <= {field.name for field in fields(kind)}:
        return False
    try:
        kind(**value)
    except TypeError:  # some are missing
        return False
    adapters, record = value.get("adapters", []), value.get("undo")
    told = record if isinstance(record, dict) else {}
    return (
        isinstance(adapters, list)
        and all(isinstance(a, dict) and isinstance(a.get("files"), dict) for a in adapters)
        and (
            kind is Undone
            or all(type(told.get(n)) is int for n in ("bytes", "adapters", "side_files"))
        )
    )
