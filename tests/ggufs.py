"""GGUF files for tests: written by the gguf package, quantized by ggml's own code where Python has
none (through xllamacpp, which carries it), and read back by the package's dequantizers."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFWriter

Stored = tuple[str, np.ndarray]  # type, and the rows of bytes (of float32 where it is F32)


@cache
def ggml() -> ctypes.CDLL:
    """The library of ggml within xllamacpp."""
    extension = pytest.importorskip("xllamacpp.xllamacpp", reason="the extra gguf is not installed")
    library = ctypes.CDLL(extension.__file__)
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    return library


def encode(values: np.ndarray, dtype: str) -> Stored:
    """float32 values, quantized along their last axis by ggml."""
    kind = GGMLQuantizationType[dtype]
    values = np.ascontiguousarray(values, np.float32)
    if dtype in ("F32", "F16", "BF16"):
        return dtype, gguf.quants.quantize(values, kind)
    elements, size = GGML_QUANT_SIZES[kind]
    columns = values.shape[-1]
    rows = values.size // columns
    data = np.zeros((*values.shape[:-1], columns // elements * size), np.uint8)
    weights = np.ones(columns, np.float32)  # of the inputs, which the smallest types ask for
    written = ggml().ggml_quantize_chunk(
        int(kind),
        values.ctypes.data_as(ctypes.c_void_p),
        data.ctypes.data_as(ctypes.c_void_p),
        ctypes.c_int64(0),
        ctypes.c_int64(rows),
        ctypes.c_int64(columns),
        weights.ctypes.data_as(ctypes.c_void_p),
    )
    assert written == data.nbytes
    return dtype, data


def drawn(rows: int, columns: int, dtype: str, seed: int = 0) -> Stored:
    """Any codes, with one float16 around 0.001 in each block: ggml takes a minute to get ready to
    encode the smallest types."""
    random = np.random.default_rng(seed)
    elements, size = GGML_QUANT_SIZES[GGMLQuantizationType[dtype]]
    blocks = random.integers(0, 256, (rows * columns // elements, size), np.uint8)
    scale = (1e-3 * (1 + random.random((len(blocks), 1)))).astype(np.float16)
    if dtype == "IQ1_M":  # its bits lie in the top nibbles of the four words at the end
        words = np.ascontiguousarray(blocks[:, 48:]).view(np.uint16) & 0x0FFF
        words |= ((scale.view(np.uint16) >> np.array([0, 4, 8, 12], np.uint16)) & 0xF) << 12
        blocks[:, 48:] = words.view(np.uint8)
    else:
        place = 52 if dtype == "TQ1_0" else 0
        blocks[:, place : place + 2] = scale.view(np.uint8)
    return dtype, blocks.reshape(rows, -1)


def decode(stored: Stored) -> np.ndarray:
    """float32 values, by the gguf package; by ggml for the type that it lacks."""
    dtype, data = stored
    if dtype != "Q1_0":
        return gguf.quants.dequantize(data, GGMLQuantizationType[dtype])
    return by_ggml(dtype, data)


def by_ggml(dtype: str, data: np.ndarray) -> np.ndarray:
    """float32 values, by ggml's own code."""
    elements, size = GGML_QUANT_SIZES[GGMLQuantizationType[dtype]]
    values = np.empty((*data.shape[:-1], data.shape[-1] // size * elements), np.float32)
    getattr(ggml(), f"dequantize_row_{dtype.lower()}")(
        np.ascontiguousarray(data).ctypes.data_as(ctypes.c_void_p),
        values.ctypes.data_as(ctypes.c_void_p),
        ctypes.c_int64(values.size),
    )
    return values


def write(
    path: Path,
    architecture: str,
    tensors: Mapping[str, Stored],
    metadata: Mapping[str, Any] | None = None,
    parts: int = 0,
) -> Path:
    """A GGUF file, or the first of `parts` files. Keys of the metadata without the architecture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {}
    if parts:
        options["split_max_tensors"] = -(-len(tensors) // parts)
    writer = GGUFWriter(path, architecture, **options)
    for key, value in (metadata or {}).items():
        add: Any = {
            int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
            list: writer.add_array, bool: writer.add_bool,
        }[type(value)]  # fmt: skip
        plain = key.startswith(("general.", "tokenizer."))
        add(key if plain else f"{architecture}.{key}", value)
    for name, (dtype, data) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=GGMLQuantizationType[dtype])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if not parts else path.with_name(f"{path.stem}-00001-of-{parts:05}.gguf")


def read(path: Path) -> dict[str, Stored]:
    """All tensors of a file, by the gguf package."""
    return {t.name: (t.tensor_type.name, np.array(t.data)) for t in GGUFReader(path).tensors}
