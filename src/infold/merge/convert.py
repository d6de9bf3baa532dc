"""Quantized modules that become dense, or are quantized again: their sources and their runs.

Where values come from the parts of a module, a block of rows is decoded to float64 when it is
asked for. A module that is quantized again is computed as a whole by the first worker that comes to
one of its parts, in blocks of rows, and its parts are held, packed, until the last byte of them is
written: codes and scales come from the same values, but lie in different places of the file.
"""

from __future__ import annotations

import math
import threading
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from infold.checkpoint.adapter import Adapter
from infold.checkpoint.inputs import InputFiles
from infold.checkpoint.stored import as_matrix, stored_matrix
from infold.edit.blocks import Block
from infold.edit.steps import Workspace, check_finite
from infold.errors import NotFinite, Refusal
from infold.formats import Floats
from infold.formats.values import VALUES, Matrix, Scheme, encoder
from infold.merge.apply import EditRun, Read, Run
from infold.merge.source import Buffers, Source
from infold.merge.whole import WholeRun, WholeSource
from infold.plan.edits import Amended, BaseTensor, Decoded, Edit, Original, Part, Plan
from infold.plan.edits import Source as AnySource

__all__ = [
    "block_elements",
    "converted_runs",
    "encoded_bytes",
    "lost_updates",
    "measured_error",
    "reads_elsewhere",
    "source_of",
]


class DecodedSource(Source):
    """The values of a quantized module as blocks, decoded when they are asked for."""

    def __init__(self, plan: Plan, source: Decoded, files: InputFiles) -> None:
        self.scheme, self.decode = source.scheme, VALUES[source.form].decode
        self.module = source.module
        self.parts = parts_of(plan, source.parts, files)

    def read(self, block: Block, buffers: Buffers) -> Tensor:
        """float64 (rows, columns) of a block."""
        try:
            values = self.decode(self.parts, self.scheme, slice(block.row, block.row + block.rows))
        except Refusal as error:
            raise Refusal(f"{self.module}: {error}") from None
        return values[:, block.column : block.column + block.columns]


class PartSource(Source):
    """What a module that is quantized again is made of; what is written is bytes."""

    def __init__(self, values: Source) -> None:
        self.values = values

    def read(self, block: Block, buffers: Buffers) -> Tensor:
        return self.values.read(block, buffers)

    def room(self, floats: Floats, block: Block, written: memoryview) -> Tensor:
        return torch.frombuffer(written, dtype=torch.uint8).view(1, -1)


def source_of(plan: Plan, run: Run, files: InputFiles) -> Source:
    """Where the stored values of one edit come from."""
    source = run.edit.source
    if isinstance(run, WholeRun):
        return WholeSource()
    if isinstance(run, PartRun):
        assert isinstance(source, Part)
        run.parts = parts_of(plan, source.stored, files)
        return PartSource(source_of(plan, run.module.inner, files))
    if isinstance(source, Decoded):
        return DecodedSource(plan, source, files)
    return Source(plan, run, files)


def reads_elsewhere(plan: Plan, source: AnySource, shard: int) -> bool:
    """Whether values come from another file than this shard of the base (or an adapter)."""
    if isinstance(source, Original):
        return True
    if isinstance(source, BaseTensor):
        return plan.base.where[source.name] != shard
    if isinstance(source, Part):
        others = any(plan.base.where[name] != shard for _, name in source.stored)
        return others or reads_elsewhere(plan, source.values.source, shard)
    if isinstance(source, Decoded):
        return any(plan.base.where[name] != shard for _, name in source.parts)
    return False


def parts_of(
    plan: Plan, parts: Sequence[tuple[str, str]], files: InputFiles
) -> Mapping[str, Matrix]:
    return {part: stored_matrix(plan.base, files, name) for part, name in parts}


