"""The arithmetic against rational numbers: one rounding, exact products, fixed sums."""

from __future__ import annotations

import math
import random
from decimal import Decimal, localcontext
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import handmade
import infold
from infold import adapters
from infold.adapters import Settings
from infold.adapters.exact import LEAF, Factors, bits, root, slices_for, squares
from infold.formats import dense
from infold.merge import prepare

# dtype: (bits of significand, smallest normal exponent, largest exponent)
FORMATS = {"F32": (24, -126, 127), "F16": (11, -14, 15), "BF16": (8, -126, 127)}
INTEGERS = {"F32": torch.int32, "F16": torch.int16, "BF16": torch.int16}
quick = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


# --- the oracle ----------------------------------------------------------------------------------


def rounded(value: Fraction, dtype: str) -> float:
    """`value` rounded once to `dtype`, ties to even: by integers alone."""
    precision, least, most = FORMATS[dtype]
    if not value:
        return 0.0
    exponent = value.numerator.bit_length() - value.denominator.bit_length()
    if abs(value) < Fraction(2) ** exponent:
        exponent -= 1
    quantum = Fraction(2) ** (max(exponent, least) - precision + 1)
    result = round(value / quantum) * quantum  # Python rounds rationals half to even
    if abs(result) >= Fraction(2) ** (most + 1):
        return math.inf if result > 0 else -math.inf
    return float(result)


def exact(x: Tensor) -> list[list[Fraction]]:
    return [[Fraction(v) for v in row] for row in x.double().tolist()]


def product(b: Tensor, a: Tensor, scale: float = 1.0) -> list[list[Fraction]]:
    """scale * b @ a, by rational numbers."""
    left, right, factor = exact(b), exact(a.t()), Fraction(scale)

    def dot(row: list[Fraction], column: list[Fraction]) -> Fraction:
        return factor * sum((x * y for x, y in zip(row, column, strict=True)), Fraction())

    return [[dot(row, column) for column in right] for row in left]


def same_bits(one: Tensor, two: Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.uint8), two.contiguous().view(torch.uint8))


def test_the_oracle_agrees_with_the_processor_where_both_are_known() -> None:
    dice = random.Random(1)
    for _ in range(2000):
        value = dice.uniform(-1, 1) * 2.0 ** dice.randint(-160, 128)
        assert rounded(Fraction(value), "F32") == torch.tensor(value, dtype=torch.float64).float()
    assert rounded(Fraction(65520), "F16") == math.inf
    assert rounded(Fraction(65519), "F16") == 65504
    assert rounded(Fraction(257), "BF16") == 256 and rounded(Fraction(259), "BF16") == 260
    assert rounded(Fraction(3, 2) * Fraction(2) ** -133, "BF16") == 2.0**-132


# --- encode --------------------------------------------------------------------------------------


def all_values(dtype: str) -> Tensor:
    """Every finite non-negative value of a 16-bit dtype in ascending order, in float64; of F32 a
    choice with all exponents. Then the power of two that would come after the largest one."""
    precision, _, most = FORMATS[dtype]
    if dtype == "F32":
        numbers = torch.Generator().manual_seed(0)
        some = torch.randint(0, 1 << 23, (20,), generator=numbers)
        mantissas = torch.cat([torch.tensor([0, 1, 2, 3, (1 << 23) - 2, (1 << 23) - 1]), some])
        patterns = (torch.arange(255)[:, None] * (1 << 23) + mantissas).flatten().sort()[0]
        patterns = torch.cat([patterns, patterns + 1]).unique()
    else:
        patterns = torch.arange(((1 << (16 - precision)) - 1) << (precision - 1))
    finite = patterns.to(INTEGERS[dtype]).view(dense.torch_dtype(dtype)).double()
    finite = finite[torch.isfinite(finite)]
    return torch.cat([finite, torch.tensor([2.0 ** (most + 1)], dtype=torch.float64)])


