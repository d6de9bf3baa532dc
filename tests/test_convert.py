"""Where nothing folds: modules become dense, or are quantized again; computed and proven.

The bases are written by the packages that define their formats, and read back by those packages.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import infold
from handmade import RECEIPT, base_folder, digests, ia3, lora
from infold.checkpoint.shards import open_checkpoint
from infold.errors import InfoldError, Refusal
from infold.plan.unconverted import with_fused, with_unconverted
from quantized_bases import KINDS, REFUSED, Module, bitsandbytes

pytestmark = pytest.mark.filterwarnings("ignore")  # of the packages that write the bases

LAYER = "model.layers.0"
SIZES = {
    "self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64), "self_attn.v_proj": (32, 64),
    "mlp.gate_proj": (128, 64), "mlp.up_proj": (128, 64), "mlp.down_proj": (64, 128),
}  # fmt: skip
TOUCHED = ("self_attn.q_proj", "mlp.down_proj")
DENSE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj")
UNKNOWN = (
    "awq-gemv", "awq-gemv_fast", "eetq", "torchao-tinygemm", "torchao-int4", "torchao-int4-plain",
)  # fmt: skip
FORMATS: dict[str, Callable[[Tensor], Module]] = {
    **{n: make for n, make in KINDS.items() if n not in UNKNOWN},
    **{n: make for n, (make, _) in REFUSED.items()},
    "bnb-nf4-nested": lambda w: bitsandbytes(w, "nf4-nested"),
}  # fmt: skip
NO_ROUNDING = {  # and why
    "hqq": "HQQ optimizes", "hqq-axis0": "HQQ optimizes", "ct-tensor": "the whole tensor",
    "torchao-int8-tensor": "the whole tensor", "torchao-intx": "how many of its 8 bits",
}  # fmt: skip


@dataclass
class Base:
    path: Path
    modules: dict[str, Module]

    def parts(self, folder: Path, name: str) -> dict[str, Tensor]:
        """The tensors of a module of a folder, by their names below it."""
        prefix = f"{LAYER}.{name}."
        with safe_open(folder / "model.safetensors", "pt") as file:
            return {
                key.removeprefix(prefix): file.get_tensor(key)
                for key in file.keys()
                if key.startswith(prefix)
            }

    def values(self, name: str, folder: Path | None = None) -> Tensor:
        made = self.modules[name]
        parts = self.parts(folder or self.path, name)
        return made.values({k: v for k, v in parts.items() if k in made.tensors})


def make_base(path: Path, make: Callable[[Tensor], Module], **config: Any) -> Base:
    random = torch.Generator().manual_seed(1)
    torch.manual_seed(1)
    modules, tensors, metadata = {}, {}, {"format": "pt"}
    for name, shape in SIZES.items():
        modules[name] = made = make(torch.randn(shape, generator=random) * 0.05)
        tensors |= {f"{LAYER}.{name}.{part}": t.contiguous() for part, t in made.tensors.items()}
        metadata |= {f"{LAYER}.{name}.{key}": text for key, text in made.metadata.items()}
    tensors[f"{LAYER}.self_attn.q_proj.bias"] = torch.randn(64, generator=random).half()
    tensors[f"{LAYER}.input_layernorm.weight"] = torch.ones(64).bfloat16()
    path.mkdir(parents=True)
    told = {"hidden_act": "silu", "quantization_config": made.config, "dtype": "bfloat16", **config}
    (path / "config.json").write_text(json.dumps(told))
    save_file(tensors, path / "model.safetensors", metadata)
    return Base(path, modules)


def low_rank(path: Path, **config: Any) -> Path:
    return lora(path, {f"{LAYER}.{n}": SIZES[n] for n in TOUCHED}, seed=4, **config)


def update(adapter: Path, name: str, weight: Tensor) -> Tensor:
    """The merged weight, float64, by LoRA's or DoRA's formula in one line each."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    prefix = f"base_model.model.{LAYER}.{name}"
    a, b = (tensors[f"{prefix}.lora_{part}.weight"].double() for part in "AB")
    new = weight + 2 * (b @ a)
    magnitude = tensors.get(f"{prefix}.lora_magnitude_vector")
    if magnitude is None:
        return new
    return magnitude.double()[:, None] / new.norm(dim=1, keepdim=True) * new


def assert_rounded(found: Tensor, exact: Tensor, bits: int = 8) -> None:
    """Each element is within half a unit of a float with that many bits, and a little: for short
    floats the exact product takes 24 bits of each factor."""
    slack = 2e-8 if bits < 24 else 1e-12
    unit = 2.0 ** (torch.frexp(exact)[1].double() - bits)
    unit.clamp_(min=2.0**-24 if bits == 11 else 0.0)  # float16's smallest
    assert ((found.double() - exact).abs() <= unit / 2 * (1 + 1e-6) + slack).all()


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def errors(receipt: Any) -> dict[str, float]:
    return {
        e["tensor"].removeprefix(f"{LAYER}."): e["error"] for e in receipt.edits if "error" in e
    }


