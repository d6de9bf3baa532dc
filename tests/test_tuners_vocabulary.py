"""Trained tokens and saved embeddings of the tuners: against PEFT, in both directions."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLora
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from infold.errors import Refusal
from infold.tuners import IA3Config, LoraConfig, attach, load
from infold.tuners.layers import Adapted
from infold.tuners.parts import new_adapter
from peft_oracle import Bench, assert_close, assert_differs, read_tensors, shuffle
from tiny_models import model_inputs, new_model

HEAD, EMBEDDING = "lm_head", "embed_tokens"
# Of these, 3 to 30 are in the inputs; every case names some that are and some that are not.
LIST = dict(r=3, lora_alpha=5, trainable_token_indices=[9, 4, 15, 0])
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {}, LIST),
    "llama tied": ("llama", {"tie_word_embeddings": True}, LIST),
    "a tie asked for": (
        "llama",
        {"tie_word_embeddings": True},
        LIST | {"ensure_weight_tying": True},
    ),
    "by name, tied": (
        "llama",
        {"tie_word_embeddings": True},
        LIST | {"trainable_token_indices": {EMBEDDING: [9, 4]}},
    ),
    "both ends, tied": (
        "llama",
        {"tie_word_embeddings": True},
        LIST | {"trainable_token_indices": {EMBEDDING: [9, 4], HEAD: [9, 4]}},
    ),
    "both ends, not the same": (
        "llama",
        {"tie_word_embeddings": True},
        LIST | {"trainable_token_indices": {EMBEDDING: [9, 4], HEAD: [9, 8, 30]}},
    ),
    "the head alone": (
        "llama",
        {"tie_word_embeddings": True},
        LIST | {"trainable_token_indices": {HEAD: [30, 2]}},
    ),
    "both ends, not tied": (
        "llama",
        {},
        LIST | {"trainable_token_indices": {EMBEDDING: [9, 4], HEAD: [9, 8, 30]}},
    ),
    "dora": ("llama", {"tie_word_embeddings": True}, LIST | {"use_dora": True}),
    "gpt2": ("gpt2", {"tie_word_embeddings": True}, LIST),
    "gemma3": ("gemma3", {"tie_word_embeddings": True}, LIST),  # scales what it looks up
    "opt": ("opt", {"tie_word_embeddings": True}, LIST),
    "bloom": ("bloom", {"tie_word_embeddings": True}, LIST),
    "t5": ("t5", {"tie_word_embeddings": True}, LIST),
}
UNTIES = ("both ends, not the same", "the head alone")


def case(name: str) -> tuple[Any, dict[str, Tensor], dict[str, Any]]:
    """A base with random weights, inputs, and the config's fields."""
    architecture, options, fields = CASES[name]
    base = new_model(architecture, **options).eval()
    shuffle(base.named_parameters(), 1)
    return base, model_inputs(architecture), copy.deepcopy(fields)


def trained(model: Any) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def randomized(model: Any, seed: int) -> Any:
    shuffle(trained(model), seed)
    return model.eval()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.clone() for n, p in model.state_dict().items() if ".adapters." not in n}


def assert_same(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    assert [n for n in one if not torch.equal(one[n], two[n])] == []


@pytest.mark.parametrize("name", CASES)
def test_trained_tokens_of_peft_load_here(bench: Bench, name: str) -> None:
    base, inputs, fields = case(name)
    theirs = bench.attach(copy.deepcopy(base), PeftLora(**fields))
    folder = bench.save(theirs)
    base.requires_grad_(False)  # PyTorch has other kernels for what needs a gradient
    before, wanted = base(**inputs).logits, theirs(**inputs).logits

    model = load(base, folder)

    assert_close(model(**inputs).logits, wanted, 1e-6)
    assert_differs(before, wanted)
    with model.disable_adapter():
        assert torch.equal(model(**inputs).logits, before)


@pytest.mark.parametrize("name", CASES)
def test_trained_tokens_from_here_load_in_peft(bench: Bench, name: str) -> None:
    base, inputs, fields = case(name)
    theirs = get_peft_model(copy.deepcopy(base), PeftLora(**fields))
    model = attach(copy.deepcopy(base), LoraConfig(**fields)).eval()
    assert model.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    assert_close(model(**inputs).logits, base(**inputs).logits, 1e-6)
    randomized(model, 2)
    ours = bench.place("ours")
    model.save_pretrained(ours)

    again = PeftModel.from_pretrained(copy.deepcopy(base), ours).eval()

    assert_close(again(**inputs).logits, model(**inputs).logits, 1e-6)
    assert_differs(base(**inputs).logits, model(**inputs).logits)
    own = load_file(ours / "adapter_model.safetensors")
    assert own.keys() == load_file(bench.save(theirs) / "adapter_model.safetensors").keys()


TIES = {
    f"model.{EMBEDDING} shares its weight with {HEAD}": dict(target_modules=["q_proj", EMBEDDING]),
    f"{HEAD} shares its weight with model.{EMBEDDING}": dict(target_modules=["q_proj", HEAD]),
    f"model.{EMBEDDING} shares": dict(target_modules=["q_proj"], modules_to_save=[EMBEDDING]),
}


@pytest.mark.parametrize("told", TIES)
def test_a_tie_that_is_asked_for_is_refused_where_there_is_one(bench: Bench, told: str) -> None:
    fields = dict(r=3, ensure_weight_tying=True) | TIES[told]
    tied, apart = (new_model("llama", tie_word_embeddings=tie).eval() for tie in (True, False))
    theirs = bench.attach(copy.deepcopy(tied), PeftLora(**copy.deepcopy(fields)))
    folder, kept = bench.save(theirs), weights(tied)

    for attempt in (lambda: attach(tied, LoraConfig(**fields)), lambda: load(tied, folder)):
        with pytest.raises(Refusal, match=f"ensure_weight_tying: {told}"):
            attempt()
    assert not hasattr(tied, "peft_config")
    assert_same(weights(tied), kept)
    folder = bench.save(bench.attach(copy.deepcopy(apart), PeftLora(**copy.deepcopy(fields))))
    again = PeftModel.from_pretrained(copy.deepcopy(apart), folder).eval()
    inputs = model_inputs("llama")
    assert_close(load(apart, folder)(**inputs).logits, again(**inputs).logits, 1e-6)


def test_tied_ends_of_which_other_tokens_are_to_be_trained_cannot_stay_tied(calm: None) -> None:
    fields = dict(trainable_token_indices={EMBEDDING: [9, 4], HEAD: [9, 8]})
    base = new_model("llama", tie_word_embeddings=True)

    with pytest.raises(Refusal, match=f"other tokens for model.{EMBEDDING} than for {HEAD}"):
        attach(base, LoraConfig(**fields, ensure_weight_tying=True))
    assert attach(base, LoraConfig(**fields)) is base


@pytest.mark.parametrize("name", CASES)
def test_ten_steps_of_tokens_and_lora_have_the_losses_of_peft(bench: Bench, name: str) -> None:
    base, inputs, fields = case(name)
    folder = bench.save(get_peft_model(copy.deepcopy(base), PeftLora(**fields)))
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), folder, is_trainable=True)
    model = load(copy.deepcopy(base), folder, trainable=True)

    wanted, found = losses(theirs, inputs), losses(model, inputs)

    assert wanted[-1] < 0.97 * wanted[0]
    assert found == pytest.approx(wanted, abs=1e-5)
    parts = [p for n, p in trained(model) if n.endswith("trainable_tokens_delta")]
    assert parts and all(part.grad is not None and part.grad.any() for part in parts)


