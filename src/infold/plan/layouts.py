"""Where storage differs from Linear's (out, in), and which ends of a model share one tensor.

The layer decides about transposition, not the saved `fan_in_fan_out`, which PEFT corrects in
memory only. A non-square weight shows its layout by its shape; for a square one the neighbours do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

from infold.checkpoint.shards import Checkpoint

__all__ = [
    "HEADS",
    "INPUT_EMBEDDINGS",
    "is_conv1d",
    "is_end",
    "is_tied",
    "leaf",
    "numeric",
    "other_ends",
    "part_config",
    "text_keys",
    "vocabularies",
]

# transformers' Conv1D stores (in, out). model_type -> last components of its Conv1D modules
_GPT2 = ("c_attn", "c_proj", "c_fc", "q_attn")
_CONV1D = {
    "gpt2": _GPT2,
    "openai-gpt": ("c_attn", "c_proj", "c_fc"),
    "imagegpt": _GPT2,
    "decision_transformer": _GPT2,
    "clvp": _GPT2,
    "clvp_decoder": _GPT2,
}
# What parts of a model are called in tensor names, where their configs are not called so
_PARTS = {
    "language_model": "text_config",
    "text_model": "text_config",
    "vision_model": "vision_config",
    "vision_tower": "vision_config",
    "visual": "vision_config",
    "audio_tower": "audio_config",
}

INPUT_EMBEDDINGS = (
    "embed_tokens",
    "wte",
    "word_embeddings",
    "embed_in",
    "tok_embeddings",
    "tokens_embed",
)
HEADS = ("lm_head", "embed_out")

# model_type -> modules of the embedding and of the head, where a name says too little by itself
_OTHER_ENDS = {
    "biogpt": ("biogpt.embed_tokens", "output_projection"),
    "ctrl": ("transformer.w", "lm_head"),
    "falcon_mamba": ("backbone.embeddings", "lm_head"),
    "flaubert": ("transformer.embeddings", "pred_layer.proj"),
    "git": ("git.embeddings.word_embeddings", "output"),
    "gpt_neox_japanese": ("gpt_neox_japanese.embed_in", "embed_out"),
    "mamba": ("backbone.embeddings", "lm_head"),
    "mamba2": ("backbone.embeddings", "lm_head"),
    "modernbert-decoder": ("model.embeddings.tok_embeddings", "decoder"),
    "rwkv": ("rwkv.embeddings", "head"),
    "trocr": ("model.decoder.embed_tokens", "output_projection"),
    "whisper": ("model.decoder.embed_tokens", "proj_out"),  # its decoder alone
    "xlm": ("transformer.embeddings", "pred_layer.proj"),
    "xlnet": ("transformer.word_embedding", "lm_loss"),
}
# The configs, below a model's own, of a part that generates text
_TEXT = ("text_config", "llm_config", "language_config")


def leaf(parameter: str) -> str:
    """The last component of a parameter's module: `q_proj` of `...self_attn.q_proj.weight`."""
    return parameter.rpartition(".")[0].rpartition(".")[2]


def numeric(path: str) -> bool:
    """Whether a module path holds a layer number."""
    return any(part.isdigit() for part in path.split("."))


def is_conv1d(base: Checkpoint, weight: str, fan_in_fan_out: bool) -> bool | None:
    """Whether a matrix is stored as (in, out). None: it cannot be told.

    The adapter's shapes have no say: those of a wrong adapter would choose the layout that fits.
    """
    last = leaf(weight)
    kind = _kind(base, weight)
    if kind in _CONV1D:
        return last in _CONV1D[kind]
    if weight.removesuffix("weight") + "bias" not in base.where:
        return False  # Conv1D has a bias always
    if weight.removesuffix("out_proj.weight") + "in_proj_weight" in base.where:
        return False  # MultiheadAttention's, which is a Linear
    rows, columns = base.info(weight).shape
    if rows != columns:
        return _by_shape(base, weight) is True
    named: set[bool] = set()  # what modules of the same name show
    around: dict[int, set[bool]] = {}  # and the others, by how much of their path is the weight's
    place = weight.split(".")
    for name in base.where:
        if not name.endswith(".weight") or (shown := _by_shape(base, name)) is None:
            continue
        if leaf(name) == last:
            named.add(shown)
        path = name.split(".")
        shared = next((n for n, (a, b) in enumerate(zip(place, path, strict=False)) if a != b), 0)
        around.setdefault(shared, set()).add(shown)
    votes = named or (around[max(around)] if around else set())
    if len(votes) == 1:
        return votes.pop()
    if votes or (fan_in_fan_out and kind is None):  # PEFT saves it as the layers were, mostly
        return None
    return False


