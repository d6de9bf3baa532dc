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
CORE = "qweight"


def accepts(stored: Stored) -> bool:
    codes, scales = stored.tensors.get("qweight"), stored.tensors.get("scales")
    if codes is None or scales is None or stored.config.get("quant_method", "gptq") == "awq":
        return False
    if codes.dtype != "I32" or len(codes.shape) != 2 or len(scales.shape) != 2:
        return False
    return codes.shape[1] == scales.shape[1] and "qzeros" in stored.tensors


def shape(stored: Stored) -> tuple[int, int]:
    """(out, in)."""
    packed, out = stored.tensors["qweight"].shape
    index = stored.tensors.get("g_idx")
    if index is not None and index.shape:
        return out, index.shape[0]
    return out, packed * 32 // bits(stored)


def bits(stored: Stored) -> int:
    """Bits of a code: of the config, else as the zeros are packed."""
    told = stored.config.get("bits")
    if isinstance(told, int) and told in (2, 3, 4, 8):
        return told
    zeros, out = stored.tensors["qzeros"].shape, stored.tensors["scales"].shape[1]
    return 32 * zeros[1] // max(out, 1)


def scales(stored: Stored) -> tuple[Scale, ...]:
    if "marlin" in str(stored.config.get("checkpoint_format", "")) or stored.config.get(
        "is_marlin_format"
    ):
        raise NoFold("its scales are permuted for Marlin kernels; use the plain GPTQ checkpoint")
    return (Scale("scales", transposed=True),)
