"""What a merge needs before it writes: the plan, and every check that can be made by then."""

from __future__ import annotations

import errno
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from infold.adapters import experts
from infold.checkpoint.adapter import KEPT, Adapter, open_adapter
from infold.checkpoint.files import digest_of
from infold.checkpoint.place import check_place
from infold.checkpoint.shards import (
    open_checkpoint,
)
from infold.checkpoint.staging import staging_folder
from infold.checkpoint.stamps import changes
from infold.disk import storage_errors
from infold.dtypes import TORCH_DTYPES
from infold.edit.threads import one_torch_thread, worker_count
from infold.errors import Refusal, StorageFailure
from infold.machine import device_of
from infold.merge.beside import side_sizes
from infold.merge.convert import block_elements, encoded_bytes
from infold.merge.options import Options
from infold.merge.recording import record_room, unkept
from infold.merge.undo import Merged
from infold.plan.build import plan_merge
from infold.plan.edits import Part, Plan
from infold.plan.output import placed
from infold.sizes import parse_bytes, plural

__all__ = [
    "DEFAULT_MEMORY",
    "Prepared",
    "block_size",
    "check",
    "check_output",
    "check_space",
    "digest_adapter",
    "open_plan",
    "prepare",
    "refuse_changed",
    "refuse_full",
]

DEFAULT_MEMORY = 1 << 30
_BLOCK = 1 << 20  # elements of a block: larger ones are not faster
_SMALLEST_BLOCK = 1 << 16
_CONVERTED = 104  # bytes of an element while codes are made of values and checked
_PER_WORKER = 10 << 20  # bytes of tiles and flags

PathLike = str | os.PathLike[str]


def open_plan(base: PathLike, adapters: Sequence[PathLike], convert: Options | None = None) -> Plan:
    """Open base and adapters, and decide every edit. convert: what to do where nothing folds."""
    choice, lossy = (None, False) if convert is None else (convert.choice(), convert.lossy)
    return plan_merge(open_checkpoint(base), [open_adapter(a) for a in adapters], choice, lossy)


@dataclass(frozen=True)
class Prepared:
    """A plan, and how it will be executed: nothing is left to be refused but by the disk."""

    plan: Plan
    out: Path
    force: bool
    device: torch.device
    workers: int
    limit: int  # elements of a block
    digests: tuple[dict[str, str], ...]  # of the adapters' files: BLAKE3 by name
    undo: bool = False  # whether a record is written
    source: Merged | None = None  # swap: what the base is restored from, block by block
    expected: Mapping[str, str] | None = None  # BLAKE3 by name, where the shards are known before
    step: int = 0  # in place: the bytes after which a step ends


def prepare(
    plan: Plan,
    out: PathLike,
    *,
    max_memory: int | str = DEFAULT_MEMORY,
    device: str = "cpu",
    threads: int | None = None,
    force: bool = False,
    undo: bool = False,
    source: Merged | None = None,
) -> Prepared:
    """Check device, output, memory, the adapters' values and the disk. Writes nothing.

    Raises Refusal or StorageFailure, as the merge would.
    """
    if not os.fspath(out):
        raise Refusal("--out is empty; is a variable of the command empty?")
    path = Path(os.path.abspath(out))
    plan = placed(plan, path)
    check_output(path, plan, force)
    where, workers, limit, digests = check(plan, max_memory, device, threads, undo, source)
    check_space(path, plan, undo)
    return Prepared(plan, path, force, where, workers, limit, digests, undo, source)


def check(
    plan: Plan,
    max_memory: int | str = DEFAULT_MEMORY,
    device: str = "cpu",
    threads: int | None = None,
    undo: bool = False,
    source: Merged | None = None,
) -> tuple[torch.device, int, int, tuple[dict[str, str], ...]]:
    """All of `prepare` that asks for no place: (device, workers, elements of a block, digests of
    the adapters)."""
    where = device_of(device)
    count, budget = worker_count(threads), parse_bytes(max_memory)
    if undo and (reasons := unkept(plan)):
        raise Refusal(reasons)
    fixed = source.limit if source else None
    workers, limit = block_size(plan, budget, count, where, threads is None, undo, fixed)
    return where, workers, limit, tuple(digest_adapter(adapter) for adapter in plan.adapters)


def check_output(out: Path, plan: Plan, force: bool, *, replaces: bool = True) -> None:
    """As `check_place`, for the inputs and the files of a plan."""
    inputs = [adapter.path for adapter in plan.adapters]
    for read in (plan.base, *([plan.original] if plan.original else [])):
        inputs += [read.path, *(shard.path for shard in read.shards)]
    coming = {*plan.copied, *plan.rewritten, *(shard.name for shard in plan.shards)}
    check_place(out, inputs, coming, force, replaces=replaces)


def refuse_changed(plan: Plan) -> None:
    """To be called when all is read and nothing is final: refuse where a file of the base or of an
    adapter is not the one that was opened. Nothing is read again for it."""
    shards = (shard for base in plan.checkpoints for shard in base.shards)
    stamps = {shard.path: shard.header.stamp for shard in shards}
    for adapter in plan.adapters:
        stamps |= adapter.stamps
    if reasons := [why for path, stamp in stamps.items() for why in changes(path, stamp)]:
        raise Refusal(reasons)


