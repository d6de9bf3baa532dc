"""The receipt: what was merged into what, so that anyone can check it or do it again."""

from __future__ import annotations

import builtins
import json
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Receipt"]


@dataclass(frozen=True)
class Receipt:
    """The result of `infold.merge`, and the content of infold-receipt.json.

    Digests are BLAKE3 in hex, by file name. Sizes are bytes.

    infold: the version. out: the output's absolute path.
    base: {path, shards: {name: digest}}. adapters: a list of {path, method, files: {name: digest}}.
    Paths are absolute, or Hub ids as they were given.
    shards: digests of the output's shards. sha256: the same as SHA-256, where asked for.
    side_files: digests of all its other files but the receipt and the undo record.
    edits: one for each edited tensor: {tensor, dtype, shape, source, operations, unchanged}.
    unchanged is the share of elements that rounding left as they were; None where an interrupted
    run had written a part of the tensor.
    Where float16 or E4M3 scales of quantized weights were edited there is also rounding: {scales,
    subnormal, zero, error}, of which so many are below the normal range, so many fell to zero;
    error is relative, in the Frobenius norm of these scales.
    Of ggml's types, which hold their scales themselves, `unchanged` is the share of the scales.
    tensors: of the output. bytes: of its shards. edited_bytes: of its edited tensors.
    resumed_bytes: left by an interrupted run, checked and kept.
    notes: what the plan and the rounding of scales told. seconds: from the first byte written to
    the receipt; in the file of an edit in place, to the end of its rehearsal.
    undo: of the undo record, {file, bytes, adapters, side_files, blake3}; None where there is none.
    So many of its bytes are a copy of the adapters, and of the base's side files.
    conversion: how quantized modules were converted, {mode, dtype, touched, beside, original}:
    modules that an adapter touches, and others that became dense with them; else None. Their edits
    have an "error", of what was written against the exact values, and an "update", of these against
    the values before; both relative to the values, in the Frobenius norm.
    peak_memory: resident, of the whole process. threads, device: what computed.
    """

    infold: str
    out: str
    base: dict[str, Any]
    adapters: list[dict[str, Any]]
    shards: dict[str, str]
    sha256: dict[str, str]
    side_files: dict[str, str]
    edits: list[dict[str, Any]]
    tensors: int
    bytes: int
    edited_bytes: int
    resumed_bytes: int
    notes: list[str]
    seconds: float
    peak_memory: int
    threads: int
    device: str
    undo: dict[str, Any] | None = None
    conversion: dict[str, Any] | None = None

    def to_file(self) -> builtins.bytes:
        """The file. Names that are not UTF-8 become JSON's escapes of what Python made of them."""
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"
        return text.encode(errors="backslashreplace")
