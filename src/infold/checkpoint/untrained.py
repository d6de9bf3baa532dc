"""Whether an adapter is as it was made: what tells it is in its values alone."""

from __future__ import annotations

from infold.checkpoint.adapter import Adapter

__all__ = ["telling", "untrained"]

# part -> the value that all its elements begin with. Other parts are random, or the base's own.
_STARTS = {"ia3_l": 1.0, "lora_B": 0.0, "lora_embedding_A": 0.0}
_PARTNERS = ("lora_A", "lora_embedding_B")  # which change nothing alone


def telling(name: str) -> float | None:
    """The value that a tensor of an adapter file begins with; None where it tells nothing."""
    return next((start for part, start in _STARTS.items() if part in name), None)


def untrained(adapter: Adapter) -> str | None:
    """The doubt about an adapter whose telling parts are as in a new one, else None. Reads up to
    the first value that was trained, which mostly is the first."""
    words: dict[str, str] = {}
    rest = False
    for name, info in adapter.tensors.items():
        if (start := telling(name)) is None:
            rest = rest or not any(part in name for part in _PARTNERS)
            continue
        if 0 in info.shape:
            continue
        if any(bool((piece != start).any()) for piece in adapter.pieces(name)):
            return None
        part = next(part for part in _STARTS if part in name)
        words[part] = f"{part} are {'one' if start else 'zero'}"
    if not words:
        return None
    what = "as in a new adapter" if rest else "the adapter changes nothing"
    return f"all {' and '.join(words.values())}: {what}; was it trained?"
