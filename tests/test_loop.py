"""The loop: one rounding, the way back, kills in every phase, honest splits, refusals."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import infold
import loop_tasks
from forked import INFOLD, infold_command, trained
from handmade import digests, lora, write_index
from infold.cli.main import app
from infold.errors import Refusal
from infold.loop import arithmetic
from infold.loop.config import read_config
from infold.loop.folder import Journal, Run, digests_of_base, write_json, write_lines
from infold.loop.run import checkout, lineage
from infold.loop.score import score, wilson
from infold.loop.task import check_apart, open_task
from infold.tuners.loading import most_tokens
from training import save_rounded_base

HERE = Path(__file__).parent
pytestmark = pytest.mark.usefixtures("calm")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_rounded_base(tmp_path_factory.mktemp("loop") / "base")


def settings(base: Path, run: Path, **changed: Any) -> dict[str, Any]:
    return {
        "base": str(base),
        "run": str(run),
        "iterations": 2,
        "task": {name: f"loop_tasks:{name}" for name in ("problems", "prompt", "verify")},
        "collect": {"problems": 6, "samples": 2, "batch": 6, "max_tokens": 4},
        "train": {"method": "lora", "rank": 2, "steps": 3, "batch_size": 2, "lr": 0.05},
        "evaluate": {"problems": 8},
    } | changed


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {
        k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()
    }


def weights(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


def without_times(value: Any) -> Any:
    """A record but for what a clock measured."""
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in ("seconds", "memory")}
    return value


def outcome(run: Path) -> dict[str, Any]:
    """All that a run made that a second run must make again."""
    found: dict[str, Any] = {"model": weights(run / "model")}
    for path in sorted((run / "iterations").rglob("*")):
        name = str(path.relative_to(run))
        if path.name in ("problems.json", "kept.jsonl", "adapter_model.safetensors"):
            found[name] = path.read_bytes()
        elif path.name in ("collect.json", "merge.json", "scores.json"):
            found[name] = without_times(json.loads(path.read_text()))
    return found


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run to its end, with a copy of each iteration's model as it was: RUN-1, RUN-2."""
    run = tmp_path_factory.mktemp("whole") / "run"

    def keep(line: str) -> None:
        number, phase = line.split()[:2]
        if phase == "merge":
            shutil.copytree(run / "model", run.with_name(f"run-{number}"))

    infold.Loop(settings(base, run)).run(keep)
    return run


# --- what a run makes -----------------------------------------------------------------------------


def test_an_iteration_is_base_and_adapters_in_one_rounding(base: Path, whole: Path) -> None:
    truth = {name: value.double() for name, value in tensors(base).items()}
    for number in (1, 2):
        adapter = whole / "iterations" / f"{number:03}" / "adapter"
        scale = json.loads((adapter / "adapter_config.json").read_text())
        saved = load_file(adapter / "adapter_model.safetensors")
        for name, a in saved.items():
            if "lora_A" in name:
                b = saved[name.replace("lora_A", "lora_B")]
                target = name.removeprefix("base_model.model.").replace(".lora_A", "")
                truth[target] += scale["lora_alpha"] / scale["r"] * (b.double() @ a.double())

    merged, changed = tensors(whole / "model"), 0
    for name, value in tensors(base).items():
        torch.testing.assert_close(merged[name], truth[name].bfloat16(), rtol=0, atol=0)
        changed += not torch.equal(merged[name], value)
    assert changed >= 4
    receipt = json.loads((whole / "model" / "infold-receipt.json").read_text())
    assert len(receipt["adapters"]) == 2


def test_every_iteration_comes_back_byte_for_byte(whole: Path, tmp_path: Path) -> None:
    for number in (1, 2):
        checkout(whole, number, tmp_path / str(number))

        assert weights(tmp_path / str(number)) == weights(whole.with_name(f"run-{number}"))
    assert weights(whole.with_name("run-1")) != weights(whole.with_name("run-2"))
    with pytest.raises(Refusal, match="has no merged iteration 3; it has 1, 2"):
        checkout(whole, 3, tmp_path / "3")
    with pytest.raises(Refusal, match="is the base itself"):
        checkout(whole, 0, tmp_path / "0")


