"""The proof: re-read a merged folder, and tell whether it is what base and adapters make.

Nothing of `merge` is used, and of `adapters` and `formats` facts only, no arithmetic: every
formula, every scaling and every rounding is stated anew in this room. Of the plan it takes
which tensor is edited from which parts, in which layout, and what headers and side files must be.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from infold.adapters import METHODS
from infold.checkpoint.adapter import Adapter, open_adapter
from infold.checkpoint.files import digest_of, safe_child
from infold.checkpoint.inputs import InputFiles
from infold.checkpoint.record import UNDO
from infold.checkpoint.safetensors import TensorInfo, read_header
from infold.checkpoint.shards import (
    RECEIPT,
    companion,
    is_lone,
    kept_name,
    misnamed,
    open_checkpoint,
    refuse_unfinished,
    renamed,
)
from infold.errors import InfoldError, Refusal
from infold.ggml import BLOCKS
from infold.plan.build import plan_merge
from infold.plan.choice import Choice
from infold.plan.edits import Amended, Operation, Plan, Replacement
from infold.plan.output import placed
from infold.verify.amended import AmendedCheck
from infold.verify.folder import (
    Claims,
    claimed_inputs,
    compare_header,
    extra_files,
    read_claims,
    side_files,
)
from infold.verify.hints import Wrong, hints
from infold.verify.parts import PartCheck, parts_checks
from infold.verify.reread import Check, Found, reread
from infold.verify.tensors import BaseCheck, EditCheck
from infold.verify.verdict import Offender, Verdict

__all__ = ["verify_checkpoint"]

PathLike = str | os.PathLike[str]


def verify_checkpoint(
    base: PathLike | None,
    adapters: Sequence[PathLike],
    merged: PathLike,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Verdict:
    """Check every byte of the folder `merged` against what base and adapters make.

    With base=None and no adapters the receipt names them, and they must have its digests.
    `progress` is called with (bytes done, bytes in all). Raises Refusal for inputs that cannot be
    planned or are not there; whatever is wrong with `merged` is an offender of the verdict.
    """
    started = time.perf_counter()
    folder = Path(os.path.abspath(merged))
    if not os.path.isdir(folder) and not (is_lone(folder) and os.path.isfile(folder)):
        raise Refusal(
            f"{merged}: is neither a folder nor a .gguf file; infold verifies what a merge has "
            f"made{misnamed(folder)}"
        )
    refuse_unfinished(folder)
    offenders: list[Offender] = []
    plan, claims = _open(base, adapters, folder, offenders)
    plan = placed(plan, folder)
    files = InputFiles()
    try:
        shards = _find_shards(plan, folder, files, base is None, offenders)
        recorded = claims is not None and claims.undo is not None
        offenders += extra_files(folder, plan, recorded)
        if claims is not None and claims.undo is not None:
            told = {companion(folder, UNDO).name: claims.undo}
            offenders += _compare_digests("undo record", told, _record(folder), "it")
        equal, different = side_files(folder, plan)
        offenders += different
        offenders += _unused(plan)
        output, sources = reread(shards, files, hashed=claims is not None, progress=progress)
        if claims is not None:
            # a shard that is missing or cannot be read is an offender already
            unread = {shard.name for shard in plan.shards} - {shard.name for shard in shards}
            claimed = {n: digest for n, digest in claims.shards.items() if n not in unread}
            changed = _compare_digests("digest", claimed, output, "the output")
            why = _explained(plan, shards)  # each by other offenders
            offenders += [o for o in changed if o.where not in why or o.where not in claimed]
            known = {offender.where for offender in different}  # a file is one offender
            offenders += [o for o in _changed_sides(claims, plan, folder) if o.where not in known]
        if claims is not None and base is None:
            found = {plan.base.shards[s.source].name: sources.get(s.name) for s in plan.shards}
            own = {s.name: found.get(s.name) or digest_of(s.path) for s in plan.base.shards}
            offenders += _compare_digests("base changed", claims.base_shards, own, "the base")
            offenders += _changed_base_sides(claims, plan)
        offenders += _wrong_tensors(plan, shards, files)
        if claims is not None and base is not None and offenders:
            offenders = [*_other_adapters(claims, plan.adapters, folder), *offenders]
    finally:
        files.close()
    checks = [check for shard in shards for check in shard.checks.values()]
    right = [check for check in checks if not check.tally.wrong]
    return Verdict(
        ok=not offenders,
        tensors=sum(len(shard.header.tensors) for shard in plan.shards),
        identical=sum(isinstance(check, BaseCheck) for check in right),
        recomputed=sum(not isinstance(check, BaseCheck) for check in right),
        undecided=sum(check.tally.undecided for check in checks),
        files=equal,
        offenders=tuple(offenders),
        seconds=round(time.perf_counter() - started, 3),
    )


# --- inputs ------------------------------------------------------------------------------------


def _open(
    base: PathLike | None, adapters: Sequence[PathLike], folder: Path, offenders: list[Offender]
) -> tuple[Plan, Claims | None]:
    """The plan, and what the receipt says. What is wrong with the receipt becomes an offender."""
    if base is not None:
        _refuse_swapped(base, folder)
        claims = None
        try:
            claims = read_claims(folder)
        except InfoldError as error:
            offenders.append(Offender("receipt", companion(folder, RECEIPT).name, str(error)))
        choice = None if claims is None else _choice(claims)
        opened = [open_adapter(a) for a in adapters]
        return plan_merge(open_checkpoint(base), opened, choice, lossy=True), claims
    if adapters:
        raise Refusal("adapters without a base; give both, or only the merged folder")
    claims = read_claims(folder)
    if claims is None:
        raise Refusal(
            f"{folder}: has no {companion(folder, RECEIPT).name}, so give base and adapters too"
            f"{renamed(folder, RECEIPT)}"
        )
    if os.path.realpath(claims.base) == os.path.realpath(folder):
        raise Refusal(
            f"{folder}: was merged in place, so its base is not there any more; restore it with "
            f"`infold undo {folder} --out BASE`, and give base and adapters too"
        )
    base, adapters = claimed_inputs(claims)
    opened = [open_adapter(name) for name in adapters]
    changed = [o for n, adapter in enumerate(opened) for o in _changed(claims, n, adapter)]
    offenders += changed
    try:
        return plan_merge(open_checkpoint(base), opened, _choice(claims), lossy=True), claims
    except Refusal as error:
        told = [f"{o.where}: changed since the merge" for o in changed]
        why = "the receipt's inputs no longer make a merge"
        raise Refusal([*told, *error.reasons, why]) from None


def _choice(claims: Claims) -> Choice | None:
    """How the receipt says that quantized modules were converted."""
    told = claims.conversion
    if told is None:
        return None
    original = None
    if told["original"]:
        if not os.path.exists(told["original"]):
            raise Refusal(f"{told['original']}: the receipt names it, and it is not there any more")
        original = open_checkpoint(told["original"])
    return Choice(told["mode"], told["dtype"], original)


def _refuse_swapped(base: PathLike, folder: Path) -> None:
    """A base whose receipt says that it was made from the folder that is to be verified."""
    first = Path(os.path.abspath(base))
    if not first.is_dir() or os.path.lexists(companion(folder, RECEIPT)):
        return
    claims = None
    with suppress(InfoldError):
        claims = read_claims(first)
    if claims is not None and Path(claims.base).name == folder.name:
        raise Refusal(
            f"{base} was merged from {claims.base}, so base and merged are swapped: the order is "
            "BASE ADAPTER... MERGED"
        )


def _adapter_digests(adapter: Adapter) -> dict[str, str]:
    names = ("adapter_config.json", adapter.weights.name)
    return {name: digest_of(adapter.path / name) for name in names}


def _changed(claims: Claims, number: int, adapter: Adapter) -> list[Offender]:
    """The files of an adapter that are not those that were merged."""
    told = f"adapter {adapter.path}"
    return _compare_digests(
        "adapter changed", claims.adapter_files[number], _adapter_digests(adapter), told
    )


def _other_adapters(claims: Claims, opened: Sequence[Adapter], folder: Path) -> list[Offender]:
    """Whether the receipt names other adapters than those that were given: the reason for all that
    differs, most likely. Where nothing differs, files of other bytes hold the same adapters."""
    if len(opened) == len(claims.adapters) and not any(
        _changed(claims, number, adapter) for number, adapter in enumerate(opened)
    ):
        return []
    found, merged = ([sorted(files.items()) for files in each]
                     for each in (map(_adapter_digests, opened), claims.adapter_files))  # fmt: skip
    which = "others than those given"
    if sorted(found) == sorted(merged):
        which = "the same, merged in another order"
    told = f"it names {which}: {', '.join(claims.adapters)}"
    return [Offender("other adapters", companion(folder, RECEIPT).name, told)]


def _record(folder: Path) -> dict[str, str]:
    """The digest of the undo record, where it can be read."""
    try:
        path = companion(folder, UNDO)
        return {path.name: digest_of(safe_child(path.parent, path.name))}
    except InfoldError:
        return {}


def _compare_digests(
    what: str, claimed: Mapping[str, str], found: Mapping[str, str], whose: str
) -> list[Offender]:
    """Files whose digest is not the receipt's."""
    offenders = []
    for name in sorted({*claimed, *found}):
        if name not in found:
            told = f"the receipt tells of this file in {whose}, and it is not there"
        elif name not in claimed:
            told = f"the receipt does not tell of this file in {whose}"
        elif claimed[name] != found[name]:
            told = f"BLAKE3 in {whose} is {found[name]}, in the receipt {claimed[name]}"
        else:
            continue
        offenders.append(Offender(what, name, told))
    return offenders


