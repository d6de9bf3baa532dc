"""Where inputs lie: local paths, Hub ids, JSON files of bounded size, links that stay inside."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from infold.checkpoint.safetensors import parse_json
from infold.errors import CorruptFile, Refusal, StorageFailure

__all__ = ["locate", "read_bytes", "read_json", "read_object", "safe_child"]

MAX_JSON = 256 << 20  # the largest index in the wild is a few megabytes
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")


def locate(name: str | os.PathLike[str], patterns: Iterable[str] | None = None) -> Path:
    """A local path as it is; a Hub id (`org/name`, `org/name@revision`) as its downloaded snapshot.

    An existing path always wins over a Hub id. Raises Refusal for neither, StorageFailure when
    the Hub cannot be reached.
    """
    path = Path(name)
    if path.exists():
        return path
    text = os.fspath(name)
    if not _HUB_ID.fullmatch(text):
        raise Refusal(f"{text}: no such file or folder (and not a Hub id such as org/name)")
    repo, _, revision = text.partition("@")
    from huggingface_hub import snapshot_download

    try:
        allow = None if patterns is None else list(patterns)
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=allow))
    except Exception as error:  # the hub client raises many kinds; all mean the same here
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise StorageFailure(
            f"{text}: no such folder here, and the Hub did not deliver it: {first}"
        ) from error


def safe_child(root: Path, name: str) -> Path:
    """`root/name`, refused when it points out of `root` by its spelling or through a link.

    One exception: the Hub's cache keeps `snapshots/REV/file` as links into the `blobs` of the
    same repository.
    """
    if not name or name.startswith("/") or "\\" in name or ".." in Path(name).parts or "\0" in name:
        raise CorruptFile(f"{root}: {name!r} points outside of the folder")
    path = root / name
    real, home = path.resolve(), root.resolve()
    allowed = [home]
    if home.parent.name == "snapshots" and home.parent.parent.name.startswith("models--"):
        allowed.append(home.parent.parent / "blobs")
    if not any(real.is_relative_to(folder) for folder in allowed):
        raise CorruptFile(f"{path}: a link that leads out of the folder")
    return path


def read_bytes(path: Path, limit: int = MAX_JSON) -> bytes:
    """The whole file, refused above `limit` bytes."""
    try:
        with open(path, "rb") as file:
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
