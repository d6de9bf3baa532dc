"""From a merged folder and its record back to the base, or on to another merge of that base."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infold.adapters.exact import LEAF
from infold.checkpoint.adapter import Adapter
from infold.checkpoint.files import digest_of, exists, read_json, safe_child
from infold.checkpoint.gguf import gguf_header_of
from infold.checkpoint.inputs import InputFiles
from infold.checkpoint.record import SEEN, UNDO, Record, open_record
from infold.checkpoint.safetensors import header_of, parse_json
from infold.checkpoint.shards import (
    INDEX,
    RECEIPT,
    Checkpoint,
    Shard,
    companion,
    is_lone,
    misnamed,
    open_checkpoint,
    read_receipt,
    refuse_unfinished,
    renamed,
    without_owner,
)
from infold.disk import storage_errors
from infold.dtypes import SCALE_DTYPES
from infold.edit.blocks import Block, cut
from infold.edit.residual import ORIGINAL, unpack
from infold.edit.steps import Workspace
from infold.errors import CorruptFile, InfoldError, Refusal
from infold.formats import floats_of
from infold.merge.apply import EditRun, Read, Run
from infold.merge.beside import Beside, read_beside
from infold.merge.manifest import ODD, as_told, read_adapter, read_edit
from infold.merge.recording import block_of, undone_by_residual
from infold.merge.stream import Streamed
from infold.merge.whole import WholeRun
from infold.plan.edits import Amended, BaseTensor, Decoded, Edit, OutputShard, Plan

__all__ = ["Merged", "open_merged"]


@dataclass(frozen=True)
class Merged:
    """A merged folder with its record: what it was made of, and how to get back."""

    checkpoint: Checkpoint  # as it lies there
    base: Checkpoint  # what it was: the base's headers and config, over the same folder
    record: Record
    receipt: Mapping[str, Any]
    adapters: tuple[Adapter, ...]  # whose tensors lie in the record
    edits: Mapping[str, Edit]  # that were done to the base's tensors
    beside: Beside  # the base's side files
    limit: int  # elements of a block
    base_digests: Mapping[str, str]
    digests: Mapping[str, str]
    kept: Mapping[str, int]  # tensors of the base that lie in the record as a whole: their files

    @property
    def path(self) -> Path:
        return self.checkpoint.path

    @property
    def instead(self) -> str:
        """How to do what a swap cannot, for messages."""
        return f": restore the base (infold undo {self.path} --out BASE), and merge into that"

    @cached_property
    def _numbers(self) -> Mapping[str, int]:
        return {name: number for number, name in enumerate(self.edits)}

    def number(self, tensor: str) -> int:
        return self._numbers[tensor]

    def observed(self, tensor: str) -> Callable[[int], Tensor] | None:
        """What the steps on a tensor had observed of it, by their numbers; None where that is not
        in the record, since they can observe it again."""
        if not undone_by_residual(self.edits[tensor]):
            return None
        number = self.number(tensor) | SEEN

        def recall(step: int) -> Tensor:
            _, data = self.record.payload(number, step)
            return torch.frombuffer(bytearray(data), dtype=torch.float64)

        return recall

    def undo_plan(self, *, in_place: bool = False) -> Plan:
        """The way back, as a plan over what lies there. The shards have the base's names, or in
        place those that they have: a merge can give a single file another one."""
        there = [shard.name for shard in self.checkpoint.shards]
        names = there if in_place else sorted(self.record.manifest["base"]["shards"])
        shards = tuple(
            OutputShard(names[number], was.header, number, was.header.raw == now.header.raw)
            for number, (was, now) in enumerate(
                zip(self.base.shards, self.checkpoint.shards, strict=True)
            )
        )
        edits = {name: self.undo_edit(name) for name in self.edits}
        edits |= {name: self._kept_edit(name) for name in self.kept}
        return Plan(self.checkpoint, self.adapters, edits, shards, self.rewritten, self.copied, ())

    def undo_edit(self, name: str) -> Edit:
        info = self.base.info(name)
        return Edit(name, BaseTensor(name), info.dtype, info.shape, ())

    def undo_runs(self, device: torch.device) -> dict[str, Run]:
        runs: dict[str, Run] = {name: UndoRun(self, name, device) for name in self.edits}
        for name, number in self.kept.items():
            count = self.base.info(name).nbytes
            runs[name] = WholeRun(self._kept_edit(name), count, partial(self.record.piece, number))
        return runs

    def _kept_edit(self, name: str) -> Edit:
        """Of a tensor that is taken from the record; nothing of what lies there is needed."""
        info = self.base.info(name)
        return Edit(name, Amended(name, b""), info.dtype, info.shape, ())

    def check_swap(self, plan: Plan | None = None) -> None:
        """Refuse where an edit needs parts of the base that are no floats, or has replaced them."""
        edits = () if plan is None else plan.edits.values()
        if self.kept or any(isinstance(edit.source, Amended | Decoded) for edit in edits):
            converted = self.receipt.get("conversion") is not None
            what = "converted weights" if converted else "scales that are quantized themselves"
            raise Refusal(
                f"{self.path}: {what} cannot be swapped; restore the base with `infold undo`, and "
                "merge the adapters into it"
            )

    def swap_plan(self, plan: Plan) -> Plan:
        """A merge of the base, as a plan over what lies there."""
        self.check_swap(plan)
        shards = tuple(
            replace(s, same_layout=s.header.raw == self.checkpoint.shards[s.source].header.raw)
            for s in plan.shards
        )
        edits = {
            name: plan.edits.get(name) or self.undo_edit(name)
            for shard in plan.shards
            for name in shard.header.tensors
            if name in plan.edits or name in self.edits
        }
        restored = {n: data for n, data in self.rewritten.items() if n in plan.copied}
        return replace(
            plan,
            base=self.checkpoint,
            edits=edits,
            shards=shards,
            rewritten={**restored, **plan.rewritten},
            copied=tuple(name for name in plan.copied if name not in restored),
        )

    def swap_runs(
        self, plan: Plan, device: torch.device, forward: Mapping[str, EditRun] | None = None
    ) -> dict[str, Run]:
        """What computes the tensors of `swap_plan(plan)`."""
        runs: dict[str, Run] = {}
        for name in {**plan.edits, **self.edits}:
            edit = plan.edits.get(name)
            if edit is None:
                if name in self.base.where:
                    runs[name] = UndoRun(self, name, device)
                continue
            new = forward[name] if forward else EditRun(edit, plan.adapters, device)
            source = edit.source.name if isinstance(edit.source, BaseTensor) else ""
            runs[name] = (
                SwapRun(UndoRun(self, source, device), new) if source in self.edits else new
            )
        return runs

    def base_block(self, files: InputFiles, name: str, block: Block) -> Tensor:
        """A block of a tensor as the base had it."""
        if name not in self.edits:
            return block_of(self.checkpoint, files, name, block)
        run = UndoRun(self, name, torch.device("cpu"))
        workspace = Workspace(run.device, block.count)

        def read(piece: Block) -> Tensor:
            return block_of(self.checkpoint, files, name, piece)

        run.prepare(workspace, read, self.limit)
        return run.restore(read, block, workspace)

    @property
    def rewritten(self) -> Mapping[str, bytes]:
        return self.beside.rewritten

    @property
    def copied(self) -> tuple[str, ...]:
        return self.beside.copied

    def notes(self) -> list[str]:
        """On side files that are not what the merge put there."""
        return [
            f"{self.path / name} {what}: the output has the base's, from the undo record"
            for name, what in self.beside.changed.items()
        ]

    def check(self, streamed: Streamed) -> None:
        """Refuse where what was read is not what the record belongs to."""
        wrong = [
            f"{self.checkpoint.home / found.source}: was changed after it was merged: its BLAKE3 "
            f"is {found.base}, the receipt's {self.digests.get(found.source)}; no base can be "
            "restored from it: bring back the file as it was, or merge again from the base"
            for found in streamed.digests.values()
            if found.base != self.digests.get(found.source)
        ]
        if wrong:
            raise Refusal(wrong)


def open_merged(folder: Path, record_name: str = UNDO, *, in_place: bool = False) -> Merged:
    """Open a merged folder and its record; all of the record is read and checked, of the shards
    only the headers. The caller closes `record`.

    Raises Refusal where there is no record, or it belongs to another output; CorruptFile where it
    is damaged.
    """
    if not folder.is_dir() and not (is_lone(folder) and folder.is_file()):
        raise Refusal(
            f"{folder}: is neither a folder nor a .gguf file; infold undoes what a merge has made"
            f"{misnamed(folder)}"
        )
    if not in_place:
        refuse_unfinished(folder)  # before a record is missed that an unfinished merge has not yet
    owner = _owner(folder) if record_name == UNDO and not in_place else folder
    if not os.path.lexists(path := companion(owner, record_name)):
        if exists(folder / "adapter_config.json") and not exists(folder / "config.json"):
            raise Refusal(f"{folder}: is an adapter; give the merged model")
        raise Refusal(
            f"{folder}: has no {path.name}; only a merge with --undo or --in-place can be undone"
            + _without_record(folder)
        )
    with ExitStack() as undone:
        record = open_record(path.parent, path.name)
        undone.callback(record.close)
        with _as_written(record):
            shards = {str(name): str(digest) for name, digest in record.manifest["shards"].items()}
        checkpoint = open_checkpoint(folder, in_place=in_place, told=shards)
        receipt: Mapping[str, Any] = {}
        if record_name == UNDO:
            if not os.path.lexists(told := companion(owner, RECEIPT)):
                raise Refusal(
                    f"{folder}: its {told.name} is missing, which tells what it is"
                    f"{renamed(folder, RECEIPT)}"
                )
            receipt = read_receipt(owner)
        with _as_written(record):
            merged = _merged(checkpoint, record, receipt, in_place)
        undone.pop_all()
        return merged


@contextmanager
def _as_written(record: Record) -> Iterator[None]:
    """A block that reads a record's manifest as infold writes it."""
    try:
        yield
    except ODD as error:
        raise CorruptFile(
            f"{record.path}: its manifest is none that this infold writes ({error})"
        ) from None


