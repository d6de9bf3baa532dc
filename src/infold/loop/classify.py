"""The built-in task `classify`: rows of text and label, whose labels are the answers.

Options: data (a file, a folder or a Hub data set id, as `infold train` reads it), labels (names of
numbered classes), template (the prompt, with {text} and, where wanted, {labels}).
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

from infold.errors import Refusal
from infold.loop.task import Task, key_of
from infold.tuners.data import read_data
from infold.tuners.tokens import class_names

__all__ = ["task"]

OPTIONS = ("data", "labels", "template", "held_out")
TEMPLATE = "{text}\nOne of {labels}. Label:"


def task(options: Mapping[str, Any]) -> Task:
    """The task of a data set. Raises Refusal for wrong options, rows or labels, all of them.

    held_out: the share of the rows that is kept for evaluation; default 0.25.
    """
    wrong = [f"task.{k} does not exist; classify has {', '.join(OPTIONS)}"
             for k in sorted(set(options) - set(OPTIONS))]  # fmt: skip
    template, share = options.get("template", TEMPLATE), options.get("held_out", 0.25)
    if "data" not in options:
        wrong.append("task.data is missing: rows of text and label")
    if not isinstance(template, str) or "{text}" not in template:
        wrong.append("task.template: must hold {text}, where the row's text goes")
    if not isinstance(share, float) or not 0 < share < 1:
        wrong.append(f"task.held_out {share!r}: must lie between 0 and 1")
    if wrong:
        raise Refusal(wrong)
    data = read_data(options["data"], None, "label")
    names = class_names(data, options.get("labels"))
    splits: dict[str, list[dict[str, str]]] = {"collect": [], "evaluate": []}
    seen: dict[str, str] = {}
    for example in data.examples:
        text, label = example.values["text"], example.values["label"]
        name = names[label] if isinstance(label, int) else str(label)
        if key_of(text) in seen:  # the same text again is the same problem
            continue
        seen[key_of(text)] = name
        fraction = int.from_bytes(sha256(key_of(text).encode()).digest()[:4], "big") / 2**32
        splits["evaluate" if fraction < share else "collect"].append({"text": text, "label": name})
    listed = ", ".join(names)

    def problems(split: str, count: int, seed: int) -> list[dict[str, str]]:
        rows = splits[split]
        return random.Random(seed).sample(rows, min(count, len(rows)))

    def prompt(problem: Mapping[str, str]) -> str:
        shown: str = template.replace("{labels}", listed)
        return shown.replace("{text}", problem["text"])

    def verify(problem: Mapping[str, str], answer: str) -> bool:
        return answer.strip().strip(".!\"'").casefold() == problem["label"].casefold()

    return Task(problems, prompt, verify)
