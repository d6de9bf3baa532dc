"""The configuration of a loop: a TOML file or a mapping, checked as a whole."""

from __future__ import annotations

import difflib
import os
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from infold.checkpoint.files import exists, read_bytes
from infold.errors import Refusal
from infold.extras import require
from infold.tuners.settings import TrainSettings

__all__ = ["FREE", "Collect", "Evaluate", "LoopConfig", "Stop", "in_keys", "read_config"]

BUILT_IN = ("arithmetic", "classify")
FUNCTIONS = ("problems", "prompt", "verify")
FILTERS = ("verifier", "none")
# What may differ between a run and the one that continues it.
FREE = frozenset({"iterations", "stop", "run", "base"})


@dataclass(frozen=True, kw_only=True)
class Collect:
    """How answers are sampled, in each iteration.

    problems: how many are asked. samples: answers for each. keep: at most so many different
    accepted answers of one problem are learnt. batch: answers computed together.
    temperature, top_p: of the sampling. max_tokens, stop: where an answer ends; it is cut before
    the first of the texts in `stop`.
    filter: verifier, or none, which keeps every answer: the control.
    server: the URL of an OpenAI-compatible server, such as vLLM's http://localhost:8000/v1.
    serve: the command that starts it, with {model} for the folder of the weights.
    """

    problems: int = 64
    samples: int = 4
    keep: int = 4
    batch: int = 64
    temperature: float = 0.8
    top_p: float = 1.0
    max_tokens: int = 64
    stop: tuple[str, ...] = ()
    filter: str = "verifier"
    server: str | None = None
    serve: str | None = None


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """The held-out problems. They are answered greedily, with the limits of [collect]."""

    problems: int = 200


@dataclass(frozen=True, kw_only=True)
class Stop:
    """When to end before `iterations`. patience: iterations without a new best score.
    minutes: no iteration begins after so many minutes of work, earlier runs included.
    verify_seconds: a call of the verifier that takes longer ends the loop."""

    patience: int | None = None
    minutes: float | None = None
    verify_seconds: float = 60.0


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """base: a folder or Hub id. run: the folder of the run. task: `name` of a built-in task and
    its options, or the three functions. train: the settings of `infold.train`."""

    base: str
    run: str
    task: Mapping[str, Any]
    iterations: int = 3
    seed: int = 0
    collect: Collect = field(default_factory=Collect)
    train: Mapping[str, Any] = field(default_factory=dict)
    evaluate: Evaluate = field(default_factory=Evaluate)
    stop: Stop = field(default_factory=Stop)

    @property
    def identity(self) -> dict[str, Any]:
        """What a run and its continuation must have in common."""
        return {key: value for key, value in self.to_dict().items() if key not in FREE}

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        found = asdict(self)
        found["collect"]["stop"] = list(self.collect.stop)
        return found


def read_config(
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    seed: int | None = None,
    run: str | os.PathLike[str] | None = None,
) -> LoopConfig:
    """The checked configuration of a TOML file or a mapping. seed, run: in place of its own.

    Paths in a file are relative to its folder. Raises Refusal, with all that is wrong.
    """
    instead: dict[str, Any] = {} if seed is None else {"seed": seed}
    if run is not None:
        instead["run"] = os.path.abspath(run) if os.fspath(run) else ""
    if isinstance(source, Mapping):
        return _checked({**source, **instead}, "the configuration", Path.cwd())
    path = Path(source)
    if not exists(path):
        raise Refusal(f"{path}: no such file; give a configuration, a .toml file")
    if path.is_dir():
        raise Refusal(
            f"{path}: is a folder; give a configuration, a .toml file (a run that began is "
            "continued by its own, and shown by infold loop show)"
        )
    return _checked({**_toml(path), **instead}, str(path), path.parent)


