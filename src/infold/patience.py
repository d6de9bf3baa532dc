"""An end to regular expressions that never end.

The patterns of an adapter are anybody's, and a few characters are enough to keep Python's matcher
busy for years. It can be interrupted, but only by a signal, which only the main thread gets.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from infold.errors import Refusal

__all__ = ["patience"]

SECONDS = 20.0  # of the process's own time; the patterns of real adapters take milliseconds


@contextmanager
def patience(what: str) -> Iterator[None]:
    """Refuse `what` where this block takes more than SECONDS of processor time.

    In other threads than the main one, and where the timer is somebody else's, there is no such
    limit; an interrupt ends it there too.
    """
    timer = getattr(signal, "ITIMER_VIRTUAL", None)
    main = threading.current_thread() is threading.main_thread()
    if timer is None or not main or signal.getitimer(timer)[0]:
        yield
        return

    def enough(number: int, frame: FrameType | None) -> None:
        raise Refusal(
            f"{what}: takes longer than {SECONDS:g} s of processor time; that happens with "
            "patterns (rank_pattern, alpha_pattern, ...) that are made to be slow"
        )

    before = signal.signal(signal.SIGVTALRM, enough)
    try:
        signal.setitimer(timer, SECONDS)
        yield
    finally:
        signal.setitimer(timer, 0)
        signal.signal(signal.SIGVTALRM, signal.SIG_DFL if before is None else before)
