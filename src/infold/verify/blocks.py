"""ggml's quantized blocks, stated anew for the proof: which of their bits an edit may change.

Read from the `dequantize` functions of the gguf package: for each type the order of its parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

__all__ = ["Blocks", "blocks_of"]

_HALF = -1  # in a list of parts: a float16 that belongs to the whole block; else bytes of codes
# type -> elements of a block, and its parts in their order
_PARTS: dict[str, tuple[int, tuple[int, ...]]] = {
    "Q4_0": (32, (_HALF, 16)),
    "Q4_1": (32, (_HALF, _HALF, 16)),
    "Q5_0": (32, (_HALF, 4, 16)),
    "Q5_1": (32, (_HALF, _HALF, 4, 16)),
    "Q8_0": (32, (_HALF, 32)),
    "Q1_0": (128, (_HALF, 16)),
    "Q2_K": (256, (16, 64, _HALF, _HALF)),
    "Q3_K": (256, (32, 64, 12, _HALF)),
    "Q4_K": (256, (_HALF, _HALF, 12, 128)),
    "Q5_K": (256, (_HALF, _HALF, 12, 32, 128)),
    "Q6_K": (256, (128, 64, 16, _HALF)),
    "IQ2_XXS": (256, (_HALF, 64)),
    "IQ2_XS": (256, (_HALF, 64, 8)),
    "IQ2_S": (256, (_HALF, 64, 8, 8)),
    "IQ3_XXS": (256, (_HALF, 64, 32)),
    "IQ3_S": (256, (_HALF, 64, 8, 32, 4)),
    "IQ1_S": (256, (_HALF, 32, 16)),
    "IQ1_M": (256, (32, 16, 8)),
    "IQ4_NL": (32, (_HALF, 16)),
    "IQ4_XS": (256, (_HALF, 2, 4, 128)),
    "TQ1_0": (256, (48, 4, _HALF)),
    "TQ2_0": (256, (64, _HALF)),
}
_SPREAD = ("IQ1_M",)  # whose float16 is the top nibbles of the four words at its end


@dataclass(frozen=True)
class Blocks:
    """The blocks of one type."""

    elements: int
    parts: tuple[int, ...]
    spread: bool

    @property
    def size(self) -> int:
        """Bytes of a block."""
        return sum(2 if part == _HALF else part for part in self.parts)

    @cached_property
    def places(self) -> tuple[int, ...]:
        """Byte offsets of the float16s; where they are spread, of the words that hold the one."""
        if self.spread:
            return (self.size - 8,)
        ends = np.cumsum([2 if part == _HALF else part for part in self.parts])
        return tuple(int(e) - 2 for e, part in zip(ends, self.parts, strict=True) if part == _HALF)

    @cached_property
    def codes(self) -> np.ndarray:
        """A mask of the bits that no edit changes, (size,) uint8."""
        mask = np.full(self.size, 0xFF, np.uint8)
        if self.spread:
            mask[self.size - 7 :: 2] = 0x0F
        else:
            for place in self.places:
                mask[place : place + 2] = 0
        return mask

    def floats(self, data: memoryview) -> Tensor:
        """The float16s of whole blocks, (blocks, floats)."""
        blocks = np.frombuffer(data, np.uint8).reshape(-1, self.size)
        if self.spread:
            words = np.ascontiguousarray(blocks[:, -8:]).view("<u2").astype(np.uint32) >> 12
            bits = (words << np.array([0, 4, 8, 12], np.uint32)).sum(1).astype("<u2")
            return torch.from_numpy(bits.view(np.float16)[:, None])
        columns = [blocks[:, place : place + 2] for place in self.places]
        return torch.from_numpy(np.concatenate(columns, 1).view("<f2"))

    def differ(self, one: memoryview, two: memoryview) -> np.ndarray:
        """The numbers of the blocks whose codes are not the same."""
        left, right = (np.frombuffer(v, np.uint8).reshape(-1, self.size) for v in (one, two))
        return np.flatnonzero((((left ^ right) & self.codes) != 0).any(1))


_BLOCKS = {n: Blocks(elements, parts, n in _SPREAD) for n, (elements, parts) in _PARTS.items()}


def blocks_of(dtype: str) -> Blocks | None:
    """The blocks of a quantized type; None for a dense dtype."""
    return _BLOCKS.get(dtype)
