"""Linear layers of other libraries that hold their weight in few bits.

What an adapter's `forward` needs of them is that they map (..., in) to (..., out). Merging needs
their weight as numbers: known here of bitsandbytes' layers and of transformers' FP8Linear.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import replace
from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor, nn

from infold.errors import Refusal
from infold.formats.values.bitsandbytes import decode
from infold.formats.values.scheme import Scheme

__all__ = [
    "dequantized",
    "exact_values",
    "exclude_from_quantization",
    "is_bitsandbytes",
    "is_readable",
    "keep_gradients",
    "widen",
]

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# Where the classes of transformers' quantization configs name the modules that they leave alone.
_SKIPPED = ("llm_int8_skip_modules", "modules_to_not_convert")


def is_bitsandbytes(module: nn.Module) -> bool:
    """Whether a module is one of bitsandbytes' linear layers, before or after quantization."""
    return any(cls.__module__.startswith("bitsandbytes.") for cls in type(module).__mro__)


def is_readable(module: nn.Module) -> bool:
    """Whether `dequantized` knows the weight, found without reading it."""
    if is_bitsandbytes(module):
        return _state_4bit(module) is not None or _scales_8bit(module) is not None
    return _scales_fp8(module) is not None


def dequantized(module: nn.Module) -> Tensor | None:
    """The weight (out, in) of a quantized linear layer, float32; None where it is not known.

    It is what the codes and their scales say, not yet rounded to the dtype the layer computes in.
    """
    if is_bitsandbytes(module):
        if _state_4bit(module) is not None:
            return _from_4bit(module)
        return _from_8bit(module)
    return _from_fp8(module)


# --- bitsandbytes --------------------------------------------------------------------------------


def _functional() -> Any:
    return import_module("bitsandbytes.functional")


def _state_4bit(module: nn.Module) -> Any:
    return getattr(module.weight, "quant_state", None)


def _from_4bit(module: nn.Module) -> Tensor | None:
    found = _unpacked(module)
    if found is None:
        return None
    codes, state = found
    state.dtype = torch.float32
    return cast(Tensor, _functional().dequantize_4bit(codes.view(-1, 1), state))


def exact_values(module: nn.Module) -> Tensor | None:
    """The weight (out, in) of a quantized linear layer, float64: what the merge of a checkpoint
    reads of the same codes and scales. None where it is not known."""
    if not is_bitsandbytes(module):
        return _from_fp8(module, torch.float64)
    if _state_4bit(module) is None:
        codes, scales = cast(Tensor, module.weight).data, _scales_8bit(module)
        if scales is None or codes.dtype != torch.int8:
            return None
        out, inputs = codes.shape
        parts = {"weight": codes, "SCB": scales.view(-1, 1)}
        return decode(parts, Scheme((out, inputs)), slice(0, out))
    found = _unpacked(module)
    if found is None:
        return None
    packed, state = found
    parts = {"weight": packed.view(torch.uint8), "weight.quant_map": state.code}
    parts["weight.absmax"] = state.absmax
    scheme = Scheme(tuple(state.shape), 4, state.blocksize, kind=state.quant_type)
    if state.nested:
        parts["weight.nested_absmax"] = state.state2.absmax
        parts["weight.nested_quant_map"] = state.state2.code
        scheme = replace(scheme, offset=float(state.offset), nested_block=state.state2.blocksize)
    columns = {name: part.reshape(-1, 1) for name, part in parts.items()}
    return decode(columns, scheme, slice(0, state.shape[0]))


def _unpacked(module: nn.Module) -> tuple[Tensor, Any] | None:
    """The codes in their usual order, and a copy of what describes them; None if that is unknown.

    The first evaluation on a CPU with AVX512-BF16 lays the codes out for a kernel of that CPU, in
    place, and rounds the scales to bfloat16. From then on these are what the layer runs with.
    """
    codes, state = cast(Tensor, module.weight).data, copy.copy(_state_4bit(module))
    if not getattr(state, "packing_format_for_cpu", False):
        return codes, state
    unpack = getattr(_functional(), "_convert_weight_packed_for_cpu_inverse", None)
    if unpack is None:
        return None
    scales = state.absmax.t().reshape(-1).float()
    state.original_nested = False
    codes, state = unpack(codes, state)
    state.absmax = scales
    return codes, state


