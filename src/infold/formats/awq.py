"""AWQ, as AutoAWQ stores it, in four bits.

    gemm       qweight I32 [in, out / 8], qzeros I32 [groups, out / 8], scales F16 [groups, out]
    gemv       qweight I32 [out, in / 8], qzeros I32 [out, ...], scales F16 [out, groups, padded]
    gemv_fast  qweight I16 [out / 4, in], qzeros and scales F16 [groups, padded; out]

gemm and gemv: W[o, i] = scales * (code - zero). gemv_fast stores -scale * zero as qzeros, in
floats: there W[o, i] = scales * code + qzeros, and a fold multiplies both.
"""

from __future__ import annotations

from infold.formats.stored import NoFold, Scale, Stored

NAME = "AWQ"
CORE: tuple[str, ...] = ("qweight",)
PARTS: tuple[str, ...] = ("qweight", "qzeros", "scales")
_CODES = 8  # in 32 bits


def accepts(stored: Stored) -> bool:
    return _version(stored) is not None


def _version(stored: Stored) -> str | None:
    codes, scales, zeros = (stored.shape(part) for part in ("qweight", "scales", "qzeros"))
    if codes is None or scales is None or zeros is None or len(codes) != 2 or len(scales) != 2:
        return None
    if stored.config.get("quant_method") == "gptq":
        return None
    kind = stored.dtype("qweight")
    if kind == "I16" and zeros == scales and codes[0] * 4 == scales[1]:
        return "gemv_fast"
    if kind == "I32" and codes[1] * _CODES == scales[1]:
        return "gemm"
    return "gemv" if kind == "I32" and codes[0] == scales[0] else None


def shape(stored: Stored) -> tuple[int, int]:
    first, second = stored.tensors["qweight"].shape
    version = _version(stored)
    if version == "gemm":
        return second * _CODES, first
    return (first, second * _CODES) if version == "gemv" else (first * 4, second)


def words(stored: Stored) -> str:
    return f"AWQ ({_version(stored)}), 4 bits"


def scales(stored: Stored) -> tuple[Scale, ...]:
    told = (stored.config.get(field) for field in ("version", "format"))
    if any("marlin" in str(kind).lower() for kind in told):
        raise NoFold("its scales lie in the order of Marlin kernels; use the gemm checkpoint")
    version = _version(stored)
    if version == "gemv":
        return (Scale("scales"),)
    scale = Scale("scales", transposed=True)
    return (scale,) if version == "gemm" else (scale, Scale("qzeros", transposed=True))
