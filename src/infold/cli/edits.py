"""Edits as text: from the plan before a merge, from the receipt after it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from infold.cli.output import fold, table

__all__ = ["edited_text", "edits_text"]

PREFIX = "base_model.model."  # PEFT's, of every key in an adapter file
_COMMON = ("method", "adapter", "module", "moved")  # the rest is what the method tells of itself
_STORED = ("view", "order", "repeat")  # how the vector comes to lie along the stored scales


def edits_text(edits: Sequence[dict[str, Any]], adapters: Sequence[str]) -> str:
    """One line for each group of edits that differ by the layer alone.

    edits: as the plan and the receipt describe them. adapters: their paths.
    """
    rows = []
    for pattern, members in fold(
        edits,
        lambda edit: str(edit["tensor"]),
        lambda edit: (edit["dtype"], tuple(edit["shape"]), _steps(edit, adapters)),
    ):
        first = members[0]
        kept = [e["unchanged"] for e in members if e.get("unchanged") is not None]
        rows.append(
            [
                pattern,
                f"{len(members)} x" if len(members) > 1 else "",
                f"{first['dtype']} {'x'.join(map(str, first['shape']))}",
                _steps(first, adapters),
                f"{_share(min(kept), max(kept))} unchanged" if kept else _error(members),
            ]
        )
    return table(rows)


def edited_text(edits: Sequence[dict[str, Any]]) -> str:
    """What the edited bytes are, which shares of a record refer to."""
    scales = [edit for edit in edits if "rounding" in edit]
    if not edits or len(scales) < len(edits):
        return "edited bytes"
    # a tensor of ggml's blocks has its codes among its bytes; elsewhere scales are tensors
    blocks = any(edit["dtype"] not in ("F16", "BF16", "F32", "F8_E4M3") for edit in scales)
    return "bytes of the edited tensors, codes too" if blocks else "bytes of the edited scales"


def _share(least: float, most: float) -> str:
    one, two = f"{least:.1%}", f"{most:.1%}"
    return one if one == two else f"{one}-{two}"


def _error(edits: Sequence[dict[str, Any]]) -> str:
    """How far converted weights are from the exact result, at most, and how far the adapters move
    them; both relative to the weight."""
    told = [edit for edit in edits if edit.get("error") is not None]
    if not told:
        return ""
    error = max(edit["error"] for edit in told)
    moved = [edit["update"] for edit in told if edit.get("update") is not None]
    return f"error {error:.2g}" + (f", update {max(moved):.2g}" if moved else "")


def _steps(edit: dict[str, Any], adapters: Sequence[str]) -> str:
    """What happens to one tensor: `lora (scaling 2), ia3 (in)`."""
    source, steps = edit["source"], []
    if "key" in source:
        key = source["key"].removeprefix(PREFIX)
        what = "" if key == edit["tensor"] else f"{key} of "
        steps.append(f"replaced by {what}{_name(adapters[source['adapter']])}")
    elif "decoded" in source or "original" in source:
        whence = "the 16-bit base" if "original" in source else source.get("format", "")
        anew = source.get("requantized", "")
        anew = f", quantized {'again' if anew == whence else f'as {anew}'}" if anew else ""
        steps.append(f"from {whence}{anew}")
    elif source["base"] != edit["tensor"]:
        steps.append(f"copied from {source['base']}")
    for operation in edit["operations"]:
        detail = ", ".join(
            f"{name} {value:g}" if isinstance(value, int | float) else str(value)
            for name, value in operation.items()
            if name not in _COMMON and name not in _STORED
        )
        if "order" in operation:
            detail += ", rows in the file's order" if detail else "rows in the file's order"
        whose = f" of {_name(adapters[operation['adapter']])}" if len(adapters) > 1 else ""
        steps.append(operation["method"] + (f" ({detail})" if detail else "") + whose)
    if "exponent" in edit:
        steps.append(f"times 2^{edit['exponent']}")
    return ", ".join(steps)


def _name(path: str) -> str:
    return os.path.basename(path.rstrip("/")) or path
