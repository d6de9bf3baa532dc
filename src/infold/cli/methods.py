"""infold methods [--measure BASE]"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from infold.cli.output import entry, table
from infold.cli.progress import step_progress
from infold.cli.startup import lasting_imports
from infold.errors import Refusal

if TYPE_CHECKING:
    from infold.methods.table import MethodRow


def methods(
    measure: Annotated[
        str | None,
        typer.Option(
            metavar="BASE", help="Also run each, unmerged, on this base: a folder or a Hub id."
        ),
    ] = None,
    tokens: Annotated[
        int, typer.Option(metavar="N", help="With --measure: tokens of the forward pass.")
    ] = 64,
    rounds: Annotated[
        int, typer.Option(metavar="N", help="With --measure: timed rounds of each.")
    ] = 9,
    adapters_python: Annotated[
        str | None,
        typer.Option(
            metavar="PYTHON", help="With --measure: the Python of an environment with `adapters`."
        ),
    ] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print tables for docs/methods.md.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of text.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Tell which adapter methods merge.

    Which end in one weight: merged by infold, by PEFT, or not, and why.

    Asks infold's tables, and tries every type that the installed PEFT registers.
    """
    if measure is None and adapters_python is not None:
        raise Refusal("--adapters-python belongs to --measure BASE")
    silent = quiet or as_json
    measured: list[dict[str, Any]] = []
    if measure is not None:
        with step_progress("measuring", silent, at_once=True) as progress:
            with lasting_imports():
                from infold.methods.measure import measure_methods

            measured = measure_methods(
                measure, tokens=tokens, rounds=rounds, adapters_python=adapters_python,
                progress=progress,
            )  # fmt: skip
    with step_progress("trying each method of PEFT", silent, at_once=True) as progress:
        with lasting_imports():
            from infold.methods.table import method_rows

        rows = method_rows(progress)
    if as_json:
        print(json.dumps({"methods": [row.as_dict() for row in rows], "measured": measured}))
    elif markdown:
        told: list[tuple[str, ...]] = [("method", "infold merges", "PEFT merges", "merged weight")]
        told += [(row.name, row.infold, row.peft, row.merge) for row in rows]
        print(_markdown(told))
        if measured:
            print("\n" + _markdown(_figures(measured)))
    else:
        print("\n\n".join([*_groups(rows), *(_plain_figures(measured) if measured else ())]))


def _groups(rows: Sequence[MethodRow]) -> list[str]:
    """The methods below what is said of them: what most have in common would fill a wide table."""
    groups: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for row in rows:
        groups.setdefault((row.infold, row.peft), []).append((row.name, row.merge))
    found = []
    for (ours, theirs), named in sorted(groups.items(), key=lambda group: _rank(group[0][0])):
        heads = [entry("infold merges", ours, 15), entry("PEFT merges", theirs, 15)]
        heads = [entry("both merge", ours, 15)] if ours == theirs else heads
        found.append("\n".join([*heads, table(named)]))
    return found


def _rank(ours: str) -> int:
    """What merges first, what never will last."""
    return 0 if ours.startswith("yes") else 1 if ours == "not yet" else 2


def _plain_figures(measured: list[dict[str, Any]]) -> list[str]:
    """The figures as a table that fits, and below it what they leave open."""
    heads = ("unmerged", "parameters", "share", "attach", "forward", "interval")
    rows: list[tuple[str, ...]] = [heads]
    notes = []
    for one, (name, *cells) in zip(measured, _figures(measured)[1:], strict=True):
        if "why" in one:
            notes.append(f"{name} was not run: {one['why']}")
            continue
        noise = " *" if one["within_noise"] else ""
        count = f"{one['parameters']:,}"
        rows.append((name, count, *cells[1:4], f"{one['low']:.2f} to {one['high']:.2f}{noise}"))
        if "note" in one:
            notes.append(f"{name}: {one['note']}")
    notes.append("forward: over the base's. * within noise: the interval holds 1.")
    return [table(rows), "\n".join(entry("", note, 2) for note in notes)]


def _figures(measured: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [
        ("unmerged", "parameters", "share", "attach", "forward, over the base", "interval")
    ]
    for one in measured:
        if "why" in one:
            rows.append((one["name"], "", "", "", f"not run: {one['why']}", ""))
            continue
        noise = ", within noise" if one["within_noise"] else ""
        note = f" ({one['note']})" if "note" in one else ""
        rows.append(
            (
                one["name"],
                f"{one['parameters']:,}{note}",
                f"{one['share']:.2%}",
                f"{one['attach_seconds']:.2f} s",
                f"{one['ratio']:.2f}x",
                f"{one['low']:.2f} to {one['high']:.2f}{noise}",
            )
        )
    return rows


def _markdown(rows: list[tuple[str, ...]]) -> str:
    head, *body = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
