"""Stored parts of quantized modules <-> values, against the packages that write such files.

GPTQ, AWQ and HQQ, whose packages need a GPU or a newer PyTorch, are restated bit by bit here.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

import ggufs
from infold.errors import Refusal
from infold.formats.gguf import PACKINGS
from infold.formats.values import (
    awq,
    bitsandbytes,
    compressed_tensors,
    fp8,
    ggml,
    gptq,
    hqq,
)
from infold.formats.values.bits import pack, unpack
from infold.formats.values.scheme import Scheme, e8m0, to_e4m3
from infold.ggml import BLOCKS
from infold.verify.ggml import values_of

RANDOM = torch.Generator().manual_seed(3)
PIECES = (slice(0, 40), slice(0, 1), slice(5, 23), slice(37, 40))


def weight(rows: int = 40, columns: int = 64, generator: torch.Generator = RANDOM) -> Tensor:
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64) * 0.05


def codes_of(shape: tuple[int, ...], bits: int) -> Tensor:
    return torch.randint(0, 1 << bits, shape, generator=RANDOM, dtype=torch.int64)


def columns(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Vectors as columns, as a file's tensors are shown to a format."""
    return {n: t.reshape(-1, 1) if t.dim() < 2 else t for n, t in tensors.items()}


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("bits", range(1, 9))
def test_bits_are_one_stream(bits: int) -> None:
    codes = codes_of((3, 45), bits)

    words = pack(codes, bits)

    streams = [sum(int(c) << bits * n for n, c in enumerate(row)) for row in codes]
    data = [int.from_bytes(row.numpy().tobytes(), "little") for row in words]
    assert data == streams
    assert torch.equal(unpack(words, bits, 45).to(torch.int64), codes)


# --- GPTQ and AWQ, bit by bit --------------------------------------------------------------------