def _explained(plan: Plan, shards: Sequence[Found]) -> set[str]:
    """The shards whose header, tensors, or bytes between them are not as they must be."""
    headers = {planned.name: planned.header.raw for planned in plan.shards}
    return {
        shard.name
        for shard in shards
        if shard.header.raw != headers[shard.name]
        or any(check.tally.wrong for check in shard.checks.values())
        or (shard.between is not None and shard.between.tally.wrong)
    }


def _changed_sides(claims: Claims, plan: Plan, folder: Path) -> list[Offender]:
    """Side files of the output that are not those of the receipt. One that is planned, and cannot
    be read, is an offender already."""
    told, planned = claims.side_files, {*plan.copied, *plan.rewritten}
    found = _digests(folder, {name: kept_name(folder, name) for name in {*told, *planned}})
    told = {n: digest for n, digest in told.items() if n in found or n not in planned}
    return _compare_digests("digest", told, found, "the output")


def _changed_base_sides(claims: Claims, plan: Plan) -> list[Offender]:
    """Side files of the base that are not those that were copied, by the receipt."""
    told = {n: digest for n, digest in claims.side_files.items() if n not in plan.rewritten}
    found = _digests(plan.base.path, {name: name for name in {*told, *plan.copied}})
    return _compare_digests("base changed", told, found, "the base")


