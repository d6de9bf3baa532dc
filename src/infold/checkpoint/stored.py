"""A tensor of a file as a matrix, of which rows and columns are read when they are asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from infold.checkpoint.inputs import InputFiles
from infold.checkpoint.safetensors import TensorInfo
from infold.checkpoint.shards import Checkpoint
from infold.ggml import BLOCKS

__all__ = ["ELEMENTS", "StoredMatrix", "as_matrix", "stored_matrix"]

ELEMENTS = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16,
    "I32": torch.int32, "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16,
    "F32": torch.float32, "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip


def as_matrix(dtype: str, shape: Sequence[int]) -> tuple[torch.dtype, tuple[int, int]]:
    """A stored tensor as (first dimension, all others); a vector is a column, a scalar (1, 1). Rows
    of ggml's blocks are rows of bytes."""
    if dtype in BLOCKS:
        elements, size = BLOCKS[dtype]
        rows = math.prod(shape[:-1])
        return torch.uint8, (rows, shape[-1] // elements * size)
    return ELEMENTS[dtype], (shape[0], math.prod(shape[1:])) if shape else (1, 1)


class StoredMatrix:
    """A stored tensor as the matrix of `as_matrix`.

    `matrix[rows, columns]` reads what is asked for, in memory of its own: at once where the columns
    are all, else row by row.
    """

    def __init__(self, files: InputFiles, path: Path, info: TensorInfo) -> None:
        self.files, self.path, self.begin = files, path, info.begin
        self.dtype, self.shape = as_matrix(info.dtype, info.shape)

    def __getitem__(self, where: tuple[slice, slice], /) -> Tensor:
        (top, bottom, _), (left, right, _) = (
            s.indices(n) for s, n in zip(where, self.shape, strict=True)
        )
        size, columns = self.dtype.itemsize, self.shape[1]
        rows, width = max(0, bottom - top), max(0, right - left)
        if not rows * width:
            return torch.empty(rows, width, dtype=self.dtype)
        data = bytearray(rows * width * size)
        view = memoryview(data)
        if width == columns:
            self.files.read(self.path, view, self.begin + top * columns * size)
        else:
            for n in range(rows):
                offset = self.begin + ((top + n) * columns + left) * size
                self.files.read(self.path, view[n * width * size : (n + 1) * width * size], offset)
        raw = torch.frombuffer(data, dtype=torch.uint8)
        return raw.view(self.dtype).view(rows, width)


def stored_matrix(checkpoint: Checkpoint, files: InputFiles, name: str) -> StoredMatrix:
    """A tensor of a checkpoint, by its name."""
    return StoredMatrix(
        files, checkpoint.shards[checkpoint.where[name]].path, checkpoint.info(name)
    )
