"""The loop: collect, train, merge, evaluate, again. Each phase continues where a kill left it.

Iteration n is always base + adapters 1 to n in one rounding, never model n-1 + adapter n: merging
n times into bfloat16 would round n times. So the adapters are the lineage, and full weights are
kept for the current iteration only.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from infold.checkpoint.files import exists, locate, read_json
from infold.checkpoint.shards import open_checkpoint, read_receipt, refuse_unfinished
from infold.disk import storage_errors
from infold.errors import CorruptFile, ProofFailed, Refusal
from infold.extras import missing
from infold.loop.config import FREE, LoopConfig, in_keys, read_config
from infold.loop.engine import open_engine
from infold.loop.folder import (
    Iteration,
    Journal,
    Run,
    digests_of_base,
    write_json,
    write_lines,
)
from infold.loop.measure import measured
from infold.loop.records import check_answers, read_record
from infold.loop.score import score
from infold.loop.task import Task, check_apart, open_task
from infold.merge.prepare import open_plan, prepare
from infold.merge.receipt import Receipt
from infold.merge.run import execute
from infold.plan.quantized import quantization_of
from infold.sizes import plural
from infold.tuners.loading import model_folder
from infold.tuners.settings import TrainSettings
from infold.tuners.train import train_adapter
from infold.version import __version__

__all__ = ["Loop", "checkout", "lineage"]

PathLike = str | os.PathLike[str]
Say = Callable[[str], None]
_SEEDS = 1000  # of one loop: for its iterations


class Loop:
    """A self-improvement loop (docs/loop.md).

    config: a TOML file, or a mapping with the same keys. seed, run: in place of the
    configuration's. control: the same loop in RUN-control that learns from every answer.
    Raises Refusal for a bad configuration or task; lists all offenders.
    """

    def __init__(
        self,
        config: PathLike | Mapping[str, Any],
        *,
        seed: int | None = None,
        run: PathLike | None = None,
        control: bool = False,
    ) -> None:
        found = read_config(config, seed=seed, run=run)
        if control:
            if "steps" not in found.train:
                raise Refusal(
                    "--control: [train] has no steps; the control learns from more rows, and would "
                    "train longer by epochs: give steps, to the run that it is compared with too"
                )
            collect = replace(found.collect, filter="none")
            found = replace(found, run=f"{found.run}-control", collect=collect)
        self.config: LoopConfig = found
        self.folder = Run(found.run)
        self.task: Task = replace(open_task(found.task), seconds=found.stop.verify_seconds)
        self._current: int | None = None  # the iteration whose weights RUN/model has for certain

    def run(self, say: Say = lambda line: None) -> dict[str, Any]:
        """Run to a stop rule, continuing what is there. Returns `lineage(RUN)`, JSON-ready.

        say: called with one line for each phase. Raises Refusal (another base or configuration, a
        task that fails), StorageFailure; what was finished stays, and the next run continues.
        """
        facts, held = self._read()
        with self.folder.locked():
            self._begin(facts, held)
            with storage_errors(self.folder.path):  # where an earlier call came to its end
                (self.folder.path / "stopped.json").unlink(missing_ok=True)
            while True:
                done = self.folder.done()
                if not done:
                    self._evaluate(self.folder.iteration(0), held, say)
                    continue
                stopped = self._stopped(done)
                if stopped:
                    break
                new = self.folder.iteration(len(done))
                counts = self._collect(new, held, say)
                if not counts["rows"]:
                    stopped = _nothing(new, counts)
                    break
                self._train(new, say)
                self._merge(new, say)
                self._evaluate(new, held, say)
            self._tidy(len(self.folder.done()) - 1)
            write_json(self.folder.path / "stopped.json", {"stopped": stopped})
        return lineage(self.folder.path)

    # --- before the first phase ---

    def _read(self) -> tuple[dict[str, Any], list[Any]]:
        """What the run is about, and the held-out problems. Nothing is written before this."""
        config, run = self.config, self.folder
        lacking = missing("train", "transformers", "accelerate")
        lacking += missing("serve", "openai") if config.collect.server else []
        if lacking:
            raise Refusal(lacking)
        if run.strangers():
            raise Refusal(
                f"{run.path}: is no run, and not empty: {', '.join(run.strangers())}; choose "
                "another folder"
            )
        digests = digests_of_base(config.base)
        model_folder(config.base, quantized=True)
        method = TrainSettings.of(config.train).method
        if method != "ia3" and quantization_of(open_checkpoint(config.base)):
            raise Refusal(
                f"{config.base}: is quantized, and only IA³ merges into it as it is; set method = "
                '"ia3" in [train], or give the unquantized base'
            )
        held = self.task.problems("evaluate", config.evaluate.problems, config.seed)
        for problem in held:
            self.task.prompt(problem)  # which refuses what is no prompt
        facts = {
            "infold": __version__,
            "config": config.to_dict(),
            "base": {"path": config.base, **digests},
        }
        return facts, held

    def _begin(self, facts: Mapping[str, Any], held: Sequence[Any]) -> None:
        """Check or make RUN."""
        config, run = self.config, self.folder
        self._current = None
        if exists(run.path / "loop.json"):
            before = run.facts
            if other := _others(before["base"], facts["base"]):
                raise Refusal(
                    f"{run.path}: is a run from another base, {before['base']['path']}: {other} of "
                    f"{config.base} is not what it was; put that back, give the base that it was, "
                    "or another run folder"
                )
            _same(run.path, before["config"], config)
            if not exists(run.path / "held_out.json"):
                raise Refusal(
                    f"{run.path / 'held_out.json'}: is gone, which tells what the scores are of; "
                    "put it back, or take another run folder"
                )
            if read_json(run.path / "held_out.json") != held:
                raise Refusal(
                    f"{run.path}: the task's held-out problems are not those of this run, so "
                    "scores would not compare; undo the change, or take another run folder"
                )
        write_json(run.path / "held_out.json", held)
        write_json(run.path / "loop.json", facts)

    def _stopped(self, done: Sequence[Iteration]) -> str | None:
        """Which rule ends the loop now."""
        stop, last = self.config.stop, len(done) - 1
        if last >= self.config.iterations:
            count = self.config.iterations
            return f"all {count} iterations are done" if count > 1 else "its one iteration is done"
        shares = [read_record(it / "scores.json")["score"]["share"] for it in done]
        best = shares.index(max(shares))
        if stop.patience and last - best >= stop.patience:
            told = plural("iteration", last - best)
            return f"no gain in {told}: iteration {best} is still the best"
        spent = sum(_seconds(it) for it in done)
        if stop.minutes and spent >= 60 * stop.minutes:
            return f"{spent / 60:.1f} minutes are spent, of {stop.minutes:g}"
        return None

    def _tidy(self, number: int) -> None:
        """Full weights of the current iteration, also where the model was removed by hand."""
        if number >= 1:
            self._weights(number)

    # --- the phases ---

    def _weights(self, number: int) -> Path:
        """The folder with the weights of an iteration; merged anew where they are not there, or
        not what they were."""
        if number == 0:
            base = locate(self.config.base)
            refuse_unfinished(base)
            return base
        if self._current != number and not self.folder.holds(number):
            self._write_weights(number)
        self._current = number
        return self.folder.model

    def _write_weights(self, number: int) -> dict[str, str]:
        self._current = None
        device = "cuda" if torch.cuda.is_available() else "cpu"
        out, force = self.folder.model, exists(self.folder.model)
        shards = _rebuild(self.folder, self.config.base, number, out, device, force).shards
        self._current = number
        return shards

    def _collect(self, it: Iteration, held: Sequence[Any], say: Say) -> dict[str, Any]:
        counts = it.read("collect.json")
        if counts is not None:
            return counts
        config = self.config.collect
        seed = self.config.seed * _SEEDS + it.number
        if exists(it / "problems.json"):
            problems = read_json(it / "problems.json")
            if not isinstance(problems, list):
                raise CorruptFile(f"{it / 'problems.json'}: is no list of problems; remove it")
        else:
            problems = self.task.problems("collect", config.problems, seed)
        prompts = [self.task.prompt(problem) for problem in problems]
        check_apart([self.task.prompt(problem) for problem in held], prompts)
        check_apart([json.dumps(p) for p in held], [json.dumps(p) for p in problems])
        write_json(it / "problems.json", problems)
        answers, right, timing = self._answer(
            it, "collect.jsonl", it.number - 1, problems, config.samples, seed
        )
        rows, with_one = [], 0
        for prompt, texts, verdicts in zip(prompts, answers, right, strict=True):
            good = [
                text
                for text, accepted in zip(texts, verdicts, strict=True)
                if (accepted or config.filter == "none") and text.strip()
            ]
            with_one += bool(good)
            rows += [_row(prompt, text) for text in list(dict.fromkeys(good))[: config.keep]]
        write_lines(it / "kept.jsonl", rows)
        counts = {
            "problems": len(problems),
            "answers": sum(map(len, answers)),
            "accepted": sum(map(sum, right)),
            "problems_learnt": with_one,
            "rows": len(rows),
            "filter": config.filter,
            **timing,
        }
        write_json(it / "collect.json", counts)
        told = f"{counts['accepted']:,} of {counts['answers']:,} answers accepted"
        say(_line(it, "collect", f"{told}, {counts['rows']:,} to learn", counts))
        return counts

    def _answer(
        self, it: Iteration, name: str, model: int, problems: Sequence[Any], samples: int, seed: int
    ) -> tuple[list[list[str]], list[list[bool]], dict[str, Any]]:
        """Answers and verdicts for all problems; no chunk of them is ever computed twice."""
        it.path.mkdir(parents=True, exist_ok=True)
        journal = Journal(it / name)
        size = max(1, self.config.collect.batch // max(1, samples))
        chunks = range(-(-len(problems) // size))

        def part(chunk: int) -> Sequence[Any]:
            return problems[chunk * size : (chunk + 1) * size]

        def known(key: str) -> dict[int, Any]:
            return {entry["chunk"]: entry[key] for entry in journal.entries if key in entry}

        sizes = [len(part(chunk)) for chunk in chunks]
        check_answers(journal.path, journal.entries, sizes, max(1, samples))
        before = sum(entry.get("seconds", 0.0) for entry in journal.entries)
        with measured() as timing:
            answered = set(known("answers"))
            missing = [chunk for chunk in chunks if chunk not in answered]
            for chunk in sorted(answered - set(known("right"))):
                self._judge(journal, chunk, part(chunk))
            if missing:
                weights = self._weights(model)
                with open_engine(weights, self.config.collect, it / "server.log") as engine:
                    for chunk in missing:
                        prompts = [self.task.prompt(problem) for problem in part(chunk)]
                        with measured() as took:
                            found = engine.answers(prompts, samples, seed * _SEEDS + chunk)
                        journal.append(
                            {"chunk": chunk, "seconds": took["seconds"], "answers": found}
                        )
                        self._judge(journal, chunk, part(chunk))
        timing["seconds"] = round(timing["seconds"] + before, 3)
        answers, right = known("answers"), known("right")
        return (
            [a for c in chunks for a in answers[c]],
            [r for c in chunks for r in right[c]],
            timing,
        )

    def _judge(self, journal: Journal, chunk: int, problems: Sequence[Any]) -> None:
        answers = next(e["answers"] for e in journal.entries if "answers" in e and
                       e["chunk"] == chunk)  # fmt: skip
        verdicts = [
            [self.task.verify(problem, text) for text in texts]
            for problem, texts in zip(problems, answers, strict=True)
        ]
        journal.append({"chunk": chunk, "right": verdicts})

    def _train(self, it: Iteration, say: Say) -> None:
        if exists(it / "train.json"):
            return
        seed = self.config.seed * _SEEDS + it.number
        settings = TrainSettings.of({**self.config.train, "seed": seed})
        with measured() as timing:
            base = self._weights(it.number - 1)
            try:
                record = train_adapter(base, it / "kept.jsonl", it.adapter, settings, resume=True)
            except Refusal as error:
                reasons = map(in_keys, error.reasons)
                raise Refusal(f"iteration {it.number}, train: {r}" for r in reasons) from None
        facts = {"steps": record.steps, "parameters": record.parameters, "losses": record.losses,
                 "adapter": it.adapter_digests()}  # fmt: skip
        write_json(it / "train.json", facts | timing)
        losses = record.losses
        told = f"{plural('step', record.steps)}, loss {losses['first']:.3f} -> {losses['last']:.3f}"
        say(_line(it, "train", told, timing))

    def _merge(self, it: Iteration, say: Say) -> None:
        if exists(it / "merge.json"):
            return
        with measured() as timing:
            if self.folder.holds(it.number):  # killed between the merge and its record
                shards: dict[str, str] = read_receipt(self.folder.model)["shards"]
                self._current = it.number
            else:
                shards = self._write_weights(it.number)
        write_json(it / "merge.json", {"shards": shards} | timing)
        say(_line(it, "merge", f"base + adapters 1 to {it.number}, one rounding", timing))

    def _evaluate(self, it: Iteration, held: Sequence[Any], say: Say) -> None:
        _, right, timing = self._answer(it, "evaluate.jsonl", it.number, held, 0, self.config.seed)
        found = score(held, [row[0] for row in right])
        write_json(it / "scores.json", {"score": found} | timing)
        interval = f"{found['low']:.1%} to {found['high']:.1%}"
        told = f"{found['right']} of {found['of']} right: {found['share']:.1%} ({interval})"
        say(_line(it, "evaluate", told, timing))


# --- a run that is there --------------------------------------------------------------------------


def lineage(run: PathLike) -> dict[str, Any]:
    """What a run holds, JSON-ready: base, config, stopped, and for each iteration its number,
    score, seconds, and the counts, seconds and memory (bytes) of its phases. An iteration that is
    not complete is there with the phases that are.
    """
    folder = Run.open(run)
    facts = folder.facts
    iterations = []
    number = 0
    while exists((it := folder.iteration(number)).path):
        phases = {name: it.read(f"{name}.json") for name in ("collect", "train", "merge")}
        scored = it.read("scores.json")
        iterations.append(
            {
                "iteration": number,
                "score": scored["score"] if scored else None,
                **phases,
                "evaluate": {k: scored[k] for k in ("seconds", "memory")} if scored else None,
                "adapter": str(it.adapter) if exists(it.adapter) else None,
                "adapter_bytes": _size(it.adapter),
                "seconds": round(_seconds(it), 3),
            }
        )
        number += 1
    stopped = folder.path / "stopped.json"
    return {
        "run": str(folder.path),
        "base": facts["base"],
        "config": facts["config"],
        "iterations": iterations,
        "stopped": read_record(stopped)["stopped"] if exists(stopped) else None,
        "model_bytes": _size(folder.model),
    }


def checkout(run: PathLike, number: int, out: PathLike, *, force: bool = False) -> dict[str, Any]:
    """Rebuild the model of an iteration in the new folder `out`, byte-identical to what it was.

    Returns {iteration, out, shards: {name: BLAKE3}}. Raises Refusal for an iteration that is not
    there or a base that changed, ProofFailed where the bytes are others; then nothing is written.
    """
    folder = Run.open(run)
    base = folder.facts["base"]
    merged = _merged(folder)
    if number == 0:
        raise Refusal(f"{folder.path}: iteration 0 is the base itself, {base['path']}; copy it")
    if number not in merged:
        there = f"it has {', '.join(map(str, merged))}" if merged else "nor any other yet"
        raise Refusal(f"{folder.path}: has no merged iteration {number}; {there}")
    if other := _others(base, digests_of_base(base["path"])):
        raise Refusal(
            f"{base['path']}: is not the base of {folder.path} any more: {other} changed; put back "
            "what was there"
        )
    receipt = _rebuild(folder, base["path"], number, out, force=force)
    return {"iteration": number, "out": receipt.out, "shards": receipt.shards}


def _rebuild(
    folder: Run, base: str, number: int, out: PathLike, device: str = "cpu", force: bool = False
) -> Receipt:
    """Write base + adapters 1 to `number`, in one rounding.

    Where the iteration was merged before, its bytes must come out: else ProofFailed, and nothing
    is written.
    """
    folder.check_adapters(number)
    adapters = folder.adapters(number)
    was = folder.iteration(number).read("merge.json")
    prepared = prepare(open_plan(base, adapters), out, device=device, force=force)
    prepared = replace(prepared, expected=was["shards"] if was else None)
    try:
        return execute(prepared, names=(base, [os.fspath(a) for a in adapters]))
    except ProofFailed as error:
        raise ProofFailed(
            f"{error}: they are not the bytes of iteration {number}, while its adapters are those "
            f"that were trained; so {folder.iteration(number) / 'merge.json'} was changed, or "
            "another infold made it"
        ) from None


def _merged(folder: Run) -> list[int]:
    found: list[int] = []
    while exists(folder.iteration(len(found) + 1) / "merge.json"):
        found.append(len(found) + 1)
    return found


# --- small things ---------------------------------------------------------------------------------


def _same(path: Path, before: Mapping[str, Any], config: LoopConfig) -> None:
    was, now = _flat(before), _flat(json.loads(json.dumps(config.identity)))  # no tuples
    names = sorted({*now, *(n for n in was if n.partition(".")[0] not in FREE)})
    other = [
        f"  {name}: {_told(was, name)} there, {_told(now, name)} now"
        for name in names
        if (name in was, was.get(name)) != (name in now, now.get(name))
    ]
    if other:
        raise Refusal(
            "\n".join(
                [f"{path}: was begun with another configuration; repeat it, or take another run "
                 "folder (iterations and stop may change)", *other]
            )
        )  # fmt: skip


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration by the names that it has in messages: `collect.samples`."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            found |= {f"{name}.{key}": inner for key, inner in value.items()}
        else:
            found[name] = value
    return found


def _told(config: Mapping[str, Any], name: str) -> str:
    return json.dumps(config[name], ensure_ascii=False) if name in config else "nothing"


def _others(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The files of a base that changed, came or went; empty where none did."""
    found = [
        name
        for kind in ("shards", "side_files")
        for name in sorted({*before[kind], *now[kind]})
        if before[kind].get(name) != now[kind].get(name)
    ]
    return ", ".join(found)


def _nothing(it: Iteration, counts: Mapping[str, Any]) -> str:
    of = f"{counts['answers']:,} answers to {counts['problems']:,} problems"
    why = f"none of {of} was accepted"
    if counts["accepted"] or counts["filter"] == "none":
        why = f"of {of} {counts['accepted']:,} were accepted, and those to be learnt are blank"
    return (
        f"iteration {it.number}: {why}, so there is nothing to learn; the run is kept. Easier "
        "problems, more samples or another prompt may help"
    )


def _row(prompt: Any, answer: str) -> dict[str, Any]:
    if isinstance(prompt, str):
        return {"prompt": prompt, "completion": answer}
    return {"messages": [*prompt, {"role": "assistant", "content": answer}]}


def _seconds(it: Iteration) -> float:
    found = [it.read(f"{name}.json") for name in ("collect", "train", "merge", "scores")]
    return sum(float(phase["seconds"]) for phase in found if phase)


def _size(folder: Path) -> int | None:
    if not exists(folder):
        return None
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _line(it: Iteration, phase: str, told: str, timing: Mapping[str, Any]) -> str:
    return f"{it.number:>3}  {phase:<9} {told}, {timing['seconds']:.1f} s"
