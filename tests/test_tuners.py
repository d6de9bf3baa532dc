"""The tuners' own promises: exact merging and unmerging, rows of a batch, refusals, habits."""

from __future__ import annotations

import copy
import io
import pickle
import signal
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import infold
from infold.adapters import METHODS, Settings, merge
from infold.errors import Refusal
from infold.tuners import IA3Config, LoraConfig, attach, load
from infold.tuners.layers import Adapted
from peft_oracle import Bench, assert_close, assert_differs, read_tensors, shuffle
from tiny_models import model_inputs, new_model
from tuner_cases import IA3, LORA, MODELS, Conv, Mlp

BOTH = [("ia3", IA3Config), ("lora", LoraConfig)]


def tuned(architecture: str, config: Any, dtype: torch.dtype = torch.float32) -> Any:
    """A tiny model with random weights and a random adapter."""
    model = new_model(architecture).to(dtype).eval()
    shuffle(model.named_parameters(), 1)
    return randomized(attach(model, config), 2)


def randomized(model: Any, seed: int) -> Any:
    shuffle(((n, p) for n, p in model.named_parameters() if p.requires_grad), seed)
    return model.eval()


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the base's tensors."""
    return {n: p.clone() for n, p in model.state_dict().items() if ".adapters." not in n}


def assert_same_bits(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    different = [n for n in one if not torch.equal(_bits(one[n]), _bits(two[n]))]
    assert different == []


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int16 if x.element_size() == 2 else torch.int32)


# --- the same bytes in memory and on disk --------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2", "t5", "bert"])
@pytest.mark.parametrize("method", ["ia3", "lora", "dora"])
def test_merging_in_memory_gives_the_bytes_of_infold_merge(
    bench: Bench, method: str, architecture: str, dtype: torch.dtype
) -> None:
    config = IA3Config() if method == "ia3" else LoraConfig(r=4, use_dora=method == "dora")
    model = tuned(architecture, config, dtype)
    adapter, base = bench.place("adapter"), bench.place("base")
    model.save_pretrained(adapter)
    copy.deepcopy(model).unload().save_pretrained(base)
    on_disk = bench.merge(base, adapter)

    plain = model.merge_and_unload()
    plain.save_pretrained(bench.folder / "memory")

    in_memory = read_tensors(bench.folder / "memory")
    assert_same_bits(in_memory, on_disk.tensors)
    changed = [n for n, t in read_tensors(base).items() if not torch.equal(t, in_memory[n])]
    assert len(changed) >= 2


@pytest.mark.parametrize("name", ["conv2d-groups-mixed", "conv3d-in", "conv1d-layer-both"])
def test_other_layers_merge_to_the_bytes_of_infold_merge_ia3(bench: Bench, name: str) -> None:
    assert_layers_merge_alike(bench, IA3Config, *IA3[name])


@pytest.mark.parametrize(
    "name",
    ["linear-lora-bias", "linear-bias-all", "embedding-dora", "conv3d-dora", "mha", "linear-saved"],
)
def test_other_layers_merge_to_the_bytes_of_infold_merge_lora(bench: Bench, name: str) -> None:
    assert_layers_merge_alike(bench, LoraConfig, *LORA[name])


def assert_layers_merge_alike(bench: Bench, kind: Any, model: str, fields: Any) -> None:
    base = MODELS[model][0]().to(torch.bfloat16)
    folder, adapter = bench.base(base), bench.place("adapter")
    attached = randomized(attach(base, kind(**fields)), 2)
    attached.save_pretrained(adapter)

    on_disk = bench.merge(folder, adapter)

    assert_same_bits(dict(attached.merge_and_unload().state_dict()), on_disk.tensors)


# --- unmerging -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("config", [IA3Config(), LoraConfig(), LoraConfig(use_dora=True)])
def test_ten_cycles_leave_every_bit_of_the_base(
    calm: None, config: Any, dtype: torch.dtype
) -> None:
    model = tuned("llama", config, dtype)
    before = weights(model)
    first: dict[str, Tensor] = {}

    for _ in range(10):
        model.merge_adapter()
        first = first or weights(model)
        assert_same_bits(weights(model), first)
        model.unmerge_adapter()
        assert_same_bits(weights(model), before)
    assert any(not torch.equal(first[n], before[n]) for n in first)


