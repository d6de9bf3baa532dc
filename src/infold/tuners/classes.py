"""Classes made at run time: what stands before the class that a module has.

An adapted module stays the object that it was. Its class becomes a subclass of the one it had, with
a `Front` before it, and that one again when the adapters leave. A class made here is nowhere to be
found by its name, so copies and pickles hold the two that it is made of.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import nn

__all__ = ["Front", "put_before", "replaced_forward", "take_away"]


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
    _change(module, _join(front, type(module)))


def take_away(module: Front) -> None:
    """Give a module the class that it had."""
    _change(module, module._plain)


def _change(module: nn.Module, to: type[nn.Module]) -> None:
    """Change a module's class. accelerate's hooks keep the forward that they found in the module
    itself, from where it would go on running instead of the new class's."""
    kept = [name for name in _FORWARDS if _is_own(module, name)]
    module.__class__ = to
    for name in kept:
        module.__dict__[name] = MethodType(to.forward, module)


# Where the forward lies that a module runs, once accelerate's hooks are there, or were.
_FORWARDS = ("_old_forward", "forward")


def _is_own(module: nn.Module, name: str) -> bool:
    """Whether the attribute is the forward of the module's class."""
    found = module.__dict__.get(name)
    own = getattr(found, "__self__", None), getattr(found, "__func__", None)
    return own[0] is module and own[1] is type(module).forward


def replaced_forward(module: nn.Module) -> str | None:
    """Why a class would not change what a module does: who set its `forward`, if not accelerate."""
    own = module.__dict__
    name = "_old_forward" if "_hf_hook" in own and "_old_forward" in own else "forward"
    if name not in own or _is_own(module, name):
        return None
    told = getattr(own[name], "__qualname__", type(own[name]).__qualname__)
    return (
        f"{told} has replaced the forward of this {type(module).__name__}, and no adapter would "
        "run; attach it before, or set that forward on the class"
    )
