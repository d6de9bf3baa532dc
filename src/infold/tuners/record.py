"""What a training leaves beside its adapter: `infold-training.json` and the loss curve."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["RECORD", "Training", "loss_picture"]

RECORD = "infold-training.json"
# What may differ between an interrupted training and the one that continues it.
FREE = frozenset({"save_every"})


@dataclass(frozen=True)
class Training:
    """The result of a training. Digests are BLAKE3, in hex."""

    infold: str  # version
    out: str
    base: dict[str, Any]  # path, and a digest over config.json and the sizes of the weight files
    data: dict[str, Any]  # path, files, digest, shape, rows, eval_rows, tokens, packed_rows, ...
    task: str
    settings: dict[str, Any]
    classes: list[str]  # of a text/label data set
    parameters: int  # trained
    all_parameters: int
    steps: int
    epochs: float
    losses: dict[str, float | None]  # first, last, eval_first, eval_last, eval_accuracy
    versions: dict[str, str]
    device: str
    targets: list[str]  # the names, or endings of paths, of the modules with an adapter
    processes: int
    resumed_step: int | None
    seconds: float  # of this run, loading included
    notes: list[str]

    @property
    def identity(self) -> dict[str, Any]:
        """What two trainings must have in common to give the same adapter."""
        return {
            "infold": self.infold,
            "base": self.base["digest"],
            "data": self.data["digest"],
            "eval_data": self.data["eval_digest"],
            "processes": self.processes,
            **{key: value for key, value in self.settings.items() if key not in FREE},
        }

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Training:
        return cls(**found)


def loss_picture(entries: Sequence[Mapping[str, Any]]) -> bytes | None:
    """A PNG of the losses over the steps; None where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        return None
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "held out", "o-")):
        points = [(entry["step"], entry[key]) for entry in entries if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1, markersize=4)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()