def test_scales_of_zero_are_taken_back(calm: None) -> None:
    model = tuned("llama", IA3Config(), torch.bfloat16)
    before = weights(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("ia3_l"):
                parameter.view(-1)[::2] = 0

    model.merge_adapter()
    assert not model.model.layers[0].self_attn.v_proj.weight[::2].any()
    model.unmerge_adapter()

    assert_same_bits(weights(model), before)


def test_several_adapters_come_out_in_another_order(calm: None) -> None:
    model = tuned("llama", LoraConfig(r=4), torch.bfloat16)
    before = weights(model)
    randomized(attach(model, IA3Config(), "scales"), 3)
    randomized(attach(model, LoraConfig(r=2, target_modules=["v_proj"]), "small"), 4)

    model.merge_adapter(["default", "scales", "small"])
    together = weights(model)
    model.unmerge_adapter(["scales"])
    without = weights(model)
    model.unmerge_adapter(["default"])
    model.merge_adapter(["scales"])
    model.unmerge_adapter(["small"])
    model.unmerge_adapter(["scales"])

    assert_same_bits(weights(model), before)
    model.merge_adapter(["default", "small"])
    assert_same_bits(weights(model), without)
    model.unmerge_adapter()
    model.merge_adapter(["default", "scales", "small"])
    assert_same_bits(weights(model), together)


def test_deleting_a_merged_adapter_takes_it_out_of_the_weights(calm: None) -> None:
    model = tuned("llama", LoraConfig(r=4))
    before = weights(model)
    model.merge_adapter()
    model.delete_adapter("default")

    assert_same_bits(weights(model), before)
    assert not any(isinstance(m, Adapted) for m in model.modules())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
@pytest.mark.parametrize("way", ["merge_adapter", "merge_and_unload"])
def test_what_is_not_finite_is_refused_and_nothing_changes(
    calm: None, way: str, value: float
) -> None:
    model = tuned("llama", LoraConfig(r=4), torch.float16)
    last = list(n for n, _ in model.named_parameters() if n.endswith("lora_B"))[-1]
    with torch.no_grad():
        model.get_parameter(last)[0, 0] = value
    before = weights(model)

    with pytest.raises(Refusal, match="v_proj"):
        getattr(model, way)()

    assert_same_bits(weights(model), before)
    assert model.active_adapters == ["default"]
    assert model.get_parameter(last).requires_grad


def test_a_refused_merge_leaves_what_was_merged_before(calm: None) -> None:
    model = tuned("llama", IA3Config(), torch.float16)
    attach(model, LoraConfig(r=2), "broken")
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.adapters["broken"].lora_B[0] = torch.nan
    model.merge_adapter(["default"])
    before = weights(model)

    with pytest.raises(Refusal, match="v_proj"):
        model.merge_adapter(["broken"])

    assert_same_bits(weights(model), before)


def test_merging_one_end_of_a_tie_unties_it(bench: Bench) -> None:
    from transformers import AutoModelForCausalLM

    model = new_model("llama", tie_word_embeddings=True).eval()
    shuffle(model.named_parameters(), 1)
    attach(model, LoraConfig(r=4, target_modules=["embed_tokens"]))
    wanted = randomized(model, 2)(**model_inputs("llama")).logits
    old = model.lm_head.weight.clone()

    with pytest.warns(UserWarning, match=r"untied: .*lm_head"):
        plain = model.merge_and_unload()
    plain.save_pretrained(bench.folder / "merged")
    again = AutoModelForCausalLM.from_pretrained(bench.folder / "merged").eval()

    assert torch.equal(again.lm_head.weight, old)
    assert_close(again(**model_inputs("llama")).logits, wanted)


@pytest.mark.parametrize("config", [IA3Config(), LoraConfig(r=4)])
def test_merging_for_good_writes_into_the_weights_it_has(calm: None, config: Any) -> None:
    """A second copy of what changes would be most of the model."""
    model = tuned("llama", config, torch.bfloat16)
    before = {n: (p, p.data_ptr()) for n, p in model.named_parameters() if ".adapters." not in n}

    plain = model.merge_and_unload()

    for name, parameter in plain.named_parameters():
        assert (parameter, parameter.data_ptr()) == (before[name][0], before[name][1])


def test_merging_for_good_keeps_off_memory_that_others_use(calm: None) -> None:
    model = tuned("llama", LoraConfig(r=4))
    layers = model.model.layers
    both = torch.zeros(2, *layers[0].self_attn.q_proj.weight.shape)
    for number in (0, 1):  # overlapping views of one tensor, one of them of a frozen layer
        layers[number].self_attn.q_proj.weight.data = both.view(-1)[: both[0].numel()].view_as(
            both[0]
        )
    plain = model.merge_and_unload()

    assert not both.any()
    assert not torch.equal(layers[0].self_attn.q_proj.weight, layers[1].self_attn.q_proj.weight)
    assert type(plain).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("config", [IA3Config(), LoraConfig(r=4, target_modules="all-linear")])
@pytest.mark.parametrize("where", ["here", "in a thread"])
def test_an_interrupted_merge_for_good_leaves_the_same_function(
    calm: None, monkeypatch: pytest.MonkeyPatch, architecture: str, config: Any, where: str
) -> None:
    """Qwen2's biases change together with their weights."""
    from infold.edit import tensor

    model = tuned(architecture, copy.deepcopy(config))
    inputs = model_inputs(architecture)
    wanted = model(**inputs).logits
    calls = 0

    def interrupted(*args: Any) -> None:
        nonlocal calls
        calls += 1
        mine = calls
        if mine == 3 and where == "here":
            main = threading.main_thread().ident
            assert main is not None
            signal.pthread_kill(main, signal.SIGINT)
        if mine == 3 and where == "in a thread":
            raise KeyboardInterrupt
        if mine >= 3 and where == "here":
            assert stopped.wait(5)
        compute(*args)

    def waiting(*args: Any) -> Any:  # the main thread has told the others to stop
        if calls >= 3:
            stopped.set()
        return wait(*args)

    stopped = threading.Event()
    compute, wait = tensor.compute, tensor.wait
    monkeypatch.setattr(tensor, "compute", interrupted)
    monkeypatch.setattr(tensor, "wait", waiting)
    monkeypatch.setattr(tensor, "usual_threads", lambda: 2)
    with pytest.raises(KeyboardInterrupt):
        model.merge_and_unload()

    left = [len(m.adapters) for m in model.modules() if isinstance(m, Adapted)]
    assert 0 < left.count(0) < len(left)
    assert_close(model(**inputs).logits, wanted)
    assert_close(model.merge_and_unload()(**inputs).logits, wanted)


@pytest.mark.parametrize("seed", range(5))
def test_no_merged_element_exceeds_the_bound(seed: int) -> None:
    """Where a method's bound were too small, a merge for good could stop half way."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random) * 10 ** (3 * torch.rand(1, generator=random))

    weight, bias, scaling = normal(8, 6).double(), normal(8).double(), -1.5
    for groups in (1, 2):
        cases = {
            "lora": {"lora_A": normal(4, 6), "lora_B": normal(8, 4 // groups)}
            | {"lora_bias": normal(8)},
            "ia3": {"ia3_l": normal(8, 1) / 5},
            "trainable_tokens": {"trainable_tokens_delta": normal(2, 6)},
        }
        for method, parts in cases.items():
            settings = Settings(scaling, 2, out=8, groups=groups, side="out", tokens=(1, 3))
            result = merge(
                method, weight.T if "tokens" in method else weight, bias, parts, settings
            )
            peak = max(weight.abs().max().item(), bias.abs().max().item())
            bound = METHODS[method].bound(peak, parts, settings)
            assert result.weight.abs().max() <= bound * (1 + 1e-6), method
            assert result.bias is not None and result.bias.abs().max() <= bound * (1 + 1e-6), method


# --- a row of the batch, its adapter -------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("llama", IA3Config()),
        ("gpt2", IA3Config()),
        ("t5", IA3Config()),
        ("llama", LoraConfig(r=4)),
        ("llama", LoraConfig(r=4, use_dora=True)),
        ("bert", LoraConfig(r=4, target_modules=["query", "word_embeddings"])),
    ],
)
@pytest.mark.parametrize("grad", [True, False])
def test_each_row_goes_through_its_own_adapter(
    calm: None, architecture: str, config: Any, grad: bool
) -> None:
    model = tuned(architecture, copy.deepcopy(config))
    randomized(attach(model, copy.deepcopy(config), "other"), 7)
    inputs = {k: v.repeat(2, 1) for k, v in model_inputs(architecture).items()}
    names = ["other", "__base__", "default", "other"]

    with torch.set_grad_enabled(grad):
        found = model(**inputs, adapter_names=names).logits

    for row, name in enumerate(names):
        alone = {k: v[row : row + 1] for k, v in inputs.items()}
        if name == "__base__":
            with model.disable_adapter():
                wanted = model(**alone).logits
        else:
            model.set_adapter(name)
            wanted = model(**alone).logits
        assert_close(found[row : row + 1], wanted)
    assert_differs(found[0], found[2])


def test_adapters_on_different_sides_and_modules_mix(calm: None) -> None:
    model = tuned("llama", IA3Config(target_modules=["up_proj"], feedforward_modules=["up_proj"]))
    other = IA3Config(target_modules=["up_proj", "v_proj"], feedforward_modules=[])
    randomized(attach(model, other, "outputs"), 5)
    randomized(attach(model, LoraConfig(r=2), "lora"), 6)
    ids = model_inputs("llama")["input_ids"]
    ids = torch.cat((ids, ids))
    names = ["lora", "outputs", "default", "__base__"]

    found = model(ids, adapter_names=names).logits

    for row, name in enumerate(names[:3]):
        model.set_adapter(name)
        assert_close(found[row], model(ids[row : row + 1]).logits[0])


@pytest.mark.parametrize("beams", [1, 2])
def test_generation_uses_the_rows_too(calm: None, beams: int) -> None:
    model = tuned("llama", IA3Config())
    randomized(attach(model, IA3Config(), "other"), 9)
    ids = model_inputs("llama")["input_ids"]
    options = dict(max_new_tokens=5, do_sample=False, num_beams=beams, eos_token_id=None)

    mixed = model.generate(ids, adapter_names=["default", "other"], **options)

    alone = []
    for row, name in enumerate(["default", "other"]):
        model.set_adapter(name)
        alone.append(model.generate(ids[row : row + 1], **options)[0])
    assert torch.equal(mixed, torch.stack(alone))


def _step(model: Any) -> None:
    ids = model_inputs("llama")["input_ids"]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=5.0)
    with torch.enable_grad():
        model(ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def _replace_values(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if ".adapters." in name:
            parameter.data = parameter.data * 1.5


def _write_values(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if ".adapters." in name:
            parameter.data.mul_(1.5)


def _other_of_that_name(model: Any) -> None:
    model.delete_adapter("default")
    randomized(attach(model, IA3Config(), "default"), 30)


CHANGES = {
    "an optimizer's step": _step,
    "other memory": _replace_values,
    "the same memory": _write_values,
    "another adapter": _other_of_that_name,
    "another one active": lambda model: model.set_adapter("other"),
    "another dtype": lambda model: model.to(torch.float64),
}


@pytest.mark.parametrize("rows", [2, 24])
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_kept_for_a_batch_is_never_out_of_date(calm: None, change: str, rows: int) -> None:
    model = tuned("llama", IA3Config())
    randomized(attach(model, IA3Config(), "other"), 9)
    model.set_adapter("default")
    ids = model_inputs("llama")["input_ids"].repeat(rows // 2, 1)
    names = ["default", "__base__"] * (rows // 2)
    with torch.no_grad():
        first = model(ids, adapter_names=names).logits

        CHANGES[change](model)

        second = model(ids, adapter_names=names).logits
    assert_close(second, model(ids, adapter_names=names).logits)
    model.set_adapter("default")
    assert_close(second[0], model(ids[:1]).logits[0])
    assert_close(first[1], second[1])
    if "another one" not in change and "dtype" not in change:
        assert_differs(first[0], second[0])
    assert not model._attached.rows.kept


@pytest.mark.parametrize("rows", [2, 24])
def test_other_names_and_gradients_see_nothing_of_an_earlier_batch(calm: None, rows: int) -> None:
    model = tuned("llama", IA3Config())
    randomized(attach(model, IA3Config(), "other"), 9)
    ids = model_inputs("llama")["input_ids"][:1].repeat(rows, 1)
    names = ["default", "other"] * (rows // 2)
    with torch.no_grad():
        first = model(ids, adapter_names=names).logits
        second = model(ids, adapter_names=names[::-1]).logits
    third = model.train()(ids, adapter_names=names[::-1]).logits

    assert_close(second, first.flip(0))
    assert_close(third, second)
    assert_differs(first[0], first[1])
    third.sum().backward()
    assert model.model.layers[0].self_attn.v_proj.adapters["other"].ia3_l.grad.any()


def test_rows_and_recomputed_layers_do_not_go_together(calm: None) -> None:
    """The backward pass would run the layers again, each row through the active adapter."""
    model = tuned("llama", IA3Config())
    attach(model, IA3Config(), "other")
    model.activation_checkpointing_enable()
    ids = model_inputs("llama")["input_ids"]
    options: dict[str, Any] = dict(adapter_names=["default", "other"])

    with pytest.raises(Refusal, match="switch it off"):
        model.train()(ids, **options)

    model.eval()(ids, **options)
    with torch.no_grad():
        model.train()(ids, **options)


def test_rows_are_trained_together(calm: None) -> None:
    model = tuned("llama", IA3Config())
    attach(model, IA3Config(), "other")
    model.set_adapter(["default", "other"])
    ids = model_inputs("llama")["input_ids"]

    model(ids, adapter_names=["default", "__base__"], labels=ids).loss.backward()

    moved = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved and all(".default." in name for name in moved)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["default", "nobody"], "no adapter nobody"),
        (["default"], "1 adapter_names for a batch of 2"),
    ],
)
def test_rows_without_an_adapter_are_refused(calm: None, names: list[str], message: str) -> None:
    model = tuned("llama", IA3Config())
    with pytest.raises(Refusal, match=message):
        model(**model_inputs("llama"), adapter_names=names)


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: IA3Config(target_modules=["a"], feedforward_modules=["b"]), "b are not among"),
        (lambda: IA3Config(target_modules="(", feedforward_modules=[]), "regular expression"),
        (lambda: LoraConfig(r=0), "r = 0"),
        (lambda: LoraConfig(lora_alpha=float("nan")), "lora_alpha"),
        (lambda: LoraConfig(lora_dropout=1.0), "lora_dropout"),
        (lambda: LoraConfig(init_lora_weights="pissa"), "pissa"),
        (lambda: LoraConfig(bias="some"), "bias = 'some'"),
        (lambda: LoraConfig(use_dora=True, lora_bias=True), "no defined meaning"),
        (lambda: LoraConfig(task_type="POETRY"), "POETRY"),
        (lambda: LoraConfig(rank_pattern={"a": -1}), "rank_pattern 'a' = -1"),
    ],
)
def test_configs_that_mean_nothing_are_refused(make: Any, message: str) -> None:
    with pytest.raises(Refusal, match=message):
        make()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoraConfig(target_modules=["lin9"]), "'lin9' means no module.*near it: lin"),
        (LoraConfig(target_modules=["lin0", "lin7"]), "'lin7' means no module"),
        (LoraConfig(target_modules=".*nothing"), "pattern '.*nothing' means no module"),
        (LoraConfig(target_modules=["lin0"], exclude_modules=["lin0"]), "no module is left"),
        (LoraConfig(target_modules=["lin0"], exclude_modules=["lin8"]), "exclude_modules: .*lin8"),
        (LoraConfig(target_modules=["lin0"], modules_to_save=["head"]), "modules_to_save: .*head"),
        (LoraConfig(target_modules=["act"]), "act is a Tanh, which takes no adapter"),
        (
            IA3Config(target_modules=".*lin0", feedforward_modules=".*lin1"),
            "lin1, which is no target|means no module",
        ),
    ],
)
def test_configs_that_do_not_suit_the_model_leave_it_alone(config: Any, message: str) -> None:
    model = Mlp()
    before = list(model.state_dict())

    with pytest.raises(Refusal, match=message):
        attach(model, config)

    assert type(model) is Mlp and list(model.state_dict()) == before
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", ["", "a.b", "__base__", "update", "training"])
def test_names_that_an_adapter_cannot_have_are_refused(name: str) -> None:
    model = Mlp()

    with pytest.raises(Refusal, match="cannot be called"):
        attach(model, LoraConfig(target_modules=["lin0"]), name)

    assert type(model) is Mlp


@pytest.mark.parametrize(
    ("model", "config", "message"),
    [
        ("conv2d-groups", LoraConfig(target_modules=["conv1"]), "2 groups"),
        ("mha", LoraConfig(target_modules=["out_proj"]), "name of the whole"),
        ("mha", LoraConfig(target_modules=["mha"], lora_dropout=0.1), "no lora_dropout"),
        ("mha", IA3Config(target_modules=["mha"], feedforward_modules=[]), "ia3 does not exist"),
        ("emb-conv1d", IA3Config(target_modules=["emb"], feedforward_modules=[]), "ia3 does not"),
        ("mlp-no-bias", LoraConfig(target_modules=["lin0"], lora_bias=True), "with a bias"),
    ],
)
def test_layers_that_take_no_such_adapter_are_refused(
    model: str, config: Any, message: str
) -> None:
    with pytest.raises(Refusal, match=message):
        attach(MODELS[model][0](), config)


def test_names_match_whole_components(calm: None) -> None:
    """PEFT takes `feedforward_modules=["v"]` for `kv` too."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.v, self.kv = nn.Linear(4, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.kv(self.v(x))

    model = attach(Two(), IA3Config(target_modules=["v", "kv"], feedforward_modules=["v"]))

    assert model.v.adapters["default"].ia3_l.shape == (1, 4)
    assert model.kv.adapters["default"].ia3_l.shape == (4, 1)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(
    "config",
    [
        IA3Config(target_modules=["conv0", "conv1"], feedforward_modules=["conv1"]),
        LoraConfig(r=3, target_modules=["conv0", "conv1"]),
    ],
)
def test_a_dilated_convolution_is_what_its_merged_weight_is(
    calm: None, config: Any, dims: int
) -> None:
    """PEFT's LoRA fails on them, and its IA³ knows no Conv1d."""
    x = torch.randn(4, 4, *(9,) * dims, generator=torch.Generator().manual_seed(1))
    model = randomized(attach(Conv(dims, dilation=2), copy.deepcopy(config)), 2)
    wanted = model(x)

    with model.disable_adapter():
        assert not torch.allclose(model(x), wanted, atol=1e-3)
    assert_close(model.merge_and_unload()(x), wanted, 1e-5)


def test_targets_that_were_found_are_told(
    calm: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    attach(new_model("llama"), IA3Config())
    assert capsys.readouterr() == ("", "infold: ia3 on down_proj (its inputs), k_proj, v_proj\n")

    attach(new_model("llama"), LoraConfig(target_modules=["k_proj"]))
    monkeypatch.setenv("RANK", "1")
    attach(new_model("llama"), LoraConfig())
    assert capsys.readouterr() == ("", "")


def test_fan_in_fan_out_is_what_the_layers_say() -> None:
    """PEFT, too, would correct it, and warn, whenever it loads the adapter."""
    for kind, wrong in (("gpt2", False), ("llama", True)):
        model = new_model(kind)
        config = LoraConfig(r=2, fan_in_fan_out=wrong)
        with pytest.warns(UserWarning, match=f"fan_in_fan_out is set to {not wrong}"):
            attach(model, config)
        assert model.peft_config["default"].fan_in_fan_out is not wrong
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            attach(new_model(kind), LoraConfig(r=2, fan_in_fan_out=not wrong))


def test_an_adapter_that_began_in_another_way_is_loaded_but_none_begins_so(bench: Bench) -> None:
    from peft import LoraConfig as PeftConfig
    from peft import PeftModel, get_peft_model

    base = new_model("llama")
    made = get_peft_model(copy.deepcopy(base), PeftConfig(r=4, init_lora_weights="orthogonal"))
    randomized(made, 5).save_pretrained(bench.folder / "a")
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), bench.folder / "a").eval()

    ours = load(copy.deepcopy(base), bench.folder / "a").eval()

    inputs = model_inputs("llama")
    assert_close(ours(**inputs).logits, theirs(**inputs).logits, 1e-6)
    with pytest.raises(Refusal, match="'orthogonal' is not known here; adapters that began so"):
        attach(base, LoraConfig(init_lora_weights="orthogonal"))


