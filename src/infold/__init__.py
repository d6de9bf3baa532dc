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
    from infold.tuners.combine import Combined
    from infold.verify.weights import Verdict

__all__ = [
    "CorruptFile",
    "InfoldError",
    "ProofFailed",
    "Refusal",
    "StorageFailure",
    "__version__",
    "combine",
    "inspect",
    "merge",
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


def _listed(adapters: PathLike | Sequence[PathLike]) -> list[PathLike]:
    return [adapters] if isinstance(adapters, str | os.PathLike) else list(adapters)