def neighbourhoods(dtype: str) -> tuple[Tensor, Tensor]:
    """(values, what each rounds to), known by construction: all values of the dtype, the midpoints
    between neighbours, and what lies a little beside either."""
    grid = all_values(dtype)
    low, high = grid[:-1], grid[1:]
    precision, least, _ = FORMATS[dtype]
    exponent = torch.where(low > 0, torch.frexp(low)[1], least).clamp(min=least + 1)
    quantum = 2.0 ** (exponent - precision).double()
    neighbours = high - low == quantum
    low, high, quantum = low[neighbours], high[neighbours], quantum[neighbours]
    middle = (low + high) / 2
    even = torch.where(torch.remainder(low / quantum, 2) == 0, low, high)
    up, down = torch.tensor(math.inf), torch.tensor(-math.inf)
    pairs = [(low, low), (middle, even), (middle.nextafter(up.double()), high)]
    pairs += [(middle.nextafter(down.double()), low)]
    for part in (2.0**-1, 2.0**-10, 2.0**-24, 2.0**-30):
        step = quantum / 2 * part
        pairs += [(middle + step, torch.where(middle + step > middle, high, even))]
        pairs += [(middle - step, torch.where(middle - step < middle, low, even))]
    pairs += [(low.nextafter(up.double()), low)]
    values, right = (torch.cat(list(part)) for part in zip(*pairs, strict=True))
    overflow = 2.0 ** (FORMATS[dtype][2] + 1)
    right[right == overflow] = math.inf
    return torch.cat([values, -values]), torch.cat([right, -right])


@pytest.mark.parametrize("dtype", FORMATS)
def test_the_neighbourhoods_tell_what_the_rational_oracle_tells(dtype: str) -> None:
    values, right = neighbourhoods(dtype)
    dice = random.Random(2)
    for number in dice.sample(range(len(values)), 3000):
        expected = rounded(Fraction(values[number].item()), dtype)
        assert expected == right[number].item(), values[number].item().hex()


@pytest.mark.parametrize("dtype", FORMATS)
def test_encode_rounds_rightly_around_every_value_and_every_midpoint(dtype: str) -> None:
    values, right = neighbourhoods(dtype)
    assert len(values) > (800_000 if dtype == "BF16" else 150_000)

    encoded = dense.encode(values, dtype)

    wrong = encoded.double() != right
    assert not wrong.any(), values[wrong][:5].tolist()
    assert torch.equal(encoded.double().signbit(), values.signbit()), "-0 stays -0"


@pytest.mark.parametrize("dtype", FORMATS)
@quick
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=40))
def test_encode_rounds_any_float64_rightly(dtype: str, values: list[float]) -> None:
    encoded = dense.encode(torch.tensor(values, dtype=torch.float64), dtype).double().tolist()

    assert encoded == [rounded(Fraction(v), dtype) for v in values]
    assert [math.copysign(1, v) for v in encoded] == [math.copysign(1, v) for v in values]


@pytest.mark.parametrize("dtype", FORMATS)
@quick
@given(st.data())
def test_encode_rounds_rightly_a_little_beside_a_midpoint(dtype: str, data: st.DataObject) -> None:
    precision, least, most = FORMATS[dtype]
    exponent = data.draw(st.integers(least, most))
    whole = data.draw(st.integers(0, (1 << precision) - 1))
    middle = Fraction(2 * whole + 1, 2) * Fraction(2) ** (exponent - precision + 1)
    shift = data.draw(st.integers(precision + 1, 52))
    sign = data.draw(st.sampled_from((-1, 0, 1)))
    value = float(middle * (1 + sign * Fraction(2) ** -shift))

    encoded = dense.encode(torch.tensor([value], dtype=torch.float64), dtype)

    assert encoded.double().item() == rounded(Fraction(value), dtype)


def test_encode_keeps_nan_and_infinity_as_such() -> None:
    odd = torch.tensor([math.nan, math.inf, -math.inf], dtype=torch.float64)
    least_nan = torch.tensor([0x7FF0000000000001], dtype=torch.int64).view(torch.float64)
    for dtype in FORMATS:
        encoded = dense.encode(torch.cat([odd, least_nan]), dtype)
        assert torch.isnan(encoded).tolist() == [True, False, False, True]
        assert torch.isinf(encoded).tolist() == [False, True, True, False]


def test_encode_does_not_share_memory_with_its_values() -> None:
    values = torch.ones(4, dtype=torch.float64)
    for dtype in ("F64", *FORMATS):
        encoded = dense.encode(values, dtype)
        encoded.fill_(5)
        assert values.eq(1).all()


# --- the same through a real merge ---------------------------------------------------------------


