"""Input embedding and output head that share one tensor: merged as PEFT trains them.

The oracle is PEFT's unmerged forward pass. Its merge_and_unload adds an update of either end to the
shared tensor, which changes both.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from peft import IA3Config, LoraConfig, PeftConfig, TrainableTokensConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BioGptConfig,
    CTRLConfig,
    FalconMambaConfig,
    FlaubertConfig,
    FlaubertWithLMHeadModel,
    GitConfig,
    GPTNeoXJapaneseConfig,
    Mamba2Config,
    MambaConfig,
    ModernBertDecoderConfig,
    TrOCRConfig,
    XLMConfig,
    XLMWithLMHeadModel,
    XLNetConfig,
    XLNetLMHeadModel,
)

import handmade
import infold
from infold import Refusal
from infold.checkpoint.adapter import open_adapter
from infold.checkpoint.shards import open_checkpoint
from infold.plan.build import plan_merge
from infold.plan.layouts import vocabularies
from peft_oracle import Bench, Merged, read_tensors
from tiny_models import SIZE, TOKENS, model_inputs, new_model, token_ids

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


# --- ends whose names say little ---------------------------------------------------------------

MAMBA = dict(vocab_size=31, hidden_size=16, state_size=4, num_hidden_layers=1, **TOKENS)
XLM = dict(vocab_size=31, emb_dim=16, n_layers=1, n_heads=2, max_position_embeddings=16)


class Ends(NamedTuple):
    config: Any
    embedding: str
    head: str
    kind: Any = AutoModelForCausalLM


NAMED_OTHERWISE = {
    "mamba": Ends(MambaConfig(**MAMBA, time_step_rank=4), "backbone.embeddings", "lm_head"),
    "falcon_mamba": Ends(
        FalconMambaConfig(**MAMBA, time_step_rank=4), "backbone.embeddings", "lm_head"
    ),
    "mamba2": Ends(
        Mamba2Config(**MAMBA, num_heads=4, head_dim=8, n_groups=1, tie_word_embeddings=True),
        "backbone.embeddings", "lm_head",
    ),
    "xlnet": Ends(
        XLNetConfig(vocab_size=31, d_model=16, n_layer=1, n_head=2, d_inner=24),
        "transformer.word_embedding", "lm_loss", XLNetLMHeadModel,
    ),
    "ctrl": Ends(
        CTRLConfig(vocab_size=31, n_positions=16, n_embd=16, dff=24, n_layer=1, n_head=2),
        "transformer.w", "lm_head",
    ),
    "xlm": Ends(XLMConfig(**XLM), "transformer.embeddings", "pred_layer.proj", XLMWithLMHeadModel),
    "flaubert": Ends(
        FlaubertConfig(**XLM), "transformer.embeddings", "pred_layer.proj", FlaubertWithLMHeadModel
    ),
    "biogpt": Ends(
        BioGptConfig(**SIZE, max_position_embeddings=16, **TOKENS),
        "biogpt.embed_tokens", "output_projection",
    ),
    "git": Ends(
        GitConfig(
            **SIZE, max_position_embeddings=16, **TOKENS, tie_word_embeddings=True,
            vision_config=dict(
                hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
                image_size=8, patch_size=4,
            ),
        ),
        "git.embeddings.word_embeddings", "output",
    ),
    "gpt_neox_japanese": Ends(
        GPTNeoXJapaneseConfig(**SIZE, **TOKENS), "gpt_neox_japanese.embed_in", "embed_out"
    ),
    "modernbert-decoder": Ends(
        ModernBertDecoderConfig(**SIZE, max_position_embeddings=16, **TOKENS),
        "model.embeddings.tok_embeddings", "decoder",
    ),
    "trocr": Ends(
        TrOCRConfig(
            vocab_size=31, d_model=16, decoder_layers=1, decoder_attention_heads=2,
            decoder_ffn_dim=24, max_position_embeddings=16, **TOKENS,
        ),
        "model.decoder.embed_tokens", "output_projection",
    ),
}  # fmt: skip


def otherwise(bench: Bench, name: str) -> Path:
    torch.manual_seed(0)
    ends = NAMED_OTHERWISE[name]
    direct = ends.kind is not AutoModelForCausalLM
    model = ends.kind(ends.config) if direct else ends.kind.from_config(ends.config)
    base = bench.base(model)
    assert f"{ends.embedding}.weight" in read_tensors(base)
    assert f"{ends.head}.weight" not in read_tensors(base)
    return base


@pytest.mark.parametrize("end", ["embedding", "head"])
@pytest.mark.parametrize("name", NAMED_OTHERWISE)
def test_ends_with_other_names_are_untied(bench: Bench, name: str, end: str) -> None:
    ends, base = NAMED_OTHERWISE[name], otherwise(bench, name)
    target = getattr(ends, end)

    # a string is a whole path: `output` in a list would mean other modules of GIT too
    config = LoraConfig(r=3, lora_alpha=5, target_modules=target)
    merged = bench.prove(ends.kind, base, config, {"input_ids": IDS})

    assert merged.config["tie_word_embeddings"] is False
    assert merged.tensors.keys() - read_tensors(base).keys() == {f"{ends.head}.weight"}
    assert any("untied" in note for note in merged.receipt.notes)


@pytest.mark.parametrize("name", ["mamba", "xlnet", "ctrl", "xlm"])
def test_other_names_in_a_file_without_a_config_are_known_too(bench: Bench, name: str) -> None:
    ends, base = NAMED_OTHERWISE[name], otherwise(bench, name)
    model = bench.load(ends.kind, base)
    adapter = bench.save(bench.attach(model, lora(ends.embedding)()))
    lone = bench.write(read_tensors(base)) / "model.safetensors"
    with pytest.raises(Refusal, match=r"config\.json"):
        infold.merge(lone, adapter, bench.place("merged"))


SEVERAL = r"is_encoder_decoder\b.*=\s*True"


def transformers_ties() -> dict[tuple[str, str], tuple[str, str]]:
    """(folder, class) -> (embedding, head) of all of transformers' classes that tie one head, as
    their source tells it: nothing is imported."""
    found = {}
    for file in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        for block in re.split(r"^class ", file.read_text(), flags=re.MULTILINE)[1:]:
            if told := re.search(r"^    _tied_weights_keys = (\{.*?\})$", block, re.M | re.S):
                ties = ast.literal_eval(told[1])
                ends = [(s, t) for t, s in ties.items() if t.endswith(".weight")]
                if len(ends) == 1 and ends[0][1].endswith(".weight"):
                    name = re.match(r"\w+", block)
                    assert name is not None
                    found[file.parent.name, name[0]] = ends[0]
    return found


def test_each_tie_of_transformers_is_known_or_refused(tmp_path: Path) -> None:
    """A tie that the plan does not see is merged at one end only, and nothing tells so."""
    ties = transformers_ties()
    assert len(ties) > 200
    files = (Path(transformers.__file__).parent / "models").glob("*/configuration_*.py")
    several = {f.parent.name for f in files if re.search(SEVERAL, f.read_text())}
    wrong = []
    for (folder, kind), (embedding, head) in ties.items():
        # CSM has another head on disk always; a lone encoder of T5 uses one of its two names only
        if kind.startswith("Csm") or kind.endswith("EncoderModel"):
            continue
        config = {"architectures": [kind], "vocab_size": 6, "tie_word_embeddings": True}
        config["model_type"] = {"modernbert_decoder": "modernbert-decoder"}.get(folder, folder)
        if kind != "WhisperForCausalLM":
            config["is_encoder_decoder"] = folder in several
        place = tmp_path / kind
        base = handmade.base_folder(place, {embedding.rstrip("$"): torch.ones(6, 4)}, config)
        module = embedding.removesuffix("$").removesuffix(".weight")
        adapter = handmade.adapter_folder(
            tmp_path / f"{kind}-adapter",
            {
                f"{module}.lora_embedding_A": torch.ones(2, 6),
                f"{module}.lora_embedding_B": torch.ones(4, 2),
            },
            {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [module]},
        )
        try:
            plan = plan_merge(open_checkpoint(base), [open_adapter(adapter)])
        except Refusal as refusal:
            if "is tied to other parts" not in str(refusal):
                wrong.append((kind, str(refusal)))
        else:
            if not any(f" and {head} are different now" in note for note in plan.notes):
                wrong.append((kind, head, plan.notes))
    assert not wrong, "\n".join(map(str, wrong))


LAYER = {"model.layers.0.q_proj.weight": torch.ones(6, 6)}


@pytest.mark.parametrize(
    ("kind", "more", "refused"),
    [
        ("NewForCausalLM", {}, True),
        ("NewForCausalLM", {"output_layer.weight": 3 * torch.ones(6, 4)}, False),  # its own head
        ("NewForCausalLM", {"output_layer.weight": torch.ones(6, 4)}, True),  # a copy, so tied
        ("NewForCausalLM", {"model.token_type_embedding.weight": torch.zeros(6, 4)}, True),
        ("NewForSequenceClassification", {"score.weight": torch.zeros(6, 4)}, False),
        ("NewModel", {}, False),
    ],
)
@pytest.mark.parametrize("place", ["top", "text_config"])
def test_an_embedding_of_an_unknown_name_is_refused_where_it_may_be_tied(
    tmp_path: Path, kind: str, more: dict[str, torch.Tensor], refused: bool, place: str
) -> None:
    text: dict[str, Any] = {"vocab_size": 6, "tie_word_embeddings": True}
    config = {"architectures": [kind], "model_type": "new"}
    config |= text if place == "top" else {"text_config": text}
    table = {"model.lookup.embedding.weight": torch.ones(6, 4)}
    base = handmade.base_folder(tmp_path / "base", LAYER | table | more, config)
    parts = {
        "lookup.embedding.lora_embedding_A": (2, 6),
        "lookup.embedding.lora_embedding_B": (4, 2),
    }
    parts |= {"layers.0.q_proj.lora_A.weight": (2, 6), "layers.0.q_proj.lora_B.weight": (6, 2)}
    adapter = handmade.adapter_folder(
        tmp_path / "adapter",
        {f"model.{part}": torch.ones(shape) for part, shape in parts.items()},
        {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["embedding", "q_proj"]},
    )
    if not refused:
        infold.merge(base, adapter, tmp_path / "out")
        return
    with pytest.raises(Refusal, match=r"lookup\.embedding\.weight: is tied") as refusal:
        infold.merge(base, adapter, tmp_path / "out")
    assert "tie_word_embeddings" in str(refusal.value) and len(refusal.value.reasons) == 1


def test_kinds_of_segments_are_no_vocabulary() -> None:
    """BERT has two: every table of two rows, such as a classifier, would be one of tokens."""
    bert = transformers.BertConfig(vocab_size=30).to_dict()

    assert set(vocabularies({"text_config": bert, "n_words": True})) == {30}


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
