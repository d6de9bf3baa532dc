"""The parts that an adapter gets at each of its layers: new ones, or those of a file."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from infold.adapters import METHODS, Settings
from infold.adapters.exact import slices_for
from infold.dtypes import NAMES
from infold.tuners.config import IA3Config, LoraConfig, TunerConfig
from infold.tuners.layers import Adapted, Adapter, Stage
from infold.tuners.offloading import home_of
from infold.tuners.parameters import Parameter
from infold.tuners.parameters import named as parameter_name
from infold.tuners.select import Selection

__all__ = ["layers_of", "new_adapter"]


def new_adapter(
    selection: Selection, path: str, layer: Adapted, loaded: Mapping[str, Tensor] | None
) -> Adapter:
    """A selection's adapter at one layer; `loaded`: its parts, where they come from a file."""
    config, tokens = selection.config, selection.rows.tokens.get(path)
    dropout = config.lora_dropout if isinstance(config, LoraConfig) else 0.0
    if tokens is None:
        settings, method = settings_of(config, path, layer, path in selection.feedforward)
    else:
        width = own_parameter(layer).shape[1]
        settings, method, dropout = Settings(tokens=tokens, out=width), "trainable_tokens", 0.0
    own = own_parameter(layer)
    home = home_of(layer.holder, own)
    if loaded is not None:
        parts = {part: value.clone() for part, value in loaded.items()}
    else:
        with torch.device("meta" if home.type == "meta" else "cpu"), torch.no_grad():
            # attaching makes it the only active one: of the others it sees what is merged
            alone = Stage(layer, (), (), {})
            parts = METHODS[method].init(layer.geometry(), settings, alone)
    dtype = own.dtype if own.dtype in (torch.float32, torch.float64) else torch.float32
    parts = {part: value.to(home, dtype) for part, value in parts.items()}
    return Adapter(method, parts, settings, dropout).train(layer.training)


def layers_of(selection: Selection) -> dict[str, nn.Module]:
    """Path -> module that holds an adapter: MultiheadAttention also has one on its out_proj."""
    found = {}
    for path, module in selection.layers.items():
        found[path] = module
        if isinstance(module, nn.MultiheadAttention):
            found[f"{path}.out_proj"] = module.out_proj
    return found | selection.tables


def settings_of(
    config: TunerConfig, path: str, layer: Adapted, feedforward: bool
) -> tuple[Settings, str]:
    """The settings and the method of one layer, the same as the merge of checkpoints takes."""
    geometry = layer.geometry()
    if isinstance(layer, Parameter):
        assert isinstance(config, LoraConfig)
        rank, shape = config.rank(parameter_name(path)), layer.weight.shape
        settings = Settings(
            scaling=config.scaling(parameter_name(path)),
            slices=slices_for(NAMES[layer.weight.dtype], rank),
            out=shape[-2],
            rank=rank,
            start=config.init_lora_weights,
            experts=layer.experts,
            width=shape[-1] if layer.experts else 0,
            flipped=layer.flipped,
        )
        return settings, "lora"
    if isinstance(config, IA3Config):
        side = "in" if feedforward else "out"
        settings = Settings(
            side=side,
            kernel=math.prod(geometry.kernel) if side == "in" else 1,
            groups=int(getattr(layer, "groups", 1)) if side == "in" and geometry.kernel else 1,
            out=geometry.outputs,
            start=config.init_ia3_weights,
        )
        return settings, "ia3"
    assert isinstance(config, LoraConfig)
    # PEFT up to 0.21 adds the update of MultiheadAttention's out_proj twice, in training too
    inner = isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear)
    times, named = (2, path.rpartition(".")[0]) if inner else (1, path)
    rank = config.rank(named)
    stored = NAMES.get(own_parameter(layer).dtype, "F32")
    settings = Settings(
        scaling=times * config.scaling(named),
        slices=slices_for(stored, rank),
        out=geometry.outputs,
        rank=rank,
        start=config.init_lora_weights,
        with_bias=config.lora_bias,
    )
    return settings, config.method


def own_parameter(layer: nn.Module) -> Tensor:
    """The weight of a layer, or whatever it has that tells its device and dtype."""
    for name in ("weight", "in_proj_weight"):
        weight = getattr(layer, name, None)
        if isinstance(weight, Tensor):
            return weight
    own = (*layer.parameters(recurse=False), *layer.buffers(recurse=False))
    return own[0] if own else torch.empty(0)
