"""The adapter_config.json of several adapters, read for combining, and that of the result.

A field that changes what an adapter does is handled here, or refused by name. PEFT and the merge
find the result's modules by `target_modules`, their ranks by `r` and `rank_pattern`; its scaling is
1 everywhere, so `alpha_pattern` repeats `rank_pattern`.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from infold.adapters.peft_config import (
    HARMLESS,
    INSIDE,
    bad_patterns,
    init_problems,
    matching,
    scales_inputs,
)
from infold.names import kin, names_a_model, same

__all__ = [
    "Fields",
    "combined_config",
    "config_notes",
    "config_problems",
    "largest_rank",
    "scaling",
]

Fields = Mapping[str, Any]

_HANDLED = {
    "LORA": frozenset(
        "r lora_alpha use_rslora rank_pattern alpha_pattern lora_bias bias init_lora_weights "
        "trainable_token_indices ensure_weight_tying".split()
    ),
    "IA3": frozenset(("feedforward_modules",)),
}
_NARROWING = ("exclude_modules", "layers_to_transform", "layers_pattern")


def config_problems(fields: Fields) -> list[str]:
    """The reasons why an adapter with this config cannot be combined; none if it can."""
    kind = fields.get("peft_type")
    if not isinstance(kind, str) or kind not in _HANDLED:
        return [f"peft_type {kind!r} cannot be combined; infold combines {', '.join(_HANDLED)}"]
    if fields.get("use_dora"):
        return [
            "use_dora: DoRA magnitudes cannot be combined, each holds lengths of its own base + "
            "update; `infold merge` merges such adapters one after the other"
        ]
    problems = [
        f"{name} = {str(value)[:60]!r} is not supported by combine; it may change the result"
        for name, value in fields.items()
        if value and name not in HARMLESS | _HANDLED[kind]
    ]
    problems += [
        f"{name} must be a list of names or a pattern"
        for name in ("target_modules", "feedforward_modules", "exclude_modules", "modules_to_save")
        if not _names(fields.get(name))
    ]
    for pattern in (fields.get("target_modules"), fields.get("feedforward_modules")):
        problems += bad_patterns([pattern] if isinstance(pattern, str) else [])
    return problems + (_lora_problems(fields) if kind == "LORA" else [])


def _names(value: Any) -> bool:
    listed = isinstance(value, list) and all(isinstance(v, str) for v in value)
    return value is None or isinstance(value, str) or listed


def _lora_problems(fields: Fields) -> list[str]:
    problems = []
    ranks, alphas = (fields.get(f"{name}_pattern") or {} for name in ("rank", "alpha"))
    if not isinstance(ranks, dict) or not isinstance(alphas, dict):
        return ["rank_pattern and alpha_pattern must map module names to numbers"]
    for rank in (fields.get("r", 8), *ranks.values()):
        if type(rank) is not int or rank < 1:
            problems.append(f"rank {rank!r} must be a positive integer")
    for alpha in (fields.get("lora_alpha", 8), *alphas.values()):
        if type(alpha) not in (int, float) or not abs(alpha) < 1e30:
            problems.append(f"alpha {alpha!r} must be a finite number")
    problems += bad_patterns([*ranks, *alphas])
    problems += init_problems(fields)
    if fields.get("bias", "none") not in ("none", "all", "lora_only"):
        problems.append(f"bias = {fields['bias']!r} is unknown")
    return problems


def scaling(fields: Fields, module: str, rank: int) -> float:
    """alpha / rank, with rsLoRA alpha / sqrt(rank). LookupError tells where the config does not."""
    ranks = matching(fields, "rank_pattern", module, fields.get("r", 8))
    if rank not in ranks:
        raise LookupError(f"rank {rank} in the file, {ranks[0]} by the config")
    alphas = set(matching(fields, "alpha_pattern", module, fields.get("lora_alpha", 8)))
    if len(alphas) > 1:
        raise LookupError("several of alpha_pattern match; PEFT lost their order on saving")
    return float(alphas.pop()) / (math.sqrt(rank) if fields.get("use_rslora") else rank)


def largest_rank(fields: Fields) -> int:
    """The rank that PEFT takes for an SVD when it is told none."""
    return int(max([fields.get("r", 8), *(fields.get("rank_pattern") or {}).values()]))


def config_notes(configs: Sequence[Fields]) -> list[str]:
    """What differs between the adapters and does not hinder, so that nobody is surprised."""
    notes = []
    for name in ("base_model_name_or_path", "revision", "task_type", "fan_in_fan_out"):
        values = list(dict.fromkeys(str(c[name]) for c in configs if c.get(name) is not None))
        taken = "True" if name == "fan_in_fan_out" else next(iter(values), "")
        if name == "base_model_name_or_path":
            values = [v for v in values if any(_other(v, value) for value in values)]
        if len(values) > 1:
            notes.append(f"{name} differs: {', '.join(values)}; the result has {taken}")
    return notes


def _other(one: str, two: str) -> bool:
    """Whether these are two models: a path, or the name of a copy, is none by itself."""
    told = kin(one, two) or (names_a_model(one) and names_a_model(two))
    return told and not same(one, two)


def combined_config(
    configs: Sequence[Fields], ranks: Mapping[str, int], inputs: Mapping[str, bool]
) -> tuple[dict[str, Any], list[str]]:
    """The result's config, and the reasons why there can be none.

    ranks: LoRA's rank of every module. inputs: for IA³ whether a module's inputs are scaled.
    """
    result, problems = _filled(configs, ranks, inputs)
    known = {name for c in configs for name in c}  # PEFT warns of names that its version lacks
    return {name: value for name, value in result.items() if value or name in known}, problems


def _filled(
    configs: Sequence[Fields], ranks: Mapping[str, int], inputs: Mapping[str, bool]
) -> tuple[dict[str, Any], list[str]]:
    result = dict(configs[0])
    for name in ("base_model_name_or_path", "revision", "task_type"):
        result[name] = next((c[name] for c in configs if c.get(name) is not None), None)
    modules = sorted({module.partition(INSIDE)[0] for module in (*ranks, *inputs)})
    result |= {
        "inference_mode": True,
        "fan_in_fan_out": any(c.get("fan_in_fan_out") for c in configs),
        "modules_to_save": _union([c.get("modules_to_save") for c in configs]) or None,
        **_targets(configs, modules),
    }
    if result["peft_type"] == "IA3":
        return _with_sides(result, configs, modules, inputs)
    rank, pattern = _patterns(ranks)
    tokens = [t for c in configs if (t := c.get("trainable_token_indices"))]
    biases = {c.get("bias", "none") for c in configs}
    result |= {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "use_rslora": False,
        "init_lora_weights": True,  # a module that is targeted but not in the file: an update of 0
        "loftq_config": {},
        "eva_config": None,
        "lora_bias": any(c.get("lora_bias") for c in configs),
        "bias": next(b for b in ("all", "lora_only", "none") if b in biases),
        "trainable_token_indices": tokens[0] if tokens else None,
    }
    problems = []
    if len({bool(c.get("ensure_weight_tying")) for c in configs}) > 1:
        problems.append("ensure_weight_tying is true in some of the adapters only: which holds?")
    if any(t != tokens[0] for t in tokens):
        problems.append("trainable_token_indices differ: such rows cannot be combined")
    inside = any(INSIDE in module for module in ranks)
    if inside and len({str(c.get("peft_version")) for c in configs}) > 1:
        problems.append(
            "updates of MultiheadAttention by different versions of PEFT, which may count them "
            "once or twice; save them with one version"
        )
    return result, problems


def _union(given: Sequence[Any]) -> list[str]:
    names = ([names] if isinstance(names, str) else names or [] for names in given)
    return sorted({name for part in names for name in part})


def _targets(configs: Sequence[Fields], modules: list[str]) -> dict[str, Any]:
    """target_modules: the union where that says the same; else the modules, one by one."""
    fields = ("target_modules", *_NARROWING)
    views = [[_unordered(c.get(name)) for name in fields] for c in configs]
    if all(view == views[0] for view in views):
        return {name: configs[0].get(name) for name in fields}
    given = [c.get("target_modules") for c in configs]
    joined = _joined(given)
    if joined is None or any(c.get(name) for c in configs for name in _NARROWING):
        joined = modules
    return {"target_modules": joined, **dict.fromkeys(_NARROWING)}


def _joined(given: Sequence[Any]) -> Any:
    """Lists as their union, patterns as alternatives; None for a mixture or a word of PEFT's."""
    if all(isinstance(names, list) for names in given):
        return _union(given)
    if all(isinstance(names, str) and names.lower() != "all-linear" for names in given):
        return "|".join(f"({pattern})" for pattern in dict.fromkeys(given))
    return None


