"""The merge, once it is prepared: from the first byte to the receipt."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from blake3 import blake3
from torch import Tensor

from infold.adapters import METHODS
from infold.checkpoint.files import digest_of, safe_child
from infold.checkpoint.inputs import InputFiles
from infold.checkpoint.record import UNDO, RecordWriter
from infold.checkpoint.shards import (
    RECEIPT,
    companion,
    is_lone,
    kept_name,
    read_receipt,
)
from infold.checkpoint.staging import Staging
from infold.disk import storage_errors
from infold.edit.blocks import Block
from infold.edit.threads import one_torch_thread
from infold.errors import InfoldError, ProofFailed
from infold.machine import peak_bytes
from infold.merge.beside import smallest
from infold.merge.convert import lost_updates, measured_error
from infold.merge.losses import loss_of, rounding_notes
from infold.merge.prepare import Prepared, check_output, refuse_changed
from infold.merge.receipt import Receipt
from infold.merge.recording import Recording, block_of
from infold.merge.stream import Streamed, stream
from infold.merge.undo import Merged
from infold.plan.edits import Plan, describe
from infold.version import __version__

__all__ = [
    "execute",
    "finish_record",
    "make_receipt",
]

PathLike = str | os.PathLike[str]


def execute(
    prepared: Prepared,
    *,
    sha256: bool = False,
    progress: Callable[[int, int], None] | None = None,
    names: tuple[str, Sequence[str]] | None = None,
) -> Receipt:
    """Write the output. `progress` is called with (bytes done, bytes in all); `names` are base and
    adapters as the user gave them, for the receipt.

    Raises Refusal for bad input, StorageFailure for the disk's refusals, ProofFailed where the
    shards are not those that were expected; then nothing is left.
    """
    with one_torch_thread():
        return _execute(prepared, sha256, progress, names)


def _execute(
    prepared: Prepared,
    sha256: bool,
    progress: Callable[[int, int], None] | None,
    names: tuple[str, Sequence[str]] | None,
) -> Receipt:
    started = time.perf_counter()
    plan, path, source = prepared.plan, prepared.out, prepared.source
    over = source.swap_plan(plan) if source else plan  # the plan, over what lies there
    runs = source.swap_runs(plan, prepared.device) if source else None
    done = 0
    total = sum(shard.header.file_size for shard in plan.shards)

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    with ExitStack() as opened:
        lone = is_lone(path)
        staging = opened.enter_context(
            Staging(
                path,
                _identity(prepared),
                prepared.force,
                lone=lone,
                like=over.base.shards[0].path if lone else over.base.path,
            )
        )
        for name in over.copied:
            kept = kept_name(over.base.path, name) if source else name
            staging.copy_file(over.base.path / kept, name)
        for name, data in over.rewritten.items():
            staging.write_bytes(name, data)
        recording = None
        if prepared.undo:
            writer = RecordWriter(staging.aside, resume=bool(staging.resumed))
            opened.callback(writer.close)
            recording = Recording(writer, plan, prepared.limit)
        streamed = stream(
            over,
            staging,
            threads=prepared.workers,
            limit=prepared.limit,
            device=prepared.device,
            advance=advance,
            runs=runs,
            recording=recording,
        )
        if source:
            source.check(streamed)
        if prepared.expected is not None:
            made = {name: digests.output for name, digests in streamed.digests.items()}
            _check_expected(path, prepared.expected, made)
        hashes = _sha256(staging.output, plan) if sha256 else {}
        receipt = make_receipt(prepared, streamed, names, staging.output, sha256=hashes)
        if recording is not None:
            told = finish_record(recording, receipt, source)
            told["file"] = companion(path, UNDO).name
            staging.adopt(told["file"], over.shards[0].name)
            receipt = replace(receipt, undo=told)
        receipt = replace(
            receipt,
            seconds=round(time.perf_counter() - started, 3),
            peak_memory=peak_bytes(),
        )
        staging.write_bytes(companion(path, RECEIPT).name, receipt.to_file())
        refuse_changed(over)
        if prepared.force:
            check_output(path, plan, True)  # what came meanwhile is not lost either
        staging.publish()
    return receipt


def _check_expected(out: Path, expected: Mapping[str, str], made: Mapping[str, str]) -> None:
    names = sorted({*expected, *made})
    if wrong := [name for name in names if expected.get(name) != made.get(name)]:
        raise ProofFailed(
            f"{out}: {', '.join(wrong)}: not the bytes that were expected; nothing was written"
        )


def _method(plan: Plan, number: int) -> str:
    """Of an adapter: its peft_type, or DoRA, which PEFT calls LoRA too."""
    operations = (op for edit in plan.edits.values() for op in edit.operations)
    directed = any(op.method == "dora" for op in operations if op.adapter == number)
    return "dora" if directed else plan.adapters[number].config["peft_type"].lower()


def make_receipt(
    prepared: Prepared,
    streamed: Streamed,
    names: tuple[str, Sequence[str]] | None,
    place: Path,
    sha256: dict[str, str],
) -> Receipt:
    """The receipt of what was streamed. `names`: base and adapters as the user gave them; `place`:
    the folder that the output's side files lie in."""
    plan, source = prepared.plan, prepared.source
    given = names or (str(plan.base.path), [str(a.path) for a in plan.adapters])
    digests = streamed.digests.items()
    base = {"path": _absolute(given[0]), "shards": {d.source: d.base for _, d in digests}}
    if source:
        base = {**source.record.manifest["base"]}
    return Receipt(
        infold=__version__,
        out=str(prepared.out),
        base=base,
        adapters=[
            {
                "path": _absolute(name),
                "method": _method(plan, number),
                "files": files,
            }
            for number, (name, files) in enumerate(zip(given[1], prepared.digests, strict=True))
        ],
        shards={name: d.output for name, d in digests},
        sha256=sha256,
        side_files=_side_files(plan, place),
        edits=_edits(plan, streamed),
        tensors=sum(len(shard.header.tensors) for shard in plan.shards),
        bytes=sum(shard.header.file_size for shard in plan.shards),
        edited_bytes=plan.edited_bytes,
        resumed_bytes=streamed.resumed,
        notes=[
            *plan.notes,
            *_there_already(prepared),
            *(source.notes() if source else ()),
            *rounding_notes(streamed.runs),
            *lost_updates(streamed.runs),
        ],
        conversion=None if plan.conversion is None else dict(plan.conversion),
        seconds=0.0,
        peak_memory=0,
        threads=prepared.workers,
        device=str(prepared.device),
    )


