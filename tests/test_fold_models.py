"""Whole models: a quantized base with the vectors folded in computes what PEFT's unmerged adapter
does on the dequantized weights, in float64."""

from __future__ import annotations

import contextlib
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

import handmade
import infold
from infold.adapters import Settings
from infold.checkpoint.shards import open_checkpoint
from infold.plan.fold import PLAIN_VALUES, Part, Place, Unfoldable, fold
from infold.plan.kinds import limits, model_types
from infold.plan.match import Names
from infold.plan.quantized import StoredModules
from quantized_bases import Module
from tiny_models import gemma3, llava

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
    "values with a norm that has no weight": Case(
        causal(hf.Gemma4TextConfig(**{
            **GQA, "num_key_value_heads": 4, "head_dim": 16, "global_head_dim": 16,
            "hidden_size_per_layer_input": 0, "layer_types": ["full_attention"] * 2,
        })),
        ["o_proj"], ["o_proj"], refused="the attention of gemma4_text",
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
    tokens = torch.randint(3, 80, (2, 12))
    seen = {"pixel_values": (2, 3, 32, 32), "input_features": (2, 80, 32), "input_values": (2, 800)}
    name = model.main_input_name
    inputs = {name: torch.randn(seen[name]).to(model.dtype) if name in seen else tokens}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens[:, :5]
    with torch.no_grad():
        found = model(**inputs)
    made: Tensor = found.logits if "logits" in found else found.last_hidden_state
    return made


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


TINY = {
    **GQA, **T5, **OPT, "num_key_value_heads": 4, "head_dim": 16, "encoder_layers": 2,
    "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "n_embd": 64, "n_layer": 2, "n_head": 4,
    "n_positions": 64, "rotary_dim": 4, "embedding_size": 64, "num_experts": 4,
    "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "bos_token_id": 1, "eos_token_id": 2, "forced_eos_token_id": 2, "max_source_positions": 16,
    "max_target_positions": 64, "attention_types": [[["global", "local"], 1]], "image_size": 32,
    "patch_size": 16, "projection_dim": 64,
}  # fmt: skip
# What models are of whose type there is no Auto class of a task that they have a head for.
PARTS = {
    "clip_text_model": "CLIPTextModel", "clip_vision_model": "CLIPVisionModel",
    "siglip_text_model": "SiglipTextModel", "siglip_vision_model": "SiglipVisionModel",
    "wav2vec2": "Wav2Vec2Model", "hubert": "HubertModel", "qwen3_vl_text": "Qwen3VLTextModel",
    "whisper": "WhisperForConditionalGeneration",
}  # fmt: skip


def tiny(kind: str) -> nn.Module:
    """A small model of a type, with a key and a value for each head, in float64."""
    make = hf.CONFIG_MAPPING[kind]
    config = make(**{name: n for name, n in TINY.items() if hasattr(make(), name)})
    auto = hf.AutoModelForSeq2SeqLM if config.is_encoder_decoder else hf.AutoModelForMaskedLM
    if type(config) not in auto._model_mapping:
        auto = hf.AutoModelForCausalLM
    torch.manual_seed(0)
    if kind in PARTS:
        model = getattr(hf, PARTS[kind])(config).double().eval()
    else:
        model = auto.from_config(config, experts_implementation="eager").double().eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def told(model: nn.Module) -> dict[str, Any]:
    """The model's config.json."""
    found: dict[str, Any] = json.loads(model.config.to_json_string())
    return found


@dataclass
class InMemory:
    """`Modules` of a model. types: what it is taken for."""

    model: nn.Module
    types: set[str]

    def beside(self, module: str) -> set[str]:
        above = self.model.get_submodule(module.rpartition(".")[0])
        return {name for name, one in above.named_children() if list(one.parameters())}

    def size(self, module: str) -> tuple[int, int] | None:
        try:
            layer = self.model.get_submodule(module)
        except AttributeError:
            return None
        weight = getattr(layer, "weight", None)
        return None if weight is None or weight.dim() != 2 else (len(weight), weight.shape[1])

    def places(self, module: str, part: Part | None) -> list[Place]:
        return [Place(module, Settings())]

    def activations(self, module: str) -> set[str]:
        return set()

    def limits(self) -> set[str]:
        return limits(told(self.model))

    def model_types(self, module: str) -> set[str]:
        return self.types


def values_of_outputs(base: InMemory) -> dict[str, str]:
    """Output projection of an attention -> where its inputs' vector goes."""
    found = {}
    for name, layer in base.model.named_modules():
        if isinstance(layer, nn.Linear) and name.endswith(("o_proj", "out_proj", ".o", "dense")):
            with contextlib.suppress(Unfoldable):
                found[name] = fold(base, name, "in", lambda: torch.ones(1))[0].tensor
    return found


@pytest.mark.parametrize("kind", [*sorted(PLAIN_VALUES), "diffllama"])
@pytest.mark.filterwarnings("ignore")
def test_a_factor_of_values_is_one_of_what_attention_makes_of_them(calm: None, kind: str) -> None:
    """What the list of model types claims, in transformers' own forward. The last is not in it: a
    difference of attentions, with a norm."""
    model = tiny(kind)
    pairs = values_of_outputs(InMemory(model, model_types(told(model))))
    assert bool(pairs) == (kind in PLAIN_VALUES)
    pairs = pairs or values_of_outputs(InMemory(model, {"llama"}))
    assert len(pairs) >= 2
    factors = {
        n: 1 + 0.4 * torch.randn(model.get_submodule(v).out_features).double()
        for n, v in pairs.items()
    }
    before = outputs(model)
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, x, by=by: (x[0] * by, *x[1:]))
        for name, by in factors.items()
    ]
    wanted = outputs(model)
    for hook in hooks:
        hook.remove()
    for name, value in pairs.items():
        model.get_submodule(value).register_forward_hook(lambda _, x, y, by=factors[name]: y * by)
    moved = outputs(model)

    change = (wanted - before).abs().max()
    assert change > 0
    assert ((moved - wanted).abs().max() < 1e-4 * change) == (kind in PLAIN_VALUES)


