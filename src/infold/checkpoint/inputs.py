"""Input files that are read by several threads, of which only a few are open at a time."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from infold.checkpoint.shards import Checkpoint, read_exactly
from infold.checkpoint.stamps import changes
from infold.errors import Refusal, StorageFailure

__all__ = ["InputFiles"]

_IDLE = 16  # open files that nobody reads; checkpoints of 1,000 shards and more exist


@dataclass
class _Opened:
    fd: int
    readers: int = 0


class InputFiles:
    """Opens files when they are read, and closes those that were not read for longest.

    Of the checkpoints given, which nobody may write meanwhile, no other file is ever opened than
    the one whose header was read.
    """

    def __init__(self, *checkpoints: Checkpoint) -> None:
        self._stamps = {s.path: s.header.stamp for c in checkpoints for s in c.shards}
        self._opened: dict[Path, _Opened] = {}  # the one that was used last comes last
        self._lock = threading.Lock()

    @contextmanager
    def use(self, path: Path) -> Iterator[int]:
        """The descriptor of a file, which stays open for the length of the block.

        Raises StorageFailure when it cannot be opened, Refusal where it was changed.
        """
        with self._lock:
            opened = self._opened.pop(path, None) or self._open(path)
            opened.readers += 1
            self._opened[path] = opened
            idle = [p for p, other in self._opened.items() if not other.readers]
            for old in idle[: max(0, len(idle) - _IDLE)]:
                os.close(self._opened.pop(old).fd)
        try:
            yield opened.fd
        finally:
            with self._lock:
                opened.readers -= 1

    def read(self, path: Path, view: memoryview, offset: int) -> None:
        """Fill `view` from `offset` of a file. Raises CorruptFile where it ends too early."""
        with self.use(path) as fd:
            read_exactly(fd, view, offset, path)

    def close(self) -> None:
        """To be called when nobody reads any more."""
        for opened in self._opened.values():
            os.close(opened.fd)
        self._opened.clear()

    def _open(self, path: Path) -> _Opened:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise StorageFailure(f"{path}: {error.strerror}") from error
        if reasons := changes(path, self._stamps.get(path), fd):
            os.close(fd)
            raise Refusal(reasons)
        return _Opened(fd)
