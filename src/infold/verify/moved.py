"""A GGUF file with other roundings: what rounding alone may do to a merge, as a file to be run.

Of the floats that the merge rounds one in four, drawn by chance, moves up or down, so far that what
is merged of it goes to its neighbour. The root mean square is then half a unit in the last place,
which is the largest error of rounding and 1.7 times the usual one, also where floats are subnormal
and have few bits, or become so. Codes stay.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from infold.checkpoint.adapter import Adapter
from infold.checkpoint.safetensors import TensorInfo
from infold.disk import storage_errors
from infold.errors import Refusal
from infold.formats.floats import Floats, floats_of
from infold.plan.edits import Edit
from infold.verify.reference import reference_of
from infold.verify.rounding import LINES, Line
from infold.verify.values import Values

__all__ = ["PRECISION", "factors_of", "write_moved"]

PRECISION = {"F64": 53, "F32": 24, "F16": 11, "BF16": 8, "F8_E4M3": 4}  # bits of a significand
_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_LARGEST = {"F16": 0x7BFF, "BF16": 0x7F7F, "F32": 0x7F7FFFFF, "F64": 0x7FEFFFFFFFFFFFFF}
_PIECE = 1 << 22  # floats


def factors_of(edit: Edit, adapters: Sequence[Adapter]) -> Tensor | None:
    """What a merge multiplies the floats of blocks by, (rows, columns) of `Floats`, float64; None
    for a tensor that has no blocks then."""
    floats = floats_of(edit.dtype, edit.shape)
    if floats is None or floats.packing is None:
        return None
    values = Values(torch.ones(floats.rows, floats.columns, dtype=torch.float64))
    for operation in edit.operations:
        adapter = adapters[operation.adapter]
        parts = {part: adapter.read(key) for part, key in operation.parts.items()}
        reference = reference_of(operation, adapter.config, parts, floats.dtype)
        reference.estimate(values, slice(0, floats.rows), slice(0, floats.columns))
    return values.x


def write_moved(
    base: Path,
    tensors: Mapping[str, TensorInfo],
    written: Mapping[str, str],
    out: Path,
    factors: Mapping[str, Tensor] = MappingProxyType({}),
) -> None:
    """Copy the GGUF file `base` to `out` with the floats of some of its tensors moved.

    written: the type that the merge gives each of those tensors: moved are the base's floats, by
    their own last place, or by as many as one of a coarser dtype is. factors: as of `factors_of`,
    by tensor: there the last place is that of the product. Raises Refusal for a type that has no
    floats, StorageFailure where it cannot be written.
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
                numbers = torch.Generator().manual_seed(seed)
                _move(out, info, floats, step, factors.get(name), numbers)


def _move(
    file: Path,
    info: TensorInfo,
    floats: Floats,
    step: int,
    factors: Tensor | None,
    numbers: torch.Generator,
) -> None:
    done = 0  # blocks
    for piece in _pieces(file, info, floats):
        data = torch.from_numpy(piece)
        if floats.packing is None:
            _step(data.view(_WORDS[floats.width]), floats.dtype, step, numbers)
        else:
            found = floats.packing.take(data)
            steps: int | Tensor = step
            if factors is not None:
                steps = _places(found, factors[done : done + len(found)], LINES[floats.dtype])
                done += len(found)
            _step(found.view(torch.int16), floats.dtype, steps, numbers)
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


def _places(found: Tensor, factors: Tensor, line: Line) -> Tensor:
    """By how many of its own places a float moves, at least one, where its product with a factor
    moves by one. What is zero then is not rounded."""
    was = found.double()
    merged = was * factors
    apart = _exponent(merged, line) - _exponent(was, line)
    places = torch.ldexp(1 / factors.abs(), apart).round().clamp(1, line.infinity)
    return torch.where(merged == 0, 1, places.long())


def _exponent(x: Tensor, line: Line) -> Tensor:
    """That of the binade whose last place a number has."""
    exponent: Tensor = torch.frexp(x)[1] - 1
    return exponent.clamp(min=line.lowest)


def _step(words: Tensor, dtype: str, step: int | Tensor, numbers: torch.Generator) -> None:
    """Move one float in four, given as integers of their bits: magnitudes count up from zero to
    the largest, and the sign is apart."""
    lowest, most = torch.iinfo(words.dtype).min, _LARGEST[dtype]
    drawn = torch.randint(0, 8, words.shape, generator=numbers, dtype=torch.int8)
    moves = (drawn == 0).long() - (drawn == 1).long()
    magnitude = ((words.long() & ~lowest) + moves * step).clamp(0, most)
    words.copy_(torch.where(words < 0, magnitude + lowest, magnitude))
