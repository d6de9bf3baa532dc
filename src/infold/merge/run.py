"""The merge from its arguments to its receipt.

`prepare` checks all that can be checked before the first byte is written; `execute` writes.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import re
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor

from infold.checkpoint.adapter import Adapter, open_adapter
from infold.checkpoint.files import read_json, safe_child
from infold.checkpoint.inputs import InputFiles
from infold.checkpoint.record import UNDO, RecordWriter
from infold.checkpoint.shards import (
    JOURNAL,
    RECEIPT,
    companion,
    is_lone,
    kept_name,
    open_checkpoint,
    read_receipt,
)
from infold.checkpoint.staging import Staging, storage_errors
from infold.dtypes import TORCH_DTYPES
from infold.edit.blocks import Block
from infold.edit.threads import one_torch_thread, usual_threads
from infold.errors import InfoldError, ProofFailed, Refusal, StorageFailure
from infold.merge.convert import block_elements, encoded_bytes, lost_updates, measured_error
from infold.merge.losses import loss_of, rounding_notes
from infold.merge.options import Options
from infold.merge.receipt import Receipt
from infold.merge.recording import Recording, block_of
from infold.merge.stream import Streamed, stream
from infold.merge.undo import Merged
from infold.plan.build import plan_merge
from infold.plan.edits import Part, Plan, describe
from infold.plan.output import placed
from infold.sizes import parse_bytes
from infold.version import __version__

__all__ = [
    "DEFAULT_MEMORY",
    "Prepared",
    "block_size",
    "check",
    "check_output",
    "check_space",
    "digest_adapter",
    "execute",
    "finish_record",
    "make_receipt",
    "merge_checkpoint",
    "open_device",
    "open_plan",
    "peak_memory",
    "prepare",
]

DEFAULT_MEMORY = 1 << 30
_BLOCK = 1 << 20  # elements of a block: larger ones are not faster
_SMALLEST_BLOCK = 1 << 16
_CONVERTED = 96  # bytes of an element while codes are made of values and checked
_PER_WORKER = 6 << 20  # bytes of tiles and flags

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
    check_space(path, plan)
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
    where = open_device(device)
    workers = threads if threads is not None else usual_threads()
    if workers < 1:
        raise Refusal(f"--threads {workers}: at least 1")
    budget = parse_bytes(max_memory)
    if undo and plan.conversion is not None:
        raise Refusal(
            f"--undo does not go with --{plan.conversion['mode']}: the quantized weights that it "
            "replaces would have to be kept whole; keep the base"
        )
    fixed = source.limit if source else None
    workers, limit = block_size(plan, budget, workers, where, threads is None, undo, fixed)
    return where, workers, limit, tuple(digest_adapter(adapter) for adapter in plan.adapters)


def merge_checkpoint(
    plan: Plan,
    out: PathLike,
    *,
    max_memory: int | str = DEFAULT_MEMORY,
    device: str = "cpu",
    threads: int | None = None,
    force: bool = False,
    sha256: bool = False,
    progress: Callable[[int, int], None] | None = None,
    names: tuple[str, Sequence[str]] | None = None,
    undo: bool = False,
) -> Receipt:
    """`prepare` and `execute`."""
    prepared = prepare(
        plan, out, max_memory=max_memory, device=device, threads=threads, force=force, undo=undo
    )
    return execute(prepared, sha256=sha256, progress=progress, names=names)


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
            Staging(path, _identity(prepared), prepared.force, lone=lone)
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
        receipt = make_receipt(prepared, streamed, names, sha256=hashes)
        if recording is not None:
            told = finish_record(recording, receipt, source)
            told["file"] = companion(path, UNDO).name
            staging.adopt(told["file"])
            receipt = replace(receipt, undo=told)
        receipt = replace(
            receipt,
            seconds=round(time.perf_counter() - started, 3),
            peak_memory=peak_memory(),
        )
        staging.write_bytes(companion(path, RECEIPT).name, receipt.to_file())
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


def make_receipt(
    prepared: Prepared,
    streamed: Streamed,
    names: tuple[str, Sequence[str]] | None,
    sha256: dict[str, str],
) -> Receipt:
    """The receipt of what was streamed. `names`: base and adapters as the user gave them."""
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
                "method": adapter.config["peft_type"].lower(),
                "files": files,
            }
            for name, adapter, files in zip(given[1], plan.adapters, prepared.digests, strict=True)
        ],
        shards={name: d.output for name, d in digests},
        sha256=sha256,
        side_files=sorted([*plan.copied, *plan.rewritten]),
        edits=_edits(plan, streamed),
        tensors=sum(len(shard.header.tensors) for shard in plan.shards),
        bytes=sum(shard.header.file_size for shard in plan.shards),
        edited_bytes=plan.edited_bytes,
        resumed_bytes=streamed.resumed,
        notes=[*plan.notes, *rounding_notes(streamed.runs), *lost_updates(streamed.runs)],
        conversion=None if plan.conversion is None else dict(plan.conversion),
        seconds=0.0,
        peak_memory=0,
        threads=prepared.workers,
        device=str(prepared.device),
    )


def finish_record(recording: Recording, receipt: Receipt, source: Merged | None) -> dict[str, Any]:
    """Write what is left of the record. Returns what the receipt tells of it."""
    plan, writer, files = recording.plan, recording.writer, InputFiles()

    def base(name: str, block: Block) -> Tensor:
        if source:
            return source.base_block(files, name, block)
        return block_of(plan.base, files, name, block)

    try:
        recording.add_originals(base)
    finally:
        files.close()
    had = [name for name in plan.rewritten if source or (plan.base.path / name).exists()]
    if source:
        sides = source.sides(had)
    else:
        sides = {name: safe_child(plan.base.path, name).read_bytes() for name in had}
    origin = {"base": receipt.base, "adapters": receipt.adapters, "infold": __version__}
    recording.finish(origin, receipt.shards, sides, source.sides_digests(plan) if source else None)
    hasher = blake3()
    with storage_errors(writer.path), open(writer.path, "rb") as file:
        while data := file.read(1 << 20):
            hasher.update(data)
    return {"file": UNDO, "bytes": writer.end, "blake3": hasher.hexdigest()}


def _absolute(name: str) -> str:
    """A local path as it stays valid from elsewhere; a Hub id as it is."""
    return os.path.abspath(name) if os.path.exists(name) else name


def open_device(name: str) -> torch.device:
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", name):
        raise Refusal(f"--device {name}: cpu, cuda or cuda:N, with the number of a GPU")
    if name == "cpu":
        return torch.device(name)
    if not torch.cuda.is_available():
        raise Refusal(f"--device {name}: this PyTorch sees no CUDA device; leave the option out")
    found = torch.device(name)
    if found.index is not None and found.index >= torch.cuda.device_count():
        raise Refusal(f"--device {name}: there are only {torch.cuda.device_count()} CUDA devices")
    return found


def check_output(out: Path, plan: Plan, force: bool) -> None:
    """The output must be a new name, or with force an old output, and not lie in an input."""
    inputs = [plan.base.path, *(adapter.path for adapter in plan.adapters)]
    inputs += [shard.path for shard in plan.base.shards]
    real = out.resolve()
    for given in inputs:
        other = given.resolve()
        if real == other or real in other.parents or (other in real.parents and other.is_dir()):
            raise Refusal(f"{out}: lies in or around the input {given}; choose another place")
    if not os.path.lexists(out):
        return
    if is_lone(out) and out.is_file() and not out.is_symlink():
        _check_file(out, force)
        return
    if out.is_symlink() or not out.is_dir():
        kind = "a link" if out.is_symlink() else "a file"
        raise Refusal(
            f"{out}: exists already and is {kind}, which --force does not replace; choose "
            "another name"
        )
    foreign = _foreign(out, plan)
    if not force:
        way = "" if foreign else ", or replace it with --force"
        raise Refusal(f"{out}: exists already; choose another name{way}")
    if foreign:
        raise Refusal(foreign)


def _check_file(out: Path, force: bool) -> None:
    """An output that exists, and is a single file, must be an old output, and be replaced."""
    if os.path.lexists(companion(out, JOURNAL)):
        raise Refusal(
            f"{out}: was left in the middle of an edit in place; `infold inspect {out}` finishes it"
        )
    told: Any = None
    with suppress(InfoldError):  # none, or a broken one
        told = read_receipt(out)
    mine = isinstance(told, dict) and out.name in (told.get("shards") or ())
    if not force:
        way = ", or replace it with --force" if mine else ""
        raise Refusal(f"{out}: exists already; choose another name{way}")
    if not mine:
        raise Refusal(
            f"{out}: {companion(out, RECEIPT).name} is not beside it, so it is no output of "
            "infold, and --force does not replace it; choose another name, or remove it yourself"
        )


def _foreign(out: Path, plan: Plan) -> list[str]:
    """What of a folder neither an earlier merge wrote nor this one will: it would be lost."""
    found = []

    def unreadable(error: OSError) -> None:
        raise StorageFailure(f"{error.filename}: {error.strerror}") from error

    for folder, folders, files in os.walk(out, onerror=unreadable):
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        found += [os.path.relpath(os.path.join(folder, name), out) for name in [*files, *links]]
    if not found:
        return []
    if RECEIPT not in found:
        return [
            f"{out}: holds no {RECEIPT}, so it is no output of infold, and --force does not "
            "replace it; choose another name, or remove it yourself"
        ]
    known = {RECEIPT, UNDO, *plan.copied, *plan.rewritten, *(shard.name for shard in plan.shards)}
    with suppress(InfoldError):  # a broken receipt tells of no file
        receipt = read_json(out / RECEIPT)
        told = receipt if isinstance(receipt, dict) else {}
        for field in ("shards", "side_files"):
            names: Any = told.get(field)
            known |= {name for name in names or () if isinstance(name, str)}
    strange = sorted(name for name in found if name not in known)
    reasons = [f"{out / name}: neither the base's nor infold's" for name in strange]
    if reasons:
        reasons.insert(
            0,
            f"{out}: holds {len(strange)} of your own files, so --force does not replace it; move "
            "them elsewhere, or choose another name",
        )
    return reasons


def block_size(
    plan: Plan,
    budget: int,
    workers: int,
    device: torch.device,
    fewer: bool,
    undo: bool = False,
    fixed: int | None = None,
) -> tuple[int, int]:
    """(workers, elements of a block), so that all workers together stay within the budget.

    `fewer`: the number of workers is ours to lower. On a GPU the budget is the host's. `undo`: a
    record is written or read; `fixed`: its blocks have this size.
    """
    sizes = sorted(_held_bytes(plan), reverse=True)
    widest = 40 if undo else 12  # bytes an element takes at most: stored, computed, staged
    if plan.conversion is not None:
        widest = _CONVERTED
    needed = 0
    least = max(block_elements(plan), min(_BLOCK, fixed) if fixed else _SMALLEST_BLOCK)
    for count in range(workers, 0, -1) if fewer else (workers,):
        parts = sum(sizes[: count + 1])  # each worker can be at an edit of its own
        room = ((budget - parts) // count - _PER_WORKER) // widest
        if room >= least:
            limit = max(least, min(_BLOCK, room)) if fixed is None else fixed
            if fixed is None and device.type != "cpu":
                limit = min(8 * limit, 8 * _BLOCK // count)
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
            count = math.prod(info.shape)
            wide = 8 * op.settings.slices if count * op.settings.slices <= 4 << 20 else 0
            total += count * (TORCH_DTYPES[info.dtype].itemsize + wide)
    return total


def digest_adapter(adapter: Adapter) -> dict[str, str]:
    """BLAKE3 of an adapter's files. Refuses NaN and inf, all of them at once."""
    bad = []
    for key in adapter.tensors:
        count = 0
        for piece in adapter.pieces(key):
            if not math.isfinite(piece.sum().item()):  # most often it is, and needs no second look
                count += int((~torch.isfinite(piece)).sum())
        if count:
            bad.append(f"{adapter.path}: {key}: {count} elements are NaN or inf")
    if bad:
        raise Refusal([*bad, "the training diverged; nothing can be merged from this adapter"])
    digests = {}
    for file in (adapter.path / "adapter_config.json", adapter.weights):
        hasher = blake3()
        with storage_errors(file), open(file, "rb") as stream_:
            while data := stream_.read(1 << 20):
                hasher.update(data)
        digests[file.name] = hasher.hexdigest()
    return digests


