"""From a base and two trained adapters to two merged models, one of them served, and a report.

    python examples/demo.py

Nothing here knows infold's library: each step is a command that is shown before it runs, and the
merged folders are loaded by plain transformers, without PEFT.
"""

import argparse
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from smollm2 import default_cache, make_base

ADAPTERS = Path(__file__).parent / "adapters"
HEAD = 18  # lines shown of a long listing

# Written for this demo, and picked: the base does not answer any of them as asked. The adapters,
# right in about 82 of 100 held-out reviews, fail on the last one, too; it stays in for that.
REVIEWS = (
    ("I expected very little and came out grinning.", "positive"),
    ("The jokes are old, and nobody seems awake.", "negative"),
    ("It would be more fun to watch the paint dry.", "negative"),
    ("The best thing about it is that it ends.", "negative"),
)

QUESTION = "Is it wise to test a model before it is deployed?"


def infold(*arguments: str | Path, head: int | None = None) -> None:
    """Show one command, run it, and leave with its exit code if it fails."""
    command = ["infold", *map(str, arguments)]
    print(f"\n$ {shlex.join(command)}", flush=True)
    # The one that belongs to this Python, whatever PATH says.
    command[0] = str(Path(sys.executable).with_name("infold"))
    done = subprocess.run(command, stdout=subprocess.PIPE if head else None, text=True)
    if done.returncode:
        print(f"\nthe command failed with exit code {done.returncode}", file=sys.stderr)
        sys.exit(done.returncode)
    if head:
        lines = done.stdout.splitlines()
        width = shutil.get_terminal_size((200, 24)).columns
        print("\n".join(line.rstrip()[:width] for line in lines[:head]))
        if len(lines) > head:
            print(f"... {len(lines) - head} more lines")


def answers(model_folder: Path) -> list[str]:
    """What one model says to each review: greedy, a few tokens, the first line."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # On the left, so that every prompt ends where its answer begins.
    tokenizer = AutoTokenizer.from_pretrained(model_folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    texts = [f"Review: {review}\nSentiment:" for review, _ in REVIEWS]
    prompts = tokenizer(texts, padding=True, return_tensors="pt")
    tokens = model.generate(**prompts, max_new_tokens=4, do_sample=False)
    said = tokenizer.batch_decode(
        tokens[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return [text.strip().split("\n")[0] for text in said]


def show_answers(models: dict[str, Path]) -> None:
    """Ask every model the same, and print one table; the last column is the truth."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from transformers.utils import logging

    logging.disable_progress_bar()
    table = Table(*("review", *models, "right"), box=box.SIMPLE_HEAD, pad_edge=False)
    columns = [answers(folder) for folder in models.values()]
    for (review, right), *said in zip(REVIEWS, *columns, strict=True):
        table.add_row(review, *said, right)
    print("\nEach merged model in plain transformers, asked `Review: ...` / `Sentiment:`")
    Console().print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=default_cache())
    cache = parser.parse_args().cache.absolute()
    base = make_base(cache)
    started = time.perf_counter()

    models = {"base": base}
    for method in ("ia3", "lora"):
        adapter = ADAPTERS / f"{method}-reviews"
        if adapter.is_relative_to(Path.cwd()):  # shorter to read, and just as true
            adapter = adapter.relative_to(Path.cwd())
        merged = cache / "demo" / method
        infold("inspect", adapter, "--base", base, head=HEAD)
        infold("merge", base, adapter, "--out", merged, "--force")
        infold("verify", base, adapter, merged)
        models[f"+ {method}"] = merged
    show_answers(models)

    served, report = cache / "demo" / "served", cache / "demo" / "report.html"
    shutil.rmtree(served, ignore_errors=True)
    infold("deploy", merged, "--out", served, "--no-measure", head=HEAD)
    asked = ("--requests", "6", "--seconds", "1", "--prompt", QUESTION)
    infold("deploy", served, "--smoke", *asked)
    infold("report", served, "--out", report)

    print(f"\nDone in {time.perf_counter() - started:.0f} s. The report, for a browser: {report}")
    print("The merged models:")
    for merged in [*list(models.values())[1:], served]:
        print(f"  {merged}")
    print("Each is an ordinary checkpoint folder:")
    print(f'  model = transformers.AutoModelForCausalLM.from_pretrained("{merged}")')
    return 0


if __name__ == "__main__":
    sys.exit(main())
