"""Undo records whose digests hold and whose manifest is not what a merge wrote."""

from __future__ import annotations

import copy
import os
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blake3 import blake3
from typer.testing import CliRunner

import ggufs
import handmade
import infold
from infold.checkpoint.record import FILE, UNDO, RecordWriter, open_record
from infold.cli.main import app
from infold.merge.beside import pack

Place = tuple[str | int, ...]
VALUES = (None, -1, 1 << 70, 1.5, "../../x", [], {}, [[-1]], True)
GONE = object()
# of an operation and its settings
OF_EXPERTS = (
    "experts", "expert", "width", "flipped", "first", "out", "method", "on_bias", "transposed",
)  # fmt: skip


def places(value: Any, at: Place = ()) -> Iterator[Place]:
    """Every place of a JSON value, from the outside in."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield (*at, key)
            yield from places(inner, (*at, key))


def changed(manifest: Any, place: Place, value: Any) -> Any:
    whole = copy.deepcopy(manifest)
    inner = whole
    for key in place[:-1]:
        inner = inner[key]
    if value is GONE:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return whole


def rewrite(folder: Path, manifest: Any, frames: dict[Any, Any]) -> None:
    path = folder / UNDO if folder.is_dir() else folder
    os.unlink(path)
    writer = RecordWriter(path)
    for (tensor, number), (kind, payload) in frames.items():
        if tensor == FILE:
            writer.append_stream(number, [payload])
        else:
            writer.append(tensor, number, kind, payload)
    writer.finish(manifest)
    writer.close()


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Merged by DoRA, with an embedding that was untied: every kind of entry is in the record."""
    root = tmp_path_factory.mktemp("records")
    numbers = torch.Generator().manual_seed(4)
    tensors = {
        "model.embed_tokens.weight": torch.randn(8, 16, generator=numbers),
        "model.q_proj.weight": torch.randn(16, 24, generator=numbers).bfloat16(),
    }
    base = handmade.base_folder(root / "base", tensors, {"tie_word_embeddings": True})
    (base / "tokenizer.json").write_text("{}")
    modules = {"model.q_proj": (16, 24), "lm_head": (8, 16)}
    adapter = handmade.lora(root / "adapter", modules, use_dora=True)
    infold.merge(base, adapter, root / "merged", undo=True)
    return root / "merged"


