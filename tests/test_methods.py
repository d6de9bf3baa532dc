"""The table of methods: what it says of merging is tried, and its page is current."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import peft
import psutil
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import infold
from infold.adapters import METHODS
from infold.cli.main import app
from infold.cli.methods import _groups, _plain_figures
from infold.cli.progress import step_progress
from infold.errors import Refusal
from infold.methods import table
from infold.methods.measure import BOTTLENECKS, _bottleneck, _check_python, _measured
from infold.methods.table import MethodRow, attach_peft, method_rows, peft_needs

pytestmark = pytest.mark.filterwarnings("ignore")
PAGE = Path(__file__).parent.parent / "docs" / "methods.md"


@pytest.fixture(scope="module")
def rows() -> dict[str, MethodRow]:
    return {row.name: row for row in method_rows()}


def test_every_type_of_peft_has_a_row_and_every_type_of_ours_merges(
    rows: dict[str, MethodRow],
) -> None:
    assert {kind.value for kind in peft.PeftType} < set(rows)
    ours = {kind for method in METHODS.values() for kind in method.PEFT_TYPES}
    assert {name for name, row in rows.items() if row.infold == "yes"} == ours
    assert all(row.peft == "yes" for name, row in rows.items() if name in ours)
    for name in ("PROMPT_TUNING", "PREFIX_TUNING", "bottleneck adapters"):
        assert rows[name].infold.startswith("never")
    assert rows["BitFit"].infold.startswith("yes")


def test_a_merge_that_computes_something_else_is_not_called_a_merge(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """IA³ unmerged leaves the base: all of its update is missing."""
    from peft.tuners.ia3.model import IA3Model

    monkeypatch.setattr(IA3Model, "merge_and_unload", IA3Model.unload)
    assert table._tried("IA3") == ("wrong by 100% of its update", False)


def test_what_depends_on_the_input_or_the_task_has_no_one_weight(
    rows: dict[str, MethodRow],
) -> None:
    for name in ("XLORA", "LILY", "SHADOW"):
        assert rows[name].infold == "never: what it adds depends on the input"
    assert rows["POLY"].infold == "no: a weight for each task, not one"
    assert rows["POLY"].peft == "no: not implemented", "it ran, and then had no merge"
    assert rows["XLORA"].peft.startswith("wrong by "), "it merges, and computes something else"
    assert rows["ADAMSS"].peft == "yes"
    assert not [row for row in rows.values() if row.peft.startswith("not tried")]
    assert all(row.merge for row in rows.values() if row.peft.startswith("yes"))


def test_a_base_without_biases_has_none_to_train() -> None:
    model = table._small()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.bias = None
    found = _measured(model, "BitFit", torch.arange(4)[None], 1, model.num_parameters())
    assert found == {"why": "this base has no biases"}


def test_what_x_lora_mixes_runs(tmp_path: Path) -> None:
    """Its experts change the outputs, by weights that differ from token to token."""
    plain = table._small()
    ids = torch.arange(6)[None]
    needs = peft_needs(plain, "XLORA", tmp_path)
    model = attach_peft(table._small(), "XLORA", needs).eval()
    with torch.no_grad():
        logits = model(ids).logits
        mix = model.base_model.get_latest_scalings()[0, :, 0]
    assert (logits - plain(ids).logits).norm() > 0.1
    assert mix.shape == (6, 2) and len({row[0].item() for row in mix}) > 1


def test_the_page_is_the_verbs_output(rows: dict[str, MethodRow]) -> None:
    """Its first table is; the second, of --measure, differs from day to day."""
    cells = [(row.name, row.infold, row.peft, row.merge) for row in rows.values()]
    wanted = ["| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in cells]
    text = PAGE.read_text().splitlines()
    begin = text.index("| method | infold merges | PEFT merges | merged weight |") + 2
    assert text[begin : text.index("", begin)] == wanted


def test_parameters_and_overhead_of_a_real_class(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    config.attention_bias = True
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "base")

    arguments = ["methods", "--measure", str(tmp_path / "base"), "--rounds", "1", "--tokens", "4"]
    done = CliRunner().invoke(app, [*arguments, "--json"])

    assert done.exit_code == 0, done.output
    found = {one["name"]: one for one in json.loads(done.stdout)["measured"]}
    types = {kind.value for kind in peft.PeftType} | {"BitFit"}
    bottlenecks = {f"bottleneck {kind}" for kind in BOTTLENECKS}
    assert set(found) == types | bottlenecks
    if find_spec("adapters") is None:
        assert all("--adapters-python" in found[name]["why"] for name in bottlenecks)
    for name in ("LORA", "IA3", "OFT", "PROMPT_TUNING"):
        trained, total = attach_peft(LlamaForCausalLM(config), name).get_nb_trainable_parameters()
        assert found[name]["parameters"] == trained and total
        assert found[name]["low"] <= found[name]["ratio"] <= found[name]["high"]
    assert found["PROMPT_TUNING"]["parameters"] == 20 * 64
    assert [found[name] for name in types if "why" in found[name]] == []
    assert found["BitFit"]["parameters"] == 2 * 4 * 64, "q, k, v and o of both layers"
    assert found["MULTITASK_PROMPT_TUNING"]["parameters"] == 20 * 64 + 2 * (20 + 64)
    layers = 2 * (4 * 8 * (64 + 64) * 2 + 4)  # q and v: four skills of rank 8, and their router
    assert found["POLY"]["parameters"] == layers + 2 * 4
    assert found["XLORA"]["parameters"] == 2 * 64 + 2 and "frozen" in found["XLORA"]["note"]


# A package of the same few functions: the real one wants a transformers that is not ours.
FAKE = """
import torch
def init(model):
    model.add_adapter = lambda name, config: None
    model.train_adapter = lambda name: train(model)
