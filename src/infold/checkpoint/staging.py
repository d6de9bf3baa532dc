"""The only writer: an output takes its name when it is complete and on the disk, never before.

While a merge runs, everything lies in `.NAME.infold/` beside the output:

    lock      held (flock) by the running merge; the system frees it however the process ends
    journal   JSON lines: first what is being made, then how far each shard is safely on the disk
    output/   the future output

Publishing is one rename of `output/`. With --force an existing output is exchanged in one step
where the system can (Linux); else the old one is set aside in `replaced`, and stays there if
neither of the two can have the name. A killed merge leaves only the hidden folder; the next one
continues from what the journal tells, after checking it, or starts over where base or adapters
differ.

An output that is a single file is published by a rename for each file in `output/`: first those
that belong to it, then itself. Before the first a file `publishing` comes to the disk, and the next
merge to this output finishes what a kill left there.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import logging
import os
import shutil
import stat
import sys
import unicodedata
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infold.disk import new_folders, remove_empty, storage_errors, sync_folder
from infold.errors import Refusal, StorageFailure

__all__ = ["Progress", "Staging", "copy_range", "staging_folder", "sync_data", "write_fully"]

_PUBLISHING = "publishing"


def staging_folder(out: Path) -> Path:
    """Where everything lies while the output `out` is made."""
    return out.parent / f".{out.name}.infold"


@dataclass(frozen=True, slots=True)
class Progress:
    """One journal line: `position` bytes of a shard are on the disk, with the digests so far."""

    position: int
    base: str  # digest of as many bytes of the base's shard (of all, once the shard is complete)
    output: str


class Staging:
    """The hidden folder of one merge. Use as `with Staging(...) as staging`.

    An InfoldError removes it, but where the next run has to finish its publishing; an interruption
    or a crash leaves it for the next run.
    like: a folder, the permissions of which and of its files the output takes, or one such file.
    """

    writes = True

    def __init__(
        self,
        out: Path,
        identity: str,
        force: bool,
        *,
        lone: bool = False,
        like: Path | None = None,
    ) -> None:
        self.out, self.identity, self.force, self.lone = out, identity, force, lone
        self.like = like
        self.folder = staging_folder(out)
        self.output = self.folder / "output"
        self.made: list[Path] = []  # folders above the output that were not there, innermost first
        self.resumed: dict[str, Progress] = {}
        self._names: dict[str, str] = {}  # of its files, by what a file system may take them for
        self._lock = self._journal = -1

    def __enter__(self) -> Staging:
        with storage_errors(self.folder):
            try:
                self._acquire()
            except Exception:  # the hidden folder may be another's, what is above it was ours
                remove_empty(self.made)
                raise
            try:
                self._open()
            except BaseException as error:
                self.__exit__(type(error), error, None)
                raise
        return self

    def _acquire(self) -> None:
        self.made = self.made or new_folders(self.out)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        fresh = not os.path.lexists(self.folder)
        self.folder.mkdir(exist_ok=True)
        for path in (self.folder, *self.folder.iterdir()):
            if path.is_symlink():  # what is written there would go elsewhere
                raise Refusal(f"{path}: is a link, not what an interrupted merge left; remove it")
        lock = self.folder / "lock"
        try:
            self._lock = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError:
            with suppress(OSError):
                self.folder.rmdir()  # only where it is empty
            raise
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # the merge that held the lock until now may have removed the file, and a third one
            # have made another
            mine = lock.exists() and os.path.samestat(os.stat(lock), os.fstat(self._lock))
        except BlockingIOError:
            self._release()
            raise Refusal(f"{self.out}: another merge is writing this output right now") from None
        except OSError:  # no locks on this file system, say
            self._release()
            if fresh:
                with suppress(OSError):
                    lock.unlink()
                    self.folder.rmdir()
            raise
        if not mine:
            self._release()
            self._acquire()

    def _open(self) -> None:
        for made in reversed(self.made):  # else a power cut could take the output with its folder
            sync_folder(made.parent)
        self._restore()
        journal = self.folder / "journal"
        self.resumed = self._read_journal(journal)
        fresh = not self.resumed
        if fresh and self.output.exists():
            shutil.rmtree(self.output)
        of_folder = self.like is not None and self.like.is_dir()
        self.output.mkdir(self._permissions() | 0o700 if of_folder else 0o777, exist_ok=True)
        self._remove_strangers()
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._journal = os.open(journal, flags | (os.O_TRUNC if fresh else 0), 0o644)
        if fresh:
            self._log({"identity": self.identity})
        else:
            whole = journal.read_bytes().rfind(b"\n") + 1
            os.ftruncate(self._journal, whole)  # no line that the kill cut off in the middle

    def _restore(self) -> None:
        """Put back the old output that a kill between the two renames of `publish` left here."""
        if (self.folder / _PUBLISHING).exists():
            self._move_files()
            (self.folder / _PUBLISHING).unlink()
            if not self.force:
                raise Refusal(
                    f"{self.out}: exists now: an interrupted merge was complete, and had to be "
                    "given its name; `infold verify` it, choose another name, or replace it with "
                    "--force"
                )
        replaced = self.folder / "replaced"
        if not replaced.exists():
            return
        if os.path.lexists(self.out):
            shutil.rmtree(replaced)
            return
        os.rename(replaced, self.out)
        if not self.force:
            raise Refusal(
                f"{self.out}: exists again: an interrupted merge with --force had set it aside; "
                "choose another name, or replace it with --force"
            )

    def _remove_strangers(self) -> None:
        """Keep what the journal vouches for; all else is written anew, or belonged elsewhere."""
        for folder, folders, files in os.walk(self.output, topdown=False):
            links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
            for name in [*files, *links]:
                file = Path(folder) / name
                known = file.relative_to(self.output).as_posix() in self.resumed
                if not known or file.is_symlink():
                    file.unlink()
            if Path(folder) != self.output:
                with suppress(OSError):
                    os.rmdir(folder)  # only where it is empty

    def _read_journal(self, path: Path) -> dict[str, Progress]:
        """What an earlier run of the same merge has finished; empty when it was another merge."""
        try:
            lines = path.read_bytes().split(b"\n")
            if json.loads(lines[0]) != {"identity": self.identity}:
                if len(lines) > 2:  # it had finished something
                    logging.getLogger("infold").warning(
                        "%s: pieces of an interrupted run with other inputs, settings or another "
                        "infold are removed",
                        self.out,
                    )
                return {}
        except (OSError, ValueError, RecursionError):
            return {}
        found = {}
        for line in lines[1:-1]:  # what follows the last newline was cut off by the kill
            try:
                entry = json.loads(line)
                progress = Progress(
                    int(entry["position"]), str(entry["base"]), str(entry["output"])
                )
                found[str(entry["shard"])] = progress
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
                break
        return found

    def _log(self, entry: dict[str, Any]) -> None:
        os.write(self._journal, json.dumps(entry).encode() + b"\n")
        sync_data(self._journal)

    def record(self, shard: str, fd: int, progress: Progress) -> None:
        """Bring the shard's bytes to the disk, then say so in the journal."""
        with storage_errors(self.output / shard):
            sync_data(fd)
            self._log(
                {
                    "shard": shard,
                    "position": progress.position,
                    "base": progress.base,
                    "output": progress.output,
                }
            )

    def _permissions(self, name: str = "") -> int:
        """Of a file of the output, or of its folder: as cp gives them, so those of what it is like,
        less the umask; but its owner may write it."""
        if self.like is not None:
            alike = self.like / name if self.like.is_dir() else self.like
            with suppress(OSError):  # what is new is like nothing
                return stat.S_IMODE(alike.stat().st_mode) & 0o777 | 0o600
        return 0o644

    def open_file(self, name: str, size: int) -> int:
        """A descriptor, for reading and writing, of an output file that will have `size` bytes.

        Raises Refusal where the file system takes its name for that of another one.
        """
        path = self.output / name
        twin = self._names.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if twin != name and path.exists() and path.samefile(self.output / twin):
                raise Refusal(
                    f"{self.out}: {twin} and {name} would be one file on this file system, which "
                    "takes capitals for small letters; choose a place on another, or rename one"
                )
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            fd = os.open(path, flags, self._permissions(name))
            try:
                os.ftruncate(fd, size)
            except OSError:
                os.close(fd)
                raise
        return fd

    def write_bytes(self, name: str, data: bytes) -> None:
        """A small file, whole and on the disk."""
        fd = self.open_file(name, 0)
        with storage_errors(self.output / name):
            try:
                write_fully(fd, memoryview(data), 0)
                os.fsync(fd)
            finally:
                os.close(fd)

    def copy_file(self, source: Path, name: str) -> None:
        """A side file, byte by byte, on the disk."""
        with storage_errors(source):
            reader = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
            try:
                size = os.fstat(reader).st_size
                fd = self.open_file(name, size)
                try:
                    with storage_errors(self.output / name):
                        copy_range(reader, fd, 0, 0, size)
                        os.fsync(fd)
                finally:
                    os.close(fd)
            finally:
                os.close(reader)

    @property
    def aside(self) -> Path:
        """A file that is not the output's yet, and outlives a kill."""
        return self.folder / "record"

    def adopt(self, name: str, like: str) -> None:
        """Make the file at `aside`, which is on the disk, part of the output, with the permissions
        of the output's file `like`."""
        with storage_errors(self.output / name):
            alike = os.stat(self.output / like)
            os.chmod(self.aside, stat.S_IMODE(alike.st_mode))
            os.rename(self.aside, self.output / name)

    def publish(self) -> None:
        """Give the output its name. After this line returned it survives a power cut."""
        try:
            self._publish()
        except StorageFailure as error:
            if not self._half_published():
                raise
            raise StorageFailure(
                f"{error}; nothing is lost: what has no name is kept in {self.folder}, and the "
                f"next merge to {self.out} begins with giving it back"
            ) from error

    def _publish(self) -> None:
        with storage_errors(self.out):
            for folder, _, _ in os.walk(self.output):
                sync_folder(Path(folder))
            # from here on the folder must not be continued: after an exchange it holds the old one
            os.unlink(self.folder / "journal")
            if os.path.lexists(self.out) and not self.force:
                raise Refusal(f"{self.out}: appeared while the merge ran; it is left as it is")
            if self.lone:
                self._announce()
                self._move_files()
            elif not os.path.lexists(self.out):
                os.rename(self.output, self.out)
            elif not _exchange(self.output, self.out):
                os.rename(self.out, self.folder / "replaced")
                try:
                    os.rename(self.output, self.out)
                except OSError:
                    os.rename(self.folder / "replaced", self.out)
                    raise
            sync_folder(self.out.parent)
            self.discard()

    def _announce(self) -> None:
        """Tell the next run what is about to get its name."""
        marker = self.folder / _PUBLISHING
        try:
            fd = os.open(marker, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            try:
                write_fully(fd, memoryview(json.dumps(os.listdir(self.output)).encode()), 0)
                os.fsync(fd)
            finally:
                os.close(fd)
            sync_folder(self.folder)
        except OSError:
            with suppress(OSError):
                os.unlink(marker)  # nothing has got its name yet
            raise

    def _move_files(self) -> None:
        """Give each file of a single-file output its name, the model's own last. What belonged to
        an old output, and has no successor, goes."""
        with suppress(ValueError):
            new = json.loads((self.folder / _PUBLISHING).read_bytes())
            for name in os.listdir(self.out.parent):
                if name.startswith(f"{self.out.name}.infold-") and name not in new:
                    os.unlink(self.out.with_name(name))
        names = sorted(os.listdir(self.output), key=lambda name: (name == self.out.name, name))
        for name in names:
            os.rename(self.output / name, self.out.with_name(name))
        sync_folder(self.out.parent)

    def discard(self) -> None:
        """Remove the hidden folder with all that is in it; the lock last, so that nobody can begin
        the same output while this is still removing."""
        with suppress(OSError):
            if (marker := self.folder / _PUBLISHING) in (entries := list(self.folder.iterdir())):
                marker.unlink()  # first: what it tells of has its name
            for entry in entries:
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry, ignore_errors=True)
                elif entry.name != "lock":
                    with suppress(OSError):
                        entry.unlink()
            (self.folder / "lock").unlink(missing_ok=True)
            self.folder.rmdir()
        remove_empty(self.made)

    def _release(self) -> None:
        for fd in (self._journal, self._lock):
            if fd >= 0:
                os.close(fd)
        self._journal = self._lock = -1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: Any
    ) -> None:
        if isinstance(error, Exception) and not self._half_published():
            self.discard()
        self._release()

    def _half_published(self) -> bool:
        """Whether the old output, or a part of the new one, lies in the hidden folder alone."""
        if (self.folder / _PUBLISHING).exists():
            return self.output.is_dir() and any(self.output.iterdir())
        return (self.folder / "replaced").exists() and not os.path.lexists(self.out)


