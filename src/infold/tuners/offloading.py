"""Layers whose weights accelerate brings only while they run, from the CPU or the disk.

In between, their parameters are on the meta device; their hook knows where the layer runs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from infold.tuners.config import LoraConfig
from infold.tuners.select import Selection, modules_of
from infold.tuners.vocabulary import alike

__all__ = ["home_of", "offloaded", "without_values"]

_WAY = "load the model without offloading, or merge on the disk with `infold merge`"


def is_offloaded(module: nn.Module) -> bool:
    """Whether a module's parameters are not in memory while it does not run."""
    return any(getattr(hook, "offload", False) for hook in _hooks(module))


def home_of(module: nn.Module, parameter: Tensor) -> torch.device:
    """Where the adapter of a parameter belongs: on the device on which its module runs."""
    if parameter.is_meta:
        for hook in _hooks(module):
            if getattr(hook, "offload", False) and hook.execution_device is not None:
                return torch.device(hook.execution_device)
    return parameter.device


def offloaded(modules: Iterable[tuple[str, nn.Module]], why: str) -> list[str]:
    """A refusal for each of these modules whose values are needed while it does not run."""
    return [
        f"{path} is offloaded by accelerate, so its values are not in memory, and {why}; {_WAY}"
        for path, module in modules
        if is_offloaded(module)
    ]


def without_values(
    model: nn.Module, selection: Selection, biases: Collection[str], new: bool
) -> list[str]:
    """Why an adapter cannot be had where weights are offloaded. biases: those that it trains."""
    config, whole = selection.config, selection.whole
    inner = (item for path, module in whole.items() for item in module.named_modules(prefix=path))
    problems = offloaded(inner, "modules_to_save needs a copy of them")
    owners = sorted({name.rpartition(".")[0] for name in biases})
    trained = ((path, model.get_submodule(path)) for path in owners)
    problems += offloaded(trained, "training a bias needs a copy of them")
    if new and isinstance(config, LoraConfig) and config.use_dora:
        problems += offloaded(selection.layers.items(), "DoRA begins from their norms")
    if new:
        problems += offloaded(selection.tables.items(), "trained tokens begin from their rows")
    elif selection.tables:
        ends = alike(model, modules_of(model))
        problems += offloaded(ends.items(), "nothing tells whether ends share the trained tokens")
    return problems


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    hook: Any = getattr(module, "_hf_hook", None)
    return tuple(getattr(hook, "hooks", (hook,)))  # a SequentialHook has several
