"""The undo record `infold-undo.bin`: what a merged checkpoint needs to become its base again.

    magic       16 bytes
    frames      each: tensor u32, number u32, kind u8, length u64, 16 bytes of BLAKE3 (of payload
                and head), then the payload; little-endian, in any order, but those at FILE last; of
                two of one block the later one counts
    manifest    the last frame (tensor MANIFEST): JSON, which says what the frames belong to
    trailer     offset of the manifest's frame u64, magic

A frame's tensor is a number in the manifest's list, and its number is the block's, in the order of
`edit.blocks.cut` with the manifest's `limit`. Tensors above SEEN hold what a method had observed of
the tensor (number: its step), those at FILE whole pieces of data (number: as the manifest tells).
What is in the blocks is `edit/residual.py`'s business.
"""

from __future__ import annotations

import json
import os
import struct
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from infold.checkpoint.files import safe_child
from infold.checkpoint.safetensors import parse_json
from infold.checkpoint.shards import read_exactly
from infold.checkpoint.staging import sync_data, write_fully
from infold.disk import storage_errors
from infold.errors import CorruptFile, StorageFailure

__all__ = ["FILE", "ORIGINAL", "RESIDUAL", "SEEN", "UNDO", "Record", "RecordWriter", "open_record"]

UNDO = "infold-undo.bin"
MAGIC = b"infold undo 3\n\0\0"
_ANY_VERSION = b"infold undo "
SEEN, FILE, MANIFEST = 1 << 31, 0xFFFFFFFE, 0xFFFFFFFF
# kinds of frames: content as it is; a block as the distance from a guess; a block as it was
DATA, RESIDUAL, ORIGINAL = 0, 1, 2
_FRAME = struct.Struct("<IIBQ16s")
_TRAILER = struct.Struct("<Q16s")
_PIECE = 1 << 20
_MOST = 256 << 20  # bytes of a payload that is read at once; a block has far fewer

Key = tuple[int, int]  # tensor, number


@dataclass(frozen=True, slots=True)
class Frame:
    """Where a payload lies in the file."""

    kind: int
    begin: int
    length: int
    digest: bytes


