"""Whether two checkpoints hold the same model, but for rounding.

    python benchmarks/compare.py ONE OTHER      # prints one JSON object; exit code 1: they differ

For each tensor the norm of the difference is taken as a share of the tensor's norm. One bfloat16
rounding is about 0.0017 of it; an adapter that was left out, or was merged in another way, is 0.02
or more in these benchmarks.
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

ROUNDING = 0.005  # PEFT rounds the update, then the sum
PIECE = 1 << 24  # elements


def tensors(folder: Path) -> dict[str, Callable[[], Tensor]]:
    """A reader for each tensor, by name."""
    result = {}
    for path in sorted(folder.glob("*.safetensors")):
        file = safe_open(path, "pt")
        result |= {name: (lambda f=file, n=name: f.get_tensor(n)) for name in file.keys()}
    return result


def pieces(one: Tensor, other: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(one.flatten().split(PIECE), other.flatten().split(PIECE), strict=True)


def main() -> int:
    one, other = (tensors(Path(folder)) for folder in sys.argv[1:])
    if one.keys() != other.keys():
        print(json.dumps({"only in one": sorted(one.keys() ^ other.keys())}))
        return 1
    worst, count, unequal = 0.0, 0, 0
    for name in one:
        a, b = one[name](), other[name]()
        if a.dtype != b.dtype or a.shape != b.shape:
            print(json.dumps({"other type or shape": name}))
            return 1
        difference = norm = 0.0
        for x, y in pieces(a, b):
            unequal += int((x != y).sum())
            count += x.numel()
            norm += x.float().square().sum().item()
            difference += (x.float() - y.float()).square().sum().item()
        worst = max(worst, (difference / norm) ** 0.5 if norm else difference)
    result = {
        "tensors": len(one),
        "greatest relative difference": round(worst, 6),
        "unequal elements": round(unequal / count, 6),
    }
    print(json.dumps(result))
    return int(not worst < ROUNDING)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(main())
