"""How the verbs print: columns, wrapping on a terminal, names folded over layers, closed pipes."""

from __future__ import annotations

import ctypes
import io
import math
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from typing import TYPE_CHECKING, TextIO, TypeVar

from infold.errors import ProofFailed

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer

__all__ = [
    "Failed",
    "complain",
    "entry",
    "finish",
    "fold",
    "protect_streams",
    "results_alone",
    "show_now",
    "table",
]

Row = TypeVar("Row")
_ROOM = 30  # columns in which text is still read


class Failed(ProofFailed):
    """A proof or a check that failed; the verb has printed its verdict."""


class _Pipe(io.FileIO):
    """A stream whose reader may leave, as `head` does, or whose disk may be full: the verb does its
    work all the same. refused: what else than a reader that left was in the way, for the end."""

    refused: OSError | None = None

    def write(self, data: Buffer, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if not isinstance(error, BrokenPipeError):
                self.refused = self.refused or error
            return memoryview(data).nbytes


def protect_streams() -> None:
    """Let standard output and error survive closed pipes, and names that they cannot spell.

    A descriptor that the caller closed would be the next file's, and whatever is printed there by
    PyTorch would go into a shard: it leads to nowhere instead.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream: TextIO | None = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(number, "w", closefd=False))
            continue
        protected = io.TextIOWrapper(
            io.BufferedWriter(_Pipe(stream.fileno(), "w", closefd=False)),
            encoding=stream.encoding,
            errors="backslashreplace",
            line_buffering=name == "stderr" or stream.isatty(),
        )
        setattr(sys, name, protected)


@contextmanager
def results_alone(wanted: bool) -> Iterator[None]:
    """While it lasts, what anything prints goes to standard error: code that is not ours, and what
    that starts, would break the one JSON document on standard output.

    What lies in buffers at the end is written while that still leads there: those of the streams
    that Python had, and C's own.
    """
    if not wanted:
        yield
        return
    sys.stdout.flush()
    kept, streams = os.dup(1), (sys.stdout, sys.__stdout__)
    try:
        os.dup2(2, 1)
        with redirect_stdout(sys.stderr):
            yield
    finally:
        for stream in streams:
            if stream is not None and not stream.closed:
                with suppress(OSError):  # of what is not ours, and standard error may be gone
                    stream.flush()
        ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)


def finish() -> OSError | None:
    """Write what is still buffered. Returns the system's refusal of what was printed, if there was
    one."""
    show_now()
    stream = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return stream.refused if isinstance(stream, _Pipe) else None


def show_now() -> None:
    """What was printed so far goes into a log or a pipe now. What cannot, is told at the end."""
    if sys.stdout is not None:
        sys.stdout.flush()


def complain(text: str) -> None:
    """One line on standard error, behind what was printed before it."""
    show_now()
    if sys.stderr is not None:
        print(f"infold: {_plain(text)}", file=sys.stderr)


def _plain(text: str) -> str:
    """What a file tells may hold commands to the terminal, such as to go up and delete a line."""
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )


def _width() -> int | None:
    """Columns of the terminal; None where the output goes elsewhere and no COLUMNS are given."""
    if "COLUMNS" not in os.environ and not (sys.stdout and sys.stdout.isatty()):
        return None
    return max(20, shutil.get_terminal_size().columns)


def entry(label: str, text: str, column: int = 9) -> str:
    """`label    text`, the text wrapped within its column on a terminal, and without lines of its
    own, which could be taken for ours."""
    text = _plain(text.replace("\n", " "))
    head, width = label.ljust(column), _width()
    if width is None or len(head) + len(text) <= width:
        return head + text
    return textwrap.fill(
        text,
        width,
        initial_indent=head,
        subsequent_indent=" " * column,
        break_long_words=False,
        break_on_hyphens=False,
    )


def table(rows: Iterable[Sequence[str]]) -> str:
    """Rows in columns, two spaces apart, indented by two. Nothing is cut: where a terminal is too
    narrow, the last column is wrapped, or if that leaves it little, the first has lines of its
    own."""
    listed = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*listed, strict=True)]
    screen = _width()
    if screen is not None and sum(widths) + 2 * len(widths) > screen:
        begin = sum(widths[:-1]) + 2 * len(widths)
        if screen - begin >= _ROOM:
            return "\n".join(
                entry("  " + "  ".join(map(str.ljust, row[:-1], widths)), row[-1], begin).rstrip()
                for row in listed
            )
        rests = ["  ".join(filter(None, row[1:])) for row in listed]
        return "\n".join(
            f"  {row[0]}\n{entry('', rest, 6)}" for row, rest in zip(listed, rests, strict=True)
        )
    return "\n".join("  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in listed)


def fold(
    rows: Iterable[Row], name: Callable[[Row], str], alike: Callable[[Row], Hashable]
) -> list[tuple[str, list[Row]]]:
    """Rows that are alike and whose names differ by numbers alone, as one: `layers.0-29.mlp`.

    Numbers in two places are folded where every combination is there: all experts of all layers.
    """
    groups: dict[Hashable, list[tuple[tuple[int, ...], Row]]] = {}
    for row in rows:
        parts = re.split(r"(?<![^.])(\d+)(?![^.])", name(row))
        numbers = tuple(map(int, parts[1::2]))
        groups.setdefault((tuple(parts[::2]), alike(row)), []).append((numbers, row))
    folded = []
    for group in groups.values():
        choices = [sorted(set(place)) for place in zip(*(n for n, _ in group), strict=True)]
        members = [row for _, row in group]
        if math.prod(map(len, choices)) == len(members):
            texts = re.split(r"(?<![^.])(?:\d+)(?![^.])", name(members[0]))
            ranges = [*map(_ranges, choices), ""]
            pattern = "".join(map(str.__add__, texts, ranges))
            folded.append((pattern, members))
        else:
            folded += [(name(row), [row]) for row in members]
    return folded


def _ranges(numbers: Sequence[int]) -> str:
    """Sorted numbers as people write them: `0-3,7`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)
