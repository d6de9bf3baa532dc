"""infold report DIR"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from infold.cli.output import entry
from infold.errors import Refusal, StorageFailure


def report(
    folder: Annotated[
        str, typer.Argument(metavar="DIR", help="A merged folder, or a folder of JSON records.")
    ],
    out: Annotated[
        str | None,
        typer.Option("--out", "-o", help="The HTML (.html) or Markdown (.md) file to write."),
    ] = None,
    record: Annotated[
        list[str] | None, typer.Option("--record", help="A JSON record from elsewhere; repeatable.")
    ] = None,
) -> None:
    """One self-contained page of what was merged, how it was measured and what was checked."""
    from infold.report.page import render_html, render_markdown
    from infold.report.records import collect

    place = Path(folder)
    target = Path(out) if out is not None else Path(f"{place.resolve().name}-report.html")
    if target.suffix not in (".html", ".md"):
        raise Refusal(f"--out {target}: name an .html or .md file")
    records = collect(place, [Path(path) for path in record or ()])
    if "receipt" in records and "update" not in records:
        records["update"] = _update(place)
    page = (render_html if target.suffix == ".html" else render_markdown)(records)
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        draft.write_text(page, encoding="utf-8")
        draft.replace(target)
    except OSError as error:
        raise StorageFailure(f"{target}: {error.strerror}") from error
    finally:
        draft.unlink(missing_ok=True)
    print(entry("report", f"{target}, of {', '.join(sorted(records))}"))


def _update(place: Path) -> dict[str, Any]:
    from infold.inspect.update import describe_update

    found: dict[str, Any] = json.loads(json.dumps(describe_update(place)))
    return found
