"""PEFT's rules for an adapter_config.json that everybody who reads one shares.

`verify/reference.py` states those that it needs anew: it is to find out where these are wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = [
    "HARMLESS",
    "INSIDE",
    "PLAIN_INITS",
    "READ_INITS",
    "UNREAD",
    "bad_patterns",
    "init_problems",
    "is_ending",
    "matching",
    "scales_inputs",
]

# What versions of PEFT and Unsloth write without an influence on a trained adapter.
UNREAD = frozenset(
    "auto_mapping peft_version megatron_core loftq_config eva_config qalora_group_size "
    "runtime_config unsloth_fixed unsloth_version".split()
)
# No influence on what a trained adapter does to a weight, only on how it is trained; or settled by
# its keys and shapes.
HARMLESS = UNREAD.union(
    "task_type peft_type base_model_name_or_path revision inference_mode target_modules "
    "exclude_modules modules_to_save fan_in_fan_out layers_to_transform layers_pattern "
    "lora_dropout init_ia3_weights init_weights".split()
)
# Initialisations of lora_A and lora_B that leave the base weight as it was. What these three gave
# is in an adapter's file; a training begins in another way here.
READ_INITS = ("eva", "orthogonal", "mica")
PLAIN_INITS = (True, False, "gaussian", *READ_INITS)
INSIDE = (
    ".base_layer"  # in the path of a part of MultiheadAttention, which goes by the whole's name
)


def is_ending(pattern: str, path: str) -> bool:
    """Whether a pattern of rank_pattern or alpha_pattern matches a whole trailing path."""
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


def bad_patterns(patterns: Iterable[str]) -> list[str]:
    """What is wrong with those that `is_ending` could not try."""
    problems = []
    for pattern in patterns:
        try:
            re.compile(rf"(.*\.)?({pattern})$")
        except (re.error, OverflowError, RecursionError) as error:
            problems.append(f"{pattern!r} is not a regular expression: {error}")
    return problems


def matching(fields: Mapping[str, Any], name: str, module: str, default: Any) -> list[Any]:
    """The values of all patterns of a field (rank_pattern, alpha_pattern) that mean a module, in
    the order of the file, which is not that of the training; else the default."""
    path = module.partition(INSIDE)[0]
    patterns = fields.get(name) or {}
    return [value for p, value in patterns.items() if is_ending(p, path)] or [default]


def scales_inputs(fields: Mapping[str, Any], module: str) -> bool:
    """Whether IA³ scales this module's inputs. PEFT: feedforward_modules is a regular expression of
    the whole path, or a list of endings (also within a component)."""
    wanted = fields.get("feedforward_modules") or ()
    if isinstance(wanted, str):
        return re.fullmatch(wanted, module) is not None
    return module.endswith(tuple(wanted))


def init_problems(fields: Mapping[str, Any]) -> list[str]:
    """Why what init_lora_weights asked for keeps an adapter from meaning an update of its base."""
    init = fields.get("init_lora_weights", True)
    if init in PLAIN_INITS:
        return []
    return [
        f"init_lora_weights = {init!r} changed the base weight before training. Convert the "
        "adapter with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)"
    ]
