"""Linear layers of other libraries that hold their weight in 4 or 8 bits."""

from __future__ import annotations

from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor, nn

__all__ = ["dequantized", "is_quantized"]


def is_quantized(module: nn.Module) -> bool:
    """Whether a module is one of bitsandbytes' linear layers, before or after quantization."""
    return any(cls.__module__.startswith("bitsandbytes.") for cls in type(module).__mro__)


def dequantized(module: nn.Module) -> Tensor | None:
    """The weight (out, in) of a quantized linear layer as floats; None if that is not known."""
    if not is_quantized(module):
        return None
    weight: Any = module.weight
    functional = import_module("bitsandbytes.functional")
    if getattr(weight, "quant_state", None) is not None:
        return cast(Tensor, functional.dequantize_4bit(weight.data, weight.quant_state))
    state: Any = getattr(module, "state", None)
    scales = getattr(weight, "SCB", None)
    scales = getattr(state, "SCB", None) if scales is None else scales
    if weight.dtype == torch.int8 and scales is not None:
        return cast(Tensor, functional.int8_vectorwise_dequant(weight.data, scales))
    return None
