"""A training in a process of its own that is killed after a number of steps (0: it ends well)."""

from __future__ import annotations

import json
import os
import signal
import sys

import torch

import infold

torch.set_num_threads(1)
base, data, out, options, killed = sys.argv[1:]


def progress(done: int, total: int, loss: float | None) -> None:
    if done == int(killed):
        os.kill(os.getpid(), signal.SIGKILL)


infold.train(base, data, out, progress=progress if int(killed) else None, **json.loads(options))
