"""infold report DIR"""

from __future__ import annotations

from typing import Annotated

import typer

from infold.cli.output import entry


def report(
    folder: Annotated[
        str,
        typer.Argument(
            metavar="DIR", help="A merged folder or GGUF file, or a folder of JSON records."
        ),
    ],
    out: Annotated[
        str | None,
        typer.Option(
            "--out", "-o", metavar="FILE", help="The HTML (.html) or Markdown (.md) file to write."
        ),
    ] = None,
    record: Annotated[
        list[str] | None,
        typer.Option("--record", metavar="FILE", help="A JSON record from elsewhere; repeatable."),
    ] = None,
) -> None:
    """Make one page of it all.

    Self-contained: what was merged, how it was measured and what was checked.
    """
    from infold.deploy.facts import check_for_report
    from infold.inspect.update import describe_update
    from infold.report.write import write_report

    target, kinds = write_report(folder, out, record or (), check_for_report, describe_update)
    print(entry("report", f"{target}, of {', '.join(kinds)}"))
