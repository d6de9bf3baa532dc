"""infold: fold trained adapters (IA³, LoRA, DoRA) into model weights, streamed, exact, proven.

    import infold
    receipt = infold.merge("base", ["adapter"], "merged")
    verdict = infold.verify("merged")

The functions below are the command line's verbs, with the same names and defaults. PyTorch is
imported when one of them is called. Each raises InfoldError and nothing else for what is wrong
with its input or the disk: Refusal (and CorruptFile, a kind of it) or StorageFailure.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, overload

from infold.errors import CorruptFile, InfoldError, ProofFailed, Refusal, StorageFailure
from infold.version import __version__

if TYPE_CHECKING:
    from infold.merge.receipt import Receipt
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
    "LoraConfig",
    "Offender",
    "ProofFailed",
    "Receipt",
    "Refusal",
    "StorageFailure",
    "Training",
    "Verdict",
    "__version__",
    "attach",
    "combine",
    "inspect",
    "load",
    "merge",
    "train",
    "verify",
]

# A room and its verb share a name. Importing a package for the first time binds its name here, so
# do that now (the rooms' __init__ import nothing), and let the functions below take the names.
for _room in ("merge", "verify", "inspect"):
    import_module(f"infold.{_room}")

_TYPES = {
    "Combined": "tuners.combine",
    "IA3Config": "tuners.config",
    "LoraConfig": "tuners.config",
    "Offender": "verify.verdict",
    "Receipt": "merge.receipt",
    "Training": "tuners.record",
    "Verdict": "verify.verdict",
    "attach": "tuners.model",
    "load": "tuners.model",
}

PathLike = str | os.PathLike[str]
Progress = Callable[[int, int], None]


@overload
def merge(
    base: PathLike,
    adapters: PathLike | Sequence[PathLike],
    out: PathLike,
    *,
    max_memory: int | str = ...,
    device: str = ...,
    threads: int | None = ...,
    dry_run: Literal[False] = ...,
    force: bool = ...,
    sha256: bool = ...,
    progress: Progress | None = ...,
) -> Receipt: ...


@overload
def merge(
    base: PathLike,
    adapters: PathLike | Sequence[PathLike],
    out: PathLike,
    *,
    max_memory: int | str = ...,
    device: str = ...,
    threads: int | None = ...,
    dry_run: Literal[True],
    force: bool = ...,
    sha256: bool = ...,
    progress: Progress | None = ...,
) -> dict[str, Any]: ...


def merge(
    base: PathLike,
    adapters: PathLike | Sequence[PathLike],
    out: PathLike,
    *,
    max_memory: int | str = 1 << 30,
    device: str = "cpu",
    threads: int | None = None,
    dry_run: bool = False,
    force: bool = False,
    sha256: bool = False,
    progress: Progress | None = None,
) -> Receipt | dict[str, Any]:
    """Merge adapters, in the order given and with one rounding at the end, into a new checkpoint.

    base: a folder, a .safetensors file or a Hub id. adapters: PEFT folders or Hub ids.
    max_memory: for buffers and factors, on top of what Python and PyTorch take: bytes, or a text
    such as "512MiB". device: "cpu", "cuda" or "cuda:N". threads: by default the processors, at
    most 8. dry_run: check everything, write nothing, and return the plan as JSON-ready values.
    force: replace an output of an earlier merge. sha256: add these digests to the receipt.
    progress: called with (bytes done, bytes in all), from several threads.
    Raises Refusal for bad input: its `reasons` list all offenders, and nothing is left behind.
    Raises CorruptFile, a Refusal, for files that break their format's rules, and StorageFailure
    where the system or the Hub says no.
    """
    from infold.merge.run import execute, open_plan, prepare

    given = _listed(adapters)
    plan = open_plan(base, given)
    prepared = prepare(
        plan, out, max_memory=max_memory, device=device, threads=threads, force=force
    )
    if dry_run:
        return plan.summary()
    names = os.fspath(base), [os.fspath(a) for a in given]
    return execute(prepared, sha256=sha256, progress=progress, names=names)


def combine(
    adapters: PathLike | Sequence[PathLike],
    out: PathLike,
    *,
    weights: Sequence[float],
    kind: str,
    density: float | None = None,
    majority_sign: str = "total",
    svd_rank: int | None = None,
    seed: int = 0,
    force: bool = False,
) -> Combined:
    """Combine IA³ or LoRA adapters of one base into one adapter folder (docs/combine.md).

    adapters: PEFT folders or Hub ids. weights: one finite number for each; they are not normalised.
    kind: the command line's --type. density: the share of elements that pruning keeps, in (0, 1].
    svd_rank: the rank of the svd kinds; default: the adapters' largest. seed: for DARE.
    The new tensors are float32 (float64 where an adapter's are).
    Raises Refusal (bad input; lists all offenders; nothing is written) or StorageFailure.
    """
    from infold.tuners.combine import plan_combination, write_combination

    plan = plan_combination(
        _listed(adapters),
        weights,
        kind,
        density=density,
        majority_sign=majority_sign,
        svd_rank=svd_rank,
        seed=seed,
    )
    return write_combination(plan, out, force=force)


def inspect(path: PathLike, *, base: PathLike | None = None) -> dict[str, Any]:
    """Describe an adapter, a checkpoint or a merged folder, as JSON-ready values.

    `kind` in the result tells which of the three it is. base: for an adapter, the checkpoint whose
    tensors it would edit. Raises Refusal for what is none of them, for a receipt that infold did
    not write, and for an adapter that does not fit its base; StorageFailure as `merge` does.
    """
    from infold.inspect.describe import describe_path

    return describe_path(path, base)


@overload
def verify(
    merged: PathLike, /, *, progress: Progress | None = ..., outputs: bool = ..., **run: Any
) -> Verdict: ...


@overload
def verify(
    *, merged: PathLike, progress: Progress | None = ..., outputs: bool = ..., **run: Any
) -> Verdict: ...


@overload
def verify(
    base: PathLike | None,
    adapters: PathLike | Sequence[PathLike],
    merged: PathLike,
    *,
    progress: Progress | None = ...,
    outputs: bool = ...,
    prompts: PathLike | None = ...,
    text: PathLike | None = ...,
    new_tokens: int = ...,
    device: str = ...,
) -> Verdict: ...


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
    """Prove that a merged folder is what base and adapters make, byte for byte.

    `verify(merged)` takes base and adapters from the receipt, and checks their digests;
    `verify(base, adapters, merged)` takes those that are given.
    outputs: also run the base with its adapters unmerged, and the merged folder, and compare their
    logits (docs/verify.md; needs transformers). prompts, text: files for that, one prompt a line.
    new_tokens: of each greedy continuation. device: "cpu", "cuda" or "cuda:N", for the outputs.
    Returns a Verdict whose `ok` tells the result and whose `offenders` lists every difference.
    Raises Refusal for inputs that make no merge, StorageFailure as `merge` does; never ProofFailed.
    """
    from infold.verify.weights import verify_checkpoint

    given = _listed(adapters)
    if merged is None and base is not None and not given:
        base, merged = None, base
    if merged is None:
        raise TypeError("verify takes (merged) or (base, adapters, merged)")
    if not outputs:
        return verify_checkpoint(base, given, merged, progress=progress)
    from infold.verify.both import verify_with_outputs

    return verify_with_outputs(
        base,
        given,
        merged,
        prompts=prompts,
        text=text,
        new_tokens=new_tokens,
        device=device,
        progress=progress,
    )


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

    return train_adapter(
        base,
        data,
        out,
        TrainSettings.of(settings),
        resume=resume,
        force=force,
        progress=progress,
    )


def _listed(adapters: PathLike | Sequence[PathLike]) -> list[PathLike]:
    return [adapters] if isinstance(adapters, str | os.PathLike) else list(adapters)
