"""What a measurement must tell of the machine."""

from __future__ import annotations

import platform
from pathlib import Path

__all__ = ["processor", "resident_bytes"]


def processor() -> str:
    """The processor's name, or its architecture where the system does not tell the name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    named = (x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    return next(named, platform.machine())


def resident_bytes() -> int:
    """Bytes of this process that are in memory. Needs psutil."""
    import psutil

    return int(psutil.Process().memory_info().rss)
