"""Input embedding and output head that share one tensor: merged as PEFT trains them.

The oracle is PEFT's unmerged forward pass. Its merge_and_unload adds an update of either end to the
shared tensor, which changes both.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftConfig, TrainableTokensConfig
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

import handmade
import infold
from infold import Refusal
from peft_oracle import Bench, Merged, read_tensors
from tiny_models import model_inputs, new_model, token_ids

INDEX = "model.safetensors.index.json"


def lora(*targets: str, **options: Any) -> Callable[[], PeftConfig]:
    return lambda: LoraConfig(r=3, lora_alpha=5, target_modules=list(targets), **options)


class Case(NamedTuple):
    config: Callable[[], PeftConfig]
    stays_tied: bool


HEAD, EMBEDDING = "lm_head", "embed_tokens"
CASES = {
    "head": Case(lora(HEAD), False),
    "embedding": Case(lora(EMBEDDING), False),
    "both, each its own": Case(lora(HEAD, EMBEDDING), False),
    "neither": Case(lora("q_proj"), True),
    "embedding, tied by PEFT": Case(lora(EMBEDDING, ensure_weight_tying=True), True),
    "head, tied by PEFT": Case(lora(HEAD, ensure_weight_tying=True), True),
    "both, tied by PEFT": Case(lora(HEAD, EMBEDDING, ensure_weight_tying=True), True),
    "embedding saved": Case(lora("q_proj", modules_to_save=[EMBEDDING]), False),
    "head saved": Case(lora("q_proj", modules_to_save=[HEAD]), False),
    "both saved": Case(lora("q_proj", modules_to_save=[HEAD, EMBEDDING]), False),
    "embedding saved, tied by PEFT": Case(
        lora("q_proj", modules_to_save=[EMBEDDING], ensure_weight_tying=True), True
    ),
    "head saved, tied by PEFT": Case(
        lora("q_proj", modules_to_save=[HEAD], ensure_weight_tying=True), True
    ),
    "head, embedding saved": Case(lora(HEAD, modules_to_save=[EMBEDDING]), False),
    "embedding, head saved": Case(lora(EMBEDDING, modules_to_save=[HEAD]), False),
    "dora on the head": Case(lora(HEAD, use_dora=True), False),
    "dora on the embedding": Case(lora(EMBEDDING, use_dora=True), False),
    "ia3 on the head": Case(
        lambda: IA3Config(target_modules=[HEAD], feedforward_modules=[]), False
    ),
    "ia3 on the head's inputs": Case(
        lambda: IA3Config(target_modules=[HEAD], feedforward_modules=[HEAD]), False
    ),
    # PEFT ties trained tokens by itself, if it is not told of other ones for the head
    "tokens": Case(lora("q_proj", trainable_token_indices=[9, 4, 5]), True),
    "tokens by name": Case(lora("q_proj", trainable_token_indices={EMBEDDING: [9, 4]}), True),
    "tokens of both": Case(
        lora("q_proj", trainable_token_indices={EMBEDDING: [9, 4], HEAD: [9, 4]}), True
    ),
    "tokens of both, not the same": Case(
        lora("q_proj", trainable_token_indices={EMBEDDING: [9, 4], HEAD: [9, 8]}), False
    ),
    "tokens of the head": Case(lora("q_proj", trainable_token_indices={HEAD: [9, 4]}), False),
    "tokens, and the head": Case(lora(HEAD, trainable_token_indices=[9, 4, 5]), False),
    "tokens alone": Case(lambda: TrainableTokensConfig(token_indices=[9, 4, 5]), True),
}


@pytest.mark.parametrize("name", CASES)
def test_a_tied_model_is_untied_where_its_ends_become_different(bench: Bench, name: str) -> None:
    base = bench.base(new_model("llama", tie_word_embeddings=True))

    merged = bench.prove(AutoModelForCausalLM, base, CASES[name].config(), {"input_ids": IDS})

    assert "lm_head.weight" not in read_tensors(base)
    assert_tie(merged, CASES[name].stays_tied)


@pytest.mark.parametrize("name", [name for name in CASES if "tied by PEFT" not in name])
def test_ends_that_are_not_tied_are_merged_each_by_itself(bench: Bench, name: str) -> None:
    base = bench.base(new_model("llama", tie_word_embeddings=False))

    merged = bench.prove(AutoModelForCausalLM, base, CASES[name].config(), {"input_ids": IDS})

    assert merged.config["tie_word_embeddings"] is False
    assert not merged.receipt.notes
    assert (merged.path / INDEX).read_bytes() == (base / INDEX).read_bytes()


IDS = torch.tensor([[9, 4, 5, 8, 3, 9, 20], [1, 2, 9, 5, 5, 30, 7]])
OTHERS = {
    "gpt2": ("wte", "lm_head"),
    "opt": ("embed_tokens", "lm_head"),
    "gemma2": ("embed_tokens", "lm_head"),
    "gemma3": ("embed_tokens", "lm_head"),  # its embedding is scaled in the forward pass
    "qwen2": ("embed_tokens", "lm_head"),
    "falcon": ("word_embeddings", "lm_head"),
    "bloom": ("word_embeddings", "lm_head"),
}


@pytest.mark.parametrize("end", [0, 1], ids=["embedding", "head"])
@pytest.mark.parametrize("model", OTHERS)
def test_one_end_of_other_architectures(bench: Bench, model: str, end: int) -> None:
    base = bench.base(new_model(model, tie_word_embeddings=True))
    merged = bench.prove(
        AutoModelForCausalLM, base, lora(OTHERS[model][end])(), model_inputs(model)
    )
    assert_tie(merged, stays=False)


@pytest.mark.parametrize("model", OTHERS)
def test_trained_tokens_of_other_architectures(bench: Bench, model: str) -> None:
    base = bench.base(new_model(model, tie_word_embeddings=True))
    inputs = model_inputs(model)
    config = TrainableTokensConfig(
        token_indices=sorted(set(inputs["input_ids"].flatten().tolist()))
    )
    assert_tie(bench.prove(AutoModelForCausalLM, base, config, inputs), stays=True)


def assert_tie(merged: Merged, stays: bool) -> None:
    """The config tells it, the head is on disk only when untied, the index tells where."""
    assert merged.config["tie_word_embeddings"] is stays
    assert ("lm_head.weight" in merged.tensors) is (not stays)
    assert any("untied" in note for note in merged.receipt.notes) is (not stays)
    index = json.loads((merged.path / INDEX).read_text())
    assert index["weight_map"].keys() == merged.tensors.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in merged.tensors.values())
    assert index["metadata"]["total_parameters"] == sum(t.numel() for t in merged.tensors.values())
    for name, file in index["weight_map"].items():
        assert name in read_file(merged, file)


def read_file(merged: Merged, file: str) -> set[str]:
    header = (merged.path / file).read_bytes()
    return set(json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")]))


# --- both ends on disk -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["head", "embedding", "neither", "embedding, tied by PEFT"])
def test_a_tied_head_that_is_on_disk_too_is_kept_in_step(bench: Bench, name: str) -> None:
    """As in checkpoints that were converted from PyTorch's pickles."""
    model = bench.base(new_model("llama", tie_word_embeddings=True))
    tensors = read_tensors(model)
    base = bench.write(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    (base / "config.json").write_bytes((model / "config.json").read_bytes())

    merged = bench.prove(AutoModelForCausalLM, base, CASES[name].config(), {"input_ids": IDS})

    ends = merged.tensors["lm_head.weight"], merged.tensors["model.embed_tokens.weight"]
    assert torch.equal(*ends) is CASES[name].stays_tied
    assert merged.config["tie_word_embeddings"] is CASES[name].stays_tied


@pytest.mark.parametrize("name", ["head", "embedding", "tokens of the head", "head saved"])
def test_a_head_with_values_of_its_own_is_not_tied_whatever_the_config_tells(
    bench: Bench, name: str
) -> None:
    base = bench.base(new_model("llama", tie_word_embeddings=False))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))

    merged = bench.prove(AutoModelForCausalLM, base, CASES[name].config(), {"input_ids": IDS})

    assert not merged.receipt.notes
    edited = {edit["tensor"] for edit in merged.receipt.edits}
    other = "lm_head.weight" if name == "embedding" else "model.embed_tokens.weight"
    assert other not in edited or torch.equal(merged.tensors[other], read_tensors(base)[other])


