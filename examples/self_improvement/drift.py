"""How far merged weights are from the float64 truth: the base plus every adapter, unrounded."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


def updates(adapter: Path) -> dict[str, torch.Tensor]:
    """alpha / r B A of a plain LoRA, in float64, by the name of the weight."""
    settings = json.loads((adapter / "adapter_config.json").read_text())
    saved = load_file(adapter / "adapter_model.safetensors")
    return {
        key.removeprefix("base_model.model.").replace(".lora_A", ""): settings["lora_alpha"]
        / settings["r"]
        * (saved[key.replace("lora_A", "lora_B")].double() @ a.double())
        for key, a in saved.items()
        if ".lora_A." in key
    }


def distance(
    found: Mapping[str, torch.Tensor], truth: Mapping[str, torch.Tensor], names: Iterable[str]
) -> float:
    """Frobenius norm of the difference, over all matrices of these names."""
    return math.sqrt(sum((found[n].double() - truth[n]).square().sum().item() for n in names))
