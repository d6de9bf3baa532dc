"""What a method's `init` and `forward` see of the layer that they adapt, whatever its kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

__all__ = ["Base", "Dropout", "Geometry"]

Dropout = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Geometry:
    """The shapes of a layer: `outputs` x `inputs` [x kernel], before groups are taken apart."""

    outputs: int
    inputs: int
    kernel: tuple[int, ...] = ()  # convolutions: the size of the kernel in each direction
    table: bool = False  # an embedding: its inputs are token numbers


class Base(Protocol):
    """A layer as it is before one method's part: its base and the adapters that came earlier.

    Channels are the dimension that a weight's rows (outputs) or columns (inputs) belong to: the
    last one of x for Linear, Conv1D and Embedding, the one before the kernel's for convolutions.
    """

    def __call__(self, x: Tensor) -> Tensor:
        """The layer's output for x, its bias included."""

    def map(self, x: Tensor, weight: Tensor) -> Tensor:
        """x through another weight (out', in[, kernel]) of this layer's kind, without a bias."""

    def add(self, y: Tensor, h: Tensor, weight: Tensor, scale: float) -> Tensor:
        """y + scale * (weight (out, r[, 1...]) over the channels of h), in y's dtype.
        May reuse y's memory."""

    def add_vector(self, y: Tensor, vector: Tensor) -> Tensor:
        """y with its element of vector (out,) added to each output channel, in y's dtype."""

    def scale_outputs(self, y: Tensor, vector: Tensor) -> Tensor:
        """y with each output channel times its element of vector (out,), in y's dtype."""

    def scale_inputs(self, x: Tensor, vector: Tensor) -> Tensor:
        """x with each input channel times its element of vector (in,), in x's dtype."""

    def replace_rows(self, x: Tensor, y: Tensor, numbers: Tensor, values: Tensor) -> Tensor:
        """y, the output for x, as it is where rows `numbers` of the table are values (n, width): an
        embedding gives such a row for its number, a head scores x by it. May reuse y's memory."""

    def table(self) -> Tensor:
        """The weight (tokens, width) of an embedding or a head, as `matrix` in dtype."""

    def matrix(self) -> Tensor:
        """The logical weight (out, in * kernel), detached; float32 or the weight's own dtype."""

    def bias(self) -> Tensor | None:
        """(out,), or None."""