# --- another number of tokens ------------------------------------------------------------------

MORE = torch.tensor([[9, 31, 32, 33, 3], [33, 4, 31, 30, 5]])
RESIZED = {
    "neither": lora("q_proj"),
    "both": lora(HEAD, EMBEDDING),
    "embedding saved": lora("q_proj", modules_to_save=[EMBEDDING]),
    "head saved": lora("q_proj", modules_to_save=[HEAD]),
    "both saved": lora("q_proj", modules_to_save=[HEAD, EMBEDDING]),
    "new tokens": lora("q_proj", trainable_token_indices=[31, 32, 33]),
    "new tokens by name": lora("q_proj", trainable_token_indices={EMBEDDING: [33, 31]}),
}
# PEFT saves only the targeted end: the other one is lost where it is not tied
RESIZED_TIED = {
    "head": lora(HEAD),
    "embedding": lora(EMBEDDING),
    "embedding, tied by PEFT": lora(EMBEDDING, ensure_weight_tying=True),
}


@pytest.mark.parametrize(
    "name, tie", [(n, True) for n in RESIZED | RESIZED_TIED] + [(n, False) for n in RESIZED]
)
def test_a_resized_vocabulary_comes_along(bench: Bench, name: str, tie: bool) -> None:
    base = bench.base(new_model("llama", tie_word_embeddings=tie))

    merged = bench.prove(
        AutoModelForCausalLM,
        base,
        (RESIZED | RESIZED_TIED)[name](),
        {"input_ids": MORE},
        prepare=lambda model: model.resize_token_embeddings(34, mean_resizing=False),
    )

    assert merged.config["vocab_size"] == 34
    assert merged.tensors["model.embed_tokens.weight"].shape == (34, 16)
    if tie:
        stays = name in ("neither", "new tokens", "new tokens by name", "embedding, tied by PEFT")
        assert_tie(merged, stays)


