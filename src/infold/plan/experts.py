"""PEFT's `target_parameters`: LoRA on a parameter of a module, mostly the experts of a layer.

The keys of a file tell the module and not the parameter. Where several parameters of a module have
an update, PEFT nests its wrappers, `experts.base_layer.lora_A` and `experts.lora_A`; which of them
is whose, the shapes tell.

In memory transformers holds the experts of a layer as one parameter. On disk they are that, or a
weight each, as in older checkpoints; then an update goes, part by part, into all of them.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from infold.adapters import Settings
from infold.adapters.exact import slices_for
from infold.formats import NoFold
from infold.plan.edits import Operation
from infold.plan.kinds import model_types

if TYPE_CHECKING:
    from infold.plan.consume import Consumer

__all__ = ["consume_parameters"]

_WRAPPER = ".base_layer"
# A parameter -> what it consists of where experts are alone, in the order of its outputs.
_ALONE: dict[str, tuple[tuple[str, ...], ...]] = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "gate_proj": (("gate_proj",), ("w1",)),
    "up_proj": (("up_proj",), ("w3",)),
    "down_proj": (("down_proj",), ("w2",)),
}
_AROUND = ("mlp", "block_sparse_moe", "feed_forward", "moe")  # what holds experts and a router
# Models whose updates are (in, out) to the experts on disk, and those where they are (out, in).
# Of neither are those whose experts transformers turns on loading, such as qwen3_vl_moe.
_FLIPPED = frozenset(("gpt_oss", "openai_privacy_filter"))
_STRAIGHT = frozenset(
    "mixtral minimax minimax_m2 phimoe jamba qwen2_moe qwen3_moe qwen3_next qwen3_5_moe "
    "qwen3_5_moe_text qwen3_omni_moe deepseek_v2 deepseek_v3 deepseek_v32 kimi_k2 olmoe flex_olmo "
    "dots1 glm4_moe glm4_moe_lite glm4v_moe ernie4_5_moe hunyuan_v1_moe lfm2_moe llama4 "
    "llama4_text solar_open".split()
)
_PEFT = 19  # 0.19 is the first that knows which dimension of an expert its outputs are
_MOST = 6  # parameters of a module; which update is whose takes all their orders


@dataclass(frozen=True)
class _Parameter:
    """A parameter of the model in memory, and where it is on disk."""

    path: str
    shape: tuple[int, ...]  # (experts, ., .), or (out, in)
    tensor: str = ""  # that holds all of it, or
    alone: tuple[tuple[str, ...], ...] = ()  # by expert its modules, in the order of the outputs
    outputs: tuple[int, ...] = ()  # of each of these

    @property
    def experts(self) -> int:
        return self.shape[0] if len(self.shape) == 3 else 1

    def ways(self, a: Sequence[int], b: Sequence[int]) -> list[bool]:
        """How factors of these shapes make an update of it: straight, flipped, or both ways."""
        if len(self.shape) not in (2, 3) or not self.experts:
            return []
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or not a[0] or a[0] % self.experts:
            return []
        last = self.shape[-2:]
        found = [flipped for flipped in (False, True) if self._is(last, a[1], b[0], flipped)]
        return found if len(self.shape) == 3 else [way for way in found if not way]

    def _is(self, last: tuple[int, ...], inputs: int, outputs: int, flipped: bool) -> bool:
        return last == ((inputs, outputs) if flipped else (outputs, inputs))


def consume_parameters(consumer: Consumer, modules: Mapping[str, dict[str, str]]) -> set[str]:
    """Edits for what an adapter has on parameters. Returns the keys of `modules` that these are."""
    targets = consumer.config.fields.get("target_parameters") or ()
    if not targets:
        return set()
    wrapped: dict[str, list[str]] = {}
    for module in modules:
        path = module
        while path.endswith(_WRAPPER):
            path = path.removesuffix(_WRAPPER)
        wrapped.setdefault(path, []).append(module)
    done: set[str] = set()
    for path, mine in wrapped.items():
        meant = _names(targets, path)
        found = [p for name in meant if (p := _locate(consumer, path, name)) is not None]
        if found:
            _assign(consumer, path, found, {module: modules[module] for module in mine})
        elif _is_experts(path, meant):
            for module in mine:
                _not_there(consumer, path, meant, modules[module])
        else:
            continue
        done.update(mine)
    return done


def _names(targets: Collection[str], path: str) -> list[str]:
    """The parameters of a module that `target_parameters` may mean."""
    names = dict.fromkeys(target.rpartition(".")[2] for target in targets)
    return [
        name
        for name in names
        if any(f".{path}.{name}".endswith(f".{target}") for target in targets)
    ]


def _is_experts(path: str, meant: Collection[str]) -> bool:
    return bool(meant) and path.rpartition(".")[2] == "experts"


def _not_there(
    consumer: Consumer, path: str, meant: Sequence[str], parts: Mapping[str, str]
) -> None:
    if (quantized := consumer.quantized(path)) is not None:
        consumer.into_scales("lora", path, path, dict(parts), *quantized)
        return
    names = " or ".join(meant)
    where = "a GGUF file" if consumer.draft.base.is_gguf else "the base"
    near = consumer.draft.names.nearest(f"{path}.{meant[0]}.weight")
    for key in parts.values():
        consumer.refuse(
            key,
            f"{where} has no {names} of {path} that infold knows, neither in one tensor nor expert "
            f"by expert{consumer.instead or near}",
        )


# --- where a parameter is ------------------------------------------------------------------------


def _locate(consumer: Consumer, path: str, name: str) -> _Parameter | None:
    if name == "weight" and consumer.quantized(path) is not None:
        return None  # which is refused as any module of its kind
    for place in _places(path):
        if (tensor := _find(consumer, f"{place}.{name}")) is not None:
            return _Parameter(f"{path}.{name}", consumer.draft.base.info(tensor).shape, tensor)
        for parts in _ALONE.get(name, ()):
            if found := _alone(consumer, f"{path}.{name}", place, parts):
                return found
    return None


def _places(path: str) -> list[str]:
    """The path itself first, then with what else is known to be around such a module."""
    above, _, last = path.rpartition(".")
    higher, _, around = above.rpartition(".")
    if around not in _AROUND:
        return [path]
    return [path, *(f"{higher}.{other}.{last}" for other in _AROUND if other != around)]


def _find(consumer: Consumer, parameter: str) -> str | None:
    try:
        return consumer.draft.names.find(parameter)
    except LookupError:
        return None


def _alone(consumer: Consumer, path: str, place: str, parts: tuple[str, ...]) -> _Parameter | None:
    """A parameter that is a weight of each expert, or several of each."""
    experts: list[tuple[str, ...]] = []
    sizes: set[tuple[tuple[int, int], ...]] = set()
    for number in itertools.count():
        modules = tuple(f"{place}.{number}.{part}" for part in parts)
        mine = [_size(consumer, module) for module in modules]
        if None in mine:
            break
        experts.append(modules)
        sizes.add(tuple(size for size in mine if size is not None))
    if len(sizes) != 1:
        return None
    size = sizes.pop()
    if len({inputs for _, inputs in size}) != 1:
        return None
    outputs = tuple(out for out, _ in size)
    shape = (len(experts), sum(outputs), size[0][1])
    return _Parameter(path, shape, alone=tuple(experts), outputs=outputs)


def _size(consumer: Consumer, module: str) -> tuple[int, int] | None:
    """(outputs, inputs) of an expert's module."""
    if (quantized := consumer.quantized(module)) is not None:
        stored, form = quantized
        try:
            return form.shape(stored)
        except NoFold:
            return None
    name = _find(consumer, f"{module}.weight")
    if name is None:
        return None
    shape = consumer.draft.base.info(name).shape
    return (shape[0], shape[1]) if len(shape) == 2 else None