def test_what_peft_would_read_otherwise_is_saved_as_a_pattern(bench: Bench) -> None:
    from peft import PeftModel

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.v, self.kv = nn.Linear(4, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.kv(self.v(x))

    base, x = Two(), torch.randn(3, 4)
    plain = copy.deepcopy(base)
    config = IA3Config(target_modules=["v", "kv"], feedforward_modules=["v"])
    model = randomized(attach(base, config), 3)
    model.save_pretrained(bench.folder / "a")

    theirs = PeftModel.from_pretrained(copy.deepcopy(plain), bench.folder / "a")

    assert_close(theirs(x), model(x), 1e-6)
    assert_close(load(plain, bench.folder / "a")(x), model(x), 1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({"base_model.model.lin7.lora_A.weight": torch.ones(8, 10)}), "lin7"),
        (lambda t: t.pop("base_model.model.lin0.lora_B.weight"), "needs lora_A, lora_B"),
        (lambda t: t.update({"base_model.model.act.weight": torch.ones(1)}), "act.weight"),
        (
            lambda t: t.update({"base_model.model.lin0.lora_A.weight": torch.ones(8, 11)}),
            r"shape \[8, 11\]",
        ),
        (lambda t: t.clear() or t.update(x=torch.ones(1)), "x: has no place"),
    ],
)
def test_files_with_tensors_that_do_not_fit_are_refused(
    tmp_path: Path, change: Any, message: str
) -> None:
    from safetensors.torch import load_file, save_file

    attach(Mlp(), LoraConfig(target_modules=["lin0"])).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    model = Mlp()

    with pytest.raises(Refusal, match=message):
        load(model, tmp_path)

    assert type(model) is Mlp and all(p.requires_grad for p in model.parameters())


