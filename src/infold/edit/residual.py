"""What rounding destroyed, in few bytes: the way from a guess of a block to the block itself.

The floats of a dtype lie on a line of integers, in their order: their bits in two's complement, all
but the sign inverted where that is set. Neighbours differ by 1 there, and -0 comes before +0. The
residual r of an element is the distance from the guess to the stored value on that line, modulo
its width. Most are 0, most of the others -1 or 1. One block becomes these planes, compressed by
Zstandard:

    mask of r != 0                  a bit for each element
    sign                            a bit for each element with r != 0;  m = |r| - 1 for those
    LEVELS times: mask of m != 0    a bit for each m;                    m := m - 1 where it is set
    what is left                    byte planes of the last m, the low bytes first

A guess of any quality gives the block back. Where the residual is no smaller than the block, the
block itself is stored as byte planes: exponents and mantissas compress better apart.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
import zstandard
from torch import Tensor

from infold.errors import CorruptFile

__all__ = [
    "ORIGINAL",
    "RESIDUAL",
    "content",
    "pack_original",
    "pack_residual",
    "unpack",
    "unpack_bound",
]

RESIDUAL, ORIGINAL = 1, 2  # kinds of a packed block
LEVELS = 2
_LEVEL = 3  # Zstandard's; higher ones gain nothing here
_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_GATHER = 0x0102040810204080  # times eight bytes of 0 or 1, moves them into the highest byte
_local = threading.local()


def pack_residual(block: Tensor, guess: Tensor) -> tuple[int, bytes]:
    """(kind, payload) of a contiguous block of a float dtype; `guess` is of its shape and dtype."""
    data = b"".join(_planes(_integers(block), _integers(guess)))
    packed = _compress(data)
    if len(packed) * 2 > block.nbytes:
        original = pack_original(block)
        if len(original[1]) <= len(packed):
            return original
    return RESIDUAL, packed


def pack_original(block: Tensor) -> tuple[int, bytes]:
    """(kind, payload) of a contiguous block that no guess is known of."""
    return ORIGINAL, _compress(_split(block.flatten()))


def unpack(kind: int, payload: bytes, block: Tensor, where: str) -> None:
    """Turn `block` in place: contiguous, a guess for RESIDUAL; for ORIGINAL its content is unused.

    Raises CorruptFile where the payload is not of such a block; `where` names it.
    """
    data = _Reader(_decompress(payload, unpack_bound(block), where), where)
    integers = _integers(block)
    if kind == ORIGINAL:
        data.join(integers)
    elif kind == RESIDUAL:
        _add(integers, data)
    else:
        raise CorruptFile(f"{where}: a block of the unknown kind {kind}")
    data.end()


def unpack_bound(block: Tensor) -> int:
    """The most bytes that the planes of such a block have."""
    return block.nbytes + (2 + LEVELS) * (block.numel() // 8 + 1)


# --- the line of floats ------------------------------------------------------------------------


def _integers(block: Tensor) -> Tensor:
    """The bits of a contiguous block, as a vector of integers over the same memory."""
    return block.view(_INTEGER[block.element_size()]).view(-1)


def _fold(bits: Tensor) -> Tensor:
    """Bits into positions on the line, or positions into bits: it is its own inverse."""
    width = 8 * bits.element_size()
    return bits ^ ((bits >> (width - 1)) & ((1 << (width - 1)) - 1))


def _differ(one: Tensor, two: Tensor) -> Tensor:
    """Where two vectors of integers differ. Mostly few do: look at eight bytes at a time first."""
    lanes = 8 // one.element_size()
    if len(one) % lanes == 0:
        wide = (one.view(torch.int64) ^ two.view(torch.int64)).nonzero().view(-1)
        if 2 * lanes * len(wide) < len(one):
            rows = one.view(-1, lanes)[wide] != two.view(-1, lanes)[wide]
            within = rows.view(-1).nonzero().view(-1)
            return wide[within // lanes] * lanes + within % lanes
    return (one != two).nonzero().view(-1)


# --- planes ------------------------------------------------------------------------------------


def _planes(block: Tensor, guess: Tensor) -> list[bytes]:
    """The planes of two vectors of bits."""
    where = _differ(block, guess)
    moved = torch.zeros(len(block), dtype=torch.bool)
    moved[where] = True
    residual = _fold(block[where]) - _fold(guess[where])
    negative = residual < 0
    planes = [_pack(moved), _pack(negative)]
    rest = torch.where(negative, ~residual, residual - 1)  # |r| - 1, which never overflows
    for _ in range(LEVELS):
        mask = rest != 0
        planes.append(_pack(mask))
        rest = rest[mask] - 1
    return [*planes, _split(rest)]


def _add(integers: Tensor, data: _Reader) -> None:
    """Move each guess on its line by the residual that the planes tell."""
    where = data.places(len(integers))
    count = len(where)
    negative = data.bits(count)
    masks = []
    for _ in range(LEVELS):
        masks.append(data.bits(count))
        count = int(torch.count_nonzero(masks[-1]))
    rest = torch.empty(count, dtype=integers.dtype)
    data.join(rest)
    for mask in reversed(masks):
        wider = torch.zeros(len(mask), dtype=integers.dtype)
        wider[mask] = rest + 1
        rest = wider
    residual = torch.where(negative, ~rest, rest + 1)
    integers[where] = _fold(_fold(integers[where]) + residual)


def _pack(mask: Tensor) -> bytes:
    """A bit for each element, the first in the lowest bit."""
    lanes = -(-len(mask) // 8)
    padded = torch.zeros(8 * lanes, dtype=torch.bool)
    padded[: len(mask)] = mask
    gathered = (padded.view(torch.int64) * _GATHER) >> 56
    return content((gathered & 0xFF).to(torch.uint8))


def _table() -> Tensor:
    """The eight bools of every byte, as one int64 each."""
    numbers = torch.arange(256)[:, None]
    return ((numbers >> torch.arange(8)) & 1).to(torch.bool).contiguous().view(torch.int64).view(-1)


_SPREAD = _table()


def _split(values: Tensor) -> bytes:
    """The bytes of the elements as planes, the low ones first."""
    return content(values.view(torch.uint8).view(-1, values.element_size()).t().contiguous())


def content(tensor: Tensor) -> bytes:
    """The bytes of a tensor on the CPU, without NumPy."""
    data = bytearray(tensor.nbytes)
    if data:
        raw = torch.frombuffer(data, dtype=torch.uint8)
        raw.copy_(tensor.contiguous().view(-1).view(torch.uint8))
    return bytes(data)


class _Reader:
    """The planes of one block, in their order."""

    def __init__(self, data: bytes, where: str) -> None:
        self.data, self.where, self.position = bytearray(data), where, 0

    def _take(self, count: int) -> Tensor:
        begin, self.position = self.position, self.position + count
        if self.position > len(self.data):
            raise CorruptFile(f"{self.where}: a block is too short")
        if not count:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(self.data, dtype=torch.uint8, count=count, offset=begin)

    def bits(self, count: int) -> Tensor:
        packed = self._take(-(-count // 8))
        return _SPREAD[packed.to(torch.int64)].view(torch.bool)[:count]

    def places(self, count: int) -> Tensor:
        """Where the bits of a mask are set; most of its bytes are 0."""
        packed = self._take(-(-count // 8)).to(torch.int64)
        some = packed.nonzero().view(-1)
        within = _SPREAD[packed[some]].view(torch.bool).nonzero().view(-1)
        where = some[within >> 3] * 8 + (within & 7)
        if len(where) and int(where[-1]) >= count:
            raise CorruptFile(f"{self.where}: a mask is longer than its block")
        return where

    def join(self, out: Tensor) -> None:
        """Fill a vector of integers from its byte planes."""
        size = out.element_size()
        planes = self._take(out.numel() * size)
        out.view(torch.uint8).view(-1, size).copy_(planes.view(size, -1).t())

    def end(self) -> None:
        if self.position != len(self.data):
            raise CorruptFile(f"{self.where}: a block is too long")


# --- Zstandard ---------------------------------------------------------------------------------


def _tool(kind: Callable[[], object]) -> object:
    """One compressor or decompressor a thread: they are not to be shared."""
    tools: dict[object, object] = _local.__dict__.setdefault("tools", {})
    if kind not in tools:
        tools[kind] = kind()
    return tools[kind]


def _compressor() -> zstandard.ZstdCompressor:
    return zstandard.ZstdCompressor(level=_LEVEL)


def _compress(data: bytes) -> bytes:
    tool = _tool(_compressor)
    assert isinstance(tool, zstandard.ZstdCompressor)
    return tool.compress(data)


def _decompress(payload: bytes, most: int, where: str) -> bytes:
    tool = _tool(zstandard.ZstdDecompressor)
    assert isinstance(tool, zstandard.ZstdDecompressor)
    try:
        told = zstandard.frame_content_size(payload)
        if not 0 <= told <= most:
            raise CorruptFile(f"{where}: a block would unpack to {told:,} bytes, not {most:,}")
        return tool.decompress(payload)
    except zstandard.ZstdError as error:
        raise CorruptFile(f"{where}: a block does not unpack: {error}") from None