def merged_values(tmp_path: Path, values: Tensor, dtype: str) -> Tensor:
    """`values` brought through a merge: a base of ones and minus ones, times IA³ vectors in F64."""
    base = torch.ones(2, len(values)).to(dense.torch_dtype(dtype))
    base[1] = -1
    folder = handmade.base_folder(tmp_path / "base", {"up_proj.weight": base})
    adapter = handmade.ia3(
        tmp_path / "ia3", {"up_proj": values[None]}, feedforward_modules=["up_proj"]
    )
    infold.merge(folder, adapter, tmp_path / "out")
    return load_file(tmp_path / "out" / "model.safetensors")["up_proj.weight"]


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("order", ["sorted", "shuffled"])
def test_a_merge_rounds_rightly_around_every_value_and_every_midpoint(
    dtype: str, order: str, tmp_path: Path
) -> None:
    """Half of all elements lie at a midpoint: every column is settled."""
    values, right = neighbourhoods(dtype)
    values, right = values[torch.isfinite(right)], right[torch.isfinite(right)]
    if order == "shuffled":
        mixed = torch.randperm(len(values), generator=torch.Generator().manual_seed(3))
        values, right = values[mixed], right[mixed]

    merged = merged_values(tmp_path, values, dtype).double()

    for row, sign in zip(merged, (1, -1), strict=True):
        wrong = row != sign * right
        assert not wrong.any(), values[wrong][:5].tolist()
        assert torch.equal(row.signbit(), (sign * values).signbit())