def test_a_changed_adapter_does_not_pass_as_the_iteration(
    base: Path, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    one, two = (run / "iterations" / n / "adapter" / "adapter_model.safetensors"
                for n in ("001", "002"))  # fmt: skip
    shutil.copyfile(two, one)

    for again in (
        lambda: checkout(run, 1, tmp_path / "out"),
        lambda: infold.Loop(settings(base, run, iterations=3)).run(),
    ):
        with pytest.raises(Refusal, match=r"001/adapter: was changed since it was trained"):
            again()
    told = run / "iterations/001/train.json"
    record = json.loads(told.read_text())
    record["adapter"] = Run(run).iteration(1).adapter_digests()  # as if it had been trained so
    told.write_text(json.dumps(record))
    with pytest.raises(
        infold.ProofFailed, match=r"not the bytes of iteration 1, .*001/merge\.json"
    ):
        checkout(run, 1, tmp_path / "out")
    assert not (tmp_path / "out").exists(), "the wrong bytes have no name"
    told = infold_command("loop", "checkout", run, "1", "--out", tmp_path / "out", "--json")
    assert told.returncode == 1 and json.loads(told.stdout)["error"] == "ProofFailed"
    checkout(whole, 1, tmp_path / "out")
    before = digests(tmp_path / "out")
    with pytest.raises(infold.ProofFailed, match="not the bytes of iteration 1"):
        checkout(run, 1, tmp_path / "out", force=True)
    assert before == digests(tmp_path / "out"), "and replace no right ones"


def test_weights_of_one_iteration_and_adapters_of_all(whole: Path) -> None:
    found = lineage(whole)

    assert [it["iteration"] for it in found["iterations"]] == [0, 1, 2]
    assert found["stopped"] == "all 2 iterations are done"
    for it in found["iterations"][1:]:
        assert it["adapter_bytes"] > 0
        for phase in ("collect", "train", "merge", "evaluate"):
            memory = it[phase]["memory"]
            assert it[phase]["seconds"] > 0
            assert memory is None or memory["peak"] >= max(memory["before"], memory["after"])
    folders = [p.parent for p in whole.rglob("*.safetensors") if p.name.startswith("model")]
    assert set(folders) == {whole / "model"}


def test_only_accepted_answers_are_learnt(whole: Path) -> None:
    for number in ("001", "002"):
        folder = whole / "iterations" / number
        rows = [json.loads(line) for line in (folder / "kept.jsonl").read_text().splitlines()]
        counts = json.loads((folder / "collect.json").read_text())

        assert rows and len(rows) == counts["rows"]
        assert all(loop_tasks.verify("", row["completion"]) for row in rows)
        assert all(row["prompt"].startswith("what is collect") for row in rows)


def test_the_control_learns_every_answer(base: Path, whole: Path, tmp_path: Path) -> None:
    found = infold.Loop(settings(base, tmp_path / "run", iterations=1), control=True).run()

    collected = found["iterations"][1]["collect"]
    assert found["run"] == str(tmp_path / "run-control") and collected["filter"] == "none"
    assert collected["accepted"] < collected["rows"] <= collected["answers"]
    rows = (tmp_path / "run-control/iterations/001/kept.jsonl").read_text().splitlines()
    assert any(len(json.loads(row)["completion"]) % 2 for row in rows)


def test_weights_that_are_not_the_iteration_s_are_made_again(
    base: Path, whole: Path, tmp_path: Path
) -> None:
    """A damaged RUN/model is never asked, nor trained on."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (shard,) = (run / "model").glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    for damage in (bytes(data), bytes(data[:-100]), None):
        shard.unlink()
        if damage is not None:
            shard.write_bytes(damage)
        infold.Loop(settings(base, run)).run()

        assert outcome(run) == outcome(whole)
    receipt = run / "model" / "infold-receipt.json"
    told = json.loads(receipt.read_text())
    for change in ({"adapters": [1, 2]}, {"shards": {"../../x": "y"}}, {"base": None}):
        receipt.write_text(json.dumps(told | change))
        infold.Loop(settings(base, run)).run()

        assert outcome(run) == outcome(whole)
    config = run / "model" / "config.json"
    config.write_bytes(config.read_bytes() + b" ")
    infold.Loop(settings(base, run)).run()
    assert config.read_bytes() == (base / "config.json").read_bytes()
    shard.write_bytes(data)  # with a receipt that agrees: of another iteration, as it were
    theirs = {"shards": {shard.name: blake3(data).hexdigest()}}
    receipt.write_text(json.dumps(told | theirs))
    infold.Loop(settings(base, run)).run()
    assert outcome(run) == outcome(whole)


@pytest.mark.parametrize("name", ["collect.json", "train.json", "merge.json", "scores.json"])
def test_a_damaged_record_comes_back_as_its_refusal_says(
    name: str, base: Path, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    record = run / "iterations/001" / name
    record.write_text("{}")
    with pytest.raises(infold.CorruptFile, match="the next run makes it anew") as told:
        infold.Loop(settings(base, run)).run()
    assert ("it and the scores.json beside it" in str(told.value)) == (name != "scores.json")

    record.unlink()
    record.with_name("scores.json").unlink(missing_ok=True)
    infold.Loop(settings(base, run)).run()

    assert outcome(run) == outcome(whole) and record.exists()


def test_a_run_belongs_to_what_lies_beside_its_base_s_weights(
    base: Path, whole: Path, tmp_path: Path
) -> None:
    run, other = tmp_path / "run", tmp_path / "base"
    shutil.copytree(whole, run)
    shutil.copytree(base, other)
    (other / "README.md").write_text("for people")
    infold.Loop(settings(other, run)).run()  # the base has moved; that is all
    tokenizer = other / "tokenizer_config.json"
    tokenizer.write_bytes(tokenizer.read_bytes() + b" ")
    (other / "chat_template.jinja").write_text("{{ messages }}")
    before = digests(run)

    names = r"chat_template\.jinja, tokenizer_config\.json"
    with pytest.raises(Refusal, match=f"another base, .*: {names} of .* is not what it was"):
        infold.Loop(settings(other, run)).run()
    with pytest.raises(Refusal, match=f"is not the base of .* any more: {names} changed"):
        checkout(run, 1, tmp_path / "out")
    assert digests(run) == before and not (tmp_path / "out").exists()


def test_more_iterations_continue_a_run(base: Path, whole: Path, tmp_path: Path) -> None:
    config = settings(base, tmp_path / "run", iterations=1)
    infold.Loop(config).run()
    infold.Loop(config | {"iterations": 2}).run()

    assert outcome(tmp_path / "run") == outcome(whole)


def test_shards_of_one_name_in_two_folders_are_two(tmp_path: Path) -> None:
    """Else no model that was merged from them would be known again, and each phase merged anew."""
    weights = {f"{part}.q.weight": torch.randn(4, 4) for part in ("one", "two")}
    folder = tmp_path / "base"
    for name, value in weights.items():
        (folder / name[:3]).mkdir(parents=True)
        save_file({name: value}, folder / name[:3] / "model.safetensors")
    write_index(folder, {name: f"{name[:3]}/model.safetensors" for name in weights})
    (folder / "config.json").write_text('{"tie_word_embeddings": false}')
    adapter = lora(tmp_path / "adapter", {"one.q": (4, 4)})

    receipt = infold.merge(folder, adapter, tmp_path / "out")

    told = digests_of_base(str(folder))["shards"]
    assert told == receipt.base["shards"] and len(told) == 2


# --- kills ----------------------------------------------------------------------------------------


def test_a_full_disk_in_the_middle_of_a_merge_loses_nothing(
    base: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "model")
    for name in ("merge.json", "scores.json", "evaluate.jsonl"):
        (run / "iterations" / "002" / name).unlink()
    kept = digests(run / "iterations")

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(infold.StorageFailure, match="no space"):
        patch.setattr(os, "pwrite", full)
        infold.Loop(settings(base, run)).run()
    assert digests(run / "iterations") == kept
    assert lineage(run)["stopped"] is None, "it is no longer at the end that it came to before"
    assert not (run / "model").exists() and not (run / ".model.infold").exists()
    infold.Loop(settings(base, run)).run()

    assert outcome(run) == outcome(whole)


def test_a_journal_loses_its_torn_line_and_no_other(tmp_path: Path) -> None:
    file = tmp_path / "collect.jsonl"
    first = {"chunk": 0, "answers": [["a\r\u2028\u0085b", "half a pair \ud800"]]}
    Journal(file).append(first)
    whole = file.read_bytes()
    file.write_bytes(whole + b'{"chunk": 1, "answ')
    assert Journal(file).entries == [first] and file.read_bytes() == whole
    for line in (b"torn\n", b"[1]\n", b"{}\n", b"\0\n"):
        file.write_bytes(whole + line + b'{"chunk": 1, "answers": []}\n')
        with pytest.raises(infold.CorruptFile, match=r"collect\.jsonl: line 2"):
            Journal(file)


def test_half_of_a_surrogate_pair_in_an_answer_is_kept(tmp_path: Path) -> None:
    write_json(tmp_path / "one.json", {"text": "\ud800 é"})
    write_lines(tmp_path / "two.jsonl", [{"text": "\ud800 é"}])
    for name in ("one.json", "two.jsonl"):
        assert json.loads((tmp_path / name).read_text()) == {"text": "\ud800 é"}


def test_killed_in_every_phase_it_ends_with_the_same_bytes(
    base: Path, whole: Path, tmp_path: Path
) -> None:
    """One run, killed again and again at a later point: in each phase, and between them."""
    config, log, run = tmp_path / "config.json", tmp_path / "log", tmp_path / "run"
    config.write_text(json.dumps(settings(base, run)))

    def run_child(point: str) -> subprocess.CompletedProcess[str]:
        return trained(HERE / "loop_child.py", config, point, log, cwd=HERE)

    for point in (
        "before:loop.json:1",
        "journal:1",  # the base's first held-out answers are there, and not judged
        "journal:5",  # in the collection
        "before:collect.json:1",
        "step:2",
        "before:train.json:1",  # trained, and not recorded
        "merge:1",
        "before:merge.json:1",  # merged, and not recorded
        "journal:2",  # in the evaluation
        "before:scores.json:1",
    ):
        ran = run_child(point)
        assert ran.returncode == -signal.SIGKILL, (point, ran.stderr)
    full = run_child("full:1")
    assert full.returncode == 1 and "StorageFailure" in full.stderr, full.stderr
    assert run_child("none").returncode == 0

    assert outcome(run) == outcome(whole)
    chunks = log.read_text().splitlines()
    assert len(chunks) == len(set(chunks)), "a chunk that was on the disk was computed again"


def test_an_interrupt_says_that_the_same_command_continues(
    base: Path, whole: Path, tmp_path: Path
) -> None:
    config, run = tmp_path / "loop.toml", tmp_path / "run"

    def command(verify: str) -> subprocess.CompletedProcess[str]:
        config.write_text(as_toml(settings(base, run), verify))
        return infold_command("loop", config, "--quiet", cwd=HERE, kind="training")

    ended = command("interrupted")
    assert ended.returncode == 130, ended.stderr
    assert "interrupted; the same command continues" in ended.stderr
    assert "Traceback" not in ended.stderr
    facts = json.loads((run / "loop.json").read_text())
    facts["config"]["task"]["verify"] = "loop_tasks:verify"  # the verifier that was corrected
    (run / "loop.json").write_text(json.dumps(facts))
    assert command("verify").returncode == 0
    assert outcome(run) == outcome(whole)


def as_toml(config: dict[str, Any], verify: str) -> str:
    config["task"] = config["task"] | {"verify": f"loop_tasks:{verify}"}
    lines = [f"{k} = {json.dumps(v)}" for k, v in config.items() if not isinstance(v, dict)]
    for name, table in config.items():
        if isinstance(table, dict):
            lines += [f"[{name}]", *(f"{k} = {json.dumps(v)}" for k, v in table.items())]
    return "\n".join([*lines, ""])


# --- refusals -------------------------------------------------------------------------------------


def test_a_verifier_that_raises_names_problem_and_answer_and_keeps_the_run(
    base: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(base, tmp_path / "run")
    monkeypatch.setattr(loop_tasks, "FAIL", True)
    raised = r"verify raised ZeroDivisionError: oh \(\S+/loop_tasks\.py, line \d+\)"
    with pytest.raises(Refusal, match=f"{raised}; problem: .*answer: .*kept"):
        infold.Loop(config).run()
    answered = (tmp_path / "run/iterations/000/evaluate.jsonl").read_bytes()
    assert answered.count(b"answers") == 1

    monkeypatch.setattr(loop_tasks, "FAIL", False)
    infold.Loop(config).run()

    assert (tmp_path / "run/iterations/000/evaluate.jsonl").read_bytes().startswith(answered)
    assert outcome(tmp_path / "run") == outcome(whole)


@pytest.mark.parametrize(
    ("verifier", "told"),
    [
        ("leaving", r"verify raised SystemExit: 0 \(\S+/loop_tasks\.py, line \d+\); problem: "),
        ("hanging", r"verify did not end within 0\.2 s \(stop\.verify_seconds\); problem: "),
        ("stubborn", r"verify did not end within 0\.2 s \(stop\.verify_seconds\); problem: "),
        ("wordy", r"verify gave 'wrong', which is neither True nor False; problem: .*answer: "),
        ("not_awaited", r"verify gave <coroutine .*neither True nor False"),
    ],
)
@pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning")
def test_a_verifier_that_does_not_judge_ends_the_loop(verifier: str, told: str) -> None:
    names = {name: f"loop_tasks:{name}" for name in ("problems", "prompt")}
    task = open_task(names | {"verify": f"loop_tasks:{verifier}"})
    before, left = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)[0]

    began = time.monotonic()
    with pytest.raises(Refusal, match=told):
        replace(task, seconds=0.2).verify("a problem", "an answer")

    assert time.monotonic() - began < 5
    assert signal.getsignal(signal.SIGALRM) is before, "an alarm of the caller's stays"
    assert left - 10 < signal.getitimer(signal.ITIMER_REAL)[0] <= left


def test_a_task_that_yields_nothing_ends_with_a_line_and_the_run(
    base: Path, tmp_path: Path
) -> None:
    config = settings(base, tmp_path / "run")
    config["task"] = config["task"] | {"verify": "loop_tasks:never"}

    found = infold.Loop(config).run()

    assert re.match("iteration 1: none of 12 answers to 6 problems was accepted", found["stopped"])
    assert found["iterations"][0]["score"]["right"] == 0
    assert not (tmp_path / "run/iterations/001/adapter").exists()


def test_held_out_problems_are_never_collected(base: Path, tmp_path: Path) -> None:
    config = settings(base, tmp_path / "run")
    config["task"] = config["task"] | {"problems": "loop_tasks:one_problem"}

    with pytest.raises(Refusal, match=r"held out and would be learnt from: .*the same in both"):
        infold.Loop(config).run()
    assert not (tmp_path / "run/iterations/001/collect.jsonl").exists()


def test_nor_are_they_in_another_guise(base: Path, tmp_path: Path) -> None:
    config = settings(base, tmp_path / "run")
    config["task"] = config["task"] | {"problems": "loop_tasks:nearly_the_same"}

    with pytest.raises(Refusal, match="held out and would be learnt from"):
        infold.Loop(config).run()


def test_white_space_and_case_do_not_make_another_problem() -> None:
    check_apart(["one", "two"], ["three"])
    for one, two in (
        ("What is  two?", "what is two? "),
        ("What\u00a0is\u200b two", "What is two?!"),
        ("it\u2019s \u201ctwo\u201d \u2013 or so.", 'It\'s "two" - or so'),
        ("cafe\u0301", "caf\u00e9"),
        ("two?", "two ?"),
        (". . .", ". . ."),
    ):
        with pytest.raises(Refusal, match="held out"):
            check_apart([one], [two])
    for one, two in (
        ("What is 5!", "What is 5"), ("2 + 3", "2 - 3"), ("1.5", "15"), ("x[1:]", "x[1]"),
        ("-3", "3"), ("a != b", "a = b"), ("2\u00b2", "22"), ("...", "?!"),
    ):  # fmt: skip
        check_apart([one], [two])


def test_a_run_belongs_to_its_base_and_configuration(
    base: Path, whole: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(base, other)
    model = LlamaForCausalLM.from_pretrained(other, dtype=torch.bfloat16)
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    model.save_pretrained(other)
    before = outcome(whole)

    with pytest.raises(Refusal, match="is a run from another base"):
        infold.Loop(settings(other, whole)).run()
    changed = settings(base, whole)
    changed["train"] = changed["train"] | {"rank": 4}
    with pytest.raises(Refusal, match=r"another configuration.*\n  train\.rank: \S+ there, 4 now$"):
        infold.Loop(changed).run()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("mine")
    with pytest.raises(Refusal, match=r"is no run, and not empty: thesis\.txt"):
        infold.Loop(settings(base, tmp_path / "mine")).run()
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    with pytest.raises(Refusal, match="no such file or folder"):
        infold.Loop(settings(tmp_path / "nowhere", tmp_path / "new")).run()
    assert not (tmp_path / "new").exists(), "a refused run leaves nothing"
    with pytest.raises(Refusal, match="is no run of infold loop"):
        lineage(tmp_path)
    with pytest.raises(Refusal, match="new: no such folder"):
        lineage(tmp_path / "new")
    with pytest.raises(Refusal, match=r"is a folder; give a configuration, a \.toml file"):
        infold.Loop(whole)
    with pytest.raises(Refusal, match=r"new\.toml: no such file; give a configuration"):
        infold.Loop(tmp_path / "new.toml")

    assert outcome(whole) == before


def test_two_loops_do_not_run_in_one_folder(base: Path, whole: Path) -> None:
    before = outcome(whole)
    with (
        Run(whole).locked(),
        pytest.raises(Refusal, match="another loop is running there right now"),
    ):
        infold.Loop(settings(base, whole, iterations=3)).run()
    assert outcome(whole) == before


def test_a_lock_that_the_system_refuses_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    told = f"{tmp_path}: {os.strerror(errno.ENOLCK)}"
    with pytest.raises(infold.StorageFailure, match=told), Run(tmp_path).locked():
        pass


RECORDS = {
    "loop.json": ({}, {"base": 5}, {"base": {"path": "x", "shards": {"a": 1}}}),
    "held_out.json": ([], {}, ["other"]),
    "stopped.json": ({"stopped": 5},),
    "iterations/000/scores.json": ({"score": {}}, {"score": {"share": "all"}}, {"seconds": "1"}),
    "iterations/000/evaluate.jsonl": (),
    "iterations/001/problems.json": ({}, 5, ["collect 1 0"]),
    "iterations/001/collect.json": ({"rows": "2"}, {"rows": True}, {"memory": 5}),
    "iterations/001/collect.jsonl": (),
    "iterations/001/train.json": ({"seconds": None}, {"adapter": {"adapter_config.json": "0"}}),
    "iterations/001/merge.json": ({"shards": {}}, {"shards": ["x"]}, {"shards": {"x": 5}}),
}
LINES = (
    {"chunk": 7, "answers": [["a"]]},
    {"chunk": -1, "answers": [["a"]]},
    {"chunk": 0, "answers": "a"},
    {"chunk": 0, "answers": [["a", "b"]]},
    {"chunk": 0, "answers": [[5, 5]] * 3},
    {"chunk": 0, "right": [[True, True]] * 3},
    {"chunk": 0},
)


@pytest.mark.parametrize("name", RECORDS)
def test_a_damaged_run_ends_in_words(name: str, base: Path, whole: Path, tmp_path: Path) -> None:
    """Whatever stands in its files: a refusal that names one of them, or the same end."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for later in ("iterations/002", "model"):
        shutil.rmtree(run / later)
    file = run / name
    if name.endswith("jsonl"):
        for done in ("collect.json", "scores.json"):
            file.with_name(done).unlink(missing_ok=True)
        texts = [json.dumps(line) + "\n" for line in LINES]
    else:
        old = json.loads(file.read_text())
        texts = [json.dumps(old | c if isinstance(old, dict) and c else c) for c in RECORDS[name]]
        texts += ["", "[" * 100_000, "\0", "null"]
    for text in texts:
        file.write_text(text)
        for use in (lambda: infold.Loop(settings(base, run, iterations=1)).run(),
                    lambda: lineage(run)):  # fmt: skip
            try:
                use()
            except infold.InfoldError as error:
                assert "run" in str(error) or "iteration 1" in str(error), text
    shutil.rmtree(run)


def test_what_is_wrong_in_a_configuration_is_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "loop.toml"
    path.write_text(
        'base = "b"\niteration = 3\nevaluate = 5\n[task]\nname = "arithmetic"\n'
        "[collect]\nsample = 3\nproblems = 0\n[stop]\npatients = 2\n"
        '[train]\nsteeps = 4\nmethod = "loar"\n'
    )
    with pytest.raises(Refusal) as error:
        read_config(path)
    for line in (
        "iteration does not exist; did you mean iterations?",
        "collect.sample does not exist; did you mean samples?",
        "stop.patients does not exist; did you mean patience?",
        "evaluate must be a table: [evaluate]",
        "run is missing",
        "did you mean steps?",
        "collect.problems 0: must be a whole number",
        "train.method: 'loar' is not",
    ):
        assert line in str(error.value)

    path.write_text(
        'base = "b"\niterations = 0\n[task]\nname = "arithmetics"\n[collect]\n'
        'temperature = -1\nserver = "http://x"\n[train]\nsteeps = 4\nseed = 1\n'
    )
    with pytest.raises(Refusal) as error:
        read_config(path)
    for line in ("run is missing", "iterations 0: must be a whole number, 1 or more",
                 "did you mean arithmetic?", "collect.temperature -1: must be a number above 0",
                 "collect.server needs collect.serve", "did you mean steps?",
                 "train.seed is derived from seed"):  # fmt: skip
        assert line in str(error.value)

    path.write_text(
        'base = "a\\u0000b"\nrun = "~nobody-of-this-name/x"\nseed = -1\n'
        '[task]\nname = "arithmetic"\n'
        "levels = [[1]]\n[collect]\ntop_p = 1.5\ntemperature = inf\nserver = 5\n"
        "serve = 'vllm \"serve'\n[stop]\nminutes = nan\nverify_seconds = 0\n"
    )
    with pytest.raises(Refusal) as error:
        read_config(path)
    for line in ("base 'a\\x00b': must be a path", "run '~nobody-of-this-name/x': ", "seed -1: ",
                 "collect.top_p 1.5: must be a number above 0, 1 at the most",
                 "collect.temperature: must be finite", "collect.server 5: must be an address",
                 "collect.serve 'vllm \"serve': must be a command", "stop.minutes nan: must be",
                 "stop.verify_seconds 0: must be a number above 0"):  # fmt: skip
        assert line in str(error.value)
    with pytest.raises(Refusal, match=r"task\.levels \[\[1\]\]: must be a list"):
        open_task({"name": "arithmetic", "levels": [[1]]})
    whole = {"base": "b", "run": "r", "task": {"name": "arithmetic"}}
    for changed, told in (
        ({"stop": {"verify_seconds": 1e10}}, "above 0, 86,400 at the most"),
        ({"stop": {"verify_seconds": math.inf}}, "above 0, 86,400 at the most"),
        ({"stop": {"minutes": math.inf}}, "must be finite; leave it out for no limit"),
        ({"collect": {"temperature": math.inf}}, "must be finite$"),
        ({"train": {"batch_size": 0}}, "configuration: train.batch_size: 0 must be a whole number"),
        ({"train": {"method": "ia3", "rank": 2}}, "train.rank: is a setting of train.method lora"),
        ({"train": {"lr": "1e-4"}}, "train.lr: '1e-4' must be a number"),
        ({"train": {"warmup": [1]}}, r"train.warmup: \[1\] must be a number"),
        ({"train": {"targets": "q_proj"}}, "train.targets: 'q_proj' must be a list of texts"),
        ({"train": {"tokens": [5]}}, r"train.tokens: \[5\] must be a list of texts"),
        ({"train": {"template": 5}}, "train.template: 5 must be a text"),
        ({"train": {"fields": "a=b"}}, "train.fields: 'a=b' must be a table"),
        ({"train": {"bf16": "yes"}}, "train.bf16: 'yes' must be true or false"),
        ({"train": {"eval_split": []}}, r"train.eval_split: \[\] must be a number or a file"),
        ({"task": {"name": "classify", "data": "~nobody-of-this-name/x"}}, "task.data '~nobody"),
    ):
        with pytest.raises(Refusal, match=told):
            read_config(whole | changed)
    for given in ({"seed": -1}, {"seed": 1 << 40}, {"run": ""}):
        with pytest.raises(Refusal, match=f"{next(iter(given))} .*must be a"):
            infold.Loop(whole, **given)  # type: ignore[arg-type]


def test_functions_that_are_not_there_are_told_together() -> None:
    with pytest.raises(Refusal) as error:
        open_task({"problems": "loop_tasks:problem", "prompt": "nowhere:f", "verify": "verify"})
    assert len(error.value.reasons) == 3


# --- tasks and scores -----------------------------------------------------------------------------


def test_a_task_named_like_a_library_is_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`random` is loaded already; a file of the working directory hides no library from us."""
    for name in ("random", "a_task_of_mine"):
        (tmp_path / f"{name}.py").write_text(
            "def problems(split, count, seed):\n    return [split]\n"
            "def prompt(problem):\n    return problem\n"
            "def verify(problem, answer):\n    return True\n"
        )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    names = ("problems", "prompt", "verify")
    with pytest.raises(Refusal, match=r"random \(.*random\.py\) has no function problems") as told:
        open_task({name: f"random:{name}" for name in names})
    assert len(told.value.reasons) == 3 and str(tmp_path) not in str(told.value)

    task = open_task({name: f"a_task_of_mine:{name}" for name in names})

    assert task.problems("collect", 1, 0) == ["collect"]
    assert sys.path[0] != str(tmp_path) and sys.path[-1] == str(tmp_path)


def test_arithmetic_is_right_and_its_splits_never_meet() -> None:
    found = arithmetic.task({})
    held = found.problems("evaluate", 400, 0)
    asked = [p for seed in range(3) for p in found.problems("collect", 400, seed)]

    assert {p["level"] for p in held} == {1, 2, 3, 4} and len(held) == 400
    computed: tuple[set[str], set[str]] = (set(), set())
    for number, problem in [*((0, p) for p in held), *((1, p) for p in asked)]:
        text = problem["question"]
        if "boxes" in text:
            terms = list(map(int, re.findall(r"\d+", text)))
            total, kind = math.prod(terms), "product"
        else:
            terms = [int(re.search(r"has (\d+)", text)[1])]  # type: ignore[index]
            for verb, term in re.findall(r"(\w+)(?: away)? (\d+)", text.split(" and ", 1)[1]):
                terms += [int(term) * (-1 if verb in ("gives", "away", "loses", "sells") else 1)]
            total, kind = sum(terms), "sum"
        assert total == problem["answer"] >= 0, text
        computed[number].add(f"{kind} {sorted(terms)}")
    assert not computed[0] & computed[1], "the same sum, told of somebody else"
    problem = held[0] | {"answer": 1200}
    assert found.verify(problem, " 3 and 4, so 1,200.") and not found.verify(problem, "1200 or 7")
    with pytest.raises(Refusal, match="levels"):
        arithmetic.task({"levels": [5]})


def test_classify_keeps_a_text_in_one_split(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": f"film {i % 90}", "label": i % 2}) + "\n"
                            for i in range(180)))  # fmt: skip
    found = open_task({"name": "classify", "data": str(data), "labels": ["bad", "good"]})
    held, asked = found.problems("evaluate", 500, 0), found.problems("collect", 500, 0)

    assert not {p["text"] for p in held} & {p["text"] for p in asked}
    assert len(held) + len(asked) == 90 and len(held) > 5
    right = {"bad": "good", "good": "bad"}[held[0]["label"]]
    assert found.verify(held[0], f" {held[0]['label'].title()}.")
    assert not found.verify(held[0], right)


@pytest.mark.parametrize("right", [0, 1, 7, 50, 99, 100])
def test_the_interval_is_where_the_score_is_just_plausible(right: int) -> None:
    """Wilson's limits are the p at which |share - p| is 1.96 standard errors of p."""
    low, high = wilson(right, 100)

    assert 0 <= low <= right / 100 <= high <= 1
    for p in {low, high} - {0.0, 1.0}:
        error = 1.959963984540054 * math.sqrt(p * (1 - p) / 100)
        assert abs(right / 100 - p) == pytest.approx(error, abs=1e-9)
    levels = score([{"level": 1}, {"level": 2}, {"level": 1}], [True, False, False])["levels"]
    assert (levels["1"]["right"], levels["1"]["of"], levels["2"]["right"]) == (1, 2, 0)


# --- a server, the command line -------------------------------------------------------------------


def served(base: Path, run: Path) -> tuple[dict[str, Any], int]:
    """Settings of a run that asks a server of its own, and the server's port."""
    pytest.importorskip("openai")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = settings(base, run, iterations=1)
    config["collect"] |= {
        "server": f"http://127.0.0.1:{port}/v1",
        "serve": f"{sys.executable} {HERE / 'completions_server.py'} {{model}} {port}",
    }
    return config, port


def listens(port: int) -> bool:
    with socket.socket() as asked:
        return asked.connect_ex(("127.0.0.1", port)) == 0


def test_a_server_answers_with_the_weights_of_each_iteration(
    base: Path, whole: Path, tmp_path: Path
) -> None:
    config, port = served(base, tmp_path / "run")

    infold.Loop(config).run()

    asked = json.loads((tmp_path / "run/iterations/000/scores.json").read_text())
    local = json.loads((whole / "iterations/000/scores.json").read_text())
    assert asked["score"] == local["score"]  # greedy answers of the same weights
    assert not listens(port), "the server outlived the loop"


def test_a_server_ends_with_a_loop_that_is_killed(base: Path, tmp_path: Path) -> None:
    """Else the next run would find it on its port, and refuse to ask it."""
    config, port = served(base, tmp_path / "run")
    (tmp_path / "config.json").write_text(json.dumps(config))

    killed = trained(HERE / "loop_child.py", tmp_path / "config.json", "journal:1",
                     tmp_path / "log", cwd=HERE)  # fmt: skip

    assert killed.returncode == -signal.SIGKILL, killed.stderr
    deadline = time.monotonic() + 30
    while listens(port) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not listens(port), "the server outlived the loop"


def test_what_a_server_started_ends_with_it(tmp_path: Path) -> None:
    """Also where the server itself ends at once, as a shell does, and what it started does not."""
    pid = tmp_path / "pid"
    script = f"sleep 600 & echo $! > {pid}.new; mv {pid}.new {pid}; wait"
    leash = subprocess.Popen(
        [sys.executable, "-m", "infold.leash", "30", "sh", "-c", script],
        stdin=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    assert leash.stdin is not None
    deadline = time.monotonic() + 60
    while not pid.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    started = psutil.Process(int(pid.read_text()))

    leash.stdin.close()
    leash.wait(20)

    try:
        started.wait(5)
    except psutil.TimeoutExpired:
        running = started.status() != psutil.STATUS_ZOMBIE  # which nobody takes away here
        started.kill()
        assert not running, "what the server started outlived it"


def test_a_command_that_is_not_there_starts_no_server(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("openai")
    config = settings(base, tmp_path / "run", iterations=1)
    config["collect"] |= {"server": "http://127.0.0.1:9/v1", "serve": "no-such-server {model}"}
    with pytest.raises(Refusal, match=r"collect\.serve: no-such-server: there is no such command"):
        infold.Loop(config).run()


def test_a_prompt_that_the_base_cannot_hold_is_refused(base: Path, tmp_path: Path) -> None:
    config = settings(base, tmp_path / "run", iterations=1)
    config["collect"] |= {"max_tokens": 1 << 20}
    with pytest.raises(Refusal, match=r"a prompt has [\d,]+ tokens, with collect.max_tokens"):
        infold.Loop(config).run()


def test_a_length_that_a_config_does_not_tell_for_certain_refuses_nothing() -> None:
    def most(**told: Any) -> int | None:
        return most_tokens(LlamaConfig(**told))

    assert most(max_position_embeddings=64) == 64
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    assert most(max_position_embeddings=64, rope_scaling=yarn) is None
    usual = {"rope_type": "default", "rope_theta": 1e4}
    for kind, found in ((usual, 64), (usual | {"rope_type": "linear", "factor": 2.0}, None)):
        config = LlamaConfig(max_position_embeddings=64)
        config.rope_parameters = {"full_attention": kind, "sliding_attention": usual}
        assert most_tokens(config) == found, "one for each kind of layers"
    for odd in (-1, 0, "64", None):  # of code of the model's own
        text = SimpleNamespace(max_position_embeddings=odd)
        assert most_tokens(SimpleNamespace(get_text_config=lambda text=text: text)) is None


def test_an_interrupted_look_at_a_run_continues_nothing(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("infold.loop.run.lineage", interrupted)
    ran = CliRunner().invoke(app, ["loop", "show", str(whole)])

    assert ran.exit_code == 130 and "interrupted" in ran.output
    assert "continues" not in ran.output


def test_what_a_task_prints_is_not_among_the_json(base: Path, tmp_path: Path) -> None:
    config = tmp_path / "loop.toml"
    few = {"iterations": 1, "collect": {"problems": 1, "samples": 1, "max_tokens": 2}}
    told = settings(base, tmp_path / "run", **few, evaluate={"problems": 1})
    config.write_text(as_toml(told, "printing"))

    # streams of its own, which a fork has from its parent: and none that write at once
    buffered = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    command = [INFOLD, "loop", config, "--json"]
    ran = subprocess.run(command, cwd=HERE, env=buffered, capture_output=True, text=True)

    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["run"] == str(tmp_path / "run"), "one document, and no more"
    ways = ("printed", "started", "written", "kept by Python", "kept by C")
    assert [way for way in ways if way not in ran.stderr] == []


def test_what_a_task_has_in_buffers_of_its_own_is_written_at_the_end(
    base: Path, tmp_path: Path
) -> None:
    (tmp_path / "keeping.py").write_text(
        "log = open('task.log', 'w')\n"
        "def problems(split, count, seed):\n"
        "    log.write('was asked')\n"
        "    return []\n"
        "prompt = never = problems\n"
    )
    config = tmp_path / "loop.toml"
    told = as_toml(settings(base, tmp_path / "run"), "never")
    config.write_text(told.replace("loop_tasks:", "keeping:"))

    # a process started in earnest: a fork of the tests' ends in a way of its own
    words = [sys.executable, "-m", "infold", "loop", config]
    ran = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)

    assert ran.returncode == 2 and "gave none" in ran.stderr
    assert (tmp_path / "task.log").read_text() == "was asked"


def test_the_command_line_runs_shows_and_checks_out(
    base: Path, whole: Path, tmp_path: Path
) -> None:
    def run(*words: object) -> subprocess.CompletedProcess[str]:
        return infold_command("loop", *words, cwd=HERE, kind="training")

    config = tmp_path / "loop.toml"
    config.write_text(
        f'base = "{base}"\nrun = "{tmp_path / "run"}"\niterations = 1\n'
        '[task]\nproblems = "loop_tasks:problems"\nprompt = "loop_tasks:prompt"\n'
        'verify = "loop_tasks:never"\n'
        "[collect]\nproblems = 4\nsamples = 1\nmax_tokens = 4\n[evaluate]\nproblems = 4\n"
    )
    ran = run(config)
    assert ran.returncode == 0, ran.stderr
    assert "evaluate" in ran.stdout and "nothing to learn; the run is kept" in ran.stdout
    shown = run("show", whole, "--json")
    assert len(json.loads(shown.stdout)["iterations"]) == 3
    out = run("checkout", whole, 1, "--out", tmp_path / "one")
    assert out.returncode == 0 and weights(tmp_path / "one") == weights(whole.with_name("run-1"))
    for words in (("show",), ("show", whole, "--out", "x"), ("checkout", whole, "one", "-o", "x")):
        refused = run(*words)
        assert refused.returncode == 2 and "Traceback" not in refused.stderr
