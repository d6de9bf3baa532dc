"""What config.json tells of a model's kind, and of what its layers do with values."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["limits", "model_types"]

_NESTED = 4  # levels of objects within a config.json
_QUANTIZATION = ("quantization_config", "compression_config")  # tell of weights, not of layers
# Fields that bound values between two projections of a layer, one for all layers or a list.
_LIMITS = re.compile(r"swiglu.*limit|activation_limit|clip_(qkv|kqv)|clamp|mlp.*softcap")
_OTHERS = ("clamp_len", "clamp_min_for_underflow")  # of positions, and of norms

# Models that do so where the field is missing, too; some also add 1 to what comes out of up_proj.
# (transformers 5.23, the defaults of such fields; a test reads them there.)
_LIMITED = (
    "deepseek_v4", "glm5_next", "gpt_oss", "hy_v4", "inkling2", "minimax_m3_vl",
    "openai_privacy_filter",
)  # fmt: skip


def _fields(config: Mapping[str, Any], depth: int = _NESTED) -> Iterator[tuple[str, Any]]:
    """The fields of a config and of those within it, as of a model that sees and reads."""
    for name, value in config.items():
        yield name, value
        if isinstance(value, dict) and depth and name not in _QUANTIZATION:
            yield from _fields(value, depth - 1)


def model_types(config: Mapping[str, Any]) -> set[str]:
    """The model types of a config and of those within it."""
    return {
        value for name, value in _fields(config) if name == "model_type" and isinstance(value, str)
    }


def limits(config: Mapping[str, Any]) -> set[str]:
    """Fields that are set and bound values inside of layers, of some layers at least. Where none
    is, and the model has such bounds by default, its model type."""
    found = {
        name
        for name, value in _fields(config)
        if _LIMITS.search(name) and name not in _OTHERS and _is_set(value)
    }
    return found or {
        f"model_type {kind}" for kind in model_types(config) if kind.startswith(_LIMITED)
    }


def _is_set(value: Any) -> bool:
    """Whether a limit, or one of a list of them, is another than none."""
    if isinstance(value, list):
        return any(map(_is_set, value))
    return bool(value)
