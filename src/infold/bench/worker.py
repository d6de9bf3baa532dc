"""One model in a process of its own, so that its memory is its own.

    python -m infold.bench.worker

Reads one JSON object a line from standard input and answers each with one: whether it is ready,
what to load, then what to time. It ends when standard input closes, however its parent ended.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from infold.errors import InfoldError
from infold.machine import device_of, import_model_code, resident_bytes

__all__: list[str] = []


class _Model:
    """The loaded model and its measurements. Seconds and bytes."""

    def __init__(
        self, kind: str, folder: str, adapter: str, device: str, dtype: str, top: int
    ) -> None:
        import torch

        from infold.tuners.loading import attach_all, load_model

        import_model_code(folder)
        if kind == "peft":
            import peft

        self.kind, self.adapter, self.top = kind, adapter, top
        self.device = device_of(device)
        before = resident_bytes()
        start = self._now()
        loaded: Any = load_model(
            Path(folder), self.device, dtype if dtype == "auto" else getattr(torch, dtype)
        )
        self.dtype = str(loaded.dtype).removeprefix("torch.")
        if kind == "infold":
            loaded = attach_all(loaded, [adapter])
        elif kind == "peft":
            loaded = peft.PeftModel.from_pretrained(loaded, adapter).eval()
        self.model = loaded
        self.load_seconds = self._now() - start
        self.run(batch=1, prompt_tokens=8, new_tokens=2)  # touches every weight
        gc.collect()
        self.resident = resident_bytes() - before

    def loaded(self) -> dict[str, Any]:
        """What loading took, and what is held since."""
        import torch

        on_gpu = self.device.type == "cuda"
        found = {
            "load_seconds": self.load_seconds,
            "resident_bytes": self.resident,
            "dtype": self.dtype,
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(self.device) if on_gpu else "cpu",
        }
        if on_gpu:
            found["cuda_bytes"] = torch.cuda.memory_allocated(self.device)
        return found

    def run(self, batch: int, prompt_tokens: int, new_tokens: int) -> dict[str, float]:
        """One prefill alone, then one greedy generation with a clock at every token.

        Another prefill comes before the clock starts: the first one after another process had the
        cores is slower, the more so the busier that one was.
        """
        import torch

        numbers = torch.Generator().manual_seed(0)
        prompt = torch.randint(0, self.top, (batch, prompt_tokens), generator=numbers)
        prompt = prompt.to(self.device)
        with torch.inference_mode():
            self.model(input_ids=prompt, use_cache=True)
            start = self._now()
            self.model(input_ids=prompt, use_cache=True)
            prefill = self._now() - start
            stamps: list[float] = []
            start = self._now()
            self.model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                min_new_tokens=new_tokens + 1,
                max_new_tokens=new_tokens + 1,
                do_sample=False,
                stopping_criteria=[self._clock(stamps)],
            )
        return {
            "prefill_seconds": prefill,
            "first_token_seconds": stamps[0] - start,
            "decode_tokens_per_second": batch * new_tokens / (stamps[-1] - stamps[0]),
        }

    def swap(self) -> dict[str, float]:
        """Load the adapter from the disk under another name, and make it the active one."""
        first = self.model.active_adapter
        start = self._now()
        self.model.load_adapter(self.adapter, "other")
        self.model.set_adapter("other")
        took = self._now() - start
        self.model.set_adapter(first)
        self.model.delete_adapter("other")
        return {"swap_seconds": took}

    def _clock(self, stamps: list[float]) -> Callable[..., Any]:
        import torch

        def criterion(ids: torch.Tensor, scores: object, **more: object) -> torch.Tensor:
            stamps.append(self._now())
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        return criterion

    def _now(self) -> float:
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def _serve() -> None:
    import torch  # noqa: F401  (before it is asked: several processes start side by side)
    import transformers  # noqa: F401

    # what libraries print goes to standard error: standard output is for answers alone
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    model: _Model | None = None
    for line in sys.stdin:
        asked: dict[str, Any] = json.loads(line)
        what = asked.pop("what")
        try:
            if what == "ready":
                found: dict[str, Any] = {}
            elif model is None:
                model = _Model(**asked)
                found = model.loaded()
            else:
                found = model.swap() if what == "swap" else model.run(**asked)
        except InfoldError as error:
            found = {"refused": list(getattr(error, "reasons", [str(error)]))}
        print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
