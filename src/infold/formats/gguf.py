"""ggml's quantized types: where the floats of a block lie. Everything else in it is codes.

An element is a sum of products in which each term has exactly one of these floats as a factor, so
multiplying all floats of a row's blocks multiplies the row, and no code changes. In `quants.py` of
the gguf package and in ggml's own headers (`block_q4_1`, ...) they are called d, dmin or m.

What is missing here has no such float: the scales of MXFP4 are powers of two, those of NVFP4 have
three bits of fraction.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from infold.dtypes import TORCH_DTYPES
from infold.ggml import BLOCKS

__all__ = ["PACKINGS", "Packing"]


@dataclass(frozen=True)
class Packing:
    """A block: its elements, its bytes, and the floats in it by dtype and byte offsets."""

    elements: int
    size: int
    dtype: str
    offsets: tuple[int, ...]

    def take(self, data: Tensor) -> Tensor:
        """The floats of whole blocks, (blocks, floats); `data` is a vector of bytes."""
        found = torch.empty(len(data) // self.size, len(self.offsets), dtype=self._kind)
        for column, place in enumerate(self._places):
            found[:, column] = self._grid(data)[:, place]
        return found

    def put(self, floats: Tensor, data: Tensor) -> None:
        """Write the floats to their places in the bytes, and nothing else."""
        for column, place in enumerate(self._places):
            self._grid(data)[:, place] = floats[:, column]

    @property
    def _kind(self) -> torch.dtype:
        return TORCH_DTYPES[self.dtype]

    @property
    def _places(self) -> tuple[int, ...]:
        return tuple(offset // self._kind.itemsize for offset in self.offsets)

    def _grid(self, data: Tensor) -> Tensor:
        """The bytes of each block as if all of them were floats."""
        return data.view(self._kind).view(-1, self.size // self._kind.itemsize)


class _Nibbles(Packing):
    """IQ1_M: the sixteen bits of d are the top nibbles of four words, the lowest first."""

    def take(self, data: Tensor) -> Tensor:
        words = self._words(data)
        bits = torch.zeros(len(words), dtype=torch.int32)
        for number in range(4):
            bits |= ((words[:, number].int() >> 12) & 0xF) << (4 * number)
        return bits.to(torch.int16).view(torch.float16)[:, None]

    def put(self, floats: Tensor, data: Tensor) -> None:
        words = self._words(data)
        bits = floats[:, 0].contiguous().view(torch.int16).int()
        for number in range(4):
            nibble = ((bits >> (4 * number)) & 0xF) << 12
            words[:, number] = ((words[:, number].int() & 0xFFF) | nibble).to(torch.int16)

    def _words(self, data: Tensor) -> Tensor:
        first = self.offsets[0] // 2
        return data.view(torch.int16).view(-1, self.size // 2)[:, first : first + 4]


_FLOATS: dict[str, tuple[int, ...]] = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q1_0": (0,),
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
    "IQ1_S": (0,), "IQ2_XXS": (0,), "IQ2_XS": (0,), "IQ2_S": (0,), "IQ3_XXS": (0,), "IQ3_S": (0,),
    "IQ4_NL": (0,), "IQ4_XS": (0,), "TQ1_0": (52,), "TQ2_0": (64,),
}  # fmt: skip

PACKINGS: dict[str, Packing] = {
    name: Packing(*BLOCKS[name], "F16", offsets) for name, offsets in _FLOATS.items()
}
PACKINGS["IQ1_M"] = _Nibbles(*BLOCKS["IQ1_M"], "F16", (48,))
