"""Modules that modules_to_save names, and of which the adapter's file has no tensors: refused where
the base has one, which would stay; told where it is not known that something is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor

import handmade
import infold
from infold import Refusal
from tiny_models import SIZE, TOKENS, new_model

Q = "model.layers.0.q_proj"
BASE = {
    f"{Q}.weight": (6, 4), "model.embed_tokens.weight": (9, 4), "lm_head.weight": (9, 4),
    "model.layers.0.norm.weight": (4,), "model.layers.1.norm.weight": (4,),
}  # fmt: skip
UPDATE = {f"{Q}.lora_A.weight": torch.ones(2, 4), f"{Q}.lora_B.weight": torch.ones(6, 2)}
SCORE = {"score.weight": torch.ones(3, 4)}


def merged(
    folder: Path,
    saved: list[str],
    held: dict[str, Tensor],
    more: dict[str, tuple[int, ...]] | None = None,
    model: dict[str, Any] | None = None,
    **fields: Any,
) -> list[str]:
    """The notes of a merge; its adapter also holds `held`, its base also has `more`."""
    tensors = {name: torch.zeros(shape) for name, shape in (BASE | (more or {})).items()}
    if model and model["tie_word_embeddings"]:
        del tensors["lm_head.weight"]
    base = handmade.base_folder(folder / "base", tensors, model)
    config = {"peft_type": "LORA", "r": 2, "modules_to_save": saved, **fields}
    adapter = handmade.adapter_folder(folder / "adapter", UPDATE | held, config)
    notes = infold.merge(base, adapter, folder / "out").notes
    return [note.partition(": ")[2] for note in notes if "modules_to_save" in note]


TIED = {
    "tie_word_embeddings": True, "model_type": "llama", "architectures": ["LlamaForCausalLM"],
}  # fmt: skip
OTHER = {"classifier.weight": (3, 4)}
AUTOMATIC = ["classifier", "score"]
LOST: dict[str, tuple[list[str], list[str], dict[str, Any]]] = {
    "a head": (["lm_head"], ["lm_head"], {}),
    "two at once": (["lm_head", "embed_tokens"], ["lm_head", "model.embed_tokens"], {}),
    "all of a name": (["norm"], ["model.layers.0.norm", "model.layers.1.norm"], {}),
    "what holds others": (["layers"], ["model.layers"], {}),
    "a tied head": (["lm_head"], ["lm_head"], {"model": TIED}),
    "a classifier": (AUTOMATIC, ["classifier"], {"more": OTHER, "task_type": "SEQ_CLS"}),
}


@pytest.mark.parametrize("case", LOST)
def test_what_the_base_has_in_its_place_is_refused(tmp_path: Path, case: str) -> None:
    saved, places, options = LOST[case]
    with pytest.raises(Refusal) as refused:
        merged(tmp_path, saved, {}, **options)

    told = [reason.partition("adapter: ")[2] for reason in refused.value.reasons]
    assert [words.partition(",")[0] for words in told] == [
        f"holds no tensors of {p}" for p in places
    ]
    assert not (tmp_path / "out").exists()


NORMS = {f"layers.{number}.norm.weight": torch.ones(4) for number in (0, 1)}
IN_MODEL = {f"model.{name}": norm for name, norm in NORMS.items()}
TOO = ", which modules_to_save names too: the base's stay"
KEPT: dict[str, tuple[list[str], dict[str, Tensor], dict[str, Any], str]] = {
    "one of PEFT's two": (AUTOMATIC, SCORE, {"task_type": "SEQ_CLS"}, ""),
    "one of them, for tokens": (AUTOMATIC, SCORE, {"task_type": "TOKEN_CLS"}, ""),
    "one of them, and the base has the other": (
        AUTOMATIC, SCORE, {"task_type": "SEQ_CLS", "more": OTHER},
        f"holds no tensors of classifier{TOO}",
    ),
    "a task without a head": (
        AUTOMATIC, {}, {"task_type": "SEQ_CLS"}, "modules_to_save names classifier, score, of",
    ),
    "a name that nobody knows": (
        ["value_head"], {}, {}, "modules_to_save names value_head, of which neither",
    ),
    "some of a name": (
        ["norm"], {"model.layers.0.norm.weight": torch.ones(4)}, {},
        f"holds no tensors of model.layers.1.norm{TOO}",
    ),
    "all of a name": (["norm"], IN_MODEL, {}, ""),
    "another beginning": (["norm"], NORMS, {}, ""),
}  # fmt: skip


@pytest.mark.parametrize("case", KEPT)
def test_what_may_be_meant_is_told(tmp_path: Path, case: str) -> None:
    saved, held, options, told = KEPT[case]
    notes = merged(tmp_path, saved, held, **options)
    assert len(notes) == bool(told) and all(note.startswith(told) for note in notes)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_an_adapter_of_a_classifier_as_peft_saves_it(tmp_path: Path, calm: None, kind: str) -> None:
    """PEFT names `classifier` and `score`; Llama's head is the one, BERT's is the other."""
    model: Any = new_model("llama")
    if kind == "bert":
        config = hf.BertConfig(**SIZE, max_position_embeddings=16, **TOKENS)
        model = hf.BertForSequenceClassification(config)
    model.save_pretrained(tmp_path / "base")
    auto = hf.AutoModelForSequenceClassification
    adapted = peft.get_peft_model(
        auto.from_pretrained(tmp_path / "base"), peft.LoraConfig(task_type="SEQ_CLS", r=2)
    )
    adapted.save_pretrained(tmp_path / "adapter")
    told = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert sorted(told["modules_to_save"]) == AUTOMATIC

    notes = infold.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out").notes

    assert not [note for note in notes if "modules_to_save" in note]
    if kind == "bert":
        file = tmp_path / "adapter" / "adapter_model.safetensors"
        left = {n: value for n, value in load_file(file).items() if "classifier" not in n}
        save_file(left, file, {"format": "pt"})
        with pytest.raises(Refusal, match="holds no tensors of classifier, which modules_to_save"):
            infold.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "other")
