"""The merged folder around its tensors: headers, side files, extra files, the receipt."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infold.checkpoint.files import already_here, safe_child
from infold.checkpoint.record import UNDO
from infold.checkpoint.safetensors import Header, open_regular
from infold.checkpoint.shards import (
    CARD,
    RECEIPT,
    companion,
    is_bundled,
    is_lone,
    kept_name,
    read_receipt,
    read_shard_header,
)
from infold.errors import CorruptFile, InfoldError, Refusal
from infold.plan.choice import DTYPES, MODES, TYPES
from infold.plan.edits import OutputShard, Plan
from infold.sizes import plural
from infold.verify.verdict import Offender

__all__ = ["Claims", "claimed_inputs", "compare_header", "extra_files", "read_claims", "side_files"]

_PIECE = 1 << 20


@dataclass(frozen=True)
class Claims:
    """What a receipt says. Digests are BLAKE3, in hex, by file name."""

    base: str
    base_shards: Mapping[str, str]
    adapters: tuple[str, ...]
    adapter_files: tuple[Mapping[str, str], ...]
    shards: Mapping[str, str]
    side_files: Mapping[str, str]  # of all but the receipt and the undo record
    conversion: Mapping[str, Any] | None  # how quantized modules were converted
    undo: str | None  # of the undo record, where the receipt tells of one


def read_claims(folder: Path) -> Claims | None:
    """A merged model's receipt, or None. Raises CorruptFile for one that infold does not write."""
    path = companion(folder, RECEIPT)
    if not os.path.lexists(path):
        return None
    safe_child(path.parent, path.name)
    receipt = read_receipt(folder)

    def text(value: Any) -> str:
        if not isinstance(value, str) or not value or "\0" in value:
            raise CorruptFile(f"{path}: not a receipt that infold writes")
        return value

    def digests(value: Any) -> dict[str, str]:
        if not isinstance(value, dict):
            raise CorruptFile(f"{path}: not a receipt that infold writes")
        return {name: text(digest) for name, digest in value.items()}

    base, adapters = receipt.get("base"), receipt.get("adapters")
    if not isinstance(base, dict) or not isinstance(adapters, list) or not adapters:
        raise CorruptFile(f"{path}: not a receipt that infold writes")
    undo = receipt.get("undo")
    if undo is not None and not isinstance(undo, dict):
        raise CorruptFile(f"{path}: not a receipt that infold writes")
    conversion = receipt.get("conversion")
    if conversion is not None:
        fields: dict[str, Any] = {"mode": str, "dtype": str, "original": (str, type(None))}
        if not isinstance(conversion, dict) or not all(
            isinstance(conversion.get(name), kind) for name, kind in fields.items()
        ):
            raise CorruptFile(f"{path}: not a receipt that infold writes")
        anew = conversion["mode"] == "requantize"
        known = ("", *TYPES.values()) if anew else tuple(DTYPES.values())
        if conversion["mode"] not in MODES or conversion["dtype"] not in known:
            raise CorruptFile(f"{path}: not a receipt that infold writes")
    if not all(isinstance(adapter, dict) for adapter in adapters):
        raise CorruptFile(f"{path}: not a receipt that infold writes")
    return Claims(
        text(base.get("path")),
        digests(base.get("shards")),
        tuple(text(adapter.get("path")) for adapter in adapters),
        tuple(digests(adapter.get("files")) for adapter in adapters),
        digests(receipt.get("shards")),
        digests(receipt["side_files"]),
        conversion,
        None if undo is None else text(undo.get("blake3")),
    )


def claimed_inputs(claims: Claims) -> tuple[Path, list[Path]]:
    """Base and adapters that a receipt names, where they lie. Anyone can write a receipt, so none
    makes infold ask the Hub. Raises Refusal for what is not here."""
    places: list[Path] = []
    gone: list[str] = []
    for name in (claims.base, *claims.adapters):
        try:
            places.append(already_here(name))
        except Refusal as error:
            gone += error.reasons
    if gone:
        raise Refusal([*gone, "give base and adapters by where they are now, or by their Hub ids"])
    return places[0], places[1:]


