"""Adapters into GGUF files: types, orders of rows, names, and files as outputs."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

import ggufs
import handmade
import infold
from forked import infold_command
from ggufs import Stored
from infold.checkpoint.gguf import read_gguf_header
from infold.edit.scales import MOST
from infold.formats.gguf import PACKINGS
from infold.formats.values import ggml as ggml_values
from infold.merge import stream
from infold.plan.gguf import ARCHITECTURES

WIDE, HEADS, GROUPS, ROWS = 256, 4, 2, 64
HEAD = {"attention.head_count": HEADS, "attention.head_count_kv": GROUPS}
SLOW = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S")
SIMPLE = {"Q4_0": 11, "Q5_0": 11, "Q8_0": 11, "IQ4_NL": 11, "F16": 11, "BF16": 8, "F32": 24}
PAIRS = ("Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K")  # whose elements are differences of two products


def matrix(rows: int, columns: int = WIDE, seed: int = 0, size: float = 0.05) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((rows, columns)) * size).astype(np.float32)


def vectors(seed: int, powers: bool, **sizes: int) -> dict[str, Tensor]:
    """By module (dots as two underscores): around 1 with both signs, or powers of two."""
    random = torch.Generator().manual_seed(seed)
    made = {}
    for name, size in sizes.items():
        signs = torch.randint(0, 2, (size, 1), generator=random) * 2.0 - 1
        exponents = torch.randint(-2, 3, (size, 1), generator=random)
        drawn = 1 + torch.randn(size, 1, generator=random) * 0.3
        made[name.replace("__", ".")] = signs * 2.0**exponents if powers else drawn
    return made


def one_layer(folder: Path, tensors: dict[str, Stored], arch: str = "llama", **more: Any) -> Path:
    return ggufs.write(folder / "model.gguf", arch, tensors, {"block_count": 1, **HEAD, **more})


# --- types ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("powers", [False, True], ids=["any factors", "powers of two"])
def test_every_type(powers: bool, tmp_path: Path) -> None:
    """What a merged file decodes to is the vector times what the base decodes to, and its codes are
    the base's. One layer for each type; the values of layer n are of type n."""
    types = [*PACKINGS, "F16", "BF16", "F32"]
    base = {
        f"blk.{n}.attn_v.weight": ggufs.drawn(ROWS, 512, dtype, n)
        if dtype in SLOW
        else ggufs.encode(matrix(ROWS, 512, n, size=1.0), dtype)
        for n, dtype in enumerate(types)
    }
    file = ggufs.write(tmp_path / "base.gguf", "llama", base, HEAD)
    scales = {
        f"model.layers.{n}.self_attn.v_proj": vectors(n, powers, v=ROWS)["v"]
        for n in range(len(types))
    }
    adapter = handmade.ia3(tmp_path / "adapter", scales)

    receipt = infold.merge(file, adapter, tmp_path / "merged.gguf", undo=True)

    merged = ggufs.read(tmp_path / "merged.gguf")
    for n, dtype in enumerate(types):
        name = f"blk.{n}.attn_v.weight"
        factor = scales[f"model.layers.{n}.self_attn.v_proj"].numpy().astype(np.float64)
        was, now = (ggufs.decode(f[name]).astype(np.float64) for f in (base, merged))
        exact = factor * was
        if dtype == "F16":  # some of its random elements are subnormal
            normal = np.abs(exact) >= 2.0**-14
            now, exact = now[normal], exact[normal]
        if powers:
            assert np.array_equal(now, exact), dtype
        elif dtype in SIMPLE:  # an element is one float times one code
            slack = np.abs(exact) * 2.0 ** -SIMPLE[dtype] * (1 + 1e-6)
            assert (np.abs(now - exact) <= slack).all(), dtype
        assert np.linalg.norm(now - exact) < 2e-3 * np.linalg.norm(exact), dtype
        if dtype in PACKINGS:
            others_kept(dtype, base[name][1], merged[name][1])
    assert infold.verify(file, adapter, tmp_path / "merged.gguf").ok
    assert [e["dtype"] for e in receipt.edits] == types
    infold.undo(tmp_path / "merged.gguf", tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == file.read_bytes()


def others_kept(dtype: str, was: np.ndarray, now: np.ndarray) -> None:
    """Which bytes of a block changed: no others than two for each float of its type."""
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[dtype]][1]
    blocks = (was.reshape(-1, size) ^ now.reshape(-1, size)) != 0
    changed = np.flatnonzero(blocks.any(0))
    if dtype == "IQ1_M":  # the top nibble of four words
        assert set(changed) <= {49, 51, 53, 55}
        assert not ((was.reshape(-1, size) ^ now.reshape(-1, size))[:, 49::2] & 0x0F).any()
    else:
        assert len(changed) <= (4 if dtype in PAIRS else 2), (dtype, changed)


@pytest.mark.parametrize("dtype", ["MXFP4", "NVFP4"])
def test_types_without_floats_are_refused(dtype: str, tmp_path: Path) -> None:
    file = one_layer(tmp_path, {"blk.0.attn_v.weight": ggufs.encode(matrix(ROWS), dtype)})
    adapter = handmade.ia3(
        tmp_path / "a", vectors(0, False, model__layers__0__self_attn__v_proj=ROWS)
    )

    with pytest.raises(infold.Refusal, match=rf"{dtype}\): the scales .* safetensors") as caught:
        infold.merge(file, adapter, tmp_path / "m.gguf")
    assert "--promote" not in str(caught.value)  # which is refused, too: nobody knows the values
    with pytest.raises(infold.Refusal, match=rf"{dtype} are not known here; merge into"):
        infold.merge(file, adapter, tmp_path / "m.gguf", promote=True)