def losses(model: Any, inputs: dict[str, Tensor]) -> list[float]:
    model.eval()  # T5 and others have a dropout of their own
    optimizer = torch.optim.AdamW((p for _, p in trained(model)), lr=2e-2, eps=1e-4)
    found = []
    for _ in range(10):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        found.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_trained_tokens_merge_to_the_bytes_of_infold_merge(
    bench: Bench, name: str, dtype: torch.dtype
) -> None:
    base, inputs, fields = case(name)
    model = randomized(attach(base.to(dtype), LoraConfig(**fields)), 2)
    adapter, folder = bench.place("adapter"), bench.place("base")
    model.save_pretrained(adapter)
    copy.deepcopy(model).unload().save_pretrained(folder)
    on_disk = bench.merge(folder, adapter)
    wanted = model(**inputs).logits

    if name in UNTIES:
        with pytest.warns(UserWarning, match="untied"):
            plain = model.merge_and_unload()
    else:
        plain = model.merge_and_unload()

    plain.save_pretrained(bench.folder / "memory")
    assert_same(read_tensors(bench.folder / "memory"), on_disk.tensors)
    kind = type(plain)
    again = kind.from_pretrained(bench.folder / "memory", dtype=dtype).eval()
    assert torch.equal(again(**inputs).logits, plain(**inputs).logits)
    if dtype == torch.float32:
        assert_close(plain(**inputs).logits, wanted)


@pytest.mark.parametrize("name", ["llama tied", "both ends, not the same", "t5"])
def test_trained_tokens_are_taken_back_bit_for_bit(calm: None, name: str) -> None:
    base, inputs, fields = case(name)
    model = randomized(attach(base.to(torch.bfloat16), LoraConfig(**fields)), 2)
    before, wanted = weights(model), model(**inputs).logits
    ends = [m for m in model.modules() if getattr(m, "weight", None) is base_table(model)]

    for _ in range(3):
        model.merge_adapter()
        assert any(not torch.equal(v, before[n]) for n, v in weights(model).items())
        if name not in UNTIES:
            assert all(end.weight is base_table(model) for end in ends)
        with model.disable_adapter():
            assert_same(weights(model), before)
        model.unmerge_adapter()
        assert_same(weights(model), before)
    assert len(ends) > 1
    assert torch.equal(model(**inputs).logits, wanted)
    plain = model.unload()
    assert_same(dict(plain.state_dict()), before)
    assert all(end.weight is base_table(plain) for end in ends)


def base_table(model: Any) -> Tensor:
    return model.get_input_embeddings().weight


def test_merging_tied_tokens_for_good_writes_into_the_one_tensor(calm: None) -> None:
    base, _, fields = case("llama tied")
    model = randomized(attach(base, LoraConfig(**fields)), 2)
    table = base_table(model)
    place = table.data_ptr()

    plain = model.merge_and_unload()

    assert base_table(plain) is table is plain.lm_head.weight and table.data_ptr() == place
    assert plain.config.tie_word_embeddings


def test_both_ends_changed_by_lora_are_untied_in_the_config_too(bench: Bench) -> None:
    base = new_model("llama", tie_word_embeddings=True).eval()
    shuffle(base.named_parameters(), 1)
    config = LoraConfig(r=4, target_modules=[EMBEDDING, HEAD])
    model = randomized(attach(base, config), 2)
    wanted = model(**model_inputs("llama")).logits

    with pytest.warns(UserWarning, match=r"untied: .*embed_tokens.*lm_head"):
        plain = model.merge_and_unload()

    plain.save_pretrained(bench.folder / "merged")
    again = AutoModelForCausalLM.from_pretrained(bench.folder / "merged").eval()
    assert_close(again(**model_inputs("llama")).logits, wanted)


