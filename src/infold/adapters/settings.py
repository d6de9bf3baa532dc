"""The numbers of one module's adapter that are not tensors."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Settings"]


@dataclass(frozen=True, slots=True)
class Settings:
    """What a method needs beside its parts. Each method reads its own few fields."""

    scaling: float = 1.0  # LoRA, DoRA: alpha / rank, or alpha / sqrt(rank) with rsLoRA
    slices: int = 1  # LoRA, DoRA: slices of each factor, see adapters/exact.py
    side: str = "out"  # IA³: "out" scales the outputs, "in" the inputs (feed-forward)
    kernel: int = 1  # convolutions: elements of the kernel
    groups: int = 1  # convolutions
    out: int = 0  # output channels, where groups > 1 need it
    tokens: tuple[int, ...] = ()  # trainable tokens: the rows that are replaced
    rank: int = 0  # LoRA, DoRA: for `init` alone, as are the two below
    start: bool | str = True  # how `init` fills the parts: True is the method's own way
    with_bias: bool = False  # LoRA: also a bias of lora_B
