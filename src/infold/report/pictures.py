"""Pictures as SVG that takes its text colour from the page, so that it is right in dark mode."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from infold.report.bars import bar_figure

__all__ = ["bars", "conversion_pictures", "pictures"]

_INK = "#010203"  # becomes currentColor
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "infold",  # the same records, the same bytes
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "font.size": 9,
}
_WIDTH = 5  # inches: two side by side on a wide screen, and text that a phone shows large enough
_FILL = "#4c8bf5"


def bars(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(caption, SVG) of a bench record."""
    if not record.get("models"):
        return []
    with rc_context(_STYLE):
        drawn = _svg(bar_figure(record, _INK, _WIDTH))
    return [("Medians, and the intervals that hold them with 95 % where rounds allow.", drawn)]


def pictures(update: Mapping[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """Heading -> (caption, SVG) for each picture that an update record has figures for."""
    found: dict[str, list[tuple[str, str]]] = {}
    with rc_context(_STYLE):
        if update.get("scales"):
            found["IA³ scales"] = [
                ("Mean scale of each layer and module; 1 leaves the weight as it is.",
                 _heat({row["module"]: row["mean"] for row in update["scales"]}, 1.0)),
            ]  # fmt: skip
            if update.get("histogram"):
                drawn = _histogram(**update["histogram"])
                found["IA³ scales"].append(("All scales.", drawn))
        norms = {
            row["tensor"]: row["relative"]
            for row in update.get("tensors", [])
            if row["relative"] is not None
        }
        changed = {row["tensor"]: row["changed"] for row in update.get("tensors", [])}
        if norms:
            found["The update"] = [
                ("Norm of the update of each tensor, over that of the base's.", _heat(norms, None)),
                ("Share of elements that are others after rounding.", _heat(changed, None)),
            ]
    return found


def conversion_pictures(receipt: Mapping[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """Heading -> (caption, SVG): what each converted weight lost, beside what the adapters do."""
    found: dict[str, dict[str, float]] = {"error": {}, "update": {}}
    for edit in receipt["edits"] if receipt.get("conversion") else ():
        source = edit["source"]  # the parts of a weight that is quantized again tell of it all
        name = source.get("decoded", source.get("original", edit["tensor"]))
        for what, values in found.items():
            if edit.get(what) is not None:
                values[name] = edit[what]
    if not found["error"]:
        return {}
    with rc_context(_STYLE):
        return {
            "Converted weights": [
                ("Error of each weight against the exact merge, over the weight's norm.",
                 _heat(found["error"], None)),
                ("The adapters' own update of it, over the same. Where the error is as large, "
                 "much of the update is lost.", _heat(found["update"], None)),
            ]
        }  # fmt: skip


def grid(values: Mapping[str, float]) -> tuple[list[str], list[int], list[list[float]]]:
    """Modules, layers and values[module][layer] (nan where there is none) from tensors' names."""
    cells: dict[str, dict[int, float]] = {}
    for name, value in values.items():
        layer = re.search(r"\.(\d+)\.", name)
        module = name[layer.end() :] if layer else name
        cells.setdefault(module.removesuffix(".weight"), {})[int(layer[1]) if layer else 0] = value
    layers = sorted({number for row in cells.values() for number in row})
    rows = [[row.get(number, float("nan")) for number in layers] for row in cells.values()]
    return list(cells), layers, rows


def _heat(values: Mapping[str, float], centre: float | None) -> str:
    modules, layers, rows = grid(values)
    figure = Figure(figsize=(_WIDTH, 1.2 + 0.3 * len(modules)), layout="constrained")
    axes = figure.subplots()
    spread = (
        max((abs(v - centre) for row in rows for v in row if v == v), default=1.0)
        if centre
        else 0.0
    )
    limits: Any = {"vmin": centre - spread, "vmax": centre + spread} if centre and spread else {}
    mesh = axes.pcolormesh(rows, cmap="RdBu_r" if centre else "viridis", **limits)
    axes.set_yticks([n + 0.5 for n in range(len(modules))], modules)
    step = max(1, len(layers) // 10)
    axes.set_xticks([n + 0.5 for n in range(0, len(layers), step)], [*map(str, layers[::step])])
    axes.set_xlabel("layer")
    axes.invert_yaxis()
    figure.colorbar(mesh, ax=axes, aspect=12)
    return _svg(figure)


def _histogram(edges: list[float], counts: list[int]) -> str:
    figure = Figure(figsize=(_WIDTH, 2.2), layout="constrained")
    axes = figure.subplots()
    axes.stairs(counts, edges, fill=True, color=_FILL)
    axes.axvline(1.0, color=_INK, linewidth=0.8)
    axes.set_yscale("log")
    axes.set_xlabel("scale")
    axes.set_ylabel("elements")
    return _svg(figure)


def _svg(figure: Figure) -> str:
    """Inline SVG: no prologue, no fixed size, no background, the page's colour."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return re.sub(r'(<svg[^>]*?) height="[^"]*pt"', r"\1", text, count=1, flags=re.DOTALL)
