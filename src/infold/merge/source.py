"""Where the stored values of an edit come from, and the bytes that a block of them becomes.

The floats of a dense tensor are its bytes. Those of a quantized one lie among its codes, block by
block: they are taken out to be computed on, and put back into a copy of the bytes.
"""

from __future__ import annotations

import mmap
from concurrent.futures import Future

import torch
from torch import Tensor

from infold.checkpoint.direct import ALIGN
from infold.checkpoint.inputs import InputFiles
from infold.dtypes import SCALE_DTYPES
from infold.edit.blocks import Block
from infold.formats import Floats, floats_of
from infold.merge.apply import Run
from infold.plan.edits import BaseTensor, Original, Plan, Replacement

__all__ = ["Buffers", "Source"]

_LEAST = 1 << 20  # bytes of a buffer


class Buffers:
    """Page-aligned buffers of one worker, kept from chunk to chunk.

    waits: the last chunk in them is still to be hashed. writing: the last write from them.
    """

    def __init__(self) -> None:
        self._maps: dict[str, mmap.mmap] = {}
        self.waits = False
        self.writing: Future[None] | None = None

    def written(self) -> None:
        """Wait for the write. Raises what it has raised."""
        if self.writing is not None:
            self.writing.result()

    def view(self, name: str, count: int, place: int = 0) -> memoryview:
        """`place`: where in a file the bytes belong, so that they can go there directly."""
        have, begin = self._maps.get(name), place % ALIGN
        if have is None or len(have) < begin + count:
            self._maps[name] = have = mmap.mmap(-1, max(count, _LEAST) + ALIGN)
        return memoryview(have)[begin : begin + count]


class Source:
    """The stored values of one edit: of the base, or a tensor of an adapter."""

    def __init__(self, plan: Plan, run: Run, files: InputFiles) -> None:
        edit, self.columns = run.edit, run.floats.columns
        self.files, self.reads = files, run.reads
        self.loaded: Tensor | None = None
        if isinstance(edit.source, BaseTensor | Original):
            whence = plan.base
            if isinstance(edit.source, Original):
                assert plan.original is not None
                whence = plan.original
            info = whence.info(edit.source.name)
            self.path = whence.shards[whence.where[edit.source.name]].path
            self.begin, self.floats = info.begin, known(info.dtype, info.shape)
        else:
            assert isinstance(edit.source, Replacement)
            adapter = plan.adapters[edit.source.adapter]
            tensor = adapter.tensors[edit.source.key]
            self.path, self.begin = adapter.weights, tensor.begin
            self.floats = known(tensor.dtype, tensor.shape)
            if tensor.end == tensor.begin:  # a pickle is in memory already
                self.loaded = adapter.read(edit.source.key).view(-1, self.columns)

    def read(self, block: Block, buffers: Buffers) -> Tensor:
        """The floats of a block, (rows, columns); its bytes are in the worker's `in` buffer."""
        floats = self.floats
        dtype = SCALE_DTYPES[floats.dtype]
        if not self.reads:
            return torch.empty(0, dtype=dtype)
        if self.loaded is not None:
            rows = self.loaded[block.row : block.row + block.rows]
            return rows[:, block.column : block.column + block.columns]
        view = buffers.view("in", block.count * floats.width)
        self.files.read(self.path, view, self.begin + place_of(floats, block))
        if floats.packing is not None:
            return floats.packing.take(torch.frombuffer(view, dtype=torch.uint8))
        raw = torch.frombuffer(view, dtype=dtype, count=block.count)
        return raw.view(block.rows, block.columns)

    def room(self, floats: Floats, block: Block, written: memoryview) -> Tensor:
        """The floats of the block to come, (rows, columns), of which `written` has the bytes."""
        dtype = SCALE_DTYPES[floats.dtype]
        if floats.packing is not None:
            return torch.empty(block.rows, block.columns, dtype=dtype)
        out = torch.frombuffer(written, dtype=dtype, count=block.count)
        return out.view(block.rows, block.columns)

    def fill(self, floats: Floats, out: Tensor, written: memoryview, buffers: Buffers) -> None:
        """Make `written` the bytes of the block whose floats are `out`; its codes are those that
        `read` has just found."""
        if floats.packing is not None:
            written[:] = buffers.view("in", len(written))
            floats.packing.put(out, torch.frombuffer(written, dtype=torch.uint8))


def known(dtype: str, shape: tuple[int, ...]) -> Floats:
    """The floats of a tensor that a plan edits, which refuses what no format stores."""
    floats = floats_of(dtype, shape)
    assert floats is not None, dtype
    return floats


def place_of(floats: Floats, block: Block) -> int:
    """Where the bytes of a block begin in its tensor."""
    return (block.row * floats.columns + block.column) * floats.width
