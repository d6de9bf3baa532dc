"""STORAGE OF ONE WEIGHT: stored parts <-> values. One file a format, one line here.

Three tables. `FORMATS` store floats one by one: a tensor is a weight. `SCALES` do so too, but only
for scales of a weight. `QUANTIZED` store the weight of
a module as codes and scales in several tensors, whose float scales are dense tensors again. ggml's
types, with scales and codes in one tensor, are a table of their own (`gguf.PACKINGS`); `floats_of`
shows the floats of any tensor as a matrix.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from infold.formats import (
    awq,
    bitsandbytes,
    compressed_tensors,
    dense,
    e4m3,
    eetq,
    fp8,
    gptq,
    hqq,
    nvfp4,
    torchao,
    unscalable,
)
from infold.formats.floats import Floats, floats_of
from infold.formats.gguf import Packing
from infold.formats.stored import BESIDE, Field, NoFold, Scale, Stored, Unnested

__all__ = [
    "BESIDE",
    "FORMATS",
    "QUANTIZED",
    "SCALES",
    "Field",
    "Floats",
    "Format",
    "NoFold",
    "Packing",
    "Quantized",
    "Scale",
    "Stored",
    "Unnested",
    "floats_of",
    "format_of",
    "quantized_of",
]


class Format(Protocol):
    """How the elements of a weight are stored.

    `encode` rounds any values. Blocks take the fast way, which gives the same bits: `narrow` from
    float64 to the dtype of `staging`, and if that is not the stored one yet, `finish`.
    """

    def accepts(self, dtype: str) -> bool:
        """Whether a safetensors dtype is of this format."""

    def torch_dtype(self, dtype: str) -> torch.dtype:
        """The torch dtype of the stored elements."""

    def decode(self, stored: Tensor, out: Tensor) -> None:
        """Stored elements into float64 `out`, exactly."""

    def encode(self, values: Tensor, dtype: str) -> Tensor:
        """float64 values, rounded once to the stored dtype, ties to even."""

    def staging(self, dtype: str) -> torch.dtype:
        """What `narrow` writes: the stored dtype, or one on the way to it."""

    def narrow(self, values: Tensor, out: Tensor) -> None:
        """float64 `values` into `out` of the dtype of `staging`, rounded once."""

    def finish(self, staged: Tensor, out: Tensor) -> Tensor:
        """A staged block (rows, columns) into `out`; returns the numbers of the columns with
        elements that may be rounded twice now, which `encode` must settle from float64 values."""


class Quantized(Protocol):
    """How the weight of a module is stored as codes and scales, in tensors of their own.

    A format is recognised by what lies there: names, dtypes and shapes, and the checkpoint's
    quantization_config where that is needed to tell two of them apart.
    """

    NAME: str  # what people call it
    CORE: tuple[str, ...]  # what every module of it has one of, by its name below the module
    PARTS: tuple[str, ...]  # all that it stores below a module; what else lies there is not its own

    def accepts(self, stored: Stored) -> bool:
        """Whether the module is of this format."""

    def shape(self, stored: Stored) -> tuple[int, int]:
        """(out, in) of the logical weight. Raises NoFold where the module does not tell it."""

    def words(self, stored: Stored) -> str:
        """The format for a person, such as "GPTQ, 4 bits, groups of 128"."""

    def scales(self, stored: Stored) -> tuple[Scale, ...]:
        """What to multiply so that rows of the weight are multiplied, and nothing else changes.

        Each of them by the same vector. Raises NoFold where there is no such thing.
        """


FORMATS: dict[str, Format] = {"dense": dense}
SCALES: dict[str, Format] = {"e4m3": e4m3}
QUANTIZED: dict[str, Quantized] = {
    "gptq": gptq,
    "awq": awq,
    "bitsandbytes": bitsandbytes,
    "nvfp4": nvfp4,
    "compressed_tensors": compressed_tensors,
    "fp8": fp8,
    "eetq": eetq,
    "hqq": hqq,
    "torchao": torchao,
    "unscalable": unscalable,
}


def format_of(dtype: str, scales: bool = False) -> Format | None:
    """The format that stores `dtype`, or None. scales: of scales, which can be of fewer bits."""
    known = {**FORMATS, **SCALES} if scales else FORMATS
    return next((form for form in known.values() if form.accepts(dtype)), None)


def quantized_of(stored: Stored) -> Quantized | None:
    """The quantized format of a module, or None."""
    return next((form for form in QUANTIZED.values() if form.accepts(stored)), None)
