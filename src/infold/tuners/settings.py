"""The settings of a training, checked as a whole. Their names are the options of `infold train`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from numbers import Real
from pathlib import Path
from typing import Any

from infold.errors import Refusal

__all__ = ["TrainSettings"]

METHODS = ("lora", "dora", "ia3")
TASKS = ("CAUSAL_LM", "SEQ_CLS")
LR = {"lora": 2e-4, "dora": 2e-4, "ia3": 3e-3}  # IA³'s is the one of its paper (2205.05638)


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How to train. Lengths are in tokens, `warmup` and `eval_split` are fractions.

    method: lora, dora or ia3. task: CAUSAL_LM, SEQ_CLS, or None: from base and data.
    epochs: passes over the data. steps: optimizer steps instead. batch_size: rows for each device
    and forward pass. accumulate: forward passes for each optimizer step.
    lr: None: 2e-4, for ia3 3e-3. schedule: linear, cosine or constant, after `warmup` (a fraction
    of all steps). rank, alpha (None: twice the rank), dropout: of LoRA and DoRA.
    targets: endings of module paths; None: found from the model's structure. feedforward: for
    ia3, those of the targets whose inputs are scaled. parameters: for lora, endings of the paths of
    parameters that get an adapter too, such as the experts of a layer. tokens: of LoRA and DoRA:
    tokens, as the tokenizer writes them, whose embeddings are trained too.
    max_length: None: what the model takes, with packing at most 2,048. too_long: what happens to
    longer rows: refuse, cut (at the end) or drop.
    eval_split: a fraction of the rows, or a file. eval_every: steps; None: after each epoch.
    fields: our field -> the data's field. labels: names of the classes. template: the prompt of
    a text/label row when the label is generated.
    """

    method: str = "lora"
    task: str | None = None
    epochs: float = 3.0
    steps: int | None = None
    batch_size: int = 8
    accumulate: int = 1
    lr: float | None = None
    schedule: str = "linear"
    warmup: float = 0.03
    weight_decay: float = 0.0
    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None
    feedforward: tuple[str, ...] | None = None
    parameters: tuple[str, ...] | None = None
    tokens: tuple[str, ...] | None = None
    max_length: int | None = None
    too_long: str = "refuse"
    fields: Mapping[str, str] | None = None
    labels: tuple[str, ...] | None = None
    template: str = "{text}\nLabel:"
    eval_split: float | str | None = None
    eval_every: int | None = None
    seed: int = 0
    bf16: bool = False
    gradient_checkpointing: bool = False
    packing: bool = False
    compile: bool = False
    save_every: int | None = None

    def __post_init__(self) -> None:
        for name in _LISTS:
            value = getattr(self, name)
            if isinstance(value, Iterable) and not isinstance(value, str):
                object.__setattr__(self, name, tuple(value))
        if problems := self._strangers() or self._problems():
            raise Refusal(f"{_option(name)}: {problem}" for name, problem in problems)

    def _strangers(self) -> list[tuple[str, str]]:
        """Values of the wrong kind, as a file may hold them: what follows compares numbers."""
        wrong = []
        for names, told, right in _KINDS:
            for name in names:
                if not right(value := getattr(self, name)):
                    value = list(value) if isinstance(value, tuple) else value
                    wrong.append((name, f"{value!r} must be {told}"))
        return wrong

    def _problems(self) -> list[tuple[str, str]]:
        wrong = []
        for name, allowed in (
            ("method", METHODS),
            ("task", (*TASKS, None)),
            ("schedule", ("linear", "cosine", "constant")),
            ("too_long", ("refuse", "cut", "drop")),
        ):
            if getattr(self, name) not in allowed:
                choice = ", ".join(filter(None, allowed))
                wrong.append((name, f"{getattr(self, name)!r} is not one of {choice}"))
        for name in (
            "steps", "batch_size", "accumulate", "rank", "max_length", "eval_every", "save_every"
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                wrong.append((name, f"{value!r} must be a whole number, 1 or more"))
        for name, low, high in (
            ("epochs", 0, math.inf), ("lr", 0, math.inf), ("alpha", 0, math.inf),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not low < value < high:
                wrong.append((name, f"{value!r} must be a number above 0"))
        for name in ("warmup", "dropout", "weight_decay"):
            if not 0 <= getattr(self, name) < 1:
                wrong.append((name, f"{getattr(self, name)!r} must be at least 0 and below 1"))
        if not 0 <= self.seed < 1 << 32:
            wrong.append(("seed", f"{self.seed} must lie in 0 to 2^32 - 1"))
        if not isinstance(self.eval_split, str | None) and not 0 < self.eval_split < 1:
            wrong.append(("eval_split", f"{self.eval_split} must be a file, or between 0 and 1"))
        if "{text}" not in self.template:
            wrong.append(("template", "must hold {text}, where the row's text goes"))
        if self.feedforward and self.method != "ia3":
            wrong.append(("feedforward", "is a setting of --method ia3"))
        if self.parameters and self.method != "lora":
            wrong.append(("parameters", "is a setting of --method lora"))
        if self.parameters and self.dropout:
            wrong.append(("dropout", "does not go together with --parameters"))
        if self.method == "ia3":
            of_lora = {"rank": self.rank != 16, "alpha": self.alpha is not None,
                       "dropout": self.dropout, "tokens": self.tokens}  # fmt: skip
            wrong += [(n, "is a setting of --method lora and dora") for n in of_lora if of_lora[n]]
        if self.tokens and len(set(self.tokens)) < len(self.tokens):
            wrong.append(("tokens", "has one of them twice"))
        if self.packing and self.task == "SEQ_CLS":
            wrong.append(("packing", "works for CAUSAL_LM only: a row has one class"))
        return wrong

    @property
    def learning_rate(self) -> float:
        return LR[self.method] if self.lr is None else self.lr

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with the defaults filled in."""
        found = asdict(self) | {"lr": self.learning_rate}
        if self.method == "ia3":
            lora = ("rank", "alpha", "dropout", "parameters", "tokens")
            found = {k: v for k, v in found.items() if k not in lora}
        elif self.alpha is None:
            found["alpha"] = 2 * self.rank
        return {k: list(v) if isinstance(v, tuple) else v for k, v in found.items()}

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> TrainSettings:
        """Settings from keywords. Raises TypeError for unknown ones, Refusal for wrong values."""
        unknown = sorted(set(options) - {item.name for item in fields(cls)})
        if unknown:
            raise TypeError(f"train() has no option {', '.join(unknown)}")
        split = options.get("eval_split")
        return cls(**{**options, "eval_split": _fraction_or_file(split)})


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_texts(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(text, str) for text in value)


def _fraction_or_file(value: Any) -> Any:
    """A number, or the path of a file; what is neither stays as it was given."""
    if isinstance(value, str | Path):
        text = str(value)
        try:
            return text if Path(text).exists() else float(text)
        except ValueError:
            return text
    return float(value) if _is_number(value) else value


_LISTS = ("targets", "feedforward", "parameters", "tokens", "labels")
_KINDS: tuple[tuple[tuple[str, ...], str, Callable[[Any], bool]], ...] = (
    (("epochs", "warmup", "weight_decay", "dropout", "seed"), "a number", _is_number),
    (("lr", "alpha"), "a number", lambda v: v is None or _is_number(v)),
    (
        ("eval_split",),
        "a number or a file",
        lambda v: v is None or isinstance(v, str) or _is_number(v),
    ),
    (_LISTS, "a list of texts", lambda v: v is None or _is_texts(v)),
    (("fields",), "a table of names", lambda v: v is None or isinstance(v, Mapping)),
    (("template",), "a text", lambda v: isinstance(v, str)),
    (
        ("bf16", "gradient_checkpointing", "packing", "compile"),
        "true or false",
        lambda v: isinstance(v, bool),
    ),
)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