def train(model):
    for p in model.parameters():
        p.requires_grad_(False)
    for layer in model.model.layers:
        layer.down, layer.up = torch.nn.Linear(32, 3), torch.nn.Linear(3, 32)
        layer.register_forward_hook(lambda m, i, out: out + m.up(torch.relu(m.down(out))))
"""


def test_bottleneck_adapters_run_in_another_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that does not run has no figures."""
    package = tmp_path / "packages" / "adapters.py"
    package.parent.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")

    package.write_text(FAKE)
    found = _bottleneck(sys.executable, tmp_path / "base", "seq_bn", tokens=4, rounds=2)
    package.write_text(FAKE.replace("out + m.up", "out + 0 * m.up"))
    idle = _bottleneck(sys.executable, tmp_path / "base", "seq_bn", tokens=4, rounds=2)

    assert found["parameters"] == 2 * (32 * 3 + 3 + 3 * 32 + 32)
    assert 0 < found["low"] <= found["ratio"] <= found["high"]
    assert idle == {"why": "it changes no logit, so it did not run"}


def test_a_bottleneck_process_ends_with_the_one_that_asked(tmp_path: Path) -> None:
    """However that ends: it may take a quarter of an hour by itself."""
    note = tmp_path / "pid"
    held = f"import os, time; open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    (tmp_path / "adapters.py").write_text(held)
    code = (
        "import sys; from pathlib import Path; from infold.methods.measure import _bottleneck\n"
        "_bottleneck(sys.executable, Path('base'), 'seq_bn', tokens=4, rounds=1)"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    ours = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path})
    end = time.monotonic() + 120
    while not (note.exists() and note.read_text()):
        assert ours.poll() is None and time.monotonic() < end, "it did not start"
        time.sleep(0.05)
    ours.kill()
    ours.wait()

    theirs = int(note.read_text())
    while psutil.pid_exists(theirs) and psutil.Process(theirs).status() != "zombie":
        assert time.monotonic() < end, "it is still there"
        time.sleep(0.05)


