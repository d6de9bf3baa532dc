"""Tensors that are written as bytes which are known already: nothing of them is computed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from infold.edit.blocks import Block
from infold.edit.steps import Workspace
from infold.formats import Floats
from infold.merge.apply import EditRun, Read
from infold.merge.source import Buffers, Source
from infold.plan.edits import Edit

__all__ = ["WholeRun", "WholeSource"]


class WholeRun:
    """One tensor, as a row of bytes. `piece` gives some of them: (first, how many)."""

    reads = False
    forward: EditRun | None = None

    def __init__(self, edit: Edit, count: int, piece: Callable[[int, int], bytes]) -> None:
        self.edit, self.piece = edit, piece
        self.stored = torch.uint8
        self.shape, self.floats = (1, count), Floats(1, count, "U8", 1, 1, None)
        self.changed = 0

    def prepare(self, workspace: Workspace, read: Read, limit: int) -> None: ...

    def run(
        self,
        raw: Tensor,
        out: Tensor,
        block: Block,
        workspace: Workspace,
        near: Tensor | None = None,
    ) -> Tensor | None:
        data = bytearray(self.piece(block.column, block.columns))
        out.copy_(torch.frombuffer(data, dtype=torch.uint8).view(1, -1))
        return None

    def release(self) -> None: ...


class WholeSource(Source):
    """Nothing is read; what is written is bytes."""

    def __init__(self) -> None: ...

    def read(self, block: Block, buffers: Buffers) -> Tensor:
        return torch.empty(0)

    def room(self, floats: Floats, block: Block, written: memoryview) -> Tensor:
        return torch.frombuffer(written, dtype=torch.uint8).view(1, -1)
