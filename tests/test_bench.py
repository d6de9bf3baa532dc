"""The measuring of base, adapter mode and merged: its statistics, processes and refusals."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from peft import IA3Config, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import infold
from infold.bench.run import measure_models
from infold.cli.bench import _show
from infold.cli.main import app
from infold.deploy.checklist import check_boxes
from infold.errors import Refusal, StorageFailure
from infold.interval import median_interval, paired_ratio
from infold.report.page import render_markdown
from infold.report.records import collect

pytestmark = pytest.mark.filterwarnings("ignore")
QUICK: dict[str, Any] = {
    "batches": (1, 2), "prompt_tokens": 8, "new_tokens": 4, "rounds": 2, "starts": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A tiny random Llama, an IA³ adapter and the two merged."""
    folder = tmp_path_factory.mktemp("bench")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder / "base")
    ia3 = IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"],
        init_ia3_weights=False,
    )  # fmt: skip
    get_peft_model(model, ia3).save_pretrained(folder / "adapter")
    infold.merge(folder / "base", folder / "adapter", folder / "merged")
    return folder / "base", folder / "adapter", folder / "merged"


def workers() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "infold.bench.worker" in process.cmdline():
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.parametrize("count", [6, 9, 15, 30])
def test_the_interval_holds_the_median_as_often_as_it_says(count: int) -> None:
    """Against a skewed distribution whose median is known: ln 2 for the exponential."""
    chance, held, trials = random.Random(count), 0, 4000
    coverage = 0.0
    for _ in range(trials):
        found = median_interval([chance.expovariate(1) for _ in range(count)])
        held += found.low <= 0.6931471805599453 <= found.high
        coverage = found.coverage
    assert coverage >= 0.95
    assert abs(held / trials - coverage) < 4 * (coverage * (1 - coverage) / trials) ** 0.5


def test_few_values_tell_the_coverage_they_have() -> None:
    assert median_interval([3.0, 1.0, 2.0, 4.0]).coverage == 1 - 2 / 2**4
    assert median_interval([3.0, 1.0, 2.0, 4.0]).low == 1.0
    assert median_interval([5.0]).coverage == 0
    with pytest.raises(ValueError, match="no values"):
        median_interval([])


def test_noise_that_both_share_does_not_hide_a_difference() -> None:
    """Rounds of 1 s and of 10 s, always 5 % apart: only pairs can tell."""
    base = [1.0, 10.0, 2.0, 7.0, 1.5, 4.0, 9.0]
    found = paired_ratio([1.05 * b for b in base], base)
    assert found.median == pytest.approx(1.05) and not found.holds_one
    assert paired_ratio(base, base).holds_one
    with pytest.raises(ValueError):
        paired_ratio([1.0], base)


def test_rounds_of_one_start_are_not_counted_as_independent() -> None:
    """Starts of which four are 5 % slower and two 5 % faster, in a hundred rounds each."""
    ratios = [r for start in (1.05, 1.05, 0.95, 1.05, 0.95, 1.05) for r in [start] * 100]
    base = [1.0] * len(ratios)
    assert not paired_ratio(ratios, base).holds_one, "which is what counting rounds would say"
    found = paired_ratio(ratios, base, starts=6)
    assert found.holds_one and (found.low, found.high, found.count) == (0.95, 1.05, 6)
    assert paired_ratio(ratios, base, starts=5).count == 600, "too few for an interval of 0.95"


