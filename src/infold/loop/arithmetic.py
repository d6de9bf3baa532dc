"""The built-in task `arithmetic`: word problems whose answers are known, of four levels.

    1  one sum or difference of numbers to 9       3  two steps
    2  one sum, difference or product, larger      4  three steps

Options: levels, a list of these. A problem belongs to the split that a digest of its computation
says: the splits cannot overlap, whatever the seed and the count, and no sum that is learnt from is
held out with other names, other things, or its terms in another order.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

from infold.errors import Refusal
from infold.loop.task import Task

__all__ = ["task"]

LEVELS = (1, 2, 3, 4)
_NAMES = "Ann Ben Cara Dan Eve Finn Gina Hugo Ida Jon Kim Leo Mia Ned Olga Pete".split()
_THINGS = "apples books coins cards eggs pens shells stamps stones tickets".split()
_MORE = ("buys {n} more", "finds {n} more", "gets {n} more from a friend")
_LESS = ("gives away {n}", "loses {n}", "sells {n}")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def task(options: Mapping[str, Any]) -> Task:
    """The task with its options. Raises Refusal for others, and for levels that do not exist."""
    unknown = sorted(set(options) - {"levels"})
    if unknown:
        raise Refusal([f"task.{key} does not exist; arithmetic has levels" for key in unknown])
    levels = options.get("levels", list(LEVELS))
    if not levels or not isinstance(levels, list | tuple) or not set(levels) <= set(LEVELS):
        raise Refusal(f"task.levels {levels!r}: must be a list of {', '.join(map(str, LEVELS))}")

    def problems(split: str, count: int, seed: int) -> list[dict[str, Any]]:
        chance = random.Random(f"{split}/{seed}")
        found: dict[str, dict[str, Any]] = {}
        for attempt in range(200 * count):
            if len(found) == count:
                break
            level = levels[len(found) % len(levels)]
            question, answer, computation = _problem(level, chance)
            if _split(computation) == split:
                found.setdefault(question, dict(question=question, answer=answer, level=level))
            elif attempt == 200 * count - 1:
                break
        return list(found.values())

    return Task(problems, prompt, verify)


def prompt(problem: Mapping[str, Any]) -> str:
    """The question, and where the answer goes."""
    return f"Question: {problem['question']}\nAnswer:"


def verify(problem: Mapping[str, Any], answer: str) -> bool:
    """Whether the last number of the answer is the right one."""
    numbers = _NUMBER.findall(answer)
    return bool(numbers) and float(numbers[-1].replace(",", "")) == problem["answer"]


def _split(computation: str) -> str:
    return "evaluate" if sha256(computation.encode()).digest()[0] < 64 else "collect"


def _problem(level: int, chance: random.Random) -> tuple[str, int, str]:
    """The question, its answer, and what is computed, however it is told."""
    name, thing = chance.choice(_NAMES), chance.choice(_THINGS)
    top = 9 if level == 1 else 30
    count = chance.randint(2, top)
    if level == 2 and chance.random() < 1 / 3:
        each = chance.randint(2, 9)
        count = chance.randint(2, 9)
        text = f"{name} has {count} boxes with {each} {thing} in each."
        computation = f"product {sorted((count, each))}"
        return f"{text} How many {thing} does {name} have?", count * each, computation
    steps, terms = [], [count]
    start = count
    for _ in range(max(1, level - 1)):
        if count > 1 and chance.random() < 0.5:
            number = chance.randint(1, min(top, count - 1))
            steps.append(chance.choice(_LESS).format(n=number))
            count -= number
            terms.append(-number)
        else:
            number = chance.randint(1, top)
            steps.append(chance.choice(_MORE).format(n=number))
            count += number
            terms.append(number)
    story = ", then ".join(steps)
    question = f"{name} has {start} {thing} and {story}. How many {thing} does {name} have now?"
    return question, count, f"sum {sorted(terms)}"