def check_space(out: Path, plan: Plan) -> None:
    parent = out.parent
    staged = out.parent / f".{out.name}.infold"
    with storage_errors(parent):
        while not parent.exists():
            parent = parent.parent
        if not parent.is_dir():
            raise StorageFailure(f"{parent}: is a file, so {out} cannot be made")
        if not os.access(parent, os.W_OK | os.X_OK):
            closed = os.statvfs(parent).f_flag & os.ST_RDONLY
            why = os.strerror(errno.EROFS if closed else errno.EACCES)
            raise StorageFailure(f"{staged}: {why}")
        free = shutil.disk_usage(parent).free
        side = sum((plan.base.path / name).stat().st_size for name in plan.copied)
    needed = plan.nbytes + side
    with suppress(FileNotFoundError):  # an interrupted run has part of it already
        needed -= sum(f.stat().st_blocks * 512 for f in staged.rglob("*") if f.is_file())
    if needed > free:
        raise StorageFailure(f"{out}: needs {needed:,} bytes, but {parent} has only {free:,} free")


def _identity(prepared: Prepared) -> str:
    """What an interrupted run must have been doing, for its pieces to be of use."""
    plan, adapters, source = prepared.plan, prepared.digests, prepared.source
    hasher = blake3(f"infold {__version__}\n".encode())
    for shard in plan.base.shards:
        hasher.update(os.fsencode(shard.name) + blake3(shard.header.raw).digest())
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
        unchanged = round(1 - run.changed / count, 6) if count and not streamed.resumed else None
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


def peak_memory() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