def _toml(path: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        require("train", "tomli")
        import tomli as tomllib
    try:
        found: dict[str, Any] = tomllib.loads(read_bytes(path).decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Refusal(f"{path}: is no TOML file: {error}") from None
    return found


def _checked(given: dict[str, Any], where: str, folder: Path) -> LoopConfig:
    tables = {"collect": Collect, "evaluate": Evaluate, "stop": Stop, "train": TrainSettings}
    wrong = _unknown(given, [item.name for item in fields(LoopConfig)], where, "")
    odd = [name for name in (*tables, "task") if not isinstance(given.get(name, {}), Mapping)]
    wrong += [f"{where}: {name} must be a table: [{name}]" for name in odd]
    given = {name: value for name, value in given.items() if name not in odd}
    for name, kind in tables.items():
        wrong += _unknown(given.get(name, {}), [item.name for item in fields(kind)], where, name)
    required = [f.name for f in fields(LoopConfig) if f.default is f.default_factory is MISSING]
    lacking = [name for name in required if name not in (*given, *odd)]
    wrong += [f"{where}: {name} is missing: {_REQUIRED[name]}" for name in lacking]
    wrong += _task_problems(given["task"], where) if "task" in given else []
    wrong += _value_problems(given, where)
    train = given.get("train", {})
    if "seed" in train:
        wrong.append(f"{where}: train.seed is derived from seed; leave it out")
    known = {item.name for item in fields(TrainSettings)} - {"seed"}
    try:
        TrainSettings.of({name: train[name] for name in train if name in known})
    except Refusal as error:
        wrong += [f"{where}: {in_keys(reason)}" for reason in error.reasons]
    if wrong:
        raise Refusal(wrong)
    collect = dict(given.get("collect", {}))
    collect["stop"] = tuple(collect.get("stop", ()))
    task = dict(given["task"])
    if isinstance(task.get("data"), str):
        task["data"] = _place(task["data"], folder)
    return LoopConfig(
        **given
        | {
            "base": _place(given["base"], folder),
            "run": os.path.abspath(folder / Path(given["run"]).expanduser()),
            "task": task,
            "collect": Collect(**collect),
            "evaluate": Evaluate(**given.get("evaluate", {})),
            "stop": Stop(**given.get("stop", {})),
        }
    )


_REQUIRED = {
    "base": "the model to begin with, a folder or a Hub id",
    "run": "the folder that the run is kept in",
    "task": "the table [task], with the name of a built-in one or with three functions",
}


def in_keys(reason: str) -> str:
    """A reason of a training's, with the keys of [train] where it names options."""
    names = {item.name for item in fields(TrainSettings)}

    def key(option: re.Match[str]) -> str:
        name = option[1].replace("-", "_")
        return f"train.{name}" if name in names else option[0]

    return re.sub(r"--([a-z0-9]+(?:-[a-z0-9]+)*)", key, reason)


def _place(text: str, folder: Path) -> str:
    """A path of the file's folder where there is such a thing; else as it is: a Hub id."""
    path = folder / Path(text).expanduser()
    return os.path.abspath(path) if exists(path) else text


def _unknown(given: Mapping[str, Any], known: list[str], where: str, section: str) -> list[str]:
    told = []
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            told.append(f"{where}: {section + '.' if section else ''}{key} does not exist; {hint}")
    return told


def _task_problems(task: Mapping[str, Any], where: str) -> list[str]:
    functions = [name for name in FUNCTIONS if name in task]
    if "name" in task and functions:
        return [f"{where}: task: give a name or functions, not both"]
    if "name" in task:
        if task["name"] in BUILT_IN:
            return []
        near = difflib.get_close_matches(str(task["name"]), BUILT_IN, 1, 0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        return [f"{where}: task.name {task['name']!r}: {hint}built in are {', '.join(BUILT_IN)}"]
    missing = [name for name in FUNCTIONS if name not in task]
    told = [f"{where}: task.{name} is missing: give module:function" for name in missing]
    return told + _unknown(task, list(FUNCTIONS), where, "task")


_WHOLE = (
    ("", "iterations"), ("collect", "problems"), ("collect", "samples"), ("collect", "keep"),
    ("collect", "batch"), ("collect", "max_tokens"), ("evaluate", "problems"), ("stop", "patience"),
)  # fmt: skip
_ABOVE_ZERO = (
    ("collect", "temperature"), ("collect", "top_p"),
    ("stop", "minutes"), ("stop", "verify_seconds"),
)  # fmt: skip
_MOST = {"top_p": 1, "verify_seconds": 86_400}  # a day; timers overflow


def _value_problems(given: Mapping[str, Any], where: str) -> list[str]:
    def value(section: str, name: str) -> Any:
        return (given.get(section, {}) if section else given).get(name)

    def number(found: Any, kind: type | tuple[type, ...]) -> bool:
        return isinstance(found, kind) and not isinstance(found, bool)

    wrong = []
    for section, name in _WHOLE:
        found = value(section, name)
        if found is not None and not (number(found, int) and found >= 1):
            wrong.append(f"{where}: {section}.{name} {found!r}: must be a whole number, 1 or more")
    for section, name in _ABOVE_ZERO:
        found = value(section, name)
        most = _MOST.get(name, float("inf"))
        if found is not None and not (number(found, (int, float)) and 0 < found <= most):
            more = f", {most:,} at the most" if name in _MOST else ""
            wrong.append(f"{where}: {section}.{name} {found!r}: must be a number above 0{more}")
        elif found == float("inf"):
            more = "; leave it out for no limit" if name == "minutes" else ""
            wrong.append(f"{where}: {section}.{name}: must be finite{more}")
    seed = given.get("seed", 0)
    if not (number(seed, int) and 0 <= seed < 1 << 20):
        wrong.append(f"{where}: seed {seed!r}: must be a whole number from 0 to 2^20 - 1")
    for name in ("base", "run"):
        if name in given and (told := _no_path(given[name])):
            wrong.append(f"{where}: {name} {given[name]!r}: {told}")
    task = given.get("task", {})
    if "data" in task and (told := _no_path(task["data"])):
        wrong.append(f"{where}: task.data {task['data']!r}: {told}")
    for name in ("server", "serve"):
        if (told := value("collect", name)) is not None and not _usable(name, told):
            kind = "a command" if name == "serve" else "an address such as http://localhost:8000/v1"
            wrong.append(f"{where}: collect.{name} {told!r}: must be {kind}")
    stop = value("collect", "stop") or []
    if not (isinstance(stop, list | tuple) and all(isinstance(s, str) and s for s in stop)):
        wrong.append(f"{where}: collect.stop {stop!r}: must be a list of texts")
    if value("collect", "filter") not in (None, *FILTERS):
        told = value("collect", "filter")
        wrong.append(f"{where}: collect.filter {told!r} is not one of {', '.join(FILTERS)}")
    if (value("collect", "server") is None) != (value("collect", "serve") is None):
        wrong.append(
            f"{where}: collect.server needs collect.serve, and serve needs server: the command is "
            "started anew for each model, since a server that stays would answer with old weights"
        )
    return [line.replace(": .", ": ") for line in wrong]


def _no_path(text: Any) -> str:
    """Why something is no path; empty where it is one."""
    if not (isinstance(text, str) and text and "\0" not in text):
        return "must be a path"
    try:
        Path(text).expanduser()
    except RuntimeError as error:  # ~somebody who is not there
        return str(error)
    return ""


def _usable(name: str, text: Any) -> bool:
    """Whether a text is the address of a server, or a command that starts one."""
    if not isinstance(text, str):
        return False
    if name == "server":
        return re.match(r"https?://[^/]", text) is not None
    try:
        return bool(shlex.split(text))
    except ValueError:  # a quotation mark too few
        return False
