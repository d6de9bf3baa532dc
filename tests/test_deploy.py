"""The bundle, the smoke test of a real server, and the checklist."""

from __future__ import annotations

import inspect
import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)
from typer.testing import CliRunner

import infold
import test_convert
from forked import infold_command, trained
from handmade import ia3
from infold.cli.main import app
from infold.deploy import smoke
from infold.deploy.bundle import bundle_problems, deploy_bundle, read_config
from infold.deploy.checklist import Box, check_boxes
from infold.deploy.facts import _cache, read_facts
from infold.deploy.local import LocalFailure, run_local
from infold.deploy.recipes import check_modelfile, check_recipes, recipes
from infold.deploy.records import keep_record, save_record
from infold.deploy.server import LOOPBACK, ServerFailure, free_port, serve
from infold.deploy.smoke import growth, smoke_test
from infold.errors import Refusal

pytestmark = pytest.mark.filterwarnings("ignore")
SERVING = [name for name in ("openai", "fastapi", "uvicorn") if find_spec(name) is None]
SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A tiny Llama with a tokenizer and a README, an IA³ adapter, and the two merged."""
    folder = tmp_path_factory.mktemp("deploy")
    torch.manual_seed(0)
    words = ["<s>", "</s>", "<unk>", *"Name three colours . red green blue the a of".split()]
    raw = Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder / "base")
    tokens = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokens.save_pretrained(folder / "base")
    (folder / "base" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# the base's own\n")
    ia3 = IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"],
        init_ia3_weights=False,
    )  # fmt: skip
    get_peft_model(model, ia3).save_pretrained(folder / "adapter")
    infold.merge(folder / "base", folder / "adapter", folder / "merged")
    return folder / "base", folder / "adapter", folder / "merged"


@pytest.fixture
def merged(made: tuple[Path, Path, Path], tmp_path: Path) -> Path:
    subprocess.run(["cp", "-r", made[2], tmp_path / "merged"], check=True)
    return tmp_path / "merged"


def used(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the code of a bundle's example beside the folder that it names."""
    (cwd / "usage.py").write_text(code)
    return trained(cwd / "usage.py", cwd=cwd)


def contents(folder: Path) -> dict[str, bytes]:
    files = [p for p in folder.rglob("*") if p.is_file()]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def test_the_bundle_lies_beside_the_weights_and_the_proof_still_holds(merged: Path) -> None:
    before = contents(merged)

    done = deploy_bundle(merged, measured=False)

    after = contents(merged)
    assert {n: after[n] for n in before if n != "README.md"} == {
        n: before[n] for n in before if n != "README.md"
    }
    assert after["README.base.md"] == before["README.md"] and done.kept == "README.base.md"
    assert infold.verify(merged).ok
    front = after["README.md"].decode().split("---\n")[1]
    assert yaml.safe_load(front)["license"] == "apache-2.0"
    assert os.access(merged / "serving" / "vllm.sh", os.X_OK)


def test_a_bundle_names_the_folder_that_it_lies_in(made: Any, tmp_path: Path) -> None:
    """Whatever that is called: code and commands run beside it."""
    out = tmp_path / "it's my model"
    infold.merge(made[0], made[1], out, undo=True)
    for place in (None, tmp_path / "other one"):
        config = deploy_bundle(out, place, measured=False).config
        folder = out if place is None else place
        tool, *words = shlex.split(config["rollback"]["command"])
        assert (tool, words[:2]) == ("infold", ["undo", folder.name])
        usage = config["usage_example"]
        assert usage.count(repr(folder.name)) == 2
        ran = used(usage, tmp_path)
        assert ran.returncode == 0, ran.stderr
        assert config["model_info"]["name"] == folder.name.replace("'", "-").replace(" ", "-")


def test_a_second_bundle_keeps_the_first_readme_and_refuses_to_lose_another(merged: Path) -> None:
    deploy_bundle(merged, measured=False)
    first = contents(merged)
    deploy_bundle(merged, measured=False)
    assert contents(merged) == first

    (merged / "README.md").write_text("mine\n")
    with pytest.raises(Refusal, match="would be lost"):
        deploy_bundle(merged, measured=False)
    assert (merged / "README.md").read_text() == "mine\n"


def test_a_proof_still_sees_a_changed_readme_and_strange_files(merged: Path) -> None:
    deploy_bundle(merged, measured=False)
    (merged / "README.base.md").write_text("changed")
    (merged / "serving" / "model.safetensors").write_bytes(b"")

    found = {o.where for o in infold.verify(merged).offenders}
    assert found == {"README.md", "serving/model.safetensors"}


def test_a_new_folder_holds_all_of_it_and_the_old_one_is_left(merged: Path) -> None:
    before = contents(merged)
    out = merged.parent / "delivery"

    deploy_bundle(merged, out, measured=False)

    assert contents(merged) == before
    assert infold.verify(out).ok
    assert not list(out.parent.glob(".delivery*"))
    config = read_config(out)
    assert config is not None and bundle_problems(out, config) == []
    for there in (out, merged):
        with pytest.raises(Refusal, match="exists already; choose another name, or leave --out"):
            deploy_bundle(merged, there, measured=False)


def test_the_figures_are_those_of_transformers(merged: Path) -> None:
    """Parameters, and the cache's size, against a cache that transformers fills."""
    config = deploy_bundle(merged, context=64).config
    model = AutoModelForCausalLM.from_pretrained(merged, dtype="auto")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.zeros(1, 64, dtype=torch.long), past_key_values=cache, use_cache=True)
    filled = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))

    memory = config["deployment_requirements"]["gpu_memory"]
    assert config["model_info"]["parameters"] == model.num_parameters()
    assert memory["kv_cache_bytes"] == filled
    assert memory["weights_bytes"] == sum(p.nbytes for p in model.parameters())
    figures = config["performance_metrics"]
    assert figures["measured"] and figures["rounds"] == 6
    card = (merged / "README.md").read_text()
    for name, unit in (("decode_tokens_per_second", 1), ("first_token_seconds", 1000)):
        found = figures[name]
        assert 0 < found["low"] <= found["median"] <= found["high"]
        assert found["count"] == 6 and found["coverage"] == 1 - 2 / 2**6, "all of six rounds"
        form = ".1f" if unit == 1 else ".0f"
        assert f"({found['low'] * unit:{form}} to {found['high'] * unit:{form}})" in card
    assert "medians of 6 rounds, in brackets intervals that hold them with 97%" in card
    assert config["deployment_requirements"]["packages"]["torch"] == torch.__version__
    ran = used(config["usage_example"], merged.parent)
    assert ran.returncode == 0, ran.stderr


