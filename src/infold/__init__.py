"""infold: fold trained adapters (IA³, LoRA, DoRA) into model weights, streamed, exact, proven.

    import infold
    receipt = infold.merge("base", ["adapter"], "merged")
    verdict = infold.verify("merged")

The functions below are the command line's verbs, with the same names and defaults. PyTorch is
imported when one of them is called. Each raises InfoldError and nothing else for what is wrong
with its input or the disk: Refusal (and CorruptFile, a kind of it) or StorageFailure.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from infold.errors import CorruptFile, InfoldError, ProofFailed, Refusal, StorageFailure
from infold.version import __version__

if TYPE_CHECKING:
    from infold.loop.run import Loop
    from infold.merge.receipt import Receipt
    from infold.merge.restore import Undone
    from infold.tuners.combine import Combined
    from infold.tuners.config import IA3Config, LoraConfig
    from infold.tuners.model import attach, load
    from infold.tuners.record import Training
    from infold.verify.verdict import Offender, Verdict

__all__ = [
    "Combined",
    "CorruptFile",
    "IA3Config",
    "InfoldError",
    "Loop",
    "LoraConfig",
    "Offender",
    "ProofFailed",
    "Receipt",
    "Refusal",
    "StorageFailure",
    "Training",
    "Undone",
    "Verdict",
    "__version__",
    "attach",
    "bench",
    "checklist",
    "combine",
    "deploy",
    "inspect",
    "load",
    "merge",
    "methods",
    "report",
    "swap",
    "train",
    "undo",
    "verify",
]

# A room and its verb share a name. Importing a package for the first time binds its name here, so
# do that now (the rooms' __init__ import nothing), and let the functions below take the names.
for _room in ("merge", "verify", "inspect", "bench", "methods", "deploy", "report"):
    import_module(f"infold.{_room}")

_TYPES = {
    "Combined": "tuners.combine",
    "IA3Config": "tuners.config",
    "Loop": "loop.run",
    "LoraConfig": "tuners.config",
    "Offender": "verify.verdict",
    "Receipt": "merge.receipt",
    "Training": "tuners.record",
    "Undone": "merge.restore",
    "Verdict": "verify.verdict",
    "attach": "tuners.model",
    "load": "tuners.model",
}

PathLike = str | os.PathLike[str]
Progress = Callable[[int, int], None]


# fmt: off
@overload
def merge(
    base: PathLike, adapters: PathLike | Sequence[PathLike], out: PathLike | None = ..., *,
    max_memory: int | str = ..., device: str = ..., threads: int | None = ..., dry_run:
    Literal[False] = ..., force: bool = ..., sha256: bool = ..., undo: bool = ..., in_place:
    bool = ..., promote: bool = ..., dequantize: bool = ..., requantize: bool = ..., dtype: str
    = ..., base_16bit: PathLike | None = ..., lossy: bool = ..., progress: Progress | None = ...,
) -> Receipt: ...
@overload
def merge(
    base: PathLike, adapters: PathLike | Sequence[PathLike], out: PathLike | None = ..., *,
    max_memory: int | str = ..., device: str = ..., threads: int | None = ..., dry_run:
    Literal[True], force: bool = ..., sha256: bool = ..., undo: bool = ..., in_place: bool =
    ..., promote: bool = ..., dequantize: bool = ..., requantize: bool = ..., dtype: str = ...,
    base_16bit: PathLike | None = ..., lossy: bool = ..., progress: Progress | None = ...,
) -> dict[str, Any]: ...
# fmt: on
def merge(
    base: PathLike,
    adapters: PathLike | Sequence[PathLike],
    out: PathLike | None = None,
    *,
    max_memory: int | str = 1 << 30,
    device: str = "cpu",
    threads: int | None = None,
    dry_run: bool = False,
    force: bool = False,
    sha256: bool = False,
    undo: bool = False,
    in_place: bool = False,
    promote: bool = False,
    dequantize: bool = False,
    requantize: bool = False,
    dtype: str = "auto",
    base_16bit: PathLike | None = None,
    lossy: bool = False,
    progress: Progress | None = None,
) -> Receipt | dict[str, Any]:
    """Merge adapters, in the order given and with one rounding at the end, into a new checkpoint.

    base: a folder, a .safetensors or GGUF file, or a Hub id. adapters: PEFT folders or Hub ids.
    out: a new folder, or of a GGUF base a .gguf file.
    max_memory: for buffers and factors, on top of what Python and PyTorch take: bytes, or a text
    such as "512MiB". device: "cpu", "cuda" or "cuda:N". threads: by default the processors, at
    most 8. dry_run: check everything, write nothing, and return the plan as JSON-ready values;
    without `out`, all but the place.
    force: replace an output of an earlier merge. sha256: add these digests to the receipt.
    undo: also write what `infold.undo` needs. in_place: edit the base's folder itself, instead of
    `out`; always with an undo record (docs/undo.md).
    promote, dequantize, requantize: what to do with quantized weights that an adapter does not fold
    into: write those of IA³ vectors, or all that an adapter touches, as "bf16", "f16" or "f32"
    (dtype; "auto": as the config tells), or round them into their own format again. base_16bit: the
    unquantized checkpoint that their values are taken from. lossy: round scales of four bits
    (NVFP4), and measure the error (docs/quantized.md).
    progress: called with (bytes done, bytes in all), from several threads.
    Raises Refusal for bad input: its `reasons` list all offenders, and nothing is left behind.
    Raises CorruptFile, a Refusal, for files that break their format's rules, and StorageFailure
    where the system or the Hub says no.
    """
    from infold.merge.options import Options
    from infold.merge.prepare import check, open_plan, prepare
    from infold.merge.run import execute

    given = _listed(adapters)
    _one_place(out, in_place or (dry_run and out is None))
    convert = Options(promote, dequantize, requantize, dtype, base_16bit, lossy)
    if in_place:
        if sha256:
            raise Refusal("--sha256 does not go with --in-place")
        convert.check_in_place()
        from infold.merge.inplace import merge_in_place

        return merge_in_place(
            base, given, max_memory=max_memory, device=device, threads=threads, dry_run=dry_run,
            lossy=lossy, progress=progress, told=_log,
        )  # fmt: skip
    _settle(base, refuse=True)
    plan = open_plan(base, given, convert)
    if out is None:  # a dry run without a place
        check(plan, max_memory, device, threads, undo)
        return plan.summary()
    prepared = prepare(
        plan, out, max_memory=max_memory, device=device, threads=threads, force=force, undo=undo
    )
    if dry_run:
        return prepared.plan.summary()
    names = os.fspath(base), [os.fspath(a) for a in given]
    return execute(prepared, sha256=sha256, progress=progress, names=names)


def undo(
    merged: PathLike,
    out: PathLike | None = None,
    *,
    max_memory: int | str = 1 << 30,
    device: str = "cpu",
    threads: int | None = None,
    in_place: bool = False,
    progress: Progress | None = None,
) -> Undone:
    """Restore the base of a merged folder or GGUF file that has an undo record, byte for byte.

    Neither base nor adapters are needed. out: the new folder or .gguf file; in_place: turn the
    model itself back into the base, instead of `out`. The other arguments are those of `merge`.
    Raises Refusal (CorruptFile) where there is no record, or it is damaged or of another output,
    before anything is written; where the shards were changed, nothing is left. StorageFailure as
    `merge` does.
    """
    _one_place(out, in_place)
    if in_place:
        from infold.merge.inplace import undo_in_place

        return undo_in_place(
            merged, max_memory=max_memory, device=device, threads=threads, progress=progress,
            told=_log,
        )  # fmt: skip
    from infold.merge.restore import undo_checkpoint

    _settle(merged)
    return undo_checkpoint(
        merged, out or "", max_memory=max_memory, device=device, threads=threads, progress=progress
    )


def swap(
    merged: PathLike,
    adapters: PathLike | Sequence[PathLike],
    out: PathLike | None = None,
    *,
    max_memory: int | str = 1 << 30,
    device: str = "cpu",
    threads: int | None = None,
    force: bool = False,
    in_place: bool = False,
    lossy: bool = False,
    progress: Progress | None = None,
) -> Receipt:
    """Undo a merged folder or GGUF file and merge other adapters, in one pass, without the base.

    The output is what merging the base with `adapters` would give, with an undo record. `merged`
    must have one, too. The arguments are those of `merge`; raises as `undo` and `merge` do.
    """
    given = _listed(adapters)
    _one_place(out, in_place)
    if in_place:
        from infold.merge.inplace import swap_in_place

        return swap_in_place(
            merged, given, max_memory=max_memory, device=device, threads=threads, lossy=lossy,
            progress=progress, told=_log,
        )  # fmt: skip
    from infold.merge.restore import open_swap, swap_checkpoint

    _settle(merged)
    prepared = open_swap(
        merged, given, out or "", max_memory=max_memory, device=device, threads=threads,
        force=force, lossy=lossy,
    )  # fmt: skip
    names = [os.fspath(adapter) for adapter in given]
    return swap_checkpoint(prepared, progress=progress, names=names)


def _one_place(out: PathLike | None, in_place: bool) -> None:
    if in_place == (out is not None):
        raise TypeError("give either out or in_place=True")


def _log(settled: object) -> None:
    logging.getLogger("infold").warning("%s", settled)


def _settle(folder: PathLike | None, *, refuse: bool = False) -> None:
    """Finish what a kill left of an edit in place, if there is such a thing."""
    from infold.checkpoint.shards import JOURNAL, companion

    if folder is not None and os.path.lexists(companion(Path(folder), JOURNAL)):
        from infold.merge.inplace import settle

        if settled := settle(folder, refuse=refuse):
            _log(f"{os.fspath(folder)}: {settled}")


# fmt: off
@overload
def combine(
    adapters: PathLike | Sequence[PathLike], out: PathLike, *, weights: Sequence[float], kind: str,
    density: float | None = ..., majority_sign: str = ..., seed: int = ..., force: bool = ...,
    svd_rank: int | None = ..., svd_clamp: float | None = ..., dry_run: Literal[False] = ...,
) -> Combined: ...
@overload
def combine(
    adapters: PathLike | Sequence[PathLike], out: PathLike, *, weights: Sequence[float], kind: str,
    density: float | None = ..., majority_sign: str = ..., seed: int = ..., force: bool = ...,
    svd_rank: int | None = ..., svd_clamp: float | None = ..., dry_run: Literal[True],
) -> dict[str, Any]: ...
# fmt: on
def combine(
    adapters: PathLike | Sequence[PathLike],
    out: PathLike,
    *,
    weights: Sequence[float],
    kind: str,
    density: float | None = None,
    majority_sign: str = "total",
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    seed: int = 0,
    force: bool = False,
    dry_run: bool = False,
) -> Combined | dict[str, Any]:
    """Combine IA³ or LoRA adapters of one base into one adapter folder (docs/combine.md).

    adapters: PEFT folders or Hub ids. weights: one finite number for each; they are not normalised.
    kind: the command line's --type. density: the share of elements that pruning keeps, in (0, 1].
    svd_rank (default: the largest), svd_clamp (a quantile of the factors): of svd kinds. seed: for
    DARE. dry_run: only return the plan, JSON-ready. New tensors are float32, or float64 as one's.
    Raises Refusal (bad input; lists all offenders; nothing is written) or StorageFailure.
    """
    from infold.tuners.combine import check_output, plan_combination, write_combination

    plan = plan_combination(
        _listed(adapters), weights, kind, density=density, majority_sign=majority_sign,
        svd_rank=svd_rank, svd_clamp=svd_clamp, seed=seed,
    )  # fmt: skip
    if dry_run:
        check_output(plan, out, force)
        return plan.summary()
    return write_combination(plan, out, force=force)


def inspect(path: PathLike, *, base: PathLike | None = None) -> dict[str, Any]:
    """Describe an adapter, a checkpoint (a GGUF file too) or a merged model, JSON-ready.

    `kind` in the result tells which of the three it is. base: for an adapter, the checkpoint whose
    tensors it would edit. Raises Refusal for what is none of them, for a receipt that infold did
    not write, and for an adapter that does not fit its base; StorageFailure as `merge` does.
    """
    from infold.inspect.describe import describe_path

    _settle(path)
    return describe_path(path, base)


@overload
def verify(
    merged: PathLike,
    /,
    *,
    progress: Progress | None = ..., outputs: bool = ..., prompts: PathLike | None = ...,
    text: PathLike | None = ..., new_tokens: int = ..., device: str = ...,
) -> Verdict: ...  # fmt: skip


@overload
def verify(
    *,
    merged: PathLike,
    progress: Progress | None = ..., outputs: bool = ..., prompts: PathLike | None = ...,
    text: PathLike | None = ..., new_tokens: int = ..., device: str = ...,
) -> Verdict: ...  # fmt: skip


@overload
def verify(
    base: PathLike | None,
    adapters: PathLike | Sequence[PathLike],
    merged: PathLike,
    *,
    progress: Progress | None = ..., outputs: bool = ..., prompts: PathLike | None = ...,
    text: PathLike | None = ..., new_tokens: int = ..., device: str = ...,
) -> Verdict: ...  # fmt: skip


def verify(
    base: PathLike | None = None,
    adapters: PathLike | Sequence[PathLike] = (),
    merged: PathLike | None = None,
    *,
    progress: Progress | None = None,
    outputs: bool = False,
    prompts: PathLike | None = None,
    text: PathLike | None = None,
    new_tokens: int = 32,
    device: str = "cpu",
) -> Verdict:
    """Prove that a merged folder or GGUF file is what base and adapters make, byte for byte.

    `verify(merged)` takes base and adapters from the receipt, and checks their digests;
    `verify(base, adapters, merged)` takes those that are given.
    outputs: also run the base with its adapters unmerged, and the merged model, and compare their
    logits (docs/verify.md; needs transformers). prompts, text: files for that, one prompt a line.
    new_tokens: of each greedy continuation. device: "cpu", "cuda" or "cuda:N", for the outputs.
    What running found is kept in records/outputs.json of the merged folder, for `checklist`.
    Returns a Verdict whose `ok` tells the result and whose `offenders` lists every difference.
    Raises Refusal for inputs that make no merge, StorageFailure as `merge` does; never ProofFailed.
    """
    from infold.verify.weights import verify_checkpoint

    given = _listed(adapters)
    if merged is None and base is not None and not given:
        base, merged = None, base
    if merged is None:
        raise TypeError("verify takes (merged) or (base, adapters, merged)")
    _settle(merged)
    _settle(base, refuse=True)
    if not outputs:
        return verify_checkpoint(base, given, merged, progress=progress)
    from infold.deploy.records import keep_record
    from infold.verify.both import verify_with_outputs

    verdict = verify_with_outputs(
        base, given, merged, prompts=prompts, text=text, new_tokens=new_tokens, device=device,
        progress=progress,
    )  # fmt: skip
    if verdict.outputs is not None:
        keep_record(merged, asdict(verdict.outputs), _log)
    return verdict


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
    progress: Callable[[int, int, float | None], None] | None = None,
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
        keep_record(merged, record, _log)
    return record


def methods(
    measure: PathLike | None = None,
    *,
    tokens: int = 64,
    rounds: int = 9,
    adapters_python: PathLike | None = None,
    progress: Callable[[int, int, float | None], None] | None = None,
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
    progress: Callable[[int, int, float | None], None] | None = None,
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
    _settle(merged)
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
    keep_record(merged, record, _log)
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

    _settle(merged)
    _settle(base, refuse=True)
    record = checklist_record(check_boxes(base, adapter, merged, progress=progress), merged)
    keep_record(merged, record, _log)
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


def __getattr__(name: str) -> Any:
    """Types of results, and the tuners, loaded when they are asked for."""
    if name not in _TYPES:
        raise AttributeError(f"module 'infold' has no attribute {name!r}")
    return getattr(import_module(f"infold.{_TYPES[name]}"), name)


def train(
    base: PathLike,
    data: PathLike,
    out: PathLike,
    *,
    resume: bool = False,
    force: bool = False,
    progress: Callable[[int, int, float | None], None] | None = None,
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


def _listed(adapters: PathLike | Sequence[PathLike]) -> list[PathLike]:
    return [adapters] if isinstance(adapters, str | os.PathLike) else list(adapters)
