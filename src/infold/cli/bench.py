"""infold bench BASE ADAPTER [MERGED]"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

import infold
from infold.cli.output import entry, table
from infold.cli.progress import step_progress
from infold.sizes import bytes_text, plural


def bench(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The base: a folder or a Hub id.")],
    adapter: Annotated[
        str, typer.Argument(metavar="ADAPTER", help="The adapter: a PEFT folder or a Hub id.")
    ],
    merged: Annotated[
        str | None,
        typer.Argument(
            metavar="MERGED", help="Their merged folder. Without it, it is not measured."
        ),
    ] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(metavar="N", help="Batch size; may be given often. Default: 1 and 4."),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(metavar="N", help="Tokens of each prompt.")] = 128,
    new_tokens: Annotated[
        int, typer.Option(metavar="N", help="Tokens decoded after the first.")
    ] = 32,
    rounds: Annotated[
        int, typer.Option(metavar="N", help="Rounds from model to model, in each start.")
    ] = 5,
    starts: Annotated[
        int, typer.Option(metavar="N", help="How often every process is launched anew.")
    ] = 3,
    device: Annotated[str, typer.Option(metavar="DEVICE", help="cpu, cuda or cuda:N.")] = "cpu",
    dtype: Annotated[
        str, typer.Option(metavar="TYPE", help="auto (as stored), float32, bfloat16 or float16.")
    ] = "auto",
    picture: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw the figures into this .svg or .png file."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of text.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Measure what a merge buys.

    Base, adapter mode (infold's and PEFT's) and merged model run side by side. On two cores that
    takes a quarter of an hour for 700 million parameters; for a look: --starts 1 --rounds 2.

    Load time, memory, prefill, first token, decoding and adapter swap, in turns, with intervals.
    """
    if picture is not None:
        from infold.report.bars import check_picture

        check_picture(picture)
    with step_progress("measuring", quiet or as_json) as progress:
        record = infold.bench(
            base, adapter, merged, batches=batch or (1, 4), prompt_tokens=prompt_tokens,
            new_tokens=new_tokens, rounds=rounds, starts=starts, device=device, dtype=dtype,
            progress=progress,
        )  # fmt: skip
    if picture is not None:
        from infold.report.bars import save_bars

        save_bars(record, picture)
    if as_json:
        print(json.dumps(record))
    elif not quiet:
        _show(record)
        if picture is not None:
            print(entry("picture", str(picture), 10))


def _show(record: dict[str, Any]) -> None:
    models = record["models"]
    metrics = dict.fromkeys(metric for found in models.values() for metric in found)
    rows: list[tuple[str, ...]] = [("median", *models)]
    for metric in metrics:
        cells = [_value(metric, found.get(metric)) for found in models.values()]
        rows.append((metric.replace("_", " "), *cells))
    print(table(rows) + "\n")
    rows = [("over the base", "ratio", "interval", "")]
    for c in record["comparisons"]:
        span, notes = f"{c['low']:.3f} to {c['high']:.3f}", []
        if c["coverage"] <= 0:
            span = "one value"
        else:
            notes += ["within noise"] if c["within_noise"] else []
            # of load and memory, which a start gives one value
            notes += [f"of {c['coverage']:.0%}"] if c["coverage"] < 0.9 else []
        rows.append((f"{c['model']}: {c['metric']}", f"{c['ratio']:.3f}", span, ", ".join(notes)))
    print(table(rows) + "\n")
    least = min(c["coverage"] for c in record["comparisons"] if c["what"] == "speed")
    if least > 0:
        told = f"median over rounds of the ratio to the base, order statistics, {least:.0%}"
        print(entry("interval", f"{told}, where no other share is told", 10))
    else:
        print(entry("interval", "none: one round in one start is one value", 10))
    where = f"{record['device']}, {record['processor']}, {plural('thread', record['threads'])}"
    print(entry("machine", f"{where}, {record['dtype']}", 10))
    count = f"{plural('round', record['rounds'])} in each of {plural('start', record['starts'])}"
    print(entry("measured", f"{count}, after one to warm up, in {record['seconds']:.0f} s", 10))
    for note in record["notes"]:
        print(entry("note", note, 10))


def _value(metric: str, found: dict[str, float] | None) -> str:
    if found is None:
        return "-"
    if "bytes" in metric:
        return bytes_text(round(found["median"]))
    return f"{found['median']:.1f}" if "per_second" in metric else f"{found['median']:.4f}"
