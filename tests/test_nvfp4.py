"""NVFP4: IA³ goes into the E4M3 scales of its blocks, rounded once, where the user agrees."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

import handmade
import infold
from infold.cli.main import app
from infold.formats import e4m3, format_of
from quantized_bases import nvfp4

pytestmark = pytest.mark.filterwarnings("ignore")  # of the package that writes the bases

LAYER = "model.layers.0"
SIZES = {"self_attn.k_proj": (64, 128), "mlp.gate_proj": (128, 64), "mlp.up_proj": (128, 64)}
SIZES["mlp.down_proj"] = (64, 128)
BESIDE = "mlp.gate_proj"  # servers load it as one with up_proj
WHOLE = {"ct": "weight_global_scale", "modelopt": "weight_scale_2"}
E4M3 = [
    Fraction((8 if code >> 3 else 0) + (code & 7)) * Fraction(2) ** (max(code >> 3, 1) - 10)
    for code in range(127)
]


def nearest(value: Fraction) -> Fraction:
    """In E4M3, ties to the even code; by looking at every number there is."""
    code = min(range(127), key=lambda code: (abs(E4M3[code] - abs(value)), code & 1))
    return E4M3[code] * (-1 if value < 0 else 1)


def base_folder(path: Path, way: str = "ct", scale: float = 1.0) -> Path:
    """One layer by compressed-tensors' own compressor; `modelopt` has other names, and the inverse
    of the scale of the whole. scale: what the scales of blocks are multiplied by."""
    random = torch.Generator().manual_seed(1)
    tensors = {}
    for name, size in SIZES.items():
        parts = nvfp4(torch.randn(size, generator=random) * 0.05, scale).tensors
        if way == "modelopt":
            whole = 1 / parts.pop("weight_global_scale")
            parts = {"weight": parts["weight_packed"], "weight_scale": parts["weight_scale"]}
            parts["weight_scale_2"] = whole.view(())
        tensors |= {f"{LAYER}.{name}.{part}": t.contiguous() for part, t in parts.items()}
    for name in ("self_attn.k_proj", "mlp.up_proj"):
        tensors[f"{LAYER}.{name}.bias"] = torch.randn(SIZES[name][0], generator=random).bfloat16()
    assert tensors[f"{LAYER}.mlp.up_proj.weight_scale"].dtype == torch.float8_e4m3fn
    told = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}
    told = {"quant_method": "modelopt", "quant_algo": "NVFP4"} if way == "modelopt" else told
    config = {"hidden_act": "silu", "quantization_config": told}
    return handmade.base_folder(path, tensors, config)


def values(folder: Path, name: str) -> Tensor:
    """float64 values of a module, by compressed-tensors' own decompressor."""
    found = load_file(folder / "model.safetensors")
    parts = {
        part: found[f"{LAYER}.{name}.{part}"]
        for part in ("weight_packed", "weight_scale", "weight_global_scale")
    }
    return nvfp4(torch.zeros(16, 16)).values(parts)


def adapter_folder(
    path: Path, seed: int = 0, powers: bool = False, first: float | None = None
) -> tuple[Path, dict[str, Tensor]]:
    """l of k_proj and of down_proj's inputs, and the factors of rows that they are."""
    random = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in (("self_attn.k_proj", (64, 1)), ("mlp.down_proj", (1, 128))):
        vector = 1 + 0.1 * torch.randn(shape, generator=random)
        if powers:
            vector = torch.exp2(torch.randint(-2, 1, shape, generator=random).float())
        if first is not None:
            vector.view(-1)[0] = first
        found[f"{LAYER}.{name}"] = vector
    rows = {
        "self_attn.k_proj": found[f"{LAYER}.self_attn.k_proj"].double(),
        "mlp.up_proj": found[f"{LAYER}.mlp.down_proj"].double().t(),
    }
    return handmade.ia3(path, found, feedforward_modules=["down_proj"]), rows