class _Error:
    """How far what is written lies from the exact values, and how far these are from what they were
    before the adapters; relative to the values, in the Frobenius norm.

    off, moved, norm: squared norms of error, update and values. crossed: update · error, since the
    same error can be two things. Codes that stay as they were lose the update: the error is its
    opposite, and of its size. Codes of a finer or another grid keep it, and add noise beside it.
    """

    def __init__(self) -> None:
        self.off = self.moved = self.norm = self.crossed = 0.0
        self._lock = threading.Lock()

    def add(self, written: Tensor, values: Tensor, before: Tensor) -> None:
        error, update = written - values, values - before
        crossed = float((error * update).sum())
        off, moved = float(error.square_().sum()), float(update.square_().sum())
        norm = float(values.square().sum())
        with self._lock:
            self.off += off
            self.moved += moved
            self.norm += norm
            self.crossed += crossed

    def join(self, other: _Error) -> None:
        """Count another weight's, too."""
        self.off, self.moved = self.off + other.off, self.moved + other.moved
        self.norm, self.crossed = self.norm + other.norm, self.crossed + other.crossed

    @property
    def left(self) -> float:
        """The share of the update that is left: 0 where nothing moved, 1 where it is there."""
        return min(1.0, max(0.0, 1 + self.crossed / self.moved))

    @property
    def noise(self) -> float:
        """The error but for what is lost of the update, relative to the values."""
        return math.sqrt(max(0.0, self.off - self.crossed**2 / self.moved) / self.norm)

    def describe(self) -> dict[str, float]:
        """As receipts tell it, with four digits."""
        pair = {"error": self.off, "update": self.moved}
        return {
            name: float(f"{math.sqrt(square / self.norm):.4g}") if self.norm else 0.0
            for name, square in pair.items()
        }


class ConvertedRun(EditRun):
    """An edit whose source is decoded, or the original's: dense, measured against the exact
    values, and without a way back."""

    def __init__(self, edit: Edit, adapters: Sequence[Adapter], device: torch.device) -> None:
        super().__init__(edit, adapters, device)
        self.error = _Error()

    def run(
        self,
        raw: Tensor,
        out: Tensor,
        block: Block,
        workspace: Workspace,
        near: Tensor | None = None,
    ) -> Tensor | None:
        values = self.exact(raw, block, workspace)
        rounded = self.target.form.encode(values, self.edit.dtype)
        check_finite(raw, rounded, block, self.target)
        self.error.add(rounded.to(torch.float64), values, raw.to(torch.float64))
        out.copy_(rounded)
        with self._lock:
            self.changed += block.count
        return None