def test_low_rank_updates_of_quantized_tensors_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = one_layer(tmp_path, {"blk.0.attn_v.weight": ggufs.encode(matrix(ROWS), "Q4_K")})
    adapter = handmade.lora(tmp_path / "a", {"model.layers.0.self_attn.v_proj": (ROWS, WIDE)})

    with pytest.raises(infold.Refusal, match=r"quantized \(Q4_K\).* --dequantize .* --requantize"):
        infold.merge(file, adapter, tmp_path / "m.gguf")
    powers = one_layer(
        tmp_path / "mx", {"blk.0.attn_v.weight": ggufs.encode(matrix(ROWS), "MXFP4")}
    )
    with pytest.raises(infold.Refusal, match=r"MXFP4 are not known here; merge into") as caught:
        infold.merge(powers, adapter, tmp_path / "m.gguf")
    assert "--dequantize" not in str(caught.value)
    tables = one_layer(tmp_path / "iq", {"blk.0.attn_v.weight": ggufs.drawn(ROWS, WIDE, "IQ3_S")})
    with pytest.raises(infold.Refusal, match=r"quantized \(IQ3_S\).* --dequantize"):
        infold.merge(tables, adapter, tmp_path / "m.gguf")
    monkeypatch.setattr(ggml_values, "find_spec", lambda name: None)
    with pytest.raises(infold.Refusal, match=r"IQ3_S are read by the gguf package.*pip install"):
        infold.merge(tables, adapter, tmp_path / "m.gguf", dequantize=True)


def test_a_factor_of_all_outputs_is_no_matter_to_rows(tmp_path: Path) -> None:
    """llama.cpp multiplies what a tensor gives by NAME.scale, where that is there."""
    stored = {
        "blk.0.attn_v.weight": ggufs.encode(matrix(ROWS), "Q8_0"),
        "blk.0.attn_v.scale": ggufs.encode(np.full(1, 0.5), "F32"),
    }
    file, module = one_layer(tmp_path, stored), "model.layers.0.self_attn.v_proj"
    vector = vectors(1, True, **{module.replace(".", "__"): ROWS})
    scales = handmade.ia3(tmp_path / "ia3", vector)
    low_rank = handmade.lora(tmp_path / "lora", {module: (ROWS, WIDE)})

    infold.merge(file, scales, tmp_path / "m.gguf")

    assert infold.verify(file, scales, tmp_path / "m.gguf").ok
    with pytest.raises(infold.Refusal, match=r"attn_v\.scale is a factor of all that .* gives"):
        infold.merge(file, low_rank, tmp_path / "no.gguf", dequantize=True)


def test_several_vectors_on_one_row_are_rounded_once(tmp_path: Path) -> None:
    """Up's own vector, down's that moves there, another adapter's: one product, one rounding."""
    was = ggufs.encode(matrix(ROWS), "Q8_0")
    gate, down = (ggufs.encode(matrix(*s), "Q8_0") for s in ((ROWS, WIDE), (WIDE, ROWS)))
    tensors = {
        "blk.0.ffn_gate.weight": gate,
        "blk.0.ffn_up.weight": was,
        "blk.0.ffn_down.weight": down,
    }
    file = one_layer(tmp_path, tensors)
    place = "model.layers.0.mlp"
    drawn = [vectors(n, False, v=ROWS)["v"] for n in range(3)]
    one = handmade.ia3(
        tmp_path / "one", {f"{place}.up_proj": drawn[0], f"{place}.down_proj": drawn[1].t()},
        feedforward_modules=["down_proj"],
    )  # fmt: skip
    two = handmade.ia3(tmp_path / "two", {f"{place}.up_proj": drawn[2]})

    infold.merge(file, [one, two], tmp_path / "m.gguf")

    now = ggufs.read(tmp_path / "m.gguf")
    blocks = [
        f.reshape(ROWS, -1, 34)[:, :, :2].copy().view(np.float16)
        for f in (was[1], now["blk.0.ffn_up.weight"][1])
    ]
    factor = torch.stack(drawn).double().prod(0).numpy()[:, :, None]
    exact = blocks[0].astype(np.float64) * factor
    assert np.array_equal(blocks[1], exact.astype(np.float16))
    assert now["blk.0.ffn_down.weight"][1].tobytes() == down[1].tobytes()


# --- scales that lose bits -----------------------------------------------------------------------


def test_scales_that_lose_bits_are_counted(tmp_path: Path) -> None:
    small = ggufs.encode(matrix(ROWS, size=0.02), "Q6_K")  # all of its scales are subnormal
    file = one_layer(tmp_path, {"blk.0.attn_v.weight": small})
    adapter = handmade.ia3(
        tmp_path / "a", vectors(0, False, model__layers__0__self_attn__v_proj=ROWS)
    )

    receipt = infold.merge(file, adapter, tmp_path / "m.gguf")

    told = receipt.edits[0]["rounding"]
    assert told["scales"] == ROWS and told["subnormal"] > ROWS // 2 and not told["zero"]
    assert 5e-4 < told["error"] < MOST["F16"]
    assert f"{told['subnormal']} of {ROWS} edited float16 scales are below" in receipt.notes[-1]


