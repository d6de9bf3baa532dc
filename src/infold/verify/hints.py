"""What may have gone wrong with a tensor that is not as it must be: known patterns, tried out."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infold.checkpoint.inputs import InputFiles
from infold.checkpoint.safetensors import TensorInfo
from infold.plan.edits import Operation, Plan
from infold.verify.amended import AmendedCheck
from infold.verify.parts import PartCheck
from infold.verify.reference import alpha_of, rank_of, scaling_of
from infold.verify.tensors import BaseCheck, EditCheck, Tally, Workspace

__all__ = ["Wrong", "hints"]

_TRIED = 24  # wrong tensors for which other tensors or scalings are tried
_SAMPLE = 1 << 12  # elements of one that are tried, in whole rows: nearly all of them will be wrong
_MISSING = "these are as in the base: the edit is missing"
_ENOUGH = 0.9  # of the elements of a sample must fit


@dataclass(frozen=True)
class Wrong:
    """A tensor that differs, and where its bytes lie."""

    check: BaseCheck | EditCheck | PartCheck | AmendedCheck
    path: Path  # its shard in the output
    info: TensorInfo


def hints(plan: Plan, wrong: Mapping[str, Wrong], files: InputFiles) -> dict[str, str]:
    """A sentence for each wrong tensor whose pattern is known."""
    workspace = Workspace()
    found: dict[str, str] = {}
    others: dict[str, BaseCheck | EditCheck] = {}  # with what they read of their adapters
    alike: dict[tuple[str, tuple[int, ...]], list[str]] = defaultdict(list)
    for name, one in wrong.items():
        alike[one.info.dtype, one.info.shape].append(name)
    for name, one in list(wrong.items())[:_TRIED]:
        tally = one.check.tally
        for other in [n for n in alike[one.info.dtype, one.info.shape] if n != name][:_TRIED]:
            if other not in others:
                others[other] = _anew(plan, other, files)
            if _fits(others[other], one, files, workspace):
                found[name] = f"it holds what belongs to {other}"
                break
        if name in found:
            continue
        if tally.like_base == tally.wrong:
            found[name] = _MISSING
        elif scaling := _scaling(plan, name, one, files, workspace):
            found[name] = f"the update is scaled by {scaling}"
        elif tally.neighbours >= _ENOUGH * tally.wrong:
            found[name] = "next to the right value: rounded more than once, or not by infold"
    for name, one in list(wrong.items())[_TRIED:]:  # what needs no trying
        if one.check.tally.like_base == one.check.tally.wrong:
            found[name] = _MISSING
    return found


def _anew(
    plan: Plan,
    name: str,
    files: InputFiles,
    scalings: Callable[[Operation, int], float] | None = None,
) -> BaseCheck | EditCheck:
    if name in plan.edits:
        edit = plan.edits[name]
        return EditCheck(edit, plan.base, plan.adapters, files, scalings, plan.original)
    base = plan.base
    return BaseCheck(base.shards[base.where[name]].path, base.info(name), files)


def _fits(
    check: BaseCheck | EditCheck, one: Wrong, files: InputFiles, workspace: Workspace
) -> bool:
    """Whether the bytes that are there fit another check, around the first that was wrong."""
    first = one.check.tally.first
    if first is None:
        return False
    shape = one.check.grid if isinstance(one.check, EditCheck) else one.info.shape
    width = one.info.nbytes // max(math.prod(shape), 1) or 1
    row, end = width, one.info.nbytes
    if isinstance(check, EditCheck):
        row = check.row_bytes if check.row_bytes <= check.step else width
        end = (first[0] * width // check.unit + 1) * check.unit
    offset = first[0] * width // row * row
    count = min(max(row, _SAMPLE * width // row * row), check.step, end - offset)
    view = workspace.bytes("merged", count)
    files.read(one.path, view, one.info.begin + offset)
    check.tally = Tally()
    check.check(view, offset, None, workspace)
    return check.tally.wrong <= (1 - _ENOUGH) * count / width


def _scaling(
    plan: Plan, name: str, one: Wrong, files: InputFiles, workspace: Workspace
) -> str | None:
    """Another scaling that fits, where the edit has one."""
    if name not in plan.edits:
        return None

    def config(op: Operation) -> Mapping[str, Any]:
        return plan.adapters[op.adapter].config

    def rank(op: Operation) -> int:
        rows = plan.adapters[op.adapter].tensors[op.parts["lora_A"]].shape[0]
        return rank_of(op, rows)

    def without(*fields: str) -> Callable[[Operation, int], float]:
        return lambda op, r: scaling_of({**config(op), **dict.fromkeys(fields)}, op.module, r)

    tried: dict[str, Callable[[Operation, int], float]] = {
        "alpha, not alpha / r": lambda op, r: alpha_of(config(op), op.module),
        "alpha / r, not alpha / sqrt(r)": without("use_rslora"),
        "alpha / sqrt(r), not alpha / r": lambda op, r: scaling_of(
            {**config(op), "use_rslora": True}, op.module, r
        ),
        "lora_alpha, where alpha_pattern has another value": without("alpha_pattern"),
        "1": lambda op, r: 1.0,
    }
    ranked = [op for op in plan.edits[name].operations if "lora_A" in op.parts]
    right = [scaling_of(config(op), op.module, rank(op)) for op in ranked]
    for told, scalings in tried.items():
        if [scalings(op, rank(op)) for op in ranked] == right:
            continue
        if _fits(_anew(plan, name, files, scalings), one, files, workspace):
            return told
    return None
