"""Edits of a folder itself: merge, undo and swap without a second copy.

A rehearsal comes first: it computes everything, refuses what is to be refused, and writes nothing
but the record of the way back. Then the blocks are written, in steps:

(beside a GGUF file that is a model by itself their names begin with its name)

    infold-undo.journal   held (flock) by the running edit; JSON lines: what is done; after the
                          rehearsal what comes out of it (from here on the edit will be completed,
                          until here it is rolled back); each finished step; that all is written
    infold-undo.part      the new record, until everything is written
    infold-undo.step      one step: its number, a digest, and the new bytes with their places; its
                          room is taken in the rehearsal

The step goes to the disk before its bytes go to their places, so one that a kill tore in the middle
is written once more. A shard never changes its length or its header: what would need that is
refused. All that a completion needs, adapters too, is in the records.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from infold.checkpoint.adapter import open_adapter
from infold.checkpoint.inputs import InputFiles
from infold.checkpoint.record import UNDO, RecordWriter
from infold.checkpoint.shards import (
    CARD,
    JOURNAL,
    KEPT_CARD,
    RECEIPT,
    Checkpoint,
    companion,
    is_bundled,
    is_lone,
    misnamed,
    open_checkpoint,
)
from infold.checkpoint.staging import Progress, sync_data
from infold.disk import storage_errors, sync_folder
from infold.edit.threads import one_torch_thread, usual_threads, worker_count
from infold.errors import Refusal
from infold.machine import device_of, peak_bytes
from infold.merge.apply import Run
from infold.merge.inplace_journal import read_journal
from infold.merge.inplace_steps import (
    Crew,
    Piece,
    Places,
    grouped,
    pack_step,
    program,
    read_step,
    reserve,
    step_memory,
    step_room,
    write_file,
)
from infold.merge.prepare import (
    DEFAULT_MEMORY,
    Prepared,
    block_size,
    digest_adapter,
    refuse_changed,
    refuse_full,
)
from infold.merge.receipt import Receipt
from infold.merge.recording import Recording, record_room
from infold.merge.restore import Undone, check_restored, undone
from infold.merge.run import finish_record, make_receipt
from infold.merge.stream import Streamed, stream
from infold.merge.undo import Merged, open_merged
from infold.plan.build import plan_edit
from infold.plan.edits import OutputShard, Plan
from infold.sizes import parse_bytes

__all__ = ["Settled", "merge_in_place", "settle", "swap_in_place", "undo_in_place"]

PART, STEP, TOLD = "infold-undo.part", "infold-undo.step", "infold-undo.receipt"
STEP_BYTES = 32 << 20  # of one step; more at once is not faster
LEAST_STEP = 2 << 20  # where there is no memory for those

PathLike = str | os.PathLike[str]
Advance = Callable[[int, int], None]


@dataclass(frozen=True)
class Settled:
    """What became of an edit that was interrupted. result: of the edit, where it was completed."""

    what: str  # merge, undo or swap
    completed: bool
    result: Mapping[str, Any]

    def __str__(self) -> str:
        if self.completed:
            return f"an interrupted {self.what} in place was completed"
        return f"an interrupted {self.what} in place was rolled back: nothing had been changed"


# --- the verbs ---------------------------------------------------------------------------------


def merge_in_place(
    base: PathLike,
    adapters: Sequence[PathLike],
    *,
    max_memory: int | str = DEFAULT_MEMORY,
    device: str = "cpu",
    threads: int | None = None,
    dry_run: bool = False,
    lossy: bool = False,
    progress: Advance | None = None,
    told: Callable[[Settled], None] | None = None,
) -> Receipt | dict[str, Any]:
    """Merge adapters into the folder of the base itself. Returns the receipt, or with `dry_run`
    the plan. `told` is called where an interrupted edit was finished first; with `dry_run` that is
    refused."""
    folder = _folder(base)
    opened = [open_adapter(adapter) for adapter in adapters]
    settled = None if dry_run else settle(folder)
    if settled and told:
        told(settled)
    if settled and settled.completed and settled.what == "merge":
        files = [entry["files"] for entry in settled.result["adapters"]]
        if files == [digest_adapter(adapter) for adapter in opened]:
            return Receipt(**settled.result)
    checkpoint = open_checkpoint(folder)
    plan = plan_edit(checkpoint, opened, lossy)
    _refuse([*_merged_already(checkpoint), *_obstacles(checkpoint, plan)])
    prepared = _prepare(plan, folder, max_memory, device, threads, None)
    _check_space(prepared, plan, record_room(plan))
    if dry_run:
        return plan.summary()
    names = (os.fspath(base), [os.fspath(adapter) for adapter in adapters])
    with _Edit(folder, "merge", progress) as edit:
        return edit.merge(prepared, names)


def swap_in_place(
    merged: PathLike,
    adapters: Sequence[PathLike],
    *,
    max_memory: int | str = DEFAULT_MEMORY,
    device: str = "cpu",
    threads: int | None = None,
    lossy: bool = False,
    progress: Advance | None = None,
    told: Callable[[Settled], None] | None = None,
) -> Receipt:
    """Undo a merged folder and merge other adapters, in the folder itself."""
    folder = _folder(merged)
    opened = [open_adapter(adapter) for adapter in adapters]
    settled = settle(folder)
    if settled and told:
        told(settled)
    if settled and settled.completed and settled.what == "swap":
        files = [entry["files"] for entry in settled.result["adapters"]]
        if files == [digest_adapter(adapter) for adapter in opened]:
            return Receipt(**settled.result)
    source = open_merged(folder)
    with source.record:
        source.check_swap()
        plan = plan_edit(source.base, opened, lossy, source.instead)
        over = source.swap_plan(plan)
        _refuse(_obstacles(source.checkpoint, over, source))
        prepared = _prepare(plan, folder, max_memory, device, threads, source)
        _check_space(prepared, over, record_room(plan))
        names = (str(folder), [os.fspath(adapter) for adapter in adapters])
        with _Edit(folder, "swap", progress) as edit:
            return edit.merge(prepared, names)


def undo_in_place(
    merged: PathLike,
    *,
    max_memory: int | str = DEFAULT_MEMORY,
    device: str = "cpu",
    threads: int | None = None,
    progress: Advance | None = None,
    told: Callable[[Settled], None] | None = None,
) -> Undone:
    """Turn a merged folder back into its base."""
    folder = _folder(merged)
    settled = settle(folder)
    if settled and told:
        told(settled)
    if settled and settled.completed and settled.what == "undo":
        return Undone(**settled.result)
    source = open_merged(folder)
    with source.record:
        plan = source.undo_plan(in_place=True)
        _refuse(_obstacles(source.checkpoint, plan, source))
        prepared = _prepare(plan, folder, max_memory, device, threads, source)
        _check_space(prepared, plan, 0)
        with _Edit(folder, "undo", progress) as edit:
            return edit.undo(prepared)


def settle(folder: PathLike, *, refuse: bool = False) -> Settled | None:
    """Finish what a kill left of an edit in place; None where there is nothing.

    Raises Refusal while another process is at it, and with `refuse` where the folder was the base
    of what follows and has become a merged one.
    """
    path = Path(os.path.abspath(folder))
    if not os.path.lexists(companion(path, JOURNAL)):
        return None
    with _Edit(path, "", None) as edit, one_torch_thread():
        settled = edit.settle()
    if refuse and settled.completed and settled.what != "undo":
        raise Refusal(f"{folder}: {settled}; it is merged now, so undo it before it is a base")
    return settled


# --- checks ------------------------------------------------------------------------------------


def _folder(name: PathLike) -> Path:
    path = Path(os.path.abspath(name))
    if not path.is_dir() and not (is_lone(path) and path.is_file()):
        raise Refusal(
            f"{name}: is neither a folder nor a .gguf file here; --in-place edits what lies on "
            f"this machine{misnamed(path)}"
        )
    return path


def _obstacles(there: Checkpoint, plan: Plan, source: Merged | None = None) -> Iterator[str]:
    """Why the files that are there cannot be edited as they lie."""
    for shard in plan.shards:
        if not shard.same_layout:
            yield (
                f"{there.home / shard.name}: its layout would change (new or resized tensors, "
                "untied embeddings), which --in-place does not do; use --out"
            )
    if source and source.record.path != (mine := companion(there.path, UNDO)):
        was = str(source.record.path).removesuffix(f".{UNDO}")
        yield (
            f"{there.path}: {mine.name} is not there, since this file was called {was} when it was "
            f"merged; --in-place needs that name (mv {there.path} {was}), or use --out"
        )
    changed = source.beside.changed if source else {}
    for name in {**plan.rewritten, **(source.rewritten if source else {})}:
        if name in changed:
            yield (
                f"{there.path / name}: {changed[name]}, and --in-place leaves side files alone; "
                "put the base's back, or use --out, where it is the base's again"
            )
        else:
            yield f"{there.path / name}: would change, which --in-place does not do; use --out"
    for old in there.shards:
        path = there.home / old.name
        if path.is_symlink() or os.stat(path).st_nlink > 1:
            yield f"{path}: is a link, and what shares it would change too; use --out"
        elif not os.access(path, os.W_OK):
            yield f"{path}: cannot be written"
    # records tell of which merge they are
    free = ("infold-", ".git", ".cache", "__pycache__", "records/")
    others = [name for name in there.left_out if not name.startswith(free)]
    yield from _bundle(there, [name for name in others if is_bundled(name)])
    for name in others:
        if not is_bundled(name):
            yield (
                f"{there.path / name}: repeats or would change the weights, and would not be "
                "merged; move it elsewhere, or use --out"
            )


def _bundle(there: Checkpoint, names: Sequence[str]) -> Iterator[str]:
    """Of `infold deploy`, whose model card took the place of the base's."""
    gone = [name for name in names if name != KEPT_CARD]
    if KEPT_CARD not in names and "deployment_config.json" in names:
        gone.append(CARD)  # which the base did not have
    steps = [f"remove {', '.join(gone)}"] if gone else []
    steps += [f"rename {KEPT_CARD}, the base's, to {CARD}"] if KEPT_CARD in names else []
    if steps:
        yield (
            f"{there.path}: holds the bundle of `infold deploy`, which would tell of weights that "
            f"are gone; {' and '.join(steps)}, or use --out"
        )


