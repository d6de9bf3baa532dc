"""Tiny models of many architectures. Their weights are random."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    Qwen2Config,
    RobertaConfig,
    T5Config,
)

SIZE = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, vocab_size=31
)  # fmt: skip
GROUPED = SIZE | dict(num_key_value_heads=2, head_dim=4)
TOKENS = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
GPT2_SIZE = dict(n_embd=16, n_layer=2, n_head=4, n_positions=16, vocab_size=31)

MODELS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**GROUPED, **TOKENS),
    "qwen2": Qwen2Config(**GROUPED, **TOKENS),  # biases on q, k and v
    "gemma2": Gemma2Config(**GROUPED, **TOKENS),
    "gemma3": Gemma3TextConfig(**GROUPED, **TOKENS),
    "gpt2": GPT2Config(**GPT2_SIZE, **TOKENS),  # Conv1D, of which attn.c_proj is square
    "opt": OPTConfig(**SIZE, **TOKENS, ffn_dim=24, word_embed_proj_dim=16),
    "gptj": GPTJConfig(**GPT2_SIZE, **TOKENS, rotary_dim=2),
    "gpt_neox": GPTNeoXConfig(**SIZE, **TOKENS),  # fused q, k, v
    "bloom": BloomConfig(hidden_size=16, n_layer=2, n_head=4, vocab_size=31, **TOKENS),
    "falcon": FalconConfig(**SIZE, **TOKENS, ffn_hidden_size=24),
    "t5": T5Config(d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, vocab_size=31, **TOKENS),
    "bert": BertConfig(**SIZE, max_position_embeddings=16, **TOKENS),
    "roberta": RobertaConfig(**SIZE, max_position_embeddings=16, **TOKENS),
}
AUTO = {
    "t5": AutoModelForSeq2SeqLM,
    "bert": AutoModelForMaskedLM,
    "roberta": AutoModelForMaskedLM,
}


def token_ids(rows: int = 2, top: int = 31) -> Tensor:
    return torch.randint(3, top, (rows, 7), generator=torch.Generator().manual_seed(9))


def model_inputs(name: str) -> dict[str, Tensor]:
    ids = token_ids()
    return {"input_ids": ids} | ({"decoder_input_ids": ids.flip(1)} if name == "t5" else {})


def new_model(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    config = MODELS[name].__class__.from_dict(MODELS[name].to_dict() | options)
    return AUTO.get(name, AutoModelForCausalLM).from_config(config)
