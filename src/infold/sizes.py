"""Sizes in bytes and counts, as people write and read them."""

from __future__ import annotations

import re

from infold.errors import Refusal

__all__ = ["bytes_text", "parse_bytes", "plural"]

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_bytes(size: int | str) -> int:
    """`1GiB`, `512MiB`, `2G`, `1048576`, or a number as it is: a number of bytes.

    Raises Refusal for any other text.
    """
    if isinstance(size, int):
        return size
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", size.strip(), re.IGNORECASE)
    if not found:
        raise Refusal(f"{size!r} is not a size such as 512MiB or 2GiB")
    unit = found[2].upper()
    scale = 1024 ** " KMGT".index(unit) if found[3] and unit else _UNITS[unit]
    return int(float(found[1]) * scale)


def bytes_text(count: float) -> str:
    """A size as people read it: `3.09 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def plural(word: str, count: int) -> str:
    """`1 shard`, `4 shards`."""
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"
