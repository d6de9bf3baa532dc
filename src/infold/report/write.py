"""The report as a file: whole under its name, or what was there."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from infold.disk import write_whole
from infold.errors import Refusal
from infold.report.page import render_html, render_markdown, shown
from infold.report.records import Records, collect

__all__ = ["write_report"]


def write_report(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str] | None,
    more: Sequence[str | os.PathLike[str]],
    check: Callable[[Path], str | None],
    describe_update: Callable[[Path], dict[str, Any]],
) -> tuple[Path, list[str]]:
    """Write the page of a folder's records; return its path and the kinds of records it shows.

    out: an .html or .md file, whose folders are made; by default NAME-report.html here. more:
    records from elsewhere.
    check: refuses a merged folder that is no longer what its receipt tells; gives the digest of the
    receipt, by which records of another merge are told. describe_update: gives the update record of
    a merged folder, which is not saved anywhere.
    Raises Refusal or CorruptFile before anything is written, StorageFailure where it cannot be.
    """
    place = Path(folder)
    target = Path(out) if out is not None else Path(f"{place.resolve().name}-report.html")
    if target.suffix not in (".html", ".md"):
        raise Refusal(f"--out {target}: name an .html or .md file")
    records = collect(place, [Path(path) for path in more])
    if "training" not in records and (beside := _beside_adapters(records)):
        records = collect(place, [*beside, *map(Path, more)])
    digest = check(place)
    html = target.suffix == ".html"
    if digest is not None and "update" not in records and html:  # it is mostly pictures
        # as it would come from a file
        records["update"] = json.loads(json.dumps(describe_update(place)))
    told = {kind: record.get("receipt") for kind, record in records.items()}
    others = [k for k, of in told.items() if digest is not None and of not in (None, digest)]
    page = (render_html if html else render_markdown)(records, others)
    write_whole(target, page.encode())
    return target, shown(records, html)


def _beside_adapters(records: Records) -> list[Path]:
    """The record of the first adapter that was trained by infold and still lies there."""
    adapters = records.get("receipt", {}).get("adapters")
    if not isinstance(adapters, list):
        return []
    named = [a.get("path") for a in adapters if isinstance(a, dict)]
    files = [Path(path) / "infold-training.json" for path in named if isinstance(path, str)]
    return [file for file in files if file.is_file()][:1]