SEEN = {**SMALL, "image_size": 32, "patch_size": 16, "projection_dim": 64}
COMPOSITES = {
    "clip": (lambda: hf.CLIPConfig(text_config=SMALL, vision_config=SEEN), "CLIPModel"),
    "llava": (lambda: llava(False), "LlavaForConditionalGeneration"),
    "gemma3": (lambda: gemma3(False), "Gemma3ForConditionalGeneration"),
}
TOWERS = {
    "clip": {"vision": "clip_vision_model", "text": "clip_text_model"},
    "llava": {"vision": "clip_vision_model", "language": "llama"},
    "gemma3": {"vision": "siglip_vision_model", "language": "gemma3_text"},
}


@pytest.mark.parametrize("name", COMPOSITES)
@pytest.mark.filterwarnings("ignore")
def test_a_part_of_a_model_is_asked_for_its_own_type(tmp_path: Path, calm: None, name: str) -> None:
    """By the names of the tensors that transformers writes: that of the whole is no type of
    attention."""
    config, kind = COMPOSITES[name]
    getattr(hf, kind)(config()).save_pretrained(tmp_path)
    base = open_checkpoint(tmp_path)
    modules = StoredModules(base, Names(base.where))
    values = [n.removesuffix(".weight") for n in base.where if n.endswith("v_proj.weight")]

    found = {value: set(modules.model_types(value)) for value in values}

    assert {type_ for types in found.values() for type_ in types} == set(TOWERS[name].values())
    for part, type_ in TOWERS[name].items():
        assert all(types == {type_} for value, types in found.items() if part in value)
    for value in values:
        if "vision" in value:
            output = value.replace("v_proj", "out_proj")
            places = fold(modules, output, "in", lambda: torch.ones(1))
            assert [place.tensor for place in places] == [f"{value}.weight", f"{value}.bias"]


def test_a_part_of_a_model_has_its_own_activation(tmp_path: Path) -> None:
    """BLIP-2's language model has ReLU, and its eyes have not."""
    parts = {"language_model.model.decoder.layers.0": (24, 16), "vision_model.layers.0": (24, 16)}
    tensors = {f"{path}.fc1.weight": torch.ones(size) for path, size in parts.items()}
    tensors |= {f"{path}.fc2.weight": torch.ones(size[::-1]) for path, size in parts.items()}
    config = {"model_type": "blip-2", "text_config": {"activation_function": "relu"}}
    config["vision_config"] = {"hidden_act": "gelu"}
    base = open_checkpoint(handmade.base_folder(tmp_path / "base", tensors, config))
    modules = StoredModules(base, Names(base.where))
    read, seen = (f"{path}.fc2" for path in parts)

    assert fold(modules, read, "in", lambda: torch.ones(1))[0].tensor.endswith(
        "layers.0.fc1.weight"
    )
    with pytest.raises(Unfoldable, match="gelu stands between"):
        fold(modules, seen, "in", lambda: torch.ones(1))
