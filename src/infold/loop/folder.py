"""The files of a run. A file that is there is whole; a journal loses at most its last line.

RUN/loop.json             what is run: version, configuration, digests of the base
RUN/held_out.json         the held-out problems
RUN/model/                the full weights of the current iteration, with their receipt
RUN/iterations/000/       the base: scores
RUN/iterations/NNN/
    problems.json         the problems of this iteration
    collect.jsonl         the answers, chunk by chunk, and which were accepted
    kept.jsonl            the rows to learn
    collect.json          counts, time and memory of the collection
    adapter/              what was trained
    train.json            time and memory of the training
    merge.json            digests of the merged shards; time and memory of the merge
    evaluate.jsonl        held-out answers
    scores.json           the score; its presence ends the iteration
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from blake3 import blake3

from infold.checkpoint.files import exists, read_bytes, read_object
from infold.checkpoint.safetensors import parse_json
from infold.checkpoint.shards import RECEIPT, open_checkpoint
from infold.checkpoint.staging import storage_errors
from infold.errors import CorruptFile, Refusal

__all__ = ["Iteration", "Journal", "Run", "digests_of_base", "write_json", "write_lines"]

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


class Iteration:
    """The folder of one iteration; 0 is the base."""

    def __init__(self, run: Path, number: int) -> None:
        self.number = number
        self.path = run / "iterations" / f"{number:03}"

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def read(self, name: str) -> dict[str, Any] | None:
        return read_object(self / name) if exists(self / name) else None

    @property
    def adapter(self) -> Path:
        return self / "adapter"


class Run:
    """A run's folder."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(os.path.abspath(path))
        self.model = self.path / "model"

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Run:
        """A run that exists. Raises Refusal for another folder."""
        run = cls(path)
        if not exists(run.path / "loop.json"):
            raise Refusal(f"{run.path}: is no run of infold loop: it has no loop.json")
        return run

    @property
    def facts(self) -> dict[str, Any]:
        return read_object(self.path / "loop.json")

    def iteration(self, number: int) -> Iteration:
        return Iteration(self.path, number)

    def done(self) -> list[Iteration]:
        """The iterations that are complete, from 0 on."""
        found: list[Iteration] = []
        while exists((new := self.iteration(len(found))) / "scores.json"):
            found.append(new)
        return found

    def adapters(self, number: int) -> list[Path]:
        return [self.iteration(n).adapter for n in range(1, number + 1)]

    def holds(self, number: int) -> bool:
        """Whether RUN/model is the base with adapters 1 to `number`, by its receipt."""
        if not exists(self.model / RECEIPT):
            return False
        receipt = read_object(self.model / RECEIPT)
        made = [adapter["files"] for adapter in receipt["adapters"]]
        return bool(
            receipt["base"]["shards"] == self.facts["base"]["shards"]
            and made == [_digests([a / name for name in ADAPTER_FILES]) for a in
                         self.adapters(number) if exists(a)]
            and len(made) == number
        )  # fmt: skip

    @contextmanager
    def locked(self) -> Iterator[None]:
        """The run belongs to this process; the system frees it however the process ends."""
        with storage_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Refusal(f"{self.path}: another loop is running there right now") from None
            yield
        finally:
            os.close(lock)


class Journal:
    """JSON lines, each on the disk before the next; a line that a kill tore is dropped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: list[dict[str, Any]] = []
        whole = 0
        data = read_bytes(path, 1 << 32) if exists(path) else b""
        for line in data.splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            entry = parse_json(line, f"{path}: line {len(self.entries) + 1}")
            if not isinstance(entry, dict) or not isinstance(entry.get("chunk"), int):
                raise CorruptFile(
                    f"{path}: line {len(self.entries) + 1} is none that infold writes; remove the "
                    "file: its answers are made anew"
                )
            self.entries.append(entry)
            whole += len(line)
        if whole < len(data):
            with storage_errors(path):
                os.truncate(path, whole)

    def append(self, entry: dict[str, Any]) -> None:
        with storage_errors(self.path), open(self.path, "ab") as file:
            file.write(_line(entry))
            file.flush()
            os.fsync(file.fileno())
        self.entries.append(entry)


def write_json(path: Path, value: Any) -> None:
    """Write under another name, fsync, rename: the file is there as a whole or not at all."""
    _write(path, _line(value, indent=1))


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    _write(path, b"".join(map(_line, rows)))


def _line(value: Any, indent: int | None = None) -> bytes:
    """JSON with a newline. Half of a surrogate pair, which a server may send, stays an escape."""
    text = json.dumps(value, indent=indent, ensure_ascii=False) + "\n"
    return text.encode(errors="backslashreplace")


def _write(path: Path, data: bytes) -> None:
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.new")
        with open(draft, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.rename(path)
        fd = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def digests_of_base(base: str) -> dict[str, str]:
    """BLAKE3 of the base's shards by name, as receipts have them."""
    return _digests([shard.path for shard in open_checkpoint(base).shards])


def _digests(files: Sequence[Path]) -> dict[str, str]:
    found = {}
    for path in files:
        hasher = blake3()
        with storage_errors(path), open(path, "rb") as file:
            while piece := file.read(1 << 22):
                hasher.update(piece)
        found[path.name] = hasher.hexdigest()
    return found