# --- habits --------------------------------------------------------------------------------------


def test_the_model_keeps_its_names_and_its_class(calm: None) -> None:
    base = new_model("llama")
    names, cls = list(dict(base.named_parameters())), type(base)

    model = attach(base, LoraConfig())

    assert model is base and isinstance(model, cls) and type(model).__name__ == cls.__name__
    assert [n for n, _ in model.named_parameters() if ".adapters." not in n] == names
    assert model.unload() is base and type(base) is cls
    assert list(dict(base.named_parameters())) == names
    assert all(p.requires_grad for p in base.parameters())


@pytest.mark.parametrize("config", [IA3Config(), LoraConfig(r=2, modules_to_save=["lm_head"])])
def test_deepcopy_and_pickle_keep_adapters(config: Any, calm: None) -> None:
    model = tuned("llama", copy.deepcopy(config))
    inputs = model_inputs("llama")
    wanted = model(**inputs).logits

    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(**inputs).logits, wanted)
        with other.disable_adapter(), model.disable_adapter():
            assert torch.equal(other(**inputs).logits, model(**inputs).logits)
        other.unload()
        assert torch.equal(model(**inputs).logits, wanted)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)


def test_several_adapters_are_saved_in_folders_of_their_names(tmp_path: Path, calm: None) -> None:
    model = tuned("llama", LoraConfig(r=2))
    randomized(attach(model, IA3Config(), "scales"), 4)
    wanted = model(**model_inputs("llama")).logits
    model.save_pretrained(tmp_path)
    fresh = new_model("llama").eval()
    shuffle(fresh.named_parameters(), 1)

    again = load(fresh, tmp_path / "scales")

    assert torch.equal(again(**model_inputs("llama")).logits, wanted)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "scales",
    ]


