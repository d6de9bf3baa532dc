"""The notebook's first cell, with an adapter at the path and without: run as it stands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import infold

EXAMPLES = Path(__file__).parent.parent / "examples"
NOTEBOOK = EXAMPLES / "ia3_merge_and_deploy.ipynb"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache whose SmolLM2 is a tiny random Llama, so that nothing is downloaded."""
    folder = tmp_path_factory.mktemp("cache")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "SmolLM2-135M-Instruct")
    return folder


def run_first_cell(cache: Path, adapter: Path, place: Path, more: str = "") -> tuple[str, Path]:
    """What the first cell and `more` after it print, and the folder in which they worked."""
    cells = [c for c in json.loads(NOTEBOOK.read_text())["cells"] if c["cell_type"] == "code"]
    source = "".join(cells[0]["source"])
    place.mkdir()
    given = {"INFOLD_CACHE": str(cache), "ADAPTER": str(adapter), "TMPDIR": str(place)}
    ran = subprocess.run(
        [sys.executable, "-c", f"{source}\n{more}\nprint(os.getcwd())"],
        capture_output=True, text=True, timeout=240, cwd=EXAMPLES, env={**os.environ, **given},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout, Path(ran.stdout.splitlines()[-1])


def test_without_an_adapter_it_makes_one_for_show_and_says_so(cache: Path, tmp_path: Path) -> None:
    """One that its own next cells take: inspected, merged, proven, and it changes every layer."""
    nowhere = tmp_path / "nothing here"
    steps = 'infold("inspect", "adapter"); infold("merge", "base", "adapter", "--out", "merged")'

    told, place = run_first_cell(cache, nowhere, tmp_path / "made", steps)

    assert told.splitlines()[0] == (
        f"no adapter at {nowhere}: this is an untrained one, moved at random, for show"
    )
    assert not (place / "adapter").is_symlink() and not nowhere.exists()
    verdict = infold.verify(place / "base", place / "adapter", place / "merged")
    assert verdict.ok
    edits = json.loads((place / "merged" / "infold-receipt.json").read_text())["edits"]
    assert len(edits) == 2 * 3 == verdict.recomputed, "k, v and down of both layers"
    assert all(edit["unchanged"] < 0.5 for edit in edits), "its scales are not those of a new one"


def test_an_adapter_at_the_path_is_taken_as_it_is(cache: Path, tmp_path: Path) -> None:
    own = EXAMPLES / "adapters" / "ia3-reviews"

    told, place = run_first_cell(cache, own, tmp_path / "taken")

    assert "no adapter at" not in told
    assert (place / "adapter").resolve() == own.resolve()
