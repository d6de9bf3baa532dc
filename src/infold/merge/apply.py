"""One edit of a plan: its parts are loaded once, then `infold.edit` computes block after block."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from infold.adapters import METHODS
from infold.adapters.exact import LEAF
from infold.checkpoint.adapter import Adapter
from infold.edit.blocks import Block, cut, matrix
from infold.edit.steps import Step, Target, Workspace, compute, observers, show
from infold.formats import format_of
from infold.plan.edits import Edit

__all__ = ["EditRun"]


class EditRun:
    """One edit with its parts in memory, shared by the workers; the first that comes prepares."""

    def __init__(self, edit: Edit, adapters: tuple[Adapter, ...], device: torch.device) -> None:
        self.edit, self.adapters, self.device = edit, adapters, device
        self.shape = matrix(edit.shape)
        form = format_of(edit.dtype)
        assert form is not None  # the plan refuses what no format stores
        self.target = Target(edit.tensor, edit.dtype, form)
        self.stored = form.torch_dtype(edit.dtype)
        self.changed = 0
        self._ready: list[Step] | None = None
        self._lock = threading.Lock()

    def prepare(self, workspace: Workspace, read: Callable[[Block], Tensor], limit: int) -> None:
        """Load the parts; where a method asks for it, show it the whole weight first."""
        with self._lock:
            if self._ready is not None:
                return
            steps = self._steps()
            for step, before in observers(steps):
                # a transposed weight shows its inputs as rows: whole leaves of them at once
                whole = max(limit, LEAF * self.shape[1]) if step.transposed else limit
                for block in cut(*self.shape, whole):
                    show(step, before, read(block).to(self.device), block, self.target, workspace)
            self._ready = steps

    def _steps(self) -> list[Step]:
        steps = []
        for op in self.edit.operations:
            parts = {
                part: self.adapters[op.adapter].read(key).to(self.device)
                for part, key in op.parts.items()
            }
            prepared = METHODS[op.method].prepare(parts, op.settings)
            steps.append(Step(prepared, op.transposed, op.on_bias))
        return steps

    def release(self) -> None:
        """Forget the parts."""
        self._ready = None

    def run(self, raw: Tensor, out: Tensor, block: Block, workspace: Workspace) -> None:
        """Compute one block: `raw` as it is stored in the source, `out` as it will be stored."""
        assert self._ready is not None
        there = out if out.device == self.device else torch.empty_like(out, device=self.device)
        compute(self._ready, raw, there, block, self.target, workspace)
        changed = block.count
        if raw.dtype == there.dtype:
            changed = workspace.count_changed(there, raw)
        if there is not out:
            out.copy_(there)
        with self._lock:
            self.changed += changed