def test_several_adapters_with_tokens(bench: Bench) -> None:
    base, inputs, fields = case("llama tied")
    model = randomized(attach(base, LoraConfig(**fields)), 2)
    other = LoraConfig(r=2, trainable_token_indices=[5, 9, 30])
    randomized(attach(model, other, "other"), 3)
    randomized(attach(model, IA3Config(), "scales"), 4)
    rows = {key: value[:1] for key, value in inputs.items()}
    alone = {}
    for name in ("default", "other", "scales"):
        model.set_adapter(name)
        alone[name] = model(**rows).logits[0]
    with model.disable_adapter():
        alone["__base__"] = model(**rows).logits[0]

    names = ["other", "__base__", "default", "scales", "default"]
    ids = rows["input_ids"].repeat(len(names), 1)
    mixed = model(ids, adapter_names=names).logits

    for row, name in enumerate(names):
        assert_close(mixed[row], alone[name])
    assert_differs(alone["default"], alone["other"])
    model.set_adapter(["other", "scales"])
    in_a_row = model(**inputs).logits
    model.merge_adapter()
    assert_close(model(**inputs).logits, in_a_row)
    model.delete_adapter("other")
    model.unmerge_adapter()
    assert "other" not in model._attached.tokens
    model.set_adapter("default")
    assert_close(model(**rows).logits[0], alone["default"], 1e-6)
    model.delete_adapter("default")
    model.delete_adapter("scales")
    assert not any(isinstance(module, Adapted) for module in model.modules())


@pytest.mark.parametrize("first", ["tokens", "lora on the head", "lora on the embedding"])
def test_tokens_do_not_overwrite_an_earlier_adapter(calm: None, first: str) -> None:
    base, _, fields = case("llama tied")
    target = EMBEDDING if "embedding" in first else HEAD
    config = LoraConfig(**fields) if first == "tokens" else LoraConfig(target_modules=[target])
    model = attach(attach(base, config, "first"), LoraConfig(**fields), "tokens")

    for use in (model.set_adapter, model.merge_adapter):
        with pytest.raises(Refusal, match=f"tokens replaces rows of .*{target}.* first changes"):
            use(["first", "tokens"])
    assert model.active_adapters == ["tokens"]
    with pytest.raises(Refusal, match="first changes"):  # tokens would go on running on top of it
        model.merge_adapter(["first"])
    model.set_adapter("first")
    model.merge_adapter(["first"])
    with pytest.raises(Refusal, match="first changes"):
        model.set_adapter("tokens")
    with pytest.raises(Refusal, match="unmerge first first"):
        attach(model, LoraConfig(**fields), "more")
    model.unmerge_adapter()
    if first == "tokens":
        return
    model.set_adapter(["tokens", "first"])
    wanted = model(**model_inputs("llama")).logits
    with pytest.raises(Refusal, match=r"first changes before it.*; put tokens first, or use one"):
        model.merge_adapter(["first"])
    model.merge_adapter(["tokens", "first", "first"])
    assert_close(model(**model_inputs("llama")).logits, wanted)
    with pytest.raises(Refusal, match="first changes"):
        model.unmerge_adapter(["tokens"])
    assert model._attached.merged.names == ("tokens", "first")
    assert_close(model(**model_inputs("llama")).logits, wanted)
    model.delete_adapter("tokens")  # which takes its work away for good
    assert model._attached.merged.names == ("first",) and model.active_adapters == ["first"]


# Two adapters on one module; the first two sit on the head, which is tied to the embedding.
CLASH = {
    "tokens on a saved head": (dict(modules_to_save=[HEAD]), dict(trainable_token_indices=[4, 9])),
    "a saved head with tokens": (
        dict(trainable_token_indices=[4, 9]),
        dict(modules_to_save=[HEAD]),
    ),
    "lora on a saved head": (dict(modules_to_save=[HEAD]), dict(target_modules=[HEAD])),
    "a saved head with lora": (dict(target_modules=[HEAD]), dict(modules_to_save=[HEAD])),
    "a saved embedding with tokens": (
        dict(trainable_token_indices=[4, 9]),
        dict(modules_to_save=[EMBEDDING]),
    ),
    "lora in a saved block": (dict(modules_to_save=["mlp"]), dict(target_modules=["down_proj"])),
    "a saved block with lora": (dict(target_modules=["down_proj"]), dict(modules_to_save=["mlp"])),
}


@pytest.mark.parametrize("loaded", [False, True], ids=["attached", "loaded"])
@pytest.mark.parametrize("name", CLASH)
def test_a_module_that_is_trained_whole_takes_no_other_adapter(
    bench: Bench, name: str, loaded: bool
) -> None:
    first, second = ({"target_modules": ["q_proj"]} | fields for fields in CLASH[name])
    base, inputs, _ = case("llama tied")
    attach(copy.deepcopy(base), LoraConfig(r=2, **second)).save_pretrained(bench.folder / "second")
    model = randomized(attach(base, LoraConfig(r=2, **first), "first"), 2)
    wanted, names = model(**inputs).logits, list(model.state_dict())

    with pytest.raises(Refusal, match=r"first (trains all of|sits on) .*delete_adapter\('first'\)"):
        if loaded:
            load(model, bench.folder / "second", "second")
        else:
            attach(model, LoraConfig(r=2, **second), "second")

    assert list(model.state_dict()) == names and list(model.peft_config) == ["first"]
    model.set_adapter("first")
    assert torch.equal(model(**inputs).logits, wanted)
    with model.disable_adapter():
        assert_differs(model(**inputs).logits, wanted)
    assert "second" not in model._attached.tokens
    model.delete_adapter("first")
    attach(model, LoraConfig(r=2, **second), "second")


@pytest.mark.parametrize("fields", [dict(modules_to_save=[HEAD]), dict(bias="all")])
def test_what_a_merged_adapter_trains_whole_stays_in_force(
    calm: None, fields: dict[str, Any]
) -> None:
    base, inputs, _ = case("opt")  # it has biases
    base.requires_grad_(False)  # PyTorch has other kernels for what needs a gradient
    plain = base(**inputs).logits
    model = randomized(attach(base, LoraConfig(r=2, **fields), "first"), 2)
    wanted = model(**inputs).logits
    model.merge_adapter(["first"])
    attach(model, LoraConfig(r=2), "second").eval()

    assert model.active_adapters == ["second"]
    assert_close(model(**inputs).logits, wanted, 1e-5)
    with model.disable_adapter():
        assert torch.equal(model(**inputs).logits, plain)
    model.unmerge_adapter(["first"])
    assert torch.equal(model(**inputs).logits, plain), "second has learnt nothing yet"


