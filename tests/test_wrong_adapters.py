"""Adapters whose shapes happen to fit a base that they were not made for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import infold

PRE = "base_model.model."


def model(folder: Path, tensors: dict[str, torch.Tensor], **config: object) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return folder


def adapter(folder: Path, parts: dict[str, torch.Tensor], **config: object) -> Path:
    folder.mkdir()
    save_file(parts, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("method", ["ia3", "lora"])
def test_shapes_that_fit_only_when_transposed_do_not_make_a_linear_a_conv1d(
    tmp_path: Path, method: str
) -> None:
    """A key projection without grouped heads on a base that has them."""
    base = model(tmp_path / "base", {"model.layers.0.k_proj.weight": torch.ones(4, 16)})
    path = PRE + "model.layers.0.k_proj"
    if method == "ia3":
        wrong = adapter(
            tmp_path / "a", {path + ".ia3_l": torch.full((16, 1), 2.0)}, peft_type="IA3"
        )
    else:
        parts = {
            path + ".lora_A.weight": torch.ones(2, 4),
            path + ".lora_B.weight": torch.ones(16, 2),
        }
        wrong = adapter(tmp_path / "a", parts, peft_type="LORA", r=2, lora_alpha=2)

    with pytest.raises(infold.Refusal, match=r"k_proj"):
        infold.merge(base, wrong, tmp_path / "out")


def test_two_keys_of_one_adapter_for_one_tensor_are_refused(tmp_path: Path) -> None:
    base = model(tmp_path / "base", {"model.layers.0.q.weight": torch.ones(4, 4)})
    parts = {
        f"{PRE}{prefix}model.layers.0.q.{part}.weight": torch.ones(*shape)
        for prefix in ("", "x.")
        for part, shape in (("lora_A", (2, 4)), ("lora_B", (4, 2)))
    }
    twice = adapter(tmp_path / "a", parts, peft_type="LORA", r=2, lora_alpha=2)

    with pytest.raises(infold.Refusal, match=r"x\.model\.layers.*one of them would be lost"):
        infold.merge(base, twice, tmp_path / "out")


def test_trained_tokens_do_not_overwrite_an_earlier_adapter(tmp_path: Path) -> None:
    base = model(
        tmp_path / "base",
        {"model.embed_tokens.weight": torch.ones(8, 4), "lm_head.weight": torch.zeros(8, 4)},
        tie_word_embeddings=False,
    )
    key = PRE + "model.embed_tokens.token_adapter.trainable_tokens_delta"
    both = [
        adapter(
            tmp_path / name,
            {key: torch.full((1, 4), value)},
            peft_type="LORA",
            trainable_token_indices=[5],
        )
        for name, value in (("one", 2.0), ("two", 3.0))
    ]

    with pytest.raises(infold.Refusal, match="an earlier adapter"):
        infold.merge(base, both, tmp_path / "out")


def test_a_head_that_differs_on_disk_is_not_taken_for_tied(tmp_path: Path) -> None:
    tensors = {"model.embed_tokens.weight": torch.ones(8, 4), "lm_head.weight": torch.zeros(8, 4)}
    base = model(tmp_path / "base", tensors)  # silent about ties: the default is tied
    key = PRE + "model.embed_tokens.token_adapter.trainable_tokens_delta"
    tokens = adapter(
        tmp_path / "a",
        {key: torch.full((1, 4), 2.0)},
        peft_type="LORA",
        trainable_token_indices=[5],
    )
    infold.merge(base, tokens, tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")

    assert torch.equal(merged["lm_head.weight"], tensors["lm_head.weight"])
    assert merged["model.embed_tokens.weight"][5].tolist() == [2.0] * 4


@pytest.mark.parametrize(
    "config",
    [
        {"lora_alpha": int("1" + "0" * 400)},
        {"alpha_pattern": {"(?i)q": 2}},
        {"rank_pattern": {"a{99999999999999}": 2}},
    ],
)
def test_hostile_numbers_and_patterns_are_refused(
    tmp_path: Path, config: dict[str, object]
) -> None:
    base = model(tmp_path / "base", {"model.layers.0.q.weight": torch.ones(4, 4)})
    parts = {
        f"{PRE}model.layers.0.q.lora_A.weight": torch.ones(2, 4),
        f"{PRE}model.layers.0.q.lora_B.weight": torch.ones(4, 2),
    }
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, **config}
    hostile = adapter(tmp_path / "a", parts, **settings)

    with pytest.raises(infold.Refusal):
        infold.merge(base, hostile, tmp_path / "out")


def test_a_config_with_infinity_is_a_config(tmp_path: Path) -> None:
    base = model(
        tmp_path / "base", {"model.layers.0.q.weight": torch.ones(4, 4)}, limit=float("inf")
    )
    scale = {PRE + "model.layers.0.q.ia3_l": torch.full((4, 1), 2.0)}
    infold.merge(base, adapter(tmp_path / "a", scale, peft_type="IA3"), tmp_path / "out")

    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()
