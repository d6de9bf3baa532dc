"""Doubly quantized absmax of bitsandbytes, as the values of a column of their own: (blocks, 1)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from infold.formats.stored import Field, Stored
from infold.formats.values import bitsandbytes
from infold.formats.values.scheme import NoValues, Parts, Scheme

__all__ = ["PARTS", "decode", "encoded", "scheme"]

PARTS: tuple[str, ...] = ("weight.absmax", "weight.nested_absmax", "weight.nested_quant_map")


def scheme(stored: Stored) -> Scheme:
    """Raises NoValues where quant_state does not tell what is needed."""
    told, absmax = bitsandbytes.scheme(stored), stored.shape("weight.absmax")
    assert absmax is not None
    if stored.shape("weight.nested_quant_map") != (256,):
        raise NoValues("its nested_quant_map is missing")
    return replace(told, shape=(absmax[0], 1))


def decode(parts: Parts, scheme: Scheme, rows: slice) -> Tensor:
    """float64 (rows, 1), of the float32 that bitsandbytes computes."""
    return bitsandbytes.absmax_of(parts, scheme, rows).to(torch.float64)[:, None]


def encoded(stored: Stored) -> dict[str, Field | None]:
    raise NoValues("its absmax shall not be quantized again")
