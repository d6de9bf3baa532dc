"""The modules of a safetensors checkpoint, some of them quantized: what `plan/fold.py` asks for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

from torch import Tensor

from infold.adapters import Settings
from infold.checkpoint.inputs import InputFiles
from infold.checkpoint.shards import Checkpoint
from infold.checkpoint.stored import ELEMENTS, stored_matrix
from infold.errors import CorruptFile
from infold.formats import (
    BESIDE,
    QUANTIZED,
    Field,
    NoFold,
    Quantized,
    Stored,
    bitsandbytes,
    format_of,
    quantized_of,
)
from infold.formats.values import VALUES, NoValues
from infold.plan.edits import Decoded, Nested
from infold.plan.fold import INSTEAD, Part, Place, Unfoldable
from infold.plan.kinds import limits, model_types
from infold.plan.layouts import is_conv1d, part_config
from infold.plan.match import Names

__all__ = ["StoredModules", "quantization_of", "rotations", "strangers", "words_of"]

_DEPTH = 3  # components of a tensor's name below its module, such as `weight.quant_state.nf4`
_ALL = slice(None)
_SMALL = 1 << 20  # bytes of a tensor that a plan reads
_ACTIVATIONS = (
    "hidden_act", "hidden_activation", "activation_function", "mlp_hidden_act", "dense_act_fn",
    "feed_forward_proj", "activation",
)  # fmt: skip
_OFFLINE = ("weight_input", "weight_output", "q_attn", "k_cache")
# Scales of activations that were measured without the adapter.
_MEASURED = (
    "input_scale", "output_scale", "input_global_scale", "k_scale", "v_scale",
    "_weight_act_quant_scale",
)  # fmt: skip
_FEW_BITS = (
    "its scales have four bits, so that multiplying them rounds each by up to 6 %; --lossy does it "
    "and tells the error, or merge into the unquantized model"
)
_CACHE = ("k_scale", "v_scale", "attn.k_scale", "attn.v_scale")
# Factors of a module's inputs, which are no matter where its rows are scaled.
_OF_INPUTS = ("pre_quant_scale",)


def quantization_of(base: Checkpoint) -> Mapping[str, Any]:
    """The config's description of how the checkpoint is quantized; empty where there is none."""
    config = base.config or {}
    inner = config.get("text_config")
    for place in (config, inner if isinstance(inner, dict) else {}):
        for name in ("quantization_config", "compression_config"):
            if isinstance(told := place.get(name), dict):
                return told
    return {}


def rotations(base: Checkpoint) -> list[str]:
    """A reason to refuse, where the config tells of matrices that multiply what goes into modules,
    or comes out of them, while the model runs: an adapter that acts there is no edit of weights.
    """
    told = quantization_of(base).get("transform_config")
    groups = told.get("config_groups") if isinstance(told, dict) else None
    if not told or (isinstance(groups, dict) and all(map(_is_offline, groups.values()))):
        return []
    return [
        f"{base.path}: quantization_config.transform_config rotates what goes into modules or "
        "comes out of them while the model runs, so what an adapter does there has no place in "
        "stored weights; merge into the unquantized model, and quantize the result"
    ]


def _is_offline(group: Any) -> bool:
    """Whether the matrices of a group are in the weights, or act past the modules."""
    applied = group.get("apply", []) if isinstance(group, dict) else None
    return isinstance(applied, list) and all(
        isinstance(entry, dict) and entry.get("location") in _OFFLINE for entry in applied
    )


def strangers(stored: Stored, parts: Collection[str], more: Collection[str] = ()) -> str:
    """What else lies below a module than its format's parts, as a sentence; empty where nothing
    does. It may have a share in the outputs (a low-rank correction, say), so nothing can be done to
    the weight alone."""
    known = {*parts, *BESIDE, *more}
    names = [part for part in stored.tensors if part not in known]
    if not names:
        return ""
    told = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"it also has {told}, which may have a share in its outputs and is not known here"


def words_of(form: Quantized, stored: Stored) -> str:
    """The format for a person, also where the module is broken."""
    try:
        return form.words(stored)
    except (NoFold, CorruptFile):
        return form.NAME


