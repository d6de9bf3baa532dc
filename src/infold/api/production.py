"""Before the merge and after it: train, bench, methods, deploy, checklist, report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infold.api.paths import PathLike, Progress, Steps, log, settle_first

if TYPE_CHECKING:
    from infold.tuners.record import Training

__all__ = ["bench", "checklist", "deploy", "methods", "report", "train"]


def train(
    base: PathLike,
    data: PathLike,
    out: PathLike,
    *,
    resume: bool = False,
    force: bool = False,
    progress: Steps | None = None,
    **settings: Any,
) -> Training:
    """Train an adapter of `base` on `data`, into the new folder `out`.

    data: JSONL, JSON, CSV, TSV or Parquet, a folder of them, or a Hub data set id.
    settings: the fields of `infold.tuners.settings.TrainSettings`, which are the command line's
    options: method="ia3", epochs=1, eval_split=0.1, ...
    resume: continue an interrupted training. force: start anew, replacing an adapter at `out`.
    progress: called with (steps done, steps in all, last loss).
    Raises Refusal (bad data or settings; lists all offenders; nothing was trained), StorageFailure,
    or TypeError for a setting that does not exist.
    """
    from infold.tuners.settings import TrainSettings
    from infold.tuners.train import train_adapter

    given = TrainSettings.of(settings)
    return train_adapter(base, data, out, given, resume=resume, force=force, progress=progress)


def bench(
    base: PathLike,
    adapter: PathLike,
    merged: PathLike | None = None,
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    batches: Sequence[int] = (1, 4),
    rounds: int = 5,
    starts: int = 3,
    device: str = "cpu",
    dtype: str = "auto",
    progress: Steps | None = None,
) -> dict[str, Any]:
    """Measure base, adapter mode (infold's, and PEFT's where it is installed) and merged model.

    Each runs in processes of its own, in turns (docs/bench.md; needs the extra `serve`).
    prompt_tokens, new_tokens, batches: what is timed. rounds: in each start, after one to warm up.
    starts: how often the processes are launched anew. dtype: "auto" as stored, or one for all.
    progress: called with (steps done, steps in all, None).
    Returns the record, JSON-ready: medians with intervals, and ratios to the base; with `merged` it
    is kept in records/bench.json there. Raises Refusal for what cannot be run, StorageFailure where
    a model's process dies.
    """
    from infold.bench.run import measure_models
    from infold.deploy.facts import check_as_merged
    from infold.deploy.records import keep_record

    if merged is not None:
        check_as_merged(merged)
    record = measure_models(
        base, adapter, merged, prompt_tokens=prompt_tokens, new_tokens=new_tokens, batches=batches,
        rounds=rounds, starts=starts, device=device, dtype=dtype, progress=progress,
    )  # fmt: skip
    if merged is not None:
        keep_record(merged, record, log)
    return record


def methods(
    measure: PathLike | None = None,
    *,
    tokens: int = 64,
    rounds: int = 9,
    adapters_python: PathLike | None = None,
    progress: Steps | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Which adapter methods end in one weight: by infold, by PEFT (tried), or not, and why.

    measure: a base, on which PEFT also attaches each type; `rounds` forward passes of `tokens`
    tokens are timed. adapters_python: the Python of an environment with the `adapters` package,
    which measures bottleneck adapters. progress: called with (steps done, steps in all, None), for
    each part.
    Returns {"methods": rows, "measured": rows}, JSON-ready. Raises Refusal as `bench` does.
    """
    from infold.methods.measure import measure_methods
    from infold.methods.table import method_rows

    measured: list[dict[str, Any]] = []
    if measure is not None:
        measured = measure_methods(
            measure, tokens=tokens, rounds=rounds, adapters_python=adapters_python,
            progress=progress,
        )  # fmt: skip
    return {"methods": [row.as_dict() for row in method_rows(progress)], "measured": measured}


def deploy(
    merged: PathLike,
    out: PathLike | None = None,
    *,
    context: int | None = None,
    license: str | None = None,
    no_measure: bool = False,
    smoke: bool = False,
    port: int = 0,
    requests: int = 30,
    seconds: float = 10,
    timeout: float = 300,
    prompt: str | None = None,
    progress: Steps | None = None,
) -> dict[str, Any]:
    """Write what a server needs beside a merged model, or with `smoke` try a real server on it.

    The bundle (docs/deploy.md): out: a new folder for model and bundle; in place without it.
    context: tokens that memory is computed for. license: for the model card; by default the one
    that the base's card tells. no_measure: do not load and measure the model.
    smoke: write none, but serve the folder, or a GGUF file, on loopback. port: 0 takes a free one.
    requests, seconds: how many, and the time they spread over. timeout: seconds until the server
    must be ready, and for each answer. prompt: what is asked.
    progress: called with (steps done, steps in all, None).
    Returns what `--json` prints: {"out", "files", "config", "kept"}; with `smoke` the record, whose
    `ok` tells the result and whose `problems` say what failed; it is kept in records/smoke.json.
    Raises Refusal, StorageFailure, or an InfoldError for a model that does not run, and a server
    that dies or is late.
    """
    settle_first(merged)
    if not smoke:
        from infold.deploy.bundle import deploy_bundle

        return asdict(deploy_bundle(
            merged, out, context=context, licence=license, measured=not no_measure,
            progress=progress,
        ))  # fmt: skip
    from infold.deploy.records import keep_record
    from infold.deploy.smoke import PROMPT, smoke_test

    if out is not None or context is not None or license is not None or no_measure:
        raise TypeError("smoke=True writes no bundle: out, context, license, no_measure")
    record = smoke_test(
        merged, port=port, requests=requests, seconds=seconds, timeout=timeout,
        prompt=PROMPT if prompt is None else prompt, progress=progress,
    )  # fmt: skip
    keep_record(merged, record, log)
    return record


def checklist(
    base: PathLike, adapter: PathLike, merged: PathLike, *, progress: Progress | None = None
) -> dict[str, Any]:
    """Check every box from the trained adapter to delivery: PASS, FAIL or NOT DONE, and why.

    The merge is verified anew; the rest is read from the records of `bench`, `verify` and `deploy`.
    progress: called with (bytes verified, bytes in all).
    Returns the record, whose `ok` says that no box failed and whose `boxes` are {"part", "title",
    "status", "evidence", "command"}; it is kept in records/checklist.json of the merged folder.
    Raises Refusal for paths that are no base, adapter and merged folder; never ProofFailed.
    """
    from infold.deploy.checklist import check_boxes, checklist_record
    from infold.deploy.records import keep_record

    settle_first(merged)
    settle_first(base, refuse=True)
    record = checklist_record(check_boxes(base, adapter, merged, progress=progress), merged)
    keep_record(merged, record, log)
    return record


def report(
    folder: PathLike, out: PathLike | None = None, *, record: Sequence[PathLike] = ()
) -> Path:
    """Write one self-contained page of what was merged, measured and checked (docs/report.md).

    folder: a merged folder or GGUF file, or JSON records. out: the .html or .md file; by default
    NAME-report.html here. record: JSON records from elsewhere. Returns the page's path.
    Raises Refusal (no records, shards that changed after the merge), CorruptFile, StorageFailure.
    """
    from infold.deploy.facts import check_for_report
    from infold.inspect.update import describe_update
    from infold.report.write import write_report

    return write_report(folder, out, record, check_for_report, describe_update)[0]
