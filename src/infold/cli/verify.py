"""infold verify BASE ADAPTER... MERGED"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from infold.api.paths import settle_first
from infold.cli.output import Failed, complain, entry, fold, table
from infold.cli.place import check_words
from infold.cli.progress import byte_progress, step_progress
from infold.cli.startup import lasting_imports
from infold.errors import Refusal
from infold.sizes import plural

if TYPE_CHECKING:
    from infold.verify.verdict import Offender, Outputs, Verdict

_SHOWN = 20  # lines of offenders; --json has all
_NUMBER = re.compile(r"[-+]?(\d[\d.,e+-]*|\b(inf|nan)\b)")


def verify(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="BASE ADAPTER... MERGED",
            help="Base, adapters in their order, merged folder or .gguf file. Or only the last: "
            "its receipt tells the rest.",
        ),
    ],
    outputs: Annotated[
        bool,
        typer.Option(
            "--outputs",
            help="Also run the base with its adapters unmerged, and the merged model, and compare "
            "their logits. Needs transformers.",
        ),
    ] = False,
    prompts: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="With --outputs: a file of prompts, one a line."),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="With --outputs: a file whose perplexity is measured."),
    ] = None,
    new_tokens: Annotated[
        int, typer.Option(metavar="N", help="With --outputs: tokens of each greedy continuation.")
    ] = 32,
    device: Annotated[
        str,
        typer.Option(
            metavar="DEVICE", help="With --outputs: cpu, cuda or cuda:N, to run the models on."
        ),
    ] = "cpu",
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
    if not outputs and (prompts or text or new_tokens != 32 or device != "cpu"):
        raise Refusal("--prompts, --text, --new-tokens and --device belong to --outputs")
    check_words(paths[:-1], paths[-1], device=device)
    with lasting_imports():
        from infold.verify.weights import verify_checkpoint

    base = paths[0] if len(paths) > 1 else None
    settle_first(paths[-1])
    if base is not None:
        settle_first(base, refuse=True)
    if outputs:
        verdict = _with_outputs(
            base, paths[1:-1], paths[-1], quiet or as_json,
            prompts=prompts, text=text, new_tokens=new_tokens, device=device,
        )  # fmt: skip
    else:
        with byte_progress("verifying", quiet or as_json) as progress:
            verdict = verify_checkpoint(base, paths[1:-1], paths[-1], progress=progress)
    if as_json:
        from infold.deploy.records import without_infinity

        print(json.dumps(without_infinity(asdict(verdict))))
    elif not quiet:
        equal = f"{verdict.identical:,} byte-identical to the base"
        anew = f"{verdict.recomputed:,} equal to their recomputation"
        print(entry("tensors", f"{equal}, {anew}, of {verdict.tensors:,}"))
        print(entry("files", f"{plural('side file', verdict.files)} equal"))
        if verdict.undecided:
            count = plural("element", verdict.undecided)
            print(entry("", f"{count} on a rounding boundary: either way is right"))
        if verdict.outputs is not None:
            _show(verdict.outputs)
    if not verdict.ok:
        if not as_json:
            _list(verdict.offenders)
        failed = [plural("offender", len(verdict.offenders))] if verdict.offenders else []
        if verdict.outputs is not None and not verdict.outputs.ok:
            failed.append("the outputs differ")
        raise Failed(f"{paths[-1]}: proof failed, {', '.join(failed)}")
    if not (quiet or as_json):
        told = f"{paths[-1]} is what base and adapters make"
        print(entry("proven", f"in {verdict.seconds:.1f} s: {told}"))


def _with_outputs(
    base: str | None, adapters: list[str], merged: str, quiet: bool, **run: Any
) -> Verdict:
    """The whole proof; what was found by running is kept for `infold checklist` and `report`."""
    from infold.deploy.records import keep_record
    from infold.verify.both import verify_with_outputs

    with byte_progress("verifying", quiet) as read, step_progress("running", quiet) as steps:
        verdict = verify_with_outputs(base, adapters, merged, progress=read, steps=steps, **run)
    if verdict.outputs is not None:
        keep_record(merged, asdict(verdict.outputs), complain)
    return verdict


def _list(offenders: Sequence[Offender]) -> None:
    """A line for each, or for those of many layers that are of one kind but for their numbers."""
    folded = fold(offenders, lambda o: o.where, lambda o: (o.what, _NUMBER.sub("#", o.detail)))
    for where, alike in folded[:_SHOWN]:
        first = alike[0]
        count = "" if len(alike) == 1 else f"{len(alike):,} alike, the first: "
        complain(f"{where}: {first.what}: {count}{first.detail}")
    if rest := sum(len(alike) for _, alike in folded[_SHOWN:]):
        complain(f"and {rest:,} more; --json lists all of them")


def _show(found: Outputs) -> None:
    """Each bound beside what was measured."""
    rows: list[tuple[str, ...]] = [("", "outputs, all in float32", "measured", "bound")]
    rows += [
        ("ok" if c.ok else "FAIL", c.what, f"{c.measured:.2e}", f"{c.bound:.2e}")
        for c in found.checks
    ]
    print("\n" + table(rows) + "\n")
    merged, pairs = found.differences["merged"], found.continuations
    same = sum(c.differs_at is None for c in pairs)
    print(entry("agree", f"best token at {merged.agreement:.2%} of {merged.positions:,} positions"))
    print(entry("greedy", f"{same} of {len(pairs)} continuations equal, token by token"))
    told = ", ".join(
        f"{name} {found.perplexity[name]:.4f}" for name in ("base", "adapter", "merged")
    )
    print(entry("ppl", f"{told}, over {found.tokens:,} tokens"))
    for note in found.notes:
        print(entry("note", note))


def _lacking(first: str, last: str) -> str:
    """What two paths lack."""
    if os.path.exists(os.path.join(last, "adapter_config.json")):
        return f"the merged folder is missing: infold verify {first} {last} MERGED"
    return (
        f"the adapters are missing: infold verify {first} ADAPTER... {last}, or infold verify "
        f"{last} alone, whose receipt tells the rest"
    )
