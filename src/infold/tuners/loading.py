"""Causal language models and tokenizers as plain transformers loads them."""

from __future__ import annotations

import logging as python_logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from infold.checkpoint.files import exists, locate, read_object
from infold.checkpoint.shards import TOKENIZERS
from infold.errors import Refusal
from infold.tuners.model import load as load_adapter

__all__ = ["attach_all", "calm", "device_of", "load_model", "model_folder", "tokenizer_of"]

PathLike = str | os.PathLike[str]

# They tell of kernels that are not there, when they are imported, or at each call of a layer.
_TALKATIVE = ("bitsandbytes", "torchao", "torch.utils._pytree")


def device_of(name: str) -> torch.device:
    """The device of "cpu", "cuda" or "cuda:N". Raises Refusal for one that is not there."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise Refusal(f"{name}: no such device: give cpu, cuda or cuda:N")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise Refusal(f"{name}: PyTorch sees {count or 'no'} CUDA devices; give cpu")
    return device


def model_folder(name: PathLike, *, quantized: bool = False) -> Path:
    """The folder of a causal language model that transformers can load; a Hub id is downloaded.
    quantized: whether its weights may be.

    Raises Refusal for a folder that is none, without reading weights.
    """
    folder = locate(name)
    if not folder.is_dir() or not exists(folder / "config.json"):
        adapter = folder.is_dir() and exists(folder / "adapter_config.json")
        hint = ": it is an adapter, give its base" if adapter else ""
        raise Refusal(f"{os.fspath(name)}: no folder with a config.json, so no model to run{hint}")
    config = read_object(folder / "config.json")
    if config.get("quantization_config") and not quantized:
        raise Refusal(f"{os.fspath(name)}: quantized weights cannot be run here yet")
    return folder


def load_model(folder: Path, device: torch.device, dtype: torch.dtype | str = "auto") -> Any:
    """The model of a folder, in evaluation mode. dtype "auto": as it is stored.

    Raises Refusal where transformers cannot load it, or where tensors are missing, left over or
    of another shape: transformers would go on with random values.
    """
    from transformers import AutoModelForCausalLM

    try:
        with calm():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, output_loading_info=True, local_files_only=True
            )
        model, told = loaded
    except (ValueError, OSError, KeyError, ImportError, TypeError, RuntimeError) as error:
        raise Refusal(f"{folder}: transformers cannot load it: {_first_line(error)}") from None
    except Exception as error:  # safetensors raises a class of its own for broken files
        if type(error).__name__ != "SafetensorError":
            raise
        raise Refusal(f"{folder}: a broken safetensors file: {_first_line(error)}") from None
    wrong = {kind: told.get(f"{kind}_keys") for kind in ("missing", "unexpected", "mismatched")}
    problems = [
        f"{folder}: {key if isinstance(key, str) else key[0]}: {kind} tensor"
        for kind, keys in wrong.items()
        for key in sorted(keys or ())
    ]
    if problems:
        raise Refusal(problems)
    return model.to(device).eval()


def attach_all(model: Any, adapters: Sequence[PathLike]) -> Any:
    """The model with all adapters attached and in force, in their order."""
    names = [f"adapter{number}" for number in range(len(adapters))]
    for name, path in zip(names, adapters, strict=True):
        model = load_adapter(model, path, name)
    model.set_adapter(names)
    return model.eval()


def tokenizer_of(folder: Path) -> Any:
    """The tokenizer of a folder. Raises Refusal where there is none."""
    from transformers import AutoTokenizer

    if not any(exists(folder / name) for name in TOKENIZERS):
        raise Refusal(f"{folder}: has no tokenizer; copy the tokenizer files of its model into it")
    try:
        with calm():
            return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (ValueError, OSError, KeyError, ImportError, TypeError) as error:
        raise Refusal(f"{folder}: the tokenizer cannot be read: {_first_line(error)}") from None


@contextmanager
def calm() -> Iterator[None]:
    """No bars and reports of transformers: what matters of them is checked and told here."""
    from transformers.utils import logging as untyped

    logging: Any = untyped

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    others = {log: log.level for log in map(python_logging.getLogger, _TALKATIVE)}
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for log in others:
        log.setLevel(python_logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        for log, was in others.items():
            log.setLevel(was)
        if bars:
            logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
