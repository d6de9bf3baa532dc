"""The safetensors container: parse a header as if it were hostile; build one.

A file is: 8 bytes little-endian header length N, N bytes of JSON, then the tensors' bytes.
What MUST hold, and is checked before anything is believed:
  N is at most 100,000,000 and fits the file; the JSON is one object without duplicate keys;
  each entry has exactly dtype, shape and data_offsets; dtype, shape and byte count agree;
  names are printable text of at most 64 components; a shape has at most 64 dimensions;
  the ranges cover the data area without overlap and without holes.
Data is never mapped: readers use pread, so memory stays what the caller allocates.
"""

from __future__ import annotations

import json
import math
import os
import stat
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from infold.checkpoint.stamps import Stamp, stamp_of
from infold.errors import CorruptFile, Refusal, StorageFailure

__all__ = [
    "DTYPE_BITS",
    "MAX_BYTES",
    "MAX_COMPONENTS",
    "MAX_HEADER",
    "MAX_NAME",
    "Header",
    "TensorInfo",
    "build_header",
    "header_of",
    "open_regular",
    "parse_json",
    "read_header",
]

MAX_HEADER = 100_000_000
MAX_NAME = 1024
MAX_COMPONENTS = 64  # between the dots of a name; the deepest model has a third of it
MAX_DIMENSIONS = 64  # what PyTorch's own operations are limited to
MAX_BYTES = 1 << 62
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64, "C128": 128,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file. `begin` and `end` are byte offsets from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class Header:
    """A parsed header. `raw` is everything before the data: length, JSON and padding."""

    tensors: Mapping[str, TensorInfo]  # in file order
    metadata: Mapping[str, Any]  # of safetensors: texts
    raw: bytes
    file_size: int
    table: int = 0  # of GGUF: where in `raw` the list of tensors begins
    stamp: Stamp | None = None  # of the file, where the header was read from one


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = [key for key, _ in pairs if key in seen or seen.add(key)]  # type: ignore[func-returns-value]
        raise ValueError(f"key {_short(twice[0])} stands twice")
    return result


def parse_json(data: bytes, where: str, *, infinity: bool = False) -> Any:
    """JSON of untrusted origin: UTF-8, no duplicate keys, no nesting bomb, no NaN literals.

    `infinity` lets Infinity and NaN pass: some model configs hold them, though JSON has none.
    """

    def refuse_constant(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_no_duplicates,
            parse_constant=None if infinity else refuse_constant,
        )
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise CorruptFile(f"{where}: not valid JSON: {reason}") from None


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading. A FIFO or a device, which might never end, is refused; and
    on a big-endian machine any file, since tensors are read as they lie, in the machine's order."""
    if sys.byteorder != "little":
        raise Refusal("infold needs a little-endian machine, as files of tensors are, not this one")
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise CorruptFile(f"{path}: is not a regular file")
    return os.fdopen(fd, "rb")


def read_header(path: Path) -> Header:
    """Parse and check the header of the safetensors file at `path`.

    Raises CorruptFile when a rule of the format is broken, StorageFailure when it cannot be read.
    """
    try:
        with open_regular(path) as file:
            stamp = stamp_of(path, file.fileno())
            size = stamp[0]
            prefix = file.read(8)
            if len(prefix) < 8:
                raise CorruptFile(f"{path}: {size} bytes are too few for a safetensors file")
            length = int.from_bytes(prefix, "little")
            if length > MAX_HEADER:
                raise CorruptFile(
                    f"{path}: header of {length:,} bytes; the limit is {MAX_HEADER:,}"
                )
            if length > size - 8:
                raise CorruptFile(
                    f"{path}: header of {length:,} bytes in a file of {size:,}; "
                    "the file is truncated: fetch it again"
                )
            text = file.read(length)
    except OSError as error:
        raise StorageFailure(f"{path}: {error.strerror}") from error
    header = _check(path, prefix + text, parse_json(text, f"{path}: header"), size)
    return replace(header, stamp=stamp)


