"""Run the example over seeds, with its control, and write what came of it.

    python examples/self_improvement/report.py --seeds 3 --out examples/self_improvement/report.md

A run that is there is continued; one that is complete costs seconds.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from drift import distance, tensors, updates

import infold
from infold.loop.run import lineage

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent.parent / "benchmarks"))
from parts import machine, told  # noqa: E402

PHASES = ("collect", "train", "merge", "evaluate")


def share(score: dict) -> str:
    return (
        f"{score['right']}/{score['of']} = {score['share']:.1%} "
        f"({score['low']:.1%} to {score['high']:.1%})"
    )


def scores(runs: dict[int, tuple[dict, dict]]) -> list[str]:
    lines = ["| seed | iteration | accepted answers are learnt | all are learnt (control) |",
             "|---|---|---|---|"]  # fmt: skip
    for seed, (loop, control) in runs.items():
        for one, other in zip(loop["iterations"], control["iterations"], strict=True):
            name = one["iteration"] or "base"
            lines.append(f"| {seed} | {name} | {share(one['score'])} | {share(other['score'])} |")
    return lines


def gains(runs: dict[int, tuple[dict, dict]]) -> list[str]:
    """In words what was gained: whether the intervals of base and last iteration meet."""
    lines = []
    for seed, arms in runs.items():
        told = []
        for name, run in zip(("accepted answers learnt", "all learnt"), arms, strict=True):
            first, last = (run["iterations"][n]["score"] for n in (0, -1))
            way = "no change is shown: the intervals meet"
            if last["low"] > first["high"]:
                way = "a gain"
            elif last["high"] < first["low"]:
                way = "a loss"
            told.append(f"{name}, {first['share']:.1%} to {last['share']:.1%}, {way}")
        lines.append(f"- Seed {seed}: {'; '.join(told)}.")
    return lines


def levels(runs: dict[int, tuple[dict, dict]]) -> list[str]:
    known = sorted(next(iter(runs.values()))[0]["iterations"][0]["score"]["levels"])
    lines = ["| seed | iteration | " + " | ".join(f"level {name}" for name in known) + " |",
             "|---|---|" + "---|" * len(known)]  # fmt: skip
    for seed, (loop, _) in runs.items():
        for it in loop["iterations"]:
            cells = [it["score"]["levels"][name] for name in known]
            shown = " | ".join(f"{cell['right']}/{cell['of']}" for cell in cells)
            lines.append(f"| {seed} | {it['iteration'] or 'base'} | {shown} |")
    return lines


def times(runs: dict[int, tuple[dict, dict]]) -> list[str]:
    lines = [f"| seed | iteration | {' | '.join(PHASES)} | rows learnt | memory at the merge, MB |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for seed, (loop, _) in runs.items():
        for it in loop["iterations"]:
            took = [f"{it[p]['seconds']:.1f} s" if it[p] else "" for p in PHASES]
            memory = it["merge"]["memory"] if it["merge"] else None
            shown = " / ".join(f"{n / 1e6:,.0f}" for n in memory.values()) if memory else ""
            rows = it["collect"]["rows"] if it["collect"] else ""
            name = it["iteration"] or "base"
            lines.append(f"| {seed} | {name} | {' | '.join(took)} | {rows} | {shown} |")
    return lines


def minutes(runs: dict[int, tuple[dict, dict]]) -> str:
    """What the phases of a run took together, of the quickest and the slowest run."""
    took = [
        sum(it[phase]["seconds"] for it in run["iterations"] for phase in PHASES if it[phase]) / 60
        for arms in runs.values()
        for run in arms
    ]
    return f"{min(took):.1f} to {max(took):.1f} minutes"


def drifts(base: Path, runs: dict[int, Path]) -> list[str]:
    """Ours, rebuilt for each iteration, and the same adapters merged one onto the other.

    Both against the float64 truth, as a share of the norm of what all adapters add together.
    """
    lines = ["| seed | iteration | update, share of the weights | base + all, one rounding | "
             "merge on merge | ratio |", "|---|---|---|---|---|---|"]  # fmt: skip
    start = {name: value.double() for name, value in tensors(base).items()}
    for seed, run in runs.items():
        truth, adapters = dict(start), []
        with tempfile.TemporaryDirectory(dir=run.parent) as work:
            before = base
            for adapter in sorted(run.glob("iterations/*/adapter")):
                adapters.append(adapter)
                added = updates(adapter)
                for name, update in added.items():
                    truth[name] = truth[name] + update
                ours, chained = Path(work) / "ours", Path(work) / f"chained-{len(adapters)}"
                infold.merge(base, adapters, ours, force=True)
                infold.merge(before, [adapter], chained)
                before = chained
                whole = distance(start, truth, added)
                share = whole / distance(start, {n: torch.zeros(()) for n in added}, added)
                one, many = (distance(tensors(w), truth, added) / whole for w in (ours, chained))
                lines.append(
                    f"| {seed} | {len(adapters)} | {share:.2%} | {one:.1%} | {many:.1%} | "
                    f"{many / one:.2f} |"
                )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--config", type=Path, default=HERE / "config.toml")
    parser.add_argument("--runs", type=Path, help="folder for the runs; beside the config's run")
    parser.add_argument("--out", type=Path, default=HERE / "report.md")
    args = parser.parse_args()
    runs: dict[int, tuple[dict, dict]] = {}
    folders: dict[int, Path] = {}
    for seed in range(args.seeds):
        made = []
        for control in (False, True):
            place = args.runs / str(seed) if args.runs else None
            loop = infold.Loop(args.config, seed=seed, run=place, control=control)
            if place is None and not control:
                args.runs = Path(f"{loop.folder.path}-seeds")
            loop = infold.Loop(args.config, seed=seed, run=args.runs / str(seed), control=control)
            print(f"\nseed {seed}{', control' if control else ''}", flush=True)
            loop.run(lambda line: print(line, flush=True))
            made.append(lineage(loop.folder.path))
        runs[seed] = (made[0], made[1])
        folders[seed] = args.runs / str(seed)
        base = Path(loop.config.base)
    text = [
        "# Self-improvement of SmolLM2-135M-Instruct on arithmetic word problems",
        "",
        f"    python examples/self_improvement/report.py --seeds {args.seeds}",
        "",
        "[config.toml](config.toml) has the settings. Both arms begin with the same model, "
        "problems and answers, and take as many training steps; later each asks the model that it "
        f"has become. All phases of one run, of one arm: {minutes(runs)}.",
        "",
        told(machine(("infold", "torch", "transformers"))),
        "",
        *gains(runs),
        "",
        "## Held-out problems that are right, with 95 % intervals (Wilson)",
        "",
        *scores(runs),
        "",
        "## By level, accepted answers learnt",
        "",
        *levels(runs),
        "",
        "## Time and memory (before / most / after), accepted answers learnt",
        "",
        "Before the merge the process still holds what it trained with; the merge itself adds next "
        "to nothing to it.",
        "",
        *times(runs),
        "",
        "## Drift, accepted answers learnt",
        "",
        "Distance from the float64 truth as a share of what all adapters add together. A merge "
        "here is the base with all adapters in one rounding; beside it, the same adapters merged "
        "one onto the other. [Over 20 iterations](../../benchmarks/results/loop-drift.md).",
        "",
        *drifts(base, folders),
        "",
    ]
    args.out.write_text("\n".join(text))
    print(f"\n{args.out}")


if __name__ == "__main__":
    main()