def gptq_parts(
    bits: int, groups: int, plus_one: bool, act_order: bool
) -> tuple[dict[str, Tensor], Tensor]:
    """A module of (64 out, 96 in) and its values, each computed from single bits."""
    out, inputs, top = 64, 96, (1 << bits) - 1
    codes = codes_of((out, inputs), bits).tolist()
    zeros = codes_of((out, groups), bits).clamp(1 if plus_one else 0, top).tolist()
    scales = (torch.rand(groups, out, generator=RANDOM) * 0.01 + 0.001).half()
    g_idx = torch.arange(inputs) // (inputs // groups)
    if act_order:
        g_idx = g_idx[torch.randperm(inputs, generator=RANDOM)]

    def stream(numbers: list[int]) -> list[int]:
        whole = sum(n << bits * k for k, n in enumerate(numbers))
        words = [whole >> 32 * k & 0xFFFFFFFF for k in range(len(numbers) * bits // 32)]
        return [word - (1 << 32) if word >> 31 else word for word in words]

    parts = {
        "qweight": torch.tensor([stream(row) for row in codes], dtype=torch.int32).t().contiguous(),
        "qzeros": torch.tensor(
            [stream([zeros[o][g] - plus_one for o in range(out)]) for g in range(groups)],
            dtype=torch.int32,
        ),
        "scales": scales,
        "g_idx": g_idx.to(torch.int32),
    }
    values = [
        [
            float(scales[g_idx[i], o]) * (codes[o][i] - zeros[o][int(g_idx[i])])
            for i in range(inputs)
        ]
        for o in range(out)
    ]
    return columns(parts), torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("plus_one", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq(bits: int, act_order: bool, plus_one: bool) -> None:
    parts, values = gptq_parts(bits, 3, plus_one, act_order)
    scheme = Scheme((64, 96), bits, 32, plus_one=plus_one)

    for rows in PIECES:
        assert torch.equal(gptq.decode(parts, scheme, rows), values[rows])

    if plus_one:
        wrong = gptq.decode(parts, Scheme((64, 96), bits, 32), slice(0, 64))
        assert not torch.isclose(wrong, values, rtol=1e-3).any(), "each weight is a step off"


def test_gptq_zero_points_that_kernels_read_in_two_ways_are_refused() -> None:
    parts, _ = gptq_parts(4, 3, False, False)
    parts["qzeros"][:] = -1

    with pytest.raises(Refusal, match="some kernels read as 16 and others as 0"):
        gptq.decode(parts, Scheme((64, 96), 4, 32, plus_one=True), slice(0, 8))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("plus_one", [False, True])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_gptq_rounds_to_the_nearest_of_its_grid(bits: int, plus_one: bool, symmetric: bool) -> None:
    parts, _ = gptq_parts(bits, 3, plus_one, act_order=True)
    scheme = Scheme((64, 96), bits, 32, symmetric, plus_one)
    values, out = weight(64, 96), {n: torch.zeros_like(t) for n, t in parts.items()}

    for rows in (slice(0, 32), slice(32, 64)):
        gptq.encode(values[rows], scheme, parts, rows, out)

    out["g_idx"] = parts["g_idx"]
    found = gptq.decode(out, scheme, slice(0, 64))
    step = out["scales"].to(torch.float64)[parts["g_idx"].flatten().long()].t()
    assert ((found - values).abs() / step).max() < (1.01 if symmetric else 1.001)
    assert ((found - values).abs() / step).median() < 0.3
    assert error(found, values) < {3: 0.25, 4: 0.11, 8: 0.007}[bits]


def test_awq() -> None:
    out, inputs, group = 40, 64, 16
    codes, zeros = codes_of((out, inputs), 4), codes_of((out, inputs // group), 4)
    scales = (torch.rand(inputs // group, out, generator=RANDOM) * 0.01 + 0.001).half()
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def words(numbers: Tensor) -> Tensor:
        """(out, n) -> (n, out / 8), nibble k of a word being output order[k]."""
        result = np.zeros((numbers.shape[1], out // 8), dtype=np.uint32)
        for n in range(numbers.shape[1]):
            for word in range(out // 8):
                for nibble, place in enumerate(order):
                    result[n, word] |= np.uint32(int(numbers[8 * word + place, n]) << 4 * nibble)
        return torch.from_numpy(result.view(np.int32))

    parts = {"qweight": words(codes), "qzeros": words(zeros), "scales": scales}
    spread = torch.arange(inputs) // group
    values = (codes - zeros[:, spread]).double() * scales.double().t()[:, spread]
    scheme = Scheme((out, inputs), 4, group, symmetric=False)

    for rows in PIECES:
        assert torch.equal(awq.decode(parts, scheme, rows), values[rows])

    again = {n: torch.zeros_like(t) for n, t in parts.items()}
    new = weight(out, inputs)
    for rows in (slice(0, 16), slice(16, 40)):
        awq.encode(new[rows], scheme, parts, rows, again)
    assert error(awq.decode(again, scheme, slice(0, out)), new) < 0.12


# --- bitsandbytes --------------------------------------------------------------------------------


def test_bitsandbytes_int8() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    codes, scales, _ = functional.int8_vectorwise_quant(weight().half())
    parts = columns({"weight": codes, "SCB": scales})
    scheme = Scheme((40, 64))
    theirs = functional.int8_vectorwise_dequant(codes, scales)

    for rows in PIECES:
        found = bitsandbytes.decode(parts, scheme, rows)
        torch.testing.assert_close(found.float(), theirs[rows], rtol=3e-7, atol=0)

    out = {n: torch.zeros_like(t) for n, t in parts.items()}
    bitsandbytes.encode(
        bitsandbytes.decode(parts, scheme, slice(0, 40)), scheme, parts, slice(0, 40), out
    )
    assert torch.equal(out["weight"], codes), "absmax rounding of what it made gives the same codes"
    torch.testing.assert_close(out["SCB"].flatten(), scales, rtol=2e-7, atol=0)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_4bit(kind: str, nested: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    values = torch.randn(40, 832, generator=RANDOM) * 0.05
    packed, state = functional.quantize_4bit(
        values, blocksize=64, quant_type=kind, compress_statistics=nested
    )
    parts = {"weight": packed, "weight.absmax": state.absmax, "weight.quant_map": state.code}
    offset = 0.0
    if nested:
        parts |= {
            "weight.nested_absmax": state.state2.absmax,
            "weight.nested_quant_map": state.state2.code,
        }
        offset = float(state.offset)
    parts = columns(parts)
    scheme = Scheme((40, 832), 4, 64, kind=kind, offset=offset, nested_block=256)
    theirs = functional.dequantize_4bit(packed, state)

    for rows in PIECES:
        found = bitsandbytes.decode(parts, scheme, rows)
        torch.testing.assert_close(found.float(), theirs[rows], rtol=3e-7, atol=1e-9)

    if not nested:
        out = {n: torch.zeros_like(t) for n, t in parts.items()}
        for rows in (slice(0, 17), slice(17, 40)):
            bitsandbytes.encode(values[rows].double(), scheme, parts, rows, out)
        again = bitsandbytes.decode(
            out | {"weight.quant_map": parts["weight.quant_map"]}, scheme, slice(0, 40)
        )
        assert torch.equal(out["weight.absmax"], parts["weight.absmax"])
        assert error(again, values.double()) <= error(theirs.double(), values.double()) + 1e-9


# --- compressed-tensors and FP8 -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "group", "symmetric"),
    [(4, 16, True), (4, 16, False), (8, 16, True), (4, 0, False), (3, 16, True), (8, 0, True)],
)
def test_compressed_tensors_packed(bits: int, group: int, symmetric: bool) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    values = weight(64, 96).float()
    arguments = QuantizationArgs(
        num_bits=bits, symmetric=symmetric, strategy="group" if group else "channel",
        group_size=group or None,
    )  # fmt: skip
    grouped = values.view(64, -1, group or 96)
    scale, zero = calculate_qparams(grouped.amin(2), grouped.amax(2), arguments)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    state = {"weight": values, "weight_scale": scale}
    if not symmetric:
        state["weight_zero_point"] = zero.to(torch.int8)
    stored = PackedQuantizationCompressor.compress(state, scheme)
    theirs = PackedQuantizationCompressor.decompress(stored, scheme)["weight"]
    parts = columns({n: t for n, t in stored.items() if n != "weight_shape"})
    mine = Scheme((64, 96), bits, group, symmetric)

    for rows in PIECES:
        found = compressed_tensors.decode(parts, mine, rows)
        torch.testing.assert_close(found.float(), theirs[rows], rtol=2e-7, atol=0)

    out = {n: torch.zeros_like(t) for n, t in parts.items()}
    for rows in (slice(0, 32), slice(32, 64)):
        compressed_tensors.encode(values[rows].double(), mine, parts, rows, out)
    again = compressed_tensors.decode(out, mine, slice(0, 64))
    # at the two ends of a symmetric grid half a step is cut off; else the same codes
    close = (again.float() - theirs).abs() < scale.repeat_interleave(group or 96, 1) * 1.01
    assert close.all()
    assert (again.float() - theirs).abs().lt(1e-6).float().mean() > 0.97


def test_fp8_blocks() -> None:
    from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

    values = torch.randn(40, 72, generator=RANDOM).to(torch.float8_e4m3fn)
    scale = torch.rand(3, 5, generator=RANDOM) + 0.01
    parts = {"weight": values, "weight_scale_inv": scale}
    scheme = Scheme((40, 72), block=(16, 16), kind="fp8")
    theirs = _dequantize_fp8_weight(values, scale, [16, 16], torch.float64)

    for rows in PIECES:
        assert torch.equal(fp8.decode(parts, scheme, rows), theirs[rows])

    out = {n: torch.zeros_like(t) for n, t in parts.items()}
    for rows in (slice(0, 32), slice(32, 40)):
        fp8.encode(theirs[rows], scheme, parts, rows, out)
    assert error(fp8.decode(out, scheme, slice(0, 40)), theirs) < 0.03
    assert (out["weight"].float().abs() == 448).sum() >= 15, "each block's largest is the largest"


@pytest.mark.parametrize("shape", [(1, 1), (40, 1)])
def test_fp8_of_rows_and_of_the_tensor(shape: tuple[int, int]) -> None:
    values = torch.randn(40, 72, generator=RANDOM).to(torch.float8_e4m3fn)
    scale = torch.rand(*shape, generator=RANDOM) + 0.01
    parts = {"weight": values, "weight_scale": scale}
    scheme = Scheme((40, 72), block=(1 if shape[0] > 1 else 0, 0), kind="fp8")

    for rows in PIECES:
        wanted = values.double() * scale.double()
        assert torch.equal(fp8.decode(parts, scheme, rows), wanted[rows])


def test_ue8m0_scales_are_powers_of_two() -> None:
    codes = torch.arange(255, dtype=torch.uint8)

    assert e8m0(codes).tolist() == [2.0 ** (n - 127) for n in range(255)]
    assert e8m0(torch.tensor([255], dtype=torch.uint8)).isnan().all()
    values = weight(32, 32)
    values[0, 0] = 0.875  # 448 * 2^-9 exactly: the scale that just holds it
    parts = {
        "weight": torch.zeros(32, 32, dtype=torch.float8_e4m3fn),
        "weight_scale_inv": torch.zeros(1, 1, dtype=torch.uint8).view(torch.float8_e8m0fnu),
    }
    scheme = Scheme((32, 32), block=(32, 32), kind="fp8")
    fp8.encode(values, scheme, parts, slice(0, 32), parts)
    assert e8m0(parts["weight_scale_inv"]).item() == 2.0**-9
    assert fp8.decode(parts, scheme, slice(0, 1))[0, 0] == 0.875


def test_e4m3_rounds_once() -> None:
    levels = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    middles = (levels[1:] + levels[:-1]) / 2
    nudge = middles * (1 + torch.tensor([-(2.0**-40), 0, 2.0**-40]).double()[:, None])

    found = to_e4m3(nudge).double()

    even = torch.arange(126) % 2 == 0
    assert torch.equal(found[0], levels[:-1]), "float32 on the way would round up to the middle"
    assert torch.equal(found[1], torch.where(even, levels[:-1], levels[1:]))
    assert torch.equal(found[2], levels[1:])
    assert to_e4m3(torch.tensor([1e9, -1e9]).double()).double().tolist() == [448, -448]


# --- HQQ ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_hqq(bits: int, axis: int) -> None:
    out, inputs, group = 40, 64, 16
    many = out * inputs // group
    codes = codes_of((many, group) if axis else (group, many), bits)
    per, target = {
        8: (1, np.uint8),
        4: (2, np.uint8),
        3: (10, np.int32),
        2: (4, np.uint8),
        1: (8, np.uint8),
    }[bits]
    step = -(-len(codes) // per)
    packed = np.zeros((step, codes.shape[1]), dtype=np.int64)
    for row in range(len(codes)):  # the first part of the rows in the highest bits
        packed[row % step] |= codes[row].numpy() << bits * (per - 1 - row // step)
    shape = (many, 1) if axis else (1, many)
    scale, zero = (torch.rand(shape, generator=RANDOM).half() for _ in range(2))
    parts = {"W_q": torch.from_numpy(packed.astype(target)), "scale": scale, "zero": zero}
    values = ((codes.double() - zero.double()) * scale.double()).reshape(out, inputs)
    scheme = Scheme((out, inputs), bits, group, axis=axis)

    for rows in PIECES:
        assert torch.equal(hqq.decode(parts, scheme, rows), values[rows])


# --- GGUF -----------------------------------------------------------------------------------------

BY_GGML = (*ggml.BORROWED, "Q1_0")  # types that the gguf package has not, or has for infold too


@pytest.mark.parametrize("kind", [kind for kind in ggml.TYPES if kind not in BY_GGML])
def test_gguf_blocks_of_any_bytes(kind: str) -> None:
    gguf = pytest.importorskip("gguf")
    size = BLOCKS[kind][1]
    raw = torch.randint(0, 256, (9, 3 * size), generator=RANDOM, dtype=torch.uint8)
    with np.errstate(invalid="ignore"):
        theirs = gguf.quants.dequantize(raw.numpy(), gguf.GGMLQuantizationType[kind])

    found = ggml.decode_rows(kind, raw).numpy()

    finite = np.isfinite(theirs)
    assert finite.mean() > 0.7
    largest = np.abs(theirs, where=finite, out=np.zeros_like(theirs)).max(1, keepdims=True)
    assert (
        np.abs(found - theirs)[finite] <= (2.0**-22 * largest.repeat(found.shape[1], 1))[finite]
    ).all()


@pytest.mark.parametrize("kind", BY_GGML)
def test_gguf_values_are_those_of_ggml_and_exact(kind: str) -> None:
    """float32 holds them without rounding, so that the values of a block are its float times what
    they are where that float is 1."""
    data = ggufs.drawn(5, 1024, kind, seed=3)[1]
    raw = torch.from_numpy(data)
    packing = PACKINGS[kind]
    floats = packing.take(raw.view(-1))
    ones = raw.clone()
    packing.put(torch.ones_like(floats), ones.view(-1))

    found = ggml.decode_rows(kind, raw)

    exact = ggml.decode_rows(kind, ones).view(len(floats), -1) * floats.double()
    assert torch.equal(found, exact.view_as(found))
    assert np.array_equal(found.numpy(), ggufs.by_ggml(kind, data))
    assert np.array_equal(values_of(kind, data.reshape(len(floats), -1)).ravel(), found.ravel())


@pytest.mark.parametrize("kind", ggml.ENCODES)
def test_gguf_rounding_is_as_good_as_the_package_s(kind: str) -> None:
    gguf = pytest.importorskip("gguf")
    values = weight(16, 256, torch.Generator().manual_seed(4))  # whichever test ran before
    values[3] = 0
    number = gguf.GGMLQuantizationType[kind]
    theirs = gguf.quants.quantize(values.numpy().astype(np.float32), number)

    mine = ggml.encode_rows(kind, values)

    assert mine.shape == theirs.shape
    assert (mine.numpy() == theirs).mean() > 0.98
    decoded = torch.from_numpy(gguf.quants.dequantize(theirs, number)).double()
    assert error(ggml.decode_rows(kind, mine), values) < error(decoded, values) * 1.001
    assert (ggml.decode_rows(kind, mine)[3] == 0).all()