def _merged_already(there: Checkpoint) -> Iterator[str]:
    if os.path.lexists(companion(there.path, UNDO)):
        yield (
            f"{there.path}: was merged already, and its undo record would be lost; `infold swap` "
            "exchanges its adapters, `infold undo` restores its base"
        )
    elif os.path.lexists(companion(there.path, RECEIPT)):
        yield (
            f"{there.path}: was merged already, so its receipt would be lost; merge all adapters "
            "into its base, or use --out"
        )


def _refuse(reasons: Iterator[str] | Sequence[str]) -> None:
    if listed := list(dict.fromkeys(reasons)):
        raise Refusal(listed)


def _prepare(
    plan: Plan,
    folder: Path,
    max_memory: int | str,
    device: str,
    threads: int | None,
    source: Merged | None,
) -> Prepared:
    where, count = device_of(device), worker_count(threads)
    fixed, budget = source.limit if source else None, parse_bytes(max_memory)

    def sized(step: int) -> tuple[int, int]:
        beside = step_memory(step)
        return block_size(plan, budget, count, where, threads is None, True, fixed, beside)

    step = STEP_BYTES
    try:
        workers, limit = sized(step)
    except Refusal:
        step = min(LEAST_STEP, STEP_BYTES)
        workers, limit = sized(step)
    mine = (
        source is None or plan.base is not source.checkpoint
    )  # an undo has no adapters of its own
    digests = tuple(digest_adapter(a) for a in plan.adapters) if mine else ()
    return Prepared(plan, folder, False, where, workers, limit, digests, True, source, step=step)