def _digests(folder: Path, names: Mapping[str, str]) -> dict[str, str]:
    """Of the files that can be read, by their names in the receipt. names: those -> their own."""
    found = {}
    for name, own in names.items():
        with suppress(InfoldError):
            found[name] = digest_of(safe_child(folder, own))
    return found


# --- tensors -----------------------------------------------------------------------------------


def _find_shards(
    plan: Plan, folder: Path, files: InputFiles, base_hashed: bool, offenders: list[Offender]
) -> list[Found]:
    """The shards of the output that can be read, each tensor with its check."""
    shards = []
    modules: dict[str, Any] = {}  # that were quantized again
    for planned in plan.shards:
        found, different = compare_header(folder.parent if is_lone(folder) else folder, planned)
        offenders += different
        if found is None:
            continue
        path, header = found
        checks: dict[str, Check] = {}
        parts = parts_checks(
            plan.edits, header, path, modules, plan.base, plan.adapters, files, plan.original
        )
        for name, info in planned.header.tensors.items():
            there = header.tensors.get(name)
            if there is None or (there.dtype, there.shape) != (info.dtype, info.shape):
                continue
            if name in parts:
                checks[name] = parts[name]
            elif name in plan.edits and isinstance(plan.edits[name].source, Amended):
                checks[name] = AmendedCheck(plan.base, plan.base.info(name), files)
            elif name in plan.edits:
                checks[name] = EditCheck(
                    plan.edits[name], plan.base, plan.adapters, files, original=plan.original
                )
            else:
                place = plan.base.shards[plan.base.where[name]].path
                checks[name] = BaseCheck(place, plan.base.info(name), files)
        source = between = None
        if planned.same_layout and not different:
            theirs, size = plan.base.shards[planned.source].path, header.file_size
            source = theirs if base_hashed else None
            between = BaseCheck(theirs, TensorInfo("", "U8", (size,), 0, size), files)
        shards.append(Found(planned.name, path, header, checks, source, between))
    return shards


