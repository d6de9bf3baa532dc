"""modules_to_save: modules that an adapter trains whole, such as the head of a classifier.

As with adapted layers, the module stays what it is; its class becomes a subclass whose `forward`
goes to the copy that the active adapter trains, if it has one.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn

from infold.errors import Refusal
from infold.tuners.classes import Front, put_before, replaced_forward, take_away
from infold.tuners.config import within
from infold.tuners.layers import Adapted
from infold.tuners.rows import Rows

__all__ = ["Whole", "add_whole", "clashes", "restore_whole"]


class Whole(Front):
    """A module that adapters train whole."""

    adapters: nn.ModuleDict
    _in_force: str | None  # the adapter whose copy runs
    _rows: Rows
    _path: str  # in the model

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        if self._rows.index is not None:
            return self._mixed(x, args, kwargs)
        if self._in_force is not None:
            return self.adapters[self._in_force](x, *args, **kwargs)
        return super().forward(x, *args, **kwargs)

    def _mixed(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Each row through its own adapter's copy."""
        y = cast(Tensor, super().forward(x, *args, **kwargs))
        index = self._rows.spread(x.shape[0], x.device, self._path)
        for number, name in enumerate(self._rows.names):
            if name in self.adapters:
                rows = (index == number).nonzero().flatten()
                y = y.index_copy(0, rows, self.adapters[name](x[rows], *args, **kwargs))
        return y


def clashes(
    layers: Mapping[str, nn.Module],
    whole: Mapping[str, nn.Module],
    others: Mapping[str, Whole],
) -> list[str]:
    """Why modules cannot be part of one more adapter: others have them in another way.

    layers: those that would get an adapter. whole: those of which a copy would be trained. others:
    those of which some adapter trains a copy, by path.
    """
    problems = []
    for path in layers:
        for place, owner in others.items():
            if within(path, [place]):
                what = f"trains all of {place} (modules_to_save), so that {path} takes no adapter"
                problems.append(_clash(owner.adapters, what))
    for path, module in whole.items():
        for name, part in module.named_modules(prefix=path):
            if isinstance(part, Adapted):
                what = f"sits on {name}, so that {path} cannot be one of modules_to_save"
                problems.append(_clash(part.adapters, what))
    return problems


def _clash(adapters: nn.ModuleDict, what: str) -> str:
    names = list(adapters)
    gone = " and ".join(f"delete_adapter({name!r})" for name in names)
    return f"{', '.join(names)} {what}; leave it out, or call {gone} before"


def add_whole(module: nn.Module, path: str, name: str, rows: Rows) -> Whole:
    """Give the module at a path a copy that the adapter `name` trains."""
    if not isinstance(module, Whole):
        if hasattr(module, "adapters"):
            kind = type(module).__name__
            raise Refusal(
                f"modules_to_save: {path}: a {kind} has an attribute `adapters` of its own"
            )
        if problem := replaced_forward(module):
            raise Refusal(f"modules_to_save: {path}: {problem}")
        own = copy.deepcopy(module)
        put_before(Whole, module)
        whole = cast(Whole, module)
        whole.adapters, whole._in_force = nn.ModuleDict(), None
        whole._rows, whole._path = rows, path
    else:
        whole = module
        own = _base_of(whole)
    own.requires_grad_(True)
    whole.adapters[name] = own
    return whole


def _base_of(module: Whole) -> nn.Module:
    """A copy of the module as it was."""
    own = copy.deepcopy(module)
    restore_whole(own)
    return own


def restore_whole(module: Whole, keep: bool = False) -> nn.Module:
    """The module as it was; with `keep`, with the parameters of the copy in force."""
    inner = module.adapters[module._in_force] if keep and module._in_force else None
    del module.adapters
    del module._in_force, module._rows, module._path
    take_away(module)
    if inner is not None:
        module._parameters, module._buffers = inner._parameters, inner._buffers
        module._modules = inner._modules
    return module
