"""What a merged folder is, from its headers, config and receipt alone: nothing is loaded."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from keyword import iskeyword
from pathlib import Path
from typing import Any

from blake3 import blake3

from infold.checkpoint.files import (
    digest_of,
    exists,
    locate,
    read_bytes,
    read_object,
    safe_child,
)
from infold.checkpoint.record import UNDO
from infold.checkpoint.safetensors import DTYPE_BITS
from infold.checkpoint.shards import (
    CARD,
    GGUF,
    KEPT_CARD,
    RECEIPT,
    TOKENIZERS,
    Checkpoint,
    companion,
    is_bundled,
    is_loaded,
    is_lone,
    open_checkpoint,
    refuse_unfinished,
)
from infold.disk import storage_errors
from infold.errors import Refusal
from infold.inspect.receipt import checked_receipt

__all__ = [
    "CONFIG",
    "UNDO",
    "Facts",
    "KVCache",
    "check_as_merged",
    "check_deployable",
    "check_for_report",
    "read_facts",
    "receipt_digest",
]

CONFIG = "deployment_config.json"

_CONFIG_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}


@dataclass(frozen=True)
class KVCache:
    """Bytes of keys and values for one token of one sequence, and how they were counted."""

    bytes_per_token: int
    formula: str


@dataclass(frozen=True)
class Facts:
    """A merged folder. Sizes are bytes.

    called: the name of the folder, or of the one that the bundle is written to.
    parameters is None where they are packed, as quantized ones are.
    dtype: safetensors' name of the dtype that holds most bytes. digest: BLAKE3 of the receipt.
    base: a name of the base that is no path of this machine. base_id: its Hub id, if one is known;
    base_given: by that it was merged, and it is not the adapter that names it.
    cache is None where the config does not tell its size; `cacheless` says why.
    context: tokens of the longest sequence that the model was made for, None where not told.
    """

    checkpoint: Checkpoint
    called: str
    receipt: Mapping[str, Any]
    digest: str
    config: Mapping[str, Any]
    parameters: int | None
    weight_bytes: int
    dtype: str
    base: str
    base_id: str | None
    base_given: bool
    adapters: tuple[str, ...]
    methods: tuple[str, ...]
    licence: str | None
    context: int | None
    cache: KVCache | None
    cacheless: str
    undo: bool
    tokenizer: bool
    chat: bool

    @property
    def folder(self) -> Path:
        return self.checkpoint.path

    @property
    def name(self) -> str:
        """The folder's name, in characters that every server takes for a model's name."""
        return re.sub(r"[^\w.-]+", "-", self.called).strip("-.") or "merged"

    @property
    def architecture(self) -> str:
        named = self.config.get("architectures")
        first = str(named[0]) if isinstance(named, list) and named else ""
        word = first.isidentifier() and not iskeyword(first)  # as which it stands in Python code
        return first if word else "unknown"

    @property
    def generates(self) -> bool:
        """Whether it is a causal language model, the kind that is measured and asked here."""
        return self.architecture.endswith(("ForCausalLM", "LMHeadModel"))


def read_facts(merged: str | os.PathLike[str]) -> Facts:
    """The facts of a merged folder. Raises Refusal for a folder that infold did not make."""
    folder = locate(merged)
    refuse_unfinished(folder)
    if is_lone(folder):
        raise Refusal(
            f"{merged}: a GGUF file gets no bundle: it is all that llama.cpp needs; try --smoke"
        )
    if not folder.is_dir() or not exists(folder / RECEIPT):
        raise Refusal(
            f"{merged}: holds no {RECEIPT}: not a merged folder; make one with `infold merge`"
        )
    receipt = checked_receipt(folder)
    checkpoint = open_checkpoint(folder)
    if checkpoint.config is None:
        raise Refusal(f"{merged}: has no config.json, without which no server loads it")
    tensors = [t for shard in checkpoint.shards for t in shard.header.tensors.values()]
    sizes: dict[str, int] = {}
    for tensor in tensors:
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    dtype = max(sizes, key=lambda name: sizes[name], default="F32")
    text = checkpoint.config.get("text_config")
    config = checkpoint.config | text if isinstance(text, dict) else checkpoint.config
    cache, why = _cache(config, dtype)
    given = _given_id(receipt)
    base_id = given or _adapters_id(receipt)
    context = config.get("max_position_embeddings", config.get("n_positions"))
    return Facts(
        checkpoint=checkpoint,
        called=folder.resolve().name,
        receipt=receipt,
        digest=receipt_digest(folder),
        config=checkpoint.config,
        parameters=None
        if "quantization_config" in checkpoint.config
        else sum(math.prod(t.shape) for t in tensors),
        weight_bytes=sum(sizes.values()),
        dtype=dtype,
        base=base_id or _last(receipt["base"]["path"]),
        base_id=base_id,
        base_given=given is not None,
        adapters=tuple(_last(a["path"]) for a in receipt["adapters"]),
        methods=tuple(dict.fromkeys(a["method"] for a in receipt["adapters"])),
        licence=_licence(folder),
        context=context if isinstance(context, int) and context > 0 else None,
        cache=cache,
        cacheless=why,
        undo=exists(folder / UNDO),
        tokenizer=any(exists(folder / name) for name in TOKENIZERS),
        chat=_has_chat_template(folder),
    )


def check_deployable(facts: Facts) -> None:
    """Read all files, and refuse what is no longer what was merged, or what no server could serve.

    Raises Refusal with all reasons.
    """
    folder, wrong = facts.folder, []
    if facts.generates and not facts.tokenizer:
        wrong.append(
            f"{folder}: has no tokenizer, so no server answers; copy the tokenizer files of its "
            "model into the base, and merge again"
        )
    wrong += _changed(folder, facts.checkpoint, facts.receipt)
    if wrong:
        raise Refusal(wrong)


def check_as_merged(merged: str | os.PathLike[str]) -> None:
    """Read all files of a merged folder, or a merged GGUF file, and refuse what is no longer what
    was merged. One without a receipt tells of nothing."""
    place = locate(merged)
    refuse_unfinished(place)
    if exists(companion(place, RECEIPT)):
        checkpoint = open_checkpoint(place)
        if wrong := _changed(checkpoint.home, checkpoint, checked_receipt(place)):
            raise Refusal(wrong)


def check_for_report(folder: Path) -> str | None:
    """As `check_as_merged`, for a folder that may hold records alone: a receipt without any shard
    beside it is one. A GGUF file is checked, too. Returns the digest of the receipt, None where
    there is none."""
    refuse_unfinished(folder)
    if not exists(companion(folder, RECEIPT)):
        return None
    if is_lone(folder) or any(any(folder.glob(kind)) for kind in ("*.safetensors*", f"*{GGUF}")):
        check_as_merged(folder)
    return receipt_digest(folder)


def _changed(folder: Path, checkpoint: Checkpoint, receipt: Mapping[str, Any]) -> list[str]:
    """The shards and side files that are not those of the receipt."""
    wrong, told = [], receipt["shards"]
    for shard in checkpoint.shards:
        path = safe_child(folder, shard.name)
        with storage_errors(path):
            found = blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()
        if told.get(shard.name) != found:
            wrong.append(
                f"{path}: was changed after it was merged: its BLAKE3 is not the receipt's; merge "
                "again (`infold verify` tells which tensors differ)"
            )
    gone = told.keys() - {shard.name for shard in checkpoint.shards}
    wrong += [f"{folder / name}: is gone; merge again" for name in sorted(gone)]
    return wrong + _changed_beside(folder, checkpoint, receipt["side_files"])


def _changed_beside(folder: Path, checkpoint: Checkpoint, told: Mapping[str, str]) -> list[str]:
    """Config, tokenizer and all else that the merge put beside its shards, if it is other now, and
    what came later and changes how the model loads. The model card is for people to read."""
    wrong = []
    for name, digest in told.items():
        path = safe_child(folder, name)
        if name == CARD:
            continue
        if not exists(path):
            wrong.append(f"{path}: is gone since the merge; put it back, or merge again")
            continue
        if digest_of(path) != digest:
            wrong.append(
                f"{path}: was changed after it was merged: its BLAKE3 is not the receipt's; put "
                "the old one back, or change the base's and merge again"
            )
    for name in (*checkpoint.side_files, *checkpoint.left_out):
        ours = name.startswith("infold-") or is_bundled(name)
        if name not in told and not ours and is_loaded(name):
            wrong.append(
                f"{folder / name}: came after the merge, and changes how the model is loaded; move "
                "it elsewhere, or put it into the base and merge again"
            )
    return wrong


def receipt_digest(folder: Path) -> str:
    """BLAKE3 of the receipt's bytes: records carry it, so that those of another merge are told."""
    path = companion(folder, RECEIPT)
    return blake3(read_bytes(safe_child(path.parent, path.name))).hexdigest()