def test_scales_that_fall_to_zero_are_counted(tmp_path: Path) -> None:
    """Two rows become too small for float16, one is meant to vanish: the rest of the tensor is as
    good as ever, so it is told and not refused."""
    was = ggufs.encode(matrix(ROWS, size=1.0), "Q8_0")
    file = one_layer(tmp_path, {"blk.0.attn_v.weight": was})
    scale = vectors(0, False, v=ROWS)["v"]
    scale[3], scale[4], scale[5] = 1e-7, -1e-7, 0.0
    adapter = handmade.ia3(tmp_path / "a", {"model.layers.0.self_attn.v_proj": scale})

    receipt = infold.merge(file, adapter, tmp_path / "m.gguf")

    blocks = WIDE // 32
    told = receipt.edits[0]["rounding"]
    assert (told["scales"], told["subnormal"], told["zero"]) == (
        blocks * ROWS, 2 * blocks, 2 * blocks,
    )  # fmt: skip
    assert told["error"] < 1e-3
    assert f"and {2 * blocks} fell to zero" in receipt.notes[-1]
    assert not ggufs.decode(ggufs.read(tmp_path / "m.gguf")["blk.0.attn_v.weight"])[3:6].any()


def test_scales_that_are_lost_are_refused(tmp_path: Path) -> None:
    tiny = ggufs.encode(matrix(ROWS, size=5e-4), "Q6_K")
    file = one_layer(tmp_path, {"blk.0.attn_v.weight": tiny, "blk.0.attn_q.weight": tiny})
    names = [f"model.layers.0.self_attn.{n}_proj" for n in "vq"]
    adapter = handmade.ia3(tmp_path / "a", {n: torch.full((ROWS, 1), 0.03) for n in names})
    (tmp_path / "out").mkdir()

    with pytest.raises(infold.Refusal) as caught:
        infold.merge(file, adapter, tmp_path / "out" / "m.gguf")

    assert len(caught.value.reasons) == 2 and "infold accepts 3.1%" in caught.value.reasons[0]
    assert list((tmp_path / "out").iterdir()) == []


# --- orders of rows ------------------------------------------------------------------------------


def converted(kind: str, weight: np.ndarray, groups: int) -> np.ndarray:
    """Rows of query_key_value as the converters of llama.cpp lay them."""
    size = (
        weight.shape[0] // (HEADS * 3)
        if kind != "falcon"
        else weight.shape[0] // (HEADS + 2 * groups)
    )
    if kind == "falcon":
        grid = weight.reshape(groups, HEADS // groups + 2, size, -1)
        parts = grid[:, :-2], grid[:, -2:-1], grid[:, -1:]
    else:
        grid = weight.reshape(HEADS, 3, size, -1)
        parts = grid[:, 0], grid[:, 1], grid[:, 2]
    return np.concatenate([p.reshape(-1, weight.shape[1]) for p in parts])


@pytest.mark.parametrize(
    ("kind", "groups", "module"),
    [
        ("gptneox", HEADS, "gpt_neox.layers.0.attention.query_key_value"),
        ("bloom", HEADS, "transformer.h.0.self_attention.query_key_value"),
        ("falcon", 1, "transformer.h.0.self_attention.query_key_value"),
        ("falcon", HEADS, "transformer.h.0.self_attention.query_key_value"),
    ],
)
def test_fused_rows(kind: str, groups: int, module: str, tmp_path: Path) -> None:
    """Scaling and then converting is converting and then merging."""
    rows = 96 if groups == HEADS else (HEADS + 2 * groups) * 8
    plain, bias = matrix(rows), matrix(rows, 1)
    scale = vectors(1, True, v=rows)["v"]
    tensors = {
        "blk.0.attn_qkv.weight": ggufs.encode(converted(kind, plain, groups), "Q8_0"),
        "blk.0.attn_qkv.bias": ggufs.encode(converted(kind, bias, groups)[:, 0], "F32"),
    }
    more = {"attention.head_count_kv": groups}
    file = one_layer(tmp_path, tensors, kind, **more)
    adapter = handmade.ia3(tmp_path / "a", {module: scale})

    infold.merge(file, adapter, tmp_path / "m.gguf")

    found = ggufs.read(tmp_path / "m.gguf")
    wanted = (
        converted(kind, scale.numpy() * plain, groups),
        converted(kind, scale.numpy() * bias, groups),
    )
    assert np.array_equal(
        ggufs.decode(found["blk.0.attn_qkv.weight"]), ggufs.decode(ggufs.encode(wanted[0], "Q8_0"))
    )
    assert np.array_equal(found["blk.0.attn_qkv.bias"][1], wanted[1][:, 0])


@pytest.mark.parametrize(("name", "heads"), [("q", HEADS), ("k", GROUPS)])
def test_a_bias_has_the_order_of_its_rows(name: str, heads: int, tmp_path: Path) -> None:
    """Llama's queries and keys are interleaved by their own heads, and so are their biases."""

    def interleaved(rows: np.ndarray) -> np.ndarray:
        halves = rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:])
        return halves.swapaxes(1, 2).reshape(rows.shape)

    weight, bias = matrix(ROWS), matrix(ROWS, 1)[:, 0]
    scale = vectors(1, True, v=ROWS)["v"]
    tensors = {
        f"blk.0.attn_{name}.weight": ggufs.encode(interleaved(weight), "Q8_0"),
        f"blk.0.attn_{name}.bias": ggufs.encode(interleaved(bias), "F32"),
    }
    file = one_layer(tmp_path, tensors)
    adapter = handmade.ia3(tmp_path / "a", {f"model.layers.0.self_attn.{name}_proj": scale})

    infold.merge(file, adapter, tmp_path / "m.gguf")

    found = ggufs.read(tmp_path / "m.gguf")
    by = scale.numpy().astype(np.float32)
    wanted = ggufs.encode(interleaved(by * weight), "Q8_0")
    assert np.array_equal(ggufs.decode(found[f"blk.0.attn_{name}.weight"]), ggufs.decode(wanted))
    assert np.array_equal(found[f"blk.0.attn_{name}.bias"][1], interleaved(by[:, 0] * bias))


