"""The proof by running, of GGUF files: right merges pass in every type, wrong ones fail."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from peft import PeftModel
from safetensors.torch import save_file

import ggufs
import handmade
import infold
from gguf_models import GROUPS, INNER, LAYERS, MODELS, SIZE, WIDE, base_file, load
from infold.checkpoint.gguf import read_gguf_header
from infold.errors import Refusal
from infold.verify.moved import write_moved
from infold.verify.outputs import prove_outputs
from training import new_tokenizer

pytestmark = pytest.mark.usefixtures("calm")
PROMPTS = "the film was good\na bad plot\n"


def tokenizer_metadata() -> dict[str, Any]:
    """A byte-level tokenizer in the keys of GGUF."""
    told = json.loads(new_tokenizer("bytes").backend_tokenizer.to_str())["model"]
    tokens = sorted(told["vocab"], key=told["vocab"].get)
    special = [len(token) > 2 and token.startswith("<") for token in tokens]
    pairs = [m if isinstance(m, str) else " ".join(m) for m in told["merges"]]
    return {
        "tokenizer__ggml__model": "gpt2", "tokenizer__ggml__tokens": tokens,
        "tokenizer__ggml__merges": pairs,
        "tokenizer__ggml__bos_token_id": 0, "tokenizer__ggml__eos_token_id": 1,
        "tokenizer__ggml__token_type": [3 if control else 1 for control in special],
    }  # fmt: skip


def new_base(folder: Path, dtype: str, instead: Any = None) -> Path:
    return base_file(folder, MODELS["llama"], dtype, 320, instead, **tokenizer_metadata())


def ia3(folder: Path) -> Path:
    """k, v and down of both layers, between a half and one and a half."""
    random = torch.Generator().manual_seed(3)
    sizes = {"self_attn.k_proj": (GROUPS * SIZE, 1), "self_attn.v_proj": (GROUPS * SIZE, 1),
             "mlp.down_proj": (1, INNER)}  # fmt: skip
    vectors = {
        f"model.layers.{layer}.{name}": 0.5 + torch.rand(size, generator=random)
        for layer in range(LAYERS)
        for name, size in sizes.items()
    }
    return handmade.ia3(
        folder, vectors, feedforward_modules=["down_proj"],
        target_modules=["k_proj", "v_proj", "down_proj"],
    )  # fmt: skip


def lora(folder: Path) -> Path:
    sizes = {"self_attn.q_proj": (WIDE, WIDE), "mlp.down_proj": (WIDE, INNER)}
    modules = {f"model.layers.{n}.{name}": s for n in range(LAYERS) for name, s in sizes.items()}
    return handmade.lora(folder, modules, target_modules=["q_proj", "down_proj"])


def prove(base: Path, adapter: Path, merged: Path, **options: Any) -> Any:
    prompts = adapter.parent / "prompts.txt"
    prompts.write_text(PROMPTS)
    return prove_outputs(base, [adapter], merged, prompts=prompts, new_tokens=4, **options)


def failed(found: Any) -> list[Any]:
    return [check for check in found.checks if not check.ok]


@pytest.mark.parametrize("dtype", ["Q8_0", "Q4_1", "IQ4_NL", "F16", "BF16", "F32"])
def test_a_right_merge_passes(dtype: str, tmp_path: Path) -> None:
    base, adapter = new_base(tmp_path / "base", dtype), ia3(tmp_path / "ia3")
    infold.merge(base, adapter, tmp_path / "merged.gguf")

    found = prove(base, adapter, tmp_path / "merged.gguf")

    assert found.ok, failed(found)
    effect, merged = found.differences["effect"], found.differences["merged"]
    assert merged.mean < effect.mean / 20 and merged.positions > 20
    assert "control" not in found.differences and not found.notes


def test_a_base_of_another_name_is_run_too(tmp_path: Path) -> None:
    base, adapter = new_base(tmp_path / "base", "Q8_0"), ia3(tmp_path / "ia3")
    base = base.rename(base.with_name("sha256-0f1e"))
    infold.merge(base, adapter, tmp_path / "merged.gguf")

    assert prove(base, adapter, tmp_path / "merged.gguf").ok


@pytest.mark.parametrize("dtype", ["IQ1_M", "IQ2_XS", "TQ1_0"])
def test_types_that_consist_of_tables(dtype: str, tmp_path: Path) -> None:
    """A vector goes into their scales, or with --dequantize a LoRA beside their values."""
    names = [f"blk.{layer}.ffn_down.weight" for layer in range(LAYERS)]
    drawn = {name: ggufs.drawn(WIDE, INNER, dtype, seed) for seed, name in enumerate(names)}
    base = new_base(tmp_path / "base", "Q8_0", drawn)
    rows = {"target_modules": ["down_proj"], "feedforward_modules": []}
    vector = 0.5 + torch.rand(WIDE, 1, generator=torch.Generator().manual_seed(1))
    modules = {f"model.layers.{n}.mlp.down_proj": vector + n for n in range(LAYERS)}
    scales = handmade.ia3(tmp_path / "ia3", modules, **rows)
    infold.merge(base, scales, tmp_path / "scales.gguf")
    low_rank = lora(tmp_path / "lora")
    infold.merge(base, low_rank, tmp_path / "dense.gguf", dequantize=True)

    for adapter, merged in ((scales, "scales.gguf"), (low_rank, "dense.gguf")):
        found = prove(base, adapter, tmp_path / merged)
        assert found.ok, failed(found)
        assert infold.verify(base, adapter, tmp_path / merged).ok


def test_a_right_merge_into_subnormal_scales_passes(tmp_path: Path) -> None:
    """The vector takes the scales of v, which are normal in float16, to where they have few bits;
    the next layer makes up for it, so that the outputs depend on them."""
    base = new_base(tmp_path / "base", "Q8_0")
    data, tensors = bytearray(base.read_bytes()), ggufs.read(base)
    for tensor in GGUFReader(base).tensors:
        for name, factor in (("attn_v", 2.0**-6), ("attn_output", 2.0**10)):
            if name in tensor.name:
                made = ggufs.encode(ggufs.decode(tensors[tensor.name]) * factor, "Q8_0")[1]
                data[tensor.data_offset : tensor.data_offset + made.nbytes] = made.tobytes()
    base.write_bytes(data)
    random = torch.Generator().manual_seed(3)
    adapter = handmade.ia3(
        tmp_path / "ia3",
        {
            f"model.layers.{layer}.self_attn.v_proj": 0.03
            + 0.04 * torch.rand(GROUPS * SIZE, 1, generator=random)
            for layer in range(LAYERS)
        },
        target_modules=["v_proj"],
    )
    receipt = infold.merge(base, adapter, tmp_path / "merged.gguf")
    rounding = receipt.edits[0]["rounding"]
    assert rounding["subnormal"] > 0.9 * rounding["scales"]

    found = prove(base, adapter, tmp_path / "merged.gguf")

    assert found.ok, failed(found)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_a_right_merge_of_lora_passes(dtype: str, tmp_path: Path) -> None:
    base, adapter = new_base(tmp_path / "base", dtype), lora(tmp_path / "lora")
    infold.merge(base, adapter, tmp_path / "merged.gguf")

    assert prove(base, adapter, tmp_path / "merged.gguf").ok


def put_back(base: Path, merged: Path, names: tuple[str, ...]) -> None:
    """Tensors of a merged file get the base's bytes."""
    data, before = bytearray(merged.read_bytes()), ggufs.read(base)
    for tensor in GGUFReader(merged).tensors:
        if any(name in tensor.name for name in names):
            raw = before[tensor.name][1].tobytes()
            data[tensor.data_offset : tensor.data_offset + len(raw)] = raw
    merged.write_bytes(data)


