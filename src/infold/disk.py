"""Bytes that are on the disk when they have their names, and errors that name the file."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from infold.errors import StorageFailure

__all__ = [
    "new_folders",
    "remove_empty",
    "storage_errors",
    "sync_folder",
    "whole_file",
    "write_whole",
]


@contextmanager
def storage_errors(what: str | Path) -> Iterator[None]:
    """Turn the system's refusals into one line that names the file."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFailure(f"{what}: no space left on the disk") from error
        name = error.filename or what
        raise StorageFailure(f"{name}: {error.strerror or error}") from error


def write_whole(path: Path, data: bytes, mode: int | None = None) -> None:
    """Write a small file, as `whole_file` does."""
    with whole_file(path, mode) as draft:
        draft.write_bytes(data)


@contextmanager
def whole_file(path: Path, mode: int | None = None) -> Iterator[Path]:
    """A name beside `path` to write to. At the end the file there comes to the disk and takes the
    name `path`, in one step: at every moment there is all of it, or what was there before.

    The folders above are made. mode: the file's permissions; by default what the process gives to
    new files. Raises StorageFailure; then, as after any other error, nothing is left of the draft.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    made = new_folders(path)
    try:
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            draft.unlink(missing_ok=True)  # of a killed process with the same number; or a link
            try:
                yield draft
                _settle(draft, mode)
                os.replace(draft, path)
            except OSError as error:
                if error.filename == os.fspath(draft):  # nobody knows that name
                    error.filename = None
                raise
            sync_folder(path.parent)
    except BaseException:
        with suppress(OSError):
            draft.unlink()
        remove_empty(made)
        raise


def _settle(path: Path, mode: int | None) -> None:
    """Give a file its permissions, and bring it to the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if mode is not None:
            os.fchmod(fd, mode)
        os.fsync(fd)
    finally:
        os.close(fd)


def new_folders(out: Path) -> list[Path]:
    """The folders above `out` that are not there yet, innermost first."""
    return [folder for folder in out.parents if not os.path.lexists(folder)]


def remove_empty(folders: Iterable[Path]) -> None:
    """Those that hold something stay."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def sync_folder(path: Path) -> None:
    """Bring a folder's names to the disk, where the file system can do that of itself."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)