def test_a_classifier_is_loaded_as_what_it_is(made: Any, tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=14, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, pad_token_id=1, num_labels=2,
    )  # fmt: skip
    model = LlamaForSequenceClassification(config)
    model.save_pretrained(tmp_path / "base")
    for file in made[0].glob("tokenizer*"):
        shutil.copy(file, tmp_path / "base")
    ia3 = IA3Config(
        target_modules=["k_proj"], feedforward_modules=[], init_ia3_weights=False,
        task_type="SEQ_CLS",
    )  # fmt: skip
    get_peft_model(model, ia3).save_pretrained(tmp_path / "adapter")
    infold.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")

    done = deploy_bundle(tmp_path / "merged")

    assert done.config["serving"] == ["serving/vllm.sh"], "others do not take it"
    assert "no causal language model" in done.config["performance_metrics"]["why"]
    ran = used(done.config["usage_example"], tmp_path)
    assert ran.returncode == 0 and "logits=tensor" in ran.stdout, ran.stderr
    assert "newly initialized" not in ran.stderr, "of another class"
    assert infold.verify(tmp_path / "merged").ok


HEADS = {"num_hidden_layers": 4, "num_attention_heads": 8, "hidden_size": 64, "dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("more", "found"),
    [
        ({}, 2 * 4 * 8 * 8 * 2),
        ({"num_key_value_heads": 2}, 2 * 4 * 2 * 8 * 2),
        ({"multi_query": True, "num_kv_heads": 8}, 2 * 4 * 1 * 8 * 2),  # Falcon 7B
        ({"multi_query": True, "new_decoder_architecture": True}, 2 * 4 * 8 * 8 * 2),
        ({"layer_types": ["full_attention", "sliding_attention"]}, 2 * 4 * 8 * 8 * 2),
        ({"layer_types": ["full_attention", "linear_attention"]}, None),
        ({"mamba_d_state": 16}, None),
        ({"is_encoder_decoder": True}, None),
        ({"kv_lora_rank": 16}, None),
    ],
)  # fmt: skip
def test_a_cache_that_the_config_does_not_tell_is_no_figure(
    more: dict[str, Any], found: int | None
) -> None:
    cache, why = _cache(HEADS | more, "BF16")
    assert (cache and cache.bytes_per_token) == found and bool(why) == (found is None)
    quantized, _ = _cache({k: v for k, v in HEADS.items() if k != "dtype"}, "I32")
    assert quantized is not None and "2 bytes (F16)" in quantized.formula


def test_recipes_name_the_folder_from_wherever_they_are_called(merged: Path) -> None:
    deploy_bundle(merged, measured=False)
    moved = merged.rename(merged.parent / "it's a new $(place)")
    fake = merged.parent / "vllm"
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    path = f"{fake.parent}{os.pathsep}{os.environ['PATH']}"

    ran = subprocess.run(
        [moved / "serving" / "vllm.sh"], cwd="/", env={**os.environ, "PATH": path},
        capture_output=True, text=True,
    )  # fmt: skip

    assert ran.stdout.splitlines()[:2] == ["serve", str(moved)], ran.stderr