# --- whose an update is --------------------------------------------------------------------------


def _assign(
    consumer: Consumer,
    path: str,
    found: Sequence[_Parameter],
    wrapped: Mapping[str, dict[str, str]],
) -> None:
    keys = [next(iter(parts.values())) for parts in wrapped.values()]
    if max(len(found), len(wrapped)) > _MOST:
        told = f"{len(wrapped)} updates of {len(found)} parameters of {path}"
        consumer.refuse(keys[0], f"{told}; infold tells apart at most {_MOST}")
        return
    for parts in wrapped.values():
        if set(parts) != {"lora_A", "lora_B"} or consumer.config.fields.get("use_dora"):
            told = ", ".join(sorted(parts))
            consumer.refuse(keys[0], f"{told} on parameters of {path}: only plain LoRA is known")
            return
    shapes = [(consumer.shape(p["lora_A"]), consumer.shape(p["lora_B"])) for p in wrapped.values()]
    orders = (
        chosen
        for chosen in itertools.permutations(found, len(wrapped))
        if all(p.ways(*shape) for p, shape in zip(chosen, shapes, strict=True))
    )
    fitting = list(itertools.islice(orders, 2))
    told = " and ".join(f"{p.path.rpartition('.')[2]} {list(p.shape)}" for p in found)
    for key, (a, b) in zip(keys, shapes, strict=True):
        if not fitting:
            consumer.refuse(
                key, f"lora_A {list(a)} and lora_B {list(b)} make no update of {told} of {path}"
            )
        elif len(fitting) > 1:
            consumer.refuse(key, f"could belong to more than one of {told} of {path}")
    if len(fitting) == 1:
        ways = [p.ways(*shape) for p, shape in zip(fitting[0], shapes, strict=True)]
        told_by = {
            way[0]
            for p, way in zip(fitting[0], ways, strict=True)
            if len(p.shape) == 3 and len(way) == 1
        }
        for parameter, parts, shape in zip(fitting[0], wrapped.values(), shapes, strict=True):
            _update(consumer, parameter, parts, *shape, told_by)


