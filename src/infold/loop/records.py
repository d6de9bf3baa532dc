"""The JSON files of a run, read as if anybody had written them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from infold.checkpoint.files import exists, read_object
from infold.errors import CorruptFile

__all__ = ["check_answers", "fits", "read_record"]

# A shape: a type; a list of shapes, of which one must fit; a mapping of shapes by key, where `...`
# stands for every key. Keys beside those of a shape may be there.
Shape = Any
_NUMBER = [int, float]
_DIGESTS = {...: str}
_SHARE = {"right": int, "of": int, "share": _NUMBER, "low": _NUMBER, "high": _NUMBER}
_TIMED = {
    "seconds": _NUMBER,
    "memory": [None, {"before": int, "peak": int, "after": int}],
}
_SHAPES: dict[str, Shape] = {
    "loop.json": {
        "config": dict,
        "base": {"path": str, "shards": _DIGESTS, "side_files": _DIGESTS},
    },
    "stopped.json": {"stopped": str},
    "collect.json": _TIMED | {"problems": int, "answers": int, "accepted": int, "rows": int},
    "train.json": _TIMED | {"steps": int, "adapter": _DIGESTS},
    "merge.json": _TIMED | {"shards": _DIGESTS},
    "scores.json": _TIMED | {"score": _SHARE | {"levels": {...: _SHARE}}},
}


def read_record(path: Path) -> dict[str, Any]:
    """A record of a run. Raises CorruptFile where it is none that infold writes."""
    found = read_object(path)
    if not fits(found, _SHAPES[path.name]):
        scored = path.with_name("scores.json")
        way = "remove it: the next run makes it anew, from the files beside it"
        if path.name == "loop.json":
            way = "put back the old one, or take another run folder"
        elif path != scored and exists(scored):  # which ends the iteration
            way = way.replace("it:", "it and the scores.json beside it:")
        raise CorruptFile(f"{path}: is none that infold writes; {way}")
    return found


def fits(value: Any, shape: Shape) -> bool:
    """Whether a JSON value has a shape."""
    if isinstance(shape, list):
        return any(fits(value, one) for one in shape)
    if isinstance(shape, Mapping):
        if not isinstance(value, Mapping):
            return False
        if ... in shape:
            return all(fits(inner, shape[...]) for inner in value.values())
        return all(key in value and fits(value[key], inner) for key, inner in shape.items())
    return value is None if shape is None else type(value) is shape


def check_answers(
    path: Path, entries: Sequence[Mapping[str, Any]], sizes: Sequence[int], each: int
) -> None:
    """Refuse a journal of answers that is not one for chunks of so many problems, with so many
    answers for each: answers to a chunk, then the verdicts on them."""
    known: dict[int, set[str]] = {}
    for line, entry in enumerate(entries, 1):
        chunk = entry["chunk"]
        before = known.setdefault(chunk, set())
        name, kind = ("right", bool) if "right" in entry else ("answers", str)
        rows = entry.get(name)
        if not (
            0 <= chunk < len(sizes)
            and name not in before
            and (name == "answers" or "answers" in before)
            and isinstance(rows, list)
            and len(rows) == sizes[chunk]
            and all(isinstance(row, list) and len(row) == each for row in rows)
            and all(type(one) is kind for row in rows for one in row)
            and fits(entry.get("seconds", 0), _NUMBER)
        ):
            raise CorruptFile(
                f"{path}: line {line} does not fit the problems of this run; remove the file: its "
                "answers are made anew"
            )
        before.add(name)
