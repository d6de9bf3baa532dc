"""What a user reads: notes, messages, folded listings, errors as JSON, and every exit code."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import handmade
import infold
from forked import INFOLD, infold_command
from handmade import RECEIPT
from infold.cli.edits import edits_text
from infold.cli.main import app
from infold.cli.place import PATHS, with_home

LAYERS = 12
LINEARS = {f"model.layers.{n}.{m}": (8, 8) for n in range(LAYERS) for m in ("q_proj", "k_proj")}


def run(
    *words: str | Path, columns: int | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "COLUMNS"}
    if columns:
        environment["COLUMNS"] = str(columns)
    return infold_command(*words, cwd=cwd, env=environment)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of 12 layers, a LoRA adapter for it, and what both make."""
    root = tmp_path_factory.mktemp("words")
    numbers = torch.Generator().manual_seed(0)
    tensors = {f"{m}.weight": torch.randn(*s, generator=numbers) for m, s in LINEARS.items()}
    config = {"tie_word_embeddings": False, "hidden_size": 8}
    handmade.base_folder(root / "Tiny-1B", tensors, config)
    handmade.lora(root / "adapter", LINEARS, target_modules=["q_proj", "k_proj"])
    infold.merge(root / "Tiny-1B", root / "adapter", root / "merged")
    return root


@pytest.fixture
def inputs(folder: Path) -> tuple[Path, Path]:
    return folder / "Tiny-1B", folder / "adapter"


# --- before anything is printed ----------------------------------------------------------------


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--out", "{folder}/merged"], "exists already"),
        (["--out", "{folder}/adapter/x"], "lies in or around the input"),
        (["--out", "{folder}/adapter/adapter_config.json"], "lies in or around the input"),
        (["--out", ""], "--out is empty"),
        (["--out", "x", "--device", "cuda:abc"], "cuda:abc"),
        (["--out", "x", "--device", "cuda:99"], "cuda:99"),
        (["--out", "x", "--max-memory", "0"], "0 bytes is too little: this merge needs"),
        (["--out", "x", "--max-memory", "100kB"], "100,000 bytes is too little"),
    ],
)
def test_all_is_checked_before_anything_is_printed(
    folder: Path, inputs: tuple[Path, Path], tmp_path: Path, words: list[str], told: str,
    dry: list[str],
) -> None:  # fmt: skip
    filled = [word.format(folder=folder) for word in words]
    ran = run("merge", *inputs, *filled, *dry, cwd=tmp_path)

    assert (ran.returncode, ran.stdout) == (2, "")
    assert told in ran.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_refuses_a_broken_adapter_too(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    broken = handmade.lora(tmp_path / "broken", LINEARS)
    file = broken / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"\xff\xff\xff\xff")  # NaN
    ran = run("merge", inputs[0], broken, "--out", tmp_path / "out", "--dry-run")

    assert (ran.returncode, ran.stdout) == (2, "") and "NaN" in ran.stderr
    without = run("merge", inputs[0], broken, "--dry-run")
    assert (without.returncode, without.stdout, without.stderr) == (2, "", ran.stderr)


