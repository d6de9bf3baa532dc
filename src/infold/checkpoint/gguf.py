"""The GGUF container (llama.cpp's): parse a header as if it were hostile. It is never rebuilt.

A file is, little-endian: "GGUF", version u32, tensor count u64, count of metadata u64; the metadata
(key, type u32, value); for each tensor its name, dimensions (the fastest first), type and offset;
padding; then the data, where each tensor begins at a multiple of `general.alignment`.
What MUST hold, and is checked before anything is believed:
  it is version 2 or 3, and all of the header lies within the file and its first 100,000,000 bytes;
  no key and no tensor stands twice; names are printable text, a tensor's of at most 64 components;
  a tensor has at most 4 dimensions, of a known type, its rows are whole blocks of that type;
  the tensors lie one after the other, with nothing between them but padding to the alignment.
A string array (a vocabulary) is walked over; nothing is allocated for its elements.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from infold.checkpoint.safetensors import (
    DTYPE_BITS,
    MAX_BYTES,
    MAX_COMPONENTS,
    MAX_HEADER,
    MAX_NAME,
    Header,
    TensorInfo,
    open_regular,
)
from infold.checkpoint.stamps import stamp_of
from infold.errors import CorruptFile, Refusal, StorageFailure
from infold.ggml import BLOCKS

__all__ = [
    "gguf_header_of",
    "is_gguf",
    "part_of",
    "parts_beside",
    "read_gguf_header",
    "with_types",
]

MAGIC = b"GGUF"
MAX_DIMENSIONS = 4  # ggml's
MOST = 1 << 20  # tensors, and keys
KEPT = 4096  # numbers of an array that are kept; longer ones belong to a vocabulary
_ALIGNMENT, _MOST_ALIGNED = 32, 1 << 24
_PIECE = 1 << 20
_TYPES = dict(
    enumerate(
        "F32 F16 Q4_0 Q4_1 - - Q5_0 Q5_1 Q8_0 - Q2_K Q3_K Q4_K Q5_K Q6_K - IQ2_XXS IQ2_XS "
        "IQ3_XXS IQ1_S IQ4_NL IQ3_S IQ2_S IQ4_XS I8 I16 I32 I64 F64 IQ1_M BF16 - - - TQ1_0 TQ2_0 "
        "- - - MXFP4 NVFP4 Q1_0".split()
    )
)
_NUMBERS = dict(enumerate("B b H h I i f ?".split())) | {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Array:
    """An array of the metadata that was not kept."""

    count: int


class _Header:
    """The bytes of a file from its start, as far as they were asked for."""

    def __init__(self, file: BinaryIO, path: Path, size: int) -> None:
        self.file, self.path, self.data, self.at = file, path, bytearray(), 0
        self.size = size

    def skip(self, count: int) -> int:
        """Pass over bytes, which are there afterwards; returns where they begin."""
        begin, end = self.at, self.at + count
        if end > self.size:
            raise CorruptFile(
                f"{self.path}: its header needs {end:,} bytes, and the file has {self.size:,}; "
                "it is truncated or damaged: fetch it again"
            )
        if end > MAX_HEADER:
            raise CorruptFile(
                f"{self.path}: header of {end:,} bytes or more; the limit is {MAX_HEADER:,}"
            )
        while len(self.data) < end:
            more = self.file.read(max(_PIECE, end - len(self.data)))
            if not more:
                raise CorruptFile(f"{self.path}: ends early; it changed while it was read")
            self.data += more
        self.at = end
        return begin

    def number(self, code: str) -> Any:
        return struct.unpack_from("<" + code, self.data, self.skip(struct.calcsize("<" + code)))[0]

    def bytes(self) -> bytes:
        length = self.number("Q")
        begin = self.skip(length)
        return bytes(self.data[begin : begin + length])

    def name(self, what: str) -> str:
        """A key or the name of a tensor."""
        where, raw = self.at, self.bytes()
        if len(raw) > MAX_NAME:
            raise CorruptFile(f"{self.path}: {what} of {len(raw):,} bytes at byte {where:,}")
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            text = "\0"
        if not text or not text.isprintable():
            raise CorruptFile(f"{self.path}: {what} at byte {where:,} is not printable text")
        return text

    def value(self, key: str) -> Any:
        kind = self.number("I")
        if kind == _ARRAY:
            return self._array(key)
        if kind == _STRING:
            return self.bytes().decode("utf-8", "replace")
        if kind not in _NUMBERS:
            raise CorruptFile(f"{self.path}: {key} has the unknown type {kind}")
        return self.number(_NUMBERS[kind])

    def _array(self, key: str) -> tuple[Any, ...] | Array:
        kind, count = self.number("I"), self.number("Q")
        if kind == _STRING:
            if 8 * count > self.size:
                raise CorruptFile(f"{self.path}: {key} has {count:,} strings, which do not fit it")
            self._strings(count)
            return Array(count)
        if kind not in _NUMBERS:
            raise CorruptFile(f"{self.path}: {key} is an array of the unknown type {kind}")
        code = _NUMBERS[kind]
        begin = self.skip(count * struct.calcsize("<" + code))
        if count > KEPT:
            return Array(count)
        return struct.unpack_from(f"<{count}{code}", self.data, begin)

    def _strings(self, count: int) -> None:
        """Walk over strings; a vocabulary has some 100,000 of them."""
        unpack, data = struct.Struct("<Q").unpack_from, self.data
        for _ in range(count):
            at = self.at
            if at + 8 > len(data):
                self.skip(8)
            end: int = at + 8 + unpack(data, at)[0]
            if end > len(data):
                self.at = at
                self.skip(end - at)
            self.at = end


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF does, whatever it is called: Ollama's have digests for names.

    Raises StorageFailure when it cannot be read.
    """
    try:
        with open_regular(path) as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError as error:
        raise StorageFailure(f"{path}: {error.strerror}") from error


