"""The loop: one rounding, the way back, kills in every phase, honest splits, refusals."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

import infold
import loop_tasks
from forked import infold_command, trained
from handmade import digests
from infold.errors import Refusal
from infold.loop import arithmetic
from infold.loop.config import read_config
from infold.loop.folder import Journal, write_json, write_lines
from infold.loop.run import checkout, lineage
from infold.loop.score import score, wilson
from infold.loop.task import check_apart, open_task
from training import save_base

HERE = Path(__file__).parent
pytestmark = pytest.mark.usefixtures("calm")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In bfloat16, where merging n times is not merging once."""
    folder = save_base(tmp_path_factory.mktemp("loop") / "base")
    LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


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
    with pytest.raises(Refusal, match="has no merged iteration 3; there are 1 to 2"):
        checkout(whole, 3, tmp_path / "3")
    with pytest.raises(Refusal, match="is the base itself"):
        checkout(whole, 0, tmp_path / "0")


def test_a_changed_adapter_does_not_pass_as_the_iteration(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    one, two = (run / "iterations" / n / "adapter" / "adapter_model.safetensors"
                for n in ("001", "002"))  # fmt: skip
    shutil.copyfile(two, one)

    with pytest.raises(infold.ProofFailed, match="not the bytes of iteration 1"):
        checkout(run, 1, tmp_path / "out")
    assert not (tmp_path / "out").exists(), "the wrong bytes have no name"
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


def test_more_iterations_continue_a_run(base: Path, whole: Path, tmp_path: Path) -> None:
    config = settings(base, tmp_path / "run", iterations=1)
    infold.Loop(config).run()
    infold.Loop(config | {"iterations": 2}).run()

    assert outcome(tmp_path / "run") == outcome(whole)


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
        "journal:1",  # the base's first held-out answers are there, and not judged
        "journal:5",  # in the collection
        "before:collect.json:1",
        "step:2",
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


# --- refusals -------------------------------------------------------------------------------------


def test_a_verifier_that_raises_names_problem_and_answer_and_keeps_the_run(
    base: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(base, tmp_path / "run")
    monkeypatch.setattr(loop_tasks, "FAIL", True)
    with pytest.raises(
        Refusal, match=r"verify raised ZeroDivisionError.*problem: .*answer: .*kept"
    ):
        infold.Loop(config).run()
    answered = (tmp_path / "run/iterations/000/evaluate.jsonl").read_bytes()
    assert answered.count(b"answers") == 1

    monkeypatch.setattr(loop_tasks, "FAIL", False)
    infold.Loop(config).run()

    assert (tmp_path / "run/iterations/000/evaluate.jsonl").read_bytes().startswith(answered)
    assert outcome(tmp_path / "run") == outcome(whole)


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


def test_white_space_and_case_do_not_make_another_problem() -> None:
    check_apart(["one", "two"], ["three"])
    with pytest.raises(Refusal, match="held out"):
        check_apart(["What is  two?"], ["what is two? "])


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
    with pytest.raises(Refusal, match=r"begun with another configuration(.|\n)*'rank': 4"):
        infold.Loop(changed).run()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("mine")
    with pytest.raises(Refusal, match=r"is no run, and not empty: thesis\.txt"):
        infold.Loop(settings(base, tmp_path / "mine")).run()
    with pytest.raises(Refusal, match="is no run of infold loop"):
        lineage(tmp_path)

    assert outcome(whole) == before


def test_what_is_wrong_in_a_configuration_is_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "loop.toml"
    path.write_text(
        'base = "b"\nrun = "r"\niteration = 3\n[task]\nname = "arithmetic"\n'
        "[collect]\nsample = 3\n[stop]\npatients = 2\n[train]\nsteeps = 4\n"
    )
    with pytest.raises(Refusal) as error:
        read_config(path)
    for line in ("iteration does not exist; did you mean iterations?",
                 "collect.sample does not exist; did you mean samples?",
                 "stop.patients does not exist; did you mean patience?"):  # fmt: skip
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


def test_a_server_answers_with_the_weights_of_each_iteration(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("openai")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = settings(base, tmp_path / "run", iterations=1)
    config["collect"] |= {
        "server": f"http://127.0.0.1:{port}/v1",
        "serve": f"{sys.executable} {HERE / 'completions_server.py'} {{model}} {port}",
    }

    infold.Loop(config).run()
    infold.Loop(settings(base, tmp_path / "local", iterations=1)).run()

    asked = json.loads((tmp_path / "run/iterations/000/scores.json").read_text())
    local = json.loads((tmp_path / "local/iterations/000/scores.json").read_text())
    assert asked["score"] == local["score"]  # greedy answers of the same weights
    with socket.socket() as gone:
        assert gone.connect_ex(("127.0.0.1", port)) != 0, "the server outlived the loop"


def test_the_command_line_runs_shows_and_checks_out(
    base: Path, whole: Path, tmp_path: Path
) -> None:
    def run(*words: object) -> subprocess.CompletedProcess[str]:
        return infold_command("loop", *words, cwd=HERE, kind="training")

    config = tmp_path / "loop.toml"
    config.write_text(
        f'base = "{base}"\nrun = "{tmp_path / "run"}"\niterations = 1\n'
        '[task]\nname = "arithmetic"\nlevels = [1]\n'
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
