"""The `infold` command: its verbs, and how an error becomes words and an exit code."""

from __future__ import annotations

import difflib
import functools
import json
import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from infold.cli import (
    bench,
    checklist,
    combine,
    deploy,
    inspect,
    loop,
    merge,
    methods,
    report,
    swap,
    train,
    undo,
    verify,
)
from infold.cli.output import Failed, complain, finish, protect_streams
from infold.cli.place import with_home
from infold.errors import InfoldError, Refusal
from infold.version import __version__

_CONTINUES: dict[Callable[..., None], str] = {
    merge.merge: "; the same command continues",
    undo.undo: "; the same command continues",
    swap.swap: "; the same command continues",
    train.train: "; the same command with --resume continues",
    loop.loop: "; the same command continues",
}
_LESS_MEMORY: dict[Callable[..., None], str] = {
    merge.merge: "; give a smaller --max-memory",
    undo.undo: "; give a smaller --max-memory",
    swap.swap: "; give a smaller --max-memory",
    train.train: "; give a smaller --batch-size and a larger --accumulate",
    loop.loop: "; give a smaller collect.batch, or train.batch_size and a larger train.accumulate",
}
_SHOWN = 10  # reasons on a terminal; --json has all

app = typer.Typer(
    name="infold",
    help="Fold trained adapters (IA³, LoRA, DoRA) into checkpoints of any size: streamed, exact, "
    "proven.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 ok, 1 proof failed, 2 bad input or refusal, 3 I/O, 70 a bug in infold, "
    "130 interrupted.",
)


def _guarded(verb: Callable[..., None]) -> Callable[..., None]:
    """A verb that ends every failure in words and its own exit code. 1 is for failed proofs."""

    @functools.wraps(verb)
    def guarded(*args: Any, **given: Any) -> None:
        writing = (merge.merge, undo.undo, swap.swap, combine.combine, train.train)
        writes = verb in writing and not given.get("dry_run")
        given = with_home(given)
        try:
            verb(*args, **given)
        except KeyboardInterrupt:
            runs = verb is not loop.loop or given["words"][0] not in ("show", "checkout")
            again = _CONTINUES.get(verb, "") if runs and not given.get("dry_run") else ""
            complain(f"interrupted{_half_edited(given) or again}")
            raise typer.Exit(130) from None
        except Exception as error:
            less = _LESS_MEMORY.get(verb, "")
            raise typer.Exit(_told(error, writes, given.get("as_json", False), less)) from None

    return guarded


def _half_edited(given: Mapping[str, Any]) -> str:
    """What an interrupted edit in place has left, if it has left anything."""
    if not given.get("in_place"):
        return ""
    from infold.checkpoint.shards import JOURNAL, companion

    place = given.get("base") or given["merged"]
    if not os.path.lexists(companion(Path(place), JOURNAL)):
        return ""
    return (
        f"; {place} may be half edited: do not load it until this or any other command of infold's "
        "on it has completed the edit or taken it back"
    )


def _told(error: Exception, writes: bool, as_json: bool, less_memory: str = "") -> int:
    """Tell an error. Returns the exit code."""
    reasons: Sequence[str] = (str(error),)
    kind = type(error).__name__
    if isinstance(error, InfoldError):
        code = error.exit_code
        if isinstance(error, Refusal):
            reasons = error.reasons
    elif isinstance(error, OSError):
        code, kind = 3, "StorageFailure"
    elif isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # CUDA's
        code, kind, reasons = 3, "MemoryError", (f"out of memory{less_memory}",)
    else:
        code = 70
        reasons = (f"a bug in infold {__version__}: {type(error).__name__}: {error}",)
        traceback.print_exception(error)
        complain("this is a bug in infold, not in your input; please report it, with all above")
    if as_json and not isinstance(error, Failed):
        print(json.dumps({"error": kind, "reasons": list(reasons)}))
    if code == 70:
        return code
    lines = _together(reasons)
    for line in lines[:_SHOWN]:
        complain(line)
    if len(lines) > _SHOWN:
        complain(f"and {len(lines) - _SHOWN:,} more; --json lists all of them")
    if writes and len(reasons) > 1:
        complain("nothing was written")
    return code