def _side_files(plan: Plan, place: Path) -> dict[str, str]:
    """Digests of the side files, by the names that the base has for them."""
    return {
        name: digest_of(safe_child(place, kept_name(place, name)))
        for name in sorted([*plan.copied, *plan.rewritten])
    }


def finish_record(recording: Recording, receipt: Receipt, source: Merged | None) -> dict[str, Any]:
    """Write what is left of the record. Returns what the receipt tells of it."""
    plan, writer, files = recording.plan, recording.writer, InputFiles(recording.plan.base)

    def base(name: str, block: Block) -> Tensor:
        if source:
            return source.base_block(files, name, block)
        return block_of(plan.base, files, name, block)

    try:
        recording.add_originals(base)
    finally:
        files.close()
    sides, copied = _base_sides(plan, source)
    origin = {"base": receipt.base, "adapters": receipt.adapters, "infold": __version__}
    inside = recording.finish(origin, receipt.shards, sides, copied)
    return {"file": UNDO, "bytes": writer.end, **inside, "blake3": digest_of(writer.path)}


def _base_sides(
    plan: Plan, source: Merged | None
) -> tuple[Iterator[tuple[str, bytes]], dict[str, str]]:
    """Of the base's side files those that a record keeps, one after the other, and the digests of
    those that the output has as they are."""
    restored = source.rewritten if source else {}

    def place(name: str) -> Path:
        folder = plan.base.path
        return safe_child(folder, kept_name(folder, name) if source else name)

    def read(name: str) -> bytes:
        path = place(name)
        with storage_errors(path):
            return restored[name] if name in restored else path.read_bytes()

    def size(name: str) -> int:
        return len(restored[name]) if name in restored else place(name).stat().st_size

    had = [name for name in plan.rewritten if name in restored or place(name).exists()]
    kept = smallest({name: size(name) for name in plan.copied})
    copied = {
        name: blake3(restored[name]).hexdigest() if name in restored else digest_of(place(name))
        for name in plan.copied
    }
    return ((name, read(name)) for name in (*had, *kept)), copied


