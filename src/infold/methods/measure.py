"""What each of PEFT's methods costs while it is not merged, on a real model.

Bottleneck adapters too, through the `adapters` package, in an environment of its own.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from infold.child import run_child
from infold.errors import Refusal
from infold.extras import require
from infold.interval import paired_ratio
from infold.machine import device_of
from infold.methods.table import (
    BITFIT,
    NOTES,
    attach_bitfit,
    attach_peft,
    peft_inputs,
    peft_needs,
    peft_types,
)
from infold.tuners.loading import calm, load_model, model_folder

__all__ = ["measure_methods"]

# configurations of the package, and what they are
BOTTLENECKS = {
    "seq_bn": "one adapter a layer",
    "double_seq_bn": "two adapters a layer",
    "par_bn": "one adapter a layer, beside the feed-forward",
}
_LIMIT = 900.0  # seconds for one of them
_ABSENT = "give the Python of an environment with the adapters package: --adapters-python"


def measure_methods(
    base: str | os.PathLike[str],
    *,
    tokens: int = 64,
    rounds: int = 9,
    adapters_python: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int, float | None], None] | None = None,
) -> list[dict[str, Any]]:
    """Parameters, time to attach and the forward pass over the base's, for each type of PEFT, for
    BitFit (the base's own biases) and for bottleneck adapters.

    Untrained adapters on the CPU in float32, with the packages' defaults; one row of `tokens`
    tokens; base and adapter take turns. A type that cannot be run has `why` instead of figures; a
    `note` tells what its figures leave open.
    adapters_python: the Python of an environment with the `adapters` package, whose versions of
    transformers are others than PEFT's; by default this one, where the package is here.
    Raises Refusal without PEFT, or for a base or a Python that cannot be run.
    """
    import torch

    require("methods", "peft", "transformers")
    if min(tokens, rounds) < 1:
        raise Refusal(f"{tokens} tokens, {rounds} rounds: at least 1 of each is needed")
    folder = model_folder(base)
    if adapters_python is None and find_spec("adapters") is not None:
        adapters_python = sys.executable
    if adapters_python is not None:
        _check_python(adapters_python)
    model = load_model(folder, device_of("cpu"), torch.float32)
    top = model.config.get_text_config().vocab_size
    ids = torch.randint(0, top, (1, tokens), generator=torch.Generator().manual_seed(0))
    total = model.num_parameters()
    found, names = [], [*peft_types(), BITFIT]
    for number, name in enumerate(names):
        silence = contextlib.redirect_stderr(io.StringIO())  # some types draw bars
        with calm(), warnings.catch_warnings(), silence:
            warnings.simplefilter("ignore")
            found.append({"name": name} | _measured(model, name, ids, rounds, total))
        if progress is not None:
            progress(number + 1, len(names) + len(BOTTLENECKS), None)
    del model
    for number, (kind, note) in enumerate(BOTTLENECKS.items()):
        row = {"why": _ABSENT} if adapters_python is None else None
        row = row or _bottleneck(adapters_python or "", folder, kind, tokens, rounds)
        found.append({"name": f"bottleneck {kind}", "note": note} | row)
        if progress is not None:
            progress(len(names) + number + 1, len(names) + len(BOTTLENECKS), None)
    return found


def _check_python(python: str | os.PathLike[str]) -> None:
    try:
        ran = subprocess.run(
            [python, "-c", "import adapters, torch, transformers"],
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        told = getattr(error, "strerror", None) or "does not answer"
        raise Refusal(f"--adapters-python {os.fspath(python)}: {told}") from None
    if ran.returncode:
        last = (ran.stderr.strip().splitlines() or [f"exit code {ran.returncode}"])[-1]
        raise Refusal(
            f"--adapters-python {os.fspath(python)}: {last}; make an environment for it with "
            "`pip install torch adapters`"
        )


def _bottleneck(
    python: str | os.PathLike[str], base: Path, kind: str, tokens: int, rounds: int
) -> dict[str, Any]:
    """A row of the package's configuration `kind`, from a process of that Python."""
    given = {"base": str(base.resolve()), "kind": kind, "tokens": tokens, "rounds": rounds}
    program = [python, Path(__file__).with_name("bottleneck.py")]
    ran = run_child(program, given, timeout=_LIMIT)
    if ran.late:
        return {"why": f"it took more than {_LIMIT:.0f} s"}
    try:
        told: dict[str, Any] = json.loads(ran.lines[-1])
    except (IndexError, ValueError):
        return {"why": (ran.errors.splitlines() or ["its process ended"])[-1][:90]}
    if "why" in told:
        return {"why": str(told["why"])[:90]}
    return _row(told["parameters"], told["total"], told["attach_seconds"], told["pairs"])


def _measured(model: Any, name: str, ids: Any, rounds: int, total: int) -> dict[str, Any]:
    import torch

    try:
        own = copy.deepcopy(model)
        with tempfile.TemporaryDirectory(prefix="infold-methods-") as place:
            needs = peft_needs(own, name, Path(place))
            began = time.perf_counter()
            adapted = attach_bitfit(own) if name == BITFIT else attach_peft(own, name, needs)
            adapted.eval()
            attached = time.perf_counter() - began
        # where a type forbids the cache of keys and values, the base does without it, too
        alike = {"use_cache": getattr(own.config, "use_cache", None)}
        more = peft_inputs(name, len(ids))
        trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        pairs = []
        with torch.inference_mode():
            for _ in range(rounds + 1):
                pairs.append((_seconds(model, ids, alike), _seconds(adapted, ids, more)))
    except Exception as error:  # forty types, each with errors of its own
        told = (str(error).strip().splitlines() or [""])[0]
        return {"why": told[:90] or type(error).__name__}
    note = {"note": NOTES[name]} if name in NOTES else {}
    return _row(trained, total, attached, pairs[1:]) | note


def _row(
    trained: int, total: int, attached: float, pairs: Sequence[Sequence[float]]
) -> dict[str, Any]:
    """pairs: seconds of the base, and of the base with the adapter."""
    plain, slower = zip(*pairs, strict=True)
    ratio = paired_ratio(slower, plain)
    return {
        "parameters": trained,
        "share": trained / total,
        "attach_seconds": attached,
        "ratio": ratio.median,
        "low": ratio.low,
        "high": ratio.high,
        "within_noise": ratio.holds_one,
    }


def _seconds(model: Any, ids: Any, more: Mapping[str, Any]) -> float:
    start = time.perf_counter()
    model(input_ids=ids, **more)
    return time.perf_counter() - start
