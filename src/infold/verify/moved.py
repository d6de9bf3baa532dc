"""A GGUF file with other roundings: what rounding alone may do to a merge, as a file to be run.

Of the floats that the merge rounds one in four, drawn by chance, goes to its neighbour, up or down.
Its root mean square is then half a unit in the last place, which is the largest error of rounding
and 1.7 times the usual one, also where floats are subnormal and have few bits. Codes stay.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from infold.checkpoint.safetensors import TensorInfo
from infold.checkpoint.staging import storage_errors
from infold.errors import Refusal
from infold.formats.floats import Floats, floats_of

__all__ = ["PRECISION", "write_moved"]

PRECISION = {"F64": 53, "F32": 24, "F16": 11, "BF16": 8, "F8_E4M3": 4}  # bits of a significand
_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_LARGEST = {"F16": 0x7BFF, "BF16": 0x7F7F, "F32": 0x7F7FFFFF, "F64": 0x7FEFFFFFFFFFFFFF}
_PIECE = 1 << 22  # floats


def write_moved(
    base: Path, tensors: Mapping[str, TensorInfo], written: Mapping[str, str], out: Path
) -> None:
    """Copy the GGUF file `base` to `out` with the floats of some of its tensors moved.

    written: the type that the merge gives each of those tensors: moved are the base's floats, by
    their own last place, or by as many as one of a coarser dtype is. Raises Refusal for a type
    that has no floats, StorageFailure where it cannot be written.
    """
    with storage_errors(out):
        shutil.copyfile(base, out)
        for seed, (name, dtype) in enumerate(written.items()):
            info = tensors[name]
            floats = floats_of(info.dtype, info.shape)
            if floats is None:
                raise Refusal(f"{base}: {name}: {info.dtype} has no floats that could be moved")
            # of a type with codes its floats' dtype, in which the merge rounds them
            bits = PRECISION.get(dtype, PRECISION[floats.dtype])
            step = int(2.0 ** (PRECISION[floats.dtype] - bits))
            if step:
                _move(out, info, floats, step, torch.Generator().manual_seed(seed))


def _move(
    file: Path, info: TensorInfo, floats: Floats, step: int, numbers: torch.Generator
) -> None:
    for piece in _pieces(file, info, floats):
        data = torch.from_numpy(piece)
        if floats.packing is None:
            _step(data.view(_WORDS[floats.width]), floats.dtype, step, numbers)
        else:
            found = floats.packing.take(data)
            _step(found.view(torch.int16), floats.dtype, step, numbers)
            floats.packing.put(found, data)


def _pieces(file: Path, info: TensorInfo, floats: Floats) -> Iterator[np.ndarray]:
    """The bytes of a tensor in the file, in whole blocks, to be changed in place."""
    block = floats.width * (floats.columns if floats.packing is not None else 1)
    size = max(1, _PIECE // block) * block
    for begin in range(info.begin, info.end, size):
        count = min(size, info.end - begin)
        piece = np.memmap(file, np.uint8, "r+", begin, (count,))
        yield piece
        piece.flush()


def _step(words: Tensor, dtype: str, step: int, numbers: torch.Generator) -> None:
    """Move one float in four, given as integers of their bits: magnitudes count up from zero to
    the largest, and the sign is apart."""
    lowest, most = torch.iinfo(words.dtype).min, _LARGEST[dtype]
    drawn = torch.randint(0, 8, words.shape, generator=numbers, dtype=torch.int8)
    moves = (drawn == 0).long() - (drawn == 1).long()
    magnitude = ((words.long() & ~lowest) + moves * step).clamp(0, most)
    words.copy_(torch.where(words < 0, magnitude + lowest, magnitude))
