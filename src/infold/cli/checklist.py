"""infold checklist BASE ADAPTER MERGED"""

from __future__ import annotations

import json
from typing import Annotated

import typer

import infold
from infold.cli.output import Failed, entry
from infold.cli.progress import byte_progress


def checklist(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The base.")],
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="The adapter.")],
    merged: Annotated[str, typer.Argument(metavar="MERGED", help="The merged folder.")],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of text.")
    ] = False,
) -> None:
    """Check every box up to delivery.

    From the trained adapter on: PASS, FAIL or NOT DONE, and why.

    The merge is verified anew; the rest is read from the records of other verbs.
    """
    with byte_progress("verifying", as_json) as progress:
        record = infold.checklist(base, adapter, merged, progress=progress)
    if as_json:
        print(json.dumps(record))
    else:
        for box in record["boxes"]:
            print(entry(f"{box['status']:8}  {box['title']:26}", box["evidence"], 38))
            if box["status"] != "PASS" and box["command"]:
                print(entry("", box["command"], 38))
    failed = [box["title"] for box in record["boxes"] if box["status"] == "FAIL"]
    if failed:
        raise Failed(f"{merged}: failed: {', '.join(failed)}")
