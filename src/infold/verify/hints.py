"""What may have gone wrong with a tensor that is not as it must be: known patterns, tried out."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infold.checkpoint.safetensors import TensorInfo
from infold.plan.edits import Plan
from infold.verify.reference import alpha_of, scaling_of
from infold.verify.tensors import BaseCheck, EditCheck, Files, Workspace

__all__ = ["Wrong", "hints"]

_TRIED = 24  # wrong tensors for which other tensors or scalings are tried
_ENOUGH = 0.9  # of the elements of a sample must fit


@dataclass(frozen=True)
class Wrong:
    """A tensor that differs, and where its bytes lie."""

    check: BaseCheck | EditCheck
    path: Path  # its shard in the output
    info: TensorInfo


def hints(plan: Plan, wrong: Mapping[str, Wrong], files: Files) -> dict[str, str]:
    """A sentence for each wrong tensor whose pattern is known."""
    workspace = Workspace()
    found: dict[str, str] = {}
    alike: dict[tuple[str, tuple[int, ...]], list[str]] = defaultdict(list)
    for name, one in wrong.items():
        alike[one.info.dtype, one.info.shape].append(name)
    for name, one in list(wrong.items())[:_TRIED]:
        tally = one.check.tally
        others = [n for n in alike[one.info.dtype, one.info.shape] if n != name][:_TRIED]
        if swapped := next(
            (n for n in others if _fits(_anew(plan, n, files), one, files, workspace)), None
        ):
            found[name] = f"it holds what belongs to {swapped}"
        elif tally.like_base == tally.wrong:
            found[name] = "these are as in the base: the edit is missing"
        elif scaling := _scaling(plan, name, one, files, workspace):
            found[name] = f"the update is scaled by {scaling}"
        elif isinstance(one.check, EditCheck) and tally.furthest == 1:
            found[name] = (
                "all are next to the right value: rounded more than once, or not merged by infold"
            )
    return found


def _anew(
    plan: Plan, name: str, files: Files, scalings: Callable[[int, str], float] | None = None
) -> BaseCheck | EditCheck:
    if name in plan.edits:
        return EditCheck(plan.edits[name], plan.base, plan.adapters, files, scalings)
    return BaseCheck(plan.base, plan.base.info(name), files)


def _fits(check: BaseCheck | EditCheck, one: Wrong, files: Files, workspace: Workspace) -> bool:
    """Whether the bytes that are there fit another check, around the first that was wrong."""
    first = one.check.tally.first
    if first is None:
        return False
    width = one.info.nbytes // max(math.prod(one.info.shape), 1) or 1
    offset = first[0] * width // check.step * check.step
    count = min(check.step, one.info.nbytes - offset)
    view = workspace.bytes("merged", count)
    files.read(one.path, view, one.info.begin + offset)
    check.check(view, offset, None, workspace)
    return check.tally.wrong <= (1 - _ENOUGH) * count / width


def _scaling(plan: Plan, name: str, one: Wrong, files: Files, workspace: Workspace) -> str | None:
    """Another scaling that fits, where the edit has one."""
    if name not in plan.edits:
        return None
    ranked = [op for op in plan.edits[name].operations if op.method in ("lora", "dora")]
    if not ranked:
        return None

    def configured(adapter: int) -> Mapping[str, Any]:
        return plan.adapters[adapter].config

    tried: dict[str, Callable[[int, str], float]] = {
        "alpha, not alpha / r": lambda a, m: alpha_of(configured(a), m),
        "alpha / sqrt(r), not alpha / r": lambda a, m: (
            alpha_of(configured(a), m) / math.sqrt(scaling_of(configured(a), m)[0])
        ),
        "alpha / r, not alpha / sqrt(r)": lambda a, m: (
            alpha_of(configured(a), m) / scaling_of(configured(a), m)[0]
        ),
        "1": lambda a, m: 1.0,
        "alpha / r without alpha_pattern and rank_pattern": lambda a, m: scaling_of(
            {**configured(a), "alpha_pattern": {}, "rank_pattern": {}}, m
        )[1],
    }
    for told, scalings in tried.items():
        same = all(
            scalings(op.adapter, op.module) == scaling_of(configured(op.adapter), op.module)[1]
            for op in ranked
        )
        if not same and _fits(_anew(plan, name, files, scalings), one, files, workspace):
            return told
    return None
