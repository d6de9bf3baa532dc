"""infold merge BASE ADAPTER... --out DIR"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from infold.api.paths import settle_first
from infold.cli.edits import edited_text, edits_text
from infold.cli.output import complain, entry
from infold.cli.place import check_words, one_place
from infold.cli.progress import byte_progress
from infold.cli.startup import lasting_imports
from infold.conversion import conversion_text
from infold.sizes import bytes_text, plural

if TYPE_CHECKING:
    from infold.merge.receipt import Receipt
    from infold.plan.edits import Plan


def merge(
    base: Annotated[
        str,
        typer.Argument(
            metavar="BASE",
            help="The base model: a folder, a .safetensors or GGUF file, or a Hub id.",
        ),
    ],
    adapters: Annotated[
        list[str],
        typer.Argument(
            metavar="ADAPTER...",
            help="PEFT adapter folders or Hub ids; several merge in the order given.",
        ),
    ],
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            "-o",
            metavar="PATH",
            help="The folder to create, or of a GGUF base a .gguf file.",
            show_default=False,
        ),
    ] = None,
    in_place: Annotated[
        bool,
        typer.Option("--in-place", help="Edit BASE itself instead; always with an undo record."),
    ] = False,
    undo: Annotated[
        bool, typer.Option("--undo", help="Also write what `infold undo` needs.")
    ] = False,
    promote: Annotated[
        bool,
        typer.Option(
            "--promote",
            help="Quantized weights with no place for an IA³ vector: write unquantized.",
        ),
    ] = False,
    dequantize: Annotated[
        bool,
        typer.Option("--dequantize", help="Quantized weights that change: write unquantized."),
    ] = False,
    requantize: Annotated[
        bool,
        typer.Option(
            "--requantize", help="Quantized weights that change: round into their format again."
        ),
    ] = False,
    dtype: Annotated[
        str,
        typer.Option(
            metavar="TYPE",
            help="What --promote and --dequantize write: auto (as the config), bf16, f16 or f32. "
            "What --requantize writes into a GGUF file: q8_0, q5_1, q5_0, q4_1 or q4_0.",
        ),
    ] = "auto",
    base_16bit: Annotated[
        str | None,
        typer.Option(
            "--base-16bit",
            metavar="BASE",
            help="Take the values of quantized weights that change from this unquantized base.",
            show_default=False,
        ),
    ] = None,
    lossy: Annotated[
        bool,
        typer.Option("--lossy", help="Round scales of four bits (NVFP4), and tell the error."),
    ] = False,
    max_memory: Annotated[
        str,
        typer.Option(
            metavar="SIZE",
            help="Memory for buffers and factors, on top of what Python and PyTorch take.",
        ),
    ] = "1GiB",
    device: Annotated[
        str, typer.Option(metavar="DEVICE", help="Where to compute: cpu, cuda or cuda:N.")
    ] = "cpu",
    threads: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Workers. Default: one for each processor, at most 8."
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Check what can be told without computing, show the plan and write nothing.",
        ),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an output of an earlier merge.")
    ] = False,
    sha256: Annotated[
        bool, typer.Option("--sha256", help="Also put SHA-256 digests into the receipt.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of text.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Merge adapters into a checkpoint on disk.

    The output appears when it is complete, and never before; a killed merge continues where it
    was when the same command is given again. Every tensor of every adapter is used, or nothing is
    written and all that does not fit is listed.
    """
    from infold.merge.options import Options, check_in_place

    place = one_place(out, in_place, dry_run)
    say = not (quiet or as_json)
    convert = Options(promote, dequantize, requantize, dtype, base_16bit, lossy)
    convert.check()
    inputs = [base, *adapters, *([base_16bit] if base_16bit is not None else [])]
    check_words(inputs, out=out, force=force, device=device, max_memory=max_memory)
    if in_place:
        check_in_place(force, sha256)
        convert.check_in_place()
        _in_place(base, adapters, max_memory, device, threads, dry_run, lossy, as_json, say)
        return
    with lasting_imports():
        from infold.merge.prepare import check, open_plan, prepare
        from infold.merge.run import execute

    if not dry_run:  # which refuses what is left of an edit: to finish that is to write
        settle_first(base, refuse=True)
    plan = open_plan(base, adapters, convert)
    if out is None:  # a dry run
        check(plan, max_memory, device, threads, undo)
        place = "the output"
    else:
        prepared = prepare(
            plan, out, max_memory=max_memory, device=device, threads=threads, force=force, undo=undo
        )
        plan = prepared.plan  # which tells what the place makes of it
    if say:
        print(_summary(plan))
    if dry_run:
        if as_json:
            print(json.dumps(plan.summary()))
        elif say:
            print(edits_text(plan.summary()["edits"], [str(a.path) for a in plan.adapters]))
            print(f"nothing was written; {place} would take {bytes_text(plan.nbytes)}")
        return
    with byte_progress("merging", not say) as progress:
        receipt = execute(prepared, sha256=sha256, progress=progress, names=(base, adapters))
    if as_json:
        print(json.dumps(asdict(receipt)))
    elif say:
        print(done_text(receipt, place, plan.notes))


