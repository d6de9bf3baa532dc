"""The compiled code, and its structs as ctypes knows them."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
from ctypes import POINTER, Structure, c_char_p, c_int64, c_void_p
from pathlib import Path

__all__ = [
    "ADD",
    "BF16",
    "F16",
    "F32",
    "OUTSIDE",
    "SCALE_COLUMNS",
    "SCALE_ROWS",
    "SUBTRACT",
    "TOO_LONG",
    "TOO_SHORT",
    "WIDTH",
    "Job",
    "Operation",
    "Residual",
    "description",
    "level",
    "load",
    "wanted",
]

FOLDER = Path(__file__).parent
SOURCES = ("kernel.h", "kernel.c", "product.h", "product.c", "residual.h", "residual.c")
FILE = "compiled.so"
FLAGS = "-std=gnu11 -O3 -fPIC -fno-fast-math -fno-math-errno -fno-trapping-math -Wall -Wextra"
# The product's sums are exact, so that fusing them changes nothing. Nowhere else may it be done.
FUSING = {
    "kernel.c": "-ffp-contract=off",
    "product.c": "-ffp-contract=fast",
    "residual.c": "-ffp-contract=off",
}

# as in kernel.h and residual.c
BF16, F16, F32 = range(3)
SCALE_ROWS, SCALE_COLUMNS, ADD, SUBTRACT = range(4)
WIDTH = 16
TOO_SHORT, OUTSIDE, TOO_LONG = range(1, 4)

_LEVELS = ("plain", "avx2", "avx512")
_TITLES = ("any processor", "AVX2", "AVX-512")


class Operation(Structure):
    _fields_ = [
        ("kind", c_int64),
        ("vector", c_void_p),
        ("rank", c_int64),
        ("slices", c_int64),
        ("left", c_void_p * 2),
        ("right", c_void_p * 2),
        ("left_row", c_int64),
        ("left_rank", c_int64),
        ("right_rank", c_int64),
        ("right_column", c_int64),
        ("same", c_int64),
    ]


class Job(Structure):
    _fields_ = [
        ("dtype", c_int64),
        ("rows", c_int64),
        ("columns", c_int64),
        ("raw", c_void_p),
        ("out", c_void_p),
        ("near", c_void_p),
        ("raw_row", c_int64),
        ("out_row", c_int64),
        ("near_row", c_int64),
        ("forward", c_int64),
        ("backward", c_int64),
        ("operations", POINTER(Operation)),
        ("panel", c_int64),
        ("scratch", c_void_p),
    ]


class Residual(Structure):
    _fields_ = [
        ("size", c_int64),
        ("count", c_int64),
        ("block", c_void_p),
        ("guess", c_void_p),
        ("coded", c_void_p),
        ("length", c_int64),
        ("scratch", c_void_p),
    ]


def digest() -> str:
    """What the compiled file is known by, so that one of other sources is never used."""
    whole = hashlib.sha256(f"{FLAGS} {FUSING}".encode())
    for name in SOURCES:
        whole.update((FOLDER / name).read_bytes())
    return whole.hexdigest()


def wanted() -> str:
    """$INFOLD_KERNEL: "off", or a level that is to be used instead of a better one.

    Raises Refusal for any other word.
    """
    word = os.environ.get("INFOLD_KERNEL", "").lower()
    if word and word not in ("off", *_LEVELS):
        from infold.errors import Refusal  # hatch_build.py reads this file without its package

        raise Refusal(f"INFOLD_KERNEL={word}: must be off, or one of {', '.join(_LEVELS)}")
    return word


@functools.cache
def load() -> ctypes.CDLL | None:
    """The compiled code; None where there is none, or PyTorch is as fast. Raises Refusal."""
    if wanted() == "off":
        return None
    try:
        made_of = digest()
        loaded = ctypes.CDLL(str(FOLDER / FILE))
        loaded.infold_sources.restype = c_char_p
        loaded.infold_level.restype = c_int64
        if loaded.infold_sources() != made_of.encode():
            return None
        if not loaded.infold_level() and wanted() != _LEVELS[0]:
            return None
        loaded.infold_scratch.argtypes, loaded.infold_scratch.restype = [POINTER(Job)], c_int64
        loaded.infold_edit.argtypes = [POINTER(Job), c_int64]
        loaded.infold_edit.restype = c_int64
        for name in ("infold_code", "infold_decode"):
            function = getattr(loaded, name)
            function.argtypes, function.restype = [POINTER(Residual), c_int64], c_int64
    except (OSError, AttributeError):  # not there, of another machine, or of another infold
        return None
    return loaded


@functools.cache
def level() -> int:
    """The instructions that are used: an index of _LEVELS."""
    loaded = load()
    assert loaded is not None
    best = int(loaded.infold_level())
    lower = [n for n, name in enumerate(_LEVELS) if name == wanted()]
    return min([best, *lower])


def description() -> str:
    """What computes blocks here, for people."""
    return f"compiled for {_TITLES[level()]}" if load() is not None else "by PyTorch"
