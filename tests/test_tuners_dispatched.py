"""Models that accelerate has dispatched: its hooks stand before each layer's forward."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from infold.errors import Refusal
from infold.tuners import IA3Config, LoraConfig, attach, load
from peft_oracle import assert_close, assert_differs, shuffle
from tiny_models import model_inputs, new_model

accelerate = pytest.importorskip("accelerate")
from accelerate.hooks import (  # noqa: E402
    add_hook_to_module,
    attach_align_device_hook,
    remove_hook_from_submodules,
)

CPU = torch.device("cpu")


def aligned(model: nn.Module) -> None:
    attach_align_device_hook(model, execution_device=CPU)


def dispatched(model: nn.Module) -> None:
    accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)


def offloaded(model: nn.Module) -> None:
    accelerate.cpu_offload(model, CPU)


WAYS = [aligned, dispatched, offloaded]
CONFIGS = [
    IA3Config(),
    LoraConfig(r=2),
    LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]),
    LoraConfig(r=2, use_dora=True),
    LoraConfig(r=2, modules_to_save=["lm_head"]),
    LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 4]),
]
NEED_VALUES = CONFIGS[3:]


def base() -> Any:
    model = new_model("llama").eval()
    shuffle(model.named_parameters(), 1)
    return model


def two(model: Any, config: Any) -> Any:
    """Two adapters, `default` and `other`; random, and the same wherever the model lies."""
    for name in ("default", "other"):
        attach(model, copy.deepcopy(config), name)
        own = ((n, p) for n, p in model.named_parameters() if f".adapters.{name}" in n)
        shuffle(own, len(name))
    model.set_adapter("default")
    return model.eval()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_a_dispatched_model_runs_its_adapters(calm: None, way: Any, config: Any) -> None:
    wanted, found = two(base(), config), base()
    inputs = model_inputs("llama")
    way(found)
    assert "forward" in found.model.layers[0].self_attn.q_proj.__dict__
    if way is offloaded and config in NEED_VALUES:
        with pytest.raises(Refusal, match="is offloaded by accelerate"):
            attach(found, copy.deepcopy(config))
        return
    found = two(found, config)
    rows = ["other", "__base__"]

    with torch.no_grad():
        for name in ("default", "other"):
            found.set_adapter(name)
            wanted.set_adapter(name)
            assert_close(found(**inputs).logits, wanted(**inputs).logits)
        mixed = wanted(**inputs, adapter_names=rows).logits
        assert_close(found(**inputs, adapter_names=rows).logits, mixed)
        assert_differs(mixed[1], wanted(**inputs).logits[1])
        with found.disable_adapter():
            assert torch.equal(found(**inputs).logits, base()(**inputs).logits)
    if config in NEED_VALUES:
        return
    options = dict(max_new_tokens=3, do_sample=False, eos_token_id=None, adapter_names=rows)
    assert torch.equal(found.generate(**inputs, **options), wanted.generate(**inputs, **options))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("config", CONFIGS[:2], ids=repr)
def test_a_dispatched_model_trains_as_another(calm: None, way: Any, config: Any) -> None:
    inputs, gradients = model_inputs("llama"), []
    for how in (lambda model: None, way):
        model = base()
        how(model)
        two(model, config)(**inputs, labels=inputs["input_ids"]).loss.backward()
        own = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        gradients.append(own)
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    for name, gradient in gradients[0].items():
        assert_close(gradients[1][name], gradient)


@pytest.mark.parametrize("way", [aligned, dispatched])
@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_a_dispatched_model_merges_as_another(calm: None, way: Any, config: Any) -> None:
    wanted, found = two(base(), config).merge_and_unload(), base()
    way(found)
    found = two(found, config).merge_and_unload()

    assert type(found) is type(base())
    assert found.state_dict().keys() == wanted.state_dict().keys()
    for name, value in wanted.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name
    inputs = model_inputs("llama")
    assert torch.equal(found(**inputs).logits, wanted(**inputs).logits)


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_weights_that_are_not_in_memory_are_not_merged_into(calm: None, merge: str) -> None:
    model = base()
    offloaded(model.model.layers[1])  # the other half is in memory, and must not be merged alone
    two(model, LoraConfig(r=2))
    inputs = model_inputs("llama")
    with torch.no_grad():
        before = model(**inputs).logits

    with pytest.raises(Refusal) as refused:
        getattr(model, merge)()

    names = [f"model.layers.1.self_attn.{n}_proj is offloaded" for n in "qv"]
    reasons = refused.value.reasons
    assert all(name in told for told, name in zip(reasons, names, strict=True))
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, before)
        assert torch.equal(model.unload()(**inputs).logits, base()(**inputs).logits)


def test_biases_and_embeddings_that_are_not_in_memory_are_refused(
    calm: None, tmp_path: Path
) -> None:
    model = new_model("gpt2")
    offloaded(model)
    config = LoraConfig(r=2, target_modules=["c_attn"], bias="lora_only")
    with pytest.raises(Refusal, match=r"c_attn is offloaded .* training a bias"):
        attach(model, config)

    full = attach(base(), LoraConfig(r=2, target_modules=["embed_tokens"]))
    full.save_pretrained(tmp_path)
    model = base()
    offloaded(model)
    with pytest.raises(
        Refusal, match=r"embed_tokens\.base_layer\.weight: the model's own has no values"
    ):
        load(model, tmp_path)
    assert type(model) is type(base())


TOKENS = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 4])


def tied(tie: bool) -> Any:
    model = new_model("llama", tie_word_embeddings=tie).eval()
    shuffle(model.named_parameters(), 1)
    return model


@pytest.mark.parametrize("where", ["model.embed_tokens", "lm_head", ""])
def test_trained_tokens_of_ends_that_may_be_one_are_refused(
    calm: None, tmp_path: Path, where: str
) -> None:
    attach(tied(True), TOKENS).save_pretrained(tmp_path)
    model = tied(True)
    offloaded(model.get_submodule(where))

    with pytest.raises(Refusal) as refused:
        load(model, tmp_path)

    ends = [where] if where else ["model.embed_tokens", "lm_head"]
    for told, end in zip(refused.value.reasons, ends, strict=True):
        assert told.startswith(f"{end} is offloaded by accelerate") and "share" in told
    assert type(model) is type(base())


def test_trained_tokens_of_ends_that_are_two_are_loaded(calm: None, tmp_path: Path) -> None:
    trained = attach(tied(False), TOKENS)
    shuffle(((n, p) for n, p in trained.named_parameters() if ".adapters." in n), 2)
    trained.save_pretrained(tmp_path)
    model = tied(False)
    offloaded(model)

    load(model, tmp_path)

    ids = torch.tensor([[3, 4, 5, 3]])
    with torch.no_grad():
        found = model(ids).logits
        assert_close(found, trained.eval()(ids).logits)
        assert_differs(found, tied(False)(ids).logits)


@pytest.mark.parametrize("config", CONFIGS[:2] + CONFIGS[4:], ids=repr)
def test_hooks_come_and_go_while_adapters_are_there(calm: None, config: Any) -> None:
    inputs = model_inputs("llama")
    wanted, plain = two(base(), config), base()
    with torch.no_grad():
        adapted, alone = wanted(**inputs).logits, plain(**inputs).logits

        model = two(base(), config)
        for module in list(model.modules()):  # hooks after adapters
            add_hook_to_module(module, accelerate.hooks.ModelHook())
        assert_close(model(**inputs).logits, adapted)
        assert torch.equal(model.unload()(**inputs).logits, alone)

        model = base()
        aligned(model)
        two(model, config)
        remove_hook_from_submodules(model)  # hooks gone before adapters
        assert_close(model(**inputs).logits, adapted)
        assert torch.equal(model.unload()(**inputs).logits, alone)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, target_modules=["q_proj", "o_proj"]),
        LoraConfig(r=2, target_modules=["o_proj"], modules_to_save=["q_proj"]),
        LoraConfig(r=2, target_parameters=["q_proj.weight", "o_proj.weight"]),
    ],
    ids=repr,
)
@pytest.mark.parametrize("hooked", [False, True])
def test_a_forward_of_another_hand_is_refused(
    calm: None, tmp_path: Path, config: Any, hooked: bool
) -> None:
    model = base()
    layer = model.model.layers[1].self_attn.q_proj
    plain = layer.forward

    def tp_forward(x: Any) -> Any:
        return plain(x)

    layer.forward = tp_forward
    if hooked:
        aligned(model)

    with pytest.raises(Refusal, match=r"tp_forward has replaced the forward of this Linear") as no:
        attach(model, config)

    assert "model.layers.1.self_attn.q_proj" in str(no.value)
    assert type(layer) is nn.Linear
    assert type(model) is type(base()) and next(model.parameters()).requires_grad
    attach(base(), copy.deepcopy(config)).save_pretrained(tmp_path)
    with pytest.raises(Refusal, match=r"model\.layers\.1\.self_attn\.q_proj\S*: .*tp_forward"):
        load(model, tmp_path)
