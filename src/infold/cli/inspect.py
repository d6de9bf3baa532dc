"""infold inspect PATH"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer

from infold.api.paths import settle_first
from infold.cli.edits import edited_text, edits_text
from infold.cli.output import entry, fold, table
from infold.cli.startup import lasting_imports
from infold.conversion import conversion_text
from infold.sizes import bytes_text, plural


def inspect(
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            help="An adapter, a checkpoint or a merged model: a folder, a file or a Hub id.",
        ),
    ],
    base: Annotated[
        str | None,
        typer.Option(
            metavar="BASE", help="For an adapter: also show which tensors of this base it edits."
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of text.")
    ] = False,
) -> None:
    """Describe an adapter, a checkpoint or a merged model."""
    with lasting_imports():
        from infold.inspect.describe import describe_path

    settle_first(path)
    found = describe_path(path, base)
    if as_json:
        print(json.dumps(found))
        return
    {"adapter": _adapter, "checkpoint": _checkpoint, "merged": _merged}[found["kind"]](found)


def _adapter(found: dict[str, Any]) -> None:
    print(entry("adapter", found["path"]))
    print(entry("method", found["method"]))
    for name, value in found["settings"].items():
        told = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        print(entry("", f"{name} = {told}"))
    share = found.get("share_of_parameters")
    of_all = f" = {share:.4%} of the base's parameters" if share is not None else ""
    count = f"{found['parameters']:,} parameters in {plural('tensor', found['tensors'])}"
    print(entry("size", f"{count}, {bytes_text(found['bytes'])}{of_all}"))
    for note in found["notes"]:
        print(entry("note", note))
    for pattern, modules in fold(found["modules"], lambda m: str(m["module"]), _kind):
        times = f"  ({len(modules)} x)" if len(modules) > 1 else ""
        print(f"{pattern}{times}")
        rows = []
        for number, part in enumerate(modules[0]["parts"]):
            every = [module["parts"][number]["statistics"] for module in modules]
            shape = "x".join(map(str, part["shape"]))
            rows.append([part["part"], f"{part['dtype']} {shape}", _statistics(every)])
        print(table(rows))
        tensors = [tensor for module in modules for tensor in module.get("edits", [])]
        for tensor, _ in fold(dict.fromkeys(tensors), str, lambda _: None):
            print(f"  edits {tensor}")


def _kind(module: dict[str, Any]) -> Hashable:
    """What modules that are shown as one must share."""
    return tuple((p["part"], p["dtype"], tuple(p["shape"])) for p in module["parts"])


def _statistics(every: list[dict[str, float]]) -> str:
    """The statistics of one part over all its layers."""
    lost = sum(one.get("not_finite", 0) for one in every)
    told = f"; {lost:,} {'is' if lost == 1 else 'are'} NaN or inf" if lost else ""
    every = [one for one in every if "max" in one]
    if not every:
        return "no finite value" + told if told else "empty"

    def over(name: str, how: Callable[[list[float]], float]) -> str:
        return f"{how([one[name] for one in every]):.3g}"

    if "rms" in every[0]:
        rms = over("rms", lambda values: fmean(v * v for v in values) ** 0.5)
        return f"rms {rms}, largest {over('max', max)}{told}"
    distance = f"|l-1| {over('mean|l-1|', fmean)} in the mean, at most {over('max|l-1|', max)}"
    return f"{over('min', min)} to {over('max', max)}; {distance}{told}"


def _checkpoint(found: dict[str, Any]) -> None:
    print(entry("checkpoint", found["path"], 12))
    if found["model_type"]:
        print(entry("model type", str(found["model_type"]), 12))
    # several codes lie in one element of a tensor, and scales are no parameters
    what = "elements, as they are packed," if found["quantization"] else "parameters"
    count = f"{found['parameters']:,} {what} in {plural('tensor', found['tensors'])}"
    shards = plural("shard", len(found["shards"]))
    print(entry("size", f"{count}, {bytes_text(found['bytes'])} in {shards}", 12))
    print("dtypes")
    print(
        table(
            [dtype, plural("tensor", e["tensors"]), bytes_text(e["bytes"])]
            for dtype, e in found["dtypes"].items()
        )
    )
    for form in found["quantization"]:
        fold_text = f"no place for IA³: {form['no_fold']}" if form["no_fold"] else "IA³ folds"
        told = f"{form['format']}: {plural('module', form['modules'])}; {fold_text}"
        print(entry("quantized", told, 12))
    for note in found["notes"]:
        print(entry("note", note, 12))
    print("shards")
    print(
        table(
            [s["name"], plural("tensor", s["tensors"]), bytes_text(s["bytes"])]
            for s in found["shards"]
        )
    )


def _merged(found: dict[str, Any]) -> None:
    from infold.checkpoint.shards import kept_name

    receipt = found["receipt"]
    print(entry("merged", f"{found['path']}, by infold {receipt['infold']}"))
    print(entry("base", receipt["base"]["path"]))
    for adapter in receipt["adapters"]:
        print(entry("adapter", f"{adapter['path']} ({adapter['method']})"))
    tensors = plural("tensor", receipt["tensors"])
    edited = f"{len(receipt['edits']):,} edited, {bytes_text(receipt['edited_bytes'])}"
    print(entry("size", f"{tensors}, {bytes_text(receipt['bytes'])}; {edited}"))
    run = f"{receipt['seconds']:.1f} s, {plural('thread', receipt['threads'])}, {receipt['device']}"
    print(entry("run", f"{run}, peak memory {bytes_text(receipt['peak_memory'])}"))
    for note in receipt["notes"]:
        print(entry("note", note))
    if converted := conversion_text(receipt):
        print(entry("converted", converted, 11))
    record = found["undo"]
    if record and "damaged" in record:
        print(entry("undo", f"damaged: {record['damaged']}"))
    elif record:
        blocks = "what was replaced, whole"  # of converted weights
        if record["blocks"]:
            blocks = plural("block", record["blocks"])
            if record["originals"]:
                blocks += f", {record['originals']:,} of them stored whole"
        print(entry("undo", f"{bytes_text(record['bytes'])}: {blocks}"))
        copies = f"{bytes_text(record['adapters'])} of adapters"
        if record["side_files"]:
            copies += f" and {bytes_text(record['side_files'])} of side files"
        what = edited_text(receipt["edits"])
        print(entry("", f"{record['share']:.2%} of the {what}, without {copies}"))
    print("edits")
    print(edits_text(receipt["edits"], [adapter["path"] for adapter in receipt["adapters"]]))
    print("BLAKE3, by the receipt (infold verify compares them)")
    folder = Path(found["path"])
    for name, digest in receipt["shards"].items():  # the name last, as b3sum --check reads it
        print(f"{digest}  {name}")
    for name, digest in receipt["side_files"].items():
        print(f"{digest}  {kept_name(folder, name)}")
