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
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from infold.checkpoint.files import digest_of, exists, read_bytes, read_object, safe_child
from infold.checkpoint.safetensors import parse_json
from infold.checkpoint.shards import CARD, INDEX, RECEIPT, open_checkpoint
from infold.disk import storage_errors, write_whole
from infold.errors import CorruptFile, Refusal
from infold.loop.records import fits, read_record

__all__ = ["Iteration", "Journal", "Run", "digests_of_base", "write_json", "write_lines"]

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
# What a kill leaves of a run before it has begun: its first files, or drafts of them
_EARLY = re.compile(r"lock|held_out\.json|\.(held_out|loop)\.json\.\d+")
_RECEIPT = {
    "base": {"shards": dict}, "adapters": list, "shards": {...: str}, "side_files": {...: str},
}  # fmt: skip


class Iteration:
    """The folder of one iteration; 0 is the base."""

    def __init__(self, run: Path, number: int) -> None:
        self.number = number
        self.path = run / "iterations" / f"{number:03}"

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def read(self, name: str) -> dict[str, Any] | None:
        return read_record(self / name) if exists(self / name) else None

    @property
    def adapter(self) -> Path:
        return self / "adapter"

    def adapter_digests(self) -> dict[str, str]:
        """BLAKE3 of the adapter's files, as receipts have them."""
        return {name: digest_of(self.adapter / name) for name in ADAPTER_FILES}


class Run:
    """A run's folder."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(os.path.abspath(path))
        self.model = self.path / "model"

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Run:
        """A run that exists. Raises Refusal for another folder."""
        run = cls(path)
        if not exists(run.path):
            raise Refusal(f"{run.path}: no such folder")
        if not exists(run.path / "loop.json"):
            raise Refusal(
                f"{run.path}: is no run of infold loop: it has no loop.json; give the folder that "
                "the configuration calls `run`"
            )
        return run

    @property
    def facts(self) -> dict[str, Any]:
        return read_record(self.path / "loop.json")

    def strangers(self) -> list[str]:
        """What lies in a folder that is no run; some names of it, and none of a run that began."""
        with storage_errors(self.path):
            if not self.path.is_dir() or exists(self.path / "loop.json"):
                return []
            return sorted(p.name for p in self.path.iterdir() if not _EARLY.fullmatch(p.name))[:10]

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

    def check_adapters(self, number: int) -> None:
        """Refuse adapters 1 to `number` where one is not what was trained: every later iteration
        would be another one."""
        wrong = []
        for n in range(1, number + 1):
            it = self.iteration(n)
            was = it.read("train.json")
            if was is not None and was["adapter"] != it.adapter_digests():
                wrong.append(
                    f"{it.adapter}: was changed since it was trained, so iterations {n} and later "
                    "cannot be made from it; put the old files back"
                )
        if wrong:
            raise CorruptFile(wrong)

    def holds(self, number: int) -> bool:
        """Whether RUN/model is the base with adapters 1 to `number`: by its receipt, byte for byte
        what the receipt tells, and what the iteration had."""
        if not exists(self.model / RECEIPT):
            return False
        receipt = read_object(self.model / RECEIPT)
        if not fits(receipt, _RECEIPT) or len(receipt["adapters"]) != number:
            return False
        made = [a.get("files") if isinstance(a, dict) else None for a in receipt["adapters"]]
        adapters = [self.iteration(n) for n in range(1, number + 1)]
        was = self.iteration(number).read("merge.json")
        sides = {name: told for name, told in receipt["side_files"].items() if name != CARD}
        return bool(
            receipt["base"]["shards"] == self.facts["base"]["shards"]
            and made == [it.adapter_digests() for it in adapters if exists(it.adapter)]
            and (was is None or was["shards"] == receipt["shards"])
            and all(_has(self.model, *told) for told in (receipt["shards"] | sides).items())
        )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """The run belongs to this process; the system frees it however the process ends."""
        with storage_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            with storage_errors(self.path):  # no locks on this file system, say
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise Refusal(
                        f"{self.path}: another loop is running there right now; wait for its end, "
                        "or give another folder with --run"
                    ) from None
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
    write_whole(path, _line(value, indent=1))


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    write_whole(path, b"".join(map(_line, rows)))


def _line(value: Any, indent: int | None = None) -> bytes:
    """JSON with a newline. Half of a surrogate pair, which a server may send, stays an escape."""
    text = json.dumps(value, indent=indent, ensure_ascii=False) + "\n"
    return text.encode(errors="backslashreplace")


def digests_of_base(base: str) -> dict[str, dict[str, str]]:
    """BLAKE3 of the base's files by name, as receipts have them: shards, and side_files, of which
    the model card is for people to read."""
    there = open_checkpoint(base)
    sides = [*there.side_files, *([INDEX] if there.index else [])]
    return {
        "shards": {shard.name: digest_of(shard.path) for shard in there.shards},
        "side_files": {
            name: digest_of(safe_child(there.home, name)) for name in sides if name != CARD
        },
    }


def _has(folder: Path, name: str, digest: str) -> bool:
    """Whether a folder has this file, and not another one of its name."""
    try:
        path = safe_child(folder, name)
    except CorruptFile:
        return False
    return path.is_file() and digest_of(path) == digest