def _given_id(receipt: Mapping[str, Any]) -> str | None:
    """The base's Hub id, where it was merged by that."""
    given = str(receipt["base"]["path"])
    is_id = re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", given) and not os.path.exists(given)
    return given if is_id else None


def _adapters_id(receipt: Mapping[str, Any]) -> str | None:
    """The base's Hub id as the first adapter's config names it."""
    for adapter in receipt["adapters"]:
        path = Path(adapter["path"]) / "adapter_config.json"
        if exists(path):
            named = read_object(path).get("base_model_name_or_path")
            there = isinstance(named, str) and os.path.exists(named)  # a folder of that name
            if isinstance(named, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", named) and not there:
                return named
    return None


def _last(path: str) -> str:
    return path if not os.path.isabs(path) else Path(path).name


def _has_chat_template(folder: Path) -> bool:
    if exists(folder / "chat_template.jinja"):
        return True
    settings = folder / "tokenizer_config.json"
    return exists(settings) and bool(read_object(settings).get("chat_template"))


def _licence(folder: Path) -> str | None:
    """The `license:` of the front matter of the base's model card."""
    for name in (KEPT_CARD, CARD):
        if exists(folder / name):
            text = read_bytes(safe_child(folder, name)).decode(errors="replace")
            front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
            found = front and re.search(r"^license: *['\"]?([\w.+-]+)", front[1], re.MULTILINE)
            if found:
                return str(found[1])
    return None


def _cache(config: Mapping[str, Any], dtype: str) -> tuple[KVCache | None, str]:
    """The size of keys and values of one token; None and why, where the config does not tell it."""

    def first(*names: str) -> int | None:
        return next((v for n in names if isinstance(v := config.get(n), int) and v > 0), None)

    if "kv_lora_rank" in config:
        return None, "the attention compresses keys and values in a way of its own (kv_lora_rank)"
    if config.get("is_encoder_decoder"):
        return None, "an encoder and a decoder keep them in other ways"
    if other := _other_states(config):
        return None, f"some layers keep states of another kind ({other})"
    layers = first("num_hidden_layers", "n_layer", "num_layers")
    heads = first("num_attention_heads", "n_head", "num_heads")
    groups = first("num_key_value_heads", "num_kv_heads", "multi_query_group_num") or heads
    if config.get("multi_query") is True and not config.get("new_decoder_architecture"):
        groups = 1  # Falcon, GPT-BigCode
    width = first("hidden_size", "n_embd", "d_model")
    size = first("head_dim", "d_kv") or (width // heads if width and heads else None)
    if layers is None or groups is None or size is None:
        return None, "config.json does not tell layers, heads and their size"
    usual = dtype if dtype in _CONFIG_DTYPES.values() else "F16"  # of quantized weights
    stored = _CONFIG_DTYPES.get(str(config.get("dtype", config.get("torch_dtype"))), usual)
    nbytes = DTYPE_BITS[stored] // 8
    formula = (
        f"2 (keys, values) x {layers} layers x {groups} heads x {size} elements x {nbytes} bytes "
        f"({stored})"
    )
    return KVCache(2 * layers * groups * size * nbytes, formula), ""


def _other_states(config: Mapping[str, Any]) -> str:
    """What in the config tells of layers that have no keys and values; empty where nothing does."""
    kinds = config.get("layer_types")
    for kind in kinds if isinstance(kinds, list) else ():
        if "attention" not in str(kind) or "linear" in str(kind):
            return f"layer_types: {kind}"
    named = ("hybrid_override_pattern", "block_types", "layers_block_type")
    return next((n for n in config if n in named or n.startswith(("mamba_", "ssm_"))), "")
