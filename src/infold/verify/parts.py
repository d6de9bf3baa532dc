"""A module that was quantized again: are its codes and scales what plain rounding makes?

The exact values are computed anew. Then, of each group of weights: is the stored scale the nearest
to what the group's extremes ask for, the zero point too, and is each code the nearest for the scale
that is stored? Nothing is quantized here: what lies there is judged.
"""

from __future__ import annotations

import threading
from collections import ChainMap
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from infold.checkpoint.adapter import Adapter
from infold.checkpoint.inputs import InputFiles
from infold.checkpoint.safetensors import Header
from infold.checkpoint.shards import Checkpoint
from infold.checkpoint.stored import StoredMatrix, stored_matrix
from infold.formats.values import Matrix
from infold.plan.edits import Edit, Part
from infold.verify.stored import FLOATS8, Grid, grid
from infold.verify.tensors import EditCheck, Tally, Workspace

__all__ = ["PartCheck", "parts_checks"]

_SLACK = 1e-9  # relative: the values here and in the merge differ by a few float64 roundings
_BLOCK = 1 << 20  # elements


class PartCheck:
    """One part; the module is checked as a whole when the first of its parts is."""

    step = _BLOCK

    def __init__(self, module: _Module, part: str) -> None:
        self.module, self.tally = module, Tally()
        module.tallies[part] = self.tally

    def check(
        self, merged: memoryview, offset: int, own: memoryview | None, workspace: Workspace
    ) -> None:
        self.module.check(workspace)

    def done(self, count: int) -> None: ...


