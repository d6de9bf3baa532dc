"""The `infold` command: its verbs, and how an error becomes one message and an exit code."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from infold.cli import combine, inspect, merge, verify
from infold.errors import InfoldError, Refusal
from infold.version import __version__

app = typer.Typer(
    name="infold",
    help="Fold trained adapters (IA³, LoRA, DoRA) into checkpoints of any size: streamed, exact, "
    "proven.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog="Exit codes: 0 ok, 1 proof failed, 2 bad input or refusal, 3 I/O, 130 interrupted.",
)


def _interruptible(verb: Callable[..., None]) -> Callable[..., None]:
    """A verb that ends with 130 on Ctrl-C; typer would end with 1, as a failed proof does."""

    @functools.wraps(verb)
    def guarded(*args: object, **kwargs: object) -> None:
        try:
            verb(*args, **kwargs)
        except KeyboardInterrupt:
            print("infold: interrupted; the same command continues a merge", file=sys.stderr)
            raise typer.Exit(130) from None

    return guarded


for _verb in (merge.merge, combine.combine, inspect.inspect, verify.verify):
    app.command()(_interruptible(_verb))


def _version(wanted: bool) -> None:
    if wanted:
        print(f"infold {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Fold trained adapters into checkpoints."""


def run() -> None:
    """Entry point of the console script. Every expected failure ends in words and its exit code."""
    try:
        app()
    except InfoldError as error:
        reasons = error.reasons if isinstance(error, Refusal) else (str(error),)
        for reason in reasons:
            print(f"infold: {reason}", file=sys.stderr)
        if len(reasons) > 1:
            print(f"infold: {len(reasons)} problems; nothing was written", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(3)
    except OSError as error:
        print(f"infold: {error}", file=sys.stderr)
        sys.exit(3)
    except MemoryError:
        print("infold: out of memory; give a smaller --max-memory", file=sys.stderr)
        sys.exit(3)
