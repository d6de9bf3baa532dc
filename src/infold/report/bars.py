"""Bars with intervals from a bench record: one small chart for each metric, one bar a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infold.errors import Refusal, StorageFailure
from infold.extras import missing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["bar_figure", "check_picture", "save_bars"]

_COLOURS = {"base": "#8a8f98", "infold": "#7fb069", "PEFT": "#e6a23c", "merged": "#4c8bf5"}
_WAIT = "seconds, less is better"


def check_picture(path: Path) -> None:
    """Before anything is measured. Raises Refusal for a picture that cannot be drawn."""
    wrong = missing("report", "matplotlib")
    if path.suffix.lower() not in (".svg", ".png"):
        wrong.append(f"{path}: a picture is a .svg or a .png file")
    if not path.parent.is_dir():
        wrong.append(f"{path.parent}: no such folder")
    if wrong:
        raise Refusal(wrong)


def save_bars(record: Mapping[str, Any], path: Path) -> None:
    """Write the picture of a bench record. Raises StorageFailure where the system says no."""
    from matplotlib import rc_context

    with rc_context({"svg.hashsalt": "infold", "font.size": 9}):
        try:
            bar_figure(record).savefig(path, dpi=150, metadata={})
        except OSError as error:
            raise StorageFailure(f"{path}: {error.strerror}") from error


def bar_figure(record: Mapping[str, Any], ink: str = "black", width: float = 7) -> Figure:
    """Medians as bars, intervals as whiskers of the colour `ink`; seconds, tokens/s and MB. width:
    inches."""
    from matplotlib.figure import Figure

    models = record["models"]
    metrics = list(dict.fromkeys(m for found in models.values() for m in found))
    figure = Figure(figsize=(width, 0.55 + len(metrics) * (0.5 + 0.18 * len(models))))
    figure.set_layout_engine("constrained")
    charts = figure.subplots(len(metrics), 1, squeeze=False)[:, 0]
    for chart, metric in zip(charts, metrics, strict=True):
        names = [name for name in models if metric in models[name]]
        scale = 1e-6 if "bytes" in metric else 1.0
        found = [models[name][metric] for name in names]
        middles = [one["median"] * scale for one in found]
        whiskers = [
            [m - one["low"] * scale for m, one in zip(middles, found, strict=True)],
            [one["high"] * scale - m for m, one in zip(middles, found, strict=True)],
        ]
        colours = [_COLOURS.get(name, "#888888") for name in names]
        chart.barh(names, middles, xerr=whiskers, color=colours, height=0.7, capsize=2,
                   error_kw={"linewidth": 0.8, "ecolor": ink})  # fmt: skip
        chart.invert_yaxis()
        unit = "MB" if "bytes" in metric else "" if "per_second" in metric else _WAIT
        told = metric.replace("_bytes", " memory").replace("_seconds", "").replace("_", " ")
        chart.set_title(f"{told}{f' ({unit})' if unit else ''}", loc="left", fontsize=9)
        chart.spines[["top", "right"]].set_visible(False)
    return figure