def write_fully(fd: int, view: memoryview, offset: int) -> None:
    """pwrite until everything is written."""
    while len(view):
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done


def copy_range(source: int, target: int, source_offset: int, offset: int, count: int) -> None:
    """Copy bytes between files in the kernel (sharing blocks where the file system can)."""
    while count and hasattr(os, "copy_file_range"):
        try:
            done = os.copy_file_range(source, target, min(count, 1 << 30), source_offset, offset)
        except OSError as error:
            if error.errno in (
                errno.EXDEV,
                errno.EINVAL,
                errno.ENOSYS,
                errno.EOPNOTSUPP,
                errno.EBADF,
            ):
                break
            raise
        if done == 0:
            break
        source_offset, offset, count = source_offset + done, offset + done, count - done
    while count:
        piece = os.pread(source, min(count, 1 << 20), source_offset)
        if not piece:
            raise OSError(errno.EIO, "the source file ended early")
        write_fully(target, memoryview(piece), offset)
        source_offset, offset, count = (
            source_offset + len(piece),
            offset + len(piece),
            count - len(piece),
        )


def sync_data(fd: int) -> None:
    """Bring a file's content to the disk. macOS has no fdatasync."""
    (os.fdatasync if hasattr(os, "fdatasync") else os.fsync)(fd)


def _exchange(one: Path, two: Path) -> bool:
    """Swap two names in one step; False where the system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "renameat2"):
        return False
    at_cwd, exchange = -100, 2
    failed = library.renameat2(at_cwd, os.fsencode(one), at_cwd, os.fsencode(two), exchange)
    return bool(failed == 0)
