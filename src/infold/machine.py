"""What a measurement must tell of the machine, and do before it begins."""

from __future__ import annotations

import os
import platform
import re
import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infold.errors import Refusal

if TYPE_CHECKING:
    import torch

__all__ = [
    "check_device",
    "device_of",
    "import_model_code",
    "peak_bytes",
    "processor",
    "resident_bytes",
]


def check_device(name: str) -> None:
    """Refuse what is no name of a device; whether there is such a one, PyTorch knows."""
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", name):
        raise Refusal(f"--device {name}: cpu, cuda or cuda:N, with the number of a GPU")


def device_of(name: str) -> torch.device:
    """The device of "cpu", "cuda" or "cuda:N". Raises Refusal for one that is not there."""
    import torch

    check_device(name)
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            sees = f"{count or 'no'} CUDA device{'s' if count != 1 else ''}"
            raise Refusal(f"--device {name}: this PyTorch sees {sees}; give cpu")
    return device


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


def import_model_code(folder: str | os.PathLike[str]) -> None:
    """Import what loading this model would, before a clock starts and memory is counted.

    transformers imports the code of a model when it makes one, which takes longer than a small
    model; PEFT has imported most of it before.
    """
    import torch
    import transformers

    model_class: Any = transformers.AutoModelForCausalLM
    with suppress(Exception), torch.device("meta"):  # what is wrong with it, loading tells
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        model_class.from_config(config)


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
