"""Runs merges for test_crash.py, each in a forked process, and ends them in the middle.

One JSON request a line, one answer a line. Forking a process that has PyTorch loaded takes a few
milliseconds, starting one seconds, so every single call of the writing primitives can be tried.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import infold
from infold.checkpoint import direct, staging
from infold.merge import beside, inplace, stream
from infold.merge import prepare as preparing

PRIMITIVES = (
    "copy_file_range", "fdatasync", "fsync", "ftruncate", "mkdir", "open", "posix_fallocate",
    "pwrite", "rename", "rmdir", "unlink", "write",
)  # fmt: skip
REMOVING = ("rmdir", "unlink")


class Watch:
    """Counts the calls that change the disk; at the n-th one does what the request asks for."""

    def __init__(self, request: dict[str, Any], seen: mmap.mmap, began: float) -> None:
        self.at, self.how = request.get("at"), request.get("how")
        self.error = request.get("error", errno.ENOSPC)
        self.seen, self.count, self.lock = seen, 0, threading.Lock()
        self.trace: list[tuple[str, str]] = []
        self.began, self.times = began, list[float]()  # of the calls, in seconds since then

    def install(self) -> None:
        bound = getattr(pathlib, "_NormalAccessor", None)  # of Python 3.10, which has taken them
        for name in PRIMITIVES:
            real = getattr(os, name)
            setattr(os, name, self.wrap(name, real))
            if getattr(bound, name, None) is real:
                setattr(bound, name, staticmethod(getattr(os, name)))
        staging._exchange = self.wrap("exchange", staging._exchange)

    def wrap(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **more: Any) -> Any:
            if name == "open" and not given[1] & os.O_CREAT:
                return real(*given, **more)
            if name == "mkdir" and os.path.isdir(given[0]):
                return real(*given, **more)  # there already: nothing changes, nothing fails
            with self.lock:
                if self.how == "fail" and name in REMOVING:
                    return real(*given, **more)  # a full disk still lets go
                self.count += 1
                self.trace.append((name, _place(name, given)))
                self.times.append(time.monotonic() - self.began)
                now = self.count == self.at
                self.seen[:32] = name.encode().ljust(32)
            if now:
                self.strike(name, real, given, more)
            return real(*given, **more)

        return call

    def strike(self, name: str, real: Callable[..., Any], given: Any, more: Any) -> None:
        if self.how == "kill before":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.how == "kill in the middle":
            if name in ("pwrite", "write"):
                with suppress(OSError):  # of O_DIRECT, which does not write such a half
                    real(given[0], bytes(given[1])[: len(given[1]) // 2], *given[2:])
            elif name == "copy_file_range":
                real(given[0], given[1], given[2] // 2, *given[3:])
            else:
                real(*given, **more)
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.how == "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
        elif self.how == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif self.how == "fail":
            raise OSError(self.error, os.strerror(self.error))


def _place(name: str, given: Any) -> str:
    """The path that a call changes."""
    target = given[1] if name in ("copy_file_range", "rename", "exchange") else given[0]
    if isinstance(target, int):
        return os.readlink(f"/proc/self/fd/{target}") if sys.platform == "linux" else ""
    return os.fspath(target)


def prepare(request: dict[str, Any], put: Callable[[Any, str, Any], None] = setattr) -> None:
    """Small blocks, so that a small base has many; and what else the request asks for."""
    put(preparing, "_BLOCK", request.get("block", 4096))
    put(preparing, "_SMALLEST_BLOCK", request.get("block", 4096))
    put(stream, "KEEP_EVERY", request.get("keep", 32 << 10))
    put(inplace, "STEP_BYTES", request.get("step", 16 << 10))
    put(stream, "COPY_PIECE", request.get("copy", 16 << 10))
    if "side" in request:
        put(beside, "_MOST", request["side"])
    if "direct" in request:
        put(direct, "LEAST", request["direct"])
    if request.get("no_exchange"):
        put(staging, "_exchange", lambda one, two: False)
    if request.get("no_preflight"):
        usage = shutil._ntuple_diskusage(1 << 50, 0, 1 << 50)
        put(shutil, "disk_usage", lambda path: usage)
    for name in ("fsync", "fdatasync"):
        # a killed process loses nothing of the page cache, and waiting for a disk takes long
        put(os, name, os.fstat)


def _run(request: dict[str, Any]) -> infold.Receipt | infold.Undone:
    """The verb on its own: the folder `base`, in place unless there is an `out`."""
    verb, threads = request.get("verb", "merge"), request.get("threads", 1)
    more: dict[str, Any] = {"undo": True} if request.get("undo") else {}
    if "force" in request:
        more["force"] = request["force"]
    inputs = [request["base"], *([] if verb == "undo" else [request["adapter"]])]
    if "out" in request:
        return getattr(infold, verb)(*inputs, request["out"], threads=threads, **more)  # type: ignore[no-any-return]
    return getattr(infold, verb)(*inputs, in_place=True, threads=threads)  # type: ignore[no-any-return]


def merge(request: dict[str, Any], seen: mmap.mmap, began: float) -> dict[str, Any]:
    """In the forked process: the merge. began: when it was forked, by `time.monotonic`."""
    prepare(request)
    # a process that was started in the background may have inherited that interrupts are ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    watch = Watch(request, seen, began)
    watch.install()
    result: dict[str, Any] = {}
    try:
        receipt = _run(request)
        result["status"] = "done"
        result["resumed"] = receipt.resumed_bytes
        result["shards"] = receipt.shards
    except infold.InfoldError as error:
        result["status"], result["message"] = type(error).__name__, str(error)
    except BaseException as error:
        result["status"], result["message"] = f"escaped {type(error).__name__}", str(error)
    result["calls"] = watch.count
    result["trace"], result["times"] = (
        (watch.trace, watch.times) if request.get("trace") else ([], [])
    )
    return result


class Server:
    """Forks, waits, answers."""

    def __init__(self) -> None:
        self.running: dict[int, tuple[int, mmap.mmap]] = {}

    def start(self, request: dict[str, Any]) -> int:
        seen = mmap.mmap(-1, 32)
        reader, writer = os.pipe()
        began = time.monotonic()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            answer = json.dumps(merge(request, seen, began)).encode()
            with open(writer, "wb") as pipe:
                pipe.write(answer)
            os._exit(0)
        os.close(writer)
        self.running[pid] = reader, seen
        if "delay" in request:
            time.sleep(max(0.0, began + request["delay"] - time.monotonic()))
            os.kill(pid, signal.SIGKILL)
        return pid

    def wait(self, pid: int) -> dict[str, Any]:
        reader, seen = self.running[pid]
        _, status = os.waitpid(pid, os.WUNTRACED)
        if os.WIFSTOPPED(status):
            return {"status": "stopped", "pid": pid}
        del self.running[pid]
        with open(reader, "rb") as pipe:
            answer = pipe.read()
        if os.WIFSIGNALED(status):
            last = seen[:32].rstrip(b" \0").decode()
            return {"status": "killed", "signal": os.WTERMSIG(status), "last": last}
        return json.loads(answer) if answer else {"status": f"exit {status}"}  # type: ignore[no-any-return]

    def serve(self) -> None:
        for line in sys.stdin:
            request = json.loads(line)
            if "continue" in request:
                pid = request["continue"]
                os.kill(pid, signal.SIGCONT)
            else:
                pid = self.start(request)
            print(json.dumps(self.wait(pid)), flush=True)


class Runner:
    """Asks a process of this for merges."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(request, default=str) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def close(self) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()


if __name__ == "__main__":
    import infold.merge.run

    Server().serve()
