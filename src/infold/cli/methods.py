"""infold methods [--measure BASE]"""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from infold.cli.output import table
from infold.cli.progress import step_progress
from infold.cli.startup import lasting_imports
from infold.errors import Refusal


def methods(
    measure: Annotated[
        str | None,
        typer.Option(help="Also run each, unmerged, on this base: a folder or a Hub id."),
    ] = None,
    tokens: Annotated[int, typer.Option(help="With --measure: tokens of the forward pass.")] = 64,
    rounds: Annotated[int, typer.Option(help="With --measure: timed rounds of each.")] = 9,
    adapters_python: Annotated[
        str | None,
        typer.Option(help="With --measure: the Python of an environment with `adapters`."),
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
    with lasting_imports():
        from infold.methods.measure import measure_methods
        from infold.methods.table import method_rows

    if measure is None and adapters_python is not None:
        raise Refusal("--adapters-python belongs to --measure BASE")
    silent = quiet or as_json
    measured: list[dict[str, Any]] = []
    if measure is not None:
        with step_progress("measuring", silent) as progress:
            measured = measure_methods(
                measure, tokens=tokens, rounds=rounds, adapters_python=adapters_python,
                progress=progress,
            )  # fmt: skip
    with step_progress("trying", silent) as progress:
        rows = method_rows(progress)
    if as_json:
        print(json.dumps({"methods": [row.as_dict() for row in rows], "measured": measured}))
        return
    told: list[tuple[str, ...]] = [("method", "infold merges", "PEFT merges", "merged weight")]
    told += [(row.name, row.infold, row.peft, row.merge) for row in rows]
    show = _markdown if markdown else table
    print(show(told))
    if measured:
        print("\n" + show(_figures(measured)))


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
