"""A tiny random model with a tokenizer that merges across words, and data for it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

WORDS = ("the film was good and fine", "a bad awful plot", "what is two plus two? four")
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% if m.role == 'assistant' %}</s>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SIZE = dict(
    vocab_size=320, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
    num_attention_heads=4, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    max_position_embeddings=64,
)  # fmt: skip


def new_tokenizer(kind: str = "bytes") -> Any:
    """bytes: byte-level BPE that begins a text with <s>. spaces: puts a space before a text."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=kind == "spaces"))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if kind == "bytes":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
        alphabet = sorted("▁\n" + "".join(map(chr, range(33, 127))))
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(WORDS * 20, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def save_base(folder: Path, kind: str = "llama", chat: str | None = CHAT, **options: Any) -> Path:
    """A tiny random model and its tokenizer, on disk. options: of a llama's config."""
    torch.manual_seed(0)
    if kind == "llama":
        model: Any = LlamaForCausalLM(LlamaConfig(**SIZE | options, num_key_value_heads=2))
    elif kind == "bloom":
        model = BloomForCausalLM(BloomConfig(vocab_size=320, hidden_size=16, n_layer=1, n_head=2))
    else:
        model = BertForMaskedLM(BertConfig(**SIZE))
    model.save_pretrained(folder)
    tokenizer = new_tokenizer()
    tokenizer.chat_template = chat
    tokenizer.save_pretrained(folder)
    return folder


def save_rounded_base(folder: Path) -> Path:
    """As `save_base`, in bfloat16, where merging n times is not merging once."""
    save_base(folder)
    LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sums(count: int) -> list[dict[str, str]]:
    """Prompts and completions of different lengths."""
    return [
        {"prompt": f"what is {i} plus" + " two" * (i % 3), "completion": f" {i} the film" + "!" * i}
        for i in range(count)
    ]
