"""What all verbs take, and what an earlier kill left where they read."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

__all__ = ["PathLike", "Progress", "Steps", "listed", "log", "settle_first"]

PathLike = str | os.PathLike[str]
Progress = Callable[[int, int], None]  # bytes done, bytes in all
Steps = Callable[[int, int, float | None], None]  # steps done, steps in all, the last loss


def listed(adapters: PathLike | Sequence[PathLike]) -> list[PathLike]:
    return [adapters] if isinstance(adapters, str | os.PathLike) else list(adapters)


def log(told: object) -> None:
    logging.getLogger("infold").warning("%s", told)


def settle_first(folder: PathLike | None, *, refuse: bool = False) -> None:
    """Finish what a kill left of an edit in place, if there is such a thing, and say what became
    of it. refuse: `folder` is an input of something else, so it is not edited; Refusal."""
    from infold.checkpoint.shards import JOURNAL, companion

    if folder is not None and os.path.lexists(companion(Path(folder), JOURNAL)):
        from infold.merge.inplace import settle

        if settled := settle(folder, refuse=refuse):
            log(f"{os.fspath(folder)}: {settled}")
