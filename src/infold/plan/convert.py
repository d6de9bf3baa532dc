"""Where nothing folds: quantized modules that become dense, or are quantized again.

The plan sees a *view* of the base in which those modules are dense already: their parts are hidden,
and a weight (out, in) stands in their place. So every rule about shapes, layouts, ties and biases
is the one for dense weights. Afterwards the edits of such weights get their true source, the parts.

    dequantize   modules that an adapter touches become dense, with the siblings that servers fuse
    promote      the same for the modules of IA³ vectors that have no place in scales; others fold
    requantize   modules that an adapter touches are written in their own format again
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from infold.checkpoint.safetensors import Header, TensorInfo
from infold.checkpoint.shards import Checkpoint
from infold.formats import Field, NoFold, Stored, format_of
from infold.formats.bitsandbytes import unnested
from infold.formats.values import VALUES, NoValues, Scheme
from infold.ggml import BLOCKS
from infold.plan.choice import Choice
from infold.plan.edits import Amended, BaseTensor, Decoded, Edit, Original, Part, Source
from infold.plan.match import Names
from infold.plan.quantized import StoredModules, strangers, words_of

__all__ = [
    "Conversion",
    "Convertible",
    "convertible",
    "loaded_as",
    "original_reasons",
    "to_dense",
    "to_quantized",
    "view",
    "with_siblings",
]


@dataclass(frozen=True)
class Convertible:
    """A quantized module whose values are known."""

    stored: Stored
    form: str  # key in VALUES
    scheme: Scheme

    @property
    def weight(self) -> str:
        """The name of its dense weight."""
        return self.tensor("" if self.form == "ggml" else "weight")

    @property
    def parts(self) -> dict[str, str]:
        """Part -> tensor of the base."""
        known = VALUES[self.form].PARTS
        return {p: self.tensor(p) for p in self.stored.tensors if p in known}

    def tensor(self, part: str) -> str:
        """The name of a part. In GGUF the one part is the tensor, and gives the module its name."""
        return f"{self.stored.name}.{part}" if part else self.stored.name


def convertible(base: Checkpoint) -> tuple[dict[str, Convertible], dict[str, str]]:
    """The quantized modules of a base by their names; and why some cannot be decoded."""
    found: dict[str, Convertible] = {}
    reasons: dict[str, str] = {}
    if base.is_gguf:
        for stored in _quantized_tensors(base):
            try:
                scheme = VALUES["ggml"].scheme(stored)
                found[stored.name] = Convertible(stored, "ggml", scheme)
            except NoValues as error:
                reasons[stored.name] = str(error)
        return found, reasons
    for stored, form in StoredModules(base, Names(base.where)).all():
        name = getattr(form, "__name__", "").rpartition(".")[2]  # a key of QUANTIZED
        if name not in VALUES:
            reasons[stored.name] = f"{words_of(form, stored)} cannot be decoded here"
            continue
        try:
            scheme = VALUES[name].scheme(stored)
            if told := strangers(stored, form.PARTS):
                raise NoValues(told)
            found[stored.name] = Convertible(stored, name, scheme)
        except (NoValues, NoFold) as error:
            reasons[stored.name] = str(error)
    return found, reasons


def _quantized_tensors(base: Checkpoint) -> Iterator[Stored]:
    """The tensors of a GGUF file that consist of blocks, each as a module of one part."""

    def nothing(part: str) -> Tensor:
        raise AssertionError("nothing is read to plan a GGUF file")

    for shard in base.shards:
        for name, info in shard.header.tensors.items():
            if info.dtype in BLOCKS:
                yield Stored(name, {"": Field(info.dtype, info.shape)}, {}, {}, nothing)


def view(base: Checkpoint, modules: Iterable[Convertible], dtype: str) -> Checkpoint:
    """The base as if these modules were dense. Nothing is to be read of their weights."""
    added: dict[int, list[TensorInfo]] = {}
    hidden: set[str] = set()
    for module in modules:
        parts = module.parts
        hidden.update(parts.values())
        home = base.where[next(iter(parts.values()))]
        info = TensorInfo(module.weight, dtype, module.scheme.shape, 0, 0)
        added.setdefault(home, []).append(info)
    if not hidden:
        return base
    shards, where = [], {}
    for number, shard in enumerate(base.shards):
        tensors = {n: t for n, t in shard.header.tensors.items() if n not in hidden}
        tensors |= {info.name: info for info in added.get(number, ())}
        header = Header(tensors, shard.header.metadata, shard.header.raw, shard.header.file_size)
        shards.append(replace(shard, header=header))
        where.update(dict.fromkeys(tensors, number))
    return replace(base, shards=tuple(shards), where=where)


# Projections that vLLM and SGLang load as one, so that all of them are quantized, or none.
_FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)
_EXPERTS = re.compile(r"(.*\.experts)\.\d+\.")


def loaded_as(module: str) -> tuple[str, ...]:
    """What servers load this module as: the same for all modules that are loaded as one."""
    if expert := _EXPERTS.match(module):
        return (expert[1],)
    above, _, name = module.rpartition(".")
    return (above, *next((names for names in _FUSED if name in names), (name,)))


def of_one_kind(module: str, modules: Collection[str]) -> set[str]:
    """Modules that differ by the number of their layer alone: HQQ's config tells kinds."""

    def kind(name: str) -> str:
        return ".".join(c for c in name.split(".") if not c.isdigit())

    return {other for other in modules if kind(other) == kind(module)} - {module}


