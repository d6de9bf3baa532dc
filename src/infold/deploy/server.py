"""A server on loopback that does not outlive the block that uses it."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

from infold.errors import InfoldError, Refusal

if TYPE_CHECKING:
    import psutil

__all__ = ["LOOPBACK", "Server", "ServerFailure", "free_port", "serve"]

LOOPBACK = "127.0.0.1"
_PATIENCE = 5.0  # seconds from SIGTERM to SIGKILL


class ServerFailure(InfoldError):
    """The server died, or did not answer in time. Nothing of it is left running."""

    exit_code = 1


@dataclass
class Server:
    """A running server. `resident` is the memory of all of its processes."""

    port: int
    ready_seconds: float
    process: subprocess.Popen[bytes]
    log: IO[bytes]

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self.port}"

    def resident(self) -> int:
        """Bytes in memory, summed over the server's processes."""
        import psutil

        total = 0
        with suppress(psutil.NoSuchProcess):
            leash = psutil.Process(self.process.pid)
            for process in leash.children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    total += process.memory_info().rss
        return total

    def check(self, wait: float = 0) -> None:
        """Raise ServerFailure, with the end of its log, if it has died, or does within `wait` s."""
        if wait:
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(wait)
        if self.process.poll() is not None:
            code = self.process.returncode
            raise ServerFailure(f"the server died with exit code {code}: {_tail(self.log)}")


def free_port(port: int) -> int:
    """`port`, or a free one for 0. Raises Refusal where another program listens on it."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except (OSError, OverflowError) as error:
            raise Refusal(
                f"--port {port}: {getattr(error, 'strerror', None) or error}; choose another, or 0 "
                "for a free one"
            ) from None
        return int(probe.getsockname()[1])


@contextmanager
def serve(
    command: Sequence[str], port: int, *, health: str = "/health", timeout: float = 300
) -> Iterator[Server]:
    """Start a server, wait until it is healthy, and end it with all of its processes.

    It ends too where this process is killed: its leash holds a pipe that closes then.
    Raises ServerFailure where it dies or is not ready within `timeout` seconds.
    """
    log = tempfile.TemporaryFile()
    process = subprocess.Popen(
        [sys.executable, "-m", "infold.leash", str(_PATIENCE), *command],
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=log,
        start_new_session=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    server = Server(port, 0.0, process, log)
    began = time.monotonic()
    try:
        while not _healthy(port, health):
            server.check()
            if time.monotonic() - began > timeout:
                raise ServerFailure(
                    f"the server was not ready within {timeout:.0f} s: {_tail(log)}; give a "
                    "longer --timeout"
                )
            time.sleep(0.1)
        server.ready_seconds = time.monotonic() - began
        server.check()  # else another program answers on the port that our server did not get
        yield server
    finally:
        _stop(process)
        log.close()


def _healthy(port: int, path: str) -> bool:
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Let go of the leash; if that does not end the group, kill it. Returns when all have ended:
    a kill is an order, and on a busy machine it takes a while until it is carried out."""
    family: list[psutil.Process] = []
    try:
        import psutil

        with suppress(psutil.Error):
            family = psutil.Process(process.pid).children(recursive=True)
        if process.stdin is not None:
            process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_PATIENCE + 2)
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        end = time.monotonic() + _PATIENCE
        while any(map(_runs, family)) and time.monotonic() < end:
            time.sleep(0.01)


def _runs(process: psutil.Process) -> bool:
    import psutil

    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _tail(log: IO[bytes], lines: int = 3) -> str:
    log.flush()
    log.seek(0)
    said = [x.strip() for x in log.read().decode(errors="replace").splitlines() if x.strip()]
    return " / ".join(said[-lines:]) or "it said nothing"
