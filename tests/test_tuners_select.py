"""Configs that mean nothing, or layers on which an adapter would do nothing, are refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from infold.errors import Refusal
from infold.tuners import IA3Config, LoraConfig, attach
from tiny_models import bart, new_model
from tuner_cases import Mlp

SIZE = dict(hidden_size=16, num_hidden_layers=2, vocab_size=31)
HEADS = dict(num_attention_heads=4, num_key_value_heads=2, intermediate_size=24)
MAMBA2 = dict(mamba_n_heads=4, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=4)
MIXERS: dict[str, dict[str, Any]] = {
    "mamba": SIZE,
    "mamba2": SIZE | dict(num_heads=4, head_dim=8, n_groups=1, state_size=4),
    "falcon_mamba": SIZE,
    "falcon_h1": SIZE | HEADS | MAMBA2 | dict(mamba_d_ssm=32),
    "bamba": SIZE | HEADS | MAMBA2,
    "granitemoehybrid": SIZE | HEADS | MAMBA2 | dict(layer_types=["mamba", "attention"]),
    "nemotron_h": {},
    "zamba2": {},
}


def on_meta(kind: str, fields: dict[str, Any]) -> Any:
    with torch.device("meta"):
        return hf.AutoModelForCausalLM.from_config(hf.CONFIG_MAPPING[kind](**fields))


@pytest.mark.parametrize("kind", MIXERS)
def test_what_kernels_read_without_calling_it_is_no_target(calm: None, kind: str) -> None:
    model = on_meta(kind, MIXERS[kind])
    with pytest.raises(Refusal, match=r"out_proj: \w+ reads this weight without calling"):
        attach(model, LoraConfig(r=2, target_modules=["out_proj"]))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of experts that are parameters
        attach(model, LoraConfig(r=2, target_modules="all-linear"))

    found = {path.rpartition(".")[2] for path in model._attached.layers}
    assert "in_proj" in found and not found & {"conv1d", "dt_proj", "out_proj"}


def test_all_linear_layers_of_zamba2_take_adapters(tmp_path: Path, calm: None) -> None:
    """Layers in lists have numbers for names, as blocks do. Its blocks share weights, but each has
    an adapter of its own, which is told; merged in memory they are apart, and load so."""
    kinds = ["mamba", "hybrid", "mamba", "hybrid"]
    fields = SIZE | dict(num_hidden_layers=4, layers_block_type=kinds, num_mem_blocks=1)
    fields |= dict(num_attention_heads=4, intermediate_size=24, mamba_d_state=4, chunk_size=8)
    fields |= dict(n_mamba_heads=4, mamba_ngroups=1, adapter_rank=2, pad_token_id=0)
    config = hf.Zamba2Config(**fields, use_shared_attention_adapter=True)
    torch.manual_seed(0)
    model = hf.Zamba2ForCausalLM(config).eval()
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)

    with pytest.warns(UserWarning, match=r"q_proj and \S+\.q_proj share a weight, and \d+ more"):
        attach(model, lora)

    found = {path.rpartition("transformer.")[2] for path in model._attached.layers}
    assert {"self_attn.linear_q_adapter_list.0.1", "feed_forward.gate_up_proj"} <= found
    ids = torch.randint(3, 31, (2, 7))
    with torch.no_grad():
        adapted = model(ids).logits
        with pytest.warns(UserWarning, match="untied"):
            model.merge_and_unload().save_pretrained(tmp_path)
        loaded = hf.Zamba2ForCausalLM.from_pretrained(tmp_path).eval()
        error = (loaded(ids).logits - adapted).abs().max()
    assert error < 1e-4 * adapted.abs().max()


def test_all_linear_leaves_out_what_attention_reads(calm: None) -> None:
    fields = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    model = hf.SiglipVisionModel(hf.SiglipVisionConfig(**fields, image_size=32, patch_size=16))
    attach(model, LoraConfig(r=2, target_modules="all-linear"))
    found = set(model._attached.layers)
    assert any(path.endswith("self_attn.out_proj") for path in found)
    assert any(path.endswith("head.mlp.fc1") for path in found)
    assert not any("head.attention" in path for path in found)


def test_mixers_that_call_their_projections_take_adapters(calm: None) -> None:
    jamba = SIZE | HEADS | dict(num_experts=1, attn_layer_period=2, attn_layer_offset=1)
    jamba |= dict(use_mamba_kernels=False, mamba_dt_rank=4, mamba_d_state=4)
    model = hf.AutoModelForCausalLM.from_config(hf.CONFIG_MAPPING["jamba"](**jamba)).eval()
    attach(model, LoraConfig(r=2, target_modules=["x_proj", "mamba.out_proj"]))
    ids = torch.randint(3, 31, (2, 5))

    model(ids, labels=ids).loss.backward()

    own = {n: p.grad for n, p in model.named_parameters() if "lora_B" in n}
    assert own and all(grad is not None and grad.any() for grad in own.values())
    with pytest.raises(Refusal, match="dt_proj: JambaMambaMixer reads this weight"):
        attach(model.unload(), LoraConfig(r=2, target_modules=["dt_proj"]))


def test_projections_of_linear_attention_take_adapters(calm: None) -> None:
    fields = SIZE | HEADS | dict(head_dim=4, layer_types=["linear_attention", "full_attention"])
    model = on_meta("qwen3_next", fields)
    attach(model, LoraConfig(r=2, target_modules=["linear_attn.out_proj"]))
    inputs = dict(target_modules=["conv1d"], feedforward_modules=[])
    with pytest.raises(Refusal, match=r"conv1d: Qwen3NextGatedDeltaNet reads this weight"):
        attach(on_meta("qwen3_next", fields), IA3Config(**inputs))


def test_attention_that_reads_weights_is_no_target(calm: None) -> None:
    fields = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    fields |= dict(conv_dim=[8, 8], conv_stride=[2, 2], conv_kernel=[3, 3])
    fields |= dict(num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2)
    model = hf.WavLMModel(hf.WavLMConfig(**fields))
    with pytest.raises(Refusal, match=r"q_proj: WavLMAttention reads this weight"):
        attach(model, LoraConfig(r=2, target_modules=["q_proj"]))


@pytest.mark.parametrize("given", [True, False])
def test_a_second_adapter_is_told_how_its_layers_store_weights(calm: None, given: bool) -> None:
    model = attach(new_model("gpt2"), LoraConfig(r=2, fan_in_fan_out=True), "a")

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        attach(model, LoraConfig(r=2, fan_in_fan_out=given), "b")

    assert model.peft_config["b"].fan_in_fan_out is True
    assert [str(warning.message) for warning in told] == (
        [] if given else ["fan_in_fan_out is set to True, since the targets are Conv1D"]
    )


@pytest.mark.parametrize(
    ("fields", "messages"),
    [
        (
            dict(rank_pattern={"q_prj": 7, "v_proj": 3}, alpha_pattern={"nope": 3}),
            [
                "rank_pattern: 'q_prj' means no target of the adapter; near it: q_proj",
                "alpha_pattern: 'nope' means no target of the adapter; there are: q_proj, v_proj",
            ],
        ),
        (
            dict(rank_pattern={"up_proj": 7}),  # which is there, but is no target
            ["rank_pattern: 'up_proj' means no target of the adapter"],
        ),
        (
            dict(layers_to_transform=[0, 99, 7]),
            ["layers_to_transform: no target is in layer 7, 99; they are in 0, 1"],
        ),
        (
            dict(layers_to_transform=2, layers_pattern="layers"),
            ["layers_to_transform: no target is in layer 2; they are in 0, 1"],
        ),
    ],
)
def test_patterns_that_mean_no_target_are_refused(
    calm: None, fields: dict[str, Any], messages: list[str]
) -> None:
    model = new_model("llama")
    with pytest.raises(Refusal) as refused:
        attach(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **fields))

    assert len(refused.value.reasons) >= len(messages)
    for told, message in zip(refused.value.reasons, messages, strict=False):
        assert told.startswith(f"LoraConfig: {message}")
    assert type(model) is type(new_model("llama"))


def test_patterns_of_parameters_and_layers_are_taken(calm: None) -> None:
    model = new_model("llama")
    fields = dict(layers_to_transform=[1, 0], rank_pattern={r"layers\.1\.self_attn\..*": 3})
    attach(model, LoraConfig(r=2, target_modules=["q_proj"], **fields))
    ranks = [
        layer.self_attn.q_proj.adapters["default"].lora_A.shape[0] for layer in model.model.layers
    ]
    assert ranks == [2, 3]
    rank = dict(rank_pattern={"q_proj.weight": 3})
    attach(new_model("llama"), LoraConfig(r=2, target_parameters=["q_proj.weight"], **rank))


@pytest.mark.parametrize("make", [bart, lambda: new_model("opt")])
@pytest.mark.parametrize("dora", [False, True])
def test_embeddings_that_do_not_look_up_what_they_get_are_refused(
    calm: None, make: Any, dora: bool
) -> None:
    with pytest.raises(Refusal, match=r"embed_positions: the forward of a \w+ is not Embedding's"):
        attach(make(), LoraConfig(r=2, target_modules=["embed_positions"], use_dora=dora))


def test_a_table_that_is_not_dense_is_called_so(calm: None) -> None:
    model = new_model("llama")
    packed = model.model.embed_tokens.weight.to(torch.int8)
    model.model.embed_tokens.weight = torch.nn.Parameter(packed, requires_grad=False)
    told = r"embed_tokens: the weight of this Embedding is not dense \(int8\)"
    with pytest.raises(Refusal, match=told):
        attach(model, LoraConfig(r=2, target_modules=["embed_tokens"]))


def test_what_is_missing_is_asked_for(calm: None) -> None:
    with pytest.raises(Refusal, match=r"a Mlp does not tell .* give feedforward_modules \(\[\]"):
        attach(Mlp(), IA3Config(target_modules=["lin0"]))
    attach(Mlp(), IA3Config(target_modules=["lin0"], feedforward_modules=[]))


@pytest.mark.parametrize("trained", [True, False])
def test_a_combined_adapter_is_trained_if_one_of_its_parents_is(calm: None, trained: bool) -> None:
    model = attach(new_model("llama"), LoraConfig(r=2, inference_mode=not trained), "a")
    attach(model, LoraConfig(r=2, inference_mode=True), "b")
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "c", "cat")
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".c." in n)

    model.set_adapter("c")

    own = [p.requires_grad for n, p in model.named_parameters() if ".adapters.c." in n]
    assert own == [trained] * len(own) and own
    if trained:
        ids = torch.randint(3, 31, (2, 7))
        model(ids, labels=ids).loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
