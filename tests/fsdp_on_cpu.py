"""Makes accelerate shard on the CPU too: there it falls back to DDP, and says nothing.

Imported by a training's process, or run in the place of `-m infold`. What was sharded is told on
stderr, so that a test can ask for it.
"""

from __future__ import annotations

import sys
from typing import Any

import accelerate.accelerator
from accelerate.state import AcceleratorState, DistributedType
from torch.distributed.tensor import DTensor

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

if __name__ == "__main__":
    from infold.cli.main import run

    run()
