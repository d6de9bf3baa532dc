"""infold: fold trained adapters (IA³, LoRA, DoRA) into model weights, streamed, exact, proven.

    import infold
    receipt = infold.merge("base", ["adapter"], "merged")
    verdict = infold.verify("base", ["adapter"], "merged")

The functions below are the command line's verbs, with the same names and defaults. PyTorch is
imported when one of them is called.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from infold.errors import CorruptFile, InfoldError, ProofFailed, Refusal, StorageFailure
from infold.version import __version__

if TYPE_CHECKING:
    from infold.merge.receipt import Receipt
    from infold.tuners.record import Training
    from infold.verify.weights import Verdict

__all__ = [
    "CorruptFile",
    "InfoldError",
    "ProofFailed",
    "Refusal",
    "StorageFailure",
    "__version__",
    "inspect",
    "merge",
    "train",
    "verify",
]

# A room and its verb share a name. Importing a package for the first time binds its name here, so
# do that now (the rooms' __init__ import nothing), and let the functions below take the names.
for _room in ("merge", "verify", "inspect"):
    import_module(f"infold.{_room}")

PathLike = str | os.PathLike[str]


def merge(
    base: PathLike,
    adapters: PathLike | Sequence[PathLike],
    out: PathLike,
    *,
    max_memory: int = 1 << 30,
    device: str = "cpu",
    threads: int | None = None,
    force: bool = False,
    sha256: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Receipt:
    """Merge adapters, in the order given and with one rounding at the end, into a new checkpoint.

    base: a folder, a .safetensors file or a Hub id. adapters: PEFT folders or Hub ids.
    max_memory: bytes for buffers and factors, on top of what Python and PyTorch take.
    progress: called with (bytes done, bytes in all).
    Raises Refusal (bad input; lists all offenders; nothing is written) or StorageFailure.
    """
    from infold.merge.run import merge_checkpoint, open_plan

    given = _listed(adapters)
    return merge_checkpoint(
        open_plan(base, given),
        out,
        max_memory=max_memory,
        device=device,
        threads=threads,
        force=force,
        sha256=sha256,
        progress=progress,
        names=(os.fspath(base), [os.fspath(a) for a in given]),
    )


def inspect(path: PathLike, *, base: PathLike | None = None) -> dict[str, Any]:
    """Describe an adapter, a checkpoint or a merged folder, as JSON-ready values.

    base: for an adapter, the checkpoint whose tensors it would edit.
    """
    from infold.inspect.describe import describe_path

    return describe_path(path, base)


def verify(
    base: PathLike | None,
    adapters: PathLike | Sequence[PathLike],
    merged: PathLike,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Verdict:
    """Prove that `merged` is what base and adapters make, byte for byte.

    With base=None and no adapters they are taken from the receipt. Returns a Verdict whose `ok`
    tells the result and whose `offenders` lists every difference. Raises Refusal for bad input.
    """
    from infold.verify.weights import verify_checkpoint

    return verify_checkpoint(base, _listed(adapters), merged, progress=progress)


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
