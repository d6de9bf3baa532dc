"""The smoke test: a real server, a real client, the right answer, and no growth over time."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from infold.checkpoint.files import locate
from infold.deploy.facts import check_as_merged, check_deployable, read_facts
from infold.deploy.gguf import ask_gguf, gguf_command
from infold.deploy.local import run_local
from infold.deploy.server import Server, ServerFailure, free_port, serve
from infold.errors import Refusal
from infold.extras import require
from infold.version import __version__

__all__ = ["PROMPT", "growth", "smoke_test"]

PROMPT = "Name three colours."
_NEW_TOKENS = 16
_SLOWER = 2.0  # the last third's median latency, over the first third's
_HASTE = 0.1  # seconds that are never called slower: answers of a few ms double by chance
_FATTER = 0.10  # resident memory at the end, over that after the first third
_ALLOWED = 64 << 20  # bytes that are never called growth


def smoke_test(
    merged: str | os.PathLike[str],
    *,
    port: int = 0,
    requests: int = 30,
    seconds: float = 10,
    timeout: float = 300,
    prompt: str = PROMPT,
    progress: Callable[[int, int, float | None], None] | None = None,
) -> dict[str, Any]:
    """Serve a merged folder (`transformers serve`) or a GGUF file (llama.cpp), and ask it.

    The greedy answer must equal that of the model loaded without a server. Then `requests` are sent
    over `seconds`, and neither latency nor the server's memory may grow.
    Returns a record whose `ok` tells the result and whose `problems` say what failed.
    Raises Refusal for what cannot be started (no extra, port in use), ServerFailure for a server
    that dies or is late, LocalFailure for a model that does not load.
    """
    place = locate(merged)
    gguf = place if place.suffix == ".gguf" else None
    require("serve" if gguf is None else "gguf", "openai", "psutil")
    if requests < 6:
        raise Refusal(f"--requests {requests}: at least 6, to compare their first and last thirds")
    if not (0 <= seconds < math.inf and 0 < timeout < math.inf):
        raise Refusal(
            f"--seconds {seconds:g} --timeout {timeout:g}: the first must be 0 or more, the second "
            "above 0, and both finite"
        )
    port = free_port(port)
    talk: dict[str, Any] = {"max_tokens": _NEW_TOKENS, "temperature": 0}
    digest = None
    if gguf is not None:
        check_as_merged(gguf)
        chat, name = True, "xllamacpp"
        command, model = gguf_command(gguf, port), "gguf"
        local = ask_gguf(gguf, {"messages": _messages(prompt), **talk})
    else:
        facts = read_facts(place)
        if not facts.generates:
            why = f"{facts.architecture} is no causal language model"
            raise Refusal(f"{merged}: {why}, and others are not asked here")
        check_deployable(facts)
        chat, name, digest = facts.chat, "transformers serve", facts.digest
        command, model = _transformers(facts.folder, port), str(facts.folder.resolve())
        told = run_local("answer", facts.folder, prompt=prompt, new_tokens=_NEW_TOKENS, chat=chat)
        local = str(told["text"])
    with serve(command, port, timeout=timeout) as server:
        ask = _client(server, model, chat, talk, timeout)
        served = ask(prompt)
        series = _soak(server, lambda: ask(prompt), served, requests, seconds, progress)
        ready = server.ready_seconds
    problems = growth(series["latencies"], series["memory"])
    if served != local:
        problems.insert(0, f"the server answers {served!r}, the model in process {local!r}")
    if series["different"]:
        problems.append(f"{series['different']} of {requests} answers differ from the first")
    latencies = sorted(series["latencies"])
    return {
        "kind": "smoke",
        "version": 1,
        "infold": __version__,
        "receipt": digest,
        "server": name,
        "endpoint": "chat" if chat else "completions",
        "ready_seconds": round(ready, 2),
        "prompt": prompt,
        "served": served,
        "local": local,
        "same": served == local,
        "requests": requests,
        "seconds": round(series["seconds"], 2),
        "latency_seconds": {
            "median": round(median(latencies), 4),
            "p95": round(latencies[int(0.95 * (len(latencies) - 1))], 4),
            "most": round(latencies[-1], 4),
        },
        "memory_bytes": {
            "first": series["memory"][0],
            "last": series["memory"][-1],
            "most": max(series["memory"]),
        },
        "limits": {
            "slower": _SLOWER,
            "allowed_seconds": _HASTE,
            "fatter": _FATTER,
            "allowed_bytes": _ALLOWED,
        },
        "stable": not growth(series["latencies"], series["memory"]) and not series["different"],
        "ok": not problems,
        "problems": problems,
    }


def growth(latencies: Sequence[float], memory: Sequence[int]) -> list[str]:
    """What grew from the first third of the requests to the last, beyond the limits."""
    third = len(latencies) // 3
    early, late = median(latencies[:third]), median(latencies[-third:])
    problems = []
    if late > max(_SLOWER * early, early + _HASTE):
        problems.append(f"latency grew from {early:.3f} s to {late:.3f} s")
    before, after = memory[third], memory[-1]
    if after - before > max(_ALLOWED, _FATTER * before):
        problems.append(f"memory grew from {before:,} to {after:,} bytes")
    return problems


def _transformers(folder: Path, port: int) -> list[str]:
    require("serve", "transformers", "fastapi", "uvicorn")
    start = "from transformers.cli.transformers import main; main()"
    where = ["serve", str(folder.resolve()), "--host", "127.0.0.1", "--port", str(port)]
    return [sys.executable, "-c", start, *where]


def _messages(prompt: str) -> list[Any]:
    return [{"role": "user", "content": prompt}]


def _client(
    server: Server, model: str, chat: bool, talk: dict[str, Any], timeout: float
) -> Callable[[str], str]:
    """A function that asks the server through the `openai` client."""
    import openai

    client = openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", timeout=timeout, max_retries=0
    )

    def ask(prompt: str) -> str:
        try:
            if chat:
                said = client.chat.completions.create(
                    model=model, messages=_messages(prompt), **talk
                )
                return str(said.choices[0].message.content)
            written = client.completions.create(model=model, prompt=prompt, **talk)
            return str(written.choices[0].text)
        except openai.OpenAIError as error:
            server.check(wait=2)  # a connection is lost a moment before its process ends
            raise ServerFailure(f"the server did not answer: {error}") from None

    return ask


def _soak(
    server: Server,
    ask: Callable[[], str],
    expected: str,
    requests: int,
    seconds: float,
    progress: Callable[[int, int, float | None], None] | None,
) -> dict[str, Any]:
    """Requests spread evenly over the time; latency and memory after each."""
    latencies, memory, different = [], [], 0
    began = time.monotonic()
    for number in range(requests):
        due = began + number * seconds / requests
        time.sleep(max(0.0, due - time.monotonic()))
        start = time.monotonic()
        different += ask() != expected
        latencies.append(time.monotonic() - start)
        memory.append(server.resident())
        if progress is not None:
            progress(number + 1, requests, None)
    return {
        "latencies": latencies,
        "memory": memory,
        "different": different,
        "seconds": time.monotonic() - began,
    }