def test_fused_rows_that_cannot_be_told_are_refused(tmp_path: Path) -> None:
    tensors = {"blk.0.attn_qkv.weight": ggufs.encode(matrix(64), "Q8_0")}
    file = one_layer(tmp_path, tensors, "falcon")  # two keys for four heads
    adapter = handmade.ia3(
        tmp_path / "a", {"transformer.h.0.self_attention.query_key_value": torch.ones(64, 1)}
    )

    with pytest.raises(infold.Refusal, match="4 heads with 2 keys, whose order"):
        infold.merge(file, adapter, tmp_path / "m.gguf")


@pytest.mark.parametrize("told", [0, 3, 5])
def test_heads_that_do_not_fit_are_refused(told: int, tmp_path: Path) -> None:
    file = one_layer(
        tmp_path, {"blk.0.attn_k.weight": ggufs.encode(matrix(32), "Q8_0")},
        **{"attention.head_count": told, "attention.head_count_kv": told},
    )  # fmt: skip
    adapter = handmade.ia3(tmp_path / "a", {"model.layers.0.self_attn.k_proj": torch.ones(32, 1)})

    with pytest.raises(infold.Refusal, match=f"32 rows are not {told} heads"):
        infold.merge(file, adapter, tmp_path / "m.gguf")


# --- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_names_are_those_of_the_gguf_package(arch: str) -> None:
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    theirs = gguf.get_tensor_name_map(kinds[arch], 3)
    table = ARCHITECTURES[arch]
    for ours, name in table.names.items():
        path = f"{table.layers}2.{ours}"
        if "{}" in ours:  # converters stack the experts, and name the stack
            path = re.sub(r"model\.(.*\.)block_sparse_moe(.*)", r"\1feed_forward\2", path)
            path = path.replace("experts.{}", "experts")
        assert theirs.get_name(path) == f"blk.2.{name}", ours
    for ours, name in table.outside.items():
        assert theirs.get_name(ours) == name or (name == "output" and arch.startswith("gemma"))


@pytest.mark.parametrize(
    ("name", "doubted"),
    [
        ("Tiny-7B-Instruct.Q4_K_M.gguf", False),
        ("tiny-7b-instruct-ud-iq3_xxs.gguf", False),
        ("Tiny-7B-Instruct-f16.gguf", False),
        ("Tiny-7B.Q8_0.gguf", True),
        ("model.gguf", False),
    ],
)
def test_whose_adapter_it_is(name: str, doubted: bool, tmp_path: Path) -> None:
    tensors = {"blk.0.attn_v.weight": ggufs.encode(matrix(ROWS), "Q8_0")}
    file = one_layer(tmp_path, tensors).rename(tmp_path / name)
    adapter = handmade.ia3(
        tmp_path / "a",
        vectors(0, False, model__layers__0__self_attn__v_proj=ROWS),
        base_model_name_or_path="some/Tiny-7B-Instruct",
    )

    notes = infold.merge(file, adapter, tmp_path / "m.gguf", dry_run=True)["notes"]

    assert any("is it the same model" in note for note in notes) == doubted


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    tensors = {"blk.0.attn_v.weight": ggufs.encode(matrix(ROWS), "Q8_0")}
    file = one_layer(tmp_path, tensors, "smollm3")
    adapter = handmade.ia3(
        tmp_path / "a", vectors(0, False, model__layers__0__self_attn__v_proj=ROWS)
    )

    with pytest.raises(infold.Refusal, match=r"'smollm3'; infold does not know .* llama, qwen2"):
        infold.merge(file, adapter, tmp_path / "m.gguf")
    assert "'smollm3'" in infold.inspect(file)["quantization"][0]["no_fold"]


def test_what_does_not_fit_is_all_listed(tmp_path: Path) -> None:
    tensors = {
        "blk.0.attn_v.weight": ggufs.encode(matrix(ROWS), "Q8_0"),
        "blk.0.ffn_up.weight": ggufs.encode(matrix(ROWS), "Q8_0"),
        "blk.0.ffn_gate.weight": ggufs.encode(matrix(ROWS), "Q8_0"),
        "blk.0.ffn_sub_norm.weight": ggufs.encode(np.ones(ROWS), "F32"),
        "blk.0.ffn_down.weight": ggufs.encode(matrix(WIDE, ROWS), "Q8_0"),
    }
    file = one_layer(tmp_path, tensors)
    layer = "model.layers.0"
    wrong = {
        f"{layer}.self_attn.v_proj": torch.ones(ROWS + 1, 1),
        f"{layer}.self_attn.k_proj": torch.ones(ROWS, 1),
        "model.layers.1.self_attn.v_proj": torch.ones(ROWS, 1),
        f"{layer}.mlp.down_proj": torch.ones(1, ROWS),
        "lm_head": torch.ones(ROWS, 1),
    }
    adapter = handmade.ia3(tmp_path / "a", wrong, feedforward_modules=["down_proj"])

    with pytest.raises(infold.Refusal) as caught:
        infold.merge(file, adapter, tmp_path / "m.gguf")

    told = "\n".join(caught.value.reasons)
    for why in (
        "65 elements, but blk.0.attn_v.weight has 64 outputs",
        "there is no module model.layers.0.self_attn.k_proj in the base",
        "there is no module model.layers.1.self_attn.v_proj in the base",
        "ffn_sub_norm beside it may change its inputs",
        "the base has no head of its own",
    ):
        assert why in told


