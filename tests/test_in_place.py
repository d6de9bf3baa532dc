"""A folder that is edited in place and killed in the middle is finished by whatever comes next."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import random
import shutil
import statistics
import threading
import tracemalloc
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from typer.testing import CliRunner

import ggufs
import handmade
import infold
import test_convert_gguf
import test_undo
from crash_child import Runner, prepare
from handmade import RECEIPT, digests
from infold.checkpoint.shards import JOURNAL, companion, open_checkpoint, read_receipt
from infold.cli.main import app
from infold.merge import inplace, inplace_steps
from infold.merge.inplace_steps import reserve

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

ALL = bool(os.environ.get("INFOLD_ALL_KILLS"))  # every call, and 200 random kills
VERBS = ("merge", "undo", "swap")
EDITED = {"b.q_proj": (128, 128), "c.k_proj": (128, 96)}
Pair = tuple[list[Path], list[Path]]  # the adapters of a merge, and of a swap


def dense(root: Path) -> Pair:
    """Low-rank updates of a folder of two shards."""
    numbers = torch.Generator().manual_seed(3)
    shapes = {"a.norm": (128,), "a.embed": (96, 128), **EDITED, "z": (64, 64)}
    tensors = {
        f"{n}.weight": torch.randn(*s, generator=numbers).bfloat16() for n, s in shapes.items()
    }
    base = handmade.base_folder(root / "base", tensors, shards=2)
    (base / "tokenizer.json").write_text("{}")
    first = handmade.lora(root / "first", EDITED, use_dora=True)
    return [first], [handmade.lora(root / "second", EDITED, seed=8)]


def replaced(root: Path) -> Pair:
    """A module and tokens that adapters replace, biases, and scales with zeros among them."""
    test_undo.new_base(root / "base")
    first = [test_undo.saved(root / "saved"), test_undo.tokens(root / "tokens")]
    return first, [test_undo.random_ia3(root / "scales", zero=True)]


def gguf(root: Path) -> Pair:
    """A file, whose blocks hold codes beside what is edited."""
    values = torch.randn(4, 64, 256, generator=torch.Generator().manual_seed(4)).numpy()
    tensors = {f"blk.{n}.attn_v.weight": ggufs.encode(values[n], "Q8_0") for n in range(4)}
    ggufs.write(root / "base" / "m.gguf", "llama", tensors, {"attention.head_count": 4})

    def scales(name: str, seed: int) -> list[Path]:
        drawn = 1 + torch.randn(4, 64, 1, generator=torch.Generator().manual_seed(seed)) / 10
        vectors = {f"model.layers.{n}.self_attn.v_proj": drawn[n].clone() for n in range(4)}
        return [handmade.ia3(root / name, vectors)]

    return scales("first", 1), scales("second", 2)


def requantized(root: Path) -> Pair:
    """A file whose codes were replaced, so that the record holds the old ones."""
    (root / "base").mkdir()
    test_convert_gguf.make(root / "base" / "m.gguf", "Q4_1")
    return [test_convert_gguf.low_rank(root / "first")], []


# how a base is made, and what its steps and blocks need so that there are several
BASES: dict[str, tuple[Callable[[Path], Pair], dict[str, int]]] = {
    "dense": (dense, {}),
    "replaced": (replaced, {"step": 2 << 10, "block": 512}),
    "gguf": (gguf, {}),
    "requantized": (requantized, {}),
}
# in place nothing is converted, so what was converted elsewhere is undone alone
CASES = [
    (base, verb) for base in BASES for verb in VERBS if base != "requantized" or verb == "undo"
]


class Place:
    """A base, adapters, and for every verb the folder before it and after it."""

    def __init__(self, root: Path, kind: str = "dense") -> None:
        self.root, self.folder = root, root / "work" / "model"
        make, self.small = BASES[kind]
        first, second = make(root)
        self.first, self.second = first[0], (second or first)[0]
        files = list((root / "base").glob("*.gguf"))
        self.name = files[0].name if files else ""
        base, one, two = (root / name / self.name for name in ("base", "one", "two"))
        options = {"requantize": True} if kind == "requantized" else {}
        with pytest.MonkeyPatch.context() as patch:
            prepare(self.small, patch.setattr)
            infold.merge(base, first, one, undo=True, threads=1, **options)
            if second:
                infold.swap(one, second, two, threads=1)
        self.before = {"merge": root / "base", "undo": root / "one", "swap": root / "one"}
        self.after = {"merge": root / "one", "undo": root / "base", "swap": root / "two"}
        self.adapter = {"merge": first, "undo": None, "swap": second}

    @property
    def model(self) -> Path:
        """What the verbs are given: the folder, or the file in it."""
        return self.folder / self.name

    @property
    def journal(self) -> Path:
        return companion(self.model, JOURNAL)

    def lay_out(self, verb: str) -> None:
        shutil.rmtree(self.folder.parent, ignore_errors=True)
        shutil.copytree(self.before[verb], self.folder)

    def request(self, verb: str) -> dict[str, Any]:
        given = [os.fspath(path) for path in self.adapter[verb] or ()]
        return {"verb": verb, "base": self.model, "adapter": given, **self.small}

    def weights(self, folder: Path) -> dict[str, str]:
        """Everything but what tells of the way: the receipt, and the record, whose order may be
        another."""
        return {n: d for n, d in digests(folder).items() if "infold-" not in n}

    def check(self, verb: str, completed: bool) -> None:
        """The folder is as before the edit, or as after it, and nothing else lies there."""
        expected = (self.after if completed else self.before)[verb]

        assert self.weights(expected) == self.weights(self.folder)
        names = {p.name for p in expected.iterdir()}
        assert names == {p.name for p in self.folder.iterdir()}
        if companion(self.model, RECEIPT).exists():
            assert self.receipt_holds()

    def receipt_holds(self) -> bool:
        """Whether a reader who compares the shards with the receipt takes this for merged."""
        if not companion(self.model, RECEIPT).exists():
            return False
        receipt = read_receipt(self.model)
        told = receipt["shards"] | receipt["side_files"]
        found = {name: blake3((self.folder / name).read_bytes()).hexdigest() for name in told}
        return bool(told == found)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Place]:
    return cache(lambda kind: Place(tmp_path_factory.mktemp(kind), kind))


@pytest.fixture(scope="module")
def place(places: Callable[[str], Place]) -> Place:
    return places("dense")


@pytest.mark.parametrize("verb", VERBS)
def test_in_place_gives_what_a_new_folder_gets(verb: str, place: Place, runner: Runner) -> None:
    for threads in (1, 3):
        place.lay_out(verb)
        done = runner.ask(**place.request(verb), threads=threads)

        assert done["status"] == "done", done
        place.check(verb, True)
    if verb != "undo":
        infold.undo(place.folder, in_place=True)
        place.check("undo", True)


def settle(place: Place, verb: str, caplog: pytest.LogCaptureFixture) -> bool:
    """What the next command finds. Returns whether it has completed the edit."""
    if not place.journal.exists():
        ended = place.weights(place.folder) == place.weights(place.after[verb])
        place.check(verb, ended)
        return ended
    if place.receipt_holds():
        whole = place.weights(place.folder)
        assert whole in [place.weights(f[verb]) for f in (place.before, place.after)]
    for path in (place.model, place.folder):
        with pytest.raises(infold.Refusal, match="edited in place"):
            open_checkpoint(path)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "infold"):
        found = infold.inspect(place.model)
    told = caplog.text
    completed = "was completed" in told
    assert (completed != ("was rolled back" in told) and verb in told) or "edit in place" in told
    merged = companion(place.model, RECEIPT).exists()
    assert found["kind"] == ("merged" if merged else "checkpoint")
    place.check(verb, completed)
    return completed


@pytest.mark.parametrize("how", ["kill before", "kill in the middle"])
@pytest.mark.parametrize(("base", "verb"), CASES)
def test_a_kill_at_any_call_is_completed_or_rolled_back(
    base: str,
    verb: str,
    how: str,
    places: Callable[[str], Place],
    runner: Runner,
    caplog: pytest.LogCaptureFixture,
) -> None:
    place = places(base)
    place.lay_out(verb)
    calls = runner.ask(**place.request(verb))["calls"]
    assert calls > 25
    ends = set()
    sample = 3 if base == "dense" else calls // 4
    for at in range(1, calls + 1, 1 if ALL else sample):
        place.lay_out(verb)
        killed = runner.ask(**place.request(verb), at=at, how=how)

        assert killed["status"] == "killed", (at, killed)
        ends.add(settle(place, verb, caplog))
    assert ends == {True, False}


def test_what_only_an_output_can_have_is_refused(place: Place) -> None:
    for name in ("force", "sha256"):
        with pytest.raises(infold.Refusal, match=f"--{name} with --in-place"):
            infold.merge(place.before["merge"], place.first, in_place=True, **{name: True})
    with pytest.raises(infold.Refusal, match="--force with --in-place"):
        infold.swap(place.before["swap"], place.second, in_place=True, force=True)


@pytest.mark.parametrize("where", ["_rehearse", "_steps"])
def test_an_interrupt_says_whether_the_folder_is_half_edited(
    where: str, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    base = shutil.copytree(place.before["merge"], tmp_path / "base")
    given = str(base / place.name) if place.name else str(base)
    with monkeypatch.context() as patch:
        patch.setattr(inplace._Edit, where, stopped)
        ran = CliRunner().invoke(app, ["merge", given, str(place.first), "--in-place"])

    assert ran.exit_code == 130
    half = where == "_steps"
    assert (f"{given} may be half edited: do not load it until" in ran.stderr) == half


@pytest.mark.parametrize("verb", VERBS)
def test_the_same_command_ends_what_was_begun(verb: str, place: Place, runner: Runner) -> None:
    place.lay_out(verb)
    calls = runner.ask(**place.request(verb))["calls"]
    for at in range(3, calls + 1, 11):
        place.lay_out(verb)
        assert runner.ask(**place.request(verb), at=at, how="kill before")["status"] == "killed"
        again = runner.ask(**place.request(verb))
        if verb == "undo" and not (place.folder / JOURNAL).exists():
            assert again["status"] in ("done", "Refusal"), "all was done before the kill"
        place.check(verb, True)


def test_a_completion_that_is_killed_is_completed(
    place: Place, runner: Runner, caplog: pytest.LogCaptureFixture
) -> None:
    place.lay_out("swap")
    calls = runner.ask(**place.request("swap"))["calls"]
    place.lay_out("swap")
    for at in (calls * 2 // 3, 9, 9, 9):
        killed = runner.ask(**place.request("swap"), at=at, how="kill in the middle")
        assert killed["status"] == "killed"

    assert settle(place, "swap", caplog)


@pytest.mark.parametrize("verb", VERBS)
def test_what_a_kill_began_is_ended_without_the_side_files(
    verb: str, place: Place, runner: Runner, tmp_path: Path
) -> None:
    """An edit that has begun to write leaves them alone, so the loss of one, which the record does
    not keep either, must not leave the folder torn."""
    start = place.before["merge"]
    if verb != "merge":
        with pytest.MonkeyPatch.context() as patch:
            prepare({"side": 0}, patch.setattr)
            infold.merge(start, place.first, tmp_path / "merged", undo=True, threads=1)
        start = tmp_path / "merged"

    def killed(at: int | None) -> Any:
        shutil.rmtree(place.folder.parent, ignore_errors=True)
        shutil.copytree(start, place.folder)
        return runner.ask(**place.request(verb), side=0, at=at, how="kill in the middle")

    ends = set()
    for at in range(2, killed(None)["calls"] + 1, 5):
        assert killed(at)["status"] == "killed"
        (place.folder / "tokenizer.json").unlink()
        settled = inplace.settle(place.folder)
        shutil.copy(start / "tokenizer.json", place.folder)
        if settled:
            ends.add(settled.completed)
            place.check(verb, settled.completed)
    assert ends == {True, False}


PHASES = ("rehearsal", "first step", "later steps")
HASTE = {"threads": 2, "step": 8 << 10}


def phase(place: Place) -> str:
    """What an edit was at when it was killed: one of PHASES, or empty before and after them."""
    known: set[str] = set()
    with suppress(FileNotFoundError):
        for line in place.journal.read_bytes().split(b"\n")[:-1]:
            known |= json.loads(line).keys()
    if "written" in known or not place.journal.exists():
        return ""
    return PHASES[("result" in known) + ("step" in known)]


def windows(place: Place, verb: str, runner: Runner) -> Mapping[str, tuple[float, float]]:
    """When each phase of an edit begins and ends, in seconds; under "" the whole of it."""
    times = []
    for _ in range(3 if ALL else 1):
        place.lay_out(verb)
        answer = runner.ask(**place.request(verb), **HASTE, trace=True)
        lines = [
            when
            for (name, path), when in zip(answer["trace"], answer["times"], strict=True)
            if name == "write" and path == str(place.journal)
        ]
        assert len(lines) > 5, "what, result, several steps, written"
        times.append((*lines[:3], lines[-1], answer["times"][-1]))
    begun, told, stepped, written, ended = map(statistics.median, zip(*times, strict=True))
    spans = ((begun, told), (told, stepped), (stepped, written))
    return {"": (0.0, ended), **dict(zip(PHASES, spans, strict=True))}


def test_random_kills(place: Place, runner: Runner, caplog: pytest.LogCaptureFixture) -> None:
    """So many that were killed, each verb in each phase: what had ended before is not counted."""
    wanted, least = (200, 10) if ALL else (9, 1)
    needed = PHASES if ALL else PHASES[::2]  # the first step is short on a busy machine
    numbers, kills, tries = random.Random(11), Counter[tuple[str, str]](), 0
    when = {verb: windows(place, verb, runner) for verb in VERBS}
    lacking = [(verb, name) for verb in VERBS for name in needed]
    while kills.total() < wanted or lacking:
        tries += 1
        assert tries < 20 * wanted, (kills, when)
        # where there were too few yet; of 200, every second one at any time of any verb
        aimed = bool(lacking) and not (ALL and tries % 2)
        verb, name = numbers.choice(lacking) if aimed else (numbers.choice(VERBS), "")
        place.lay_out(verb)
        delay = numbers.uniform(*when[verb][name])
        answer = runner.ask(**place.request(verb), **HASTE, delay=delay)
        assert answer["status"] in ("killed", "done")
        found = phase(place)
        kills[verb, found] += answer["status"] == "killed"
        if aimed and found != name:  # the machine is slower or faster now
            late = not found or PHASES.index(found) > PHASES.index(name)
            factor = 0.95 if late else 1.05
            when[verb] = {n: (a * factor, b * factor) for n, (a, b) in when[verb].items()}
        settle(place, verb, caplog)
        lacking = [pair for pair in lacking if kills[pair] < least]
    print(f"{tries} tries, killed in: {dict(kills)}")


def test_a_full_disk_before_the_first_step_changes_nothing(place: Place, runner: Runner) -> None:
    place.lay_out("merge")
    calls = runner.ask(**place.request("merge"))["calls"]
    statuses = set()
    for at in range(1, calls + 1, 3):
        place.lay_out("merge")
        failed = runner.ask(**place.request("merge"), at=at, how="fail")
        statuses.add(failed["status"])
        if (place.folder / JOURNAL).exists():  # after the commit: it waits for space
            infold.inspect(place.folder)
            place.check("merge", True)
        else:
            place.check("merge", failed["status"] == "done")
    assert "StorageFailure" in statuses and not any("escaped" in s for s in statuses), statuses


@pytest.mark.parametrize("verb", VERBS)
def test_the_room_of_a_step_is_taken_in_the_rehearsal(
    verb: str, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a disk that is too full for it refuses the edit, and does not stop it in the middle."""
    prepare({}, monkeypatch.setattr)

    def edit() -> None:
        given = [place.adapter[verb]] if place.adapter[verb] else []
        getattr(infold, verb)(place.folder, *given, in_place=True, threads=2)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    place.lay_out(verb)
    with monkeypatch.context() as patch, pytest.raises(infold.StorageFailure, match="no space"):
        patch.setattr(os, "posix_fallocate", full)
        edit()
    place.check(verb, False)

    steps = []

    def watched(path: Path, data: bytes, **how: bool) -> None:
        if path.name == inplace.STEP:
            steps.append((len(data), path.stat().st_size))
        written(path, data, **how)

    written = inplace.write_file
    monkeypatch.setattr(inplace, "write_file", watched)
    edit()
    place.check(verb, True)
    assert len(steps) > 3 and all(count <= room for count, room in steps), steps
    assert len({room for _, room in steps}) == 1, "no step gives it back"

    monkeypatch.delattr(os, "posix_fallocate")  # as on macOS
    place.lay_out(verb)
    edit()
    place.check(verb, True)


