"""quantization_config tells loaders which modules are not quantized, each method in its own way."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from infold.checkpoint.shards import Checkpoint
from infold.plan.layouts import HEADS

__all__ = ["unconverted_changes", "with_unconverted"]

_LISTS = {
    "awq": ("modules_to_not_convert",),
    "bitsandbytes": ("llm_int8_skip_modules",),
    "compressed-tensors": ("ignore",),
    "fp8": ("modules_to_not_convert", "ignored_layers"),
    "fbgemm_fp8": ("modules_to_not_convert",),
    "torchao": ("modules_to_not_convert",),
    "hqq": ("skip_modules",),
}
_FUSED_AS = {
    "q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj",
}  # fmt: skip
# Methods whose list makes transformers forget what it leaves unconverted by itself: the head.
_OWN_DEFAULT = ("bitsandbytes", "fp8", "fbgemm_fp8", "torchao")


def unconverted_changes(base: Checkpoint, dense: Sequence[str]) -> dict[str, object]:
    """The field of config.json that lists the modules `dense` as not quantized, as it must be.

    Raises LookupError, with a sentence, where it is not known how.
    """
    if "hf_quant_config.json" in base.side_files:
        raise LookupError("ModelOpt's hf_quant_config.json cannot be changed to fit")
    config = base.config or {}
    inner = config.get("text_config")
    for place in (config, inner if isinstance(inner, dict) else {}):
        for field in ("quantization_config", "compression_config"):
            if isinstance(told := place.get(field), dict):
                return {field: with_unconverted(told, dense, base)}
    if base.config is None:
        return {"quantization_config": {}}
    return {"quantization_config": with_unconverted({}, dense, base)}


def with_unconverted(
    config: Mapping[str, Any], dense: Sequence[str], base: Checkpoint
) -> dict[str, Any]:
    """A quantization_config that also lists the modules `dense` as not quantized.

    Raises LookupError, with a sentence, where it is not known how a method is told.
    """
    method = config.get("quant_method")
    if method in ("gptq", "gptqmodel"):
        dynamic = config.get("dynamic") or {}
        if not isinstance(dynamic, dict):
            raise LookupError("quantization_config.dynamic is no object")
        new: dict[str, Any] = {f"-:^{re.escape(name)}$": {} for name in with_fused(dense)}
        return {**config, "dynamic": {**new, **dynamic}}  # the first pattern that fits decides
    if method == "auto-round":
        extra = config.get("extra_config") or {}
        if not isinstance(extra, dict):
            raise LookupError("quantization_config.extra_config is no object")
        return {**config, "extra_config": {**extra, **{n: {"bits": 16} for n in dense}}}
    if not isinstance(method, str) or method not in _LISTS:
        told = f"quant_method {method!r}" if method else "no quantization_config.quant_method"
        raise LookupError(
            f"config.json tells {told}, and how loaders learn there which modules are not "
            "quantized is not known here"
        )
    names = list(dense)
    if method == "awq":
        names = with_fused(names)
    if method == "hqq":
        names = list(dict.fromkeys(_tag(name) for name in names))
    first, *others = _LISTS[method]
    changed = dict(config)
    for field in (first, *(other for other in others if other in config)):
        known = config.get(field)
        if known is not None and not isinstance(known, list):
            raise LookupError(f"quantization_config.{field} is no list")
        before = list(known) if known is not None else []
        if known is None and method in _OWN_DEFAULT:
            before = _heads(base)
        changed[field] = before + [name for name in names if name not in before]
    return changed


def with_fused(names: Collection[str]) -> list[str]:
    """Modules, and what servers call those that they load as one."""
    found: dict[str, None] = {}
    for name in names:
        found[name] = None
        above, dot, last = name.rpartition(".")
        if last in _FUSED_AS:
            found[above + dot + _FUSED_AS[last]] = None
    return list(found)


def _tag(name: str) -> str:
    """HQQ's name of a kind of module: `self_attn.q_proj`."""
    parts = name.split(".")
    return ".".join(p for p in parts if p not in ("model", "layers") and not p.isdigit())


def _heads(base: Checkpoint) -> list[str]:
    """The output heads that the base stores as floats, or ties."""
    found = [n.removesuffix(".weight") for n in base.where if n.endswith(".weight")]
    return [n for n in found if n.rpartition(".")[2] in HEADS] or ["lm_head"]
