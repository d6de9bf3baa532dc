"""A task for a tiny random model: what it writes is noise, so the length of the answer decides."""

from __future__ import annotations

FAIL = False  # whether the verifier raises


def problems(split: str, count: int, seed: int) -> list[str]:
    return [f"{split} {seed} {i}" for i in range(count)]


def one_problem(split: str, count: int, seed: int) -> list[str]:
    return ["the same in both splits"]


def prompt(problem: str) -> str:
    return f"what is {problem}?"


def verify(problem: str, answer: str) -> bool:
    if FAIL:
        raise ZeroDivisionError("oh")
    return len(answer) % 2 == 0


def never(problem: str, answer: str) -> bool:
    return False
