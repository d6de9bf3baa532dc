"""A checkpoint and its adapters: merge, undo, swap, combine, inspect, verify."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal, overload

from infold.api.paths import PathLike, Progress, listed, log, settle_first

if TYPE_CHECKING:
    from infold.merge.receipt import Receipt
    from infold.merge.restore import Undone
    from infold.tuners.combine import Combined
    from infold.verify.verdict import Verdict

__all__ = ["combine", "inspect", "merge", "swap", "undo", "verify"]


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
    (NVFP4), and measure the error (docs/convert.md, docs/quantized.md).
    progress: called with (bytes done, bytes in all), from several threads.
    Raises Refusal for bad input: its `reasons` list all offenders, and nothing is left behind.
    Raises CorruptFile, a Refusal, for files that break their format's rules, and StorageFailure
    where the system or the Hub says no.
    """
    from infold.merge.options import Options, check_in_place
    from infold.merge.prepare import check, open_plan, prepare
    from infold.merge.run import execute

    given = listed(adapters)
    _one_place(out, in_place or (dry_run and out is None))
    convert = Options(promote, dequantize, requantize, dtype, base_16bit, lossy)
    if in_place:
        check_in_place(force, sha256)
        convert.check_in_place()
        from infold.merge.inplace import merge_in_place

        return merge_in_place(
            base, given, max_memory=max_memory, device=device, threads=threads, dry_run=dry_run,
            lossy=lossy, progress=progress, told=log,
        )  # fmt: skip
    if not dry_run:  # which refuses what is left of an edit: to finish that is to write
        settle_first(base, refuse=True)
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
            told=log,
        )  # fmt: skip
    from infold.merge.restore import undo_checkpoint

    settle_first(merged)
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
    from infold.merge.options import check_in_place

    given = listed(adapters)
    _one_place(out, in_place)
    if in_place:
        check_in_place(force)
        from infold.merge.inplace import swap_in_place

        return swap_in_place(
            merged, given, max_memory=max_memory, device=device, threads=threads, lossy=lossy,
            progress=progress, told=log,
        )  # fmt: skip
    from infold.merge.restore import open_swap, swap_checkpoint

    settle_first(merged)
    prepared = open_swap(
        merged, given, out or "", max_memory=max_memory, device=device, threads=threads,
        force=force, lossy=lossy,
    )  # fmt: skip
    names = [os.fspath(adapter) for adapter in given]
    return swap_checkpoint(prepared, progress=progress, names=names)


def _one_place(out: PathLike | None, in_place: bool) -> None:
    if in_place == (out is not None):
        raise TypeError("give either out or in_place=True")


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
        listed(adapters), weights, kind, density=density, majority_sign=majority_sign,
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

    settle_first(path)
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

    given = listed(adapters)
    if merged is None and base is not None and not given:
        base, merged = None, base
    if merged is None:
        raise TypeError("verify takes (merged) or (base, adapters, merged)")
    settle_first(merged)
    settle_first(base, refuse=True)
    if not outputs:
        return verify_checkpoint(base, given, merged, progress=progress)
    from infold.deploy.records import keep_record
    from infold.verify.both import verify_with_outputs

    verdict = verify_with_outputs(
        base, given, merged, prompts=prompts, text=text, new_tokens=new_tokens, device=device,
        progress=progress,
    )  # fmt: skip
    if verdict.outputs is not None:
        keep_record(merged, asdict(verdict.outputs), log)
    return verdict
