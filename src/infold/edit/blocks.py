"""A stored tensor as a matrix, and the pieces that it is cut into.

A *block* is what one worker takes at once. It is cut into *tiles* that stay in the processor's
cache, and for methods that observe the weight into *strips*.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from infold.adapters.exact import LEAF

__all__ = ["Block", "cut", "matrix", "strips", "tiles", "within"]


def matrix(shape: Sequence[int]) -> tuple[int, int]:
    """A stored shape as (rows, columns) of a matrix; a vector is a column."""
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


@dataclass(frozen=True, slots=True)
class Block:
    """Rows and columns of a stored matrix. Columns are all of them unless a row is very long."""

    row: int
    rows: int
    column: int
    columns: int

    @property
    def count(self) -> int:
        return self.rows * self.columns


def cut(rows: int, columns: int, limit: int) -> Iterator[Block]:
    """Blocks of at most `limit` elements, in storage order."""
    if columns > limit:
        step = limit // LEAF * LEAF
        for row in range(rows):
            for column in range(0, columns, step):
                yield Block(row, 1, column, min(step, columns - column))
        return
    step = max(1, limit // max(columns, 1))
    if step >= LEAF:
        step = step // LEAF * LEAF
    for row in range(0, rows, step):
        yield Block(row, min(step, rows - row), 0, columns)


def tiles(block: Block, tile: int, tile_columns: int) -> Iterator[tuple[slice, slice]]:
    """Pieces of a block of at most `tile` elements, as rows and columns of the tensor. Few rows,
    such as those of stacked experts, are long, and so are their pieces."""
    columns = max(1, min(block.columns, max(tile_columns, tile // max(block.rows, 1))))
    return _pieces(block, max(1, tile // columns), columns)


def strips(block: Block, tile: int, tile_columns: int) -> Iterator[tuple[slice, slice]]:
    """Tiles for `observe`: cut at multiples of LEAF in either direction, inputs ascending."""
    columns = min(block.columns, max(LEAF, tile_columns // LEAF * LEAF))
    return _pieces(block, max(LEAF, tile // columns // LEAF * LEAF), columns)


def _pieces(block: Block, rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
    for row in range(block.row, block.row + block.rows, rows):
        for column in range(block.column, block.column + block.columns, columns):
            yield (
                slice(row, min(row + rows, block.row + block.rows)),
                slice(column, min(column + columns, block.column + block.columns)),
            )


def within(block: Block, rows: slice, columns: slice) -> tuple[slice, slice]:
    """Rows and columns of the tensor as rows and columns of the block."""
    return (
        slice(rows.start - block.row, rows.stop - block.row),
        slice(columns.start - block.column, columns.stop - block.column),
    )
