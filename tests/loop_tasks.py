"""A task for a tiny random model: what it writes is noise, so the length of the answer decides."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from typing import Any

import torch

torch.set_num_threads(1)  # as the tests have it: the last bits of products so small depend on it

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


def printing(problem: str, answer: str) -> bool:
    """As any way of printing does: Python's, what it starts, what knows the descriptor, and what
    writes into a buffer that no one empties before the end."""
    print("printed", answer)
    assert sys.__stdout__ is not None
    sys.__stdout__.write("kept by Python\n")
    ctypes.CDLL(None).printf(b"kept by C\n")
    subprocess.run([sys.executable, "-S", "-c", "print('started')"], check=True)
    os.write(1, b"written\n")
    return False


def never(problem: str, answer: str) -> bool:
    return False


def leaving(problem: str, answer: str) -> bool:
    sys.exit(0)


def hanging(problem: str, answer: str) -> bool:
    """Takes whatever interrupts it for a wrong answer."""
    try:
        time.sleep(60)
    except BaseException:
        pass
    return False


def stubborn(problem: str, answer: str) -> bool:
    """Goes on after it was interrupted, twice."""
    for _ in range(3):
        try:
            time.sleep(10)
        except BaseException:
            pass
    return False


def interrupted(problem: str, answer: str) -> bool:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
    return True


async def not_awaited(problem: str, answer: str) -> bool:
    return False


def wordy(problem: str, answer: str) -> Any:
    return "wrong"


def nearly_the_same(split: str, count: int, seed: int) -> list[str]:
    return [
        "It\u2019s  2\u20133, \u201cas IT was\u201d\u2026"
        if split == "collect"
        else 'it\'s 2-3 "as it was"'
    ]


def always(problem: str, answer: str) -> bool:
    return True
