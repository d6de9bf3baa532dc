"""What an adapter is to be: PEFT's fields, names and defaults, and its adapter_config.json."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from infold.adapters.peft_config import PLAIN_INITS, UNREAD, bad_patterns, is_ending
from infold.checkpoint.files import locate, read_object, safe_child
from infold.disk import write_whole
from infold.errors import Refusal

__all__ = [
    "HEADS",
    "IA3Config",
    "LoraConfig",
    "Names",
    "TunerConfig",
    "matches",
    "read_config",
    "within",
]

FILE = "adapter_config.json"
_TASKS = (
    "CAUSAL_LM",
    "SEQ_2_SEQ_LM",
    "SEQ_CLS",
    "TOKEN_CLS",
    "QUESTION_ANS",
    "FEATURE_EXTRACTION",
)
HEADS = ("classifier", "score")  # that SEQ_CLS and TOKEN_CLS train whole, as PEFT does
Names = list[str] | str | None
C = TypeVar("C", bound="TunerConfig")


@dataclass(kw_only=True)
class TunerConfig:
    """The fields that all methods share.

    target_modules: the modules that get an adapter: endings of their paths by whole components, or
      a regular expression of the whole path, or "all-linear"; None: found from the structure.
    exclude_modules: those of them that do not, in the same way.
    modules_to_save: modules that are trained whole, as the head of a classifier.
    task_type: PEFT's word for what the model does; SEQ_CLS and TOKEN_CLS also train the head.
    """

    METHOD: ClassVar[str]
    PEFT_TYPE: ClassVar[str]

    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    target_modules: Names = None
    exclude_modules: Names = None
    modules_to_save: list[str] | None = None
    fan_in_fan_out: bool = False

    def __post_init__(self) -> None:
        names = ("target_modules", "exclude_modules", "modules_to_save", "feedforward_modules")
        for name in (*names, "target_parameters"):
            value = getattr(self, name, None)
            if isinstance(value, set | tuple):  # PEFT's configs hold sets
                setattr(self, name, sorted(value) if isinstance(value, set) else list(value))
        problems = self._problems()
        if problems:
            raise Refusal(f"{type(self).__name__}: {problem}" for problem in problems)

    @property
    def peft_type(self) -> str:
        return self.PEFT_TYPE

    @property
    def method(self) -> str:
        """The key in METHODS of what its modules get."""
        return self.METHOD

    def _problems(self) -> list[str]:
        problems = []
        for name in ("target_modules", "exclude_modules", "feedforward_modules"):
            value = getattr(self, name, None)
            if isinstance(value, str):
                problems += _bad_pattern(name, value)
            elif value is not None and not _strings(value):
                problems.append(f"{name} must be a list of names or a regular expression")
        if self.modules_to_save is not None and not _strings(self.modules_to_save):
            problems.append("modules_to_save must be a list of names")
        if self.task_type is not None and self.task_type not in _TASKS:
            problems.append(f"task_type {self.task_type!r} is not one of {', '.join(_TASKS)}")
        return problems

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, as PEFT writes it."""
        own = {item.name: getattr(self, item.name) for item in fields(self)}
        return {"peft_type": self.PEFT_TYPE, **own}

    @classmethod
    def from_dict(cls: type[C], given: Mapping[str, Any], where: str = FILE) -> C:
        """The config that a JSON object means. Raises Refusal for what has no place in it."""
        known = {item.name for item in fields(cls)}
        problems = [
            f"{where}: {name} = {value!r} is not supported by infold's tuners"
            for name, value in given.items()
            if name not in known | UNREAD | {"peft_type"} and value
        ]
        if given.get("peft_type", cls.PEFT_TYPE) != cls.PEFT_TYPE:
            problems.append(f"{where}: peft_type is {given['peft_type']!r}, not {cls.PEFT_TYPE}")
        if problems:
            raise Refusal(problems)
        return cls(**{name: value for name, value in given.items() if name in known})

    @classmethod
    def from_pretrained(cls: type[C], path: str | os.PathLike[str]) -> C:
        """The config of an adapter folder or Hub id."""
        folder = locate(path, (FILE,))
        return cls.from_dict(read_object(safe_child(folder, FILE)), str(folder / FILE))

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write adapter_config.json into a folder, which is made where it is not there.

        Raises StorageFailure.
        """
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True)
        write_whole(Path(folder) / FILE, text.encode())


@dataclass(kw_only=True)
class IA3Config(TunerConfig):
    """IA³ (arXiv 2205.05638).

    feedforward_modules: the targets whose inputs are scaled instead of their outputs; None: those
      that the structure shows to be a feed-forward's second projection.
    init_ia3_weights: begin with ones; False: with random numbers.
    """

    METHOD: ClassVar[str] = "ia3"
    PEFT_TYPE: ClassVar[str] = "IA3"

    feedforward_modules: Names = None
    init_ia3_weights: bool = True

    def _problems(self) -> list[str]:
        problems = super()._problems()
        targets, inner = self.target_modules, self.feedforward_modules
        if isinstance(targets, list) and isinstance(inner, list):
            strangers = sorted(set(inner) - set(targets))
            if strangers:
                problems.append(
                    f"feedforward_modules {', '.join(strangers)} are not among the target_modules "
                    f"{', '.join(targets)}"
                )
        if targets is None and inner is not None:
            problems.append("feedforward_modules without target_modules")
        return problems


@dataclass(kw_only=True)
class LoraConfig(TunerConfig):
    """LoRA (arXiv 2106.09685), rsLoRA and DoRA.

    r, lora_alpha: rank and scale; the update is lora_alpha / r * B A (use_rslora: / sqrt r).
    rank_pattern, alpha_pattern: other values for modules whose path ends in a pattern.
    bias: "none", or train the biases of the targets ("lora_only") or of all modules ("all").
    lora_bias: give B a bias of its own.
    init_lora_weights: True, "gaussian", or False (no factor is 0: the model changes at once).
    target_parameters: parameters that get an adapter, such as the experts of a layer, by endings of
      their paths; target_modules=None then means no modules.
    trainable_token_indices: tokens whose rows of the input embedding are trained as well, and with
      them those of a head that is tied to it; or {name of an embedding or a head: its tokens}.
    ensure_weight_tying: ends of the model that share a weight also share their adapter; refused
      where one of them would get another adapter than trained tokens, which are shared anyway.
    """

    METHOD: ClassVar[str] = "lora"
    PEFT_TYPE: ClassVar[str] = "LORA"

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    bias: str = "none"
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    use_dora: bool = False
    lora_bias: bool = False
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    target_parameters: list[str] | None = None
    ensure_weight_tying: bool = False

    def _problems(self) -> list[str]:
        problems = super()._problems()
        self.rank_pattern, self.alpha_pattern = self.rank_pattern or {}, self.alpha_pattern or {}
        ranks = {"r": self.r, **{f"rank_pattern {k!r}": v for k, v in self.rank_pattern.items()}}
        for name, rank in ranks.items():
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                problems.append(f"{name} = {rank!r} must be a positive integer")
        alphas = {"lora_alpha": self.lora_alpha}
        alphas |= {f"alpha_pattern {k!r}": v for k, v in self.alpha_pattern.items()}
        for name, alpha in alphas.items():
            if not isinstance(alpha, int | float) or not math.isfinite(alpha):
                problems.append(f"{name} = {alpha!r} must be a finite number")
        for pattern in (*self.rank_pattern, *self.alpha_pattern):
            problems += _bad_pattern("rank_pattern or alpha_pattern", pattern)
        if not 0 <= self.lora_dropout < 1:
            problems.append(f"lora_dropout = {self.lora_dropout!r} must be in [0, 1)")
        if self.bias not in ("none", "all", "lora_only"):
            problems.append(f"bias = {self.bias!r} must be none, all or lora_only")
        if self.init_lora_weights not in PLAIN_INITS:
            problems.append(
                f"init_lora_weights = {self.init_lora_weights!r} must be True, False or 'gaussian'"
            )
        if self.use_dora and self.lora_bias:
            problems.append("lora_bias together with use_dora has no defined meaning")
        problems += _bad_tokens(self.trainable_token_indices)
        if self.target_parameters is not None and not _strings(self.target_parameters):
            problems.append("target_parameters must be a list of names")
        if self.target_parameters:
            others = ("lora_dropout", "use_dora", "lora_bias")
            taken = [name for name in others if getattr(self, name)]
            taken += ["bias"] if self.bias != "none" else []
            problems += [f"{name} does not go together with target_parameters" for name in taken]
        if self.layers_pattern and self.layers_to_transform is None:
            problems.append("layers_pattern without layers_to_transform")
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            problems.append("layers_to_transform needs target_modules as a list")
        return problems

    @property
    def method(self) -> str:
        return "dora" if self.use_dora else "lora"

    def rank(self, path: str) -> int:
        """The rank for a module."""
        return int(_matching(self.rank_pattern, path, self.r))

    def scaling(self, path: str) -> float:
        """alpha / rank for a module, or alpha / sqrt(rank) with rsLoRA."""
        rank = self.rank(path)
        alpha = float(_matching(self.alpha_pattern, path, self.lora_alpha))
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


CONFIGS: dict[str, type[TunerConfig]] = {cls.PEFT_TYPE: cls for cls in (IA3Config, LoraConfig)}


def read_config(given: Mapping[str, Any], where: str) -> TunerConfig:
    """The config of the class that peft_type names."""
    kind = given.get("peft_type")
    if not isinstance(kind, str) or kind not in CONFIGS:
        raise Refusal(f"{where}: peft_type {kind!r}; infold's tuners know {', '.join(CONFIGS)}")
    return CONFIGS[kind].from_dict(given, where)


def matches(names: Names, path: str) -> bool:
    """Whether a list of endings, by whole components, or a regular expression means a path."""
    if not names:
        return False
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)


def within(path: str, others: Iterable[str]) -> bool:
    """Whether a module is one of others, or lies in one."""
    return any(path == other or path.startswith(f"{other}.") for other in others)


def _matching(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value of the first pattern that means a path."""
    return next((value for p, value in patterns.items() if is_ending(p, path)), default)


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) and v for v in value)


def _bad_tokens(given: Any) -> list[str]:
    """What is wrong with trainable_token_indices."""
    if given is None:
        return []
    own = "trainable_token_indices"
    lists = {own: given}
    if isinstance(given, dict):
        lists = {f"{own}[{name!r}]": tokens for name, tokens in given.items()}
    problems = [] if lists else [f"{own} = {{}}: name an embedding, or give None"]
    for name, tokens in lists.items():
        if not isinstance(tokens, list) or not tokens:
            problems.append(f"{name} = {tokens!r} must be a list of token numbers")
        elif wrong := [token for token in tokens if type(token) is not int or token < 0]:
            problems.append(f"{name}: {wrong[0]!r} is no token number: 0 or more")
        elif twice := [token for token, count in Counter(tokens).items() if count > 1]:
            problems.append(f"{name}: token {twice[0]} is there twice")
    return problems


def _bad_pattern(name: str, pattern: str) -> list[str]:
    return [f"{name}: {problem}" for problem in bad_patterns([pattern])]
