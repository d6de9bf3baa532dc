"""Which base tensor an adapter's key means; and that a doubtful key is refused, never guessed."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import infold
from infold import Refusal
from infold.plan.match import Names, group_keys
from peft_oracle import Bench, Merged, read_tensors
from tiny_models import model_inputs, new_model

PREFIX = "base_model.model."


def weights(*names: str, rows: int = 6, columns: int = 4) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(2)
    return {name: torch.randn(rows, columns, generator=random) for name in names}


def adapt(bench: Bench, *modules: str, rows: int = 6, columns: int = 4) -> Path:
    """A LoRA adapter of rank 2 on modules of (rows, columns)."""
    random = torch.Generator().manual_seed(3)
    tensors = {}
    for module in modules:
        tensors[f"{PREFIX}{module}.lora_A.weight"] = torch.randn(2, columns, generator=random)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = torch.randn(rows, 2, generator=random)
    return bench.write_adapter(tensors, peft_type="LORA", r=2, lora_alpha=2)


def reasons(bench: Bench, base: Path, adapter: Path) -> str:
    with pytest.raises(Refusal) as refusal:
        infold.merge(base, adapter, bench.place("merged"))
    return str(refusal.value)


def edited(merged: Merged) -> list[str]:
    return sorted(edit["tensor"] for edit in merged.receipt.edits)


# --- names that are spelled differently on disk ------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules="all-linear"),
        LoraConfig(target_modules=["wte"]),
        LoraConfig(target_modules=["lm_head"]),
        LoraConfig(target_modules=["c_attn"], modules_to_save=["wpe"], bias="all"),
        IA3Config(),
    ],
    ids=["lora", "embedding", "head", "saved", "ia3"],
)
def test_gpt2_as_the_hub_stores_it_lacks_a_component(
    bench: Bench, config: LoraConfig | IA3Config
) -> None:
    base = bench.base(new_model("gpt2"))
    tensors = {name.removeprefix("transformer."): t for name, t in read_tensors(base).items()}
    hub = bench.write(tensors)
    (hub / "config.json").write_bytes((base / "config.json").read_bytes())

    merged = bench.prove(AutoModelForCausalLM, hub, config, model_inputs("gpt2"))

    assert "h.0.attn.c_attn.weight" in merged.tensors


LAYERS = ("layers.0.q.weight", "layers.1.q.weight", "layers.11.q.weight")


@pytest.mark.parametrize(
    "in_memory, on_disk",
    [
        ("model", ""),
        ("", "model"),
        ("model", "language_model.model"),
        ("model.language_model", "language_model.model"),
        ("model.language_model", "model"),
        ("base.model", "model"),
    ],
)
def test_leading_components_may_lack_be_more_or_stand_in_another_order(
    bench: Bench, in_memory: str, on_disk: str
) -> None:
    names = [f"{on_disk}.{layer}".lstrip(".") for layer in LAYERS]
    modules = [f"{in_memory}.{layer}".lstrip(".").removesuffix(".weight") for layer in LAYERS]
    base = bench.write(weights(*names, "norm.weight"))

    merged = bench.merge(base, adapt(bench, *modules))

    plain = bench.merge(
        bench.write(weights(*LAYERS)), adapt(bench, *(name[:-7] for name in LAYERS))
    )
    assert edited(merged) == sorted(names)
    for name, layer in zip(names, LAYERS, strict=True):
        assert torch.equal(merged.tensors[name], plain.tensors[layer])


# --- names that are not the same ---------------------------------------------------------------


def test_components_count_as_a_whole(bench: Bench) -> None:
    base = bench.write(weights("model.layers.1.q.weight", "model.layers.11.q.weight"))
    merged = bench.merge(base, adapt(bench, "model.layers.1.q"))
    assert edited(merged) == ["model.layers.1.q.weight"]


@pytest.mark.parametrize(
    "wanted, there",
    [
        ("model.layers.1.q", "model.layers.11.q"),
        ("model.layers.11.q", "model.layers.1.q"),
        ("model.layers.2.q", "model.layers.1.q"),
        ("q_proj", "model.my_q_proj"),
        ("model.layers.0.q_proj", "model.layers.0.my.q_proj"),
        ("decoder.layers.1.q", "encoder.layers.1.q"),
        ("bert.pooler.dense", "cls.predictions.transform.dense"),
        ("classifier.dense", "lm_head.dense"),
        ("model.vision.layers.0.q", "model.text.layers.0.q"),
    ],
)
def test_another_module_is_never_taken(bench: Bench, wanted: str, there: str) -> None:
    message = reasons(bench, bench.write(weights(f"{there}.weight")), adapt(bench, wanted))
    assert f"there is no module {wanted} in the base" in message
    assert f"nearest in the base: {there}.weight" in message


def test_a_layer_that_lacks_in_one_stack_is_not_taken_from_another(bench: Bench) -> None:
    """Without this, the last layer of a deeper decoder would change the encoder."""
    base = bench.write(
        weights("layers.0.q.weight", "tower.layers.0.q.weight", "tower.layers.1.q.weight")
    )
    message = reasons(bench, base, adapt(bench, "layers.0.q", "layers.1.q"))
    assert "there is no module layers.1.q" in message
    assert "layers.0.q:" not in message


def test_two_candidates_are_a_refusal_that_names_them(bench: Bench) -> None:
    base = bench.write(weights("text.layers.0.q.weight", "vision.layers.0.q.weight"))
    message = reasons(bench, base, adapt(bench, "layers.0.q"))
    assert "could be any of text.layers.0.q.weight, vision.layers.0.q.weight" in message


def test_a_beginning_is_always_exchanged_for_the_same_other_one(bench: Bench) -> None:
    base = bench.write(weights("text.layers.0.q.weight", "vision.layers.0.k.weight"))
    message = reasons(bench, base, adapt(bench, "layers.0.q", "layers.0.k"))
    assert "but elsewhere 'nothing' became" in message


def test_an_exact_name_goes_before_every_other(bench: Bench) -> None:
    base = bench.write(weights("layers.0.q.weight", "vision.layers.0.q.weight"))
    assert edited(bench.merge(base, adapt(bench, "layers.0.q"))) == ["layers.0.q.weight"]


def test_unmatched_keys_are_all_listed(bench: Bench) -> None:
    lost = [f"model.layers.{number}.{name}" for number in range(5) for name in ("q", "zz")]
    base = bench.write(weights("model.layers.0.k.weight", "model.norm.weight"))
    message = reasons(bench, base, adapt(bench, "model.layers.0.k", *lost))
    for module in lost:
        assert f"{PREFIX}{module}.lora_A.weight:" in message
        assert f"{PREFIX}{module}.lora_B.weight:" in message
    assert "layers.0.k.lora" not in message


def test_the_message_tells_which_base_the_adapter_was_trained_on(bench: Bench) -> None:
    adapter = bench.write_adapter(
        {f"{PREFIX}q.ia3_l": torch.ones(6, 1)},
        peft_type="IA3", base_model_name_or_path="someone/another-model",
    )  # fmt: skip
    message = reasons(bench, bench.write(weights("k.weight")), adapter)
    assert "it was trained on someone/another-model, and the base is " in message


@pytest.mark.parametrize(
    ("base", "told"),
    [("a/Tiny-1B", None), ("a/Other-1B", "it has 2 layers, the base 3; it was trained on a/Other")],
)
def test_an_adapter_of_the_first_layers_is_not_of_a_smaller_model(
    bench: Bench, base: str, told: str | None
) -> None:
    """It has fewer layers than its own base; only where the names differ, too, that tells."""
    parts = {f"{PREFIX}model.layers.{n}.q.ia3_l": torch.ones(5 + n, 1) for n in range(2)}
    adapter = bench.write_adapter(parts, peft_type="IA3", base_model_name_or_path=base)
    folder = bench.write(weights(*(f"model.layers.{n}.q.weight" for n in range(3))))
    message = reasons(bench, folder.rename(folder.with_name("Tiny-1B")), adapter)

    assert (told in message) if told else ("does not fit" not in message)


# --- spellings of keys -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ending, part",
    [
        ("lora_A.weight", "lora_A"),
        ("lora_B.weight", "lora_B"),
        ("lora_B.bias", "lora_bias"),
        ("lora_embedding_A", "lora_embedding_A"),
        ("lora_embedding_B", "lora_embedding_B"),
        ("lora_magnitude_vector", "lora_magnitude_vector"),
        ("lora_magnitude_vector.weight", "lora_magnitude_vector"),
        ("ia3_l", "ia3_l"),
        ("trainable_tokens_delta", "trainable_tokens_delta"),
        ("token_adapter.trainable_tokens_delta", "trainable_tokens_delta"),
    ],
)
def test_parts_are_known_by_their_endings(ending: str, part: str) -> None:
    key = f"{PREFIX}model.q.{ending}"
    found = group_keys([key])
    assert found.modules == {"model.q": {part: key}}
    assert not found.plain and not found.strange


@pytest.mark.parametrize(
    "path, parameter",
    [
        ("model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("model.q.base_layer.bias", "model.q.bias"),
        ("attn.base_layer.out_proj.base_layer.bias", "attn.out_proj.bias"),
        ("embed_tokens.token_adapter.base_layer.weight", "embed_tokens.weight"),
    ],
)
def test_plain_tensors_are_named_without_wrappers(path: str, parameter: str) -> None:
    assert group_keys([PREFIX + path]).plain == {parameter: PREFIX + path}


def test_what_a_wrapper_holds_besides_is_told_apart() -> None:
    keys = [
        f"{PREFIX}{path}.weight"
        for path in ("score", "score.modules_to_save", "score.original_module")
    ]
    found = group_keys(keys)
    assert found.plain == {"score.weight": keys[0]}
    assert found.copies == {"score.weight": keys[1]}
    assert found.unused == [keys[2]]


@pytest.mark.parametrize(
    "key",
    [
        "model.q.lora_A.weight",  # without PEFT's prefix
        "base_model.q.lora_A.weight",
        f"{PREFIX}model.q.lora_A.default.weight",  # the adapter's name was left in
        f"{PREFIX}model.q.lora_C.weight",
        f"{PREFIX}model.q.ia3_l.weight",
        f"{PREFIX}weight",
        f"{PREFIX}score.original_module.weight",  # and no trained one
    ],
)
def test_other_spellings_are_refused_by_name(bench: Bench, key: str) -> None:
    base = bench.write(weights("model.q.weight"))
    adapter = adapt(bench, "model.q")
    file = adapter / "adapter_model.safetensors"
    save_file(load_file(file) | {key: torch.ones(2, 4)}, file)
    assert f"{key}: not a tensor name that PEFT writes" in reasons(bench, base, adapter)


def test_a_copy_that_differs_is_refused(bench: Bench) -> None:
    tensors = weights(f"{PREFIX}score.weight", f"{PREFIX}score.modules_to_save.weight")
    adapter = bench.write_adapter(tensors, peft_type="IA3", modules_to_save=["score"])
    message = reasons(bench, bench.write(weights("score.weight")), adapter)
    assert f"{PREFIX}score.modules_to_save.weight: differs from {PREFIX}score.weight" in message


def test_names_that_do_not_exist_have_no_nearest() -> None:
    assert Names(["model.q.weight"]).find("weight") is None
    assert Names([]).find("model.q.weight") is None
    assert Names([]).nearest("model.q.weight") == ""


def test_deep_names_take_no_more_memory_than_their_length() -> None:
    deep = ".".join("a" * 60)
    names = [f"{number}.{deep}.q.weight" for number in range(1000)]

    tracemalloc.start()
    try:
        assert Names(names).find("b.q.weight") is None
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()