@pytest.mark.parametrize("target", [HEAD, EMBEDDING])
def test_half_a_resized_vocabulary_is_refused(bench: Bench, target: str) -> None:
    base = bench.base(new_model("llama", tie_word_embeddings=False))
    model = bench.load(AutoModelForCausalLM, base)
    model.resize_token_embeddings(34, mean_resizing=False)
    adapter = bench.save(bench.attach(model, lora(target)()))

    with pytest.raises(Refusal, match="has 31 tokens, but the adapter brings 34"):
        infold.merge(base, adapter, bench.place("merged"))


def test_a_smaller_vocabulary_comes_along(bench: Bench) -> None:
    base = bench.base(new_model("gpt2"))
    merged = bench.prove(
        AutoModelForCausalLM,
        base,
        lora("c_attn")(),
        {"input_ids": token_ids(top=20)},
        prepare=lambda model: model.resize_token_embeddings(20),
    )
    assert merged.config["vocab_size"] == 20


# --- ties that cannot be undone ----------------------------------------------------------------


@pytest.mark.parametrize(
    "model, kind, target, tensor",
    [
        ("t5", AutoModelForSeq2SeqLM, "shared", "shared.weight"),
        ("t5", AutoModelForSeq2SeqLM, "lm_head", "lm_head"),
        ("bert", AutoModelForMaskedLM, "word_embeddings", "word_embeddings.weight"),
        ("roberta", AutoModelForMaskedLM, "word_embeddings", "word_embeddings.weight"),
    ],
)
def test_a_tie_of_more_than_two_ends_is_refused(
    bench: Bench, model: str, kind: Any, target: str, tensor: str
) -> None:
    base = bench.base(new_model(model))
    adapter = bench.save(bench.attach(bench.load(kind, base), lora(target)()))
    with pytest.raises(Refusal) as refusal:
        infold.merge(base, adapter, bench.place("merged"))
    assert tensor in str(refusal.value)


def test_a_head_of_its_own_is_merged_in_an_encoder_decoder_too(bench: Bench) -> None:
    """As in T5 1.1. transformers 5 saves no such model any more, but loads it."""
    model = bench.base(new_model("t5"))
    config = json.loads((model / "config.json").read_text()) | {"tie_word_embeddings": False}
    head = 0.2 * torch.randn(31, 16, generator=torch.Generator().manual_seed(7))
    base = bench.write(read_tensors(model) | {"lm_head.weight": head}, config)
    bench.prove(AutoModelForSeq2SeqLM, base, lora("lm_head", "q")(), model_inputs("t5"))


def test_a_lone_file_cannot_be_untied(bench: Bench) -> None:
    base = bench.base(new_model("llama", tie_word_embeddings=True))
    adapter = bench.save(bench.attach(bench.load(AutoModelForCausalLM, base), lora(HEAD)()))
    lone = bench.write(read_tensors(base)) / "model.safetensors"
    with pytest.raises(Refusal, match=r"config\.json"):
        infold.merge(lone, adapter, bench.place("merged"))


@pytest.mark.parametrize(
    ("names", "kept"), [(["bad", "good"], True), (["a", "b", "c"], False), (None, False)]
)
def test_a_new_head_keeps_the_bases_labels_if_their_number_fits(
    names: list[str] | None, kept: bool, tmp_path: Path
) -> None:
    config: dict[str, Any] = {"tie_word_embeddings": False, "model_type": "llama"}
    if names:
        config |= {"id2label": {str(n): name for n, name in enumerate(names)}}
        config |= {"label2id": {name: n for n, name in enumerate(names)}}
    weights = {"model.layers.0.q_proj.weight": torch.ones(4, 4)}
    base = handmade.base_folder(tmp_path / "base", weights, config)
    adapter = handmade.adapter_folder(
        tmp_path / "adapter",
        {"score.weight": torch.ones(2, 4)},
        {"peft_type": "LORA", "task_type": "SEQ_CLS", "modules_to_save": ["score"]},
    )

    infold.merge(base, adapter, tmp_path / "out")

    found = json.loads((tmp_path / "out" / "config.json").read_text())
    usual = {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}}
    assert found == (config if kept else config | usual)
