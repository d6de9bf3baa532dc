"""The deployment checklist: each box is checked by what was done, never by a mark that was set."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal

from infold.checkpoint.adapter import Adapter, open_adapter
from infold.checkpoint.files import digest_of, exists, locate, read_object, safe_child
from infold.checkpoint.shards import CARD, Checkpoint, is_lone, open_checkpoint
from infold.checkpoint.untrained import telling
from infold.deploy.bundle import bundle_problems, read_config
from infold.deploy.facts import CONFIG, UNDO, Facts, read_facts, receipt_digest
from infold.deploy.records import read_records
from infold.errors import InfoldError, Refusal
from infold.formats import QUANTIZED
from infold.sizes import plural
from infold.verify.weights import verify_checkpoint
from infold.version import __version__

__all__ = ["Box", "check_boxes", "checklist_record"]

Status = Literal["PASS", "FAIL", "NOT DONE"]
_TRAINING = "infold-training.json"
_SLACK = 0.02  # a merged model that is surely slower or larger than this has not become the base
_WIDE = 0.10  # an interval that reaches further above the base's says nothing
# what a record may raise
_UNREADABLE = (KeyError, TypeError, ValueError, IndexError, AttributeError, InfoldError)
_SURE = 0.90  # the least probability of an interval of speed; memory varies little


@dataclass(frozen=True)
class Box:
    """One line of the checklist. command: what produces the evidence, if there is a verb for it."""

    part: str
    title: str
    status: Status
    evidence: str
    command: str


@dataclass(frozen=True)
class _Evidence:
    """All that the boxes look at."""

    base: Checkpoint
    adapter: Adapter
    facts: Facts
    training: Mapping[str, Any] | None
    records: Mapping[str, Mapping[str, Any]]
    config: Mapping[str, Any] | None
    words: Mapping[str, str]  # base, adapter and merged as a shell takes them
    progress: Callable[[int, int], None] | None

    def stale(self, record: Mapping[str, Any]) -> bool:
        """Whether a record tells of another merge than the one that lies there."""
        return record.get("receipt") not in (None, self.facts.digest)


# what a quantized weight is stored as, below its module; and what one of lies there in any case
_PARTS = {"weight", *(part for form in QUANTIZED.values() for part in form.PARTS)}
_CORES = {"weight", *(part for form in QUANTIZED.values() for part in form.CORE)}
_Shapes = Mapping[str, tuple[int, ...]]
_Found = tuple[Status, str] | tuple[Status, str, str]  # evidence; a command before the box's own
_Check = Callable[[_Evidence], _Found]


def check_boxes(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    merged: str | os.PathLike[str],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> list[Box]:
    """Check every box. The merge is verified anew; the rest is read from records.

    progress: called with (bytes verified, bytes in all).
    Raises Refusal for paths that are no base, adapter and merged folder.
    """
    if is_lone(locate(merged)):
        name = shlex.quote(os.fspath(merged))
        raise Refusal(
            f"{merged}: the checklist takes merged folders, and a GGUF file has none for records: "
            f"`infold verify {name}` proves the merge, `infold deploy {name} --smoke` serves it"
        )
    facts, opened = read_facts(merged), open_adapter(adapter)
    training = opened.path / _TRAINING
    evidence = _Evidence(
        base=open_checkpoint(base),
        adapter=opened,
        facts=facts,
        training=read_object(training) if exists(training) else None,
        records=read_records(facts.folder),
        config=read_config(facts.folder),
        words={
            "base": shlex.quote(os.fspath(base)),
            "adapter": shlex.quote(os.fspath(adapter)),
            "merged": shlex.quote(os.fspath(merged)),
            "new": shlex.quote(_new_name(adapter)),
            "again": shlex.quote(_new_name(merged)),
            "method": _method(opened),
        },
        progress=progress,
    )
    boxes = []
    for part, title, check, command in _BOXES:
        status, told, *better = check(evidence)
        words = (better or [command])[0].format(**evidence.words)
        boxes.append(Box(part, title, status, told, words))
    return boxes


def _new_name(folder: str | os.PathLike[str]) -> str:
    """A name beside a folder that nothing has: what is made again replaces nothing."""
    given = Path(folder) if os.path.isdir(folder) else Path(Path(folder).name)  # a Hub id
    stem = given if given.name not in ("", "..") else given.resolve()
    numbers = (stem.with_name(f"{stem.name}-{n}") for n in count(2))
    return os.fspath(next(path for path in numbers if not os.path.lexists(path)))


def _method(adapter: Adapter) -> str:
    """As `infold train --method` names it."""
    return "dora" if adapter.config.get("use_dora") else str(adapter.config["peft_type"]).lower()


def checklist_record(boxes: list[Box], merged: str | os.PathLike[str]) -> dict[str, Any]:
    """The boxes as a record, for `infold report`. ok: no box failed."""
    return {
        "kind": "checklist",
        "version": 1,
        "infold": __version__,
        "receipt": receipt_digest(locate(merged)),
        "ok": all(box.status != "FAIL" for box in boxes),
        "boxes": [asdict(box) for box in boxes],
    }


def _of(file: str) -> Callable[[_Check], _Check]:
    """Of a check whose evidence is in one file: another version's, or one that was edited by hand,
    fails."""

    def guard(check: _Check) -> _Check:
        def guarded(e: _Evidence) -> _Found:
            try:
                return check(e)
            except _UNREADABLE as error:
                why = f"{type(error).__name__} {error}"
                return "FAIL", f"{file} cannot be read, make it again: {why}"

        return guarded

    return guard


# --- the boxes -----------------------------------------------------------------------------------


def _trained(e: _Evidence) -> _Found:
    moved = False
    # what tells: other parts are random, or the base's own, from the start
    starts = {name: telling(name) for name in e.adapter.tensors}
    none = all(start is None for start in starts.values())
    for name, start in starts.items():
        for piece in e.adapter.pieces(name):
            values = piece.double()
            if not bool(values.isfinite().all()):
                return "FAIL", f"{name} holds values that are not finite"
            if none or start is not None:
                moved = moved or bool((values != (start or 0.0)).any())
    if not moved:
        return "FAIL", "all tensors are as they were before training: it changes nothing"
    told = f"{plural('tensor', len(e.adapter.tensors))}, finite, changed by training"
    if e.training is not None:
        told += f"; {e.training.get('steps')} steps, recorded"
    return "PASS", told


@_of(_TRAINING)
def _validated(e: _Evidence) -> _Found:
    if e.training is None:
        return "NOT DONE", f"no {_TRAINING} beside the adapter"
    losses = e.training.get("losses", {})
    first, last = losses.get("eval_first"), losses.get("eval_last")
    if first is None or last is None:
        return "NOT DONE", "trained without held-out rows"
    accuracy = losses.get("eval_accuracy")
    also = f", accuracy {accuracy:.3f}" if isinstance(accuracy, float) else ""
    told = f"loss on held-out rows {first:.4f} -> {last:.4f}{also}"
    return ("PASS" if last < first else "FAIL"), told


def _baseline(e: _Evidence) -> _Found:
    def told(record: Mapping[str, Any]) -> _Found:
        base = record.get("models", {}).get("base")
        if not base:
            return "NOT DONE", "records/bench.json has no figures of the base"
        times = [
            f"{m.replace('_', ' ')}: {base[m]['median']:.4g}" for m in base if "bytes" not in m
        ]
        return "PASS", "; ".join(times)

    return _of_record(e, "bench", told)


def _merged(e: _Evidence) -> _Found:
    verdict = verify_checkpoint(e.base.path, [e.adapter.path], e.facts.folder, progress=e.progress)
    if not verdict.ok:
        first = verdict.offenders[0]
        count = plural("offender", len(verdict.offenders))
        return "FAIL", f"{count}, first {first.where}: {first.detail}"
    return "PASS", (
        f"{verdict.identical} tensors equal to the base's, {verdict.recomputed} to their "
        f"recomputation, proven in {verdict.seconds:.1f} s"
    )


def _parameters(e: _Evidence) -> _Found:
    was, now = ({n: c.info(n).shape for n in c.where} for c in (e.base, e.facts.checkpoint))
    stored, resized = _stored_anew(e.facts.receipt), _resized(e.facts.receipt, was, now)
    parts = {f"{name}.{part}" for name in stored for part in _PARTS}
    differing = {n for n in {*was, *now} if was.get(n) != now.get(n)} - resized
    # the codes may have gone for floats, or other codes: that there are none is a lost weight
    lost = [
        f"{name}.weight"
        for name in stored
        if name not in now and not any(f"{name}.{core}" in now for core in _CORES)
    ]
    different = [*(differing - parts), *lost]
    if different:
        count_of = plural("tensor", len(different))
        return "FAIL", f"shape or name of {count_of} differ, as of {min(different)}"
    count = sum(math.prod(shape) for shape in now.values())
    what = "packed elements" if e.facts.parameters is None else "parameters"
    told = f"{count:,} {what} in {plural('tensor', len(now))}, each of the base's shape"
    if differing:
        told += f"; but for the parts of {len(stored)} quantized weights, which are stored "
        told += "otherwise now"
    for name in sorted(resized):
        told += f"; but for {name}, of {was[name][0]:,} rows, which the adapter replaces by "
        told += f"{now[name][0]:,}"
    return "PASS", told


def _stored_anew(receipt: Mapping[str, Any]) -> set[str]:
    """Modules of which the merge stores other tensors than the base: the same weights, converted,
    or with scales that were codes. That they are right is another box's proof."""
    told = receipt.get("conversion") or {"touched": (), "beside": ()}
    sources = [edit["source"] for edit in receipt["edits"]]
    names = [s[key] for s in sources for key in ("decoded", "original") if key in s]
    return {*told["touched"], *told["beside"], *(name.removesuffix(".weight") for name in names)}


