"""The tuners against PEFT's: the same numbers, from each other's files, also in training."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config as PeftIA3
from peft import LoraConfig as PeftLora
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from infold.tuners import IA3Config, LoraConfig, attach, load
from peft_oracle import Bench, assert_close, assert_differs, shuffle
from tiny_models import MODELS as TINY
from tiny_models import model_inputs, new_model
from tuner_cases import IA3, LORA, MODELS

FILE = "adapter_model.safetensors"
CASES = [("ia3", name) for name in IA3] + [("lora", name) for name in LORA]
ids = [f"{method}-{name}" for method, name in CASES]


def case(method: str, name: str) -> tuple[nn.Module, Tensor, dict[str, Any]]:
    """A base with random weights, its input, and the config's fields."""
    kind, fields = (IA3 if method == "ia3" else LORA)[name]
    build, x = MODELS[kind]
    torch.manual_seed(0)
    base = build()
    shuffle(base.named_parameters(), 1)
    return base.eval(), x, copy.deepcopy(fields)


def ours(method: str, fields: dict[str, Any]) -> Any:
    return IA3Config(**fields) if method == "ia3" else LoraConfig(**fields)


def peft_config(method: str, fields: dict[str, Any]) -> Any:
    return PeftIA3(**fields) if method == "ia3" else PeftLora(**fields)


def trained(model: Any) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


@pytest.mark.parametrize(("method", "name"), CASES, ids=ids)
def test_an_adapter_of_peft_loads_here_and_gives_the_same_numbers(
    bench: Bench, method: str, name: str
) -> None:
    base, x, fields = case(method, name)
    theirs = bench.attach(copy.deepcopy(base), peft_config(method, fields))
    folder = bench.save(theirs)
    before, wanted = base(x), theirs(x)

    model = load(copy.deepcopy(base), folder)

    assert_close(model(x), wanted, 1e-6)
    assert_differs(before, wanted)
    with model.disable_adapter():
        assert torch.equal(model(x), before)


@pytest.mark.parametrize(("method", "name"), CASES, ids=ids)
def test_an_adapter_from_here_loads_in_peft_and_gives_the_same_numbers(
    bench: Bench, method: str, name: str
) -> None:
    base, x, fields = case(method, name)
    model = attach(copy.deepcopy(base), ours(method, fields)).eval()
    shuffle(trained(model), 2)
    folder = bench.place("adapter")
    model.save_pretrained(folder)

    theirs = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()

    assert_close(theirs(x), model(x), 1e-6)
    assert_differs(base(x), model(x))


@pytest.mark.parametrize(("method", "name"), CASES, ids=ids)
def test_the_same_parameters_are_trained_and_nothing_changes_at_the_start(
    calm: None, method: str, name: str
) -> None:
    base, x, fields = case(method, name)
    theirs = get_peft_model(copy.deepcopy(base), peft_config(method, fields))

    model = attach(copy.deepcopy(base), ours(method, fields)).eval()

    shapes = sorted(tuple(p.shape) for _, p in trained(model))
    assert shapes == sorted(tuple(p.shape) for _, p in trained(theirs))
    assert model.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    if fields.get("init_lora_weights") is not False and fields.get("init_ia3_weights") is not False:
        assert_close(model(x), base(x), 1e-6)


@pytest.mark.parametrize(("method", "name"), CASES, ids=ids)
def test_merged_and_unmerged_are_the_same_model_and_unmerging_is_exact(
    calm: None, method: str, name: str
) -> None:
    base, x, fields = case(method, name)
    model = attach(copy.deepcopy(base), ours(method, fields)).eval()
    shuffle(trained(model), 2)
    wanted, before = model(x), base(x)

    model.merge_adapter()
    assert_close(model(x), wanted)
    with model.disable_adapter():
        assert torch.equal(model(x), before)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(x), before)
    assert torch.equal(model(x), wanted)
    plain = model.merge_and_unload()

    assert type(plain) is type(base)
    assert plain.state_dict().keys() == base.state_dict().keys()
    assert_close(plain(x), wanted)


@pytest.mark.parametrize(
    "name", ["linear-both", "linear-dora", "embedding", "conv2d", "linear-saved"]
)
def test_twenty_steps_of_lora_have_the_losses_of_peft(bench: Bench, name: str) -> None:
    assert_same_training(bench, "lora", name)


@pytest.mark.parametrize("name", ["linear-both", "conv1d-layer-both", "conv2d-groups-mixed"])
def test_twenty_steps_of_ia3_have_the_losses_of_peft(bench: Bench, name: str) -> None:
    assert_same_training(bench, "ia3", name)