@pytest.mark.usefixtures("by_pytorch")
@pytest.mark.parametrize("dtype", FORMATS)
def test_a_merge_rounds_a_few_hidden_midpoints_rightly(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few elements of a block lie at a midpoint: only their columns are settled."""
    values, right = neighbourhoods(dtype)
    keep = torch.isfinite(right) & (values.abs() < 1e30) & (values.abs() > 1e-30)
    values, right = values[keep], right[keep]
    numbers = torch.Generator().manual_seed(4)
    plain = torch.randn(60_000, generator=numbers, dtype=torch.float64)
    plain_right = dense.encode(plain, dtype).double()  # tested above
    places = torch.randperm(60_000, generator=numbers)[:120]
    chosen = torch.randperm(len(values), generator=numbers)[:120]
    plain[places], plain_right[places] = values[chosen], right[chosen]
    settled = []
    real = dense.midpoints

    def noted(staged: Tensor) -> Tensor:
        settled.append(len(real(staged)))
        return real(staged)

    monkeypatch.setattr(dense, "midpoints", noted)
    monkeypatch.setattr(prepare, "_BLOCK", 16_384)
    monkeypatch.setattr(prepare, "_SMALLEST_BLOCK", 16_384)

    merged = merged_values(tmp_path, plain, dtype).double()

    assert torch.equal(merged[0], plain_right) and torch.equal(merged[1], -plain_right)
    if dtype == "BF16":
        assert 0 < max(settled) < 500, "of 8,192 columns of a block"


@pytest.mark.parametrize("dtype", FORMATS)
def test_a_merged_bias_is_rounded_rightly_too(dtype: str, tmp_path: Path) -> None:
    values, right = neighbourhoods(dtype)
    keep = torch.isfinite(right)
    values, right = values[keep][::7], right[keep][::7]
    stored = dense.torch_dtype(dtype)
    base = {
        "q_proj.weight": torch.ones(len(values), 3, dtype=stored),
        "q_proj.bias": torch.ones(len(values), dtype=stored),
    }
    folder = handmade.base_folder(tmp_path / "base", base)
    adapter = handmade.ia3(tmp_path / "ia3", {"q_proj": values[:, None]})

    infold.merge(folder, adapter, tmp_path / "out")

    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(merged["q_proj.bias"].double(), right)
    assert torch.equal(merged["q_proj.weight"].double(), right[:, None].expand(-1, 3))


def test_overflow_is_refused_by_the_last_value_that_does_not_fit(tmp_path: Path) -> None:
    """One float64 below the border fits, the border itself does not."""
    for dtype, (precision, _, most) in FORMATS.items():
        border = 2.0 ** (most + 1) * (1 - 2.0 ** -(precision + 1))
        below = math.nextafter(border, 0)
        values = torch.full((5,), below, dtype=torch.float64)
        (tmp_path / dtype).mkdir()
        largest = merged_values(tmp_path / dtype, values, dtype)
        assert (largest[0] == torch.finfo(largest.dtype).max).all()
        values[3] = border
        (tmp_path / f"{dtype}-over").mkdir()
        with pytest.raises(infold.Refusal, match=rf"up_proj.weight\[0, 3\].*not fit {dtype}"):
            merged_values(tmp_path / f"{dtype}-over", values, dtype)


# --- the methods against rational numbers --------------------------------------------------------


def factors(out: int, inner: int, rank: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    numbers = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, inner, generator=numbers) * 0.05
    a = torch.randn(rank, inner, generator=numbers) / inner**0.5
    return weight, a, torch.randn(out, rank, generator=numbers) * 0.02


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("rank", "alpha"), [(1, 1), (8, 16), (16, 6), (7, 3), (64, 100)])
def test_lora_into_f32_is_the_rightly_rounded_rational_value(
    rank: int, alpha: float, seed: int
) -> None:
    weight, a, b = factors(24, 20, rank, seed)
    scale = alpha / rank

    merged = adapters.merge(
        "lora",
        weight,
        None,
        {"lora_A": a, "lora_B": b},
        Settings(scaling=scale, slices=slices_for("F32", rank)),
    ).weight

    update = product(b, a, scale)
    right = [
        [rounded(w + d, "F32") for w, d in zip(*rows, strict=True)]
        for rows in zip(exact(weight), update, strict=True)
    ]
    assert dense.encode(merged, "F32").double().tolist() == right


@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("dtype", FORMATS)
def test_ia3_is_the_rightly_rounded_rational_value(side: str, dtype: str) -> None:
    """A product of two stored numbers fits float64, so only the one rounding is left."""
    numbers = torch.Generator().manual_seed(6)
    weight = torch.randn(40, 50, generator=numbers).to(dense.torch_dtype(dtype))
    bias = torch.randn(40, generator=numbers).to(dense.torch_dtype(dtype))
    vector = torch.rand(40 if side == "out" else 50, generator=numbers) * 2
    settings_ = Settings(side=side, out=40)

    merged = adapters.merge("ia3", weight, bias, {"ia3_l": vector}, settings_)

    scale = [Fraction(v) for v in vector.tolist()]
    right = [
        [rounded(w * scale[i if side == "out" else j], dtype) for j, w in enumerate(row)]
        for i, row in enumerate(exact(weight))
    ]
    assert dense.encode(merged.weight, dtype).double().tolist() == right
    assert merged.bias is not None
    [values] = exact(bias[None])
    expected = [
        rounded(v * s, dtype) if side == "out" else float(v)
        for v, s in zip(values, scale if side == "out" else values, strict=True)
    ]
    assert dense.encode(merged.bias, dtype).double().tolist() == expected


def test_several_adapters_are_rounded_once(tmp_path: Path) -> None:
    """LoRA, then IA³, then LoRA again on one F32 weight: the rational value, rounded at the end."""
    weight, a, b = factors(24, 20, 4, 1)
    base = handmade.base_folder(tmp_path / "base", {"q_proj.weight": weight})
    one = handmade.lora(tmp_path / "one", {"q_proj": (24, 20)}, 4, 8, seed=2)
    vector = torch.rand(24, 1) + 0.5
    two = handmade.ia3(tmp_path / "two", {"q_proj": vector})
    three = handmade.lora(tmp_path / "three", {"q_proj": (24, 20)}, 4, 6, seed=3)

    infold.merge(base, [one, two, three], tmp_path / "out")

    updates = []
    for adapter, scale in ((one, 2.0), (three, 1.5)):
        parts = load_file(adapter / "adapter_model.safetensors")
        b, a = (parts[f"base_model.model.q_proj.lora_{x}.weight"] for x in "BA")
        updates.append(product(b, a, scale))
    merged = load_file(tmp_path / "out" / "model.safetensors")["q_proj.weight"].double()
    for i, row in enumerate(exact(weight)):
        factor = Fraction(vector[i, 0].item())
        for j, value in enumerate(row):
            right = (value + updates[0][i][j]) * factor + updates[1][i][j]
            assert merged[i, j].item() == rounded(right, "F32")


@pytest.mark.parametrize("ratio", [0.05, 1.0, 30.0], ids="update {} of the weight".format)
@pytest.mark.parametrize(
    ("dtype", "rank"),
    [("BF16", r) for r in (4, 16, 17, 64, 256, 512)] + [("F16", r) for r in (1, 16, 64, 512)],
)
def test_hardly_any_element_of_16_bits_is_decided_by_the_cut_of_the_factors(
    dtype: str, rank: int, ratio: float
) -> None:
    """The elements are the rightly rounded ones, but where the exact value lies closer to a
    midpoint than the product's error. With one slice that may be 1 in 10,000 up to an update as
    large as the weight, and little more beyond; with two slices none."""
    slices = slices_for(dtype, rank)
    weight, a, b = factors(512, 640, rank, rank)
    stored = weight.to(dense.torch_dtype(dtype))
    plain = b.double() @ a.double()
    scale = ratio * float(weight.double().norm() / plain.norm())

    merged = adapters.merge(
        "lora", stored, None, {"lora_A": a, "lora_B": b}, Settings(scaling=scale, slices=slices)
    ).weight

    ours = dense.encode(merged, dtype).double()
    reference, near = stored.double() + scale * plain, (scale * plain).abs() * 2.0**-30
    low, high = (dense.encode(reference + d, dtype).double() for d in (-near, near))
    asked = ((low != high) | (ours != low)).nonzero().tolist()  # all others are beyond doubt
    wrong = 0
    for i, j in asked:
        [[update]] = product(b[i : i + 1], a[:, j : j + 1], scale)
        value = Fraction(stored[i, j].item()) + update
        right = rounded(value, dtype)
        if ours[i, j].item() != right:
            wrong += 1
            middle = (Fraction(ours[i, j].item()) + Fraction(right)) / 2
            largest = b[i].double().abs().max() * a[:, j].double().abs().max() * rank * scale
            assert abs(value - middle) <= Fraction(largest.item()) * 2 ** (1 - bits(rank)) * 2
    most = 0 if slices == 2 else 1 if ratio <= 1 else 2
    assert wrong * 10_000 <= most * ours.numel(), wrong


def test_two_slices_are_taken_where_one_is_not_enough() -> None:
    assert [slices_for(d, 16) for d in ("BF16", "F16", "F32", "F64")] == [1, 2, 2, 2]
    assert slices_for("BF16", 17) == slices_for("F16", 1) == 2
    for rank in (1, 2, 3, 8, 9, 64, 255, 300, 513, 4096, 1 << 20):
        assert rank * 2 ** (2 * bits(rank)) <= 2**53


@pytest.mark.parametrize("transposed", [False, True])
def test_dora_is_as_near_to_the_true_value_as_float64_allows(transposed: bool) -> None:
    weight, a, b = factors(12, 600, 4, 9)
    magnitude = torch.rand(12, generator=torch.Generator().manual_seed(1)) + 0.5
    parts = {"lora_A": a, "lora_B": b, "lora_magnitude_vector": magnitude}
    given_ = weight.t().contiguous().t() if transposed else weight

    merged = adapters.merge("dora", given_, None, parts, Settings(scaling=1.5, slices=2)).weight

    update = product(b, a, 1.5)
    for i, row in enumerate(exact(weight)):
        values = [w + d for w, d in zip(row, update[i], strict=True)]
        with localcontext() as context:
            context.prec = 50
            total = sum(v * v for v in values)
            norm = (Decimal(total.numerator) / Decimal(total.denominator)).sqrt()
            factor = Fraction(Decimal(magnitude[i].item()) / norm)
        for j, value in enumerate(values):
            true = value * factor
            size = abs(Fraction(weight[i, j].item())) * factor + abs(update[i][j]) * factor
            assert abs(Fraction(merged[i, j].item()) - true) <= size * Fraction(1, 2**48)


# --- the exact product ---------------------------------------------------------------------------


def update_of(a: Tensor, b: Tensor, slices: int, scale: float = 1.5) -> Tensor:
    x = torch.zeros(b.shape[0], a.shape[1], dtype=torch.float64)
    Factors(a, b, scale, slices).add_to(x, slice(None), slice(None))
    return x


@pytest.mark.parametrize("slices", [1, 2])
@pytest.mark.parametrize("rank", [1, 5, 16, 64, 300])
def test_the_product_does_not_depend_on_the_order_of_the_rank(rank: int, slices: int) -> None:
    _, a, b = factors(70, 90, rank, 1)
    expected = update_of(a, b, slices)
    for seed in range(4):
        order = torch.randperm(rank, generator=torch.Generator().manual_seed(seed))
        assert same_bits(update_of(a[order], b[:, order], slices), expected)


@pytest.mark.parametrize("slices", [1, 2])
def test_the_product_is_the_plain_sum_in_any_order_of_its_integers(slices: int) -> None:
    """Summed term by term, forwards and backwards, with exact rational numbers as the judge."""
    rank = 24
    _, a, b = factors(9, 11, rank, 2)
    made = Factors(a, b, 1.0, slices)
    left, right = made.b.take(slice(None)), made.a.take(slice(None))
    pairs = [(left[0], right[0])]
    for order in (range(rank), reversed(range(rank))):
        total = torch.zeros(9, 11, dtype=torch.float64)
        for k in order:
            total += left[0][:, k : k + 1] * right[0][k : k + 1]
        exactly = product(*pairs[0])
        assert exact(total) == exactly, "no partial sum was rounded"


@pytest.mark.parametrize("slices", [1, 2])
@pytest.mark.parametrize("rank", [3, 16, 257])
def test_the_product_does_not_depend_on_blocks(rank: int, slices: int) -> None:
    _, a, b = factors(61, 83, rank, 3)
    expected = update_of(a, b, slices)
    made = Factors(a, b, 1.5, slices)
    dice = random.Random(rank)
    for _ in range(5):
        rows = sorted({0, 61, *(dice.randrange(61) for _ in range(4))})
        columns = sorted({0, 83, *(dice.randrange(83) for _ in range(4))})
        for layout in ("rows", "columns", "strided"):
            x = torch.zeros(61, 83, dtype=torch.float64)
            for top, bottom in pairwise(rows):
                for left, right in pairwise(columns):
                    piece = x[top:bottom, left:right]
                    part = piece.clone()
                    if layout == "columns":
                        part = part.t().contiguous().t()
                    if layout == "strided":
                        part = torch.zeros(2 * part.shape[0], 3 * part.shape[1]).double()[::2, ::3]
                    made.add_to(part, slice(top, bottom), slice(left, right))
                    piece.copy_(part)
            assert same_bits(x, expected), layout


@pytest.mark.parametrize("slices", [1, 2])
def test_the_product_of_chosen_rows_and_columns_is_a_choice_of_the_product(slices: int) -> None:
    _, a, b = factors(61, 83, 16, 4)
    expected = update_of(a, b, slices)
    made = Factors(a, b, 1.5, slices)
    numbers = torch.Generator().manual_seed(5)
    for count in (1, 2, 40):
        rows = torch.randint(0, 61, (count,), generator=numbers)
        columns = torch.randint(0, 83, (count,), generator=numbers)
        for transposed in (False, True):
            x = torch.zeros(count, count, dtype=torch.float64)
            x = x.t() if transposed else x
            made.add_to(x, rows, columns)
            assert same_bits(x, expected[rows][:, columns])
        x = torch.zeros(count, 83, dtype=torch.float64)
        made.add_to(x, rows, slice(None))
        assert same_bits(x, expected[rows])


@pytest.mark.parametrize("slices", [1, 2])
def test_a_factor_too_large_to_be_kept_whole_gives_the_same_bits(
    slices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from infold.adapters import exact as module

    _, a, b = factors(61, 83, 16, 4)
    expected = update_of(a, b, slices)
    monkeypatch.setattr(module, "_EAGER", 0)
    made = Factors(a, b, 1.5, slices)
    assert made.a.whole is None and made.b.whole is None

    x = torch.zeros(61, 83, dtype=torch.float64)
    for top in range(0, 61, 17):
        made.add_to(x[top : top + 17], slice(top, top + 17), slice(None))
    assert same_bits(x, expected)
    rows = torch.tensor([60, 3, 3, 0])
    x = torch.zeros(4, 83, dtype=torch.float64)
    made.add_to(x, rows, slice(0, 83))
    assert same_bits(x, expected[rows])


@pytest.mark.parametrize("slices", [1, 2])
def test_a_kept_product_is_used_for_its_own_range_alone(slices: int) -> None:
    """Updates of two adapters added and subtracted in every order, in ranges of one shape, in both
    memory orders, with objects that come and go: against the update on a fresh thread's buffers."""
    _, a, b = factors(60, 80, 8, 4)
    _, a2, b2 = factors(60, 80, 8, 5)
    whole = [update_of(a, b, slices), update_of(a2, b2, slices)]
    dice = random.Random(6)
    made: list[Factors] = []
    for turn in range(300):
        if turn % 20 == 0:
            made = [Factors(a, b, 1.5, slices), Factors(a2, b2, 1.5, slices)]
        which, sign = dice.randrange(2), dice.choice([1, -1])
        rows = slice(top := dice.choice([0, 20, 40]), top + 20)
        columns = slice(left := dice.choice([0, 20, 60]), left + 20)
        x = torch.full((20, 20), 0.1, dtype=torch.float64)
        x = x.t() if dice.random() < 0.5 else x
        for _ in range(dice.randrange(1, 3)):
            x.fill_(0.1)
            made[which].add_to(x, rows, columns, sign)
        update = whole[which][rows, columns]
        assert same_bits(x, 0.1 + update if sign > 0 else 0.1 - update)


@pytest.mark.parametrize("slices", [1, 2])
def test_the_memory_order_and_dtype_of_the_factors_do_not_matter(slices: int) -> None:
    _, a, b = factors(61, 83, 16, 4)
    a, b = a.bfloat16(), b.bfloat16()
    expected = update_of(a, b, slices)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        one, two = a.to(dtype), b.to(dtype)
        assert same_bits(update_of(one, two, slices), expected)
        assert same_bits(
            update_of(one.t().contiguous().t(), two.t().contiguous().t(), slices), expected
        )


@pytest.mark.parametrize("rank", [1, 2, 16])
def test_an_update_of_zero_is_plus_zero_whatever_the_signs_of_its_terms(rank: int) -> None:
    """Sums of nothing but -0 come out as -0 or +0, depending on the shape and the BLAS."""
    for out, inner in ((1, 1), (1, 40), (40, 1), (64, 64), (3, 4)):
        a = -torch.rand(rank, inner) - 1
        b = torch.zeros(out, rank)
        for slices in (1, 2):
            for left, right in ((a, b), (-a, b), (a, -b)):
                x = torch.full((out, inner), -0.0, dtype=torch.float64)
                x[0, 0] = 5.0
                Factors(left, right, 1.0, slices).add_to(x, slice(None), slice(None))
                assert not x.signbit().any()
                assert x[0, 0] == 5.0 and x.count_nonzero() == 1


# --- sums in a fixed order -----------------------------------------------------------------------


@pytest.mark.parametrize("columns", [1, 3, 255, 256, 257, 1000, 1024, 2049])
def test_a_sum_of_squares_does_not_depend_on_cuts_at_whole_leaves(columns: int) -> None:
    numbers = torch.Generator().manual_seed(columns)
    x = torch.randn(7, columns, generator=numbers, dtype=torch.float64)
    x *= 10.0 ** torch.randint(-8, 9, x.shape, generator=numbers)
    expected = torch.zeros(7, dtype=torch.float64)
    squares(x, expected)
    dice = random.Random(columns)
    for _ in range(6):
        cuts = {0, *(dice.randrange(0, columns + LEAF, LEAF) for _ in range(3))}
        edges = sorted({min(c, columns) for c in cuts} | {columns})
        for layout in (lambda t: t, lambda t: t.t().contiguous().t(), lambda t: t[[3, 1]]):
            total = torch.zeros(len(layout(x)), dtype=torch.float64)
            for begin, end in pairwise(edges):
                squares(layout(x)[:, begin:end], total)
            right = expected if len(total) == 7 else expected[[3, 1]]
            assert same_bits(total, right)


def test_a_sum_of_squares_is_near_the_rational_sum() -> None:
    x = torch.randn(5, 1500, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    total = torch.zeros(5, dtype=torch.float64)
    squares(x, total)
    for row, value in zip(exact(x), total.tolist(), strict=True):
        true = sum((v * v for v in row), Fraction())
        assert abs(Fraction(value) - true) <= true * Fraction(24, 2**53)


# --- any shape, rank and size of numbers ---------------------------------------------------------


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, float, int, bool]:
    """Weight, A, B, scale, slices, transposed: with sizes from 1e-30 to 1e30, zeros, and ties."""
    out, inner = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    rank = draw(st.one_of(st.integers(1, 20), st.sampled_from((63, 64, 65, 128, 255, 300))))
    numbers = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16, torch.float64)))
    widest = 4 if dtype == torch.float16 else 30

    def matrix(rows: int, columns: int) -> Tensor:
        x = torch.randn(rows, columns, generator=numbers, dtype=torch.float64)
        if draw(st.booleans()):
            x = torch.round(x * 4) / 4  # few bits: sums that cancel, exact ties
        spread = draw(st.sampled_from((0, 1, widest)))
        exponents = torch.randint(-spread, spread + 1, x.shape, generator=numbers)
        if draw(st.booleans()):  # one size for a row or a column
            exponents = exponents[:, :1] if draw(st.booleans()) else exponents[:1]
        x = x * 10.0**exponents
        if draw(st.booleans()):
            x[draw(st.integers(0, rows - 1))] = 0
        if draw(st.booleans()):
            x[:, draw(st.integers(0, columns - 1))] = 0
        return x.to(dtype)

    a, b, weight = matrix(rank, inner), matrix(out, rank), matrix(out, inner)
    scale = draw(st.sampled_from((1.0, 2.0, 0.375, 1 / 3, 16 / 7, -1.5, 1e-3, 0.0)))
    return weight, a, b, scale, draw(st.sampled_from((1, 2))), draw(st.booleans())


