"""Edits of tensors in memory, their blocks spread over threads."""

from __future__ import annotations

import concurrent.futures
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import accumulate, count
from typing import TypeVar

import torch
from torch import Tensor

from infold.dtypes import NAMES
from infold.edit.blocks import Block, cut, matrix
from infold.edit.steps import Step, Target, Workspace, compute, observers, show
from infold.edit.threads import one_torch_thread, take_one_core, usual_threads, worker_count
from infold.errors import Refusal
from infold.formats import format_of

__all__ = ["TensorEdit", "edit_tensor", "edit_tensors", "on_all_cores"]

T = TypeVar("T")

_BLOCK = 1 << 20  # elements of a block: larger ones are not faster
_SMALLEST_BLOCK = 1 << 16
_GPU_BLOCK = 8 << 20
_KEPT = 64 << 20  # bytes that are edited at a time, and memory for them that is kept


def _on(stream: torch.cuda.Stream | None) -> AbstractContextManager[object]:
    """The caller's stream, which is a matter of the thread."""
    return nullcontext() if stream is None else torch.cuda.stream(stream)


class _Crew:
    """Threads that live as long as the process, each with buffers that it keeps (10 MB or so).

    Fresh memory costs as much in page faults as a third of the arithmetic.

    They do the work even where one is enough: autocast, grad mode and the default device belong to
    the caller's thread, and must not reach the arithmetic.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()  # one edit at a time has all the cores
        self.pool = ThreadPoolExecutor(64, "infold-edit", take_one_core)
        self.own = threading.local()
        self.second = torch.empty(0, dtype=torch.uint8)  # where edits in place are computed

    def workspace(self, device: torch.device) -> Workspace:
        if device.type != "cpu":  # its memory is scarce, and PyTorch's allocator keeps it anyway
            return Workspace(device, _GPU_BLOCK)
        if not hasattr(self.own, "workspace"):
            self.own.workspace = Workspace(device, _BLOCK)
        kept: Workspace = self.own.workspace
        return kept

    def borrow(self, sizes: Sequence[int]) -> list[Tensor]:
        """Bytes of these sizes on the CPU, until the lock is given back or this is called again."""
        aligned = [-(-size // 64) * 64 for size in sizes]
        memory = self.second
        if memory.numel() < sum(aligned):
            memory = torch.empty(sum(aligned), dtype=torch.uint8)
            if memory.numel() <= _KEPT:
                self.second = memory
        begins = accumulate(aligned, initial=0)
        return [memory[begin : begin + size] for begin, size in zip(begins, sizes, strict=False)]

    def spread(
        self,
        work: Callable[[T, Workspace], object],
        items: Iterable[T],
        device: torch.device,
        threads: int,
    ) -> None:
        """Do the work on every item; the first failure stops all, and is raised."""
        queue, lock, stopped = iter(items), threading.Lock(), threading.Event()
        idle, busy = threading.Condition(), 0
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

        def loop() -> None:
            nonlocal busy
            with idle:
                if stopped.is_set():
                    return
                busy += 1
            try:
                # here tensors of inference mode may be changed too, such as the steps' sums
                with torch.inference_mode(), _on(stream):
                    workspace = self.workspace(device)
                    while not stopped.is_set():
                        with lock:
                            item = next(queue, None)
                        if item is None:
                            return
                        work(item, workspace)
            except BaseException:
                stopped.set()
                raise
            finally:
                with idle:
                    busy -= 1
                    idle.notify_all()

        futures: list[Future[None]] = []
        try:
            for _ in range(threads):
                futures.append(self.pool.submit(loop))
            left = set(futures)
            while left:  # in pieces: an interrupt that comes just before a wait does not end it
                done, left = concurrent.futures.wait(left, 0.2)
                for future in done:
                    future.result()
        finally:  # also when the user interrupts, which can happen inside of `submit`, too
            with idle:
                stopped.set()
            wait(futures)
            with idle:
                idle.wait_for(lambda: not busy)


_crew: _Crew | None = None
_made = threading.Lock()


def _the_crew() -> _Crew:
    global _crew
    with _made:
        if _crew is None:
            _crew = _Crew()
        return _crew


def _forget_crew() -> None:
    """A forked child has none of the threads, and maybe a lock that nobody will open."""
    global _crew, _made
    _crew, _made = None, threading.Lock()


os.register_at_fork(after_in_child=_forget_crew)


@dataclass(frozen=True)
class TensorEdit:
    """What is to be done with one tensor of a model.

    stored: F64, F32, F16 or BF16, on the CPU or a GPU, of any shape; it is seen as the matrix
    (shape[0], product of the rest), a bias as a column. steps: makes them, in their order, freshly
    prepared on the device of `stored`; a method that observes is shown the weight here. name: for
    messages. dtype: of the result, that of `stored` by default.
    """

    stored: Tensor
    steps: Callable[[], Sequence[Step]]
    name: str
    dtype: torch.dtype | None = None


Done = Callable[[list[Tensor]], None]


def edit_tensor(
    stored: Tensor,
    steps: Sequence[Step],
    name: str,
    *,
    out: Tensor | None = None,
    dtype: torch.dtype | None = None,
    threads: int | None = None,
) -> Tensor:
    """One tensor of a model after the steps: the bytes that merging its checkpoint would give.

    stored, name, dtype: as of a TensorEdit. steps: in their order, each freshly prepared on the
    device of `stored`. out: filled if given, and may be `stored` itself. threads: at most so many
    work on a CPU's tensor; by default one for each processor, at most 8. Needs memory for a second
    tensor.

    Returns `out`, or a new contiguous tensor of the shape and device of `stored`. Raises
    Refusal where a value becomes or is NaN or infinite, or for another dtype; then neither `stored`
    nor `out` has changed.
    """
    like = (stored.shape, stored.dtype if dtype is None else dtype, stored.device)
    if out is not None and (out.shape, out.dtype, out.device) != like:
        raise ValueError(f"{name}: out must have the shape, dtype and device of the stored tensor")
    made: list[Tensor] = [] if out is None else [out]

    def done(results: list[Tensor]) -> None:
        if out is None:
            made.extend(results)
        else:
            out.copy_(results[0])

    edit = TensorEdit(stored, lambda: steps, name, dtype)
    edit_tensors([([edit], done)], borrowed=out is not None, threads=threads)
    return made[0]


def edit_tensors(
    groups: Iterable[tuple[Sequence[TensorEdit], Done]],
    *,
    borrowed: bool = False,
    threads: int | None = None,
) -> None:
    """Many edits, as `edit_tensor` does one. The steps, too, are prepared on all cores.

    A group is given to its function as a whole, when all of it is computed: a list of new
    contiguous tensors, in its order. An interruption comes before or after that call. The calls
    come from other threads, in any order. borrowed: the tensors' memory is used again after it.

    Raises Refusal as edit_tensor does; groups that were handed over before stay so.
    """
    crew, cores = _the_crew(), worker_count(threads)
    with crew.lock, torch.no_grad():
        for window in _windows(_Group(edits, done) for edits, done in groups):
            _run(crew, window, borrowed, cores)


def on_all_cores(work: Callable[[T], object], items: Sequence[T]) -> None:
    """Do the work on every item, in threads that have one core each; for CPU tensors.

    PyTorch's own threads are no use for small tensors: they cost more than they bring, and much
    more than that where others use the processors too.
    """
    crew, threads = _the_crew(), min(usual_threads(), len(items))
    with crew.lock, one_torch_thread():
        crew.spread(lambda item, _: work(item), items, torch.device("cpu"), threads)


class _Task:
    """One edit that is being done."""

    def __init__(self, edit: TensorEdit) -> None:
        stored = edit.stored
        self.dtype = stored.dtype if edit.dtype is None else edit.dtype
        _target(stored, stored.dtype, edit.name)
        self.target = _target(stored, self.dtype, edit.name)
        self.edit = edit
        with torch.inference_mode(False):
            self.raw = stored.detach().reshape(matrix(stored.shape))
        self.merged: Tensor
        self.steps: Sequence[Step] = ()

    @property
    def shape(self) -> tuple[int, int]:
        return (self.raw.shape[0], self.raw.shape[1])

    @property
    def nbytes(self) -> int:
        return self.raw.numel() * self.dtype.itemsize


@dataclass
class _Group:
    """Edits that belong together."""

    edits: Sequence[TensorEdit]
    done: Done
    left: int = 0  # blocks
    tasks: list[_Task] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tasks = [_Task(edit) for edit in self.edits]

    def hand_over(self) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self.done([task.merged.view(task.edit.stored.shape) for task in self.tasks])


def _target(stored: Tensor, wanted: torch.dtype, name: str) -> Target:
    dtype = NAMES.get(wanted)
    form = format_of(dtype) if dtype else None
    if dtype is None or form is None or stored.device.type == "meta":
        what = "has no values" if stored.device.type == "meta" else f"is {wanted}"
        raise Refusal(f"{name}: {what}; infold merges into tensors of {', '.join(NAMES.values())}")
    return Target(name, dtype, form)


def _windows(groups: Iterable[_Group]) -> Iterator[list[_Group]]:
    """Groups on one device that are edited at the same time."""
    window: list[_Group] = []
    size, device = 0, None
    for group in groups:
        mine = sum(task.nbytes for task in group.tasks)
        where = group.tasks[0].raw.device if group.tasks else device
        if window and (size + mine > _KEPT or where != device):
            yield window
            window, size = [], 0
        window.append(group)
        size, device = size + mine, where
    if window:
        yield window


def _run(crew: _Crew, window: list[_Group], borrowed: bool, threads: int) -> None:
    tasks = [task for group in window for task in group.tasks]
    if not tasks:
        return
    device = tasks[0].raw.device
    total = sum(task.raw.numel() for task in tasks)
    limit = min(_BLOCK, max(_SMALLEST_BLOCK, total // (4 * threads)))
    if device.type != "cpu":
        limit, threads = _GPU_BLOCK, 1
    blocks = [
        (group, task, block)
        for group in window
        for task in group.tasks
        if task.raw.numel()
        for block in cut(*task.shape, limit)
    ]
    for group, _, _ in blocks:
        group.left += 1
    _give_memory(crew, tasks, borrowed)
    lock = threading.Lock()

    def prepare(task: _Task, workspace: Workspace) -> None:
        task.steps = task.edit.steps()

    def see(item: tuple[_Task, int, Block], workspace: Workspace) -> None:
        task, number, block = item
        step, before = list(observers(task.steps))[number]
        show(step, before, _part(task.raw, block), block, task.target, workspace)

    def fill(item: tuple[_Group, _Task, Block], workspace: Workspace) -> None:
        group, task, block = item
        raw, merged = _part(task.raw, block), _part(task.merged, block)
        compute(task.steps, raw, merged, block, task.target, workspace)
        with lock:
            group.left -= 1
            last = not group.left
        if last:
            group.hand_over()

    empty = [group for group in window if not group.left]
    with one_torch_thread():
        crew.spread(prepare, tasks, device, min(threads, len(tasks)))
        for number in count():
            seen = [t for t in tasks if t.raw.numel() and len(list(observers(t.steps))) > number]
            if not seen:
                break
            slabs = (
                (task, number, block)
                for task in seen
                for block in _slabs(*task.shape, limit, _observer(task, number).transposed)
            )
            crew.spread(see, slabs, device, threads)
        crew.spread(fill, blocks, device, min(threads, len(blocks)))
        for group in empty:
            group.hand_over()


def _give_memory(crew: _Crew, tasks: list[_Task], borrowed: bool) -> None:
    with torch.inference_mode(False):
        if borrowed and tasks[0].raw.device.type == "cpu":
            for task, memory in zip(tasks, crew.borrow([t.nbytes for t in tasks]), strict=True):
                task.merged = memory.view(task.dtype).view(task.raw.shape)
            return
        for task in tasks:
            task.merged = torch.empty(task.raw.shape, dtype=task.dtype, device=task.raw.device)


def _observer(task: _Task, number: int) -> Step:
    return list(observers(task.steps))[number][0]


def _part(tensor: Tensor, block: Block) -> Tensor:
    rows = tensor[block.row : block.row + block.rows]
    return rows[:, block.column : block.column + block.columns]


def _slabs(rows: int, columns: int, limit: int, transposed: bool) -> Iterator[Block]:
    """Blocks of whole outputs, which observers may see in any order: whole columns of the matrix
    where it is stored transposed, else whole rows."""
    if not transposed:
        step = max(1, limit // columns)
        yield from (Block(r, min(step, rows - r), 0, columns) for r in range(0, rows, step))
        return
    step = max(64, limit // rows)  # fewer would touch most cache lines several times
    yield from (Block(0, rows, c, min(step, columns - c)) for c in range(0, columns, step))