def block_size(
    plan: Plan,
    budget: int,
    workers: int,
    device: torch.device,
    fewer: bool,
    undo: bool = False,
    fixed: int | None = None,
    beside: int = 0,
) -> tuple[int, int]:
    """(workers, elements of a block), so that all workers together stay within the budget.

    `fewer`: the number of workers is ours to lower. On a GPU the budget is the host's. `undo`: a
    record is written or read; `fixed`: its blocks have this size; `beside`: bytes that are held for
    something else.
    """
    sizes, shared = sorted(_held_bytes(plan), reverse=True), _shared_bytes(plan) + beside
    # bytes an element takes at most: stored and computed, twice, and staged
    widest = 48 if undo else 20
    if plan.conversion is not None:
        widest = _CONVERTED
    needed = 0
    least = max(block_elements(plan), fixed or _SMALLEST_BLOCK)
    for count in range(workers, 0, -1) if fewer else (workers,):
        # each worker at an edit, one of its own not hashed yet
        parts = shared + sum(sizes[: 2 * count])
        room = ((budget - parts) // count - _PER_WORKER) // widest
        if room >= least:
            limit = max(least, min(_BLOCK, room)) if fixed is None else fixed
            if fixed is None and device.type != "cpu":
                limit = min(8 * limit, 8 * _BLOCK // count, max(least, room))
            return count, limit
        needed = parts + count * (_PER_WORKER + least * widest)
    raise Refusal(
        f"--max-memory: {_mib(budget)} is too little: this merge needs {-(-needed >> 20)} MiB "
        f"with --threads {1 if fewer else workers}"
    )


def _mib(count: int) -> str:
    return f"{count / (1 << 20):.4g} MiB" if count >= 1 << 20 else f"{count:,} bytes"


def _held_bytes(plan: Plan) -> Iterator[int]:
    """Memory that each edit takes beside its blocks; a module that is quantized again is one."""
    modules: dict[str, int] = {}
    for name, edit in plan.edits.items():
        if isinstance(edit.source, Part):
            weight = edit.source.values.tensor
            modules.setdefault(weight, _part_bytes(plan, name))
            modules[weight] += encoded_bytes(edit)
        else:
            yield _part_bytes(plan, name)
    yield from modules.values()


def _part_bytes(plan: Plan, name: str) -> int:
    """Memory of one edit's parts, as they are stored and as float64 factors."""
    total = 0
    for op in plan.edits[name].operations:
        for key in op.parts.values():
            info = plan.adapters[op.adapter].tensors[key]
            told, stored = op.settings, math.prod(info.shape)
            one = stored // max(told.experts, 1)
            made = one * max(1, min(told.experts, experts.KEPT))
            if told.expert >= 0:
                stored = made = one
            wide = 8 * told.slices if one * told.slices <= 4 << 20 else 0
            total += stored * TORCH_DTYPES[info.dtype].itemsize + made * wide
    return total


def _shared_bytes(plan: Plan) -> int:
    """Memory of what adapters keep for all experts that are weights of their own; one tensor more
    while it is read."""
    largest: dict[int, int] = {}
    for edit in plan.edits.values():
        for op in edit.operations:
            if op.settings.expert >= 0:
                info = plan.adapters[op.adapter].tensors[op.parts["lora_B"]]
                size = math.prod(info.shape) * TORCH_DTYPES[info.dtype].itemsize
                largest[op.adapter] = max(size, largest.get(op.adapter, 0))
    return (KEPT + 1) * sum(largest.values())


def digest_adapter(adapter: Adapter) -> dict[str, str]:
    """BLAKE3 of an adapter's files. Refuses NaN and inf, all of them at once."""
    bad = []
    with one_torch_thread():  # several would spin between the pieces, for ten times as long
        for key in adapter.tensors:
            count = 0
            for piece in adapter.pieces(key):
                if not math.isfinite(piece.sum().item()):  # mostly it is, and needs no second look
                    count += int((~torch.isfinite(piece)).sum())
            if count:
                bad.append(f"{adapter.path}: {key}: NaN or inf in {plural('element', count)}")
    if bad:
        raise Refusal([*bad, "the training diverged; nothing can be merged from this adapter"])
    files = (adapter.path / "adapter_config.json", adapter.weights)
    return {file.name: digest_of(file) for file in files}


def check_space(out: Path, plan: Plan, undo: bool = False) -> None:
    """undo: whether a record is written. Raises StorageFailure where there is not enough space, or
    `out` cannot be made."""
    parent = out.parent
    staged = staging_folder(out)
    with storage_errors(parent):
        while not parent.exists():
            parent = parent.parent
        if not parent.is_dir():
            raise StorageFailure(f"{parent}: is a file, so {out} cannot be made")
        if not os.access(parent, os.W_OK | os.X_OK):
            closed = os.statvfs(parent).f_flag & os.ST_RDONLY
            why = os.strerror(errno.EROFS if closed else errno.EACCES)
            raise StorageFailure(f"{staged}: {why}")
    needed = plan.nbytes + sum(side_sizes(plan.base, plan.copied).values())
    needed += sum(map(len, plan.rewritten.values()))
    record = record_room(plan) if undo else 0
    with storage_errors(staged), suppress(FileNotFoundError):
        # an interrupted run has part of it already
        needed -= sum(f.stat().st_blocks * 512 for f in staged.rglob("*") if f.is_file())
    refuse_full(out, parent, needed + record, record)


def refuse_full(out: Path, home: Path, needed: int, record: int) -> None:
    """Raises StorageFailure where the disk of the folder `home` has less space than is needed.
    record: how much of it is estimated for an undo record."""
    with storage_errors(home):
        free = shutil.disk_usage(home).free
    if needed > free:
        told = f", about {record:,} of them for the undo record" if record else ""
        raise StorageFailure(
            f"{out}: needs {needed:,} bytes{told}, but {home} has only {free:,} free"
        )