def _owner(path: Path) -> Path:
    """The name that the record of a merged model goes by: its own, or of a GGUF file that was
    renamed without its companions the one that it had. A receipt beside tells it by the digest."""
    if not is_lone(path) or os.path.lexists(companion(path, UNDO)):
        return path
    digest = ""
    for name in without_owner(path, UNDO):
        was = path.with_name(name.removesuffix(f".{UNDO}"))
        with suppress(InfoldError):  # no receipt, or a broken one
            told = read_receipt(was).get("shards")
            with storage_errors(path):
                digest = digest or digest_of(path)
            if told == {was.name: digest}:
                return was
    return path


def _without_record(folder: Path) -> str:
    """What to do, for messages."""
    if is_lone(folder) and without_owner(folder, UNDO):
        return renamed(folder, UNDO)
    other = f"{renamed(folder, UNDO)}. Else merge" if is_lone(folder) else ". Merge"
    return f"{other} once more from the base, with --undo, or use the base where it is still there"


def _merged(
    checkpoint: Checkpoint, record: Record, receipt: Mapping[str, Any], in_place: bool
) -> Merged:
    told = record.manifest
    files: dict[str, int] = {str(k): int(v) for k, v in told["files"].items()}
    shards = []
    there, merged = [shard.name for shard in checkpoint.shards], sorted(told["shards"])
    # what a single file is called tells nothing; its digest does
    if there != merged and not (is_lone(checkpoint.path) and len(there) == len(merged) == 1):
        raise Refusal(
            f"{record.path}: belongs to another output, which has other shards "
            f"({', '.join(merged)})"
        )
    if receipt and receipt.get("shards") != told["shards"]:
        raise Refusal(
            f"{record.path}: belongs to another output: its shards are not those of "
            f"{str(record.path).removesuffix(UNDO)}{RECEIPT}; put the record back that was written "
            "with this output"
        )
    names = sorted(told["base"]["shards"])  # which a single file need not have kept
    if odd := _odd_names(names, there):
        raise CorruptFile(f"{record.path}: tells of shards that no base has: {', '.join(odd)}")
    for shard, name in zip(checkpoint.shards, names, strict=True):
        header = shard.header
        if (label := f"header/{name}") in files:
            raw = record.file(files[label])
            if checkpoint.is_gguf:
                header = gguf_header_of(raw, int(told["sizes"][name]), str(record.path))
            else:
                header = header_of(raw, str(record.path))
        shards.append(Shard(shard.name, shard.path, header))
    # an interrupted edit in place is finished, whatever became of files that it leaves alone
    beside = read_beside(checkpoint, names, record, files, told["side_files"], not in_place)
    rewritten = beside.rewritten
    config = checkpoint.config
    index: dict[str, Any] | None = None
    if "config.json" in rewritten:
        config = parse_json(rewritten["config.json"], str(record.path), infinity=True)
    if INDEX in rewritten:
        index = parse_json(rewritten[INDEX], str(record.path))
    elif INDEX in beside.copied and not in_place:
        index = read_json(safe_child(checkpoint.path, INDEX))
    if index is not None and index.get("weight_map") != {
        tensor: name
        for shard, name in zip(shards, names, strict=True)
        for tensor in shard.header.tensors
    }:
        raise CorruptFile(
            f"{record.path}: tells of side files that no base has: an {INDEX} of other tensors"
        )
    sides = sorted({*beside.copied, *rewritten} - {INDEX})
    where = {n: number for number, shard in enumerate(shards) for n in shard.header.tensors}
    base = Checkpoint(
        checkpoint.path, tuple(shards), index, config, tuple(sides), (), where,
        str(told["base"]["path"]),
    )  # fmt: skip
    adapters = tuple(
        read_adapter(record, files[f"adapter/{n}"], entry)
        for n, entry in enumerate(told["contents"])
    )
    edits = {
        str(name): read_edit(str(name), told["edits"][name], adapters) for name in told["tensors"]
    }
    kept = {n.removeprefix("tensor/"): files[n] for n in files if n.startswith("tensor/")}
    lost = [name for name in (*edits, *kept) if name not in where]
    short = [
        name
        for name, number in kept.items()
        if name in where and record.length(number) != base.info(name).nbytes
    ]
    if short:
        raise CorruptFile(
            f"{record.path}: keeps other sizes than the base has of: {', '.join(short)}"
        )
    limit = int(told["limit"])
    odd = [
        name
        for name, edit in edits.items()
        if name in where
        and undone_by_residual(edit)
        and (base.info(name).dtype, base.info(name).shape) != (edit.dtype, edit.shape)
    ]
    if odd:
        raise CorruptFile(
            f"{record.path}: tells other dtypes or shapes than the base's of: {', '.join(odd)}"
        )
    if lost:
        raise CorruptFile(
            f"{record.path}: edits tensors that the base does not have: {', '.join(lost)}"
        )
    called = told["base"]["path"]
    # fsencode: text that no path can hold is a ValueError
    if not LEAF <= limit <= 1 << 26 or b"\0" in os.fsencode(called):
        raise ValueError(f"blocks of {limit} elements, base {called!r}")
    return Merged(
        checkpoint, base, record, receipt, adapters, edits, beside, limit,
        {s.name: str(told["base"]["shards"][n]) for s, n in zip(shards, names, strict=True)},
        {name: str(told["shards"][n]) for name, n in zip(there, merged, strict=True)},
        kept,
    )  # fmt: skip


