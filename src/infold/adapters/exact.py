"""A matrix product that is the same on every machine, and sums in a fixed order.

A float64 product depends on the order of its sums, so on the BLAS, the threads and the device. So
make it exact. For B (out, r) and A (r, in), with b = (53 - ceil(log2 r)) // 2 bits:

    unit of row i of B:     u_i = 2^(e_i - b), where 2^(e_i - 1) <= max_k |B_ik| < 2^e_i
    B1_ik = u_i * round(B_ik / u_i), ties to even;        the same for the columns of A

Each product B1_ik * A1_kj is an integer of at most 2b bits times u_i * v_j, each partial sum an
integer of at most 2^53 of them: float64 holds all of them, whatever the order or the fusing. An
update of zero is +0, so it makes +0 of a weight of -0, and changes no other.

One slice leaves a relative error of about 2^-b of each factor: 24 bits at rank 16, as much as a
float32 had, and enough for a BF16 weight. With two slices the rest is rounded again, B2 on the
grid u_i * 2^-b, and

    B @ A = B1 @ A1 + [B1 B2] @ [A2; A1]                  both products exact, error about 2^-2b.
"""

from __future__ import annotations

import math
import threading
import weakref
from typing import TypeAlias

import torch
from torch import Tensor

from infold.adapters.operations import AddProduct

__all__ = ["LEAF", "Factors", "Index", "root", "slices_for", "squares"]

Index: TypeAlias = slice | Tensor  # a range of rows or columns, or their numbers (int64)

LEAF = 256  # columns that are summed as one tree; the order across leaves is ascending
_ONE_SLICE = 16  # the largest rank at which one slice of each factor is enough for BF16
_EAGER = 4 << 20  # elements up to which a factor is kept in float64 as a whole
_local = threading.local()


def bits(rank: int) -> int:
    """Bits of one slice, so that a sum of `rank` products stays below 2^53."""
    return (53 - math.ceil(math.log2(max(rank, 1)))) // 2


def slices_for(dtype: str, rank: int) -> int:
    """1 where what a slice leaves out decides hardly any rounding, else 2.

    The share of elements that one slice rounds otherwise grows with the stored dtype's precision,
    the size of the update and 2^-b; docs/architecture.md has figures.
    """
    return 1 if dtype == "BF16" and rank <= _ONE_SLICE else 2


def _on_grid(x: Tensor, dim: int, width: int, slices: int) -> tuple[Tensor, ...]:
    """x (float64) as `slices` terms, each on its grid. Along `dim` they share a unit."""
    _, exponent = torch.frexp(x.abs().amax(dim, keepdim=True))
    terms: list[Tensor] = []
    for number in range(1, slices + 1):
        shift = exponent - number * width
        x = x - terms[-1] if terms else x
        terms.append(_ldexp(_ldexp(x, -shift).round_(), shift))
    return tuple(terms)


def _ldexp(x: Tensor, shift: Tensor) -> Tensor:
    """x * 2^shift in two steps: 2^shift alone can leave float64's range, the result does not.

    The powers are made of their bits, since `torch.ldexp` takes them from `pow`, which is not
    correctly rounded on every device, and in older versions is of float32's range.
    """
    half = shift.div(2, rounding_mode="floor")
    return x * _power(half) * _power(shift - half)


def _power(exponent: Tensor) -> Tensor:
    """2^exponent, float64, for integers that stay within its normal range."""
    return (exponent.to(torch.int64) + 1023).bitwise_left_shift(52).view(torch.float64)


class _Grid:
    """One factor, on its grid: whole where it is small, else by the piece that is asked for."""

    def __init__(self, raw: Tensor, dim: int, scale: float, width: int, slices: int) -> None:
        self.raw, self.dim, self.scale, self.width, self.slices = raw, dim, scale, width, slices
        self.whole = self._terms(raw) if raw.numel() * slices <= _EAGER else None

    def _terms(self, raw: Tensor) -> tuple[Tensor, ...]:
        return _on_grid(raw.double() * self.scale, self.dim, self.width, self.slices)

    def take(self, index: Index) -> tuple[Tensor, ...]:
        if self.whole is None:
            return self._terms(self.raw[index] if self.dim == 1 else self.raw[:, index])
        return tuple(t[index] if self.dim == 1 else t[:, index] for t in self.whole)


