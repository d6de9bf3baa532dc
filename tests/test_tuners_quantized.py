"""Adapters on linear layers of 4 and 8 bits, and on those that only map (..., in) to (..., out)."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import IA3Config as PeftIA3
from peft import LoraConfig as PeftLora
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

import infold
from infold.adapters import merge
from infold.errors import Refusal
from infold.formats import format_of
from infold.tuners import IA3Config, LoraConfig, attach, load
from infold.tuners.layers import Adapted, Adapter
from infold.tuners.quantized import dequantized
from peft_oracle import assert_close, assert_differs, read_tensors, shuffle

F32, BF16 = torch.float32, torch.bfloat16
KINDS = ["nf4", "fp4", "nested", "int8"]
CONFIGS = {
    "ia3": IA3Config(),
    "lora": LoraConfig(r=4, lora_alpha=6),
    "dora": LoraConfig(r=4, use_dora=True),
}
IDS = torch.randint(3, 64, (3, 9), generator=torch.Generator().manual_seed(4))


def settings(kind: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="fp4" if kind == "fp4" else "nf4",
        bnb_4bit_use_double_quant=kind == "nested",
        bnb_4bit_compute_dtype=dtype,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, calm: None) -> Path:
    """A Llama with random weights; its sizes suit the blocks of 64 and the kernels of the CPU."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64, attention_bias=True, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, initializer_range=0.1,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    shuffle(((n, p) for n, p in model.named_parameters() if n.endswith("bias")), 5)
    path = tmp_path_factory.mktemp("base")
    model.save_pretrained(path)
    return path


def quantized(folder: Path, kind: str, dtype: torch.dtype = F32) -> Any:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=settings(kind, dtype)
    )
    return model.eval()


def randomized(model: Any, seed: int = 2) -> Any:
    shuffle(((n, p) for n, p in model.named_parameters() if p.requires_grad), seed)
    return model


