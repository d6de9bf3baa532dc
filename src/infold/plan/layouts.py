"""Where storage differs from Linear's (out, in), and which ends of a model share one tensor.

The layer decides about transposition, not the saved `fan_in_fan_out`, which PEFT corrects in
memory only. A non-square weight shows its layout by its shape; for a square one the neighbours do.
"""

from __future__ import annotations

from infold.checkpoint.shards import Checkpoint

__all__ = ["HEADS", "INPUT_EMBEDDINGS", "is_conv1d", "is_tied", "leaf", "numeric"]

# transformers' Conv1D stores (in, out). model_type -> last components of its Conv1D modules
_CONV1D = {
    "gpt2": ("c_attn", "c_proj", "c_fc", "q_attn"),
    "openai-gpt": ("c_attn", "c_proj", "c_fc"),
    "imagegpt": ("c_attn", "c_proj", "c_fc", "q_attn"),
    "decision_transformer": ("c_attn", "c_proj", "c_fc", "q_attn"),
    "clvp": ("c_attn", "c_proj", "c_fc", "q_attn"),
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
    kind = (base.config or {}).get("model_type")
    if isinstance(kind, str) and kind in _CONV1D:
        return last in _CONV1D[kind]
    rows, columns = base.info(weight).shape
    own = weight.removesuffix("weight") + "bias"
    if rows != columns:  # Conv1D has a bias always
        return own in base.where and base.info(own).shape == (columns,)
    votes = set()
    for name in base.where:
        if not name.endswith(f".{last}.weight"):
            continue
        shape, bias = base.info(name).shape, name.removesuffix("weight") + "bias"
        if len(shape) == 2 and shape[0] != shape[1] and bias in base.where:
            votes.add(base.info(bias).shape == shape[1:])
    if len(votes) == 1:
        return votes.pop()
    if votes or (fan_in_fan_out and kind is None):
        return None
    return False


def is_tied(base: Checkpoint) -> bool | None:
    """Whether the output head shares the input embedding's tensor. None: there is no config.

    Where the config and its text_config disagree, transformers mostly takes the one that ties.
    """
    if base.config is None:
        return None
    flags = [
        bool(config["tie_word_embeddings"])
        for config in (base.config, base.config.get("text_config"))
        if isinstance(config, dict) and "tie_word_embeddings" in config
    ]
    return any(flags) if flags else True  # transformers' default where the config is silent