@settings(quick, max_examples=150)
@given(problems())
def test_any_update_stays_within_the_documented_bound(
    problem: tuple[Tensor, Tensor, Tensor, float, int, bool],
) -> None:
    """|error| <= 2 * 2^-b (one slice) or 3 * 2^-2b (two) of rank * max|B_i| * max|A_j|, and a few
    roundings of float64."""
    weight, a, b, scale, slices, transposed = problem
    rank = a.shape[0]
    x = weight.double()
    x = x.clone().t().contiguous().t() if transposed else x.clone()

    Factors(a, b, scale, slices).add_to(x, slice(None), slice(None))

    assert torch.isfinite(x).all()
    update = product(b, a, scale)
    relative = Fraction(2 if slices == 1 else 3, 2 ** (slices * bits(rank))) * Fraction(65, 64)
    for i in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            start, change = Fraction(weight[i, j].item()), update[i][j]
            largest = abs(Fraction(scale)) * Fraction(b[i].double().abs().max().item())
            largest *= rank * Fraction(a[:, j].double().abs().max().item())
            bound = largest * (relative + Fraction(1, 2**51))
            bound += (abs(start) + abs(change)) * Fraction(1, 2**52)
            error = abs(Fraction(x[i, j].item()) - start - change)
            assert error <= bound, (i, j, float(error), float(bound))
            if not largest:
                assert x[i, j].item() == weight[i, j].item(), "no update, no change"