def _by_shape(base: Checkpoint, weight: str) -> bool | None:
    """Whether a matrix and its bias show that it is stored as (in, out). None: they do not."""
    bias = weight.removesuffix("weight") + "bias"
    shape = base.info(weight).shape
    if len(shape) != 2 or shape[0] == shape[1] or bias not in base.where:
        return None
    length = base.info(bias).shape
    return length == shape[1:] if length in (shape[:1], shape[1:]) else None


def _configs(base: Checkpoint, tensor: str) -> list[Mapping[str, Any]]:
    """The model's config, and those nested in it, down to that of the part with a tensor."""
    found: list[Mapping[str, Any]] = [base.config or {}]
    for part in tensor.split("."):
        for key in (part, f"{part}_config", _PARTS.get(part, "")):
            if isinstance(below := found[-1].get(key), dict):
                found.append(below)
                break
    return found


def _kind(base: Checkpoint, tensor: str) -> str | None:
    """The model_type of the part of the model that a tensor belongs to, by the nested configs."""
    told = (config.get("model_type") for config in reversed(_configs(base, tensor)))
    return next((kind for kind in told if isinstance(kind, str)), None)


def part_config(base: Checkpoint, tensor: str) -> Mapping[str, Any]:
    """The config of the part of the model that a tensor belongs to; the model's own where names do
    not tell the part."""
    return _configs(base, tensor)[-1]


def other_ends(base: Checkpoint) -> tuple[tuple[str, str], ...]:
    """(embedding, head), as modules, that go by the model's type. Without a config: by names that
    no other type has."""
    if base.config is None:
        return tuple(
            ends
            for ends in _OTHER_ENDS.values()
            if ends[0].rpartition(".")[2] not in INPUT_EMBEDDINGS
        )
    kind = base.config.get("model_type")
    return (_OTHER_ENDS[kind],) if isinstance(kind, str) and kind in _OTHER_ENDS else ()


def is_end(base: Checkpoint, name: str) -> bool:
    """Whether a tensor is by its name a table of tokens: an input embedding, or an output head."""
    module = name.removesuffix(".weight")
    known = leaf(name) in (*INPUT_EMBEDDINGS, *HEADS) or module in chain(*other_ends(base))
    return known and name.endswith(".weight")


def text_keys(config: Mapping[str, object]) -> tuple[str, ...]:
    """The keys of those configs below a model's own that tell of the part that generates text."""
    return tuple(key for key in _TEXT if isinstance(config.get(key), dict))


def is_tied(base: Checkpoint) -> bool | None:
    """Whether the output head shares the input embedding's tensor. None: there is no config.

    Where the config and that of its text model or decoder disagree, transformers mostly takes the
    one that ties.
    """
    if base.config is None:
        return None
    flags = [
        bool(config["tie_word_embeddings"])
        for config in (base.config, *(base.config.get(key) for key in (*_TEXT, "decoder")))
        if isinstance(config, dict) and "tie_word_embeddings" in config
    ]
    return any(flags) if flags else True  # transformers' default where the config is silent


def vocabularies(config: Mapping[str, object]) -> Iterator[int]:
    """The numbers of tokens that a config and the ones nested in it tell."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from vocabularies(value)
        elif type(value) is int and key != "type_vocab_size":  # kinds of segments, two mostly
            if key.endswith("vocab_size") or key in ("n_words", "n_vocab"):
                yield value
