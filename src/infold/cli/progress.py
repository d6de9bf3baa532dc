"""Progress bars over bytes and over steps: on a terminal a bar, elsewhere nothing."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["byte_progress", "step_progress"]


@contextmanager
def byte_progress(label: str, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A callback (bytes done, bytes in all) that draws bytes, rate and remaining time on stderr."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    lock = threading.Lock()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=None)

        def show(done: int, total: int) -> None:
            with lock:
                bar.update(task, completed=done, total=total)

        yield show


@contextmanager
def step_progress(
    label: str, quiet: bool, at_once: bool = False
) -> Iterator[Callable[[int, int, float | None], None] | None]:
    """A callback (steps done, steps in all, loss) that draws them and the remaining time.

    at_once: a bar that moves is there before the first step, while libraries and models load.
    """
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=None, loss="", visible=at_once)

        def show(done: int, total: int, loss: float | None) -> None:
            text = "" if loss is None else f"loss {loss:.4f}"
            bar.update(task, completed=done, total=total, loss=text, visible=True)

        yield show
