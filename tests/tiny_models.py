"""Tiny models of many architectures. Their weights are random."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    LlavaConfig,
    OPTConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2VLConfig,
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


def bart(**options: Any) -> Any:
    """BART, with embeddings that are scaled."""
    config = BartConfig(
        vocab_size=31, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, **TOKENS,
        max_position_embeddings=64, decoder_start_token_id=2, forced_eos_token_id=None,
        scale_embedding=True, **options,
    )  # fmt: skip
    return BartForConditionalGeneration(config)


TEXT = GROUPED | {"vocab_size": 64}
PATCHES = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    image_size=16, patch_size=8,
)  # fmt: skip
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 1e4}


def gemma3(tie: bool) -> PreTrainedConfig:
    """The text model's own flag stays true: transformers does not look at it."""
    return Gemma3Config(
        text_config=TEXT, vision_config=PATCHES, tie_word_embeddings=tie, mm_tokens_per_image=4,
        image_token_index=62, boi_token_index=61, eoi_token_index=60,
    )  # fmt: skip


def llava(tie: bool) -> PreTrainedConfig:
    return LlavaConfig(
        text_config={"model_type": "llama", "tie_word_embeddings": tie} | TEXT,
        vision_config={"model_type": "clip_vision_model", "projection_dim": 16} | PATCHES,
        tie_word_embeddings=tie,
        image_token_index=62,
    )


def qwen2_vl(tie: bool) -> PreTrainedConfig:
    text = {key: value for key, value in TEXT.items() if key != "head_dim"}
    return Qwen2VLConfig(
        text_config=text | {"rope_parameters": ROPE},
        vision_config=dict(depth=2, embed_dim=16, hidden_size=16, num_heads=4, patch_size=4),
        tie_word_embeddings=tie, image_token_id=62, video_token_id=61,
        vision_start_token_id=60, vision_end_token_id=59,
    )  # fmt: skip


VISION_MODELS = {"gemma3": gemma3, "llava": llava, "qwen2_vl": qwen2_vl}
