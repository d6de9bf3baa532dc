"""The float dtypes of weights and adapters, by the names that safetensors gives them."""

from __future__ import annotations

import torch

__all__ = ["NAMES", "SCALE_DTYPES", "TORCH_DTYPES"]

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
# What scales can be stored as: no weight and no adapter is edited in the last one.
SCALE_DTYPES = {**TORCH_DTYPES, "F8_E4M3": torch.float8_e4m3fn}
NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