def compare_header(
    folder: Path, planned: OutputShard
) -> tuple[tuple[Path, Header] | None, list[Offender]]:
    """The header of a shard as it lies in a folder, if it can be read, and how it differs."""
    name, wanted = planned.name, planned.header
    if not os.path.lexists(folder / name):
        missing = f"a shard with {plural('tensor', len(wanted.tensors))}"
        return None, [Offender("missing file", name, missing)]
    try:
        path = safe_child(folder, name)
        header = read_shard_header(path)
    except InfoldError as error:
        return None, [Offender("unreadable file", name, str(error))]
    if header.raw == wanted.raw:
        return (path, header), []
    offenders = []
    for tensor, info in wanted.tensors.items():
        found = header.tensors.get(tensor)
        if found is None:
            told = f"{info.dtype} {list(info.shape)} should be in {name}"
            offenders.append(Offender("missing tensor", tensor, told))
        elif (found.dtype, found.shape) != (info.dtype, info.shape):
            told = f"{found.dtype} {list(found.shape)}, not {info.dtype} {list(info.shape)}"
            offenders.append(Offender("dtype or shape", tensor, told))
    for tensor, info in header.tensors.items():
        if tensor not in wanted.tensors:
            told = f"{info.dtype} {list(info.shape)} in {name}, where none should be"
            offenders.append(Offender("extra tensor", tensor, told))
    if header.metadata != wanted.metadata:
        told = f"{_short(dict(header.metadata))}, not {_short(dict(wanted.metadata))}"
        offenders.append(Offender("metadata", name, told))
    if not offenders:
        offenders.append(Offender("header", name, "names the right tensors, but in other bytes"))
    return (path, header), offenders


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 80 else text[:77] + "..."


def side_files(folder: Path, plan: Plan) -> tuple[int, list[Offender]]:
    """How many side files are equal, and the others."""
    equal, offenders = 0, []
    for name in [*plan.copied, *plan.rewritten]:
        if not os.path.lexists(folder / name):
            offenders.append(Offender("missing file", name, "it should be beside the weights"))
            continue
        try:
            path = safe_child(folder, kept_name(folder, name))
            if name in plan.rewritten:
                difference = _differs_from(path, plan.rewritten[name])
                origin = "what the merge makes of the base's"
            else:
                difference = _differs(path, safe_child(plan.base.path, name))
                origin = "the base's"
        except InfoldError as error:
            offenders.append(Offender("unreadable file", name, str(error)))
            continue
        except OSError as error:
            told = f"{error.filename or path}: {error.strerror or error}"
            offenders.append(Offender("unreadable file", name, told))
            continue
        if difference is None:
            equal += 1
        else:
            offenders.append(Offender("side file", name, f"differs from {origin} {difference}"))
    return equal, offenders


def _differs(one: Path, two: Path) -> str | None:
    with open_regular(one) as left, open_regular(two) as right:
        sizes = [os.fstat(file.fileno()).st_size for file in (left, right)]
        if sizes[0] != sizes[1]:
            return f"in size: {sizes[0]:,} bytes, not {sizes[1]:,}"
        position = 0
        while pieces := [file.read(_PIECE) for file in (left, right)]:
            if pieces[0] != pieces[1]:
                return f"from byte {position + _common(*pieces):,} on"
            if not pieces[0]:
                return None
            position += len(pieces[0])
    return None


def _differs_from(path: Path, wanted: bytes) -> str | None:
    with open_regular(path) as file:
        found = file.read(len(wanted) + 1)
    return None if found == wanted else f"from byte {_common(found, wanted):,} on"


def _common(one: bytes, two: bytes) -> int:
    return next((n for n, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), len(one))


def extra_files(folder: Path, plan: Plan, recorded: bool) -> list[Offender]:
    """Files of the merged folder that nobody planned, and links to folders."""
    if is_lone(folder):  # what else lies in its folder is no business of a single file
        return []
    known = {shard.name for shard in plan.shards} | {*plan.copied, *plan.rewritten, RECEIPT}
    if recorded:
        known.add(UNDO)
    known |= {CARD} if os.path.lexists(folder / "deployment_config.json") else set()
    offenders = []

    def unreadable(error: OSError) -> None:
        told = error.strerror or str(error)
        offenders.append(Offender("unreadable file", str(error.filename), told))

    for where, folders, names in os.walk(folder, onerror=unreadable):
        links = [name for name in folders if os.path.islink(os.path.join(where, name))]
        for name in sorted([*names, *links]):
            relative = os.path.relpath(os.path.join(where, name), folder)
            if relative not in known and not is_bundled(relative):
                told = "neither the base nor the merge puts it there"
                offenders.append(Offender("extra file", relative, told))
    return offenders