def _in_place(
    base: str,
    adapters: list[str],
    max_memory: str,
    device: str,
    threads: int | None,
    dry_run: bool,
    lossy: bool,
    as_json: bool,
    say: bool,
) -> None:
    with lasting_imports():
        from infold.merge.inplace import merge_in_place

    with byte_progress("merging", not say) as progress:
        done = merge_in_place(
            base, adapters, max_memory=max_memory, device=device, threads=threads,
            dry_run=dry_run, lossy=lossy, progress=progress,
            told=lambda s: complain(f"{base}: {s}"),
        )  # fmt: skip
    if isinstance(done, dict):
        if as_json:
            print(json.dumps(done))
        elif say:
            print(edits_text(done["edits"], adapters))
            print(f"nothing was written; {bytes_text(done['edited_bytes'])} of {base} would change")
    elif as_json:
        print(json.dumps(asdict(done)))
    elif say:
        print(done_text(done, base))


def _summary(plan: Plan) -> str:
    from infold.ggml import BLOCKS

    methods = sorted({op.method for edit in plan.edits.values() for op in edit.operations})
    tensors = sum(len(shard.header.tensors) for shard in plan.shards)
    edits = f"{plural('edit', len(plan.edits))} ({', '.join(methods) or 'copies'})"
    where = f"of {plural('tensor', tensors)} in {plural('shard', len(plan.shards))}"
    sizes = f"{bytes_text(plan.edited_bytes)} of {bytes_text(plan.nbytes)} change"
    if all(edit.dtype in BLOCKS for edit in plan.edits.values()) and not plan.conversion:
        sizes = f"scales within {bytes_text(plan.edited_bytes)} of {bytes_text(plan.nbytes)} change"
    lines = [entry("planned", f"{edits} {where}: {sizes}")]
    lines += [entry("note", note) for note in plan.notes]
    return "\n".join(lines)


def _elements(edit: dict[str, Any]) -> int:
    """Of a quantized tensor: its scales."""
    return edit["rounding"]["scales"] if "rounding" in edit else math.prod(edit["shape"])


def _record_text(receipt: Receipt) -> str:
    """The size of the record, and of what it consists."""
    told = receipt.undo or {}
    copies = {"the adapters": told["adapters"], "the side files": told["side_files"]}
    size = told["bytes"] - sum(copies.values())
    share = size / max(1, receipt.edited_bytes)
    listed = [
        f"{bytes_text(count)} for a copy of {what}" for what, count in copies.items() if count
    ]
    what = edited_text(receipt.edits)
    text = ", ".join([f"{bytes_text(size)} for the {what} ({share:.1%} of them)", *listed])
    return f"{bytes_text(told['bytes'])}: " + " and ".join(text.rsplit(", ", 1))


def done_text(receipt: Receipt, out: str, told: Sequence[str] = ()) -> str:
    """What was done; `told`: notes that were printed already."""
    kept = bytes_text(receipt.resumed_bytes)
    resumed = f", {kept} kept from an interrupted run" if receipt.resumed_bytes else ""
    speed = bytes_text(receipt.bytes / max(receipt.seconds, 1e-3))
    lines = [
        entry(
            "merged",
            f"{plural('shard', len(receipt.shards))} in {receipt.seconds:.1f} s, {speed}/s, "
            f"peak memory {bytes_text(receipt.peak_memory)}{resumed}",
        )
    ]
    merged = [e for e in receipt.edits if e["operations"] and e["unchanged"] is not None]
    count = sum(map(_elements, merged))
    same = sum(edit["unchanged"] * _elements(edit) for edit in merged)
    what = "scales" if all("rounding" in edit for edit in merged) else "elements"
    if receipt.resumed_bytes:
        what += " of tensors that this run merged whole"
    if same:
        lines.append(
            entry(
                "rounding",
                f"{same / count:.1%} of the edited {what} stayed as they were: "
                "their change is zero or under half a unit of the stored dtype",
            )
        )
    lines += [entry("note", note) for note in receipt.notes if note not in told]
    if converted := conversion_text(vars(receipt)):
        lines.append(entry("converted", converted, 11))
    if receipt.undo:
        lines.append(entry("record", f"{_record_text(receipt)}; `infold undo` restores the base"))
    return "\n".join([*lines, entry("output", out)])
