"""Where an output may go."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from infold.checkpoint.files import read_json, walk
from infold.checkpoint.record import UNDO
from infold.checkpoint.shards import (
    CARD,
    GGUF,
    JOURNAL,
    RECEIPT,
    companion,
    is_bundled,
    is_lone,
    read_receipt,
)
from infold.checkpoint.staging import staging_folder
from infold.disk import new_folders, storage_errors
from infold.errors import InfoldError, Refusal

__all__ = ["check_adapter_place", "check_name", "check_place"]

# what training and combining write; and PEFT, where the adapter came from it
_OF_ADAPTERS = frozenset(
    "adapter_config.json adapter_model.safetensors adapter_model.bin README.md loss.jsonl loss.png "
    "infold-training.json".split()
)

# Endings of single files that no output has: it would be a folder of that name
_FILES = (GGUF, ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".onnx")


def _check_ending(out: Path) -> None:
    """Refuse a new output that is called as a file and would be a folder: every output is one, but
    for `.gguf` files."""
    if out.suffix.lower() in _FILES and not is_lone(out) and not os.path.lexists(out):
        raise Refusal(
            f"{out}: would be a folder of that name: a model's files lie in a folder, as "
            f"{out.with_suffix('')}; only of a GGUF base the output can be a file, as "
            f"{out.with_suffix(GGUF)}"
        )


def check_name(out: Path, beside: Path | None = None) -> None:
    """Refuse an output for which a name, the longest beside it or one of new folders above it, has
    more bytes than its file system takes.

    beside: that longest one; by default the one that a checkpoint or adapter needs.
    """
    if beside is None:  # a single file's receipt stays there
        beside = companion(out, RECEIPT) if is_lone(out) else staging_folder(out)
    above = next((folder for folder in out.parents if os.path.lexists(folder)), out)
    limit = 255
    with suppress(OSError):
        limit = os.pathconf(above, "PC_NAME_MAX")
    reasons = []
    for path, name in ((out, beside.name), *((new, new.name) for new in new_folders(out))):
        excess = len(os.fsencode(name)) - limit
        if excess > 0:
            longer = name.replace(path.name, "NAME")
            why = "" if path.name == name else f"{longer} lies beside it, and "
            reasons.append(
                f"{path}: this name is {excess} bytes too long: {why}names have at most {limit} "
                "here; choose a shorter one"
            )
    if reasons:
        raise Refusal(reasons)


def check_adapter_place(out: Path, force: bool) -> None:
    """An adapter's folder must be a new name, or with force that of an adapter and nothing else."""
    if not os.path.lexists(out):
        return
    if not force:
        raise Refusal(f"{out}: exists already; choose another name, or replace it with --force")
    if out.is_symlink() or not out.is_dir():
        raise Refusal(f"{out}: is not a folder, so --force does not replace it")
    with storage_errors(out):
        names = {path.name for path in out.iterdir()}
    if strangers := sorted(names - _OF_ADAPTERS):
        raise Refusal(
            f"{out}: holds more than an adapter, so --force does not replace it: "
            + ", ".join(strangers[:10])
            + (f" and {len(strangers) - 10} more" if len(strangers) > 10 else "")
        )


def check_place(
    out: Path, inputs: Iterable[Path], coming: Collection[str], force: bool, *, replaces: bool
) -> None:
    """The output must be a new name, or with force an old output, and not lie in an input.

    coming: names of the files that a folder will have, as far as they are known. replaces: whether
    the verb has --force at all.
    """
    check_name(out)
    _check_ending(out)
    # Path.resolve ends in a RuntimeError where links run in a circle
    real = Path(os.path.realpath(out))
    for given in inputs:
        other = given.resolve()
        if real == other or real in other.parents or (other in real.parents and other.is_dir()):
            raise Refusal(f"{out}: lies in or around the input {given}; choose another place")
    if is_lone(out) and os.path.lexists(journal := companion(out, JOURNAL)):
        # also where the file has another name now: its edit must not be completed on this output
        raise Refusal(
            f"{out}: was left in the middle of an edit in place; `infold inspect {out}` finishes "
            f"it, or remove {journal.name} if that file is gone"
        )
    if not os.path.lexists(out):
        return
    if not replaces:
        raise Refusal(f"{out}: exists already; choose another name")
    if is_lone(out) and out.is_file() and not out.is_symlink():
        _check_file(out, force)
        return
    if out.is_symlink() or not out.is_dir():
        kind = "a link" if out.is_symlink() else "a file"
        raise Refusal(
            f"{out}: exists already and is {kind}, which --force does not replace; choose "
            "another name"
        )
    foreign = _foreign(out, coming)
    if not force:
        way = "" if foreign else ", or replace it with --force"
        raise Refusal(f"{out}: exists already; choose another name{way}")
    if foreign:
        raise Refusal(foreign)


def _check_file(out: Path, force: bool) -> None:
    """An output that exists, and is a single file, must be an old output, and be replaced."""
    told: Any = None
    with suppress(InfoldError):  # none, or a broken one
        told = read_receipt(out)
    mine = isinstance(told, dict) and out.name in (told.get("shards") or ())
    if not force:
        way = ", or replace it with --force" if mine else ""
        raise Refusal(f"{out}: exists already; choose another name{way}")
    if not mine:
        raise Refusal(
            f"{out}: {companion(out, RECEIPT).name} is not beside it, so it is no output of "
            "infold, and --force does not replace it; choose another name, or remove it yourself"
        )


def _foreign(out: Path, coming: Collection[str]) -> list[str]:
    """What of a folder neither an earlier merge wrote nor this one will: it would be lost."""
    found = []
    for folder, folders, files in walk(out):
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        found += [os.path.relpath(os.path.join(folder, name), out) for name in [*files, *links]]
    if not found:
        return []
    if RECEIPT not in found:
        return [
            f"{out}: holds no {RECEIPT}, so it is no output of infold, and --force does not "
            "replace it; choose another name, or remove it yourself"
        ]
    known = {RECEIPT, UNDO, *coming}
    with suppress(InfoldError):  # a broken receipt tells of no file
        receipt = read_json(out / RECEIPT)
        told = receipt if isinstance(receipt, dict) else {}
        for field in ("shards", "side_files"):
            names: Any = told.get(field)
            known |= {name for name in names or () if isinstance(name, str)}
    if "deployment_config.json" in found:
        known.add(CARD)  # of `infold deploy`
    strange = sorted(name for name in found if name not in known and not _told(out, name))
    reasons = [f"{out / name}: neither the base's nor infold's" for name in strange]
    if reasons:
        reasons.insert(
            0,
            f"{out}: holds {len(strange)} of your own files, so --force does not replace it; move "
            "them elsewhere, or choose another name",
        )
    return reasons


def _told(out: Path, name: str) -> bool:
    """Whether a file is what infold told of the merge that is there."""
    if not is_bundled(name):
        return False
    if not name.startswith("records/"):
        return True
    with suppress(InfoldError):  # a record has its kind for a name
        record = read_json(out / name)
        return isinstance(record, dict) and record.get("kind") == Path(name).stem
    return False
