"""The values that a plan consists of: operations on tensors, files of the output. Frozen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from infold.adapters import METHODS, Settings
from infold.checkpoint.adapter import Adapter
from infold.checkpoint.safetensors import Header
from infold.checkpoint.shards import Checkpoint
from infold.formats.values import Scheme

__all__ = [
    "Amended",
    "BaseTensor",
    "Decoded",
    "Edit",
    "Nested",
    "Operation",
    "Original",
    "OutputShard",
    "Part",
    "Plan",
    "Replacement",
    "Source",
    "describe",
]


@dataclass(frozen=True)
class BaseTensor:
    """The values come from this tensor of the base."""

    name: str


@dataclass(frozen=True)
class Replacement:
    """The values come from a tensor of an adapter: a saved module, a bias, a resized embedding."""

    adapter: int
    key: str


@dataclass(frozen=True)
class Decoded:
    """The values come from the parts of a quantized module: (name in its format, tensor)."""

    module: str
    form: str  # key in VALUES
    scheme: Scheme
    parts: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Original:
    """The values come from this tensor of the unquantized original of the base."""

    name: str


@dataclass(frozen=True)
class Part:
    """One part of a module that is quantized again. `values`: the edit of its dense weight, which
    all parts of the module share. `stored`: the base's parts, as in Decoded."""

    part: str
    values: Edit
    form: str
    scheme: Scheme
    stored: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Amended:
    """These bytes, which the plan has made from the base's tensor."""

    name: str
    data: bytes


@dataclass(frozen=True)
class Nested:
    """Scales of a module that are quantized themselves and become plain: their values, the tensors
    that are gone then, and those with other bytes."""

    source: Decoded
    removed: tuple[str, ...]
    amended: Mapping[str, bytes]


Source = BaseTensor | Replacement | Decoded | Original | Part | Amended


@dataclass(frozen=True)
class Operation:
    """One method of one adapter on one tensor."""

    method: str  # key in METHODS
    adapter: int  # number of the adapter, in the order of the command
    module: str  # its path in memory, as the adapter file spells it
    parts: Mapping[str, str]  # part name -> key in the adapter file
    settings: Settings
    transposed: bool = False  # stored as (in, out): Conv1D, embeddings
    on_bias: bool = False
    moved: bool = False  # from its module's inputs to the rows that make them; see plan/fold.py


@dataclass(frozen=True)
class Edit:
    """What happens to one tensor of the output. No operation: its source is only copied or cast.

    exponent: of a power of two that multiplies it after the operations; see plan/room.py.
    """

    tensor: str
    source: Source
    dtype: str  # stored dtype of the output
    shape: tuple[int, ...]
    operations: tuple[Operation, ...]
    scales: bool = False  # the tensor's floats are scales of a quantized weight
    exponent: int = 0


@dataclass(frozen=True)
class OutputShard:
    """One safetensors file of the output. `header` is final before the first tensor is written."""

    name: str
    header: Header
    source: int  # number of the base's shard with the same name
    same_layout: bool  # every tensor keeps its place, so unedited ranges move as they are


@dataclass(frozen=True)
class Plan:
    """Everything that a merge will do, decided from headers."""

    base: Checkpoint
    adapters: tuple[Adapter, ...]
    edits: Mapping[str, Edit]  # by tensor of the output
    shards: tuple[OutputShard, ...]
    rewritten: Mapping[str, bytes]  # side files whose content changes: config.json, the index
    copied: tuple[str, ...]  # side files copied as bytes
    notes: tuple[str, ...] = field(default=())  # what the user should know
    original: Checkpoint | None = None  # the unquantized base that some values come from
    conversion: Mapping[str, Any] | None = None  # how quantized modules are converted, for receipts

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """Those that values come from."""
        return (self.base,) if self.original is None else (self.base, self.original)

    @property
    def nbytes(self) -> int:
        """Size of the output in bytes, without side files that are only copied."""
        return sum(s.header.file_size for s in self.shards) + sum(map(len, self.rewritten.values()))

    @property
    def edited_bytes(self) -> int:
        return sum(
            s.header.tensors[e].nbytes
            for s in self.shards
            for e in s.header.tensors
            if e in self.edits
        )

    def summary(self) -> dict[str, Any]:
        """The plan as JSON-ready values."""
        return {
            "tensors": sum(len(shard.header.tensors) for shard in self.shards),
            "edited_tensors": len(self.edits),
            "edited_bytes": self.edited_bytes,
            "output_bytes": self.nbytes,
            "shards": [shard.name for shard in self.shards],
            "notes": list(self.notes),
            "edits": [describe(edit) for edit in self.edits.values()],
        }


def describe(edit: Edit) -> dict[str, Any]:
    """One edit as JSON-ready values, as the receipt and --json show it."""
    operations = []
    for op in edit.operations:
        entry: dict[str, Any] = {"method": op.method, "adapter": op.adapter, "module": op.module}
        if op.moved:
            entry["moved"] = True
        operations.append(entry | METHODS[op.method].describe(op.settings))
    told = {
        "tensor": edit.tensor,
        "dtype": edit.dtype,
        "shape": list(edit.shape),
        "source": _told(edit.source),
        "operations": operations,
    }
    return told | {"exponent": edit.exponent} if edit.exponent else told


def _told(source: Source) -> dict[str, Any]:
    """A source as JSON-ready values."""
    if isinstance(source, BaseTensor):
        return {"base": source.name}
    if isinstance(source, Replacement):
        return {"adapter": source.adapter, "key": source.key}
    if isinstance(source, Decoded):
        return {"decoded": source.module, "format": _type(source.form, source.scheme)}
    if isinstance(source, Original):
        return {"original": source.name}
    if isinstance(source, Amended):
        return {"base": source.name, "amended": True}
    written = _type(source.form, source.scheme)
    return {**_told(source.values.source), "requantized": written}


def _type(form: str, scheme: Scheme) -> str:
    """A format as people call it; of a GGUF file the type of the tensor."""
    return scheme.kind if form == "ggml" else form
