"""Codes of 1 to 8 bits in 32-bit words: one stream of bits, the lowest first.

A code of 3 bits may cross from one word into the next; 32 codes always end at a word's end.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["pack", "unpack", "words"]

_WORD = (1 << 32) - 1


def words(count: int, bits: int) -> int:
    """How many words hold `count` codes."""
    return -(-count * bits // 32)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """int32 words (rows, words) -> codes (rows, count), int32."""
    mask = (1 << bits) - 1
    if 32 % bits == 0:
        shifts = torch.arange(0, 32, bits, dtype=torch.int32)
        codes = (packed[:, :, None] >> shifts) & mask
        return codes.reshape(len(packed), -1)[:, :count]
    wide = packed.to(torch.int64) & _WORD
    first = torch.arange(count) * bits
    place, shift = first // 32, first % 32
    codes = wide[:, place] >> shift
    crossing = (shift + bits > 32).nonzero().flatten()
    codes[:, crossing] |= wide[:, place[crossing] + 1] << (32 - shift[crossing])
    return (codes & mask).to(torch.int32)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes (rows, count) -> int32 words (rows, words); the last word is filled with zeros."""
    rows, count = codes.shape
    blocks = -(-count // 32)
    padded = torch.zeros(rows, 32 * blocks, dtype=torch.int64)
    padded[:, :count] = codes
    padded = padded.view(rows, blocks, 32)
    packed = torch.zeros(rows, blocks, bits, dtype=torch.int64)
    for number in range(32):
        place, shift = divmod(number * bits, 32)
        packed[:, :, place] |= padded[:, :, number] << shift
        if shift + bits > 32:
            packed[:, :, place + 1] |= padded[:, :, number] >> (32 - shift)
    packed &= _WORD
    signed = torch.where(packed > _WORD >> 1, packed - _WORD - 1, packed).to(torch.int32)
    return signed.view(rows, blocks * bits)[:, : words(count, bits)].contiguous()
