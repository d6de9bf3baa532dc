"""The numbers of one module's adapter that are not tensors."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Settings"]


@dataclass(frozen=True, slots=True)
class Settings:
    """What a method needs beside its parts. Each method reads its own few fields."""

    scaling: float = 1.0  # LoRA, DoRA: alpha / rank, or alpha / sqrt(rank) with rsLoRA
    slices: int = 1  # LoRA, DoRA: slices of each factor, see adapters/exact.py
    side: str = "out"  # IA³: "out" scales the outputs, "in" the inputs (feed-forward)
    kernel: int = 1  # convolutions: elements of the kernel
    groups: int = 1  # convolutions
    out: int = 0  # output channels, where groups > 1 or `width` need it
    tokens: tuple[int, ...] = ()  # trainable tokens: the rows that are replaced
    rank: int = 0  # LoRA, DoRA: for `init` alone, as are the two below
    start: bool | str = True  # how `init` fills the parts: True is the method's own way
    with_bias: bool = False  # LoRA: also a bias of lora_B
    # IA³ on stored rows that are not the module's outputs one by one (side "out"): a row map, in
    # this order. The float scales of a quantized weight are such rows; see plan/fold.py.
    # LoRA, DoRA: of the two below, the order of the stored rows
    view: tuple[int, ...] = ()  # vector.view(view).permute(order).flatten(), unless empty
    order: tuple[int, ...] = ()
    root: int = 1  # 2: the square root of each element, for a vector moved through relu²
    first: int = 0  # where the vector begins in a fused tensor of `rows` rows; 1 elsewhere
    rows: int = 0  # 0: as many as the vector has elements
    repeat: int = 1  # consecutive stored rows that share one of these elements
    width: int = 0  # elements of an output, where a stored row holds `out` of them: one expert's
    # LoRA on experts that share their factors' tensors; see adapters/experts.py
    experts: int = 0
    expert: int = -1  # the one that this weight is of, its outputs from `first` on; -1: of all
    flipped: bool = False  # of all: each is stored as (in, out); `width` is the length of its rows

    def arranged(self, x: Tensor) -> Tensor:
        """Outputs (out, ...) in the order of the stored rows, by `view` and `order`."""
        if not self.order:
            return x
        rest = range(len(self.view), len(self.view) + x.dim() - 1)
        return x.reshape(*self.view, *x.shape[1:]).permute(*self.order, *rest).reshape(x.shape)
