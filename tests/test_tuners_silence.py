"""What an adapter lacks, what an option would have asked for, and what was left out, is told."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import MambaConfig, MambaForCausalLM, MixtralConfig, MixtralForCausalLM

from forked import infold_command
from infold.checkpoint.adapter import open_adapter
from infold.checkpoint.untrained import untrained
from infold.errors import Refusal
from infold.tuners import IA3Config, LoraConfig, attach, load
from tiny_models import new_model
from training import save_base

pytestmark = pytest.mark.usefixtures("calm")


def saved(folder: Path, config: Any, keep: str) -> Path:
    """An adapter of a tiny Llama, of which the file holds only the tensors with `keep` in them."""
    attach(new_model("llama"), config).save_pretrained(folder)
    file = folder / "adapter_model.safetensors"
    tensors = {name: value for name, value in load_file(file).items() if keep in name}
    assert tensors
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def test_targets_without_tensors_are_told(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    half = saved(tmp_path / "half", config, "layers.0.self_attn.q_proj")

    told = r"holds no tensors for model.layers.0.self_attn.v_proj and \d+ more, which target_mod"
    with pytest.warns(UserWarning, match=told):
        load(new_model("llama"), half)

    whole = saved(tmp_path / "whole", config, "")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(new_model("llama"), whole)


def test_a_saved_module_without_tensors_is_refused(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    folder = saved(tmp_path, config, "q_proj")
    model = new_model("llama")

    with pytest.raises(Refusal, match="holds no tensors of lm_head, which modules_to_save names"):
        load(model, folder)

    assert not hasattr(model, "peft_config")


def test_a_saved_adapter_that_would_do_nothing_is_told(tmp_path: Path) -> None:
    sizes = MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=31)
    LoraConfig(r=2, target_modules=["out_proj"]).save_pretrained(tmp_path)
    parts = {"lora_A": torch.ones(2, 32), "lora_B": torch.ones(16, 2)}
    tensors = {
        f"base_model.model.backbone.layers.{number}.mixer.out_proj.{part}.weight": value.clone()
        for number in range(2)
        for part, value in parts.items()
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    told = r"layers\.0\.mixer\.out_proj: MambaMixer reads this weight without calling the module"

    with pytest.warns(UserWarning, match=rf"{told}.* until it is merged, and 1 more like it"):
        model = load(MambaForCausalLM(sizes), tmp_path)
    before = model.backbone.layers[0].mixer.out_proj.weight.clone()
    merged = model.merge_and_unload().backbone.layers[0].mixer.out_proj.weight
    assert not torch.equal(merged, before)

    with pytest.raises(Refusal, match=told) as refused:
        load(MambaForCausalLM(sizes), tmp_path, trainable=True)
    assert len(refused.value.reasons) == 2


def test_options_that_would_be_ignored_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = attach(new_model("llama"), IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    asked: list[tuple[str, str | None]] = []

    def deliver(repo: str, revision: str | None = None, **_: Any) -> str:
        asked.append((repo, revision))
        return str(saved(tmp_path / "hub", IA3Config(target_modules=["k_proj"],
                                                     feedforward_modules=[]), ""))  # fmt: skip

    monkeypatch.setattr("huggingface_hub.snapshot_download", deliver)
    model.load_adapter("org/name", "b", revision="v2", subfolder=None)
    assert asked == [("org/name", "v2")]
    for name, wrong in (("subfolder", "x"), ("low_cpu_mem_usage", True), ("nonsense", 1)):
        with pytest.raises(Refusal, match=f"load_adapter: {name}: not known here"):
            model.load_adapter(tmp_path / "hub", "c", **{name: wrong})
    model.load_adapter(tmp_path / "hub", "d", autocast_adapter_dtype=True)  # as it is anyway
    with pytest.raises(Refusal, match="load_adapter: autocast_adapter_dtype: not known here"):
        model.load_adapter(tmp_path / "hub", "c", autocast_adapter_dtype=False)
    for name, wrong in (
        ("safe_serialization", False), ("path_initial_model_for_weight_conversion", "x"),
    ):  # fmt: skip
        with pytest.raises(Refusal, match=name):
            model.save_pretrained(tmp_path / "out", **{name: wrong})
    assert not (tmp_path / "out").exists()
    model.save_pretrained(tmp_path / "out", max_shard_size="5GB", token=None)
    assert (tmp_path / "out/adapter_config.json").exists()


def test_a_training_tells_of_experts_that_no_target_reaches(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    size = json.loads((base / "config.json").read_text())["vocab_size"]
    sizes = MixtralConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=size, num_local_experts=2, max_position_embeddings=64,
    )  # fmt: skip
    MixtralForCausalLM(sizes).save_pretrained(base)
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "1 + 2 =", "completion": " 3"}\n' * 8)

    ran = infold_command(
        "train", base, data, "--method", "ia3", "--steps", 1, "--out", tmp_path / "out",
        kind="training",
    )  # fmt: skip

    assert ran.returncode == 0, ran.stderr
    told = [line for line in ran.stdout.splitlines() if line.startswith("note")]
    assert len([line for line in told if "experts" in line]) == 1
    notes = json.loads((tmp_path / "out/infold-training.json").read_text())["notes"]
    assert [note for note in notes if "experts" in note]


class _Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.lin1 = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.lin1(self.lin0(x))
        return out


def test_a_weight_that_is_computed_cannot_be_merged_into() -> None:
    model = _Pair()
    nn.utils.parametrizations.weight_norm(model.lin0)
    config = IA3Config(target_modules=["lin0"], feedforward_modules=[])
    adapted = attach(model, config)

    for merge in (adapted.merge_adapter, adapted.merge_and_unload):
        with pytest.raises(Refusal, match="lin0: its weight is computed from others"):
            merge()


def test_torchao_weights_are_no_plain_ones() -> None:
    torchao = pytest.importorskip("torchao.quantization")
    model = _Pair().bfloat16()
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    config = IA3Config(target_modules=["lin0", "lin1"], feedforward_modules=["lin1"])
    adapted = attach(model, config)
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    assert adapted(x).dtype == torch.bfloat16

    for merge in (adapted.merge_adapter, adapted.merge_and_unload):
        with pytest.raises(Refusal, match=r"lin0: (a|the weight of a) Linear"):
            merge()


@pytest.mark.parametrize("dora", [False, True])
def test_peft_s_own_new_adapter_is_told_as_one(tmp_path: Path, dora: bool) -> None:
    """Of an embedding it is the other factor that begins with zeros."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], use_dora=dora)
    model = peft.get_peft_model(new_model("llama"), config)
    model.save_pretrained(tmp_path / "new")
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_embedding_A" in n)[0, 0] = 1e-3
    model.save_pretrained(tmp_path / "trained")

    assert "was it trained?" in str(untrained(open_adapter(tmp_path / "new")))
    assert untrained(open_adapter(tmp_path / "trained")) is None