@settings(quick, max_examples=60)
@given(problems(), st.randoms())
def test_any_update_is_the_same_in_blocks_of_any_order(
    problem: tuple[Tensor, Tensor, Tensor, float, int, bool], dice: random.Random
) -> None:
    weight, a, b, scale, slices, _ = problem
    rank = a.shape[0]
    expected = weight.double().clone()
    Factors(a, b, scale, slices).add_to(expected, slice(None), slice(None))

    order = torch.tensor(dice.sample(range(rank), rank))
    made = Factors(a[order], b[:, order], scale, slices)
    x = weight.double().clone()
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            index = torch.tensor([i]), torch.tensor([j])
            rows, columns = (slice(i, i + 1), slice(j, j + 1)) if dice.random() < 0.5 else index
            made.add_to(x[i : i + 1, j : j + 1], rows, columns)

    assert same_bits(x, expected)


@pytest.mark.parametrize("power", [-1000, -500, -149, -126, 100, 127, 300, 480])
def test_factors_of_any_exponent_keep_their_bits(power: int) -> None:
    """Powers of two only move the result: no power in between leaves float64's range."""
    _, a, b = factors(5, 6, 8, 1)
    for slices in (1, 2):
        plain = update_of(a, b, slices, 1.0)
        moved = update_of(a.double(), b.double() * 2.0**power, slices, 1.0)
        assert same_bits(moved, plain * 2.0**power)


