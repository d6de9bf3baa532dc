"""Every quantized format: IA³ goes into its float scales, and nothing else changes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

import handmade
import infold
import quantized_bases
from infold.checkpoint.record import UNDO
from infold.cli.main import app
from infold.plan.fold import INSTEAD
from quantized_bases import KINDS, REFUSED, Module

pytestmark = pytest.mark.filterwarnings("ignore")  # of the packages that write the bases

LAYER = "model.layers.0"
SIZES = {"self_attn.k_proj": (64, 128), "mlp.gate_proj": (128, 64), "mlp.up_proj": (128, 64)}
SIZES["mlp.down_proj"] = (64, 128)
PRECISION = {torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}


@dataclass
class Base:
    path: Path
    modules: Mapping[str, Module]

    def parts(self, folder: Path, name: str) -> dict[str, Tensor]:
        """The tensors of a module of a folder, by their names below it."""
        prefix = f"{LAYER}.{name}."
        with safe_open(folder / "model.safetensors", "pt") as file:
            return {
                key.removeprefix(prefix): file.get_tensor(key)
                for key in file.keys()
                if key.startswith(prefix)
            }

    def values(self, folder: Path, name: str) -> Tensor:
        parts = self.parts(folder, name)
        mine = self.modules[name].tensors
        return self.modules[name].values({k: v for k, v in parts.items() if k in mine})


def make_base(path: Path, kind: str, encode: object = None) -> Base:
    """One layer, with a bias at k_proj and up_proj."""
    random = torch.Generator().manual_seed(1)
    torch.manual_seed(1)
    encode = encode or KINDS[kind]
    modules, tensors, metadata = {}, {}, {"format": "pt"}
    for name, shape in SIZES.items():
        assert callable(encode)
        modules[name] = made = encode(torch.randn(shape, generator=random) * 0.05)
        tensors |= {f"{LAYER}.{name}.{part}": t.contiguous() for part, t in made.tensors.items()}
        metadata |= {f"{LAYER}.{name}.{key}": text for key, text in made.metadata.items()}
    for name in ("self_attn.k_proj", "mlp.up_proj"):
        tensors[f"{LAYER}.{name}.bias"] = torch.randn(SIZES[name][0], generator=random).half()
    tensors[f"{LAYER}.input_layernorm.weight"] = torch.ones(64).bfloat16()
    config = {"hidden_act": "silu", "quantization_config": made.config}
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors, path / "model.safetensors", metadata)
    return Base(path, modules)


def vectors(seed: int = 0, powers: bool = False) -> dict[str, Tensor]:
    """l of k_proj and of down_proj's inputs, some of them negative or zero."""
    random = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in (("self_attn.k_proj", (64, 1)), ("mlp.down_proj", (1, 128))):
        vector = 1 + 0.3 * torch.randn(shape, generator=random)
        if powers:
            vector = torch.exp2(torch.randint(-2, 3, shape, generator=random).float())
        vector.view(-1)[:4] = torch.tensor([-1.0, 0.5, 2.0, 0.0])
        found[f"{LAYER}.{name}"] = vector
    return found


def make_adapter(path: Path, found: dict[str, Tensor]) -> Path:
    return handmade.ia3(path, found, feedforward_modules=["down_proj"])


SCALED = {"self_attn.k_proj": "self_attn.k_proj", "mlp.up_proj": "mlp.down_proj"}


