"""compressed-tensors, as llm-compressor writes it.

pack-quantized    weight_packed I32 [out, in * bits / 32], weight_shape I64 [2],
                  weight_scale [out, in / group] or [out, 1], weight_zero_point I32, packed
int-quantized     weight I8 [out, in], weight_scale [out, 1], [out, in / group] or [1]
float-quantized   weight F8_E4M3 [out, in], weight_scale [out, 1], [1] or one for each 128 x 128
mxfp4             weight_packed U8 [out, in / 2], weight_scale U8 [out, in / 32]

W[o, i] = weight_scale[o, g] * (code[o, i] - zero[o, g]), the zero being a code. NVFP4 is a format
of its own: `nvfp4.py`.
"""

from __future__ import annotations

from infold.formats.stored import NoFold, Scale, Stored

NAME = "compressed-tensors"
CORE: tuple[str, ...] = ("weight_packed", "weight")
PARTS: tuple[str, ...] = (
    "weight_packed", "weight", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx",
    "weight_global_scale", "input_scale", "input_zero_point", "input_global_scale",
)  # fmt: skip
_FLOATS = ("F64", "F32", "F16", "BF16")


def accepts(stored: Stored) -> bool:
    if stored.dtype("weight_packed") in ("I32", "U8"):
        return "weight_scale" in stored.tensors or "scale_packed" in stored.tensors
    codes = stored.dtype("weight")
    if codes == "I8":
        return "weight_scale" in stored.tensors
    told = stored.config.get("quant_method") == "compressed-tensors"
    return told and codes == "F8_E4M3" and "weight_scale" in stored.tensors


def shape(stored: Stored) -> tuple[int, int]:
    weight = stored.shape("weight")
    if weight is not None and len(weight) == 2:
        return weight[0], weight[1]
    _refuse_marlin(stored)
    packed = stored.shape("weight_packed")
    if packed is None or len(packed) != 2:
        raise NoFold("its weight is no matrix")
    if stored.dtype("weight_packed") == "U8":
        return packed[0], 2 * packed[1]
    kind = stored.dtype("weight_shape")
    if stored.shape("weight_shape") != (2,) or kind not in ("I32", "I64"):
        raise NoFold("its weight_shape is missing")
    out, inputs = stored.read("weight_shape").tolist()
    return out, inputs


def words(stored: Stored) -> str:
    told = stored.config.get("format")
    return NAME + (f", {told}" if isinstance(told, str) else "")


def scales(stored: Stored) -> tuple[Scale, ...]:
    _refuse_marlin(stored)
    scale, kind, (out, _) = (
        stored.shape("weight_scale"),
        stored.dtype("weight_scale"),
        shape(stored),
    )
    assert scale is not None
    if kind not in _FLOATS:
        raise NoFold("MX scales are powers of two, so they cannot take a factor")
    return (Scale("weight_scale", rows=check_rows(scale, out)),)


def _refuse_marlin(stored: Stored) -> None:
    if "scale_packed" in stored.tensors:
        raise NoFold("its scales lie in the order of Marlin kernels (2:4 sparse)")


def check_rows(scale: tuple[int, ...], out: int) -> int:
    """0, where a tensor of scales has the module's rows as its first dimension. Raises NoFold."""
    if not scale or scale == (1,) or (len(scale) == 2 and scale == (1, 1) and out != 1):
        raise NoFold("one scale belongs to the whole weight")
    if scale[0] != out:
        raise NoFold(f"one scale belongs to several rows ({list(scale)} scales for {out} rows)")
    return 0