def _odd_names(base: Sequence[str], merged: Sequence[str]) -> list[str]:
    """Names of the base's shards that its merge would not have given the other ones."""
    if len(base) > 1:
        return sorted({*base} ^ {*merged})
    suffix = Path(merged[0]).suffix
    return [n for n in base if not {*b"/\0"}.isdisjoint(os.fsencode(n)) or Path(n).suffix != suffix]


class UndoRun:
    """One tensor of the base, from the merged one and the record."""

    def __init__(self, merged: Merged, tensor: str, device: torch.device) -> None:
        self.merged, self.device = merged, device
        self.forward: EditRun | None = None
        self.edit = merged.undo_edit(tensor)
        self.where = f"{merged.record.path}: {tensor}"
        floats = floats_of(self.edit.dtype, self.edit.shape)
        if floats is None:
            raise CorruptFile(f"{self.where}: {self.edit.dtype} is never edited")
        self.floats, self.shape = floats, (floats.rows, floats.columns)
        self.stored = SCALE_DTYPES[floats.dtype]
        self.changed = 0
        done = merged.edits[tensor]
        now = merged.checkpoint
        info = now.info(tensor) if tensor in now.where else None
        self.reads = info is not None and info.shape == self.edit.shape
        self.number = merged.number(tensor)
        self.guesser: EditRun | None = None
        if undone_by_residual(done):
            self.guesser = EditRun(done, merged.adapters, device, merged.observed(tensor))
        self._numbers: dict[tuple[int, int], int] | None = None
        self._lock = threading.Lock()

    def prepare(self, workspace: Workspace, read: Read, limit: int) -> None:
        if self.guesser is not None:
            with as_told(self.where):
                self.guesser.prepare(workspace, read, limit)

    def release(self) -> None:
        if self.guesser is not None:
            self.guesser.release()

    def run(
        self,
        raw: Tensor,
        out: Tensor,
        block: Block,
        workspace: Workspace,
        near: Tensor | None = None,
    ) -> None:
        """`block` is one of the record's, `out` on the CPU."""
        with self._lock:
            if self._numbers is None:
                blocks = enumerate(self._cut())
                self._numbers = {(b.row, b.column): n for n, b in blocks}
        number = self._numbers[block.row, block.column]
        kind, payload = self.merged.record.payload(self.number, number)
        if kind != ORIGINAL:
            if self.guesser is None or not self.guesser.has_way_back():
                raise CorruptFile(f"{self.where}: a residual, but no method that it belongs to")
            with as_told(self.where):
                self.guesser.guess(raw, out, block, workspace)
        unpack(kind, payload, out, self.where)

    def _cut(self) -> Iterator[Block]:
        """The blocks of the record."""
        return cut(*self.shape, self.floats.share(self.merged.limit))

    def restore(self, read: Read, block: Block, workspace: Workspace) -> Tensor:
        """Any block of whole rows, or within one; `read` gives merged blocks."""
        out = torch.empty(block.rows, block.columns, dtype=self.stored)
        for part in self._cut():
            top, bottom = (
                max(part.row, block.row),
                min(part.row + part.rows, block.row + block.rows),
            )
            left = max(part.column, block.column)
            right = min(part.column + part.columns, block.column + block.columns)
            if top >= bottom or left >= right:
                continue
            piece = torch.empty(part.rows, part.columns, dtype=self.stored)
            raw = read(part).to(self.device) if self.reads else piece
            self.run(raw, piece, part, workspace)
            out[
                top - block.row : bottom - block.row, left - block.column : right - block.column
            ] = piece[top - part.row : bottom - part.row, left - part.column : right - part.column]
        return out


class SwapRun:
    """One tensor of another merge of the base: undone, and merged anew, block by block."""

    def __init__(self, undo: UndoRun, forward: EditRun) -> None:
        self.undo, self.new = undo, forward
        self.forward: EditRun | None = forward
        self.edit, self.shape, self.stored = forward.edit, forward.shape, forward.stored
        self.floats = forward.floats
        self.reads = undo.reads
        self.changed = 0

    def prepare(self, workspace: Workspace, read: Read, limit: int) -> None:
        self.undo.prepare(workspace, read, limit)
        self.new.prepare(workspace, lambda block: self.undo.restore(read, block, workspace), limit)

    def release(self) -> None:
        self.undo.release()
        self.new.release()

    def run(
        self,
        raw: Tensor,
        out: Tensor,
        block: Block,
        workspace: Workspace,
        near: Tensor | None = None,
    ) -> Tensor:
        base = workspace.block("base", block, self.undo.stored)
        self.undo.run(raw, base, block, workspace)
        self.new.run(base.to(self.new.device), out, block, workspace, near)
        self.changed = self.new.changed
        return base