class StoredModules:
    """`plan/fold.Modules` of a checkpoint. Modules go by their paths in memory.

    lossy: whether scales of four bits may be multiplied, which rounds them.
    """

    def __init__(self, base: Checkpoint, names: Names, lossy: bool = False) -> None:
        self.base, self.names, self.lossy = base, names, lossy
        self.config = quantization_of(base)
        self._found: dict[str, tuple[Stored, Quantized] | None] = {}
        self.nested: dict[str, Nested] = {}  # by the tensor of such scales, once they are places

    @cached_property
    def _below(self) -> dict[str, dict[str, str]]:
        """Module on the disk -> {name of a tensor below it: its whole name}."""
        below: dict[str, dict[str, str]] = defaultdict(dict)
        for name in self.base.where:
            components = name.split(".")
            for depth in range(1, min(_DEPTH, len(components) - 1) + 1):
                below[".".join(components[:-depth])][".".join(components[-depth:])] = name
        return below

    @cached_property
    def _children(self) -> dict[str, set[str]]:
        children: dict[str, set[str]] = defaultdict(set)
        for name in self.base.where:
            components = name.split(".")
            for depth in range(len(components) - 1):
                children[".".join(components[:depth])].add(components[depth])
        return children

    @cached_property
    def _cores(self) -> list[str]:
        """What weights are called here; nothing but `weight` where nothing is quantized."""
        known = dict.fromkeys(name for form in QUANTIZED.values() for name in form.CORE)
        leaves = {name.rpartition(".")[2] for name in self.base.where}
        return [core for core in known if core in leaves]

    def find(self, module: str) -> tuple[Stored, Quantized] | None:
        """A quantized module, and its format; None where the base has no such module, or stores its
        weight as floats. Raises LookupError where the path may be one of several."""
        if module not in self._found:
            self._found[module] = self._find(module)
        return self._found[module]

    def _find(self, module: str) -> tuple[Stored, Quantized] | None:
        tried = set()
        for core in self._cores:
            tensor = self.names.find(f"{module}.{core}")
            place = None if tensor is None else tensor.removesuffix(f".{core}")
            if tensor is None or place is None or place in tried:
                continue
            tried.add(place)
            if core == "weight" and self._is_dense(place, tensor):
                return None
            stored = self._stored(place, tensor)
            form = quantized_of(stored)
            if form is not None:
                return stored, form
        return None

    def _is_dense(self, place: str, weight: str) -> bool:
        """Whether a weight is stored as floats. Codes of bitsandbytes may be called floats too."""
        codes = any(f"{place}.{state}" in self.base.where for state in bitsandbytes.STATES)
        return format_of(self.base.info(weight).dtype) is not None and not codes

    def _stored(self, place: str, core: str) -> Stored:
        below = self._below[place]
        fields = {
            part: Field(info.dtype, info.shape)
            for part, name in below.items()
            for info in [self.base.info(name)]
        }
        metadata = self.base.shards[self.base.where[core]].header.metadata
        return Stored(
            place, fields, self.config, metadata, lambda part: read(self.base, below[part])
        )

    def all(self) -> Iterator[tuple[Stored, Quantized]]:
        """Every quantized module, in the order of the files."""
        for place, below in self._below.items():
            core = next((part for part in below if part in self._cores), None)
            if core is None or (core == "weight" and self._is_dense(place, below[core])):
                continue
            stored = self._stored(place, below[core])
            form = quantized_of(stored)
            if form is not None:
                yield stored, form

    def measured(self, module: str) -> list[str]:
        """Tensors of a quantized module that were measured without the adapter: static scales of
        its activations, and of the cache of keys and values beside it."""
        found = self.find(module)
        if found is None:
            return []
        here = self._below[found[0].name]
        names = [here[part] for part in _MEASURED if part in here]
        if module.endswith(("k_proj", "v_proj", "qkv_proj", "key", "value")):
            above = self._below.get(found[0].name.rpartition(".")[0], {})
            names += [above[part] for part in _CACHE if part in above]
        return names

    # --- what `fold` asks for

    def beside(self, module: str) -> Collection[str]:
        place = self._place(module)
        return self._children[place.rpartition(".")[0]] if place is not None else set()

    def _place(self, module: str) -> str | None:
        """A module's path on the disk."""
        if (found := self.find(module)) is not None:
            return found[0].name
        weight = self.names.find(f"{module}.weight")
        return None if weight is None else weight.removesuffix(".weight")

    def size(self, module: str) -> tuple[int, int] | None:
        if (found := self.find(module)) is not None:
            stored, form = found
            try:
                return form.shape(stored)
            except NoFold as error:
                raise Unfoldable(str(error)) from None
        weight = self.names.find(f"{module}.weight")
        if weight is None or len(self.base.info(weight).shape) != 2:
            return None
        rows, columns = self.base.info(weight).shape
        return (columns, rows) if self._transposed(weight) else (rows, columns)

    def _transposed(self, weight: str) -> bool:
        transposed = is_conv1d(self.base, weight, False)
        if transposed is None:
            raise Unfoldable(f"{weight} is square, and nothing tells whether it is transposed")
        return transposed

    def places(self, module: str, part: Part | None) -> list[Place]:
        size = self.size(module)
        if size is None:
            raise Unfoldable(f"{module}, which the base does not have")
        rows = size[0] if part else 0
        whole = Settings(side="out", out=size[0], first=part.first if part else 0, rows=rows)
        found, bias = self.find(module), self._place(module)
        assert bias is not None
        places = []
        if found is None:
            weight = f"{bias}.weight"
            if format_of(self.base.info(weight).dtype) is None:
                raise Unfoldable(
                    f"{module}, stored as {self.base.info(weight).dtype} in a way that is unknown"
                )
            places.append(Place(weight, whole, self._transposed(weight)))
        else:
            stored, form = found
            places += self._scales(module, stored, form, whole)
        bias = f"{bias}.bias"
        if bias in self.base.where:
            if self.base.info(bias).shape != (size[0],):
                raise Unfoldable(
                    f"{module}, the bias of which has shape {list(self.base.info(bias).shape)}"
                )
            places.append(Place(bias, whole, on_bias=True))
        return places

    def _scales(
        self, module: str, stored: Stored, form: Quantized, whole: Settings
    ) -> Iterator[Place]:
        """The places of the rows of a quantized module."""
        try:
            scales = form.scales(stored)
            if told := strangers(stored, form.PARTS, _OF_INPUTS):
                raise NoFold(told)
            for scale in scales:
                tensor = f"{stored.name}.{scale.part}"
                if scale.nested:
                    self.nested[tensor] = _nested(stored)
                elif scale.lossy and not self.lossy:
                    raise NoFold(_FEW_BITS)
                elif format_of(dtype := stored.tensors[scale.part].dtype, scale.lossy) is None:
                    raise NoFold(f"its scales are {dtype}")
                settings = replace(whole, repeat=scale.repeat, rows=scale.rows or whole.rows)
                yield Place(
                    tensor, settings, scale.transposed, scales=True, nested=scale.nested,
                    lossy=scale.lossy,
                )  # fmt: skip
        except (NoFold, NoValues) as error:
            why = f"{module} ({words_of(form, stored)}): {error}"
            raise Unfoldable(why + INSTEAD) from None

    def activations(self, module: str) -> Collection[str]:
        config = self._part(module)
        places = [place for place in (config, *config.values()) if isinstance(place, dict)]
        return {
            value.removeprefix("gated-")
            for name in _ACTIVATIONS
            for place in places
            if isinstance(value := place.get(name), str)
        }

    def limits(self) -> Collection[str]:
        return limits(self.base.config or {})

    def model_types(self, module: str) -> Collection[str]:
        return model_types(self._part(module))

    def _part(self, module: str) -> Mapping[str, Any]:
        """The config of the part of the model that a module is in."""
        return part_config(self.base, self._place(module) or module)


def read(base: Checkpoint, name: str) -> Tensor:
    """A small tensor of a checkpoint that tells how a module is quantized.

    Raises CorruptFile for one that is large, or of a dtype that tells nothing.
    """
    info = base.info(name)
    path = base.shards[base.where[name]].path
    if info.dtype not in ELEMENTS or info.nbytes > _SMALL:
        raise CorruptFile(
            f"{path}: {name}: {info.nbytes:,} bytes of {info.dtype} cannot tell how a module is "
            "quantized"
        )
    files = InputFiles()
    try:
        return stored_matrix(base, files, name)[_ALL, _ALL].view(info.shape)
    finally:
        files.close()


def _nested(stored: Stored) -> Nested:
    """Nested scales of bitsandbytes as plain ones. Raises NoValues, NoFold."""
    values = VALUES["bitsandbytes_absmax"]
    parts = tuple((part, f"{stored.name}.{part}") for part in values.PARTS)
    source = Decoded(stored.name, "bitsandbytes_absmax", values.scheme(stored), parts)
    changes = bitsandbytes.unnested(stored)
    return Nested(
        source,
        tuple(f"{stored.name}.{part}" for part in changes.removed),
        {f"{stored.name}.{part}": data for part, data in changes.amended.items()},
    )