@pytest.mark.parametrize("change", [{"shape": [1 << 40, 24]}, {"dtype": "F32"}])
def test_an_edit_of_another_tensor_than_the_base_s_is_refused(
    merged: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(merged, folder)
    with open_record(folder) as record:
        frames, manifest = {key: record.payload(*key) for key in record.frames}, record.manifest
    forged = copy.deepcopy(manifest)
    forged["edits"]["model.q_proj.weight"] |= change | {"exponent": 1}
    rewrite(folder, forged, frames)

    with pytest.raises(infold.CorruptFile, match="other dtypes or shapes"):
        infold.undo(folder, tmp_path / "out", threads=1)


@pytest.mark.parametrize(
    ("tensor", "change"),
    [
        ("bias", {}),
        ("weight", {"side": "in"}),
        ("weight", {"repeat": 2}),
        ("weight", {"view": [4, 4], "order": [1, 0]}),
    ],
    ids=str,
)
def test_an_expert_in_a_layout_that_no_merge_makes_is_refused(
    tmp_path: Path, tensor: str, change: dict[str, Any]
) -> None:
    tensors = {"model.v_proj.weight": torch.randn(16, 24), "model.v_proj.bias": torch.randn(16)}
    base = handmade.base_folder(tmp_path / "base", tensors)
    vector = torch.linspace(0.5, 1.5, 16)[:, None]
    adapter = handmade.ia3(tmp_path / "adapter", {"model.v_proj": vector})
    folder = tmp_path / "merged"
    infold.merge(base, adapter, folder, undo=True)
    with open_record(folder) as record:
        frames, manifest = {key: record.payload(*key) for key in record.frames}, record.manifest
    (operation,) = manifest["edits"][f"model.v_proj.{tensor}"]["operations"]
    operation["settings"] |= {"out": 16, "width": 1, **change}
    rewrite(folder, manifest, frames)

    with pytest.raises(infold.CorruptFile, match="an expert's rows in a layout"):
        infold.undo(folder, tmp_path / "out", threads=1)


@pytest.mark.parametrize("change", [{"rows": 1 << 20}, {"side": "in", "kernel": 1 << 20}], ids=str)
def test_a_vector_that_is_spread_beyond_its_tensor_is_refused(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    """Some bytes of a record, for which any memory would be taken."""
    base = handmade.base_folder(tmp_path / "base", {"model.v_proj.weight": torch.randn(16, 16)})
    vector = torch.linspace(0.5, 1.5, 16)[:, None]
    adapter = handmade.ia3(tmp_path / "adapter", {"model.v_proj": vector})
    infold.merge(base, adapter, tmp_path / "merged", undo=True)

    def alter(manifest: Any, frames: Any) -> None:
        (operation,) = manifest["edits"]["model.v_proj.weight"]["operations"]
        operation["settings"] |= change

    folder = forged(tmp_path / "merged", tmp_path / "model", alter)
    with pytest.raises(infold.CorruptFile, match="of more elements than the tensor has"):
        infold.undo(folder, tmp_path / "out", threads=1)


@pytest.mark.parametrize("name", ["../evil.json", "/tmp/evil.json", "a/../../evil.json"])
def test_a_side_file_of_the_record_stays_in_the_folder(
    merged: Path, tmp_path: Path, name: str
) -> None:
    """One that is not there is written from the record."""
    folder = tmp_path / "deep" / "model"
    shutil.copytree(merged, folder)
    with open_record(folder) as record:
        frames, manifest = {key: record.payload(*key) for key in record.frames}, record.manifest
    forged = copy.deepcopy(manifest)
    forged["side_files"][name] = forged["side_files"]["tokenizer.json"]
    forged["files"][f"side/{name}"] = forged["files"]["side/tokenizer.json"]
    rewrite(folder, forged, frames)

    with pytest.raises(infold.CorruptFile, match="points outside of the folder"):
        infold.undo(folder, tmp_path / "deep" / "out", threads=1)
    assert not list(tmp_path.rglob("evil.json"))


def forged(merged: Path, folder: Path, change: Callable[[Any, dict[Any, Any]], None]) -> Path:
    """A copy of the merged folder with a record that is not what the merge wrote."""
    shutil.copytree(merged, folder)
    with open_record(folder) as record:
        frames, manifest = {key: record.payload(*key) for key in record.frames}, record.manifest
    change(manifest, frames)
    rewrite(folder, manifest, frames)
    return folder


@pytest.mark.parametrize(
    "names",
    [
        ".git/hooks/post-checkout", ".git/config", ".git", "deep/.git/config", ".cache/x",
        "pytorch_model.bin", "adapter_config.json", "adapter_model.safetensors", "model.gguf",
        "infold-undo.bin", "infold-undo.journal", "infold-receipt.json", "records/bench.json",
        "deployment_config.json", "serving/vllm.sh", "README.base.md",
        "model.safetensors", "model.safetensors/x", "model.safetensors.index.json",
        "a a/b", "a a/b/c", "config.json/x", ".",
    ],
)  # fmt: skip
def test_a_record_alone_puts_no_such_file_into_the_base(
    merged: Path, tmp_path: Path, names: str
) -> None:
    """Hooks of git, weights and adapters that loaders prefer, what infold would believe."""

    def change(manifest: Any, frames: Any) -> None:
        for name in names.split(" "):
            manifest["side_files"][name] = manifest["side_files"]["tokenizer.json"]
            manifest["files"][f"side/{name}"] = manifest["files"]["side/tokenizer.json"]

    folder = forged(merged, tmp_path / "in" / "model", change)

    with pytest.raises(infold.CorruptFile, match="side files that no base has"):
        infold.undo(folder, folder.parent / "out", threads=1)
    with pytest.raises(infold.CorruptFile, match="side files that no base has"):
        infold.swap(folder, merged.parent / "adapter", folder.parent / "out", threads=1)
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


def test_an_index_of_the_record_is_not_put_beside_a_single_shard(
    merged: Path, tmp_path: Path
) -> None:
    def change(manifest: Any, frames: Any) -> None:
        index = "side/model.safetensors.index.json"
        manifest["files"][index] = manifest["files"]["side/tokenizer.json"]

    folder = forged(merged, tmp_path / "model", change)
    with pytest.raises(infold.CorruptFile, match="side files that no base has"):
        infold.undo(folder, tmp_path / "out", threads=1)


@pytest.mark.parametrize(
    "name", [".git/hooks/x.safetensors", "config.json", "infold-undo.bin", "\0.safetensors", ""]
)
def test_a_shard_of_the_base_has_the_name_of_one(merged: Path, tmp_path: Path, name: str) -> None:
    def change(manifest: Any, frames: Any) -> None:
        (digest,) = manifest["base"]["shards"].values()
        manifest["base"]["shards"] = {name: digest}
        manifest["sizes"] = {name: 0}

    folder = forged(merged, tmp_path / "model", change)
    with pytest.raises(infold.CorruptFile, match="shards that no base has"):
        infold.undo(folder, tmp_path / "out", threads=1)


def test_a_record_of_a_file_alone_puts_nothing_beside_it(tmp_path: Path) -> None:
    tensors = {"blk.0.attn_v.weight": ggufs.encode(np.ones((4, 32)), "Q8_0")}
    base = ggufs.write(tmp_path / "base.gguf", "llama", tensors)
    vector = {"model.layers.0.self_attn.v_proj": torch.ones(4, 1)}
    out = tmp_path / "merged.gguf"
    infold.merge(base, handmade.ia3(tmp_path / "adapter", vector), out, undo=True)
    record = tmp_path / f"merged.gguf.{UNDO}"
    with open_record(tmp_path, record.name) as opened:
        frames, manifest = {key: opened.payload(*key) for key in opened.frames}, opened.manifest
    for name in ("tokenizer.json", "config.json"):
        number = manifest["files"][f"side/{name}"] = len(manifest["files"])
        frames[FILE, number] = 0, pack(b"{}")
    manifest["side_files"]["tokenizer.json"] = blake3(b"{}").hexdigest()
    rewrite(record, manifest, frames)

    for restored in (tmp_path / "again.gguf", tmp_path / "again"):
        with pytest.raises(infold.CorruptFile, match="side files that no base has"):
            infold.undo(out, restored, threads=1)


def test_names_of_one_small_frame_do_not_fill_the_memory(merged: Path, tmp_path: Path) -> None:
    """A record of some kilobytes, of which 640 MB would be unpacked."""
    data = bytes(33 << 20)
    digest, packed = blake3(data).hexdigest(), pack(data)
    assert len(packed) < 10_000

    def change(manifest: Any, frames: Any) -> None:
        number = len(manifest["files"])
        frames[FILE, number] = 0, packed
        for file in range(20):
            manifest["files"][f"side/{file}.txt"] = number
            manifest["side_files"][f"{file}.txt"] = digest

    folder = forged(merged, tmp_path / "model", change)
    tracemalloc.start()
    try:
        with pytest.raises(infold.CorruptFile, match=r"would unpack to 34,603,008 bytes"):
            infold.undo(folder, tmp_path / "out", threads=1)
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("path", ["a\0b", "\ud800", ["a"], None])
def test_a_base_with_an_impossible_path_is_refused(merged: Path, tmp_path: Path, path: Any) -> None:
    """A swap compares the base's name with what the adapter tells."""

    def change(manifest: Any, frames: Any) -> None:
        manifest["base"]["path"] = path

    folder = forged(merged, tmp_path / "model", change)
    adapter = merged.parent / "adapter"
    swap = CliRunner().invoke(app, ["swap", str(folder), str(adapter), "--out", f"{tmp_path}/out"])
    assert swap.exit_code == 2 and "is none that this infold writes" in swap.output, swap.output
    with pytest.raises(infold.CorruptFile):
        infold.undo(folder, tmp_path / "out", threads=1)


def test_a_side_file_that_is_another_than_told_is_refused(merged: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(merged, folder)
    with open_record(folder) as record:
        frames, manifest = {key: record.payload(*key) for key in record.frames}, record.manifest
    forged = copy.deepcopy(manifest)
    forged["files"]["side/tokenizer.json"] = forged["files"]["side/config.json"]
    rewrite(folder, forged, frames)
    (folder / "tokenizer.json").unlink()

    with pytest.raises(infold.CorruptFile, match=r"keeps another tokenizer\.json"):
        infold.undo(folder, tmp_path / "out", threads=1)


def test_a_forged_manifest_ends_in_words_and_leaves_nothing(merged: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(merged, folder)
    # all values at every place would take long; each place gets some of them
    refused = forge(folder, lambda number, place: (GONE, *VALUES[number % 5 :: 5]))

    assert refused > 100


@pytest.mark.parametrize("alone", [False, True])
def test_forged_settings_of_experts_end_in_words(tmp_path: Path, alone: bool) -> None:
    numbers = torch.Generator().manual_seed(5)
    where = "model.mlp.experts"
    weights = {f"{where}.down_proj": (3, 6, 4)}
    if alone:
        weights = {f"{where}.{number}.down_proj.weight": (6, 4) for number in range(3)}
    tensors = {n: torch.randn(*s, generator=numbers).bfloat16() for n, s in weights.items()}
    base = handmade.base_folder(tmp_path / "base", tensors)
    adapter = handmade.adapter_folder(
        tmp_path / "adapter",
        {f"{where}.lora_A.weight": torch.ones(6, 4), f"{where}.lora_B.weight": torch.ones(6, 6)},
        {"peft_type": "LORA", "r": 2, "target_parameters": ["experts.down_proj"]},
    )
    folder = tmp_path / "in" / "model"
    infold.merge(base, adapter, folder, undo=True)

    def values(_: int, place: Place) -> tuple[Any, ...]:
        found = (GONE, *VALUES, 0, 1, 2, 3, 5, "lora", "dora", "ia3")
        return (
            found if len(place) > 2 and place[:1] == ("edits",) and place[-1] in OF_EXPERTS else ()
        )

    assert forge(folder, values) > 50


def forge(folder: Path, values: Callable[[int, Place], tuple[Any, ...]]) -> int:
    """Put values into places of a record's manifest, one at a time. Returns how many were refused;
    nothing may end in another way, or leave anything beside the folder."""
    out = folder.parent / "out"
    with open_record(folder) as record:
        frames, manifest = {key: record.payload(*key) for key in record.frames}, record.manifest
    rewrite(folder, manifest, frames)
    infold.undo(folder, out)  # the forger's tools are right
    shutil.rmtree(out)
    escaped, refused = [], 0
    for number, place in enumerate(places(manifest)):
        for value in values(number, place):
            rewrite(folder, changed(manifest, place, value), frames)
            try:
                infold.inspect(folder)
                infold.undo(folder, out, threads=1)
                shutil.rmtree(out)
            except infold.InfoldError:
                refused += 1
            except Exception as error:
                escaped.append((place, value, repr(error)))
            assert sorted(p.name for p in folder.parent.iterdir()) == ["model"], (place, value)

    assert not escaped, escaped[:5]
    return refused