def _there_already(prepared: Prepared) -> list[str]:
    """Notes on a base that is a merge itself, as its receipt tells, and on adapters that it has."""
    if prepared.source is not None:  # a swap takes them out
        return []
    base = prepared.plan.base.path
    try:
        receipt = read_receipt(base)
    except InfoldError:  # none, or none that tells
        return []
    told, first = receipt.get("adapters"), receipt.get("base")
    entries = [entry for entry in told if isinstance(entry, dict)] if isinstance(told, list) else []
    had = [entry.get("files") for entry in entries]
    notes = [
        f"{adapter.path} is in the base already, as the base's receipt tells, and its change is "
        "made once more (infold swap exchanges adapters)"
        for adapter, files in zip(prepared.plan.adapters, prepared.digests, strict=True)
        if files in had
    ]
    if entries and isinstance(first, dict):
        notes.append(
            f"{base} is a merge itself, so its weights are rounded a second time; all adapters "
            f"merged into {first.get('path')} at once are rounded once"
        )
    return notes


def _absolute(name: str) -> str:
    """A local path as it stays valid from elsewhere; a Hub id as it is."""
    return os.path.abspath(name) if os.path.exists(name) else name


def _identity(prepared: Prepared) -> str:
    """What an interrupted run must have been doing, for its pieces to be of use."""
    plan, adapters, source = prepared.plan, prepared.digests, prepared.source
    hasher = blake3(f"infold {__version__}\n".encode())
    # blocks may depend on more of the base than what their digests cover: norms, scales that follow
    beyond = plan.conversion is not None or any(
        METHODS[o.method].OBSERVES for edit in plan.edits.values() for o in edit.operations
    )
    for shard in (shard for base in plan.checkpoints for shard in base.shards):
        hasher.update(os.fsencode(shard.name) + blake3(shard.header.raw).digest())
        if beyond:
            hasher.update(repr(shard.header.stamp).encode())
    for output in plan.shards:
        hasher.update(blake3(output.header.raw).digest())
    hasher.update(repr([plan.copied, sorted(plan.rewritten.items())]).encode())
    for files in adapters:
        hasher.update(repr(sorted(files.items())).encode())
    hasher.update(repr([describe(edit) for edit in plan.edits.values()]).encode())
    hasher.update(repr([(edit.operations, edit.exponent) for edit in plan.edits.values()]).encode())
    hasher.update(repr([edit.source for edit in plan.edits.values()]).encode())
    hasher.update(repr(plan.conversion).encode())
    if prepared.undo:  # a record has blocks of one size
        hasher.update(repr([prepared.limit, source and source.record.identity]).encode())
    return hasher.hexdigest()


def _edits(plan: Plan, streamed: Streamed) -> list[dict[str, object]]:
    """Every edit, with the share of elements that rounding left as they were."""
    result = []
    for name, edit in plan.edits.items():
        run = streamed.runs[name]
        count = run.floats.rows * run.floats.columns
        error = measured_error(run)
        whole = name not in streamed.kept
        unchanged = round(1 - run.changed / count, 6) if count and whole else None
        entry = {**describe(edit), "unchanged": unchanged}
        if error is not None:  # nothing of the base's is left to compare with
            known = dict.fromkeys(error) if streamed.resumed else error
            entry |= {"unchanged": None, **known}
        if (loss := loss_of(run)) is not None:
            entry["rounding"] = loss.describe()
        result.append(entry)
    return result


def _sha256(folder: Path, plan: Plan) -> dict[str, str]:
    result = {}
    for shard in plan.shards:
        hasher = hashlib.sha256()
        with storage_errors(folder / shard.name), open(folder / shard.name, "rb") as file:
            while piece := file.read(1 << 20):
                hasher.update(piece)
        result[shard.name] = hasher.hexdigest()
    return result
