"""One edit of a plan: its parts are loaded once, then `infold.edit` computes block after block."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from infold.adapters import METHODS, Settings, ia3
from infold.adapters.exact import LEAF
from infold.checkpoint.adapter import Adapter
from infold.dtypes import SCALE_DTYPES
from infold.edit.blocks import Block, cut
from infold.edit.scales import Loss, measure, measures
from infold.edit.steps import (
    Step,
    Target,
    Workspace,
    backward,
    compute,
    exact,
    guess,
    observers,
    show,
)
from infold.formats import Floats, floats_of, format_of
from infold.plan.edits import Edit, Operation

__all__ = ["EditRun", "Read", "Run"]

Read = Callable[[Block], Tensor]  # the stored elements of a block of the source


class Run(Protocol):
    """What computes one tensor of an output, shared by the workers."""

    edit: Edit
    floats: Floats  # of the output's tensor
    shape: tuple[int, int]  # of their matrix
    stored: torch.dtype  # of each
    changed: int  # elements that differ from the source's
    reads: bool  # whether `run` needs the source's block
    forward: EditRun | None  # what edits the base's block, where that happens

    def prepare(self, workspace: Workspace, read: Read, limit: int) -> None:
        """Make ready, once. `read` gives any block of the source; it is valid until the next."""

    def run(
        self,
        raw: Tensor,
        out: Tensor,
        block: Block,
        workspace: Workspace,
        near: Tensor | None = None,
    ) -> Tensor | None:
        """Compute one block: `raw` as it is stored in the source, `out` as it will be stored.

        near: on the CPU, gets what the base's block is taken for when the way back begins; only
        where `forward.has_way_back()`. Returns the base's block that `out` was made from, where
        there is one to go back to; it is valid until the next block.
        """

    def release(self) -> None:
        """Forget what `prepare` loaded."""


def steps_of(edit: Edit, adapters: Sequence[Adapter], device: torch.device) -> list[Step]:
    """What an edit does, with the parts of its operations loaded."""
    steps = []
    for op in edit.operations:
        parts, settings = _loaded(op, adapters[op.adapter])
        parts = {part: values.to(device) for part, values in parts.items()}
        prepared = METHODS[op.method].prepare(parts, settings)
        steps.append(Step(prepared, op.transposed, op.on_bias))
    if edit.exponent:
        rows = edit.shape[0] if edit.shape else 1
        powers = torch.full((rows,), 2.0**edit.exponent, dtype=torch.float64, device=device)
        steps.append(Step(ia3.prepare({"ia3_l": powers}, Settings(side="out", out=rows))))
    return steps


def _loaded(op: Operation, adapter: Adapter) -> tuple[dict[str, Tensor], Settings]:
    """The parts of an operation. Of experts that are weights of their own, and share the adapter's
    tensors, only those of this one, as of any other weight."""
    told = op.settings
    if told.expert < 0:
        return {part: adapter.read(key) for part, key in op.parts.items()}, told
    a, b = op.parts["lora_A"], op.parts["lora_B"]
    rank = adapter.tensors[a].shape[0] // told.experts
    outputs = slice(told.first, told.first + told.out)
    parts = {
        "lora_A": adapter.rows(a, told.expert * rank, rank),
        "lora_B": adapter.kept(b)[outputs, told.expert :: told.experts].clone(),
    }
    return parts, replace(told, experts=0, expert=-1, first=0)


class EditRun:
    """One edit with its parts in memory; the first worker that comes prepares.

    observed: tells what the step of that number had observed, so that it needs not do it again.
    """

    reads = True

    def __init__(
        self,
        edit: Edit,
        adapters: Sequence[Adapter],
        device: torch.device,
        observed: Callable[[int], Tensor] | None = None,
    ) -> None:
        self.edit, self.adapters, self.device = edit, adapters, device
        self.forward: EditRun | None = self
        floats = floats_of(edit.dtype, edit.shape)
        assert floats is not None  # the plan refuses what no format stores
        form = format_of(floats.dtype, edit.scales)
        assert form is not None
        self.floats, self.shape = floats, (floats.rows, floats.columns)
        self.target = Target(edit.tensor, floats.dtype, form)
        self.stored = SCALE_DTYPES[floats.dtype]
        self.changed = 0
        scales = edit.scales or floats.packing is not None
        # what rounding cost, where that is measured
        self.loss = Loss() if scales and measures(self.target.dtype) else None
        self._known = observed
        self._ready: list[Step] | None = None
        self._back: list[Step] | None = None
        self._lock = threading.Lock()

    def prepare(self, workspace: Workspace, read: Read, limit: int) -> None:
        """Load the parts; where a method asks for it, show it the whole weight first."""
        with self._lock:
            if self._ready is not None:
                return
            steps = steps_of(self.edit, self.adapters, self.device)
            for step, before in observers(steps):
                if self._known is not None:
                    step.prepared.recall(self._known(len(before)).to(self.device))
                    continue
                # a transposed weight shows its inputs as rows: whole leaves of them at once
                whole = max(limit, LEAF * self.shape[1]) if step.transposed else limit
                for block in cut(*self.shape, whole):
                    show(step, before, read(block).to(self.device), block, self.target, workspace)
            self._back = None
            self._ready = steps

    def release(self) -> None:
        """Forget the parts."""
        self._ready = self._back = None

    def run(
        self,
        raw: Tensor,
        out: Tensor,
        block: Block,
        workspace: Workspace,
        near: Tensor | None = None,
    ) -> Tensor | None:
        assert self._ready is not None
        there, nearly = self._here(out), self._here(near)
        assert there is not None
        back = self._way_back() or () if near is not None else ()
        counted = compute(self._ready, raw, there, block, self.target, workspace, back, nearly)
        loss = None
        if self.loss is not None:
            loss = measure(self._ready, raw, there, block, self.target, workspace)
        changed = block.count
        if counted is not None:
            changed = counted
        elif raw.dtype == there.dtype:
            changed = workspace.count_changed(there, raw)
        if there is not out:
            out.copy_(there)
        if near is not None and nearly is not None and nearly is not near:
            near.copy_(nearly)
        with self._lock:
            self.changed += changed
            if self.loss is not None and loss is not None:
                self.loss.add(loss)
        return raw

    def _here(self, tensor: Tensor | None) -> Tensor | None:
        """A tensor to fill in its place, on our device."""
        if tensor is None or tensor.device == self.device:
            return tensor
        return torch.empty_like(tensor, device=self.device)

    def exact(self, raw: Tensor, block: Block, workspace: Workspace) -> Tensor:
        """float64 values of a block that nothing has rounded."""
        assert self._ready is not None
        return exact(self._ready, raw, block, self.target, workspace)

    def observed(self) -> dict[int, Tensor]:
        """What the methods have observed, by number of the step."""
        steps = enumerate(self._ready or ())
        return {n: o for n, step in steps if (o := step.prepared.observed) is not None}

    def has_way_back(self) -> bool:
        """Whether the methods know one, once all is prepared."""
        return self._way_back() is not None

    def _way_back(self) -> list[Step] | None:
        assert self._ready is not None
        with self._lock:
            if self._back is None:
                self._back = backward(self._ready)
            return self._back

    def guess(self, merged: Tensor, out: Tensor, block: Block, workspace: Workspace) -> None:
        """The base's block, nearly, into `out`, made of the merged one."""
        back, there = self._way_back(), self._here(out)
        assert back is not None and there is not None
        guess(back, merged.to(self.device), there, block, self.target, workspace)
        if there is not out:
            out.copy_(there)
