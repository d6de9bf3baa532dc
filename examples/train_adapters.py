"""Train the two example adapters: IA3 and LoRA on short film reviews, with PEFT, on a CPU.

The task is one word long: `Review: ...` / `Sentiment:` is answered by ` positive` or ` negative`,
and then the turn ends. The base has a notion of the answer but not of the format; the adapters
learn both. The loss is taken on the answer alone, so nothing is learnt of how reviews are worded.

infold trains such adapters, too: train_reviews.py.

    python examples/train_adapters.py     # 10 to 15 minutes on 2 cores; needs the extra `dev`
"""

import argparse
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from reviews import ANSWERS, REVIEWS, Review, judge, last_logits, load_reviews
from smollm2 import NAME, PACKAGE, UPSTREAM, default_cache, make_base
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

BATCH, WARMUP, SEED = 4, 10, 0


class Recipe(NamedTuple):
    """One adapter to train."""

    config: PeftConfig
    learning_rate: float
    about: str


RECIPES = {
    "ia3-reviews": Recipe(
        IA3Config(
            task_type="CAUSAL_LM",
            target_modules=["k_proj", "v_proj", "down_proj"],
            feedforward_modules=["down_proj"],
        ),
        8e-3,
        "IA³ on `k_proj`, `v_proj` (outputs) and `down_proj` (inputs) of every layer",
    ),
    "lora-reviews": Recipe(
        LoraConfig(
            task_type="CAUSAL_LM",
            r=8,
            lora_alpha=16,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        ),
        5e-4,
        "LoRA of rank 8, alpha 16, on `q_proj`, `k_proj`, `v_proj`, `o_proj` of every layer",
    ),
}


def train(model: PeftModel, reviews: list[Review], answers: list[int], lr: float, steps: int):
    """Plain AdamW. The rate climbs for `WARMUP` steps, then falls to zero in a straight line."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP, (steps - step) / steps)
    )
    model.train()
    for step in range(steps):
        batch = reviews[step * BATCH : (step + 1) * BATCH]
        rows = [[*review.tokens, answers[review.label]] for review in batch]
        target = torch.tensor([[row[-1], model.config.eos_token_id] for row in rows])
        # Over the whole vocabulary, not the two answers: the format has to be learnt too.
        logits = last_logits(model, rows, count=2)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step == steps - 1:
            print(f"  step {step:3d}  loss {loss.item():.3f}", flush=True)


def write_card(folder: Path, recipe: Recipe, steps: int, before: list[bool], after: list[bool]):
    """Replace PEFT's template card, which is mostly unfilled blanks, by one with the facts."""
    rows = len(after)
    fixed = sum(a and not b for a, b in zip(after, before, strict=True))
    broken = sum(b and not a for a, b in zip(after, before, strict=True))
    (folder / "README.md").write_text(
        f"""---
base_model: {UPSTREAM}
library_name: peft
license: apache-2.0
---

# {folder.name}

{recipe.about}.
An example adapter for infold: it answers `Review: ...` / `Sentiment:` with ` positive` or
` negative`. Trained with PEFT in fp32 on a CPU: {steps} steps of {BATCH} Rotten Tomatoes sentences,
learning rate {recipe.learning_rate:g}, seed {SEED}, loss on the answer and the end of turn.
The reviews come from the package `{REVIEWS}` when the script runs; none of their text is
in this folder.

    python examples/train_adapters.py --steps {steps} --held-out {rows}

Accuracy on {rows:,} held-out rows, the likelier of the two answers, one seed:

| | accuracy |
|---|---|
| base | {sum(before) / rows:.3f} |
| base + this adapter | {sum(after) / rows:.3f} ({fixed} answers fixed, {broken} broken) |

The base's weights are those of the Q4_1 file in the package `{PACKAGE}`, widened
(`examples/smollm2.py`): these scores are not the upstream model's.

Licence of the adapter: Apache-2.0, as the base.
""",
        encoding="utf-8",
    )


def load_base(base: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=default_cache())
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "adapters")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--held-out", type=int, default=1000, metavar="ROWS")
    options = parser.parse_args()
    logging.disable_progress_bar()

    base = make_base(options.cache)
    tokenizer = AutoTokenizer.from_pretrained(base)
    answers = [token for answer in ANSWERS for token in tokenizer.encode(answer)]
    to_train, held_out = load_reviews(tokenizer, options.held_out)
    before = judge(load_base(base), held_out, answers)
    print(f"{NAME}: {sum(before) / len(before):.3f} right of {len(before)} held-out rows")

    for name, recipe in RECIPES.items():
        started = time.perf_counter()
        print(f"{name}: {options.steps} steps", flush=True)
        torch.manual_seed(SEED)  # LoRA's A starts at random
        model = get_peft_model(load_base(base), recipe.config)
        train(model, to_train, answers, recipe.learning_rate, options.steps)
        seconds = time.perf_counter() - started
        after = judge(model, held_out, answers)
        # PEFT notes the path it loaded from; that path means nothing on another machine.
        recipe.config.base_model_name_or_path = UPSTREAM
        # PEFT keeps the names as a set, whose order changes from run to run.
        recipe.config.target_modules = sorted(recipe.config.target_modules)
        # False: the embeddings are untouched, and asking the hub whether they are needs a network.
        model.save_pretrained(options.out / name, save_embedding_layers=False)
        write_card(options.out / name, recipe, options.steps, before, after)
        print(f"{name}: {sum(after) / len(after):.3f} right, trained in {seconds:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
