"""The merge from its arguments to its receipt."""

from __future__ import annotations

import hashlib
import math
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from blake3 import blake3

from infold.checkpoint.adapter import Adapter, open_adapter
from infold.checkpoint.shards import RECEIPT, open_checkpoint
from infold.checkpoint.staging import Staging, storage_errors
from infold.dtypes import TORCH_DTYPES
from infold.edit.threads import one_torch_thread, usual_threads
from infold.errors import Refusal, StorageFailure
from infold.merge.receipt import Receipt
from infold.merge.stream import Streamed, stream
from infold.plan.build import plan_merge
from infold.plan.edits import Plan, describe
from infold.version import __version__

__all__ = ["DEFAULT_MEMORY", "merge_checkpoint", "open_plan"]

DEFAULT_MEMORY = 1 << 30
_BLOCK = 1 << 20  # elements of a block: larger ones are not faster
_SMALLEST_BLOCK = 1 << 16
_PER_WORKER = 6 << 20  # bytes of tiles and flags

PathLike = str | os.PathLike[str]


def open_plan(base: PathLike, adapters: Sequence[PathLike]) -> Plan:
    """Open base and adapters, and decide every edit."""
    return plan_merge(open_checkpoint(base), [open_adapter(a) for a in adapters])


def merge_checkpoint(
    plan: Plan,
    out: PathLike,
    *,
    max_memory: int = DEFAULT_MEMORY,
    device: str = "cpu",
    threads: int | None = None,
    force: bool = False,
    sha256: bool = False,
    progress: Callable[[int, int], None] | None = None,
    names: tuple[str, Sequence[str]] | None = None,
) -> Receipt:
    """Execute a plan. `progress` is called with (bytes done, bytes in all); `names` are base and
    adapters as the user gave them, for the receipt.

    Raises Refusal for bad input, StorageFailure for the disk's refusals; then nothing is left.
    """
    with one_torch_thread():
        return _merge(plan, out, max_memory, device, threads, force, sha256, progress, names)


def _merge(
    plan: Plan,
    out: PathLike,
    max_memory: int,
    device: str,
    threads: int | None,
    force: bool,
    sha256: bool,
    progress: Callable[[int, int], None] | None,
    names: tuple[str, Sequence[str]] | None,
) -> Receipt:
    started = time.perf_counter()
    path = Path(os.path.abspath(out))
    where = _device(device)
    workers = threads if threads is not None else usual_threads()
    if workers < 1:
        raise Refusal(f"--threads {workers}: at least 1")
    _check_output(path, plan, force)
    workers, limit = _block_size(plan, max_memory, workers, where, threads is None)
    adapters = [_digest(adapter) for adapter in plan.adapters]
    _check_space(path, plan)

    done = 0
    total = sum(shard.header.file_size for shard in plan.shards)

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    with Staging(path, _identity(plan, adapters), force) as staging:
        for name in plan.copied:
            staging.copy_file(plan.base.path / name, name)
        for name, data in plan.rewritten.items():
            staging.write_bytes(name, data)
        streamed = stream(
            plan, staging, threads=workers, limit=limit, device=where, advance=advance
        )
        hashes = _sha256(staging.output, plan) if sha256 else {}
        given = names or (str(plan.base.path), [str(a.path) for a in plan.adapters])
        receipt = Receipt(
            infold=__version__,
            out=str(path),
            base={
                "path": _absolute(given[0]),
                "shards": {name: d.base for name, d in streamed.digests.items()},
            },
            adapters=[
                {
                    "path": _absolute(name),
                    "method": adapter.config["peft_type"].lower(),
                    "files": files,
                }
                for name, adapter, files in zip(given[1], plan.adapters, adapters, strict=True)
            ],
            shards={name: d.output for name, d in streamed.digests.items()},
            sha256=hashes,
            edits=_edits(plan, streamed),
            tensors=sum(len(shard.header.tensors) for shard in plan.shards),
            bytes=total,
            edited_bytes=plan.edited_bytes,
            resumed_bytes=streamed.resumed,
            notes=list(plan.notes),
            seconds=round(time.perf_counter() - started, 3),
            peak_memory=_peak_memory(),
            threads=workers,
            device=device,
        )
        staging.write_bytes(RECEIPT, receipt.to_json().encode(errors="backslashreplace"))
        staging.publish()
    return receipt


def _absolute(name: str) -> str:
    """A local path as it stays valid from elsewhere; a Hub id as it is."""
    return os.path.abspath(name) if os.path.exists(name) else name