def _resized(receipt: Mapping[str, Any], was: _Shapes, now: _Shapes) -> set[str]:
    """Tensors that an adapter brings with another number of rows, as embeddings of a vocabulary
    with new tokens, and that have the shape that the receipt tells."""
    return {
        edit["tensor"]
        for edit in receipt["edits"]
        if (name := edit["tensor"]) in was
        and now.get(name) == tuple(edit["shape"]) != was[name]
        and now[name][1:] == was[name][1:]
    }


def _functions(e: _Evidence) -> _Found:
    return _of_record(
        e,
        "smoke",
        lambda r: (
            ("PASS" if r["same"] else "FAIL"),
            f"{r['server']} answers {r['served']!r}, in process {r['local']!r}",
        ),
    )


def _speed(e: _Evidence) -> _Found:
    return _of_record(e, "bench", lambda r: _compared(r, "speed"))


def _memory(e: _Evidence) -> _Found:
    return _of_record(e, "bench", lambda r: _compared(r, "memory"))


def _sampling(e: _Evidence) -> _Found:
    return _of_record(
        e,
        "outputs",
        lambda r: (
            ("PASS" if r["ok"] else "FAIL"),
            "adapter mode and merged " + (_agreement(r) if r["ok"] else "differ"),
        ),
    )


