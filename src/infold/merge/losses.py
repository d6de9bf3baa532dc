"""What rounding costs the scales of a merge, as reasons to refuse it and as notes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from infold.edit.scales import MOST, Loss
from infold.merge.apply import Run

__all__ = ["loss_of", "lossy", "rounding_notes"]

_NAMES = {"F16": "float16", "F8_E4M3": "E4M3"}


def loss_of(run: Run) -> Loss | None:
    """What the rounding of a tensor's scales cost; None where nothing of it was measured."""
    loss = run.forward.loss if run.forward is not None else None
    return loss if loss is not None and loss.count else None


def lossy(runs: Mapping[str, Run]) -> list[str]:
    """Reasons to refuse what was computed: scales that rounding has spoilt."""
    return [
        f"{name}: {loss.subnormal:,} of {loss.count:,} scales are below {_NAMES[dtype]}'s normal "
        f"range, and their rounding error is {loss.error:.1%}; infold accepts {MOST[dtype]:.1%}. "
        "Quantize the base with other scales, or merge into the unquantized one"
        for name, run in runs.items()
        if (loss := loss_of(run)) is not None
        if loss.error > MOST[dtype := run.floats.dtype]
    ]


def rounding_notes(runs: Mapping[str, Run]) -> Iterator[str]:
    """Notes on float16 scales that have fewer bits than their dtype, and on all of E4M3."""
    found: dict[str, list[Loss]] = {}
    for run in runs.values():
        if (loss := loss_of(run)) is not None:
            found.setdefault(run.floats.dtype, []).append(loss)
    for dtype, losses in found.items():
        total, worst = Loss(), max(loss.error for loss in losses)
        for loss in losses:
            total.add(loss)
        if dtype == "F8_E4M3":
            yield (
                f"{total.count:,} E4M3 scales of blocks (NVFP4) were rounded to their four bits: "
                f"the relative error of all is {total.error:.2g}, of a tensor's {worst:.2g} at "
                f"most; {total.zero:,} fell to zero"
            )
        elif total.subnormal:
            yield (
                f"{total.subnormal:,} of {total.count:,} edited float16 scales are below its "
                f"normal range, where they have fewer bits, and {total.zero:,} fell to zero; the "
                f"rounding error of a tensor's scales is at most {worst:.2%}"
            )