def test_active_adapters_in_a_row_are_what_merging_them_in_a_row_gives(calm: None) -> None:
    model = tuned("llama", LoraConfig(r=4))
    randomized(attach(model, IA3Config(), "scales"), 4)
    dora = LoraConfig(r=2, use_dora=True, target_modules=["v_proj", "o_proj"])
    randomized(attach(model, dora, "dora"), 5)
    model.set_adapter(["default", "scales", "dora"])
    wanted = model(**model_inputs("llama")).logits

    plain = model.merge_and_unload()

    assert_close(plain(**model_inputs("llama")).logits, wanted)


def test_trainable_parameters_are_printed_as_in_peft(
    calm: None, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft import LoraConfig as PeftLora
    from peft import get_peft_model

    get_peft_model(new_model("llama"), PeftLora(r=4)).print_trainable_parameters()
    theirs = capsys.readouterr().out
    attach(new_model("llama"), LoraConfig(r=4)).print_trainable_parameters()

    assert capsys.readouterr().out == theirs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("config", [IA3Config(), LoraConfig(), LoraConfig(use_dora=True)])
def test_a_16_bit_base_is_trained_in_float32_and_keeps_its_dtype(
    calm: None, config: Any, dtype: torch.dtype
) -> None:
    model = attach(new_model("llama").to(dtype), copy.deepcopy(config))
    out = model(**model_inputs("llama"), labels=model_inputs("llama")["input_ids"])
    out.loss.backward()

    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert out.logits.dtype == dtype
    assert all(g is not None and g.dtype == torch.float32 for g in grads)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(("method", "kind"), BOTH)
def test_gradient_checkpointing_gives_the_same_gradients(
    calm: None, method: str, kind: Any, reentrant: bool
) -> None:
    def gradients(checkpointing: bool) -> list[Tensor]:
        model = tuned("llama", kind()).train()
        if checkpointing:
            options = {"use_reentrant": reentrant}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
            model.enable_input_require_grads()
        ids = model_inputs("llama")["input_ids"]
        model(ids, labels=ids).loss.backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    for one, two in zip(gradients(False), gradients(True), strict=True):
        assert_close(one, two, 1e-6)


@pytest.mark.parametrize(("method", "kind"), BOTH)
def test_torch_compile_sees_what_is_active(calm: None, method: str, kind: Any) -> None:
    model = tuned("llama", kind())
    inputs = model_inputs("llama")
    wanted = model(**inputs).logits
    with model.disable_adapter():
        base = model(**inputs).logits

    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)

    with torch.no_grad():
        assert_close(compiled(**inputs).logits, wanted)
        with model.disable_adapter():
            assert_close(compiled(**inputs).logits, base)
        assert_close(compiled(**inputs).logits, wanted)


