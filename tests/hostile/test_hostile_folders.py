"""Indexes that lie, links that lead away, files that are no files."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

import handmade
import infold
from hostile.conftest import Refused
from infold.checkpoint.files import safe_child

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = handmade.INDEX
SECRET = "the content of a file elsewhere"


def change_index(folder: Path, change: Any) -> Path:
    """Rewrite the index by a function of its weight_map."""
    file = folder / INDEX
    index = json.loads(file.read_text())
    index["weight_map"] = change(index["weight_map"])
    file.write_text(json.dumps(index))
    return file


# --- the index ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "../elsewhere/x.safetensors",
        "a/../../elsewhere/x.safetensors",
        "..\\elsewhere\\x.safetensors",
        "/etc/x.safetensors",
        "//etc/x.safetensors",
        "x\0.safetensors",
        "x\n.safetensors",
        "\x1b[2Jx.safetensors",
        "\ud800.safetensors",
        "\udcff.safetensors",
        "./model-00001-of-00002.safetensors",
        "a//b.safetensors",
        "a/./b.safetensors",
        "",
        ".",
        "..",
        "/",
        "config.json",
        INDEX,
        "infold-receipt.json",
        ".safetensors/..",
    ],
)
def test_an_index_may_not_name_this_file(
    name: str, sharded: Path, adapter: Path, tmp_path: Path, refused: Refused
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (sharded / ONE).rename(tmp_path / "elsewhere" / "x.safetensors")
    change_index(sharded, lambda where: {t: name if f == ONE else f for t, f in where.items()})

    message = refused(sharded, adapter, str(sharded))

    assert "\x1b" not in message and "\n." not in message


def test_an_index_may_not_name_a_file_of_300_letters(
    sharded: Path, adapter: Path, refused: Refused
) -> None:
    long = "x" * 300 + ".safetensors"
    change_index(sharded, lambda where: dict.fromkeys(where, long))

    refused(sharded, adapter, str(sharded), "too long", kind=infold.StorageFailure)


@pytest.mark.parametrize(
    "where", [None, {}, [], "x", {"a": 1}, {"a": None}, {"a": ["x"]}, {"a": {"b": "c"}}, 3.5]
)
def test_an_index_without_a_usable_weight_map_is_refused(
    where: Any, sharded: Path, adapter: Path, refused: Refused
) -> None:
    file = change_index(sharded, lambda _: where)

    refused(sharded, adapter, str(file), "weight_map")


def test_an_index_naming_missing_shards_lists_all_of_them(
    sharded: Path, adapter: Path, refused: Refused
) -> None:
    (sharded / ONE).unlink()
    (sharded / TWO).unlink()

    refused(sharded, adapter, str(sharded / ONE), str(sharded / TWO), "not there")


def test_a_tensor_that_the_index_has_and_the_shard_has_not(
    sharded: Path, adapter: Path, refused: Refused
) -> None:
    change_index(sharded, lambda where: {**where, "ghost.weight": ONE})

    refused(sharded, adapter, str(sharded / ONE), "'ghost.weight' is in the index, not in the file")


def test_a_tensor_that_the_shard_has_and_the_index_has_not(
    sharded: Path, adapter: Path, refused: Refused
) -> None:
    change_index(sharded, lambda where: {t: f for t, f in where.items() if "norm" not in t})

    refused(sharded, adapter, "'model.norm.weight' is in the file, not in the index")


def test_a_tensor_that_the_index_puts_into_the_wrong_shard(
    sharded: Path, adapter: Path, refused: Refused
) -> None:
    change_index(sharded, lambda where: {t: TWO if "norm" in t else f for t, f in where.items()})

    message = refused(sharded, adapter, str(sharded / ONE), str(sharded / TWO))

    assert message.count("model.norm.weight") == 2


def test_a_tensor_in_two_shards_is_refused(
    sharded: Path, adapter: Path, tensors: dict[str, torch.Tensor], refused: Refused
) -> None:
    handmade.save_file(tensors, sharded / TWO)

    refused(sharded, adapter, str(sharded / TWO), "is in the file, not in the index")


# --- links -------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "secret").write_text(SECRET)
    return folder


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "deep/below.txt", INDEX, ONE])
@pytest.mark.parametrize("relative", [False, True])
def test_a_link_out_of_the_base_is_refused(
    name: str, relative: bool, sharded: Path, adapter: Path, elsewhere: Path, refused: Refused
) -> None:
    link = sharded / name
    link.parent.mkdir(exist_ok=True)
    target = elsewhere / "secret"
    if link.exists():
        target = elsewhere / "moved"
        link.rename(target)
    link.symlink_to(os.path.relpath(target, link.parent) if relative else target)

    message = refused(sharded, adapter, str(link), "leads out of the folder")

    assert SECRET not in message


def test_a_link_to_a_folder_elsewhere_is_refused(
    sharded: Path, adapter: Path, elsewhere: Path, refused: Refused
) -> None:
    (sharded / "more").symlink_to(elsewhere)

    refused(sharded, adapter, str(sharded / "more"), "leads out of the folder")


def test_a_shard_behind_a_linked_folder_elsewhere_is_refused(
    sharded: Path, adapter: Path, elsewhere: Path, refused: Refused
) -> None:
    (sharded / ONE).rename(elsewhere / ONE)
    (sharded / "more").symlink_to(elsewhere)
    change_index(sharded, lambda w: {t: f"more/{ONE}" if f == ONE else f for t, f in w.items()})

    refused(sharded, adapter, str(sharded / "more" / ONE), "leads out of the folder")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_link_out_of_the_adapter_is_refused(
    name: str, base: Path, adapter: Path, elsewhere: Path, refused: Refused
) -> None:
    (adapter / name).rename(elsewhere / name)
    (adapter / name).symlink_to(elsewhere / name)

    refused(base, adapter, str(adapter / name), "leads out of the folder")


def test_a_link_in_a_snapshot_may_lead_to_the_blobs_of_its_own_repository_only(
    tmp_path: Path,
) -> None:
    mine, other = (tmp_path / f"models--a--{n}" for n in ("mine", "other"))
    for repository in (mine, other):
        (repository / "blobs").mkdir(parents=True)
        (repository / "blobs" / "1234").write_text("x")
        (repository / "snapshots" / "main").mkdir(parents=True)
    snapshot = mine / "snapshots" / "main"
    (snapshot / "good").symlink_to("../../blobs/1234")
    (snapshot / "bad").symlink_to(other / "blobs" / "1234")

    assert safe_child(snapshot, "good").read_text() == "x"
    with pytest.raises(infold.CorruptFile, match="leads out of the folder"):
        safe_child(snapshot, "bad")


def test_links_that_stay_inside_are_copied_as_what_they_show(
    sharded: Path, adapter: Path, tmp_path: Path
) -> None:
    (sharded / "real.txt").write_text("real")
    (sharded / "linked.txt").symlink_to("real.txt")
    (sharded / "folder").mkdir()
    (sharded / "folder" / "inner.txt").symlink_to("../real.txt")

    infold.merge(sharded, adapter, tmp_path / "out")

    for name in ("real.txt", "linked.txt", "folder/inner.txt"):
        file = tmp_path / "out" / name
        assert file.read_text() == "real" and not file.is_symlink()


@pytest.mark.parametrize("target", [".", "..", "../sharded"])
def test_a_loop_of_linked_folders_ends(
    target: str, sharded: Path, adapter: Path, tmp_path: Path, refused: Refused
) -> None:
    (sharded / "loop").mkdir()
    (sharded / "loop" / "again").symlink_to(target)
    if target == "../sharded":  # relative to loop/: does not exist
        refused(sharded, adapter, str(sharded / "loop" / "again"), kind=infold.Refusal)
        return

    receipt = infold.merge(sharded, adapter, tmp_path / "out")

    assert any("loop/again" in note for note in receipt.notes), "dropped in silence"
    assert not (tmp_path / "out" / "loop" / "again").exists()


@pytest.mark.parametrize("name", ["config.json", "side.txt", ONE, INDEX])
def test_a_link_to_itself_is_refused(
    name: str, sharded: Path, adapter: Path, refused: Refused
) -> None:
    (sharded / name).unlink(missing_ok=True)
    (sharded / name).symlink_to(name)

    refused(sharded, adapter, str(sharded), kind=infold.Refusal)


def test_a_dangling_link_is_refused(sharded: Path, adapter: Path, refused: Refused) -> None:
    (sharded / "tokenizer.json").symlink_to("nowhere")

    refused(sharded, adapter, str(sharded / "tokenizer.json"), "dangling", kind=infold.Refusal)


# --- what is no file ---------------------------------------------------------------------------


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "name",
    ["side.txt", "config.json", INDEX, ONE, "other.safetensors", "deep/fifo"],
)
def test_a_fifo_in_the_base_does_not_hang_the_merge(
    name: str, sharded: Path, adapter: Path, refused: Refused
) -> None:
    (sharded / name).unlink(missing_ok=True)
    (sharded / name).parent.mkdir(exist_ok=True)
    os.mkfifo(sharded / name)

    refused(sharded, adapter, str(sharded / name), kind=infold.Refusal)


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"]
)
def test_a_fifo_in_the_adapter_does_not_hang_the_merge(
    name: str, base: Path, adapter: Path, refused: Refused
) -> None:
    if name.endswith(".bin"):
        (adapter / "adapter_model.safetensors").unlink()
    (adapter / name).unlink(missing_ok=True)
    os.mkfifo(adapter / name)

    refused(base, adapter, str(adapter / name), "not a regular file")


@pytest.mark.timeout(30)
def test_a_fifo_as_the_base_itself_does_not_hang_the_merge(
    adapter: Path, tmp_path: Path, refused: Refused
) -> None:
    os.mkfifo(tmp_path / "model.safetensors")

    refused(tmp_path / "model.safetensors", adapter, "model.safetensors", kind=infold.Refusal)


def test_a_socket_beside_the_shards_is_refused(
    sharded: Path, adapter: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(sharded)  # a socket's path may have about 100 letters
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        refused(sharded, adapter, str(sharded / "socket"), kind=infold.Refusal)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("name", ["side.bin", "config.json", ONE])
def test_an_endless_device_is_not_read(
    name: str, sharded: Path, adapter: Path, refused: Refused
) -> None:
    (sharded / name).unlink(missing_ok=True)
    try:
        os.mknod(sharded / name, 0o20666, os.makedev(1, 5))  # /dev/zero
    except (PermissionError, OSError) as error:
        pytest.skip(f"no device can be made here: {error}")

    refused(sharded, adapter, str(sharded / name), kind=infold.Refusal)


@pytest.mark.parametrize("name", ["config.json", INDEX, ONE])
def test_a_folder_in_the_place_of_a_file_is_refused(
    name: str, sharded: Path, adapter: Path, tmp_path: Path, refused: Refused
) -> None:
    (sharded / name).unlink()
    (sharded / name).mkdir()
    if name == "config.json":  # then there is no config, as in a folder without one
        infold.merge(sharded, adapter, tmp_path / "out")
        return

    refused(sharded, adapter, str(sharded / name), "not a regular file")


# --- whole folders -----------------------------------------------------------------------------


def test_a_folder_of_pickles_is_refused_with_advice(
    base: Path, adapter: Path, refused: Refused
) -> None:
    (base / "model.safetensors").rename(base / "pytorch_model.bin")

    refused(
        base, adapter, str(base), "PyTorch pickles only", "save_pretrained", kind=infold.Refusal
    )


def test_base_and_adapter_swapped_are_refused_with_a_hint(
    base: Path, adapter: Path, refused: Refused
) -> None:
    refused(adapter, base, str(adapter), "looks like an adapter", kind=infold.Refusal)


def test_a_base_given_as_the_adapter_is_refused_with_a_hint(
    base: Path, adapter: Path, refused: Refused
) -> None:
    refused(base, base, str(base), "looks like a base model", kind=infold.Refusal)


@pytest.mark.parametrize(
    "name", ["nowhere", "not/here/at/all", "a b/c", "", "x" * 5000, "a\0b", "\udcff/x", "~/x"]
)
@pytest.mark.parametrize("which", ["base", "adapter"])
def test_a_name_of_nothing_is_refused(
    name: str, which: str, base: Path, adapter: Path, refused: Refused
) -> None:
    if name == "":
        return  # the current folder, by Python's and the shell's understanding
    given = (name, adapter) if which == "base" else (base, name)

    refused(*given, kind=(infold.Refusal, infold.StorageFailure))


def test_an_unlisted_copy_of_the_weights_is_left_out(
    sharded: Path, adapter: Path, tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    handmade.save_file(tensors, sharded / "again.safetensors")

    receipt = infold.merge(sharded, adapter, tmp_path / "out")

    assert not (tmp_path / "out" / "again.safetensors").exists()
    assert any("again.safetensors" in note for note in receipt.notes)


def test_names_that_are_not_utf8_are_copied_and_told(
    sharded: Path, adapter: Path, tmp_path: Path
) -> None:
    kept, left = os.fsdecode(b"caf\xe9.txt"), os.fsdecode(b"caf\xe9.gguf")
    try:
        (sharded / kept).write_text("x")
    except OSError as error:
        pytest.skip(f"this file system takes no such names: {error}")
    (sharded / left).write_text("x")

    infold.merge(sharded, adapter, tmp_path / "out")

    assert (tmp_path / "out" / kept).read_text() == "x"
    receipt = json.loads((tmp_path / "out" / handmade.RECEIPT).read_bytes())
    assert any(left in note for note in receipt["notes"])


def test_an_output_inside_of_an_input_or_around_it_is_refused(base: Path, adapter: Path) -> None:
    for out in (base, base / "out", base.parent, adapter, adapter / "x" / "y"):
        with pytest.raises(infold.Refusal, match="in or around the input"):
            infold.merge(base, adapter, out, force=True)


def test_an_output_in_the_place_of_a_file_is_refused(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    for name in ("file", "link"):
        file = tmp_path / name
        file.symlink_to("nowhere") if name == "link" else file.write_text("mine")
        for force in (False, True):
            with pytest.raises(infold.Refusal, match=str(file)):
                infold.merge(base, adapter, file, force=force)
    with pytest.raises(infold.StorageFailure, match="file"):
        infold.merge(base, adapter, tmp_path / "file" / "out")
    assert (tmp_path / "file").read_text() == "mine"
    assert not list(tmp_path.glob(".*"))


def test_force_does_not_replace_a_folder_that_is_no_model(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_text("dear")

    with pytest.raises(infold.Refusal, match=r"holds no infold-receipt\.json"):
        infold.merge(base, adapter, tmp_path / "photos", force=True)

    assert (tmp_path / "photos" / "one.jpg").read_text() == "dear"


@pytest.mark.parametrize(
    "planted", ["link to a folder", "file", "output", "lock", "journal", "record"]
)
def test_a_hidden_folder_that_someone_else_planted_leads_nowhere(
    planted: str, base: Path, adapter: Path, tmp_path: Path
) -> None:
    """In a shared place another user could prepare the name of the staging folder."""
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "dear").write_text("dear")
    (victim / "output").mkdir()
    (victim / "output" / "dear").write_text("dear")
    hidden = tmp_path / ".out.infold"
    if planted == "link to a folder":
        hidden.symlink_to(victim)
    elif planted == "file":
        hidden.write_text("x")
    else:
        hidden.mkdir()
        (hidden / planted).symlink_to(victim / ("output" if planted == "output" else "dear"))

    with pytest.raises(infold.InfoldError, match=r"\.out\.infold"):
        infold.merge(base, adapter, tmp_path / "out", undo=True)

    assert (victim / "dear").read_text() == "dear"
    assert (victim / "output" / "dear").read_text() == "dear"
    assert not (tmp_path / "out").exists()


def test_an_output_whose_links_run_in_a_circle_is_refused(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    merged = tmp_path / "merged"
    infold.merge(base, adapter, merged)
    before = sorted(path.name for path in tmp_path.iterdir())

    for out in (loop, loop / "inside"):
        for make in (
            lambda out: infold.merge(base, adapter, out, force=True),
            lambda out: infold.combine([adapter, adapter], out, weights=[1, 1], kind="cat"),
            lambda out: infold.deploy(merged, out, no_measure=True),
        ):
            with pytest.raises(infold.InfoldError, match="loop"):
                make(out)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
