"""A merge that is killed leaves nothing or everything, and the next run goes on from there.

Merges run in forked processes (crash_child.py) that are killed at every single call which changes
the disk: before it, and in the middle of it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import handmade
import infold
from crash_child import PRIMITIVES, Runner, prepare
from handmade import RECEIPT, digests
from infold.checkpoint import staging
from infold.checkpoint.place import check_name
from infold.merge import chain
from infold.merge.receipt import Receipt

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

EDITED = {"b.q_proj": (128, 128), "c.k_proj": (128, 128)}
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
KILLS = ("kill before", "kill in the middle")


class Place:
    """A base, an adapter and a folder for outputs; merges into `out` in processes of their own."""

    def __init__(self, root: Path, runner: Runner) -> None:
        self.root, self.runner = root, runner
        self.base, self.adapter = root / "base", root / "adapter"
        self.folder = root / "result"
        self.out, self.hidden = self.folder / "out", self.folder / ".out.infold"
        self.staged = self.hidden / "output"
        self.old = root / "old"
        numbers = torch.Generator().manual_seed(3)
        names = ["a.norm.weight", "a.embed.weight", *(f"{m}.weight" for m in EDITED), "z.weight"]
        tensors = {n: torch.randn(128, 128, generator=numbers) for n in names}
        handmade.base_folder(self.base, tensors, shards=2)
        (self.base / "tokenizer.json").write_text("{}")
        (self.base / "deep").mkdir()
        (self.base / "deep" / "side.txt").write_text("side")
        handmade.lora(self.adapter, EDITED)
        self.folder.mkdir()
        self.expected = self.undisturbed()

    def undisturbed(self) -> dict[str, str]:
        """The digests of what base and adapter make now."""
        infold.merge(self.base, self.adapter, self.root / "expected")
        result = digests(self.root / "expected")
        shutil.rmtree(self.root / "expected")
        return result

    def merge(self, at: int | None = None, how: str = "", **more: Any) -> dict[str, Any]:
        given = {"base": self.base, "adapter": self.adapter, "out": self.out}
        return self.runner.ask(**{**given, "at": at, "how": how, **more})

    def calls(self, **more: Any) -> int:
        """How many calls an undisturbed merge makes."""
        if more.get("force"):
            self.place_old()
        done = self.merge(**more)
        assert done["status"] == "done", done
        self.clear()
        return int(done["calls"])

    def place_old(self) -> None:
        """An output of an earlier merge, with one file that the new one will not have."""
        if not self.old.exists():
            other = handmade.lora(self.root / "other", EDITED, seed=9)
            extra = self.base / "extra.txt"
            extra.write_text("of the old output")
            infold.merge(self.base, other, self.old)
            extra.unlink()
        shutil.copytree(self.old, self.out)

    def clear(self) -> None:
        shutil.rmtree(self.folder)
        self.folder.mkdir()

    def stop_with_pieces(self, how: str = "kill before") -> dict[str, Any]:
        """Kill a merge when the first shard is done and the second is begun in the journal."""
        trace = self.merge(trace=True)["trace"]
        self.clear()
        lines = [n for n, (name, path) in enumerate(trace) if (name, Path(path).name) == WRITTEN]
        for _ in range(5):  # seen once: the kill fell before the second shard was begun
            killed = self.merge(at=lines[-3] + 3, how=how)
            assert killed["status"] == "killed" and self.staged.exists()
            journal = (self.hidden / "journal").read_text().splitlines()
            pieces = [json.loads(line) for line in journal[1:]]
            if {p["shard"] for p in pieces} == {FIRST, SECOND}:
                break
            self.clear()
        assert {p["shard"] for p in pieces} == {FIRST, SECOND}
        return {p["shard"]: p["position"] for p in pieces}

    def finish(self, **more: Any) -> Receipt:
        """The next run, which must end as if nothing had happened."""
        with pytest.MonkeyPatch.context() as patch:
            prepare(more, patch.setattr)
            receipt = infold.merge(
                self.base,
                self.adapter,
                self.out,
                force=more.get("force", False),
                threads=more.get("threads", 1),
            )
        assert digests(self.out) == self.expected
        assert json.loads((self.out / RECEIPT).read_text())["shards"] == receipt.shards
        assert sorted(p.name for p in self.folder.iterdir()) == ["out"]
        return receipt


WRITTEN = ("write", "journal")


@pytest.fixture
def place(tmp_path: Path, runner: Runner) -> Place:
    return Place(tmp_path, runner)


# --- kill -9 -----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", KILLS)
@pytest.mark.parametrize("threads", [1, 3])
def test_a_kill_at_any_call_leaves_nothing_or_everything_and_the_next_run_finishes(
    how: str, threads: int, place: Place
) -> None:
    given = {"threads": threads, "direct": 4096 if threads > 1 else 1 << 40}
    calls = place.calls(**given)
    assert calls > 60
    sizes = {(place.base / name).stat().st_size for name in (FIRST, SECOND)}
    resumed, struck = [], set()
    # a kill before a call is one after the call before it, but where that one was cut in half
    step = threads if how == "kill in the middle" else 2 * threads
    for at in range(1, calls + 1, step):
        killed = place.merge(at, how, **given)
        assert killed["status"] == "killed", killed
        struck.add(killed["last"])
        if place.out.exists():
            assert digests(place.out) == place.expected, f"torn output after call {at}"
            assert (place.out / RECEIPT).exists()
        else:
            resumed.append(place.finish(**given).resumed_bytes)
        place.clear()

    if step == 1:
        assert struck == set(PRIMITIVES) - {"posix_fallocate"}  # which only edits in place do
    assert resumed.count(0) < len(resumed) * 2 / 3, "most runs have something to go on from"
    whole = {0, *sizes, sum(sizes)}
    assert not whole.issuperset(resumed), "runs also go on from the middle of a shard"
    assert max(resumed) == sum(sizes), "nothing is done again when only the end is missing"


def test_many_kills_one_after_the_other_still_come_to_the_same_end(place: Place) -> None:
    calls = place.calls()
    dice = random.Random(4)
    for _ in range(6):
        kills = 0
        while kills < 5 and not place.out.exists():
            at, how = dice.randrange(1, calls), dice.choice(KILLS)
            kills += place.merge(at, how)["status"] == "killed"
        if not place.out.exists():
            place.finish()
        assert digests(place.out) == place.expected
        place.clear()


def test_a_kill_at_any_time_leaves_nothing_or_everything(place: Place) -> None:
    dice = random.Random(5)
    outcomes = []
    for _ in range(25):
        ended = place.merge(delay=dice.uniform(0.002, 0.08), threads=2)["status"]
        outcomes.append(ended)
        if place.out.exists():
            assert digests(place.out) == place.expected
            place.clear()
        elif dice.random() < 0.5:
            place.finish(threads=2)
            place.clear()

    assert "killed" in outcomes


def test_the_next_run_may_have_other_threads_and_another_block_size(place: Place) -> None:
    for change in ({"threads": 4}, {"block": 1000}, {"block": 8192}, {"copy": 5000}, {"keep": 1}):
        place.stop_with_pieces()
        place.finish(**change)
        place.clear()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open descriptors")
def test_a_resume_that_fails_leaves_no_descriptor_open(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.stop_with_pieces()

    def fails(*_: object) -> None:
        raise infold.CorruptFile("it went away")

    monkeypatch.setattr(chain, "_hash_file", fails)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(infold.CorruptFile, match="it went away"):
        infold.merge(place.base, place.adapter, place.out)

    assert os.listdir("/proc/self/fd") == before


def test_what_is_resumed_is_told_and_is_what_the_journal_vouches_for(place: Place) -> None:
    pieces = place.stop_with_pieces()

    assert place.finish().resumed_bytes == sum(pieces.values())


def test_what_a_resumed_run_has_not_seen_has_no_share_of_unchanged_elements(
    place: Place, tmp_path: Path
) -> None:
    """All others have it: one kept block of one tensor costs the figures of no other tensor."""
    adapter = handmade.lora(tmp_path / "lora", EDITED)
    whole = infold.merge(place.base, adapter, tmp_path / "whole")
    out, found = tmp_path / "out", []
    told = {edit["tensor"]: edit["unchanged"] for edit in whole.edits}
    assert all(share is not None for share in told.values())
    for share in (0.2, 0.7, 1.0):

        def stop(done: int, total: int, share: float = share) -> None:
            if done >= share * total:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            infold.merge(place.base, adapter, out, threads=1, progress=stop)
        receipt = infold.merge(place.base, adapter, out, threads=1)
        for edit in receipt.edits:
            assert edit["unchanged"] in (told[edit["tensor"]], None)
        found.append([e["unchanged"] is None for e in receipt.edits])
        shutil.rmtree(out)
    assert any(any(some) and not all(some) for some in found), found
    assert all(found[-1]), "all was kept"


# --- what must not be trusted --------------------------------------------------------------------


@pytest.mark.parametrize("shard", [FIRST, SECOND])
@pytest.mark.parametrize("where", ["the header", "the first tensor", "the last byte"])
def test_a_staged_piece_with_one_flipped_bit_is_made_again(
    shard: str, where: str, place: Place
) -> None:
    pieces = place.stop_with_pieces()
    offset = {"the header": 20, "the first tensor": 1000, "the last byte": pieces[shard] - 1}[where]
    with open(place.staged / shard, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))

    receipt = place.finish()

    assert receipt.resumed_bytes == sum(pieces.values()) - pieces[shard]


@pytest.mark.parametrize("size", [0, 100, 1 << 20])
def test_a_staged_shard_of_another_size_does_not_disturb(size: int, place: Place) -> None:
    place.stop_with_pieces()
    os.truncate(place.staged / FIRST, size)

    place.finish()


def test_a_staged_shard_that_is_gone_or_is_a_folder_does_not_disturb(place: Place) -> None:
    place.stop_with_pieces()
    (place.staged / FIRST).unlink()
    place.finish()


JOURNALS = {
    "empty": b"",
    "garbage": b"\xff\xfe\x00\n" * 5,
    "an array": b"[]\n[]\n",
    "another identity": b'{"identity": "0"}\n',
    "a nesting bomb": b"[" * 100_000 + b"\n",
}


def test_a_run_that_had_finished_nothing_is_begun_anew_without_a_word(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    place.stop_with_pieces()
    journal = place.hidden / "journal"
    journal.write_bytes(journal.read_bytes().split(b"\n")[0] + b"\n")

    assert place.finish().resumed_bytes == 0
    assert caplog.text == ""


@pytest.mark.parametrize("journal", JOURNALS)
def test_a_journal_that_makes_no_sense_is_not_followed(journal: str, place: Place) -> None:
    place.stop_with_pieces()
    (place.hidden / "journal").write_bytes(JOURNALS[journal])

    assert place.finish().resumed_bytes == 0


@pytest.mark.parametrize(
    "line",
    [
        b"[]",
        b"7",
        b"{}",
        b'{"shard": "%s", "position": -1, "base": "", "output": ""}',
        b'{"shard": "%s", "position": 99999999999, "base": "", "output": ""}',
        b'{"shard": "%s", "position": 1e999, "base": "", "output": ""}',
        b'{"shard": "%s", "position": [], "base": "", "output": ""}',
        b'{"shard": ["%s"], "position": 5000, "base": "", "output": ""}',
        b'{"shard": "%s", "position": 5001, "base": 1, "output": null}',
        b'{"shard": "../../../../etc/passwd", "position": 1, "base": "", "output": ""}',
        b"[" * 100_000,
        b'{"shard": "half a li',
    ],
)
def test_a_journal_line_that_makes_no_sense_does_no_harm(line: bytes, place: Place) -> None:
    place.stop_with_pieces()
    with open(place.hidden / "journal", "ab") as file:
        file.write(line.replace(b"%s", FIRST.encode()) + b"\n")

    place.finish()


def test_digests_of_other_bytes_in_the_journal_are_not_believed(place: Place) -> None:
    """A journal that tells of the first shard what is true of the second."""
    place.stop_with_pieces()
    text = (place.hidden / "journal").read_text()
    text = text.replace(FIRST, "x").replace(SECOND, FIRST).replace('"x"', f'"{SECOND}"')
    (place.hidden / "journal").write_text(text)

    assert place.finish().resumed_bytes == 0


def test_a_base_that_changed_since_is_not_resumed(place: Place) -> None:
    place.stop_with_pieces()
    file = place.base / FIRST  # one bit of the values; the header stays the same
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    place.expected = place.undisturbed()

    assert place.finish().resumed_bytes < file.stat().st_size


def test_a_base_that_is_only_newer_is_resumed(place: Place) -> None:
    """As one that was copied or downloaded again: what was kept is compared by its bytes."""
    pieces = place.stop_with_pieces()
    for file in place.base.glob("*.safetensors"):
        os.utime(file, ns=(1, 1))

    assert place.finish().resumed_bytes == sum(pieces.values())


def test_a_base_that_changed_only_behind_the_kept_piece_is_merged_as_it_is_now(
    place: Place,
) -> None:
    pieces = place.stop_with_pieces()
    file = place.base / SECOND
    assert pieces[SECOND] < file.stat().st_size - 5
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    place.expected = place.undisturbed()

    place.finish()


@pytest.mark.parametrize("what", ["values", "config", "adapter_model.bin"])
def test_an_adapter_that_changed_since_is_not_resumed(
    what: str, place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    place.stop_with_pieces()
    if what == "values":
        shutil.rmtree(place.adapter)
        handmade.lora(place.adapter, EDITED, seed=1)
    elif what == "config":
        file = place.adapter / "adapter_config.json"
        file.write_text(file.read_text().replace('"lora_alpha": 8', '"lora_alpha": 16'))
    else:
        weights = place.adapter / "adapter_model.safetensors"
        tensors = {k: 2 * v for k, v in load_file(weights).items()}
        weights.unlink()
        torch.save(tensors, place.adapter / what)
    place.expected = place.undisturbed()

    assert place.finish().resumed_bytes == 0
    assert "pieces of an interrupted run with other inputs" in caplog.text


def test_side_files_that_changed_came_or_went_since_are_as_they_are_now(place: Place) -> None:
    place.stop_with_pieces()
    (place.base / "tokenizer.json").write_text("shorter or longer than before")
    (place.base / "deep" / "side.txt").unlink()
    (place.base / "deep").rmdir()
    (place.base / "new.txt").write_text("new")
    place.expected = place.undisturbed()
    assert "deep/side.txt" not in place.expected

    place.finish()

    assert not (place.out / "deep").exists()


def test_files_that_someone_put_into_the_staged_output_are_not_published(place: Place) -> None:
    place.stop_with_pieces()
    (place.staged / "stranger.txt").write_text("x")
    (place.staged / "strange").mkdir()
    (place.staged / "strange" / "er.txt").write_text("x")

    place.finish()


def test_links_that_someone_put_into_the_staged_output_are_not_followed(place: Place) -> None:
    place.stop_with_pieces()
    elsewhere = place.root / "elsewhere"
    elsewhere.mkdir()
    for name in ("side.txt", SECOND):
        (elsewhere / name).write_text("dear")
    shutil.rmtree(place.staged / "deep")
    (place.staged / "deep").symlink_to(elsewhere)
    (place.staged / SECOND).unlink()
    (place.staged / SECOND).symlink_to(elsewhere / SECOND)

    place.finish()

    assert {file.read_text() for file in elsewhere.iterdir()} == {"dear"}


# --- force -------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", KILLS)
def test_with_force_the_old_or_the_new_output_is_whole_at_every_kill(
    how: str, place: Place
) -> None:
    calls = place.calls(force=True)
    old = digests(place.old)
    found = []
    for at in (*range(1, calls - 30, 8), *range(calls - 30, calls + 1)):
        place.place_old()
        assert place.merge(at, how, force=True)["status"] == "killed"
        found.append(digests(place.out))
        assert found[-1] in (old, place.expected), f"torn output after call {at}"
        place.finish(force=True)
        place.clear()

    assert old in found and place.expected in found


@pytest.mark.parametrize("how", KILLS)
def test_where_names_cannot_be_exchanged_the_old_output_is_never_lost(
    how: str, place: Place
) -> None:
    """Two renames then; a kill between them leaves the old output in the hidden folder."""
    old_style = {"force": True, "no_exchange": True}
    calls = place.calls(**old_style)
    old = digests(place.old)
    aside = 0
    for at in range(calls - 40, calls + 1):
        place.place_old()
        assert place.merge(at, how, **old_style)["status"] == "killed"
        if place.out.exists():
            assert digests(place.out) in (old, place.expected)
        else:
            aside += 1
            assert digests(place.hidden / "replaced") == old
        place.finish(**old_style)
        place.clear()

    assert aside, "the moment between the two renames was met"


def set_aside(place: Place) -> None:
    """Kill a merge between the two renames."""
    old_style = {"force": True, "no_exchange": True}
    place.place_old()
    trace = place.merge(trace=True, **old_style)["trace"]
    place.clear()
    place.place_old()
    [first, _] = [n for n, (name, _) in enumerate(trace) if name == "rename"]
    assert place.merge(first + 1, "kill in the middle", **old_style)["status"] == "killed"
    assert not place.out.exists()


def test_an_old_output_that_was_set_aside_survives_a_next_run_that_fails(place: Place) -> None:
    set_aside(place)

    failed = place.merge(20, "fail", force=True)

    assert failed["status"] == "StorageFailure"
    assert digests(place.out) == digests(place.old)
    assert not place.hidden.exists()


@pytest.mark.parametrize("back", [True, False])
def test_an_old_output_outlives_a_system_that_does_not_rename_the_new_one(
    back: bool, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """back: whether it lets the old one return to its name."""
    place.place_old()
    old, real = digests(place.old), os.rename

    def rename(source: Path, target: Path) -> None:
        if target == place.out and (source == place.staged or not back):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(source), None, str(target))
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(staging, "_exchange", lambda one, two: False)
        patch.setattr(os, "rename", rename)
        told = os.strerror(errno.EIO) + ("$" if back else f".* kept in {place.hidden}")
        with pytest.raises(infold.StorageFailure, match=told):
            infold.merge(place.base, place.adapter, place.out, force=True)
        if not back:
            with pytest.raises(infold.StorageFailure, match=os.strerror(errno.EIO)):
                infold.merge(place.base, place.adapter, place.out, force=True)
    if not back:
        assert digests(place.hidden / "replaced") == old
        with pytest.raises(infold.Refusal, match="exists again"):
            infold.merge(place.base, place.adapter, place.out)

    assert digests(place.out) == old and not place.hidden.exists()
    place.finish(force=True)


def test_an_old_output_that_was_set_aside_is_not_overwritten_without_force(place: Place) -> None:
    set_aside(place)

    refused = place.merge()

    assert refused["status"] == "Refusal" and "exists again" in refused["message"]
    assert digests(place.out) == digests(place.old)
    assert not place.hidden.exists()


def test_with_force_a_refused_merge_leaves_the_old_output(place: Place) -> None:
    place.place_old()
    tensors = load_file(place.adapter / "adapter_model.safetensors")
    save_file(
        {k: v * 1e30 for k, v in tensors.items()}, place.adapter / "adapter_model.safetensors"
    )

    refused = place.merge(force=True)

    assert refused["status"] == "Refusal" and "does not fit" in refused["message"]
    assert digests(place.out) == digests(place.old)
    assert not place.hidden.exists()


def test_an_output_that_appears_while_the_merge_runs_is_left_as_it_is(place: Place) -> None:
    stopped = place.merge(30, "stop")
    place.out.mkdir()
    (place.out / "dear").write_text("dear")

    refused = place.runner.ask(**{"continue": stopped["pid"]})

    assert refused["status"] == "Refusal" and "appeared while the merge ran" in refused["message"]
    assert [p.name for p in place.folder.rglob("*")] == ["out", "dear"]


# --- interrupts and company ----------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 3])
def test_an_interrupt_keeps_the_pieces_and_publishes_nothing(threads: int, place: Place) -> None:
    calls = place.calls(threads=threads)
    resumed = []
    for at in range(5, calls - 20, 6):
        ended = place.merge(at, "interrupt", threads=threads)
        if place.out.exists():  # the streaming was over before the main thread woke up
            assert digests(place.out) == place.expected
        else:
            assert ended["status"] == "escaped KeyboardInterrupt", ended
            assert (place.hidden / "lock").exists()
            resumed.append(place.finish(threads=threads).resumed_bytes)
        place.clear()

    assert max(resumed) > 0


@pytest.mark.parametrize("at", [3, 12, 30, 60])
def test_of_two_merges_into_one_output_the_second_is_refused_and_the_first_finishes(
    at: int, place: Place
) -> None:
    stopped = place.merge(at, "stop")
    assert stopped["status"] == "stopped"
    before = {p: p.stat().st_mtime_ns for p in place.hidden.rglob("*")}

    for force in (False, True):
        with pytest.raises(infold.Refusal, match="another merge is writing this output right now"):
            infold.merge(place.base, place.adapter, place.out, force=force)

    assert {p: p.stat().st_mtime_ns for p in place.hidden.rglob("*")} == before
    done = place.runner.ask(**{"continue": stopped["pid"]})
    assert done["status"] == "done", done
    assert digests(place.out) == place.expected
    assert not place.hidden.exists()


def test_a_merge_into_another_output_beside_is_not_disturbed(place: Place) -> None:
    stopped = place.merge(30, "stop")

    infold.merge(place.base, place.adapter, place.folder / "out2")

    assert digests(place.folder / "out2") == place.expected
    assert place.runner.ask(**{"continue": stopped["pid"]})["status"] == "done"
    assert digests(place.out) == place.expected


def test_the_lock_of_a_killed_merge_does_not_lock_anyone_out(place: Place) -> None:
    assert place.merge(30, "kill before")["status"] == "killed"
    assert (place.hidden / "lock").exists()

    place.finish()


# --- the disk says no ----------------------------------------------------------------------------


@pytest.mark.parametrize("force", [False, True])
def test_a_full_disk_at_any_call_is_one_clear_line_and_leaves_nothing(
    force: bool, place: Place
) -> None:
    if force:
        place.place_old()
    done = place.merge(how="fail", force=force)
    place.clear()
    for at in range(1, done["calls"] + 1, 1 + force):
        if force:
            place.place_old()
        failed = place.merge(at, "fail", force=force)
        assert failed["status"] == "StorageFailure", (at, failed)
        assert failed["message"].endswith("no space left on the disk")
        assert "\n" not in failed["message"] and str(place.folder) in failed["message"]
        left = sorted(p.name for p in place.folder.iterdir())
        if force:
            assert left == ["out"]
            assert digests(place.out) in (digests(place.old), place.expected)
        elif left:  # published; only the last flush of the parent folder failed
            assert left == ["out"] and digests(place.out) == place.expected
            assert at == done["calls"]
        place.clear()


def test_a_full_disk_at_any_call_leaves_no_new_folder_above_the_output(place: Place) -> None:
    out = place.folder / "some" / "where" / "out"
    calls = place.merge(how="fail", out=out)["calls"]
    place.clear()
    for at in [*range(1, 12), *range(12, calls, 7)]:  # at the last one it is published
        failed = place.merge(at, "fail", out=out)
        assert failed["status"] == "StorageFailure", (at, failed)
        assert list(place.folder.iterdir()) == [], at


def test_a_lock_that_the_system_refuses_leaves_no_new_folder_either(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(infold.StorageFailure, match=os.strerror(errno.ENOLCK)):
        infold.merge(place.base, place.adapter, place.folder / "some" / "where" / "out")

    assert list(place.folder.iterdir()) == []


@pytest.mark.parametrize(("out", "longest"), [("{}", 247), ("new/{}/out", 255), ("é{}", 245)])
def test_a_name_that_is_too_long_is_refused_before_anything_is_written(
    out: str, longest: int, place: Place
) -> None:
    """Of its bytes, with what lies beside the output while it is made, or afterwards."""
    check_name(place.folder / out.format("n" * longest))
    for excess in (1, 9):
        path = place.folder / out.format("n" * (longest + excess))
        with pytest.raises(infold.Refusal, match=f"is {excess} bytes too long: .* at most 255"):
            infold.merge(place.base, place.adapter, path)
        assert list(place.folder.iterdir()) == []


def test_the_receipt_of_a_single_file_is_the_longest_name_beside_it(tmp_path: Path) -> None:
    check_name(tmp_path / f"{'n' * 230}.gguf")
    with pytest.raises(infold.Refusal, match=r"too long: NAME.infold-receipt.json lies beside it"):
        check_name(tmp_path / f"{'n' * 231}.gguf")


def test_the_longest_name_is_merged_to(place: Place) -> None:
    place.out = place.folder / ("n" * 247)
    infold.merge(place.base, place.adapter, place.out)

    assert digests(place.out) == place.expected


@pytest.mark.parametrize("error", [errno.EIO, errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_other_refusals_of_the_system_are_one_clear_line_too(error: int, place: Place) -> None:
    calls = place.merge(how="fail")["calls"]
    place.clear()
    for at in range(2, calls, 7):
        failed = place.merge(at, "fail", error=error)
        assert failed["status"] == "StorageFailure", (at, failed)
        assert "\n" not in failed["message"] and str(place.folder) in failed["message"]
        told = "no space left" if error == errno.EDQUOT else os.strerror(error)
        assert told in failed["message"]
        assert list(place.folder.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB, where this process may mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("may not mount a small file system here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full_is_one_clear_line(place: Place, small_disk: Path) -> None:
    failed = place.merge(out=small_disk / "out", no_preflight=True)

    assert failed["status"] == "StorageFailure", failed
    assert failed["message"].endswith("no space left on the disk")
    assert list(small_disk.iterdir()) == []


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    place: Place, small_disk: Path
) -> None:
    before = small_disk.stat().st_mtime_ns

    with pytest.raises(infold.StorageFailure, match=r"needs [\d,]+ bytes, but .* has only [\d,]+"):
        infold.merge(place.base, place.adapter, small_disk / "some" / "where" / "out")

    assert list(small_disk.iterdir()) == [] and small_disk.stat().st_mtime_ns == before


def test_the_space_that_an_interrupted_run_takes_already_is_not_needed_twice(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.stop_with_pieces()
    kept = sum(f.stat().st_blocks * 512 for f in place.staged.rglob("*") if f.is_file())
    size = sum(f.stat().st_size for f in place.base.rglob("*") if f.is_file())
    assert kept > size // 2
    free = size - kept + 4096
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, free))

    with pytest.raises(infold.StorageFailure, match="needs"):
        infold.merge(place.base, place.adapter, place.folder / "other")
    infold.merge(place.base, place.adapter, place.out)

    assert digests(place.out) == place.expected


def test_the_copies_of_side_files_in_a_record_need_space(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place.base / "tokenizer.json").write_text("x" * 100_000)
    size = sum(f.stat().st_size for f in place.base.rglob("*") if f.is_file())
    free = size + 50_000
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, free))

    with pytest.raises(infold.StorageFailure, match="needs"):
        infold.merge(place.base, place.adapter, place.out, undo=True)
    infold.merge(place.base, place.adapter, place.out)


def test_a_parent_folder_that_is_read_only_is_one_clear_line(
    place: Place, small_disk: Path
) -> None:
    remount = ["mount", "-o", "remount,ro", str(small_disk)]
    subprocess.run(remount, check=True)

    failed = place.merge(out=small_disk / "out", no_preflight=True)

    assert failed["status"] == "StorageFailure"
    assert failed["message"] == f"{small_disk}/.out.infold: Read-only file system"


def test_a_parent_folder_without_permission_is_one_clear_line(place: Place) -> None:
    if os.geteuid() == 0:  # the superuser may write everywhere: the refusal is played
        failed = place.merge(1, "fail", error=errno.EACCES)
    else:
        place.folder.chmod(0o555)
        failed = place.merge()
        place.folder.chmod(0o755)

    assert failed["status"] == "StorageFailure"
    assert failed["message"].endswith("Permission denied") and ".out.infold" in failed["message"]


# --- a power cut -------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc which file a descriptor is")
@pytest.mark.parametrize("force", [False, True])
def test_all_is_flushed_before_the_output_takes_its_name(force: bool, place: Place) -> None:
    """A kill keeps what is in the page cache, a power cut does not: so look at the order of calls.
    Each file is flushed after its last change, then each folder, then comes the name."""
    if force:
        place.place_old()
    trace = [(name, path) for name, path in place.merge(trace=True, force=force)["trace"]]
    named = "exchange" if force else "rename"
    publish = next(n for n, (name, _) in enumerate(trace) if name == named)

    for file in [*digests(place.out), RECEIPT]:
        path = str(place.staged / file)
        changed = [n for n, (name, at) in enumerate(trace) if at == path and name not in FLUSHES]
        flushed = [n for n, (name, at) in enumerate(trace) if at == path and name in FLUSHES]
        assert changed and max(changed) < max(flushed) < publish, file
    for folder in (place.staged, place.staged / "deep"):
        inside = [
            n
            for n, (name, at) in enumerate(trace[:publish])
            if Path(at).parent == folder and name not in FLUSHES
        ]
        synced = [n for n, call in enumerate(trace) if call == ("fsync", str(folder))]
        assert max(inside) < max(synced) < publish
    assert ("fsync", str(place.folder)) in trace[publish:]


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc which file a descriptor is")
def test_new_folders_above_the_output_are_flushed_too(place: Place) -> None:
    out = place.folder / "some" / "where" / "out"
    trace = [tuple(call) for call in place.merge(trace=True, out=out)["trace"]]
    publish = trace.index(("rename", str(out)))

    for parent in (place.folder, place.folder / "some"):
        assert ("fsync", str(parent)) in trace[:publish]


def test_the_lock_goes_last(place: Place) -> None:
    """While the old output is still being removed nobody may begin in the hidden folder."""
    place.place_old()
    trace = place.merge(trace=True, force=True)["trace"]
    after = trace[next(n for n, (name, _) in enumerate(trace) if name == "exchange") :]
    removed = [path for name, path in after if name in ("unlink", "rmdir")]

    assert len(removed) > 5
    assert removed[-2:] == [str(place.hidden / "lock"), str(place.hidden)]


FLUSHES = ("fsync", "fdatasync")


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc which file a descriptor is")
def test_a_piece_is_flushed_before_the_journal_tells_of_it(place: Place) -> None:
    trace = place.merge(trace=True)["trace"]
    told = [n for n, (name, path) in enumerate(trace) if (name, Path(path).name) == WRITTEN]

    assert len(told) > 6
    for line, number in enumerate(told):  # line 0 tells only what is being made
        flushed = [
            path for name, path in trace[:number] if name == "fdatasync" and "safetensors" in path
        ]
        assert len(flushed) >= line


def test_a_kill_really_was_a_kill(place: Place) -> None:
    assert place.merge(10, "kill before")["signal"] == signal.SIGKILL
