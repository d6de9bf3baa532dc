"""Measure base, adapter mode (infold, PEFT) and merged SmolLM2, with `infold bench`.

    python benchmarks/deployment.py                    # the base and adapters of `make demo`
    python benchmarks/deployment.py --only ia3 --dtype float32        # one part of four, again
    python benchmarks/deployment.py --pairs            # base and merged alone, in many more starts
    python benchmarks/deployment.py --pairs --control  # a copy of the base as the merged one
    python benchmarks/deployment.py --rounds 1 --starts 1 --results /tmp   # a try

Writes deployment.md (deployment-pairs.md), and the same as JSON with medians and intervals, after
each part: those of an interrupted run on the same machine, with the same versions and settings, are
kept.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import infold
from infold.bench.run import measure_models
from infold.cli.progress import step_progress
from infold.sizes import bytes_text

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "examples"))

from smollm2 import default_cache, make_base  # noqa: E402

ADAPTERS = HERE.parent / "examples" / "adapters"
DTYPES = ("bfloat16", "float32")
# a merged model is the base's own architecture: anything beyond this is noise, or a defect
NOISE = (0.98, 1.02)


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, help="default: SmolLM2-135M-Instruct, which is made")
    parser.add_argument("--only", choices=("lora", "ia3"))
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--device", default="cpu")
    # 28 pairs, in processes that were launched four times: each model has loaded first once
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--starts", type=int)
    parser.add_argument("--batch", type=int, action="append", help="default: 1")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--pairs", action="store_true", help="base and merged alone, 16 starts")
    parser.add_argument("--control", action="store_true", help="a copy of the base as merged")
    given = parser.parse_args()
    starts, rounds, new_tokens = (16, 5, 8) if given.pairs else (4, 7, 16)
    starts = starts if given.starts is None else given.starts
    rounds = rounds if given.rounds is None else given.rounds
    new_tokens = new_tokens if given.new_tokens is None else given.new_tokens
    base = given.base or make_base(default_cache())
    records: dict[str, dict[str, Any]] = {}
    methods = [given.only] if given.only else ["lora", "ia3"]
    for method in methods[:1] if given.control else methods:
        adapter = ADAPTERS / f"{method}-reviews"
        with tempfile.TemporaryDirectory() as made:
            if given.control:
                shutil.copytree(base, Path(made) / "merged")
            else:
                infold.merge(base, adapter, Path(made) / "merged")
            for dtype in [given.dtype] if given.dtype else DTYPES:
                with step_progress(f"{method} {dtype}", False) as progress:
                    record = measure_models(
                        base, adapter, Path(made) / "merged", rounds=rounds,
                        starts=starts, dtype=dtype, device=given.device,
                        batches=given.batch or [1], prompt_tokens=given.prompt_tokens,
                        new_tokens=new_tokens, modes=not given.pairs, progress=progress,
                    )  # fmt: skip
                name = "deployment-pairs" if given.pairs else "deployment"
                part = "a copy of the base as merged" if given.control else method
                records = _save(given.results / name, f"{part}, {dtype}", record)
    print(page(records))


def _save(path: Path, part: str, record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Put a part among those that were measured in the same way; return all of them."""
    path.parent.mkdir(exist_ok=True)
    file = path.with_suffix(".json")
    before = json.loads(file.read_text()) if file.exists() else {}
    records = {name: r for name, r in before.items() if _way(r) == _way(record)} | {part: record}
    file.write_text(json.dumps(records, indent=1) + "\n")
    path.with_suffix(".md").write_text(page(records))
    return records


def _way(record: dict[str, Any]) -> list[Any]:
    """What must be equal for figures to stand on one page."""
    names = "device processor threads versions prompt_tokens new_tokens starts rounds infold"
    return [record[name] for name in names.split()]


def page(records: dict[str, dict[str, Any]]) -> str:
    """The results as Markdown."""
    one = next(iter(records.values()))
    lines = [
        "# Base, adapter mode, merged",
        "",
        "    python benchmarks/deployment.py" + ("" if "infold" in one["models"] else " --pairs"),
        "",
        f"SmolLM2-135M-Instruct and the adapters of `examples/`. {one['processor']}, "
        f"{one['threads']} threads, {one['device']}; "
        + ", ".join(f"{name} {version}" for name, version in one["versions"].items())
        + ".",
        "",
        f"`infold bench` with {one['rounds']} rounds in each of {one['starts']} starts, "
        f"{one['prompt_tokens']} prompt tokens, {one['new_tokens']} decoded. In brackets: over the "
        "base, the median of paired rounds and its interval of at least 95 % (load and memory: as "
        "many values as starts; with 6 starts and more all are medians of starts, whose rounds are "
        "more alike than those of two). More than 1 is worse.",
    ]
    return "\n".join([*lines, *tables(records)]) + "\n"


def tables(records: dict[str, dict[str, Any]]) -> list[str]:
    """One table for each record of `infold bench`, as lines."""
    lines = []
    for title, record in records.items():
        models = record["models"]
        lines += ["", f"## {title}", "", "| | " + " | ".join(models) + " |"]
        lines.append("|---|" + "--:|" * len(models))
        ratios = {(c["model"], c["metric"]): c for c in record["comparisons"]}
        metrics = dict.fromkeys(metric for found in models.values() for metric in found)
        for metric in metrics:
            told = metric.replace("decode_tokens_per_second", "decode_seconds_per_token")
            told = told.replace("_", " ")
            cells = [_cell(metric, f.get(metric), ratios.get((m, told))) for m, f in models.items()]
            lines.append(f"| {metric.replace('_', ' ')} | " + " | ".join(cells) + " |")
        lines += ["", verdict(record)]
    return lines


def verdict(record: dict[str, Any]) -> str:
    """Whether merged is the base's equal: intervals of speed that lie in the band, or hold 1."""
    low, high = NOISE
    found = [c for c in record["comparisons"] if c["model"] == "merged" and c["what"] == "speed"]
    medians = [c for c in found if low <= c["ratio"] <= high]
    whole = [c for c in found if low <= c["low"] and c["high"] <= high]
    apart = [c for c in found if not c["within_noise"]]
    text = f"Merged over base, of {len(found)} ratios of speed: {len(medians)} medians and "
    text += f"{len(whole)} whole intervals lie in {low}–{high}; {len(found) - len(apart)} "
    text += "intervals hold 1."
    if apart:
        text += " Not: " + ", ".join(f"{c['metric']} {c['ratio']:.3f}" for c in apart) + "."
    return text + f" Measured in {record['seconds']:.0f} s."


def _cell(metric: str, found: dict[str, float] | None, ratio: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    if "bytes" in metric:
        text = bytes_text(round(found["median"]))
    elif "per_second" in metric:
        text = f"{found['median']:.1f}"
    else:
        text = f"{found['median']:.3f} s"
    if ratio is not None:
        text += f" ({ratio['ratio']:.3f}: {ratio['low']:.3f}–{ratio['high']:.3f})"
    return text


if __name__ == "__main__":
    main()