def test_encoder_layers_of_torch_do_not_take_their_fast_path_around_adapters(calm: None) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        base = layer(x)
        model = randomized(attach(layer, LoraConfig(target_modules=["linear1", "self_attn"])), 2)
        found = model(x)
    slow = model(x).detach()  # with gradients there is no fast path

    assert_close(found, slow)
    assert_differs(found, base)


# --- the seam ------------------------------------------------------------------------------------


def test_every_method_is_the_same_on_activations_and_on_weights(calm: None) -> None:
    """The conformance of the seam, for all methods that there are, on each kind of layer."""
    seen = set()
    tokens = ("emb-conv1d", dict(trainable_token_indices={"emb": [4, 7], "lin0": [2, 0]}, r=2))
    tokens[1]["target_modules"] = ["conv1d"]
    cases = LORA | {"tokens": tokens}
    for table, kind in ((IA3, IA3Config), (cases, LoraConfig)):
        for model, fields in table.values():
            build, x = MODELS[model]
            adapted = randomized(attach(build().double(), kind(**fields)), 5)
            seen |= {
                a.method
                for m in adapted.modules()
                if isinstance(m, Adapted)
                for a in m.adapters.values()
            }
            wanted = adapted(x if x.dtype == torch.int64 else x.double())
            plain = adapted.merge_and_unload()
            assert_close(plain(x if x.dtype == torch.int64 else x.double()), wanted, 1e-12)
    assert seen == set(METHODS)