class _Module:
    def __init__(
        self,
        source: Part,
        base: Checkpoint,
        adapters: tuple[Adapter, ...],
        files: InputFiles,
        original: Checkpoint | None,
    ) -> None:
        self.form, self.scheme = source.form, source.scheme
        self.values = EditCheck(source.values, base, adapters, files, original=original)
        self.stored: dict[str, Matrix] = {
            part: stored_matrix(base, files, name) for part, name in source.stored
        }
        self.merged: dict[str, Matrix] = {}
        self.tallies: dict[str, Tally] = {}
        self._lock = threading.Lock()
        self._done = False

    def check(self, workspace: Workspace) -> None:
        with self._lock:
            if self._done:
                return
            self._done = True
            rows, columns = self.scheme.shape
            step = max(1, _BLOCK // max(1, columns) // self.scheme.align) * self.scheme.align
            parts: Mapping[str, Matrix] = ChainMap(self.merged, self.stored)
            for row in range(0, rows, step):
                here = slice(row, min(row + step, rows))
                values = self.values.exact(here, workspace)
                self._judge(values, grid(self.form, parts, self.scheme, here), row)

    def _judge(self, values: Tensor, found: Grid, row: int) -> None:
        group = found.group.expand_as(values)
        shape = found.scale.shape
        high = values.new_zeros(shape).scatter_reduce(1, group, values, "amax")
        low = values.new_zeros(shape).scatter_reduce(1, group, values, "amin")
        if self.scheme.block[0] > 1:  # rows of a block share their scale
            high, low = (self._tall(x, reduce) for x, reduce in ((high, "amax"), (low, "amin")))
        if self.form == "ggml":
            self._ggml(values, found, row)
            self._codes(values, found, row)
            return
        self._scales(found, high, low, row)
        if found.zero is not None:
            self._zeros(found, low, row)
        self._codes(values, found, row)

    def _ggml(self, values: Tensor, found: Grid, row: int) -> None:
        """The float16 of each block: what its extremes ask for, and of *_1 its minimum."""
        grouped = values.view(*found.scale.shape, -1)
        high, low = grouped.amax(2), grouped.amin(2)
        kind, tiny = self.scheme.kind, 2.0**-25
        reach = torch.maximum(high, -low)

        def near(stored: Tensor, wanted: Tensor) -> Tensor:
            close = (stored - wanted).abs() <= wanted.abs() * (2.0**-11 + _SLACK) + tiny
            return close | ((wanted.abs() <= tiny * (1 + _SLACK)) & (stored == 1))

        if kind == "Q8_0":
            fine = near(found.scale, reach / 127)
        elif found.zero is None:  # the extreme has the lowest code, whichever its sign
            half = -float(found.levels[0])
            fine = (near(found.scale, high / -half) & (high >= reach * (1 - _SLACK))) | (
                near(found.scale, low / -half) & (-low >= reach * (1 - _SLACK))
            )
        else:
            fine = near(found.scale, (high - low) / float(found.levels[-1]))
            least = -found.zero * found.scale
            fine &= (least - low).abs() <= low.abs() * (2.0**-11 + _SLACK) + tiny
        self._tell("", ~fine, found.scale, reach, row)

    def _tall(self, x: Tensor, reduce: str) -> Tensor:
        """The extremes of blocks of rows, for each row."""
        block = (torch.arange(len(x)) // self.scheme.block[0])[:, None].expand_as(x)
        out = x.new_zeros(int(block.max()) + 1, x.shape[1])
        return out.scatter_reduce(0, block, x, reduce)[block[:, 0]]

    def _symmetric(self, found: Grid) -> bool:
        return found.zero is None or (self.form == "gptq" and self.scheme.symmetric)

    def _scales(self, found: Grid, high: Tensor, low: Tensor, row: int) -> None:
        part, levels = found.scale_part, found.levels
        reach = torch.maximum(high, -low)
        bits = self.scheme.bits
        dtype = getattr(self.merged[part], "dtype", torch.float32)
        if dtype == torch.float8_e8m0fnu:  # the least power of two that holds the extremes
            wide = reach / 448 <= found.scale * (1 + _SLACK)
            tight = reach / 448 > found.scale / 2 * (1 - _SLACK)
            fine = (wide & tight) | (reach == 0)
            self._tell(part, ~fine, found.scale, reach / 448, row)
            return
        if self.form == "torchao" and levels is not FLOATS8:
            wanted = reach / 127
        elif levels is FLOATS8:
            wanted = reach / 448
        elif self.form == "bitsandbytes":
            wanted = reach / (1 if self.scheme.kind else 127)
        elif self._symmetric(found):
            wanted = 2 * reach / ((1 << bits) - 1)
        else:
            wanted = (high - low) / ((1 << bits) - 1)
        info = torch.finfo(dtype)
        near = (found.scale - wanted).abs() <= wanted * (
            info.eps / 2 + _SLACK
        ) + info.tiny * info.eps
        none = (wanted <= info.tiny * info.eps / 2 * (1 + _SLACK)) & (found.scale > 0)
        self._tell(part, ~(near | none), found.scale, wanted, row)

    def _zeros(self, found: Grid, low: Tensor, row: int) -> None:
        assert found.zero is not None
        least, most = float(found.levels[0]), float(found.levels[-1])
        if self.form == "torchao":
            wanted = torch.zeros_like(low)
        elif self._symmetric(found):
            wanted = torch.full_like(low, float(1 << (self.scheme.bits - 1)))
        else:
            wanted = least - low / found.scale
            wanted = wanted.clamp(
                1.0 if self.scheme.plus_one and self.form == "gptq" else least, most
            )
        wrong = (found.zero - wanted).abs() > 0.5 + _SLACK * wanted.abs()
        self._tell(found.zero_part, wrong, found.zero, wanted, row)

    def _codes(self, values: Tensor, found: Grid, row: int) -> None:
        place = values / found.scale[:, found.group]
        if found.zero is not None:
            place = place + found.zero[:, found.group]
        levels = found.levels[found.levels.isfinite()].sort().values
        if self.form in ("bitsandbytes", "torchao", "ggml") and len(levels) == 256:
            levels = levels[1:]  # -128 is not used where 127 is the absmax
        right = torch.searchsorted(levels, place.contiguous()).clamp(1, len(levels) - 1)
        best = torch.minimum((levels[right] - place).abs(), (place - levels[right - 1]).abs())
        stored = found.levels[found.codes]
        wrong = (stored - place).abs() > best + _SLACK * (1 + place.abs())
        wrong |= stored.isnan()
        self._tell(found.code_part, wrong, stored, place, row)

    def _tell(self, part: str, wrong: Tensor, stored: Tensor, wanted: Tensor, row: int) -> None:
        count = int(wrong.sum())
        if not count:
            return
        i, j = wrong.nonzero()[0].tolist()
        first = (
            (row + i) * wrong.shape[1] + j,
            repr(float(stored[i, j])),
            repr(float(wanted[i, j])),
        )
        self.tallies.get(part, next(iter(self.tallies.values()))).add(count, first)


def parts_checks(
    edits: Mapping[str, Edit],
    header: Header,
    path: Path,
    modules: dict[str, _Module],
    base: Checkpoint,
    adapters: tuple[Adapter, ...],
    files: InputFiles,
    original: Checkpoint | None,
) -> dict[str, PartCheck]:
    """The checks of all parts that lie in one shard of the output. `modules`: seen so far."""
    checks = {}
    for name, edit in edits.items():
        source = edit.source
        if not isinstance(source, Part) or name not in header.tensors:
            continue
        weight = source.values.tensor
        if weight not in modules:
            modules[weight] = _Module(source, base, adapters, files, original)
        modules[weight].merged[source.part] = StoredMatrix(files, path, header.tensors[name])
        checks[name] = PartCheck(modules[weight], source.part)
    return checks
