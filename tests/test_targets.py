"""Default targets: the modules of each architecture, read from its paper and its module tree.

In the table, `k_proj:2` is an ending and the number of modules that it must hit. Models are on the
meta device: few layers, the widths of their default configurations.
"""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
import transformers
from peft.utils import constants
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, MixtralConfig, PreTrainedConfig

from infold.errors import Refusal
from infold.tuners import IA3Config, LoraConfig, attach, load
from infold.tuners.targets import Targets, find_targets
from tiny_models import VISION_MODELS

CAUSAL, MASKED, SEQ2SEQ = "AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForSeq2SeqLM"
IMAGE, CTC, SPEECH = (
    "AutoModelForImageClassification",
    "AutoModelForCTC",
    "AutoModelForSpeechSeq2Seq",
)
IMAGE_TEXT, BARE = "AutoModelForImageTextToText", "AutoModel"
LAYERS = {"num_hidden_layers": 2}
N_LAYERS = {"n_layer": 2}
BOTH = {"encoder_layers": 2, "decoder_layers": 2}
T5 = {"num_layers": 2, "num_decoder_layers": 2}
PATCH_TREE = {"hidden_sizes": [8, 16], "depths": [1, 1]}


class Case(NamedTuple):
    auto: str
    options: dict[str, Any]
    ia3: str  # outputs are scaled: key, value
    feedforward: str  # inputs are scaled: the second projection
    lora: str
    warning: str = ""  # a part of the sentence, under ia3


LLAMA = ("k_proj:2 v_proj:2", "down_proj:2", "q_proj:2 v_proj:2")
QWEN = ("q_proj:2 v_proj:2", "down_proj:2", "q_proj:2 v_proj:2")  # as PEFT: q instead of k
OPT = ("k_proj:2 v_proj:2", "fc2:2", "q_proj:2 v_proj:2")
GPT2 = ("c_attn:2", "mlp.c_proj:2", "c_attn:2")
NEOX = ("query_key_value:2", "dense_4h_to_h:2", "query_key_value:2")
# BERT's layer has output.dense, its attention too: one ending, four modules, as PEFT has it.
BERT = ("key:2 value:2", "output.dense:4", "query:2 value:2")
# The encoder has self-attention, the decoder has both: 2 + 2 + 2.
BART = ("k_proj:6 v_proj:6", "fc2:4", "q_proj:6 v_proj:6")
EXPERTS = "mlp.experts are 3-D parameters"
NO_ATTENTION = "no key and value projections found"