def header_of(raw: bytes, where: str) -> Header:
    """The header that a file begins with, where the file itself is not at hand.

    Raises CorruptFile as `read_header` does.
    """
    fields = parse_json(raw[8:], where)
    entries = fields.items() if isinstance(fields, dict) else ()
    ends = [e["data_offsets"][1] for k, e in entries if k != "__metadata__"]
    return _check(Path(where), raw, fields, len(raw) + max(ends, default=0))


def _check(path: Path, raw: bytes, fields: Any, size: int) -> Header:
    if not isinstance(fields, dict):
        raise CorruptFile(f"{path}: header is not a JSON object")
    metadata = fields.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CorruptFile(f"{path}: __metadata__ must map strings to strings")
    tensors = [_entry(path, name, entry, len(raw)) for name, entry in fields.items()]
    tensors.sort(key=lambda t: (t.begin, t.end))
    position = len(raw)
    for tensor in tensors:
        if tensor.begin != position:
            kind = "overlaps the tensor before it" if tensor.begin < position else "leaves a hole"
            raise CorruptFile(f"{path}: tensor {_short(tensor.name)} {kind}")
        position = tensor.end
    if position != size:
        what = (
            "is truncated: fetch it again" if position > size else "has bytes after the last tensor"
        )
        raise CorruptFile(
            f"{path}: {size:,} bytes where its header tells {position:,}; the file {what}"
        )
    return Header({t.name: t for t in tensors}, metadata, raw, size)


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _entry(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    if len(name) > MAX_NAME:
        raise CorruptFile(f"{path}: a tensor name of {len(name):,} characters")
    where = f"{path}: tensor {_short(name)}"
    if not name.isprintable():  # on a terminal it could be a line, or a command
        raise CorruptFile(f"{where}: its name is not printable text")
    if name.count(".") >= MAX_COMPONENTS:
        raise CorruptFile(f"{where}: its name has more than {MAX_COMPONENTS} components")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CorruptFile(f"{where}: must have dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise CorruptFile(f"{where}: unknown dtype {_short(dtype)}")
    if not isinstance(shape, list) or not all(_count(n) for n in shape):
        raise CorruptFile(f"{where}: shape must be a list of non-negative integers")
    if len(shape) > MAX_DIMENSIONS:
        raise CorruptFile(f"{where}: {len(shape):,} dimensions; the limit is {MAX_DIMENSIONS}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_count(n) for n in offsets):
        raise CorruptFile(f"{where}: data_offsets must be two non-negative integers")
    # a tensor without elements may not tell an impossible size either: loaders multiply it up
    if math.prod(n for n in shape if n) > MAX_BYTES:
        raise CorruptFile(f"{where}: shape {shape} is larger than any file")
    bits = DTYPE_BITS[dtype] * math.prod(shape)
    if offsets[1] - offsets[0] != bits // 8 or bits % 8:
        raise CorruptFile(
            f"{where}: {dtype} of shape {shape} needs {bits // 8} bytes, "
            f"not {offsets[1] - offsets[0]}"
        )
    return TensorInfo(name, dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _short(value: Any) -> str:
    """For a message: what a hostile file may have made very long."""
    text = repr(value) if isinstance(value, str) else f"of type {type(value).__name__}"
    return text if len(text) <= 200 else text[:197] + "..."


def build_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, Any]
) -> Header:
    """The header for tensors (name, dtype, shape) in the order given; data is 8-byte aligned."""
    fields: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    spans: list[tuple[str, str, tuple[int, ...], int, int]] = []
    position = 0
    for name, dtype, shape in tensors:
        bits = DTYPE_BITS[dtype]
        for n in shape:
            bits *= n
        spans.append((name, dtype, shape, position, position + bits // 8))
        fields[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [position, position + bits // 8],
        }
        position += bits // 8
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    raw = len(text).to_bytes(8, "little") + text
    infos = {n: TensorInfo(n, d, s, len(raw) + b, len(raw) + e) for n, d, s, b, e in spans}
    return Header(infos, dict(metadata), raw, len(raw) + position)
