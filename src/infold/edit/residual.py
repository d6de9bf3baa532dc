"""What rounding destroyed, in few bytes: the way from a guess of a block to the block itself.

The bits of an element are taken for an integer. The residual r is the integer of the stored value
less that of the guess, modulo its width; neighbours of one sign differ by 1. Most residuals are 0,
most of the others -1 or 1. One block becomes two parts, compressed by Zstandard:

    codes       two bits for each element: r where it is -1, 0 or 1, else 2. A byte has the codes of
                four elements, one of each quarter of the block, the first quarter lowest; what
                a quarter is too short by counts as 0
    the others  for each code of 2, in order, 2 r - 3 where r > 0, else -2 r - 4, as byte planes,
                the low bytes first

C does this where it can, by `kernel/residual.c`, and PyTorch elsewhere: the same bytes.

A guess of any quality gives the block back. Where the residual is no smaller than the block, the
block itself is stored as byte planes: exponents and mantissas compress better apart.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable

import torch
import zstandard
from torch import Tensor

from infold.edit.compiled import readable
from infold.errors import CorruptFile
from infold.kernel import library as c

__all__ = [
    "ORIGINAL",
    "RESIDUAL",
    "content",
    "pack_original",
    "pack_residual",
    "unpack",
]

RESIDUAL, ORIGINAL = 1, 2  # kinds of a packed block
_LEVEL = 1  # Zstandard's; higher ones gain nothing here
_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_HIGH, _LOW = 0xAA, 0x55  # the bits of each code in a byte of four
_WRONG = {
    c.TOO_SHORT: "a block is too short",
    c.TOO_LONG: "a block is too long",
    c.OUTSIDE: "a residual lies outside of its block",
}
_local = threading.local()


def pack_residual(block: Tensor, guess: Tensor) -> tuple[int, bytes]:
    """(kind, payload) of a contiguous block of a float dtype; `guess` is of its shape and dtype."""
    packed = _compress(_coded(_integers(block), _integers(guess)))
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
    data, integers = _decompress(payload, unpack_bound(block), where), _integers(block)
    if kind == ORIGINAL:
        planes = _Reader(data, where)
        planes.join(integers)
        planes.end()
    elif kind == RESIDUAL:
        _decode(integers, data, where)
    else:
        raise CorruptFile(f"{where}: a block of the unknown kind {kind}")


def unpack_bound(block: Tensor) -> int:
    """The most bytes that such a block has before it is compressed."""
    return block.nbytes + _quarter(block.numel())


# --- residuals ---------------------------------------------------------------------------------


def _integers(block: Tensor) -> Tensor:
    """The bits of a contiguous block, as a vector of integers over the same memory."""
    return block.view(_INTEGER[block.element_size()]).view(-1)


def _quarter(count: int) -> int:
    """Elements of a quarter: whole lanes of eight bytes of codes."""
    return -(-count // 32) * 8


def _coded(block: Tensor, guess: Tensor) -> bytes | memoryview:
    """What two vectors of integers make, before it is compressed; valid until the next call."""
    loaded = c.load()
    alike = guess.shape == block.shape and guess.dtype == block.dtype
    if loaded is None or not (alike and _plain(block) and _plain(guess)):
        return _coded_by_pytorch(block, guess)
    job = _job(block, _buffer("coded", unpack_bound(block), torch.uint8).data_ptr())
    job.guess = guess.data_ptr()
    length = int(loaded.infold_code(job, c.level()))
    return memoryview((ctypes.c_ubyte * unpack_bound(block)).from_address(job.coded))[:length]


def _decode(integers: Tensor, data: bytes, where: str) -> None:
    """Add to guesses what `_coded` made. Raises CorruptFile where it is not of such a vector."""
    loaded = c.load()
    if loaded is None or not _plain(integers):
        _decode_by_pytorch(integers, _Reader(data, where))
        return
    held = ctypes.c_char_p(data)
    job = _job(integers, ctypes.cast(held, ctypes.c_void_p).value)
    job.length = len(data)
    if wrong := loaded.infold_decode(job, c.level()):
        raise CorruptFile(f"{where}: {_WRONG[wrong]}")


def _plain(integers: Tensor) -> bool:
    """Whether C may have it: it checks nothing."""
    return bool(len(integers)) and integers.is_contiguous() and readable(integers)


def _job(integers: Tensor, coded: int | None) -> c.Residual:
    return c.Residual(
        size=integers.element_size(),
        count=len(integers),
        block=integers.data_ptr(),
        coded=coded,
        scratch=_buffer("scratch", unpack_bound(integers), torch.uint8).data_ptr(),
    )


def _coded_by_pytorch(block: Tensor, guess: Tensor) -> bytes:
    count, size = len(block), _quarter(len(block))
    residual = _buffer("residual", 4 * size, block.dtype)
    residual[count:] = 0
    torch.sub(block, guess, out=residual[:count])
    codes = _buffer("codes", 4 * size, block.dtype)
    torch.clamp(residual, -2, 2, out=codes).bitwise_and_(3)
    joined, *quarters = codes.view(4, size).unbind()
    for number, quarter in enumerate(quarters, 1):
        joined |= quarter.bitwise_left_shift_(2 * number)
    packed = joined.to(torch.uint8)
    others = residual[_others(packed)]
    rest = ((others << 1) ^ (others >> (8 * others.element_size() - 1))) - 3
    return content(packed) + _split(rest)


def _others(codes: Tensor) -> Tensor:
    """The numbers of the elements whose code is 2, ascending. Mostly few are: look at eight bytes
    at a time first."""
    lanes = ((codes & _HIGH) & ~((codes & _LOW) << 1)).view(torch.int64)
    wide = lanes.nonzero().view(-1)
    some = lanes[wide].view(torch.uint8)
    within = some.nonzero().view(-1)
    which = torch.stack([some[within] & (2 << shift) for shift in (0, 2, 4, 6)])
    quarter, number = which.nonzero(as_tuple=True)
    return quarter * len(codes) + (wide[within >> 3] * 8 + (within & 7))[number]


def _decode_by_pytorch(integers: Tensor, data: _Reader) -> None:
    count, size = len(integers), _quarter(len(integers))
    codes = data.bytes(size)
    others = _others(codes)
    rest = torch.empty(len(others), dtype=integers.dtype)
    data.join(rest)
    data.end()
    if len(others) and int(others[-1]) >= count:
        raise CorruptFile(f"{data.where}: {_WRONG[c.OUTSIDE]}")
    rest += 3
    told = ((rest >> 1) & _largest(rest.dtype)) ^ -(rest & 1)
    new = integers[others] + told
    wide = _buffer("codes", size, integers.dtype).copy_(codes)
    moved, width = _buffer("residual", size, integers.dtype), 8 * integers.element_size()
    for number in range(4):
        # two bits with their sign: up to the left end and down again
        torch.bitwise_left_shift(wide, width - 2 - 2 * number, out=moved)
        moved.bitwise_right_shift_(width - 2)
        part = integers[number * size : (number + 1) * size]
        part += moved[: len(part)]
    integers[others] = new


def _largest(dtype: torch.dtype) -> int:
    return torch.iinfo(dtype).max


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

    def bytes(self, count: int) -> Tensor:
        begin, self.position = self.position, self.position + count
        if self.position > len(self.data):
            raise CorruptFile(f"{self.where}: {_WRONG[c.TOO_SHORT]}")
        if not count:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(self.data, dtype=torch.uint8, count=count, offset=begin)

    def join(self, out: Tensor) -> None:
        """Fill a vector of integers from its byte planes."""
        size = out.element_size()
        planes = self.bytes(out.numel() * size)
        out.view(torch.uint8).view(-1, size).copy_(planes.view(size, -1).t())

    def end(self) -> None:
        if self.position != len(self.data):
            raise CorruptFile(f"{self.where}: {_WRONG[c.TOO_LONG]}")


# --- Zstandard ---------------------------------------------------------------------------------


def _tool(kind: Callable[[], object]) -> object:
    """One compressor or decompressor a thread: they are not to be shared."""
    tools: dict[object, object] = _local.__dict__.setdefault("tools", {})
    if kind not in tools:
        tools[kind] = kind()
    return tools[kind]


def _buffer(name: str, count: int, dtype: torch.dtype) -> Tensor:
    """A vector of the thread, reused: fresh memory costs more than what is done with it."""
    size = count * dtype.itemsize
    buffers: dict[str, Tensor] = _local.__dict__.setdefault("buffers", {})
    kept = buffers.get(name)
    if kept is None or kept.numel() < size:
        kept = buffers[name] = torch.empty(size, dtype=torch.uint8, device="cpu")
    return kept[:size].view(dtype)


def _compressor() -> zstandard.ZstdCompressor:
    return zstandard.ZstdCompressor(level=_LEVEL)


def _compress(data: bytes | memoryview) -> bytes:
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