def _check_space(prepared: Prepared, over: Plan, record: int) -> None:
    """Whether the disk has room for a record of this size and for a step. over: the plan, over what
    lies there."""
    out = prepared.out
    needed = record + step_room(over, prepared.limit, prepared.step)
    refuse_full(out, out.parent if is_lone(out) else out, needed, record)


# --- one edit ----------------------------------------------------------------------------------


class _Rehearsal:
    """Takes the place of `Staging`: everything is computed and hashed, and goes nowhere."""

    writes = False

    def __init__(self, folder: Path) -> None:
        self.output, self.resumed = folder, dict[str, Progress]()

    def open_file(self, name: str, size: int) -> int:
        return os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)

    def record(self, shard: str, fd: int, progress: Progress) -> None: ...


class _Edit:
    """The journal of one edit in place, locked. An error before the first step rolls it back."""

    def __init__(self, folder: Path, what: str, progress: Advance | None) -> None:
        self.folder, self.what, self.progress = folder, what, progress
        self.home = folder.parent if is_lone(folder) else folder
        self.lines: list[dict[str, Any]] = []
        self.fd, self.done, self.total = -1, 0, 0
        self.committed = False

    def _own(self, name: str) -> Path:
        """A file of the edit: in the folder, or beside the file."""
        return companion(self.folder, name)

    def __enter__(self) -> _Edit:
        path = self._own(JOURNAL)
        with storage_errors(path):
            fresh = bool(self.what) and not os.path.lexists(path)
            flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT if self.what else 0)
            self.fd = os.open(path, flags, 0o644)
            try:
                fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                mine = path.exists() and os.path.samestat(os.stat(path), os.fstat(self.fd))
            except BlockingIOError:
                mine = False
            except OSError:  # no locks on this file system, say
                self._close()
                if fresh:  # else nobody could read the folder any more, nor end this edit
                    with suppress(OSError):
                        os.unlink(path)
                raise
            if not mine:
                self._close()
                raise Refusal(f"{self.folder}: is being edited in place right now")
            data = os.pread(self.fd, os.fstat(self.fd).st_size, 0)
            if self.what and data:
                self._close()
                raise Refusal(f"{self.folder}: another edit in place has just begun; try again")
            try:
                if self.what:
                    self._log({"what": self.what})
                    sync_folder(self.home)
                else:
                    self._read(data)
            except BaseException as error:
                self.__exit__(type(error), error, None)
                raise
        return self

    def _read(self, data: bytes) -> None:
        self.committed = True  # one that cannot be read is left as it lies
        self.lines, whole = read_journal(self._own(JOURNAL), data)
        os.ftruncate(self.fd, whole)  # no line that the kill cut off in the middle
        self.what = self.lines[0]["what"] if self.lines else "edit"
        self.committed = any("result" in line for line in self.lines)

    def __exit__(self, kind: type[BaseException] | None, error: object, _: object) -> None:
        try:
            if error is not None and not self.committed:
                self._forget()
        finally:
            self._close()

    def _close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _log(self, entry: Mapping[str, Any]) -> None:
        self.lines.append(dict(entry))
        os.lseek(self.fd, 0, os.SEEK_END)
        line = memoryview(json.dumps(entry).encode() + b"\n")
        while len(line):
            line = line[os.write(self.fd, line) :]
        sync_data(self.fd)

    def _forget(self, *names: str) -> None:
        """Remove what belongs to the edit alone, the journal last."""
        with storage_errors(self.folder):
            for name in (*names, PART, STEP, TOLD, JOURNAL):
                if name == JOURNAL:
                    sync_folder(self.home)
                if os.path.lexists(self._own(name)):
                    os.unlink(self._own(name))
            sync_folder(self.home)

    def _advance(self, count: int) -> None:
        self.done += count
        if self.progress is not None:
            self.progress(self.done, self.total)

    # the rehearsal

    def merge(self, prepared: Prepared, names: tuple[str, Sequence[str]]) -> Receipt:
        started, plan, source = time.perf_counter(), prepared.plan, prepared.source
        over = source.swap_plan(plan) if source else plan
        runs = source.swap_runs(plan, prepared.device) if source else None
        with one_torch_thread(), ExitStack() as opened:
            writer = RecordWriter(self._own(PART))
            opened.callback(writer.close)
            recording = Recording(writer, plan, prepared.limit)
            streamed = self._rehearse(over, prepared, runs, recording)
            if source:
                source.check(streamed)
            receipt = make_receipt(prepared, streamed, names, self.folder, sha256={})
            told = finish_record(recording, receipt, source)
            told["file"] = self._own(UNDO).name
            receipt = replace(
                receipt,
                undo=told,
                out=str(self.folder),
                seconds=round(time.perf_counter() - started, 3),
                peak_memory=peak_bytes(),
            )
            writer.close()
            self._write(asdict(receipt), over, prepared)
        return replace(receipt, seconds=round(time.perf_counter() - started, 3))

    def undo(self, prepared: Prepared) -> Undone:
        started, source = time.perf_counter(), prepared.source
        assert source is not None
        with one_torch_thread():
            runs = source.undo_runs(prepared.device)
            streamed = self._rehearse(prepared.plan, prepared, runs, None)
            check_restored(source, streamed)
            result = undone(source, self.folder, streamed, started)
            self._write(asdict(result), prepared.plan, prepared)
        return replace(result, seconds=round(time.perf_counter() - started, 3))

    def _rehearse(
        self,
        plan: Plan,
        prepared: Prepared,
        runs: Mapping[str, Run] | None,
        recording: Recording | None,
    ) -> Streamed:
        self.total = sum(s.header.file_size for s in plan.shards) + plan.edited_bytes
        return stream(
            plan,
            _Rehearsal(self.home),
            threads=prepared.workers,
            limit=prepared.limit,
            device=prepared.device,
            advance=self._advance,
            runs=runs,
            recording=recording,
        )

    # the writing

    def settle(self) -> Settled:
        if not self.committed:
            self._forget()
            return Settled(self.what, False, {})
        told = next(line for line in self.lines if "result" in line)
        self._finish(told["result"], min(told["workers"], usual_threads()))
        return Settled(self.what, True, told["result"])

    def _write(self, result: Mapping[str, Any], plan: Plan, prepared: Prepared) -> None:
        refuse_changed(plan)
        with storage_errors(self._own(STEP)):
            reserve(self._own(STEP), step_room(plan, prepared.limit, prepared.step))
            sync_folder(self.home)  # the record's name too: from here on it is needed
        with storage_errors(self._own(JOURNAL)):
            held = {"step_bytes": prepared.step, "workers": prepared.workers}
            self._log({"result": result, **held})
        self.committed = True
        self._finish(result, prepared.workers)

    def _finish(self, result: Mapping[str, Any], workers: int) -> None:
        """From wherever it stands to its end."""
        if not any("written" in line for line in self.lines):
            self._steps(workers)
            with storage_errors(self._own(JOURNAL)):
                self._log({"written": True})
        with storage_errors(self.folder):
            if self.what == "undo":
                self._forget(RECEIPT, UNDO)
                return
            if os.path.lexists(self._own(STEP)):  # whose room the receipt may need
                os.unlink(self._own(STEP))
            if os.path.lexists(self._own(PART)):
                weights = os.stat(self.home / min(result["shards"]))
                os.chmod(self._own(PART), stat.S_IMODE(weights.st_mode))
                os.rename(self._own(PART), self._own(UNDO))
            write_file(self._own(TOLD), Receipt(**result).to_file())
            os.rename(self._own(TOLD), self._own(RECEIPT))
            sync_folder(self.home)
            self._forget()

    def _steps(self, workers: int) -> None:
        with ExitStack() as opened:
            old = new = None
            if self.what != "merge":
                old = open_merged(self.folder, in_place=True)
                opened.callback(old.record.close)
            if self.what != "undo":
                new = open_merged(self.folder, PART, in_place=True)
                opened.callback(new.record.close)
            plan, runs, limit = program(old, new)
            finished = max((line.get("step", 0) for line in self.lines), default=0)
            size = next(line["step_bytes"] for line in self.lines if "step_bytes" in line)
            writer = Places([shard.path for shard in plan.base.shards])
            finished = self._replay(writer, finished, plan.shards)
            files = InputFiles()
            opened.callback(files.close)
            crew = opened.enter_context(Crew(workers, limit, plan, files))
            steps = grouped(plan, runs, files, limit, size)
            for works in islice(steps, finished):
                self._advance(sum(work.count for work in works))
            for number, pieces in enumerate(crew.compute(steps), finished + 1):
                self._step(writer, number, pieces)
                self._advance(sum(len(piece.data) for piece in pieces))

    def _step(self, writer: Places, number: int, pieces: Sequence[Piece]) -> None:
        with storage_errors(self._own(STEP)):
            write_file(self._own(STEP), pack_step(number, pieces), cut=False)
            if number == 1:
                sync_folder(self.home)
        self._place(writer, number, pieces)

    def _place(self, writer: Places, number: int, pieces: Sequence[Piece]) -> None:
        writer.write(pieces)
        with storage_errors(self._own(JOURNAL)):
            self._log({"step": number})

    def _replay(self, writer: Places, finished: int, shards: Sequence[OutputShard]) -> int:
        """Write the step once more that the kill may have torn. Returns the last finished one."""
        pieces = read_step(self._own(STEP), finished + 1, shards)
        if pieces is None:
            return finished
        self._place(writer, finished + 1, pieces)
        return finished + 1