# --- several adapters into one -------------------------------------------------------------------


def with_two(config: Any, other: Any) -> Any:
    model = tuned("llama", config)
    return randomized(attach(model, other, "other"), 3)


@pytest.mark.parametrize(
    "kind", ["svd", "linear", "cat", "ties", "dare_linear", "magnitude_prune_svd"]
)
def test_combining_in_memory_is_combining_files_lora(bench: Bench, kind: str) -> None:
    pruned: dict[str, Any] = {} if kind in ("svd", "linear", "cat") else {"density": 0.5}
    if kind == "svd":
        pruned |= {"svd_rank": 3, "svd_clamp": 0.9}
    model = with_two(LoraConfig(r=4), LoraConfig(r=4, lora_alpha=3))
    folder = bench.place("both")
    model.save_pretrained(folder)

    model.add_weighted_adapter(["default", "other"], [0.7, -0.4], "sum", kind, **pruned)

    model.save_pretrained(folder, selected_adapters=["sum"])
    infold.combine(
        [folder, folder / "other"],
        bench.folder / "wanted",
        weights=[0.7, -0.4],
        kind=kind,
        **pruned,
    )
    assert_same_bits(read_tensors(folder / "sum"), read_tensors(bench.folder / "wanted"))


@pytest.mark.parametrize("kind", ["linear", "cat", "svd"])
def test_combining_in_memory_is_what_peft_does_lora(calm: None, kind: str) -> None:
    import peft

    configs = [dict(r=4, lora_alpha=a, target_modules=["q_proj", "v_proj"]) for a in (8, 3)]
    model = with_two(*(LoraConfig(**c) for c in configs))
    theirs = peft.get_peft_model(copy.deepcopy(model).unload(), peft.LoraConfig(**configs[0]))
    theirs.add_adapter("other", peft.LoraConfig(**configs[1]))
    ours = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if ".lora_" in name:
                path, part, adapter = (
                    name.removeprefix("base_model.model.").split(".lora_")[0],
                    *(name.split(".lora_")[1].split(".")[:2]),
                )
                parameter.copy_(ours[f"{path}.adapters.{adapter}.lora_{part}"])

    for one in (model, theirs):
        one.add_weighted_adapter(["default", "other"], [0.7, 0.4], "sum", combination_type=kind)
        one.set_adapter("sum")

    inputs = model_inputs("llama")
    assert_close(model(**inputs).logits, theirs.eval()(**inputs).logits)


