"""LoRA into GGUF files: touched tensors in floats, or quantized anew, the rest as it is.

Read back by the gguf package. Rows of queries and keys have llama.cpp's order, so the oracle puts
the update's rows in that order by the converters' formula.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFWriter
from safetensors.torch import load_file

import ggufs
import infold
import test_gguf_models as models
from handmade import ia3, lora
from infold.checkpoint.gguf import read_gguf_header
from infold.errors import Refusal
from infold.formats.values.ggml import ENCODES, TYPES

WIDE, HEADS, GROUPS = 256, 4, 2
SIZES = {
    "attn_q": (256, WIDE), "attn_k": (128, WIDE), "attn_v": (128, WIDE), "ffn_up": (512, WIDE),
    "ffn_gate": (512, WIDE), "ffn_down": (WIDE, 512),
}  # fmt: skip
PATHS = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def stored(kind: str, rows: int, columns: int, seed: int) -> np.ndarray:
    """Rows of bytes: any codes, with float16 around 0.001 where the floats of a block lie."""
    random = np.random.default_rng(seed)
    number = GGMLQuantizationType[kind]
    if kind in ("F16", "F32", *ENCODES):
        values = (random.standard_normal((rows, columns)) * 0.05).astype(np.float32)
        return gguf.quants.quantize(values, number)
    elements, size = GGML_QUANT_SIZES[number]
    blocks = random.integers(0, 256, (rows * columns // elements, size), np.uint8)
    places = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
    places |= {"TQ1_0": (52,), "TQ2_0": (64,)}
    if kind == "IQ1_M":
        return ggufs.drawn(rows, columns, kind, seed)[1]
    for place in places.get(kind, (0,)):
        scale = (1e-3 * (1 + random.random((len(blocks), 1)))).astype(np.float16)
        blocks[:, place : place + 2] = scale.view(np.uint8)
    return blocks.reshape(rows, -1)


def make(path: Path, kind: str, alignment: int = 32, architecture: str = "llama") -> Path:
    writer = GGUFWriter(path, architecture)
    writer.add_string("general.name", "a name of an odd length")
    writer.add_custom_alignment(alignment)
    writer.add_uint32(f"{architecture}.block_count", 1)
    writer.add_uint32(f"{architecture}.attention.head_count", HEADS)
    writer.add_uint32(f"{architecture}.attention.head_count_kv", GROUPS)
    for seed, (name, shape) in enumerate(SIZES.items()):
        if architecture == "gpt2" and name == "ffn_gate":
            continue
        own = "Q8_0" if name == "attn_v" and kind != "F16" else kind
        data = stored(own, *shape, seed)
        writer.add_tensor(f"blk.0.{name}.weight", data, raw_dtype=GGMLQuantizationType[own])
    norm = np.arange(5, dtype=np.float32)  # of a length that asks for padding
    writer.add_tensor("blk.0.attn_norm.weight", norm, raw_dtype=GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read(path: Path) -> dict[str, tuple[str, np.ndarray]]:
    return {
        t.name.split(".")[2]: (t.tensor_type.name, np.array(t.data))
        for t in GGUFReader(path).tensors
    }


def values(tensors: dict[str, tuple[str, np.ndarray]], name: str) -> torch.Tensor:
    return torch.from_numpy(ggufs.decode(tensors[name]).astype(np.float64))


def low_rank(path: Path, *names: str, **config: float) -> Path:
    names = names or tuple(PATHS)
    return lora(path, {f"model.layers.0.{PATHS[n]}": SIZES[n] for n in names}, seed=4, **config)


def update(adapter: Path, name: str) -> torch.Tensor:
    """2 B A, its rows where llama.cpp's converters put those of such a tensor."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    prefix = f"base_model.model.model.layers.0.{PATHS[name]}"
    a, b = (tensors[f"{prefix}.lora_{part}.weight"].double() for part in "AB")
    delta = 2 * (b @ a)
    if name in ("attn_q", "attn_k"):
        heads = HEADS if name == "attn_q" else GROUPS
        split = delta.view(heads, 2, len(delta) // heads // 2, -1)
        delta = split.transpose(1, 2).reshape(delta.shape)
    return delta


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def errors(receipt: Any) -> dict[str, float]:
    return {e["tensor"].split(".")[2]: e["error"] for e in receipt.edits if "error" in e}


@pytest.mark.parametrize("kind", TYPES)
def test_touched_tensors_become_floats(kind: str, tmp_path: Path) -> None:
    base = make(tmp_path / "base.gguf", kind, alignment=64 if kind == "Q6_K" else 32)
    adapter, out = low_rank(tmp_path / "lora"), tmp_path / "merged.gguf"
    with pytest.raises(Refusal, match=r"changes single elements.*--dequantize"):
        infold.merge(base, adapter, out)

    receipt = infold.merge(base, adapter, out, dequantize=True)

    before, after = read(base), read(out)
    assert list(before) == list(after)
    for name, (type_, data) in after.items():
        if name not in PATHS:
            assert (type_, data.tobytes()) == (before[name][0], before[name][1].tobytes())
            continue
        assert type_ == "F16"
        exact = values(before, name) + update(adapter, name)
        found = values(after, name)
        assert (found - exact).abs().max() <= exact.abs().max() * 2.0**-11
        assert errors(receipt)[name] == pytest.approx(relative(found, exact), rel=1e-2)
        plain = values(before, name) + update(adapter, name).flip(0)
        assert relative(found, plain) > 5 * relative(found, exact), (
            "another order of rows is another result"
        )
    headers = [read_gguf_header(path) for path in (base, out)]
    assert headers[0].raw[: headers[0].table] == headers[1].raw[: headers[1].table]
    assert infold.verify(out).ok


@pytest.mark.parametrize(("kind", "target"), [
    *((kind, "auto") for kind in ENCODES), ("Q4_K", "q8_0"), ("Q6_K", "q5_1"), ("IQ4_XS", "q4_0"),
])  # fmt: skip
def test_touched_tensors_are_quantized_anew(kind: str, target: str, tmp_path: Path) -> None:
    base = make(tmp_path / "base.gguf", kind)
    adapter, out = low_rank(tmp_path / "lora", "attn_k", "ffn_down"), tmp_path / "merged.gguf"

    receipt = infold.merge(base, adapter, out, requantize=True, dtype=target)

    before, after = read(base), read(out)
    for name in after:
        if name not in ("attn_k", "ffn_down"):
            assert after[name][1].tobytes() == before[name][1].tobytes()
            continue
        assert after[name][0] == (kind if target == "auto" else target.upper())
        exact = values(before, name) + update(adapter, name)
        found = values(after, name)
        assert relative(found, exact) < {"8": 0.01, "5": 0.06, "4": 0.14}[after[name][0][1]]
        assert errors(receipt)[name] == pytest.approx(relative(found, exact), rel=1e-3)
    assert infold.verify(out).ok, infold.verify(out).offenders

    header = read_gguf_header(out)
    data = bytearray(out.read_bytes())
    data[header.tensors["blk.0.ffn_down.weight"].begin + 9] ^= 2  # one code of the first block
    out.write_bytes(data)
    wrong = {o.where for o in infold.verify(base, adapter, out).offenders}
    assert "blk.0.ffn_down.weight" in wrong


@pytest.mark.parametrize(
    ("options", "kind"),
    [({"dequantize": True}, "F16"), ({"requantize": True, "dtype": "q8_0"}, "Q8_0")],
)
def test_a_model_in_parts(options: dict[str, Any], kind: str, tmp_path: Path) -> None:
    """Each part keeps its tensors, whatever becomes of their types, and the way back is exact."""
    tensors = {
        f"blk.{n}.{name}.weight": ("Q4_K", stored("Q4_K", 64, WIDE, n))
        for n in range(4)
        for name in ("attn_q", "attn_v")
    }
    head = {"attention.head_count": HEADS, "attention.head_count_kv": GROUPS}
    first = ggufs.write(tmp_path / "base/m.gguf", "llama", tensors, head, parts=3)
    shapes = {f"model.layers.{n}.self_attn.v_proj": (64, WIDE) for n in range(4)}
    adapter, out = lora(tmp_path / "lora", shapes), tmp_path / "out"

    infold.merge(first, adapter, out, undo=True, **options)

    parts = sorted(first.parent.iterdir())
    assert [p.name for p in parts] == [p.name for p in sorted(out.glob("*.gguf"))]
    for part in parts:
        before, after = ggufs.read(part), ggufs.read(out / part.name)
        assert list(before) == list(after)
        assert all(after[n][0] == (kind if "attn_v" in n else "Q4_K") for n in after)
    assert infold.verify(out).ok
    infold.undo(out, tmp_path / "back")
    assert all((tmp_path / "back" / p.name).read_bytes() == p.read_bytes() for p in parts)


def test_the_note_on_rounding_ranks_the_types_as_they_are(tmp_path: Path) -> None:
    """A small update of a Q4_1 file. Into Q4_1 again its error is that most of it is gone, into
    Q8_0 one of the same size is noise beside all of it; into Q5_1 there is much more of that."""
    base = make(tmp_path / "base.gguf", "Q4_1")
    adapter = low_rank(tmp_path / "lora", "attn_q", "ffn_down", "attn_k", alpha=0.1)
    told = {}
    for kind in ("q4_1", "q5_1", "q8_0"):
        out = tmp_path / f"{kind}.gguf"
        receipt = infold.merge(base, adapter, out, requantize=True, dtype=kind)
        (note,) = [n for n in receipt.notes if "the rounding error is as large as" in n]
        left, noise, change = re.search(
            r"(\d+)% of that change is left .* noise of ([\d.]+)% .* change is ([\d.]+)%", note
        ).groups()
        told[kind] = int(left), float(noise)

        # the same from the files, by the package gguf
        before, after = read(base), read(out)
        changes, written, sizes = [], [], []
        for name in ("attn_q", "ffn_down", "attn_k"):
            changes.append(update(adapter, name).flatten() * (0.1 / 8))
            written.append((values(after, name) - values(before, name)).flatten())
            sizes.append(values(before, name).flatten() + changes[-1])
        asked, got, norm = torch.cat(changes), torch.cat(written), torch.cat(sizes).norm()
        share = float(asked @ got / (asked @ asked))
        assert int(left) == pytest.approx(100 * min(1, max(0, share)), abs=0.6)
        assert float(noise) == pytest.approx(
            100 * float((got - share * asked).norm() / norm), abs=0.02
        )
        assert float(change) == pytest.approx(100 * float(asked.norm() / norm), abs=0.02)
    assert told["q4_1"][0] < 60 < 80 < told["q8_0"][0]
    assert told["q8_0"][1] < 1 < told["q5_1"][1]


def test_what_plain_rounding_does_not_make(tmp_path: Path) -> None:
    base = make(tmp_path / "base.gguf", "Q4_K")

    with pytest.raises(Refusal, match=r"Q4_K is not made by plain rounding; --dtype q8_0"):
        infold.merge(base, low_rank(tmp_path / "lora"), tmp_path / "merged.gguf", requantize=True)


def test_values_of_an_unquantized_gguf_file(tmp_path: Path) -> None:
    base, first = make(tmp_path / "base.gguf", "Q4_0"), make(tmp_path / "first.gguf", "F16")
    adapter, out = low_rank(tmp_path / "lora", "attn_q"), tmp_path / "merged.gguf"

    infold.merge(base, adapter, out, dequantize=True, dtype="bf16", base_16bit=first)

    exact = values(read(first), "attn_q") + update(adapter, "attn_q")
    after = read(out)
    assert after["attn_q"][0] == "BF16"
    assert relative(values(after, "attn_q"), exact) < 2.0**-9
    assert infold.verify(out).ok


def test_a_vector_without_a_place_is_promoted(tmp_path: Path) -> None:
    """GPT-2's GELU stands before ffn_down; attn_v's vector goes into its scales."""
    base = make(tmp_path / "base.gguf", "Q4_1", architecture="gpt2")
    vector = 1 + 0.3 * torch.randn(1, 512, generator=torch.Generator().manual_seed(1))
    up = 1 + 0.3 * torch.randn(512, 1, generator=torch.Generator().manual_seed(2))
    adapter = ia3(
        tmp_path / "ia3",
        {"transformer.h.0.mlp.c_proj": vector, "transformer.h.0.mlp.c_fc": up},
        feedforward_modules=["mlp.c_proj"],
    )
    with pytest.raises(Refusal, match="gelu_new"):
        infold.merge(base, adapter, tmp_path / "out.gguf")

    infold.merge(base, adapter, tmp_path / "out.gguf", promote=True)

    before, after = read(base), read(tmp_path / "out.gguf")
    assert {n for n in after if after[n][0] != before[n][0]} == {"ffn_down"}
    exact = values(before, "ffn_down") * vector.double()
    assert relative(values(after, "ffn_down"), exact) < 2.0**-11
    assert relative(values(after, "ffn_up"), values(before, "ffn_up") * up.double()) < 1e-3
    assert infold.verify(tmp_path / "out.gguf").ok


# --- transformers reads the file, PEFT attaches the adapter ---------------------------------------


@pytest.mark.parametrize(("name", "kind"), [
    ("llama", "lora"), ("llama", "dora"), ("qwen2", "lora"), ("bloom", "lora"), ("phi3", "lora"),
])  # fmt: skip
def test_a_converted_file_is_the_adapted_model(
    name: str, kind: str, tmp_path: Path, calm: None
) -> None:
    import peft

    model = models.MODELS[name]
    file = models.base_file(tmp_path / "base", model, "Q8_0")
    config = peft.LoraConfig(
        r=4, lora_alpha=16, target_modules=list(model.targets), use_dora=kind == "dora",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    adapted = peft.get_peft_model(models.load(file), config).eval()
    random = torch.Generator().manual_seed(3)
    for path, parameter in adapted.named_parameters():
        if "lora_B" in path:
            parameter.data = torch.randn(parameter.shape, generator=random) / 8
        elif "magnitude" in path:
            parameter.data *= 0.5 + torch.rand(parameter.shape, generator=random)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    expected = models.logits(adapted)

    infold.merge(file, tmp_path / "adapter", tmp_path / "merged.gguf", dequantize=True, dtype="f32")

    found = models.logits(models.load(tmp_path / "merged.gguf"))
    assert models.close(found, expected)
    assert not models.close(found, models.logits(models.load(file)))
    assert infold.verify(tmp_path / "merged.gguf").ok


def test_a_promoted_file_is_the_adapted_model(tmp_path: Path, calm: None) -> None:
    """GPT-2: GELU before c_proj, which becomes F32; the vector of c_attn folds (powers of two)."""
    gpt2 = replace(
        models.MODELS["gpt2"], targets=("c_attn", "mlp.c_proj"), feedforward=("mlp.c_proj",)
    )
    file = models.base_file(tmp_path / "base", gpt2, "Q8_0")
    expected = models.logits(models.adapted(file, gpt2, tmp_path / "adapter"))

    infold.merge(file, tmp_path / "adapter", tmp_path / "merged.gguf", promote=True, dtype="f32")

    assert models.close(models.logits(models.load(tmp_path / "merged.gguf")), expected)
    kinds = {t.name: t.tensor_type.name for t in GGUFReader(tmp_path / "merged.gguf").tensors}
    assert kinds["blk.1.ffn_down.weight"] == "F32" and kinds["blk.1.attn_qkv.weight"] == "Q8_0"