def _update(
    consumer: Consumer,
    parameter: _Parameter,
    parts: dict[str, str],
    a: Sequence[int],
    b: Sequence[int],
    others: Collection[bool],
) -> None:
    """others: the ways of the module's updates that fit in one way only."""
    key, experts = parts["lora_A"], parameter.experts
    scaling = consumer.scaling(parameter.path, key, a[0] // experts)
    flipped = _flipped(consumer, parameter, key, parameter.ways(a, b), others)
    if scaling is None or flipped is None:
        return
    own = Settings(scaling=scaling, experts=experts if len(parameter.shape) == 3 else 0)
    if parameter.tensor:
        width = parameter.shape[-1] if own.experts else 0
        settings = replace(own, width=width, flipped=flipped, out=parameter.shape[-2])
        _edit(consumer, parameter.path, parameter.tensor, parts, settings, a[0] // experts)
        return
    for number, modules in enumerate(parameter.alone):
        first = 0
        for module, out in zip(modules, parameter.outputs, strict=True):
            if (quantized := consumer.quantized(module)) is not None:
                consumer.into_scales("lora", module, module, parts, *quantized)
            elif (name := _find(consumer, f"{module}.weight")) is not None:
                settings = replace(own, expert=number, first=first, out=out)
                _edit(consumer, parameter.path, name, parts, settings, a[0] // experts)
            first += out


def _edit(
    consumer: Consumer,
    path: str,
    tensor: str,
    parts: dict[str, str],
    settings: Settings,
    rank: int,
) -> None:
    if consumer.twice(tensor, "lora", parts["lora_A"]):
        return
    state = consumer.draft.state(tensor)
    settings = replace(settings, slices=slices_for(state.dtype, rank))
    state.operations.append(Operation("lora", consumer.number, path, parts, settings))


def _flipped(
    consumer: Consumer,
    parameter: _Parameter,
    key: str,
    ways: Sequence[bool],
    others: Collection[bool],
) -> bool | None:
    """Whether the stored matrix of an expert is (in, out). None: it cannot be told, or used."""
    way: bool | None = ways[0]
    if len(ways) == 2:
        way = next(iter(others)) if len(others) == 1 else _way_of_its_kind(consumer)
    if way is None:
        consumer.refuse(
            key,
            f"{parameter.path} has square experts, and nothing tells which side are their outputs: "
            "that takes an adapter of PEFT 0.19 or later and a base whose config.json has a "
            "model_type that infold knows, or an update of another parameter of this module that "
            "is not square; or merge in memory, by infold.load and merge_and_unload",
        )
    elif way and parameter.alone:
        consumer.refuse(
            key,
            f"was trained on experts stored as (in, out), and those of {parameter.path} are "
            "single weights (out, in) here; save it with PEFT 0.19 or later",
        )
        way = None
    return way


def _way_of_its_kind(consumer: Consumer) -> bool | None:
    """What the base's kind of model tells; None: nothing, since a guess could merge wrongly."""
    version = re.match(r"0\.(\d+)\b", str(consumer.config.fields.get("peft_version") or "0.0"))
    if version and int(version[1]) < _PEFT:
        return None
    kinds = model_types(consumer.draft.base.config or {})
    flipped, straight = not kinds.isdisjoint(_FLIPPED), not kinds.isdisjoint(_STRAIGHT)
    return flipped if flipped != straight else None