@pytest.mark.parametrize("names", [("blk.1.attn_v.",), ("blk.0.ffn_",), ("",)])
@pytest.mark.parametrize("dtype", ["Q8_0", "Q4_1", "BF16"])
def test_a_wrong_merge_fails_by_its_outputs_alone(
    names: tuple[str, ...], dtype: str, tmp_path: Path
) -> None:
    """Without the edit of one module; and the base, passed off as merged."""
    base, adapter = new_base(tmp_path / "base", dtype), ia3(tmp_path / "ia3")
    merged = tmp_path / "merged.gguf"
    infold.merge(base, adapter, merged)
    put_back(base, merged, names)

    found = prove(base, adapter, merged)

    assert not found.ok and "adapter mode and the merged folder" in failed(found)[0].what
    assert any("is it the base?" in note for note in found.notes) is (names == ("",))


def test_figures_are_those_of_peft_and_transformers(tmp_path: Path) -> None:
    """The largest difference on a text, by PEFT's own forward and transformers' reader."""
    base, adapter = new_base(tmp_path / "base", "Q4_1"), ia3(tmp_path / "ia3")
    merged, text = tmp_path / "merged.gguf", tmp_path / "text.txt"
    infold.merge(base, adapter, merged)
    text.write_text("the film was good and fine")

    found = prove(base, adapter, merged, text=text)

    one, two = PeftModel.from_pretrained(load(base), adapter).eval(), load(merged)
    tokenizer, asked, apart, loss = new_tokenizer("bytes"), [], [], 0.0
    for line in (*PROMPTS.splitlines(), text.read_text()):
        ids = tokenizer(line, return_tensors="pt", add_special_tokens=False)["input_ids"]
        asked.append(ids)
        with torch.no_grad():
            left, right = one(input_ids=ids), two(ids, labels=ids)
        apart.append(float((left.logits - right.logits).abs().max()))
        loss = float(right.loss)
    # the greedy continuations of the prompts may differ by more
    assert 0 < max(apart) <= found.differences["merged"].largest * (1 + 1e-3)
    assert found.perplexity["merged"] == pytest.approx(math.exp(loss), rel=1e-3)
    assert found.tokens == asked[-1].shape[1]