def _together(reasons: Sequence[str]) -> list[str]:
    """Reasons that say the same of several tensors of one file, as one line."""

    def split(reason: str) -> tuple[str, str, str]:
        found = re.fullmatch(r"(.*?): ([^\s:]+): (.*)", reason, re.DOTALL)
        return (found[1], found[3], found[2]) if found else ("", reason, "")

    lines = []
    for (place, why), group in groupby(map(split, reasons), lambda parts: parts[:2]):
        keys = [key for _, _, key in group]
        more = f" and {len(keys) - 1:,} more" if len(keys) > 1 else ""
        lines += [f"{place}: {keys[0]}{more}: {why}"] if place else [why] * len(keys)
    return _alike(lines)


def _alike(lines: Sequence[str]) -> list[str]:
    """Lines that differ by the numbers in names alone (layers, experts), or by the element that
    they tell of: the first tells how many are like it."""
    groups: dict[str, list[str]] = {}
    for line in lines:
        alike = re.sub(r"(?<=\.)\d+(?=\.)|(?<=\[)\d+, \d+(?=\]: )", "#", line)
        groups.setdefault(alike, []).append(line)
    return [
        g[0] + (f" (and {len(g) - 1:,} more like this)" if len(g) > 1 else "")
        for g in groups.values()
    ]


_VERBS = (
    merge.merge,
    undo.undo,
    swap.swap,
    train.train,
    loop.loop,
    combine.combine,
    inspect.inspect,
    verify.verify,
    bench.bench,
    methods.methods,
    deploy.deploy,
    checklist.checklist,
    report.report,
)


class _Verb(TyperCommand):
    """A verb whose help calls arguments by their words alone: typer adds the types of Python."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        there = [p for p in self.get_params(ctx) if p.param_type_name == "argument"]
        return ["[OPTIONS]", *(_word(p) if p.required else f"[{_word(p)}]" for p in there)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        told: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for parameter in self.get_params(ctx):
            if (record := parameter.get_help_record(ctx)) is not None:
                option = parameter.param_type_name == "option"
                row = (record[0] if option else _word(parameter), record[1])
                told["Options" if option else "Arguments"].append(row)
        for title, rows in told.items():
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)


def _word(argument: Any) -> str:
    return str(argument.metavar or argument.name)


for _verb in _VERBS:
    app.command(cls=_Verb)(_guarded(_verb))


def _version(asked: bool) -> None:
    if asked:
        from infold.kernel import description

        print(f"infold {__version__} (arithmetic {description()})")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Fold trained adapters into checkpoints."""


def _misused(error: Any) -> int:
    """Tell an unknown option, a missing argument and the like. Returns the exit code.

    Whether the verb would print JSON, nobody has parsed then: the word alone tells.
    """
    message: str = error.format_message()
    if type(error).__name__ == "NoArgsIsHelpError":  # `infold` alone: its message is the help
        print(message)
        return 0
    context: Any = getattr(error, "ctx", None)
    name = context.info_name if context else "".join(sys.argv[1:2])  # not every error has it
    verb = {v.__name__: v for v in _VERBS}.get(name)
    if verb and context and hasattr(error, "possibilities"):  # no such option
        known = [o for p in context.command.params for o in p.opts if o.startswith("-")]
        near = difflib.get_close_matches(error.option_name, known, n=1, cutoff=0.7)
        message = f"{error.message}{f'; did you mean {near[0]}?' if near else ''}"
    complain(message)
    if verb is not None:  # each verb's module begins with its usage
        usage = (sys.modules[verb.__module__].__doc__ or "").partition("\n")[0]
        complain(f"usage: {usage} (all options: infold {verb.__name__} --help)")
    else:
        complain("usage: infold VERB ... (all verbs: infold --help)")
    if "--json" in sys.argv[1:]:
        print(json.dumps({"error": "UsageError", "reasons": [message]}))
    return int(error.exit_code)


class _Complaints(logging.Handler):
    """What the library says beside its results, told as the verbs tell it."""

    def emit(self, record: logging.LogRecord) -> None:
        complain(record.getMessage())


def run() -> None:
    """Read the command line and do what it says. Ends the process."""
    protect_streams()
    logging.getLogger("infold").addHandler(_Complaints())
    logging.getLogger("infold").propagate = False
    try:
        code: Any = app(standalone_mode=False) or 0
    except SystemExit as ended:
        code = ended.code
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except Exception as error:
        # the class of these errors lies elsewhere in each version of typer
        misused = hasattr(error, "format_message") and hasattr(error, "exit_code")
        code = _misused(error) if misused else _told(error, False, False)
    if (unwritten := finish()) is not None:
        complain(f"standard output: {unwritten.strerror}")
        code = code or 3
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is told: the exit code is the work's
    sys.exit(code)
