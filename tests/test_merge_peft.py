"""Merged weights do what PEFT does with the adapter beside the base; PEFT is the oracle.

All bases are random and tiny. Outputs are compared with PEFT's unmerged forward pass, and weights
with PEFT's merge_and_unload where that is right.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.pytorch_utils import Conv1D

from peft_oracle import (
    Bench,
    Merged,
    assert_close,
    assert_differs,
    assert_rounded_once,
    logits,
    read_tensors,
    shuffle,
)
from tiny_models import AUTO, MODELS, VISION_MODELS, model_inputs, new_model, token_ids

# --- single layers -----------------------------------------------------------------------------


class Net(nn.Module):
    """Named layers in a row, so that each has a path with a name like those of real models."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        self.body = nn.ModuleDict(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.body.values():
            x = torch.tanh(layer(x))
        return x


class SelfAttention(nn.Module):
    def __init__(self, heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, x, x)[0]


FILE = "model.safetensors"
CONVOLUTION = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def linear() -> Net:
    return Net(wide=nn.Linear(6, 10), square=nn.Linear(10, 10), plain=nn.Linear(10, 4, bias=False))


def conv1d() -> Net:
    return Net(wide=Conv1D(10, 6), narrow=Conv1D(4, 10))


def embedding() -> Net:
    return Net(emb=nn.Embedding(12, 6), out=nn.Linear(6, 4))


def attention() -> Net:
    return Net(one=SelfAttention(2), two=SelfAttention(4))


def convolution(dims: int, groups: int = 1) -> Callable[[], Net]:
    def make() -> Net:
        kernel = (3, 2, 1)[:dims]
        kind = CONVOLUTION[dims]
        return Net(conv=kind(4, 8, kernel, groups=groups), last=kind(8, 6, (2, 2, 1)[:dims]))

    return make


def pointwise() -> Net:
    return Net(conv=nn.Conv3d(4, 8, 1))


