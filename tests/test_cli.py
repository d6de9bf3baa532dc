"""The command line as a user meets it: texts, JSON, exit codes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import infold
from forked import infold_command as run
from handmade import adapter_folder, ia3
from infold.checkpoint.adapter import PIECE, Adapter
from infold.cli import progress


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny random base in two dtypes, and an IA³ adapter for it, both written by hand."""
    folder = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    adapter.mkdir()
    tensors = {
        "model.layers.0.self_attn.k_proj.weight": torch.randn(16, 32).bfloat16(),
        "model.layers.0.self_attn.k_proj.bias": torch.randn(16).bfloat16(),
        "model.layers.0.mlp.down_proj.weight": torch.randn(32, 48).bfloat16(),
        "model.norm.weight": torch.ones(32),
    }
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    (base / "config.json").write_text('{"model_type": "llama", "tie_word_embeddings": false}')
    (base / "tokenizer.json").write_text("{}")
    parts = {
        "base_model.model.model.layers.0.self_attn.k_proj.ia3_l": 1 + torch.randn(16, 1) / 10,
        "base_model.model.model.layers.0.mlp.down_proj.ia3_l": 1 + torch.randn(1, 48) / 10,
    }
    save_file(parts, adapter / "adapter_model.safetensors")
    config = {"peft_type": "IA3", "feedforward_modules": ["down_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return base, adapter


def test_merge_tells_what_it_did(pair: tuple[Path, Path], tmp_path: Path) -> None:
    ran = run("merge", *pair, "--out", tmp_path / "out")

    assert ran.returncode == 0 and ran.stderr == ""
    assert "3 edits (ia3)" in ran.stdout and f"output   {tmp_path / 'out'}" in ran.stdout
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


def test_json_is_one_object_that_equals_the_receipt(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    ran = run("merge", *pair, "--out", tmp_path / "out", "--json", "--sha256")
    printed = json.loads(ran.stdout)

    assert printed == json.loads((tmp_path / "out" / "infold-receipt.json").read_text())
    assert len(printed["sha256"]["model.safetensors"]) == 64
    assert {edit["operations"][0]["side"] for edit in printed["edits"]} == {"in", "out"}


def test_the_receipt_tells_what_share_rounding_left_as_it_was(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """Counted anew, from base and output."""
    receipt = infold.merge(*pair, tmp_path / "out")

    before, after = (load_file(f / "model.safetensors") for f in (pair[0], tmp_path / "out"))
    shares = {edit["tensor"]: edit["unchanged"] for edit in receipt.edits}
    assert len(shares) == 3
    for name, share in shares.items():
        same = (before[name] == after[name]).double().mean().item()
        assert share == pytest.approx(same, abs=1e-6)
    assert max(shares.values()) > 0, "a scale of 1 +- 0.1 moves most elements, and not all"


def test_dry_run_writes_nothing(pair: tuple[Path, Path], tmp_path: Path) -> None:
    text = run("merge", *pair, "--out", tmp_path / "out", "--dry-run")
    plan = run("merge", *pair, "--out", tmp_path / "out", "--dry-run", "--json")

    assert "k_proj.weight" in text.stdout and "nothing was written" in text.stdout
    assert json.loads(plan.stdout)["edited_tensors"] == 3
    assert list(tmp_path.iterdir()) == []


def test_quiet_is_quiet(pair: tuple[Path, Path], tmp_path: Path) -> None:
    ran = run("merge", *pair, "--out", tmp_path / "out", "--quiet")
    proof = run("verify", *pair, tmp_path / "out", "--quiet")

    assert (ran.stdout, ran.stderr, proof.stdout, proof.stderr) == ("", "", "", "")


def test_an_existing_output_is_refused_and_replaced_by_force(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run("merge", *pair, "--out", out)
    before = (out / "infold-receipt.json").stat().st_ino
    refused = run("merge", *pair, "--out", out)
    kept = (out / "infold-receipt.json").stat().st_ino == before
    forced = run("merge", *pair, "--out", out, "--force")

    assert refused.returncode == 2 and "replace it with --force" in refused.stderr and kept
    assert forced.returncode == 0 and (out / "infold-receipt.json").stat().st_ino != before


@pytest.mark.parametrize("kind", ["a stranger", "a model", "an output with a note", "a file"])
def test_force_spares_what_infold_did_not_write(
    pair: tuple[Path, Path], tmp_path: Path, kind: str
) -> None:
    out = tmp_path / "out"
    if kind == "an output with a note":
        run("merge", *pair, "--out", out)
        (out / "deep").mkdir()
        mine = [out / "deep" / f"thesis-{n}.tex" for n in range(12)]
    elif kind == "a file":
        mine = [out]
    else:
        out.mkdir()
        mine = [out / ("model.safetensors" if kind == "a model" else "thesis.tex")]
    for file in mine:
        file.write_text("years")
    plain = run("merge", *pair, "--out", out)
    forced = run("merge", *pair, "--out", out, "--force")
    as_json = run("merge", *pair, "--out", out, "--force", "--json")

    assert plain.returncode == forced.returncode == as_json.returncode == 2
    assert "with --force" not in plain.stderr, "a way out that is none"
    assert [file.read_text() for file in mine] == ["years"] * len(mine)
    if kind == "an output with a note":
        assert "12 of your own files" in forced.stderr and "thesis-0.tex" in forced.stderr
        assert "and 3 more" in forced.stderr
        reasons = json.loads(as_json.stdout)["reasons"]
        assert all(any(str(file) in reason for reason in reasons) for file in mine)


def test_force_replaces_what_infold_told_of_the_old_output(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run("merge", *pair, "--out", out)
    (out / "records").mkdir()
    (out / "serving").mkdir()
    (out / "records" / "checklist.json").write_text('{"kind": "checklist"}')
    for name in ("deployment_config.json", "README.md", "serving/vllm.sh"):
        (out / name).write_text("{}")
    assert run("merge", *pair, "--out", out, "--force").returncode == 0
    assert not (out / "records").exists() and not (out / "serving").exists()

    (out / "records").mkdir()
    (out / "records" / "mine.json").write_text('{"kind": "checklist"}')
    assert "1 of your own files" in run("merge", *pair, "--out", out, "--force").stderr
    assert (out / "records" / "mine.json").exists()


def test_a_base_of_the_adapters_own_name_is_not_doubted(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = tmp_path / "Tiny-7B-Chat", tmp_path / "adapter"
    shutil.copytree(pair[0], base)
    shutil.copytree(pair[1], adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    first = next(iter(tensors))
    tensors[first.replace("_proj", "_prxj")] = tensors.pop(first)
    save_file(tensors, adapter / "adapter_model.safetensors")
    for name, doubted in (("org/Tiny-7B-Chat", False), ("org/Tiny-13B-Chat", True)):
        config = json.loads((adapter / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = name
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        told = run("merge", base, adapter, "--out", tmp_path / "out")
        assert told.returncode == 2 and ("it was trained on" in told.stderr) is doubted


def test_a_file_that_comes_into_the_old_output_during_the_merge_is_not_lost(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    infold.merge(pair[0], pair[1], out)

    def come(done: int, total: int) -> None:
        (out / "new.txt").write_text("mine")

    with pytest.raises(infold.Refusal, match=r"new\.txt"):
        infold.merge(pair[0], pair[1], out, force=True, progress=come)
    assert (out / "new.txt").read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["merge", "nowhere", "{adapter}", "--out", "x"], 2),
        (["merge", "{base}", "nowhere", "--out", "x"], 2),
        (["merge", "{adapter}", "{base}", "--out", "x"], 2),
        (["merge", "{base}", "{adapter}", "--out", "x", "--max-memory", "much"], 2),
        (["merge", "{base}", "{adapter}", "--out", "x", "--max-memory", "1MiB"], 2),
        (["merge", "{base}", "{adapter}", "--out", "x", "--device", "abacus"], 2),
        (["merge", "{base}", "{adapter}", "--out", "/proc/x/y"], 3),
        (["merge", "{base}"], 2),
        (["verify", "{base}", "{adapter}"], 2),
        (["inspect", "nowhere"], 2),
        (["inspect", "{base}", "--base", "{base}"], 2),
    ],
)
def test_errors_end_in_words_and_their_code(
    pair: tuple[Path, Path], tmp_path: Path, words: list[str], code: int
) -> None:
    filled = [word.format(base=pair[0], adapter=pair[1]) for word in words]
    ran = run(*filled, cwd=tmp_path)

    assert ran.returncode == code, ran.stderr
    assert ran.stderr and "Traceback" not in ran.stderr
    assert list(tmp_path.iterdir()) == []


def test_verify_exits_1_and_lists_the_offender(pair: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("merge", *pair, "--out", out)
    right = run("verify", *pair, out)
    by_receipt = run("verify", out)
    file = out / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    wrong = run("verify", *pair, out)
    as_json = run("verify", *pair, out, "--json")

    assert right.returncode == by_receipt.returncode == 0 and "proven" in right.stdout
    assert wrong.returncode == 1 and "model." in wrong.stderr
    assert json.loads(as_json.stdout)["ok"] is False


@pytest.mark.parametrize("kind", ["adapter", "checkpoint", "merged"])
def test_inspect_describes(pair: tuple[Path, Path], tmp_path: Path, kind: str) -> None:
    run("merge", *pair, "--out", tmp_path / "out")
    place = {"adapter": pair[1], "checkpoint": pair[0], "merged": tmp_path / "out"}[kind]
    text, data = run("inspect", place), run("inspect", place, "--json")

    assert text.returncode == 0 and text.stdout.startswith(kind)
    assert json.loads(data.stdout)["kind"] == kind


def test_inspect_says_what_is_lacking(pair: tuple[Path, Path], tmp_path: Path) -> None:
    weights = pair[1] / "adapter_model.safetensors"
    ran = run("inspect", weights)
    assert ran.returncode == 2 and f"adapter's weights; give its folder, {pair[1]}" in ran.stderr

    (tmp_path / "bare").mkdir()
    shutil.copy(weights, tmp_path / "bare")
    ran = run("inspect", tmp_path / "bare")
    assert ran.returncode == 2 and f"holds {weights.name} and no adapter_config.json" in ran.stderr

    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "config.json").write_text("{}")
    ran = run("inspect", tmp_path / "notes")
    assert ran.returncode == 2 and "neither an adapter nor a model: " in ran.stderr


@pytest.mark.parametrize("method", ["ia3", "lora", "lora with a bias"])
def test_an_adapter_that_was_never_trained_is_told(
    method: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """It merges without a complaint, and the result is the base."""
    name = "model.layers.0.self_attn.k_proj"
    out, inner = load_file(pair[0] / "model.safetensors")[f"{name}.weight"].shape
    told = "all lora_B are zero: the adapter changes nothing; was it trained?"
    if method == "ia3":
        told = told.replace("lora_B are zero", "ia3_l are one")
        fresh = ia3(tmp_path / "fresh", {name: torch.ones(out, 1)}, feedforward_modules=[])
    else:
        parts = {
            f"{name}.lora_A.weight": torch.randn(2, inner),
            f"{name}.lora_B.weight": torch.zeros(out, 2),
        }
        saved = {} if method == "lora" else {"modules_to_save": ["norm"]}
        if saved:
            parts["model.norm.weight"] = torch.full((inner,), 2.0)
            told = told.replace("the adapter changes nothing", "as in a new adapter")
        config = {"peft_type": "LORA", "r": 2, **saved}
        fresh = adapter_folder(tmp_path / "fresh", parts, config)

    seen = run("inspect", fresh)
    merged = run("merge", pair[0], fresh, "--out", tmp_path / "out")
    assert seen.returncode == merged.returncode == 0, seen.stderr + merged.stderr
    assert seen.stdout.count(told) == merged.stdout.count(told) == 1
    assert run("inspect", fresh, "--base", pair[0]).stdout.count(told) == 1
    assert "was it trained?" not in run("inspect", pair[1]).stdout


def test_inspect_tells_of_an_adapter_that_diverged(pair: tuple[Path, Path], tmp_path: Path) -> None:
    broken = tmp_path / "adapter"
    shutil.copytree(pair[1], broken)
    tensors = load_file(broken / "adapter_model.safetensors")
    one, other = (tensors[key] for key in sorted(tensors))  # of down_proj and k_proj
    one[0, :2] = torch.tensor([torch.nan, torch.inf])
    other[:] = torch.nan
    save_file(tensors, broken / "adapter_model.safetensors")

    told = run("inspect", broken)
    ran = run("inspect", broken, "--json")

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    found = json.loads(ran.stdout, parse_constant=refuse)["modules"]
    lost = {m["module"]: m["parts"][0]["statistics"]["not_finite"] for m in found}
    assert told.returncode == ran.returncode == 0 and sorted(lost.values()) == [2, 16]
    text = " ".join(told.stdout.split())  # which is wrapped
    assert "; 2 are NaN or inf" in text and "no finite value; 16 are NaN or inf" in text


def test_what_a_file_tells_is_neither_a_line_nor_a_command(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    adapter = Path(shutil.copytree(pair[1], tmp_path / "adapter"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "org/other-7b\nproven   all\x1b[1A"
    (adapter / "adapter_config.json").write_text(json.dumps(config))

    ran = run("inspect", adapter)
    assert ran.returncode == 0 and "org/other-7b" in ran.stdout
    assert "\nproven" not in ran.stdout and "\x1b" not in ran.stdout
    config["new\x1b[1A"] = True
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    ran = run("merge", pair[0], adapter, "--dry-run")
    assert ran.returncode == 2 and "new" in ran.stderr and "\x1b" not in ran.stderr


def test_inspect_takes_the_memory_of_a_piece_of_a_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A saved embedding can be larger than the memory."""
    table = torch.randn(3 << 19, generator=torch.Generator().manual_seed(2)).view(-1, 64)
    table[3, :2] = torch.tensor([torch.nan, -9.0])
    vector = torch.linspace(0.5, 1.75, 3 << 19)[:, None]
    tensors = {"model.embed_tokens.weight": table, "model.q_proj.ia3_l": vector}
    config = {"peft_type": "IA3", "modules_to_save": ["embed_tokens"]}
    adapter = adapter_folder(tmp_path / "adapter", tensors, config)
    sizes: list[int] = []
    read = Adapter._stretch

    def stretch(self: Adapter, info: Any, begin: int, end: int) -> torch.Tensor:
        sizes.append(end - begin)
        return read(self, info, begin, end)

    monkeypatch.setattr(Adapter, "_stretch", stretch)
    found = {m["module"]: m["parts"][0]["statistics"] for m in infold.inspect(adapter)["modules"]}

    assert max(sizes) == PIECE < table.nbytes
    finite = table[table.isfinite()].double()
    wanted = {"rms": float(finite.square().mean().sqrt()), "max": 9.0, "not_finite": 1}
    assert found["model.embed_tokens.weight"] == pytest.approx(wanted, rel=1e-12)
    distance = (vector.double() - 1).abs()
    assert found["model.q_proj"] == pytest.approx(
        {"min": 0.5, "max": 1.75, "mean": 1.125, "mean|l-1|": float(distance.mean()),
         "max|l-1|": 0.75}, rel=1e-12,
    )  # fmt: skip


def test_inspect_takes_a_digit_that_is_no_number_for_a_letter(tmp_path: Path) -> None:
    adapter = ia3(
        tmp_path / "adapter", {f"model.{n}.q": torch.ones(4, 1) for n in ("10", "1²2", "2")}
    )
    names = [module["module"] for module in infold.inspect(adapter)["modules"]]
    assert names == ["model.1²2.q", "model.2.q", "model.10.q"]


def test_inspect_shows_what_an_adapter_edits_and_how_far_it_went(pair: tuple[Path, Path]) -> None:
    found = infold.inspect(pair[1], base=pair[0])
    by_name = {module["module"]: module for module in found["modules"]}
    k_proj = by_name["model.layers.0.self_attn.k_proj"]

    assert k_proj["edits"] == [
        "model.layers.0.self_attn.k_proj.bias",
        "model.layers.0.self_attn.k_proj.weight",
    ]
    assert 0 < k_proj["parts"][0]["statistics"]["mean|l-1|"] < 0.3
    assert found["parameters"] == 64
    assert found["share_of_parameters"] == pytest.approx(64 / (16 * 32 + 16 + 32 * 48 + 32))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's full device")
def test_where_nothing_can_be_told_the_exit_code_tells(tmp_path: Path) -> None:
    words = [
        sys.executable,
        "-m",
        "infold",
        "merge",
        "nowhere",
        "x",
        "--out",
        str(tmp_path / "out"),
    ]
    with open("/dev/full", "w") as full:
        assert subprocess.run(words, stderr=full).returncode == 2
        assert subprocess.run([*words, "--no-such"], stderr=full).returncode == 2


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_end_no_verb_and_reach_no_shard(
    closed: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """The next file would take a closed stream's number, and get what PyTorch prints there."""
    code = (
        "import os, sys\nfrom infold.checkpoint.staging import Staging\n"
        "whole = Staging.open_file\n"
        "def loud(self, name, size):\n"
        "    fd = whole(self, name, size)\n"
        "    for number in (1, 2):\n"
        "        os.write(number, b'a warning of PyTorch')\n"
        "    return fd\n"
        "Staging.open_file = loud\n"
        "from infold.cli.main import run\nrun()\n"
    )
    (tmp_path / "loud.py").write_text(code)
    for verb in ("merge", "verify"):
        words = [str(w) for w in (*pair, "out")]
        words[-1:-1] = ["--out"] if verb == "merge" else []
        line = " ".join([sys.executable, "loud.py", verb, *words, closed])
        done = subprocess.run(["sh", "-c", line], cwd=tmp_path, capture_output=True)
        assert done.returncode == 0, done

    assert infold.verify(*pair, tmp_path / "out").ok


def test_an_interrupt_ends_with_130_and_the_next_run_finishes(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """A patched read makes every block slow, so that the signal comes in the middle."""
    code = (
        "import sys, time\nfrom infold.checkpoint import inputs as s\n"
        "whole = s.read_exactly\n"
        "def slow(*a):\n"
        "    print('reading', flush=True); time.sleep(1); return whole(*a)\n"
        "s.read_exactly = slow\n"
        f"inputs = [{str(pair[0])!r}, {str(pair[1])!r}]\n"
        "sys.argv = ['infold', 'merge', *inputs, '--out', 'out', '-q']\n"
        "from infold.cli.main import run\n"
        "run()\n"
    )
    started = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a test run in the background has SIGINT ignored, and its children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert started.stdout is not None and started.stderr is not None
    started.stdout.readline()
    time.sleep(0.1)
    os.kill(started.pid, signal.SIGINT)
    code_of_exit, message = started.wait(60), started.stderr.read()
    started.stdout.close()
    started.stderr.close()

    assert (code_of_exit, message.count("Traceback")) == (130, 0), message
    assert "interrupted" in message
    assert not (tmp_path / "out").exists()
    assert run("merge", *pair, "--out", tmp_path / "out").returncode == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("text", "value"),
    [("1GiB", 1 << 30), ("512MiB", 512 << 20), ("2G", 2 * 10**9), ("1.5kB", 1500), ("64", 64)],
)
def test_sizes_are_read(text: str, value: int) -> None:
    from infold.sizes import parse_bytes

    assert parse_bytes(text) == value


def test_an_interrupt_of_the_first_imports_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise KeyboardInterrupt")
    found = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]

    ran = subprocess.run(
        [sys.executable, "-m", "infold", "--help"],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(found)},
    )  # fmt: skip

    assert (ran.returncode, ran.stdout, ran.stderr) == (130, "", "infold: interrupted\n")


def test_a_log_gets_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where there is no terminal; what is done before the first line tells nothing."""
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with progress.step_progress("training", quiet=False) as show:
        assert show is not None
        for done in range(0, 101, 10):
            show(done, 100, 0.5 if done else None)
            clock[0] += 12
    with progress.byte_progress("merging", quiet=False) as told:
        assert told is not None
        for done in (10, 20, 40, 5, 15, 140):  # the first ten were there, and are made again
            told(done << 30, 140 << 30)
            clock[0] += 40
    with progress.byte_progress("merging", quiet=True) as none:
        assert none is None

    assert capsys.readouterr().err.splitlines() == [
        "training: 30 of 100, loss 0.5000, 1:24 left",
        "training: 60 of 100, loss 0.5000, 0:48 left",
        "training: 90 of 100, loss 0.5000, 0:12 left",
        "merging: 21.5 GB of 150 GB, 268 MB/s, 8:00 left",
        "merging: 42.9 GB of 150 GB, 537 MB/s, 3:20 left",
        "merging: 5.37 GB of 150 GB",
        "merging: 16.1 GB of 150 GB, 268 MB/s, 8:20 left",
    ]