def test_converted_weights(tmp_path: Path) -> None:
    """LoRA into Q8_0 as BF16 is proven; quantized again it is refused before anything is run."""
    base, adapter = new_base(tmp_path / "base", "Q8_0"), lora(tmp_path / "lora")
    infold.merge(base, adapter, tmp_path / "bf16.gguf", dequantize=True, dtype="bf16")
    infold.merge(base, adapter, tmp_path / "again.gguf", requantize=True)

    found = prove(base, adapter, tmp_path / "bf16.gguf")

    assert found.ok, failed(found)
    with pytest.raises(Refusal, match=r"quantized again.* without --outputs"):
        prove(base, adapter, tmp_path / "again.gguf")


def test_what_cannot_be_run_is_refused(tmp_path: Path) -> None:
    adapter = ia3(tmp_path / "ia3")
    bare = base_file(tmp_path / "bare", MODELS["llama"])
    infold.merge(bare, adapter, tmp_path / "merged.gguf")
    with pytest.raises(Refusal, match=r"tokenizer cannot be read: .*; copy the tokenizer files"):
        prove(bare, adapter, tmp_path / "merged.gguf")
    base = new_base(tmp_path / "base", "Q8_0")
    parts = ggufs.write(tmp_path / "parts" / "m.gguf", "llama", ggufs.read(base), parts=2)
    with pytest.raises(Refusal, match=r"in 2 parts, .*llama-gguf-split --merge"):
        prove(parts, adapter, tmp_path / "merged.gguf")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text("{}")
    save_file({"x": torch.ones(1)}, tmp_path / "folder" / "model.safetensors")
    with pytest.raises(Refusal, match="both be GGUF files, or both be folders"):
        prove(base, adapter, tmp_path / "folder")