def _agreement(record: Mapping[str, Any]) -> str:
    merged, pairs = record["differences"]["merged"], record["continuations"]
    same = sum(pair["differs_at"] is None for pair in pairs)
    return (
        f"agree within what rounding does: the same best token at {merged['agreement']:.2%} of "
        f"{merged['positions']:,} positions, {same} of {len(pairs)} greedy continuations equal"
    )


def _stable(e: _Evidence) -> _Found:
    return _of_record(
        e,
        "smoke",
        lambda r: (
            ("PASS" if r["stable"] else "FAIL"),
            "; ".join(r["problems"])
            if not r["stable"]
            else f"{r['requests']} requests over {r['seconds']} s: median "
            f"{r['latency_seconds']['median']} s, memory {r['memory_bytes']['first']:,} -> "
            f"{r['memory_bytes']['last']:,} bytes",
        ),
    )


@_of(CONFIG)
def _configured(e: _Evidence) -> _Found:
    if e.config is None:
        return "NOT DONE", f"no {CONFIG}"
    if e.stale(e.config):
        return "FAIL", f"{CONFIG} tells of another merge"
    problems = bundle_problems(e.facts.folder, e.config)
    return ("FAIL", "; ".join(problems)) if problems else ("PASS", f"{CONFIG} fits this merge")


@_of(CONFIG)
def _measured(e: _Evidence) -> _Found:
    found = (e.config or {}).get("performance_metrics", {})
    if not found.get("measured"):
        return "NOT DONE", str(found.get("why", f"no {CONFIG}"))
    if e.config is not None and e.stale(e.config):
        return "FAIL", f"{CONFIG} tells of another merge"
    rate = found["decode_tokens_per_second"]
    told = f"{rate['median']:.1f} tokens/s ({rate['low']:.1f} to {rate['high']:.1f})"
    return "PASS", f"{told} on {found['device']}, in {CONFIG}"


