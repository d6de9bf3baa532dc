"""Causal language models and tokenizers as plain transformers loads them: from a folder, or from a
GGUF file, whose weights it decodes."""

from __future__ import annotations

import logging as python_logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from infold.checkpoint.files import exists, locate, read_object
from infold.checkpoint.gguf import is_gguf
from infold.checkpoint.shards import GGUF, TOKENIZERS, is_lone, open_checkpoint, refuse_unfinished
from infold.errors import Refusal
from infold.tuners.model import load as load_adapter

__all__ = [
    "attach_all",
    "calm",
    "config_of",
    "gguf_file",
    "load_model",
    "model_folder",
    "most_tokens",
    "pad_id",
    "positions_of",
    "tokenizer_of",
]

PathLike = str | os.PathLike[str]

# They tell of kernels that are not there, when they are imported, or at each call of a layer.
_TALKATIVE = ("bitsandbytes", "torchao", "torch.utils._pytree")
# What transformers raises for models that it cannot read.
_UNREADABLE = (ValueError, OSError, KeyError, ImportError, TypeError)


def positions_of(config: Any) -> int | None:
    """Tokens in a row by a model's config; None where it does not tell."""
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    return most if isinstance(most, int) and most > 0 else None


def most_tokens(config: Any) -> int | None:
    """Tokens that a model takes in a row; None where its config does not tell, or scales its
    positions (YaRN and others), which may take it further than that number."""
    text = config.get_text_config()
    told = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    # one for all layers, or one for each kind of them
    kinds = [one for one in (told, *told.values()) if isinstance(one, dict)]
    usual = {kind.get("rope_type", kind.get("type")) for kind in kinds} <= {None, "default"}
    return positions_of(config) if usual else None


def model_folder(name: PathLike, *, quantized: bool = False) -> Path:
    """The folder of a causal language model that transformers can load; a Hub id is downloaded.
    quantized: whether its weights may be.

    Raises Refusal for a folder that is none, without reading weights, and as `refuse_unfinished`.
    """
    folder = locate(name)
    refuse_unfinished(folder)
    if not folder.is_dir() or not exists(folder / "config.json"):
        hint = ""
        if folder.is_dir() and exists(folder / "adapter_config.json"):
            hint = ": it is an adapter, give its base"
        elif folder.is_file() and is_gguf(folder):
            hint = ": of a GGUF file give the folder that it was converted from"
        raise Refusal(f"{os.fspath(name)}: no folder with a config.json, so no model to run{hint}")
    config = read_object(folder / "config.json")
    if config.get("quantization_config") and not quantized:
        raise Refusal(f"{os.fspath(name)}: quantized weights cannot be run here yet")
    return folder


def gguf_file(name: PathLike) -> Path | None:
    """The file of a GGUF model, given by itself or by its folder; None for another model.

    Raises Refusal for one in several parts, which transformers does not read, and as
    `open_checkpoint` does.
    """
    path = Path(name)
    if path.is_dir():
        if any(path.glob("*.safetensors")) or not any(path.glob("*" + GGUF)):
            return None
    elif not (path.is_file() and (is_lone(path) or is_gguf(path))):
        return None
    shards = open_checkpoint(path).shards
    if len(shards) > 1:
        raise Refusal(
            f"{path}: a GGUF model in {len(shards)} parts, and transformers reads only whole ones; "
            "join its parts (llama-gguf-split --merge) to run it here"
        )
    return shards[0].path


def load_model(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype | str = "auto",
    *,
    strangers: bool = False,
) -> Any:
    """The model of a folder or of a GGUF file, in evaluation mode. dtype "auto": as it is stored.
    What a GGUF file holds is decoded to float32.

    Raises Refusal where transformers cannot load it, or where tensors are missing or of another
    shape: transformers would go on with random values. So where some are left over, but with
    `strangers`: a base may have a head that nobody runs here.
    """
    from transformers import AutoModelForCausalLM

    place, options = _place(folder)
    if options:
        dtype, options = torch.float32, options | _decoding(folder)
    try:
        with calm(), _no_bar_of_gguf():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                place, dtype=dtype, output_loading_info=True, local_files_only=True, **options
            )
        model, told = loaded
    except (*_UNREADABLE, RuntimeError) as error:
        raise Refusal(f"{folder}: transformers cannot load it: {_first_line(error)}") from None
    except Exception as error:  # safetensors raises a class of its own for broken files
        if type(error).__name__ != "SafetensorError":
            raise
        raise Refusal(f"{folder}: a broken safetensors file: {_first_line(error)}") from None
    kinds = ("missing", "mismatched") if strangers else ("missing", "unexpected", "mismatched")
    wrong = {kind: told.get(f"{kind}_keys") for kind in kinds}
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
    """The tokenizer of a folder or in a GGUF file. Raises Refusal where there is none."""
    from transformers import AutoTokenizer

    place, options = _place(folder)
    beside = any(exists(place / name) for name in TOKENIZERS)
    if not (options or beside):
        raise Refusal(f"{folder}: has no tokenizer; copy the tokenizer files of its model into it")
    ways: list[dict[str, Any]] = [options] if options else []
    if beside:  # what somebody put beside a GGUF file is meant for it
        ways.insert(0, {})
    problem = ""
    for way in ways:
        try:
            with calm():
                return AutoTokenizer.from_pretrained(place, local_files_only=True, **way)
        except _UNREADABLE as error:
            problem = problem or _first_line(error)
        except Exception as error:  # of the tokenizers package, which has no class of its own
            if type(error) is not Exception:
                raise
            problem = problem or _first_line(error)
    hint = f"; copy the tokenizer files of its model into {place}" if options else ""
    raise Refusal(f"{folder}: the tokenizer cannot be read: {problem}{hint}")


def pad_id(tokenizer: Any) -> int:
    """The id that fills a row up, which an attention mask or the labels take out again."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(int(i) for i in ids if i is not None)


def config_of(folder: Path) -> Any:
    """The config of a folder, or what a GGUF file tells of it. Raises Refusal where transformers
    cannot read it."""
    from transformers import AutoConfig

    place, options = _place(folder)
    try:
        with calm():
            return AutoConfig.from_pretrained(place, local_files_only=True, **options)
    except _UNREADABLE as error:
        told = _first_line(error)
        raise Refusal(f"{folder}: transformers cannot read the config: {told}") from None


def _place(model: Path) -> tuple[Path, dict[str, Any]]:
    """What transformers wants to be told of a model: a folder, and the name of a GGUF file."""
    if not model.is_file():
        return model, {}
    return model.parent, {"gguf_file": model.name}


def _decoding(file: Path) -> dict[str, Any]:
    """Settings that make transformers decode a GGUF file, which versions before 5.21 always do."""
    import transformers

    kind: Any = getattr(transformers, "GgufConfig", None)
    return {} if kind is None else {"quantization_config": kind(file.name, dequantize=True)}


@contextmanager
def _no_bar_of_gguf() -> Iterator[None]:
    """The reader of GGUF files draws a bar that no setting of transformers hides."""
    try:
        reader: Any = import_module("transformers.modeling_gguf_pytorch_utils")
        bar = reader.tqdm
    except (ImportError, AttributeError):  # of another version
        yield
        return
    reader.tqdm = partial(bar, disable=True)
    try:
        yield
    finally:
        reader.tqdm = bar


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
