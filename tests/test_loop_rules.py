"""The loop: its rules to stop, its methods and built-in tasks, and what it refuses to begin."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

import infold
from infold.errors import Refusal
from infold.loop.folder import Iteration
from infold.loop.run import _nothing, checkout
from test_loop import settings, weights
from training import save_rounded_base

pytestmark = pytest.mark.usefixtures("calm")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_rounded_base(tmp_path_factory.mktemp("rules") / "base")


def accepting(base: Path, run: Path, **changed: Any) -> dict[str, Any]:
    """A loop whose verifier accepts everything, so that no score is ever better than the base's."""
    config = settings(base, run, **changed)
    config["task"] = config["task"] | {"verify": "loop_tasks:always"}
    return config


@pytest.mark.parametrize(
    ("stop", "ended", "iterations"),
    [
        ({"patience": 1}, "no gain in 1 iteration: iteration 0 is still the best", 1),
        ({"patience": 2}, "no gain in 2 iterations: iteration 0 is still the best", 2),
        ({"minutes": 1e-6}, r"\d+\.\d minutes are spent, of 1e-06", 0),
    ],
)
def test_a_stop_rule_ends_the_loop(
    stop: dict[str, float], ended: str, iterations: int, base: Path, tmp_path: Path
) -> None:
    found = infold.Loop(accepting(base, tmp_path / "run", iterations=3, stop=stop)).run()

    assert re.fullmatch(ended, found["stopped"])
    assert len(found["iterations"]) == 1 + iterations


def test_ia3_goes_round_too(base: Path, tmp_path: Path) -> None:
    train = {"method": "ia3", "steps": 3, "batch_size": 2, "lr": 0.05}

    found = infold.Loop(accepting(base, tmp_path / "run", train=train)).run()

    kept = weights(tmp_path / "run" / "model")
    adapters = [Path(it["adapter"]) for it in found["iterations"][1:]]
    infold.merge(base, adapters, tmp_path / "once")
    assert weights(tmp_path / "once") == kept != weights(base)
    checkout(tmp_path / "run", 2, tmp_path / "two")
    assert weights(tmp_path / "two") == kept
    assert all(it["seconds"] > 0 for it in found["iterations"])


def test_the_built_in_tasks_go_round(base: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    rows = [{"text": f"{i} is {'odd' if i % 2 else 'even'}", "label": i % 2} for i in range(60)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    classify = {"name": "classify", "data": str(data), "labels": ["a", "b"], "held_out": 0.4}
    roomy = shutil.copytree(base, tmp_path / "base")
    told = json.loads((roomy / "config.json").read_text())
    (roomy / "config.json").write_text(json.dumps(told | {"max_position_embeddings": 256}))
    for task in (classify, {"name": "arithmetic", "levels": [1]}):
        config = settings(roomy, tmp_path / task["name"], iterations=1, task=task)
        config["collect"] |= {"filter": "none"}  # what is random is rarely right

        found = infold.Loop(config).run()

        folder = tmp_path / task["name"] / "iterations/001"
        learnt = [json.loads(row) for row in (folder / "kept.jsonl").read_text().splitlines()]
        problems = json.loads((folder / "problems.json").read_text())
        assert len(learnt) == found["iterations"][1]["collect"]["rows"] > 0
        assert all(any(p.get("text", p.get("question")) in r["prompt"] for p in problems)
                   for r in learnt)  # fmt: skip
        assert found["iterations"][1]["score"]["of"] > 0


def test_a_quantized_base_is_refused_before_anything_is_collected(
    base: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(base, tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    (folder / "config.json").write_text(json.dumps(config))

    with pytest.raises(Refusal, match='only IA³ merges into it as it is; set method = "ia3"'):
        infold.Loop(settings(folder, tmp_path / "run")).run()

    assert not (tmp_path / "run").exists()


def test_a_base_that_is_a_file_is_refused_before_anything_is_collected(
    base: Path, tmp_path: Path
) -> None:
    with pytest.raises(Refusal, match=r"model\.safetensors: no folder with a config\.json"):
        infold.Loop(settings(base / "model.safetensors", tmp_path / "run")).run()

    assert not (tmp_path / "run").exists()


def test_what_training_refuses_is_told_by_the_keys_of_the_configuration(
    base: Path, tmp_path: Path
) -> None:
    config = accepting(base, tmp_path / "run")
    config["train"] = config["train"] | {"max_length": 2}

    with pytest.raises(Refusal, match=r"^iteration 1, train: (.|\n)*or choose train\.too_long cut"):
        infold.Loop(config).run()


def test_held_out_problems_that_are_gone_are_not_made_anew(base: Path, tmp_path: Path) -> None:
    """The scores that are there were of others, perhaps."""
    infold.Loop(accepting(base, tmp_path / "run", iterations=1)).run()
    (tmp_path / "run" / "held_out.json").unlink()

    with pytest.raises(Refusal, match=r"held_out\.json: is gone.*put it back, or take another run"):
        infold.Loop(accepting(base, tmp_path / "run", iterations=2)).run()


def test_a_control_without_steps_would_train_longer(base: Path, tmp_path: Path) -> None:
    config = settings(base, tmp_path / "run")
    del config["train"]["steps"]

    with pytest.raises(Refusal, match=r"--control: \[train\] has no steps"):
        infold.Loop(config, control=True)


def test_blank_answers_are_not_told_as_refused_ones(tmp_path: Path) -> None:
    counts = {"answers": 12, "problems": 6, "accepted": 3, "filter": "verifier"}
    it = Iteration(tmp_path, 1)

    assert "of 12 answers to 6 problems 3 were accepted, and those to be learnt are blank" in (
        _nothing(it, counts)
    )
    assert "none of 12 answers" in _nothing(it, counts | {"accepted": 0})