class Factors:
    """scaling * B @ A for B (out, r) and A (r, in), exact as told above."""

    def __init__(self, a: Tensor, b: Tensor, scaling: float, slices: int) -> None:
        width = bits(a.shape[0])
        self.slices = slices
        self.b = _Grid(b, 1, scaling, width, slices)
        self.a = _Grid(a, 0, 1.0, width, slices)

    def add_to(self, x: Tensor, rows: Index, cols: Index, sign: int = 1) -> None:
        """x += sign * (scaling * B @ A)[rows][:, cols], in place; x is float64 in either memory
        order. The last product is kept: one that was added is often subtracted again at once."""
        flipped = x.stride(0) < x.stride(1)  # stored as (in, out)
        if flipped:
            x = x.t()
        delta = _scratch(x, 0)
        this = self._product(flipped, rows, cols, x)
        if this is None or this != _local.__dict__.get("last"):
            _local.last = None
            self._multiply(flipped, rows, cols, delta)
            _local.last = this
        if sign < 0:
            x.sub_(delta)
        else:
            x.add_(delta)

    def operation(self, rows: slice, cols: slice, sign: int) -> AddProduct:
        """`add_to` as an operation."""
        return AddProduct(self.b.take(rows), self.a.take(cols), sign, id(self))

    def _product(self, flipped: bool, rows: Index, cols: Index, x: Tensor) -> object:
        """What the thread's buffer is known by; None: this product is not kept."""
        if x.device.type != "cpu" or isinstance(rows, Tensor) or isinstance(cols, Tensor):
            return None
        return weakref.ref(self), flipped, rows, cols, x.shape  # equal while it is alive

    def _multiply(self, flipped: bool, rows: Index, cols: Index, delta: Tensor) -> None:
        """The product into `delta`, in the order of its memory."""
        b, a = self.b.take(rows), self.a.take(cols)
        if flipped:
            b, a = tuple(t.t() for t in a), tuple(t.t() for t in b)
        # a sum of nothing but -0 is -0 or +0, as the BLAS likes; begun with +0 it is +0
        delta.zero_().addmm_(b[0], a[0])
        if self.slices == 2:
            cross = _scratch(delta, 1)
            torch.mm(torch.cat(b, 1), torch.cat(a[::-1], 0), out=cross)
            delta.add_(cross)


def _scratch(like: Tensor, number: int) -> Tensor:
    """A float64 buffer of the thread, reused: a fresh one would cost its page faults every time."""
    if like.device.type != "cpu":
        return torch.empty(like.shape, dtype=torch.float64, device=like.device)
    buffers = _local.__dict__.setdefault("buffers", {})
    buffer = buffers.get(number)
    if buffer is None or buffer.numel() < like.numel():
        buffer = buffers[number] = torch.empty(like.numel(), dtype=torch.float64)
    return buffer[: like.numel()].view(like.shape)  # type: ignore[no-any-return]


def squares(x: Tensor, total: Tensor) -> None:
    """total += the sum of x² over the columns of x (rows, cols), float64, in a fixed order.

    Leaves of LEAF columns are summed as halving trees, then added to `total` from left to right,
    so any cut at multiples of LEAF gives the same bits.
    """
    count = x.shape[1]
    leaves = -(-count // LEAF)
    square = x.new_zeros(x.shape[0], leaves * LEAF)
    torch.mul(x, x, out=square[:, :count])
    tree = square.view(x.shape[0], leaves, LEAF)
    width = LEAF
    while width > 1:
        width //= 2
        tree = tree[:, :, :width] + tree[:, :, width : 2 * width]
    for leaf in range(leaves):
        total += tree[:, leaf, 0]


def root(x: Tensor) -> Tensor:
    """The square root of float64 x, a vector, correctly rounded.

    PyTorch's is not: neither on CUDA nor, in about 1 of 100 cases, on a CPU with MKL. The C
    library's is. What is rooted here is a vector for each tensor, so its time does not matter.
    """
    roots = [math.sqrt(v) if v >= 0 else math.nan for v in x.tolist()]
    return torch.tensor(roots, dtype=torch.float64, device=x.device)
