"""A task: problems, the prompt of each, and who tells a right answer from a wrong one.

The three functions of a task, built in or the user's `module:function`:

    problems(split, count, seed) -> a list of at most `count` problems, JSON values
                                    split is "collect" or "evaluate"; the two must not overlap
    prompt(problem) -> a text, or chat messages [{"role": ..., "content": ...}, ...]; always the
                       same for the same problem
    verify(problem, answer) -> whether the answer (a text) is right: True or False

A problem that is an object with `level` is also scored by it.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import re
import signal
import sys
import threading
import time
import traceback
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from infold.errors import Refusal
from infold.sizes import plural

__all__ = ["Prompt", "Task", "check_apart", "key_of", "open_task", "short"]

Prompt = str | list[dict[str, str]]


@dataclass(frozen=True)
class Task:
    """The functions, guarded: what they raise or return wrongly is told with the problem."""

    make: Callable[[str, int, int], Sequence[Any]]
    ask: Callable[[Any], Prompt]
    check: Callable[[Any, str], bool]
    seconds: float = 60.0  # that one call of `check` may take

    def problems(self, split: str, count: int, seed: int) -> list[Any]:
        """Problems as JSON keeps them. Raises Refusal for none, and for what is no JSON."""
        try:
            made = json.dumps(list(self.make(split, count, seed)), allow_nan=False)
            found: list[Any] = json.loads(made)
        except Refusal:
            raise
        except _WHATEVER as error:
            raise Refusal(f"task: problems({split!r}, {count}, {seed}) {_raised(error)}") from error
        if not found:
            raise Refusal(
                f"task: problems({split!r}, {count}, {seed}) gave none; it must give at least one"
            )
        return found[:count]

    def prompt(self, problem: Any) -> Prompt:
        try:
            found = self.ask(problem)
        except _WHATEVER as error:
            raise Refusal(f"task: prompt {_raised(error)} on {short(problem)}") from error
        if isinstance(found, str) and found:
            return found
        if (
            isinstance(found, list)
            and found
            and all(isinstance(m, Mapping) and {"role", "content"} <= set(m) for m in found)
        ):
            return found
        raise Refusal(
            f"task: prompt gave {short(found)} for {short(problem)}; it must give a text with "
            'something in it, or messages: [{"role": ..., "content": ...}, ...]'
        )

    def verify(self, problem: Any, answer: str) -> bool:
        try:
            with _limited(self.seconds) as clock:
                found = self.check(problem, answer)
            if clock.over:  # and the verifier went on, whatever it made of the interruption
                raise _TooLong
            judged = found in (True, False)
            what = "" if judged else f"gave {found!r}, which is neither True nor False"
        except _TooLong:
            what = f"did not end within {self.seconds:g} s (stop.verify_seconds)"
            raise self._unjudged(what, problem, answer) from None
        except _WHATEVER as error:
            raise self._unjudged(_raised(error), problem, answer) from error
        if not judged:
            raise self._unjudged(what, problem, answer)
        return bool(found)

    def _unjudged(self, what: str, problem: Any, answer: str) -> Refusal:
        return Refusal(
            f"task: verify {what}; problem: {short(problem)}; answer: {short(answer)}. The run "
            "is kept: correct the function and run again"
        )


# What a function of the task may end with: code that an answer holds may well call exit().
_WHATEVER = (Exception, SystemExit)


class _TooLong(BaseException):
    """Nothing that a verifier catches on purpose."""


class _Clock:
    over = False


@contextmanager
def _limited(seconds: float) -> Iterator[_Clock]:
    """Interrupt what takes longer, again and again, since a verifier may catch what interrupts it.

    Only the main thread of a POSIX system can be interrupted, and only between instructions of
    Python; a verifier that uses the same timer (signal.alarm) looks after itself."""
    clock = _Clock()
    main = threading.current_thread() is threading.main_thread()
    if not main or not hasattr(signal, "setitimer"):
        yield clock
        return
    (theirs, again), began = signal.getitimer(signal.ITIMER_REAL), time.monotonic()
    if 0 < theirs <= seconds:  # somebody's alarm, which comes first
        yield clock
        return

    watching = True

    def ring(number: int, frame: FrameType | None) -> None:
        if watching:
            clock.over = True
            raise _TooLong

    before = signal.signal(signal.SIGALRM, ring)
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
            yield clock
        finally:
            watching = False
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL if before is None else before)
        if theirs:
            left = theirs - (time.monotonic() - began)
            signal.setitimer(signal.ITIMER_REAL, max(left, 0.001), again)


def open_task(options: Mapping[str, Any]) -> Task:
    """The task that a configuration names. Raises Refusal, with all functions that fail."""
    if "name" in options:
        rest = {key: value for key, value in options.items() if key != "name"}
        module = importlib.import_module(f"infold.loop.{options['name']}")
        task: Task = module.task(rest)
        return task
    found, wrong = [], []
    for name in ("problems", "prompt", "verify"):
        try:
            found.append(_function(str(options[name])))
        except _WHATEVER as error:  # a module may raise what it likes
            why = str(error) if isinstance(error, Refusal) else _raised(error)
            wrong.append(f"task.{name} = {options[name]!r}: {why}")
    if wrong:
        raise Refusal(wrong)
    make, ask, check = found
    return Task(make, ask, check)


def key_of(prompt: Prompt) -> str:
    """What two prompts have in common that are the same to a reader.

    Case, white space, invisible characters, the kind of quotes and dashes, and the punctuation at
    the end of words do not make a new problem; signs within it do, and `5!` is not 5.
    """
    text = prompt if isinstance(prompt, str) else "\n".join(str(m["content"]) for m in prompt)
    text = unicodedata.normalize("NFC", text).translate(_QUOTES).casefold()
    kinds = ((c, unicodedata.category(c)) for c in text)
    text = "".join("-" if kind == "Pd" else c for c, kind in kinds if kind != "Cf")
    words = text.split()
    # of punctuation alone nothing would be left, and all of it would be the same
    return " ".join(filter(None, (_ENDS.sub("", word) for word in words))) or " ".join(words)


_QUOTES = {ord(c): "'" for c in "‘’‚‛′`´"} | {ord(c): '"' for c in "“”„‟″«»"} | {0x2212: "-"}
_ENDS = re.compile(r"""(?:[.,;:?…]|(?<![\d)])!)+(?=["']*$)""")


def check_apart(held: Sequence[Prompt], collected: Sequence[Prompt]) -> None:
    """Refuse held-out problems among those that answers are collected for, all of them."""
    known = {key_of(prompt) for prompt in held}
    both = sorted({key for prompt in collected if (key := key_of(prompt)) in known})
    if both:
        shown = [f"task: held out and would be learnt from: {short(key)}" for key in both[:10]]
        more = [f"and {plural('other', len(both) - 10)}"] if len(both) > 10 else []
        raise Refusal([*shown, *more, "let problems() keep the splits collect and evaluate apart"])


@functools.cache
def _function(name: str) -> Callable[..., Any]:
    module, _, attribute = name.partition(":")
    if not (module and attribute):
        raise Refusal("write module:function")
    here = os.getcwd()
    sys.path.insert(0, here)  # as `python -m` does
    try:
        loaded = importlib.import_module(module)
    finally:
        sys.path.remove(here)
        if here not in sys.path:  # for what the task imports later; it hides no library from us
            sys.path.append(here)
    found = getattr(loaded, attribute, None)
    if not callable(found):
        origin = getattr(loaded, "__file__", None) or "built into Python"
        raise Refusal(
            f"{module} ({origin}) has no function {attribute}; if yours is another file, give it a "
            "name that no library has"
        )
    return found  # type: ignore[no-any-return]


def _raised(error: BaseException) -> str:
    """What a task's function raised, and where in its own file."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = (__file__, importlib.__file__)
    theirs = [f for f in frames if f.filename not in ours and not f.filename.startswith("<frozen")]
    lines = [f.lineno for f in theirs if f.filename == theirs[0].filename]
    where = f" ({theirs[0].filename}, line {lines[-1]})" if lines else ""
    return f"raised {type(error).__name__}: {error}{where}"


def short(value: Any) -> str:
    """A value of the task's, as JSON, for a message."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 300 else f"{text[:300]}..."
