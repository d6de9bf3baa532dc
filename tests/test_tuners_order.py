"""What is merged, what is active, and what trains biases, in every order."""

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
from tuner_cases import MODELS

SCALES = IA3Config(target_modules=["lin0"], feedforward_modules=[])


def randomized(model: Any, seed: int) -> Any:
    shuffle(((n, p) for n, p in model.named_parameters() if p.requires_grad), seed)
    return model.eval()


def two(first: Any, second: Any) -> tuple[Any, torch.Tensor, nn.Module]:
    """A model with two random adapters, `a` and `b`, its input, and a copy of the base."""
    build, x = MODELS["mlp"]
    torch.manual_seed(0)
    base = build().eval()
    model = randomized(attach(copy.deepcopy(base), first, "a"), 1)
    model.add_adapter("b", second)
    model.set_adapter("b")
    return randomized(model, 2), x, base


@pytest.mark.parametrize("chosen", [None, ["b"]])
def test_merging_for_good_keeps_what_was_merged_before(calm: None, chosen: Any) -> None:
    model, x, base = two(SCALES, LoraConfig(target_modules=["lin1"]))
    model.merge_adapter(["a"])
    wanted = model(x)

    plain = model.merge_and_unload(adapter_names=chosen)

    assert_differs(base(x), wanted)
    assert_close(plain(x), wanted)


@pytest.mark.parametrize("merged", [(), ("b",), ("b", "a")])
def test_biases_are_trained_below_what_scales_them(calm: None, merged: tuple[str, ...]) -> None:
    model, x, base = two(SCALES, LoraConfig(target_modules=["lin1"], bias="all"))
    model.set_adapter(["b", "a"])
    wanted = model(x)
    model.set_adapter("a")  # so that the biases of `b` are not in force when it is merged
    model.merge_adapter(merged)
    model.set_adapter(["b", "a"])

    assert_close(model(x), wanted)
    with model.disable_adapter():
        assert torch.equal(model(x), base(x))
    model.unmerge_adapter()
    assert torch.equal(model(x), wanted)
    assert_close(model.merge_and_unload()(x), wanted)


def test_biases_that_would_replace_merged_ones_are_refused(calm: None) -> None:
    build, x = MODELS["mlp"]
    base = build().eval()
    model = randomized(attach(copy.deepcopy(base), SCALES, "a"), 1)
    model.merge_adapter()
    wanted, names = model(x), list(model.state_dict())

    with pytest.raises(Refusal, match=r"b replaces lin0.bias, which a changes before it"):
        attach(model, LoraConfig(target_modules=["lin1"], bias="all"), "b")

    assert list(model.state_dict()) == names and torch.equal(model(x), wanted)
    model.add_adapter("b", LoraConfig(target_modules=["lin1"], bias="all"))
    own = model._attached.biases["b"]
    assert all(torch.equal(own.others[n], p) for n, p in base.named_parameters() if n in own.others)
    with pytest.raises(Refusal, match="work would be lost; put b first"):
        model.set_adapter(["a", "b"])
    assert torch.equal(model(x), wanted)
    model.unload()
    assert all(torch.equal(p, base.get_parameter(n)) for n, p in model.named_parameters())


@pytest.mark.parametrize("own", [True, False])
def test_gradient_checkpointing_leaves_no_hook_behind(
    calm: None, tmp_path: Path, own: bool
) -> None:
    """The inputs of a model that recomputes its layers must require a gradient while it has
    adapters; if its owner wants that too, they go on."""
    model = new_model("llama").train()
    model.activation_checkpointing_enable()
    if own:
        model.enable_input_require_grads()
    embedding = model.get_input_embeddings()
    before = len(embedding._forward_hooks)

    with pytest.raises(Refusal):
        load(model, tmp_path / "nothing")
    assert len(embedding._forward_hooks) == before
    attach(model, LoraConfig())
    model(**model_inputs("llama"), labels=model_inputs("llama")["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.unload()

    assert len(embedding._forward_hooks) == before
