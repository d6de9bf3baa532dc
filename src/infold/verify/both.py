"""The proof of the bytes, then the proof by running, as one verdict."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from infold.errors import Refusal
from infold.extras import require
from infold.machine import device_of
from infold.verify.folder import claimed_inputs, read_claims
from infold.verify.outputs import prove_outputs
from infold.verify.verdict import Offender, Verdict
from infold.verify.weights import verify_checkpoint

__all__ = ["verify_with_outputs"]

PathLike = str | os.PathLike[str]


def verify_with_outputs(
    base: PathLike | None,
    adapters: Sequence[PathLike],
    merged: PathLike,
    *,
    prompts: PathLike | None = None,
    text: PathLike | None = None,
    new_tokens: int = 32,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
    steps: Callable[[int, int, float | None], None] | None = None,
) -> Verdict:
    """`verify_checkpoint` and `prove_outputs`; ok only where both are.

    A folder whose bytes are wrong is run all the same, to tell what that does to its outputs; if it
    cannot be run, that is one more offender. Raises as both do.
    """
    require("train", "transformers")  # before minutes of reading
    device_of(device)
    verdict = verify_checkpoint(base, adapters, merged, progress=progress)
    if base is None:
        claims = read_claims(Path(merged))
        assert claims is not None  # or verify_checkpoint had refused
        base, adapters = claimed_inputs(claims)
    try:
        outputs = prove_outputs(
            base,
            adapters,
            merged,
            prompts=prompts,
            text=text,
            new_tokens=new_tokens,
            device=device,
            progress=steps,
        )
    except Refusal as error:
        if verdict.ok:
            raise
        told = tuple(Offender("outputs", os.fspath(merged), why) for why in error.reasons)
        return replace(verdict, offenders=verdict.offenders + told)
    return replace(verdict, ok=verdict.ok and outputs.ok, outputs=outputs)
