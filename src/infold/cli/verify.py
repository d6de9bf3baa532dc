"""infold verify BASE ADAPTER... MERGED"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from infold.cli.progress import byte_progress
from infold.cli.startup import lasting_imports
from infold.errors import ProofFailed, Refusal


def verify(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="BASE ADAPTER... MERGED",
            help="Base, adapters in their order, merged folder. Or only the merged folder: its "
            "receipt tells the rest.",
        ),
    ],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of text.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Prove that a merged model is what base and adapters make.

    Re-reads the output: unedited tensors must be byte-equal to the base's, edited ones equal to an
    independent recomputation, nothing missing, nothing extra, side files equal.
    """
    if len(paths) == 2:
        raise Refusal("verify takes BASE ADAPTER... MERGED, or MERGED alone")
    with lasting_imports():
        from infold.verify.weights import verify_checkpoint

    base = paths[0] if len(paths) > 1 else None
    with byte_progress("verifying", quiet or as_json) as progress:
        verdict = verify_checkpoint(base, paths[1:-1], paths[-1], progress=progress)
    if as_json:
        print(json.dumps(asdict(verdict)))
    elif not quiet:
        print(
            f"tensors  {verdict.identical} byte-identical to the base, {verdict.recomputed} equal "
            f"to their recomputation, of {verdict.tensors}"
        )
        print(f"files    {verdict.files} side files equal")
        if verdict.undecided:
            print(
                f"         {verdict.undecided} elements lie on a rounding boundary: "
                "either way is right"
            )
    if verdict.ok:
        if not (quiet or as_json):
            print(
                f"proven   in {verdict.seconds:.1f} s: {paths[-1]} is what base and adapters make"
            )
        return
    if not as_json:
        from rich import box
        from rich.console import Console
        from rich.table import Table

        table = Table("what", "where", "detail", box=box.SIMPLE_HEAD, pad_edge=False)
        for offender in verdict.offenders:
            table.add_row(offender.what, offender.where, offender.detail)
        Console(stderr=True, soft_wrap=False).print(table)
    raise ProofFailed(f"{paths[-1]}: proof failed, {len(verdict.offenders)} offenders")
