"""Time and memory of a phase."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from infold.machine import resident_bytes

__all__ = ["measured"]

_EVERY = 0.02  # seconds between two looks at the memory


@contextmanager
def measured() -> Iterator[dict[str, Any]]:
    """Yields a dict that has, behind the block, seconds and memory: {before, peak, after}.

    Memory is what is resident of this process, in bytes (without a server's); None where the
    system has no /proc.
    """
    found: dict[str, Any] = {}
    before = peak = resident_bytes()
    over = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.wait(_EVERY):
            peak = max(peak, resident_bytes())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    started = time.monotonic()
    try:
        yield found
    finally:
        seconds = time.monotonic() - started
        over.set()
        watcher.join()
        after = resident_bytes()
        memory = {"before": before, "peak": max(peak, after), "after": after}
        found.update(seconds=round(seconds, 3), memory=memory if before else None)
