"""An adapter folder in PEFT's layout: adapter_config.json, adapter_model.safetensors or .bin."""

from __future__ import annotations

import os
import threading
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch

from infold.checkpoint.files import exists, locate, read_object, safe_child
from infold.checkpoint.safetensors import MAX_COMPONENTS, MAX_NAME, open_regular, read_header
from infold.checkpoint.shards import read_exactly
from infold.checkpoint.stamps import Stamp, changes, stamp_of
from infold.dtypes import NAMES, TORCH_DTYPES
from infold.errors import CorruptFile, Refusal, StorageFailure

__all__ = ["CONFIG", "KEPT", "PICKLE", "WEIGHTS", "Adapter", "AdapterTensor", "open_adapter"]

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
KEPT = 2  # tensors that an adapter keeps in memory, where many edits share them
PIECE = 4 << 20  # bytes; a multiple of every element's size


@dataclass(frozen=True, slots=True)
class AdapterTensor:
    """Header of one tensor of an adapter."""

    dtype: str
    shape: tuple[int, ...]
    begin: int  # byte offset in the file; 0 for a tensor from a pickle
    end: int


@dataclass(frozen=True)
class Adapter:
    """A trained adapter. Tensors are read on demand."""

    path: Path
    config: dict[str, Any]
    tensors: Mapping[str, AdapterTensor]
    weights: Path  # the file that holds the tensors
    _loaded: Mapping[str, torch.Tensor] | None = None  # only for .bin
    _kept: dict[str, torch.Tensor] = field(default_factory=dict, compare=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, compare=False, repr=False)
    # of its files; none of what lies in an undo record
    stamps: Mapping[Path, Stamp] = field(default_factory=dict, compare=False, repr=False)

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name`, in its stored dtype and shape, in memory of its own."""
        if self._loaded is not None:
            return self._loaded[name].detach().clone().contiguous()
        info = self.tensors[name]
        if info.end == info.begin:
            return torch.empty(info.shape, dtype=TORCH_DTYPES[info.dtype])
        return self._stretch(info, info.begin, info.end).view(info.shape)

    def rows(self, name: str, first: int, count: int) -> torch.Tensor:
        """Some rows of a tensor, as `read` gives all of them."""
        if self._loaded is not None:
            return self._loaded[name].detach()[first : first + count].clone().contiguous()
        info = self.tensors[name]
        size = (info.end - info.begin) // max(info.shape[0], 1)
        begin = info.begin + first * size
        return self._stretch(info, begin, begin + count * size).view(count, *info.shape[1:])

    def kept(self, name: str) -> torch.Tensor:
        """As `read`, for a tensor that many edits use one after the other: the last KEPT of these
        stay in memory. It must not be changed."""
        with self._lock:
            found = self._kept.pop(name, None)
            if found is None:
                if len(self._kept) == KEPT:
                    del self._kept[next(iter(self._kept))]
                found = self.read(name)
            self._kept[name] = found  # the last to go
            return found

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """The elements of a tensor in file order, a few megabytes at a time."""
        info = self.tensors[name]
        if self._loaded is not None:
            yield from self._loaded[name].detach().flatten().split(PIECE)  # type: ignore[no-untyped-call]
            return
        for begin in range(info.begin, info.end, PIECE):
            yield self._stretch(info, begin, min(begin + PIECE, info.end))

    def _stretch(self, info: AdapterTensor, begin: int, end: int) -> torch.Tensor:
        buffer = bytearray(end - begin)
        try:
            fd = os.open(self.weights, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise StorageFailure(f"{self.weights}: {error.strerror}") from error
        try:
            if reasons := changes(self.weights, self.stamps.get(self.weights), fd):
                raise Refusal(reasons)
            read_exactly(fd, memoryview(buffer), begin, self.weights)
        finally:
            os.close(fd)
        return torch.frombuffer(buffer, dtype=TORCH_DTYPES[info.dtype])


def open_adapter(name: str | os.PathLike[str]) -> Adapter:
    """Open a PEFT folder or a Hub id.

    Raises Refusal for what is no adapter, and later, when it is read, for one that was changed.
    """
    path = locate(name, ("adapter_*", "*.json"))
    if not path.is_dir():
        raise Refusal(f"{path}: an adapter is a folder with {CONFIG} and {WEIGHTS}")
    if not exists(path / CONFIG):
        hint = " (it looks like a base model)" if exists(path / "config.json") else ""
        raise Refusal(f"{path}: no {CONFIG}, so this is not a PEFT adapter{hint}")
    stamps: dict[Path, Stamp] = {}

    def stamped(name: str) -> Path:
        """A file of it, before anything is read there."""
        file = safe_child(path, name)
        stamps[file] = stamp_of(file)
        return file

    config = read_object(stamped(CONFIG))
    if exists(path / WEIGHTS):
        file = stamped(WEIGHTS)
        header = read_header(file)
        odd = [t for t in header.tensors.values() if t.dtype not in TORCH_DTYPES]
        if odd:
            raise Refusal(
                f"{file}: {t.name}: adapter tensors must be floats, not {t.dtype}" for t in odd
            )
        tensors = {
            t.name: AdapterTensor(t.dtype, t.shape, t.begin, t.end) for t in header.tensors.values()
        }
        return Adapter(path, config, tensors, file, stamps=stamps)
    if exists(path / PICKLE):
        return replace(_open_pickle(path, config, stamped(PICKLE)), stamps=stamps)
    raise Refusal(f"{path}: no {WEIGHTS}; the adapter's weights are missing")


def _open_pickle(path: Path, config: dict[str, Any], file: Path) -> Adapter:
    """A .bin adapter, by torch's weights_only unpickler, which runs no code of the file."""
    try:
        with open_regular(file) as stream:
            if _compressed(stream):  # torch never writes one; it could unpack to any size
                raise CorruptFile(f"{file}: is a compressed archive, which PyTorch does not write")
            loaded = torch.load(stream, map_location="cpu", weights_only=True)
    except OSError as error:
        raise StorageFailure(f"{file}: {error.strerror}") from error
    except CorruptFile:
        raise
    except Exception as error:
        raise CorruptFile(
            f"{file}: not a plain pickle of tensors ({type(error).__name__}); "
            "it is not loaded, since a pickle can run code. Save the adapter as safetensors"
        ) from None
    if not isinstance(loaded, dict) or not all(
        isinstance(k, str) and k.isprintable() and _plain(v) for k, v in loaded.items()
    ):
        raise CorruptFile(f"{file}: must map names, of printable text, to float tensors")
    if any(len(k) > MAX_NAME or k.count(".") >= MAX_COMPONENTS for k in loaded):
        raise CorruptFile(
            f"{file}: a name has more than {MAX_NAME} characters or {MAX_COMPONENTS} components"
        )
    tensors = {k: AdapterTensor(NAMES[v.dtype], tuple(v.shape), 0, 0) for k, v in loaded.items()}
    return Adapter(path, config, tensors, file, loaded)


def _compressed(stream: BinaryIO) -> bool:
    packed = False
    if zipfile.is_zipfile(stream):
        with zipfile.ZipFile(stream) as archive:
            packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
    stream.seek(0)
    return packed


def _plain(value: Any) -> bool:
    """A dense float tensor whose elements are all in memory (none is made up by a stride of 0)."""
    return (
        isinstance(value, torch.Tensor)
        and value.dtype in NAMES
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and value.nbytes <= value.untyped_storage().nbytes()
    )
