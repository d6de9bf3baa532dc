"""FP8 E4M3 weights with scales per tensor, row or block: W = weight * scale.

    weight            F8_E4M3 (out, in)
    weight_scale_inv  F32, BF16 or F8_E8M0, () or (out / rows, in / columns), rounded up
    weight_scale      the same by FBGEMM and compressed-tensors: (), (1), (out, 1) or blocks

Despite its name weight_scale_inv is multiplied. Source: DeepSeek-V3's files, transformers.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from infold.errors import Refusal
from infold.formats import fp8
from infold.formats.stored import Field, Stored
from infold.formats.values.scheme import (
    E4M3_MAX,
    Matrix,
    NoValues,
    Parts,
    Scheme,
    e8m0,
    stored_scales,
    to_e4m3,
)

__all__ = ["PARTS", "decode", "encode", "encoded", "scheme"]

PARTS = fp8.PARTS

_ALL = slice(None)


def scheme(stored: Stored) -> Scheme:
    """Raises NoValues where the shape of the blocks is not told."""
    weight = stored.tensors["weight"]
    scale = stored.tensors[scale_part(stored.tensors)]
    if len(weight.shape) != 2 or weight.dtype != "F8_E4M3":
        raise NoValues(f"its weight is {weight.dtype} {list(weight.shape)}, no matrix of F8_E4M3")
    if scale.dtype not in ("F32", "BF16", "F16", "F8_E8M0"):
        raise NoValues(f"its scales are {scale.dtype}")
    if len(scale.shape) > 2:
        raise NoValues(f"its scales {list(scale.shape)} are no matrix")
    outputs, inputs = weight.shape
    count = scale.shape if len(scale.shape) == 2 else (math.prod(scale.shape), 1)
    if count == (1, 1):
        return Scheme((outputs, inputs), kind="fp8")
    if count == (outputs, 1):
        return Scheme((outputs, inputs), block=(1, 0), kind="fp8")
    block = _told_block(stored.config)
    if block is None or count != (-(-outputs // block[0]), -(-inputs // block[1])):
        raise NoValues(f"what its scales {list(scale.shape)} belong to is not told by the config")
    return Scheme((outputs, inputs), block=block, kind="fp8")


def _told_block(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """The blocks' shape as the config tells it, for all modules."""
    found = [config.get("weight_block_size")]
    groups = config.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        found.append(weights.get("block_structure") if isinstance(weights, dict) else None)
    told = {tuple(b) for b in found if isinstance(b, list) and len(b) == 2}
    block = told.pop() if len(told) == 1 else None
    if block is None or not all(type(n) is int and n > 0 for n in block):
        return None
    return block[0], block[1]


def encoded(stored: Stored) -> dict[str, Field | None]:
    """The tensors that `encode` writes anew."""
    name = scale_part(stored.tensors)
    if math.prod(stored.tensors[name].shape) == 1 and stored.tensors["weight"].shape[0] > 1:
        raise NoValues("one scale belongs to the whole tensor, so its rows cannot be rounded apart")
    return {part: stored.tensors[part] for part in ("weight", name)}


def scale_part(parts: Collection[str]) -> str:
    """The name of the scale's tensor."""
    return next(n for n in ("weight_scale_inv", "weight_scale") if n in parts)


def decode(parts: Parts, scheme: Scheme, rows: slice) -> Tensor:
    """float64 (rows, in)."""
    values = parts["weight"][rows, _ALL].to(torch.float32).to(torch.float64)
    scale = parts[scale_part(parts)]
    values *= _spread(scale, scheme, rows)
    return values


def _spread(scale: Matrix, scheme: Scheme, rows: slice) -> Tensor:
    """Scales that broadcast over rows."""
    outputs, inputs = scheme.shape
    tall, wide = _block(scheme)
    first, last = rows.start // tall, -(-rows.stop // tall)
    taken = _wide(scale[slice(first, last), _ALL])
    tallied = taken.repeat_interleave(min(tall, outputs), 0)
    tallied = tallied[rows.start - first * tall : rows.stop - first * tall]
    if taken.shape[1] > 1:
        tallied = tallied.repeat_interleave(wide, 1)[:, :inputs]
    return tallied


def _wide(scale: Tensor) -> Tensor:
    return e8m0(scale) if scale.dtype == torch.float8_e8m0fnu else scale.to(torch.float64)


def _block(scheme: Scheme) -> tuple[int, int]:
    """Outputs and inputs that share a scale; (0, 0) in the scheme is the whole matrix."""
    return scheme.block[0] or max(1, scheme.shape[0]), scheme.block[1] or max(1, scheme.shape[1])


def encode(
    values: Tensor, scheme: Scheme, parts: Parts, rows: slice, out: dict[str, Tensor]
) -> None:
    """Round float64 rows to FP8 with scale = max|w| / 448 of each block; for UE8M0 the next power
    of two above. Rows are whole blocks."""
    name = scale_part(parts)
    tall, wide = _block(scheme)
    if tall >= scheme.shape[0] > 1 and len(values) < scheme.shape[0]:
        raise Refusal("one scale for the whole tensor: its rows cannot be quantized apart")
    down, across = -(-len(values) // tall), -(-scheme.shape[1] // wide)
    padded = values.new_zeros(down * tall, across * wide)
    padded[: len(values), : scheme.shape[1]] = values.abs()
    most = padded.view(down, tall, across, wide).amax(dim=(1, 3))
    target = out[name]
    if target.dtype == torch.float8_e8m0fnu:
        exponents = torch.where(most > 0, torch.ceil(torch.log2(most / E4M3_MAX)), 0.0)
        # log2 of a power of two may be off by its last bit: settle by comparing
        exponents += (most > E4M3_MAX * torch.exp2(exponents)).to(torch.float64)
        exponents -= (most <= E4M3_MAX * torch.exp2(exponents - 1)).to(torch.float64)
        exponents = torch.where(most > 0, exponents, 0.0).clamp(-127, 127)
        scales = torch.exp2(exponents)
        stored = (exponents + 127).to(torch.uint8).view(torch.float8_e8m0fnu)
    else:
        scales = stored_scales(most / E4M3_MAX, target.dtype)
        stored = scales.to(target.dtype)
    spread = scales.repeat_interleave(tall, 0)[: len(values)]
    spread = spread.repeat_interleave(wide, 1)[:, : scheme.shape[1]]
    out["weight"][rows] = to_e4m3(values / spread)
    first = rows.start // tall
    target.view(-1, across)[first : first + down] = stored
