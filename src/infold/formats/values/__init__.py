"""VALUES OF QUANTIZED MODULES: stored parts <-> float64. One file a format, one line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from infold.formats.stored import Field, Stored
from infold.formats.values import (
    awq,
    bitsandbytes,
    bitsandbytes_absmax,
    compressed_tensors,
    fp8,
    ggml,
    gptq,
    hqq,
    torchao,
)
from infold.formats.values.scheme import Matrix, NoValues, Parts, Scheme

__all__ = ["VALUES", "Matrix", "NoValues", "Parts", "Scheme", "Values", "encoder"]


class Values(Protocol):
    """What the stored parts of a module mean, as float64 (out, in)."""

    PARTS: tuple[str, ...]  # all that the format may store below a module; a bias is none of it

    def scheme(self, stored: Stored) -> Scheme:
        """How the module is to be read. Raises NoValues where that is not known."""

    def decode(self, parts: Parts, scheme: Scheme, rows: slice) -> Tensor:
        """The values of some rows, float64 (rows, in), exactly what the format means."""

    def encoded(self, stored: Stored) -> dict[str, Field | None]:
        """The parts that `encode` writes, and with None those that go. Raises NoValues where plain
        rounding does not apply."""


VALUES: Mapping[str, Values] = {
    "gptq": gptq,
    "awq": awq,
    "bitsandbytes": bitsandbytes,
    "bitsandbytes_absmax": bitsandbytes_absmax,
    "compressed_tensors": compressed_tensors,
    "fp8": fp8,
    "hqq": hqq,
    "torchao": torchao,
    "ggml": ggml,
}


def encoder(name: str) -> Any:
    """encode(values, scheme, parts, rows, out) of a format whose `encoded` raises nothing: float64
    rows into the parts as they will be stored, by plain absmax (or minimum and maximum) rounding.
    Rows begin at multiples of `scheme.align`; `parts` are the base's."""
    return getattr(VALUES[name], "encode")  # noqa: B009
