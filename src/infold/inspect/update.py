"""How far a merge moved each tensor, measured from base and merged as they lie on the disk."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infold.checkpoint.adapter import open_adapter
from infold.checkpoint.files import already_here, digest_of, safe_child
from infold.checkpoint.inputs import InputFiles
from infold.checkpoint.safetensors import DTYPE_BITS
from infold.checkpoint.shards import Checkpoint, open_checkpoint
from infold.dtypes import TORCH_DTYPES
from infold.errors import InfoldError, Refusal
from infold.inspect.receipt import checked_receipt
from infold.plan.config import read_config
from infold.plan.match import group_keys

__all__ = ["describe_update"]

_PIECE = 1 << 20  # elements
_BINS = 41
_FOLDERS = re.compile(r"(?<![^\s'\"`(])(/|\.{1,2}/|~/)[^\n:]*/")


def describe_update(merged: str | os.PathLike[str]) -> dict[str, Any]:
    """The edits of a merged folder as a record: JSON-ready.

    tensors: for each edited one {tensor, dtype, norm, relative, changed}: the Frobenius norm of
    merged - base, the same over the base's, and the share of elements whose bits changed. Converted
    weights are not among them; the receipt tells how far they moved.
    scales: IA³ scales by module {module, mean, least, most}, and their histogram {edges, counts}.
    Without the base (or an adapter) at the path of the receipt, or where another one lies there now
    (after a merge in place the merged one itself), those lists are empty, and `notes` say why.
    """
    folder = Path(merged)
    receipt = checked_receipt(folder)
    found: dict[str, Any] = {"kind": "update", "version": 1, "tensors": [], "notes": []}
    try:
        base = open_checkpoint(already_here(receipt["base"]["path"]))
        _check({s.name: s.path for s in base.shards}, receipt["base"]["shards"])
        now = open_checkpoint(folder)
        # what only moves a power of two between two scales changes no weight
        # and from the codes of converted weights nothing can be subtracted
        names = [e["tensor"] for e in receipt["edits"] if not {"exponent", "error"} & e.keys()]
        found["tensors"] = [row for n in names if (row := _moved(base, now, n)) is not None]
    except InfoldError as error:
        found["notes"].append(_left_out("norms of updates", error))
    rows, values = [], []
    for entry in receipt["adapters"]:
        if entry["method"] != "ia3":
            continue
        try:
            adapter = open_adapter(already_here(entry["path"]))
            files = {name: safe_child(adapter.path, name) for name in entry["files"]}
            _check(files, entry["files"])
            read_config(adapter)
        except InfoldError as error:
            found["notes"].append(_left_out("scales", error))
            continue
        for module, parts in group_keys(adapter.tensors).modules.items():
            if (key := parts.get("ia3_l")) is not None:
                scale = adapter.read(key).double().flatten()
                scale = scale[scale.isfinite()]  # of another adapter that lies there now
                if not len(scale):
                    continue
                values.append(scale)
                rows.append(
                    {
                        "module": module,
                        "mean": float(scale.mean()),
                        "least": float(scale.min()),
                        "most": float(scale.max()),
                    }
                )
    found["scales"] = rows
    if values:
        every = torch.cat(values)
        counts, edges = torch.histogram(every, bins=_BINS)
        found["histogram"] = {"edges": edges.tolist(), "counts": counts.int().tolist()}
    return found


def _check(files: Mapping[str, Path], told: Mapping[str, str]) -> None:
    """Raises Refusal where the files are not those of the receipt."""
    for name, path in files.items():
        if digest_of(path) != told.get(name):
            raise Refusal(f"{path}: is not what was merged, or not any more")


def _left_out(what: str, error: InfoldError) -> str:
    """A note with the names of files alone: their folders tell of this machine and of nothing else,
    and a report goes to others."""
    return f"no {what}: {_FOLDERS.sub('', str(error))}"


def _moved(base: Checkpoint, merged: Checkpoint, name: str) -> dict[str, Any] | None:
    """One tensor's row; None where it is new, resized or not stored as floats."""
    if name not in base.where or name not in merged.where:
        return None
    was, now = base.info(name), merged.info(name)
    if (was.dtype, was.shape) != (now.dtype, now.shape) or was.dtype not in TORCH_DTYPES:
        return None
    width = DTYPE_BITS[was.dtype] // 8
    moved = size = 0.0
    changed = 0
    files = InputFiles()
    try:
        for at in range(0, was.nbytes, _PIECE * width):
            count = min(_PIECE * width, was.nbytes - at)
            pair = [
                _piece(files, c.shards[c.where[name]].path, i.begin + at, count, i.dtype)
                for c, i in ((base, was), (merged, now))
            ]
            old, new = (values.double() for values in pair)
            moved += float((new - old).square().sum())
            size += float(old.square().sum())
            changed += int((pair[0] != pair[1]).sum())
    finally:
        files.close()
    total = was.nbytes // width
    return {
        "tensor": name,
        "dtype": was.dtype,
        "norm": moved**0.5,
        "relative": (moved / size) ** 0.5 if size else None,
        "changed": changed / total if total else 0.0,
    }


def _piece(files: InputFiles, path: Path, offset: int, count: int, dtype: str) -> Tensor:
    raw = bytearray(count)
    files.read(path, memoryview(raw), offset)
    return torch.frombuffer(raw, dtype=TORCH_DTYPES[dtype])
