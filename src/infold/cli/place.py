"""Where a verb writes, and what a kill left there."""

from __future__ import annotations

import os
from pathlib import Path

from infold.cli.output import complain
from infold.errors import Refusal

__all__ = ["one_place", "settle_first"]


def one_place(out: str | None, in_place: bool, dry_run: bool = False) -> str:
    """The place of --out; empty with --in-place, and where a dry run has none. Raises Refusal for
    both, and for none."""
    if in_place == (out is not None) and not (dry_run and out is None):
        raise Refusal("give either --out DIR or --in-place")
    return out or ""


def settle_first(folder: str, *, refuse: bool = False) -> None:
    """Finish what a kill left of an edit in place, and say what became of it."""
    from infold.checkpoint.shards import JOURNAL, companion

    if os.path.lexists(companion(Path(folder), JOURNAL)):
        from infold.merge.inplace import settle

        if settled := settle(folder, refuse=refuse):
            complain(f"{folder}: {settled}")
