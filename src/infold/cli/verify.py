"""infold verify BASE ADAPTER... MERGED"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from typing import Annotated

import typer

from infold.cli.output import complain, entry, plural
from infold.cli.place import settle_first
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
        raise Refusal(_lacking(*paths))
    with lasting_imports():
        from infold.verify.weights import verify_checkpoint

    base = paths[0] if len(paths) > 1 else None
    settle_first(paths[-1])
    if base is not None:
        settle_first(base, refuse=True)
    with byte_progress("verifying", quiet or as_json) as progress:
        verdict = verify_checkpoint(base, paths[1:-1], paths[-1], progress=progress)
    if as_json:
        print(json.dumps(asdict(verdict)))
    elif not quiet:
        equal = f"{verdict.identical:,} byte-identical to the base"
        anew = f"{verdict.recomputed:,} equal to their recomputation"
        print(entry("tensors", f"{equal}, {anew}, of {verdict.tensors:,}"))
        print(entry("files", f"{plural('side file', verdict.files)} equal"))
        if verdict.undecided:
            count = f"{verdict.undecided:,} elements lie on a rounding boundary"
            print(entry("", f"{count}: either way is right"))
    if not verdict.ok:
        if not as_json:
            for offender in verdict.offenders:
                complain(f"{offender.where}: {offender.what}: {offender.detail}")
        offenders = plural("offender", len(verdict.offenders))
        raise ProofFailed(f"{paths[-1]}: proof failed, {offenders}")
    if not (quiet or as_json):
        told = f"{paths[-1]} is what base and adapters make"
        print(entry("proven", f"in {verdict.seconds:.1f} s: {told}"))


def _lacking(first: str, last: str) -> str:
    """What two paths lack."""
    if os.path.exists(os.path.join(last, "adapter_config.json")):
        return f"the merged folder is missing: infold verify {first} {last} MERGED"
    return (
        f"the adapters are missing: infold verify {first} ADAPTER... {last}, or infold verify "
        f"{last} alone, whose receipt tells the rest"
    )
