"""llama.cpp by its C functions, which the extension module of xllamacpp exports: logits at every
position, and ggml's own quantizers.

Structures that are passed by value are taken for blobs, larger than they are; of their fields only
the first four of the context's, which are old, are set.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import TracebackType

import numpy as np

CONTEXT = 2048  # tokens


class _Blob(ctypes.Structure):
    _fields_ = (("content", ctypes.c_uint8 * 1024),)


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


_Log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_silent = _Log(lambda level, text, data: None)


@cache
def library() -> ctypes.CDLL:
    import xllamacpp.xllamacpp as extension

    found = ctypes.CDLL(extension.__file__)
    blobs = ("llama_model_default_params", "llama_context_default_params")
    for name in blobs:
        getattr(found, name).restype = _Blob
    pointers = (
        "llama_model_load_from_file", "llama_init_from_model", "llama_get_memory",
        "llama_get_logits_ith", "llama_model_get_vocab",
    )  # fmt: skip
    for name in pointers:
        getattr(found, name).restype = ctypes.c_void_p
    found.llama_batch_init.restype = _Batch
    found.ggml_quantize_chunk.restype = ctypes.c_size_t
    found.llama_log_set(_silent, None)
    found.llama_backend_init()
    return found


class Llama:
    """A GGUF file in llama.cpp, on the CPU. Use as `with Llama(file) as model`.

    texts: how many are decoded side by side at most, sharing CONTEXT tokens.
    """

    def __init__(self, file: Path, threads: int = 1, texts: int = 1) -> None:
        lib = library()
        self.model = ctypes.c_void_p(
            lib.llama_model_load_from_file(str(file).encode(), lib.llama_model_default_params())
        )
        if not self.model:
            raise RuntimeError(f"{file}: llama.cpp does not load it")
        settings = lib.llama_context_default_params()
        struct.pack_into("<4I", settings.content, 0, CONTEXT, CONTEXT, 512, texts)
        self.context = ctypes.c_void_p(lib.llama_init_from_model(self.model, settings))
        if not self.context:
            raise RuntimeError(f"{file}: llama.cpp makes no context of it")
        lib.llama_set_n_threads(self.context, threads, threads)
        vocabulary = ctypes.c_void_p(lib.llama_model_get_vocab(self.model))
        self.vocabulary = lib.llama_vocab_n_tokens(vocabulary)
        self.batch = lib.llama_batch_init(CONTEXT, 0, 1)

    def __enter__(self) -> Llama:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        lib = library()
        lib.llama_batch_free(self.batch)
        lib.llama_free(self.context)
        lib.llama_model_free(self.model)

    def forget(self) -> None:
        lib = library()
        lib.llama_memory_clear(ctypes.c_void_p(lib.llama_get_memory(self.context)), True)

    def decode(self, tokens: Sequence[int], start: int = 0) -> None:
        """Go on with one text by these tokens."""
        self._fill([tokens], start, every=False)

    def logits(self, texts: Sequence[Sequence[int]], every: bool) -> list[np.ndarray]:
        """Logits (positions, vocabulary) of texts of their own: every position, or the last."""
        self.forget()
        places = self._fill(texts, 0, every)
        lib, found = library(), []
        for mine in places:
            rows = []
            for place in mine:
                row = ctypes.cast(
                    lib.llama_get_logits_ith(self.context, place), ctypes.POINTER(ctypes.c_float)
                )
                rows.append(np.ctypeslib.as_array(row, (self.vocabulary,)).copy())
            found.append(np.stack(rows))
        return found

    def _fill(self, texts: Sequence[Sequence[int]], start: int, every: bool) -> list[list[int]]:
        """Decode a batch; returns the places in it that have logits, by text."""
        batch, count = self.batch, 0
        places: list[list[int]] = []
        for number, tokens in enumerate(texts):
            places.append([])
            for position, token in enumerate(tokens):
                batch.token[count], batch.pos[count] = token, start + position
                batch.n_seq_id[count], batch.seq_id[count][0] = 1, number
                batch.logits[count] = wanted = every or position == len(tokens) - 1
                if wanted:
                    places[-1].append(count)
                count += 1
        batch.n_tokens = count
        if library().llama_decode(self.context, batch):
            raise RuntimeError("llama_decode failed")
        return places


def quantize(values: np.ndarray, kind: int, size: int) -> np.ndarray:
    """float32 (rows, columns) by ggml's quantizer of type `kind`, without an importance matrix but
    ones, which some types ask for; (rows, size) bytes."""
    values = np.ascontiguousarray(values, np.float32)
    rows, columns = values.shape
    data = np.zeros((rows, size), np.uint8)
    weights = np.ones(columns, np.float32)
    pointer = ctypes.c_void_p
    written = library().ggml_quantize_chunk(
        kind, values.ctypes.data_as(pointer), data.ctypes.data_as(pointer), ctypes.c_int64(0),
        ctypes.c_int64(rows), ctypes.c_int64(columns), weights.ctypes.data_as(pointer),
    )  # fmt: skip
    assert written == data.nbytes
    return data
