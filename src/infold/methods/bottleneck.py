"""What bottleneck adapters cost, through the `adapters` package and whichever transformers it pins.

    PYTHON bottleneck.py

PYTHON is that of an environment with the package; it need not have infold, so this file imports
nothing of it. Reads one JSON object, a line of standard input, and prints one as its last line.
Where standard input closes, the process that asked has ended, and so does this one.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import threading
import time
from typing import Any

__all__: list[str] = []


def measure(base: str, kind: str, tokens: int, rounds: int) -> dict[str, Any]:
    """Parameters, seconds to attach, and `rounds` pairs of seconds (base, adapted), after one more.

    An adapter of the configuration `kind` with random values, in float32 on the CPU; one row of
    `tokens` tokens. Raises RuntimeError where it changes no logit, since then it did not run.
    """
    import adapters
    import torch
    from transformers import AutoModelForCausalLM

    load: Any = AutoModelForCausalLM.from_pretrained
    plain = load(base, local_files_only=True).float().eval()
    top = plain.config.vocab_size
    ids = torch.randint(0, top, (1, tokens), generator=torch.Generator().manual_seed(0))
    adapted = copy.deepcopy(plain)
    began = time.perf_counter()
    adapters.init(adapted)
    adapted.add_adapter("measured", config=kind)
    adapted.train_adapter("measured")
    attached = time.perf_counter() - began
    adapted.eval()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in trained:  # some begin at zero, which would hide whether they run
            parameter.add_(0.01 * torch.randn(parameter.shape))

    def seconds(model: Any) -> float:
        start = time.perf_counter()
        model(input_ids=ids)
        return time.perf_counter() - start

    with torch.inference_mode():
        if torch.equal(plain(input_ids=ids).logits, adapted(input_ids=ids).logits):
            raise RuntimeError("it changes no logit, so it did not run")
        pairs = [(seconds(plain), seconds(adapted)) for _ in range(rounds + 1)]
    return {
        "parameters": sum(p.numel() for p in trained),
        "total": sum(p.numel() for p in plain.parameters()),
        "attach_seconds": attached,
        "pairs": pairs[1:],
    }


def _watch() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)


def main() -> None:
    given = json.loads(sys.stdin.readline())
    threading.Thread(target=_watch, daemon=True).start()
    try:
        found = measure(**given)
    except Exception as error:  # another environment, with errors of its own
        told = (str(error).strip().splitlines() or [""])[0]
        found = {"why": told or type(error).__name__}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
