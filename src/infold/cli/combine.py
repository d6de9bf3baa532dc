"""infold combine ADAPTER... --weights W,... --type TYPE --out DIR"""

from __future__ import annotations

import json
from dataclasses import asdict
from operator import itemgetter
from typing import TYPE_CHECKING, Annotated

import typer

from infold.cli.output import fold, table
from infold.cli.startup import lasting_imports
from infold.errors import Refusal
from infold.sizes import bytes_text, plural

if TYPE_CHECKING:
    from infold.tuners.combine import Combination


def combine(
    adapters: Annotated[
        list[str],
        typer.Argument(
            metavar="ADAPTER...", help="IA³ or LoRA adapters of one base: PEFT folders or Hub ids."
        ),
    ],
    weights: Annotated[
        str, typer.Option(metavar="W,...", help="One number for each adapter, such as 0.5,0.5.")
    ],
    kind: Annotated[
        str,
        typer.Option(
            "--type",
            metavar="TYPE",
            help="IA³: linear, interpolate, product. LoRA: linear, cat, svd, ties, ties_svd, "
            "dare_linear, dare_ties, dare_linear_svd, dare_ties_svd, magnitude_prune, "
            "magnitude_prune_svd.",
        ),
    ],
    out: Annotated[str, typer.Option("--out", "-o", metavar="DIR", help="The folder to create.")],
    density: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE", help="The share of elements that ties, dare and magnitude_prune keep."
        ),
    ] = None,
    majority_sign: Annotated[
        str,
        typer.Option(
            metavar="HOW", help="How ties elects a sign: total (of the values) or frequency."
        ),
    ] = "total",
    svd_rank: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="The rank of the svd types. Default: the adapters' largest."
        ),
    ] = None,
    svd_clamp: Annotated[
        float | None,
        typer.Option(
            metavar="QUANTILE",
            help="Cut the factors of the svd types at this quantile, such as 0.99.",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(metavar="N", help="For dare: which elements are dropped.")
    ] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be combined and write nothing.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing adapter.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of text.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Combine adapters of one base into one adapter.

    The adapters may touch different modules and, where the type allows it, have different ranks.
    Every tensor is combined or carried over, or nothing is written and all that does not fit is
    listed.
    """
    numbers = _numbers(weights)
    with lasting_imports():
        from infold.tuners.combine import check_output, plan_combination, write_combination

    plan = plan_combination(
        adapters,
        numbers,
        kind,
        density=density,
        majority_sign=majority_sign,
        svd_rank=svd_rank,
        svd_clamp=svd_clamp,
        seed=seed,
    )
    check_output(plan, out, force)
    if dry_run:
        print(json.dumps(plan.summary()) if as_json else _plan_text(plan))
        return
    say = not (quiet or as_json)
    if say:
        print(_summary(plan), flush=True)
    combined = write_combination(plan, out, force=force)
    if as_json:
        print(json.dumps(asdict(combined)))
    elif say:
        print(
            f"combined {plural('tensor', combined.tensors)}, {bytes_text(combined.bytes)}, "
            f"in {combined.seconds:.1f} s"
        )
        print(f"output   {out}")


def _numbers(text: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise Refusal(f"--weights {text!r} is not a list of numbers such as 0.5,0.5") from None


def _summary(plan: Combination) -> str:
    lines = [
        f"planned  {plan.method} {plan.kind} of {plural('adapter', len(plan.adapters))}: "
        f"{plural('module', len(plan.modules))}{_ranks(plan)}"
    ]
    lines += [f"note     {note}" for note in plan.notes]
    return "\n".join(lines)


def _ranks(plan: Combination) -> str:
    ranks = sorted(set(plan.ranks.values()))
    if not ranks:
        return ""
    return f", rank {ranks[0]}" if len(ranks) == 1 else f", ranks {ranks[0]} to {ranks[-1]}"


def _plan_text(plan: Combination) -> str:
    rows = [(module, _terms(plan, module)) for module in plan.modules]
    rows += [(key, "carried over") for key in plan.carried]
    folded = fold(rows, itemgetter(0), itemgetter(1))
    told = table((name, members[0][1]) for name, members in folded)
    return "\n".join([_summary(plan), told, "nothing was written"])


def _terms(plan: Combination, module: str) -> str:
    terms = " + ".join(f"{plan.weights[n]:g} x adapter {n}" for n, _, _ in plan.modules[module])
    return f"{terms}  rank {plan.ranks[module]}" if plan.ranks else terms
