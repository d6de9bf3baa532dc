"""Threads: how many, and each with one core of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from infold.errors import Refusal

__all__ = ["one_torch_thread", "take_one_core", "usual_threads", "worker_count"]


def processors() -> int:
    """Those that this process may use, which a container can limit."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def usual_threads() -> int:
    """Workers where the user does not say: one for each processor, at most 8."""
    return min(processors(), 8)


def worker_count(threads: int | None) -> int:
    """As many as the caller says, else the usual number. Raises Refusal for what is no number."""
    if threads is None:
        return usual_threads()
    if not isinstance(threads, int) or threads < 1:
        raise Refusal(f"threads: {threads!r} is not a whole number of at least 1")
    return threads


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """PyTorch's own threads spin between small operations, beside workers that compute already."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def take_one_core() -> None:
    """To be called by a worker: the workers are the threads, and blocks are too small to share."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(False)
