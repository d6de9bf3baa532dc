"""Small files: whole on the disk under their names, or what was there before."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from infold.disk import whole_file, write_whole
from infold.errors import StorageFailure


def test_bytes_come_to_the_disk_before_the_name_and_the_name_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a power cut could leave an empty file under the name, or take the new one back."""
    path = tmp_path / "file.json"
    path.write_bytes(b"old")
    calls: list[tuple[str, bytes]] = []

    def fsync(fd: int) -> None:
        calls.append(("folder" if os.path.isdir(f"/dev/fd/{fd}") else "file", path.read_bytes()))

    monkeypatch.setattr(os, "fsync", fsync)
    write_whole(path, b"new")

    assert calls == [("file", b"old"), ("folder", b"new")]
    assert os.listdir(tmp_path) == ["file.json"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_a_failure_leaves_what_was_there_and_nothing_else(
    call: str, error: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(b"old")

    def fail(*given: Any) -> None:
        names = map(str, given[:1]) if call == "replace" else ()  # as the system's errors have
        raise OSError(error, os.strerror(error), *names)

    monkeypatch.setattr(os, call, fail)
    for target in (path, tmp_path / "new" / "folders" / "file.json"):
        with pytest.raises(StorageFailure) as failure:
            write_whole(target, b"new")
        why = "no space left on the disk" if error == errno.ENOSPC else os.strerror(error)
        assert str(failure.value) == f"{target}: {why}", "not the name of the draft"

    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file.json"]


def test_an_error_of_the_writer_passes_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), whole_file(tmp_path / "new" / "file") as draft:
        draft.write_bytes(b"half")
        raise KeyboardInterrupt

    assert os.listdir(tmp_path) == []


def test_what_waits_at_the_name_of_the_draft_is_not_written_through(tmp_path: Path) -> None:
    """A killed process with the same number left it (each container begins with the number 1), or
    somebody who knows the number put a link there."""
    other = tmp_path / "other"
    other.write_bytes(b"other")
    (tmp_path / f".file.{os.getpid()}").symlink_to(other)

    write_whole(tmp_path / "file", b"new")

    assert other.read_bytes() == b"other"
    assert (tmp_path / "file").read_bytes() == b"new" and not (tmp_path / "file").is_symlink()


def test_permissions_are_those_asked_for_or_the_usual_ones(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "usual", b"")
        write_whole(tmp_path / "script", b"", 0o755)
    finally:
        os.umask(before)

    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {"usual": 0o640, "script": 0o755}