def _wrong_tensors(plan: Plan, shards: Sequence[Found], files: InputFiles) -> list[Offender]:
    wrong = {}
    described: list[Offender] = []
    for shard in shards:
        for name, check in shard.checks.items():
            if check.tally.wrong:
                if isinstance(check, PartCheck | AmendedCheck):
                    described.append(
                        _describe(name, Wrong(check, shard.path, shard.header.tensors[name]), None)
                    )
                    continue
                info = shard.header.tensors[name]
                wrong[name] = Wrong(check, shard.path, info)
    told = hints(plan, wrong, files)
    described += [_describe(name, one, told.get(name)) for name, one in wrong.items()]
    for shard in shards:
        tally = None if shard.between is None else shard.between.tally
        if tally is not None and tally.first is not None:
            detail = f"{tally.wrong:,} bytes differ from the base's, first byte {tally.first[0]:,}"
            described.append(Offender("between tensors", shard.name, detail))
    return described


def _describe(name: str, one: Wrong, hint: str | None) -> Offender:
    tally, shape, what = one.check.tally, one.info.shape, "elements"
    if isinstance(one.check, EditCheck) and one.check.blocks is not None:
        shape, what = one.check.grid, "scales, by block,"
    elif one.info.dtype in BLOCKS:
        shape, what = (one.info.nbytes,), "bytes"
    assert tally.first is not None
    number, stored, expected = tally.first
    index = []
    for size in reversed(shape):
        number, rest = divmod(number, size)
        index.append(rest)
    detail = (
        f"{tally.wrong:,} of {math.prod(shape):,} {what} differ, first {index[::-1]}: "
        f"stored {stored}, expected {expected}"
    )
    kind = "unedited tensor" if isinstance(one.check, BaseCheck) else "edited tensor"
    return Offender(kind, name, f"{detail}; {hint}" if hint else detail)


# --- adapters ----------------------------------------------------------------------------------


def _unused(plan: Plan) -> list[Offender]:
    """Tensors of the adapter files, read anew, that no edit uses."""
    used: set[tuple[int, str]] = set()
    for edit in plan.edits.values():
        if isinstance(edit.source, Replacement):
            used.add((edit.source.adapter, edit.source.key))
        used |= {
            (op.adapter, key)
            for op in edit.operations
            for part, key in op.parts.items()
            if part in _parts_used(op)
        }
    offenders = []
    for number, adapter in enumerate(plan.adapters):
        keys = set(adapter.tensors)
        if adapter.weights.suffix == ".safetensors":
            keys = set(read_header(adapter.weights).tensors)
        mine = [key for n, key in used if n == number]
        for key in sorted(keys.difference(mine)):
            if key in adapter.tensors and _repeats(adapter, key, mine):
                continue  # the other end of a tied pair, which got the same update
            told = f"{adapter.path}: no edit uses it, so what it was trained for is lost"
            offenders.append(Offender("unused adapter tensor", key, told))
    return offenders


def _parts_used(operation: Operation) -> tuple[str, ...]:
    """What enters the formula; the parts of a module are listed with its weight and its bias."""
    method = METHODS[operation.method]
    return method.ON_BIAS if operation.on_bias else method.REQUIRED


def _repeats(adapter: Adapter, key: str, used: Sequence[str]) -> bool:
    """Whether a tensor is equal to one that is used, as it is or transposed."""
    shape = adapter.tensors[key].shape
    for other in used:
        theirs = adapter.tensors[other].shape
        if theirs == shape and torch.equal(adapter.read(key), adapter.read(other)):
            return True
        if len(shape) == 2 and theirs == shape[::-1]:
            if torch.equal(adapter.read(key), adapter.read(other).t()):
                return True
    return False
