"""What every hostile input must end in: one clear refusal, soon, with nothing left behind."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import handmade
import infold

MODULES = {"model.layers.0.q_proj": (16, 24), "model.layers.1.q_proj": (16, 24)}
LONGEST = 20.0  # seconds, on a machine that does other things too
LARGEST = 2 << 30  # bytes by which the process may grow

Refused = Callable[..., str]


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    made = {f"{m}.weight": torch.randn(*s, generator=random) for m, s in MODULES.items()}
    made["model.norm.weight"] = torch.randn(16, generator=random)
    return made


@pytest.fixture
def base(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A good base in one file."""
    return handmade.base_folder(tmp_path / "base", tensors)


@pytest.fixture
def sharded(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A good base in two files with an index."""
    return handmade.base_folder(tmp_path / "sharded", tensors, shards=2)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A good adapter for both bases."""
    return handmade.lora(tmp_path / "adapter", MODULES)


@pytest.fixture
def refused(tmp_path: Path) -> Refused:
    """Merge, and check that it ends as a hostile input must. Returns the message."""

    def check(
        base: Path | str,
        adapter: Path | str,
        *names: str,
        kind: type[infold.InfoldError] | tuple[type[infold.InfoldError], ...] = infold.CorruptFile,
        **options: object,
    ) -> str:
        folder = tmp_path / "result"
        folder.mkdir()
        _forget_peak()
        began, before = time.monotonic(), _peak()
        with pytest.raises(infold.InfoldError) as caught:
            infold.merge(base, adapter, folder / "out", **options)
        message = str(caught.value)
        assert isinstance(caught.value, kind), f"{type(caught.value).__name__}: {message}"
        assert caught.value.exit_code in (2, 3)
        told = message.replace(str(tmp_path), "")  # a test's own name is part of its paths
        for name in names:
            assert name.replace(str(tmp_path), "") in told, message
        assert message.strip() and len(message) < 100_000
        assert list(folder.iterdir()) == [], "something was left behind"
        assert time.monotonic() - began < LONGEST
        assert _peak() - before < LARGEST
        return message

    return check


def _forget_peak() -> None:
    """Let the peak begin at what is in use now (Linux; elsewhere it only grows)."""
    with suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def _peak() -> int:
    """The most memory that the process had."""
    with suppress(OSError), open("/proc/self/status") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