# --- files ---------------------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tensors = {
        f"blk.{n}.{name}.weight": ggufs.encode(matrix(ROWS, seed=n), "Q4_K")
        for n in range(4)
        for name in ("attn_q", "attn_v")
    }
    tensors["output_norm.weight"] = ggufs.encode(np.ones(5), "F32")  # padding follows
    return ggufs.write(tmp_path / "base" / "model.gguf", "llama", tensors, HEAD)


def scaling(folder: Path, seed: int) -> Path:
    drawn = {
        f"model.layers.{n}.self_attn.{name}_proj": vectors(seed + n, False, v=ROWS)["v"]
        for n in range(4)
        for name in "qv"
    }
    return handmade.ia3(folder, drawn)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return scaling(tmp_path / "adapter", 1)


def test_a_file_and_what_belongs_to_it(base: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "merged.gguf"

    infold.merge(base, adapter, out, undo=True)

    beside = [f"merged.gguf.{name}" for name in ("infold-receipt.json", "infold-undo.bin")]
    assert sorted(os.listdir(out.parent)) == ["merged.gguf", *beside]
    one, two = (read_gguf_header(path) for path in (base, out))
    assert one.raw == two.raw and one.file_size == two.file_size
    infold.merge(base, adapter, tmp_path / "folder")
    assert (tmp_path / "folder" / "model.gguf").read_bytes() == out.read_bytes()
    assert infold.verify(tmp_path / "folder").ok
    assert infold.inspect(out)["kind"] == "merged"
    found = infold.inspect(base)
    assert found["dtypes"]["Q4_K"]["tensors"] == 8
    told = {form["format"]: (form["modules"], form["no_fold"]) for form in found["quantization"]}
    assert told["GGUF Q4_K"] == (8, None)


def test_a_file_is_known_by_what_it_begins_with(base: Path, adapter: Path, tmp_path: Path) -> None:
    """As Ollama's, which have digests for names. What goes with a merged file goes by its name."""
    blob = tmp_path / "blobs" / "sha256-0f1e"
    blob.parent.mkdir()
    shutil.copy(base, blob)
    infold.merge(base, adapter, tmp_path / "wanted.gguf")

    for out, file in (("m.gguf", "m.gguf"), ("folder", "folder/sha256-0f1e.gguf")):
        infold.merge(blob, adapter, tmp_path / out, undo=True)
        assert (tmp_path / file).read_bytes() == (tmp_path / "wanted.gguf").read_bytes()
        assert infold.verify(tmp_path / out).ok and infold.verify(blob, adapter, tmp_path / out).ok
        infold.undo(tmp_path / out, tmp_path / f"back-{out}")
    assert (tmp_path / "back-m.gguf").read_bytes() == base.read_bytes()
    assert os.listdir(tmp_path / "back-folder") == ["sha256-0f1e.gguf"]
    assert infold.inspect(blob)["model_type"] == "llama"
    (tmp_path / "m.gguf").rename(tmp_path / "m.bin")
    for use in (
        lambda: infold.merge(blob, adapter, in_place=True),
        lambda: infold.undo(tmp_path / "m.bin", tmp_path / "no.gguf"),
        lambda: infold.verify(tmp_path / "m.bin"),
    ):
        with pytest.raises(infold.Refusal, match=r"It holds GGUF: call it \S+\.gguf"):
            use()
    assert os.listdir(blob.parent) == [blob.name] and blob.read_bytes() == base.read_bytes()


def test_what_wants_a_folder_says_so(base: Path, tmp_path: Path) -> None:
    with pytest.raises(infold.Refusal, match="of a GGUF file give the folder that it was"):
        infold.bench(base, tmp_path)
    with pytest.raises(infold.Refusal, match="give the model's folder; of a GGUF file the one it"):
        infold.train(base, tmp_path, tmp_path / "out")


def test_what_the_output_will_be_is_said(base: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    told = f"{out} is a folder, with model.gguf in it; for a file write {out}.gguf"
    for given, noted in ((base, True), (base.parent, False)):
        plan = infold.merge(given, adapter, out, dry_run=True)
        assert (told in plan["notes"]) == noted
    wide = {**os.environ, "COLUMNS": "1000"}
    dry = infold_command("merge", base, adapter, "--out", out, "--dry-run", env=wide)
    assert told in dry.stdout
    plain = handmade.base_folder(tmp_path / "plain", {"v.weight": torch.ones(4, 4)})
    scales = handmade.ia3(tmp_path / "v", {"v": torch.ones(4, 1)})

    for ending in ("GGUF", "safetensors", "bin"):
        for inputs in ((base, adapter), (plain, scales)):
            with pytest.raises(infold.Refusal, match=rf"folder, as {out}; .* file, as {out}.gguf"):
                infold.merge(*inputs, tmp_path / f"merged.{ending}")
    with pytest.raises(infold.Refusal, match=rf"does not convert it; give a folder, as {out}$"):
        infold.merge(plain, scales, tmp_path / "merged.gguf")
    assert not list(tmp_path.glob("*merged*"))


def test_what_an_output_replaces(base: Path, adapter: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "merged.gguf", scaling(tmp_path / "other", 9)
    infold.merge(base, adapter, out)
    first = out.read_bytes()

    with pytest.raises(infold.Refusal, match=r"exists already.* --force"):
        infold.merge(base, other, out)
    infold.merge(base, adapter, out, force=True, undo=True)
    infold.merge(base, other, out, force=True)
    assert not (tmp_path / "merged.gguf.infold-undo.bin").exists()
    assert out.read_bytes() != first and infold.verify(out).ok
    journal = tmp_path / "merged.gguf.infold-undo.journal"
    journal.write_text("")
    with pytest.raises(infold.Refusal, match="in the middle of an edit"):
        infold.merge(base, other, out, force=True)
    journal.unlink()
    (tmp_path / "merged.gguf.infold-receipt.json").unlink()
    with pytest.raises(infold.Refusal, match="is no output of infold"):
        infold.merge(base, adapter, out, force=True)
    with pytest.raises(infold.Refusal, match="lies in or around the input"):
        infold.merge(base, adapter, base, force=True)
    with pytest.raises(infold.Refusal, match="does not convert"):
        plain = handmade.base_folder(tmp_path / "plain", {"v.weight": torch.ones(4, 4)})
        infold.merge(
            plain, handmade.ia3(tmp_path / "v", {"v": torch.ones(4, 1)}), tmp_path / "v.gguf"
        )


@pytest.mark.parametrize("name", ["merged.gguf", "merged"])
def test_swap_and_the_way_back(name: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    other = scaling(tmp_path / "other", 9)
    infold.merge(base, adapter, tmp_path / name, undo=True)
    infold.merge(base, other, tmp_path / "wanted.gguf")

    infold.swap(tmp_path / name, other, tmp_path / "swapped.gguf")
    infold.undo(tmp_path / "swapped.gguf", tmp_path / "back")
    infold.undo(tmp_path / name, tmp_path / "restored.gguf")

    assert (tmp_path / "swapped.gguf").read_bytes() == (tmp_path / "wanted.gguf").read_bytes()
    assert (tmp_path / "back" / "model.gguf").read_bytes() == base.read_bytes()
    assert (tmp_path / "restored.gguf").read_bytes() == base.read_bytes()
    assert not list(tmp_path.glob("restored.gguf.*"))


def test_in_place(base: Path, adapter: Path, tmp_path: Path) -> None:
    other, file = scaling(tmp_path / "other", 9), tmp_path / "here" / "m.gguf"
    file.parent.mkdir()
    shutil.copy(base, file)
    infold.merge(base, other, tmp_path / "wanted.gguf")

    infold.merge(file, adapter, in_place=True)
    assert infold.verify(base, adapter, file).ok
    infold.swap(file, other, in_place=True)
    assert file.read_bytes() == (tmp_path / "wanted.gguf").read_bytes()
    infold.undo(file, in_place=True)

    assert file.read_bytes() == base.read_bytes()
    assert os.listdir(file.parent) == ["m.gguf"]


@pytest.mark.parametrize("beside", [True, False])
def test_in_place_after_a_merge_to_another_name(
    beside: bool, base: Path, adapter: Path, tmp_path: Path
) -> None:
    """The record tells the base's name. What is edited is the merged file, wherever the base is."""
    other, pristine = scaling(tmp_path / "other", 9), base.read_bytes()
    infold.merge(base, other, tmp_path / "wanted.gguf")
    first, second = (base.with_name(name) for name in ("first.gguf", "second.gguf"))
    for out in (first, second):
        infold.merge(base, adapter, out, undo=True)
    if not beside:
        base.unlink()

    infold.swap(first, other, in_place=True)
    assert first.read_bytes() == (tmp_path / "wanted.gguf").read_bytes()
    back = [infold.undo(out, in_place=True) for out in (first, second)]

    assert first.read_bytes() == second.read_bytes() == pristine
    assert [list(undone.shards) for undone in back] == [["first.gguf"], ["second.gguf"]]
    left = ["first.gguf", "second.gguf"]
    if beside:
        left.insert(1, "model.gguf")
        assert base.read_bytes() == pristine
    assert sorted(os.listdir(base.parent)) == left


def test_a_changed_file_is_not_undone(base: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged.gguf"
    infold.merge(base, adapter, out, undo=True)
    data = bytearray(out.read_bytes())
    data[-40] ^= 1
    out.write_bytes(data)

    with pytest.raises(infold.Refusal, match="was changed after it was merged"):
        infold.undo(out, tmp_path / "restored.gguf")
    assert not (tmp_path / "restored.gguf").exists()


@pytest.mark.parametrize("where", ["padding", "codes", "metadata", "unedited"])
def test_every_byte_is_proven(where: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged.gguf"
    infold.merge(base, adapter, out)
    header = read_gguf_header(out)
    norm, edited = header.tensors["output_norm.weight"], header.tensors["blk.1.attn_v.weight"]
    place, told = {
        "padding": (norm.end + 3, "between tensors"),
        "codes": (edited.begin + 144 * 5 + 77, "edited tensor"),
        "metadata": (header.raw.index(b"general.architecture") + 33, "metadata"),
        "unedited": (norm.begin + 2, "unedited tensor"),
    }[where]
    data = bytearray(out.read_bytes())
    data[place] ^= 1
    out.write_bytes(data)

    verdict = infold.verify(base, adapter, out)

    assert told in {offender.what for offender in verdict.offenders}


def test_a_model_in_parts(adapter: Path, base: Path, tmp_path: Path) -> None:
    first = ggufs.write(tmp_path / "parts" / "m.gguf", "llama", ggufs.read(base), HEAD, parts=3)
    (tmp_path / "parts" / "README.md").write_text("a model")
    infold.merge(base, adapter, tmp_path / "whole.gguf")

    for given, out in ((first, "one"), (first.parent, "two")):
        infold.merge(given, adapter, tmp_path / out, undo=True)
        assert infold.verify(tmp_path / out).ok
        infold.undo(tmp_path / out, tmp_path / f"{out}-back")

    names = sorted(p.name for p in first.parent.iterdir())
    assert sorted(os.listdir(tmp_path / "two-back")) == names
    for name in names:
        assert (tmp_path / "two-back" / name).read_bytes() == (first.parent / name).read_bytes()
    whole, found = ggufs.read(tmp_path / "whole.gguf"), {}
    for part in sorted((tmp_path / "one").glob("*.gguf")):
        found |= ggufs.read(part)
    assert all(np.array_equal(whole[name][1], found[name][1]) for name in whole)
    with pytest.raises(infold.Refusal, match="has 3 parts; give a folder"):
        infold.merge(first, adapter, tmp_path / "m.gguf")
    with pytest.raises(infold.Refusal, match="give the first"):
        infold.merge(first.with_name("m-00002-of-00003.gguf"), adapter, tmp_path / "x")


def test_a_folder_of_several_models_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    shutil.copy(base, base.with_name("other.gguf"))
    ggufs.write(base.with_name("mmproj.gguf"), "clip", {}, {"general.type": "mmproj"})

    with pytest.raises(infold.Refusal, match=r"several GGUF models \(model.gguf, other.gguf\)"):
        infold.merge(base.parent, adapter, tmp_path / "out")
    base.with_name("other.gguf").unlink()
    infold.merge(base.parent, adapter, tmp_path / "out")

    assert (tmp_path / "out" / "mmproj.gguf").exists()


def test_a_killed_merge_to_a_file_goes_on(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the names: what was complete gets the rest of its names."""
    out, real = tmp_path / "merged.gguf", os.rename

    class Killed(BaseException):
        pass

    def renamed(source: Any, target: Any) -> None:
        if str(target) == str(out):
            raise Killed
        real(source, target)

    monkeypatch.setattr(os, "rename", renamed)
    with pytest.raises(Killed):
        infold.merge(base, adapter, out, undo=True)
    monkeypatch.undo()
    assert not out.exists() and (tmp_path / ".merged.gguf.infold" / "publishing").exists()

    with pytest.raises(infold.Refusal, match="exists now"):
        infold.merge(base, adapter, out, undo=True)

    assert infold.verify(out).ok and not (tmp_path / ".merged.gguf.infold").exists()
    assert json.loads((tmp_path / "merged.gguf.infold-receipt.json").read_text())["undo"]


def test_a_kill_while_leftovers_are_removed_is_no_trouble_to_the_next_merge(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, real = tmp_path / "merged.gguf", shutil.rmtree

    class Killed(BaseException):
        pass

    def removed(*given: Any, **more: Any) -> None:
        real(*given, **more)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", removed)
        with pytest.raises(Killed):
            infold.merge(base, adapter, out)
    assert infold.verify(out).ok and (tmp_path / ".merged.gguf.infold").exists()

    infold.merge(base, adapter, out, force=True)
    assert infold.verify(out).ok and not (tmp_path / ".merged.gguf.infold").exists()


@pytest.mark.parametrize("old", [False, True])
def test_a_merge_to_a_file_that_gets_no_name_is_kept(
    old: bool, base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By then the record and the receipt of an old file are gone, and the new ones are there."""
    out, hidden, real = tmp_path / "merged.gguf", tmp_path / ".merged.gguf.infold", os.rename
    if old:
        infold.merge(base, scaling(tmp_path / "other", 9), out, undo=True)

    def renamed(source: Any, target: Any) -> None:
        if str(target) == str(out):
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), str(source))
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", renamed)
        for _ in range(2):
            with pytest.raises(infold.StorageFailure, match="no space left on the disk"):
                infold.merge(base, adapter, out, undo=True, force=True)
            assert (hidden / "output" / out.name).exists()
    if old:
        infold.merge(base, adapter, out, undo=True, force=True)
    else:
        with pytest.raises(infold.Refusal, match="exists now"):
            infold.merge(base, adapter, out, undo=True)

    assert infold.verify(base, adapter, out).ok and not hidden.exists()
    infold.undo(out, in_place=True)
    assert out.read_bytes() == base.read_bytes()


def test_an_interrupted_merge_goes_on_where_it_was(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is known of the scales then covers those that were written before, too."""
    monkeypatch.setattr(stream, "KEEP_EVERY", 1 << 12)
    whole = infold.merge(base, adapter, tmp_path / "whole.gguf", undo=True)
    out, size = tmp_path / "merged.gguf", base.stat().st_size

    def interrupt(done: int, total: int) -> None:
        if done > size * 2 // 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        infold.merge(base, adapter, out, undo=True, threads=1, progress=interrupt)
    receipt = infold.merge(base, adapter, out, undo=True, threads=1)

    assert receipt.resumed_bytes > size // 2
    assert out.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    told = [[edit["rounding"] for edit in one.edits] for one in (receipt, whole)]
    assert told[0] == told[1] and all(one["scales"] == 2 * ROWS for one in told[0])
    infold.undo(out, tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == base.read_bytes()


def test_a_renamed_file_finds_its_record_by_its_digest(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    """Of several that lie beside, and also where record and receipt were renamed with it."""
    old, new = tmp_path / "merged.gguf", tmp_path / "better.gguf"
    infold.merge(base, adapter, old, undo=True)
    other = tmp_path / "a.gguf"
    infold.swap(old, scaling(tmp_path / "other", 5), other)
    expected = other.read_bytes()
    other.unlink()  # its record and receipt stay
    old.rename(new)

    infold.undo(new, tmp_path / "back.gguf")
    infold.swap(new, tmp_path / "other", tmp_path / "swapped.gguf")
    assert (tmp_path / "back.gguf").read_bytes() == base.read_bytes()
    assert (tmp_path / "swapped.gguf").read_bytes() == expected
    with pytest.raises(infold.Refusal, match=rf"called {old} when .* \(mv {new} {old}\)"):
        infold.undo(new, in_place=True)
    (note,) = infold.inspect(new)["notes"]
    assert "better.gguf.infold-receipt.json is not there" in note
    assert infold.inspect(base)["notes"] == [], "an old name that lies beside is no model's own"

    for name in ("infold-undo.bin", "infold-receipt.json"):
        Path(f"{old}.{name}").rename(f"{new}.{name}")
    infold.undo(new, tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == base.read_bytes()
    infold.undo(new, in_place=True)
    assert new.read_bytes() == base.read_bytes()


def test_a_file_is_undone_in_place_whatever_its_base_is_called(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    """And a file that has the base's name beside it is left alone."""
    out, decoy = tmp_path / "merged.gguf", tmp_path / base.name
    infold.merge(base, adapter, out, undo=True)
    right, merged = base.read_bytes(), out.read_bytes()
    decoy.write_bytes(merged)

    infold.undo(out, in_place=True)

    assert out.read_bytes() == right != merged and decoy.read_bytes() == merged
    names = {"adapter", "base", out.name, decoy.name}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_a_renamed_file_is_told_what_it_lacks(base: Path, adapter: Path, tmp_path: Path) -> None:
    """Receipt and record are found by the file's name: what was looked for, and what lies there."""
    old, new = tmp_path / "merged.gguf", tmp_path / "better.gguf"
    infold.merge(base, adapter, old, undo=True)
    old.rename(new)
    back = rf"\(mv {new} {old}\)"
    told = r"has no better.gguf.{}.*Beside it lies merged.gguf.{}: .*"
    name = "infold-receipt.json"
    with pytest.raises(infold.Refusal, match=told.format(name, name) + back):
        infold.verify(new)

    data = bytearray(new.read_bytes())
    data[-1] ^= 1  # another file than the one that was merged
    new.write_bytes(data)
    name = "infold-undo.bin"
    for use in (
        lambda: infold.undo(new, tmp_path / "never.gguf"),
        lambda: infold.swap(new, adapter, tmp_path / "never.gguf"),
        lambda: infold.undo(new, in_place=True),
    ):
        with pytest.raises(infold.Refusal, match=told.format(name, name) + back):
            use()
    for name in ("infold-undo.bin", "infold-receipt.json"):
        shutil.copy(f"{old}.{name}", f"{new}.{name}")
    with pytest.raises(infold.Refusal, match="was changed after it was merged"):
        infold.undo(new, tmp_path / "never.gguf")
    assert not (tmp_path / "never.gguf").exists()
    (tmp_path / "away").mkdir()
    shutil.copy(new, tmp_path / "away" / "merged.gguf")
    with pytest.raises(infold.Refusal, match="renamed or moved, undo that"):
        infold.undo(tmp_path / "away" / "merged.gguf", tmp_path / "never.gguf")


def test_a_file_without_a_record_is_told_how_to_get_one(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    infold.merge(base, adapter, tmp_path / "merged.gguf")
    told = r"renamed or moved, undo that\. Else merge once more from the base, with --undo, or use"
    with pytest.raises(infold.Refusal, match=told):
        infold.undo(tmp_path / "merged.gguf", tmp_path / "never.gguf")


def test_a_swap_asks_about_the_base_and_not_about_the_merged_file(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    named = shutil.copy(base, tmp_path / "Tiny-1B.Q8_0.gguf")
    infold.merge(named, adapter, tmp_path / "Famous-70B.gguf", undo=True)
    config = adapter / "adapter_config.json"
    doubts = []
    for name in ("someone/Tiny-1B", "someone/Famous-70B"):
        told = {**json.loads(config.read_text()), "base_model_name_or_path": name}
        config.write_text(json.dumps(told))
        out = tmp_path / f"{name.rpartition('/')[2]}-swapped.gguf"
        notes = infold.swap(tmp_path / "Famous-70B.gguf", adapter, out).notes
        doubts.append(any("is it the same model" in note for note in notes))

    assert doubts == [False, True]


def test_the_type_of_a_tensor_is_what_is_told(base: Path, adapter: Path, tmp_path: Path) -> None:
    """And where the edited bytes hold codes, the share of a record says so."""
    ran = infold_command("merge", base, adapter, "--out", tmp_path / "m.gguf", "--undo")
    assert ran.returncode == 0 and "scales within" in ran.stdout
    assert "for the bytes of the edited tensors, codes too" in ran.stdout
    shown = infold_command("inspect", tmp_path / "m.gguf")
    assert "of the bytes of the edited tensors, codes too, without" in shown.stdout
