"""A block of a tensor and its operations, handed to the compiled code."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from infold.adapters.operations import AddProduct, Operation, ScaleOutputs
from infold.kernel import library as c

if TYPE_CHECKING:
    from infold.edit.steps import Step

__all__ = ["edit", "readable"]

_DTYPES = {torch.bfloat16: c.BF16, torch.float16: c.F16, torch.float32: c.F32}
_PANEL = 1536  # columns: their float64 values stay in the first cache, and whole rows are read best
_FACTORS = 1 << 16  # doubles of right factors that are kept in the second, so of fewer columns
_TERMS = 1 << 12  # of the sums of one element; a BLAS is better at more
_own = threading.local()


@dataclass(frozen=True, slots=True)
class _Told:
    """An operation, and whether the block is stored as its transpose."""

    operation: Operation
    transposed: bool


def edit(
    forward: Sequence[Step],
    backward: Sequence[Step],
    raw: Tensor,
    out: Tensor | None,
    near: Tensor | None,
    rows: slice,
    columns: slice,
) -> int | None:
    """Edit one block. Returns how many elements differ from `raw`; None where that is to be done by
    PyTorch: then `out` and `near` hold nothing of use.

    raw: the stored block, (rows, columns) of the tensor. out: gets it after the steps `forward`,
    rounded once. near: gets what `guess` makes of `out` by the steps `backward`; of `raw`, where
    there is no `out`.
    """
    loaded = c.load()
    tensors = [t for t in (raw, out, near) if t is not None]
    if loaded is None or not all(_fits(t, raw) for t in tensors):
        return None
    steps, back = _told(forward, rows, columns), _told(backward, rows, columns)
    if steps is None or back is None:
        return None
    told = [*steps, *back]
    if not all(_suits(one, raw.shape) for one in told):
        return None
    kept: list[Tensor] = []  # until the call is over
    operations = (c.Operation * len(told))()
    for number, one in enumerate(told):
        _write(operations[number], told[:number], one, kept)
    terms = sum(op.rank * op.slices for op in operations if op.same < 0)
    if terms > _TERMS:
        return None
    width = min(_PANEL, _FACTORS // max(terms, 1), raw.shape[1] + c.WIDTH - 1)
    job = c.Job(
        _DTYPES[raw.dtype],
        *raw.shape,
        raw.data_ptr(),
        None if out is None else out.data_ptr(),
        None if near is None else near.data_ptr(),
        raw.stride(0),
        0 if out is None else out.stride(0),
        0 if near is None else near.stride(0),
        len(steps),
        len(back),
        operations,
        max(1, width // c.WIDTH) * c.WIDTH,
    )
    scratch = _scratch(loaded.infold_scratch(job))
    job.scratch = scratch.data_ptr()
    changed = int(loaded.infold_edit(job, c.level()))
    return None if changed < 0 else changed


def readable(tensor: Tensor) -> bool:
    """Whether its elements lie where `data_ptr` says. Those of a subclass may lie anywhere."""
    plain = type(tensor) is Tensor and tensor.device.type == "cpu" and not tensor.is_neg()
    return plain and tensor.data_ptr() % tensor.element_size() == 0


def _fits(tensor: Tensor, raw: Tensor) -> bool:
    alike = tensor.dtype == raw.dtype and tensor.shape == raw.shape
    wide = tensor.shape[1] >= c.WIDTH and tensor.stride(1) == 1
    return alike and wide and tensor.dtype in _DTYPES and readable(tensor)


def _suits(one: _Told, shape: tuple[int, ...]) -> bool:
    """Whether the operation's tensors are what C may read; PyTorch tells what is wrong with others,
    such as those of a forged record."""
    operation = one.operation
    outputs, inputs = reversed(shape) if one.transposed else shape
    if isinstance(operation, AddProduct):
        rank, slices = len(operation.a[0]), len(operation.a)
        wanted: list[tuple[int, ...]] = [*[(outputs, rank)] * slices, *[(rank, inputs)] * slices]
        tensors = [*operation.b, *operation.a]
        alike = all(len({t.stride() for t in factor}) == 1 for factor in (operation.b, operation.a))
        if slices > 2 or not rank or not alike:
            return False
    else:
        wanted = [(outputs if isinstance(operation, ScaleOutputs) else inputs,)]
        tensors = [operation.factors]
    return [tuple(t.shape) for t in tensors] == wanted and all(
        t.dtype == torch.float64 and readable(t) for t in tensors
    )


def _told(steps: Sequence[Step], rows: slice, columns: slice) -> list[_Told] | None:
    told: list[_Told] = []
    for step in steps:
        outputs, inputs = (columns, rows) if step.transposed else (rows, columns)
        operations = None if step.on_bias else step.prepared.operations(outputs, inputs)
        if operations is None:
            return None
        told += (_Told(operation, step.transposed) for operation in operations)
    return told


def _write(to: c.Operation, before: Sequence[_Told], one: _Told, kept: list[Tensor]) -> None:
    operation = one.operation
    to.same = -1
    if not isinstance(operation, AddProduct):
        by_rows = isinstance(operation, ScaleOutputs) != one.transposed
        to.kind = c.SCALE_ROWS if by_rows else c.SCALE_COLUMNS
        kept.append(operation.factors.contiguous())
        to.vector = kept[-1].data_ptr()
        return
    to.kind = c.ADD if operation.sign > 0 else c.SUBTRACT
    b, a = operation.b, operation.a
    left, right = (tuple(t.t() for t in a), tuple(t.t() for t in b)) if one.transposed else (b, a)
    to.rank, to.slices = right[0].shape[0], len(right)
    for number in range(len(right)):
        to.left[number], to.right[number] = left[number].data_ptr(), right[number].data_ptr()
    to.left_row, to.left_rank = left[0].stride()
    to.right_rank, to.right_column = right[0].stride()
    kept += (*left, *right)
    to.same = next((n for n, other in enumerate(before) if _same(other, one)), -1)


def _same(one: _Told, other: _Told) -> bool:
    a, b = one.operation, other.operation
    if not (isinstance(a, AddProduct) and isinstance(b, AddProduct)):
        return False
    return a.known_by == b.known_by and one.transposed == other.transposed


def _scratch(doubles: int) -> Tensor:
    """The thread's memory: fresh one would cost its page faults in every block."""
    scratch: Tensor | None = getattr(_own, "scratch", None)
    if scratch is None or scratch.numel() < doubles:
        scratch = _own.scratch = torch.empty(doubles, dtype=torch.float64, device="cpu")
    return scratch