@pytest.mark.parametrize("way", ["ct", "modelopt"])
def test_every_scale_is_the_nearest(tmp_path: Path, way: str) -> None:
    base = base_folder(tmp_path / "base", way)
    adapter, rows = adapter_folder(tmp_path / "adapter")

    receipt = infold.merge(base, adapter, tmp_path / "out", lossy=True, undo=True)

    before, after = (load_file(f / "model.safetensors") for f in (base, tmp_path / "out"))
    edited = {f"{LAYER}.{name}.weight_scale" for name in (*rows, BESIDE)}
    edited |= {f"{LAYER}.{name}.{WHOLE[way]}" for name in (*rows, BESIDE)}
    edited |= {f"{LAYER}.{name}.bias" for name in rows}
    for name, old in before.items():
        raw = after[name].contiguous().view(-1).view(torch.uint8)
        assert torch.equal(old.view(-1).view(torch.uint8), raw) == (name not in edited), name
    for name, factor in rows.items():
        key, whole = f"{LAYER}.{name}.weight_scale", f"{LAYER}.{name}.{WHOLE[way]}"
        assert float(after[whole] / before[whole]) == (0.5 if way == "ct" else 2)
        old, new = before[key].double(), after[key].double()
        off = size = 0.0
        for i in range(len(old)):
            times = Fraction(float(factor[i])) / 2  # the other half went to the whole
            for j in range(old.shape[1]):
                exact = Fraction(float(old[i, j])) * times
                # the merge rounds a float64 product: 24 and 4 bits fit into it
                assert Fraction(float(new[i, j])) == nearest(exact), (name, i, j)
                off += float(nearest(exact) - exact) ** 2
                size += float(exact) ** 2
        (told,) = (e["rounding"] for e in receipt.edits if e["tensor"] == key)
        assert told["error"] == pytest.approx((off / size) ** 0.5, rel=1e-3)
        assert 0.015 < told["error"] < 0.035
    assert any("E4M3 scales" in note for note in receipt.notes)
    assert infold.verify(tmp_path / "out").ok
    infold.undo(tmp_path / "out", tmp_path / "back")
    assert handmade.digests(tmp_path / "back") == handmade.digests(base)


