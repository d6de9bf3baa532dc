"""Starting and ending a process of one verb, without what neither of them needs."""

from __future__ import annotations

import atexit
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

__all__ = ["Ending", "lasting_imports", "run"]


def run() -> None:
    """Entry point of the console script: what is imported first can be interrupted too."""
    try:
        from infold.cli.main import run as run_verb
    except KeyboardInterrupt:
        print("infold: interrupted", file=sys.stderr)
        sys.exit(130)
    run_verb()


@contextmanager
def lasting_imports() -> Iterator[None]:
    """Imports in this block make objects that live as long as the process: they are not looked
    through for garbage, now or at the exit. That saves half a second of processor time."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


class Ending:
    """How this process ends, made before the heavy imports: Python joins threads and calls the exit
    handlers, of which this is the last, and then it leaves all memory to the system.

    To take PyTorch's modules apart is half a second of processor time, more than many a merge's
    arithmetic, and nothing depends on it: files are closed and on the disk when a verb returns.
    """

    def __init__(self) -> None:
        self._code: int | None = None
        atexit.register(self._leave)

    def exit(self, code: object) -> None:
        """As `sys.exit`. Does not return."""
        self._code = 0 if code is None else code if isinstance(code, int) else None
        sys.exit(code)  # type: ignore[arg-type]

    def _leave(self) -> None:
        if self._code is None:  # a text, which Python itself tells
            return
        for stream in (sys.stdout, sys.stderr):
            if stream is not None and not stream.closed:
                with suppress(OSError):
                    stream.flush()
        os._exit(self._code & 0xFF)
