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
