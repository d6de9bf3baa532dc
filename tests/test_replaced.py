"""Inputs that are replaced or rewritten while they are read are noticed, and nothing is made of
them: one half of a result would be of one adapter, and the other, or its way back, of another."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import handmade
import infold
from crash_child import prepare
from handmade import digests
from infold.merge import inplace, recording

MODULES = {"a.q_proj": (48, 40), "b.k_proj": (40, 56), "c.v_proj": (32, 40)}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare({"block": 512, "keep": 2 << 10, "step": 2 << 10}, monkeypatch.setattr)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    numbers = torch.Generator().manual_seed(1)
    tensors = {f"{m}.weight": torch.randn(*s, generator=numbers) for m, s in MODULES.items()}
    values = {name: (t * 0.1).bfloat16() for name, t in tensors.items()}
    return handmade.base_folder(tmp_path / "base", values, shards=2)


def replaced(file: Path, other: Path) -> None:
    shutil.copy(other, file.with_name("new"))
    os.replace(file.with_name("new"), file)


def rewritten(file: Path, other: Path) -> None:
    file.write_bytes(other.read_bytes())


class Inputs:
    """A base, its adapter, and what one file of either becomes when `act` is called."""

    def __init__(self, base: Path, what: str, how: Callable[[Path, Path], None]) -> None:
        root = base.parent
        self.base, self.how = base, how
        self.adapter = handmade.lora(root / "adapter", MODULES)
        other = handmade.lora(root / "other", MODULES, seed=7)
        self.file = self.adapter / "adapter_model.safetensors"
        self.other = other / self.file.name
        if what == "base":
            self.file = base / "model-00002-of-00002.safetensors"
            data = bytearray(self.file.read_bytes())
            data[-9] ^= 1
            self.other = root / "shard"
            self.other.write_bytes(data)
        elif what == "config":
            self.file = self.adapter / "adapter_config.json"
            self.other = root / "config"
            self.other.write_text(
                self.file.read_text().replace('"lora_alpha": 8', '"lora_alpha": 4')
            )
        assert self.file.read_bytes() != self.other.read_bytes()
        self.left = 1

    def act(self) -> None:
        if self.left:
            self.left = 0
            self.how(self.file, self.other)


INPUTS = [("adapter", replaced), ("adapter", rewritten), ("base", replaced), ("config", rewritten)]


@pytest.mark.parametrize("undo", [False, True])
@pytest.mark.parametrize(("what", "how"), INPUTS)
def test_a_merge_of_two_inputs_is_refused(
    what: str, how: Callable[[Path, Path], None], undo: bool, base: Path, tmp_path: Path
) -> None:
    inputs, out = Inputs(base, what, how), tmp_path / "results" / "out"

    def progress(done: int, total: int) -> None:
        if done > total // 3:
            inputs.act()

    with pytest.raises(infold.Refusal, match=f"{inputs.file}: was changed while infold read it"):
        infold.merge(base, inputs.adapter, out, undo=undo, threads=1, progress=progress)

    assert not inputs.left and not out.parent.exists()


@pytest.mark.parametrize("when", ["while it is rehearsed", "before its copy is made", "after that"])
@pytest.mark.parametrize(("what", "how"), INPUTS)
def test_an_edit_in_place_of_two_inputs_changes_nothing(
    what: str,
    how: Callable[[Path, Path], None],
    when: str,
    base: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Blocks are written from the copy in the record, and the base's are restored with it."""
    inputs = Inputs(base, what, how)
    before = digests(base)
    if what == "base":
        before[inputs.file.name] = hashlib.sha256(inputs.other.read_bytes()).hexdigest()

    def progress(done: int, total: int) -> None:
        if when == "while it is rehearsed" and done > total // 6:
            inputs.act()

    copied, finished = recording._contents, inplace.finish_record

    def contents(adapter: object) -> object:
        if when == "before its copy is made":
            inputs.act()
        return copied(adapter)  # type: ignore[arg-type]

    def finish(*given: object) -> object:
        told = finished(*given)  # type: ignore[arg-type]
        if when == "after that":
            inputs.act()
        return told

    monkeypatch.setattr(recording, "_contents", contents)
    monkeypatch.setattr(inplace, "finish_record", finish)
    with pytest.raises(infold.Refusal, match=f"{inputs.file}: was changed while infold read it"):
        infold.merge(base, inputs.adapter, in_place=True, threads=1, progress=progress)

    assert not inputs.left and digests(base) == before


def test_a_shard_that_is_replaced_before_its_turn_is_told_when_it_comes(
    base: Path, tmp_path: Path
) -> None:
    """And not after hours, when all others are done."""
    adapter = handmade.lora(tmp_path / "adapter", MODULES)
    file, new = base / "model-00002-of-00002.safetensors", tmp_path / "new"
    shutil.copy(file, new)
    most = 0.0

    def progress(done: int, total: int) -> None:
        nonlocal most
        most = max(most, done / total)
        if new.exists() and most > 0.25:
            os.replace(new, file)

    with pytest.raises(infold.Refusal, match="was changed while infold read it"):
        infold.merge(base, adapter, tmp_path / "out", threads=1, progress=progress)

    assert 0.25 < most < 0.9


def test_what_a_change_behind_the_kept_piece_has_changed_before_it_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DoRA's norms of a transposed weight are of all of its blocks: none of them is of use when the
    last has changed."""
    name, numbers = "h.0.attn.c_attn", torch.Generator().manual_seed(2)
    tensors = {
        f"{name}.weight": torch.randn(64, 192, generator=numbers),
        f"{name}.bias": torch.zeros(192),
    }
    base = handmade.base_folder(tmp_path / "base", tensors, {"model_type": "gpt2"})
    adapter = handmade.lora(
        tmp_path / "adapter", {name: (192, 64)}, use_dora=True, fan_in_fan_out=True
    )

    def progress(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        infold.merge(base, adapter, tmp_path / "out", threads=1, progress=progress)
    file = base / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-200:] = bytes(200)
    file.write_bytes(data)
    resumed = infold.merge(base, adapter, tmp_path / "out", threads=1)

    assert resumed.shards == infold.merge(base, adapter, tmp_path / "plain").shards
