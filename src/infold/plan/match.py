"""Adapter keys -> modules of the base.

PEFT names modules as they are in memory. On disk the same module can lack leading components
(`h.0...` for `transformer.h.0...`), carry more, or have them in another order. A module resolves to
the tensor with the longest equal ending, by whole components, where
  the differing beginnings hold no layer number, so layer 1 never becomes layer 11 or 2;
  one beginning has all components of the other, so an encoder never becomes a decoder;
  the base has no such place that only lacks this tensor;
  only one tensor has that longest ending;
  the same beginning is always exchanged for the same other one.
"""

from __future__ import annotations

import difflib
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from infold.adapters import METHODS
from infold.plan.layouts import numeric

__all__ = ["Grouped", "Names", "group_keys"]

PREFIX = "base_model.model."
# ending of a key -> name of the part; an ending that contains another comes first
_ENDINGS = dict(
    sorted(
        {key: part for method in METHODS.values() for key, part in method.KEYS.items()}.items(),
        key=lambda item: -len(item[0]),
    )
)
_WRAPPERS = frozenset(("base_layer", "token_adapter"))  # PEFT's, around a module of the base
_COPIES = frozenset(("modules_to_save", "original_module"))


@dataclass
class Grouped:
    """The keys of an adapter, by what they are."""

    modules: dict[str, dict[str, str]] = field(default_factory=lambda: defaultdict(dict))
    plain: dict[str, str] = field(default_factory=dict)  # parameter path -> key
    copies: dict[str, str] = field(default_factory=dict)  # the same values once more
    unused: list[str] = field(default_factory=list)  # values from before the training
    strange: list[str] = field(default_factory=list)


def group_keys(keys: Iterable[str]) -> Grouped:
    """Split an adapter's keys into parts of methods, {module: {part: key}}, and plain tensors.

    Where an embedding was resized, PEFT writes all that its wrappers hold: `modules_to_save` a
    second time, and the `original_module` that it replaces.
    """
    found = Grouped()
    doubtful = {}
    for key in sorted(keys):
        path = key.removeprefix(PREFIX)
        ending = next((ending for ending in _ENDINGS if path.endswith(ending)), None)
        components = path.split(".")
        if path == key or len(components) < 2:
            found.strange.append(key)
        elif ending is not None:
            parts = found.modules[path.removesuffix(ending)]
            if _ENDINGS[ending] in parts:
                found.strange.append(key)
            parts[_ENDINGS[ending]] = key
        elif any(c.startswith(("lora_", "ia3_")) for c in components):
            found.strange.append(key)
        elif not _COPIES.isdisjoint(components):
            doubtful[key] = ".".join(c for c in components if c not in _WRAPPERS | _COPIES)
        else:
            parameter = ".".join(c for c in components if c not in _WRAPPERS)
            if parameter in found.plain:
                found.strange.append(key)
            found.plain[parameter] = key
    for key, parameter in doubtful.items():
        if parameter not in found.plain:
            found.strange.append(key)
        elif ".original_module." in key:
            found.unused.append(key)
        else:
            found.copies[parameter] = key
    return found


@dataclass
class _Ending:
    """Names below one trailing path, in a tree that is keyed from the last component."""

    children: dict[str, _Ending]
    names: list[str]


class Names:
    """The tensor names of a base, by their endings; remembers which beginnings it exchanged."""

    def __init__(self, names: Iterable[str]) -> None:
        self.all = set(names)
        self._root = _Ending({}, [])
        self._exchanged: dict[str, str] = {}
        self._sorted = sorted(self.all)
        for name in self.all:
            node = self._root
            for component in reversed(name.split(".")):
                node = node.children.setdefault(component, _Ending({}, []))
                node.names.append(name)

    def find(self, parameter: str) -> str | None:
        """The base tensor for a parameter path in memory.

        None when nothing fits; raises LookupError with a sentence when more than one does.
        """
        if parameter in self.all:
            return parameter
        components = parameter.split(".")
        node, shared = self._root, 0
        for component in reversed(components):
            child = node.children.get(component)
            if child is None:
                break
            node, shared = child, shared + 1
        if shared < 2:  # `weight` alone says nothing
            return None
        ours = ".".join(components[: len(components) - shared])
        if numeric(ours) or self._holds(components[: len(components) - shared + 1]):
            return None
        fitting = []
        for name in node.names:
            theirs = ".".join(name.split(".")[:-shared])
            if not numeric(theirs) and _alike(ours, theirs):
                fitting.append((name, theirs))
        if len(fitting) > 1:
            names = ", ".join(sorted(name for name, _ in fitting))
            raise LookupError(f"could be any of {names}")
        if not fitting:
            return None
        name, theirs = fitting[0]
        known = self._exchanged.setdefault(ours, theirs)
        if known != theirs:
            raise LookupError(
                f"would be {name}, but elsewhere {ours or 'nothing'!r} became "
                f"{known or 'nothing'!r}"
            )
        return name

    def _holds(self, beginning: list[str]) -> bool:
        """Whether a tensor's name begins so: the place exists, and it lacks what is looked for."""
        start = ".".join(beginning) + "."
        place = bisect_left(self._sorted, start)
        return place < len(self._sorted) and self._sorted[place].startswith(start)

    def nearest(self, parameter: str) -> str:
        """For a message: the names that look most like this one."""
        leaf = parameter.rsplit(".", 2)[-2] if "." in parameter else parameter
        pool = [n for n in self.all if leaf in n] or sorted(self.all)
        close = difflib.get_close_matches(parameter, pool[:4000], n=2, cutoff=0.3)
        return f"; nearest in the base: {', '.join(close)}" if close else ""


def _alike(ours: str, theirs: str) -> bool:
    """Whether two beginnings may name one place: one has all components of the other."""
    one, two = set(ours.split(".")) - {""}, set(theirs.split(".")) - {""}
    return one <= two or two <= one
