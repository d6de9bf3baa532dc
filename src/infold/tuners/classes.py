"""Classes made at run time: what stands before the class that a module has.

An adapted module stays the object that it was. Its class becomes a subclass of the one it had, with
a `Front` before it, and that one again when the adapters leave. A class made here is nowhere to be
found by its name, so copies and pickles hold the two that it is made of.
"""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["Front", "put_before", "take_away"]


class Front(nn.Module):
    """What an adapted module's class has before the class that it was."""

    _front: type[Front]
    _plain: type[nn.Module]  # the class that it was

    @classmethod
    def _look(cls, plain: type[nn.Module]) -> tuple[str, dict[str, Any]]:
        """Name and attributes of the class that this makes of `plain`."""
        return f"Adapted{plain.__name__}", {"__module__": cls.__module__}

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self._front, self._plain), self.__dict__


_made: dict[tuple[type[Front], type[nn.Module]], type[nn.Module]] = {}


def _join(front: type[Front], plain: type[nn.Module]) -> type[nn.Module]:
    made = _made.get((front, plain))
    if made is None:
        name, attributes = front._look(plain)
        attributes |= {"_front": front, "_plain": plain}
        made = _made[front, plain] = type(name, (front, plain), attributes)
    return made


def _rebuild(front: type[Front], plain: type[nn.Module]) -> nn.Module:
    made = _join(front, plain)
    return made.__new__(made)


def put_before(front: type[Front], module: nn.Module) -> None:
    """Give a module the methods of `front`; nothing else of it changes."""
    module.__class__ = _join(front, type(module))


def take_away(module: Front) -> None:
    """Give a module the class that it had."""
    module.__class__ = module._plain  # type: ignore[assignment]
