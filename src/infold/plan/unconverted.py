"""quantization_config tells loaders which modules are not quantized, each method in its own way."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from infold.checkpoint.files import read_object
from infold.checkpoint.shards import Checkpoint
from infold.plan.layouts import HEADS

__all__ = ["QUANT_CONFIGS", "unconverted_beside", "unconverted_changes", "with_unconverted"]

# Files beside config.json that tell it too, and whose they are: of ModelOpt's exports, the older
# have it there alone; GPTQModel looks there before it looks into config.json.
QUANT_CONFIGS = {"hf_quant_config.json": "modelopt", "quantize_config.json": "gptq"}

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
_EXPERT = re.compile(r"(.*\.experts)\.\d+\.")  # all of a layer become dense together
# Methods whose list makes transformers forget what it leaves unconverted by itself: the head.
_OWN_DEFAULT = ("bitsandbytes", "fp8", "fbgemm_fp8", "torchao")


def unconverted_changes(base: Checkpoint, dense: Sequence[str]) -> dict[str, object]:
    """The field of config.json that lists the modules `dense` as not quantized, as it must be; none
    where only a file beside it tells of quantization.

    Raises LookupError, with a sentence, where it is not known how.
    """
    if field := _field(base):
        return {field[0]: with_unconverted(field[1], dense, base)}
    if any(name in base.side_files for name in QUANT_CONFIGS):
        return {}
    if base.config is None:
        return {"quantization_config": {}}
    return {"quantization_config": with_unconverted({}, dense, base)}


def unconverted_beside(base: Checkpoint, dense: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The content of the base's QUANT_CONFIGS with the modules `dense` listed, by name.

    Raises LookupError, with a sentence, where it is not known how, and CorruptFile for what is no
    JSON object.
    """
    changed = {}
    field = _field(base)
    for name, method in QUANT_CONFIGS.items():
        if name not in base.side_files:
            continue
        content = read_object(base.home / name)
        told = content.get("quant_method")
        if name == "quantize_config.json" and field:  # AutoGPTQ's and AutoAWQ's tell no method
            method = field[1].get("quant_method", method)
        new = with_unconverted({"quant_method": method, **content}, dense, base, name)
        changed[name] = {key: new[key] for key in new if key != "quant_method" or told}
    return changed


def _field(base: Checkpoint) -> tuple[str, dict[str, Any]] | None:
    """The name and content of what config.json tells of quantization."""
    config = base.config or {}
    inner = config.get("text_config")
    for place in (config, inner if isinstance(inner, dict) else {}):
        for field in ("quantization_config", "compression_config"):
            if isinstance(told := place.get(field), dict):
                return field, told
    return None


def with_unconverted(
    config: Mapping[str, Any], dense: Sequence[str], base: Checkpoint, file: str = "config.json"
) -> dict[str, Any]:
    """A quantization_config (of `file`) that also lists the modules `dense` as not quantized.

    Raises LookupError, with a sentence, where it is not known how a method is told.
    """
    method = config.get("quant_method")
    if method in ("gptq", "gptqmodel"):
        dynamic = config.get("dynamic") or {}
        if not isinstance(dynamic, dict):
            raise LookupError(f"{_in(file)}dynamic is no object")
        new: dict[str, Any] = {f"-:^{re.escape(name)}$": {} for name in with_fused(dense)}
        return {
            **config,
            "dynamic": {**new, **dynamic},  # the first pattern that fits decides
            "modules_in_block_to_quantize": [_quantized(base, dense)],
        }
    if method == "auto-round":
        extra = config.get("extra_config") or {}
        if not isinstance(extra, dict):
            raise LookupError(f"{_in(file)}extra_config is no object")
        return {**config, "extra_config": {**extra, **{n: {"bits": 16} for n in dense}}}
    if isinstance(method, str) and method.startswith("modelopt"):
        return _modelopt(config, dense, file)
    if not isinstance(method, str) or method not in _LISTS:
        told = f"quant_method {method!r}" if method else "no quantization_config.quant_method"
        raise LookupError(
            f"{file} tells {told}, and how loaders learn there which modules are not "
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
        own = _heads(base) if method in _OWN_DEFAULT else []
        changed[field] = _longer(config, field, names, own, _in(file))
    return changed


def _in(file: str) -> str:
    """What fields of a file are named after in a refusal."""
    return "quantization_config." if file == "config.json" else f"{file}: "


def _longer(
    config: Mapping[str, Any], field: str, names: Sequence[str], own: list[str], where: str
) -> list[Any]:
    """A list of the config with `names` at its end; `own` is what stands there without a list."""
    known = config.get(field)
    if known is not None and not isinstance(known, list):
        raise LookupError(f"{where}{field} is no list")
    before = list(known) if known is not None else own
    return before + [name for name in names if name not in before]


def _modelopt(config: Mapping[str, Any], dense: Sequence[str], file: str) -> dict[str, Any]:
    """ModelOpt's: `ignore` in config.json, `exclude_modules` where there is a section of its own.

    A mixed checkpoint also has a table of the modules that are quantized. vLLM wants that filled,
    and looks at the list first, so it keeps its last ones.
    """
    section, names = config.get("quantization", config), with_fused(dense)
    if not isinstance(section, dict):
        raise LookupError(f"{_in(file)}quantization is no object")
    field = "exclude_modules" if "quantization" in config else "ignore"
    new = {**section, field: _longer(section, field, names, [], _in(file))}
    table = section.get("quantized_layers")
    if isinstance(table, dict):
        gone = set(names)
        left = {name: told for name, told in table.items() if name not in gone}
        new["quantized_layers"] = left or table
    return {**config, "quantization": new} if "quantization" in config else new


def _quantized(base: Checkpoint, dense: Collection[str]) -> list[str]:
    """GPTQ's modules that stay quantized, for transformers, which does not know `dynamic`.

    optimum compares the ends of modules' names with these, vLLM asks whether one is in a name. So
    what all layers have in common is told by its name inside of a layer, as it is documented, but
    by whole names where that would mean another module, too.
    """
    coded = [n.removesuffix(".qweight") for n in base.where if n.endswith(".qweight")]
    gone = set(dense)
    whole = [name for name in coded if name not in gone]
    plain = [n.removesuffix(".weight") for n in base.where if n.endswith(".weight")]
    others = [*dense, *plain]
    inside = list(dict.fromkeys(re.sub(r"^.*?\.\d+\.", "", name) for name in whole))
    return whole if any(i in other for i in inside for other in others) else inside


def with_fused(names: Collection[str]) -> list[str]:
    """Modules, and what servers call those that they load as one."""
    found: dict[str, None] = {}
    for name in names:
        found[name] = None
        above, dot, last = name.rpartition(".")
        if last in _FUSED_AS:
            found[above + dot + _FUSED_AS[last]] = None
        if expert := _EXPERT.match(name):
            found[expert[1]] = None
    return list(found)


def _tag(name: str) -> str:
    """HQQ's name of a kind of module: `self_attn.q_proj`."""
    parts = name.split(".")
    return ".".join(p for p in parts if p not in ("model", "layers") and not p.isdigit())


def _heads(base: Checkpoint) -> list[str]:
    """The output heads that the base stores as floats, or ties."""
    found = [n.removesuffix(".weight") for n in base.where if n.endswith(".weight")]
    return [n for n in found if n.rpartition(".")[2] in HEADS] or ["lm_head"]