def test_a_dry_run_needs_no_place(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    with_place = run("merge", *inputs, "--out", tmp_path / "out", "--dry-run", "--json")
    without = run("merge", *inputs, "--dry-run", "--json")

    assert without.returncode == 0 and without.stdout == with_place.stdout
    assert "the output would take" in run("merge", *inputs, "--dry-run").stdout
    assert infold.merge(*inputs, dry_run=True) == json.loads(without.stdout)
    assert list(tmp_path.iterdir()) == []
    assert run("merge", *inputs).returncode == 2
    with pytest.raises(TypeError, match="either out or in_place"):
        infold.merge(*inputs)


def test_a_quiet_dry_run_prints_nothing(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    ran = run("merge", *inputs, "--out", tmp_path / "out", "--dry-run", "--quiet")

    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


# --- errors ------------------------------------------------------------------------------------


def test_a_wrong_base_is_summed_up_and_json_lists_all(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    other = handmade.base_folder(tmp_path / "other", {"h.0.attn.weight": torch.zeros(4, 4)})
    ran = run("merge", other, inputs[1], "--out", tmp_path / "out")
    as_json = run("merge", other, inputs[1], "--out", tmp_path / "out", "--json")
    lines, told = ran.stderr.splitlines(), json.loads(as_json.stdout)

    assert ran.returncode == as_json.returncode == 2 and ran.stdout == ""
    assert lines[0] == (
        f"infold: {inputs[1]}: does not fit {other}: none of its {2 * LAYERS} modules is in "
        f"{other}; it has {LAYERS} layers, the base 1"
    )
    alike = [line for line in lines if line.endswith(f"(and {LAYERS - 1} more like this)")]
    assert len(alike) == 2 and all("model.layers.0." in line for line in alike)
    assert lines[-1] == "infold: nothing was written"
    assert told["error"] == "Refusal"
    for module in LINEARS:
        for part in ("lora_A", "lora_B"):
            assert any(f"{module}.{part}" in reason for reason in told["reasons"])


def test_refusals_of_verify_and_inspect_speak_of_no_writing(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    other = handmade.base_folder(tmp_path / "other", {"h.0.attn.weight": torch.zeros(4, 4)})
    for words in (
        ["verify", other, inputs[1], other],
        ["inspect", inputs[1], "--base", other],
        ["merge", other, inputs[1], "--out", tmp_path / "out", "--dry-run"],
    ):
        ran = run(*words)
        assert ran.returncode == 2 and ran.stderr and "written" not in ran.stderr


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, "no side_files with the digests"),
        ({"side_files": {}}, "lacks infold, base, adapters"),
        (None, "must hold a JSON object"),
        ({"base": {"path": 3}, "side_files": {}}, "lacks infold"),
        ({"+edits": [{"tensor": "x"}]}, "edits[0]"),
        ({"+adapters": []}, "is made from nothing that it names"),
        ({"+tensors": "many"}, "tensors is 'many'"),
    ],
)
def test_a_receipt_that_infold_does_not_write_is_refused(
    folder: Path, tmp_path: Path, change: Any, told: str
) -> None:
    receipt = json.loads((folder / "merged" / "infold-receipt.json").read_text())
    if change is None:
        receipt = []
    elif any(name.startswith("+") for name in change):
        receipt |= {name.removeprefix("+"): value for name, value in change.items()}
    else:
        receipt = change
    (tmp_path / "infold-receipt.json").write_text(json.dumps(receipt))
    for words in ([], ["--json"]):
        ran = run("inspect", tmp_path, *words)
        assert ran.returncode == 2 and told in ran.stderr and "Traceback" not in ran.stderr
        assert "infold-receipt.json" in ran.stderr


def child(code: str, *words: str | Path, **more: Any) -> subprocess.CompletedProcess[str]:
    """infold with `code` run before it."""
    whole = f"import sys\n{code}\nsys.argv = {['infold', *map(str, words)]!r}\n"
    whole += "from infold.cli.main import run\nrun()\n"
    return subprocess.run([sys.executable, "-c", whole], capture_output=True, text=True, **more)


@pytest.mark.parametrize("verb", ["merge", "inspect", "verify"])
def test_a_bug_ends_with_70_and_asks_to_be_reported(
    inputs: tuple[Path, Path], folder: Path, tmp_path: Path, verb: str
) -> None:
    words = {
        "merge": ["merge", *inputs, "--out", tmp_path / "out"],
        "inspect": ["inspect", inputs[1]],
        "verify": ["verify", folder / "merged"],
    }[verb]
    code = (
        "import infold.checkpoint.adapter as a, infold.checkpoint.shards as s\n"
        "def bug(*_): raise KeyError('surprise')\n"
        "a.read_header = s.read_header = bug"
    )
    ran = child(code, *words)

    assert ran.returncode == 70, ran.stderr
    assert "KeyError: 'surprise'" in ran.stderr and "report" in ran.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("closed", ["1", "2", "1 and 2"])
def test_a_reader_that_leaves_changes_nothing(
    inputs: tuple[Path, Path], folder: Path, tmp_path: Path, closed: str
) -> None:
    """The verbs do their work, and their exit code tells how it went."""
    reader, pipe = os.pipe()
    os.close(reader)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    streams |= {"stdout": pipe} if "1" in closed else {}
    streams |= {"stderr": pipe} if "2" in closed else {}

    def code(*words: str | Path) -> int:
        return subprocess.run([INFOLD, *map(str, words)], **streams).returncode

    try:
        if "1" in closed:  # what they print
            assert code("inspect", folder / "merged") == 0
            assert code("--help") == 0
            assert code("verify", folder / "merged") == 0
        assert code("merge", *inputs, "--out", tmp_path / "out") == 0
        if "2" in closed:  # what they complain of
            assert code("merge", *inputs, "--out", tmp_path / "out") == 2
    finally:
        os.close(pipe)
    assert infold.verify(tmp_path / "out").ok


def test_complaints_stand_behind_what_was_printed_before(folder: Path, tmp_path: Path) -> None:
    """Where both streams go to one file, as into a log."""
    wrong = shutil.copytree(folder / "merged", tmp_path / "wrong")
    weights = wrong / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 0x40
    weights.write_bytes(data)
    ran = subprocess.run(
        [INFOLD, "verify", wrong], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )

    lines = [line.split()[0] for line in ran.stdout.splitlines()]
    assert ran.returncode == 1
    assert lines.index("tensors") < lines.index("infold:"), ran.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("words", [["inspect"], ["inspect", "--json"], ["verify"]])
def test_an_output_that_cannot_be_printed_is_told(words: list[str], folder: Path) -> None:
    with open("/dev/full", "w") as full:
        ran = subprocess.run(
            [INFOLD, *words, folder / "merged"], stdout=full, stderr=subprocess.PIPE, text=True
        )

    assert ran.returncode == 3
    assert ran.stderr == "infold: standard output: No space left on device\n"


@pytest.mark.parametrize(("verb", "threads"), [("merge", 1), ("merge", 2), ("verify", 0)])
def test_an_interrupt_in_a_worker_ends_with_130(
    inputs: tuple[Path, Path], folder: Path, tmp_path: Path, verb: str, threads: int
) -> None:
    """The workers are inside PyTorch when the signal comes, and stay there for a while: a process
    that did not wait for them would abort."""
    code = (
        "import time, torch\n"
        "from infold.merge import stream as m\n"
        "from infold.verify import reread as v\n"
        "big = torch.randn(1000, 1000)\n"
        "def slow(whole):\n"
        "    def call(*a):\n"
        "        print('working', flush=True)\n"
        "        for _ in range(12): torch.mm(big, big)\n"
        "        return whole(*a)\n"
        "    return call\n"
        "m._Pool._compute = slow(m._Pool._compute)\n"
        "v._Reread._take = slow(v._Reread._take)\n"
    )
    words: list[str | Path] = ["verify", *inputs, folder / "merged"]
    if verb == "merge":
        words = ["merge", *inputs, "--out", tmp_path / "out", "--threads", str(threads)]
    whole = f"import sys\n{code}\nsys.argv = {['infold', *map(str, words), '--quiet']!r}\n"
    whole += "from infold.cli.main import run\nrun()\n"
    started = subprocess.Popen(
        [sys.executable, "-c", whole],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # a test run in the background has SIGINT ignored, and its children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert started.stdout is not None
    started.stdout.readline()
    time.sleep(0.05)
    os.kill(started.pid, signal.SIGINT)
    _, message = started.communicate(timeout=60)

    more = "; the same command continues" if verb == "merge" else ""
    assert (started.returncode, message) == (130, f"infold: interrupted{more}\n")


def test_an_interrupt_while_a_thread_starts_comes_when_it_has_started() -> None:
    code = (
        "import os, signal, threading, time\n"
        "from infold.workers import Worker, run_all\n"
        "begun = threading.Thread.start\n"
        "def start(self):\n"
        "    os.kill(os.getpid(), signal.SIGINT); begun(self)\n"
        "threading.Thread.start = start\n"
        "told, stop = [], threading.Event()\n"
        "def work(): stop.wait(); time.sleep(0.2); told.append('over')\n"
        "try: run_all([Worker(work, 'w')], stop.set)\n"
        "except KeyboardInterrupt: told.append('interrupted')\n"
        "print(told)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip

    assert ran.stdout == "['over', 'interrupted']\n", ran.stderr


# --- verify ------------------------------------------------------------------------------------


def test_an_offender_has_one_line_with_its_whole_name(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    infold.merge(*inputs, tmp_path / "merged")
    file, receipt = tmp_path / "merged" / "model.safetensors", tmp_path / "merged" / RECEIPT
    right = file.read_bytes()
    file.write_bytes(right[:-1] + bytes([right[-1] ^ 1]))
    changed = run("verify", *inputs, tmp_path / "merged", columns=80).stderr.splitlines()
    file.write_bytes(right)
    told = json.loads(receipt.read_text())
    told["shards"][file.name] = "0" * 64
    receipt.write_text(json.dumps(told))
    ran = run("verify", *inputs, tmp_path / "merged", columns=80)
    forged = ran.stderr.splitlines()

    assert ran.returncode == 1
    # the digest of a shard is told where nothing else tells what is wrong with it
    assert changed[0].startswith("infold: model.layers.9.q_proj.weight: edited tensor: 1 of")
    assert forged[0].startswith("infold: model.safetensors: digest:")
    assert len(forged[0].split("BLAKE3 in")[1]) > 128
    for lines in (changed, forged):
        assert len(lines) == 2 and lines[1].endswith("proof failed, 1 offender")


def test_offenders_of_many_layers_are_one_line(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    """As a merge tells what it edits. Layers that differ otherwise have lines of their own."""
    infold.merge(*inputs, tmp_path / "merged")
    for shard in inputs[0].glob("*.safetensors"):
        shutil.copy(shard, tmp_path / "merged")
    file = tmp_path / "merged" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.3.q_proj.weight"][0, 0] += 1
    save_file(tensors, file, {"format": "pt"})
    ran = run("verify", *inputs, tmp_path / "merged", columns=80)
    offenders = json.loads(run("verify", *inputs, tmp_path / "merged", "--json").stdout)[
        "offenders"
    ]

    lines = ran.stderr.splitlines()
    others = f"model.layers.0-2,4-{LAYERS - 1}.q_proj.weight"
    assert len(offenders) == 2 * LAYERS and len(lines) == 4
    assert lines[-1].endswith(f"proof failed, {2 * LAYERS} offenders")
    told = {line.split(": ")[1]: line for line in lines[:-1]}
    assert told.keys() == {
        others, "model.layers.3.q_proj.weight", f"model.layers.0-{LAYERS - 1}.k_proj.weight"
    }  # fmt: skip
    assert f": edited tensor: {LAYERS - 1} alike, the first: " in told[others]
    assert told[others].endswith("these are as in the base: the edit is missing")
    assert "alike" not in told["model.layers.3.q_proj.weight"]


@pytest.mark.parametrize("how", ["cut", "gone"])
def test_a_shard_that_cannot_be_read_is_one_offender(
    inputs: tuple[Path, Path], tmp_path: Path, how: str
) -> None:
    infold.merge(*inputs, tmp_path / "merged")
    file = tmp_path / "merged" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    if how == "gone":
        file.unlink()
    verdict = infold.verify(*inputs, tmp_path / "merged")

    kind = {"cut": "unreadable file", "gone": "missing file"}[how]
    assert [o.what for o in verdict.offenders] == [kind]


def test_wrong_orders_and_missing_paths_are_named(inputs: tuple[Path, Path], folder: Path) -> None:
    base, adapter = inputs
    merged = folder / "merged"
    swapped = run("verify", merged, adapter, base)
    no_adapter = run("verify", base, merged)
    no_merged = run("verify", base, adapter)

    assert swapped.returncode == no_adapter.returncode == no_merged.returncode == 2
    assert "base and merged are swapped" in swapped.stderr
    assert "the adapters are missing" in no_adapter.stderr
    assert "the merged folder is missing" in no_merged.stderr


# --- listings ----------------------------------------------------------------------------------


def test_layers_are_folded_and_nothing_is_wider_than_the_terminal(
    inputs: tuple[Path, Path], folder: Path, tmp_path: Path
) -> None:
    adapter = run("inspect", inputs[1], "--base", inputs[0], columns=80)
    merged = run("inspect", folder / "merged", columns=80)
    plan = run("merge", *inputs, "--out", tmp_path / "out", "--dry-run", columns=80)

    for shown in (adapter, merged, plan):
        assert shown.returncode == 0 and "model.layers.0-11.q_proj" in shown.stdout
        assert "layers.7" not in shown.stdout
        for line in shown.stdout.splitlines():
            whole = str(tmp_path.parent) in line or line.endswith("  model.safetensors")
            assert len(line) <= 80 or whole, line
    assert "lora (scaling 2)" in merged.stdout and "lora (scaling 2)" in plan.stdout
    assert "(12 x)" in adapter.stdout and "target_modules = q_proj, k_proj" in adapter.stdout
    assert len(json.loads(run("inspect", inputs[1], "--json").stdout)["modules"]) == 2 * LAYERS


def test_folding_is_by_numbers_of_whole_components_and_by_likeness() -> None:
    from infold.cli.output import fold

    names = [f"l.{n}.e.{m}.w" for n in range(3) for m in range(2)]
    assert [p for p, _ in fold(names, str, lambda _: 0)] == ["l.0-2.e.0-1.w"]
    assert [p for p, _ in fold(names[1:], str, lambda _: 0)] == names[1:]
    assert [p for p, _ in fold(["a.1", "a.2", "a.4", "b2", "b3"], str, lambda _: 0)] == [
        "a.1-2,4", "b2", "b3",
    ]  # fmt: skip
    assert [p for p, _ in fold(names, str, lambda n: n[2] == "1")] == [
        "l.0,2.e.0-1.w", "l.1.e.0-1.w",
    ]  # fmt: skip


def test_a_replaced_tensor_says_by_what(tmp_path: Path) -> None:
    weight = {"a.weight": torch.zeros(4, 4), "b.weight": torch.zeros(4, 4)}
    base = handmade.base_folder(tmp_path / "base", weight)
    one = handmade.adapter_folder(
        tmp_path / "one", {"a.weight": torch.ones(4, 4)},
        {"peft_type": "IA3", "modules_to_save": ["a"]},
    )  # fmt: skip
    two = handmade.ia3(tmp_path / "two", {"b": torch.ones(4, 1)})
    ran = run("merge", base, one, two, "--out", tmp_path / "out", "--dry-run")

    assert "replaced by one" in ran.stdout and "ia3 (out) of two" in ran.stdout, ran.stdout


# --- notes on the origin -----------------------------------------------------------------------

SMOL = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.parametrize(
    ("trained_on", "folder_name", "own_name", "noted"),
    [
        (SMOL, "SmolLM2-135M-Instruct", None, False),
        (SMOL, "smollm2-135m-instruct-bf16", None, False),
        (SMOL, "HuggingFaceTB_SmolLM2-135M-Instruct", None, False),
        (SMOL, "models--HuggingFaceTB--SmolLM2-135M-Instruct/snapshots/0a1b2c", None, False),
        (SMOL, "base", None, False),
        (SMOL, "checkpoint-500", None, False),
        (SMOL, "base", SMOL, False),
        (SMOL, "SmolLM2-135M", SMOL, False),
        (SMOL, "SmolLM2-135M", None, True),
        (SMOL, "base", "HuggingFaceTB/SmolLM2-135M", True),
        (SMOL, "models--HuggingFaceTB--SmolLM2-135M/snapshots/0a1b2c", None, True),
        (SMOL, "Llama-7B", None, True),
        ("gpt2", "gpt2-medium", None, True),
        ("bert-base-uncased", "bert-base-cased", None, True),
        ("/somewhere/else/base", "model", None, False),
        (None, "SmolLM2-135M", None, False),
        (7, "SmolLM2-135M", None, False),
    ],
)
def test_an_adapter_of_another_base_is_noted_and_a_local_copy_is_not(
    tmp_path: Path, trained_on: Any, folder_name: str, own_name: str | None, noted: bool
) -> None:
    config = {"tie_word_embeddings": False} | ({"_name_or_path": own_name} if own_name else {})
    base = tmp_path / folder_name
    handmade.base_folder(base, {"a.weight": torch.zeros(4, 4)}, config)
    adapter = handmade.lora(tmp_path / "adapter", {"a": (4, 4)}, base_model_name_or_path=trained_on)
    plan = infold.merge(base, adapter, tmp_path / "out", dry_run=True)

    assert [note for note in plan["notes"] if "is it the same model?" in note] == (
        plan["notes"] if noted else []
    )
    assert len(plan["notes"]) == noted


def test_a_shard_that_is_given_for_the_base_is_told_from_a_wrong_one(tmp_path: Path) -> None:
    tensors = {f"{name}.weight": torch.ones(8, 8) for name in LINEARS}
    base = handmade.base_folder(tmp_path / "base", tensors, shards=3)
    shard = base / "model-00001-of-00003.safetensors"
    adapter = handmade.lora(tmp_path / "adapter", LINEARS)
    told = f"{shard}: is one shard of 3, and the base is all of them: give their folder, {base}"

    with pytest.raises(infold.Refusal) as refused:
        infold.merge(shard, adapter, tmp_path / "out")
    assert refused.value.reasons[0] == told
    ran = run("merge", shard, adapter, "--out", tmp_path / "out")
    assert ran.returncode == 2 and ran.stderr.startswith(f"infold: {told}\n")
    with pytest.raises(infold.Refusal) as refused:
        infold.merge(base, handmade.lora(tmp_path / "wrong", {"no": (8, 8)}), tmp_path / "out")
    assert "one shard" not in str(refused.value)

    inside = handmade.lora(tmp_path / "inside", {next(iter(LINEARS)): (8, 8)})
    notes = infold.merge(shard, inside, tmp_path / "out", dry_run=True)["notes"]
    assert notes[0] == f"{told}; the output is the base's one file, and no whole model"


def test_what_is_not_known_without_a_config_is_one_note(tmp_path: Path) -> None:
    base = handmade.base_folder(tmp_path / "base", {"a.weight": torch.zeros(4, 4)})
    adapter = handmade.lora(tmp_path / "adapter", {"a": (4, 4)})
    file, told = base / "model.safetensors", "there is no config.json, so names and shapes alone"

    assert infold.merge(base, adapter, tmp_path / "out", dry_run=True)["notes"] == []
    (note,) = infold.merge(file, adapter, tmp_path / "out", dry_run=True)["notes"]
    assert told in note and note.endswith(f"; give {base}, which has one")
    (base / "config.json").unlink()
    for given in (base, file):
        (note,) = infold.merge(given, adapter, tmp_path / "out", dry_run=True)["notes"]
        assert note.startswith(f"{given}: {told}") and note.endswith("changes both")


def test_the_folder_that_an_adapter_was_trained_on_is_never_doubted(tmp_path: Path) -> None:
    base = handmade.base_folder(tmp_path / "Llama-7B", {"a.weight": torch.zeros(4, 4)})
    (tmp_path / "Other-3B").symlink_to(base)
    adapter = handmade.lora(
        tmp_path / "adapter", {"a": (4, 4)}, base_model_name_or_path=str(tmp_path / "Other-3B")
    )

    assert infold.merge(base, adapter, tmp_path / "out", dry_run=True)["notes"] == []


def test_an_adapter_that_is_given_twice_is_noted(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(inputs[1])
    plan = infold.merge(inputs[0], [inputs[1], tmp_path / "link"], tmp_path / "out", dry_run=True)

    assert len(plan["notes"]) == 1 and "is given 2 times" in plan["notes"][0]


def test_an_adapter_that_the_base_has_already_is_noted(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = inputs
    first = infold.merge(base, adapter, tmp_path / "once", undo=True)
    shutil.copytree(adapter, tmp_path / "copy")
    again = infold.merge(tmp_path / "once", tmp_path / "copy", tmp_path / "again")
    swapped = infold.swap(tmp_path / "once", adapter, tmp_path / "swapped")

    assert any("is in the base already" in note for note in again.notes)
    assert not any("already" in note for note in [*first.notes, *swapped.notes])


def test_long_notes_are_wrapped_on_a_terminal_and_whole_in_a_pipe(tmp_path: Path) -> None:
    base = handmade.base_folder(tmp_path / "Llama-7B", {"a.weight": torch.zeros(4, 4)})
    adapter = handmade.lora(tmp_path / "adapter", {"a": (4, 4)}, base_model_name_or_path=SMOL)
    words = ["merge", base, adapter, "--out", tmp_path / "out", "--dry-run"]
    narrow = run(*words, columns=80).stdout.splitlines()
    whole = run(*words).stdout.splitlines()

    begin = next(n for n, line in enumerate(narrow) if line.startswith("note"))
    assert narrow[begin + 1].startswith(" " * 9)
    assert all(len(line) <= 80 for line in narrow if str(tmp_path) not in line)
    assert any(line.startswith("note") and line.endswith("same model?") for line in whole)


# --- the library -------------------------------------------------------------------------------


def test_verify_takes_a_merged_folder_alone(inputs: tuple[Path, Path], folder: Path) -> None:
    merged = folder / "merged"

    assert infold.verify(merged).ok
    assert infold.verify(merged=merged).ok
    assert infold.verify(base=inputs[0], adapters=[inputs[1]], merged=str(merged)).ok
    with pytest.raises(TypeError, match="base, adapters, merged"):
        infold.verify(*inputs)  # type: ignore[call-overload]


def test_memory_is_a_number_or_a_text(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    receipt = infold.merge(*inputs, tmp_path / "out", max_memory="64MiB")

    assert isinstance(receipt, infold.Receipt) and list(receipt.side_files) == ["config.json"]
    for memory in (100, "100B", "0.1kB"):
        with pytest.raises(infold.Refusal, match="100 bytes is too little"):
            infold.merge(*inputs, tmp_path / "other", max_memory=memory)
    with pytest.raises(infold.Refusal, match="not a size"):
        infold.merge(*inputs, tmp_path / "other", max_memory="much")


def test_a_dry_run_returns_what_the_command_prints_as_json(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    plan = infold.merge(*inputs, tmp_path / "out", dry_run=True)
    printed = run("merge", *inputs, "--out", tmp_path / "out", "--dry-run", "--json")

    assert json.loads(printed.stdout) == plan and plan["edited_tensors"] == 2 * LAYERS
    assert list(tmp_path.iterdir()) == []


def test_the_fields_of_receipt_and_verdict_are_documented() -> None:
    for kind in (infold.Receipt, infold.Verdict, infold.Offender):
        missing = [f for f in kind.__dataclass_fields__ if f not in (kind.__doc__ or "")]
        assert missing == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["merge", "a"], "Missing argument 'ADAPTER...'"),
        (["merge", "a", "b", "--frce"], "No such option: --frce"),
        (["merge", "a", "b", "--threads", "x"], "Invalid value for '--threads'"),
        (["frob"], "No such command 'frob'"),
    ],
)
def test_a_command_that_cannot_be_read_is_json_too(words: list[str], told: str) -> None:
    plain, as_json = run(*words), run(*words, "--json")

    assert plain.returncode == as_json.returncode == 2 and plain.stdout == ""
    assert told in plain.stderr and told in as_json.stderr
    found = json.loads(as_json.stdout)
    assert found["error"] == "UsageError" and told in found["reasons"][0]


def test_what_the_system_refuses_is_a_storage_failure_by_name(
    inputs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fails(*words: Any, **given: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(import_module("infold.merge.prepare"), "open_plan", fails)
    given = [*map(str, inputs), "--out", str(tmp_path / "out"), "--json"]
    ran = CliRunner().invoke(app, ["merge", *given])

    assert ran.exit_code == 3
    assert json.loads(ran.output.splitlines()[0])["error"] == "StorageFailure"


def test_undo_has_no_force_and_names_none(
    inputs: tuple[Path, Path], folder: Path, tmp_path: Path
) -> None:
    infold.merge(*inputs, tmp_path / "merged", undo=True)

    ran = run("undo", tmp_path / "merged", "--out", folder / "merged")

    assert ran.returncode == 2 and "exists already; choose another name" in ran.stderr
    assert "--force" not in ran.stderr


def test_short_help() -> None:
    assert run("-h").stdout == run("--help").stdout
    assert run("merge", "-h").stdout.startswith("Usage: infold merge")


def test_the_command_alone_is_the_help() -> None:
    ran = run()
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, run("--help").stdout, "")


def test_help_has_words_and_no_types_of_python() -> None:
    for verb in (command.callback.__name__ for command in app.registered_commands):
        told = CliRunner().invoke(app, [verb, "--help"], prog_name="infold").output

        assert told.startswith(f"Usage: infold {verb} [OPTIONS]")
        assert not re.search(r"<(str|int|float|list|path)\b|\{[A-Z]|\b(INTEGER|FLOAT)\b", told), (
            told
        )
    usage = CliRunner().invoke(app, ["bench", "--help"], prog_name="infold").output.splitlines()[0]
    assert usage == "Usage: infold bench [OPTIONS] BASE ADAPTER [MERGED]"


def test_empty_paths_are_told(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    for words in (["merge", "", inputs[1]], ["merge", inputs[0], ""], ["inspect", ""]):
        more = ["--out", "out"] if words[0] == "merge" else []
        ran = run(*words, *more, cwd=tmp_path)
        assert ran.returncode == 2 and "an empty path was given" in ran.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_tilde_that_the_shell_left_alone_is_the_home_folder(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of options and of arguments; what is called so, and is no user's home, stays what it is."""
    (tmp_path / "home").mkdir()
    (tmp_path / "~nobody-of-this-name").symlink_to(inputs[0])
    (tmp_path / "home" / "adapter").symlink_to(inputs[1])
    told = {**os.environ, "HOME": str(tmp_path / "home")}
    ran = infold_command(
        "merge", "~nobody-of-this-name", "~/adapter", "--out=~/new/m", "--json",
        cwd=tmp_path, env=told,
    )  # fmt: skip

    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["out"] == str(tmp_path / "home" / "new" / "m")
    assert infold_command("inspect", "~/new/m", cwd=tmp_path, env=told).returncode == 0
    assert {p.name for p in tmp_path.iterdir()} == {"home", "~nobody-of-this-name"}
    named = with_home({"path": "~root", "out": Path("~"), "prompt": "~/x", "record": ["~", "a/~"]})
    (tmp_path / "~root").mkdir()
    monkeypatch.chdir(tmp_path)
    assert with_home({"path": "~root"}) == {"path": "~root"}
    home = os.path.expanduser("~")
    assert named["path"] == os.path.expanduser("~root") != "~root", "a user's"
    assert (named["out"], named["prompt"]) == (Path(home), "~/x")
    assert named["record"] == [home, "a/~"]


def test_every_argument_that_is_a_text_is_known_as_a_path_or_as_none() -> None:
    """A new option would else forget the `~`."""
    texts = {
        "device", "dtype", "feedforward", "fields", "kind", "labels", "licence", "majority_sign",
        "max_memory", "method", "parameters", "prompt", "schedule", "targets", "task", "template",
        "tokens", "too_long", "weights",
    }  # fmt: skip
    found = {
        name
        for command in app.registered_commands
        for name, kind in get_type_hints(command.callback).items()
        if name != "return" and re.search(r"\b(str|Path)\b", str(kind))
    }

    assert found - texts == PATHS and texts - found == set()


def test_reasons_that_are_not_alike_stay_lines_and_the_rest_is_counted(tmp_path: Path) -> None:
    modules = {f"model.layers.0.part{chr(97 + n)}": (8, 8) for n in range(14)}
    base = handmade.base_folder(tmp_path / "base", {"h.0.attn.weight": torch.zeros(4, 4)})
    handmade.lora(tmp_path / "adapter", modules, target_modules=["parta"])
    ran = run("merge", base, tmp_path / "adapter", "--out", tmp_path / "out")

    assert "more like this" not in ran.stderr and "more; --json lists all of them" in ran.stderr
    assert len(ran.stderr.splitlines()) == 12


def test_a_proof_with_another_adapter_says_so_and_folds_the_list(
    folder: Path, tmp_path: Path
) -> None:
    handmade.lora(tmp_path / "other", LINEARS, target_modules=["q_proj", "k_proj"], seed=9)
    ran = run("verify", folder / "Tiny-1B", tmp_path / "other", folder / "merged")
    right = run("verify", folder / "Tiny-1B", folder / "adapter", folder / "merged")
    told = json.loads(
        run("verify", folder / "Tiny-1B", tmp_path / "other", folder / "merged", "--json").stdout
    )

    assert ran.returncode == 1 and right.returncode == 0
    assert f"it names others than those given: {folder / 'adapter'}" in ran.stderr.splitlines()[0]
    assert len(ran.stderr.splitlines()) == 4, "a line for each module, of all layers"
    assert len(told["offenders"]) == 1 + 2 * LAYERS
    assert told["offenders"][0]["what"] == "other adapters"


def test_a_proof_in_another_order_says_so(folder: Path, tmp_path: Path) -> None:
    vectors = {name: torch.linspace(0.5, 2, 8).view(8, 1) for name in LINEARS}
    handmade.ia3(tmp_path / "other", vectors, target_modules=["q_proj", "k_proj"])
    base, both = folder / "Tiny-1B", (folder / "adapter", tmp_path / "other")
    assert run("merge", base, *both, "--out", tmp_path / "out").returncode == 0

    ran = run("verify", base, *reversed(both), tmp_path / "out")

    told = "it names the same, merged in another order: "
    assert ran.returncode == 1
    assert told + ", ".join(map(str, both)) in ran.stderr.splitlines()[0]


@pytest.mark.parametrize("name", ["Tiny-1B-nf4", "tiny-1b-GPTQ-Int4", "Tiny-1B-bnb-4bit"])
def test_a_quantized_copy_is_not_another_model(name: str, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "Tiny-1B", tmp_path / name)
    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    fields = json.loads(config.read_text())
    config.write_text(json.dumps({**fields, "base_model_name_or_path": "someone/Tiny-1B"}))
    ran = run(
        "merge", tmp_path / name, tmp_path / "adapter", "--out", tmp_path / "out", "--dry-run"
    )

    assert ran.returncode == 0 and "is it the same model" not in ran.stdout


def test_edits_of_a_gguf_file_read_as_words() -> None:
    """The row order of the file is told; the shapes that say how it is made are the receipt's."""
    operation = {"method": "ia3", "adapter": 0, "module": "k", "side": "out"}
    row_map = {"view": [3, 2, 32], "order": [0, 2, 1], "repeat": 18}
    edit = {"tensor": "blk.0.attn_k.weight", "dtype": "Q4_1", "shape": [192, 576]}
    edit |= {"source": {"base": "blk.0.attn_k.weight"}, "operations": [operation | row_map]}

    told = edits_text([edit], ["ia3-reviews"])

    assert "ia3 (out, rows in the file's order)" in told and "repeat" not in told


@pytest.fixture
def without_torch(tmp_path: Path) -> dict[str, str]:
    """The environment of a command that must not import PyTorch."""
    (tmp_path / "traps").mkdir()
    (tmp_path / "traps" / "torch.py").write_text("raise SystemExit('PyTorch was imported')")
    paths = [str(tmp_path / "traps"), str(Path(infold.__file__).parents[1])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("merge {no}/a {no}/b -o x", ["{no}/a: no such file", "{no}/b: no such file"]),
        ("merge {base} {adapter} -o {merged}", ["exists already; choose another name, or replace"]),
        ("merge {base} {adapter} -o {adapter}/x", ["lies in or around the input"]),
        ("merge {base} {adapter} -o x --dtype f15", ["--dtype f15: auto, bf16"]),
        ("merge {base} {adapter} -o x --base-16bit {no}", ["goes with --dequantize"]),
        ("merge {base} {adapter} -o x --device gpu", ["--device gpu: cpu, cuda"]),
        ("merge {base} {adapter} -o x --max-memory lots", ["lots"]),
        ("undo {no} -o x", ["{no}: no such file or folder"]),
        ("undo {merged} -o {base}", ["exists already; choose another name\n"]),
        ("swap {merged} {no}/a {no}/b -o x", ["{no}/a: no such", "{no}/b: no such"]),
        ("swap {merged} {adapter} -o {base}", ["exists already"]),
        ("verify {no}", ["{no}: no such file or folder"]),
        ("verify {base} {no}/a {merged}", ["{no}/a: no such file"]),
    ],
)
def test_what_needs_no_pytorch_is_refused_without_it(
    words: str, told: list[str], folder: Path, tmp_path: Path, without_torch: dict[str, str]
) -> None:
    """Importing it takes seconds. The trap itself works: the last command falls into it."""
    names = {
        "no": tmp_path / "no", "base": folder / "Tiny-1B", "adapter": folder / "adapter",
        "merged": folder / "merged",
    }  # fmt: skip
    filled = [word.format(**names) for word in words.split()]
    commands = [filled, ["inspect", str(folder / "merged")]]
    ran, trapped = (
        subprocess.run(
            [sys.executable, "-m", "infold", *command],
            capture_output=True, text=True, cwd=tmp_path, env=without_torch,
        )
        for command in commands
    )  # fmt: skip

    assert (ran.returncode, ran.stdout) == (2, "") and "PyTorch" not in ran.stderr, ran
    assert all(text.format(**names) in ran.stderr for text in told), ran.stderr
    assert "PyTorch was imported" in trapped.stderr
    assert not (tmp_path / "x").exists()


def test_the_types_that_are_told_without_pytorch_are_those_that_are_written() -> None:
    from infold.formats.values.ggml import ENCODES
    from infold.plan.choice import TYPES

    assert tuple(TYPES.values()) == ENCODES


def test_a_mistyped_option_gets_the_nearest_and_the_usage() -> None:
    for verb, wrong, near in (
        ("merge", "--ot", "--out"), ("merge", "--max-memry", "--max-memory"),
        ("undo", "--inplace", "--in-place"),
    ):  # fmt: skip
        ran = run(verb, "a", "b", wrong, "c")
        first, second = ran.stderr.splitlines()
        assert first == f"infold: No such option: {wrong}; did you mean {near}?"
        assert second.startswith(f"infold: usage: infold {verb} ") and "--out DIR" in second
    assert "did you mean" not in run("merge", "--qqqqqqq").stderr
    assert "did you mean" not in run("merge", "a", "--adapter", "b").stderr, "no option's name"


@pytest.mark.parametrize("words", ["merge a b --out", "merge a b --undo=yes", "loop --seed"])
def test_an_option_without_its_value_gets_the_usage_of_the_verb(words: str) -> None:
    verb = words.partition(" ")[0]
    ran = run(*words.split())
    first, second = ran.stderr.splitlines()
    assert ran.returncode == 2 and first.startswith("infold: Option '--")
    assert second.startswith(f"infold: usage: infold {verb} "), second


def test_combine_checks_its_place_before_it_prints(folder: Path, tmp_path: Path) -> None:
    adapters = [folder / "adapter", folder / "adapter"]
    options = ["--weights", "1,1", "--type", "linear", "--out", folder / "merged"]
    ran = run("combine", *adapters, *options)

    assert (ran.returncode, ran.stdout) == (2, "") and "exists already" in ran.stderr


@pytest.mark.parametrize(
    ("names", "doubted"),
    [
        (("someone/Tiny-1B", "/home/me/models/Tiny-1B-bf16"), False),
        (("someone/Tiny-1B", "/tmp/checkpoint-500"), False),
        (("someone/Tiny-1B", "someone/Tiny-3B"), True),
    ],
)
def test_combine_doubts_the_names_that_merge_doubts(
    names: tuple[str, str], doubted: bool, folder: Path, tmp_path: Path
) -> None:
    adapters = []
    for number, name in enumerate(names):
        adapters.append(shutil.copytree(folder / "adapter", tmp_path / f"a{number}"))
        config = adapters[-1] / "adapter_config.json"
        fields = {**json.loads(config.read_text()), "base_model_name_or_path": name}
        config.write_text(json.dumps(fields))
    told = infold.combine(adapters, tmp_path / "out", weights=[1, 1], kind="linear")

    assert any("base_model_name_or_path differs" in note for note in told.notes) is doubted


def test_why_a_file_is_left_out_is_told(folder: Path, tmp_path: Path) -> None:
    base = shutil.copytree(folder / "merged", tmp_path / "base")
    (base / "pytorch_model.bin").write_bytes(b"weights")
    (base / ".git").mkdir()
    notes = infold.merge(base, folder / "adapter", dry_run=True)["notes"]

    assert "left out, since it tells of another merge, that made the base: infold-receipt.json" in (
        notes
    )
    assert any(n.endswith("change the merged weights: pytorch_model.bin") for n in notes)
    assert "left out, since it is no part of the model: .git" in notes


def test_one_changed_file_is_one_offender(folder: Path, tmp_path: Path) -> None:
    base = shutil.copytree(folder / "Tiny-1B", tmp_path / "base")
    (base / "tokenizer.json").write_text("{}")
    infold.merge(base, folder / "adapter", tmp_path / "out")
    (tmp_path / "out" / "tokenizer.json").write_text("{ }")
    ran = run("verify", tmp_path / "out")

    assert ran.returncode == 1 and "proof failed, 1 offender\n" in ran.stderr
