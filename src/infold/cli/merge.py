"""infold merge BASE ADAPTER... --out DIR"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from infold.cli.options import bytes_text, parse_bytes, plural
from infold.cli.progress import byte_progress
from infold.cli.startup import lasting_imports

if TYPE_CHECKING:
    from infold.plan.edits import Plan


def merge(
    base: Annotated[
        str,
        typer.Argument(
            metavar="BASE", help="The base model: a folder, a .safetensors file or a Hub id."
        ),
    ],
    adapters: Annotated[
        list[str],
        typer.Argument(
            metavar="ADAPTER...",
            help="PEFT adapter folders or Hub ids; several merge in the order given.",
        ),
    ],
    out: Annotated[str, typer.Option("--out", "-o", help="The folder to create.")],
    max_memory: Annotated[
        str,
        typer.Option(
            help="Memory for buffers and factors, on top of what Python and PyTorch take."
        ),
    ] = "1GiB",
    device: Annotated[str, typer.Option(help="Where to compute: cpu or cuda.")] = "cpu",
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Workers. Default: one for each processor, at most 8."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan and write nothing.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
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
    memory = parse_bytes(max_memory)
    with lasting_imports():
        from infold.merge.run import merge_checkpoint, open_plan

    plan = open_plan(base, adapters)
    if dry_run:
        print(json.dumps(plan.summary()) if as_json else _plan_text(plan))
        return
    say = not (quiet or as_json)
    if say:
        print(_summary(plan))
    with byte_progress("merging", not say) as progress:
        receipt = merge_checkpoint(
            plan,
            out,
            max_memory=memory,
            device=device,
            threads=threads,
            force=force,
            sha256=sha256,
            progress=progress,
            names=(base, adapters),
        )
    if as_json:
        print(json.dumps(asdict(receipt)))
    elif say:
        resumed = (
            f", {bytes_text(receipt.resumed_bytes)} kept from an interrupted run"
            if receipt.resumed_bytes
            else ""
        )
        print(
            f"merged   {plural('shard', len(plan.shards))} in "
            f"{receipt.seconds:.1f} s, {bytes_text(receipt.bytes / max(receipt.seconds, 1e-3))}/s, "
            f"peak memory {bytes_text(receipt.peak_memory)}{resumed}"
        )
        merged = [e for e in receipt.edits if e["operations"] and e["unchanged"] is not None]
        count = sum(math.prod(edit["shape"]) for edit in merged)
        same = sum(edit["unchanged"] * math.prod(edit["shape"]) for edit in merged)
        if same:
            print(
                f"rounding {same / count:.1%} of the edited elements stayed as they were: "
                "their change is zero or under half a unit of the stored dtype"
            )
        print(f"output   {out}")


def _summary(plan: Plan) -> str:
    methods = sorted({op.method for edit in plan.edits.values() for op in edit.operations})
    lines = [
        f"planned  {len(plan.edits)} edits ({', '.join(methods) or 'copies'}) in "
        f"{plural('shard', len(plan.shards))}: "
        f"{bytes_text(plan.edited_bytes)} of {bytes_text(plan.nbytes)} change"
    ]
    lines += [f"note     {note}" for note in plan.notes]
    return "\n".join(lines)


def _plan_text(plan: Plan) -> str:
    lines = [_summary(plan)]
    for edit in plan.edits.values():
        steps = []
        for op in edit.operations:
            detail = (
                f" x {op.settings.scaling:g}"
                if op.method in ("lora", "dora")
                else f" {op.settings.side}"
                if op.method == "ia3"
                else ""
            )
            steps.append(f"{op.method}{detail}")
        shape = "x".join(map(str, edit.shape))
        lines.append(f"  {edit.tensor}  {edit.dtype} {shape}  {', '.join(steps) or 'replaced'}")
    lines.append(f"nothing was written; the output would take {bytes_text(plan.nbytes)}")
    return "\n".join(lines)