class _Module:
    """One module that is quantized again. `values`: its dense edit; `written`: its parts' edits."""

    def __init__(self, source: Part, adapters: Sequence[Adapter], device: torch.device) -> None:
        self.inner = EditRun(source.values, adapters, device)
        self.form, self.scheme = source.form, source.scheme
        self.written: dict[str, Edit] = {}
        self.outputs: dict[str, Tensor] | None = None
        self.refused: NotFinite | None = None  # for all parts alike
        self.error = _Error()
        self.left = 0
        self._lock = threading.Lock()

    def add(self, part: str, edit: Edit) -> None:
        self.written[part] = edit
        self.left += 1

    def compute(
        self, workspace: Workspace, read: Read, stored: Mapping[str, Matrix], limit: int
    ) -> None:
        """Fill `outputs`, once. Raises NotFinite, each time the same."""
        with self._lock:
            if self.refused is not None:
                raise self.refused
            if self.outputs is not None:
                return
            try:
                self.outputs = self._computed(workspace, read, stored, limit)
            except NotFinite as error:
                self.refused = error
                raise

    def _computed(
        self, workspace: Workspace, read: Read, stored: Mapping[str, Matrix], limit: int
    ) -> dict[str, Tensor]:
        self.inner.prepare(workspace, read, limit)
        outputs = {}
        for part, edit in self.written.items():
            dtype, shape = as_matrix(edit.dtype, edit.shape)
            outputs[part] = torch.zeros(shape, dtype=dtype)
        rows, columns = self.scheme.shape
        encode, decode = encoder(self.form), VALUES[self.form].decode
        step = max(1, limit // max(1, columns) // self.scheme.align) * self.scheme.align
        for row in range(0, rows, step):
            block = Block(row, min(step, rows - row), 0, columns)
            here = slice(row, row + block.rows)
            raw = read(block).to(self.inner.device)
            values = self.inner.exact(raw, block, workspace).cpu()
            if not torch.isfinite(values).all():
                check_finite(raw.cpu(), values, block, self.inner.target)
            try:
                encode(values, self.scheme, stored, here, outputs)
                again = decode(ChainMap(outputs, dict(stored)), self.scheme, here)  # type: ignore[arg-type]
            except Refusal as error:
                raise Refusal(f"{self.inner.edit.tensor}: {error}") from None
            if not torch.isfinite(again).all():
                name = self.inner.edit.tensor
                why = "its scales do not fit their dtype"
                raise NotFinite(name, (row, 0), name, why, "use --dequantize")
            self.error.add(again, values, raw.cpu().to(torch.float64))
        self.inner.release()
        return outputs

    def done(self) -> None:
        """One part is written; after the last of them all is forgotten."""
        with self._lock:
            self.left -= 1
            if self.left <= 0:
                self.outputs = None


class PartRun:
    """One part of a module that is quantized again, as a row of bytes."""

    reads = False
    forward: EditRun | None = None

    def __init__(self, edit: Edit, module: _Module) -> None:
        assert isinstance(edit.source, Part)
        self.edit, self.module, self.part = edit, module, edit.source.part
        self.stored = torch.uint8
        count = encoded_bytes(edit)
        self.shape, self.floats = (1, count), Floats(1, count, "U8", 1, 1, None)
        self.changed = 0
        self.parts: Mapping[str, Matrix] = {}
        module.add(self.part, edit)

    @property
    def error(self) -> _Error:
        return self.module.error

    def prepare(self, workspace: Workspace, read: Read, limit: int) -> None:
        self.module.compute(workspace, read, self.parts, limit)

    def run(
        self,
        raw: Tensor,
        out: Tensor,
        block: Block,
        workspace: Workspace,
        near: Tensor | None = None,
    ) -> Tensor | None:
        outputs = self.module.outputs
        assert outputs is not None
        data = outputs[self.part].view(torch.uint8).view(-1)
        out.copy_(data[block.column : block.column + block.columns].view(1, -1))
        return None

    def release(self) -> None:
        self.module.done()


def converted_runs(plan: Plan, device: torch.device) -> dict[str, Run]:
    """What computes every edit of a plan, converted modules included."""
    runs: dict[str, Run] = {}
    modules: dict[str, _Module] = {}
    for name, edit in plan.edits.items():
        source = edit.source
        if isinstance(source, Part):
            weight = source.values.tensor
            if weight not in modules:
                modules[weight] = _Module(source, plan.adapters, device)
            runs[name] = PartRun(edit, modules[weight])
        elif isinstance(source, Amended):
            runs[name] = WholeRun(edit, len(source.data), _pieces_of(source.data))
        elif isinstance(source, Decoded | Original):
            runs[name] = ConvertedRun(edit, plan.adapters, device)
        else:
            runs[name] = EditRun(edit, plan.adapters, device)
    return runs


def _pieces_of(data: bytes) -> Callable[[int, int], bytes]:
    return lambda first, count: data[first : first + count]


def measured_error(run: Run) -> dict[str, float] | None:
    """The relative error of what was written, and the size of the update, where they are known."""
    return run.error.describe() if isinstance(run, ConvertedRun | PartRun) else None


def lost_updates(runs: Mapping[str, Run]) -> list[str]:
    """A note on what quantizing again loses of the adapters' update, and what noise it adds, where
    some weight's error is as large as its update."""
    found: dict[str, _Error] = {}
    for run in runs.values():
        if isinstance(run, PartRun) and run.error.moved > 0:
            found[run.module.inner.edit.tensor] = run.error
    larger = sum(error.off >= error.moved for error in found.values())
    if not larger:
        return []
    least, total = min(found, key=lambda name: found[name].left), _Error()
    for error in found.values():
        total.join(error)
    update = math.sqrt(total.moved / total.norm)
    return [
        f"in {larger:,} of {len(found):,} weights that were quantized again the rounding error is "
        f"as large as what the adapters change there, or larger: {total.left:.0%} of that change "
        f"is left ({least}: {found[least].left:.0%}), and noise of {total.noise:.2%} of the "
        f"weights was added, where the change is {update:.2%}; --dequantize keeps all of it, "
        "without such noise"
    ]


def encoded_bytes(edit: Edit) -> int:
    """Memory that one part takes until it is written."""
    if not isinstance(edit.source, Part):
        return 0
    dtype, shape = as_matrix(edit.dtype, edit.shape)
    return math.prod(shape) * dtype.itemsize


def block_elements(plan: Plan) -> int:
    """The least elements of a block for the modules that are quantized again."""
    schemes: set[Scheme] = {
        edit.source.scheme for edit in plan.edits.values() if isinstance(edit.source, Part)
    }
    return max((s.align * s.shape[1] for s in schemes), default=0)
