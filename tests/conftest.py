"""Fixtures for all tests, and the warnings of PEFT that belong to its cases.

PyTorch and PEFT are imported by who needs them: the process that only hands out tests does not.
"""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from crash_child import Runner
    from peft_oracle import Bench

os.environ["HF_HUB_OFFLINE"] = "1"
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's jobs begin so
    signal.signal(signal.SIGINT, signal.default_int_handler)

# What PEFT tells about cases that are here on purpose. Any other warning is an error.
_EXPECTED = (
    "UserWarning: fan_in_fan_out is set to",  # PEFT corrects it in memory for Conv1D and Linear
    "UserWarning: Setting `save_embedding_layers` to `True`",
    "UserWarning: Could not identify embedding layer",
    "UserWarning: Model has `tie_word_embeddings=True` and a tied layer is part of the adapter",
    "UserWarning: Model with `tie_word_embeddings=True` and the tied_target_modules",
    "UserWarning: You have requested `ensure_weight_tying`",
    "UserWarning: ensure_weight_tying=True but the model does not have tied weights",
    "UserWarning: LoRA adapter added to ConvNd layer with groups > 1",
    "UserWarning: .* LoRA tensor.* have invalid shape",  # it means the bias of lora_B
    "FutureWarning: `is_gradient_checkpointing` is deprecated",  # PEFT asks transformers for it
)


def pytest_configure(config: pytest.Config) -> None:
    for expected in _EXPECTED:
        category, message = expected.split(": ", 1)
        config.addinivalue_line("filterwarnings", f"ignore:{message}:{category}")


def pytest_collection_finish() -> None:
    """What is loaded now stays. Each training looks for garbage, and needs not look there."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def by_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """No compiled blocks: for what only the tiles of PyTorch have."""
    monkeypatch.setattr("infold.kernel.library.load", lambda: None)


@pytest.fixture(params=["compiled", "by PyTorch"])
def either(request: pytest.FixtureRequest) -> bool:
    """Both ways to compute a block. True: by PyTorch, so in tiles."""
    if request.param == "compiled":
        from infold.kernel import library

        if library.load() is None:
            pytest.skip("nothing is compiled here")
        return False
    request.getfixturevalue("by_pytorch")
    return True


@pytest.fixture(scope="session")
def calm() -> None:
    """One thread for each worker; no progress bars and reports of transformers."""
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()


@pytest.fixture
def bench(tmp_path: Path, calm: None) -> Bench:
    from peft_oracle import Bench

    return Bench(tmp_path)


@pytest.fixture(scope="session")
def runner() -> Iterator[Runner]:
    from crash_child import Runner

    made = Runner()
    yield made
    made.close()