def flip(folder: Path, tensor: str, element: int = 5) -> None:
    """Change one bit of a stored tensor."""
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    begin = header[tensor]["data_offsets"][0] + 8 + length
    data[begin + element] ^= 4
    file.write_bytes(data)


# --- dequantize ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
def test_touched_modules_become_dense(kind: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", FORMATS[kind])
    adapter = low_rank(tmp_path / "lora", use_dora=kind in ("gptq", "bnb-nf4", "fp8-blocks"))
    out = tmp_path / "merged"

    receipt = infold.merge(base.path, adapter, out, dequantize=True)

    config = json.loads((out / "config.json").read_text())["quantization_config"]
    if kind.startswith("gptq"):  # what stays is told, too
        (stay,) = config.pop("modules_in_block_to_quantize")
        assert sorted(stay) == sorted(SIZES.keys() - set(DENSE))
    told = json.dumps(config)
    for name in SIZES:
        parts = base.parts(out, name)
        if name not in DENSE:
            before = base.parts(base.path, name)
            assert parts.keys() == before.keys()
            assert all(
                torch.equal(parts[k].view(torch.uint8), t.view(torch.uint8))
                if t.dim() and t.dtype.itemsize == 1 else torch.equal(parts[k], t)
                for k, t in before.items()
            )  # fmt: skip
            assert kind.startswith("hqq") or name.rpartition(".")[2] not in told
            continue
        assert parts.keys() <= {"weight", "bias"}
        exact = base.values(name)
        if name in TOUCHED:
            exact = update(adapter, name, exact)
        assert parts["weight"].dtype == torch.bfloat16
        assert_rounded(parts["weight"], exact)
        measured = errors(receipt)[f"{name}.weight"]
        assert measured == pytest.approx(relative(parts["weight"], exact), rel=1e-3)
        assert name.rpartition(".")[2] in told
    assert torch.equal(
        base.parts(out, "self_attn.q_proj")["bias"],
        base.parts(base.path, "self_attn.q_proj")["bias"],
    )
    assert sorted(receipt.conversion["touched"]) == sorted(f"{LAYER}.{n}" for n in TOUCHED)
    verdict = infold.verify(out)
    assert verdict.ok and verdict.recomputed == len(DENSE), verdict.offenders

    flip(out, f"{LAYER}.self_attn.v_proj.weight")
    found = [o.where for o in infold.verify(base.path, adapter, out).offenders]
    assert f"{LAYER}.self_attn.v_proj.weight" in found


@pytest.mark.parametrize("kind", UNKNOWN)
def test_codes_in_an_unknown_order_are_refused(kind: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", KINDS[kind])

    with pytest.raises(Refusal) as caught:
        infold.merge(base.path, low_rank(tmp_path / "lora"), tmp_path / "out", dequantize=True)

    reasons = [reason for reason in caught.value.reasons if "single elements" in reason]
    assert len(reasons) == len(TOUCHED)
    assert all("known here" in r or "cannot be decoded" in r for r in reasons), reasons


def test_every_dtype_budget_and_number_of_threads(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", KINDS["gptq"])
    adapter = low_rank(tmp_path / "lora")
    exact = update(adapter, "mlp.down_proj", base.values("mlp.down_proj"))
    made = set()
    for dtype, bits in (("f16", 11), ("f32", 24), ("bf16", 8)):
        for number, options in enumerate(({"threads": 1}, {"threads": 2, "max_memory": "64MiB"})):
            out = tmp_path / f"{dtype}-{number}"
            infold.merge(base.path, adapter, out, dequantize=True, dtype=dtype, **options)
            made.add(digests(out)["model.safetensors"])
            assert_rounded(base.parts(out, "mlp.down_proj")["weight"], exact, bits)
            assert infold.verify(out).ok
    assert len(made) == 3


# --- requantize ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind not in NO_ROUNDING])
def test_touched_modules_are_rounded_into_their_format(kind: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", FORMATS[kind])
    adapter = low_rank(tmp_path / "lora")
    out = tmp_path / "merged"

    receipt = infold.merge(base.path, adapter, out, requantize=True)

    with safe_open(base.path / "model.safetensors", "pt") as before:
        with safe_open(out / "model.safetensors", "pt") as after:
            nested = ("nested_absmax", "nested_quant_map") if kind.endswith("nested") else ()
            assert set(before.keys()) - set(after.keys()) == {
                f"{LAYER}.{name}.weight.{part}" for name in TOUCHED for part in nested
            }
            assert set(after.keys()) <= set(before.keys())
            assert before.metadata() == after.metadata()
    assert (out / "config.json").read_bytes() == (base.path / "config.json").read_bytes()
    for name in TOUCHED:
        exact = update(adapter, name, base.values(name))
        found = base.values(name, out)
        moved = {e.get("update") for e in receipt.edits if f".{name}." in e["tensor"]} - {None}
        assert moved.pop() == pytest.approx(relative(base.values(name), exact), rel=1e-3)
        told = {e for tensor, e in errors(receipt).items() if tensor.startswith(f"{name}.")}
        assert len(told) == 1
        assert told.pop() == pytest.approx(relative(found, exact), rel=1e-3)
        worst = 0.2 if base.modules[name].config.get("bits") == 4 or "4" in kind else 0.13
        assert relative(found, exact) < worst
        assert relative(found, base.values(name)) > 0.5 * relative(exact, base.values(name))
    verdict = infold.verify(out)
    assert verdict.ok, verdict.offenders


@pytest.mark.parametrize(("kind", "part"), [
    ("gptq", "qweight"), ("gptq", "scales"), ("gptq", "qzeros"), ("awq", "qzeros"),
    ("bnb-int8", "SCB"), ("bnb-nf4", "weight"), ("fp8-blocks", "weight_scale_inv"),
    ("ct-pack-asymmetric", "weight_zero_point"), ("ct-int8", "weight"),
])  # fmt: skip
def test_a_wrong_code_or_scale_is_found(kind: str, part: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", FORMATS[kind])
    adapter = low_rank(tmp_path / "lora")
    infold.merge(base.path, adapter, tmp_path / "merged", requantize=True)
    name = f"{LAYER}.mlp.down_proj.{part}"

    flip(tmp_path / "merged", name)

    wrong = [o for o in infold.verify(tmp_path / "merged").offenders if o.what == "edited tensor"]
    assert wrong and name in {o.where for o in wrong}, wrong


@pytest.mark.parametrize("kind", [kind for kind in NO_ROUNDING if kind in FORMATS])
def test_formats_that_plain_rounding_does_not_make(kind: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", FORMATS[kind])

    with pytest.raises(Refusal, match=f"{NO_ROUNDING[kind]}.*--dequantize"):
        infold.merge(base.path, low_rank(tmp_path / "lora"), tmp_path / "out", requantize=True)


def test_the_first_gptq_version_and_symmetric_grids(tmp_path: Path) -> None:
    """A symmetric base keeps its fixed zero points, whatever the update."""
    base = make_base(tmp_path / "base", KINDS["gptq"])
    path = base.path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["sym"] = True
    path.write_text(json.dumps(config))
    out = tmp_path / "merged"

    infold.merge(base.path, low_rank(tmp_path / "lora"), out, requantize=True)

    zeros = base.parts(out, "mlp.down_proj")["qzeros"]
    assert (zeros == 0x77777777).all(), "8, less one"
    assert infold.verify(out).ok


def test_a_small_update_that_rounding_swallows_is_told(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", KINDS["bnb-nf4"])
    adapter = low_rank(tmp_path / "lora", alpha=0.01)

    receipt = infold.merge(base.path, adapter, tmp_path / "merged", requantize=True)

    (note,) = [n for n in receipt.notes if "the rounding error is as large as" in n]
    assert "in 2 of 2 weights" in note and "--dequantize keeps all of it" in note


def test_several_adapters_act_in_order_before_one_rounding(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", KINDS["gptq"])
    first, second = low_rank(tmp_path / "lora"), ia3(
        tmp_path / "ia3", vectors(), feedforward_modules=["down_proj"]
    )  # fmt: skip
    out = tmp_path / "merged"

    infold.merge(base.path, [first, second], out, dequantize=True)

    exact = update(first, "mlp.down_proj", base.values("mlp.down_proj"))
    assert_rounded(
        base.parts(out, "mlp.down_proj")["weight"],
        exact * vectors()[f"{LAYER}.mlp.down_proj"].double(),
    )
    key = base.values("self_attn.k_proj") * vectors()[f"{LAYER}.self_attn.k_proj"].double()
    assert_rounded(base.parts(out, "self_attn.k_proj")["weight"], key)
    assert infold.verify(out).ok


@pytest.mark.parametrize("mode", ["dequantize", "requantize"])
def test_an_interrupted_merge_ends_with_the_same_bytes(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal is kept after every tensor or so; a stop in between, then the same command."""
    from infold.merge import stream

    monkeypatch.setattr(stream, "KEEP_EVERY", 1 << 10)
    base = make_base(tmp_path / "base", KINDS["ct-pack-asymmetric"])
    adapter = low_rank(tmp_path / "lora")
    infold.merge(base.path, adapter, tmp_path / "whole", **{mode: True})
    wanted = digests(tmp_path / "whole")

    for share in (0.3, 0.6, 0.9):

        def stop(done: int, total: int, share: float = share) -> None:
            if done > share * total:
                raise KeyboardInterrupt

        out = tmp_path / f"out-{share}"
        with pytest.raises(KeyboardInterrupt):
            infold.merge(base.path, adapter, out, threads=1, progress=stop, **{mode: True})
        assert not out.exists() and (tmp_path / f".{out.name}.infold").exists()
        receipt = infold.merge(base.path, adapter, out, threads=1, **{mode: True})
        assert digests(out) == wanted
        assert infold.verify(out).ok
        if mode == "requantize" and share == 0.9:
            assert receipt.resumed_bytes > 0


# --- promote ------------------------------------------------------------------------------------


def vectors() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(3)
    return {
        f"{LAYER}.self_attn.k_proj": 1 + 0.3 * torch.randn(32, 1, generator=random),
        f"{LAYER}.mlp.down_proj": 1 + 0.3 * torch.randn(1, 128, generator=random),
    }


@pytest.mark.parametrize("kind", REFUSED)
def test_vectors_without_a_place_in_scales(kind: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", FORMATS[kind])
    adapter = ia3(tmp_path / "ia3", vectors(), feedforward_modules=["down_proj"])
    out = tmp_path / "merged"
    with pytest.raises(Refusal, match=REFUSED[kind][1]) as caught:
        infold.merge(base.path, adapter, out)
    assert all("--promote" in reason for reason in caught.value.reasons)

    receipt = infold.merge(base.path, adapter, out, promote=True)

    key, down = (base.parts(out, n)["weight"] for n in ("self_attn.k_proj", "mlp.down_proj"))
    first, second = vectors().values()
    assert_rounded(key, first.double() * base.values("self_attn.k_proj"))
    assert_rounded(down, second.double() * base.values("mlp.down_proj"))
    kept = set() if kind == "hqq-axis0" else {"mlp.gate_proj", "mlp.up_proj"}
    assert all(base.parts(out, n).keys() == base.parts(base.path, n).keys() for n in kept)
    assert receipt.conversion["mode"] == "promote"
    told = json.dumps(json.loads((out / "config.json").read_text())["quantization_config"])
    for name in ("q_proj", "v_proj"):  # which servers load with k_proj as one
        assert_rounded(
            base.parts(out, f"self_attn.{name}")["weight"], base.values(f"self_attn.{name}")
        )
        assert name in told
    assert infold.verify(out).ok


def test_only_what_does_not_fold_is_promoted(tmp_path: Path) -> None:
    """GELU stands before down_proj; k_proj's vector still goes into its scales."""
    base = make_base(tmp_path / "base", KINDS["ct-int8"], hidden_act="gelu")
    tensors = load_file(base.path / "model.safetensors")
    plain = {n: t for n, t in tensors.items() if "gate_proj" not in n}
    save_file(plain, base.path / "model.safetensors", {"format": "pt"})
    adapter = ia3(tmp_path / "ia3", vectors(), feedforward_modules=["down_proj"])
    out = tmp_path / "merged"

    infold.merge(base.path, adapter, out, promote=True, dtype="f16")

    after = load_file(out / "model.safetensors")
    place = f"{LAYER}.self_attn.k_proj"
    assert torch.equal(after[f"{place}.weight"], tensors[f"{place}.weight"])
    assert torch.equal(after[f"{place}.weight_scale"], (
        tensors[f"{place}.weight_scale"].double() * vectors()[place].double()
    ).float())  # fmt: skip
    assert after[f"{LAYER}.mlp.down_proj.weight"].dtype == torch.float16
    told = json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    assert told == [f"{LAYER}.mlp.down_proj"]
    assert infold.verify(out).ok


def test_promote_is_for_vectors(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", KINDS["gptq"])

    with pytest.raises(Refusal, match="--promote is for IA³ vectors; --dequantize"):
        infold.merge(base.path, low_rank(tmp_path / "lora"), tmp_path / "out", promote=True)


# --- the unquantized original -------------------------------------------------------------------


def original(path: Path, **changes: Tensor | None) -> Path:
    random = torch.Generator().manual_seed(1)
    tensors = {
        f"{LAYER}.{n}.weight": (torch.randn(s, generator=random) * 0.05).bfloat16()
        for n, s in SIZES.items()
    }
    for name, tensor in changes.items():
        key = f"{LAYER}.mlp.{name}.weight"
        tensors.pop(key)
        if tensor is not None:
            tensors[key] = tensor
    path.mkdir()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.mark.parametrize("mode", ["dequantize", "requantize"])
def test_values_of_the_unquantized_original(mode: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", KINDS["awq"])
    adapter, first = low_rank(tmp_path / "lora"), original(tmp_path / "original")
    out = tmp_path / "merged"

    infold.merge(base.path, adapter, out, base_16bit=first, **{mode: True})

    dense = load_file(first / "model.safetensors")
    for name in TOUCHED:
        exact = update(adapter, name, dense[f"{LAYER}.{name}.weight"].double())
        if mode == "dequantize":
            assert_rounded(base.parts(out, name)["weight"], exact)
        else:
            assert relative(base.values(name, out), exact) < 0.12
            theirs = update(adapter, name, base.values(name))
            assert relative(base.values(name, out), theirs) > 1.1 * relative(
                base.values(name, out), exact
            )
    if mode == "dequantize":
        beside = base.parts(out, "self_attn.v_proj")["weight"]
        assert_rounded(beside, base.values("self_attn.v_proj"))
    assert infold.verify(out).ok


def test_an_original_of_another_model(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", KINDS["awq"])
    wrong = original(tmp_path / "original", up_proj=torch.ones(128, 32), gate_proj=None)

    with pytest.raises(Refusal) as caught:
        infold.merge(
            base.path, low_rank(tmp_path / "lora"), tmp_path / "out", dequantize=True,
            base_16bit=wrong,
        )  # fmt: skip

    told = "\n".join(caught.value.reasons)
    assert "has no model.layers.0.mlp.gate_proj.weight" in told
    assert "up_proj.weight is F32 [128, 32], not floats of [128, 64]" in told


def test_the_original_is_not_replaced_by_what_is_made_from_it(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", KINDS["awq"])
    adapter = low_rank(tmp_path / "lora")
    infold.merge(original(tmp_path / "dense"), adapter, first := tmp_path / "original")
    before = (first / "model.safetensors").read_bytes()

    with pytest.raises(Refusal, match="lies in or around the input"):
        infold.merge(base.path, adapter, first, dequantize=True, base_16bit=first, force=True)

    assert (first / "model.safetensors").read_bytes() == before


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "why"), [
    ({}, "--dequantize writes such weights unquantized, --requantize"),
    ({"dequantize": True, "requantize": True}, "--dequantize and --requantize exclude each other"),
    ({"dequantize": True, "dtype": "int4"}, "--dtype int4: auto, bf16, f16, f32, q4_0"),
    ({"dtype": "f16"}, "--dtype goes with"),
    ({"requantize": True, "dtype": "f16"}, "--dtype f16 goes with --dequantize"),
    ({"base_16bit": "somewhere"}, "--base-16bit goes with"),
])  # fmt: skip
def test_what_does_not_go_together(options: dict[str, Any], why: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", KINDS["ct-int8"])

    with pytest.raises(Refusal, match=why):
        infold.merge(base.path, low_rank(tmp_path / "lora"), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_in_place_and_dense_bases_are_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", KINDS["ct-int8"])
    adapter = low_rank(tmp_path / "lora")

    with pytest.raises(Refusal, match="--dequantize with --in-place"):
        infold.merge(base.path, adapter, in_place=True, dequantize=True)
    with pytest.raises(Refusal, match="has no quantized weights"):
        infold.merge(original(tmp_path / "dense"), adapter, tmp_path / "out", dequantize=True)


def test_a_config_that_cannot_tell_of_it_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", KINDS["ct-int8"], quantization_config={"quant_method": "x"})

    with pytest.raises(Refusal, match=r"config\.json tells quant_method 'x'"):
        infold.merge(base.path, low_rank(tmp_path / "lora"), tmp_path / "out", dequantize=True)


def test_a_receipt_that_lies_about_the_choice(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", KINDS["ct-int8"])
    out = tmp_path / "merged"
    infold.merge(base.path, low_rank(tmp_path / "lora"), out, dequantize=True)
    receipt = json.loads((out / RECEIPT).read_text())
    receipt["conversion"]["dtype"] = "F16"
    (out / RECEIPT).write_text(json.dumps(receipt))

    verdict = infold.verify(out)

    assert not verdict.ok and "dtype or shape" in {o.what for o in verdict.offenders}


# --- transformers and PEFT ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_model_that_transformers_quantized_and_loads_again(kind: str, tmp_path: Path) -> None:
    """LoRA by PEFT on transformers' own dequantized weights, against the merged folder."""
    import peft
    import transformers as hf

    torch.manual_seed(0)
    config = hf.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=80, tie_word_embeddings=False, pad_token_id=0,
    )  # fmt: skip
    hf.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    way = hf.BitsAndBytesConfig(**(four if kind == "nf4" else {"load_in_8bit": True}))
    load = hf.AutoModelForCausalLM.from_pretrained
    model = load(tmp_path / "dense", quantization_config=way, dtype=torch.float32)
    model.save_pretrained(tmp_path / "base")
    dense = load(tmp_path / "base", dtype=torch.float32).dequantize().float()
    ids = torch.randint(1, 80, (2, 9))
    linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    settings = peft.LoraConfig(
        r=4, target_modules=linears, init_lora_weights=False, use_dora=kind == "nf4"
    )
    adapted = peft.get_peft_model(dense, settings).eval()
    adapted.save_pretrained(tmp_path / "lora")
    out = tmp_path / "merged"

    infold.merge(tmp_path / "base", tmp_path / "lora", out, dequantize=True, dtype="f32")

    merged = load(out, dtype=torch.float32).eval()
    assert {type(m).__name__ for m in merged.modules() if isinstance(m, torch.nn.Linear)} == {
        "Linear"
    }
    with torch.no_grad():
        found, wanted = merged(ids).logits, adapted(ids).logits
        with adapted.disable_adapter():
            without = adapted(ids).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)
    assert (without - wanted).abs().max() > 0.05

    # where the adapter touches one projection, the others stay quantized, but for its siblings
    keys = [k for k in load_file(tmp_path / "lora" / "adapter_model.safetensors") if "q_proj" in k]
    one = {k: load_file(tmp_path / "lora" / "adapter_model.safetensors")[k] for k in keys}
    save_file(one, tmp_path / "lora" / "adapter_model.safetensors")
    infold.merge(tmp_path / "base", tmp_path / "lora", tmp_path / "one", dequantize=True)
    classes = {
        name.rpartition(".")[2]: type(module).__name__
        for name, module in load(tmp_path / "one").named_modules()
    }
    assert [classes[name] for name in ("q_proj", "k_proj", "v_proj", "lm_head")] == ["Linear"] * 4
    assert classes["up_proj"] == {"int8": "Linear8bitLt", "nf4": "Linear4bit"}[kind]

    # quantized again, it loads as it did; NF4 scales are plain now where they were quantized
    infold.merge(tmp_path / "base", tmp_path / "lora", tmp_path / "again", requantize=True)
    place = "model.layers.1.self_attn.q_proj"
    wanted = dict(load(tmp_path / "one", dtype=torch.float32).named_modules())[place].weight
    again = load(tmp_path / "again", dtype=torch.float32).dequantize().float()
    found = dict(again.named_modules())[place].weight
    assert relative(found, wanted.double()) < {"int8": 0.01, "nf4": 0.12}[kind]
    assert infold.verify(tmp_path / "again").ok


# --- hostile files ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [
    "gptq", "awq", "ct-pack-asymmetric", "ct-int8", "bnb-int8", "bnb-nf4-nested", "fp8-blocks",
    "hqq", "torchao-int8",
])  # fmt: skip
def test_parts_of_any_shape_end_in_a_reason(kind: str, tmp_path: Path) -> None:
    """Each part in turn gets other shapes and another dtype: a refusal, or a merge of what it means
    then; never an error of another kind."""
    base = make_base(tmp_path / "base", FORMATS[kind])
    adapter = lora(tmp_path / "lora", {f"{LAYER}.mlp.down_proj": SIZES["mlp.down_proj"]}, seed=4)
    file = base.path / "model.safetensors"
    good = load_file(file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    for part in base.modules["mlp.down_proj"].tensors:
        name = f"{LAYER}.mlp.down_proj.{part}"
        old = good[name]
        others = [old.new_zeros(0), old.new_zeros(1, 1), old.new_zeros(*old.shape, 2)]
        if old.dim():
            others += [old[:-1].contiguous(), old.flatten(), torch.cat((old, old))]
        others.append(old.to(torch.float32) if old.dtype != torch.float32 else old.half())
        for other in others:
            save_file({**good, name: other}, file, metadata)
            for mode in ("dequantize", "requantize"):
                out = tmp_path / "out"
                try:
                    infold.merge(base.path, adapter, out, force=True, **{mode: True})
                except Refusal as refusal:
                    assert refusal.reasons and all("\n" not in r for r in refusal.reasons)
                else:
                    assert infold.verify(out).ok, (part, other.shape, other.dtype)


@pytest.mark.parametrize("kind", ["fp8-blocks", "ct-pack"])
def test_a_base_made_by_hand_that_transformers_reads(kind: str, tmp_path: Path) -> None:
    """What transformers decodes from base and output, with PEFT's LoRA on the one. It decodes
    compressed-tensors in the dtype of the scales, bfloat16 here, so that comparison is coarser."""
    import peft
    import transformers as hf

    torch.manual_seed(0)
    config = hf.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=80, tie_word_embeddings=False, pad_token_id=0,
    )  # fmt: skip
    base, out = tmp_path / "base", tmp_path / "merged"
    hf.AutoModelForCausalLM.from_config(config).save_pretrained(base)
    tensors = load_file(base / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        made = FORMATS[kind](tensors.pop(name).float())
        place = name.removesuffix("weight")
        tensors |= {place + part: tensor.contiguous() for part, tensor in made.tensors.items()}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    told = dict(made.config)
    if kind == "ct-pack":
        scheme = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
        group = {"targets": ["Linear"], "weights": {**scheme, "symmetric": True}}
        told |= {"config_groups": {"group_0": group}, "ignore": ["lm_head"]}
        told["quantization_status"] = "compressed"
    fields = json.loads((base / "config.json").read_text()) | {"quantization_config": told}
    (base / "config.json").write_text(json.dumps(fields))
    way = (
        hf.FineGrainedFP8Config(dequantize=True)
        if kind == "fp8-blocks"
        else hf.CompressedTensorsConfig(run_compressed=False)
    )

    def load(path: Path) -> Any:
        return hf.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, quantization_config=way
        ).eval()

    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(load(base), settings).eval()
    adapted.save_pretrained(tmp_path / "lora")

    infold.merge(base, tmp_path / "lora", out, dequantize=True, dtype="f32")

    ids = torch.randint(1, 80, (2, 9))
    with torch.no_grad():
        found, wanted = load(out)(ids).logits, adapted(ids).logits
        with adapted.disable_adapter():
            without = adapted(ids).logits
    limit = 1e-5 if kind == "fp8-blocks" else 5e-3
    torch.testing.assert_close(found, wanted, rtol=0, atol=limit)
    assert (without - wanted).abs().max() > 20 * limit


# --- what config.json tells loaders -------------------------------------------------------------


SERVED = ["a.q_proj", "a.qkv_proj", "b.w"]  # with the name of what servers load q, k and v as


@pytest.mark.parametrize(("config", "expected"), [
    ({"quant_method": "gptq"}, {"dynamic": {
        r"-:^a\.q_proj$": {}, r"-:^a\.qkv_proj$": {}, r"-:^b\.w$": {}
    }, "modules_in_block_to_quantize": [[]]}),
    ({"quant_method": "awq"}, {"modules_to_not_convert": ["a.q_proj", "a.qkv_proj", "b.w"]}),
    ({"quant_method": "bitsandbytes"}, {"llm_int8_skip_modules": ["lm_head", "a.q_proj", "b.w"]}),
    ({"quant_method": "bitsandbytes", "llm_int8_skip_modules": ["c"]},
     {"llm_int8_skip_modules": ["c", "a.q_proj", "b.w"]}),
    ({"quant_method": "fp8", "ignored_layers": ["c"]},
     {"modules_to_not_convert": ["lm_head", "a.q_proj", "b.w"],
      "ignored_layers": ["c", "a.q_proj", "b.w"]}),
    ({"quant_method": "compressed-tensors", "ignore": ["c"]}, {"ignore": ["c", "a.q_proj", "b.w"]}),
    ({"quant_method": "auto-round"}, {"extra_config": {"a.q_proj": {"bits": 16},
                                                       "b.w": {"bits": 16}}}),
    ({"quant_method": "modelopt", "ignore": ["c"]}, {"ignore": ["c", *SERVED]}),
    ({"quant_method": "modelopt_fp4", "quantization": {"exclude_modules": None}},
     {"quantization": {"exclude_modules": SERVED}}),
    ({"quant_method": "modelopt", "quantized_layers": {"a.q_proj": {}, "c": {}}},
     {"ignore": SERVED, "quantized_layers": {"c": {}}}),
    ({"quant_method": "modelopt", "quantized_layers": {"a.q_proj": {}}}, {"ignore": SERVED}),
])  # fmt: skip
def test_unconverted_modules_by_method(
    config: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    base = open_checkpoint(original(tmp_path / "base"))

    assert with_unconverted(config, ["a.q_proj", "b.w"], base) == {**config, **expected}


def test_experts_are_told_as_what_servers_load_them_as() -> None:
    """vLLM and SGLang ask for `mlp.experts`, which patterns of single experts do not match."""
    found = with_fused([f"l.0.mlp.experts.{n}.up_proj" for n in (0, 11)] + ["l.0.experts_gate"])

    assert [name for name in found if "up_proj" not in name] == [
        "l.0.mlp.experts",
        "l.0.experts_gate",
    ]


# --- ModelOpt, whose lists lie in two files -----------------------------------------------------


def per_tensor(weight: Tensor) -> Module:
    """FP8 as ModelOpt exports it: a scale for the whole weight, and one of activations."""
    scale = weight.abs().amax() / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    parts = {"weight": codes, "weight_scale": scale, "input_scale": torch.tensor(0.02)}
    return Module(parts, lambda t: t["weight"].double() * t["weight_scale"].double(), (), {})


def modelopt_base(path: Path, beside: bool, inside: bool) -> Base:
    """As ModelOpt 0.29 exports FP8: what config.json tells is made of the other file."""
    base = make_base(path, per_tensor)
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]
    producer = {"name": "modelopt", "version": "0.29.0"}
    number = {"dynamic": False, "num_bits": 8, "type": "float"}
    group = {"input_activations": number, "weights": number, "targets": ["Linear"]}
    if inside:
        config["quantization_config"] = {
            "config_groups": {"group_0": group}, "ignore": ["lm_head"], "quant_algo": "FP8",
            "kv_cache_scheme": number, "producer": producer, "quant_method": "modelopt",
        }  # fmt: skip
    if beside:
        section = {
            "quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"],
        }  # fmt: skip
        told = {"producer": producer, "quantization": section}
        (path / "hf_quant_config.json").write_text(json.dumps(told))
    (path / "config.json").write_text(json.dumps(config))
    return base


@pytest.mark.parametrize(("beside", "inside"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("mode", ["promote", "dequantize"])
def test_modelopt_learns_of_dense_modules_wherever_it_looks(
    mode: str, beside: bool, inside: bool, tmp_path: Path
) -> None:
    base = modelopt_base(tmp_path / "base", beside, inside)
    adapter = low_rank(tmp_path / "adapter")
    if mode == "promote":
        adapter = ia3(tmp_path / "ia3", vectors(), feedforward_modules=["down_proj"])
    out, back = tmp_path / "merged", tmp_path / "back"

    infold.merge(base.path, adapter, out, undo=True, **{mode: True})

    dense = sorted(f"{LAYER}.{n}" for n in SIZES if base.parts(out, n).keys() <= {"weight", "bias"})
    assert len(dense) == 4
    names = [f"{LAYER}.self_attn.qkv_proj", *dense]
    before, after = (
        {
            name: json.loads((folder / name).read_text())
            for name in ("config.json", "hf_quant_config.json")
            if (folder / name).exists()
        }
        for folder in (base.path, out)
    )
    if inside:
        told = after["config.json"]["quantization_config"].pop("ignore")
        assert told[0] == "lm_head" and sorted(told[1:]) == sorted(names)
        assert before["config.json"]["quantization_config"].pop("ignore") == ["lm_head"]
    if beside:
        told = after["hf_quant_config.json"]["quantization"].pop("exclude_modules")
        assert told[0] == "lm_head" and sorted(told[1:]) == sorted(names)
        del before["hf_quant_config.json"]["quantization"]["exclude_modules"]
    assert before == after  # and nothing else is told
    assert infold.verify(base.path, adapter, out).ok
    infold.undo(out, back)
    assert digests(back) == digests(base.path)


def test_modelopts_other_file_is_proven_too(tmp_path: Path) -> None:
    base = modelopt_base(tmp_path / "base", beside=True, inside=True)
    out = tmp_path / "merged"
    infold.merge(base.path, low_rank(tmp_path / "adapter"), out, dequantize=True)

    (out / "hf_quant_config.json").write_bytes((base.path / "hf_quant_config.json").read_bytes())

    assert not infold.verify(out).ok


@pytest.mark.parametrize(("text", "why"), [
    ('{"quantization": []}', r"hf_quant_config\.json: quantization is no object"),
    ('{"quantization": {"exclude_modules": "lm_head"}}', "exclude_modules is no list"),
    ("[]", "must hold a JSON object"),
])  # fmt: skip
def test_a_list_that_is_none_is_refused(text: str, why: str, tmp_path: Path) -> None:
    base = modelopt_base(tmp_path / "base", beside=True, inside=True)
    (base.path / "hf_quant_config.json").write_text(text)

    with pytest.raises(InfoldError, match=why):
        infold.merge(base.path, low_rank(tmp_path / "lora"), tmp_path / "out", dequantize=True)
    assert not (tmp_path / "out").exists()


# --- GPTQ, whose loaders read different fields --------------------------------------------------


CODED = [f"model.layers.{n}.{m}" for n in (0, 1, 10) for m in ("self_attn.q_proj", "mlp.up_proj")]


@pytest.mark.parametrize(("dense", "plain", "expected"), [
    ([name for name in CODED if "q_proj" in name], "model.norm", ["mlp.up_proj"]),
    (CODED[2:3], "model.norm", [*CODED[:2], *CODED[3:]]),  # of one layer
    ([name for name in CODED if "q_proj" in name], "visual.layers.0.mlp.up_proj",
     [name for name in CODED if "up_proj" in name]),  # of all layers, and dense elsewhere
])  # fmt: skip
def test_what_stays_in_gptq_is_told_by_names_that_nothing_else_has(
    dense: list[str], plain: str, expected: list[str], tmp_path: Path, monkeypatch: Any
) -> None:
    """optimum replaces what ends with one of the names, vLLM what has one in it."""
    from transformers.utils import quantization_config as hf

    tensors = {f"{name}.qweight": torch.zeros(1, 1).int() for name in CODED}
    tensors[f"{plain}.weight"] = torch.zeros(1, 1)
    base = open_checkpoint(base_folder(tmp_path / "base", tensors, {}))
    config = {"quant_method": "gptq", "bits": 4, "modules_in_block_to_quantize": [["mlp.w"]]}

    told = with_unconverted(config, dense, base)

    monkeypatch.setattr(hf.importlib.metadata, "version", lambda name: "2.0.0")  # optimum's
    (kept,) = hf.GPTQConfig.from_dict(told).to_dict_optimum()["modules_in_block_to_quantize"]
    assert sorted(kept) == sorted(expected)
    stay = set(CODED) - set(dense)
    every = [*CODED, plain]
    assert {name for name in every if any(name.endswith(k) for k in kept)} == stay
    assert {name for name in every if any(k in name for k in kept)} == stay


@pytest.mark.parametrize("method", [None, "gptq"])
def test_gptqmodels_own_file_is_changed_too(method: str | None, tmp_path: Path) -> None:
    """GPTQModel looks into it first; AutoGPTQ's has no method."""
    base = make_base(tmp_path / "base", KINDS["gptq"])
    before = {"bits": 4, "group_size": 32, **({"quant_method": method} if method else {})}
    (base.path / "quantize_config.json").write_text(json.dumps(before))
    out, back = tmp_path / "merged", tmp_path / "back"

    infold.merge(base.path, low_rank(tmp_path / "lora"), out, dequantize=True, undo=True)

    after, config = (
        json.loads((out / name).read_text()) for name in ("quantize_config.json", "config.json")
    )
    fields = ("dynamic", "modules_in_block_to_quantize")
    assert {f: config["quantization_config"][f] for f in fields} == {f: after[f] for f in fields}
    assert {name: value for name, value in after.items() if name not in fields} == before
    assert [name for name in after["dynamic"] if "down_proj" in name] == [
        r"-:^model\.layers\.0\.mlp\.down_proj$"
    ]
    infold.undo(out, back)
    assert digests(back) == digests(base.path)