def read_gguf_header(path: Path) -> Header:
    """Parse and check the header of the GGUF file at `path`. Its `metadata` are the file's keys.

    Raises CorruptFile when a rule of the format is broken, Refusal for a kind of GGUF that is not
    read here, StorageFailure when it cannot be read.
    """
    try:
        with open_regular(path) as file:
            stamp = stamp_of(path, file.fileno())
            return replace(_parse(_Header(file, path, stamp[0])), stamp=stamp)
    except OSError as error:
        raise StorageFailure(f"{path}: {error.strerror}") from error


def gguf_header_of(raw: bytes, size: int, where: str) -> Header:
    """The header that a file of this size begins with, where the file itself is not at hand.

    Raises CorruptFile and Refusal as `read_gguf_header` does.
    """
    return _parse(_Header(BytesIO(raw), Path(where), size))


def _parse(header: _Header) -> Header:
    path, size = header.path, header.size
    if size < 24:
        raise CorruptFile(f"{path}: {size} bytes are too few for a GGUF file")
    begin = header.skip(4)
    if header.data[begin:4] != MAGIC:
        raise CorruptFile(f"{path}: does not begin with {MAGIC.decode()}, so it is no GGUF file")
    version = header.number("I")
    if version not in (2, 3):
        if version >> 16:
            raise Refusal(f"{path}: a big-endian GGUF file, which infold does not read")
        raise Refusal(f"{path}: GGUF version {version}; infold reads 2 and 3. Convert it anew")
    count, keys = header.number("Q"), header.number("Q")
    if max(count, keys) > MOST:
        raise CorruptFile(f"{path}: {count:,} tensors and {keys:,} keys; the limit is {MOST:,}")
    metadata: dict[str, Any] = {}
    for _ in range(keys):
        key = header.name("a key")
        if key in metadata:
            raise CorruptFile(f"{path}: key {key!r} stands twice")
        metadata[key] = header.value(key)
    align = metadata.get("general.alignment", _ALIGNMENT)
    if type(align) is not int or not 0 < align <= _MOST_ALIGNED or align & (align - 1):
        raise CorruptFile(f"{path}: general.alignment = {align!r} is not a power of two")
    table = header.at
    entries = [_entry(header) for _ in range(count)]
    seen: set[str] = set()
    for entry in entries:
        if entry.name in seen:
            raise CorruptFile(f"{path}: tensor {entry.name!r} stands twice")
        seen.add(entry.name)
    start = min(_up(header.at, align), size) if not count else _up(header.at, align)
    if start > size:
        raise CorruptFile(f"{path}: ends within its header; it is truncated: fetch it again")
    header.skip(start - header.at)
    placed = [TensorInfo(e.name, e.dtype, e.shape, start + e.begin, start + e.end) for e in entries]
    placed.sort(key=lambda t: (t.begin, t.end))
    _check_places(path, placed, start, align, size)
    raw = bytes(header.data[:start])
    return Header({t.name: t for t in placed}, metadata, raw, size, table)


