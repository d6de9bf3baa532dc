"""Checkpoints and adapters made by hand, byte by byte where a test needs them broken."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

RECEIPT = "infold-receipt.json"
INDEX = "model.safetensors.index.json"


def raw_file(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file of any header (bytes, or a value to be dumped) and any data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def base_folder(
    path: Path,
    tensors: dict[str, Tensor],
    config: dict[str, Any] | None = None,
    shards: int = 0,
) -> Path:
    """A checkpoint folder; `shards` = 0 makes a single file without an index."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config or {"tie_word_embeddings": False}))
    if not shards:
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
        return path
    names, where = list(tensors), {}
    for number in range(shards):
        mine = names[number::shards]
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        save_file({n: tensors[n] for n in mine}, path / file, {"format": "pt"})
        where |= dict.fromkeys(mine, file)
    size = sum(t.nbytes for t in tensors.values())
    write_index(path, where, {"total_size": size})
    return path


def write_index(path: Path, where: dict[str, str], metadata: dict[str, Any] | None = None) -> None:
    (path / INDEX).write_text(json.dumps({"metadata": metadata or {}, "weight_map": where}))


def adapter_folder(path: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Path:
    """A PEFT folder; keys are given without PEFT's prefix."""
    path.mkdir(parents=True)
    (path / "adapter_config.json").write_text(json.dumps(config))
    prefixed = {f"base_model.model.{k}": v.contiguous() for k, v in tensors.items()}
    save_file(prefixed, path / "adapter_model.safetensors", {"format": "pt"})
    return path


def lora(
    path: Path,
    shapes: dict[str, tuple[int, int]],
    rank: int = 4,
    alpha: float = 8,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **config: Any,
) -> Path:
    """A LoRA adapter for modules of the given (out, in)."""
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, (out, inner) in shapes.items():
        a = torch.randn(rank, inner, generator=random) / inner**0.5
        tensors[f"{module}.lora_A.weight"] = a.to(dtype)
        tensors[f"{module}.lora_B.weight"] = (torch.randn(out, rank, generator=random) * 0.02).to(
            dtype
        )
        if config.get("use_dora"):
            magnitude = 0.5 + torch.rand(out, generator=random)
            tensors[f"{module}.lora_magnitude_vector"] = magnitude.to(dtype)
    fields = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, **config}
    return adapter_folder(path, tensors, fields)


def ia3(path: Path, vectors: dict[str, Tensor], **config: Any) -> Path:
    """An IA³ adapter; vectors of (out, 1) or (1, in)."""
    tensors = {f"{module}.ia3_l": vector for module, vector in vectors.items()}
    return adapter_folder(path, tensors, {"peft_type": "IA3", **config})


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file but the receipt."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.relative_to(folder) != Path(RECEIPT)
    }
