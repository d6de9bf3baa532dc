"""Tiny models of several architectures as GGUF files, and how transformers loads them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ggufs
from ggufs import Stored

WIDE, HEADS, GROUPS, INNER, VOCABULARY, LAYERS = 64, 4, 2, 256, 96, 2
SIZE = WIDE // HEADS


@dataclass
class Model:
    """A tiny architecture: its tensors per block by name and (out, in), and who has a bias."""

    arch: str
    matrices: dict[str, tuple[int, int]]
    norms: tuple[str, ...]
    targets: tuple[str, ...]  # of PEFT; those of feedforward come in both
    feedforward: tuple[str, ...]
    biases: tuple[str, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)
    head: bool = True
    positions: bool = False
    layernorm: bool = False
    size: int = SIZE  # of a head


def attention(size: int) -> dict[str, tuple[int, int]]:
    return {
        "attn_q": (HEADS * size, WIDE),
        "attn_k": (GROUPS * size, WIDE),
        "attn_v": (GROUPS * size, WIDE),
        "attn_output": (WIDE, HEADS * size),
    }


ATTENTION = attention(SIZE)
GATED = {"ffn_gate": (INNER, WIDE), "ffn_up": (INNER, WIDE), "ffn_down": (WIDE, INNER)}
NORMS = ("attn_norm", "ffn_norm")
FOUR = (*NORMS, "post_attention_norm", "post_ffw_norm")
USUAL = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
PLAIN = {
    "attn_qkv": (3 * WIDE, WIDE),
    "attn_output": (WIDE, WIDE),
    "ffn_up": (INNER, WIDE),
    "ffn_down": (WIDE, INNER),
}
MODELS = {
    "llama": Model("llama", ATTENTION | GATED, NORMS, USUAL, ("down_proj",)),
    "qwen2": Model(
        "qwen2", ATTENTION | GATED, NORMS, USUAL, ("down_proj",), ("attn_q", "attn_k", "attn_v")
    ),
    "qwen3": Model(  # whose heads transformers takes to be of 128
        "qwen3", attention(128) | GATED, (*NORMS, "attn_q_norm", "attn_k_norm"), USUAL,
        ("down_proj",), size=128,
    ),
    "gemma2": Model("gemma2", ATTENTION | GATED, FOUR, USUAL, ("down_proj",), head=False),
    "gemma3": Model(
        "gemma3", ATTENTION | GATED, (*FOUR, "attn_q_norm", "attn_k_norm"), USUAL, ("down_proj",),
        metadata={"attention.sliding_window": 8}, head=False,
    ),
    "phi3": Model(
        "phi3",
        {
            "attn_qkv": (WIDE + 2 * GROUPS * SIZE, WIDE),
            "attn_output": (WIDE, WIDE),
            "ffn_up": (2 * INNER, WIDE),
            "ffn_down": (WIDE, INNER),
        },
        NORMS,
        ("qkv_proj", "down_proj"),
        ("down_proj",),
    ),
    "gpt2": Model(
        "gpt2", PLAIN, NORMS, ("c_attn", "c_fc"), (), tuple(PLAIN), head=False, positions=True,
        layernorm=True,
    ),
    "bloom": Model(
        "bloom", PLAIN, NORMS, ("query_key_value", "dense_h_to_4h"), (), tuple(PLAIN), head=False,
        layernorm=True,
    ),
}  # fmt: skip


def tensors(
    model: Model, dtype: str, seed: int = 0, vocabulary: int = VOCABULARY
) -> dict[str, Stored]:
    random = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return random.standard_normal((rows, columns)) * (2 / columns**0.5)

    made = {"token_embd.weight": ggufs.encode(matrix(vocabulary, WIDE), "F32")}
    for layer in range(LAYERS):
        for name, shape in model.matrices.items():
            made[f"blk.{layer}.{name}.weight"] = ggufs.encode(matrix(*shape), dtype)
        for name in model.biases:
            bias = random.standard_normal(model.matrices[name][0]) / 4
            made[f"blk.{layer}.{name}.bias"] = ggufs.encode(bias, "F32")
        for name in model.norms:
            size = model.size if name.endswith(("q_norm", "k_norm")) else WIDE
            made |= norm(f"blk.{layer}.{name}", size, model)
    made |= norm("output_norm", WIDE, model)
    if model.arch == "bloom":
        made |= norm("token_embd_norm", WIDE, model)
    if model.positions:
        made["position_embd.weight"] = ggufs.encode(matrix(1024, WIDE), "F32")
    if model.head:
        made["output.weight"] = ggufs.encode(matrix(vocabulary, WIDE), "F32")
    return made


def norm(name: str, size: int, model: Model) -> dict[str, Stored]:
    made = {f"{name}.weight": ggufs.encode(np.ones(size), "F32")}
    return made | ({f"{name}.bias": ggufs.encode(np.zeros(size), "F32")} if model.layernorm else {})


def base_file(
    folder: Path,
    model: Model,
    dtype: str = "Q8_0",
    vocabulary: int = VOCABULARY,
    instead: Mapping[str, Stored] | None = None,
    **more: Any,
) -> Path:
    """instead: of tensors of these names. more: metadata, dots as two underscores."""
    heads = HEADS if "attn_qkv" in model.matrices and model.arch != "phi3" else GROUPS
    metadata = {
        "block_count": LAYERS, "context_length": 32, "embedding_length": WIDE,
        "feed_forward_length": INNER, "attention.head_count": HEADS,
        "attention.head_count_kv": heads, "vocab_size": vocabulary,
        "attention.layer_norm_rms_epsilon": 1e-6, "attention.layer_norm_epsilon": 1e-5,
        "rope.freq_base": 10000.0, "rope.dimension_count": model.size,
        "attention.key_length": model.size, "attention.value_length": model.size,
        "tokenizer.ggml.tokens": [f"t{n}" for n in range(vocabulary)],
        "tokenizer.ggml.padding_token_id": 0, **model.metadata,
        **{key.replace("__", "."): value for key, value in more.items()},
    }  # fmt: skip
    made = tensors(model, dtype, vocabulary=vocabulary) | dict(instead or {})
    return ggufs.write(folder / "model.gguf", model.arch, made, metadata)


def load(file: Path) -> Any:
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, attn_implementation="eager"
        ).eval()
