"""PEFT as the oracle: tiny bases with random weights, adapters with random parts, comparisons.

PEFT and transformers are imported by those who need them: other tests stay fast.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import infold


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint folder; each must lie in one file only."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        assert found.keys().isdisjoint(tensors), file
        found |= tensors
    return found


def shuffle(parameters: Iterable[tuple[str, Tensor]], seed: int) -> None:
    """Values that no initialisation would give, for biases and norms too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in parameters:
            noise = torch.randn(value.shape, generator=generator)
            if "ia3_l" in name:
                new = 1 + 0.3 * noise
            elif "lora_magnitude_vector" in name:
                new = value * (1 + 0.1 * noise.clamp(-2, 2))
            elif "lora_" in name or value.dim() > 1:
                new = 0.2 * noise
            elif name.endswith("bias"):
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
    _seed: int = 0
    _taken: dict[str, int] = field(default_factory=dict)

    def place(self, name: str) -> Path:
        number = self._taken[name] = self._taken.get(name, 0) + 1
        return self.folder / f"{name}-{number}"

    def base(self, model: nn.Module) -> Path:
        """Random weights, saved: transformers' models in several shards, others in one file."""
        self._seed += 1
        shuffle(model.named_parameters(), self._seed)
        path = self.place("base")
        if hasattr(model, "save_pretrained"):
            size = sum(p.numel() * p.element_size() for p in model.parameters())
            model.save_pretrained(path, max_shard_size=size // 3)
        else:
            path.mkdir()
            save_file(dict(model.state_dict()), path / "model.safetensors", {"format": "pt"})
        return path

    def write(self, tensors: dict[str, Tensor], config: dict[str, Any] | None = None) -> Path:
        """A base of given tensors."""
        path = self.place("base")
        path.mkdir()
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
        if config is not None:
            (path / "config.json").write_text(json.dumps(config))
        return path

    def load(self, kind: Any, path: Path, new: Sequence[str] = (), **options: Any) -> Any:
        """A folder in float32, by an Auto class that must find every tensor but those in `new`."""
        model, info = kind.from_pretrained(
            path, dtype=torch.float32, output_loading_info=True, **options
        )
        missing = [key for key in info["missing_keys"] if not key.startswith(tuple(new) or "//")]
        assert not missing and not info["mismatched_keys"], info
        return model.eval()

    def attach(self, model: nn.Module, config: Any) -> Any:
        """PEFT's model, with random values in everything that would be trained."""
        from peft import get_peft_model

        self._seed += 1
        attached = get_peft_model(model, config)
        trained = [(n, p) for n, p in attached.named_parameters() if p.requires_grad]
        assert trained
        shuffle(trained, self._seed)
        return attached.eval()

    def save(self, attached: Any, dtype: torch.dtype | None = None) -> Path:
        """The adapter, in the files that PEFT writes; optionally rounded to another dtype."""
        path = self.place("adapter")
        attached.save_pretrained(path)
        if dtype is not None:
            file = path / "adapter_model.safetensors"
            tensors = {name: value.to(dtype) for name, value in load_file(file).items()}
            save_file(tensors, file, {"format": "pt"})
        return path

    def write_adapter(self, tensors: dict[str, Tensor], **config: Any) -> Path:
        """An adapter of given tensors and config fields."""
        path = self.place("adapter")
        path.mkdir()
        save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})
        (path / "adapter_config.json").write_text(json.dumps(config))
        return path

    def merge(self, base: Path, adapters: Path | Sequence[Path]) -> Merged:
        out = self.place("merged")
        receipt = infold.merge(base, adapters, out)
        assert not (self.folder / f".{out.name}.infold").exists()
        return Merged(out, receipt, read_tensors(out))

    def prove(
        self,
        kind: Any,
        base: Path,
        config: Any,
        inputs: dict[str, Tensor],
        prepare: Callable[[Any], Any] | None = None,
        new: Sequence[str] = (),
        **options: Any,
    ) -> Merged:
        """The round trip: PEFT's logits with the adapter beside the base are those of the merged
        folder, loaded without PEFT; and they are not the base's."""
        model = self.load(kind, base, new, **options)
        if prepare is not None:
            prepare(model)
        before = logits(model, inputs)
        attached = self.attach(model, config)
        wanted = logits(attached, inputs)
        merged = self.merge(base, self.save(attached))
        found = logits(self.load(kind, merged.path), inputs)
        assert_close(found, wanted)
        assert_differs(before, wanted)
        return merged


@torch.no_grad()
def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    output = model(**inputs)
    if "start_logits" in output:
        return torch.stack((output.start_logits, output.end_logits))
    return output.logits


def assert_close(found: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    """Equal up to `tolerance` of the largest element."""
    assert found.shape == wanted.shape
    scale = wanted.abs().max().item()
    error = (found.double() - wanted.double()).abs().max().item()
    assert error <= tolerance * scale, f"off by {error:.3g}, largest element {scale:.3g}"


def assert_differs(one: Tensor, two: Tensor) -> None:
    """The guard: without it a merge that does nothing could pass."""
    difference = (one.double() - two.double()).abs().max().item()
    assert difference > 1e-2 * two.abs().max().item(), "the adapter has no effect"


def assert_rounded_once(found: Tensor, *steps: Tensor) -> None:
    """`found` is the last step, a float32 result with errors of its own, rounded to found's dtype.

    The steps are the base and the weight after each merge. No element is off by more than one unit
    in the last place; or, where the sum cancels, by more than 2^-20 of its terms.
    """
    rounded = steps[-1].to(found.dtype)
    terms = steps[0].double().abs()
    for one, two in pairwise(steps):
        terms = terms + (two.double() - one.double()).abs()
    small = (found.double() - rounded.double()).abs() <= 2.0**-20 * terms
    if found.dtype == torch.float32:
        assert small.all()
        return
    ulps = (_on_a_line(found) - _on_a_line(rounded)).abs()
    assert ((ulps <= 1) | small).all(), f"off by {ulps.max()} units in the last place"
    assert (ulps == 0).float().mean() > 0.95


def _on_a_line(values: Tensor) -> Tensor:
    """16-bit floats as integers in the same order, neighbours one apart."""
    bits = values.view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)