@pytest.mark.parametrize("fresh", [True, False])
def test_an_adapter_that_is_not_added_to_the_end_leaves_nothing(
    calm: None, monkeypatch: pytest.MonkeyPatch, fresh: bool
) -> None:
    base, inputs, fields = case("llama tied")
    if not fresh:
        randomized(attach(base, LoraConfig(**fields), "first"), 2)
    wanted, names, calls = base(**inputs).logits, list(base.state_dict()), 0

    def interrupted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return new_adapter(*args)

    monkeypatch.setattr("infold.tuners.model.new_adapter", interrupted)
    with pytest.raises(KeyboardInterrupt):
        attach(base, LoraConfig(**fields, bias="all"), "second")

    assert list(base.state_dict()) == names
    assert hasattr(base, "peft_config") is not fresh
    if not fresh:
        base.set_adapter("first")
    assert torch.equal(base(**inputs).logits, wanted)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (LoraConfig(target_modules=[EMBEDDING]), LoraConfig(trainable_token_indices=[3, 9])),
        (LoraConfig(), LoraConfig(use_dora=True)),
    ],
    ids=["tokens", "dora"],
)
def test_a_new_adapter_changes_nothing_whatever_was_active(
    calm: None, first: LoraConfig, second: LoraConfig
) -> None:
    base, inputs, _ = case("llama")
    wanted = base(**inputs).logits
    model = randomized(attach(base, first, "first"), 2)
    assert_differs(model(**inputs).logits, wanted)

    attach(model, second, "second").eval()

    assert model.active_adapters == ["second"]
    assert_close(model(**inputs).logits, wanted, 1e-6)


def test_two_adapters_that_replace_a_module_are_not_used_together(calm: None) -> None:
    base, inputs, _ = case("llama")
    config = LoraConfig(r=2, modules_to_save=[HEAD])
    model = randomized(attach(base, config, "one"), 2)
    wanted = model(**inputs).logits
    randomized(attach(model, config, "two"), 3)

    with pytest.raises(
        Refusal, match=r"two replaces lm_head, which one changes .*lost; use one of"
    ):
        model.set_adapter(["one", "two"])

    model.set_adapter("one")
    assert torch.equal(model(**inputs).logits, wanted)


def test_token_numbers_of_32_bits_and_slices_are_looked_up(calm: None) -> None:
    base, inputs, fields = case("llama tied")
    model = randomized(attach(base, LoraConfig(**fields)), 2)
    ids = inputs["input_ids"]
    wanted = model(ids).logits

    for same in (ids.int(), ids.t().contiguous().t()):
        assert torch.equal(model(same).logits, wanted)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"trainable_token_indices": [3, 31]}, "token 31 of model.embed_tokens, which has 31: "),
        ({"trainable_token_indices": {"wte": [3]}}, "the name 'wte' means no module"),
        ({"trainable_token_indices": {"mlp": [3]}}, "mlp is a LlamaMLP, not an embedding"),
        (
            {"trainable_token_indices": [3], "target_modules": [EMBEDDING, "q_proj"]},
            "embed_tokens is also one of target_modules",
        ),
        (
            {"trainable_token_indices": [3], "target_modules": [HEAD]},
            r"lm_head \(tied to model.embed_tokens\) is also one of target_modules",
        ),
        (
            {"trainable_token_indices": [3], "modules_to_save": [EMBEDDING]},
            "embed_tokens is also one of modules_to_save",
        ),
        (
            {"trainable_token_indices": {EMBEDDING: [3], "model.embed_tokens": [4]}},
            "model.embed_tokens has two names there",
        ),
    ],
)
def test_tokens_that_cannot_be_trained_are_refused(
    calm: None, fields: dict[str, Any], message: str
) -> None:
    base = new_model("llama", tie_word_embeddings=True)
    with pytest.raises(Refusal, match=message):
        attach(base, LoraConfig(**fields))
    assert type(base).__name__ == "LlamaForCausalLM" and not hasattr(base, "peft_config")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], r"= \[\] must be a list of token numbers"),
        ([1, -2], "-2 is no token number"),
        ([1, True], "True is no token number"),
        ({"a": [4, 5, 4]}, r"\['a'\]: token 4 is there twice"),
        ({}, "name an embedding"),
        ("embed_tokens", "must be a list of token numbers"),
    ],
)
def test_token_lists_that_mean_nothing_are_refused(given: Any, message: str) -> None:
    with pytest.raises(Refusal, match=message):
        LoraConfig(trainable_token_indices=given)


KEY = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"