def _unordered(value: Any) -> Any:
    """PEFT saves sets, in any order."""
    return sorted(map(str, value)) if isinstance(value, list) else value


def _with_sides(
    result: dict[str, Any],
    configs: Sequence[Fields],
    modules: list[str],
    inputs: Mapping[str, bool],
) -> tuple[dict[str, Any], list[str]]:
    """feedforward_modules: the union where it says the same; else the modules, one by one."""
    result["init_ia3_weights"] = True  # a module that is targeted but not in the file stays as is
    given = [c.get("feedforward_modules") or [] for c in configs]
    exact = [module for module, wanted in inputs.items() if wanted]
    listed = result["target_modules"] == modules
    for targets, wanted in (
        (result["target_modules"], exact if listed else _joined(given)),
        (modules, exact),
    ):
        result |= {"target_modules": targets, "feedforward_modules": wanted}
        wrong = [m for m, side in inputs.items() if scales_inputs(result, m) != side]
        if wanted is not None and not wrong:
            return result, []
        result |= dict.fromkeys(_NARROWING)
    return result, [
        f"{module}: ends like a feed-forward module, so no config can tell the two apart"
        for module in wrong
    ]


def _patterns(ranks: Mapping[str, int]) -> tuple[int, dict[str, int]]:
    """The most common rank, and a pattern for every module of another one."""
    if not ranks:
        return 1, {}
    count = Counter(ranks.values())
    usual = max(count, key=lambda rank: (count[rank], rank))
    by_leaf = defaultdict(set)
    paths = {module.partition(INSIDE)[0]: rank for module, rank in ranks.items()}
    for path, rank in paths.items():
        by_leaf[path.rpartition(".")[2]].add(rank)
    pattern = {}
    for path, rank in sorted(paths.items()):
        leaf = path.rpartition(".")[2]
        alone = len(by_leaf[leaf]) == 1
        if rank != usual:  # "^" holds the whole path, where a name alone could fit another one
            pattern[re.escape(leaf) if alone else f"^{re.escape(path)}"] = rank
    return usual, pattern