# --- against the usual way -----------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_a_trained_like_bfloat16_merge_is_within_one_ulp_of_the_usual_float32_merge(
    seed: int,
) -> None:
    weight, a, b = factors(256, 512, 16, seed)
    stored, scale = weight.bfloat16(), 2.0
    usual = (stored.float() + scale * (b @ a)).bfloat16()

    merged = adapters.merge(
        "lora", stored, None, {"lora_A": a, "lora_B": b}, Settings(scaling=scale, slices=1)
    ).weight

    ours = dense.encode(merged, "BF16")

    def line(x: Tensor) -> Tensor:
        """Sign and magnitude as integers in order: neighbours differ by one."""
        raw = x.view(torch.int16).int()
        return torch.where(raw < 0, -(raw & 0x7FFF), raw)

    apart = (line(ours) - line(usual)).abs()
    sizes = stored.double().abs() + (scale * (b.double() @ a.double())).abs()
    cancelled = (ours.double() - usual.double()).abs() < sizes * 2.0**-20
    assert not ((apart > 1) & ~cancelled).any()
    assert (apart > 0).float().mean() < 1e-3
    assert (ours != stored).float().mean() > 0.3, "the update is not lost in the rounding"


def test_square_roots_are_correctly_rounded() -> None:
    """PyTorch's own are not, in about 1 of 100 cases, where it computes them with MKL."""
    x = torch.rand(3000, dtype=torch.float64, generator=torch.Generator().manual_seed(4)) + 0.5
    found = root(x)

    for value, near in zip(x.tolist(), found.tolist(), strict=True):
        middles = [(Fraction(near) + Fraction(math.nextafter(near, to))) / 2 for to in (0, 2)]
        assert middles[0] ** 2 < Fraction(value) < middles[1] ** 2
    assert root(torch.tensor([-1.0], dtype=torch.float64)).isnan().all()
