"""A loop in a process of its own that is killed at a point, or whose disk is full at one.

    python loop_child.py CONFIG.json POINT LOG

Points: "journal:N" behind the N-th line of any journal; "before:NAME:N" when the N-th file of
that name is about to be written; "step:N" behind the N-th training step; "merge:N" when the N-th
merged checkpoint is complete, and not in its place; "full:1" lets no file of the first merge grow
over 16 KiB; "none". Each chunk of answers that reached the disk is a line in LOG.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from infold.checkpoint import staging
from infold.loop import folder, run
from infold.loop.run import Loop

torch.set_num_threads(1)
config, point, log = sys.argv[1:]
seen: Counter[str] = Counter()


def at(name: str) -> None:
    seen[name] += 1
    if f"{name}:{seen[name]}" == point:
        os.kill(os.getpid(), signal.SIGKILL)


append, write, train, merge = (
    folder.Journal.append, run.write_json, run.train_adapter, run.execute,
)  # fmt: skip
publish = staging.Staging.publish


def appended(self: folder.Journal, entry: dict[str, Any]) -> None:
    append(self, entry)
    if "answers" in entry:
        with open(log, "a") as file:
            file.write(f"{self.path.parent.name}/{self.path.name} {entry['chunk']}\n")
    at("journal")


def written(path: Path, value: Any) -> None:
    at(f"before:{path.name}")
    write(path, value)


def trained(*args: Any, **options: Any) -> Any:
    return train(*args, **options, progress=lambda done, total, loss: at("step"))


def merged(*args: Any, **options: Any) -> Any:
    if point == "full:1":
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, -1))
    return merge(*args, **options)


def published(self: Any, *args: Any, **options: Any) -> Any:
    at("merge")
    return publish(self, *args, **options)


folder.Journal.append = appended  # type: ignore[method-assign]
run.write_json, run.train_adapter, run.execute = written, trained, merged
staging.Staging.publish = published  # type: ignore[method-assign]

Loop(json.loads(Path(config).read_text())).run()
