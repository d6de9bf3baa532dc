"""How a process of the command line ends."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import atexit, sys, tempfile, threading, time
from infold.cli import startup
sys.argv = ["infold", *{words!r}]
def late():
    time.sleep(0.2)
    print("a thread that was not waited for")
def add(handler=atexit.register):
    import infold.cli.main as verbs
    run = verbs.run
    def wrapped():
        handler(print, "an exit handler")
        threading.Thread(target=late).start()
        run()
    verbs.run = wrapped
add()
startup.run()
"""


def ended(*words: str) -> subprocess.CompletedProcess[str]:
    code = SCRIPT.format(words=words)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_threads_and_exit_handlers_end_before_the_process() -> None:
    ran = ended("--version")

    assert ran.returncode == 0 and ran.stdout.startswith("infold ")
    assert ran.stdout.splitlines()[1:] == ["a thread that was not waited for", "an exit handler"]


def test_the_exit_code_is_the_verb_s() -> None:
    assert [ended(word).returncode for word in ("--help", "merge")] == [0, 2]
