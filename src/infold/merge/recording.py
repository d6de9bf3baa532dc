"""What a merge writes down so that it can be undone. `merge/undo.py` reads it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from infold.checkpoint.adapter import Adapter
from infold.checkpoint.inputs import InputFiles
from infold.checkpoint.record import SEEN, RecordWriter
from infold.checkpoint.safetensors import DTYPE_BITS
from infold.checkpoint.shards import Checkpoint, Shard
from infold.dtypes import SCALE_DTYPES
from infold.edit.blocks import Block, cut
from infold.edit.residual import content, pack_original, pack_residual
from infold.edit.steps import Workspace
from infold.formats import Floats, floats_of, format_of
from infold.merge.apply import Run
from infold.merge.beside import LABEL, pack, side_sizes, smallest
from infold.plan.edits import BaseTensor, Edit, Plan, Replacement

__all__ = [
    "BlockOf",
    "Recording",
    "block_of",
    "record_room",
    "undone_by_residual",
    "unkept",
]

_PIECE = 1 << 20
_RESIDUAL_SHARE = 100  # the least part of the edited bytes that residuals take, as a rule
BlockOf = Callable[[str, Block], Tensor]  # stored elements (rows, columns) of a tensor by its name


def undone_by_residual(edit: Edit) -> bool:
    """Whether the merged tensor tells of the base's; else the base's own bytes are kept."""
    return edit.source == BaseTensor(edit.tensor)


def block_of(checkpoint: Checkpoint, files: InputFiles, name: str, block: Block) -> Tensor:
    """The floats of a block of a tensor, in memory of their own."""
    info = checkpoint.info(name)
    floats = _floats(checkpoint, name)
    dtype = SCALE_DTYPES[floats.dtype]
    data = bytearray(block.count * floats.width)
    if not data:
        return torch.empty(block.rows, block.columns, dtype=dtype)
    begin = info.begin + (block.row * floats.columns + block.column) * floats.width
    files.read(checkpoint.shards[checkpoint.where[name]].path, memoryview(data), begin)
    if floats.packing is not None:
        return floats.packing.take(torch.frombuffer(data, dtype=torch.uint8))
    return torch.frombuffer(data, dtype=dtype).view(block.rows, block.columns)


def _floats(checkpoint: Checkpoint, name: str) -> Floats:
    info = checkpoint.info(name)
    floats = floats_of(info.dtype, info.shape)
    assert floats is not None  # no plan edits such a tensor
    return floats


class Recording:
    """The record of one merge while it is made. `limit`: elements of a block."""

    def __init__(self, writer: RecordWriter, plan: Plan, limit: int) -> None:
        self.writer, self.plan, self.limit = writer, plan, limit
        names = [name for shard in plan.base.shards for name in shard.header.tensors]
        self.kept = _kept_whole(plan)
        # new tensors have no number, since they have no way back
        edited = [t for t in names if t in plan.edits and t not in self.kept]
        self.numbers = {name: n for n, name in enumerate(edited)}

    def has(self, run: Run, number: int) -> bool:
        """Whether this block is in the record, or needs not be."""
        tensor = self._tensor(run)
        return tensor is None or (tensor, number) in self.writer.frames

    def _tensor(self, run: Run) -> int | None:
        edit = self.plan.edits.get(run.edit.tensor)
        return self.numbers.get(edit.tensor) if edit and undone_by_residual(edit) else None

    def near(self, run: Run, block: Block, workspace: Workspace) -> Tensor | None:
        """Where `run`, which is prepared, shall put what it takes the base's block for."""
        if self._tensor(run) is None or run.forward is None or not run.forward.has_way_back():
            return None
        return workspace.block("near", block, run.stored)

    def add(self, run: Run, number: int, before: Tensor, near: Tensor | None) -> None:
        """One block of the base, by the run that has just merged it, and what `near` got."""
        tensor, forward = self._tensor(run), run.forward
        if tensor is None or forward is None:
            return
        if number == 0:
            for step, observed in forward.observed().items():
                self.writer.append(tensor | SEEN, step, 0, content(observed.cpu()))
        before = before.cpu()
        packed = pack_original(before) if near is None else pack_residual(before, near)
        self.writer.append(tensor, number, *packed)

    def add_originals(self, base: BlockOf) -> None:
        """The base's own bytes of tensors that something else has replaced."""
        for name, number in self.numbers.items():
            if undone_by_residual(self.plan.edits[name]):
                continue
            floats = _floats(self.plan.base, name)
            blocks = cut(floats.rows, floats.columns, floats.share(self.limit))
            for which, block in enumerate(blocks):
                if block.count:
                    self.writer.append(number, which, *pack_original(base(name, block)))

    def finish(
        self,
        origin: Mapping[str, Any],
        shards: Mapping[str, str],
        sides: Iterable[tuple[str, bytes]],
        copied: Mapping[str, str],
    ) -> dict[str, int]:
        """Everything else that the base needs; returns how many bytes of it are a copy of the
        adapters, and of side files. `origin`: the receipt's `base` and `adapters`;
        `shards`: digests of the output's; `sides`: the base's side files that the record keeps;
        `copied`: digests of those that the merge leaves as they are."""
        plan = self.plan
        files: dict[str, int] = {}

        def keep(label: str, pieces: Iterable[bytes]) -> int:
            files[label] = len(files)
            return self.writer.append_stream(files[label], pieces)

        for shard, output in zip(plan.base.shards, plan.shards, strict=True):
            if not output.same_layout:
                keep(f"header/{shard.name}", [shard.header.raw])
        beside = sum(keep(LABEL + name, [pack(data)]) for name, data in sides)
        inside = sum(keep(f"adapter/{n}", _contents(a)) for n, a in enumerate(plan.adapters))
        for name in self.kept:
            keep(f"tensor/{name}", _stored(plan.base, name))
        self.writer.finish(
            {
                **origin,
                "limit": self.limit,
                "shards": dict(shards),
                "rewritten": sorted(plan.rewritten),
                "side_files": dict(copied),
                "contents": [_describe(adapter) for adapter in plan.adapters],
                "files": files,
                "sizes": {s.name: s.header.file_size for s in plan.base.shards},
                "tensors": list(self.numbers),
                "edits": {name: asdict(plan.edits[name]) for name in self.numbers},
            }
        )
        return {"adapters": inside, "side_files": beside}


