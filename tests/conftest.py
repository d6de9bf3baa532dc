"""Fixtures: tiny bases with random weights, PEFT adapters with random parts, PEFT as the oracle.

PEFT and transformers are imported when a fixture first needs them: other tests stay fast.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import infold

os.environ["HF_HUB_OFFLINE"] = "1"

# What PEFT and transformers tell about the cases on purpose. Everything else stays an error.
_EXPECTED = (
    "fan_in_fan_out is set to",  # PEFT corrects it in memory for Conv1D and Linear
    "Setting `save_embedding_layers` to `True`",
    "Model has `tie_word_embeddings=True` and a tied layer is part of the adapter",
    "Model with `tie_word_embeddings=True` and the tied_target_modules",
    "You have requested `ensure_weight_tying`",
    "Could not identify embedding layer",
    "`Conv1D` is not a native|is not native",
    "Already found a `peft_config` attribute in the model",
    "You are trying to modify a model with PEFT for a second time",
)


def pytest_configure(config: pytest.Config) -> None:
    for message in _EXPECTED:
        config.addinivalue_line("filterwarnings", f"ignore:{message}:UserWarning")


@pytest.fixture(scope="session", autouse=True)
def quiet_transformers() -> None:
    torch.set_num_threads(1)
    try:
        from transformers.utils import logging
    except ImportError:
        return
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint folder; each must lie in one file only."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        assert found.keys().isdisjoint(tensors), file
        found |= tensors
    return found


def shuffle(parameters: Iterable[tuple[str, Tensor]], seed: int) -> None:
    """Give every parameter values that no initialisation would: biases and norms count too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in parameters:
            noise = torch.randn(value.shape, generator=generator)
            leaf = name.rsplit(".", 1)[-1]
            if "ia3_l" in name:
                new = 1 + 0.3 * noise
            elif "lora_magnitude_vector" in name:
                new = value * (1 + 0.1 * noise.clamp(-2, 2))
            elif "lora_" in name or value.dim() > 1:
                new = 0.2 * noise
            elif leaf == "bias":
                new = 0.3 * noise
            else:
                new = value + 0.1 * noise
            value.copy_(new.to(value.dtype))


@dataclass
class Merged:
    """A merged folder and what is in it."""

    path: Path
    receipt: Any
    tensors: dict[str, Tensor]

    @property
    def config(self) -> dict[str, Any]:
        return json.loads((self.path / "config.json").read_text())


@dataclass
class Bench:
    """A folder for one test, in which bases, adapters and merged models are made."""

    folder: Path
    seed: int = 0
    _taken: dict[str, int] = field(default_factory=dict)

    def _place(self, name: str) -> Path:
        number = self._taken[name] = self._taken.get(name, -1) + 1
        return self.folder / (f"{name}{number}" if number else name)

    # --- bases ---------------------------------------------------------------------------------

    def base(self, model: nn.Module, dtype: torch.dtype = torch.float32) -> Path:
        """Random weights, saved: transformers' models in several small shards, others in one."""
        self.seed += 1
        shuffle(model.named_parameters(), self.seed)
        model.to(dtype).eval()
        path = self._place("base")
        if hasattr(model, "save_pretrained"):
            size = sum(p.numel() * p.element_size() for p in model.parameters())
            model.save_pretrained(path, max_shard_size=max(size // 3, 1))
        else:
            path.mkdir()
            save_file(dict(model.state_dict()), path / "model.safetensors", {"format": "pt"})
        return path

    def write(self, tensors: dict[str, Tensor], config: dict[str, Any] | None = None) -> Path:
        """A base from tensors alone."""
        path = self._place("base")
        path.mkdir()
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
        if config is not None:
            (path / "config.json").write_text(json.dumps(config))
        return path

    # --- adapters ------------------------------------------------------------------------------

    def attach(self, model: nn.Module, config: Any) -> Any:
        """PEFT's model with random values in everything that would be trained."""
        from peft import get_peft_model

        self.seed += 1
        attached = get_peft_model(model, config)
        trained = [(n, p) for n, p in attached.named_parameters() if p.requires_grad]
        assert trained
        shuffle(trained, self.seed)
        return attached.eval()

    def save(self, attached: Any, dtype: torch.dtype | None = None) -> Path:
        """The adapter, in PEFT's files."""
        path = self._place("adapter")
        attached.save_pretrained(path)
        if dtype is not None:
            file = path / "adapter_model.safetensors"
            tensors = {name: value.to(dtype) for name, value in load_file(file).items()}
            save_file(tensors, file, {"format": "pt"})
        return path

    def write_adapter(self, tensors: dict[str, Tensor], **config: Any) -> Path:
        """An adapter from tensors and config fields alone."""
        path = self._place("adapter")
        path.mkdir()
        save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})
        (path / "adapter_config.json").write_text(json.dumps(config))
        return path

    # --- merging and comparing -----------------------------------------------------------------

    def merge(self, base: Path, adapters: Path | Sequence[Path]) -> Merged:
        out = self._place("merged")
        receipt = infold.merge(base, adapters, out)
        assert not (self.folder / f".{out.name}.infold").exists()
        return Merged(out, receipt, read_tensors(out))

    def load(self, kind: Any, path: Path, **options: Any) -> Any:
        """A folder, in float32, by an Auto class that must find every tensor that it wants."""
        model, info = kind.from_pretrained(
            path, dtype=torch.float32, output_loading_info=True, **options
        )
        assert not info["missing_keys"] and not info["mismatched_keys"], info
        return model.eval()


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def assert_close(found: Tensor, wanted: Tensor, tolerance: float = 2e-5) -> None:
    """Equal up to `tolerance` of the largest element."""
    assert found.shape == wanted.shape
    scale = wanted.abs().max().item()
    error = (found.double() - wanted.double()).abs().max().item()
    assert error <= tolerance * scale, f"off by {error:.3g}, largest element {scale:.3g}"


def assert_differs(one: Tensor, two: Tensor) -> None:
    """The guard: without it a merge that does nothing could pass."""
    difference = (one.double() - two.double()).abs().max().item()
    assert difference > 1e-3 * two.abs().max().item(), "the adapter has no effect"


@pytest.fixture
def close() -> Callable[..., None]:
    return assert_close


@pytest.fixture
def differs() -> Callable[..., None]:
    return assert_differs
