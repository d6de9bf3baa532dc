"""The coding of what rounding destroyed: small, right for any bits, and the same by compiled code
and by PyTorch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from infold.edit import residual
from infold.edit.residual import RESIDUAL, pack_original, pack_residual, unpack
from infold.errors import CorruptFile
from infold.kernel import library

DTYPES = [torch.float8_e4m3fn, torch.float16, torch.bfloat16, torch.float32, torch.float64]
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
ON = pytest.mark.skipif(library.load() is None, reason="nothing is compiled here")


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(INTEGERS[tensor.element_size()])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 1000])
def test_any_block_comes_back_from_any_guess(dtype: torch.dtype, count: int, either: bool) -> None:
    """Any bits: infinities, every NaN, both zeros."""
    kind = INTEGERS[dtype.itemsize]
    span = torch.iinfo(kind)
    random = torch.Generator().manual_seed(count)

    def draw() -> Tensor:
        return torch.randint(span.min, span.max, (count, 1), dtype=kind, generator=random)

    block, strange = draw(), draw()
    near = block + (torch.rand(count, 1, generator=random) < 0.3)
    for guess in (strange, near, block, torch.full_like(block, span.min)):
        for packed in (
            pack_residual(block.view(dtype), guess.view(dtype)),
            pack_original(block.view(dtype)),
        ):
            found = guess.clone().view(dtype)
            unpack(*packed, found, "here")

            assert torch.equal(block, bits(found))


def test_the_residual_of_neighbours_is_small_also_across_zero() -> None:
    block = torch.tensor([[0.0, -0.0, 1.0, -1.0] * 1000], dtype=torch.bfloat16)
    smallest = torch.tensor(1, dtype=torch.int16).view(torch.bfloat16)
    guess = torch.tensor([[-0.0, 0.0, 1.0, -1.0] * 1000], dtype=torch.bfloat16)
    guess[:, 0] = -smallest

    kind, payload = pack_residual(block, guess)

    assert kind == RESIDUAL and len(payload) < 60


def entropy(share: float) -> Tensor:
    p = torch.tensor([share, 1 - share], dtype=torch.float64)
    return -(p * p.log2()).sum()


def test_the_mask_costs_about_its_entropy() -> None:
    """An independent bound: bits that are set at random, each with the given probability."""
    random = torch.Generator().manual_seed(0)
    guess = torch.randn(1024, 1024, generator=random).to(torch.bfloat16)
    for share in (0.02, 0.1, 0.3):
        off = (torch.rand(guess.shape, generator=random) < share).to(torch.int16)
        block = (bits(guess) + off * torch.where(bits(guess) < 0, -1, 1).to(torch.int16)).view(
            torch.bfloat16
        )
        _, payload = pack_residual(block, guess)
        least = float(entropy(share)) * guess.numel() / 8

        assert least < len(payload) < 1.7 * least + 0.01 * guess.nbytes


# --- compiled, and by PyTorch ------------------------------------------------------------------


def ways() -> Iterator[str]:
    """PyTorch first, then each level of what is compiled, as long as the loop's body runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "load", lambda: None)
        yield "PyTorch"
    for level in range(library.level() + 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(library, "level", lambda level=level: level)
            yield str(level)


def a_vector(count: int, kind: torch.dtype, spread: int, seed: int) -> tuple[Tensor, Tensor]:
    """A block and a guess whose residuals are mostly 0, some 1 or -1, some up to `spread`."""
    random = torch.Generator().manual_seed(seed)
    span = torch.iinfo(kind)
    block = torch.randint(span.min, span.max, (count,), dtype=kind, generator=random)
    share = torch.rand(count, generator=random)
    step = torch.randint(-1, 2, (count,), generator=random)
    far = torch.randint(-spread, spread + 1, (count,), generator=random)
    off = torch.where(share < 0.05, far, torch.where(share < 0.4, step, 0)).to(kind)
    return block, block - off


@ON
@settings(max_examples=150, deadline=None)
@given(
    count=st.integers(1, 600),
    kind=st.sampled_from(list(INTEGERS.values())),
    spread=st.sampled_from([0, 2, 3, 127, 1 << 40]),
    seed=st.integers(0, 1 << 20),
)
def test_both_ways_write_the_same_bytes_and_read_them(
    count: int, kind: torch.dtype, spread: int, seed: int
) -> None:
    block, guess = a_vector(count, kind, spread, seed)
    coded = [bytes(residual._coded(block, guess)) for _ in ways()]
    assert set(coded) == {coded[0]}
    assert len(coded[0]) <= residual.unpack_bound(block)
    for way in ways():
        found = guess.clone()
        residual._decode(found, coded[0], "here")
        assert torch.equal(found, block), way


@ON
@settings(max_examples=300, deadline=None)
@given(
    count=st.integers(1, 300),
    kind=st.sampled_from(list(INTEGERS.values())),
    seed=st.integers(0, 1 << 20),
    data=st.data(),
)
def test_forged_residuals_end_alike_and_touch_nothing_else(
    count: int, kind: torch.dtype, seed: int, data: st.DataObject
) -> None:
    """Bits turned over, bytes cut off or added: an error, or the same block both ways."""
    block, guess = a_vector(count, kind, 127, seed)
    coded = bytearray(residual._coded(block, guess))
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, len(coded) - 1))
        coded[at] ^= 1 << data.draw(st.integers(0, 7))
    length = data.draw(st.sampled_from([len(coded), 0, len(coded) // 2, len(coded) - 1]))
    forged = bytes(coded[:length]) + b"x" * data.draw(st.sampled_from([0, 0, 1, 8]))
    ends = []
    for _ in ways():
        around = torch.full((count + 64,), 77, dtype=kind)
        around[32:-32] = guess
        try:
            residual._decode(around[32:-32], forged, "here")
            ends.append(around[32:-32].tolist())
        except CorruptFile as error:
            ends.append(str(error))
            assert torch.equal(around[32:-32], guess)
        assert (around[:32] == 77).all() and (around[-32:] == 77).all()
    assert all(end == ends[0] for end in ends)


@ON
def test_what_c_may_not_read_is_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elements apart, or not where the processor wants them."""
    block, guess = a_vector(96, torch.int16, 127, 1)
    coded = bytes(residual._coded(block, guess))
    odd = torch.frombuffer(bytearray(2 * 96 + 1), dtype=torch.int16, count=96, offset=1)
    for place in (torch.zeros(96, 3, dtype=torch.int16)[:, 1], odd):
        with monkeypatch.context() as patch:
            patch.setattr(library, "level", lambda: pytest.fail("C was called"))
            place.copy_(guess)
            assert bytes(residual._coded(block, place)) == coded
            residual._decode(place, coded, "here")
        assert torch.equal(place, block)


@pytest.mark.parametrize(
    ("coded", "why"),
    [
        (b"\0" * 7, "too short"),  # seven bytes of eight with codes
        (b"\2" + b"\0" * 7 + b"x", "too short"),  # a code of 2, and one byte of two
        (b"\0" * 8 + b"x", "too long"),
        (b"\2" + b"\0" * 7 + b"xxx", "too long"),
        (b"\0" * 5 + b"\2\0\0" + b"xx", "outside of its block"),  # of the sixth of five
        (b"\x80" + b"\0" * 7 + b"xx", "outside of its block"),  # of the fourth quarter
        (b"\x80" + b"\0" * 7 + b"x", "too short"),  # which is told first
    ],
)
def test_what_is_wrong_with_a_forged_block_is_told(coded: bytes, why: str, either: bool) -> None:
    with pytest.raises(CorruptFile, match=f"here: .*{why}"):
        residual._decode(torch.zeros(5, dtype=torch.int16), coded, "here")
