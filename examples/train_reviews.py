"""Train IA³ and LoRA with infold on film reviews, and follow both to the merged model.

For each method: train, load the adapter in PEFT and compare, score over held-out reviews, merge,
verify, score the merged model.

    python examples/train_reviews.py                # one seed; needs the extra `dev`, for PEFT
    python examples/train_reviews.py --seeds 3 --results benchmarks/results/reviews.md
"""

import argparse
import json
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel
from reviews import ANSWERS, REVIEWS, Review, judge, last_logits, load_reviews
from smollm2 import NAME, PACKAGE, default_cache, make_base
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import infold

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
from parts import machine, told

STEPS, ROW = 100, 240  # a row of so many tokens holds about seven reviews, one after the other
OPTIONS = {
    "ia3": "--lr 8e-3",
    "lora": "--lr 5e-4 --rank 8 --alpha 16 --targets q_proj,k_proj,v_proj,o_proj",
}


class Score(NamedTuple):
    """One trained adapter: right answers of all, and what it takes."""

    method: str
    seed: int
    unmerged: float
    merged: float
    changed: int  # answers that differ between the two
    parameters: int
    size: int  # bytes of the adapter's tensors on disk
    seconds: float  # of the training


def command(*arguments: object) -> None:
    """Show one infold command and run it."""
    words = [str(argument) for argument in arguments]
    print(f"\n$ infold {shlex.join(words)}", flush=True)
    subprocess.run([str(Path(sys.executable).with_name("infold")), *words], check=True)


def load_model(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def compare_with_peft(model, base: Path, adapter: Path, reviews: list[Review]) -> None:
    """PEFT reads the folder and gives the same logits; otherwise this ends the example."""
    rows = [review.tokens for review in reviews]
    with torch.inference_mode():
        ours = last_logits(model, rows, count=1)
        theirs = last_logits(PeftModel.from_pretrained(load_model(base), adapter), rows, count=1)
    distance = (ours - theirs).abs().max().item()
    print(f"PEFT loads it: logits of {len(rows)} reviews differ by at most {distance:.1e}")
    if distance > 1e-3:
        raise SystemExit("PEFT and infold disagree about this adapter")


def run(
    method: str,
    seed: int,
    base: Path,
    work: Path,
    data: Path,
    held_out: list[Review],
    answers: list[int],
) -> Score:
    """One method and one seed, from the data to the merged model."""
    adapter, merged = work / f"{method}-{seed}", work / "merged"
    shutil.rmtree(adapter, ignore_errors=True)
    began = time.perf_counter()
    packed = f"--packing --max-length {ROW} --batch-size 1"  # so nothing is padded
    settings = f"--method {method} --steps {STEPS} {packed} --warmup 0.1 --seed {seed}"
    command("train", base, data, "--out", adapter, *f"{settings} {OPTIONS[method]}".split())
    seconds = time.perf_counter() - began

    model = infold.load(load_model(base), adapter)
    compare_with_peft(model, base, adapter, held_out[:16])
    unmerged = judge(model, held_out, answers)
    parameters = sum(p.numel() for n, p in model.named_parameters() if ".adapters." in n)

    command("merge", base, adapter, "--out", merged, "--force")
    command("verify", base, adapter, merged)
    after = judge(load_model(merged), held_out, answers)
    changed = sum(a != b for a, b in zip(unmerged, after, strict=True))
    rows, size = len(held_out), (adapter / "adapter_model.safetensors").stat().st_size
    print(f"{method}: {sum(unmerged) / rows:.3f} right unmerged, {sum(after) / rows:.3f} merged")
    return Score(
        method,
        seed,
        sum(unmerged) / rows,
        sum(after) / rows,
        changed,
        parameters,
        size,
        seconds,
    )


def table(scores: list[Score], before: float, rows: int) -> str:
    """Markdown, one line a method: mean over the seeds, and each seed."""
    lines = [
        "| | right, mean | each seed | merged, each seed | answers changed by merging "
        "| trainable parameters | adapter |",
        "|---|--:|---|---|---|--:|--:|",
        f"| base | {before:.3f} | | | | | |",
    ]
    for method in OPTIONS:
        own = [score for score in scores if score.method == method]
        each = ", ".join(f"{score.unmerged:.3f}" for score in own)
        merged = ", ".join(f"{score.merged:.3f}" for score in own)
        changed = ", ".join(str(score.changed) for score in own)
        mean = statistics.mean(score.unmerged for score in own)
        lines.append(
            f"| {method} | {mean:.3f} | {each} | {merged} | {changed} of {rows:,} "
            f"| {own[0].parameters:,} | {own[0].size / 1e3:,.0f} kB |"
        )
    return "\n".join(lines)


def page(scores: list[Score], before: float, rows: int, minutes: float) -> str:
    seeds = len({score.seed for score in scores})
    return f"""# Film reviews: IA³ and LoRA, trained, merged, scored

{NAME} (the weights of the Q4_1 file in `{PACKAGE}`, widened to bf16); Rotten Tomatoes sentences of
`{REVIEWS}`; {STEPS} steps of one row of {ROW} tokens, about seven reviews; {rows:,} reviews that no
training saw; the likelier of the two answers counts. Adapters run beside the base in float32;
merged models are stored in bf16. {minutes:.0f} minutes in all.

{told(machine(("infold", "torch", "transformers", "peft")))}

{table(scores, before, rows)}

    python examples/train_reviews.py --seeds {seeds} --results benchmarks/results/reviews.md
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=default_cache())
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--held-out", type=int, default=1000, metavar="ROWS")
    parser.add_argument("--results", type=Path, help="file to write the table to")
    options = parser.parse_args()
    logging.disable_progress_bar()
    began = time.perf_counter()

    base = make_base(options.cache)
    work = options.cache / "train-reviews"
    work.mkdir(exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(base)
    answers = [token for answer in ANSWERS for token in tokenizer.encode(answer)]
    to_train, held_out = load_reviews(tokenizer, options.held_out)
    data = work / "reviews.jsonl"
    rows = [{"prompt": one.prompt, "completion": ANSWERS[one.label]} for one in to_train]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    before = sum(judge(load_model(base), held_out, answers)) / len(held_out)
    print(f"base: {before:.3f} right of {len(held_out):,} held-out reviews")

    scores = [
        run(method, seed, base, work, data, held_out, answers)
        for seed in range(options.seeds)
        for method in OPTIONS
    ]
    minutes = (time.perf_counter() - began) / 60
    print(f"\n{table(scores, before, len(held_out))}\n\n{minutes:.1f} minutes; adapters in {work}")
    if options.results:
        options.results.write_text(page(scores, before, len(held_out), minutes), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
