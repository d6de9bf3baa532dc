"""Adapters merged into GGUF files, against PEFT's unmerged adapters on what transformers reads.

transformers has a reader of GGUF of its own, which knows the order of rows that llama.cpp wants.
It reads the base, PEFT puts the adapter on it; it reads what infold merged; the logits must agree.
With vectors of powers of two all scales are exact, and what is left are roundings of float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from safetensors.numpy import load_file
from torch import Tensor

import ggufs
import infold
from gguf_models import MODELS, USUAL, VOCABULARY, Model, base_file, load
from ggufs import Stored


def powers(shape: torch.Size, random: torch.Generator) -> Tensor:
    return 2.0 ** torch.randint(-1, 2, tuple(shape), generator=random)


def adapted(file: Path, model: Model, folder: Path) -> Any:
    """The base with PEFT's IA³, of powers of two; saved in the folder."""
    from peft import IA3Config, get_peft_model

    config = IA3Config(
        target_modules=list(model.targets), feedforward_modules=list(model.feedforward),
        task_type="CAUSAL_LM", fan_in_fan_out=model.arch == "gpt2",
    )  # fmt: skip
    found = get_peft_model(load(file), config).eval()
    random = torch.Generator().manual_seed(3)
    for name, parameter in found.named_parameters():
        if "ia3_l" in name:
            parameter.data = powers(parameter.shape, random)
    found.save_pretrained(folder, save_embedding_layers=False)
    return found


def logits(model: Any) -> Tensor:
    tokens = torch.arange(24).remainder(VOCABULARY).view(2, 12)
    with torch.no_grad():
        return model(tokens).logits


def close(one: Tensor, two: Tensor) -> bool:
    return float((one - two).norm() / two.norm()) < 2e-5


@pytest.mark.parametrize("name", MODELS)
def test_a_merged_file_is_the_adapted_model(name: str, tmp_path: Path, calm: None) -> None:
    model = MODELS[name]
    file = base_file(tmp_path / "base", model)
    expected = logits(adapted(file, model, tmp_path / "adapter"))
    out = tmp_path / "out" / "merged.gguf"

    infold.merge(file, tmp_path / "adapter", out)

    found = logits(load(out))
    assert close(found, expected)
    assert not close(found, logits(load(file)))
    assert infold.verify(out).ok


