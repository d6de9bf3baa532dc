"""Make the inputs of the benchmark: checkpoints of real shapes with random weights, and adapters.

    python benchmarks/inputs.py 3gb         # in the cache folder, once; then nothing to do

Weights are N(0, 0.02), as models are initialised; a merge does not care. Adapters lie in PEFT's
layout and have the size of trained ones: LoRA changes each weight by about 2 % of its norm, IA³'s
factors are 1 ± 0.1. Every tensor's values depend on its name alone, so inputs made elsewhere are
the same. Tensors are written one by one; a folder gets its name when it is complete.
"""

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PIECE = 8 << 20  # elements that are drawn at once
SPREAD = 0.02  # standard deviation of the weights
UPDATE = 0.02  # norm of LoRA's update, as a share of the weight's norm
RANK, ALPHA = 16, 32
TYPES = {"BF16": "bfloat16", "F32": "float32"}

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Size:
    """A Qwen2 model with tied embeddings, cut into `shards` files."""

    layers: int
    hidden: int
    ff: int
    heads: int
    kv_heads: int
    vocab: int
    shards: int
    lone: tuple[int, int]  # the large tensor of the lone file that goes with this size

    @property
    def head(self) -> int:
        return self.hidden // self.heads

    def linears(self) -> Shapes:
        """(out, in) of the linear layers of one block, by their path in it."""
        kv = self.kv_heads * self.head
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.ff, self.hidden),
            "mlp.up_proj": (self.ff, self.hidden),
            "mlp.down_proj": (self.hidden, self.ff),
        }

    def tensors(self) -> Shapes:
        """Every tensor of the model, in its order."""
        result: Shapes = {"model.embed_tokens.weight": (self.vocab, self.hidden)}
        for number in range(self.layers):
            block = f"model.layers.{number}"
            for path, shape in self.linears().items():
                result[f"{block}.{path}.weight"] = shape
                if path.endswith(("q_proj", "k_proj", "v_proj")):
                    result[f"{block}.{path}.bias"] = shape[:1]
            for norm in ("input_layernorm", "post_attention_layernorm"):
                result[f"{block}.{norm}.weight"] = (self.hidden,)
        result["model.norm.weight"] = (self.hidden,)
        return result

    @property
    def nbytes(self) -> int:
        return 2 * sum(map(math.prod, self.tensors().values()))


SIZES = {
    # Qwen2.5-1.5B
    "3gb": Size(28, 1536, 8960, 12, 2, 151_936, 4, (62_500, 32_000)),
    "12gb": Size(36, 3072, 13_952, 24, 8, 151_936, 4, (62_500, 32_000)),
    "tiny": Size(2, 128, 256, 4, 2, 1_000, 4, (4_000, 2_000)),
}
LONE = "model.layers.0.mlp.down_proj"  # the large layer of the lone file


def cache() -> Path:
    """`bench` in `$INFOLD_CACHE`, else `$XDG_CACHE_HOME/infold`, else `~/.cache/infold`."""
    if own := os.environ.get("INFOLD_CACHE"):
        return Path(own).absolute() / "bench"
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).absolute() / "infold" / "bench"
    return Path.home() / ".cache" / "infold" / "bench"


def names(size: str) -> dict[str, str]:
    """The inputs of a size, by what they are: names in the cache folder."""
    lone = "x".join(map(str, SIZES[size].lone))
    return {
        "base": f"qwen2-{size}",
        "lora": f"qwen2-{size}-lora",
        "ia3": f"qwen2-{size}-ia3",
        "lone": f"lone-{lone}",
        "lone lora": f"lone-{lone}-lora",
    }


def draw(name: str, shape: tuple[int, ...], dtype: str) -> Iterator[memoryview]:
    """The bytes of a tensor of the model or the adapter, in pieces."""
    import torch

    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    total = math.prod(shape)
    for begin in range(0, total, PIECE):
        x = torch.empty(min(PIECE, total - begin))
        if name.endswith("lora_A.weight"):  # as PEFT initialises it
            bound = shape[1] ** -0.5
            x.uniform_(-bound, bound, generator=generator)
        elif name.endswith("lora_B.weight"):
            x.normal_(0, _spread_of_b(shape[1]), generator=generator)
        elif name.endswith("ia3_l"):
            x.normal_(1, 0.1, generator=generator)
        elif "norm" in name:
            x.normal_(1, 0.1, generator=generator)
        else:
            x.normal_(0, SPREAD, generator=generator)
        # of every other element's type there is a view as bytes, of bfloat16 not in numpy
        yield memoryview(x.to(getattr(torch, TYPES[dtype])).view(torch.uint8).numpy())


def _spread_of_b(rank: int) -> float:
    """With |alpha/r B A| = UPDATE |W|. An element of A has variance 1/(3 in), so one of B A has
    spread sqrt(r / (3 in)) * spread(B); `in` is put in by `_lora_b`."""
    return UPDATE * SPREAD / (ALPHA / RANK) * math.sqrt(3 / rank)
