"""What a method does to a block of a weight, told as data: what compiled code can do in one pass.

A method whose `weight` is a sequence of these may tell it by `operations`. It stays the same
arithmetic, each a rounding of float64, in the order told; the bits may not differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

__all__ = ["AddProduct", "Operation", "ScaleInputs", "ScaleOutputs"]


@dataclass(frozen=True, slots=True)
class ScaleOutputs:
    """x = factors[:, None] * x"""

    factors: Tensor  # float64, one for each row of the block


@dataclass(frozen=True, slots=True)
class ScaleInputs:
    """x = x * factors"""

    factors: Tensor  # float64, one for each column of the block


@dataclass(frozen=True, slots=True)
class AddProduct:
    """x = x + sign * (B1 A1 + (B1 A2 + B2 A1)), each of the inner sums exact; see `exact.py`."""

    b: tuple[Tensor, ...]  # one or two slices, float64, (rows, rank)
    a: tuple[Tensor, ...]  # as many, (rank, columns)
    sign: int
    known_by: int  # equal for two with the same product in one block


Operation: TypeAlias = ScaleOutputs | ScaleInputs | AddProduct
