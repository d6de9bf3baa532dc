"""Training data: the rows of JSON, CSV or Parquet files become examples, or one refusal says why.

The shape of a data set is decided by the fields of its first row, in this order:

    messages              chat: a list of {role, content}; loss on the assistant's turns
    prompt, completion    loss on the completion
    text, label           classification
    text                  loss on everything

Every row is checked before anything is trained: all offenders are told with file, line and field.
Lines are counted from 1 as an editor counts them; Parquet has rows, also from 1.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from blake3 import blake3

from infold.checkpoint.files import HUB_ID, exists
from infold.checkpoint.safetensors import open_regular, parse_json
from infold.errors import CorruptFile, Refusal, StorageFailure
from infold.extras import needs
from infold.sizes import plural

__all__ = ["DataSet", "Example", "Offences", "read_data"]

SHAPES = {
    "chat": ("messages",),
    "completion": ("prompt", "completion"),
    "label": ("text", "label"),
    "text": ("text",),
}
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
SHOWN = 20  # kinds of offences that a refusal spells out
ALIKE = 3  # rows of one kind that it names
_HELD_OUT = re.compile(r"(^|[^a-z])(test|valid|validation|val|dev|eval)([^a-z]|$)")


@dataclass(frozen=True, slots=True)
class Example:
    """One checked row. `values` holds the fields of the data set's shape, and no others."""

    where: str  # `reviews.jsonl, line 3`
    values: Mapping[str, Any]


@dataclass
class Offences:
    """Everything that is wrong with a data set, so that it is told at once: what is wrong with many
    rows by the first of them and their number."""

    kinds: dict[str, list[str]] = field(default_factory=dict)  # message, its numbers aside -> texts
    counts: Counter[str] = field(default_factory=Counter)  # of each
    count: int = 0  # of all
    places: set[str] = field(default_factory=set)

    def add(self, where: str, message: str) -> None:
        kind = re.sub(r"\d[\d,.]*", "#", message)
        self.counts[kind] += 1
        self.count += 1
        self.places.add(where)
        told = self.kinds.setdefault(kind, [])
        if len(told) < ALIKE:
            told.append(f"{where}: {message}")

    def refuse(self, name: str, rows: int) -> None:
        """Raise Refusal, one text with lines for each kind of offence, when there are any."""
        if not self.count:
            return
        lines = [f"{name}: {len(self.places):,} of {plural('row', rows)} cannot be used"]
        rest = self.count
        for kind, told in list(self.kinds.items())[:SHOWN]:
            lines += [f"  {text}" for text in told]
            if more := self.counts[kind] - len(told):
                lines.append(f"  and {more:,} more like these")
            rest -= self.counts[kind]
        if rest:
            lines.append(f"  and {rest:,} more of other kinds")
        raise Refusal("\n".join(lines))


@dataclass(frozen=True)
class DataSet:
    """Checked rows of one shape. `digest` is BLAKE3, in hex, over the files in order."""

    name: str  # as it was given
    shape: str  # a key of SHAPES
    examples: Sequence[Example]
    files: tuple[str, ...]
    digest: str
    ignored: tuple[str, ...]  # fields that are not used

    def __len__(self) -> int:
        return len(self.examples)


def read_data(
    name: str | os.PathLike[str],
    fields: Mapping[str, str] | None = None,
    shape: str | None = None,
    like: DataSet | None = None,
) -> DataSet:
    """Read and check all rows of a file, a folder of files or a Hub data set (`org/name`).

    fields: our field -> the data's (`{"prompt": "question", "completion": "answer"}`). Where given,
    they are the only fields that are looked at, so they decide the shape too.
    shape: the shape that is wanted, where something else has decided it. like: the training data of
    these rows, which decides that, and whether the labels of a CSV file are numbers.
    Raises Refusal (bad rows, all of them; no such data) or StorageFailure.
    """
    text, shape = os.fspath(name), like.shape if like else shape
    known = {ours for names in SHAPES.values() for ours in names}
    if unknown := sorted(set(fields or ()) - known):
        raise Refusal(
            f"--fields: {', '.join(unknown)}: not a field of training data; "
            f"known are {', '.join(sorted(known))}"
        )
    wrong = Offences()
    digest = blake3()
    rows: list[tuple[str, dict[str, Any]]] = []
    total = 0
    files = _files(text)
    for file in files:
        data = _bytes(file)
        digest.update(data)
        for where, row in _READERS[file.suffix.lower()](data, file.name, wrong):
            total += 1
            if isinstance(row, dict):
                rows.append((where, row))
            else:
                wrong.add(where, f"must be an object with fields, not {_kind(row)}")
    total = max(total, len(wrong.places | {where for where, _ in rows}))
    if not rows:
        wrong.refuse(text, total)
        raise Refusal(f"{text}: holds no rows")
    found = set(fields or rows[0][1])
    shape = shape or next((s for s, names in SHAPES.items() if found >= set(names)), None)
    if shape is None:
        wanted = "; ".join(" and ".join(names) for names in SHAPES.values())
        raise Refusal(
            f"{rows[0][0]}: has the fields {', '.join(sorted(found)) or '(none)'}, but training "
            f"needs one of: {wanted}. Say which are which: "
            "--fields prompt=question,completion=answer"
        )
    source = {ours: (fields or {}).get(ours, ours) for ours in SHAPES[shape]}
    examples = []
    for where, row in rows:
        before = wrong.count
        values = {ours: _value(row, ours, theirs, where, wrong) for ours, theirs in source.items()}
        if wrong.count == before:
            examples.append(Example(where, values))
    if shape == "label":
        if {file.suffix.lower() for file in files} <= {".csv", ".tsv"}:
            examples = _numbered(examples, like)
        _check_labels(examples, source["label"], wrong)
    wrong.refuse(text, total)
    ignored = {key for _, row in rows for key in row} - set(source.values())
    names = tuple(file.name for file in files)
    return DataSet(text, shape, examples, names, digest.hexdigest(), tuple(sorted(ignored)))


