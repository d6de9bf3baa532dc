"""HQQ, as its state dict is saved in safetensors: settings are tensors too.

    W_q    codes, packed along the groups
    scale  [groups, 1] for axis 1, [1, groups] for axis 0;   zero  the same
    axis, group_size, nbits  I32 [];   shape  I64 [2];   packing  U8, the letters

W.flatten() in groups of group_size, as rows (axis 1) or as columns (axis 0):
W = (code - zero) * scale. Along axis 0 a group gathers elements of many rows of W.
"""

from __future__ import annotations

from infold.formats.stored import NoFold, Scale, Stored

NAME = "HQQ"
CORE: tuple[str, ...] = ("W_q",)
PARTS: tuple[str, ...] = (
    "W_q", "nbits", "group_size", "shape", "scale", "zero", "axis", "packing", "unpack_view_dtype",
    "view_as_float", "quant_scale", "quant_zero", "compute_dtype", "offload_meta",
    "encoded_state_dict", "stores_quant_config", "channel_wise", "optimize", "round_zero",
)  # fmt: skip


def accepts(stored: Stored) -> bool:
    return all(part in stored.tensors for part in ("W_q", "shape", "axis"))


def shape(stored: Stored) -> tuple[int, int]:
    if stored.shape("shape") != (2,) or stored.dtype("shape") not in ("I32", "I64"):
        raise NoFold("its weight is no matrix")
    out, inputs = (int(n) for n in stored.read("shape"))
    return out, inputs


def _number(stored: Stored, part: str) -> int | None:
    if stored.shape(part) not in ((), (1,)) or stored.dtype(part) not in ("I32", "I64", "U8"):
        return None
    return int(stored.read(part).item())


def words(stored: Stored) -> str:
    told = [f"{n} bits" for n in [_number(stored, "nbits")] if n is not None]
    told += [f"groups of {n}" for n in [_number(stored, "group_size")] if n is not None]
    return ", ".join([NAME, *told, f"axis {_number(stored, 'axis')}"])


def scales(stored: Stored) -> tuple[Scale, ...]:
    scale, (out, inputs) = stored.shape("scale"), shape(stored)
    if scale is None:
        raise NoFold("its scales are quantized themselves")
    if _number(stored, "axis") != 1:
        raise NoFold("its groups lie along axis 0, so they gather elements of many rows")
    count = scale[0] if len(scale) == 2 and scale[1] == 1 else 0
    if not out or not count or count % out or (inputs * out) % count:
        raise NoFold(f"scales {list(scale)} do not belong to single rows of {out}")
    return (Scale("scale", repeat=count // out),)
