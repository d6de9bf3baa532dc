"""Converted weights and back: the record keeps the codes and scales that were replaced."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import infold
import test_convert as folders
import test_convert_gguf as files
from handmade import RECEIPT, digests, ia3
from infold.checkpoint.gguf import read_gguf_header
from infold.checkpoint.record import UNDO
from infold.cli.main import app
from infold.errors import CorruptFile, Refusal
from quantized_bases import KINDS, bitsandbytes

pytestmark = pytest.mark.filterwarnings("ignore")  # of the packages that write the bases


def restored(base: Path, adapter: Path, place: Path, **options: Any) -> Any:
    """Merge with a record, prove it, take it back, and compare every byte. Returns the receipt."""
    out, back = (place / f"{name}{base.suffix}" for name in ("merged", "back"))
    receipt = infold.merge(base, adapter, out, undo=True, **options)
    assert infold.verify(base, adapter, out).ok
    infold.undo(out, back)
    if base.is_dir():
        assert digests(back) == digests(base)
        assert (out / UNDO).stat().st_size == receipt.undo["bytes"]
    else:
        assert back.read_bytes() == base.read_bytes()
    return receipt


@pytest.mark.parametrize("kind", folders.FORMATS)
def test_dense_weights_become_what_they_were(kind: str, tmp_path: Path) -> None:
    base = folders.make_base(tmp_path / "base", folders.FORMATS[kind])

    receipt = restored(base.path, folders.low_rank(tmp_path / "lora"), tmp_path, dequantize=True)

    kept = sum(t.nbytes for n in folders.DENSE for t in base.parts(base.path, n).values())
    assert kept < receipt.undo["bytes"] < kept + 60_000  # the adapter, the header, digests


@pytest.mark.parametrize(
    "kind", [kind for kind in folders.FORMATS if kind not in folders.NO_ROUNDING]
)
def test_codes_come_back(kind: str, tmp_path: Path) -> None:
    base = folders.make_base(tmp_path / "base", folders.FORMATS[kind])

    restored(base.path, folders.low_rank(tmp_path / "lora"), tmp_path, requantize=True)


def test_what_was_promoted_and_what_was_folded(tmp_path: Path) -> None:
    base = folders.make_base(tmp_path / "base", folders.FORMATS["ct-tensor"])
    adapter = ia3(tmp_path / "ia3", folders.vectors(), feedforward_modules=["down_proj"])

    restored(base.path, adapter, tmp_path, promote=True)

    with pytest.raises(Refusal, match="converted weights cannot be swapped; restore the base"):
        infold.swap(tmp_path / "merged", adapter, tmp_path / "swapped")


def test_values_of_the_original_are_taken_back(tmp_path: Path) -> None:
    base = folders.make_base(tmp_path / "base", KINDS["awq"])
    first = folders.original(tmp_path / "original")

    out, back = tmp_path / "merged", tmp_path / "back"
    adapter = folders.low_rank(tmp_path / "lora")
    infold.merge(base.path, adapter, out, base_16bit=first, dequantize=True, undo=True)
    infold.undo(out, back)

    assert digests(back) == digests(base.path)


@pytest.mark.parametrize("kind", ["bnb-int8", "ct-fp8", "gptq"])
def test_a_module_that_was_trained_whole_is_taken_back(kind: str, tmp_path: Path) -> None:
    """modules_to_save: the dense weight of the adapter takes the place of codes."""
    base = folders.make_base(tmp_path / "base", KINDS[kind])
    adapter = folders.low_rank(tmp_path / "lora", modules_to_save=["up_proj"])
    weights = adapter / "adapter_model.safetensors"
    place = f"base_model.model.{folders.LAYER}.mlp.up_proj.weight"
    save_file({**load_file(weights), place: torch.randn(folders.SIZES["mlp.up_proj"])}, weights)

    restored(base.path, adapter, tmp_path, dequantize=True)


def test_codes_come_back_in_place(tmp_path: Path) -> None:
    """Codes that were written again lie where they lay; what became dense does not."""
    base = folders.make_base(tmp_path / "base", KINDS["gptq"])
    adapter, out, dense = folders.low_rank(tmp_path / "lora"), tmp_path / "one", tmp_path / "two"
    infold.merge(base.path, adapter, out, undo=True, requantize=True)
    infold.merge(base.path, adapter, dense, undo=True, dequantize=True)

    infold.undo(out, in_place=True)

    assert digests(out) == digests(base.path) and not (out / RECEIPT).exists()
    with pytest.raises(Refusal, match="layout would change"):
        infold.undo(dense, in_place=True)


@pytest.mark.parametrize("mode", ["dequantize", "requantize"])
def test_an_interrupted_merge_has_its_record(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from infold.merge import stream

    monkeypatch.setattr(stream, "KEEP_EVERY", 1 << 10)
    base = folders.make_base(tmp_path / "base", lambda w: bitsandbytes(w, "nf4-nested"))
    adapter, out = folders.low_rank(tmp_path / "lora"), tmp_path / "merged"

    def stop(done: int, total: int) -> None:
        if done > 0.9 * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        infold.merge(base.path, adapter, out, threads=1, undo=True, progress=stop, **{mode: True})
    infold.merge(base.path, adapter, out, threads=1, undo=True, **{mode: True})
    infold.undo(out, tmp_path / "back")

    assert digests(tmp_path / "back") == digests(base.path)


def test_a_changed_output_and_a_damaged_record_are_refused(tmp_path: Path) -> None:
    base = folders.make_base(tmp_path / "base", KINDS["ct-int8"])
    adapter, out = folders.low_rank(tmp_path / "lora"), tmp_path / "merged"
    infold.merge(base.path, adapter, out, undo=True, dequantize=True)
    record = (out / UNDO).read_bytes()

    folders.flip(out, f"{folders.LAYER}.mlp.up_proj.weight")
    with pytest.raises(Refusal, match="was changed after it was merged"):
        infold.undo(out, tmp_path / "back")
    folders.flip(out, f"{folders.LAYER}.mlp.up_proj.weight")
    (out / UNDO).write_bytes(record[:-2000] + bytes([record[-2000] ^ 1]) + record[-1999:])
    with pytest.raises(CorruptFile, match="damaged"):
        infold.undo(out, tmp_path / "back")
    assert not (tmp_path / "back").exists()


# --- GGUF ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "options"), [
    ("Q4_K", {"dequantize": True}), ("Q6_K", {"dequantize": True, "dtype": "f32"}),
    ("Q4_1", {"requantize": True}), ("Q5_K", {"requantize": True, "dtype": "q8_0"}),
])  # fmt: skip
def test_a_file_comes_back(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    base = files.make(tmp_path / "base.gguf", kind, alignment=64)

    restored(base, files.low_rank(tmp_path / "lora"), tmp_path, **options)


def test_a_file_without_padding_at_its_end_comes_back(tmp_path: Path) -> None:
    """Some writers end with the last tensor, others at the next multiple of the alignment."""
    base = files.make(tmp_path / "base.gguf", "Q4_0")
    end = max(t.end for t in read_gguf_header(base).tensors.values())
    data = base.read_bytes()
    assert end < len(data)
    base.write_bytes(data[:end])

    restored(base, files.low_rank(tmp_path / "lora"), tmp_path, dequantize=True)


def test_a_promoted_file_comes_back(tmp_path: Path) -> None:
    base = files.make(tmp_path / "base.gguf", "Q4_1", architecture="gpt2")
    vector = 1 + 0.3 * torch.randn(1, 512, generator=torch.Generator().manual_seed(1))
    adapter = ia3(
        tmp_path / "ia3", {"transformer.h.0.mlp.c_proj": vector}, feedforward_modules=["mlp.c_proj"]
    )

    restored(base, adapter, tmp_path, promote=True)


def test_bytes_between_tensors_that_would_not_come_back(tmp_path: Path) -> None:
    base = files.make(tmp_path / "base.gguf", "Q4_0")
    data = bytearray(base.read_bytes())
    data[-1] = 7  # padding after the last tensor
    base.write_bytes(data)
    adapter, out = files.low_rank(tmp_path / "lora"), tmp_path / "merged.gguf"

    with pytest.raises(Refusal, match="bytes between its tensors that are not zero"):
        infold.merge(base, adapter, out, undo=True, dequantize=True)
    assert not out.exists()
    restored(base, adapter, tmp_path, requantize=True)  # where the layout stays, all is copied


# --- what a swap can and cannot -------------------------------------------------------------------


def test_a_swap_names_what_can_be_done(tmp_path: Path) -> None:
    base = files.make(tmp_path / "base.gguf", "Q4_0")
    vector = 1 + 0.3 * torch.randn(128, 1, generator=torch.Generator().manual_seed(1))
    scales = ia3(tmp_path / "ia3", {"model.layers.0.self_attn.k_proj": vector})
    adapter, out = files.low_rank(tmp_path / "lora"), tmp_path / "merged.gguf"
    infold.merge(base, scales, out, undo=True)
    way = rf"options of `infold merge --out`: restore the base \(infold undo {out} --out BASE\)"

    with pytest.raises(Refusal, match=way) as caught:
        infold.swap(out, adapter, tmp_path / "swapped.gguf")
    assert sum("--dequantize" in reason for reason in caught.value.reasons) == 1
    with pytest.raises(Refusal, match=way):
        infold.swap(out, adapter, in_place=True)
    with pytest.raises(Refusal, match=r"options of `infold merge --out`$"):
        infold.merge(base, adapter, in_place=True)
    with pytest.raises(Refusal) as caught:
        infold.merge(base, adapter, tmp_path / "other.gguf")
    assert "options of" not in str(caught.value)


def test_inspect_tells_what_was_kept_and_how_good_it_is(tmp_path: Path) -> None:
    base, out = files.make(tmp_path / "base.gguf", "Q4_0"), tmp_path / "merged.gguf"
    infold.merge(base, files.low_rank(tmp_path / "lora"), out, undo=True, dequantize=True)
    told = CliRunner().invoke(app, ["inspect", str(out)], env={"COLUMNS": "200"}).stdout

    assert ": what was replaced, whole" in told and "0 blocks" not in told
    assert re.search(r"F16 \S+ +from Q4_0, lora .* error \S+, update \S+\n", told)