def test_a_folder_of_a_file_and_a_tokenizer_beside_it(tmp_path: Path) -> None:
    base = base_file(tmp_path / "base", MODELS["llama"], vocabulary=320)
    new_tokenizer("bytes").save_pretrained(base.parent)
    adapter = ia3(tmp_path / "ia3")
    infold.merge(base.parent, adapter, tmp_path / "merged")

    (tmp_path / "prompts.txt").write_text(PROMPTS)
    run: dict[str, Any] = {
        "outputs": True, "prompts": tmp_path / "prompts.txt", "new_tokens": 2
    }  # fmt: skip

    verdict = infold.verify(base.parent, adapter, tmp_path / "merged", **run)

    assert verdict.ok and verdict.outputs is not None and verdict.outputs.ok
    assert json.loads((tmp_path / "merged" / "records" / "outputs.json").read_text())["ok"]
    shutil.copy(base, tmp_path / "merged" / "model.gguf")
    verdict = infold.verify(base, adapter, tmp_path / "merged", **run)
    assert verdict.offenders and verdict.outputs is not None and not verdict.outputs.ok


@pytest.mark.parametrize("dtype", ["Q4_1", "Q6_K", "IQ1_M", "F16", "BF16", "F32"])
def test_one_float_in_four_moves_by_one_place(dtype: str, tmp_path: Path) -> None:
    """By numpy's own neighbours; no code changes, and no other tensor."""
    random = np.random.default_rng(0)
    values = random.standard_normal((8, 512)).astype(np.float32)
    stored = ggufs.drawn(8, 512, dtype) if dtype == "IQ1_M" else ggufs.encode(values, dtype)
    tensors = {"a.weight": ggufs.encode(values, "F32"), "b.weight": stored}
    base = ggufs.write(tmp_path / "base.gguf", "llama", tensors)
    header = read_gguf_header(base)

    write_moved(base, header.tensors, {"b.weight": dtype}, tmp_path / "out.gguf")

    found = ggufs.read(tmp_path / "out.gguf")
    assert np.array_equal(found["a.weight"][1], tensors["a.weight"][1])
    was, now = (ggufs.decode(one).astype(np.float64) for one in (stored, found["b.weight"]))
    if dtype in ("F16", "F32"):
        kind = np.float16 if dtype == "F16" else np.float32
        exact, moved = was.astype(kind), now.astype(kind)
        up, down = (np.nextafter(exact, kind(end)) for end in (np.inf, -np.inf))
        ups, downs, kept = ((moved == one).mean() for one in (up, down, exact))
        assert ups + downs + kept == 1
        assert abs(ups - 1 / 8) < 0.02 and abs(downs - 1 / 8) < 0.02
    else:
        apart = np.abs(now - was).max() / np.abs(was).max()
        assert 0 < apart < {"BF16": 2**-7}.get(dtype, 2**-9)
        same = (stored[1] == found["b.weight"][1]).mean()
        assert 0.8 < same < 1


@pytest.mark.parametrize("factor", [0.03, 1.3, -5.0])
def test_a_float_moves_by_a_place_of_what_is_merged(factor: float, tmp_path: Path) -> None:
    """The product, by numpy's spacing of float16 there: half a place in the root mean square, but
    that a move is a whole number of the base's places."""
    values = np.random.default_rng(0).standard_normal((64, 512)).astype(np.float32) / 64
    base = ggufs.write(tmp_path / "b.gguf", "llama", {"a.weight": ggufs.encode(values, "Q8_0")})
    header = read_gguf_header(base)
    factors = torch.full((64 * 16, 1), factor, dtype=torch.float64)

    write_moved(
        base, header.tensors, {"a.weight": "Q8_0"}, tmp_path / "m.gguf", {"a.weight": factors}
    )

    was, now = (
        ggufs.read(file)["a.weight"][1].reshape(-1, 34)[:, :2].copy().view(np.float16)[:, 0]
        for file in (base, tmp_path / "m.gguf")
    )
    exact, moved = (x.astype(np.float64) * factor for x in (was, now))
    places = (moved - exact) / np.spacing(np.abs(exact).astype(np.float16)).astype(np.float64)
    assert 0.4 < np.sqrt((places**2).mean()) < 0.7
