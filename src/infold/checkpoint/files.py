"""Where inputs lie: local paths, Hub ids, JSON files of bounded size, links that stay inside."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from blake3 import blake3

from infold.checkpoint.safetensors import open_regular, parse_json
from infold.disk import storage_errors
from infold.errors import CorruptFile, Refusal, StorageFailure

__all__ = [
    "HUB_ID", "already_here", "check_named", "digest_of", "exists", "locate", "read_bytes",
    "read_json", "read_object", "safe_child", "walk",
]  # fmt: skip

MAX_JSON = 64 << 20  # the largest index in the wild is about 15 MB
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")


def exists(path: Path) -> bool:
    """Whether there is anything at `path`; an unreadable folder or an impossible name is told."""
    try:
        return path.exists()
    except (OSError, ValueError) as error:
        raise StorageFailure(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def already_here(name: str) -> Path:
    """As `locate`, for a name that a file tells and not the user: nothing is ever fetched for it.

    A Hub id is looked up in the Hub's cache alone. Raises Refusal where it is not there.
    """
    path = Path(name)
    if exists(path):
        return path
    if HUB_ID.fullmatch(name):
        repo, _, revision = name.partition("@")
        from huggingface_hub import snapshot_download

        with suppress(Exception):  # whatever it is, it is not here
            return Path(snapshot_download(repo, revision=revision or None, local_files_only=True))
        raise Refusal(
            f"{name}: the receipt names it, and the Hub's cache does not have it; nothing is "
            "fetched because a receipt says so"
        )
    raise Refusal(f"{name}: the receipt names it, and it is not there any more")


def check_named(names: Iterable[str | os.PathLike[str]]) -> None:
    """Refuse all that are neither paths of this machine nor Hub ids."""
    wrong = []
    for name in names:
        text = os.fspath(name)
        if not text:
            wrong.append("an empty path was given; is a variable of the command empty?")
        elif not exists(Path(name)) and not HUB_ID.fullmatch(text):
            wrong.append(f"{text}: no such file or folder (and not a Hub id such as org/name)")
    if wrong:
        raise Refusal(wrong)


def locate(
    name: str | os.PathLike[str],
    only: Sequence[str] | None = None,
    never: Sequence[str] | None = None,
) -> Path:
    """A local path as it is; a Hub id (`org/name`, `org/name@revision`) as its downloaded snapshot.

    `only` and `never` are patterns of file names to download.

    An existing path always wins over a Hub id. Raises Refusal for neither, StorageFailure when
    the Hub cannot be reached.
    """
    check_named([name])
    text, path = os.fspath(name), Path(name)
    if exists(path):
        return path
    repo, _, revision = text.partition("@")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                repo,
                revision=revision or None,
                allow_patterns=None if only is None else list(only),
                ignore_patterns=None if never is None else list(never),
            )
        )
    except Exception as error:  # the hub client raises many kinds; all mean the same here
        raise StorageFailure(
            f"{text}: no such folder here, and {_why_not(error, repo, revision)}"
        ) from error


def _why_not(error: Exception, repo: str, revision: str) -> str:
    """Why the Hub did not deliver a repository, and what to do."""
    from huggingface_hub import constants

    kinds = {kind.__name__ for kind in type(error).__mro__}  # they moved between its versions
    login = "accept its terms there, and log in with `hf auth login`"
    if "GatedRepoError" in kinds:  # which is a RepositoryNotFoundError, too
        return f"the Hub gives {repo} only to those who may read it; {login}"
    if "RevisionNotFoundError" in kinds:
        return f"the Hub's {repo} has no revision {revision or 'main'!r}; look them up on its page"
    if "RepositoryNotFoundError" in kinds:
        return (
            f"the Hub has no {repo}; check the spelling, or log in with `hf auth login` if it is "
            "private"
        )
    if "HFValidationError" in kinds:
        return "it is no name that the Hub allows; check the spelling"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "there is no space on the disk to download it from the Hub"
    if constants.HF_HUB_OFFLINE:
        return (
            "HF_HUB_OFFLINE keeps infold from asking the Hub, while the Hub's cache lacks it or "
            "files of it; correct the path, unset that variable to download it, or "
            "download it elsewhere and give the folder"
        )
    if isinstance(error, PermissionError):
        return f"the Hub's cache cannot be written: {error}"
    return (
        f"the Hub could not be reached ({type(error).__name__}): correct the path, or if it is "
        "a Hub id try again, or download it elsewhere and give the folder"
    )


def safe_child(root: Path, name: str) -> Path:
    """`root/name`, refused when it points out of `root` by its spelling or through a link.

    One exception: the Hub's cache keeps `snapshots/REV/file` as links into the `blobs` of the
    same repository.
    """
    if not name or name.startswith("/") or "\\" in name or ".." in Path(name).parts or "\0" in name:
        raise CorruptFile(f"{root}: {name!r} points outside of the folder")
    path = root / name
    if path.relative_to(root).as_posix() != name:
        raise CorruptFile(f"{root}: {name!r} is an odd spelling of a file name")
    try:
        real, home = path.resolve(), root.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise CorruptFile(f"{root}: {name!r} cannot be followed: {error}") from None
    allowed = [home]
    if home.parent.name == "snapshots" and home.parent.parent.name.startswith("models--"):
        allowed.append(home.parent.parent / "blobs")
    if not any(real.is_relative_to(folder) for folder in allowed):
        raise CorruptFile(f"{path}: a link that leads out of the folder")
    return path


def walk(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """As os.walk, which would pass over a folder that cannot be read. Raises StorageFailure."""

    def unreadable(error: OSError) -> None:
        raise StorageFailure(f"{error.filename}: {error.strerror}") from error

    return os.walk(folder, onerror=unreadable)


def digest_of(path: Path) -> str:
    """The BLAKE3 of a file, in hex. Raises StorageFailure, and CorruptFile for no regular file."""
    hasher = blake3()
    with storage_errors(path), open_regular(path) as file:
        while piece := file.read(1 << 20):
            hasher.update(piece)
    return hasher.hexdigest()


def read_bytes(path: Path, limit: int = MAX_JSON) -> bytes:
    """The whole file, refused above `limit` bytes."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise CorruptFile(f"{path}: {size:,} bytes; the limit for such a file is {limit:,}")
            return file.read(limit + 1)
    except OSError as error:
        raise StorageFailure(f"{path}: {error.strerror}") from error


def read_json(path: Path) -> Any:
    """The JSON document at `path`, treated as hostile."""
    return parse_json(read_bytes(path), str(path))


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object at `path`."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise CorruptFile(f"{path}: must hold a JSON object")
    return value
