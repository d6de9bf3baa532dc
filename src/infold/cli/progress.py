"""Progress over bytes and over steps: on a terminal a bar, elsewhere a line each half minute."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from infold.sizes import bytes_text

__all__ = ["byte_progress", "step_progress"]

_EVERY = 30.0  # seconds between two lines in a log


class _Log:
    """Lines for standard error where that is no terminal; none where little time is taken."""

    def __init__(self, label: str) -> None:
        self.label, self.lock = label, threading.Lock()
        self.told = time.monotonic()
        self.since: tuple[float, int] | None = None  # from where on the rate counts

    def show(self, done: int, total: int, text: Callable[[float], str]) -> None:
        """text: what is said, of units a second since the line before; 0 where that is unknown.

        What an earlier run has done, or is done again, counts in one line's rate at most.
        """
        now = time.monotonic()
        with self.lock:
            if self.since is None or done < self.since[1]:
                self.since = now, done
            if now - self.told < _EVERY or done >= total:
                return
            began, before = self.since
            rate = (done - before) / (now - began) if now > began else 0.0
            self.told, self.since = now, (now, done)
        left = f", {_time((total - done) / rate)} left" if rate else ""
        print(f"{self.label}: {text(rate)}{left}", file=sys.stderr, flush=True)


def _time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


@contextmanager
def byte_progress(label: str, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A callback (bytes done, bytes in all) that tells bytes, rate and remaining time on stderr."""
    if quiet:
        yield None
        return
    if not sys.stderr.isatty():
        log = _Log(label)

        def tell(done: int, total: int) -> None:
            sizes = f"{bytes_text(done)} of {bytes_text(total)}"
            log.show(done, total, lambda rate: sizes + (f", {bytes_text(rate)}/s" if rate else ""))

        yield tell
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
    """A callback (steps done, steps in all, loss) that tells them and the remaining time.

    at_once: a bar that moves is there before the first step, while libraries and models load.
    """
    if quiet:
        yield None
        return
    if not sys.stderr.isatty():
        log = _Log(label)

        def tell(done: int, total: int, loss: float | None) -> None:
            told = "" if loss is None else f", loss {loss:.4f}"
            log.show(done, total, lambda rate: f"{done:,} of {total:,}{told}")

        yield tell
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
