"""What the models are asked: prompts to continue, and a text to read."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infold.checkpoint.files import read_bytes
from infold.errors import Refusal

__all__ = ["TEXT", "Questions", "read_questions"]

PathLike = str | os.PathLike[str]

PROMPTS = (
    "The film was",
    "Once upon a time there was a lighthouse keeper who",
    "Water boils at a lower temperature on a mountain because",
    "def fibonacci(n):",
    "Question: what is the capital of France?\nAnswer:",
    "1, 2, 4, 8, 16,",
)
TEXT = """\
The harbour woke before the town did. Gulls walked along the quay and looked into the boats, and
the first lorry of the day reversed slowly past the ice house. In the office above the fish
market an old clerk opened the ledger, wrote the date, and added up the column that he had left
unfinished the evening before: forty-two crates of cod, eleven of mackerel, three of crab. The
sum was right. He drank his coffee, which was too hot, and thought about the letter from his
daughter. She had found work in a laboratory, where she measured how quickly small crystals grow
when a solution cools. If it cools slowly, she wrote, the crystals are few and large; if it
cools at once, they are many and fine, and nobody can tell beforehand where the first of them
will appear. He understood this very well. It was the same with ice on the basin, and with
rumours in the town.
"""
_WINDOW = 512  # tokens of the text that are read at once


@dataclass(frozen=True)
class Questions:
    """Token ids. `windows` are pieces of one text, of at most 512 tokens, each read on its own."""

    prompts: tuple[str, ...]
    prompt_ids: tuple[tuple[int, ...], ...]
    windows: tuple[tuple[int, ...], ...]


def read_questions(
    prompts: PathLike | None, text: PathLike | None, tokenizer: Any, limit: int, new_tokens: int
) -> Questions:
    """Prompts (a file: one a line) and a text, as tokens; None stands for infold's own.

    limit: positions that the model takes. Raises Refusal that lists all empty and too long lines.
    """
    lines = PROMPTS if prompts is None else tuple(_lines(_decode(prompts)))
    problems = [] if lines else [f"{prompts}: holds no prompt"]
    encoded = []
    for number, line in enumerate(lines, 1):
        where = f"{prompts or 'prompts'}: line {number}"
        ids = tuple(tokenizer(line)["input_ids"]) if line.strip() else ()
        if not line.strip():
            problems.append(f"{where} is empty; remove it")
        elif not ids:
            problems.append(f"{where} has no tokens")
        elif len(ids) + new_tokens > limit:
            told = f"{len(ids):,} tokens and {new_tokens} new ones; the model takes {limit:,}"
            problems.append(f"{where}: {told}")
        encoded.append(ids)
    whole = TEXT if text is None else _decode(text)
    ids = tuple(tokenizer(whole, verbose=False)["input_ids"])
    size = min(_WINDOW, limit)
    windows = tuple(ids[at : at + size] for at in range(0, len(ids), size))
    windows = tuple(window for window in windows if len(window) > 1)
    if not windows:
        problems.append(f"{text}: a text of two tokens or more is needed to tell a perplexity")
    if problems:
        raise Refusal(problems)
    return Questions(lines, tuple(encoded), windows)


def _lines(text: str) -> list[str]:
    """Lines as editors count them; the end of the last one is no line."""
    return text.replace("\r\n", "\n").removesuffix("\n").split("\n") if text else []


def _decode(path: PathLike) -> str:
    """A file's UTF-8 text."""
    try:
        return read_bytes(Path(path)).decode("utf-8")
    except UnicodeDecodeError as error:
        raise Refusal(f"{path}: not UTF-8 at byte {error.start:,}") from None
