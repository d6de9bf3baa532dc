"""A checkpoint loaded by plain transformers in a process of its own, so that its memory is its own.

`run_local` starts this module as a program, which ends with the process that asked; the last line
that it prints is its result, as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from infold.child import STEP, asked, run_child
from infold.errors import InfoldError
from infold.extras import require
from infold.interval import median_interval
from infold.machine import import_model_code, processor, resident_bytes

__all__ = ["LocalFailure", "run_local"]


class LocalFailure(InfoldError):
    """transformers could not load or run the folder."""

    exit_code = 1


def run_local(
    what: str,
    folder: Path,
    *,
    timeout: float = 900,
    progress: Callable[[int, int, float | None], None] | None = None,
    **given: Any,
) -> dict[str, Any]:
    """`what` is "measure" or "answer"; `given` are the keyword arguments of that function.

    progress: called with (steps done, steps in all, None).
    Raises Refusal without transformers, LocalFailure where the model does not load or run.
    """
    require("serve", "transformers")
    told = run_child(
        [sys.executable, "-m", __name__, what, str(folder)],
        given,
        timeout=timeout,
        progress=progress,
    )
    if told.late:
        raise LocalFailure(f"{folder}: did not {what} within {timeout:.0f} s")
    if told.code:
        last = (told.errors.splitlines() or [f"exit code {told.code}"])[-1]
        raise LocalFailure(f"{folder}: transformers cannot run it: {last}")
    found: dict[str, Any] = json.loads(told.lines[-1])
    return found


def measure(
    folder: str, prompt_tokens: int = 128, new_tokens: int = 32, rounds: int = 6
) -> dict[str, Any]:
    """Load time, memory and speed at batch 1, greedy: medians over `rounds`, one more to warm up.

    Each median has the interval of its order statistics; 6 rounds are the least that reach 95 %.
    Loading and memory are measured once. Seconds, bytes and tokens/s. The tokens are drawn by a
    fixed seed; no tokenizer is needed.
    """
    import torch
    import transformers

    import_model_code(folder)
    before = resident_bytes()
    began = time.perf_counter()
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device).eval()
    loading = time.perf_counter() - began
    top = model.config.get_text_config().vocab_size
    seed = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, top, (1, prompt_tokens), generator=seed).to(device)
    mask = torch.ones_like(prompt)

    def now() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(count: int) -> list[float]:
        """Seconds from the start to each token."""
        stamps: list[float] = []

        def stamp(ids: torch.Tensor, scores: torch.Tensor, **more: Any) -> torch.Tensor:
            stamps.append(now())
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        start = now()
        model.generate(
            input_ids=prompt,
            attention_mask=mask,
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            stopping_criteria=[stamp],
        )
        return [one - start for one in stamps]

    def step(done: int) -> None:
        print(f"{STEP}{done} {rounds + 1}", flush=True)

    timed(2)
    step(1)
    firsts, rates = [], []
    for number in range(rounds):
        seconds = timed(1 + new_tokens)
        firsts.append(seconds[0])
        rates.append(new_tokens / (seconds[-1] - seconds[0]))
        step(number + 2)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"cpu, {processor()}",
        "threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "load_seconds": round(loading, 3),
        "resident_bytes": resident_bytes() - before,
        "cuda_peak_bytes": peak,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "rounds": rounds,
        "first_token_seconds": _interval(firsts),
        "decode_tokens_per_second": _interval(rates),
    }


def answer(folder: str, prompt: str, new_tokens: int, chat: bool) -> dict[str, Any]:
    """The greedy continuation of a prompt, as text."""
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"  # as the server chooses
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    if chat:
        talk = [{"role": "user", "content": prompt}]
        inputs: Any = tokenizer.apply_chat_template(
            talk, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    inputs = inputs.to(device)
    tokens = model.to(device).eval().generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    new = tokens[0, inputs["input_ids"].shape[1] :]
    return {"text": tokenizer.decode(new, skip_special_tokens=True)}


def _interval(values: list[float]) -> dict[str, float]:
    found = asdict(median_interval(values))
    return {name: round(value, 5) for name, value in found.items()}


if __name__ == "__main__":
    given = asked()
    made = (
        measure(sys.argv[2], **given) if sys.argv[1] == "measure" else answer(sys.argv[2], **given)
    )
    print(json.dumps(made))
