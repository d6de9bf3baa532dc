"""Trainings one after another under accelerate launch, which shards on the CPU too.

    accelerate launch ... fsdp_on_cpu.py PORT infold train ... , PORT train_child.py ... , ...

With a port like "ddp:PORT" it is DDP that the processes of a training do.

There accelerate falls back to DDP, and says nothing; here it does not. What was sharded is told on
stderr, so that a test can ask for it. Each training runs in a fork, so that it may be killed, and
its processes meet at a port of their own; the libraries are loaded once. At the end each process
prints the exit codes.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from itertools import groupby
from typing import Any

import accelerate.accelerator
import matplotlib.figure  # noqa: F401  (loaded once: what a training needs)
import peft  # noqa: F401
import transformers.models.llama.modeling_llama
import transformers.trainer  # noqa: F401
from accelerate.state import AcceleratorState, DistributedType
from torch.distributed.tensor import DTensor

from forked import ended, run_main

_init = AcceleratorState.__init__
_prepare = accelerate.accelerator.fsdp2_prepare_model


def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
    """What it does itself where the processes have a GPU each."""
    _init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin


def prepare(accelerator: Any, model: Any) -> Any:
    model = _prepare(accelerator, model)
    whole = [n for n, p in model.named_parameters() if not isinstance(p, DTensor)]
    print(f"sharded by FSDP2, but for {whole}", file=sys.stderr, flush=True)
    return model


AcceleratorState.__init__ = init  # type: ignore[method-assign]
accelerate.accelerator.fsdp2_prepare_model = prepare


def train(port: str, what: str, *words: str) -> int:
    """Run it in a fork. Returns the exit code."""
    if (pid := os.fork()) == 0:
        kind, _, port = port.rpartition(":")
        if kind == "ddp":
            del os.environ["ACCELERATE_USE_FSDP"]
        os.environ.update(MASTER_PORT=port, TORCHELASTIC_USE_AGENT_STORE="False")
        run_main(what, list(words))
        sys.exit()
    return ended(pid)


if __name__ == "__main__":
    gc.freeze()
    trainings = [list(group) for end, group in groupby(sys.argv[1:], ",".__eq__) if not end]
    print(f"exit codes {json.dumps([train(*words) for words in trainings])}", flush=True)