def test_feedforward_inputs_of_dense_weights(tmp_path: Path, calm: None) -> None:
    """GPT-2's vector cannot move through GELU; where the weight is dense, it need not."""
    model = replace(MODELS["gpt2"], targets=("c_attn", "mlp.c_proj"), feedforward=("mlp.c_proj",))
    dense, quantized = (base_file(tmp_path / d, model, d) for d in ("F32", "Q8_0"))
    expected = logits(adapted(dense, model, tmp_path / "adapter"))

    infold.merge(dense, tmp_path / "adapter", tmp_path / "merged.gguf")

    assert close(logits(load(tmp_path / "merged.gguf")), expected)
    with pytest.raises(infold.Refusal, match="gelu_new stands between"):
        infold.merge(quantized, tmp_path / "adapter", tmp_path / "other.gguf")


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_low_rank_updates_of_dense_weights(kind: str, tmp_path: Path, calm: None) -> None:
    from peft import LoraConfig, get_peft_model

    model = MODELS["llama"]
    file = base_file(tmp_path / "base", model, "F32")
    config = LoraConfig(
        r=4, lora_alpha=16, target_modules=list(USUAL), use_dora=kind == "dora",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    adapted = get_peft_model(load(file), config).eval()
    random = torch.Generator().manual_seed(3)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=random) / 8
        elif "magnitude" in name:
            parameter.data *= 0.5 + torch.rand(parameter.shape, generator=random)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)

    infold.merge(file, tmp_path / "adapter", tmp_path / "merged.gguf", undo=True)

    found = logits(load(tmp_path / "merged.gguf"))
    assert close(found, logits(adapted)) and not close(found, logits(load(file)))
    assert infold.verify(tmp_path / "merged.gguf").ok
    infold.undo(tmp_path / "merged.gguf", tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == file.read_bytes()


# --- what a wrong merge would look like: each must be seen ----------------------------------------


def patched(
    base: Path, merged: Path, out: Path, change: Callable[[str, Stored, Stored], np.ndarray | None]
) -> Path:
    """`merged` with other bytes for some tensors: change(name, base's, merged's)."""
    data = bytearray(merged.read_bytes())
    before = ggufs.read(base)
    for tensor in GGUFReader(merged).tensors:
        now = (tensor.tensor_type.name, np.array(tensor.data))
        new = change(tensor.name, before[tensor.name], now)
        if new is not None:
            raw = new.tobytes()
            data[tensor.data_offset : tensor.data_offset + len(raw)] = raw
    out.write_bytes(data)
    return out


def scaled(stored: Stored, factors: np.ndarray, places: tuple[int, ...] = (0,)) -> np.ndarray:
    """Rows of blocks of Q8_0 or Q4_1, their float16s at these places multiplied."""
    size = {"Q8_0": 34, "Q4_1": 20}[stored[0]]
    blocks = stored[1].reshape(len(factors), -1, size).copy()
    for place in places:
        floats = np.ascontiguousarray(blocks[:, :, place : place + 2]).view(np.float16)
        floats = (floats.astype(np.float64) * factors[:, None, None]).astype(np.float16)
        blocks[:, :, place : place + 2] = floats.view(np.uint8)
    return blocks.reshape(stored[1].shape)


def vector(folder: Path, ending: str) -> np.ndarray:
    found = load_file(folder / "adapter_model.safetensors")
    return next(v for k, v in found.items() if k.endswith(f"layers.0.{ending}.ia3_l")).ravel()


def wrong_order(folder: Path) -> Callable[[str, Stored, Stored], np.ndarray | None]:
    k = vector(folder, "self_attn.k_proj")
    return lambda name, base, now: scaled(base, k) if name == "blk.0.attn_k.weight" else None


def no_bias(folder: Path) -> Callable[[str, Stored, Stored], np.ndarray | None]:
    return lambda name, base, now: base[1] if name == "blk.0.attn_v.bias" else None


def into_the_gate(folder: Path) -> Callable[[str, Stored, Stored], np.ndarray | None]:
    down, up = vector(folder, "mlp.down_proj"), vector(folder, "mlp.up_proj")

    def change(name: str, base: Stored, now: Stored) -> np.ndarray | None:
        if name == "blk.0.ffn_up.weight":
            return scaled(base, up)
        return scaled(base, down) if name == "blk.0.ffn_gate.weight" else None

    return change


def without_m(folder: Path) -> Callable[[str, Stored, Stored], np.ndarray | None]:
    v = vector(folder, "self_attn.v_proj")
    return lambda name, base, now: scaled(base, v) if name == "blk.0.attn_v.weight" else None


WRONG = {
    "rows in another order": ("llama", "Q8_0", wrong_order, "blk.0.attn_k.weight"),
    "the bias forgotten": ("qwen2", "Q8_0", no_bias, "blk.0.attn_v.bias"),
    "the vector in the gate": ("llama", "Q8_0", into_the_gate, "blk.0.ffn_gate.weight"),
    "Q4_1 without its m": ("llama", "Q4_1", without_m, "blk.0.attn_v.weight"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_merge_is_seen(wrong: str, tmp_path: Path, calm: None) -> None:
    name, dtype, how, tensor = WRONG[wrong]
    base = base_file(tmp_path / "base", MODELS[name], dtype)
    adapter, right = tmp_path / "adapter", tmp_path / "merged.gguf"
    expected = logits(adapted(base, MODELS[name], adapter))
    infold.merge(base, adapter, right)

    bad = patched(base, right, tmp_path / "bad.gguf", how(adapter))

    assert close(logits(load(right)), expected)
    assert not close(logits(load(bad)), expected)
    verdict = infold.verify(base, adapter, bad)
    assert not verdict.ok and tensor in {offender.where for offender in verdict.offenders}
    assert infold.verify(base, adapter, right).ok
    mended = patched(base, right, tmp_path / "mended.gguf", lambda name, base, now: now[1])
    assert mended.read_bytes() == right.read_bytes()  # the patching itself changes nothing