class RecordWriter:
    """Writes frames, from any thread. `resume`: whole ones of an earlier run are kept, but for
    those at FILE, which end a record."""

    def __init__(self, path: Path, *, resume: bool = False) -> None:
        self.path, self._lock = path, threading.Lock()
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        with storage_errors(path):
            # until it is finished nobody else needs it, and it holds the adapter
            self.fd = os.open(path, flags | (0 if resume else os.O_TRUNC), 0o600)
            try:
                size = os.fstat(self.fd).st_size
                self.frames, self.end = _scan(self.fd, path, size) if resume else ({}, 0)
                if self.end < len(MAGIC):
                    self.frames, self.end = {}, len(MAGIC)
                    write_fully(self.fd, memoryview(MAGIC), 0)
                self._forget_files()
                os.ftruncate(self.fd, self.end)
            except BaseException:
                self.close()
                raise

    def append(self, tensor: int, number: int, kind: int, payload: bytes) -> None:
        """One frame. One that an earlier run has written is not written again where it is the same;
        else, as where the base has changed since, this one counts."""
        digest = _digest(blake3(payload), tensor, number, kind, len(payload))
        with self._lock:
            earlier = self.frames.get((tensor, number))
            if earlier is not None and earlier.digest == digest:
                return
            head = _FRAME.pack(tensor, number, kind, len(payload), digest)
            begin = self.end + len(head)
            with storage_errors(self.path):
                write_fully(self.fd, memoryview(head + payload), self.end)
            self.end = begin + len(payload)
            self.frames[tensor, number] = Frame(kind, begin, len(payload), digest)

    def append_stream(self, number: int, pieces: Iterable[bytes]) -> int:
        """A frame of FILE, of any length; returns how many bytes it has."""
        with self._lock, storage_errors(self.path):
            start, position = self.end, self.end + _FRAME.size
            hasher = blake3()
            for piece in pieces:
                hasher.update(piece)
                write_fully(self.fd, memoryview(piece), position)
                position += len(piece)
            length = position - start - _FRAME.size
            digest = _digest(hasher, FILE, number, DATA, length)
            head = _FRAME.pack(FILE, number, DATA, length, digest)
            write_fully(self.fd, memoryview(head), start)
            self.end = position
            self.frames[FILE, number] = Frame(DATA, start + _FRAME.size, length, digest)
        return length

    def _forget_files(self) -> None:
        """Go back to the end of the blocks."""
        files = [frame for (tensor, _), frame in self.frames.items() if tensor >= FILE]
        if files:
            first = min(frame.begin for frame in files)
            self.frames = {key: f for key, f in self.frames.items() if f.begin < first}
            self.end = first - _FRAME.size

    def sync(self) -> None:
        with storage_errors(self.path):
            sync_data(self.fd)

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """The manifest and the trailer; then all of it is on the disk."""
        where = self.end
        text = json.dumps(manifest, ensure_ascii=False)
        # names that are not UTF-8 become JSON's escapes of what Python made of them
        self.append(MANIFEST, 0, DATA, text.encode(errors="backslashreplace"))
        with storage_errors(self.path):
            write_fully(self.fd, memoryview(_TRAILER.pack(where, MAGIC)), self.end)
            os.fsync(self.fd)
        self.end += _TRAILER.size

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Record:
    """A complete record, every byte of which was checked when it was opened."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path, self.fd = path, fd
        size = os.fstat(fd).st_size
        self.nbytes = size
        if size < len(MAGIC) + _TRAILER.size:
            raise CorruptFile(f"{path}: {size} bytes are too few for an undo record")
        trailer = bytearray(_TRAILER.size)
        read_exactly(fd, memoryview(trailer), size - len(trailer), path)
        where, magic = _TRAILER.unpack(trailer)
        first = os.pread(fd, len(MAGIC), 0)
        if first.startswith(_ANY_VERSION) and first != MAGIC:
            raise CorruptFile(
                f"{path}: is an undo record of another version of infold; restore the base with "
                "that one, or merge once more from the base"
            )
        self.frames, end = _scan(fd, path, size - len(trailer))
        told = self.frames.pop((MANIFEST, 0), None)
        if magic != MAGIC or told is None or end != size - len(trailer):
            raise CorruptFile(
                f"{path}: damaged at byte {end:,} of {size:,}, or no undo record; the base cannot "
                "be restored from it: fetch the file again"
            )
        if told.begin - _FRAME.size != where or told.begin + told.length != end:
            raise CorruptFile(f"{path}: damaged: its manifest is not its last frame")
        data = self._read(told)
        self.identity = blake3(data).hexdigest()  # every digest of the base and the output is in it
        manifest = parse_json(data, f"{path}: manifest")
        if not isinstance(manifest, dict):
            raise CorruptFile(f"{path}: its manifest is not a JSON object")
        self.manifest: dict[str, Any] = manifest

    def _read(self, frame: Frame) -> bytes:
        if frame.length > _MOST:
            raise CorruptFile(f"{self.path}: a frame of {frame.length:,} bytes is too long")
        data = bytearray(frame.length)
        read_exactly(self.fd, memoryview(data), frame.begin, self.path)
        return bytes(data)

    def payload(self, tensor: int, number: int) -> tuple[int, bytes]:
        """(kind, payload) of a frame. Raises CorruptFile where there is none."""
        frame = self.frames.get((tensor, number))
        if frame is None:
            raise CorruptFile(f"{self.path}: block {number} of tensor {tensor} is missing")
        return frame.kind, self._read(frame)

    def file(self, number: int) -> bytes:
        """A small frame of FILE as a whole."""
        return self.payload(FILE, number)[1]

    def length(self, number: int) -> int:
        """Bytes of a frame of FILE. Raises CorruptFile where there is none."""
        if (frame := self.frames.get((FILE, number))) is None:
            raise CorruptFile(f"{self.path}: its file {number} is missing")
        return frame.length

    def piece(self, number: int, first: int, count: int) -> bytes:
        """Some bytes of a frame of FILE, however long it is."""
        if not 0 <= first <= first + count <= self.length(number):
            raise CorruptFile(f"{self.path}: its file {number} is too short")
        data = bytearray(count)
        begin = self.frames[FILE, number].begin + first
        read_exactly(self.fd, memoryview(data), begin, self.path)
        return bytes(data)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Record:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_record(folder: Path, name: str = UNDO) -> Record:
    """The record in a folder. Reads all of it.

    Raises CorruptFile where it is damaged, StorageFailure where it cannot be read.
    """
    path = safe_child(folder, name)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise StorageFailure(f"{path}: {error.strerror}") from error
    try:
        return Record(path, fd)
    except BaseException:
        os.close(fd)
        raise


def _digest(payload: blake3, tensor: int, number: int, kind: int, length: int) -> bytes:
    """Of a payload that went into the hasher, and of the head that describes it."""
    payload.update(_FRAME.pack(tensor, number, kind, length, b""))
    return payload.digest(16)


def _scan(fd: int, path: Path, size: int) -> tuple[dict[Key, Frame], int]:
    """All frames up to the first that is not whole, and where that one begins; 0: no record."""
    frames: dict[Key, Frame] = {}
    head, piece = bytearray(_FRAME.size), memoryview(bytearray(_PIECE))
    if size < len(MAGIC) or os.pread(fd, len(MAGIC), 0) != MAGIC:
        return {}, 0
    position = len(MAGIC)
    while position + _FRAME.size <= size:
        read_exactly(fd, memoryview(head), position, path)
        tensor, number, kind, length, digest = _FRAME.unpack(head)
        begin = position + _FRAME.size
        if length > size - begin:
            break
        hasher = blake3()
        for offset in range(0, length, _PIECE):
            part = piece[: min(_PIECE, length - offset)]
            read_exactly(fd, part, begin + offset, path)
            hasher.update(part)
        if _digest(hasher, tensor, number, kind, length) != digest:
            break
        frames[tensor, number] = Frame(kind, begin, length, digest)
        position = begin + length
    return frames, position
