"""Small quantized modules: written by the packages that define a format where these run on a CPU,
else by hand to its published layout; and read back to float64 by means that infold does not share.

Each kind gives `encode(W) -> Module` for float32 W (out, in); `Module.values(tensors)` reads the
tensors of a module back, and `Module.folded` names those that an output vector may change.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Parts = Mapping[str, Tensor]


@dataclass
class Module:
    """One quantized weight. values: its tensors -> float64 (out, in)."""

    tensors: dict[str, Tensor]
    values: Callable[[Parts], Tensor]
    folded: tuple[str, ...]
    config: dict[str, Any]
    metadata: dict[str, str] = field(default_factory=dict)  # of the module's weight, by its class
    affine: bool = False  # values are sums of two rounded terms


def pack(codes: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Codes (..., n) into int32, 32 / bits of them in one, the first lowest."""
    each = 32 // bits
    grouped = codes.long().view(*codes.shape[:-1], -1, each)
    if order:
        grouped = grouped[..., list(order)]
    words = sum(grouped[..., n] << (bits * n) for n in range(each))
    return (words & 0xFFFFFFFF).where(words < 2**31, words - 2**32).int()


def unpack(words: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    each = 32 // bits
    codes = torch.stack([(words.long() >> (bits * n)) & (2**bits - 1) for n in range(each)], -1)
    if order:
        codes = codes[..., [order.index(n) for n in range(each)]]
    return codes.flatten(-2)


Rounded = tuple[Tensor, Tensor, Tensor]  # codes (out, in), zeros and F16 scales (out, groups)


def asymmetric(weight: Tensor, group: int, bits: int = 4) -> Rounded:
    """Each group to the nearest of 2^bits steps between its least and its greatest element."""
    grouped = weight.view(len(weight), -1, group)
    low, high = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-6).half()
    zero = (-low / scale.float()).round().clamp(0, 2**bits - 1)
    codes = (grouped / scale.float()[..., None]).round() + zero[..., None]
    return codes.clamp(0, 2**bits - 1).view_as(weight).int(), zero.int(), scale


