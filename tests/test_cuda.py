"""What runs on a GPU, against the same on the CPU. Skipped where there is none; the bytes of merges
are in test_same_bytes.py. Tiny random models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import infold
from infold.bench.run import measure_models
from infold.tuners import IA3Config, LoraConfig, attach
from infold.verify.outputs import prove_outputs
from test_tuners import randomized
from tiny_models import model_inputs, new_model
from training import save_base, sums, write_jsonl

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this PyTorch sees no CUDA device"),
    pytest.mark.usefixtures("calm"),
    pytest.mark.filterwarnings("default"),
]
KINDS = {
    "lora": lambda: LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]),
    "dora": lambda: LoraConfig(r=4, target_modules=["q_proj", "down_proj"], use_dora=True),
    "ia3": IA3Config,
}


def adapted(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """The same model with the same adapter, on the CPU."""
    return randomized(attach(new_model("llama").to(dtype), KINDS[kind]()), 1)


def inputs(device: str) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in model_inputs("llama").items()}


@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_gradients_are_those_of_the_cpu(kind: str) -> None:
    found = []
    for device in ("cpu", "cuda"):
        model = adapted(kind).to(device)
        given = inputs(device)
        result = model(**given, labels=given["input_ids"])
        result.loss.backward()
        gradients = [p.grad.cpu() for p in model.parameters() if p.grad is not None]
        found.append([result.logits.detach().cpu(), *gradients])

    assert len(found[0]) > 4
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_in_memory_gives_the_bytes_of_the_cpu_and_unmerging_the_base(kind: str) -> None:
    base = {n: t.clone() for n, t in new_model("llama").bfloat16().state_dict().items()}
    model = adapted(kind, torch.bfloat16).cuda()
    wanted = adapted(kind, torch.bfloat16).merge_and_unload().state_dict()

    for _ in range(3):
        model.merge_adapter()
        model.unmerge_adapter()
    assert all(torch.equal(base[n], t.cpu()) for n, t in model.state_dict().items() if n in base)
    merged = model.merge_and_unload().state_dict()

    assert all(t.is_cuda for t in merged.values())
    assert all(torch.equal(wanted[name], t.cpu()) for name, t in merged.items())
    assert any(not torch.equal(base[name], t.cpu()) for name, t in merged.items())


def test_each_row_has_its_adapter() -> None:
    model = adapted("ia3").cuda()
    attach(model, KINDS["ia3"](), "other")
    randomized(model, 5)
    given = inputs("cuda")
    rows = []
    for name in ("default", "other"):
        model.set_adapter(name)
        rows.append(model(**given).logits)

    mixed = model(**given, adapter_names=["other", "default"]).logits

    torch.testing.assert_close(mixed, torch.stack([rows[1][0], rows[0][1]]), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(rows[0], rows[1], rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_by_inductor(kind: str) -> None:
    model = adapted(kind).cuda().eval()
    given = inputs("cuda")
    with torch.no_grad():
        wanted = model(**given).logits
        found = torch.compile(model)(**given).logits

    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("options", [{"method": "ia3"}, {"method": "lora", "bf16": True}])
def test_a_trained_adapter_merges_to_the_same_bytes(
    options: dict[str, Any], tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base")
    data = write_jsonl(tmp_path / "sums.jsonl", sums(22))

    infold.train(base, data, tmp_path / "adapter", steps=30, batch_size=8, lr=2e-2, **options)
    infold.merge(base, tmp_path / "adapter", tmp_path / "merged", device="cuda")

    trained = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    idle = [n for n, t in trained.items() if len(t.unique()) == 1]  # as they began: all 1, or all 0
    assert trained and not idle
    assert infold.verify(base, tmp_path / "adapter", tmp_path / "merged").ok
    infold.merge(base, tmp_path / "adapter", tmp_path / "on-the-cpu")
    one, two = (load_file(tmp_path / f / "model.safetensors") for f in ("merged", "on-the-cpu"))
    assert all(torch.equal(one[name], two[name]) for name in two)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("one", "two"), [("cpu", "cuda"), ("cuda", "cpu"), ("cuda", "cuda")])
def test_the_way_back_on_another_device(kind: str, one: str, two: str, tmp_path: Path) -> None:
    model = new_model("llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    randomized(attach(model, KINDS[kind]()), 1).save_pretrained(tmp_path / "adapter")
    infold.merge(
        tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", undo=True, device=one
    )

    infold.undo(tmp_path / "merged", tmp_path / "again", device=two)
    infold.swap(tmp_path / "merged", tmp_path / "adapter", tmp_path / "swapped", device=two)

    folders = ("base", "again", "merged", "swapped")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in folders]
    assert weights[0] == weights[1] and weights[2] == weights[3] and weights[0] != weights[2]


def test_outputs_are_proven_and_measured(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    randomized(attach(model, KINDS["lora"]()), 1).save_pretrained(tmp_path / "adapter")
    infold.merge(base, tmp_path / "adapter", tmp_path / "merged")
    given = [base, tmp_path / "adapter", tmp_path / "merged"]

    proof = prove_outputs(given[0], [given[1]], given[2], new_tokens=4, device="cuda")
    record = measure_models(
        *given, batches=(1,), prompt_tokens=8, new_tokens=4, rounds=2, starts=1, device="cuda"
    )

    assert proof.ok, proof.checks
    assert record["models"]["merged"]["cuda_bytes"]["median"] > 0
