"""Tensors that are written as bytes which are known as a whole: nothing of them is computed."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from infold.edit.blocks import Block
from infold.edit.steps import Workspace
from infold.errors import CorruptFile
from infold.formats import Floats
from infold.merge.apply import EditRun, Read
from infold.merge.source import Buffers, Source
from infold.plan.edits import Edit

__all__ = ["WholeRun", "WholeSource"]


class WholeRun:
    """One tensor, as a row of bytes. `load` gives them, and is asked once."""

    reads = False
    forward: EditRun | None = None

    def __init__(self, edit: Edit, count: int, load: Callable[[], bytes]) -> None:
        self.edit, self.load = edit, load
        self.stored = torch.uint8
        self.shape, self.floats = (1, count), Floats(1, count, "U8", 1, 1, None)
        self.changed = 0
        self._data: Tensor | None = None
        self._lock = threading.Lock()

    def prepare(self, workspace: Workspace, read: Read, limit: int) -> None:
        with self._lock:
            if self._data is None:
                data = bytearray(self.load())
                if len(data) != self.shape[1]:
                    raise CorruptFile(
                        f"{self.edit.tensor}: {len(data):,} bytes are kept, not {self.shape[1]:,}"
                    )
                self._data = torch.frombuffer(data, dtype=torch.uint8)

    def run(
        self,
        raw: Tensor,
        out: Tensor,
        block: Block,
        workspace: Workspace,
        near: Tensor | None = None,
    ) -> Tensor | None:
        assert self._data is not None
        out.copy_(self._data[block.column : block.column + block.columns].view(1, -1))
        return None

    def release(self) -> None:
        self._data = None


class WholeSource(Source):
    """Nothing is read; what is written is bytes."""

    def __init__(self) -> None: ...

    def read(self, block: Block, buffers: Buffers) -> Tensor:
        return torch.empty(0)

    def room(self, floats: Floats, block: Block, written: memoryview) -> Tensor:
        return torch.frombuffer(written, dtype=torch.uint8).view(1, -1)
