"""A table that encoder and decoder share: T5's and BART's `shared`, which no forward calls. They
look up by modules of their own, which have its weight, so an adapter on it must be theirs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import Tensor

import infold
from infold.errors import Refusal
from infold.tuners import LoraConfig, attach, load
from peft_oracle import Bench, assert_close, assert_differs, logits, read_tensors, shuffle
from tiny_models import bart, new_model, token_ids

pytestmark = pytest.mark.usefixtures("calm")

IDS = token_ids()
INPUTS = {"input_ids": IDS, "decoder_input_ids": IDS.flip(1)}
STACKS = ("encoder.embed_tokens", "decoder.embed_tokens")
ON_SHARED = LoraConfig(r=2, target_modules=["shared"], init_lora_weights=False)


def scaled(**fields: Any) -> Any:
    return shaken(bart(**fields))


def t5() -> Any:
    return shaken(new_model("t5"))


def shaken(model: Any) -> Any:
    shuffle(model.named_parameters(), 3)
    return model.eval()


def fed(model: Any, **changed: Tensor) -> Tensor:
    return logits(model, INPUTS | changed)


MODELS = {"t5": t5, "bart": scaled}  # BART scales what it looks up


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:untied")
def test_both_stacks_look_up_what_the_merged_model_has(
    tmp_path: Path, name: str, dora: bool
) -> None:
    model = MODELS[name]()
    before = fed(model)
    attach(model, LoraConfig(**vars(ON_SHARED) | {"use_dora": dora}))
    attach(model, ON_SHARED, "second")
    model.set_adapter(["default", "second"])
    adapted = fed(model)
    assert_differs(before, adapted)
    with model.disable_adapter():
        assert torch.equal(fed(model), before)
    model.merge_adapter()
    assert_close(fed(model), adapted)
    model.unmerge_adapter()
    assert_close(fed(model), adapted)

    merged = model.merge_and_unload()

    assert_close(fed(merged), adapted)
    tables = [m.weight for n, m in merged.named_modules() if n.endswith(("shared", *STACKS))]
    assert len(tables) == 3 and len(set(map(id, tables))) == 1
    merged.save_pretrained(tmp_path)
    loaded = type(merged).from_pretrained(tmp_path).eval()
    assert_close(fed(loaded), adapted)


@pytest.mark.parametrize("name", MODELS)
def test_both_stacks_train_the_one_adapter(name: str) -> None:
    model = attach(MODELS[name](), LoraConfig(r=2, target_modules=["shared"]))
    assert model.get_nb_trainable_parameters()[0] == 2 * (31 + 16)
    given = {"input_ids": torch.tensor([[5, 6]]), "decoder_input_ids": torch.tensor([[7, 8, 9]])}

    model(**given).logits.square().sum().backward()

    (rows,) = (p.grad for n, p in model.named_parameters() if n.endswith("lora_A"))
    assert rows.any(0).nonzero().flatten().tolist() == [5, 6, 7, 8, 9]


@pytest.mark.parametrize("copies", [False, True])
def test_in_memory_it_is_what_the_merge_writes(bench: Bench, copies: bool) -> None:
    """As in T5 1.1, with a head of its own. Files of older versions have a copy of the table for
    each stack, which must change with it: transformers unties those that differ."""
    saved = bench.base(new_model("t5"))
    config = json.loads((saved / "config.json").read_text()) | {"tie_word_embeddings": False}
    tensors = read_tensors(saved)
    tensors |= {"lm_head.weight": 0.2 * torch.randn(31, 16, generator=torch.manual_seed(7))}
    if copies:
        tensors |= {f"{path}.weight": tensors["shared.weight"].clone() for path in STACKS}
    base = bench.write(tensors, config)
    model = bench.load(hf.AutoModelForSeq2SeqLM, base)
    before = fed(model)
    attach(model, ON_SHARED)
    adapted = fed(model)
    assert_differs(before, adapted)
    adapter = bench.place("adapter")
    model.save_pretrained(adapter)
    held = load_file(adapter / "adapter_model.safetensors")
    assert held.keys() == {f"base_model.model.shared.lora_embedding_{part}" for part in "AB"}
    assert_close(fed(load(bench.load(hf.AutoModelForSeq2SeqLM, base), adapter)), adapted)

    merged = bench.merge(base, adapter)

    assert_close(fed(bench.load(hf.AutoModelForSeq2SeqLM, merged.path)), adapted)
    changed = {n for n, value in merged.tensors.items() if not torch.equal(value, tensors[n])}
    assert changed == {"shared.weight", *(f"{path}.weight" for path in STACKS if copies)}
    assert infold.verify(base, adapter, merged.path).ok
    # PEFT wraps a module that is not called
    wrapped = peft.PeftModel.from_pretrained(bench.load(hf.AutoModelForSeq2SeqLM, base), adapter)
    assert torch.equal(fed(wrapped), before)


def test_a_copy_that_has_an_update_of_its_own_is_refused(bench: Bench) -> None:
    table = torch.randn(31, 16)
    tensors = {"shared.weight": table, "encoder.embed_tokens.weight": table.clone()}
    base = bench.write(tensors, {"tie_word_embeddings": False})
    parts = {"lora_embedding_A": torch.ones(2, 31), "lora_embedding_B": torch.ones(16, 2)}
    both = {
        f"base_model.model.{path}.{part}": value.clone()
        for path in ("shared", STACKS[0])
        for part, value in parts.items()
    }
    adapter = bench.write_adapter(both, peft_type="LORA", r=2)

    with pytest.raises(Refusal, match=r"means encoder\.embed_tokens\.weight, and so does"):
        infold.merge(base, adapter, bench.place("merged"))


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        (
            dict(target_modules=["shared", "embed_tokens"]),
            "encoder.embed_tokens looks up in the table of shared, whose adapter it gets; leave",
        ),
        (
            dict(target_modules=["shared"], modules_to_save=["decoder"]),
            "decoder.embed_tokens looks up in the table of shared",
        ),
        (
            dict(target_modules=["q"], modules_to_save=["shared"]),
            "modules_to_save: shared is not called: encoder.embed_tokens and decoder.embed_tokens",
        ),
    ],
)
def test_what_would_do_nothing_is_refused(fields: dict[str, Any], told: str) -> None:
    model = t5()
    with pytest.raises(Refusal, match=told):
        attach(model, LoraConfig(r=2, **fields))
    assert type(model) is hf.T5ForConditionalGeneration


def test_a_saved_copy_of_it_is_not_loaded(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q"], modules_to_save=["shared"])
    peft.get_peft_model(t5(), config).save_pretrained(tmp_path)
    with pytest.raises(Refusal, match="modules_to_save: shared is not called"):
        load(t5(), tmp_path)


def test_a_table_that_nobody_looks_up_in_is_refused() -> None:
    model = scaled(tie_word_embeddings=False)
    told = r"model\.shared is not called, and model\.encoder\.embed_tokens and model\.decoder\."
    with pytest.raises(Refusal, match=told):
        attach(model, ON_SHARED)
    attach(model, LoraConfig(r=2, target_modules=["embed_tokens"]))


@pytest.mark.filterwarnings("ignore:untied")
def test_one_stack_alone_is_still_a_target() -> None:
    model = t5()
    attach(model, LoraConfig(r=2, target_modules=[STACKS[0]], init_lora_weights=False))
    assert list(model._attached.layers) == [STACKS[0]]
    adapted = fed(model)
    assert_close(fed(model.merge_and_unload()), adapted)
