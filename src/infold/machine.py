"""What a measurement must tell of the machine."""

from __future__ import annotations

import os
import platform
import resource
import sys
from pathlib import Path

__all__ = ["peak_bytes", "processor", "resident_bytes"]


def processor() -> str:
    """The processor's name, or its architecture where the system does not tell the name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    named = (x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    return next(named, platform.machine())


def resident_bytes() -> int:
    """Bytes of this process that are in memory; 0 where neither the system nor psutil tells."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux
        pass
    try:
        import psutil
    except ImportError:
        return 0
    return int(psutil.Process().memory_info().rss)


def peak_bytes() -> int:
    """The most bytes of this process that were in memory at once."""
    try:
        # getrusage on Linux begins with what the process that started this one had at the fork
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:  # not Linux
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