def keep_gradients(model: nn.Module) -> list[nn.Module]:
    """Keep 4-bit layers off the kernel above, which has no gradient: without an error, whatever is
    below such a layer would stop to learn after the first evaluation.

    Layers that went that way already come back. Returns those that would go; set
    `support_avx512bf16_for_cpu` of them when the training is over.
    """
    found = []
    for module in model.modules():
        if not is_bitsandbytes(module) or _state_4bit(module) is None:
            continue
        if getattr(_state_4bit(module), "packing_format_for_cpu", False):
            usual = _unpacked(module)
            if usual is None:
                raise Refusal(
                    "a 4-bit layer was evaluated on this CPU, and its codes cannot be brought back "
                    "into an order that can be trained through; load the model anew"
                )
            weight: Any = module.weight
            weight.data, weight.quant_state = usual
            module.quant_state = weight.quant_state
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = cast(Any, False)
            found.append(module)
    return found


def _scales_8bit(module: nn.Module) -> Tensor | None:
    """They wander from the weight into the layer's state at the first call."""
    found = getattr(module.weight, "SCB", None)
    return getattr(getattr(module, "state", None), "SCB", None) if found is None else found


def _from_8bit(module: nn.Module) -> Tensor | None:
    scales, codes = _scales_8bit(module), cast(Tensor, module.weight).data
    if scales is None or codes.dtype != torch.int8:
        return None
    return cast(Tensor, _functional().int8_vectorwise_dequant(codes, scales))


# --- FP8 of transformers -------------------------------------------------------------------------


def _scales_fp8(module: nn.Module) -> Tensor | None:
    """One for all of the weight, or one for each block of it."""
    weight, scales = getattr(module, "weight", None), getattr(module, "weight_scale_inv", None)
    if not isinstance(scales, Tensor) or (scales.numel() > 1 and scales.dim() != 2):
        return None
    known = isinstance(weight, Tensor) and weight.dtype in _FP8 and weight.dim() == 2
    return scales if known else None


def _from_fp8(module: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor | None:
    scales = _scales_fp8(module)
    if scales is None:
        return None
    weight = cast(Tensor, module.weight).detach().to(dtype)
    scales = scales.detach().to(dtype)
    if scales.numel() > 1:
        size = cast("tuple[int, int]", module.block_size)
        for dim in (0, 1):
            scales = scales.repeat_interleave(size[dim], dim)
        scales = scales[: weight.shape[0], : weight.shape[1]]
    return weight * scales


def widen(model: nn.Module) -> list[str]:
    """Replace a model's quantized layers by Linear layers in float32, which hold what codes and
    scales say. Returns their paths. Raises Refusal where a layer's weight is not known."""
    found = {}
    for path, module in model.named_modules():
        if is_bitsandbytes(module) or _scales_fp8(module) is not None:
            weight = dequantized(module)
            if weight is None:
                raise Refusal(f"{path}: a quantized layer whose weight cannot be read here")
            found[path] = (weight, getattr(module, "bias", None))
    for path, (weight, bias) in found.items():
        with torch.device("meta"):
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
        layer.weight = nn.Parameter(weight.float(), requires_grad=False)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().float(), requires_grad=False)
        model.set_submodule(path, layer)
    if found:
        _forget_quantization(model)
    return list(found)


# --- the model that holds them -------------------------------------------------------------------


def exclude_from_quantization(model: nn.Module, paths: Collection[str]) -> None:
    """Tell a model's quantization config that these layers are dense now, so that what is saved
    loads again. Where no quantized layer is left, the model is no longer a quantized one."""
    config: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    if config is None:
        return
    if not any(is_readable(module) for module in model.modules() if hasattr(module, "weight")):
        _forget_quantization(model)
        return
    settings = config if isinstance(config, dict) else config.__dict__
    field = next((name for name in _SKIPPED if name in settings), None)
    if field is None:
        return
    skipped = settings[field]
    if skipped is None:  # transformers then keeps the output embedding, and what is tied to it
        skipped = import_module("transformers.quantizers.base").get_keys_to_not_convert(model)
    settings[field] = [*skipped, *(path for path in paths if path not in skipped)]


def _forget_quantization(model: Any) -> None:
    del model.config.quantization_config
    for name in ("hf_quantizer", "quantization_method"):
        model.__dict__.pop(name, None)
    for name in ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        if getattr(model, name, False):
            setattr(model, name, False)
