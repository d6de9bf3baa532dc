"""Conv1D, which stores (in, out), below an outer model_type and beside Linear layers.

The cross attention's q_attn of a GPT-2 decoder is always square: nothing of its own tells how it is
stored. The oracle is PEFT's forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftConfig
from torch import Tensor
from transformers import (
    BertConfig,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    GPT2Config,
    PreTrainedConfig,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
)

import handmade
import infold
from infold import Refusal
from infold.tuners import load
from peft_oracle import Bench, read_tensors
from tiny_models import GPT2_SIZE, SIZE, TOKENS, token_ids

VIT = SIZE | {"image_size": 8, "patch_size": 4}
PIXELS = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(4))
KINDS: dict[str, tuple[Any, Any, PreTrainedConfig, dict[str, Tensor]]] = {
    "text": (
        EncoderDecoderModel, EncoderDecoderConfig,
        BertConfig(**SIZE, max_position_embeddings=16), {"input_ids": token_ids()},
    ),
    "vision": (
        VisionEncoderDecoderModel, VisionEncoderDecoderConfig,
        ViTConfig(**{k: v for k, v in VIT.items() if k != "vocab_size"}), {"pixel_values": PIXELS},
    ),
}  # fmt: skip


def captioner(bench: Bench, name: str) -> tuple[Path, Any, dict[str, Tensor]]:
    """(base, class, inputs) of a GPT-2 decoder with cross attention below an encoder."""
    torch.manual_seed(0)
    kind, outer, encoder, inputs = KINDS[name]
    decoder = GPT2Config(**GPT2_SIZE, **TOKENS, add_cross_attention=True, is_decoder=True)
    config = outer.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    base = bench.base(kind(config=config))
    return base, kind, inputs | {"decoder_input_ids": token_ids().flip(1)}


def lora(**options: Any) -> Callable[[], PeftConfig]:
    return lambda: LoraConfig(r=3, lora_alpha=5, target_modules=["q_attn"], **options)


def ia3(*ff: str) -> Callable[[], PeftConfig]:
    return lambda: IA3Config(  # the other square one makes the effect large enough to be seen
        target_modules=["q_attn", "crossattention.c_proj"], feedforward_modules=list(ff)
    )


METHODS = {
    "lora": lora(fan_in_fan_out=True),
    "lora, saved flag wrong": lora(),
    "dora": lora(use_dora=True, fan_in_fan_out=True),
    "ia3": ia3(),
    "ia3 on inputs": ia3("q_attn"),
    "all": lambda: LoraConfig(  # square Linears of the encoder, with biases too
        r=3, target_modules=["q_attn", "c_attn", "attn.c_proj", "query", "key"]
    ),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", KINDS)
def test_the_square_conv1d_of_a_decoder_is_known_below_another_type(
    bench: Bench, name: str, method: str
) -> None:
    base, kind, inputs = captioner(bench, name)
    bench.prove(kind, base, METHODS[method](), inputs)


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "ia3 on inputs"])
def test_memory_and_disk_agree_on_it(bench: Bench, method: str) -> None:
    base, kind, _ = captioner(bench, "text")
    adapter = bench.save(bench.attach(bench.load(kind, base), METHODS[method]()))
    merged = bench.merge(base, adapter)

    inner = load(bench.load(kind, base), adapter).merge_and_unload().state_dict()

    edited = [edit["tensor"] for edit in merged.receipt.edits if "q_attn" in edit["tensor"]]
    assert edited
    for name in edited:
        assert torch.equal(inner[name], merged.tensors[name])
        assert not torch.equal(inner[name], read_tensors(base)[name])


# what tells of a square weight with a bias in a model of a type that is not known
NEIGHBOURS: dict[str, tuple[dict[str, tuple[int, int]], bool | None]] = {
    "siblings are Conv1D": ({"attn.kv": (4, 8), "up": (8, 4)}, True),
    "siblings are Linear": ({"attn.kv": (8, 4), "up": (4, 8)}, False),
    "its name elsewhere": ({"other.q": (4, 8), "attn.kv": (8, 4)}, True),
    "neighbours do not agree": ({"attn.k": (4, 8), "attn.v": (8, 4)}, None),
}


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_a_square_weight_of_an_unknown_type_is_told_by_its_neighbours(
    tmp_path: Path, name: str
) -> None:
    shapes, transposed = NEIGHBOURS[name]
    widths = {"up": 4, "attn.kv": 8, "attn.k": 8, "attn.v": 8, "other.q": 8}
    tensors = {"h.0.attn.q.weight": torch.zeros(4, 4), "h.0.attn.q.bias": torch.zeros(4)}
    for module, shape in shapes.items():
        tensors[f"h.0.{module}.weight"] = torch.zeros(shape)
        tensors[f"h.0.{module}.bias"] = torch.zeros(widths[module])
    config = {"model_type": "new", "decoder": {"model_type": "newer"}}
    base = handmade.base_folder(tmp_path / "base", tensors, config)
    a, b = torch.arange(4.0).view(1, 4), torch.tensor([[1.0], [0], [0], [2]])
    adapter = handmade.adapter_folder(
        tmp_path / "adapter",
        {"h.0.attn.q.lora_A.weight": a} | {"h.0.attn.q.lora_B.weight": b},
        {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q"]},
    )
    if transposed is None:
        with pytest.raises(Refusal, match=r"attn\.q\.weight is square, and nothing tells"):
            infold.merge(base, adapter, tmp_path / "out")
        return
    infold.merge(base, adapter, tmp_path / "out")
    update = b @ a
    found = read_tensors(tmp_path / "out")["h.0.attn.q.weight"]
    assert torch.equal(found, update.T if transposed else update)
