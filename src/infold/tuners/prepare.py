"""Everything about a training that is known before the model is loaded, checked as a whole."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infold.checkpoint.files import exists, locate
from infold.checkpoint.shards import refuse_unfinished
from infold.errors import Refusal
from infold.tuners.data import DataSet, read_data
from infold.tuners.loading import config_of, pad_id, positions_of, tokenizer_of
from infold.tuners.settings import TrainSettings
from infold.tuners.tokens import Tokens, check_labels, class_names, encode, pack

__all__ = ["SMALL", "Prepared", "prepare"]

SMALL = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")  # config and tokenizer
_PACKED = 2048  # tokens of a packed row, where the model takes more and nothing else is said


@dataclass(frozen=True)
class Prepared:
    """Everything that is known before the model is loaded."""

    folder: Path  # of the base: config and tokenizer
    config: Any
    tokenizer: Any
    task: str
    classes: list[str]
    rows: list[Tokens]
    eval_rows: list[Tokens]
    pad_id: int
    trained: list[int]  # tokens whose embeddings are trained
    data: dict[str, Any]  # for the record
    notes: list[str]


def prepare(
    base: str | os.PathLike[str], data: str | os.PathLike[str], settings: TrainSettings
) -> Prepared:
    """Read config, tokenizer and data, decide the task, and check every row. Loads no weights."""
    name = os.fspath(base)
    folder = locate(base, SMALL)
    refuse_unfinished(folder)
    if not exists(folder / "config.json"):
        hint = " (an adapter: give its base)" if exists(folder / "adapter_config.json") else ""
        if folder.is_file():
            hint = " (a file: give the model's folder; of a GGUF file the one it was made from)"
        raise Refusal(
            f"{name}: no config.json, so this is no base model in transformers' form{hint}"
        )
    found = read_data(data, settings.fields)
    config = config_of(folder)
    tokenizer = tokenizer_of(folder)
    task = _task(name, config, found, settings)
    limit = _limit(name, config, tokenizer, settings)
    classes = _classes(found, task, settings)
    held = None
    if isinstance(settings.eval_split, str):
        held = read_data(settings.eval_split, settings.fields, like=found)
        if classes:
            check_labels(held, classes)

    def tokens(rows: DataSet) -> tuple[list[Tokens], int]:
        return encode(
            rows,
            tokenizer,
            limit=limit,
            too_long=settings.too_long,
            template=settings.template,
            classes=classes,
            heads=task == "SEQ_CLS",
        )

    trained = _trained(name, tokenizer, settings)
    rows, changed = tokens(found)
    eval_rows: list[Tokens] = []
    if held is not None:
        eval_rows, _ = tokens(held)
    elif isinstance(settings.eval_split, float):
        rows, eval_rows = _split(rows, settings.eval_split, settings.seed, found.name)
    facts = {
        "path": found.name,
        "files": list(found.files),
        "digest": found.digest,
        "eval_digest": held.digest if held else None,
        "shape": found.shape,
        "rows": len(rows),
        "eval_rows": len(eval_rows),
        "tokens": sum(len(row.ids) for row in rows),
        "learnt_tokens": sum(row.learnt for row in rows),
    }
    notes = []
    if found.ignored:
        notes.append(f"fields that are not used: {', '.join(found.ignored)}")
    if changed:
        done = "cut at" if settings.too_long == "cut" else "dropped, being longer than"
        notes.append(f"{changed:,} rows were {done} {limit:,} tokens")
    seen = {token for row in rows for token in row.ids}
    if absent := [t for t, i in zip(settings.tokens or (), trained, strict=True) if i not in seen]:
        notes.append(f"in no row, so it learns nothing from being read: {', '.join(absent)}")
    if settings.packing:
        rows, eval_rows = pack(rows, limit), pack(eval_rows, limit)
        facts["packed_rows"] = len(rows)
    pad = pad_id(tokenizer)
    return Prepared(
        folder, config, tokenizer, task, classes, rows, eval_rows, pad, trained, facts, notes
    )


def _trained(name: str, tokenizer: Any, settings: TrainSettings) -> list[int]:
    """The numbers of the tokens whose embeddings are trained."""
    if not settings.tokens:
        return []
    known = tokenizer.get_vocab()
    strangers = [token for token in settings.tokens if token not in known]
    if strangers:
        raise Refusal(
            f"--tokens: {token!r} is no token of {name}; give one as its tokenizer lists it, or "
            "add it to the tokenizer and resize the model's embeddings first"
            for token in strangers
        )
    return [known[token] for token in settings.tokens]


def _task(name: str, config: Any, data: DataSet, settings: TrainSettings) -> str:
    """What is trained. A causal model learns to write the label; others get a head for it."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    causal = {
        cls
        for classes in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        for cls in ([classes] if isinstance(classes, str) else classes)
    }
    made_for = list(getattr(config, "architectures", None) or ())
    writes = any(a in causal for a in made_for) and not getattr(config, "is_encoder_decoder", False)
    task = settings.task or ("SEQ_CLS" if data.shape == "label" and not writes else "CAUSAL_LM")
    if task == "SEQ_CLS" and data.shape != "label":
        raise Refusal(f"{data.name}: --task SEQ_CLS needs the fields text and label")
    if task == "SEQ_CLS" and settings.packing:
        raise Refusal("--packing works for CAUSAL_LM only: in SEQ_CLS a row has one class")
    if task == "CAUSAL_LM" and not writes:
        raise Refusal(
            f"{name}: is made for {', '.join(made_for) or 'an unknown task'}, which is no causal "
            "language model of transformers; such a base can be trained on text and label "
            "(--task SEQ_CLS)"
        )
    return task


def _classes(data: DataSet, task: str, settings: TrainSettings) -> list[str]:
    if data.shape != "label":
        if settings.labels:
            raise Refusal(f"--labels: names classes, and {data.name} has no field label")
        return []
    numbers = isinstance(data.examples[0].values["label"], int)
    if task == "CAUSAL_LM" and numbers and not settings.labels:
        raise Refusal(
            f"{data.name}: labels are numbers, which say nothing to a language model; name them, "
            "from 0 on: --labels negative,positive (or train a head: --task SEQ_CLS)"
        )
    return class_names(data, settings.labels)


def _limit(name: str, config: Any, tokenizer: Any, settings: TrainSettings) -> int:
    """The most tokens of a row."""
    text, positions = config.get_text_config(), positions_of(config)
    if positions is not None and text.model_type in ("roberta", "xlm-roberta", "camembert"):
        positions -= text.pad_token_id + 1  # their positions begin behind the padding's
    told = tokenizer.model_max_length
    model = min(positions or 1 << 62, told if told and told < 1 << 40 else 1 << 62)
    if settings.max_length is None:
        return min(model, _PACKED) if settings.packing else model
    if positions is not None and settings.max_length > positions:
        raise Refusal(
            f"--max-length {settings.max_length}: {name} takes {positions} tokens at most"
        )
    return settings.max_length


def _split(
    rows: list[Tokens], share: float, seed: int, name: str
) -> tuple[list[Tokens], list[Tokens]]:
    """Hold a share of the rows out, chosen by the seed."""
    count = max(1, round(share * len(rows)))
    if count >= len(rows):
        raise Refusal(f"{name}: {len(rows)} rows are too few to hold {share:.0%} of them out")
    held = set(random.Random(seed).sample(range(len(rows)), count))
    kept = [row for number, row in enumerate(rows) if number not in held]
    return kept, [rows[number] for number in sorted(held)]
