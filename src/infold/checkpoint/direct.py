"""Writing past the page cache, and copying without copying.

A byte that is written the usual way is copied into a page of memory that the system must find
first; on a virtual machine that costs several times as much as all the arithmetic of a merge. With
O_DIRECT the disk takes it from where it lies. The conditions: Linux, a file system that can, and
a piece whose place in memory and place in the file agree modulo ALIGN. What does not fit goes the
usual way, and so does the rest where the disk turns out to be slow: nothing is saved there, and
what is in the cache is read again faster.

Pieces seldom begin where blocks of the disk do. A block that two of them share is put together in
memory: to write a part of it the usual way, beside pieces that go directly, makes the system read
the block again, and lets all writers of the file wait.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import struct
import sys
import threading
import time
from pathlib import Path

from infold.checkpoint.staging import copy_range, write_fully
from infold.disk import storage_errors

__all__ = ["ALIGN", "OutputFile", "Pace"]

# Bytes: the largest unit of common disks and file systems, and whole pages, since one that is
# written past the cache must not be in it for its neighbour's sake.
ALIGN = max(4096, mmap.PAGESIZE)
LEAST = 256 << 10  # bytes of a piece that are worth it
_TRIAL = 64 << 20  # bytes after which the pace is judged
_SLOW = 200e6  # bytes a second of one writer, waiting included
_CLONE = struct.Struct("qQQQ")  # source, its offset, bytes, offset
_FICLONERANGE = 0x4020940D
_UNABLE = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.ENOSYS, errno.EPERM)


class Pace:
    """Whether writing past the cache pays, for all files of an output."""

    def __init__(self) -> None:
        self.pays = sys.platform == "linux"
        self._bytes, self._seconds, self._lock = 0, 0.0, threading.Lock()

    def judge(self, count: int, seconds: float) -> None:
        with self._lock:
            self._bytes += count
            self._seconds += seconds
            if self._bytes >= _TRIAL:
                self.pays = self.pays and self._bytes >= _SLOW * self._seconds
                self._bytes, self._seconds = 0, 0.0


class _Shared:
    """A block of the disk that several pieces have a part of."""

    def __init__(self) -> None:
        self.data = bytearray(ALIGN)
        self.parts: list[tuple[int, int]] = []  # which are there, and do not overlap

    def until(self, end: int) -> list[tuple[int, int]]:
        """The parts that lie in its first `end` bytes, neighbours joined."""
        joined: list[tuple[int, int]] = []
        for begin, stop in sorted(part for part in self.parts if part[1] <= end):
            if joined and joined[-1][1] == begin:
                begin = joined.pop()[0]
            joined.append((begin, stop))
        return joined


class OutputFile:
    """A file that several threads fill. `fd` is open for reading and writing, and stays the
    caller's until `close`."""

    def __init__(self, fd: int, path: Path, pace: Pace) -> None:
        self.fd, self.path, self.pace = fd, path, pace
        self._direct: int | None = None  # a second descriptor; -1: not to be had
        self._clones = sys.platform == "linux"
        self._lock = threading.Lock()
        self._shared: dict[int, _Shared] = {}  # blocks of the disk, by their place

    def write(self, view: memoryview, offset: int, aligned: bool = False) -> None:
        """All of the bytes, some of them by the next `flush`. aligned: the first one's address is
        `offset` modulo ALIGN.

        Raises StorageFailure.
        """
        with storage_errors(self.path):
            if aligned and self.goes_direct(len(view)):
                head = -offset % ALIGN
                whole = (len(view) - head) // ALIGN * ALIGN
                self._keep(view[:head], offset)
                done = head + self._write_direct(view[head : head + whole], offset + head)
                view, offset = view[done:], offset + done
                if done == head + whole:
                    self._keep(view, offset)
                    return
            write_fully(self.fd, view, offset)

    def flush(self, end: int) -> None:
        """Write what `write` has kept of the first `end` bytes, all of which it was given.

        Raises StorageFailure.
        """
        with self._lock:
            kept = [
                (place, one.data, one.until(end - place))
                for place, one in sorted(self._shared.items())
                if place < end
            ]
        with storage_errors(self.path):
            for place, data, parts in kept:
                for begin, stop in parts:
                    write_fully(self.fd, memoryview(data)[begin:stop], place + begin)
        with self._lock:
            for place, _, _ in kept:
                if place + ALIGN <= end:  # else more of it is to come
                    del self._shared[place]

    def _keep(self, view: memoryview, offset: int) -> None:
        """A part of one block of the disk."""
        if not len(view):
            return
        begin = offset % ALIGN
        place, end = offset - begin, begin + len(view)
        with self._lock:
            if place not in self._shared:
                self._shared[place] = _Shared()
            self._shared[place].data[begin:end] = view
            self._shared[place].parts.append((begin, end))

    def goes_direct(self, count: int) -> bool:
        """Whether an aligned piece of so many bytes will be written past the page cache."""
        return count >= LEAST and self.pace.pays and self._opened() >= 0

    def clone(self, source: int, source_offset: int, offset: int, count: int) -> bool:
        """Share a range with another file, where the file system can; else nothing happens.

        The bytes before and after the blocks that can be shared are copied.
        """
        head = -offset % ALIGN
        whole = (count - head) // ALIGN * ALIGN
        if not self._clones or whole <= 0 or (source_offset - offset) % ALIGN:
            return False
        order = _CLONE.pack(source, source_offset + head, whole, offset + head)
        with storage_errors(self.path):
            try:
                fcntl.ioctl(self.fd, _FICLONERANGE, order)
            except OSError as error:
                if error.errno not in _UNABLE:
                    raise
                self._clones = False
                return False
            for begin, end in ((0, head), (head + whole, count)):
                copy_range(source, self.fd, source_offset + begin, offset + begin, end - begin)
        return True

    def close(self) -> None:
        for fd in (self.fd, self._direct or -1):
            if fd >= 0:
                os.close(fd)
        self.fd = self._direct = -1

    def _opened(self) -> int:
        with self._lock:
            if self._direct is None:
                flags = os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC | os.O_NOFOLLOW
                try:
                    self._direct = os.open(self.path, flags)
                except OSError:  # not on this file system
                    self._direct = -1
            return self._direct

    def _write_direct(self, view: memoryview, offset: int) -> int:
        """How many bytes went there: fewer where the system wants other pieces than these."""
        done, fd = 0, self._opened()
        while done < len(view) and not done % ALIGN:
            began = time.perf_counter()
            try:
                count = os.pwrite(fd, view[done:], offset + done)
            except OSError as error:
                if error.errno not in _UNABLE:
                    raise
                self.pace.pays = False
                break
            self.pace.judge(count, time.perf_counter() - began)
            done += count
            if not count:
                break
        return done
