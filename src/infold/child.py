"""Another program that is asked by one line of JSON, and does not outlive the one that asked.

What is asked is a line of its standard input, which stays open: where that closes, the process that
asked has ended, however it did, and so does the program.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

__all__ = ["STEP", "Told", "asked", "run_child"]

STEP = "step "  # begins a line `step DONE ALL`, which is no result
Progress = Callable[[int, int, float | None], None]


@dataclass(frozen=True)
class Told:
    """What a process said. late: it was ended, since its time was over."""

    lines: list[str]
    errors: str
    code: int
    late: bool


def run_child(
    command: Sequence[str | os.PathLike[str]],
    given: object,
    *,
    timeout: float,
    progress: Progress | None = None,
) -> Told:
    """Run a program that reads `given` by `asked`, or as that does, to its end.

    It asks no hub. timeout: seconds, after which it is killed. Raises OSError where the command
    cannot be started.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            errors="replace",
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"},
        )
        late = threading.Event()

        def stop() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(timeout, stop)
        timer.start()
        try:
            lines = _heard(process, json.dumps(given), progress)
        finally:
            timer.cancel()
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with suppress(BrokenPipeError):
                    assert pipe is not None
                    pipe.close()
        errors.seek(0)
        return Told(lines, errors.read().strip(), process.returncode, late.is_set())


def asked() -> Any:
    """What `run_child` gave to this process, which ends from now on with the one that asked."""
    given = json.loads(sys.stdin.readline())

    def watch() -> None:
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    return given


def _heard(process: subprocess.Popen[str], given: str, progress: Progress | None) -> list[str]:
    """All lines that the process prints until its end; steps are passed on as they come."""
    assert process.stdin is not None and process.stdout is not None
    with suppress(BrokenPipeError):  # it died; why stands in its errors
        process.stdin.write(given + "\n")
        process.stdin.flush()
    lines = []
    for line in process.stdout:
        if line.startswith(STEP):
            if progress is not None:
                done, total = map(int, line.removeprefix(STEP).split())
                progress(done, total, None)
        else:
            lines.append(line)
    process.wait()
    return lines