def assert_same_training(bench: Bench, method: str, name: str) -> None:
    base, x, fields = case(method, name)
    start = get_peft_model(copy.deepcopy(base), peft_config(method, fields))
    folder = bench.save(start)
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), folder, is_trainable=True)
    model = load(copy.deepcopy(base), folder, trainable=True)

    wanted, found = losses(theirs, x), losses(model, x)

    assert wanted[-1] < 0.95 * wanted[0]
    assert found == pytest.approx(wanted, abs=1e-5)


def losses(model: Any, x: Tensor) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW((p for _, p in trained(model)), lr=2e-2, eps=1e-6)
    goal = torch.sin(torch.arange(model(x).numel())).view(model(x).shape)
    found = []
    for _ in range(20):
        loss = nn.functional.mse_loss(model(x), goal)
        found.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return found


ARCHITECTURES = ("llama", "qwen2", "gemma2", "gpt2", "opt", "gptj", "gpt_neox", "bloom", "falcon")


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "t5", "bert", "roberta"])
@pytest.mark.parametrize("method", ["ia3", "lora"])
def test_architectures_with_default_targets_agree_with_peft(
    bench: Bench, architecture: str, method: str
) -> None:
    base = new_model(architecture).eval()
    shuffle(base.named_parameters(), 1)
    inputs = model_inputs(architecture)
    theirs = bench.attach(copy.deepcopy(base), peft_config(method, {}))
    folder = bench.save(theirs)
    model = attach(copy.deepcopy(base), ours(method, {})).eval()
    count = model.get_nb_trainable_parameters()
    model.load_adapter(folder, "theirs")
    model.set_adapter("theirs")

    assert_close(model(**inputs).logits, theirs(**inputs).logits, 1e-6)
    assert count == (theirs.get_nb_trainable_parameters()[0], count[1])
    assert type(model).__name__ == type(base).__name__
    own = {n for n, _ in model.named_parameters() if ".adapters." not in n}
    assert own == {n for n, _ in base.named_parameters()}


@pytest.mark.parametrize("targets", [["query", "dense"], "all-linear"])
def test_what_lies_in_a_trained_head_is_no_target(bench: Bench, targets: Any) -> None:
    """RoBERTa's classifier has a `dense` of its own; PEFT trains the classifier whole."""
    from safetensors.torch import load_file

    base = AutoModelForSequenceClassification.from_config(TINY["roberta"]).eval()
    fields = dict(r=2, task_type="SEQ_CLS", target_modules=targets)
    theirs = bench.attach(copy.deepcopy(base), PeftLora(**fields))
    folder = bench.save(theirs)
    model = attach(copy.deepcopy(base), LoraConfig(**fields))
    model.save_pretrained(bench.folder / "ours")

    keys = [set(load_file(f / FILE)) for f in (bench.folder / "ours", folder)]
    assert keys[0] == keys[1] and any("classifier" in key for key in keys[0])
    x = model_inputs("roberta")
    assert_close(load(base, folder)(**x).logits, theirs(**x).logits, 1e-6)


def test_a_folder_from_here_is_what_peft_writes(tmp_path: Path, calm: None) -> None:
    from safetensors.torch import load_file

    base, _, fields = case("lora", "linear-both-patterns")
    theirs = get_peft_model(copy.deepcopy(base), PeftLora(**fields))
    theirs.save_pretrained(tmp_path / "theirs")
    attach(base, LoraConfig(**fields)).save_pretrained(tmp_path / "ours")

    one = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    two = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    assert {k: v.shape for k, v in one.items()} == {k: v.shape for k, v in two.items()}
    ours_again = LoraConfig.from_pretrained(tmp_path / "theirs")
    ours_again.target_modules.sort()  # PEFT writes a set
    assert ours_again == LoraConfig(**fields, inference_mode=True)
    assert PeftLora.from_pretrained(tmp_path / "ours").rank_pattern == fields["rank_pattern"]


def test_the_gradient_in_attention_is_that_of_what_runs(calm: None) -> None:
    """PEFT adds out_proj's update twice, and lets the gradient through one of them only."""
    base, x, fields = case("lora", "mha")
    model = attach(base.double(), LoraConfig(**fields))
    shuffle(trained(model), 2)
    x = x.double()

    for name, parameter in trained(model):
        model(x).square().sum().backward()
        slope = parameter.grad.flatten()[0].item()
        with torch.no_grad():
            values = []
            for step in (1e-6, -2e-6):
                parameter.view(-1)[0] += step
                values.append(model(x).square().sum().item())
            parameter.view(-1)[0] += 1e-6
        model.zero_grad()
        assert slope == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5, abs=1e-7), name
