"""The receipt: what was merged into what, so that anyone can check it or do it again."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Receipt"]


@dataclass(frozen=True)
class Receipt:
    """The result of a merge. Digests are BLAKE3, in hex, by file name."""

    infold: str  # version
    out: str
    base: dict[str, Any]  # path, shards: {name: digest}
    adapters: list[dict[str, Any]]  # path, method, files: {name: digest}
    shards: dict[str, str]  # of the output
    sha256: dict[str, str]  # of the output's shards, where asked for
    edits: list[dict[str, Any]]  # tensor, dtype, operations, unchanged: share of equal elements
    tensors: int  # of the output
    bytes: int  # of the output's shards
    edited_bytes: int
    resumed_bytes: int  # of an interrupted run, checked and kept
    notes: list[str]
    seconds: float
    peak_memory: int  # bytes, resident, of the whole process
    threads: int
    device: str

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"