def test_llama_cpp_serves_the_merge_that_lies_there(made: Any, merged: Path) -> None:
    """Not what another merge of that name left beside it, nor a file that came from elsewhere, nor
    half of one; and what is converted already is not converted again."""
    tools = merged.parent / "tools"
    tools.mkdir()
    # converts by the digest of the receipt; the server tells what it would serve
    (tools / "python").write_text(
        '#!/bin/sh\n[ -z "$TORN" ] || { echo half > "$4"; exit 1; }\n'
        'sha256sum < "$2/infold-receipt.json" > "$4"; echo converted\n'
    )
    (tools / "llama-server").write_text('#!/bin/sh\ncat "$2"\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"

    def served(**more: str) -> tuple[str, str]:
        ran = subprocess.run(
            [merged / "serving" / "llamacpp.sh"], capture_output=True, text=True,
            env={**os.environ, "PATH": path, "LLAMA_CPP": "/llama", **more},
        )  # fmt: skip
        return ran.stdout, ran.stderr

    def expected() -> str:
        with open(merged / "infold-receipt.json") as receipt:
            return subprocess.run(
                ["sha256sum"], stdin=receipt, capture_output=True, text=True, check=True
            ).stdout

    (merged.parent / "merged.gguf").write_text("a file from elsewhere\n")
    deploy_bundle(merged, measured=False)
    assert served(TORN="1")[0] == ""
    first = expected()
    assert served() == ("converted\n" + first, "")
    again, told = served()
    assert again == first and "which is there" in told

    infold.merge(made[0], made[1], merged, force=True)
    deploy_bundle(merged, measured=False)
    assert served()[0] == "converted\n" + expected() != "converted\n" + first
    assert served(GGUF=str(merged.parent / "merged.gguf"))[0] == "a file from elsewhere\n"


def test_broken_recipes_are_found(merged: Path) -> None:
    good = recipes(read_facts(merged), 128)

    assert len(good) == 7 and check_recipes(good) == []
    assert check_recipes({"serving/x.sh": "if true; then\n"})[0].startswith("serving/x.sh")
    assert check_modelfile("FORM ..\n") == [
        "line 1: 'FORM' is no instruction", "has 0 FROM lines, not one",
    ]  # fmt: skip


def test_what_is_no_merged_folder_is_refused(made: tuple[Path, Path, Path]) -> None:
    ran = CliRunner().invoke(app, ["deploy", str(made[0])])

    assert ran.exit_code == 2 and "not a merged folder" in ran.output


def test_a_model_without_a_tokenizer_is_refused(merged: Path) -> None:
    for file in merged.glob("tokenizer*"):
        file.unlink()
    before = contents(merged)
    for more in ((), ("--smoke",)):
        ran = CliRunner().invoke(app, ["deploy", str(merged), *more])
        assert ran.exit_code == 2 and "has no tokenizer" in ran.output
    assert contents(merged) == before


def test_a_folder_that_was_edited_afterwards_is_refused(merged: Path) -> None:
    content = bytearray((merged / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (merged / "model.safetensors").write_bytes(content)
    before = contents(merged)
    for more in ((), ("--smoke",)):
        ran = CliRunner().invoke(app, ["deploy", str(merged), *more])
        assert ran.exit_code == 2 and "was changed after it was merged" in ran.output
    assert contents(merged) == before


def test_the_rollback_command_restores_the_base(made: Any, tmp_path: Path) -> None:
    infold.merge(made[0], made[1], tmp_path / "merged", undo=True)
    plan = deploy_bundle(tmp_path / "merged", measured=False).config["rollback"]

    assert plan["exact"] and plan["command"] in (tmp_path / "merged" / "README.md").read_text()
    tool, *words = plan["command"].split()
    assert tool == "infold"
    assert infold_command(*words, cwd=tmp_path).returncode == 0
    assert contents(tmp_path / "base") == contents(made[0])
    infold.swap(tmp_path / "merged", made[1], tmp_path / "swapped")
    assert (tmp_path / "swapped" / "README.md").read_text().endswith("# the base's own\n")


@pytest.mark.parametrize("card", [True, False])
def test_the_base_comes_back_in_place_once_the_bundle_is_gone_as_told(
    card: bool, made: Any, tmp_path: Path
) -> None:
    base, merged = tmp_path / "base", tmp_path / "merged"
    shutil.copytree(made[0], base)
    if not card:
        (base / "README.md").unlink()
    infold.merge(base, made[1], merged, undo=True)
    deploy_bundle(merged, measured=False)
    before = contents(merged)

    for edit in (
        lambda: infold.undo(merged, in_place=True),
        lambda: infold.swap(merged, made[1], in_place=True),
    ):
        with pytest.raises(Refusal, match="the bundle of `infold deploy`") as told:
            edit()
    assert contents(merged) == before and len(told.value.reasons) == 1
    found = re.search(r"gone; remove (.*?)( and rename .*)?, or use --out", str(told.value))
    assert found and bool(found[2]) == card
    for name in found[1].split(", "):
        (merged / name).unlink()
    if card:
        assert found[2] == " and rename README.base.md, the base's, to README.md"
        (merged / "README.base.md").rename(merged / "README.md")
    infold.undo(merged, in_place=True)

    assert contents(merged) == contents(base)


def test_it_tells_spread_and_files_as_they_are(merged: Path) -> None:
    """What it wrote, and what lies there beside it of the model: not what its user keeps there."""
    own = len(contents(merged))
    for name in (".git/HEAD", ".cache/huggingface/x.lock", "notes.txt", "records/mine.json"):
        (merged / name).parent.mkdir(parents=True, exist_ok=True)
        (merged / name).write_text("{}")
    ran = CliRunner().invoke(app, ["deploy", str(merged), "--context", "64"])

    said = " ".join(ran.output.split())
    number = r"[\d.]+"
    spread = rf"\({number} to {number}\)"
    assert re.search(
        rf"measured {number} tokens/s {spread}, first token after {number} s {spread}", said
    ), said
    written, there = re.search(
        r"bundle (\d+) files, beside (\d+) of the merged model", said
    ).groups()
    assert int(there) == own, "the README.md that was there is README.base.md"
    assert int(written) == len(read_config(merged)["bundle"]) + 1, "and the configuration itself"


@pytest.mark.parametrize("named", ["given", "by its commit", "by the adapter", "nowhere"])
def test_the_card_says_whose_files_the_rollback_brings(
    named: str, made: Any, tmp_path: Path
) -> None:
    """A repository of the Hub may be cut into other shards than the copy that was merged."""
    base, adapter, merged = made[0], tmp_path / "adapter", tmp_path / "merged"
    shutil.copytree(made[1], adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "them/their-model" if named == "by the adapter" else None
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    infold.merge(base, adapter, merged, undo=True)
    receipt = merged / "infold-receipt.json"
    commit = "0a" * 20 if named == "by its commit" else ""
    if named in ("given", "by its commit"):  # as where the base was fetched by its id
        told = json.loads(receipt.read_text())
        path = f"them/their-model@{commit}".rstrip("@")
        receipt.write_text(json.dumps(told | {"base": told["base"] | {"path": path}}))

    for undo in (True, False):
        if not undo:
            (merged / "infold-undo.bin").unlink()
        way = deploy_bundle(merged, measured=False).config["rollback"]
        card = " ".join((merged / "README.md").read_text().partition("## Rollback")[2].split())
        at = f" --revision {commit}" if commit else ""
        fetched = f"hf download them/their-model{at} --local-dir base"
        assert way["command"] == (
            "infold undo merged --out base"
            if undo
            else f"cp -r /path/to/{base.name} base"
            if named == "nowhere"
            else fetched
        )
        assert way["command"] in card and "base/model.safetensors" in card
        assert ("cut into the shards that it was merged from" in card) == undo
        warned = "was a copy of it. If that was cut into other shards" in card
        assert warned == (not undo and named == "by the adapter")
        assert ("which tells no commit" in card) == (not undo and named == "given")
        assert ("is the base to keep" in card) == (
            not undo and named in ("given", "by the adapter")
        )
        box = by_title(check_boxes(base, adapter, merged))["rollback plan"]
        unsure = not undo and named in ("given", "by the adapter")
        assert box.status == ("NOT DONE" if unsure else "PASS"), box.evidence
        assert box.evidence.startswith(way["command"])
        assert ("the files there are others" in box.evidence) == unsure
        if unsure:
            assert box.command == f"infold merge {base} {adapter} --out {merged}-2 --undo"


def test_an_architecture_that_is_no_word_is_unknown(merged: Path) -> None:
    facts = read_facts(merged)
    for name in ("class", "None", "a b", ""):
        assert replace(facts, config={"architectures": [name]}).architecture == "unknown"
    assert facts.architecture == "LlamaForCausalLM"


# --- servers -------------------------------------------------------------------------------------


def alive(pids: list[int]) -> list[int]:
    return [p for p in pids if psutil.pid_exists(p) and psutil.Process(p).status() != "zombie"]


def test_a_port_in_use_is_refused() -> None:
    with socket.socket() as taken:
        taken.bind((LOOPBACK, 0))
        taken.listen()
        with pytest.raises(Refusal, match=r"--port \d+: Address already in use"):
            free_port(taken.getsockname()[1])


def test_a_server_that_dies_is_told_with_its_last_words() -> None:
    words = [sys.executable, "-c", "import sys; print('no such model'); sys.exit(3)"]
    with pytest.raises(ServerFailure, match="exit code 3: no such model"):
        with serve(words, free_port(0), timeout=30):
            pass


def test_a_server_that_is_late_is_stopped(tmp_path: Path) -> None:
    note = tmp_path / "pids"
    code = (
        "import os, subprocess, signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
        f"open({str(note)!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}'); time.sleep(600)"
    )
    with pytest.raises(ServerFailure, match="not ready within"):
        with serve([sys.executable, "-c", code], free_port(0), timeout=2):
            pass

    pids = [int(p) for p in note.read_text().split()]
    assert len(pids) == 2 and alive(pids) == [], "it, and what it started, ignore SIGTERM"


@pytest.mark.parametrize(
    ("error", "told"),
    [(psutil.AccessDenied(1), ServerFailure), (KeyboardInterrupt(), KeyboardInterrupt)],
    ids=["no rights", "a second interrupt"],
)
def test_a_server_ends_where_its_processes_cannot_be_listed(
    error: BaseException, told: type[BaseException], tmp_path: Path, monkeypatch: Any
) -> None:
    def children(process: psutil.Process, recursive: bool = False) -> list[psutil.Process]:
        raise error

    note = tmp_path / "pid"
    code = f"import os, time; open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    monkeypatch.setattr(psutil.Process, "children", children)
    with pytest.raises(told) as caught:
        with serve([sys.executable, "-c", code], free_port(0), timeout=3):
            pass
    monkeypatch.undo()

    wait_for(lambda: not alive([int(note.read_text())]))
    assert caught.traceback, "kept until here, and with it the pipe that would end the server"


def test_a_server_ends_with_the_process_that_was_killed(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    server = f"import os, time; open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    code = (
        "import sys; from infold.deploy.server import serve\n"
        f"with serve([sys.executable, '-c', {server!r}], 1, timeout=600): pass"
    )
    ours = subprocess.Popen([sys.executable, "-c", code])
    wait_for(lambda: note.exists() and note.read_text())
    ours.send_signal(signal.SIGKILL)
    ours.wait()

    wait_for(lambda: not alive([int(note.read_text())]))


def wait_for(condition: Any, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def test_growth_is_found_and_noise_is_not() -> None:
    flat = [1000 << 20] * 9
    assert growth([1.0] * 9, flat) == []
    assert growth([0.002] * 3 + [0.02] * 6, flat) == [], "a few ms"
    assert growth([0.5, 1.5, 1.0] * 3, [*flat[:8], flat[0] + (60 << 20)]) == []
    assert "latency grew" in growth([1, 1, 1, 2, 2, 2, 3, 3, 3], flat)[0]
    assert "memory grew" in growth([1.0] * 9, [n << 20 for n in range(1000, 1900, 100)])[0]


# Answers as it is told to: leaks, becomes slower, says another thing, hangs, dies or fails.
FALSE_SERVER = """
import http.server, json, os, sys, time
kept, asked, how = [], 0, sys.argv[2]
class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *words): pass
    def answer(self, code, body):
        self.send_response(code); self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body))); self.end_headers()
        self.wfile.write(body)
    def do_GET(self): self.answer(200, b"{}")
    def do_POST(self):
        global asked
        asked += 1
        self.rfile.read(int(self.headers["Content-Length"]))
        text = "red"
        if how == "leak": kept.append(os.urandom(24 << 20))
        if how == "slow": time.sleep(0.02 * asked**2)
        if how == "other" and asked > 3: text = "blue"
        if how == "hang" and asked > 3: time.sleep(60)
        if how == "die" and asked > 3: print("out of memory"); sys.stdout.flush(); os._exit(5)
        if how == "fail" and asked > 3: return self.answer(500, b"{}")
        self.answer(200, json.dumps({"id": "1", "object": "text_completion", "created": 0,
            "model": "m", "choices": [{"index": 0, "text": text, "finish_reason": "stop"}]}
            ).encode())
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.mark.skipif(bool(SERVING), reason=f"the extra serve is missing: {SERVING}")
@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("well", None),
        ("leak", "memory grew from"),
        ("slow", "latency grew from"),
        ("other", "4 of 6 answers differ from the first"),
        ("hang", "the server did not answer: Request timed out"),
        ("die", "the server died with exit code 5: out of memory"),
        ("fail", "the server did not answer"),
    ],
)
def test_a_server_that_misbehaves_is_found_out(
    merged: Path, monkeypatch: pytest.MonkeyPatch, how: str, told: str | None
) -> None:
    def command(folder: Path, port: int) -> list[str]:
        return [sys.executable, "-c", FALSE_SERVER, str(port), how]

    monkeypatch.setattr(smoke, "_transformers", command)
    monkeypatch.setattr(smoke, "run_local", lambda *words, **given: {"text": "red"})
    before = {p.pid for p in psutil.Process().children(recursive=True)}

    few = ("--requests", "6", "--seconds", "0", "--timeout", "8")
    ran = CliRunner().invoke(app, ["deploy", str(merged), "--smoke", *few])

    assert ran.exit_code == (0 if told is None else 1), ran.output
    if told is not None:
        assert told in ran.output + str(ran.exception)
    assert {p.pid for p in psutil.Process().children(recursive=True)} <= before


@pytest.mark.skipif(bool(SERVING), reason=f"the extra serve is missing: {SERVING}")
def test_a_real_server_answers_as_the_model_does(
    made: Any, merged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smoke, "_HASTE", 60.0)  # other tests take the cores meanwhile
    before = {p.pid for p in psutil.Process().children(recursive=True)}

    found = smoke_test(merged, requests=6, seconds=1, timeout=240)

    assert found["same"] and found["ok"], found
    assert found["served"] and found["receipt"] == read_facts(merged).digest
    assert {p.pid for p in psutil.Process().children(recursive=True)} <= before

    save_record(merged, found)
    deploy_bundle(merged, measured=False)
    boxes = by_title(check_boxes(made[0], made[1], merged))
    assert boxes["functions normally"].status == boxes["stable over time"].status == "PASS"
    assert boxes["merged"].status == "PASS"


# --- the checklist -------------------------------------------------------------------------------


def by_title(boxes: list[Box]) -> dict[str, Box]:
    return {box.title: box for box in boxes}


def test_nothing_is_ticked_that_was_not_done(made: tuple[Path, Path, Path], merged: Path) -> None:
    boxes = by_title(check_boxes(made[0], made[1], merged))

    done = {title for title, box in boxes.items() if box.status == "PASS"}
    assert done == {"adapter trained and saved", "merged", "parameter count unchanged"}
    assert {b.status for t, b in boxes.items() if t not in done} == {"NOT DONE"}
    verbs = {command.callback.__name__ for command in app.registered_commands if command.callback}
    named = [box.command.split()[:2] for box in boxes.values() if box.command]
    assert all(tool == "infold" and verb in verbs for tool, verb in named)


@pytest.fixture(scope="module")
def delivered(made: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, adapter and merged, with all that the checklist asks for. The records of the slow verbs
    are written by hand."""
    root = tmp_path_factory.mktemp("delivered")
    for name, source in zip(("base", "adapter"), made, strict=False):
        shutil.copytree(source, root / name)
    losses = {"eval_first": 1.0, "eval_last": 0.5, "eval_accuracy": None}
    write_json(root / "adapter" / "infold-training.json", {"losses": losses, "steps": 3})
    merged = root / "merged"
    infold.merge(root / "base", root / "adapter", merged, undo=True)
    deploy_bundle(merged)
    compared = {"model": "merged", "ratio": 1.0, "low": 0.99, "high": 1.01, "coverage": 0.95}
    for told in (
        {
            "kind": "bench",
            "models": {"base": {"load_seconds": {"median": 0.5}}},
            "comparisons": [
                {"what": "speed", "metric": "prefill seconds", **compared},
                {"what": "memory", "metric": "loaded bytes", **compared},
            ],
        },
        {
            "kind": "outputs", "ok": True, "continuations": [{"differs_at": None}],
            "differences": {"merged": {"agreement": 1.0, "positions": 40}},
        },
        {
            "kind": "smoke", "same": True, "stable": True, "problems": [], "server": "transformers",
            "served": "red", "local": "red", "requests": 9, "seconds": 2.0,
            "latency_seconds": {"median": 0.1}, "memory_bytes": {"first": 1000, "last": 1000},
        },
    ):  # fmt: skip
        keep_record(merged, told, print)
    return root


def write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content))


def changed(name: str, *place: str | int, value: Any) -> Callable[[Path], None]:
    """What puts a value into a JSON file below the root."""

    def change(root: Path) -> None:
        whole = inner = json.loads((root / name).read_text())
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = value
        write_json(root / name, whole)

    return change


def untrained(root: Path) -> None:
    file = root / "adapter" / "adapter_model.safetensors"
    ones = {name: torch.ones_like(tensor) for name, tensor in load_file(file).items()}
    save_file(ones, file, {"format": "pt"})


def other_weights(root: Path) -> None:
    file = root / "merged" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def lost_tensor(root: Path) -> None:
    file = root / "merged" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file, {"format": "pt"})


def other_recipe(root: Path) -> None:
    with open(root / "merged" / "serving" / "vllm.sh", "a") as script:
        script.write("--port 1\n")


BENCH, SMOKE = "merged/records/bench.json", "merged/records/smoke.json"
CONFIG = "merged/deployment_config.json"
# by the box: what it is there to notice, and which others must notice that too
BREAKS: dict[str, tuple[Callable[[Path], Any], set[str]]] = {
    "adapter trained and saved": (untrained, {"merged"}),
    "validated on held-out data": (
        changed("adapter/infold-training.json", "losses", "eval_last", value=1.5), set()
    ),
    "baseline recorded": (
        changed(BENCH, "models", "base", "load_seconds", "median", value="fast"), set()
    ),
    "merged": (other_weights, set()),
    "parameter count unchanged": (lost_tensor, {"merged"}),
    "functions normally": (changed(SMOKE, "same", value=False), set()),
    "speed": (changed(BENCH, "comparisons", 0, "low", value=1.05), set()),
    "memory": (changed(BENCH, "comparisons", 1, "low", value=1.05), set()),
    "outputs sampled": (changed("merged/records/outputs.json", "ok", value=False), set()),
    "stable over time": (changed(SMOKE, "stable", value=False), set()),
    "configuration saved": (other_recipe, set()),
    "benchmark recorded": (
        changed(CONFIG, "performance_metrics", "decode_tokens_per_second", value="fast"), set()
    ),
    "rollback plan": (lambda root: (root / "merged" / "infold-undo.bin").unlink(), {"merged"}),
    "API notes": (
        lambda root: (root / "merged" / "serving" / "vllm.sh").unlink(), {"configuration saved"}
    ),
}  # fmt: skip


def test_every_box_can_be_ticked(delivered: Path) -> None:
    boxes = check_boxes(*(delivered / name for name in ("base", "adapter", "merged")))

    assert [box.title for box in boxes] == list(BREAKS), "each has its break below"
    assert {box.status for box in boxes} == {"PASS"}, boxes


@pytest.mark.parametrize("title", BREAKS)
def test_every_box_notices_what_it_is_there_for(
    title: str, delivered: Path, tmp_path: Path
) -> None:
    root = shutil.copytree(delivered, tmp_path / "root")
    breaks, others = BREAKS[title]
    breaks(root)

    boxes = check_boxes(*(root / name for name in ("base", "adapter", "merged")))

    assert {box.title for box in boxes if box.status == "FAIL"} == {title, *others}, boxes


@pytest.mark.parametrize("kind", ["bench", "outputs", "smoke"])
def test_no_box_is_ticked_by_the_record_of_another_merge(
    kind: str, delivered: Path, tmp_path: Path
) -> None:
    root = shutil.copytree(delivered, tmp_path / "root")
    changed(f"merged/records/{kind}.json", "receipt", value="0" * 64)(root)

    boxes = check_boxes(*(root / name for name in ("base", "adapter", "merged")))

    failed = {
        "bench": {"baseline recorded", "speed", "memory"},
        "outputs": {"outputs sampled"},
        "smoke": {"functions normally", "stable over time"},
    }
    assert {box.title for box in boxes if box.status == "FAIL"} == failed[kind], boxes


def test_of_a_gguf_file_it_tells_what_there_is_instead(made: Any, tmp_path: Path) -> None:
    file = tmp_path / "my merged.gguf"
    file.write_bytes(b"GGUF")
    ran = CliRunner().invoke(app, ["checklist", *map(str, (made[0], made[1], file))])

    said = ran.output + str(ran.exception)
    assert ran.exit_code == 2 and "the checklist takes merged folders" in said
    assert f"`infold verify '{file}'`" in said and f"`infold deploy '{file}' --smoke`" in said


@pytest.mark.parametrize("method", ["ia3", "lora", "dora"])
def test_training_again_is_suggested_beside_the_adapter(
    method: str, made: Any, merged: Path, tmp_path: Path
) -> None:
    """Under its own name a --force would replace it, and without --method by another kind."""
    adapter = tmp_path / "my adapter"
    (tmp_path / "my adapter-2").mkdir()
    shutil.copytree(made[1], adapter)
    if method != "ia3":
        model = AutoModelForCausalLM.from_pretrained(made[0])
        other = LoraConfig(target_modules=["k_proj"], use_dora=method == "dora")
        get_peft_model(model, other).save_pretrained(adapter)

    boxes = by_title(check_boxes(made[0], f"{adapter}/", merged))

    for title in ("adapter trained and saved", "validated on held-out data"):
        words = shlex.split(boxes[title].command)
        told = dict(zip(words[4::2], words[5::2], strict=True))
        assert told["--out"] == f"{tmp_path}/my adapter-3" and told["--method"] == method


def test_what_was_changed_afterwards_fails(made: tuple[Path, Path, Path], merged: Path) -> None:
    deploy_bundle(merged, measured=False)
    with open(merged / "serving" / "vllm.sh", "a") as script:
        script.write("if\n")
    weights = merged / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    save_record(merged, {"kind": "smoke", "receipt": "0" * 64, "same": True, "stable": True})

    ran = CliRunner().invoke(app, ["checklist", *map(str, (made[0], made[1], merged)), "--json"])

    assert ran.exit_code == 1
    boxes = {b["title"]: b for b in json.loads(ran.stdout.splitlines()[0])["boxes"]}
    failed = {title for title, box in boxes.items() if box["status"] == "FAIL"}
    assert failed == {
        "merged", "functions normally", "stable over time", "configuration saved",
    }  # fmt: skip
    assert "another merge" in boxes["functions normally"]["evidence"]


@pytest.mark.parametrize("kind", ["bnb-nf4-nested", "awq"])
@pytest.mark.parametrize("way", ["fold", "dequantize", "requantize"])
def test_weights_that_are_stored_otherwise_are_as_many(way: str, kind: str, tmp_path: Path) -> None:
    """Doubly quantized scales become floats, codes become dense: a right merge fails no box."""
    base = test_convert.make_base(tmp_path / "base", test_convert.FORMATS[kind]).path
    if way == "fold":
        vectors = test_convert.vectors()
        adapter = ia3(tmp_path / "adapter", vectors, feedforward_modules=["down_proj"])
    else:
        adapter = test_convert.low_rank(tmp_path / "adapter")
    merged = tmp_path / "merged"
    infold.merge(base, adapter, merged, **({} if way == "fold" else {way: True}))

    boxes = by_title(check_boxes(base, adapter, merged))

    box = boxes["parameter count unchanged"]
    assert (box.status, boxes["merged"].status) == ("PASS", "PASS"), box.evidence
    moved = way == "dequantize" or kind == "bnb-nf4-nested"
    assert ("stored otherwise now" in box.evidence) == moved

    weights = merged / "model.safetensors"
    right = load_file(weights)
    module = "model.layers.0.self_attn.q_proj"
    codes = {n for n in right if n.startswith(f"{module}.") and not n.endswith(".bias")}
    wrong = {
        "of no quantized weight": {
            **right,
            "model.layers.0.input_layernorm.weight": torch.ones(32),
        },
        "a bias of another shape": {**right, f"{module}.bias": torch.ones(32)},
        "a lost bias": {n: t for n, t in right.items() if n != f"{module}.bias"},
        "a lost weight": {n: t for n, t in right.items() if n not in codes},
        "what is no part of a weight": {**right, f"{module}.strange": torch.ones(2)},
    }
    for what, tensors in wrong.items():
        save_file(tensors, weights, metadata={"format": "pt"})
        boxes = by_title(check_boxes(base, adapter, merged))
        assert boxes["parameter count unchanged"].status == "FAIL", what


def test_a_rollback_to_another_base_is_no_plan(made: Any, merged: Path, tmp_path: Path) -> None:
    """The same tensors in another file: what would be served again is not what was merged."""
    subprocess.run(["cp", "-r", made[0], tmp_path / "base"], check=True)
    deploy_bundle(merged, measured=False)
    for metadata, status in ((None, "PASS"), ({"format": "pt", "other": "1"}, "FAIL")):
        if metadata:
            file = tmp_path / "base" / "model.safetensors"
            save_file(load_file(file), file, metadata=metadata)
        box = by_title(check_boxes(tmp_path / "base", made[1], merged))["rollback plan"]
        assert box.status == status, box.evidence
    assert "not the one that was merged" in box.evidence


def test_the_library_does_what_the_commands_do(
    made: tuple[Path, Path, Path], merged: Path, tmp_path: Path
) -> None:
    done = infold.deploy(merged, context=64, no_measure=True)
    record = infold.checklist(made[0], made[1], merged)
    page = infold.report(merged, tmp_path / "page.md")

    assert done["config"] == json.loads((merged / "deployment_config.json").read_text())
    assert record == json.loads((merged / "records" / "checklist.json").read_text())
    ran = CliRunner().invoke(app, ["checklist", *map(str, (made[0], made[1], merged)), "--json"])
    told = {box["title"]: box["status"] for box in json.loads(ran.stdout.splitlines()[0])["boxes"]}
    assert {box["title"]: box["status"] for box in record["boxes"]} == told
    assert all(title in page.read_text() for title in told)
    with pytest.raises(TypeError, match="writes no bundle"):
        infold.deploy(merged, tmp_path / "out", smoke=True)


def test_names_and_defaults_are_the_commands_own() -> None:
    """but for the library's progress, and the commands' ways to print."""
    for verb in ("deploy", "checklist", "report"):
        (command,) = (
            c.callback
            for c in app.registered_commands
            if c.callback and c.callback.__name__ == verb
        )
        told, ours = (
            {n: p.default for n, p in inspect.signature(f).parameters.items()}
            for f in (command, getattr(infold, verb))
        )
        told = {n: v for n, v in told.items() if n not in ("as_json", "quiet")}
        told = {{"licence": "license"}.get(n, n): v for n, v in told.items()}
        ours.pop("progress", None)
        ours |= {"record": None} if "record" in ours else {}  # a list, which no default may be
        assert ours == told


def test_a_folder_that_cannot_be_written_costs_the_record_alone(merged: Path) -> None:
    (merged / "records").write_text("a file where a folder would be\n")
    told: list[str] = []

    keep_record(merged, {"kind": "bench"}, told.append)

    assert len(told) == 1 and "the bench record was not kept" in told[0]


def test_an_infinite_difference_is_a_record_all_the_same(made: Any, merged: Path) -> None:
    """JSON has no infinity: of a wrong merge the record would be unreadable, and its FAIL lost."""
    one = {"largest": math.inf, "mean": math.nan, "agreement": 0.5, "positions": 4}
    checks = [{"what": "far", "measured": math.inf, "bound": 0.25, "ok": False}]
    perplexity = {"base": 9.0, "adapter": 8.0, "merged": math.inf}
    record = {"kind": "outputs", "ok": False, "checks": checks, "differences": {"merged": one}}
    record |= {"perplexity": perplexity, "continuations": [], "tokens": 3, "notes": []}

    keep_record(merged, record, print)

    assert by_title(check_boxes(made[0], made[1], merged))["outputs sampled"].status == "FAIL"
    page = infold.report(merged, merged.parent / "page.md").read_text()
    assert "| FAIL | far | not finite | 2.50e-01 |" in page and "merged not finite" in page


def test_times_that_are_none_are_refused(merged: Path) -> None:
    for words in (["--seconds", "nan"], ["--seconds", "-1"], ["--timeout", "0"]):
        ran = CliRunner().invoke(app, ["deploy", str(merged), "--smoke", *words])
        assert ran.exit_code == 2 and "must be 0 or more, the second above 0" in ran.output


def test_an_adapter_that_was_never_trained_fails(made: Any, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(made[0])
    ia3 = IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    get_peft_model(model, ia3).save_pretrained(tmp_path / "fresh")
    infold.merge(made[0], tmp_path / "fresh", tmp_path / "merged")

    boxes = by_title(check_boxes(made[0], tmp_path / "fresh", tmp_path / "merged"))
    assert boxes["adapter trained and saved"].status == "FAIL"


def test_parts_that_are_never_as_they_began_tell_nothing(made: Any, tmp_path: Path) -> None:
    """DoRA's magnitudes are the base's norms, and a saved module is the base's, before training."""
    model = AutoModelForCausalLM.from_pretrained(made[0])
    dora = LoraConfig(
        target_modules=["k_proj"], use_dora=True, modules_to_save=["lm_head"], task_type="CAUSAL_LM"
    )
    get_peft_model(model, dora).save_pretrained(tmp_path / "fresh")
    infold.merge(made[0], tmp_path / "fresh", tmp_path / "merged")

    boxes = by_title(check_boxes(made[0], tmp_path / "fresh", tmp_path / "merged"))
    assert boxes["adapter trained and saved"].status == "FAIL"


def test_a_baseline_without_figures_is_none(made: Any, merged: Path) -> None:
    for base, status in (({}, "NOT DONE"), ({"load_seconds": {"median": 0.5}}, "PASS")):
        save_record(merged, {"kind": "bench", "models": {"base": base}, "comparisons": []})
        box = by_title(check_boxes(made[0], made[1], merged))["baseline recorded"]
        assert box.status == status
    assert box.evidence == "load seconds: 0.5"


def test_figures_of_an_old_or_edited_configuration_fail(made: Any, merged: Path) -> None:
    deploy_bundle(merged, measured=False)
    config = json.loads((merged / "deployment_config.json").read_text())
    good = {"median": 5.0, "low": 4.0, "high": 6.0}
    for rate, status in (
        (good, "PASS"), ({"median": 5.0}, "FAIL"), (5.0, "FAIL"), ({**good, "low": "4"}, "FAIL"),
    ):  # fmt: skip
        told = {"measured": True, "device": "cpu", "decode_tokens_per_second": rate}
        config["performance_metrics"] = told
        (merged / "deployment_config.json").write_text(json.dumps(config))
        box = by_title(check_boxes(made[0], made[1], merged))["benchmark recorded"]
        assert box.status == status, box.evidence
    assert "make it again" in box.evidence


@pytest.mark.parametrize(
    ("title", "file", "change"),
    [
        ("validated on held-out data", "infold-training.json", {"losses": ["a"]}),
        ("validated on held-out data", "infold-training.json",
         {"losses": {"eval_first": "high", "eval_last": "low"}}),
        ("benchmark recorded", "deployment_config.json", {"performance_metrics": "good"}),
        ("rollback plan", "deployment_config.json", {"rollback": "easy"}),
        ("API notes", "deployment_config.json", {"serving": ["../evil.sh"]}),
        ("API notes", "deployment_config.json", {"serving": 3}),
        ("baseline recorded", "records/bench.json", {"models": ["base"]}),
    ],
)  # fmt: skip
def test_a_file_that_was_edited_by_hand_fails_its_box(
    made: Any, merged: Path, tmp_path: Path, title: str, file: str, change: dict[str, Any]
) -> None:
    deploy_bundle(merged, measured=False)
    adapter = shutil.copytree(made[1], tmp_path / "adapter")
    save_record(merged, {"kind": "bench", "models": {}, "comparisons": []})
    place = (adapter if "training" in file else merged) / file
    told = json.loads(place.read_text()) if place.exists() else {}
    place.write_text(json.dumps(told | change))

    boxes = by_title(check_boxes(made[0], adapter, merged))
    assert boxes[title].status == "FAIL"
    assert boxes[title].evidence.startswith(f"{file} cannot be read, make it again: ")


def test_a_vocabulary_of_another_size_is_named(made: Any, tmp_path: Path) -> None:
    """Saved embeddings with more rows; but only as many as the receipt tells."""
    rows = 16
    model = AutoModelForCausalLM.from_pretrained(made[0])
    model.resize_token_embeddings(rows)
    saved = LoraConfig(target_modules=["k_proj"], modules_to_save=["embed_tokens", "lm_head"])
    get_peft_model(model, saved).save_pretrained(tmp_path / "adapter")
    merged = tmp_path / "merged"
    infold.merge(made[0], tmp_path / "adapter", merged)

    box = by_title(check_boxes(made[0], tmp_path / "adapter", merged))["parameter count unchanged"]
    assert box.status == "PASS", box.evidence
    assert f"lm_head.weight, of 13 rows, which the adapter replaces by {rows}" in box.evidence

    weights = merged / "model.safetensors"
    tensors = load_file(weights)
    save_file({**tensors, "lm_head.weight": torch.ones(rows + 1, 32)}, weights, {"format": "pt"})
    box = by_title(check_boxes(made[0], tmp_path / "adapter", merged))["parameter count unchanged"]
    assert box.status == "FAIL" and "lm_head.weight" in box.evidence


def test_validation_is_read_from_the_training_record(made: Any, merged: Path) -> None:
    record = made[1] / "infold-training.json"
    try:
        for last, status in ((0.5, "PASS"), (1.5, "FAIL")):
            losses = {"eval_first": 1.0, "eval_last": last, "eval_accuracy": None}
            record.write_text(json.dumps({"losses": losses, "steps": 3}))
            boxes = by_title(check_boxes(made[0], made[1], merged))
            assert boxes["validated on held-out data"].status == status
    finally:
        record.unlink()


def test_measuring_tells_how_far_it_is_and_ends_in_time(merged: Path) -> None:
    steps: list[tuple[int, int]] = []

    deploy_bundle(merged, context=64, progress=lambda done, of, _: steps.append((done, of)))

    assert steps == [(n, 7) for n in range(1, 8)]
    began = time.monotonic()
    with pytest.raises(LocalFailure, match="did not measure within 1 s"):
        run_local("measure", merged, timeout=1, prompt_tokens=8, new_tokens=100, rounds=10**6)
    assert time.monotonic() - began < 30


def test_loading_is_not_the_import_of_the_models_code(merged: Path) -> None:
    """transformers imports it when it makes a model: some seconds, once, of no model's own."""
    found = run_local("measure", merged, prompt_tokens=8, new_tokens=2, rounds=1)

    began = time.monotonic()
    code = "import sys; from infold.machine import import_model_code as f; f(sys.argv[1])"
    code += "; print('transformers.models.llama.modeling_llama' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code, str(merged)], capture_output=True, text=True)
    assert ran.stdout.strip() == "True", ran.stderr
    assert found["load_seconds"] < (time.monotonic() - began) / 2


def test_a_measuring_process_ends_with_the_one_that_asked(merged: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from infold.deploy.local import run_local\n"
        "run_local('measure', Path(sys.argv[1]), prompt_tokens=8, new_tokens=100, rounds=10**6,"
        " progress=lambda *_: print('step', flush=True))"
    )
    ours = subprocess.Popen(
        [sys.executable, "-c", code, str(merged)], stdout=subprocess.PIPE, text=True
    )
    assert ours.stdout is not None and ours.stdout.readline() == "step\n"
    children = [p.pid for p in psutil.Process(ours.pid).children(recursive=True)]
    ours.kill()
    ours.wait()

    assert len(children) == 1
    wait_for(lambda: not alive(children))
