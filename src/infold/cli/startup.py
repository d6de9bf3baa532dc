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
    ending = Ending()
    try:
        from infold.cli.main import run as run_verb
    except KeyboardInterrupt:
        print("infold: interrupted", file=sys.stderr)
        sys.exit(130)
    try:
        run_verb()
    except SystemExit as ended:
        ending.code = 0 if ended.code is None else ended.code
        raise


@contextmanager
def lasting_imports() -> Iterator[None]:
    """Imports in this block make objects that live as long as the process: they are not looked
    through for garbage, now or at the exit. That saves half a second of processor time; and a
    twentieth, that the BLAS of NumPy, which no verb uses, gets no threads to spin."""
    threads = "OPENBLAS_NUM_THREADS"
    told = threads in os.environ
    os.environ.setdefault(threads, "1")
    gc.disable()
    try:
        yield
    finally:
        if not told:
            del os.environ[threads]
        gc.freeze()
        gc.enable()


class Ending:
    """How this process ends, made before the heavy imports: Python joins threads, calls the exit
    handlers that came later, and then this, which leaves all memory to the system.

    To take PyTorch's modules apart is a tenth of a second of processor time, and nothing depends on
    it: files are closed and on the disk when a verb returns.
    """

    shortened = (
        True  # a verb that runs code which is not ours, and may leave files open, says False
    )

    def __init__(self) -> None:
        self.code: object = None  # of the verb, when it has ended
        atexit.register(self._leave)

    def _leave(self) -> None:
        # a code that is a text is Python's to tell; there is none where no verb ended
        if not self.shortened or not isinstance(self.code, int):
            return
        for stream in (sys.stdout, sys.stderr):
            if stream is not None and not stream.closed:
                with suppress(OSError):
                    stream.flush()
        os._exit(self.code & 0xFF)