def with_siblings(touched: Collection[str], modules: Mapping[str, Convertible]) -> list[str]:
    """All modules that become dense where these do, in the order of the files."""
    together: dict[tuple[str, ...], list[str]] = {}
    for name in modules:
        together.setdefault(loaded_as(name), []).append(name)
    found: set[str] = set()
    todo = list(touched)
    while todo:
        module = todo.pop()
        if module in found:
            continue
        found.add(module)
        todo += together[loaded_as(module)]
        if modules[module].form == "hqq":
            todo += of_one_kind(module, modules)
    return [name for name in modules if name in found]


@dataclass(frozen=True)
class Conversion:
    """The edits with their true sources, and what happens to the layout."""

    edits: Mapping[str, Edit]
    removed: frozenset[str] = frozenset()  # tensors of the base that the output lacks
    place: Mapping[str, str] = field(
        default_factory=dict
    )  # new tensor -> the base's whose place it takes
    dense: tuple[str, ...] = ()  # modules that become dense
    metadata: Mapping[str, str] = field(default_factory=dict)  # entries of headers that change


def to_dense(
    edits: Mapping[str, Edit], modules: Mapping[str, Convertible], dtype: str, choice: Choice
) -> Conversion:
    """Edits of dense weights, and of the siblings that are only decoded."""
    weights = {module.weight: module for module in modules.values()}
    result: dict[str, Edit] = {}
    for name, edit in edits.items():
        module = weights.get(name)
        result[name] = (
            edit if module is None else replace(edit, source=_source(module, edit, choice))
        )
    removed: set[str] = set()
    place = {}
    metadata = {}
    for name, module in weights.items():
        parts = list(module.parts.values())
        removed.update(parts)
        place[name] = parts[0]
        if name not in result:
            result[name] = Edit(name, _decoded(module), dtype, module.scheme.shape, ())
        if module.form == "torchao":
            metadata[name] = '{"_type": "Tensor"}'
    return Conversion(result, frozenset(removed), place, tuple(modules), metadata)


def to_quantized(
    edits: Mapping[str, Edit], modules: Mapping[str, Convertible], choice: Choice
) -> Conversion:
    """Each edit of a dense weight as edits of the parts that it is written to.

    Raises NoValues, naming the module, where its format is not to be had by plain rounding.
    """
    weights = {module.weight: module for module in modules.values()}
    result: dict[str, Edit] = {}
    removed: set[str] = set()
    for name, edit in edits.items():
        module = weights.get(name)
        if module is None:
            result[name] = edit
            continue
        values = replace(edit, source=_source(module, edit, choice))
        stored = module.stored
        if choice.dtype in BLOCKS:  # another type of GGUF than the base's
            stored = replace(stored, tensors={"": Field(choice.dtype, module.scheme.shape)})
        try:
            written = VALUES[module.form].encoded(stored)
            _check_blocks(written)
        except NoValues as error:
            raise NoValues(f"{module.stored.name}: {error}") from None
        for part, entry in written.items():
            tensor, scheme = module.tensor(part), module.scheme
            if entry is None:
                removed.add(tensor)
                for name, data in unnested(module.stored).amended.items():
                    told = module.tensor(name)
                    result[told] = Edit(told, Amended(told, data), "U8", (len(data),), ())
                continue
            if entry.dtype in BLOCKS:
                scheme = replace(scheme, kind=entry.dtype)
            source = Part(part, values, module.form, scheme, tuple(module.parts.items()))
            result[tensor] = Edit(tensor, source, entry.dtype, entry.shape, edit.operations)
    return Conversion(result, frozenset(removed))


def _check_blocks(written: Mapping[str, Field | None]) -> None:
    for entry in written.values():
        elements = BLOCKS.get(entry.dtype, (1, 1))[0] if entry else 1
        if entry and entry.shape and entry.shape[-1] % elements:
            raise NoValues(f"rows of {entry.shape[-1]} are no whole blocks of {entry.dtype}")


def _decoded(module: Convertible) -> Decoded:
    return Decoded(module.stored.name, module.form, module.scheme, tuple(module.parts.items()))


def _source(module: Convertible, edit: Edit, choice: Choice) -> Source:
    """Where the values of a touched module come from."""
    if edit.source != BaseTensor(edit.tensor):
        return edit.source  # a whole module of an adapter takes its place
    if choice.original is not None:
        return Original(edit.tensor)
    return _decoded(module)


def original_reasons(original: Checkpoint, modules: Mapping[str, Convertible]) -> list[str]:
    """Why a checkpoint is not what the quantized one was made of."""
    reasons = []
    if any(module.form == "ggml" for module in modules.values()) and not original.is_gguf:
        return [
            f"{original.path}: is no GGUF file, and the base has the names and orders of rows of "
            "one; convert it without quantizing, to F16 or BF16"
        ]
    for module in modules.values():
        name = module.weight
        if name not in original.where:
            reasons.append(f"{original.path}: has no {name}, which the quantized base has")
            continue
        info = original.info(name)
        if info.shape != module.scheme.shape or format_of(info.dtype) is None:
            told = f"{info.dtype} {list(info.shape)}, not floats of {list(module.scheme.shape)}"
            reasons.append(f"{original.path}: {name} is {told}")
    return reasons
