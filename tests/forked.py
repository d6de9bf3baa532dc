"""Processes of Python's own that start in milliseconds: forks of one that has the libraries loaded.

Loading PyTorch and transformers takes a process seconds of work, and is not what a test is about
that kills a training. Only libraries are loaded beforehand, never infold; the fork ends as any
process does, or is killed. What a start itself does (imports, streams that are closed, signals) is
tested in processes that are started in earnest.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any, NoReturn

INFOLD = Path(sys.executable).with_name("infold")
LIBRARIES = {
    "torch": ("torch", "safetensors.torch", "typer", "rich.console", "rich.progress", "blake3"),
    "training": ("torch.distributed.tensor", "peft", "accelerate.accelerator", "matplotlib.figure",
                 "transformers.trainer", "transformers.models.llama.modeling_llama"),
}  # fmt: skip


class Forked:
    """Runs scripts, or modules as `python -m` does, in forks of a process with LIBRARIES[kind]."""

    def __init__(self, kind: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,  # some libraries talk while they are loaded
            text=True,
        )

    def run(
        self,
        what: Path | str,
        *words: object,
        cwd: Path | None = None,
        env: dict[str, str] | None = None,
    ) -> CompletedProcess[str]:
        """what: the Path of a script, or the name of a module."""
        assert self.process.stdin and self.process.stdout and self.process.stderr
        with tempfile.TemporaryDirectory() as folder:
            streams = [os.path.join(folder, name) for name in ("stdout", "stderr")]
            request = {
                "what": str(what), "words": [str(word) for word in words],
                "streams": streams, "cwd": str(cwd or Path.cwd()), "env": env or dict(os.environ),
            }  # fmt: skip
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            code = self.process.stdout.readline()
            assert code, self.process.stderr.read()
            out, err = (Path(stream).read_text() for stream in streams)
        return CompletedProcess([str(what), *request["words"]], int(code), out, err)

    def close(self) -> None:
        self.process.communicate(timeout=30)  # closes its stdin first


@functools.cache
def forked(kind: str) -> Forked:
    """The one of this test process, which ends with it."""
    made = Forked(kind)
    atexit.register(made.close)
    return made


def trained(script: Path, *words: object, cwd: Path | None = None) -> CompletedProcess[str]:
    """Run a script that trains."""
    return forked("training").run(script, *words, cwd=cwd)


def infold_command(
    *words: object, cwd: Path | None = None, env: dict[str, str] | None = None, kind: str = "torch"
) -> CompletedProcess[str]:
    """Run the command line. kind: "training" where the verb needs transformers."""
    return forked(kind).run(INFOLD, *words, cwd=cwd, env=env)


def serve() -> dict[str, Any]:
    """Forks for each line that comes. Returns, in the fork, what it has to run."""
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        if (pid := os.fork()) == 0:
            return request
        print(ended(pid), flush=True)
    sys.exit()


def ended(pid: int) -> int:
    """Wait for a process. Returns its exit code, or the negative signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def apart(request: dict[str, Any]) -> None:
    """Into folder and environment of the request; nothing to read, and its files to write to."""
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, stream in enumerate(request["streams"], 1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT, 0o600), number)


def run_main(what: str, words: list[str]) -> None:
    """As `python what words`, or for the name of a module `python -m what words`."""
    sys.argv = [what, *words]
    if os.sep in what:
        sys.path[0] = os.path.dirname(what)
        runpy.run_path(what, run_name="__main__")
    else:
        runpy.run_module(what, run_name="__main__", alter_sys=True)


def end(code: int | None) -> NoReturn:
    """End as the interpreter does, but leave the memory to the system: to take thousands of modules
    apart copies the pages that forks share, and takes longer than most commands."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not stream.closed:
            stream.flush()
    os._exit((code or 0) & 0xFF)


if __name__ == "__main__":
    for name in LIBRARIES[sys.argv[1]]:
        importlib.import_module(name)
    assert "infold" not in sys.modules
    gc.freeze()  # else each fork's collections would look through all of it
    task = serve()
    apart(task)
    try:
        run_main(task["what"], task["words"])
    except SystemExit as over:
        if not isinstance(over.code, int | None):
            raise  # a text, which goes to standard error
        end(over.code)
    end(0)
