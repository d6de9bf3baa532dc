"""infold inspect PATH"""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from infold.cli.options import bytes_text, plural
from infold.cli.startup import lasting_imports


def inspect(
    path: Annotated[
        str, typer.Argument(help="An adapter, a checkpoint or a merged folder (or a Hub id).")
    ],
    base: Annotated[
        str | None,
        typer.Option(help="For an adapter: also show which tensors of this base it edits."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of text.")
    ] = False,
) -> None:
    """Describe an adapter, a checkpoint or a merged folder."""
    with lasting_imports():
        from infold.inspect.describe import describe_path

    found = describe_path(path, base)
    if as_json:
        print(json.dumps(found))
        return
    {"adapter": _adapter, "checkpoint": _checkpoint, "merged": _merged}[found["kind"]](found)


def _table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A table as wide as its content: piped output is not cut at 80 columns."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    if not console.is_terminal:
        console = Console(width=Console(width=10_000).measure(table).maximum)
    console.print(table)


def _adapter(found: dict[str, Any]) -> None:
    print(f"adapter  {found['path']}")
    print(f"method   {found['method']}")
    for name, value in found["settings"].items():
        print(f"         {name} = {value}")
    share = found.get("share_of_parameters")
    of_all = f" = {share:.4%} of the base's parameters" if share is not None else ""
    count = f"{found['parameters']:,} parameters in {found['tensors']} tensors"
    print(f"size     {count}, {bytes_text(found['bytes'])}{of_all}")
    rows = []
    for module in found["modules"]:
        for part in module["parts"]:
            stats = part["statistics"]
            rows.append(
                [
                    module["module"],
                    part["part"],
                    "x".join(map(str, part["shape"])),
                    part["dtype"],
                    " ".join(f"{key} {value:.4g}" for key, value in stats.items()),
                    ", ".join(module.get("edits", [])),
                ]
            )
    columns = ["module", "part", "shape", "dtype", "statistics"]
    with_base = any(row[-1] for row in rows)
    _table(
        "parts",
        [*columns, "edits"] if with_base else columns,
        rows if with_base else [row[:-1] for row in rows],
    )
    for note in found.get("notes", []):
        print(f"note     {note}")


def _checkpoint(found: dict[str, Any]) -> None:
    print(f"checkpoint  {found['path']}")
    if found["model_type"]:
        print(f"model type  {found['model_type']}")
    print(
        f"size        {found['parameters']:,} parameters in {found['tensors']} tensors, "
        f"{bytes_text(found['bytes'])} in {plural('shard', len(found['shards']))}"
    )
    rows = [
        [dtype, str(entry["tensors"]), f"{entry['parameters']:,}", bytes_text(entry["bytes"])]
        for dtype, entry in found["dtypes"].items()
    ]
    _table("dtypes", ["dtype", "tensors", "parameters", "bytes"], rows)
    rows = [[s["name"], str(s["tensors"]), bytes_text(s["bytes"])] for s in found["shards"]]
    _table("shards", ["shard", "tensors", "bytes"], rows)


def _merged(found: dict[str, Any]) -> None:
    receipt = found["receipt"]
    print(f"merged   {found['path']}, by infold {receipt['infold']}")
    print(f"base     {receipt['base']['path']}")
    for number, adapter in enumerate(receipt["adapters"]):
        print(f"adapter  {number}: {adapter['path']} ({adapter['method']})")
    print(
        f"size     {receipt['tensors']} tensors, {bytes_text(receipt['bytes'])}; "
        f"{len(receipt['edits'])} edited, {bytes_text(receipt['edited_bytes'])}"
    )
    print(
        f"run      {receipt['seconds']:.1f} s, {receipt['threads']} threads, {receipt['device']}, "
        f"peak memory {bytes_text(receipt['peak_memory'])}"
    )
    for note in receipt["notes"]:
        print(f"note     {note}")
    rows = []
    for edit in receipt["edits"]:
        steps = [
            op["method"] + (f" x {op['scaling']:g}" if "scaling" in op else "")
            for op in edit["operations"]
        ]
        share = "" if edit["unchanged"] is None else f"{edit['unchanged']:.2%}"
        shape = "x".join(map(str, edit["shape"]))
        rows.append([edit["tensor"], edit["dtype"], shape, ", ".join(steps) or "replaced", share])
    _table("edits", ["tensor", "dtype", "shape", "operations", "unchanged"], rows)
    rows = [[name, digest] for name, digest in receipt["shards"].items()]
    _table("digests (BLAKE3)", ["shard", "digest"], rows)
