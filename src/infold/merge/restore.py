"""`infold undo` and `infold swap`, each to a new folder."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from infold.checkpoint.adapter import open_adapter
from infold.checkpoint.shards import is_lone, kept_name
from infold.checkpoint.staging import Staging
from infold.edit.threads import one_torch_thread, worker_count
from infold.errors import Refusal
from infold.machine import device_of, peak_bytes
from infold.merge.prepare import (
    DEFAULT_MEMORY,
    Prepared,
    block_size,
    check_output,
    check_space,
    prepare,
)
from infold.merge.receipt import Receipt
from infold.merge.run import execute
from infold.merge.stream import Streamed, stream
from infold.merge.undo import Merged, open_merged
from infold.plan.build import plan_edit
from infold.plan.output import placed
from infold.sizes import parse_bytes
from infold.version import __version__

__all__ = ["Undone", "check_restored", "open_swap", "swap_checkpoint", "undo_checkpoint", "undone"]

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Undone:
    """The result of `infold.undo`. Sizes are bytes.

    out: the restored base's absolute path. shards: BLAKE3 of its shards, which are those of the
    receipt. side_files: its other files. tensors: those that were restored, of all; the others were
    copied. bytes: of its shards. resumed_bytes: left by an interrupted run, checked and kept.
    seconds: from the first byte written to the last. peak_memory: resident, of the whole process.
    notes: on side files that were changed or lost in the merged folder.
    """

    out: str
    shards: dict[str, str]
    side_files: list[str]
    restored: int
    tensors: int
    bytes: int
    resumed_bytes: int
    seconds: float
    peak_memory: int
    notes: list[str]


def undo_checkpoint(
    folder: PathLike,
    out: PathLike,
    *,
    max_memory: int | str = DEFAULT_MEMORY,
    device: str = "cpu",
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Undone:
    """Restore the base of a merged folder or GGUF file, byte for byte, at `out`.

    Raises Refusal or CorruptFile for a folder that cannot be undone, before anything is written
    but for shards that were changed after the merge: that shows when they have been read, and then
    nothing is left. StorageFailure for the disk's refusals.
    """
    started = time.perf_counter()
    if not os.fspath(out):
        raise Refusal("--out is empty; is a variable of the command empty?")
    path = Path(os.path.abspath(out))
    where = device_of(device)
    merged = open_merged(Path(folder))
    with merged.record, one_torch_thread():
        plan = placed(merged.undo_plan(), path)
        check_output(path, plan, False, replaces=False)
        count, budget = worker_count(threads), parse_bytes(max_memory)
        workers, limit = block_size(plan, budget, count, where, threads is None, True, merged.limit)
        check_space(path, plan)
        total = sum(shard.header.file_size for shard in plan.shards)
        done = 0

        def advance(more: int) -> None:
            nonlocal done
            done += more
            if progress is not None:
                progress(done, total)

        identity = blake3(f"infold {__version__} undo {merged.record.identity}".encode())
        lone = is_lone(path)
        like = plan.base.shards[0].path if lone else plan.base.path
        with Staging(path, identity.hexdigest(), False, lone=lone, like=like) as staging:
            for name in plan.copied:
                staging.copy_file(plan.base.path / kept_name(plan.base.path, name), name)
            for name, data in plan.rewritten.items():
                staging.write_bytes(name, data)
            streamed = stream(
                plan,
                staging,
                threads=workers,
                limit=limit,
                device=where,
                advance=advance,
                runs=merged.undo_runs(where),
            )
            check_restored(merged, streamed)
            staging.publish()
        return undone(merged, path, streamed, started)


def check_restored(merged: Merged, streamed: Streamed) -> None:
    """Refuse where the shards that were read or made have not the digests of the merge."""
    merged.check(streamed)
    wrong = [
        f"{merged.checkpoint.home / found.source}: what is restored has the BLAKE3 {found.output}, "
        f"the base had {merged.base_digests.get(found.source)}"
        for found in streamed.digests.values()
        if found.output != merged.base_digests.get(found.source)
    ]
    if wrong:
        raise Refusal([*wrong, "the record was not made by this infold's arithmetic"])


def undone(merged: Merged, path: Path, streamed: Streamed, started: float) -> Undone:
    base = merged.base
    return Undone(
        out=str(path),
        shards={name: digests.output for name, digests in streamed.digests.items()},
        side_files=sorted([*merged.copied, *merged.rewritten]),
        restored=len(merged.edits) + len(merged.kept),
        tensors=len(base.where),
        bytes=base.nbytes,
        resumed_bytes=streamed.resumed,
        seconds=round(time.perf_counter() - started, 3),
        peak_memory=peak_bytes(),
        notes=merged.notes(),
    )


def open_swap(
    folder: PathLike,
    adapters: Sequence[PathLike],
    out: PathLike,
    *,
    max_memory: int | str = DEFAULT_MEMORY,
    device: str = "cpu",
    threads: int | None = None,
    force: bool = False,
    lossy: bool = False,
) -> Prepared:
    """Check all that a swap needs. Writes nothing. The caller closes `source.record`."""
    merged = open_merged(Path(folder))
    try:
        merged.check_swap()
        opened = [open_adapter(adapter) for adapter in adapters]
        plan = plan_edit(merged.base, opened, lossy, merged.instead)
        return prepare(
            plan, out, max_memory=max_memory, device=device, threads=threads, force=force,
            undo=True, source=merged,
        )  # fmt: skip
    except BaseException:
        merged.record.close()
        raise


def swap_checkpoint(
    prepared: Prepared,
    *,
    progress: Callable[[int, int], None] | None = None,
    names: Sequence[str] | None = None,
) -> Receipt:
    """Write what merging the base with the new adapters would, in one pass over the merged folder.

    Raises as `execute` does, and Refusal where the folder was changed after it was merged.
    """
    source = prepared.source
    assert source is not None
    given = names or [str(adapter.path) for adapter in prepared.plan.adapters]
    with source.record:
        base = str(source.record.manifest["base"]["path"])
        return execute(prepared, progress=progress, names=(base, given))
