"""What an adapter_config.json asks for. Every field that changes the result is handled or refused.

Sources: PEFT's LoraConfig, IA3Config and TrainableTokensConfig (0.21). A field that no method knows
and that is not known to be harmless is refused, unless it is empty: silence could mean a wrong
merge.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from infold.adapters import METHODS, methods_of
from infold.adapters.peft_config import (
    HARMLESS,
    INSIDE,
    bad_patterns,
    init_problems,
    matching,
    scales_inputs,
)
from infold.checkpoint.adapter import Adapter

__all__ = ["AdapterConfig", "read_config"]


@dataclass(frozen=True)
class AdapterConfig:
    """The fields of one adapter that a plan needs."""

    peft_type: str
    fields: Mapping[str, Any]

    @property
    def method(self) -> str:
        """The key in METHODS of the adapter's main method."""
        methods = methods_of(self.peft_type)
        fitting = (name for name, m in methods.items() if m.owns(m.REQUIRED, self.fields))
        return next(fitting, self.peft_type.lower())

    def ranks(self, module: str) -> list[int]:
        """The ranks that lora_A may have. Where several patterns match, the file tells which."""
        found = matching(self.fields, "rank_pattern", module, self.fields.get("r", 8))
        return [int(rank) for rank in found]

    def scalings(self, module: str, rank: int) -> list[float]:
        """alpha / rank, or alpha / sqrt(rank) with rsLoRA; several where the patterns disagree.

        PEFT takes the first pattern that matches, but sorts them when it saves: which one was the
        first cannot be told.

        PEFT up to 0.21 adds the update of MultiheadAttention's output projection twice, in training
        too (its pull request 3774 tells), so such an adapter has learnt half of its update.
        """
        usual = self.fields.get("lora_alpha", 8)
        alphas = matching(self.fields, "alpha_pattern", module, usual)
        divisor = math.sqrt(rank) if self.fields.get("use_rslora") else rank
        times = 2 if INSIDE in module else 1
        return [times * (float(alpha) / divisor) for alpha in dict.fromkeys(alphas)]

    @property
    def doubles(self) -> bool:
        """Whether the adapter comes from a PEFT that is known to add that update twice."""
        version = re.match(r"0\.(\d+)\b", str(self.fields.get("peft_version") or "0.0"))
        return version is not None and int(version[1]) <= 21

    def is_feedforward(self, module: str) -> bool:
        return scales_inputs(self.fields, module)

    def tokens(self, module: str) -> tuple[int, ...] | None:
        """The token numbers that belong to an embedding's `trainable_tokens_delta`."""
        indices = self.fields.get("trainable_token_indices", self.fields.get("token_indices"))
        if isinstance(indices, dict):
            found = [v for k, v in indices.items() if module == k or module.endswith("." + k)]
            found = found or list(indices.values())  # the copy of a tied head is not named
            indices = found[0] if found and all(v == found[0] for v in found) else None
        if not isinstance(indices, list) or not all(type(i) is int and i >= 0 for i in indices):
            return None
        return tuple(indices)

    def saves(self, module: str) -> bool:
        """Whether modules_to_save names this module, or one around it (PEFT: any ending)."""
        saved = tuple(self.fields.get("modules_to_save") or ())
        components = module.split(".")
        paths = (".".join(components[:count]) for count in range(1, len(components) + 1))
        return any(path.endswith(saved) for path in paths)

    @property
    def adds_head(self) -> bool:
        """Classification tasks train a head that the base model need not have."""
        return self.fields.get("task_type") in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")

    @property
    def ties(self) -> bool:
        return bool(self.fields.get("ensure_weight_tying"))


def _number(value: Any, low: float) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) < 1e30 and value >= low  # False for NaN too


def read_config(adapter: Adapter) -> tuple[AdapterConfig, list[str]]:
    """The adapter's config, and the reasons why it cannot be merged (none if it can)."""
    fields = adapter.config
    where = f"{adapter.path}/adapter_config.json"
    kind = fields.get("peft_type")
    methods = list(methods_of(kind).values()) if isinstance(kind, str) else []
    if not isinstance(kind, str) or not methods:
        known = ", ".join(dict.fromkeys(t for m in METHODS.values() for t in m.PEFT_TYPES))
        return AdapterConfig(str(kind), {}), [
            f"{where}: peft_type {kind!r} cannot be merged by infold, which merges {known}. "
            "`infold methods` tells which others PEFT merges, and which have no merged form, "
            "such as prompts before the input"
        ]
    handled = HARMLESS.union(*(method.PEFT_TYPES[kind] for method in methods))
    refused = {name: why for method in methods for name, why in method.REFUSED.items()}
    problems = []
    for name, value in fields.items():
        if name in handled or not value:
            continue
        if name in refused:
            problems.append(f"{where}: {name}: {refused[name]}")
        else:
            problems.append(
                f"{where}: unknown field {name!r} = {_short(value)}; it may change the result. "
                "Remove it from the file if you know that it does not"
            )
    problems += [f"{where}: {problem}" for problem in _invalid(kind, fields)]
    return AdapterConfig(kind, fields), problems


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."


def _invalid(kind: str, fields: Mapping[str, Any]) -> list[str]:
    problems = []
    saved = fields.get("modules_to_save")
    if saved is not None and not _strings(saved):
        problems.append("modules_to_save must be a list of names")
    if kind == "IA3":
        wanted = fields.get("feedforward_modules")
        if wanted is not None and not isinstance(wanted, str) and not _strings(wanted):
            problems.append("feedforward_modules must be a list of names or a pattern")
        if isinstance(wanted, str):
            problems += bad_patterns([wanted])
        return problems
    if kind != "LORA":
        return problems
    if not isinstance(fields.get("r", 8), int) or not _number(fields.get("r", 8), 1):
        problems.append(f"r = {fields.get('r')!r} must be a positive integer")
    if not _number(fields.get("lora_alpha", 8), -math.inf):
        problems.append(f"lora_alpha = {fields.get('lora_alpha')!r} must be a finite number")
    for name, low in (("rank_pattern", 1.0), ("alpha_pattern", -math.inf)):
        pattern = fields.get(name) or {}
        if not isinstance(pattern, dict) or not all(_number(v, low) for v in pattern.values()):
            problems.append(f"{name} must map module names to numbers")
        else:
            problems += bad_patterns(pattern)
    problems += init_problems(fields)
    if fields.get("bias", "none") not in ("none", "all", "lora_only"):
        problems.append(f"bias = {fields['bias']!r} is unknown")
    targets = fields.get("target_parameters")
    if targets is not None and not _strings(targets):
        problems.append("target_parameters must be a list of names")
    if fields.get("use_dora") and fields.get("lora_bias"):
        problems.append("lora_bias together with use_dora has no defined meaning")
    return problems


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)