def test_each_model_loads_first_in_turn(
    made: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And none while another still imports PyTorch, which takes the cores."""
    loaded: list[str] = []

    class Model:
        def __init__(self, name: str) -> None:
            self.name = name

        def ask(self, what: str, **given: Any) -> dict[str, Any]:
            if what == "ready":
                loaded.append(what)
                return {}
            if what != "load":
                return {"prefill_seconds": 1.0, "decode_tokens_per_second": 1.0}
            loaded.append(self.name)
            return {"load_seconds": 1.0, "dtype": "", "threads": 1, "device": "cpu"}

    module = sys.modules[measure_models.__module__]
    monkeypatch.setattr(module, "_worker", lambda name: nullcontext(Model(name)))
    found = measure_models(*made, batches=(1,), rounds=3, starts=2, modes=False)

    assert loaded == ["ready", "ready", "base", "merged", "ready", "ready", "merged", "base"]
    for one in found["models"].values():  # all starts count, and of each all rounds but the first
        counts = {name: metric["count"] for name, metric in one.items()}
        rounds = dict.fromkeys(("prefill_seconds", "decode_tokens_per_second"), 6)
        assert counts == {"load_seconds": 2} | {f"{n}, batch 1": c for n, c in rounds.items()}


@pytest.fixture(scope="module")
def measured(
    made: tuple[Path, Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any], list[tuple[int, int]]]:
    """What the verb measured of a folder of its own: that folder, what it told, and its steps."""
    folder = tmp_path_factory.mktemp("measured")
    shutil.copytree(made[2], folder / "merged")
    arguments = ["bench", *map(str, (*made[:2], folder / "merged")), "--batch", "1", "--batch", "2"]
    arguments += ["--rounds", "2", "--starts", "1", "--prompt-tokens", "8", "--new-tokens", "4"]
    steps: list[tuple[int, int]] = []

    def counted(*inputs: Any, **given: Any) -> dict[str, Any]:
        given["progress"] = lambda done, of, _: steps.append((done, of))
        return measure_models(*inputs, **given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[measure_models.__module__], "measure_models", counted)
        picture = ["--picture", str(folder / "p.svg")]
        done = CliRunner().invoke(app, [*arguments, "--json", *picture])
    assert done.exit_code == 0, done.output
    return folder, json.loads(done.stdout), steps


def test_it_measures_every_model(measured: Any) -> None:
    _, record, steps = measured

    assert list(record["models"]) == ["base", "infold", "PEFT", "merged"]
    assert steps == [(done, 12) for done in range(1, 13)]
    assert not workers()
    for name, found in record["models"].items():
        shared = {"load_seconds", "resident_bytes"}
        shared |= {f"{m}, batch {b}" for b in (1, 2) for m in (
            "prefill_seconds", "first_token_seconds", "decode_tokens_per_second")}  # fmt: skip
        assert set(found) == shared | ({"swap_seconds"} if name in ("infold", "PEFT") else set())
        assert all(one["low"] <= one["median"] <= one["high"] for one in found.values())
        assert all(one["median"] > 0 for m, one in found.items() if m != "resident_bytes")
        assert (
            found["prefill_seconds, batch 1"]["count"] == 2 and found["load_seconds"]["count"] == 1
        )
    compared = {(c["model"], c["what"]) for c in record["comparisons"]}
    assert compared == {(m, w) for m in ("infold", "PEFT", "merged") for w in (
        "speed", "memory", "load")}  # fmt: skip
    assert record["dtype"] == "bfloat16" and record["versions"]["torch"] == torch.__version__


def test_memory_is_what_the_weights_take(tmp_path: Path) -> None:
    """Twice the dtype, twice the memory; of a model so large that the allocator hardly matters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048, hidden_size=1024, intermediate_size=4096, num_hidden_layers=3,
        num_attention_heads=8, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    ia3 = IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    weights = sum(p.nbytes for p in model.parameters())
    get_peft_model(model, ia3).save_pretrained(tmp_path / "adapter")

    found = [
        measure_models(
            tmp_path / "base", tmp_path / "adapter", batches=(1,), prompt_tokens=4, new_tokens=1,
            rounds=1, starts=1, dtype=dtype, modes=False,
        )["models"]["base"]["resident_bytes"]["median"]
        for dtype in ("bfloat16", "float32")
    ]  # fmt: skip
    assert weights * 0.9 < found[0] < weights * 1.6
    assert weights * 1.8 < found[1] < weights * 2.9


def test_the_verb_saves_what_checklist_and_report_read(
    made: tuple[Path, Path, Path], measured: Any
) -> None:
    base, adapter, _ = made
    folder, told, _ = measured
    merged = folder / "merged"

    saved = json.loads((merged / "records" / "bench.json").read_text())
    assert told["comparisons"] == saved["comparisons"]
    assert (folder / "p.svg").read_text().rstrip().endswith("</svg>")
    assert infold.verify(merged).ok
    boxes = {box.title: box for box in check_boxes(base, adapter, merged)}
    assert boxes["baseline recorded"].status == "PASS"
    assert "the base's" in boxes["speed"].evidence
    page = render_markdown(collect(merged))
    assert "| over the base's; more is worse | infold | PEFT | merged |" in page

    # memory has one value a start: here one in all, then two, of which an interval is forged
    memory = next(
        c for c in saved["comparisons"] if c["model"] == "merged" and c["what"] == "memory"
    )
    for more, told in (
        ({}, rf"{memory['ratio']:.3f}, one value"),
        ({"low": 0.9, "high": 1.1, "coverage": 0.5}, r"1\.000 \(0\.900 to 1\.100\), of 50%"),
    ):
        memory |= {"ratio": 1.0, **more} if more else {}
        (merged / "records" / "bench.json").write_text(json.dumps(saved))
        page = render_markdown(collect(merged))
        assert re.search(rf"\n\| {memory['metric']} \|.*\| {told} \|\n", page), page

    # the same record, made to tell of other merged models
    def box(what: str = "speed", **told: float) -> str:
        for one in saved["comparisons"]:
            if one["model"] == "merged" and one["what"] == what:
                one |= told
        (merged / "records" / "bench.json").write_text(json.dumps(saved))
        boxes = {box.title: box for box in check_boxes(base, adapter, merged)}
        assert ("one value, of no interval" in boxes[what].evidence) == (told["coverage"] == 0)
        return boxes[what].status

    assert box(ratio=1.1, low=1.08, high=1.12, coverage=0.95) == "FAIL"
    assert box(ratio=1.0, low=0.99, high=1.01, coverage=0.95) == "PASS"
    assert box(ratio=1.0, low=0.70, high=1.30, coverage=0.95) == "NOT DONE"
    assert box(ratio=1.1, low=1.08, high=1.12, coverage=0.75) == "NOT DONE"
    assert box("memory", ratio=1.1, low=1.08, high=1.12, coverage=0.75) == "FAIL"
    assert box("memory", ratio=1.0, low=0.99, high=1.01, coverage=0.75) == "PASS"
    for what in ("speed", "memory"):
        for ratio in (1.0, 1.8):
            one = {"ratio": ratio, "low": ratio, "high": ratio, "coverage": 0.0}
            assert box(what, **one) == "NOT DONE"


@pytest.mark.parametrize("coverage", [0.0, 0.97])
def test_one_value_is_shown_without_an_interval(
    coverage: float, capsys: pytest.CaptureFixture[str]
) -> None:
    one = {"model": "merged", "what": "speed", "metric": "prefill seconds", "within_noise": False}
    one |= {"ratio": 1.29, "low": 1.29, "high": 1.29, "coverage": coverage}
    record = {"models": {"base": {}, "merged": {}}, "comparisons": [one], "device": "cpu"}
    record |= {"processor": "p", "threads": 1, "dtype": "auto", "rounds": 1, "starts": 1}
    _show(record | {"seconds": 1.0, "notes": []})

    said = capsys.readouterr().out
    assert ("1.290" in said and "1.290 to 1.290" not in said) or coverage
    assert ("one value" in said) == (coverage == 0) and (" 0%" in said) is False
    assert ("97%" in said) == (coverage > 0)


def test_more_tokens_than_the_model_takes_are_refused(made: tuple[Path, Path, Path]) -> None:
    config = json.loads((made[0] / "config.json").read_text())
    longest = config["max_position_embeddings"]
    with pytest.raises(Refusal, match=f"takes {longest:,} tokens; .* make {longest + 1:,}"):
        measure_models(*made[:2], prompt_tokens=longest - 4, new_tokens=4)


def test_all_that_is_wrong_is_told_at_once(made: tuple[Path, Path, Path]) -> None:
    base, adapter, _ = made
    with pytest.raises(Refusal) as told:
        measure_models(base, adapter, rounds=0, starts=-1, batches=(2, 2, 0), dtype="fp8")
    text = "\n".join(told.value.reasons)
    for part in ("0 rounds", "-1 starts", "a batch of 0", "given twice", "dtype fp8"):
        assert part in text


def test_a_folder_that_was_changed_is_not_measured(
    made: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    """Its record would tell of other weights than the receipt."""
    base, adapter, merged = made
    folder = tmp_path / "merged"
    shutil.copytree(merged, folder)
    shutil.rmtree(folder / "records", ignore_errors=True)
    (shard,) = folder.glob("*.safetensors")
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)

    with pytest.raises(Refusal, match="was changed after it was merged"):
        infold.bench(base, adapter, folder, **QUICK)
    done = CliRunner().invoke(app, ["bench", str(base), str(adapter), str(folder)])
    assert done.exit_code == 2 and not (folder / "records").exists()


def test_what_cannot_be_run_is_refused(
    made: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter, merged = made
    other = LlamaForCausalLM(LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, bos_token_id=0, eos_token_id=1))  # fmt: skip
    other.save_pretrained(tmp_path / "other")

    module = sys.modules[measure_models.__module__]
    with monkeypatch.context() as patch, pytest.raises(Refusal, match=r"infold: .*"):
        patch.setattr(module, "find_spec", lambda name: None if name == "peft" else True)
        measure_models(tmp_path / "other", adapter, **QUICK)
    assert not workers()
    with pytest.raises(Refusal, match="no folder with a config"):
        measure_models(adapter, adapter, **QUICK)
    with pytest.raises(Refusal, match="no such file or folder"):
        measure_models(base, adapter, tmp_path / "nothing", **QUICK)
    (tmp_path / "weightless").mkdir()
    (tmp_path / "weightless" / "config.json").write_bytes((merged / "config.json").read_bytes())
    with pytest.raises(Refusal, match="base: "):
        measure_models(tmp_path / "weightless", adapter, **QUICK, modes=False)

    class Base:
        """Answers without a process: the merged model is the one that cannot be loaded."""

        def ask(self, what: str, **given: Any) -> dict[str, Any]:
            return {"load_seconds": 1.0, "dtype": "", "threads": 1, "device": "cpu"}

    started = module._worker
    with monkeypatch.context() as patch, pytest.raises(Refusal, match=r"^merged: "):
        patch.setattr(
            module, "_worker", lambda n: nullcontext(Base()) if n == "base" else started(n)
        )
        measure_models(base, adapter, tmp_path / "weightless", **QUICK, modes=False)
    assert not workers()
    if not torch.cuda.is_available():
        with pytest.raises(Refusal, match="no CUDA devices"):
            measure_models(base, adapter, **{**QUICK, "device": "cuda"})
    done = CliRunner().invoke(app, ["bench", str(base), str(adapter), "--picture", "p.gif"])
    assert done.exit_code == 2
    assert not workers()


def test_a_model_whose_process_dies_ends_the_run_and_leaves_none(
    made: tuple[Path, Path, Path],
) -> None:
    base, adapter, _ = made

    def kill(done: int, of: int, _: float | None) -> None:
        workers()[0].send_signal(signal.SIGKILL)

    with pytest.raises(StorageFailure, match="was killed"):
        measure_models(base, adapter, **QUICK, modes=False, progress=kill)
    assert not workers()


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_killed_bench_leaves_no_process(made: tuple[Path, Path, Path]) -> None:
    """The workers' standard input closes with their parent, and they end: the first waits to be
    asked, the second loads its model."""
    base, adapter, _ = map(str, made)
    parent = subprocess.Popen(
        [sys.executable, "-m", "infold", "bench", base, adapter, "--rounds", "500"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    begun = psutil.Process(parent.pid)
    until = time.monotonic() + 120
    while len(found := begun.children(recursive=True)) < 2 and time.monotonic() < until:
        time.sleep(0.1)
    parent.kill()
    parent.wait()
    assert len(found) >= 2
    _, left = psutil.wait_procs(found, timeout=60)
    assert not left
