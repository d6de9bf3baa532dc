"""Journals and steps of an edit in place that infold did not write, or not so."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3

import handmade
import infold
from handmade import RECEIPT, digests
from infold.checkpoint.safetensors import read_header
from infold.checkpoint.shards import JOURNAL, read_receipt
from infold.merge import inplace
from infold.merge.inplace import PART, STEP, TOLD
from infold.merge.inplace_steps import Piece, pack_step

SHARD = "model.safetensors"
Lines = list[dict[str, Any]]


@pytest.fixture
def halfway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Lines, Path]:
    """(a folder whose merge in place ended at its first step, the journal's lines, the merge)."""
    numbers = torch.Generator().manual_seed(2)
    base = handmade.base_folder(
        tmp_path / "base", {"q.weight": torch.randn(32, 16, generator=numbers)}
    )
    adapter = handmade.lora(tmp_path / "adapter", {"q": (32, 16)})
    infold.merge(base, adapter, tmp_path / "whole", undo=True)

    def ended(*_: object) -> None:
        raise OSError("the power went")

    with monkeypatch.context() as patch:
        patch.setattr(inplace._Edit, "_place", ended)
        with pytest.raises((OSError, infold.StorageFailure)):
            infold.merge(base, adapter, in_place=True)
    lines = [json.loads(line) for line in (base / JOURNAL).read_bytes().splitlines()]
    assert [next(iter(line)) for line in lines] == ["what", "result"]
    assert (base / PART).exists() and (base / STEP).exists()
    return base, lines, tmp_path / "whole"


def write(folder: Path, lines: list[Any]) -> None:
    (folder / JOURNAL).write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_what_was_begun_is_completed(halfway: tuple[Path, Lines, Path]) -> None:
    folder, _, whole = halfway
    infold.inspect(folder)

    assert (folder / SHARD).read_bytes() == (whole / SHARD).read_bytes()


CHANGES: dict[str, Callable[[Lines], list[Any]]] = {
    "a result that is torn in the middle": lambda lines: [lines[0], "torn", {"step": 1}],
    "no result before a step": lambda lines: [lines[0], {"step": 1}],
    "no verb": lambda lines: lines[1:],
    "an unknown verb": lambda lines: [{"what": "format"}, lines[1]],
    "a verb that is a number": lambda lines: [{"what": 7}, lines[1]],
    "a list": lambda lines: [[1]],
    "a number": lambda lines: [5],
    "nothing that has a name": lambda lines: [{}],
    "a result that is a list": lambda lines: [lines[0], {**lines[1], "result": [1]}],
    "a result without its fields": lambda lines: [lines[0], {**lines[1], "result": {}}],
    "a result with others": lambda lines: [lines[0], {**lines[1], "result": {"a": 1}}],
    "the result of another verb": lambda lines: [{"what": "undo"}, lines[1]],
    "adapters that are none": lambda lines: [
        lines[0],
        {**lines[1], "result": {**lines[1]["result"], "adapters": [1]}},
    ],
    "a record of no size": lambda lines: [
        lines[0],
        {**lines[1], "result": {**lines[1]["result"], "undo": {"bytes": "1"}}},
    ],
    "steps of no size": lambda lines: [lines[0], {**lines[1], "step_bytes": 0}],
    "no worker": lambda lines: [lines[0], {**lines[1], "workers": 0}],
    "workers that are no number": lambda lines: [lines[0], {**lines[1], "workers": True}],
    "steps of an odd size": lambda lines: [lines[0], {**lines[1], "step_bytes": "x"}],
    "the third step first": lambda lines: [*lines, {"step": 3}],
    "steps after the end": lambda lines: [*lines, {"written": True}, {"step": 1}],
    "a second verb": lambda lines: [*lines, {"what": "merge"}],
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_journal_that_makes_no_sense_is_left_as_it_lies(
    change: str, halfway: tuple[Path, Lines, Path]
) -> None:
    """It cannot tell whether bytes of the shards have changed: no rollback, no completion."""
    folder, lines, _ = halfway
    write(folder, CHANGES[change](lines))
    before = digests(folder)
    for verb in (
        lambda: infold.inspect(folder),
        lambda: infold.merge(folder, folder.parent / "adapter", in_place=True),
        lambda: infold.undo(folder, in_place=True),
    ):
        with pytest.raises(infold.CorruptFile, match=r"line \d is none that infold writes"):
            verb()
        assert before == digests(folder)


@pytest.mark.parametrize("text", [b"[" * 100_000 + b"\n", b"\xff\n", b"\0\0\n", b"\n", b"{}{}\n"])
def test_a_journal_that_is_no_json_is_left_as_it_lies(
    text: bytes, halfway: tuple[Path, Lines, Path]
) -> None:
    folder = halfway[0]
    (folder / JOURNAL).write_bytes(text)
    before = digests(folder)
    with pytest.raises(infold.CorruptFile, match="line 1 is none that infold writes"):
        infold.inspect(folder)

    assert before == digests(folder)


@pytest.mark.parametrize("name", [STEP, TOLD])
def test_a_link_in_the_place_of_a_file_is_not_written_through(
    name: str, halfway: tuple[Path, Lines, Path], tmp_path: Path
) -> None:
    folder, lines, _ = halfway
    if name == TOLD:  # nothing is left to do but the receipt: no shard is opened any more
        write(folder, [*lines, {"written": True}])
    secret = tmp_path / "secret"
    secret.write_text("precious")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)
    with pytest.raises(infold.InfoldError, match=name):
        infold.inspect(folder)

    assert secret.read_text() == "precious"


def test_a_link_in_the_place_of_the_journal_is_not_followed(
    halfway: tuple[Path, Lines, Path], tmp_path: Path
) -> None:
    folder = halfway[0]
    (folder / JOURNAL).rename(tmp_path / "elsewhere")
    (folder / JOURNAL).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(infold.StorageFailure, match=JOURNAL):
        infold.inspect(folder)

    assert (tmp_path / "elsewhere").exists()


def outside(folder: Path, where: str) -> Piece:
    size, header = (folder / SHARD).stat().st_size, len(read_header(folder / SHARD).raw)
    return {
        "in the header": Piece(0, 8, b"x"),
        "across the header's end": Piece(0, header - 1, b"xy"),
        "behind the end": Piece(0, size - 1, b"xy"),
        "far behind the end": Piece(0, 1 << 40, b"x"),
        "in a shard that is not there": Piece(1, header, b"x"),
    }[where]


@pytest.mark.parametrize(
    "where",
    ["in the header", "across the header's end", "behind the end", "far behind the end",
     "in a shard that is not there"],
)  # fmt: skip
def test_a_step_whose_bytes_belong_to_no_tensor_is_refused(
    where: str, halfway: tuple[Path, Lines, Path]
) -> None:
    folder = halfway[0]
    (folder / STEP).write_bytes(pack_step(1, [outside(folder, where)]))
    before = (folder / SHARD).read_bytes()
    with pytest.raises(infold.CorruptFile, match="belong to no tensor"):
        infold.inspect(folder)

    assert before == (folder / SHARD).read_bytes()


def test_a_step_that_ends_within_a_piece_is_refused(halfway: tuple[Path, Lines, Path]) -> None:
    folder = halfway[0]
    begin = len(read_header(folder / SHARD).raw)
    whole = pack_step(1, [Piece(0, begin, b"xy")])
    short = pack_step(1, [])[:16] + whole[16:24] + (22 - 1).to_bytes(8, "little")
    body = whole[64:-1]
    (folder / STEP).write_bytes(short + blake3(body).digest() + body)
    with pytest.raises(infold.CorruptFile, match="belong to no tensor"):
        infold.inspect(folder)


def test_names_that_are_not_utf8_do_not_stop_an_edit(tmp_path: Path) -> None:
    """Of the base's folder, and of a file in it: in the record, in the journal, in the receipt."""
    made = handmade.base_folder(tmp_path / "made", {"q.weight": torch.ones(8, 4)})
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    made.rename(folder)
    (Path(os.fsdecode(os.fsencode(folder) + b"/na\xefve"))).write_text("kept")
    adapter = handmade.lora(tmp_path / "adapter", {"q": (8, 4)})
    before = digests(folder)

    infold.merge(folder, adapter, tmp_path / "out", undo=True)
    assert infold.verify(tmp_path / "out").ok
    infold.swap(tmp_path / "out", adapter, tmp_path / "out2")
    infold.undo(tmp_path / "out2", tmp_path / "back")
    assert before == digests(tmp_path / "back")
    infold.merge(folder, adapter, in_place=True)
    assert read_receipt(folder)["out"] == str(folder)
    infold.undo(folder, in_place=True)
    assert before == digests(folder) and not (folder / RECEIPT).exists()


def test_half_of_a_surrogate_pair_in_a_config_that_changes_stays(tmp_path: Path) -> None:
    tensors = {"model.embed_tokens.weight": torch.ones(8, 4)}
    base = handmade.base_folder(tmp_path / "base", tensors)
    (base / "config.json").write_text('{"tie_word_embeddings": true, "note": "\\ud800 é"}')
    adapter = handmade.lora(tmp_path / "adapter", {"lm_head": (8, 4)})

    infold.merge(base, adapter, tmp_path / "out", undo=True)

    text = (tmp_path / "out" / "config.json").read_text()
    assert json.loads(text) == {"tie_word_embeddings": False, "note": "\ud800 é"} and "é" in text
    assert infold.verify(base, adapter, tmp_path / "out").ok
    infold.undo(tmp_path / "out", tmp_path / "back")
    assert digests(base) == digests(tmp_path / "back")