def _device(name: str) -> torch.device:
    if name not in ("cpu", "cuda") and not name.startswith("cuda:"):
        raise Refusal(f"--device {name}: cpu or cuda")
    if name != "cpu" and not torch.cuda.is_available():
        raise Refusal(f"--device {name}: this PyTorch sees no CUDA device; leave the option out")
    return torch.device(name)


def _check_output(out: Path, plan: Plan, force: bool) -> None:
    """The output must be a new name, or with force an old output, and not lie in an input."""
    inputs = [plan.base.path, *(adapter.path for adapter in plan.adapters)]
    real = out.resolve()
    for given in inputs:
        other = given.resolve()
        if real == other or real in other.parents or (other in real.parents and other.is_dir()):
            raise Refusal(f"{out}: lies in or around the input {given}; choose another place")
    if not os.path.lexists(out):
        return
    if not force:
        raise Refusal(f"{out}: exists already; choose another name, or replace it with --force")
    if out.is_symlink() or not out.is_dir():
        raise Refusal(f"{out}: is not a folder, so --force does not replace it")
    holds_model = (out / RECEIPT).exists() or any(out.glob("*.safetensors"))
    if any(out.iterdir()) and not holds_model:
        raise Refusal(f"{out}: holds no model, so --force does not replace it; remove it yourself")


def _block_size(
    plan: Plan, budget: int, workers: int, device: torch.device, fewer: bool
) -> tuple[int, int]:
    """(workers, elements of a block), so that all workers together stay within the budget.

    `fewer`: the number of workers is ours to lower. On a GPU the budget is the host's.
    """
    sizes = sorted((_part_bytes(plan, name) for name in plan.edits), reverse=True)
    widest = 12  # bytes an element takes at most: stored, computed, staged
    needed = 0
    for count in range(workers, 0, -1) if fewer else (workers,):
        parts = sum(sizes[: count + 1])  # each worker can be at an edit of its own
        limit = min(_BLOCK, ((budget - parts) // count - _PER_WORKER) // widest)
        if limit >= _SMALLEST_BLOCK:
            return count, limit if device.type == "cpu" else min(8 * limit, 8 * _BLOCK // count)
        needed = parts + count * (_PER_WORKER + _SMALLEST_BLOCK * widest)
    raise Refusal(
        f"--max-memory {budget >> 20} MiB is too little: this merge needs {-(-needed >> 20)} MiB "
        f"with {1 if fewer else workers} threads"
    )


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


def _digest(adapter: Adapter) -> dict[str, str]:
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


def _check_space(out: Path, plan: Plan) -> None:
    parent = out.parent
    with storage_errors(parent):
        while not parent.exists():
            parent = parent.parent
        free = shutil.disk_usage(parent).free
        side = sum((plan.base.path / name).stat().st_size for name in plan.copied)
    needed = plan.nbytes + side
    staged = out.parent / f".{out.name}.infold"
    with suppress(FileNotFoundError):  # an interrupted run has part of it already
        needed -= sum(f.stat().st_blocks * 512 for f in staged.rglob("*") if f.is_file())
    if needed > free:
        raise StorageFailure(f"{out}: needs {needed:,} bytes, but {parent} has only {free:,} free")


def _identity(plan: Plan, adapters: list[dict[str, str]]) -> str:
    """What an interrupted run must have been doing, for its pieces to be of use."""
    hasher = blake3(f"infold {__version__}\n".encode())
    for shard in plan.base.shards:
        hasher.update(os.fsencode(shard.name) + blake3(shard.header.raw).digest())
    for output in plan.shards:
        hasher.update(blake3(output.header.raw).digest())
    hasher.update(repr([plan.copied, sorted(plan.rewritten.items())]).encode())
    for files in adapters:
        hasher.update(repr(sorted(files.items())).encode())
    hasher.update(repr([describe(edit) for edit in plan.edits.values()]).encode())
    hasher.update(repr([edit.operations for edit in plan.edits.values()]).encode())
    return hasher.hexdigest()


def _edits(plan: Plan, streamed: Streamed) -> list[dict[str, object]]:
    """Every edit, with the share of elements that rounding left as they were."""
    result = []
    for name, edit in plan.edits.items():
        count = math.prod(edit.shape)
        changed = streamed.runs[name].changed
        unchanged = round(1 - changed / count, 6) if count and not streamed.resumed else None
        result.append({**describe(edit), "unchanged": unchanged})
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


def _peak_memory() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
