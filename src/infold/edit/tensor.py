"""One edit of one tensor in memory, its blocks spread over threads."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from infold.dtypes import NAMES
from infold.edit.blocks import Block, cut, matrix
from infold.edit.steps import Step, Target, Workspace, compute, observers, show
from infold.edit.threads import one_torch_thread, take_one_core, usual_threads
from infold.errors import Refusal
from infold.formats import format_of

__all__ = ["edit_tensor"]

_BLOCK = 1 << 20  # elements of a block: larger ones are not faster
_SMALLEST_BLOCK = 1 << 16
_GPU_BLOCK = 8 << 20
_KEPT = 128 << 20  # bytes of a second tensor that are kept for the next edit in place


def _on(stream: torch.cuda.Stream | None) -> AbstractContextManager[object]:
    """The caller's stream, which is a matter of the thread."""
    return nullcontext() if stream is None else torch.cuda.stream(stream)


class _Crew:
    """Threads that live as long as the process, each with buffers that it keeps (8 MB or so).

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

    def like(self, raw: Tensor) -> Tensor:
        """Memory for a second `raw`, until the lock is given back."""
        if raw.device.type != "cpu" or raw.nbytes > _KEPT:
            return _empty(raw, raw.dtype)
        if self.second.numel() < raw.nbytes:
            self.second = torch.empty(raw.nbytes, dtype=torch.uint8)
        return self.second[: raw.nbytes].view(raw.dtype).view(raw.shape)

    def spread(
        self,
        work: Callable[[Block, Workspace], None],
        blocks: Iterable[Block],
        device: torch.device,
        threads: int,
    ) -> None:
        """Do the work on every block; the first failure stops all, and is raised."""
        queue, lock, stopped = iter(blocks), threading.Lock(), threading.Event()
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

        def loop() -> None:
            try:
                # here tensors of inference mode may be changed too, such as the steps' sums
                with torch.inference_mode(), _on(stream):
                    workspace = self.workspace(device)
                    while not stopped.is_set():
                        with lock:
                            block = next(queue, None)
                        if block is None:
                            return
                        work(block, workspace)
            except BaseException:
                stopped.set()
                raise

        futures = [self.pool.submit(loop) for _ in range(threads)]
        try:
            for future in futures:
                future.result()
        finally:  # also when the user interrupts
            stopped.set()
            wait(futures)


def _empty(raw: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(raw.shape, dtype=dtype, device=raw.device)


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

    stored: F64, F32, F16 or BF16, on the CPU or a GPU, of any shape; it is seen as the matrix
    (shape[0], product of the rest), a bias as a column. steps: in their order, each freshly
    prepared on the device of `stored`; a method that observes is shown the weight here. name: for
    messages. out: filled if given, and may be `stored` itself. dtype: of the result, that of
    `stored` by default; float64 is rounded to it once. threads: at most so many work on a
    CPU's tensor; by default one for each processor, at most 8. Needs memory for a second tensor.

    Returns `out`, or a new contiguous tensor of the shape and device of `stored`. Raises
    Refusal where a value becomes or is NaN or infinite, or for another dtype; then neither `stored`
    nor `out` has changed.
    """
    dtype = stored.dtype if dtype is None else dtype
    _target(stored, stored.dtype, name)
    target = _target(stored, dtype, name)
    like = (stored.shape, dtype, stored.device)
    if out is not None and (out.shape, out.dtype, out.device) != like:
        raise ValueError(f"{name}: out must have the shape, dtype and device of the stored tensor")
    if threads is not None and threads < 1:
        raise ValueError(f"threads = {threads}: at least 1")
    crew, count = _the_crew(), threads or usual_threads()
    with crew.lock, torch.no_grad():
        with torch.inference_mode(False):
            raw = stored.detach().reshape(matrix(stored.shape))
            merged = _empty(raw, dtype) if out is None or dtype != raw.dtype else crew.like(raw)
            if raw.numel():
                _run(crew, raw, merged, steps, target, count)
        merged = merged.view(stored.shape)
        return merged if out is None else out.copy_(merged)


def _target(stored: Tensor, wanted: torch.dtype, name: str) -> Target:
    dtype = NAMES.get(wanted)
    form = format_of(dtype) if dtype else None
    if dtype is None or form is None or stored.device.type == "meta":
        what = "has no values" if stored.device.type == "meta" else f"is {wanted}"
        raise Refusal(f"{name}: {what}; infold merges into tensors of {', '.join(NAMES.values())}")
    return Target(name, dtype, form)


def _run(
    crew: _Crew, raw: Tensor, merged: Tensor, steps: Sequence[Step], target: Target, threads: int
) -> None:
    """Fill `merged` from `raw`, both (rows, columns)."""
    device = raw.device
    shape = (raw.shape[0], raw.shape[1])
    limit = min(_BLOCK, max(_SMALLEST_BLOCK, raw.numel() // (4 * threads)))
    if device.type != "cpu":
        limit, threads = _GPU_BLOCK, 1
    threads = min(threads, -(-raw.numel() // limit))

    def part(tensor: Tensor, block: Block) -> Tensor:
        rows = tensor[block.row : block.row + block.rows]
        return rows[:, block.column : block.column + block.columns]

    def fill(block: Block, workspace: Workspace) -> None:
        compute(steps, part(raw, block), part(merged, block), block, target, workspace)

    with one_torch_thread():
        for step, before in observers(steps):

            def see(
                block: Block,
                workspace: Workspace,
                step: Step = step,
                before: Sequence[Step] = before,
            ) -> None:
                show(step, before, part(raw, block), block, target, workspace)

            crew.spread(see, _slabs(*shape, limit, step.transposed), device, threads)
        crew.spread(fill, cut(*shape, limit), device, threads)


def _slabs(rows: int, columns: int, limit: int, transposed: bool) -> Iterator[Block]:
    """Blocks of whole outputs, which observers may see in any order: whole columns of the matrix
    where it is stored transposed, else whole rows."""
    if not transposed:
        step = max(1, limit // columns)
        yield from (Block(r, min(step, rows - r), 0, columns) for r in range(0, rows, step))
        return
    step = max(64, limit // rows)  # fewer would touch most cache lines several times
    yield from (Block(0, rows, c, min(step, columns - c)) for c in range(0, columns, step))