def _kept_whole(plan: Plan) -> list[str]:
    """The base's tensors that the output lacks, or has with bytes that are made of something else
    than their floats: codes and scales of converted modules, nested scales that became plain. All
    of their bytes are kept, since no arithmetic brings codes back."""
    there = {name for shard in plan.shards for name in shard.header.tensors}

    def remade(edit: Edit | None, dtype: str) -> bool:
        if edit is None or isinstance(edit.source, BaseTensor):
            return False
        return not isinstance(edit.source, Replacement) or format_of(dtype) is None

    return [
        name
        for shard in plan.base.shards
        for name, info in shard.header.tensors.items()
        if name not in there or remade(plan.edits.get(name), info.dtype)
    ]


def record_room(plan: Plan) -> int:
    """Bytes that the record of a merge may take.

    How large its residuals are, only the merge tells (docs/undo.md): 1 to 6 % of the edited bytes
    as a rule, of which 1 % is counted, so that nobody is refused for whom there is room. Of all
    else the size before it is compressed. Raises StorageFailure for side files that cannot be read.
    """
    base, kept = plan.base, set(_kept_whole(plan))
    total = sum(base.info(name).nbytes for name in kept)
    for adapter in plan.adapters:
        for info in adapter.tensors.values():
            total += math.prod(info.shape) * DTYPE_BITS[info.dtype] // 8
    for name, edit in plan.edits.items():
        if name not in base.where or name in kept:
            continue
        if undone_by_residual(edit):
            total += base.info(name).nbytes // _RESIDUAL_SHARE
        else:
            total += base.info(name).nbytes
    sizes = side_sizes(base, plan.copied)
    total += sum(sizes[name] for name in smallest(sizes))
    return total + sum(side_sizes(base, plan.rewritten).values())


def unkept(plan: Plan) -> list[str]:
    """Reasons why no record brings a base back bit for bit: what lies between the tensors of a GGUF
    file, which is nothing as a rule, is written as zeros where its layout changes."""
    files = InputFiles(plan.base)

    def stray(shard: Shard) -> bool:
        ends = [len(shard.header.raw), *(t.end for t in shard.header.tensors.values())]
        begins = [*(t.begin for t in shard.header.tensors.values()), shard.header.file_size]
        for end, begin in zip(ends, begins, strict=True):
            gap = bytearray(begin - end)
            files.read(shard.path, memoryview(gap), end)
            if any(gap):
                return True
        return False

    try:
        return [
            f"{shard.path}: has bytes between its tensors that are not zero, and no record brings "
            "those back; leave --undo out, and keep the base"
            for shard, output in zip(plan.base.shards, plan.shards, strict=True)
            if plan.base.is_gguf and not output.same_layout and stray(shard)
        ]
    finally:
        files.close()


def _stored(base: Checkpoint, name: str) -> Iterator[bytes]:
    """The bytes of a tensor, some at a time."""
    info, files = base.info(name), InputFiles(base)
    try:
        for begin in range(info.begin, info.end, _PIECE):
            piece = bytearray(min(_PIECE, info.end - begin))
            files.read(base.shards[base.where[name]].path, memoryview(piece), begin)
            yield bytes(piece)
    finally:
        files.close()


def _contents(adapter: Adapter) -> Iterator[bytes]:
    """The tensors of an adapter, one after the other."""
    for key in adapter.tensors:
        for piece in adapter.pieces(key):
            yield content(piece)


def _describe(adapter: Adapter) -> dict[str, Any]:
    """Of which tensors `_contents` consists."""
    tensors = [[key, info.dtype, list(info.shape)] for key, info in adapter.tensors.items()]
    return {"config": adapter.config, "tensors": tensors}
