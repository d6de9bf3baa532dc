"""Whole models: a quantized base with the vectors folded in computes what PEFT's unmerged adapter
does on the dequantized weights, in float64."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import infold
from quantized_bases import Module

SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": 80, "max_position_embeddings": 64,
}  # fmt: skip
GQA = {**SMALL, "num_key_value_heads": 2, "tie_word_embeddings": False, "pad_token_id": 0}
T5 = {
    "d_model": 64, "d_ff": 96, "d_kv": 16, "num_layers": 2, "num_heads": 4, "vocab_size": 80,
    "decoder_start_token_id": 0, "dropout_rate": 0.0, "tie_word_embeddings": False,
}  # fmt: skip
OPT = {
    "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": 80, "max_position_embeddings": 64, "word_embed_proj_dim": 64, "dropout": 0.0,
}  # fmt: skip
BERT = {**SMALL, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@dataclass
class Case:
    """A model, what IA³ trains in it, and whether its feed-forward vectors must be positive."""

    make: Callable[[], nn.Module]
    targets: list[str]
    feedforward: list[str]
    positive: bool = False
    refused: str = ""


def causal(config: Any) -> Callable[[], nn.Module]:
    return lambda: hf.AutoModelForCausalLM.from_config(config)


CASES = {
    "llama": Case(
        causal(hf.LlamaConfig(**GQA, attention_bias=True, mlp_bias=True)),
        ["k_proj", "v_proj", "down_proj"], ["down_proj"],
    ),
    "qwen3": Case(
        causal(hf.Qwen3Config(**GQA, head_dim=16, attention_bias=True)),
        ["q_proj", "v_proj", "down_proj"], ["down_proj"],
    ),
    "phi3": Case(
        causal(hf.Phi3Config(**GQA)), ["qkv_proj", "down_proj"], ["down_proj"],
    ),
    "up and down": Case(
        causal(hf.LlamaConfig(**GQA)), ["up_proj", "gate_proj", "down_proj"], ["down_proj"],
    ),
    "multi-head values": Case(
        causal(hf.LlamaConfig(**{**GQA, "num_key_value_heads": 4}, attention_bias=True)),
        ["v_proj", "o_proj"], ["o_proj"],
    ),
    "grouped values": Case(
        causal(hf.LlamaConfig(**GQA)), ["o_proj"], ["o_proj"], refused="grouped heads",
    ),
    "opt": Case(
        causal(hf.OPTConfig(**OPT, activation_function="relu")),
        ["q_proj", "k_proj", "fc2"], ["fc2"], positive=True,
    ),
    "opt, negative": Case(
        causal(hf.OPTConfig(**OPT, activation_function="relu")),
        ["fc2"], ["fc2"], refused="negative elements, and ReLU",
    ),
    "opt with gelu": Case(
        causal(hf.OPTConfig(**OPT, activation_function="gelu")),
        ["fc2"], ["fc2"], positive=True, refused="gelu stands between",
    ),
    "nemotron": Case(
        causal(hf.NemotronConfig(**GQA, hidden_act="relu2")),
        ["k_proj", "down_proj"], ["down_proj"], positive=True,
    ),
    "t5": Case(
        lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5, feed_forward_proj="relu")),
        ["k", "v", "wo"], ["wo"], positive=True,
    ),
    "flan-t5": Case(
        lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5, feed_forward_proj="gated-gelu")),
        ["k", "v", "wo"], ["wo"],
    ),
    "bert": Case(
        lambda: hf.BertForSequenceClassification(hf.BertConfig(**BERT, hidden_act="relu")),
        ["key", "value", "output.dense"], ["output.dense"], positive=True,
    ),
    "bert with gelu": Case(
        lambda: hf.BertForSequenceClassification(hf.BertConfig(**BERT)),
        ["key", "value", "output.dense"], ["output.dense"], positive=True,
        refused="gelu stands between",
    ),
}  # fmt: skip


def int8(weight: Tensor) -> Module:
    """A code a row, F32 scales: `weight_scale` of compressed-tensors' int-quantized."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    tensors = {"weight": (weight / scale).round().to(torch.int8), "weight_scale": scale}
    told = {"quant_method": "compressed-tensors", "format": "int-quantized"}
    return Module(
        tensors,
        lambda p: p["weight"].double() * p["weight_scale"].double(),
        ("weight_scale",),
        told,
    )


def quantize(model: nn.Module, folder: Path) -> dict[str, Module]:
    """Save a model with all its Linear layers in int8, but for its heads."""
    model.save_pretrained(folder)
    path = folder / "model.safetensors"
    tensors, modules = load_file(path), {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name.rpartition(".")[2] not in (
            "lm_head",
            "classifier",
        ):
            modules[name] = made = int8(tensors.pop(f"{name}.weight"))
            tensors |= {f"{name}.{part}": tensor for part, tensor in made.tensors.items()}
    save_file(tensors, path, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": made.config}))
    return modules


def dequantized(model: nn.Module, folder: Path, modules: dict[str, Module]) -> nn.Module:
    """The model in float64, with the values that lie in a folder."""
    tensors = load_file(folder / "model.safetensors")
    state = {k: v.double() for k, v in tensors.items() if v.is_floating_point()}
    for name, module in modules.items():
        parts = {part: tensors[f"{name}.{part}"] for part in module.tensors}
        state[f"{name}.weight"] = module.values(parts)
        del state[f"{name}.weight_scale"]
    model = model.double()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and all("embed" in name or "lm_head" in name for name in missing)
    return model.eval()


def outputs(model: nn.Module) -> Tensor:
    torch.manual_seed(3)
    tokens = torch.randint(1, 80, (2, 12))
    extra = {"decoder_input_ids": tokens[:, :5]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        logits: Tensor = model(input_ids=tokens, **extra).logits
    return logits


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore")
def test_folded_model(tmp_path: Path, calm: None, name: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    model = case.make()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):
            parameter.data.normal_(0, 0.3)
        elif parameter.dim() == 2:
            parameter.data.normal_(0, 0.15)
    modules = quantize(model, tmp_path / "base")
    model = dequantized(model, tmp_path / "base", modules)
    before = outputs(model)
    config = peft.IA3Config(target_modules=case.targets, feedforward_modules=case.feedforward)
    adapted = peft.get_peft_model(model, config)
    for key, parameter in adapted.named_parameters():
        if "ia3_l" in key:
            parameter.data = (1 + 0.4 * torch.randn_like(parameter)).float()
            if case.positive:
                parameter.data.abs_()
    adapted.save_pretrained(tmp_path / "adapter")
    unmerged = outputs(adapted)
    size = unmerged.abs().max()
    assert (unmerged - before).abs().max() > 0.02 * size

    if case.refused:
        with pytest.raises(infold.Refusal, match=case.refused):
            infold.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
        return
    infold.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")

    folded = outputs(dequantized(case.make(), tmp_path / "out", modules))
    assert (folded - unmerged).abs().max() < 3e-6 * size
    assert infold.verify(tmp_path / "base", tmp_path / "adapter", tmp_path / "out").ok
