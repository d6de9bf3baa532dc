"""Adapter keys -> modules of the base.

PEFT names modules as they are in memory. On disk the same module can lack a leading component
(`h.0...` for `transformer.h.0...`), carry one more, or have another one. A module resolves to the
tensor with the longest equal ending, by whole components, where
  the differing beginnings hold no layer number, so layer 1 never becomes layer 11 or 2;
  only one tensor has that longest ending;
  the same beginning is always exchanged for the same other one.
"""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from infold.plan.layouts import numeric

__all__ = ["Names", "group_keys"]

PREFIX = "base_model.model."
# ending of a key -> name of the part; an ending that contains another comes first
_ENDINGS = {
    ".token_adapter.trainable_tokens_delta": "trainable_tokens_delta",
    ".trainable_tokens_delta": "trainable_tokens_delta",
    ".lora_magnitude_vector.weight": "lora_magnitude_vector",
    ".lora_magnitude_vector": "lora_magnitude_vector",
    ".lora_embedding_A": "lora_embedding_A",
    ".lora_embedding_B": "lora_embedding_B",
    ".lora_A.weight": "lora_A",
    ".lora_B.weight": "lora_B",
    ".lora_B.bias": "lora_bias",
    ".ia3_l": "ia3_l",
}


def group_keys(
    keys: Iterable[str],
) -> tuple[dict[str, dict[str, str]], dict[str, str], list[str]]:
    """Split an adapter's keys.

    Returns ({module: {part: key}}, {parameter path: key} for plain tensors, keys that are neither).
    """
    modules: dict[str, dict[str, str]] = defaultdict(dict)
    plain: dict[str, str] = {}
    strange: list[str] = []
    for key in sorted(keys):
        if not key.startswith(PREFIX):
            strange.append(key)
            continue
        path = key[len(PREFIX) :]
        for ending, part in _ENDINGS.items():
            if path.endswith(ending):
                module = path[: -len(ending)]
                if part in modules[module]:
                    strange.append(key)
                modules[module][part] = key
                break
        else:
            components = path.split(".")
            if any(c.startswith(("lora_", "ia3_")) for c in components) or "." not in path:
                strange.append(key)
                continue
            if len(components) > 2 and components[-2] == "base_layer":
                del components[-2]
            parameter = ".".join(components)
            if parameter in plain:
                strange.append(key)
            plain[parameter] = key
    return dict(modules), plain, strange


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
        fitting = []
        for name in node.names:
            theirs = ".".join(name.split(".")[:-shared])
            if not numeric(ours) and not numeric(theirs):
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

    def nearest(self, parameter: str) -> str:
        """For a message: the names that look most like this one."""
        leaf = parameter.rsplit(".", 2)[-2] if "." in parameter else parameter
        pool = [n for n in self.all if leaf in n] or sorted(self.all)
        close = difflib.get_close_matches(parameter, pool[:4000], n=2, cutoff=0.3)
        return f"; nearest in the base: {', '.join(close)}" if close else ""


def missing_parts(method: str, parts: Mapping[str, str]) -> list[str]:
    """Names of the required parts that a module's keys lack."""
    needed = {
        "ia3": ("ia3_l",),
        "lora": ("lora_A", "lora_B"),
        "dora": ("lora_A", "lora_B", "lora_magnitude_vector"),
        "trainable_tokens": ("trainable_tokens_delta",),
    }[method]
    return [part for part in needed if part not in parts]
