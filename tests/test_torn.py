"""What a kill in the middle of an edit in place leaves is read by nobody, by whatever path."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ggufs
import handmade
import infold
from crash_child import Runner
from forked import infold_command as run
from infold.checkpoint.shards import JOURNAL, open_checkpoint
from training import save_base, sums, write_jsonl

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def tear(runner: Runner, model: Path, adapter: Path, **more: Any) -> None:
    """Kill an edit of this model in the middle of its first write to the weights."""
    request = {"base": model, "adapter": adapter, **more}
    copy = shutil.copytree(model if model.is_dir() else model.parent, model.parent.parent / "trial")
    trial = copy if model.is_dir() else copy / model.name
    calls = runner.ask(**{**request, "base": trial}, trace=True)
    shutil.rmtree(copy)
    assert calls["status"] == "done", calls
    written = [
        number
        for number, (name, path) in enumerate(calls["trace"], 1)
        if name == "pwrite" and Path(path).suffix in (".safetensors", ".gguf")
    ]
    assert runner.ask(**request, at=written[0], how="kill in the middle")["status"] == "killed"


class Torn:
    """A model that transformers loads, an adapter, and what a killed merge and swap left of it."""

    def __init__(self, root: Path, runner: Runner) -> None:
        self.base = save_base(root / "base")
        shapes = {f"model.layers.{n}.self_attn.q_proj": (16, 16) for n in range(2)}
        self.adapter = handmade.lora(root / "adapter", shapes, task_type="CAUSAL_LM")
        self.other = handmade.lora(root / "other", shapes, seed=5)
        self.data = write_jsonl(root / "data.jsonl", sums(6))
        self.folder = root / "torn" / "model"
        shutil.copytree(self.base, self.folder)
        tear(runner, self.folder, self.adapter)
        self.swapped = root / "swapped" / "model"
        infold.merge(self.base, self.adapter, self.swapped, undo=True)
        tear(runner, self.swapped, self.other, verb="swap")
        self.loop = root / "loop.toml"
        self.loop.write_text(
            f'base = "{self.folder}"\nrun = "{root / "run"}"\niterations = 1\n'
            '[task]\nname = "arithmetic"\n'
        )


@pytest.fixture(scope="module")
def torn(tmp_path_factory: pytest.TempPathFactory, runner: Runner) -> Torn:
    return Torn(tmp_path_factory.mktemp("torn"), runner)


READING = {
    "train": "train {folder} {data} --out {out} --steps 1",
    "bench": "bench {folder} {adapter} --rounds 1 --starts 1",
    "bench merged": "bench {base} {adapter} {folder} --rounds 1 --starts 1",
    "methods": "methods --measure {folder} --rounds 1",
    "loop": "loop {loop}",
    "report": "report {swapped} --out {out}.html",
    "inspect an adapter": "inspect {adapter} --base {folder}",
    "merge of a shard": "merge {folder}/model.safetensors {adapter} --out {out}",
    "inspect a shard": "inspect {folder}/model.safetensors",
    "merge of a link": "merge {link} {adapter} --out {out}",
    "train on linked shards": "train {linked} {data} --out {out} --steps 1",
    "verify against a shard": "verify {folder}/model.safetensors {adapter} {base}",
    "dry run": "merge {folder} {adapter} --out {out} --dry-run",
    "dry run in place": "merge {folder} {adapter} --in-place --dry-run",
    "promotion": "merge {base} {adapter} --base-16bit {folder} --dequantize --out {out}",
}


@pytest.mark.parametrize("verb", READING)
def test_a_torn_folder_is_refused(verb: str, torn: Torn, tmp_path: Path) -> None:
    """By each verb that does not end the edit itself: which command does is told."""
    (tmp_path / "link.safetensors").symlink_to(torn.folder / "model.safetensors")
    linked = shutil.copytree(torn.base, tmp_path / "linked")
    (linked / "model.safetensors").unlink()
    (linked / "model.safetensors").symlink_to(torn.folder / "model.safetensors")
    places = {**vars(torn), "out": tmp_path / "out", "linked": linked}
    words = READING[verb].format_map({**places, "link": tmp_path / "link.safetensors"}).split()
    ran = run(*words)

    assert ran.returncode == 2, (ran.stdout, ran.stderr)
    folder = torn.swapped if verb == "report" else torn.folder
    told = " ".join(ran.stderr.split())
    assert "left in the middle of it" in told and f"`infold inspect {folder}` finishes" in told
    assert told.count("left in the middle") == 1, "once for all of its names"
    assert not (tmp_path / "out").exists() and (folder / JOURNAL).exists()


ENDING = {
    "inspect": "inspect {here}",
    "verify": "verify {base} {adapter} {here}",
    "checklist": "checklist {base} {adapter} {here}",
    "deploy": "deploy {here} --no-measure",
    "undo": "undo {here} --out {out}",
    "undo in place": "undo {here} --in-place",
    "swap": "swap {here} {other} --out {out}",
    "swap in place": "swap {here} {other} --in-place",
    "merge in place": "merge {here} {adapter} --in-place",
}


@pytest.mark.parametrize("verb", ENDING)
def test_a_torn_folder_is_ended(verb: str, torn: Torn, tmp_path: Path) -> None:
    here = shutil.copytree(torn.folder, tmp_path / "here")
    places = {**vars(torn), "here": here, "out": tmp_path / "out"}
    ran = run(*ENDING[verb].format_map(places).split())

    assert ran.returncode == 0, (ran.stdout, ran.stderr)
    assert "merge in place was completed" in ran.stderr
    assert not (here / JOURNAL).exists()


# --- a GGUF file and its folder ------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    head = {"attention.head_count": 4, "embedding_length": 256}
    numbers = np.random.default_rng(0)
    tensors = {
        f"blk.{n}.attn_v.weight": ggufs.encode(
            numbers.standard_normal((64, 256), dtype=np.float32), "Q8_0"
        )
        for n in range(2)
    }
    return ggufs.write(tmp_path / "here" / "m.gguf", "llama", tensors, head)


@pytest.fixture
def scales(tmp_path: Path) -> Path:
    numbers = torch.Generator().manual_seed(1)
    vectors = {
        f"model.layers.{n}.self_attn.v_proj": 1 + torch.randn(64, 1, generator=numbers) / 10
        for n in range(2)
    }
    return handmade.ia3(tmp_path / "scales", vectors)


def refused(place: Path, command: str) -> None:
    with pytest.raises(infold.Refusal) as caught:
        open_checkpoint(place)
    (reason,) = caught.value.reasons
    assert "left in the middle" in reason and command in reason
    for use in (infold.inspect, infold.verify):
        with pytest.raises(infold.Refusal, match="left in the middle"):
            use(place)


def test_a_torn_file_is_refused_by_its_folder_too(
    file: Path, scales: Path, runner: Runner, tmp_path: Path
) -> None:
    whole = file.read_bytes()
    tear(runner, file, scales)
    link = tmp_path / "link.gguf"
    link.symlink_to(file)

    refused(file.parent, f"`infold inspect {file}` finishes")
    refused(link, f"`infold inspect {file}` finishes")
    with pytest.raises(infold.Refusal, match="left in the middle"):
        infold.merge(file.parent, scales, in_place=True)
    for in_place in (True, False):
        with pytest.raises(infold.Refusal, match="left in the middle"):
            infold.merge(file, scales, in_place=in_place, dry_run=True)
    infold.inspect(file)
    assert file.read_bytes() != whole
    infold.undo(file, in_place=True)
    assert file.read_bytes() == whole


def test_a_torn_folder_is_refused_by_its_file_too(
    file: Path, scales: Path, runner: Runner, tmp_path: Path
) -> None:
    tear(runner, file.parent, scales)

    refused(file, f"`infold inspect {file.parent}` finishes")
    with pytest.raises(infold.Refusal, match="left in the middle"):
        infold.merge(file, scales, in_place=True)
    infold.inspect(file.parent)
    open_checkpoint(file)


def test_a_torn_file_that_was_renamed_is_refused(
    file: Path, scales: Path, runner: Runner, tmp_path: Path
) -> None:
    """Also where it is served, and where its old name would be given to another file."""
    whole = file.read_bytes()
    tear(runner, file, scales)
    other = file.rename(file.with_name("n.gguf"))

    back = f"(mv {other} {file}), and `infold inspect {file}` finishes it"
    refused(other, back)
    refused(file.parent, back)
    uses = [
        lambda: infold.deploy(other, smoke=True),
        lambda: infold.undo(other, in_place=True),
        lambda: infold.merge(other, scales, in_place=True),
        lambda: infold.merge(other, scales, tmp_path / "out.gguf"),
        lambda: infold.report(file.parent, tmp_path / "page.html"),
    ]
    (file.parent / "bench.json").write_text(json.dumps({"kind": "bench"}))
    for use in uses:
        with pytest.raises(infold.InfoldError, match="left in the middle"):
            use()
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "m.gguf").write_bytes(whole)
    with pytest.raises(infold.Refusal, match="left in the middle"):
        infold.merge(tmp_path / "base" / "m.gguf", scales, file)
    other.rename(file)
    infold.inspect(file)
    infold.undo(file, in_place=True)
    assert file.read_bytes() == whole


def test_what_lies_beside_other_weights_is_no_matter(file: Path, torn: Torn) -> None:
    folder = file.parent
    shutil.copytree(torn.base, folder, dirs_exist_ok=True)
    (folder / f"{file.name}.{JOURNAL}").write_text("")
    (folder / f"gone.gguf.{JOURNAL}").write_text("")

    assert [shard.name for shard in open_checkpoint(folder).shards] == ["model.safetensors"]