def _renamed(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    tensors[KEY.replace(EMBEDDING, "norm")] = tensors.pop(KEY)


def _shorter(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    tensors[KEY] = tensors[KEY][:2].clone()


def _untold(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    config["trainable_token_indices"] = None


def _also_lora(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    path = KEY.removesuffix("token_adapter.trainable_tokens_delta")
    tensors[f"{path}lora_embedding_A"], tensors[f"{path}lora_embedding_B"] = (
        torch.ones(3, 31),
        torch.ones(16, 3),
    )


def _other_copy(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    tensors[KEY.replace("model.embed_tokens", HEAD)] = tensors[KEY] + 1


def _outside(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    config["trainable_token_indices"] = [9, 4, 15, 31]


def _copy_and_lora(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    copy_key = KEY.replace("model.embed_tokens", HEAD)
    tensors[copy_key] = tensors[KEY].clone()
    path = copy_key.removesuffix("token_adapter.trainable_tokens_delta")
    tensors[f"{path}lora_A.weight"] = torch.ones(3, 16)
    tensors[f"{path}lora_B.weight"] = torch.ones(31, 3)


WRONG = {
    "a name": (_renamed, "holds no trained tokens of model.embed_tokens"),
    "a shape": (_shorter, r"shape \[2, 16\]; 4 tokens of .* need \[4, 16\]"),
    "no config": (_untold, "does not tell which tokens of model.embed_tokens"),
    "lora": (_also_lora, "has trained tokens and lora_A, lora_B"),
    "a copy and lora": (_copy_and_lora, r"lm_head \(tied to .*\) is also one of target_modules"),
    "another copy": (_other_copy, "differs from .* but the model ties the two"),
    "a number": (_outside, "token 31 of model.embed_tokens"),
}


@pytest.mark.parametrize("name", WRONG)
def test_files_whose_tokens_do_not_fit_are_refused(bench: Bench, name: str) -> None:
    import json

    spoil, message = WRONG[name]
    base, _, fields = case("llama tied")
    folder = bench.save(bench.attach(copy.deepcopy(base), PeftLora(**fields)))
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    spoil(tensors, config)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config))

    with pytest.raises(Refusal, match=message):
        load(base, folder)

    assert type(base).__name__ == "LlamaForCausalLM" and not hasattr(base, "peft_config")


class Opaque(nn.Module):
    """As GPTQ's linear layers: it has no weight."""

    in_features = out_features = 16


@pytest.mark.parametrize("module", [nn.MultiheadAttention(16, 2), Opaque()], ids=["mha", "opaque"])
def test_tokens_of_a_module_without_a_table_are_refused(bench: Bench, module: nn.Module) -> None:
    import json

    base, _, fields = case("llama")
    folder = bench.save(bench.attach(copy.deepcopy(base), PeftLora(**fields)))
    base.other = module
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    copied = {KEY.replace("model.embed_tokens", "other"): tensors[KEY].clone()}
    save_file(tensors | copied, file, {"format": "pt"})
    config = json.loads((folder / "adapter_config.json").read_text())
    tokens = fields["trainable_token_indices"]
    config["trainable_token_indices"] = {EMBEDDING: tokens, "other": tokens}
    (folder / "adapter_config.json").write_text(json.dumps(config))

    with pytest.raises(Refusal, match=f"other is a {type(module).__name__}, not an embedding"):
        load(base, folder)


def test_a_copy_of_a_tied_end_is_no_second_part(bench: Bench) -> None:
    base, inputs, fields = case("llama tied")
    theirs = bench.attach(copy.deepcopy(base), PeftLora(**fields))
    folder = bench.save(theirs)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {KEY.replace("model.embed_tokens", HEAD): tensors[KEY].clone()}, file)

    assert_close(load(base, folder)(**inputs).logits, theirs(**inputs).logits, 1e-6)


def test_combining_carries_trained_tokens_over(calm: None) -> None:
    base, inputs, fields = case("llama tied")
    model = randomized(attach(base, LoraConfig(**fields)), 2)
    randomized(attach(model, LoraConfig(r=3), "other"), 3)
    with pytest.warns(UserWarning, match="carried over"):
        model.add_weighted_adapter(["default", "other"], [1.0, 0.0], "sum", "linear")
    model.set_adapter("default")
    wanted = model(**inputs).logits

    model.set_adapter("sum")

    assert_close(model(**inputs).logits, wanted)


def test_a_copy_of_the_model_keeps_its_ends_tied(calm: None) -> None:
    import io
    import pickle

    base, inputs, fields = case("llama tied")
    model = randomized(attach(base, LoraConfig(**fields)), 2)
    wanted = model(**inputs).logits
    for again in (
        copy.deepcopy(model),
        pickle.load(io.BytesIO(pickle.dumps(model))),
        copy.deepcopy(model).to(torch.float64).to(torch.float32),
    ):
        parts = again.model.embed_tokens.adapters["default"], again.lm_head.adapters["default"]
        assert parts[0] is parts[1]
        assert torch.equal(again(**inputs).logits, wanted)


def test_checkpointed_activations_give_tokens_the_same_gradients(calm: None) -> None:
    base, inputs, fields = case("llama tied")
    model = randomized(attach(base, LoraConfig(**fields)), 2).train()
    found = []
    for again in (model, copy.deepcopy(model)):
        if again is not model:
            again.activation_checkpointing_enable()
        again(**inputs, labels=inputs["input_ids"]).loss.backward()
        found.append({name: p.grad for name, p in trained(again)})

    assert found[0].keys() == found[1].keys()
    assert any("tokens" in name and grad.any() for name, grad in found[0].items())
    for name, grad in found[0].items():
        assert_close(found[1][name], grad)


def test_rows_of_a_generation_use_their_own_tokens(calm: None) -> None:
    base, inputs, fields = case("llama tied")
    model = randomized(attach(base, LoraConfig(**fields)), 2)
    other = LoraConfig(r=2, trainable_token_indices=[5, 9, 30])
    randomized(attach(model, other, "other"), 3)
    ids, names = inputs["input_ids"], ["default", "other"]
    options = dict(max_new_tokens=5, do_sample=False, eos_token_id=None)

    mixed = model.generate(ids, adapter_names=names, **options)

    alone = []
    for row, name in enumerate(names):
        model.set_adapter(name)
        alone.append(model.generate(ids[row : row + 1], **options)[0])
    assert torch.equal(mixed, torch.stack(alone))


def test_compiled_tokens_are_the_same(calm: None) -> None:
    base, inputs, fields = case("llama tied")
    model = randomized(attach(base, LoraConfig(**fields)), 2)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert_close(compiled(**inputs).logits, model(**inputs).logits)


def test_a_16_bit_base_trains_tokens_in_float32(calm: None) -> None:
    base, inputs, fields = case("llama tied")
    model = attach(base.to(torch.bfloat16), LoraConfig(**fields))
    assert {p.dtype for _, p in trained(model)} == {torch.float32}
    output = model(**inputs, labels=inputs["input_ids"])
    assert output.logits.dtype == torch.bfloat16
    output.loss.backward()
    (tokens,) = (p for n, p in trained(model) if "tokens" in n)
    before = tokens.detach().clone()
    torch.optim.SGD([tokens], lr=1e-4).step()
    changed = tokens != before
    same = tokens.to(torch.bfloat16) == before.to(torch.bfloat16)
    assert (changed & same).any()  # steps that bfloat16 could not tell


# --- embeddings that are saved whole -------------------------------------------------------------

TARGETED = {
    "embedding": dict(target_modules=[EMBEDDING]),
    "head": dict(target_modules=[HEAD]),
    "both": dict(target_modules=[EMBEDDING, HEAD, "q_proj"]),
    "dora": dict(target_modules=[EMBEDDING, "q_proj"], use_dora=True),
    "pattern": dict(target_modules=r".*(embed_tokens|q_proj)"),
}
RESIZED = {
    "neither": dict(target_modules=["q_proj"]),
    "both": dict(target_modules=[EMBEDDING, HEAD]),
    "embedding saved": dict(target_modules=["q_proj"], modules_to_save=[EMBEDDING]),
    "head saved": dict(target_modules=["q_proj"], modules_to_save=[HEAD]),
    "new tokens": dict(target_modules=["q_proj"], trainable_token_indices=[31, 33, 4]),
}
MORE = {"input_ids": torch.tensor([[9, 31, 32, 33, 3], [33, 4, 31, 30, 5]])}


def saved_base(bench: Bench, tie: bool, dtype: torch.dtype = torch.float32) -> Any:
    """A folder with a base, as its vocabulary is compared with that."""
    return bench.base(new_model("llama", tie_word_embeddings=tie).to(dtype))


def larger(bench: Bench, folder: Any, seed: int = 0) -> Any:
    """The base with three tokens more, whose values depend on the seed."""
    torch.manual_seed(seed)
    model = bench.load(AutoModelForCausalLM, folder)
    model.resize_token_embeddings(34, mean_resizing=False)
    return model


@pytest.mark.parametrize("tie", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("name", TARGETED)
def test_targeted_embeddings_are_read_and_written_as_peft_does(
    bench: Bench, name: str, tie: bool
) -> None:
    folder = saved_base(bench, tie)
    base = bench.load(AutoModelForCausalLM, folder)
    fields, inputs = dict(r=3, **TARGETED[name]), model_inputs("llama")
    theirs = bench.attach(copy.deepcopy(base), PeftLora(**fields))
    file = bench.save(theirs)

    model = load(copy.deepcopy(base), file)

    assert_close(model(**inputs).logits, theirs(**inputs).logits, 1e-6)
    assert not model._attached.embeddings  # they are what the model has
    assert_differs(base(**inputs).logits, model(**inputs).logits)
    model.save_pretrained(bench.folder / "ours")
    one = load_file(bench.folder / "ours" / "adapter_model.safetensors")
    two = load_file(file / "adapter_model.safetensors")
    assert any(".base_layer." in key for key in two)
    assert_same(dict(sorted(one.items())), dict(sorted(two.items())))
    model.merge_adapter()
    model.save_pretrained(bench.folder / "while merged")
    assert_same(load_file(bench.folder / "while merged" / "adapter_model.safetensors"), one)
    model.save_pretrained(bench.folder / "small", save_embedding_layers=False)
    small = load_file(bench.folder / "small" / "adapter_model.safetensors")
    assert small.keys() == {key for key in two if ".base_layer." not in key}


@pytest.mark.parametrize("tie", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("name", RESIZED)
def test_a_resized_vocabulary_is_read_and_written_as_peft_does(
    bench: Bench, name: str, tie: bool
) -> None:
    folder = saved_base(bench, tie)
    theirs = bench.attach(larger(bench, folder, 1), PeftLora(r=3, **RESIZED[name]))
    file = bench.save(theirs)
    wanted = theirs(**MORE).logits
    base = larger(bench, folder, 2).requires_grad_(False)
    before, values = base(**MORE).logits, weights(base)

    model = load(base, file)

    assert_close(model(**MORE).logits, wanted, 1e-6)
    assert_differs(before, wanted)
    with model.disable_adapter():
        assert torch.equal(model(**MORE).logits, before)
        assert_same(weights(model), values)
    model.save_pretrained(bench.folder / "ours")
    again = PeftModel.from_pretrained(larger(bench, folder, 3), bench.folder / "ours").eval()
    assert_close(again(**MORE).logits, wanted, 1e-6)
    model.merge_adapter()
    assert_close(model(**MORE).logits, wanted)
    model.unmerge_adapter()
    assert_close(model(**MORE).logits, wanted, 1e-6)
    plain = model.unload()
    assert_same(dict(plain.state_dict()), values)


@pytest.mark.parametrize("tie", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("name", RESIZED)
def test_a_resized_vocabulary_merges_to_the_bytes_of_infold_merge(
    bench: Bench, name: str, tie: bool
) -> None:
    folder = saved_base(bench, tie)
    file = bench.save(bench.attach(larger(bench, folder, 1), PeftLora(r=3, **RESIZED[name])))
    on_disk = bench.merge(folder, file)
    model = load(larger(bench, folder, 2), file)
    wanted = model(**MORE).logits

    if tie and (name == "both" or "saved" in name):
        with pytest.warns(UserWarning, match="untied"):
            plain = model.merge_and_unload()
    else:
        plain = model.merge_and_unload()

    assert_close(plain(**MORE).logits, wanted)
    plain.save_pretrained(bench.folder / "memory")
    assert_same(read_tensors(bench.folder / "memory"), on_disk.tensors)


@pytest.mark.parametrize("seed", [1, 2], ids=["", "other rows in memory"])
@pytest.mark.parametrize("tie", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("name", RESIZED)
def test_an_embedding_that_a_16_bit_model_rounds_merges_with_one_rounding(
    bench: Bench, name: str, tie: bool, seed: int
) -> None:
    """The new rows are trained in float32, and the base holds bfloat16."""
    folder = saved_base(bench, tie, torch.bfloat16)
    file = bench.save(bench.attach(larger(bench, folder, 1), PeftLora(r=3, **RESIZED[name])))
    on_disk = bench.merge(folder, file)
    model = load(larger(bench, folder, seed).to(torch.bfloat16), file)
    again = bench.folder / "again"
    model.save_pretrained(again)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "untied")
        model.merge_adapter()
        model.unmerge_adapter()
        plain = model.merge_and_unload()

    plain.save_pretrained(bench.folder / "memory")
    assert_same(read_tensors(bench.folder / "memory"), on_disk.tensors)
    given, written = (load_file(f / "adapter_model.safetensors") for f in (file, again))
    for key, value in written.items():
        if key in given and "saved" not in name:  # of that, the copy is the model's
            assert torch.equal(value, given[key]), key


def test_a_file_that_repeats_the_base_loads_while_something_is_merged(bench: Bench) -> None:
    base = bench.load(AutoModelForCausalLM, saved_base(bench, True))
    theirs = bench.attach(copy.deepcopy(base), PeftLora(r=3, target_modules=[EMBEDDING]))
    file, inputs = bench.save(theirs), model_inputs("llama")
    model = randomized(attach(base, LoraConfig(r=2, target_modules=[EMBEDDING, HEAD]), "one"), 2)
    model.merge_adapter()

    model.load_adapter(file, "two")

    assert not model._attached.embeddings
    model.unmerge_adapter()
    model.set_adapter("two")
    assert_close(model(**inputs).logits, theirs(**inputs).logits, 1e-6)


def test_adapters_that_bring_the_same_embedding_share_it(bench: Bench) -> None:
    folder = saved_base(bench, True)
    file = bench.save(bench.attach(larger(bench, folder, 1), PeftLora(r=3, **RESIZED["neither"])))
    model = load(larger(bench, folder, 2), file, "one")
    wanted = model(**MORE).logits
    values = weights(load(larger(bench, folder, 2), file).unload())
    randomized(attach(model, LoraConfig(r=3, target_modules=["q_proj"]), "other"), 5)
    other = model(**MORE).logits

    model.load_adapter(file, "two")
    with pytest.warns(UserWarning, match="carried over"):
        model.add_weighted_adapter(["one", "other"], [1.0, 0.0], "sum", "linear")

    assert_same(weights(model), values)  # other is active still
    for name in ("one", "two", "sum"):
        model.set_adapter(name)
        assert_close(model(**MORE).logits, wanted, 1e-6)
    model.set_adapter(["one", "two"])
    model.set_adapter("sum")
    model.merge_adapter(["one"])
    model.unmerge_adapter(["one"])
    for name in ("one", "two"):
        model.delete_adapter(name)
        assert_close(model(**MORE).logits, wanted, 1e-6)
    model.save_pretrained(bench.folder, selected_adapters=["sum"])
    embedding = load_file(bench.folder / "sum" / "adapter_model.safetensors")
    given = load_file(file / "adapter_model.safetensors")
    key = "base_model.model.model.embed_tokens.weight"
    assert torch.equal(embedding[key], given[key])
    model.set_adapter("other")
    assert_close(model(**MORE).logits, other, 1e-6)
    model.set_adapter("sum")
    model.delete_adapter("sum")
    assert_same(weights(model), values)


def test_rows_of_a_batch_share_the_embedding_that_an_adapter_brings(bench: Bench) -> None:
    folder = saved_base(bench, True)
    file = bench.save(bench.attach(larger(bench, folder, 1), PeftLora(r=3, **RESIZED["neither"])))
    model = load(larger(bench, folder, 2), file, "brings")
    wanted = model(**MORE).logits
    assert_close(model(**MORE, adapter_names=["brings"] * 2).logits, wanted)
    refused = r"batch of their own, after set_adapter\('brings'\)"
    for names in (["brings", "__base__"], ["__base__"] * 2):
        with pytest.raises(Refusal, match=refused):
            model(**MORE, adapter_names=names)

    randomized(attach(model, LoraConfig(r=2), "other"), 5)
    alone = model(**MORE).logits
    assert_close(model(**MORE, adapter_names=["other", "__base__"]).logits[0], alone[0])
    with pytest.raises(Refusal, match=refused):
        model(**MORE, adapter_names=["brings"] * 2)


def _saved(model: Any) -> Any:
    return attach(model, LoraConfig(r=2, modules_to_save=[EMBEDDING]), "mine")


def _targets(model: Any) -> Any:
    return attach(model, LoraConfig(r=2, target_modules=[EMBEDDING]), "mine")


@pytest.mark.parametrize("make", [_saved, _targets])
def test_an_embedding_that_an_adapter_brings_and_another_adapter_do_not_overwrite_each_other(
    bench: Bench, make: Any
) -> None:
    folder = saved_base(bench, False)
    file = bench.save(bench.attach(larger(bench, folder, 1), PeftLora(r=3, **RESIZED["neither"])))
    model = randomized(make(load(larger(bench, folder, 2), file, "brings")), 3)
    wanted = model(**MORE).logits

    refused = "brings replaces model.embed_tokens, which mine changes before it"
    with pytest.raises(Refusal, match=refused):
        model.set_adapter(["mine", "brings"])
    if make is _saved:
        with pytest.raises(Refusal, match=r"mine replaces model.embed_tokens.*lost; use one of"):
            model.set_adapter(["brings", "mine"])
    else:
        model.set_adapter(["brings", "mine"])
        both = model(**MORE).logits
        with pytest.raises(Refusal, match=refused):
            model.merge_adapter(["mine"])
        assert_close(model(**MORE).logits, both, 1e-6)
        model.merge_adapter()
        with pytest.raises(Refusal, match=refused):
            model.unmerge_adapter(["brings"])
        assert_close(model(**MORE).logits, both)
        model.unmerge_adapter()
    model.set_adapter("mine")
    assert_close(model(**MORE).logits, wanted, 1e-6)
    fresh = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[31, 4])
    with model.disable_adapter():
        before = model(**MORE).logits
    model.set_adapter("brings")
    if make is _targets:
        attach(model, fresh, "tokens").eval()  # begins from the base's rows, not from those brought
        assert_close(model(**MORE).logits, before, 1e-6)
        with pytest.raises(Refusal, match=r"tokens replaces rows of .*, which brings changes"):
            model.set_adapter(["brings", "tokens"])


def test_an_embedding_of_an_adapter_is_in_force_while_the_adapter_is(bench: Bench) -> None:
    folder = saved_base(bench, True)
    file = bench.save(bench.attach(larger(bench, folder, 1), PeftLora(r=3, **RESIZED["both"])))
    alone = load(larger(bench, folder, 2), file)(**MORE).logits
    model = load(larger(bench, folder, 2), file, "brings")
    values = weights(model.unload())
    model = load(model, file, "brings")
    randomized(attach(model, LoraConfig(r=2), "other"), 5)
    assert_same(weights(model), values)
    other = model(**MORE).logits

    model.set_adapter("brings")
    assert_close(model(**MORE).logits, alone, 1e-6)
    model.set_adapter(["brings", "other"])
    together = model(**MORE).logits
    assert_differs(together, alone)
    model.set_adapter("other")
    model.merge_adapter(["brings", "other"])  # though one of them is not in force
    assert_close(model(**MORE).logits, together)
    model.unmerge_adapter(["brings"])
    assert_close(model(**MORE).logits, other)
    model.unmerge_adapter()
    assert_same(weights(model), values)
    with pytest.raises(Refusal, match="brings brings an embedding"):
        model(**MORE, adapter_names=["brings", "other"])
    third = bench.save(bench.attach(larger(bench, folder, 4), PeftLora(r=3, **RESIZED["both"])))
    with pytest.raises(Refusal, match="brings has values of its own there already"):
        load(model, third, "third")
    assert_same(weights(model), values)
    model.delete_adapter("brings")
    assert_same(weights(model), values)
    load(model, third, "third")
    with pytest.raises(Refusal, match=r"third replaces model.embed_tokens, which head changes"):
        head = LoraConfig(r=2, target_modules=[EMBEDDING])
        attach(model, head, "head").set_adapter(["head", "third"])


def test_each_adapter_is_saved_with_its_embedding_whatever_is_in_force(bench: Bench) -> None:
    folder = saved_base(bench, True)
    file = bench.save(bench.attach(larger(bench, folder, 1), PeftLora(r=3, **RESIZED["both"])))
    base = larger(bench, folder, 2)
    table = base.model.embed_tokens.weight.clone()
    model = load(attach(base, LoraConfig(r=2), "other"), file, "brings")
    wanted = load_file(file / "adapter_model.safetensors")

    for number, active in enumerate(("brings", "other")):
        model.set_adapter(active)
        model.save_pretrained(bench.folder / str(number), save_embedding_layers=True)
        found = load_file(bench.folder / str(number) / "brings" / "adapter_model.safetensors")
        assert_same(dict(sorted(found.items())), dict(sorted(wanted.items())))
        other = load_file(bench.folder / str(number) / "other" / "adapter_model.safetensors")
        assert torch.equal(other["base_model.model.model.embed_tokens.weight"], table)


def test_an_embedding_of_an_adapter_moves_with_the_model(bench: Bench) -> None:
    folder = saved_base(bench, True)
    file = bench.save(bench.attach(larger(bench, folder, 1), PeftLora(r=3, **RESIZED["both"])))
    model = load(larger(bench, folder, 2), file)
    wanted = model(**MORE).logits
    with model.disable_adapter():
        before = model(**MORE).logits

    again = copy.deepcopy(model).to(torch.float64)

    assert_close(again(**MORE).logits, wanted)
    with again.disable_adapter():
        assert again.model.embed_tokens.weight.dtype == torch.float64
        assert_close(again(**MORE).logits, before)
    assert torch.equal(model(**MORE).logits, wanted)


@pytest.mark.parametrize("rows", [31, 40])
def test_a_vocabulary_of_another_size_is_refused_with_what_to_call(bench: Bench, rows: int) -> None:
    folder = saved_base(bench, False)
    file = bench.save(bench.attach(larger(bench, folder, 1), PeftLora(r=3, **RESIZED["neither"])))
    model = bench.load(AutoModelForCausalLM, folder)
    if rows != 31:
        model.resize_token_embeddings(rows, mean_resizing=False)
    values = weights(model)

    with pytest.raises(Refusal, match=r"resize_token_embeddings\(34\)") as refusal:
        load(model, file)

    assert len(refusal.value.reasons) == 2
    assert_same(weights(model), values)
    assert type(model).__name__ == "LlamaForCausalLM" and not hasattr(model, "peft_config")


def test_two_values_for_one_tensor_are_refused(bench: Bench) -> None:
    folder = saved_base(bench, False)
    file = bench.save(bench.attach(larger(bench, folder, 1), PeftLora(r=3, **RESIZED["neither"])))
    tied = bench.load(AutoModelForCausalLM, saved_base(bench, True))
    tied.resize_token_embeddings(34, mean_resizing=False)

    with pytest.raises(Refusal, match=r"differs from .* but the model ties the two"):
        load(tied, file)


def test_embeddings_are_saved_when_they_are_asked_for(bench: Bench) -> None:
    base = bench.load(AutoModelForCausalLM, saved_base(bench, False))
    model = attach(base, LoraConfig(r=2))
    sizes = {}
    for wanted in (True, False, "auto"):
        model.save_pretrained(bench.folder / str(wanted), save_embedding_layers=wanted)
        sizes[wanted] = load_file(bench.folder / str(wanted) / "adapter_model.safetensors").keys()

    prefix = "base_model.model."
    own = {f"{prefix}model.embed_tokens.weight", f"{prefix}lm_head.weight"}
    assert sizes[True] - sizes[False] == own
    assert sizes["auto"] == sizes[False]
    with pytest.raises(Refusal, match="save_embedding_layers='yes'"):
        model.save_pretrained(bench.folder / "yes", save_embedding_layers="yes")


def test_a_base_that_is_not_there_is_told_when_nothing_else_says_the_size(bench: Bench) -> None:
    base = bench.load(AutoModelForCausalLM, saved_base(bench, False))
    config = LoraConfig(r=2, base_model_name_or_path=str(bench.folder / "gone"))
    model = attach(base, config)

    with pytest.warns(UserWarning, match="save with save_embedding_layers=True"):
        model.save_pretrained(bench.folder / "adapter")
