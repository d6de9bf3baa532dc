"""A GGUF file served, or asked in process, by llama.cpp through xllamacpp.

python -m infold.deploy.gguf serve FILE PORT
python -m infold.deploy.gguf answer FILE    (the question as a line of JSON on standard input)
"""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

from infold.child import asked, run_child
from infold.deploy.local import LocalFailure
from infold.disk import storage_errors
from infold.errors import Refusal
from infold.extras import require

__all__ = ["ask_gguf", "gguf_command"]


def gguf_command(file: Path, port: int) -> list[str]:
    """The command that serves a file. Raises Refusal without xllamacpp, or for another format."""
    require("gguf", "xllamacpp")
    with storage_errors(file), file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise Refusal(f"{file}: does not begin with GGUF, so it is no such file")
    return [sys.executable, "-m", __name__, "serve", str(file), str(port)]


def ask_gguf(file: Path, request: dict[str, Any], timeout: float = 900) -> str:
    """The answer to a chat request of the file loaded in a process of its own, without HTTP.

    Raises LocalFailure where llama.cpp does not load it, or does not answer within `timeout` s.
    """
    told = run_child(
        [sys.executable, "-m", __name__, "answer", str(file)], request, timeout=timeout
    )
    if told.late:
        raise LocalFailure(f"{file}: did not answer within {timeout:.0f} s")
    if told.code:
        raise LocalFailure(f"{file}: llama.cpp cannot run it: {_reason(told.errors)}")
    found: dict[str, Any] = json.loads(told.lines[-1])
    return str(found["choices"][0]["message"]["content"])


def _reason(said: str) -> str:
    """The first error of llama.cpp's log, of which all others follow; else the last line."""
    lines = said.strip().splitlines() or ["it said nothing"]
    errors = [told[1] for line in lines if (told := re.match(r"[\d.]+ E (.*)", line))]
    return errors[0].strip() if errors else lines[-1]


def _open(file: str, port: int) -> Any:
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = file
    settings.hostnames = ["127.0.0.1"]
    settings.port = port
    settings.n_ctx = 2048
    settings.n_parallel = 1
    settings.warmup = False
    return xllamacpp.Server(settings)


def main() -> None:
    what, file = sys.argv[1:3]
    if what == "serve":
        server = _open(file, int(sys.argv[3]))
        print(f"listening on {server.listening_address}", flush=True)
        while True:
            time.sleep(3600)
    question = asked()  # first: from here on this process ends with the one that asked
    found = _open(file, 0).handle_chat_completions(question)
    print(found if isinstance(found, str) else json.dumps(found))


if __name__ == "__main__":
    main()
