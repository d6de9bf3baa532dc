"""What some verbs need beside the core's dependencies, and what to do where it is not there."""

from __future__ import annotations

from importlib.util import find_spec

from infold.errors import Refusal

__all__ = ["missing", "needs", "require"]


def needs(extra: str) -> str:
    """How to install an extra. infold is on no package index: a plain `pip install infold` would
    fail, or bring a stranger's package."""
    return f"in infold's clone: pip install '.[{extra}]'"


def missing(extra: str, *modules: str) -> list[str]:
    """What to tell of modules that an extra brings: nothing where all are there. Imports none."""
    lacking = [name for name in modules if find_spec(name) is None]
    return [f"{', '.join(lacking)} not installed; {needs(extra)}"] if lacking else []


def require(extra: str, *modules: str) -> None:
    """Raise Refusal where modules that an extra brings are not there."""
    if wrong := missing(extra, *modules):
        raise Refusal(wrong)
