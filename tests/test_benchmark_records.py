"""Records of benchmarks: every part tells its own machine, and records from before still render."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
OLDER = {"times": 1, "run": 2, "machine": {"system": "Old", "python": "3"}, "load": {"run": 9.5}}


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield __import__("parts")
    sys.modules.pop("parts")


def test_each_part_tells_its_machine(parts: Any, tmp_path: Path) -> None:
    file = tmp_path / "results" / "record.json"
    parts.add_part(file, "run", {"a": 1}, ("torch", "none-such"))
    parts.add_part(file, "models", [], ("torch",), "int8")
    parts.add_part(file, "models", [], ("torch",), "nf4")

    record = json.loads(file.read_text())

    assert record["run"] == {"a": 1}
    (line, _), models = parts.told_of(record, "run"), parts.told_of(record, "models")
    where = record["machines"]["run"]
    for told in (where["cpu"], f"torch {where['torch']}", f"commit {where['commit'] or 'unknown'}"):
        assert told in line
    assert "none-such" not in line and len(models) == 4
    assert ["(int8)" in models[0], "(nf4)" in models[2]] == [True, True]
    assert parts.told_of(record, "mod") == [] and parts.told_of_older(record, ["run"]) == []


def test_older_records_say_less(parts: Any, tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    file.write_text(json.dumps(OLDER))
    assert parts.told_of(OLDER, "run") == []
    parts.add_part(file, "times", 3, ())

    record = json.loads(file.read_text())

    assert record["machine"] == OLDER["machine"] and record["run"] == 2
    (line, _) = parts.told_of_older(record, ["times", "run", "errors"])
    assert "parts: run (load 9.5); the last that ran had system Old, python 3" in line


@pytest.mark.parametrize(("factor", "verdict"), [(1.02, "Within noise"), (0.8, "cannot be told")])
def test_a_difference_is_noise_only_within_the_controls_spread(
    factor: float, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    table = __import__("quantized").speed_table
    base = [{"prompt": 100.0, "decode": 10.0}] * 5
    again = [{n: v * f for n, v in base[0].items()} for f in (0.7, 0.96, 1.0, 1.04, 1.6)]
    folded = [{n: v * factor for n, v in turn.items()} for turn in base]
    rates = {"base": base, "folded": folded, "base again": again}

    lines = table([{"kind": "int8", "rates": rates}])

    row = next(line for line in lines if line.startswith("| int8, the prompt"))
    assert "1.000 (0.960 to 1.040)" in row and "0.700" not in row
    (told,) = [line for line in lines if "one by one (" in line]
    assert verdict in told and "of the control 0.080" in told
