"""GPTQ, as AutoGPTQ, GPTQModel and AutoRound store it.

    qweight  I32 [in * bits / 32, out]      codes, packed along the inputs
    qzeros   I32 [in / group, out * bits / 32]
    scales   F16 [in / group, out]
    g_idx    I32 [in]                       the group of an input; in any order with act-order

W[o, i] = scales[g, o] * (code[i, o] - zero[g, o]), g = g_idx[i]. In files of version 1 qzeros holds
zero - 1. A row's scale is a factor of all that belongs to the row, so a fold does not ask for the
version, the order, the number of bits or the symmetry.
"""

from __future__ import annotations

from infold.formats.stored import NoFold, Scale, Stored

NAME = "GPTQ"
CORE: tuple[str, ...] = ("qweight",)
PARTS: tuple[str, ...] = ("qweight", "qzeros", "scales", "g_idx")


def accepts(stored: Stored) -> bool:
    codes, scales, zeros = (stored.shape(part) for part in ("qweight", "scales", "qzeros"))
    if codes is None or scales is None or zeros is None or stored.dtype("qweight") != "I32":
        return False
    if stored.config.get("quant_method") == "awq" or len(codes) != 2 or len(scales) != 2:
        return False
    return codes[1] == scales[1] and len(zeros) == 2


def shape(stored: Stored) -> tuple[int, int]:
    packed, out = stored.tensors["qweight"].shape
    index = stored.shape("g_idx")
    return out, index[0] if index else packed * 32 // bits(stored)


def bits(stored: Stored) -> int:
    """Bits of a code: of the config, else as the zeros are packed."""
    told = stored.config.get("bits")
    if type(told) is int and told in (2, 3, 4, 8):
        return told
    out = stored.tensors["scales"].shape[1]
    return max(1, 32 * stored.tensors["qzeros"].shape[1] // max(out, 1))


def words(stored: Stored) -> str:
    groups, inputs = stored.tensors["scales"].shape[0], shape(stored)[1]
    return f"GPTQ, {bits(stored)} bits, groups of {inputs // max(groups, 1)}"


def scales(stored: Stored) -> tuple[Scale, ...]:
    told = (stored.config.get(field) for field in ("checkpoint_format", "format"))
    if any("marlin" in str(kind) for kind in told) or stored.config.get("is_marlin_format"):
        raise NoFold("its scales lie in the order of Marlin kernels; use the plain GPTQ checkpoint")
    return (Scale("scales", transposed=True),)
