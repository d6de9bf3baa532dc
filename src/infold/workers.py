"""Threads that can be waited for while Ctrl-C comes in between."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

__all__ = ["Worker", "run_all"]


class Worker(threading.Thread):
    """A thread that says itself when its work is over.

    `Thread.join` does not do: up to Python 3.12 a join that an interrupt ends takes the thread for
    ended while it still runs (it only looks whether the thread's lock is held, not by whom). The
    process would then leave, and pull the interpreter from under a thread that is inside PyTorch.
    """

    def __init__(self, work: Callable[[], None], name: str) -> None:
        super().__init__(daemon=True, name=name)
        self._work = work
        self._over = threading.Event()

    def start(self) -> None:
        with _interrupts_later():  # else it could run, and not be known to run
            super().start()

    def run(self) -> None:
        try:
            self._work()
        finally:
            self._over.set()

    def wait(self) -> None:
        """Until its work is over; at once where it was never started."""
        if self.ident is not None:
            # in pieces: an interrupt that comes just before a wait does not end it
            while not self._over.wait(0.2):
                pass
            self.join()


@contextmanager
def _interrupts_later() -> Iterator[None]:
    """Hold Ctrl-C back until the block is done. Only the main thread is ever interrupted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: held.append(number))
    try:
        yield
    finally:
        # None: it was not set from Python, and cannot be set again from here
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)
        if held:
            signal.raise_signal(signal.SIGINT)


def run_all(workers: Sequence[Worker], stop: Callable[[], None]) -> None:
    """Start all, and wait for all. On an interrupt `stop` is called, and all are waited for."""
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.wait()
    except BaseException:
        stop()
        for worker in workers:
            worker.wait()
        raise
