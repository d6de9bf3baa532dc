"""Inputs that change while the merge reads them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import handmade
import infold
from infold.merge import apply, stream

OUT, IN = 512, 1024


@pytest.fixture
def large(tmp_path: Path) -> tuple[Path, Path]:
    """A base of several blocks, and unedited tensors around; its adapter."""
    random = torch.Generator().manual_seed(5)
    tensors = {
        "a.plain": torch.randn(OUT, IN, generator=random),
        "b.q_proj.weight": torch.randn(OUT, IN, generator=random),
        "c.plain": torch.randn(OUT, IN, generator=random),
    }
    base = handmade.base_folder(tmp_path / "base", tensors)
    return base, handmade.lora(tmp_path / "adapter", {"b.q_proj": (OUT, IN)})


def cut_at(file: Path, size: int) -> Callable[[], None]:
    return lambda: os.truncate(file, size)


@pytest.mark.parametrize("part", [0.01, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("moment", ["when the streaming begins", "while a block is computed"])
def test_a_base_that_shrinks_while_it_is_read_ends_in_one_clear_error(
    part: float,
    moment: str,
    large: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, adapter = large
    file = base / "model.safetensors"
    shrink = cut_at(file, int(file.stat().st_size * part))
    place, name = (
        (stream, "chunks_of") if moment == "when the streaming begins" else (apply.EditRun, "run")
    )
    real = getattr(place, name)

    def shrunk(*given: Any) -> Any:
        shrink()
        return real(*given)

    monkeypatch.setattr(place, name, shrunk)

    if moment == "while a block is computed" and part == 0.9:
        # all blocks of the edit may have been read; then only the tail is missing
        monkeypatch.setattr(stream, "COPY_PIECE", 1 << 16)
    with pytest.raises((infold.Refusal, infold.StorageFailure)) as caught:
        infold.merge(base, adapter, tmp_path / "out", threads=2)

    told = str(caught.value)
    assert "model.safetensors" in told
    assert "early" in told or "changed while" in told
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_side_file_that_vanishes_is_a_storage_failure(
    large: tuple[Path, Path], tmp_path: Path
) -> None:
    from infold.merge.prepare import open_plan, prepare
    from infold.merge.run import execute

    base, adapter = large
    (base / "tokenizer.json").write_text("{}")
    plan = open_plan(base, [adapter])
    (base / "tokenizer.json").unlink()

    with pytest.raises(infold.StorageFailure, match=r"tokenizer\.json"):
        execute(prepare(plan, tmp_path / "out"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_shard_that_vanishes_is_a_storage_failure(
    large: tuple[Path, Path], tmp_path: Path
) -> None:
    from infold.merge.prepare import open_plan, prepare
    from infold.merge.run import execute

    base, adapter = large
    plan = open_plan(base, [adapter])
    (base / "model.safetensors").unlink()

    with pytest.raises(infold.StorageFailure, match=r"model\.safetensors"):
        execute(prepare(plan, tmp_path / "out"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]