def test_an_untouched_layer_counts_as_one_in_memory_too(calm: None) -> None:
    model = with_two(
        IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
        IA3Config(target_modules=["v_proj"], feedforward_modules=[]),
    )
    attention = model.model.layers[0].self_attn

    model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "mean")

    own = attention.k_proj.adapters["default"].ia3_l
    mean = attention.k_proj.adapters["mean"].ia3_l
    assert_close(mean, 0.5 * own + 0.5)
    assert model.active_adapters == ["other"]
    assert not mean.requires_grad


def test_what_cannot_be_combined_leaves_the_model_alone(calm: None) -> None:
    model = with_two(LoraConfig(r=4), LoraConfig(r=2))
    before = {name: value.clone() for name, value in model.state_dict().items()}

    with pytest.raises(Refusal, match="ranks 4, 2: linear works element by element") as refused:
        model.add_weighted_adapter(["default", "other"], [1, 1], "sum", "linear")
    with pytest.raises(Refusal, match="there is no adapter missing"):
        model.add_weighted_adapter(["default", "missing"], [1, 1], "sum")
    with pytest.raises(Refusal, match="already"):
        model.add_weighted_adapter(["default"], [1], "other")

    assert not any("/tmp" in reason for reason in refused.value.reasons)
    assert_same_bits(dict(model.state_dict()), before)
    assert set(model.peft_config) == {"default", "other"}