@pytest.mark.parametrize("kind", KINDS)
def test_fold(tmp_path: Path, kind: str) -> None:
    """Codes, zeros and packing stay as they are; the values are l times the base's, but for one
    rounding of each scale; verify agrees and undo takes it back."""
    base = make_base(tmp_path / "base", kind)
    given = vectors()
    adapter = make_adapter(tmp_path / "adapter", given)
    out = tmp_path / "out"

    infold.merge(base.path, adapter, out, undo=True)

    before, after = (load_file(f / "model.safetensors") for f in (base.path, out))
    allowed = {f"{LAYER}.{name}.bias" for name in SCALED} | {
        f"{LAYER}.{name}.{part}" for name in SCALED for part in base.modules[name].folded
    }
    changed = {name for name in before if not same(before[name], after[name])}
    assert changed == allowed and before.keys() == after.keys()
    for name, origin in SCALED.items():
        factor = given[f"{LAYER}.{origin}"].double().flatten()
        module, parts = base.modules[name], base.parts(out, name)
        wanted, found = (
            factor[:, None] * base.values(base.path, name),
            base.values(out, name),
        )
        precision = min(PRECISION[parts[part].dtype] for part in module.folded)
        size = wanted.abs()
        if module.affine:  # the two terms are rounded, their sum may be small
            size = size.amax(1, keepdim=True) * 3
        assert ((found - wanted).abs() <= size * 2.0**-precision).all()
        bias = base.parts(base.path, name)["bias"].double() * factor
        assert torch.equal(parts["bias"], bias.half())
    assert infold.verify(base.path, adapter, out).ok
    infold.undo(out, tmp_path / "back")
    assert (tmp_path / "back/model.safetensors").read_bytes() == (
        base.path / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_powers_of_two_are_exact(tmp_path: Path, kind: str) -> None:
    base = make_base(tmp_path / "base", kind)
    given = vectors(powers=True)

    infold.merge(base.path, make_adapter(tmp_path / "adapter", given), tmp_path / "out")

    for name, origin in SCALED.items():
        factor = given[f"{LAYER}.{origin}"].double().view(-1, 1)
        assert torch.equal(
            base.values(tmp_path / "out", name), factor * base.values(base.path, name)
        )


def same(one: Tensor, two: Tensor) -> bool:
    """Whether two tensors have the same bytes."""
    return one.dtype == two.dtype and torch.equal(
        one.contiguous().flatten().view(torch.uint8), two.contiguous().flatten().view(torch.uint8)
    )


@pytest.mark.parametrize("kind", REFUSED)
def test_no_fold(tmp_path: Path, kind: str) -> None:
    """Where no scale belongs to one row alone: every module is named, with the way out."""
    encode, why = REFUSED[kind]
    base = make_base(tmp_path / "base", kind, encode)

    with pytest.raises(infold.Refusal) as caught:
        infold.merge(base.path, make_adapter(tmp_path / "adapter", vectors()), tmp_path / "out")

    told = [reason for reason in caught.value.reasons if "ia3_l" in reason]
    assert len(told) == 2 == len(caught.value.reasons)
    assert all(why in reason for reason in caught.value.reasons)
    assert all(reason.endswith(INSTEAD) for reason in caught.value.reasons)
    assert not (tmp_path / "out").exists()


def test_blocks_that_cross_rows(tmp_path: Path) -> None:
    """NF4's blocks of 64 do not end with a row of 96 elements."""
    encode = KINDS["bnb-nf4"]
    base = make_base(
        tmp_path / "base", "", lambda w: encode(w[:, :96].contiguous() if len(w) == 64 else w)
    )

    with pytest.raises(infold.Refusal, match=r"rows of 96 elements share blocks of 64.*--promote"):
        infold.merge(base.path, make_adapter(tmp_path / "adapter", vectors()), tmp_path / "out")


def test_the_experts_of_mixtral(tmp_path: Path) -> None:
    """The vector on the inputs of one expert's w2 goes to the rows of the same expert's w3."""
    layer = f"{LAYER}.block_sparse_moe"
    tensors, modules = {f"{layer}.gate.weight": torch.randn(3, 64)}, {}
    for expert in range(3):
        for name, shape in (("w1", (128, 64)), ("w2", (64, 128)), ("w3", (128, 64))):
            path = f"{layer}.experts.{expert}.{name}"
            modules[path] = made = KINDS["gptq"](torch.randn(shape) * 0.05)
            tensors |= {f"{path}.{part}": t.contiguous() for part, t in made.tensors.items()}
    base = handmade.base_folder(tmp_path / "base", tensors, {"quantization_config": made.config})
    vector = torch.rand(1, 128) + 0.5
    adapter = handmade.ia3(
        tmp_path / "adapter", {f"{layer}.experts.1.w2": vector}, feedforward_modules=["w2"]
    )

    infold.merge(base, adapter, tmp_path / "out")

    after, place = load_file(tmp_path / "out/model.safetensors"), f"{layer}.experts.1.w3"
    changed = {name for name in tensors if not same(tensors[name], after[name])}
    assert changed == {f"{place}.scales"}
    exact = tensors[f"{place}.scales"].double() * vector.double()
    assert torch.equal(after[f"{place}.scales"], exact.half())
    assert infold.verify(base, adapter, tmp_path / "out").ok


@pytest.mark.parametrize("kind", ["gptq", "ct-pack", "bnb-nf4"])
def test_several_vectors_on_one_row_are_rounded_once(tmp_path: Path, kind: str) -> None:
    """up_proj is a target itself, down_proj's vector moves there, and a second adapter has both."""
    base = make_base(tmp_path / "base", kind)
    adapters, factor = [], torch.ones(128, dtype=torch.float64)
    for seed in (1, 2):
        given = vectors(seed)
        given[f"{LAYER}.mlp.up_proj"] = own = 1 + torch.rand(128, 1)
        adapters.append(make_adapter(tmp_path / f"adapter{seed}", given))
        # in the order of the merge: what moves acts last, and each product is float64
        factor = factor * own.flatten().double()
    for seed in (1, 2):
        factor = factor * vectors(seed)[f"{LAYER}.mlp.down_proj"].flatten().double()

    infold.merge(base.path, adapters, tmp_path / "out")

    before, after = (base.parts(f, "mlp.up_proj") for f in (base.path, tmp_path / "out"))
    (part,) = base.modules["mlp.up_proj"].folded
    old, new = before[part], after[part]
    rows = {"gptq": factor[None], "ct-pack": factor[:, None], "bnb-nf4": factor[:, None]}[kind]
    wide = old.double().view(128, -1) * rows if kind == "bnb-nf4" else old.double() * rows
    near = (new.double().view(wide.shape) - wide).abs()
    assert (near <= wide.abs() * 2.0 ** -PRECISION[old.dtype]).all()
    assert infold.verify(base.path, adapters, tmp_path / "out").ok


def broken(base: Base, out: Path, way: str) -> None:
    """What a careless tool would write."""
    path = out / "model.safetensors"
    tensors, old = load_file(path), load_file(base.path / "model.safetensors")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    names = {f"{LAYER}.mlp.{name}": base.modules[f"mlp.{name}"] for name in ("up_proj",)}
    for name, module in names.items():
        if way == "bias":
            tensors[f"{name}.bias"] = old[f"{name}.bias"]
        elif way == "zeros":
            tensors[f"{name}.{module.folded[1]}"] = old[f"{name}.{module.folded[1]}"]
        else:
            factor = vectors()[f"{LAYER}.mlp.down_proj"].double()
            for part in module.folded:
                gate = f"{LAYER}.mlp.gate_proj.{part}"
                tensors[f"{name}.{part}"] = old[f"{name}.{part}"]
                tensors[gate] = (old[gate].double() * factor).to(old[gate].dtype)
    save_file(tensors, path, metadata)


@pytest.mark.parametrize("way", ["bias", "gate", "zeros"])
def test_what_a_careless_fold_gets_wrong_is_noticed(tmp_path: Path, way: str) -> None:
    """A forgotten bias, the vector in the gate, AWQ's float zeros left as they were: the layer's
    output is another one, and verify says so. The fold as it is, is right."""
    base = make_base(tmp_path / "base", "awq-gemv_fast")
    given = vectors()
    adapter, out = make_adapter(tmp_path / "adapter", given), tmp_path / "out"
    infold.merge(base.path, adapter, out)
    random = torch.randn(8, 64, dtype=torch.float64)

    def feed_forward(folder: Path, vector: Tensor | float) -> Tensor:
        gate, up, down = (base.values(folder, f"mlp.{n}_proj") for n in ("gate", "up", "down"))
        bias = base.parts(folder, "mlp.up_proj")["bias"].double()
        inner = torch.nn.functional.silu(random @ gate.t()) * (random @ up.t() + bias)
        return (inner * vector) @ down.t()

    unmerged = feed_forward(base.path, given[f"{LAYER}.mlp.down_proj"].double())
    size = unmerged.norm()
    assert (feed_forward(out, 1.0) - unmerged).norm() < 2e-3 * size
    assert (feed_forward(base.path, 1.0) - unmerged).norm() > 0.1 * size

    broken(base, out, way)

    assert (feed_forward(out, 1.0) - unmerged).norm() > 0.05 * size
    assert not infold.verify(base.path, adapter, out).ok


def test_a_lora_finds_no_place_in_scales(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "gptq")
    adapter = handmade.lora(tmp_path / "lora", {f"{LAYER}.self_attn.k_proj": (64, 128)})

    with pytest.raises(infold.Refusal, match=r"is quantized \(GPTQ, 4 bits, groups of 32\)"):
        infold.merge(base.path, adapter, tmp_path / "out")


def test_a_clamp_of_some_layers_stands_between(tmp_path: Path) -> None:
    """Step's limits are lists, by layer; its up_proj's outputs are clamped."""
    base = make_base(tmp_path / "base", "gptq")
    config = json.loads((base.path / "config.json").read_text())
    config |= {"model_type": "step3p5", "swiglu_limits": [0.0], "swiglu_limits_shared": [16.0]}
    (base.path / "config.json").write_text(json.dumps(config))
    adapter = make_adapter(tmp_path / "adapter", vectors())

    with pytest.raises(infold.Refusal, match=r"swiglu_limits_shared clamps.*--promote") as caught:
        infold.merge(base.path, adapter, tmp_path / "out")

    assert len(caught.value.reasons) == 1  # k_proj's outputs are scaled before any clamp
    infold.merge(base.path, adapter, tmp_path / "out", promote=True)
    assert base.parts(tmp_path / "out", "mlp.down_proj").keys() == {"weight"}
    assert base.parts(tmp_path / "out", "mlp.up_proj").keys() > {"qweight"}


def test_marlin_is_refused_by_name(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "gptq")
    config = json.loads((base.path / "config.json").read_text())
    config["quantization_config"]["checkpoint_format"] = "marlin"
    (base.path / "config.json").write_text(json.dumps(config))

    with pytest.raises(infold.Refusal, match="order of Marlin kernels"):
        infold.merge(base.path, make_adapter(tmp_path / "adapter", vectors()), tmp_path / "out")


@pytest.mark.parametrize(
    ("parts", "name"),
    [
        ("q_weight", "EXL2"),
        ("trellis", "EXL3"),
        ("Qidxs", "QuIP#"),
        ("codes codebooks scales", "AQLM"),
        ("indices centroids.weight perm", "VPTQ"),
        ("dense_weights row_offsets col_vals in_perm", "SpQR"),
        ("blocks scales", "MXFP4"),
        ("B s workspace", "Marlin"),
        ("weight_packed scale_packed meta", "Marlin"),
        ("weight weight_scale weight_scale_2", "NVFP4"),
        ("weight_packed weight_scale weight_global_scale", "NVFP4"),
        ("weight_packed weight_scale", "MX scales"),
    ],
)
def test_formats_without_row_scales_are_refused_by_name(
    tmp_path: Path, parts: str, name: str
) -> None:
    tensors = {
        f"{LAYER}.{module}.{part}": torch.zeros(shape[0], shape[1] // 2).byte()
        for module, shape in SIZES.items()
        for part in parts.split()
    }
    base = handmade.base_folder(tmp_path / "base", tensors)

    with pytest.raises(infold.Refusal) as caught:
        infold.merge(base, make_adapter(tmp_path / "adapter", vectors()), tmp_path / "out")

    assert len(caught.value.reasons) == 2
    assert all(name in reason for reason in caught.value.reasons)


def test_the_experts_of_gpt_oss_are_refused_by_name(tmp_path: Path) -> None:
    """One tensor of codes and one of exponents for all experts of a layer; attention is dense."""
    experts, key = f"{LAYER}.mlp.experts", f"{LAYER}.self_attn.k_proj"
    tensors = {f"{key}.weight": torch.randn(64, 64).bfloat16()}
    for name, outputs in (("gate_up_proj", 192), ("down_proj", 64)):
        tensors[f"{experts}.{name}_blocks"] = torch.zeros(4, outputs, 3, 16).byte()
        tensors[f"{experts}.{name}_scales"] = torch.zeros(4, outputs, 3).byte()
        tensors[f"{experts}.{name}_bias"] = torch.zeros(4, outputs).bfloat16()
    told = {"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}
    base = handmade.base_folder(tmp_path / "base", tensors, told)
    lora = handmade.adapter_folder(
        tmp_path / "lora",
        {
            f"{experts}.lora_A.weight": torch.randn(16, 96),
            f"{experts}.lora_B.weight": torch.randn(64, 16),
        },
        {
            "peft_type": "LORA", "r": 4, "lora_alpha": 8,
            "target_parameters": ["mlp.experts.down_proj"],
        },
    )  # fmt: skip

    for mode in ({}, {"dequantize": True}, {"requantize": True}):
        with pytest.raises(infold.Refusal) as caught:
            infold.merge(base, lora, tmp_path / "out", **mode)
        (reason,) = caught.value.reasons
        assert f"{experts} is quantized (MXFP4), and lora changes single elements" in reason
        assert reason.endswith("; and MXFP4 cannot be decoded here")

    (found,) = infold.inspect(base)["quantization"]
    assert (found["format"], found["modules"]) == ("MXFP4", 1)
    assert found["no_fold"].startswith("MXFP4 is not supported")
    ia3 = handmade.ia3(tmp_path / "ia3", {key: torch.rand(64, 1)})
    infold.merge(base, ia3, tmp_path / "attention")
    assert infold.verify(base, ia3, tmp_path / "attention").ok


def test_dense_modules_of_a_quantized_base(tmp_path: Path) -> None:
    """A dense k_proj merges as ever; a quantized down_proj's vector goes to a dense up_proj's rows;
    a dense down_proj keeps its own, though up_proj is quantized."""
    base = make_base(tmp_path / "base", "gptq")
    tensors = load_file(base.path / "model.safetensors")

    def dense(name: str, folder: str) -> Path:
        some = {k: v for k, v in tensors.items() if f"{name}." not in k or k.endswith("bias")}
        weight = base.values(base.path, name).bfloat16().contiguous()
        config = json.loads((base.path / "config.json").read_text())
        return handmade.base_folder(
            tmp_path / folder, {**some, f"{LAYER}.{name}.weight": weight}, config
        )

    adapter = make_adapter(tmp_path / "adapter", vectors())
    factor = vectors()[f"{LAYER}.mlp.down_proj"].double()
    wanted = {
        "self_attn.k_proj": vectors()[f"{LAYER}.self_attn.k_proj"].double(),
        "mlp.up_proj": factor.t(),
        "mlp.down_proj": factor,
    }
    for number, (name, scale) in enumerate(wanted.items()):
        path, out = dense(name, f"dense{number}"), tmp_path / f"out{number}"
        infold.merge(path, adapter, out)

        before, after = (load_file(f / "model.safetensors") for f in (path, out))
        key = f"{LAYER}.{name}.weight"
        assert torch.equal(after[key], (before[key].double() * scale).bfloat16())
        kept = same(before[f"{LAYER}.mlp.up_proj.bias"], after[f"{LAYER}.mlp.up_proj.bias"])
        assert kept == (name == "mlp.down_proj")
        assert infold.verify(path, adapter, out).ok


def test_a_moved_vector_acts_after_a_later_lora(tmp_path: Path) -> None:
    """It scales what comes out of up_proj, whatever another adapter has made of that."""
    base = make_base(tmp_path / "base", "ct-int8")
    name = f"{LAYER}.mlp.up_proj"
    tensors = load_file(base.path / "model.safetensors")
    kept = {k: v for k, v in tensors.items() if not k.startswith(name)}
    kept[f"{name}.weight"] = weight = base.values(base.path, "mlp.up_proj").float()
    config = json.loads((base.path / "config.json").read_text())
    folder = handmade.base_folder(tmp_path / "dense", kept, config)
    ia3 = make_adapter(tmp_path / "ia3", vectors())
    lora = handmade.lora(tmp_path / "lora", {name: SIZES["mlp.up_proj"]})
    parts = load_file(lora / "adapter_model.safetensors")
    a, b = (parts[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")

    infold.merge(folder, [ia3, lora], tmp_path / "out")

    found = load_file(tmp_path / "out/model.safetensors")[f"{name}.weight"].double()
    factor = vectors()[f"{LAYER}.mlp.down_proj"].double().t()
    wanted = factor * (weight.double() + 2 * b @ a)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)
    assert (found - (factor * weight.double() + 2 * b @ a)).abs().max() > 1e-3


def test_static_scales_of_activations_are_told(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "ct-fp8")
    tensors = load_file(base.path / "model.safetensors")
    for name in ("mlp.down_proj.input_scale", "self_attn.k_scale"):
        tensors[f"{LAYER}.{name}"] = torch.ones(1)
    save_file(tensors, base.path / "model.safetensors")

    receipt = infold.merge(
        base.path, make_adapter(tmp_path / "adapter", vectors()), tmp_path / "out"
    )

    assert any(note.startswith("2 static scales of activations") for note in receipt.notes)


def test_torchao_s_static_scales_of_activations_are_told(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "torchao-int8-static")

    receipt = infold.merge(
        base.path, make_adapter(tmp_path / "adapter", vectors()), tmp_path / "out"
    )

    (note,) = [note for note in receipt.notes if "static scales" in note]
    assert note.startswith("2 static") and "_proj._weight_act_quant_scale, ..." in note


def test_a_reason_stands_once(tmp_path: Path) -> None:
    """Why a vector finds no scales can be why the weight cannot be decoded, too."""
    base = make_base(tmp_path / "base", "hqq")
    path = base.path / "model.safetensors"
    renamed = {n.replace(".scale", ".quant_scale"): t for n, t in load_file(path).items()}
    save_file(renamed, path)

    with pytest.raises(infold.Refusal) as caught:
        infold.merge(base.path, make_adapter(tmp_path / "adapter", vectors()), tmp_path / "out")

    assert len(caught.value.reasons) == 2
    for reason in caught.value.reasons:
        assert reason.endswith(": its scales are quantized themselves")


def test_in_place_and_back(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "bnb-nf4")
    kept = (base.path / "model.safetensors").read_bytes()
    adapter = make_adapter(tmp_path / "adapter", vectors())
    infold.merge(base.path, adapter, tmp_path / "out")

    infold.merge(base.path, adapter, in_place=True)

    merged = (base.path / "model.safetensors").read_bytes()
    assert merged == (tmp_path / "out/model.safetensors").read_bytes() != kept
    assert (base.path / UNDO).exists()
    infold.undo(base.path, in_place=True)
    assert (base.path / "model.safetensors").read_bytes() == kept


def test_inspect_tells_which_scales(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "awq-gemv_fast")
    told = infold.inspect(make_adapter(tmp_path / "adapter", vectors()), base=base.path)

    by_module = {entry["module"]: entry["edits"] for entry in told["modules"]}
    up = f"{LAYER}.mlp.up_proj"
    assert by_module[f"{LAYER}.mlp.down_proj"] == [f"{up}.bias", f"{up}.qzeros", f"{up}.scales"]


@pytest.mark.parametrize(("size", "error"), [(1e-3, None), (2e-6, 0.009), (1.8e-7, 0.1)])
def test_small_scales_are_counted_and_hopeless_ones_refused(
    tmp_path: Path, size: float, error: float | None
) -> None:
    """float16's step is 6e-8 below its normal range: 2e-6 are 33 steps, 1.8e-7 only three."""
    base = make_base(tmp_path / "base", "gptq")
    tensors = load_file(base.path / "model.safetensors")
    for name in tensors:
        if name.endswith("scales"):
            tensors[name] = torch.full_like(tensors[name], size)
    save_file(tensors, base.path / "model.safetensors")
    adapter, out = make_adapter(tmp_path / "adapter", vectors()), tmp_path / "out"

    if error is not None and error > 0.05:
        with pytest.raises(infold.Refusal, match="below float16's normal range") as caught:
            infold.merge(base.path, adapter, out)
        assert len(caught.value.reasons) == 2 and not out.exists()
        return
    receipt = infold.merge(base.path, adapter, out)

    found = [edit["rounding"] for edit in receipt.edits if "rounding" in edit]
    assert sorted(entry["scales"] for entry in found) == [64 * 4, 128 * 2]
    told = [note for note in receipt.notes if "float16 scales are below" in note]
    if error is None:
        assert not told and not any(entry["subnormal"] for entry in found)
    else:
        count = sum(entry["subnormal"] for entry in found)
        assert count == 63 * 4 + 127 * 2  # all but the zeros that are meant
        assert f"{count:,} of {64 * 4 + 128 * 2:,}" in told[0] and "0 fell to zero" in told[0]
        assert all(0.5 * error < entry["error"] < 2 * error for entry in found)


def test_inspect_tells_the_formats(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "gptq")
    tensors = load_file(base.path / "model.safetensors")
    made = quantized_bases.blocks(torch.randn(64, 64))
    tensors |= {f"{LAYER}.self_attn.o_proj.{part}": t for part, t in made.tensors.items()}
    save_file(tensors, base.path / "model.safetensors")

    found = infold.inspect(base.path)["quantization"]

    assert sorted(found, key=lambda entry: -entry["modules"]) == [
        {"format": "GPTQ, 4 bits, groups of 32", "modules": 4, "no_fold": None},
        {
            "format": "FP8, a scale for each block",
            "modules": 1,
            "no_fold": "one scale belongs to several rows ([2, 2] scales for 64 rows)",
        },
    ]
    told = CliRunner().invoke(app, ["inspect", str(base.path)]).output
    assert "GPTQ, 4 bits, groups of 32: 4 modules; IA³ folds" in told
    assert "elements, as they are packed, in" in told and "parameters" not in told
    assert "FP8, a scale for each block: 1 module; no place for IA³: one scale" in told


@pytest.fixture
def nested(tmp_path: Path) -> tuple[Base, Path, Path]:
    """NF4 with double quantization: (base, adapter, merged with an undo record)."""
    base = make_base(tmp_path / "base", "", lambda w: quantized_bases.bitsandbytes(w, "nf4-nested"))
    adapter = make_adapter(tmp_path / "adapter", vectors())
    infold.merge(base.path, adapter, tmp_path / "out", undo=True)
    return base, adapter, tmp_path / "out"


def test_nested_scales_become_plain(nested: tuple[Base, Path, Path], tmp_path: Path) -> None:
    """What bitsandbytes makes of nested absmax, times l, rounded once; it reads the result itself.
    The other modules stay nested."""
    import bitsandbytes.functional as bnb

    base, adapter, out = nested
    for name, origin in SCALED.items():
        before, after = base.parts(base.path, name), base.parts(out, name)
        factor = vectors()[f"{LAYER}.{origin}"].double().flatten()
        told = {k.removeprefix("weight."): v for k, v in before.items() if "." in k}
        state = bnb.QuantState.from_dict(told, torch.device("cpu"))
        absmax = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
        each = len(absmax) // len(factor)
        wanted = (absmax.double() * factor.repeat_interleave(each)).float()

        assert torch.equal(after["weight.absmax"], wanted)
        assert same(after["weight"], before["weight"])
        assert after.keys() == before.keys() - {"weight.nested_absmax", "weight.nested_quant_map"}
        exact = factor[:, None] * base.values(base.path, name)
        assert ((base.values(out, name) - exact).abs() <= exact.abs() * 2.0**-24).all()
    gates = [base.parts(folder, "mlp.gate_proj") for folder in (base.path, out)]
    assert gates[0].keys() == gates[1].keys()
    assert all(same(tensor, gates[1][name]) for name, tensor in gates[0].items())
    assert infold.verify(base.path, adapter, out).ok
    assert infold.inspect(out)["kind"] == "merged"


def test_nested_scales_come_back(nested: tuple[Base, Path, Path], tmp_path: Path) -> None:
    base, adapter, out = nested

    infold.undo(out, tmp_path / "back")

    back, was = (f / "model.safetensors" for f in (tmp_path / "back", base.path))
    assert back.read_bytes() == was.read_bytes()
    with pytest.raises(infold.Refusal, match="cannot be swapped"):
        infold.swap(out, adapter, tmp_path / "swapped")
    with pytest.raises(infold.Refusal, match="layout would change"):
        infold.merge(base.path, adapter, in_place=True)


@pytest.mark.parametrize("part", ["weight.quant_state.bitsandbytes__nf4", "weight.absmax"])
def test_a_wrong_nested_module_is_noticed(nested: tuple[Base, Path, Path], part: str) -> None:
    base, adapter, out = nested
    path, name = out / "model.safetensors", f"{LAYER}.mlp.up_proj.{part}"
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    changed = tensors[name].clone()
    changed[5] = changed[6]
    tensors[name] = changed
    save_file(tensors, path, metadata)

    verdict = infold.verify(base.path, adapter, out)

    assert not verdict.ok and any(o.where == name for o in verdict.offenders)


def test_two_adapters_on_nested_scales(nested: tuple[Base, Path, Path], tmp_path: Path) -> None:
    base, adapter, _ = nested
    other = make_adapter(tmp_path / "other", vectors(5))

    infold.merge(base.path, [adapter, other], tmp_path / "both")

    old = base.values(base.path, "mlp.up_proj")
    factor = torch.stack([vectors(n)[f"{LAYER}.mlp.down_proj"].double() for n in (0, 5)]).prod(0)
    off = (base.values(tmp_path / "both", "mlp.up_proj") - factor.view(-1, 1) * old).abs()
    assert (off <= (factor.view(-1, 1) * old).abs() * 2.0**-24 * (1 + 1e-9)).all()
    assert infold.verify(base.path, [adapter, other], tmp_path / "both").ok


@pytest.mark.parametrize(
    ("kind", "part", "value"),
    [
        ("bnb-nf4", "weight.quant_state.bitsandbytes__nf4", torch.tensor(list(b'{"shape": ['))),
        ("bnb-nf4", "weight.quant_state.bitsandbytes__nf4", torch.tensor([0.5, 1.5])),
        ("bnb-nf4", "weight.quant_state.bitsandbytes__nf4", torch.zeros(2 << 20).byte()),
        ("bnb-nf4", "weight.quant_state.bitsandbytes__nf4", torch.zeros(9, dtype=torch.uint64)),
        ("bnb-nf4", "weight.quant_state.bitsandbytes__nf4", torch.tensor(list(b"[" * 100000))),
        ("bnb-nf4", "weight.absmax", torch.ones(3)),
        ("ct-pack", "weight_shape", torch.tensor([64.0, 128.0])),
        ("ct-pack", "weight_shape", torch.tensor([-64, 1 << 62])),
        ("ct-pack", "weight_scale", torch.ones(0)),
        ("gptq", "scales", torch.ones(3, 5).half()),
        ("hqq", "axis", torch.tensor(float("nan"))),
        ("hqq", "shape", torch.tensor([0, 0])),
        ("hqq", "scale", torch.ones(7, 1).half()),
        ("torchao-tinygemm", "_weight_scale_and_zero", torch.ones(2, 2).bfloat16()),
    ],
)
def test_broken_modules_are_refused(tmp_path: Path, kind: str, part: str, value: Tensor) -> None:
    """Whatever a file tells of its modules: a reason to refuse, and nothing is written."""
    base = make_base(tmp_path / "base", kind)
    tensors = load_file(base.path / "model.safetensors")
    if value.dtype == torch.int64 and "quant_state" in part:
        value = value.byte()
    tensors[f"{LAYER}.self_attn.k_proj.{part}"] = value
    with safe_open(base.path / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    save_file(tensors, base.path / "model.safetensors", metadata)

    adapter = make_adapter(tmp_path / "adapter", vectors())

    for mode in ({}, {"promote": True}, {"dequantize": True}):
        with pytest.raises(infold.Refusal):
            infold.merge(base.path, adapter, tmp_path / "out", **mode)

    assert not (tmp_path / "out").exists()
    infold.inspect(base.path)


def amended(base: Base, more: dict[str, Tensor], **config: object) -> Base:
    """The base with more tensors, and other fields of its quantization_config."""
    path = base.path / "model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({**load_file(path), **more}, path, metadata)
    told = json.loads((base.path / "config.json").read_text())
    told["quantization_config"] |= config
    (base.path / "config.json").write_text(json.dumps(told))
    return base


@pytest.mark.parametrize("kind", KINDS)
def test_a_correction_beside_the_codes_is_no_scale(tmp_path: Path, kind: str) -> None:
    """What a module adds to its outputs from other tensors would stay unscaled."""
    part = f"{LAYER}.self_attn.k_proj.lora_B"
    base = amended(make_base(tmp_path / "base", kind), {part: torch.ones(64, 4)})
    adapter = make_adapter(tmp_path / "adapter", vectors())

    with pytest.raises(infold.Refusal, match="it also has lora_B, which may have a share") as told:
        infold.merge(base.path, adapter, tmp_path / "out")
    assert len(told.value.reasons) == 1 and "--promote" not in str(told.value)
    with pytest.raises(infold.Refusal, match=r"lora_B|not known|cannot be decoded"):
        infold.merge(base.path, adapter, tmp_path / "out", dequantize=True)


def test_scales_of_inputs_are_no_matter_to_rows(tmp_path: Path) -> None:
    part = f"{LAYER}.self_attn.k_proj.pre_quant_scale"
    base = amended(make_base(tmp_path / "base", "fbgemm"), {part: torch.rand(128)})
    adapter = make_adapter(tmp_path / "adapter", vectors())

    infold.merge(base.path, adapter, tmp_path / "out")

    assert infold.verify(base.path, adapter, tmp_path / "out").ok
    low_rank = handmade.lora(tmp_path / "lora", {f"{LAYER}.self_attn.k_proj": (64, 128)})
    for mode in ("dequantize", "requantize"):
        with pytest.raises(infold.Refusal, match="it also has pre_quant_scale"):
            infold.merge(base.path, low_rank, tmp_path / "no", **{mode: True})


ROTATIONS = {
    "none": ({}, True),
    "no groups": ({"config_groups": {}}, True),
    "in the weights": ({"config_groups": {"R1": {"type": "hadamard", "apply": [
        {"targets": ["Linear"], "location": "weight_input"},
        {"targets": ["v_proj"], "location": "weight_output"},
    ]}}}, True),
    "on inputs": ({"config_groups": {"R4": {"type": "hadamard", "apply": [
        {"targets": ["down_proj"], "location": "input"},
        {"targets": ["down_proj"], "location": "weight_input", "inverse": True},
    ]}}}, False),
    "on outputs": ({"config_groups": {"u": {"type": "hadamard", "apply": [
        {"targets": ["Linear"], "location": "output", "inverse": True},
    ]}}}, False),
    "not to be read": ({"config_groups": {"u": {"apply": 5}}}, False),
    "nor this": ([1], False),
}  # fmt: skip


@pytest.mark.parametrize("name", ROTATIONS)
def test_rotations_while_the_model_runs_are_refused(tmp_path: Path, name: str) -> None:
    told, harmless = ROTATIONS[name]
    base = amended(make_base(tmp_path / "base", "ct-int8"), {}, transform_config=told)
    adapter = make_adapter(tmp_path / "adapter", vectors())

    for mode in ({}, {"dequantize": True}, {"requantize": True}):
        if harmless:
            infold.merge(base.path, adapter, tmp_path / f"out{len(mode)}{list(mode)}", **mode)
            continue
        with pytest.raises(infold.Refusal, match="transform_config rotates"):
            infold.merge(base.path, adapter, tmp_path / "out", **mode)


@pytest.mark.parametrize("kind", ["nf4", "fp4-nested"])
def test_codes_that_are_called_floats(tmp_path: Path, kind: str) -> None:
    """bnb_4bit_quant_storage: FSDP shards floats only, so codes are called bfloat16."""

    def encode(weight: Tensor) -> Module:
        made = quantized_bases.bitsandbytes(weight, kind)
        made.tensors["weight"] = made.tensors["weight"].view(-1).view(torch.bfloat16)[:, None]
        values = made.values
        made.values = lambda p: values({**p, "weight": p["weight"].view(torch.uint8).view(-1, 1)})
        return made

    base = make_base(tmp_path / "base", "", encode)
    adapter = make_adapter(tmp_path / "adapter", vectors())

    infold.merge(base.path, adapter, tmp_path / "out", undo=True)

    for name, origin in SCALED.items():
        factor = vectors()[f"{LAYER}.{origin}"].double().view(-1, 1)
        exact = factor * base.values(base.path, name)
        found = base.values(tmp_path / "out", name)
        assert ((found - exact).abs() <= exact.abs() * 2.0**-24).all()
        codes = [base.parts(p, name)["weight"] for p in (base.path, tmp_path / "out")]
        assert torch.equal(codes[0].view(torch.uint8), codes[1].view(torch.uint8))
    assert infold.verify(base.path, adapter, tmp_path / "out").ok
    infold.undo(tmp_path / "out", tmp_path / "back")
    back, was = (f / "model.safetensors" for f in (tmp_path / "back", base.path))
    assert back.read_bytes() == was.read_bytes()
    assert "bitsandbytes, " in CliRunner().invoke(app, ["inspect", str(base.path)]).output
    name = "mlp.gate_proj"
    low_rank = handmade.lora(tmp_path / "lora", {f"{LAYER}.{name}": SIZES[name]})
    for mode, most in (("dequantize", 2.0**-8), ("requantize", 0.15)):
        infold.merge(base.path, low_rank, tmp_path / mode, **{mode: True})
        assert infold.verify(base.path, low_rank, tmp_path / mode).ok
        parts = load_file(low_rank / "adapter_model.safetensors")
        a, b = (parts[f"base_model.model.{LAYER}.{name}.lora_{n}.weight"].double() for n in "AB")
        exact = base.values(base.path, name) + 2 * b @ a
        dense = base.parts(tmp_path / mode, name)["weight"].double()
        found = dense if mode == "dequantize" else base.values(tmp_path / mode, name)
        assert (found - exact).norm() < most * exact.norm()
