"""Modules that an adapter's config says were trained whole, and of which its file has no tensors.

Merged without a word, the model would have the base's there, where training had another.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from infold.plan.config import AdapterConfig
from infold.plan.layouts import HEADS, INPUT_EMBEDDINGS

__all__ = ["not_held"]

# PEFT puts both into modules_to_save for these tasks; a model has the one or the other.
_CLASSIFIERS = ("classifier", "score")
_CLASSIFYING = ("SEQ_CLS", "TOKEN_CLS")


def not_held(
    config: AdapterConfig, parameters: Collection[str], base: Collection[str]
) -> tuple[list[str], list[str]]:
    """(reasons to refuse, notes) about modules of which an adapter's file should hold tensors.

    parameters: what the file holds whole. base: the base's tensors. Both go by paths in memory, of
    which the beginnings may differ.
    """
    reasons, notes = [], []
    for names, enough in _groups(config):
        held = [path for name in enough for path in _held(name, parameters)]
        there = [place for name in names for place in sorted(_places(name, base))]
        if not held:
            reasons += [
                f"holds no tensors of {place}, which modules_to_save names, so the model would "
                "have the base's there; save the adapter again, or take the name out of "
                "adapter_config.json if the base's is meant"
                for place in there
            ]
        if not held and not there:
            notes.append(
                f"modules_to_save names {', '.join(names)}, of which neither the adapter nor the "
                "base has a tensor: nothing of it is merged"
            )
        left = [place for place in there if not any(_alike(place, path) for path in held)]
        if held and left and not set(names) < set(enough):
            more = f" and {len(left) - 1:,} more" if len(left) > 1 else ""
            notes.append(
                f"holds no tensors of {left[0]}{more}, which modules_to_save names too: the "
                "base's stay"
            )
    return reasons, notes


def _groups(config: AdapterConfig) -> Iterator[tuple[list[str], Collection[str]]]:
    """The names of modules_to_save, each with those of which one that is held will do."""
    names = list(dict.fromkeys(config.fields.get("modules_to_save") or ()))
    groups: list[Collection[str]] = []
    if config.fields.get("task_type") in _CLASSIFYING:
        groups.append(_CLASSIFIERS)
    if config.ties:  # PEFT then trains one of them for all
        groups.append((*INPUT_EMBEDDINGS, *HEADS, "shared"))
    for group in groups:
        if together := [name for name in names if name.rpartition(".")[2] in group]:
            names = [name for name in names if name not in together]
            yield together, group
    yield from (([name], [name]) for name in names)


def _held(name: str, parameters: Iterable[str]) -> Iterator[str]:
    """The modules of this name of which a file holds tensors. As in PEFT any ending will do."""
    for parameter in parameters:
        components = parameter.split(".")
        for count in range(1, len(components)):
            if (path := ".".join(components[:count])).endswith(name):
                yield path


def _places(name: str, base: Iterable[str]) -> set[str]:
    """The base's modules of this name, by whole components."""
    found, wanted = set(), f".{name}."
    for tensor in base:
        begin = f".{tensor}".find(wanted)
        if begin >= 0:
            found.add(tensor[: begin + len(name)])
    return found


def _alike(one: str, two: str) -> bool:
    """Whether two paths may be of one module, of which the beginning is left out in one."""
    return f".{one}".endswith(f".{two}") or f".{two}".endswith(f".{one}")
