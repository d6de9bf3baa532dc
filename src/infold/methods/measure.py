"""What each of PEFT's methods costs while it is not merged, on a real model."""

from __future__ import annotations

import contextlib
import copy
import io
import os
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from infold.bench.interval import paired_ratio
from infold.errors import Refusal
from infold.methods.table import attach_peft, peft_types
from infold.tuners.loading import calm, device_of, load_model, model_folder

__all__ = ["measure_methods"]


def measure_methods(
    base: str | os.PathLike[str],
    *,
    tokens: int = 64,
    rounds: int = 9,
    progress: Callable[[int, int, float | None], None] | None = None,
) -> list[dict[str, Any]]:
    """Parameters, time to attach and the forward pass over the base's, for each type of PEFT.

    Untrained adapters on the CPU in float32, with PEFT's defaults; one row of `tokens` tokens; base
    and adapter take turns. A type that cannot be run has `why` instead of figures.
    Raises Refusal without PEFT, or for a base that cannot be run.
    """
    import torch

    if find_spec("peft") is None or find_spec("transformers") is None:
        raise Refusal("PEFT and transformers are needed: pip install 'infold[train]' peft")
    if min(tokens, rounds) < 1:
        raise Refusal(f"{tokens} tokens, {rounds} rounds: at least 1 of each is needed")
    model = load_model(model_folder(base), device_of("cpu"), torch.float32)
    top = model.config.get_text_config().vocab_size
    ids = torch.randint(0, top, (1, tokens), generator=torch.Generator().manual_seed(0))
    total = model.num_parameters()
    found, names = [], peft_types()
    for number, name in enumerate(names):
        silence = contextlib.redirect_stderr(io.StringIO())  # some types draw bars
        with calm(), warnings.catch_warnings(), silence:
            warnings.simplefilter("ignore")
            found.append({"name": name} | _measured(model, name, ids, rounds, total))
        if progress is not None:
            progress(number + 1, len(names), None)
    return found


def _measured(model: Any, name: str, ids: Any, rounds: int, total: int) -> dict[str, Any]:
    import torch

    try:
        own = copy.deepcopy(model)
        began = time.perf_counter()
        adapted = attach_peft(own, name).eval()
        attached = time.perf_counter() - began
        trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        pairs = []
        with torch.inference_mode():
            for _ in range(rounds + 1):
                pairs.append((_seconds(model, ids), _seconds(adapted, ids)))
    except Exception as error:  # forty types, each with errors of its own
        told = (str(error).strip().splitlines() or [""])[0]
        return {"why": told[:90] or type(error).__name__}
    plain, slower = zip(*pairs[1:], strict=True)
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


def _seconds(model: Any, ids: Any) -> float:
    start = time.perf_counter()
    model(input_ids=ids)
    return time.perf_counter() - start