def with_types(header: Header, types: Mapping[str, str]) -> Header:
    """The header of the same file with other types of some tensors, in the same order and with the
    same metadata, byte for byte: in the list of tensors only types and offsets change."""
    align = header.metadata.get("general.alignment", _ALIGNMENT)
    assert type(align) is int  # checked when the file was read
    start, position, tensors = len(header.raw), 0, {}
    for name, info in header.tensors.items():
        dtype = types.get(name, info.dtype)
        elements, width = BLOCKS.get(dtype) or (1, DTYPE_BITS[dtype] // 8)
        begin = _up(position, align)
        position = begin + math.prod(info.shape) // elements * width
        tensors[name] = TensorInfo(name, dtype, info.shape, start + begin, start + position)
    raw, at = bytearray(header.raw), header.table
    numbers = {dtype: number for number, dtype in _TYPES.items()}
    for _ in tensors:
        (length,) = struct.unpack_from("<Q", raw, at)
        name = raw[at + 8 : at + 8 + length].decode()
        (dimensions,) = struct.unpack_from("<I", raw, at + 8 + length)
        at += 8 + length + 4 + 8 * dimensions
        info = tensors[name]
        struct.pack_into("<IQ", raw, at, numbers[info.dtype], info.begin - start)
        at += 12
    return Header(tensors, header.metadata, bytes(raw), start + _up(position, align), header.table)


def _up(position: int, align: int) -> int:
    return -(-position // align) * align


def _entry(header: _Header) -> TensorInfo:
    """One tensor; its offsets count from the start of the data."""
    name = header.name("the name of a tensor")
    where = f"{header.path}: tensor {name!r}"
    if name.count(".") >= MAX_COMPONENTS:
        raise CorruptFile(f"{where}: its name has more than {MAX_COMPONENTS} components")
    count = header.number("I")
    if count > MAX_DIMENSIONS:
        raise CorruptFile(f"{where}: {count:,} dimensions; the limit is {MAX_DIMENSIONS}")
    shape = tuple(header.number("Q") for _ in range(count))[::-1]
    kind, offset = header.number("I"), header.number("Q")
    dtype = _TYPES.get(kind, "-")
    if dtype == "-":
        raise CorruptFile(
            f"{where}: has the type {kind}, which infold does not know; ggml dropped it, or the "
            "file is damaged or newer than this infold"
        )
    if math.prod(n for n in shape if n) > MAX_BYTES:
        raise CorruptFile(f"{where}: shape {list(shape)} is larger than any file")
    elements, width = BLOCKS.get(dtype) or (1, DTYPE_BITS[dtype] // 8)
    if (shape[-1] if shape else 1) % elements:
        raise CorruptFile(
            f"{where}: rows of {shape[-1] if shape else 1} elements are no whole blocks of {dtype}"
        )
    end = offset + math.prod(shape) // elements * width
    if end > MAX_BYTES:
        raise CorruptFile(f"{where}: ends at byte {end:,} of the data, beyond any file")
    return TensorInfo(name, dtype, shape, offset, end)


def _check_places(path: Path, tensors: list[TensorInfo], start: int, align: int, size: int) -> None:
    """Each tensor must begin where the one before it ends, at the next multiple of the alignment,
    counted from the start of the data (as ggml demands)."""
    position = start
    for tensor in tensors:
        expected = start + _up(position - start, align)
        if tensor.begin != expected:
            if tensor.begin < position:
                kind = "overlaps the tensor before it"
            elif (tensor.begin - start) % align:
                kind = f"does not begin at a multiple of {align}"
            else:
                kind = "leaves a hole"
            raise CorruptFile(f"{path}: tensor {tensor.name!r} {kind}")
        position = tensor.end
    if position > size:
        raise CorruptFile(
            f"{path}: {size:,} bytes where its header tells {position:,}; the file is truncated: "
            "fetch it again"
        )
    if size > start + _up(position - start, align):
        raise CorruptFile(
            f"{path}: {size:,} bytes where its header tells {position:,}; the file has bytes after "
            "the last tensor"
        )


def part_of(path: Path, metadata: Mapping[str, Any]) -> tuple[int, int]:
    """Which part of a model a file is, from 0 on, and how many there are: (0, 1) for a whole one.

    Raises CorruptFile where its keys make no sense.
    """
    count, number = metadata.get("split.count", 1), metadata.get("split.no", 0)
    if type(count) is not int or type(number) is not int or not 0 <= number < max(count, 1):
        raise CorruptFile(f"{path}: split.no = {number!r} of split.count = {count!r}")
    return number, max(count, 1)


def parts_beside(path: Path, count: int) -> list[Path]:
    """The files of a model in `count` parts, from the path of its first one.

    Raises Refusal where the name is not that of a first part.
    """
    found = _PART.fullmatch(path.name)
    if found is None or int(found[2]) != 1 or int(found[3]) != count:
        raise Refusal(
            f"{path}: is one of {count} parts; give the first, named "
            f"NAME-00001-of-{count:05}.gguf, with the others beside it"
        )
    return [path.with_name(f"{found[1]}-{n:05}-of-{count:05}.gguf") for n in range(1, count + 1)]
