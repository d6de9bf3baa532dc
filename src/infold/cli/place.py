"""Where a verb reads and writes, checked before anything slow."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from infold.errors import Refusal
from infold.machine import check_device
from infold.sizes import parse_bytes

__all__ = ["PATHS", "check_words", "one_place", "with_home"]

# What the verbs call arguments and options that are paths, or can be
PATHS = frozenset({
    "adapter", "adapters", "adapters_python", "base", "base_16bit", "data", "eval_split", "folder",
    "measure", "merged", "out", "path", "paths", "picture", "prompts", "record", "run", "text",
    "words",
})  # fmt: skip


def with_home(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a verb with a leading `~` of its paths expanded: shells leave it alone in
    `--out=~/x` and between quotes."""

    def expanded(value: Any) -> Any:
        if isinstance(value, list):
            return [expanded(one) for one in value]
        text = str(value)
        user = text.partition("/")[0]  # one that is not there expands to itself
        if not text.startswith("~") or (user != "~" and os.path.lexists(user)):
            return value
        return type(value)(os.path.expanduser(text))

    return {name: expanded(v) if name in PATHS else v for name, v in given.items()}


def check_words(
    inputs: Sequence[str],
    merged: str | None = None,
    out: str | None = None,
    *,
    force: bool | None = None,
    device: str = "cpu",
    max_memory: str = "1GiB",
) -> None:
    """Refuse what is wrong whatever the files hold, before PyTorch is imported, which takes
    seconds: inputs that are not there, an output that is, and values of options. What follows
    checks all of it again, with what it knows then.

    inputs: paths or Hub ids; merged: a path. force: None where the verb has no --force.
    """
    from infold.checkpoint.files import check_named
    from infold.checkpoint.place import check_place
    from infold.kernel import wanted

    wanted()  # of $INFOLD_KERNEL
    check_named(inputs)
    if merged is not None and not os.path.lexists(merged):
        raise Refusal(f"{merged}: no such file or folder")
    check_device(device)
    parse_bytes(max_memory)
    if out and not force:
        there = [Path(name) for name in (*inputs, *filter(None, [merged])) if os.path.exists(name)]
        check_place(Path(os.path.abspath(out)), there, (), False, replaces=force is not None)


def one_place(out: str | None, in_place: bool, dry_run: bool = False) -> str:
    """The place of --out; empty with --in-place, and where a dry run has none. Raises Refusal for
    both, and for none."""
    if in_place == (out is not None) and not (dry_run and out is None):
        raise Refusal("give either --out DIR or --in-place")
    return out or ""
