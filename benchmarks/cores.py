"""Whether two processes that compute a merge's tiles slow each other down on this machine.

    python benchmarks/cores.py

Each repeats what a merge does to a tile of a BF16 weight, in buffers that stay in the cache:
LoRA's product in float64, and decoding, adding, rounding. Times of one alone and of two at once
tell what threads could gain at most.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

from parts import machine

TILE = """
import time, torch
torch.set_num_threads(1)
left = torch.randn(128, 16, dtype=torch.float64)
right = torch.randn(16, 1536, dtype=torch.float64)
product = torch.empty(128, 1536, dtype=torch.float64)
stored = torch.randn(128, 1536).bfloat16()
value, rounded = torch.empty_like(product), torch.empty(128, 1536)

def multiply():
    torch.mm(left, right, out=product)

def rest():
    value.copy_(stored)
    value.add_(product)
    rounded.copy_(value)

for part in (multiply, rest):
    for _ in range(200):
        part()
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < 2:
        part()
        count += 1
    print((time.perf_counter() - begin) / count * 1e6)
"""


def times(processes: int) -> list[list[float]]:
    """Microseconds for a tile, of the product and of the rest, in each process."""
    running = [
        subprocess.Popen([sys.executable, "-c", TILE], stdout=subprocess.PIPE, text=True)
        for _ in range(processes)
    ]
    return [[float(word) for word in one.communicate()[0].split()] for one in running]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    alone, both = [], []
    for _ in range(rounds):
        alone += times(1)
        both += times(2)
    told = machine(["torch"])
    print(f"{told['cpu']}, {told['processors']} processors, torch {told['torch']}")
    for part, name in enumerate(("product", "rest")):
        one, two = (statistics.median(t[part] for t in found) for found in (alone, both))
        print(f"{name}: {one:.0f} us alone, {two:.0f} us of two at once, {two / one:.2f} times")


if __name__ == "__main__":
    main()