def inputs(kind: Callable[[], Net], model: Net) -> Tensor:
    random = torch.Generator().manual_seed(5)
    if kind is embedding:
        return torch.randint(0, 12, (3, 7), generator=random)
    first = next(iter(model.body.values()))
    if isinstance(first, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return torch.randn(2, 4, *(6,) * (first.weight.dim() - 2), generator=random)
    width = {linear: 6, conv1d: 6, attention: 8}[kind]
    return torch.randn(3, 5, width, generator=random)


def lora(*targets: str, **options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": list(targets)} | options)


def ia3(*targets: str, ff: tuple[str, ...] = (), **options: Any) -> IA3Config:
    return IA3Config(target_modules=list(targets), feedforward_modules=list(ff), **options)


class Layer(NamedTuple):
    make: Callable[[], Net]
    config: PeftConfig
    peft_merges: bool = True  # whether PEFT's merge_and_unload gives the weights that it should


LAYERS = {
    "lora linear": Layer(linear, lora("wide", "square", "plain")),
    "lora rslora": Layer(linear, lora("wide", "square", use_rslora=True)),
    "lora patterns": Layer(
        linear,
        lora(
            "wide", "square", "plain",
            rank_pattern={"square": 3, ".*plain": 2}, alpha_pattern={"^body.wide": 5, "plain": 1},
        ),
    ),
    "lora bias of B": Layer(linear, lora("wide", "square", lora_bias=True)),
    "lora trains all biases": Layer(linear, lora("square", bias="all")),
    "lora trains own biases": Layer(linear, lora("square", bias="lora_only")),
    "lora saves a module": Layer(linear, lora("square", modules_to_save=["plain", "wide"])),
    "lora Conv1D": Layer(conv1d, lora("wide", "narrow", fan_in_fan_out=True)),
    "lora Conv1D, saved flag wrong": Layer(conv1d, lora("wide", "narrow")),
    "lora Conv1D bias of B": Layer(conv1d, lora("wide", lora_bias=True, fan_in_fan_out=True)),
    "lora embedding": Layer(embedding, lora("emb", "out")),
    "lora conv1d": Layer(convolution(1), lora("conv", "last")),
    "lora conv2d": Layer(convolution(2), lora("conv", "last")),
    "lora conv2d bias of B": Layer(convolution(2), lora("conv", "last", lora_bias=True)),
    "lora conv3d": Layer(convolution(3), lora("conv", "last")),
    # PEFT takes a kernel of 1 x 1 for Conv2d's and cannot merge it
    "lora conv3d, kernel of 1": Layer(pointwise, lora("conv"), peft_merges=False),
    # PEFT adds the update of out_proj twice, in the forward pass as in the merge
    "lora attention": Layer(attention, lora("attn")),
    "lora attention patterns": Layer(
        attention, lora("attn", rank_pattern={"two.attn": 3}, alpha_pattern={"one.attn": 5})
    ),
    "dora linear": Layer(linear, lora("wide", "square", "plain", use_dora=True)),
    "dora rslora": Layer(linear, lora("wide", use_dora=True, use_rslora=True)),
    "dora Conv1D": Layer(conv1d, lora("wide", "narrow", use_dora=True, fan_in_fan_out=True)),
    "dora embedding": Layer(embedding, lora("emb", "out", use_dora=True)),
    "dora conv1d": Layer(convolution(1), lora("conv", "last", use_dora=True)),
    "dora conv2d": Layer(convolution(2), lora("conv", "last", use_dora=True)),
    "dora conv3d": Layer(convolution(3), lora("conv", "last", use_dora=True)),
    "ia3 linear": Layer(linear, ia3("wide", "square", "plain")),
    "ia3 linear ff": Layer(linear, ia3("wide", "square", ff=("wide", "square"))),
    "ia3 linear both": Layer(linear, ia3("wide", "square", "plain", ff=("square",))),
    "ia3 linear pattern": Layer(
        linear, IA3Config(target_modules=r".*(wide|plain)", feedforward_modules=r"body\.p.*")
    ),
    "ia3 saves a module": Layer(linear, ia3("square", modules_to_save=["plain"])),
    "ia3 Conv1D": Layer(conv1d, ia3("wide", "narrow", fan_in_fan_out=True)),
    "ia3 Conv1D ff": Layer(conv1d, ia3("wide", "narrow", ff=("narrow",), fan_in_fan_out=True)),
    "ia3 conv2d": Layer(convolution(2), ia3("conv", "last")),
    "ia3 conv2d ff": Layer(convolution(2), ia3("conv", "last", ff=("conv", "last"))),
    "ia3 conv2d, 2 groups": Layer(convolution(2, 2), ia3("conv")),
    "ia3 conv2d ff, 2 groups": Layer(convolution(2, 2), ia3("conv", ff=("conv",))),
    "ia3 conv2d ff, 4 groups": Layer(convolution(2, 4), ia3("conv", ff=("conv",))),
    "ia3 conv3d": Layer(convolution(3), ia3("conv", "last", ff=("last",))),
    "ia3 conv3d ff, 2 groups": Layer(convolution(3, 2), ia3("conv", ff=("conv",))),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_merged_layers_do_what_peft_does(bench: Bench, name: str) -> None:
    case = LAYERS[name]
    model = case.make()
    base = bench.base(model)
    x = inputs(case.make, model)
    with torch.no_grad():
        before = model.eval()(x)
        attached = bench.attach(model, case.config)
        wanted = attached(x)
    assert_differs(before, wanted)

    merged = bench.merge(base, bench.save(attached))

    fresh = case.make().eval()
    fresh.load_state_dict(merged.tensors)
    with torch.no_grad():
        assert_close(fresh(x), wanted)
    if case.peft_merges:
        for key, value in attached.merge_and_unload().state_dict().items():
            assert_close(merged.tensors[key], value, 1e-6)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("side", ["out", "in"])
def test_ia3_on_conv1d_follows_the_layout_that_peft_would_write(
    bench: Bench, side: str, groups: int
) -> None:
    """PEFT has no IA3 for Conv1d: the expected outputs are written out here."""
    conv = nn.Conv1d(4, 6, 3, groups=groups)
    base = bench.base(conv)
    channels = 6 if side == "out" else 4
    vector = 1 + 0.3 * torch.randn(1, channels, 1, generator=torch.Generator().manual_seed(3))
    adapter = bench.write_adapter(
        {"base_model.model.conv.ia3_l": vector},
        peft_type="IA3", target_modules=["conv"], feedforward_modules=["conv"] * (side == "in"),
    )  # fmt: skip
    tensors = {f"conv.{name}": value for name, value in load_file(base / FILE).items()}
    merged = bench.merge(bench.write(tensors), adapter)

    x = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        before = conv(x)
        wanted = before * vector if side == "out" else conv(x * vector)
        conv.load_state_dict({name[5:]: value for name, value in merged.tensors.items()})
        assert_differs(before, wanted)
        assert_close(conv(x), wanted)


# --- whole models ------------------------------------------------------------------------------

METHODS = {
    "lora": lambda: LoraConfig(r=3, lora_alpha=5, target_modules="all-linear"),
    "dora": lambda: LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", use_dora=True),
    "ia3": lambda: IA3Config(),  # the modules that PEFT names for each architecture
}


@pytest.mark.parametrize("method", ["lora", "ia3"])
@pytest.mark.parametrize("name", MODELS)
def test_merged_models_give_the_adapters_logits(bench: Bench, name: str, method: str) -> None:
    base = bench.base(new_model(name))
    kind = AUTO.get(name, AutoModelForCausalLM)

    merged = bench.prove(kind, base, METHODS[method](), model_inputs(name))

    assert_only_edits_differ(base, merged)


def test_dora_reaches_every_layer_of_gpt2(bench: Bench) -> None:
    base = bench.base(new_model("gpt2"))
    bench.prove(AutoModelForCausalLM, base, METHODS["dora"](), model_inputs("gpt2"))


@pytest.mark.parametrize("ff", [[], ["attn.c_proj"]], ids=["out", "in"])
def test_the_square_conv1d_of_gpt2_is_scaled_on_the_right_side(bench: Bench, ff: list[str]) -> None:
    config = IA3Config(target_modules=["attn.c_proj"], feedforward_modules=ff)
    base = bench.base(new_model("gpt2"))
    bench.prove(AutoModelForCausalLM, base, config, model_inputs("gpt2"))


def assert_only_edits_differ(base: Path, merged: Merged) -> None:
    """Bytes of side files, index and unedited tensors are the base's; every shard is there."""
    edited = {edit["tensor"] for edit in merged.receipt.edits}
    old = read_tensors(base)
    assert edited and old.keys() == merged.tensors.keys()
    for name, value in old.items():
        assert torch.equal(value, merged.tensors[name]) == (name not in edited), name
    ours = {file.name for file in merged.path.iterdir()} - {"infold-receipt.json"}
    assert ours == {file.name for file in base.iterdir()}
    assert len([name for name in ours if name.endswith(".safetensors")]) > 1
    for file in base.iterdir():
        if file.suffix != ".safetensors":
            assert (merged.path / file.name).read_bytes() == file.read_bytes(), file.name


# the adapters' options that change which layers they have, not what a layer does
OPTIONS: dict[str, dict[str, Any]] = {
    "some layers": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "but one": {"exclude_modules": ["q_proj"]},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal", "r": 4},
    "rank 1, negative alpha": {"r": 1, "lora_alpha": -3},
    "rank above the width": {"r": 40},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_other_options_of_lora_are_harmless(bench: Bench, name: str) -> None:
    config = LoraConfig(**{"r": 3, "target_modules": ["q_proj", "v_proj"]} | OPTIONS[name])
    bench.prove(AutoModelForCausalLM, bench.base(new_model("qwen2")), config, model_inputs("qwen2"))


@pytest.mark.filterwarnings("ignore:.* changes the base weights of the model:UserWarning")
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_that_peft_converted_to_plain_lora_is_merged(bench: Bench, init: str) -> None:
    """PiSSA and OLoRA change the base; PEFT can turn them into LoRA of twice the rank."""
    base = bench.base(new_model("llama"))
    config = LoraConfig(r=3, target_modules=["q_proj", "down_proj"], init_lora_weights=init)
    attached = get_peft_model(bench.load(AutoModelForCausalLM, base), config)
    start = bench.place("start")
    attached.peft_config["default"].init_lora_weights = True
    attached.save_pretrained(start)
    attached.peft_config["default"].init_lora_weights = init
    shuffle([(n, p) for n, p in attached.named_parameters() if "lora_A" in n], seed=8)
    wanted = logits(attached.eval(), model_inputs("llama"))
    adapter = bench.place("adapter")
    attached.save_pretrained(adapter, path_initial_model_for_weight_conversion=str(start))

    merged = bench.merge(base, adapter)

    assert_close(
        logits(bench.load(AutoModelForCausalLM, merged.path), model_inputs("llama")), wanted
    )


def test_an_adapter_in_a_pickle_gives_the_same_bytes(bench: Bench) -> None:
    base = bench.base(new_model("llama"))
    attached = bench.attach(bench.load(AutoModelForCausalLM, base), METHODS["lora"]())
    adapter = bench.save(attached)
    old = bench.place("adapter")
    attached.save_pretrained(old, safe_serialization=False)
    assert (old / "adapter_model.bin").exists()
    one, two = bench.merge(base, adapter), bench.merge(base, old)
    assert one.receipt.shards == two.receipt.shards


# --- models with a vision tower: in memory other names than on disk ----------------------------

VISION = {
    "queries": lambda: LoraConfig(r=3, target_modules=["q_proj"]),  # of both towers
    "head": lambda: LoraConfig(r=3, target_modules=["lm_head"]),
    "embedding": lambda: LoraConfig(r=3, target_modules=["embed_tokens"]),
    "ia3": lambda: IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "tokens": lambda: LoraConfig(
        r=3, target_modules=["v_proj"], trainable_token_indices=list(range(31))
    ),
}


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", VISION)
@pytest.mark.parametrize("model", VISION_MODELS)
def test_models_with_a_vision_tower(bench: Bench, model: str, name: str, tie: bool) -> None:
    torch.manual_seed(0)
    base = bench.base(AutoModelForImageTextToText.from_config(VISION_MODELS[model](tie)))

    merged = bench.prove(
        AutoModelForImageTextToText, base, VISION[name](), {"input_ids": token_ids()}
    )

    ends = "head", "embedding"
    assert merged.config["tie_word_embeddings"] is (tie and name not in ends)
    on_disk = [key for key in merged.tensors if key.endswith("lm_head.weight")]
    assert len(on_disk) == (not tie or name in ends)


# --- dtypes ------------------------------------------------------------------------------------

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@pytest.mark.parametrize("adapter_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_weights_are_the_float32_merge_rounded_once(
    bench: Bench, method: str, dtype: str, adapter_dtype: str
) -> None:
    base = bench.base(new_model("qwen2").to(DTYPES[dtype]))

    merged = assert_merge_rounds_once(bench, base, method, DTYPES[adapter_dtype])

    assert {value.dtype for value in merged.tensors.values()} == {DTYPES[dtype]}


@pytest.mark.parametrize("method", METHODS)
def test_each_tensor_keeps_its_own_dtype(bench: Bench, method: str) -> None:
    model = new_model("qwen2").to(torch.bfloat16)
    for name, module in model.named_modules():
        if name.endswith(("norm", "k_proj")):
            module.float()
        if name.endswith("v_proj"):
            module.bias.data = module.bias.float()
    base = bench.base(model)

    merged = assert_merge_rounds_once(bench, base, method, torch.bfloat16)

    dtypes = {name: value.dtype for name, value in merged.tensors.items()}
    assert dtypes == {name: value.dtype for name, value in read_tensors(base).items()}
    assert len(set(dtypes.values())) == 2


def assert_merge_rounds_once(
    bench: Bench, base: Path, method: str, adapter_dtype: torch.dtype
) -> Merged:
    adapter = bench.save(
        bench.attach(bench.load(AutoModelForCausalLM, base), METHODS[method]()), adapter_dtype
    )
    merged = bench.merge(base, adapter)

    attached = PeftModel.from_pretrained(bench.load(AutoModelForCausalLM, base), adapter)
    exact = attached.merge_and_unload().state_dict()
    edited = {edit["tensor"] for edit in merged.receipt.edits}
    for name, old in read_tensors(base).items():
        assert_rounded_once(merged.tensors[name], old, exact[name])
        assert torch.equal(merged.tensors[name], old) == (name not in edited)
    return merged


# --- several adapters --------------------------------------------------------------------------

SAVED = {
    "saved": lambda: LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["v_proj"]),
    "biases": lambda: LoraConfig(r=3, target_modules=["q_proj"], bias="all"),
}
SEQUENCES = {
    "saved, ia3": ("saved", "ia3"),
    "biases, ia3": ("biases", "ia3"),
    "lora, lora": ("lora", "lora"),
    "lora, ia3": ("lora", "ia3"),
    "ia3, lora": ("ia3", "lora"),
    "ia3, ia3": ("ia3", "ia3"),
    "dora, lora, ia3": ("dora", "lora", "ia3"),
    "ia3, dora": ("ia3", "dora"),
}


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("sequence", SEQUENCES)
def test_adapters_are_merged_one_after_the_other(bench: Bench, sequence: str, dtype: str) -> None:
    """What merging each in float32 into the last one's result gives, but rounded only once."""
    base = bench.base(new_model("qwen2").to(DTYPES[dtype]))
    model = bench.load(AutoModelForCausalLM, base)
    adapters, steps = [], [read_tensors(base)]
    outputs = [logits(model, model_inputs("qwen2"))]
    for method in SEQUENCES[sequence]:
        attached = bench.attach(model, (METHODS | SAVED)[method]())
        outputs.append(logits(attached, model_inputs("qwen2")))
        assert_differs(outputs[-2], outputs[-1])
        adapters.append(bench.save(attached))
        model = attached.merge_and_unload()
        steps.append({name: value.clone() for name, value in model.state_dict().items()})

    merged = bench.merge(base, adapters)

    for name, value in merged.tensors.items():
        assert_rounded_once(value, *(step[name] for step in steps))
    if dtype == "f32":
        found = logits(bench.load(AutoModelForCausalLM, merged.path), model_inputs("qwen2"))
        assert_close(found, outputs[-1])
    assert [adapter["path"] for adapter in merged.receipt.adapters] == [str(a) for a in adapters]


def test_two_adapters_scale_both_sides_of_one_module(bench: Bench) -> None:
    base = bench.base(new_model("qwen2"))
    model = bench.load(AutoModelForCausalLM, base)
    adapters = []
    for ff in ([], ["q_proj"]):
        config = IA3Config(target_modules=["q_proj"], feedforward_modules=ff)
        attached = bench.attach(model, config)
        wanted = logits(attached, model_inputs("qwen2"))
        adapters.append(bench.save(attached))
        model = attached.merge_and_unload()

    merged = bench.merge(base, adapters)

    found = logits(bench.load(AutoModelForCausalLM, merged.path), model_inputs("qwen2"))
    assert_close(found, wanted)
    sides = [op["side"] for e in merged.receipt.edits for op in e["operations"]]
    assert sides.count("in") == 2 and sides.count("out") == 4  # weights; weights and biases


def test_the_order_of_adapters_matters(bench: Bench) -> None:
    base = bench.base(new_model("qwen2"))
    adapters = [
        bench.save(bench.attach(bench.load(AutoModelForCausalLM, base), METHODS[method]()))
        for method in ("lora", "ia3")
    ]
    one, two = bench.merge(base, adapters), bench.merge(base, adapters[::-1])
    name = "model.layers.0.self_attn.v_proj.weight"
    assert_differs(one.tensors[name], two.tensors[name])


# --- heads -------------------------------------------------------------------------------------


class Head(NamedTuple):
    model: str
    task: str
    auto: Any
    saved_by: Any  # the class that wrote the base


SEQ, TOK, QA = (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoModelForQuestionAnswering,
)
HEADS = {
    "bert with its head": Head("bert", "SEQ_CLS", SEQ, SEQ),
    "bert without prefix": Head("bert", "SEQ_CLS", SEQ, AutoModel),
    "bert with another head": Head("bert", "SEQ_CLS", SEQ, AutoModelForPreTraining),
    "bert tokens": Head("bert", "TOKEN_CLS", TOK, AutoModelForMaskedLM),
    "bert questions": Head("bert", "QUESTION_ANS", QA, AutoModel),
    "roberta, head of two layers": Head("roberta", "SEQ_CLS", SEQ, AutoModelForMaskedLM),
    "gpt2 with its head": Head("gpt2", "SEQ_CLS", SEQ, SEQ),
    "gpt2 from a language model": Head("gpt2", "SEQ_CLS", SEQ, AutoModelForCausalLM),
    "gpt2 without prefix": Head("gpt2", "SEQ_CLS", SEQ, AutoModel),
    "llama": Head("llama", "SEQ_CLS", SEQ, AutoModelForCausalLM),
}
NEW = ("classifier", "score", "qa_outputs")


@pytest.mark.parametrize("method", ["lora", "ia3"])
@pytest.mark.parametrize("name", HEADS)
def test_trained_heads_come_along(bench: Bench, name: str, method: str) -> None:
    case = HEADS[name]
    own = case.saved_by is case.auto
    labels = {} if case.task == "QUESTION_ANS" else {"num_labels": 3}
    config = MODELS[case.model].__class__.from_dict(
        MODELS[case.model].to_dict() | (labels if own else {})
    )
    torch.manual_seed(1)
    base = bench.base(case.saved_by.from_config(config))
    kind = IA3Config if method == "ia3" else LoraConfig
    adapter = kind(task_type=case.task)

    merged = bench.prove(
        case.auto, base, adapter, {"input_ids": token_ids()}, new=() if own else NEW, **labels
    )

    added = merged.tensors.keys() - read_tensors(base).keys()
    assert bool(added) == (not own)
    assert own or any("added" in note for note in merged.receipt.notes)
