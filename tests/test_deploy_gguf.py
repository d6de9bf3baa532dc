"""The smoke test of a GGUF file: llama.cpp's server, against llama.cpp without one."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from typer.testing import CliRunner

import handmade
import infold
from infold.cli.main import app
from infold.deploy import smoke
from infold.deploy.local import LocalFailure
from infold.deploy.server import LOOPBACK
from infold.deploy.smoke import smoke_test
from infold.errors import Refusal

pytest.importorskip("xllamacpp", reason="the extra gguf is not installed")
gguf = pytest.importorskip("gguf", reason="the package gguf, which writes the file, is missing")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("gguf") / "tiny.gguf", seed=0)


def write_llama(path: Path, seed: int, architecture: str = "llama") -> Path:
    """A Llama of two layers and random weights, whose tokens are the 256 bytes."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.BYTE
    types = [kinds[0], kinds[1], kinds[1], *[kinds[2]] * 256]
    width, inner, heads, groups = 64, 96, 4, 2
    file = gguf.GGUFWriter(path, architecture)
    file.add_context_length(256)
    file.add_embedding_length(width)
    file.add_block_count(2)
    file.add_feed_forward_length(inner)
    file.add_head_count(heads)
    file.add_head_count_kv(groups)
    file.add_layer_norm_rms_eps(1e-5)
    file.add_tokenizer_model("llama")
    file.add_token_list(tokens)
    file.add_token_scores([0.0] * len(tokens))
    file.add_token_types(types)
    file.add_bos_token_id(1)
    file.add_eos_token_id(2)
    file.add_unk_token_id(0)
    drawn = np.random.default_rng(seed)

    def add(name: str, *shape: int) -> None:
        values = np.ones(shape) if len(shape) == 1 else drawn.standard_normal(shape) / 8
        file.add_tensor(f"{name}.weight", values.astype(np.float32))

    add("token_embd", len(tokens), width)
    add("output", len(tokens), width)
    add("output_norm", width)
    for n in range(2):
        for name in ("attn_norm", "ffn_norm"):
            add(f"blk.{n}.{name}", width)
        for name in ("attn_q", "attn_output"):
            add(f"blk.{n}.{name}", width, width)
        for name in ("attn_k", "attn_v"):
            add(f"blk.{n}.{name}", width * groups // heads, width)
        for name in ("ffn_gate", "ffn_up"):
            add(f"blk.{n}.{name}", inner, width)
        add(f"blk.{n}.ffn_down", width, inner)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path


def test_a_real_server_answers_as_llama_cpp_does_without_one(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smoke, "_HASTE", 60.0)  # other tests take the cores meanwhile
    before = {p.pid for p in psutil.Process().children(recursive=True)}

    found = smoke_test(tiny, requests=6, seconds=0.1, timeout=60)

    assert found["server"] == "xllamacpp" and found["ok"], found
    assert found["served"] == found["local"] and len(found["served"]) > 3
    assert {p.pid for p in psutil.Process().children(recursive=True)} <= before


def test_a_merged_file_that_was_edited_afterwards_is_refused(tiny: Path, tmp_path: Path) -> None:
    """Before anything is started; as it was merged it is served."""
    vectors = {f"model.layers.{n}.self_attn.v_proj": torch.full((32, 1), 1.5) for n in range(2)}
    out = tmp_path / "merged.gguf"
    infold.merge(tiny, handmade.ia3(tmp_path / "adapter", vectors), out)
    arguments = ["deploy", str(out), "--smoke", "--requests", "6", "--seconds", "0"]
    ran = CliRunner().invoke(app, arguments)  # how fast it answers depends on the machine
    assert ran.exit_code != 2 and "was changed after it was merged" not in ran.output

    content = bytearray(out.read_bytes())
    content[-1] ^= 1
    out.write_bytes(content)
    ran = CliRunner().invoke(app, arguments)
    assert ran.exit_code == 2 and "was changed after it was merged" in ran.output
    ran = CliRunner().invoke(app, ["deploy", str(out)])
    assert ran.exit_code == 2 and "a GGUF file gets no bundle" in ran.output


def test_a_server_with_another_model_is_found_out(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = write_llama(tmp_path / "other.gguf", seed=1)
    ask = smoke.ask_gguf
    monkeypatch.setattr(smoke, "ask_gguf", lambda file, request: ask(other, request))

    ran = CliRunner().invoke(
        app, ["deploy", str(tiny), "--smoke", "--requests", "6", "--seconds", "0"]
    )

    assert ran.exit_code == 1 and "the model in process" in ran.output


def test_a_file_that_llama_cpp_does_not_load_is_told_with_its_reason(
    tiny: Path, tmp_path: Path
) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tiny.read_bytes()[:2000])
    strange = write_llama(tmp_path / "strange.gguf", 0, architecture="nosuch")
    fake = tmp_path / "fake.gguf"
    fake.write_bytes(b"PK\3\4 and more")

    with pytest.raises(LocalFailure, match=r"cut\.gguf.*: failed to read key-value pairs"):
        smoke_test(cut)
    with pytest.raises(LocalFailure, match="unknown model architecture: 'nosuch'"):
        smoke_test(strange)
    with pytest.raises(Refusal, match="does not begin with GGUF"):
        smoke_test(fake)


def test_a_port_in_use_is_refused_before_a_model_is_loaded(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*given: Any) -> str:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(smoke, "ask_gguf", loaded)
    with socket.socket() as taken:
        taken.bind((LOOPBACK, 0))
        taken.listen()
        with pytest.raises(Refusal, match="Address already in use"):
            smoke_test(tiny, port=taken.getsockname()[1])