@_of(CONFIG)
def _rollback(e: _Evidence) -> _Found:
    way = (e.config or {}).get("rollback")
    if not way:
        return "NOT DONE", f"no {CONFIG} with a rollback plan"
    if not exists(e.facts.folder / CARD):
        return "FAIL", f"{CARD}, which tells the plan, is gone"
    if way["exact"]:
        if not exists(e.facts.folder / UNDO):
            return "FAIL", f"the plan needs {UNDO}, which is gone"
        return "PASS", f"{way['command']}: from {UNDO}"
    if {s.name: digest_of(s.path) for s in e.base.shards} != e.facts.receipt["base"]["shards"]:
        return "FAIL", "the base given is not the one that was merged, by the receipt's digests"
    command = str(way["command"])
    # a bundle of an earlier version tells no caveat, and may name a download all the same
    if caveat := way.get("caveat", "" if command.startswith("cp ") else "it tells no commit"):
        told = (
            f"{command}: {caveat}. Merge with --undo, which gives the base bit for bit, or keep "
            f"{e.words['base']}, which has the receipt's digests"
        )
        return "NOT DONE", told, _UNDO
    return "PASS", f"{command}; {e.words['base']} has the receipt's digests"


@_of(CONFIG)
def _notes(e: _Evidence) -> _Found:
    if e.config is None:
        return "NOT DONE", f"no {CONFIG}"
    scripts = [n for n in e.config.get("serving", []) if exists(safe_child(e.facts.folder, n))]
    lacking = set(e.config.get("serving", [])) - set(scripts)
    if lacking or not scripts:
        return "FAIL", f"recipes are gone: {', '.join(sorted(lacking)) or 'all'}"
    return "PASS", f"usage example, and recipes: {', '.join(Path(n).stem for n in scripts)}"


def _compared(record: Mapping[str, Any], what: str) -> _Found:
    """The merged model against the base, by `comparisons` of a bench record: each is {model,
    what: "speed" or "memory", metric, ratio, low, high}, over the base, more is worse."""
    told_of = [c for c in record.get("comparisons", []) if c["what"] == what]
    found = [c for c in told_of if c.get("model", "merged") == "merged"]
    if not found:
        return "NOT DONE", f"records/bench.json compares no {what} of merged and base"
    told = "; ".join(_ratio(c) for c in found)
    alone = [c for c in found if c.get("coverage", 1) <= 0]
    least = _SURE if what == "speed" else 0
    sure = [c for c in found if c not in alone and c.get("coverage", 1) >= least]
    if any(c["low"] > 1 + _SLACK for c in sure):
        return "FAIL", told
    more = "starts" if what == "memory" else "rounds"  # a start gives one value of memory
    if alone:
        return "NOT DONE", f"one value, of no interval: measure with more {more}: {told}"
    if len(sure) < len(found):
        return "NOT DONE", f"too wide to tell, take more {more}: {told}"
    if any(c["high"] > 1 + _WIDE for c in found):
        return "NOT DONE", f"too wide to tell, take a quieter machine, or more {more}: {told}"
    return "PASS", told


def _ratio(c: Mapping[str, Any]) -> str:
    span = f"{c['low']:.3f} to {c['high']:.3f}" if c.get("coverage", 1) > 0 else "one value"
    return f"{c['metric']} {c['ratio']:.3f}x the base's ({span})"


def _of_record(e: _Evidence, kind: str, check: Callable[[Mapping[str, Any]], _Found]) -> _Found:
    record = e.records.get(kind)
    if record is None:
        return "NOT DONE", f"no records/{kind}.json in the merged folder"
    if e.stale(record):
        return "FAIL", f"records/{kind}.json tells of another merge"
    return _of(f"records/{kind}.json")(lambda _: check(record))(e)


_TRAIN = "infold train {base} DATA --out {new} --method {method} --eval-split 0.1"
_BENCH = "infold bench {base} {adapter} {merged}"
_UNDO = "infold merge {base} {adapter} --out {again} --undo"
_OUTPUTS = "infold verify {base} {adapter} {merged} --outputs"
_DEPLOY, _SMOKE = "infold deploy {merged}", "infold deploy {merged} --smoke"
_BOXES: tuple[tuple[str, str, _Check, str], ...] = (
    ("before", "adapter trained and saved", _trained, _TRAIN),
    ("before", "validated on held-out data", _validated, _TRAIN),
    ("before", "baseline recorded", _baseline, _BENCH),
    ("merge", "merged", _merged, "infold verify {base} {adapter} {merged}"),
    ("merge", "parameter count unchanged", _parameters, "infold inspect {merged}"),
    ("merge", "functions normally", _functions, _SMOKE),
    ("after", "speed", _speed, _BENCH),
    ("after", "memory", _memory, _BENCH),
    ("after", "outputs sampled", _sampling, _OUTPUTS),
    ("after", "stable over time", _stable, _SMOKE),
    ("delivery", "configuration saved", _configured, _DEPLOY),
    ("delivery", "benchmark recorded", _measured, _DEPLOY),
    ("delivery", "rollback plan", _rollback, _DEPLOY),
    ("delivery", "API notes", _notes, _DEPLOY),
)
