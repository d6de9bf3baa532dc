"""Time and memory of a phase."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["measured"]

_EVERY = 0.02  # seconds between two looks at the memory


@contextmanager
def measured() -> Iterator[dict[str, Any]]:
    """Yields a dict that has, behind the block, seconds and memory: {before, peak, after}.

    Memory is what is resident of this process, in bytes (without a server's); None where the
    system has no /proc.
    """
    found: dict[str, Any] = {}
    before = peak = _resident()
    over = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.wait(_EVERY):
            peak = max(peak, _resident())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    started = time.monotonic()
    try:
        yield found
    finally:
        seconds = time.monotonic() - started
        over.set()
        watcher.join()
        after = _resident()
        memory = {"before": before, "peak": max(peak, after), "after": after}
        found.update(seconds=round(seconds, 3), memory=memory if before else None)


def _resident() -> int:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
