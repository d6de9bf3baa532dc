"""What a quantized format gets to see of one module, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["BESIDE", "Field", "NoFold", "Scale", "Stored", "Unnested"]

# Tensors below a module that are no part of its weight, whatever its format: the bias, and static
# scales of activations and of the cache.
BESIDE = (
    "bias", "input_scale", "input_zero_point", "input_global_scale", "output_scale",
    "output_zero_point", "q_scale", "k_scale", "v_scale",
)  # fmt: skip


class NoFold(ValueError):
    """Rows of a module cannot be scaled without touching its codes. Tells why, as a sentence."""


@dataclass(frozen=True, slots=True)
class Field:
    """One stored tensor: its dtype by safetensors' name, and its shape."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Stored:
    """The tensors of one module as they lie on the disk.

    name: of the module, on the disk. tensors: by their names below the module, such as `qweight`,
    `weight.absmax`, `bias`. config: the checkpoint's quantization_config, empty without one.
    metadata: of the file that holds the weight. read: the elements of a tensor, in its stored dtype
    and shape; a plan reads only small ones.
    """

    name: str
    tensors: Mapping[str, Field]
    config: Mapping[str, Any]
    metadata: Mapping[str, str]
    read: Callable[[str], Tensor]

    def shape(self, part: str) -> tuple[int, ...] | None:
        """The shape of a tensor, None where there is no such tensor."""
        field = self.tensors.get(part)
        return None if field is None else field.shape

    def dtype(self, part: str) -> str | None:
        """The dtype of a tensor, None where there is no such tensor."""
        field = self.tensors.get(part)
        return None if field is None else field.dtype


@dataclass(frozen=True, slots=True)
class Scale:
    """A tensor of floats that is proportional to the module's rows.

    part: its name below the module. transposed: its matrix (first dimension, all others) holds the
    rows as columns. repeat: consecutive rows of it that belong to one row of the module. rows: how
    many rows of the module it has room for, if more than the module has (padding). nested: it is
    quantized itself, and becomes plain floats; see `Unnested`. lossy: it has so few bits, and no
    sign, that it is only multiplied where the user agrees. over: the scale above it, a float for
    the whole weight, which can take a power of two from it; below: that one divides.
    """

    part: str
    transposed: bool = False
    repeat: int = 1
    rows: int = 0
    nested: bool = False
    lossy: bool = False
    over: str = ""
    below: bool = False


@dataclass(frozen=True)
class Unnested:
    """What else changes where nested scales become plain, by names below the module: tensors that
    are gone, and others with their new bytes."""

    removed: tuple[str, ...]
    amended: Mapping[str, bytes]