@pytest.mark.parametrize("columns", [80, 100])
def test_what_it_prints_fits_a_terminal(
    columns: int, rows: dict[str, MethodRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing is cut: every method, with what is said of it above."""
    monkeypatch.setenv("COLUMNS", str(columns))
    figures = {"parameters": 79_122_240, "share": 0.5882, "attach_seconds": 18.57}
    figures |= {"ratio": 12.5, "low": 12.44, "high": 12.54, "within_noise": True}
    noted = figures | {"note": "its classifier; two LoRA adapters beside it, frozen"}
    measured = [{"name": name} | (noted if name == "XLORA" else figures) for name in rows]
    measured[-1] = {"name": "bottleneck double_seq_bn", "why": "w" * 40 + " " + "w" * 49}

    groups, told = _groups([*rows.values()]), _plain_figures(measured)

    lines = "\n".join([*groups, *told]).splitlines()
    assert max(map(len, lines)) <= columns, max(lines, key=len)
    for row in rows.values():
        (group,) = (g for g in groups if f"\n  {row.name} " in f"{g} ".replace("\n", " \n"))
        flat = " ".join(group.split())
        for part in (row.infold, row.peft, row.merge):
            assert " ".join(part.split()) in flat, (row, group)
    text = " ".join(" ".join(told).split())
    assert "79,122,240 58.82% 18.57 s 12.50x 12.44 to 12.54 *" in text
    assert f"XLORA: {noted['note']}" in text
    assert f"bottleneck double_seq_bn was not run: {measured[-1]['why']}" in text


def test_what_libraries_say_is_not_printed() -> None:
    """In a process of its own: most of it is said by imports."""
    tried = "from infold.methods import table; table.peft_types(); print(table._tried('LORA'))"
    ran = subprocess.run([sys.executable, "-c", tried], capture_output=True, text=True)

    assert (ran.stdout, ran.stderr) == ("('yes', False)\n", "")


def test_a_bar_moves_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT and its forty types take half a minute to load and try."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    for at_once in (True, False):
        screen = Terminal()
        monkeypatch.setattr(sys, "stderr", screen)
        with step_progress("trying", False, at_once=at_once):
            pass
        assert ("trying" in screen.getvalue()) == at_once


@pytest.mark.skipif(
    "INFOLD_ADAPTERS_PYTHON" not in os.environ,
    reason="INFOLD_ADAPTERS_PYTHON names no Python with the package adapters",
)
def test_bottleneck_adapters_of_the_real_package(tmp_path: Path) -> None:
    """The counts are the formula's: down, up and their biases, one or two a layer."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    python = os.environ["INFOLD_ADAPTERS_PYTHON"]
    one = 2 * (64 * 4 + 4 + 4 * 64 + 64)  # both layers, reduced by 16

    for kind, parameters in (("seq_bn", one), ("double_seq_bn", 2 * one)):
        found = _bottleneck(python, tmp_path / "base", kind, tokens=4, rounds=1)
        assert found["parameters"] == parameters, found


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    for python, told in ((tmp_path / "no", "No such file"), (Path("/bin/false"), "exit code 1")):
        with pytest.raises(Refusal, match=f"--adapters-python {python}: {told}"):
            _check_python(python)
    done = CliRunner().invoke(app, ["methods", "--adapters-python", "python"])
    assert done.exit_code == 2 and "belongs to --measure" in done.output
    with pytest.raises(Refusal, match="no such file or folder"):
        infold.methods(tmp_path / "nothing")
    done = CliRunner().invoke(app, ["methods", "--measure", str(tmp_path), "--rounds", "0"])
    assert done.exit_code == 2


def test_without_peft_it_lists_what_infold_merges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "find_spec", lambda name: None)
    found = {row.name: row for row in method_rows()}
    assert found["IA3"].infold == "yes" and found["IA3"].peft == "PEFT is not installed"