# --- one field ------------------------------------------------------------------------------------


def _value(row: dict[str, Any], ours: str, theirs: str, where: str, wrong: Offences) -> Any:
    """The checked value of a field; what is wrong with it goes to `wrong`."""
    if theirs not in row or row[theirs] is None:
        wrong.add(where, f"field {theirs!r} is missing")
        return None
    value = row[theirs]
    if ours == "messages":
        return _messages(value, theirs, where, wrong)
    if ours == "label":
        if isinstance(value, bool) or not isinstance(value, str | int):
            wrong.add(where, f"field {theirs!r} must be text or a whole number, not {_kind(value)}")
        elif isinstance(value, int) and value < 0:
            wrong.add(where, f"field {theirs!r} is {value}, which marks a row without a label")
        elif isinstance(value, str) and not value.strip():
            wrong.add(where, f"field {theirs!r} is empty")
        return value
    if not isinstance(value, str):
        wrong.add(where, f"field {theirs!r} must be text, not {_kind(value)}")
    elif not (value if ours == "completion" else value.strip()):
        wrong.add(where, f"field {theirs!r} is empty")
    elif not value.isprintable() and any("\ud800" <= c <= "\udfff" for c in value):
        wrong.add(where, f"field {theirs!r} holds half of a surrogate pair, which is no text")
    return value


def _messages(value: Any, name: str, where: str, wrong: Offences) -> Any:
    if isinstance(value, str) and value.lstrip()[:1] == "[":  # a CSV cell
        try:
            value = json.loads(value)
        except ValueError:
            pass
    if not isinstance(value, list) or not value:
        wrong.add(where, f"field {name!r} must be a list of messages, not {_kind(value)}")
        return value
    before = wrong.count
    for number, message in enumerate(value):
        place = f"field '{name}[{number}]'"
        if not isinstance(message, dict):
            wrong.add(where, f"{place} must be an object, not {_kind(message)}")
            continue
        if not isinstance(message.get("role"), str) or not message["role"]:
            wrong.add(where, f"{place} has no 'role'")
        elif not isinstance(message.get("content"), str) and not message.get("tool_calls"):
            wrong.add(where, f"{place} has no 'content' that is text")
        elif message["role"] == "assistant" and not (
            message.get("content") or message.get("tool_calls")
        ):
            wrong.add(where, f"{place} is an answer without content")
    if wrong.count == before and all(message["role"] != "assistant" for message in value):
        wrong.add(where, f"field {name!r} holds no message of the assistant, so nothing to learn")
    # Parquet fills absent keys with None, which a chat template may print
    return [
        {k: v for k, v in m.items() if v is not None} if isinstance(m, dict) else m for m in value
    ]


def _numbered(examples: list[Example], like: DataSet | None) -> list[Example]:
    """Labels of a CSV file as the numbers that they are, where they count classes from 0 on: the
    format has text alone."""
    labels = {example.values["label"] for example in examples}
    if like is not None:
        count = isinstance(like.examples[0].values["label"], int) and all(
            map(str.isdecimal, labels)
        )
    else:
        count = len(labels) > 1 and labels == {str(number) for number in range(len(labels))}
    if not count:
        return examples
    return [
        replace(one, values={**one.values, "label": int(one.values["label"])}) for one in examples
    ]


def _check_labels(examples: Sequence[Example], name: str, wrong: Offences) -> None:
    """Labels are all text or all numbers: 1 and "1" would be two classes."""
    if not examples:
        return
    first = type(examples[0].values["label"])
    for example in examples:
        value = example.values["label"]
        if type(value) is not first:
            wrong.add(
                example.where,
                f"field {name!r} is {_kind(value)}, where the first row has {_KINDS[first]}",
            )


_KINDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false",
          list: "a list", dict: "an object", type(None): "null"}  # fmt: skip


def _kind(value: Any) -> str:
    if value in ("", [], {}):
        return f"{_KINDS[type(value)]} that is empty"
    return _KINDS.get(type(value), type(value).__name__)


# --- files ----------------------------------------------------------------------------------------

Rows = Iterator[tuple[str, Any]]


def _jsonl(data: bytes, name: str, wrong: Offences) -> Rows:
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        try:
            yield where, parse_json(line, where)
        except CorruptFile as error:
            wrong.add(where, str(error).removeprefix(f"{where}: "))


def _json(data: bytes, name: str, wrong: Offences) -> Rows:
    """A JSON list of objects; what starts with an object is taken for JSON lines."""
    if data.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] != b"[":
        yield from _jsonl(data, name, wrong)
        return
    for number, row in enumerate(parse_json(data.removeprefix(b"\xef\xbb\xbf"), name), 1):
        yield f"{name}, item {number}", row


def _csv(data: bytes, name: str, wrong: Offences, delimiter: str = ",") -> Rows:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        wrong.add(f"{name}, line {line}", "is not UTF-8; save the file as UTF-8")
        return
    limit = csv.field_size_limit(len(text) + 1)  # a long text is no attack here
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        header = next(reader, [])
        twice = sorted({column for column in header if header.count(column) > 1})
        if twice:
            wrong.add(f"{name}, line 1", f"names a column twice: {', '.join(twice)}")
            return
        line = reader.line_num
        for cells in reader:
            begin, line = line + 1, reader.line_num
            where = f"{name}, line {begin}"
            if not cells:
                continue
            if len(cells) != len(header):
                wrong.add(
                    where, f"has {plural('field', len(cells))}, and the header has {len(header)}"
                )
                continue
            yield where, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        wrong.add(f"{name}, line {line + 1}", f"is not CSV: {error}; the rest was not read")
    finally:
        csv.field_size_limit(limit)


def _tsv(data: bytes, name: str, wrong: Offences) -> Rows:
    return _csv(data, name, wrong, "\t")


def _parquet(data: bytes, name: str, wrong: Offences) -> Rows:
    try:
        import pyarrow as arrow  # type: ignore[import-not-found,import-untyped,unused-ignore]
        from pyarrow import parquet  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError:
        raise Refusal(f"{name}: Parquet needs pyarrow; {needs('train')}") from None
    try:
        batches = parquet.ParquetFile(arrow.BufferReader(data)).iter_batches()
        number = 0
        for batch in batches:
            for row in batch.to_pylist():
                number += 1
                yield f"{name}, row {number}", row
    except (arrow.ArrowException, OSError) as error:
        raise CorruptFile(f"{name}: not a Parquet file that can be read: {error}") from None


_READERS: dict[str, Callable[[bytes, str, Offences], Rows]] = {
    ".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _tsv,
    ".parquet": _parquet,
}  # fmt: skip


def _bytes(file: Path) -> bytes:
    try:
        with open_regular(file) as stream:
            return stream.read()
    except OSError as error:
        raise StorageFailure(f"{file}: {error.strerror}") from error


def _files(name: str) -> list[Path]:
    """A data set's files: itself, those of a folder, or the training split of a Hub data set."""
    path = Path(name)
    hub = not exists(path)
    if hub:
        path = _download(name)
    if not path.is_dir():
        if path.suffix.lower() not in SUFFIXES:
            raise Refusal(f"{name}: training data is one of {', '.join(SUFFIXES)}")
        return [path]
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    inside = {p: p.relative_to(path).as_posix().lower() for p in files}
    files = [p for p in files if not _HELD_OUT.search(inside[p]) and "info" not in p.stem.lower()]
    train = [p for p in files if "train" in inside[p]]
    if not (train or files):
        raise Refusal(f"{name}: holds no training file ({', '.join(SUFFIXES)})")
    folders = sorted({p.parent for p in train or files})
    if hub and len(folders) > 1:  # rows of all languages, say, are rarely what is meant
        subsets = ", ".join(folder.relative_to(path).as_posix() for folder in folders)
        raise Refusal(
            f"{name}: has several subsets: {subsets}; give the folder of one: {folders[0]}"
        )
    return train or files


def _download(name: str) -> Path:
    if not HUB_ID.fullmatch(name):
        raise Refusal(f"{name}: no such file or folder (and not a Hub data set such as org/name)")
    repo, _, revision = name.partition("@")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                repo,
                repo_type="dataset",
                revision=revision or None,
                allow_patterns=[f"*{suffix}" for suffix in SUFFIXES],
            )
        )
    except Exception as error:  # the hub client raises many kinds; all mean the same here
        raise StorageFailure(
            f"{name}: no such file here, and the Hub did not deliver a data set of that name "
            f"({type(error).__name__}). Give a local file, or check the name and the network"
        ) from error