CASES: dict[str, Case] = {
    # decoders
    "llama": Case(CAUSAL, LAYERS, *LLAMA),
    "mistral": Case(CAUSAL, LAYERS, *LLAMA),
    "olmo2": Case(CAUSAL, LAYERS, *LLAMA),
    "granite": Case(CAUSAL, LAYERS, *LLAMA),
    "cohere": Case(CAUSAL, LAYERS, *LLAMA),
    "stablelm": Case(CAUSAL, LAYERS, *LLAMA),
    "glm4": Case(CAUSAL, LAYERS, *LLAMA),  # gate_up_proj in one
    "smollm3": Case(CAUSAL, LAYERS, *LLAMA),
    "qwen2": Case(CAUSAL, LAYERS, *QWEN),
    "qwen3": Case(CAUSAL, LAYERS, *QWEN),
    "gemma": Case(CAUSAL, LAYERS, *QWEN),
    "gemma2": Case(CAUSAL, LAYERS, *QWEN),
    "gemma3_text": Case(CAUSAL, LAYERS, *QWEN),
    "phi": Case(CAUSAL, LAYERS, "q_proj:2 v_proj:2", "fc2:2", "q_proj:2 v_proj:2 fc1:2 fc2:2"),
    "phi3": Case(CAUSAL, LAYERS, "qkv_proj:2", "down_proj:2", "qkv_proj:2"),
    "starcoder2": Case(CAUSAL, LAYERS, "k_proj:2 v_proj:2", "c_proj:2", "q_proj:2 v_proj:2"),
    "gpt2": Case(CAUSAL, N_LAYERS, *GPT2),
    "gpt_bigcode": Case(CAUSAL, N_LAYERS, *GPT2),  # one key and value for all heads
    "openai-gpt": Case(CAUSAL, N_LAYERS, *GPT2),
    "gpt_neo": Case(
        CAUSAL, {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
        "q_proj:2 v_proj:2", "c_proj:2", "q_proj:2 v_proj:2",
    ),
    "gptj": Case(CAUSAL, N_LAYERS, "q_proj:2 v_proj:2", "fc_out:2", "q_proj:2 v_proj:2"),
    "gpt_neox": Case(CAUSAL, LAYERS, *NEOX),
    "bloom": Case(CAUSAL, N_LAYERS, *NEOX),
    "falcon": Case(CAUSAL, LAYERS, *NEOX),
    "mpt": Case(CAUSAL, {"n_layers": 2}, "Wqkv:2", "down_proj:2", "Wqkv:2"),
    "codegen": Case(CAUSAL, N_LAYERS, "qkv_proj:2", "fc_out:2", "qkv_proj:2"),
    "ctrl": Case(CAUSAL, N_LAYERS, "Wk:2 Wv:2", "ffn.2:2", "Wq:2 Wv:2"),
    "opt": Case(CAUSAL, LAYERS, "q_proj:2 k_proj:2", "fc2:2", "q_proj:2 v_proj:2"),
    "xglm": Case(CAUSAL, {"num_layers": 2}, *OPT),
    "biogpt": Case(CAUSAL, LAYERS, *OPT),
    "deepseek_v3": Case(  # one dense layer, one of experts with a shared one; low-rank attention
        CAUSAL, LAYERS | {"first_k_dense_replace": 1},
        "kv_b_proj:2", "down_proj:2", "q_b_proj:2 kv_b_proj:2", EXPERTS,
    ),
    "xlnet": Case(
        CAUSAL, N_LAYERS, "", "layer_2:2", "layer_1:2 layer_2:2",
        "query, key and value of transformer.layer.N.rel_attn are parameters",
    ),
    # experts in 3-D parameters
    "mixtral": Case(CAUSAL, LAYERS, "k_proj:2 v_proj:2", "", "q_proj:2 v_proj:2", EXPERTS),
    "qwen3_moe": Case(CAUSAL, LAYERS, "k_proj:2 v_proj:2", "", "q_proj:2 v_proj:2", EXPERTS),
    "gpt_oss": Case(CAUSAL, LAYERS, "k_proj:2 v_proj:2", "", "q_proj:2 v_proj:2", EXPERTS),
    "granitemoe": Case(
        CAUSAL, LAYERS, "k_proj:2 v_proj:2", "", "q_proj:2 v_proj:2",
        "block_sparse_moe.experts are 3-D parameters",
    ),
    "qwen2_moe": Case(CAUSAL, LAYERS, *LLAMA, EXPERTS),  # shared_expert.down_proj
    # state spaces and attention
    "falcon_h1": Case(CAUSAL, LAYERS, *LLAMA),
    "jamba": Case(  # attention in the second layer, experts too
        CAUSAL, LAYERS | {"attn_layer_period": 2, "attn_layer_offset": 1},
        "k_proj:1 v_proj:1", "down_proj:1", "q_proj:1 v_proj:1",
        "feed_forward.experts are 3-D parameters",
    ),
    "qwen3_next": Case(  # a gated delta net: query, key, value and gate in one
        CAUSAL, LAYERS, "in_proj_qkvz:2", "down_proj:2", "in_proj_qkvz:2", EXPERTS,
    ),
    "rwkv": Case(  # key and value stand in the feed-forward network too
        CAUSAL, LAYERS, "attention.key:2 attention.value:2", "feed_forward.value:2",
        "key:4 value:4 receptance:4 output:2",
    ),
    # encoders
    "bert": Case(MASKED, LAYERS, *BERT),
    "roberta": Case(MASKED, LAYERS, *BERT),
    "xlm-roberta": Case(MASKED, LAYERS, *BERT),
    "electra": Case(MASKED, LAYERS, *BERT),
    "layoutlm": Case(MASKED, LAYERS, *BERT),
    "longformer": Case(
        MASKED, LAYERS | {"attention_window": [8, 8]},
        "key:2 value:2 key_global:2 value_global:2", "output.dense:4",
        "query:2 value:2 query_global:2 value_global:2",
    ),
    "mobilebert": Case(  # per layer: three networks in `ffn`, one of its own, the attention
        MASKED, LAYERS, "key:2 value:2", "output.dense:10", "query:2 value:2"
    ),
    "albert": Case(MASKED, LAYERS, "key:1 value:1", "ffn_output:1", "query:1 value:1"),
    "distilbert": Case(MASKED, {"n_layers": 2}, "k_lin:2 v_lin:2", "lin2:2", "q_lin:2 v_lin:2"),
    "flaubert": Case(
        "AutoModelWithLMHead", {"n_layers": 2}, "k_lin:2 v_lin:2", "lin2:2", "q_lin:2 v_lin:2"
    ),
    "deberta": Case(MASKED, LAYERS, "in_proj:2", "output.dense:4", "in_proj:2"),
    "deberta-v2": Case(
        MASKED, LAYERS, "key_proj:2 value_proj:2", "output.dense:4", "query_proj:2 value_proj:2"
    ),
    "modernbert": Case(MASKED, LAYERS, "Wqkv:2", "mlp.Wo:2", "Wqkv:2"),  # attn.Wo is not meant
    "mpnet": Case(MASKED, LAYERS, "k:2 v:2", "output.dense:2", "q:2 v:2"),
    "squeezebert": Case(MASKED, LAYERS, "key:2 value:2", "output.conv1d:2", "query:2 value:2"),
    "funnel": Case(
        MASKED, {"block_sizes": [1, 1], "num_decoder_layers": 1},
        "k_head:3 v_head:3", "linear_2:3", "q_head:3 v_head:3",
    ),
    # encoder and decoder
    "t5": Case(SEQ2SEQ, T5, "k:6 v:6", "wo:4", "q:6 v:6"),
    "mt5": Case(SEQ2SEQ, T5, "k:6 v:6 wi_1:4", "", "q:6 v:6"),
    "switch_transformers": Case(  # in both stacks one dense network and three experts
        SEQ2SEQ,
        T5 | {"num_experts": 3, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
        "k:6 v:6", "wo:8", "q:6 v:6",
    ),
    "bart": Case(SEQ2SEQ, BOTH, "q_proj:6 v_proj:6", "fc2:4", "q_proj:6 v_proj:6"),
    "pegasus": Case(SEQ2SEQ, BOTH, *BART),
    "m2m_100": Case(SEQ2SEQ, BOTH, *BART),
    "prophetnet": Case(
        SEQ2SEQ, {"num_encoder_layers": 2, "num_decoder_layers": 2},
        "key_proj:6 value_proj:6", "output:4", "query_proj:6 value_proj:6",
    ),
    # speech
    "whisper": Case(SPEECH, BOTH, *BART),
    "wav2vec2": Case(CTC, LAYERS, "k_proj:2 v_proj:2", "output_dense:2", "q_proj:2 v_proj:2"),
    "hubert": Case(CTC, LAYERS, "k_proj:2 v_proj:2", "output_dense:2", "q_proj:2 v_proj:2"),
    "wav2vec2-conformer": Case(  # a network before and one after the attention
        CTC, LAYERS | {"vocab_size": 32},
        "linear_k:2 linear_v:2", "output_dense:4", "linear_q:2 linear_v:2",
    ),
    "fastspeech2_conformer": Case(  # the feed-forward networks are convolutions
        BARE, {"encoder_layers": 1, "decoder_layers": 1},
        "linear_k:2 linear_v:2", "conv2:4", "linear_q:2 linear_v:2",
    ),
    # vision
    "vit": Case(IMAGE, LAYERS, *OPT),
    "beit": Case(IMAGE, LAYERS, *OPT),
    "deit": Case(BARE, LAYERS, *OPT),
    "dinov2": Case(IMAGE, LAYERS, *OPT),
    "siglip_vision_model": Case(
        BARE, LAYERS, "k_proj:2 v_proj:2", "fc2:3", "q_proj:2 v_proj:2",
        "query, key and value of head.attention are parameters",
    ),
    "swin": Case(IMAGE, {"depths": [1, 1], "num_heads": [3, 6]}, *OPT),
    "segformer": Case(IMAGE, {"num_encoder_blocks": 2, "depths": [1, 1]}, *OPT),
    "cvt": Case(
        IMAGE, {"depth": [1, 2, 10]},
        "projection_key:13 projection_value:13", "output.dense:26",
        "projection_query:13 projection_value:13",
    ),
    "convnext": Case(IMAGE, PATCH_TREE | {"num_stages": 2}, "", "pwconv2:2", "pwconv1:2 pwconv2:2",
                     NO_ATTENTION),
    # several towers
    "clip": Case(BARE, {"text_config": LAYERS, "vision_config": LAYERS},
                 "k_proj:4 v_proj:4", "fc2:4", "q_proj:4 v_proj:4"),
    "llava": Case(  # the language model gated, CLIP not; the projector between them is not hit
        IMAGE_TEXT, {}, "k_proj:4 v_proj:4", "down_proj:2 fc2:2", "q_proj:4 v_proj:4"
    ),
    "qwen2_vl": Case(
        IMAGE_TEXT, {}, "qkv:2 k_proj:2 v_proj:2", "fc2:2 down_proj:2", "qkv:2 q_proj:2 v_proj:2"
    ),
    "gemma3": Case(
        IMAGE_TEXT, {}, "k_proj:4 v_proj:4", "fc2:3 down_proj:2", "q_proj:4 v_proj:4",
        "query, key and value of model.vision_tower.head.attention are parameters",
    ),
}  # fmt: skip

# Nothing to scale: no attention, and no feed-forward network of h -> i -> h. The projections of a
# state-space mixer are neither, and its kernels read out_proj's weight past any adapter.
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "mamba": (CAUSAL, LAYERS, r"dt_proj \(2\), in_proj \(2\), lm_head \(1\), out_proj \(2\)"),
    "mamba2": (CAUSAL, LAYERS, r"in_proj \(2\), lm_head \(1\), out_proj \(2\)"),
    "falcon_mamba": (CAUSAL, LAYERS, r"in_proj \(2\)"),
    "resnet": (IMAGE, {}, r"convolution \(\d+\)"),
    "mobilenet_v1": (IMAGE, {}, r"convolution \(27\)"),
    "mobilenet_v2": (IMAGE, {}, r"convolution \(\d+\)"),
    "regnet": (IMAGE, {}, r"convolution \(\d+\)"),
}


def build(kind: str, auto: str, options: dict[str, Any]) -> nn.Module:
    config: PreTrainedConfig
    config = (
        VISION_MODELS[kind](False) if kind in VISION_MODELS else CONFIG_MAPPING[kind](**options)
    )
    with torch.device("meta"):
        if auto == "AutoModelWithLMHead":
            return transformers.FlaubertWithLMHeadModel(config)
        model: nn.Module = getattr(transformers, auto).from_config(config)
        return model


def hits(model: nn.Module, endings: Any) -> set[str]:
    """The modules that PEFT's rules select: a regular expression for all, or endings."""
    paths = [path for path, _ in model.named_modules()]
    if isinstance(endings, str):
        return {path for path in paths if re.fullmatch(endings, path)}
    return {p for p in paths if any(p == e or p.endswith(f".{e}") for e in endings)}


def counts(model: nn.Module, endings: tuple[str, ...]) -> dict[str, int]:
    return {ending: len(hits(model, [ending])) for ending in endings}


def table(text: str) -> dict[str, int]:
    return {name: int(count) for name, _, count in (e.partition(":") for e in text.split())}


def found(model: nn.Module, method: str) -> tuple[Targets, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        targets = find_targets(model, method)
    return targets, [str(one.message) for one in caught]


@pytest.mark.parametrize("kind", CASES)
def test_each_architecture_has_these_targets(kind: str) -> None:
    case = CASES[kind]
    model = build(kind, case.auto, case.options)

    ia3, sentences = found(model, "ia3")
    lora, _ = found(model, "lora")

    assert counts(model, ia3.feedforward) == table(case.feedforward)
    assert counts(model, ia3.modules) == table(case.ia3) | table(case.feedforward)
    assert counts(model, lora.modules) == table(case.lora)
    assert lora.feedforward == ()
    assert len(sentences) == bool(case.warning)
    assert all(case.warning in sentence for sentence in sentences)


@pytest.mark.parametrize("method", ["ia3", "lora"])
@pytest.mark.parametrize("kind", REFUSED)
def test_no_targets_is_a_refusal_that_lists_the_endings(kind: str, method: str) -> None:
    auto, options, listed = REFUSED[kind]

    with pytest.raises(Refusal, match=listed) as refusal:
        find_targets(build(kind, auto, options), method)

    assert "Give target_modules" in str(refusal.value)


IA3 = constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
IA3_FEEDFORWARD = constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
LORA = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
NOT_IN_TRANSFORMERS = {"RefinedWeb", "RefinedWebModel", "btlm", "chatglm", "rwkv7"}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {  # of PEFT's, those that CASES lacks
    "llama4": (IMAGE_TEXT, {"text_config": LAYERS | {"num_experts": 2}, "vision_config": LAYERS}),
    "gemma4": (IMAGE_TEXT, {"text_config": LAYERS, "vision_config": LAYERS}),
    "nemotron_h": (CAUSAL, {}),
    "blip-2": (IMAGE_TEXT, {"text_config": {"model_type": "opt"} | LAYERS}),
}


def test_all_of_peft_s_model_types_are_compared() -> None:
    assert set(IA3) | set(LORA) == {*CASES, *OTHERS, *NOT_IN_TRANSFORMERS} & (set(IA3) | set(LORA))
    assert not NOT_IN_TRANSFORMERS & set(CONFIG_MAPPING)


def peft_model(kind: str) -> nn.Module:
    auto, options = CASES[kind][:2] if kind in CASES else OTHERS[kind]
    return build(kind, auto, options)


@pytest.mark.parametrize("kind", sorted(set(IA3) - NOT_IN_TRANSFORMERS))
def test_ia3_modules_are_those_of_peft(kind: str) -> None:
    model = peft_model(kind)
    theirs = hits(model, IA3[kind])

    ours, _ = found(model, "ia3")

    assert theirs
    assert hits(model, ours.modules) == theirs
    # PEFT's own rule: no component boundary
    assert hits(model, ours.feedforward) == {
        path for path in theirs if path.endswith(tuple(IA3_FEEDFORWARD[kind]))
    }


@pytest.mark.parametrize("kind", sorted(set(LORA) - NOT_IN_TRANSFORMERS))
def test_lora_modules_are_those_of_peft(kind: str) -> None:
    model = peft_model(kind)
    theirs = hits(model, LORA[kind])

    ours, _ = found(model, "lora")

    assert theirs
    assert hits(model, ours.modules) == theirs


RELATIVE = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
VARIANTS: list[tuple[str, str, dict[str, Any]]] = [
    ("gpt2", CAUSAL, N_LAYERS | {"add_cross_attention": True}),
    ("t5", SEQ2SEQ, T5 | {"feed_forward_proj": "gated-gelu"}),
    ("mt5", SEQ2SEQ, T5 | {"feed_forward_proj": "relu"}),
    ("opt", "AutoModelForSequenceClassification", LAYERS),
    ("bert", "AutoModelForTokenClassification", LAYERS),
    ("bert", CAUSAL, LAYERS | {"is_decoder": True, "add_cross_attention": True}),
    ("falcon", CAUSAL, LAYERS | {"multi_query": False, "new_decoder_architecture": True}),
    ("gpt_bigcode", CAUSAL, N_LAYERS | {"multi_query": False}),
    ("llama", CAUSAL, LAYERS | {"intermediate_size": 4096}),  # gate, up and down all square
    ("llama", CAUSAL, LAYERS | {"intermediate_size": 37}),
    ("bart", CAUSAL, BOTH),
    ("deberta", MASKED, LAYERS | RELATIVE),  # pos_q_proj is no query
    ("deberta-v2", MASKED, LAYERS | RELATIVE | {"share_att_key": False}),
    ("phi", CAUSAL, LAYERS | {"qk_layernorm": True}),
]


@pytest.mark.parametrize(("kind", "auto", "options"), VARIANTS)
def test_variants_have_peft_s_modules_too(kind: str, auto: str, options: dict[str, Any]) -> None:
    model = build(kind, auto, options)

    ia3, lora = found(model, "ia3")[0], found(model, "lora")[0]

    assert hits(model, ia3.modules) == hits(model, IA3[kind])
    assert hits(model, lora.modules) == hits(model, LORA[kind])


def test_blip_2_with_t5_has_peft_s_modules() -> None:
    model = build("blip-2", IMAGE_TEXT, {"text_config": {"model_type": "t5"} | T5})

    assert hits(model, found(model, "lora")[0].modules) == hits(model, LORA["blip-2"])


def test_mixtral_says_that_experts_are_out_of_reach_and_lora_does_not_care() -> None:
    model = build("mixtral", CAUSAL, LAYERS)

    with pytest.warns(UserWarning, match=r"model\.layers\.N\.mlp\.experts are 3-D parameters"):
        find_targets(model, "ia3")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        find_targets(model, "lora")


def tiny_mixtral() -> Any:
    return AutoModelForCausalLM.from_config(
        MixtralConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=31, num_local_experts=4, pad_token_id=0,
        )
    )  # fmt: skip


def test_fused_experts_are_never_missed_in_silence() -> None:
    with pytest.warns(UserWarning, match="all-linear: the experts in model.layers.N.mlp.experts"):
        adapted = attach(tiny_mixtral(), LoraConfig(target_modules="all-linear"))
    assert adapted.peft_config["default"].target_modules == ["k_proj", "o_proj", "q_proj", "v_proj"]
    for names, told in (
        (["q_proj", "down_proj"], "'down_proj' is a parameter of model.layers.0.mlp.experts"),
        (["experts.gate_up_proj"], "'experts.gate_up_proj' is a parameter of model.layers.0"),
        (["experts"], "model.layers.0.mlp.experts is a MixtralExperts, which takes no adapter"),
        (["q_proj", "w2"], "the name 'w2' means no module of the model"),
    ):
        with pytest.raises(Refusal, match=told):
            attach(tiny_mixtral(), LoraConfig(target_modules=names))


def test_files_for_what_the_tuners_do_not_have_are_refused_by_name(tmp_path: Path) -> None:
    theirs = peft.LoraConfig(target_modules=["q_proj"], r=2)
    peft.get_peft_model(tiny_mixtral(), theirs).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"alora_invocation_tokens": [3]}))
    model = tiny_mixtral()

    with pytest.raises(Refusal, match=r"alora_\w+ = \[3\] is not supported by infold's tuners"):
        load(model, tmp_path)

    assert type(model).__name__ == "MixtralForCausalLM" and not hasattr(model, "peft_config")