def gptq(
    weight: Tensor,
    version: int = 1,
    act_order: bool = True,
    bits: int = 4,
    rounded: Callable[[Tensor, int, int], Rounded] = asymmetric,
) -> Module:
    inputs, group = weight.shape[1], 32
    order = torch.randperm(inputs) if act_order else torch.arange(inputs)
    g_idx = torch.empty(inputs, dtype=torch.int32)
    g_idx[order] = (torch.arange(inputs) // group).int()
    codes, zero, scale = rounded(weight[:, order].contiguous(), group, bits)
    back = torch.empty_like(codes)
    back[:, order] = codes
    less = 1 if version == 1 else 0
    tensors = {
        "qweight": pack(back, bits).t().contiguous(),
        "qzeros": pack((zero.t() - less) & (2**bits - 1), bits),
        "scales": scale.t().contiguous(),
        "g_idx": g_idx,
    }

    def values(parts: Parts) -> Tensor:
        codes = unpack(parts["qweight"].t(), bits)
        zeros = (unpack(parts["qzeros"], bits) + less) & (2**bits - 1)
        group = parts["g_idx"].long()
        difference = codes.t().double() - zeros[group].double()
        return (parts["scales"].double()[group] * difference).t()

    told = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": act_order}
    told["checkpoint_format"] = "gptq" if version == 1 else "gptq_v2"
    return Module(tensors, values, ("scales",), told)


AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def awq(weight: Tensor, version: str = "gemm") -> Module:
    out, inputs, group = *weight.shape, 32
    codes, zero, scale = asymmetric(weight, group)
    told = {"quant_method": "awq", "bits": 4, "group_size": group, "version": version}
    if version == "gemm":
        tensors = {
            "qweight": pack(codes.t().contiguous(), 4, AWQ_ORDER),
            "qzeros": pack(zero.t().contiguous(), 4, AWQ_ORDER),
            "scales": scale.t().contiguous(),
        }

        def values(parts: Parts) -> Tensor:
            codes = unpack(parts["qweight"], 4, AWQ_ORDER).double()
            zeros = unpack(parts["qzeros"], 4, AWQ_ORDER).double()
            group = torch.arange(inputs) // 32
            return ((codes - zeros[group]) * parts["scales"].double()[group]).t()

        return Module(tensors, values, ("scales",), told)
    padded = -(-scale.shape[1] // 8) * 8  # groups
    wide = torch.zeros(out, padded, dtype=torch.float16)
    wide[:, : scale.shape[1]] = scale
    if version == "gemv":
        zeros = torch.zeros(out, padded, dtype=torch.int32)
        zeros[:, : zero.shape[1]] = zero
        tensors = {"qweight": pack(codes, 4), "qzeros": pack(zeros, 4), "scales": wide}

        def values(parts: Parts) -> Tensor:
            codes, group = unpack(parts["qweight"], 4).double(), torch.arange(inputs) // 32
            zeros = unpack(parts["qzeros"], 4).double()
            return (codes - zeros[:, group]) * parts["scales"].double()[:, group]

        return Module(tensors, values, ("scales",), told)
    floats = torch.zeros(out, padded, dtype=torch.float16)
    floats[:, : zero.shape[1]] = -(scale.float() * zero.float()).half()
    # the kernel's own order of codes does not matter here: four in one int16, four rows in one
    four = codes.view(out // 4, 4, inputs).transpose(1, 2).reshape(out // 4, inputs, 4).long()
    words = sum(four[..., n] << (4 * n) for n in range(4))
    words = words.where(words < 2**15, words - 2**16).short()
    tensors = {"qweight": words, "qzeros": floats.t().contiguous(), "scales": wide.t().contiguous()}

    def values(parts: Parts) -> Tensor:
        words, group = parts["qweight"].long(), torch.arange(inputs) // 32
        codes = torch.stack([(words >> (4 * n)) & 15 for n in range(4)], 1).view(out, inputs)
        scales, zeros = (parts[name].double().t()[:, group] for name in ("scales", "qzeros"))
        return codes.double() * scales + zeros

    return Module(tensors, values, ("scales", "qzeros"), told, affine=True)


def compressed(weight: Tensor, kind: str) -> Module:
    """By compressed-tensors' own compressors, back by its own decompressors."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    way = {
        "pack-quantized": {"num_bits": 4, "strategy": "group", "group_size": 32},
        "pack-asymmetric": {
            "num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False
        },
        "int-quantized": {"num_bits": 8, "strategy": "channel"},
        "float-quantized": {"num_bits": 8, "type": "float", "strategy": "channel"},
        "tensor": {"num_bits": 8, "type": "float", "strategy": "tensor"},
    }[kind]  # fmt: skip
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**way))
    name = {"pack-asymmetric": "pack-quantized", "tensor": "float-quantized"}.get(kind, kind)
    compressor = BaseCompressor.get_value_from_registry(name)
    zero = None
    if kind.startswith("pack"):
        _, zero, scale = asymmetric(weight, 32)
        if kind == "pack-quantized":
            scale, zero = (weight.view(len(weight), -1, 32).abs().amax(2) / 7).bfloat16(), None
        else:
            zero = (zero - 8).to(torch.int8)
    elif kind == "tensor":
        scale = (weight.abs().amax() / 448).view(1)
    else:
        scale = weight.abs().amax(1, keepdim=True) / (127 if kind == "int-quantized" else 448)
    state = {"weight": weight, "weight_scale": scale}
    if zero is not None:
        state["weight_zero_point"] = zero
    told = {"quant_method": "compressed-tensors", "format": name}

    def values(parts: Parts) -> Tensor:
        wide = {**parts, "weight_scale": parts["weight_scale"].double()}
        return compressor.decompress(wide, scheme)["weight"].double()

    return Module(compressor.compress(state, scheme), values, ("weight_scale",), told)


def bitsandbytes(weight: Tensor, kind: str) -> Module:
    """By bitsandbytes on the CPU; read back by its own look-up table."""
    import bitsandbytes.functional as bnb

    if kind == "int8":
        codes, scale, _ = bnb.int8_vectorwise_quant(weight.half())
        tensors = {"weight": codes, "SCB": scale, "weight_format": torch.tensor(0).byte()}

        def values(parts: Parts) -> Tensor:
            return parts["weight"].double() * parts["SCB"].double()[:, None] / 127

        return Module(tensors, values, ("SCB",), {"quant_method": "bitsandbytes"})
    nested = kind.endswith("-nested")
    codes, state = bnb.quantize_4bit(
        weight, blocksize=64, compress_statistics=nested, quant_type=kind.removesuffix("-nested")
    )
    tensors = {"weight": codes}
    tensors |= {f"weight.{name}": value for name, value in state.as_dict(packed=True).items()}

    def values(parts: Parts) -> Tensor:
        told = {name.removeprefix("weight."): v for name, v in parts.items() if "." in name}
        state = bnb.QuantState.from_dict(dict(told), torch.device("cpu"))
        absmax = state.absmax
        if state.nested:
            absmax = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
        words = parts["weight"].flatten()
        codes = torch.stack([words >> 4, words & 15], 1).flatten().long()
        found = state.code.double()[codes].view(-1, 64) * absmax.double()[:, None]
        return found.view(weight.shape)

    return Module(tensors, values, ("weight.absmax",), {"quant_method": "bitsandbytes"})


def nvfp4(weight: Tensor, scale: float = 1.0) -> Module:
    """By compressed-tensors' own compressor, and read by it. scale: of the scales of blocks."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args = QuantizationArgs(
        num_bits=4, type="float", strategy="tensor_group", group_size=16, symmetric=True
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized")
    whole = 448 * 6 / weight.abs().amax()
    blocks = weight.view(len(weight), -1, 16).abs().amax(2) / 6 * whole * scale
    given = {
        "weight": weight,
        "weight_scale": blocks.to(torch.float8_e4m3fn).float(),
        "weight_global_scale": whole.view(1),
    }
    tensors = compressor.compress(given, scheme)

    def values(parts: Parts) -> Tensor:
        return compressor.decompress(dict(parts), scheme)["weight"].double()

    told = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}
    return Module(tensors, values, ("weight_scale", "weight_global_scale"), told)


def fbgemm(weight: Tensor) -> Module:
    scale = weight.abs().amax(1, keepdim=True) / 448
    tensors = {"weight": (weight / scale).to(torch.float8_e4m3fn), "weight_scale": scale}

    def values(parts: Parts) -> Tensor:
        return parts["weight"].double() * parts["weight_scale"].double()

    return Module(tensors, values, ("weight_scale",), {"quant_method": "fbgemm_fp8"})


def blocks(weight: Tensor) -> Module:
    """Fine-grained FP8, in blocks of 32 here."""
    cut = weight.view(len(weight) // 32, 32, -1, 32)
    scale = cut.abs().amax((1, 3)) / 448
    codes = (cut / scale[:, None, :, None]).reshape(weight.shape).to(torch.float8_e4m3fn)
    told = {"quant_method": "fp8", "weight_block_size": [32, 32]}

    def values(parts: Parts) -> Tensor:
        wide = parts["weight_scale_inv"].double()
        wide = wide.repeat_interleave(32, 0).repeat_interleave(32, 1)
        return parts["weight"].double() * wide

    return Module({"weight": codes, "weight_scale_inv": scale}, values, (), told)


def eetq(weight: Tensor) -> Module:
    scale = (weight.abs().amax(1) / 127).half()
    codes = (weight / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
    tensors = {"weight": codes.t().contiguous(), "weight_scales": scale}

    def values(parts: Parts) -> Tensor:
        return parts["weight"].t().double() * parts["weight_scales"].double()[:, None]

    return Module(tensors, values, ("weight_scales",), {"quant_method": "eetq"})


def hqq(weight: Tensor, axis: int = 1) -> Module:
    """By hand, to `HQQLinear.state_dict` with encoded settings; eight bits need no packing."""
    flat = weight.reshape(-1, 32) if axis == 1 else weight.reshape(32, -1)
    low, high = flat.amin(axis, keepdim=True), flat.amax(axis, keepdim=True)
    scale = ((high - low) / 255).half()
    zero = (-low / scale.float()).half()
    codes = (flat / scale.float() + zero.float()).round().clamp(0, 255).byte()
    tensors = {
        "W_q": codes, "scale": scale, "zero": zero, "shape": torch.tensor(weight.shape),
        "axis": torch.tensor(axis).int(), "nbits": torch.tensor(8).int(),
        "group_size": torch.tensor(32).int(),
    }  # fmt: skip

    def values(parts: Parts) -> Tensor:
        found = (parts["W_q"].double() - parts["zero"].double()) * parts["scale"].double()
        return found.view(parts["shape"].tolist())

    return Module(tensors, values, ("scale",), {"quant_method": "hqq"})


def torchao(weight: Tensor, kind: str) -> Module:
    """By torchao, flattened by its own writer and read back by its own reader."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao.prototype.safetensors.safetensors_support import (
            flatten_tensor_state_dict,
            unflatten_tensor_state_dict,
        )
        from torchao.quantization import (
            Float8Tensor,
            Int8Tensor,
            IntxUnpackedToInt8Tensor,
            PerRow,
            PerTensor,
        )
        from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs
    made = {
        "int8": lambda w: Int8Tensor.from_hp(w, granularity=PerRow()),
        "int8-static": lambda w: Int8Tensor.from_hp(
            w,
            granularity=PerRow(),
            act_quant_kwargs=QuantizeTensorToInt8Kwargs(PerTensor()),
            act_quant_scale=torch.tensor([[0.02]]),
            act_quant_zero_point=torch.tensor([[3]], dtype=torch.int8),
        ),
        "int8-tensor": lambda w: Int8Tensor.from_hp(w, granularity=PerTensor()),
        "float8": lambda w: Float8Tensor.from_hp(w, granularity=PerRow()),
        "intx": lambda w: IntxUnpackedToInt8Tensor.from_hp(w, (1, 32), torch.int4),
    }[kind](weight)
    flat, metadata = flatten_tensor_state_dict({"m.weight": made})
    tensors = {name.removeprefix("m."): tensor for name, tensor in flat.items()}

    def values(parts: Parts) -> Tensor:
        wide = {f"m.{name}": tensor for name, tensor in parts.items()}
        found, _ = unflatten_tensor_state_dict(wide, metadata)
        tensor = found["m.weight"]
        tensor.scale = tensor.scale.double()
        if kind == "float8":
            return tensor.qdata.double() * tensor.scale
        zero = 0 if tensor.zero_point is None else tensor.zero_point.double()
        return _by_groups(tensor.qdata.double(), tensor.scale, zero)

    return Module(
        tensors, values, ("_weight_scale",), {"quant_method": "torchao"}, json_of(metadata)
    )


def _by_groups(codes: Tensor, scale: Tensor, zero: Tensor | int) -> Tensor:
    each = codes.shape[1] // scale.shape[1]
    wide = [t.repeat_interleave(each, 1) if isinstance(t, Tensor) else t for t in (scale, zero)]
    return (codes - wide[1]) * wide[0]


def json_of(metadata: Mapping[str, str]) -> dict[str, str]:
    assert json.loads(metadata["tensor_names"]) == ["m.weight"]
    return {"weight": metadata["m.weight"]}


def tinygemm(weight: Tensor) -> Module:
    """torchao's tiles, by hand: only the scales and zeros matter, W = (code - 8) * s + z."""
    out, inputs, group = *weight.shape, 32
    grouped = weight.view(out, -1, group)
    low, high = grouped.amin(2), grouped.amax(2)
    scale = ((high - low) / 15).bfloat16()
    zero = (low + scale.float() * 8).bfloat16()
    codes = ((grouped - zero.float()[..., None]) / scale.float()[..., None]).round() + 8
    padded = torch.zeros(inputs // group, out + 8, 2, dtype=torch.bfloat16)
    padded[:, :out] = torch.stack([scale.t(), zero.t()], 2)
    told = {"_type": "Int4TilePackedTo4dTensor", "_data": {"shape": [out, inputs]}}
    tensors = {
        "_weight_qdata": codes.clamp(0, 15).int().view(1, 1, out, inputs),
        "_weight_scale_and_zero": padded,
    }

    def values(parts: Parts) -> Tensor:
        scale, zero = parts["_weight_scale_and_zero"][:, :out].double().unbind(2)
        codes = parts["_weight_qdata"].view(out, inputs).double() - 8
        wide = [t.t().repeat_interleave(group, 1) for t in (scale, zero)]
        return codes * wide[0] + wide[1]

    return Module(
        tensors, values, ("_weight_scale_and_zero",), {"quant_method": "torchao"},
        {"weight": json.dumps(told)}, affine=True,
    )  # fmt: skip


def int4(weight: Tensor, plain: bool) -> Module:
    """torchao's scales [groups, out], by hand: W = (code - zero) * s of Int4PlainInt32Tensor, or
    W = (code - 8) * s + z of Int4Tensor."""
    out, inputs, group = *weight.shape, 32
    codes, zero, scale = asymmetric(weight, group)
    tensors = {"_weight_scale": scale.bfloat16().t().contiguous()}
    if plain:
        tensors["_weight_qdata"] = pack(codes, 4)
        tensors["_weight_zero_point"] = zero.t().to(torch.int8).contiguous()
    else:
        tensors["_weight_qdata"] = (codes[:, ::2] + 16 * codes[:, 1::2]).byte()
        floats = (8 - zero).float() * scale.float()
        tensors["_weight_zero_point"] = floats.bfloat16().t().contiguous()

    def values(parts: Parts) -> Tensor:
        scale, zero = (
            parts[name].double().t().repeat_interleave(group, 1)
            for name in ("_weight_scale", "_weight_zero_point")
        )
        words = parts["_weight_qdata"]
        if plain:
            return (unpack(words, 4).double() - zero) * scale
        codes = torch.stack([words & 15, words >> 4], 2).view(out, inputs).double()
        return (codes - 8) * scale + zero

    told = {"_type": "Int4PlainInt32Tensor" if plain else "Int4Tensor"}
    told |= {"_data": {"block_size": [1, group], "shape": [out, inputs]}}
    folded = ("_weight_scale",) if plain else ("_weight_scale", "_weight_zero_point")
    return Module(
        tensors, values, folded, {"quant_method": "torchao"}, {"weight": json.dumps(told)},
        affine=not plain,
    )  # fmt: skip


KINDS: dict[str, Callable[[Tensor], Module]] = {
    "gptq": gptq,
    "gptq-v2-plain-8": lambda w: gptq(w, 2, False, 8),
    "awq": awq,
    "awq-gemv": lambda w: awq(w, "gemv"),
    "awq-gemv_fast": lambda w: awq(w, "gemv_fast"),
    "ct-pack": lambda w: compressed(w, "pack-quantized"),
    "ct-pack-asymmetric": lambda w: compressed(w, "pack-asymmetric"),
    "ct-int8": lambda w: compressed(w, "int-quantized"),
    "ct-fp8": lambda w: compressed(w, "float-quantized"),
    "bnb-int8": lambda w: bitsandbytes(w, "int8"),
    "bnb-nf4": lambda w: bitsandbytes(w, "nf4"),
    "bnb-fp4": lambda w: bitsandbytes(w, "fp4"),
    "fbgemm": fbgemm,
    "eetq": eetq,
    "hqq": hqq,
    "torchao-int8": lambda w: torchao(w, "int8"),
    "torchao-int8-static": lambda w: torchao(w, "int8-static"),
    "torchao-float8": lambda w: torchao(w, "float8"),
    "torchao-intx": lambda w: torchao(w, "intx"),
    "torchao-tinygemm": tinygemm,
    "torchao-int4": lambda w: int4(w, False),
    "torchao-int4-plain": lambda w: int4(w, True),
}
REFUSED: dict[str, tuple[Callable[[Tensor], Module], str]] = {
    "fp8-blocks": (blocks, "one scale belongs to several rows"),
    "ct-tensor": (lambda w: compressed(w, "tensor"), "one scale belongs to the whole weight"),
    "hqq-axis0": (lambda w: hqq(w, 0), "axis 0"),
    "torchao-int8-tensor": (lambda w: torchao(w, "int8-tensor"), "the whole weight"),
}
