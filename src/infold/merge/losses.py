"""What rounding costs the scales of a merge, as reasons to refuse it and as a note."""

from __future__ import annotations

from collections.abc import Mapping

from infold.edit.scales import MOST, Loss
from infold.merge.apply import Run

__all__ = ["loss_of", "lossy", "subnormal_note"]


def loss_of(run: Run) -> Loss | None:
    """What the rounding of a tensor's scales cost; None where nothing of it was measured."""
    loss = run.forward.loss if run.forward is not None else None
    return loss if loss is not None and loss.count else None


def lossy(runs: Mapping[str, Run]) -> list[str]:
    """Reasons to refuse what was computed: scales that rounding has spoilt."""
    return [
        f"{name}: {loss.subnormal:,} of {loss.count:,} scales are below float16's normal range, "
        f"and their rounding error is {loss.error:.1%}; infold accepts {MOST:.1%}. Quantize the "
        "base with other scales, or merge into the unquantized one"
        for name, run in runs.items()
        if (loss := loss_of(run)) is not None and loss.error > MOST
    ]


def subnormal_note(runs: Mapping[str, Run]) -> list[str]:
    """A note on scales that have fewer bits than their dtype, if there are any."""
    total, worst = Loss(), 0.0
    for run in runs.values():
        if (loss := loss_of(run)) is not None:
            total.add(loss)
            worst = max(worst, loss.error)
    if not total.subnormal:
        return []
    return [
        f"{total.subnormal:,} of {total.count:,} edited float16 scales are below its normal range, "
        f"where they have fewer bits, and {total.zero:,} fell to zero; the rounding error of a "
        f"tensor's scales is at most {worst:.2%}"
    ]
