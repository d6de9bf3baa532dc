"""infold loop CONFIG.toml, infold loop show RUN, infold loop checkout RUN N --out DIR"""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from infold.cli.output import results_alone, table
from infold.cli.startup import Ending, lasting_imports
from infold.errors import Refusal

_USAGE = "infold loop CONFIG.toml, infold loop show RUN, or infold loop checkout RUN N --out DIR"


def loop(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="CONFIG.toml | show RUN | checkout RUN N",
            help="A configuration to run; or a run to show; or a run, and which iteration.",
        ),
    ],
    run: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="The run's folder, instead of the configuration's."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="The seed, instead of the configuration's.")
    ] = None,
    control: Annotated[
        bool,
        typer.Option(
            "--control",
            help="Run the control in RUN-control: the same, but every answer is learnt.",
        ),
    ] = False,
    out: Annotated[
        str | None,
        typer.Option("--out", "-o", metavar="DIR", help="checkout: the folder to create."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="checkout: replace the output of an earlier merge.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of text.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Collect, train, merge, evaluate, and again.

    The model learns from those of its answers that a verifier accepts.

    The same command continues a run that was interrupted.
    """
    say = not (quiet or as_json)
    action = words[0] if words[0] in ("show", "checkout") else "run"
    if len(words) != {"run": 1, "show": 2, "checkout": 3}[action]:
        raise Refusal(f"cannot read {' '.join(words)!r}; write {_USAGE}")
    for_run = run is not None or seed is not None or control
    _check_options(action, for_run, out is not None or force)
    with lasting_imports():
        from infold.loop.run import Loop, checkout, lineage
    if action == "run":
        Ending.shortened = False
        with results_alone(as_json):  # a task is the user's code, and may print
            result = Loop(words[0], seed=seed, run=run, control=control).run(
                (lambda line: print(line, flush=True)) if say else lambda line: None
            )
        told = f"\n{_shown(result)}"
    elif action == "show":
        result = lineage(words[1])
        told = _shown(result)
    else:
        if out is None:
            raise Refusal(f"checkout needs --out DIR: infold loop {' '.join(words)} --out DIR")
        if not words[2].isdecimal():
            raise Refusal(
                f"{words[2]}: is no iteration; give a whole number, as infold loop show "
                f"{words[1]} tells them"
            )
        result = checkout(words[1], int(words[2]), out, force=force)
        told = f"output   {result['out']}: iteration {result['iteration']}, byte-identical"
    if as_json:
        print(json.dumps(result))
    elif say:
        print(told)


def _check_options(action: str, for_run: bool, for_checkout: bool) -> None:
    if for_run and action != "run":
        raise Refusal("--run, --seed and --control belong to a configuration that is run")
    if for_checkout and action != "checkout":
        raise Refusal("--out and --force belong to checkout")


def _shown(found: dict[str, Any]) -> str:
    phases = ("collect", "train", "merge", "evaluate")
    rows: list[tuple[str, ...]] = [
        ("iteration", "right", "95 %", "learnt", *phases, "all", "merge memory", "adapter")
    ]
    for it in found["iterations"]:
        score, merge = it["score"], it["merge"]
        rows.append(
            (
                str(it["iteration"]) if it["iteration"] else "base",
                f"{score['right']}/{score['of']} = {score['share']:.1%}" if score else "-",
                f"{score['low']:.1%}..{score['high']:.1%}" if score else "-",
                f"{it['collect']['rows']:,}" if it["collect"] else "-",
                *(f"{it[p]['seconds']:.1f} s" if it[p] else "-" for p in phases),
                f"{it['seconds']:.1f} s",
                _memory(merge["memory"]) if merge else "-",
                f"{it['adapter_bytes'] / 1e6:,.1f} MB" if it["adapter_bytes"] else "-",
            )
        )
    lines = [f"base     {found['base']['path']}", f"run      {found['run']}", "", table(rows)]
    if found["stopped"]:
        lines += ["", f"stopped  {found['stopped']}"]
    return "\n".join(lines)


def _memory(memory: dict[str, int] | None) -> str:
    """MB before, at the most, and after."""
    return " / ".join(f"{n / 1e6:,.0f}" for n in memory.values()) + " MB" if memory else "-"