def test_the_next_step_is_computed_while_one_is_written(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare({}, monkeypatch.setattr)
    place.lay_out("merge")
    computed = threading.Semaphore(0)

    def counted(self: inplace_steps.Crew, work: inplace_steps.Work) -> inplace_steps.Piece:
        try:
            return compute(self, work)
        finally:
            computed.release()

    def watched(number: int, pieces: Sequence[inplace_steps.Piece]) -> bytes:
        if number == 1:
            assert all(computed.acquire(timeout=20) for _ in range(len(pieces) + 1))
        return pack(number, pieces)

    compute, pack = inplace_steps.Crew._compute, inplace.pack_step
    monkeypatch.setattr(inplace_steps.Crew, "_compute", counted)
    monkeypatch.setattr(inplace, "pack_step", watched)
    infold.merge(place.folder, place.first, in_place=True, threads=2)
    place.check("merge", True)


def test_the_memory_of_steps_is_counted_and_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With little memory the steps are smaller; what `--max-memory` is told to need is enough."""
    prepare({"block": 1 << 16, "step": 4 << 20}, monkeypatch.setattr)
    monkeypatch.setattr(inplace, "LEAST_STEP", 1 << 20)
    modules = {f"m.{n}": (1024, 1024) for n in range(6)}
    base = handmade.base_folder(
        tmp_path / "base", {f"{module}.weight": torch.ones(1024, 1024) for module in modules}
    )
    adapter = handmade.lora(tmp_path / "adapter", modules)
    steps, peaks = list[int](), list[int]()

    def written(edit: inplace._Edit, workers: int) -> None:
        steps.append(next(line["step_bytes"] for line in edit.lines if "step_bytes" in line))
        try:
            write(edit, workers)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()

    def begun(*given: Any) -> Any:
        tracemalloc.start()  # the records are open
        return group(*given)

    write, group = inplace._Edit._steps, inplace.grouped
    monkeypatch.setattr(inplace._Edit, "_steps", written)
    monkeypatch.setattr(inplace, "grouped", begun)
    with pytest.raises(infold.Refusal, match=r"this merge needs \d+ MiB") as refusal:
        infold.merge(base, adapter, in_place=True, threads=2, max_memory=1)
    needed = int(str(refusal.value).partition("needs ")[2].partition(" MiB")[0]) << 20
    for memory in (1 << 30, needed):
        folder = shutil.copytree(base, tmp_path / f"model-{memory}")
        infold.merge(folder, adapter, in_place=True, threads=2, max_memory=memory)

    assert steps == [4 << 20, 1 << 20]
    for step, peak in zip(steps, peaks, strict=True):
        assert 2 * step < peak < inplace_steps.step_memory(step) + (2 << 20), (step, peak)


def test_a_completion_takes_no_more_workers_than_the_edit(
    place: Place, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose memory was asked for with that many."""
    place.lay_out("merge")
    calls = runner.ask(**place.request("merge"))["calls"]
    place.lay_out("merge")
    killed = runner.ask(**place.request("merge"), threads=3, at=calls * 2 // 3, how="kill before")
    assert killed["status"] == "killed"
    workers = list[int]()

    def crew(count: int, *rest: Any) -> inplace_steps.Crew:
        workers.append(count)
        return inplace_steps.Crew(count, *rest)

    monkeypatch.setattr(inplace, "Crew", crew)
    monkeypatch.setattr(inplace, "usual_threads", lambda: 8)
    settled = inplace.settle(place.folder)

    assert settled and settled.completed and workers == [3]


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS])
def test_room_is_taken_on_file_systems_that_cannot_do_it_themselves(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There glibc reads and writes the bytes one by one, and other libraries give up."""

    def by_hand(fd: int, offset: int, length: int) -> None:
        os.pread(fd, 1, offset)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", by_hand)
    reserve(tmp_path / "step", 3 << 19)
    assert (tmp_path / "step").read_bytes() == bytes(3 << 19)

    def as_glibc(fd: int, offset: int, length: int) -> None:
        os.pread(fd, 1, offset)
        os.ftruncate(fd, length)

    monkeypatch.setattr(os, "posix_fallocate", as_glibc)
    monkeypatch.setattr(inplace_steps, "write_fully", None)  # is not needed then
    reserve(tmp_path / "step", 100)
    assert (tmp_path / "step").stat().st_size == 100


@pytest.mark.parametrize("verb", VERBS)
def test_without_locks_nothing_is_left_in_the_folder(
    verb: str, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A journal, even an empty one, would keep all of infold from reading the model."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    place.lay_out(verb)
    before, descriptors = digests(place.folder), open_descriptors()
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", refuse)
        given = [] if verb == "undo" else [place.adapter[verb]]
        with pytest.raises(infold.StorageFailure, match=os.strerror(errno.ENOLCK)):
            getattr(infold, verb)(place.model, *given, in_place=True)

    assert digests(place.folder) == before and open_descriptors() == descriptors
    infold.inspect(place.model)


def open_descriptors() -> list[str]:
    return os.listdir("/proc/self/fd") if os.path.exists("/proc/self/fd") else []


def test_nobody_else_edits_the_folder_meanwhile(place: Place, runner: Runner) -> None:
    place.lay_out("merge")
    stopped = runner.ask(**place.request("merge"), at=20, how="stop")
    assert stopped["status"] == "stopped"
    try:
        with pytest.raises(infold.Refusal, match="being edited in place right now"):
            infold.inspect(place.folder)
        with pytest.raises(infold.Refusal, match="being edited in place right now"):
            infold.merge(place.folder, place.second, in_place=True)
    finally:
        done = runner.ask(**{"continue": stopped["pid"]})
    assert done["status"] == "done"
    place.check("merge", True)


# --- refusals ----------------------------------------------------------------------------------


def refused(place: Path, adapter: Path, match: str) -> None:
    before = digests(place)
    with pytest.raises(infold.Refusal, match=match):
        infold.merge(place, adapter, in_place=True)
    assert before == digests(place)


def test_what_would_change_the_layout_is_refused(tmp_path: Path) -> None:
    tensors = {"model.embed_tokens.weight": torch.ones(8, 4)}
    base = handmade.base_folder(tmp_path / "base", tensors, {"tie_word_embeddings": True})
    adapter = handmade.lora(tmp_path / "adapter", {"lm_head": (8, 4)})

    refused(base, adapter, "layout would change")


def test_links_and_second_copies_are_refused(tmp_path: Path) -> None:
    base = handmade.base_folder(tmp_path / "base", {"q.weight": torch.ones(8, 4)})
    adapter = handmade.lora(tmp_path / "adapter", {"q": (8, 4)})
    (base / "pytorch_model.bin").write_bytes(b"x")
    refused(base, adapter, r"pytorch_model.bin: repeats")
    (base / "pytorch_model.bin").unlink()
    os.link(base / "model.safetensors", tmp_path / "elsewhere")
    refused(base, adapter, "is a link")
    (tmp_path / "elsewhere").unlink()
    infold.merge(base, adapter, in_place=True)
    refused(base, adapter, "merged already")


def test_a_system_without_fdatasync_merges_too(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As macOS."""
    monkeypatch.delattr(os, "fdatasync")
    place.lay_out("merge")
    infold.merge(place.folder, place.first, tmp_path / "out", undo=True)
    infold.merge(place.folder, place.first, in_place=True)
    place.check("merge", True)
    assert place.weights(tmp_path / "out") == place.weights(place.folder)


def test_an_overflow_is_refused_before_anything_changes(tmp_path: Path) -> None:
    base = handmade.base_folder(tmp_path / "base", {"q.weight": torch.ones(64, 64).half()})
    adapter = handmade.lora(tmp_path / "adapter", {"q": (64, 64)}, alpha=1e9)

    refused(base, adapter, "does not fit F16")


@pytest.mark.parametrize("verb", ["undo", "swap"])
def test_a_record_of_the_merge_does_not_block_the_way_back(verb: str, place: Place) -> None:
    place.lay_out(verb)
    record = place.folder / "records" / "checklist.json"
    record.parent.mkdir()
    record.write_text('{"kind": "checklist", "receipt": "of the merge"}')
    if verb == "undo":
        infold.undo(place.folder, in_place=True)
    else:
        infold.swap(place.folder, place.second, in_place=True)
    assert record.exists(), "it tells of which merge it is"
    shutil.rmtree(record.parent)
    place.check(verb, completed=True)


def test_shards_that_were_changed_are_not_undone_in_place(place: Place) -> None:
    place.lay_out("undo")
    shard = place.folder / "model-00001-of-00002.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    before = digests(place.folder)
    for verb in (
        lambda: infold.undo(place.folder, in_place=True),
        lambda: infold.swap(place.folder, place.second, in_place=True),
    ):
        with pytest.raises(infold.Refusal, match="was changed after it was merged"):
            verb()
        assert before == digests(place.folder)


def test_a_step_that_is_not_written_ahead_would_be_noticed(
    place: Place, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests above can fail: without the step file a torn write is not repaired."""
    monkeypatch.setattr(inplace._Edit, "_replay", lambda self, writer, finished, _: finished)
    place.lay_out("undo")
    calls = runner.ask(**place.request("undo"), trace=True)
    written = [
        number
        for number, (name, path) in enumerate(calls["trace"], 1)
        if name == "pwrite" and Path(path).suffix == ".safetensors"
    ]
    place.lay_out("undo")
    runner.ask(**place.request("undo"), at=written[0], how="kill in the middle")
    try:
        infold.inspect(place.folder)
        same = place.weights(place.folder) == place.weights(place.after["undo"])
    except infold.InfoldError:
        same = False
    assert not same