def run(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and gradients in training mode, where no kernel rounds the scales of 4-bit layers."""
    model.train()
    model.zero_grad()
    found = model(IDS, labels=IDS)
    found.loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return found.logits.detach(), grads


def linears(model: nn.Module) -> dict[str, nn.Module]:
    kinds = (Linear4bit, Linear8bitLt)
    return {n: m for n, m in model.named_modules() if isinstance(m, kinds)}


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items() if ".adapters." not in n}


# --- against PEFT --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", CONFIGS)
def test_forward_and_gradients_are_those_of_peft(
    folder: Path, tmp_path: Path, kind: str, method: str
) -> None:
    config = CONFIGS[method]
    fields = dict(target_modules=["k_proj", "v_proj", "down_proj"])
    if method == "ia3":
        theirs: Any = PeftIA3(**fields, feedforward_modules=["down_proj"])
    else:
        theirs = PeftLora(**fields, r=4, lora_alpha=config.lora_alpha, use_dora=config.use_dora)
    wanted_model = randomized(get_peft_model(quantized(folder, kind), theirs))
    wanted_model.save_pretrained(tmp_path)
    wanted, wanted_grads = run(wanted_model)

    model = load(quantized(folder, kind), tmp_path, trainable=True)
    found, grads = run(model)

    assert_close(found, wanted, 2e-6)
    assert len(grads) == len(wanted_grads) > 0
    for name, value in grads.items():
        key = _key_in_peft(name)
        assert_close(value, wanted_grads[key], 1e-5)
    with torch.no_grad(), model.disable_adapter():
        assert_differs(model.train()(IDS).logits, wanted)


def _key_in_peft(name: str) -> str:
    path, _, part = name.partition(".adapters.default.")
    ending = {
        "ia3_l": "ia3_l.default",
        "lora_magnitude_vector": "lora_magnitude_vector.default.weight",
    }
    return f"base_model.model.{path}.{ending.get(part, f'{part}.default.weight')}"


@pytest.mark.parametrize("kind", ["nested", "int8"])
@pytest.mark.parametrize("method", CONFIGS)
def test_a_saved_adapter_loads_in_peft(
    folder: Path, tmp_path: Path, kind: str, method: str
) -> None:
    model = randomized(attach(quantized(folder, kind), copy.deepcopy(CONFIGS[method])))
    model.save_pretrained(tmp_path)
    wanted, _ = run(model)

    theirs = PeftModel.from_pretrained(quantized(folder, kind), tmp_path, is_trainable=True)

    assert_close(run(theirs)[0], wanted, 2e-6)


# --- in 16 bits ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nested", "int8"])
@pytest.mark.parametrize("method", CONFIGS)
def test_bfloat16_needs_no_autocast(folder: Path, kind: str, method: str) -> None:
    model = randomized(attach(quantized(folder, kind, BF16), copy.deepcopy(CONFIGS[method])))
    dtypes = set()
    for name, layer in linears(model).items():
        if not isinstance(layer, Adapted):
            continue
        layer.register_forward_hook(
            lambda _, x, y, n=name: dtypes.add((x[0].dtype, y.dtype))  # type: ignore[misc]
        )

    logits, grads = run(model)

    assert dtypes == {(BF16, BF16)}
    assert logits.dtype == BF16
    assert {g.dtype for g in grads.values()} == {F32}
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in grads.values())


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("kind", ["nf4", "nested", "int8"])
@pytest.mark.parametrize("method", CONFIGS)
def test_training_moves_the_adapter_and_no_bit_of_the_base(
    folder: Path, kind: str, method: str, dtype: torch.dtype
) -> None:
    base = quantized(folder, kind, dtype).train()
    before, logits = bits(base), base(IDS).logits
    model = attach(base, copy.deepcopy(CONFIGS[method]))
    model.activation_checkpointing_enable()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-2)
    losses = []
    for _ in range(6):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05

    plain = model.unload()

    after = bits(plain)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(plain.train()(IDS).logits, logits)


@pytest.mark.parametrize("evaluated", ["before", "after"])
@pytest.mark.parametrize("kind", ["nf4", "nested", "int8"])
def test_an_evaluation_does_not_end_the_learning(folder: Path, kind: str, evaluated: str) -> None:
    """On some CPUs it brings 4-bit layers to a kernel that has no gradient, and says nothing."""
    model = quantized(folder, kind)
    if evaluated == "before":
        with torch.no_grad():
            model(IDS)
        wanted = None
    model = randomized(attach(model, LoraConfig(r=4, target_modules=["q_proj"])))
    if evaluated == "after":
        _, wanted = run(model)
        with torch.no_grad():
            model.eval()(IDS)

    _, grads = run(model)

    assert len(grads) == 4 and all(g.abs().max() > 0 for g in grads.values())
    for name, value in (wanted or {}).items():
        assert torch.equal(grads[name], value)


@pytest.mark.parametrize("kind", ["nf4", "nested"])
def test_layers_that_were_packed_for_a_cpu_compute_the_same_and_learn(
    folder: Path, kind: str
) -> None:
    """As the test before, on any CPU."""
    model = quantized(folder, kind).train()
    for layer in linears(model).values():
        weight: Any = layer.weight
        weight.data, weight.quant_state = functional._convert_weight_packed_for_cpu(
            weight.data, weight.quant_state
        )
    values = {name: dequantized(layer) for name, layer in linears(model).items()}

    model = attach(model, LoraConfig(r=4))

    for name, layer in linears(model).items():
        before = values[name]
        assert before is not None and torch.equal(float32_of(layer), before)
    _, grads = run(randomized(model))
    assert all(g.abs().max() > 0 for g in grads.values())
    flags = [getattr(m, "support_avx512bf16_for_cpu", None) for m in linears(model).values()]
    assert not any(flags)
    plain = model.unload()
    known = bool(functional.has_avx512bf16())
    assert {m.support_avx512bf16_for_cpu for m in linears(plain).values()} <= {known, int(known)}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_each_row_goes_through_its_own_adapter(folder: Path, kind: str) -> None:
    model = randomized(attach(quantized(folder, kind), IA3Config(), "scale"))
    model = randomized(attach(model, LoraConfig(r=4), "low"), 3).eval()
    names = ["low", "__base__", "scale"]
    with torch.no_grad():
        wanted = []
        for row, name in zip(IDS, names, strict=True):
            if name == "__base__":
                with model.disable_adapter():
                    wanted.append(model(row[None]).logits)
            else:
                model.set_adapter(name)
                wanted.append(model(row[None]).logits)
        found = model(IDS, adapter_names=names).logits
    # bitsandbytes chooses the columns that it keeps in 16 bits by all rows of a batch
    assert_close(found, torch.cat(wanted), 2e-2 if kind == "int8" else 1e-5)


# --- merging -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", CONFIGS)
def test_merging_rounds_what_bitsandbytes_holds_once(
    folder: Path, kind: str, method: str, dtype: torch.dtype
) -> None:
    model = randomized(attach(quantized(folder, kind, dtype), copy.deepcopy(CONFIGS[method])))
    layers = {n: m for n, m in linears(model).items() if isinstance(m, Adapted)}
    wanted = {}
    for name, layer in layers.items():
        adapter = layer.adapters["default"]
        assert isinstance(adapter, Adapter)
        bias = getattr(layer, "bias", None)
        slices = 1 if dtype == BF16 else 2
        with torch.no_grad():
            options = replace(adapter.settings, slices=slices)
            done = merge(adapter.method, float64_of(layer), bias, adapter.parts, options)
        wanted[f"{name}.weight"] = rounded(done.weight, dtype)
        if done.bias is not None:
            wanted[f"{name}.bias"] = rounded(done.bias, dtype)
    others = {n: t for n, t in bits(model).items() if n.rpartition(".")[0] not in layers}

    merged = model.merge_and_unload(dequantize=dtype)

    found = merged.state_dict()
    for name, value in wanted.items():
        assert found[name].dtype == dtype and torch.equal(found[name], value), name
    assert all(torch.equal(found[n], t) for n, t in others.items() if "weight." not in n)
    assert not any(isinstance(m, Adapted) for m in merged.modules())
    assert sorted(linears(merged)) == sorted(set(linears(quantized(folder, kind))) - set(layers))


def float32_of(layer: nn.Module) -> Tensor:
    """bitsandbytes' own dequantization, asked for float32."""
    weight: Any = layer.weight
    if isinstance(layer, Linear8bitLt):
        return functional.int8_vectorwise_dequant(weight.data, weight.SCB)
    state = copy.copy(weight.quant_state)
    state.dtype = F32
    return functional.dequantize_4bit(weight.data, state)


def float64_of(layer: nn.Module) -> Tensor:
    """The same without float32's rounding of the last product."""
    weight: Any = layer.weight
    if isinstance(layer, Linear8bitLt):
        found = weight.data.double() * weight.SCB.double()[:, None] / 127
    else:
        state = weight.quant_state
        absmax = state.absmax
        if state.nested:
            absmax = functional.dequantize_blockwise(absmax, state.state2) + state.offset
        ones = copy.copy(state)
        ones.dtype, ones.nested, ones.absmax = F32, False, torch.ones_like(absmax)
        levels = functional.dequantize_4bit(weight.data, ones).double()  # codes times 1
        blocks = levels.view(-1, state.blocksize) * absmax.double()[:, None]
        found = blocks.view(levels.shape)
    assert_close(found, float32_of(layer), 1e-6)
    return found


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    name = {F32: "F32", BF16: "BF16", torch.float16: "F16"}[dtype]
    form = format_of(name)
    assert form is not None
    return form.encode(values, name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", CONFIGS)
def test_memory_and_disk_dequantize_to_the_same_bytes(
    folder: Path, tmp_path: Path, kind: str, method: str
) -> None:
    base = quantized(folder, kind, BF16)
    base.save_pretrained(tmp_path / "base")
    model = randomized(attach(base, copy.deepcopy(CONFIGS[method])))
    model.save_pretrained(tmp_path / "adapter")
    edited = [n for n, m in linears(model).items() if isinstance(m, Adapted)]

    infold.merge(
        tmp_path / "base", tmp_path / "adapter", tmp_path / "disk", dequantize=True, dtype="bf16"
    )
    model.merge_and_unload(dequantize=BF16).save_pretrained(tmp_path / "memory")

    disk, memory = (read_tensors(tmp_path / name) for name in ("disk", "memory"))
    # on disk whole sets that servers fuse change together, so that it leaves fewer codes
    alike = {n for n in disk if memory[n].dtype == disk[n].dtype}
    changed = {f"{path}.weight" for path in edited}
    assert changed <= alike and disk.keys() <= memory.keys()
    assert {memory[n].dtype for n in changed} == {BF16}
    assert [n for n in sorted(alike) if not torch.equal(disk[n], memory[n])] == []


@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_model_computes_the_same_and_loads_again(
    folder: Path, tmp_path: Path, kind: str
) -> None:
    model = randomized(attach(quantized(folder, kind), IA3Config()))
    with torch.no_grad():
        base = quantized(folder, kind).train()(IDS).logits
        unmerged = model.train()(IDS).logits

        merged = model.merge_and_unload(dequantize=F32)

        found = merged.train()(IDS).logits
        merged.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path).train()(IDS).logits
    # int8 layers also round their inputs; those that became dense do not
    assert_close(found, unmerged, 5e-2 if kind == "int8" else 1e-5)
    assert_differs(base, unmerged)
    assert_close(again, found, 1e-6)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_model_without_quantized_layers_is_no_quantized_model(
    folder: Path, tmp_path: Path, kind: str
) -> None:
    config = LoraConfig(r=4, target_modules="all-linear")
    model = randomized(attach(quantized(folder, kind, BF16), config))

    merged = model.merge_and_unload(dequantize=BF16)

    assert linears(merged) == {}
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not hasattr(again.config, "quantization_config")
    assert {p.dtype for p in again.parameters()} == {BF16}
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, merged.eval()(IDS).logits)
    merged.float()  # which transformers refuses of quantized models


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_merging_is_never_done_in_silence(folder: Path, kind: str) -> None:
    model = randomized(attach(quantized(folder, kind, BF16), IA3Config()))
    before, logits = bits(model), run(model)[0]
    layers = [n for n, m in linears(model).items() if isinstance(m, Adapted)]

    for attempt in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(Refusal, match=r"dequantize=torch\.bfloat16") as caught:
            attempt()
        assert [reason.partition(":")[0] for reason in caught.value.reasons] == layers
    with pytest.raises(Refusal, match=r"rest of the model is torch\.bfloat16"):
        model.merge_and_unload(dequantize=F32)
    with pytest.raises(Refusal, match=r"give one of torch\.float64"):
        model.merge_and_unload(dequantize=torch.int8)

    after = bits(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(run(model)[0], logits)


def test_codes_that_were_laid_out_for_a_cpu_are_read() -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    for nested in (False, True):
        codes, state = functional.quantize_4bit(
            weight, quant_type="nf4", compress_statistics=nested, blocksize=64
        )
        layer = Linear4bit(128, 64, bias=False, quant_type="nf4", compress_statistics=nested)
        layer.weight.data, layer.weight.quant_state = codes, state
        plain = dequantized(layer)
        assert plain is not None and plain.dtype == F32
        scales = plain.abs().view(64, 2, 64).amax(2)
        # as the first evaluation on a CPU with AVX512-BF16 does
        packed, state = functional._convert_weight_packed_for_cpu(codes, state)
        layer.weight.data, layer.weight.quant_state = packed, state
        before = copy.copy(state.__dict__)

        found = dequantized(layer)

        wanted = plain / scales[:, :, None].expand(64, 2, 64).reshape(64, 128)
        wanted *= scales.to(BF16).float()[:, :, None].expand(64, 2, 64).reshape(64, 128)
        assert found is not None
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
        assert state.__dict__.keys() == before.keys()  # reading changes nothing
        assert all(state.__dict__[key] is before[key] for key in before)
        assert torch.equal(layer.weight.data, packed)


# --- whatever maps (..., in) to (..., out) -------------------------------------------------------
#
# The libraries of GPTQ and AWQ do not install here. These stand-ins have the attributes, shapes and
# dtypes of their layers, no `weight`, and compute what those compute.


class StandIn(nn.Module):
    """Codes of 4 bits, eight in an int32, with a scale and a zero for each group of 32 inputs."""

    GROUP = 32

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(inputs + outputs)
        codes = torch.randint(0, 16, (inputs, outputs), generator=generator)
        zeros = torch.full((inputs // self.GROUP, outputs), 8)
        scales = 0.02 * (1 + torch.rand(inputs // self.GROUP, outputs, generator=generator))
        self.register_buffer("qweight", self.pack(codes))
        self.register_buffer("qzeros", self.pack(zeros.t()).t().contiguous())
        self.register_buffer("scales", scales.half())
        noise = 0.1 * torch.randn(outputs, generator=generator)
        self.register_buffer("bias", noise.half() if bias else None)

    def pack(self, codes: Tensor) -> Tensor:
        """Along the first dimension."""
        lanes = codes.view(codes.shape[0] // 8, 8, -1) << (4 * torch.arange(8))[None, :, None]
        return lanes.sum(1).to(torch.int32)

    def unpack(self, packed: Tensor) -> Tensor:
        lanes = packed[:, None, :] >> (4 * torch.arange(8))[None, :, None]
        return (lanes & 15).flatten(0, 1)

    def values(self) -> Tensor:
        """(out, in), float32."""
        zeros = self.unpack(self.qzeros.t().contiguous()).t()
        grid = self.unpack(self.qweight) - zeros.repeat_interleave(self.GROUP, 0)
        return (grid * self.scales.float().repeat_interleave(self.GROUP, 0)).t()

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.values().to(x.dtype), bias)


class Gptq(StandIn):
    """As GPTQModel's TorchQuantLinear: (in / 8, out), and a group number for each input."""

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__(inputs, outputs, bias)
        self.in_features, self.out_features = inputs, outputs
        self.register_buffer("g_idx", torch.arange(inputs, dtype=torch.int32) // self.GROUP)


class AutoGptq(Gptq):
    """The older library's names."""

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__(inputs, outputs, bias)
        del self.in_features, self.out_features
        self.infeatures, self.outfeatures = inputs, outputs


class Awq(StandIn):
    """As AutoAWQ's WQLinear_GEMM: (in, out / 8)."""

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__(inputs, outputs, bias)
        self.in_features, self.out_features = inputs, outputs
        self.qweight = self.pack(self.unpack(self.qweight).t()).t().contiguous()

    def values(self) -> Tensor:
        narrow = self.qweight
        self.qweight = self.pack(self.unpack(narrow.t().contiguous()).t())
        try:
            return super().values()
        finally:
            self.qweight = narrow


def with_stand_ins(folder: Path, kind: type[StandIn], dtype: torch.dtype) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            parent, _, last = name.rpartition(".")
            new = kind(module.in_features, module.out_features, module.bias is not None)
            setattr(model.get_submodule(parent), last, new)
    return model


def as_linears(model: nn.Module) -> nn.Module:
    for name, module in list(model.named_modules()):
        if isinstance(module, StandIn):
            parent, _, last = name.rpartition(".")
            weight = module.values()
            new = nn.Linear(weight.shape[1], weight.shape[0], bias=module.bias is not None)
            new.weight = nn.Parameter(weight.clone(), requires_grad=False)
            if module.bias is not None:
                new.bias = nn.Parameter(module.bias.float(), requires_grad=False)
            setattr(model.get_submodule(parent), last, new)
    return model


@pytest.mark.parametrize("kind", [Gptq, AutoGptq, Awq])
@pytest.mark.parametrize("method", ["ia3", "lora"])
def test_a_layer_without_a_weight_is_adapted_like_a_linear(
    folder: Path, tmp_path: Path, kind: type[StandIn], method: str
) -> None:
    config = copy.deepcopy(CONFIGS[method])
    model = randomized(attach(with_stand_ins(folder, kind, F32), config))
    model.save_pretrained(tmp_path)

    wanted = load(as_linears(with_stand_ins(folder, kind, F32)), tmp_path, trainable=True)

    found, grads = run(model)
    logits, wanted_grads = run(wanted)
    assert_close(found, logits, 1e-6)
    assert grads.keys() == wanted_grads.keys() and len(grads) > 0
    for name, value in grads.items():
        assert_close(value, wanted_grads[name], 1e-5)
    again = load(with_stand_ins(folder, kind, F32), tmp_path)
    with torch.no_grad():
        assert torch.equal(again.train()(IDS).logits, found)
        mixed = again(IDS, adapter_names=["default", "__base__", "default"]).logits
        assert_close(mixed[::2], found[::2], 1e-5)
        with again.disable_adapter():
            assert_close(mixed[1], again(IDS).logits[1], 1e-5)
            assert_differs(again(IDS).logits, found)
    sixteen = load(with_stand_ins(folder, kind, BF16), tmp_path, trainable=True)
    logits, grads = run(sixteen)
    assert logits.dtype == BF16 and {g.dtype for g in grads.values()} == {F32}


@pytest.mark.parametrize("kind", [Gptq, Awq])
def test_a_weight_that_nobody_knows_is_not_merged(folder: Path, kind: type[StandIn]) -> None:
    model = randomized(attach(with_stand_ins(folder, kind, F32), IA3Config()))
    before, logits = bits(model), run(model)[0]

    for attempt in (
        model.merge_adapter, model.merge_and_unload, lambda: model.merge_and_unload(dequantize=F32)
    ):  # fmt: skip
        with pytest.raises(Refusal, match="cannot be read as numbers; attach") as caught:
            attempt()
        assert len(caught.value.reasons) == 6
    with pytest.raises(Refusal, match="DoRA needs the weight"):
        attach(model, LoraConfig(use_dora=True), "more")

    after = bits(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(run(model)[0], logits)
    assert not any(isinstance(m, Adapted) for m in model.unload().modules())


@pytest.mark.parametrize("size", [(64, 64), (48, 40), None], ids=str)
@pytest.mark.parametrize("method", CONFIGS)
def test_fp8_layers_of_transformers(
    monkeypatch: pytest.MonkeyPatch, calm: None, method: str, size: tuple[int, int] | None
) -> None:
    from transformers.integrations import finegrained_fp8 as fp8

    def linear(x: Tensor, weight: Tensor, scales: Tensor, block: Any, *rest: Any) -> Tensor:
        """The kernels are for GPUs; this is what they approximate."""
        return nn.functional.linear(x, fp8._dequantize_fp8_weight(weight, scales, block, F32))

    monkeypatch.setattr(fp8, "fp8_linear", linear)
    torch.manual_seed(0)
    layer = fp8.FP8Linear(96, 128, block_size=size).requires_grad_(False)
    layer.weight.copy_(torch.randn(128, 96).to(torch.float8_e4m3fn))
    layer.weight_scale_inv.copy_(torch.rand(layer.weight_scale_inv.shape) + 0.1)
    model = nn.Sequential(layer)
    config = replace(CONFIGS[method], target_modules=["0"])
    if isinstance(config, IA3Config):
        config.feedforward_modules = []
    adapted = randomized(attach(model, config))
    x = torch.randn(5, 96)

    y = adapted(x)
    y.sum().backward()
    adapter: Any = layer.adapters["default"]
    with torch.no_grad():
        weight = fp8._dequantize_fp8_weight(
            layer.weight, layer.weight_scale_inv, size, torch.float64
        )
        options = replace(adapter.settings, slices=1)
        done = merge(adapter.method, weight, None, adapter.parts, options)
    merged = adapted.merge_and_unload(dequantize=BF16)

    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapter.parameters())
    assert torch.equal(merged[0].weight, rounded(done.weight, BF16))
    assert_close(y, nn.functional.linear(x, done.weight.float()), 1e-5)
    assert_differs(nn.functional.linear(x, weight.float()), y)