def test_experts_that_were_modules_once_have_no_place_now(tmp_path: Path) -> None:
    """An IA³ adapter that was trained on Mixtral before transformers 5."""
    adapted = attach(tiny_mixtral(), IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    adapted.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    old = "base_model.model.model.layers.0.block_sparse_moe.experts.0.w2.ia3_l"
    save_file({**load_file(file), old: torch.ones(1, 24)}, file)

    with pytest.raises(Refusal, match=r"has no module .*w2; near it: .*experts"):
        load(tiny_mixtral(), tmp_path)


def test_only_fused_parameters_are_a_refusal_that_says_so() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up_proj = nn.Parameter(torch.zeros(2, 8, 4))
            self.down_proj = nn.Parameter(torch.zeros(2, 4, 8))
            self.router = nn.Linear(4, 2)

    with pytest.raises(Refusal, match=r"experts in experts\.N are 3-D.*end in router \(1\)"):
        find_targets(nn.ModuleDict({"experts": nn.ModuleList([Experts()])}), "ia3")


class Quantized(nn.Module):
    """As the linear layers of quantization libraries: packed weights, sizes as attributes."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.register_buffer("qweight", torch.zeros(inputs * outputs // 2, dtype=torch.uint8))


def test_quantized_layers_and_models_without_a_config_are_read_too() -> None:
    attention = nn.ModuleDict({name: Quantized(8, 8) for name in ("wq", "wk", "wv", "wo")})
    # Out of order, and w3 has the shape that would follow w2.
    network = nn.ModuleDict(
        {"w1": Quantized(8, 12), "w2": Quantized(12, 8), "w3": Quantized(8, 12)}
    )
    router = nn.ModuleDict({"down": Quantized(8, 2), "up": Quantized(2, 8)})
    layer = nn.ModuleDict({"attention": attention, "network": network, "router": router})
    model = nn.ModuleDict({"layers": nn.ModuleList([layer]), "head": Quantized(8, 31)})

    assert find_targets(model, "ia3") == Targets(("w2", "wk", "wv"), ("w2",))
    assert find_targets(model, "lora") == Targets(("wq", "wv"), ())


def test_endings_match_whole_components_and_lengthen_only_where_they_must() -> None:
    def layer() -> nn.ModuleDict:
        attention = {name: nn.Linear(8, 8) for name in ("q", "k", "v", "out")}
        return nn.ModuleDict(
            {
                "attn": nn.ModuleDict(attention),
                "ff": nn.ModuleDict({"in": nn.Linear(8, 32), "out": nn.Linear(32, 8)}),
            }
        )

    model = nn.ModuleDict(
        {"layers": nn.ModuleList([layer(), layer()]), "kv": nn.Linear(8, 8), "k": nn.Linear(8, 8)}
    )

    targets = find_targets(model, "ia3")

    assert targets == Targets(("attn.k", "ff.out", "v"), ("ff.out",))
    assert "kv" not in hits(model, targets.modules)


class Attention(nn.Module):
    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(8, 8))


def test_queries_count_in_layers_that_take_keys_and_values_from_another() -> None:
    layers = [Attention("q_proj", "k_proj", "v_proj", "o_proj"), Attention("q_proj", "o_proj")]
    model = nn.ModuleDict({"layers": nn.ModuleList(layers), "pool": nn.Linear(8, 8)})

    targets, _ = found(model, "lora")

    assert targets.modules == ("q_proj", "v_proj")
    assert hits(model, targets.modules) == {
        "layers.0.q_proj", "layers.0.v_proj", "layers.1.q_proj"
    }  # fmt: skip


def test_a_bottleneck_beside_the_feed_forward_network_is_none() -> None:
    layer = {
        "attn": Attention("query", "key", "value"),
        "up": nn.Linear(8, 32),
        "down": nn.Linear(32, 8),
        "squeeze": nn.Linear(8, 2),
        "expand": nn.Linear(2, 8),
    }
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict(layer)])})

    assert find_targets(model, "ia3") == Targets(("down", "key", "value"), ("down",))


def test_an_unknown_method_is_a_refusal() -> None:
    with pytest.raises(Refusal, match="'vera': give target_modules"):
        find_targets(nn.Linear(2, 2), "vera")