def test_powers_of_two_are_exact_and_decode_to_the_product(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base")
    adapter, rows = adapter_folder(tmp_path / "adapter", powers=True)

    receipt = infold.merge(base, adapter, tmp_path / "out", lossy=True)

    for name, factor in rows.items():
        assert torch.equal(values(tmp_path / "out", name), values(base, name) * factor)
    assert all(e["rounding"]["error"] == 0 for e in receipt.edits if "rounding" in e)


def test_the_weight_is_as_far_off_as_the_scales_are(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base")
    adapter, rows = adapter_folder(tmp_path / "adapter")

    receipt = infold.merge(base, adapter, tmp_path / "out", lossy=True)

    for name, factor in rows.items():
        exact = values(base, name) * factor
        error = float((values(tmp_path / "out", name) - exact).norm() / exact.norm())
        told = [
            e["rounding"]["error"] for e in receipt.edits if name in e["tensor"] if "rounding" in e
        ]
        assert told[0] == pytest.approx(error, rel=0.15)


@pytest.mark.parametrize("way", ["ct", "modelopt"])
def test_without_lossy_it_is_refused_with_the_way_out(tmp_path: Path, way: str) -> None:
    base = base_folder(tmp_path / "base", way)
    adapter, _ = adapter_folder(tmp_path / "adapter")

    with pytest.raises(infold.Refusal) as caught:
        infold.merge(base, adapter, tmp_path / "out")

    assert len(caught.value.reasons) == 2
    assert all("NVFP4" in r and "--lossy" in r for r in caught.value.reasons)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("most", "halvings"), [(464 / 448, 0), (1.0359, 1), (2.0, 1), (3.0, 2)])
def test_what_would_overflow_goes_one_level_up(tmp_path: Path, most: float, halvings: int) -> None:
    """The largest block of a weight has the scale 448 already, which is the nearest up to 464."""
    base = base_folder(tmp_path / "base")
    vectors = {f"{LAYER}.mlp.down_proj": torch.full((1, 128), most)}
    vectors[f"{LAYER}.mlp.down_proj"][0, ::2] = 0.5
    large = handmade.ia3(tmp_path / "large", vectors, feedforward_modules=["down_proj"])
    out = tmp_path / "out"

    receipt = infold.merge(base, large, out, lossy=True, undo=True)

    before, after = (load_file(f / "model.safetensors") for f in (base, out))
    for name in ("mlp.up_proj", BESIDE):
        key = f"{LAYER}.{name}.weight_global_scale"
        assert float(before[key] / after[key]) == 2.0**halvings
    kept = f"{LAYER}.self_attn.k_proj.weight_scale"
    assert torch.equal(before[kept].view(torch.uint8), after[kept].view(torch.uint8))
    assert torch.equal(values(out, BESIDE), values(base, BESIDE))
    exact = values(base, "mlp.up_proj") * vectors[f"{LAYER}.mlp.down_proj"].double().t()
    found = values(out, "mlp.up_proj")
    assert torch.equal(found[::2], exact[::2])
    assert float(((found - exact) / exact).nan_to_num().abs().max()) <= 1 / 16
    assert any("moved a power of two" in note for note in receipt.notes) == (halvings > 0)
    assert infold.verify(base, [large], out).ok
    infold.undo(out, tmp_path / "back")
    assert handmade.digests(tmp_path / "back") == handmade.digests(base)


def test_what_is_not_finite_is_refused_in_no_time(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base")
    for number, most in enumerate((torch.inf, torch.nan)):
        adapter, _ = adapter_folder(tmp_path / f"{number}", first=most)
        with pytest.raises(infold.Refusal, match="NaN or inf in 1 element"):
            infold.merge(base, adapter, tmp_path / "out", lossy=True)


def test_a_broken_weight_that_servers_load_with_it_is_a_reason(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base")
    path = base / "model.safetensors"
    tensors = load_file(path)
    key = f"{LAYER}.{BESIDE}.weight_global_scale"
    tensors[key] = tensors[key].repeat(2)
    save_file(tensors, path, {"format": "pt"})
    adapter, _ = adapter_folder(tmp_path / "adapter")

    with pytest.raises(infold.Refusal, match=r"gate_proj: its weight_global_scale is F32 \[2\]"):
        infold.merge(base, adapter, tmp_path / "out", lossy=True)


def test_verify_sees_a_scale_of_the_whole_that_was_forgotten(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base")
    adapter, _ = adapter_folder(tmp_path / "adapter")
    infold.merge(base, adapter, tmp_path / "out", lossy=True)
    path = tmp_path / "out" / "model.safetensors"
    before, after = load_file(base / "model.safetensors"), load_file(path)
    for name in ("mlp.up_proj", BESIDE):
        key = f"{LAYER}.{name}.weight_global_scale"
        save_file(after | {key: before[key]}, path, {"format": "pt"})

        verdict = infold.verify(base, [adapter], tmp_path / "out")

        assert key in [offender.where for offender in verdict.offenders]


def test_a_negative_element_is_refused(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base")
    adapter, _ = adapter_folder(tmp_path / "adapter", first=-1.0)

    with pytest.raises(
        infold.Refusal, match=r"one element is negative, .* without a sign"
    ) as caught:
        infold.merge(base, adapter, tmp_path / "out", lossy=True)

    assert len(caught.value.reasons) == 2


def test_what_falls_to_zero_is_counted_and_small_scales_are_refused(tmp_path: Path) -> None:
    adapter, _ = adapter_folder(tmp_path / "adapter", first=2.0**-20)
    receipt = infold.merge(base_folder(tmp_path / "base"), adapter, tmp_path / "out", lossy=True)
    fell = {e["tensor"]: e["rounding"]["zero"] for e in receipt.edits if "rounding" in e}
    assert fell == {
        f"{LAYER}.self_attn.k_proj.weight_scale": 8,
        f"{LAYER}.mlp.up_proj.weight_scale": 4,
        f"{LAYER}.{BESIDE}.weight_scale": 0,
    }
    assert any("12 fell to zero" in note for note in receipt.notes)

    small = base_folder(tmp_path / "small", scale=2.0**-15)
    with pytest.raises(infold.Refusal, match="below E4M3's normal range"):
        infold.merge(small, adapter, tmp_path / "out2", lossy=True)


def test_an_fp8_weight_is_refused_as_ever(tmp_path: Path) -> None:
    """Eight bits without scales are no place for an adapter, whatever the user agrees to."""
    weight = torch.randn(64, 128).to(torch.float8_e4m3fn)
    base = handmade.base_folder(tmp_path / "base", {f"{LAYER}.self_attn.k_proj.weight": weight})
    vector = {f"{LAYER}.self_attn.k_proj": torch.full((64, 1), 0.5)}
    adapter = handmade.ia3(tmp_path / "adapter", vector, feedforward_modules=[])

    for lossy in (False, True):
        with pytest.raises(infold.Refusal, match="F8_E4M3"):
            infold.merge(base, adapter, tmp_path / "out", lossy=lossy)
    assert format_of("F8_E4M3") is None


def test_verify_sees_one_flipped_bit(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base")
    adapter, _ = adapter_folder(tmp_path / "adapter")
    infold.merge(base, adapter, tmp_path / "out", lossy=True)
    path, key = tmp_path / "out" / "model.safetensors", f"{LAYER}.mlp.up_proj.weight_scale"
    tensors = load_file(path)
    tensors[key].view(torch.uint8)[5, 2] ^= 1
    save_file(tensors, path, {"format": "pt"})

    verdict = infold.verify(base, [adapter], tmp_path / "out")

    assert not verdict.ok
    assert any(key in str(offender) for offender in verdict.offenders)


def test_swap_in_place_and_back(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base")
    one, _ = adapter_folder(tmp_path / "one")
    two, _ = adapter_folder(tmp_path / "two", seed=2)
    infold.merge(base, two, tmp_path / "wanted", lossy=True)
    wanted, original = (handmade.digests(tmp_path / n) for n in ("wanted", "base"))

    infold.merge(base, one, in_place=True, lossy=True)
    with pytest.raises(infold.Refusal, match="--lossy"):
        infold.swap(base, two, tmp_path / "swapped")
    infold.swap(base, two, tmp_path / "swapped", lossy=True)
    infold.swap(base, two, in_place=True, lossy=True)

    key = "model.safetensors"
    assert wanted[key] == handmade.digests(base)[key]
    assert wanted[key] == handmade.digests(tmp_path / "swapped")[key]
    infold.undo(base, in_place=True)
    assert handmade.digests(base) == original


def test_the_command_tells_the_error(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base")
    adapter, _ = adapter_folder(tmp_path / "adapter")
    out = tmp_path / "out"

    done = CliRunner().invoke(app, ["merge", str(base), str(adapter), "--out", str(out), "--lossy"])

    assert done.exit_code == 0, done.output
    text = " ".join(done.output.split())
    assert "3 weights (NVFP4) moved a power of two" in text and "1 of them since servers" in text
    assert "1,536 E4M3 scales of blocks (NVFP4) were rounded to their four bits" in text
    assert "the relative error of all is 0.02" in text
    told = json.loads((out / "infold-receipt.json").read_text())
    assert sum(e["rounding"]["scales"] for e in told["edits"] if "rounding" in e) == 1536


def test_e4m3_is_rounded_once() -> None:
    """Middles of neighbours, and what lies next to them in float64, which float32 cannot tell."""
    numbers = torch.tensor([float(number) for number in E4M3], dtype=torch.float64)
    middles = (numbers[1:] + numbers[:-1]) / 2
    near = torch.cat([middles, middles * (1 + 2.0**-50), middles * (1 - 2.0**-50), numbers])
    every = torch.cat([near, -near])

    found = e4m3.encode(every, "F8_E4M3").double()

    assert [Fraction(x) for x in found.tolist()] == [nearest(Fraction(x)) for x in every.tolist()]
    beyond = torch.tensor(
        [464.0, 464.0 * (1 + 2.0**-50), 1e300, torch.inf, -500.0], dtype=torch.float64
    )
    assert e4m3.encode(beyond, "F8_E4M3").double().isnan().tolist() == [False] + [True] * 4
