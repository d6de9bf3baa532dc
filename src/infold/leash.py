"""Runs a command, and ends it when standard input closes, which happens however our parent ends.

    python -m infold.leash SECONDS COMMAND...

SIGTERM first; SIGKILL to the whole process group once the command has ended, at the latest after
SECONDS. Imports nothing of infold.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading


def main() -> int:
    patience, command = float(sys.argv[1]), sys.argv[2:]
    try:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr)
        return 127

    closed = threading.Event()

    def watch() -> None:
        while os.read(0, 1):
            pass
        closed.set()
        child.terminate()
        try:
            child.wait(patience)
        except subprocess.TimeoutExpired:
            pass
        os.killpg(0, signal.SIGKILL)  # whatever the server started; and this process

    threading.Thread(target=watch, daemon=True).start()
    code = child.wait()
    if closed.is_set():  # what it started is still there, and nobody else ends that
        os.killpg(0, signal.SIGKILL)
    return code


if __name__ == "__main__":
    sys.exit(main())
