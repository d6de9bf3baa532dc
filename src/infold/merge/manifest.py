"""The manifest of an undo record, read as if it were hostile: adapters and edits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from infold.adapters import METHODS, Settings
from infold.checkpoint.adapter import Adapter, AdapterTensor
from infold.checkpoint.record import FILE, Record
from infold.checkpoint.safetensors import DTYPE_BITS
from infold.errors import CorruptFile
from infold.formats import floats_of
from infold.plan.edits import BaseTensor, Edit, Operation, Replacement

__all__ = ["ODD", "as_told", "read_adapter", "read_edit"]

# What reading values of other kinds than those expected ends in.
ODD = (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError)
_COUNTS = ("kernel", "groups", "repeat")  # of Settings, from 1 on
_NUMBERS = ("out", "rank", "first", "rows", "width", "experts")  # from 0 on
_LISTS = ("tokens", "view", "order")
_LARGEST = 1 << 48
_POWERS = 1000  # of two, in float64


@contextmanager
def as_told(where: str) -> Iterator[None]:
    """A block that computes with what a record tells: where that does not fit together, the record
    is to blame."""
    try:
        yield
    except (*ODD, RuntimeError) as error:
        if type(error).__name__ == "OutOfMemoryError":  # CUDA's
            raise
        raise CorruptFile(
            f"{where}: the edit that the record tells of does not fit this tensor ({error})"
        ) from error


def read_adapter(record: Record, number: int, entry: Mapping[str, Any]) -> Adapter:
    """An adapter whose tensors are read from the record's own file."""
    frame = record.frames[FILE, number]
    position, tensors = frame.begin, {}
    for key, dtype, shape in entry["tensors"]:
        if not _counts(shape, 0):
            raise ValueError(f"{key} has the shape {shape}")
        end = position + DTYPE_BITS[dtype] // 8 * math.prod(shape)
        tensors[str(key)] = AdapterTensor(dtype, tuple(shape), position, end)
        position = end
    if position != frame.begin + frame.length:
        raise CorruptFile(f"{record.path}: an adapter's tensors do not fill their place")
    if not isinstance(entry["config"], dict):
        raise ValueError("an adapter's config is no object")
    return Adapter(record.path, entry["config"], tensors, record.path)


def read_edit(name: str, entry: Mapping[str, Any], adapters: Sequence[Adapter]) -> Edit:
    """The mirror of `dataclasses.asdict`. Raises one of ODD for what no plan makes."""
    source, dtype, shape = entry["source"], entry["dtype"], entry["shape"]
    if not isinstance(dtype, str) or not _counts(shape, 0):
        raise ValueError(f"{name} has the dtype {dtype!r} and the shape {shape!r}")
    if floats_of(dtype, tuple(shape)) is None:
        raise ValueError(f"{name}: {dtype} is never edited")
    operations = tuple(_operation(name, op, shape, adapters) for op in entry["operations"])
    came: BaseTensor | Replacement
    if "name" in source:
        came = BaseTensor(source["name"])
    else:
        came = Replacement(**source)
        _tensor(adapters, came.adapter, came.key)
    exponent = entry.get("exponent", 0)
    if type(exponent) is not int or abs(exponent) > _POWERS:
        raise ValueError(f"{name}: the exponent {exponent!r}")
    scales = bool(entry.get("scales", False))
    return Edit(name, came, dtype, tuple(shape), operations, scales, exponent)


def _operation(
    name: str, op: Mapping[str, Any], shape: Sequence[int], adapters: Sequence[Adapter]
) -> Operation:
    if op["method"] not in METHODS:
        raise CorruptFile(f"{name}: merged by {op['method']!r}, a method unknown here")
    method = METHODS[op["method"]]
    made = Operation(**{**op, "settings": _settings(op["settings"])})
    if not all(type(flag) is bool for flag in (made.transposed, made.on_bias, made.moved)):
        raise ValueError(f"{name}: {op['method']} in no layout")
    if (made.settings.width and not _of_an_expert(made)) or not _of_experts(made, shape):
        raise ValueError(f"{name}: an expert's rows in a layout that no merge makes")
    needed = method.ON_BIAS if made.on_bias else method.REQUIRED
    if not set(needed) <= made.parts.keys() <= set(method.PARTS):
        raise ValueError(f"{name}: {op['method']} of the parts {list(made.parts)}")
    for key in made.parts.values():
        _tensor(adapters, made.adapter, key)
    if not _within(made, shape, adapters[made.adapter]):
        raise ValueError(f"{name}: {op['method']} of more elements than the tensor has")
    return made


def _within(made: Operation, shape: Sequence[int], adapter: Adapter) -> bool:
    """Whether a vector, once it is spread over rows or over a convolution's kernel, has no more
    elements than the tensor: a few bytes of a record could ask for any memory."""
    told, most = made.settings, math.prod(shape)
    vectors = (math.prod(adapter.tensors[key].shape) for key in made.parts.values())
    return told.rows <= most and (told.side == "out" or told.kernel * max(vectors) <= most)


def _of_an_expert(made: Operation) -> bool:
    """Whether outputs that lie within a row are scaled as a plan does it: in their order."""
    told = made.settings
    in_order = not (told.view or told.order) and told.repeat == 1
    return not made.on_bias and told.side == "out" and in_order


def _of_experts(made: Operation, shape: Sequence[int]) -> bool:
    """Whether experts are updated as a plan does it: of LoRA, and all of them a row of the tensor
    each. True where there are none."""
    told = made.settings
    if not told.experts:
        return not told.flipped
    if made.method != "lora" or made.on_bias or made.transposed:
        return False
    if told.expert >= 0:
        return not told.width and not told.flipped
    of_rows = told.width > 0 and math.prod(shape[1:]) % told.width == 0
    return of_rows and len(shape) == 3 and shape[0] == told.experts


def _tensor(adapters: Sequence[Adapter], number: Any, key: str) -> None:
    """Whether an adapter has a tensor."""
    if type(number) is not int or not 0 <= number < len(adapters):
        raise ValueError(f"adapter {number!r}, of {len(adapters)}")
    if key not in adapters[number].tensors:
        raise ValueError(f"adapter {number} has no tensor {key!r}")


def _settings(told: Mapping[str, Any]) -> Settings:
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in told.items()
    }
    made = Settings(**fields)
    whole = (
        _counts([getattr(made, name) for name in _COUNTS], 1)
        and _counts([getattr(made, name) for name in _NUMBERS], 0)
        and all(_counts(getattr(made, name), 0) for name in _LISTS)
        and made.slices in (1, 2)
        and made.root in (1, 2)
        and made.side in ("out", "in")
        and (not made.width or made.out > 0)
        and type(made.expert) is int
        and -1 <= made.expert < made.experts
        and type(made.flipped) is bool
        and isinstance(made.scaling, int | float)
        and math.isfinite(made.scaling)
    )
    if not whole:
        raise ValueError(f"settings {dict(told)}")
    return made


def _counts(values: Any, least: int) -> bool:
    return isinstance(values, list | tuple) and all(
        type(value) is int and least <= value <= _LARGEST for value in values
    )
