"""Whether an input is still the file that was opened.

A merge reads its inputs many times, for as long as hours: headers, values, digests, the copy in an
undo record. If a file is exchanged meanwhile these belong to two models, and the base to neither.
"""

from __future__ import annotations

import os
from pathlib import Path

from infold.errors import StorageFailure

__all__ = ["Stamp", "changes", "stamp_of"]

# Bytes, and nanoseconds of the last change. No inode: file systems in user space, and of networks,
# give a file that nobody has touched another one when they like.
Stamp = tuple[int, int]


def stamp_of(path: Path, fd: int | None = None) -> Stamp:
    """fd: of the file, where it is open. Raises StorageFailure where it cannot be looked at."""
    try:
        found = os.stat(path if fd is None else fd)
    except OSError as error:
        raise StorageFailure(f"{path}: {error.strerror}") from error
    return found.st_size, found.st_mtime_ns


def changes(path: Path, stamp: Stamp | None, fd: int | None = None) -> list[str]:
    """Why a file is not the one that had this stamp: one reason, or none. None: it never had one.

    Raises StorageFailure as `stamp_of` does.
    """
    if stamp is None or stamp_of(path, fd) == stamp:
        return []
    return [f"{path}: was changed while infold read it; nothing was written, so try again"]
