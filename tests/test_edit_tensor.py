"""One tensor edited in memory: rightly rounded, all of it or nothing, on any layout and thread."""

from __future__ import annotations

import math
import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from infold.adapters import METHODS, Settings
from infold.edit import Step, TensorEdit, edit_tensor, edit_tensors, tensor
from infold.errors import Refusal
from infold.formats import dense
from test_numerics import exact, factors, product, rounded, same_bits

DTYPES = ("F32", "F16", "BF16")
quick = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def ia3(vector: Tensor, side: str = "out", **options: bool) -> Step:
    return Step(METHODS["ia3"].prepare({"ia3_l": vector}, Settings(side=side)), **options)


def lora(a: Tensor, b: Tensor, scaling: float = 2.0, slices: int = 2, **options: bool) -> Step:
    parts = {"lora_A": a, "lora_B": b}
    return Step(METHODS["lora"].prepare(parts, Settings(scaling, slices, out=len(b))), **options)


def dora(a: Tensor, b: Tensor, magnitude: Tensor, **options: bool) -> Step:
    parts = {"lora_A": a, "lora_B": b, "lora_magnitude_vector": magnitude}
    return Step(METHODS["dora"].prepare(parts, Settings(2.0, 2, out=len(b))), **options)


def many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor, "_SMALLEST_BLOCK", 512)


# --- rounding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_several_steps_are_one_rounding_of_the_rational_value(dtype: str, transposed: bool) -> None:
    weight, a, b = factors(24, 20, 4, 1)
    weight = weight.to(dense.torch_dtype(dtype))
    vector = torch.rand(24, generator=torch.Generator().manual_seed(3)) + 0.5
    steps = [
        lora(a, b, transposed=transposed),
        ia3(vector, transposed=transposed),
        lora(a, b, -0.75, transposed=transposed),
    ]

    stored = weight.t().contiguous() if transposed else weight
    merged = edit_tensor(stored, steps, "w")

    assert merged.is_contiguous() and (merged.shape, merged.dtype) == (stored.shape, stored.dtype)
    merged = merged.t() if transposed else merged
    first, last = product(b, a, 2.0), product(b, a, -0.75)
    for i, row in enumerate(exact(weight)):
        right = [
            (w + first[i][j]) * Fraction(vector[i].item()) + last[i][j] for j, w in enumerate(row)
        ]
        assert merged[i].double().tolist() == [rounded(value, dtype) for value in right]


@pytest.mark.parametrize("dtype", DTYPES)
@quick
@given(data=st.data())
def test_a_product_beside_a_midpoint_is_rounded_rightly(dtype: str, data: st.DataObject) -> None:
    """An element that is a power of two, times any float64, is exact: only one rounding is left.
    Most factors lie a last bit beside the middle of two neighbours of the stored dtype."""
    precision = {"F32": 24, "F16": 11, "BF16": 8}[dtype]
    values = []
    for _ in range(data.draw(st.integers(1, 12))):
        whole = data.draw(st.integers(1 << (precision - 1), (1 << precision) - 1))
        value = math.ldexp(2 * whole + 1, data.draw(st.integers(-20, 2)) - precision)
        towards = data.draw(st.sampled_from((0.0, value, math.inf)))
        values.append(math.nextafter(value, towards))
    vector = torch.tensor(values, dtype=torch.float64)
    base = torch.full((len(values), 3), -0.5, dtype=dense.torch_dtype(dtype))

    merged = edit_tensor(base, [ia3(vector)], "w", threads=1).double()

    assert merged[:, 1].tolist() == [rounded(Fraction(-v) / 2, dtype) for v in values]
    assert torch.equal(merged, merged[:, 1:2].expand(-1, 3))


def test_a_bias_is_a_column() -> None:
    bias, vector = torch.tensor([1.0, -2.0, 0.5]).half(), torch.tensor([3.0, 0.25, -1.0])

    merged = edit_tensor(bias, [ia3(vector, on_bias=True)], "b")

    assert merged.tolist() == [3.0, -0.5, -0.5] and merged.dtype == torch.float16


# --- layouts -------------------------------------------------------------------------------------


def test_any_strides_shapes_and_gradients_of_the_stored_tensor_are_taken() -> None:
    weight, a, b = factors(24, 30, 4, 5)
    right = edit_tensor(weight, [lora(a, b)], "w")
    strided = weight.t().contiguous().t()
    conv = weight.view(24, 10, 3, 1).contiguous(memory_format=torch.channels_last)
    trained = nn.Parameter(weight.clone())
    with torch.inference_mode():
        inferred = weight.clone()

    assert same_bits(edit_tensor(strided, [lora(a, b)], "w"), right)
    assert same_bits(edit_tensor(conv, [lora(a, b)], "w").view(24, 30), right)
    assert same_bits(edit_tensor(inferred, [lora(a, b)], "w"), right)
    made = edit_tensor(trained, [lora(a.requires_grad_(), b)], "w")
    assert same_bits(made, right) and not made.requires_grad and made.grad_fn is None
    edit_tensor(trained, [lora(a, b)], "w", out=trained)
    assert same_bits(trained.detach(), right) and trained.requires_grad and trained.is_leaf
    assert not same_bits(right, weight)


def test_in_place_and_into_another_tensor_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    many_blocks(monkeypatch)
    weight, a, b = factors(100, 90, 4, 6)
    stored = weight.bfloat16()
    right = edit_tensor(stored, [lora(a, b)], "w")
    other = torch.empty_like(stored.t().contiguous().t())

    assert edit_tensor(stored, [lora(a, b)], "w", out=other) is other
    assert same_bits(other, right) and same_bits(stored, weight.bfloat16())
    assert edit_tensor(stored, [lora(a, b)], "w", out=stored) is stored
    assert same_bits(stored, right)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0,), ()])
def test_tensors_of_no_or_one_element(shape: tuple[int, ...]) -> None:
    stored = torch.full(shape, 3.0)

    merged = edit_tensor(stored, [ia3(torch.tensor([2.0]))], "w")

    assert merged.shape == shape and torch.equal(merged, stored * 2)


def test_dora_is_the_same_for_any_cut_and_number_of_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight, a, b = factors(300, 700, 4, 7)
    magnitude = torch.rand(300, generator=torch.Generator().manual_seed(1)) + 0.5
    whole = edit_tensor(weight, [dora(a, b, magnitude)], "w", threads=1)
    many_blocks(monkeypatch)

    for threads in (1, 3):
        for transposed in (False, True):
            stored = weight.t().contiguous() if transposed else weight
            step = dora(a, b, magnitude, transposed=transposed)
            merged = edit_tensor(stored, [step], "w", threads=threads)
            assert same_bits(merged.t() if transposed else merged, whole)

    full = weight.double() + 2 * b.double() @ a.double()
    expected = magnitude.double()[:, None] * full / full.norm(dim=1, keepdim=True)
    torch.testing.assert_close(whole.double(), expected, rtol=1e-6, atol=1e-9)


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_place", [False, True])
def test_what_does_not_fit_is_refused_and_nothing_has_changed(
    dtype: str, in_place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    many_blocks(monkeypatch)
    stored = torch.full((60, 50), 2.0, dtype=dense.torch_dtype(dtype))
    vector = torch.full((60,), 1.5, dtype=torch.float64)
    vector[41] = torch.finfo(stored.dtype).max
    before, out = stored.clone(), stored if in_place else torch.zeros_like(stored)

    with pytest.raises(Refusal, match=rf"h.0.w\[41, 0\]: the merged value does not fit {dtype}"):
        edit_tensor(stored, [ia3(vector)], "h.0.w", out=out)

    assert same_bits(stored, before)
    assert in_place or not out.any()


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_a_base_that_is_not_finite_is_told_as_such(odd: float) -> None:
    stored = torch.ones(8, 6, dtype=torch.bfloat16)
    stored[3, 4] = odd

    with pytest.raises(Refusal, match=rf"w\[3, 4\]: the base holds {odd} there"):
        edit_tensor(stored, [ia3(torch.ones(8))], "w")


def test_values_whose_sum_alone_overflows_are_no_offence() -> None:
    stored = torch.full((64, 64), 60_000.0, dtype=torch.float16)

    merged = edit_tensor(stored, [ia3(torch.full((64,), 1.0625))], "w")

    assert (merged == 63_744).all()


def test_other_dtypes_and_tensors_without_values_are_refused() -> None:
    for stored in (torch.ones(2, 2, dtype=torch.int8), torch.ones(2, 2, dtype=torch.complex64)):
        with pytest.raises(Refusal, match=rf"w: is {stored.dtype}; .*F64, F32, F16, BF16"):
            edit_tensor(stored, [], "w")
    with pytest.raises(Refusal, match="w: has no values"):
        edit_tensor(torch.ones(2, 2, device="meta"), [], "w")
    with pytest.raises(ValueError, match="shape, dtype and device"):
        edit_tensor(torch.ones(2, 2), [], "w", out=torch.ones(2, 2).half())
    for threads in (0, "two"):
        with pytest.raises(Refusal, match=f"threads: {threads!r} is not"):
            edit_tensor(torch.ones(2, 2), [], "w", threads=threads)  # type: ignore[arg-type]


# --- threads -------------------------------------------------------------------------------------


def test_several_threads_share_one_tensor_and_leave_the_settings_of_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    many_blocks(monkeypatch)
    weight, a, b = factors(200, 90, 4, 8)
    seen, company = set(), threading.Event()
    real = tensor.compute

    def noted(*given: object) -> None:
        seen.add((threading.get_ident(), torch.get_num_threads()))
        if len(seen) > 1:
            company.set()
        assert company.wait(20)
        real(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(tensor, "compute", noted)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        edit_tensor(weight, [lora(a, b)], "w", threads=2)
        after = torch.get_num_threads()
    finally:
        torch.set_num_threads(before)

    assert after == 3
    assert len({thread for thread, _ in seen}) == 2 and {cores for _, cores in seen} == {1}
    assert threading.get_ident() not in {thread for thread, _ in seen}


def test_calls_from_several_threads_do_not_disturb_each_other() -> None:
    weight, a, b = factors(120, 90, 4, 9)
    right = [edit_tensor(weight, [lora(a, b, s)], "w") for s in range(1, 9)]

    with ThreadPoolExecutor(4) as pool:
        made = list(
            pool.map(lambda s: edit_tensor(weight, [lora(a, b, s)], "w", threads=3), range(1, 9))
        )

    assert all(same_bits(*pair) for pair in zip(made, right, strict=True))
    assert not same_bits(right[0], right[1])


def test_a_failure_of_one_block_ends_the_call_and_the_next_one_works(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    many_blocks(monkeypatch)
    weight, a, b = factors(200, 90, 4, 10)
    right = edit_tensor(weight, [lora(a, b)], "w")
    with monkeypatch.context() as patch:

        def interrupted(*given: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(tensor, "compute", interrupted)
        with pytest.raises(KeyboardInterrupt):
            edit_tensor(weight, [lora(a, b)], "w", out=weight)

    assert same_bits(edit_tensor(weight, [lora(a, b)], "w"), right)


def _in_child(queue: multiprocessing.Queue[Tensor]) -> None:  # type: ignore[type-arg]
    queue.put(edit_tensor(torch.ones(40, 30), [ia3(torch.full((40,), 3.0))], "w").tolist())


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_has_threads_of_its_own() -> None:
    edit_tensor(torch.ones(40, 30), [ia3(torch.ones(40))], "w")  # the parent has its threads
    fork = multiprocessing.get_context("fork")
    queue = fork.Queue()
    child = fork.Process(target=_in_child, args=(queue,))
    child.start()
    try:
        assert queue.get(timeout=30) == [[3.0] * 30] * 40
    finally:
        child.join(5)
        child.kill()


@pytest.mark.parametrize("borrowed", [False, True])
@pytest.mark.parametrize("kept", [1, 2000, 1 << 20])
def test_many_edits_are_each_what_one_is(
    monkeypatch: pytest.MonkeyPatch, borrowed: bool, kept: int
) -> None:
    """Small and large windows, methods that observe, several tensors a group, empty ones too."""
    many_blocks(monkeypatch)
    monkeypatch.setattr(tensor, "_KEPT", kept)
    groups, right = [], []
    found: dict[int, list[Tensor]] = {}
    for number, dtype in enumerate((torch.bfloat16, torch.float32, torch.float16) * 3):
        weight, a, b = factors(70 + number, 90, 4, number)
        weight = weight.to(dtype)
        if number == 4:
            weight, a, b = weight[:0], a, b[:0]

        def steps(a: Tensor = a, b: Tensor = b, number: int = number) -> list[Step]:
            if number % 3 == 1 and len(b):
                magnitude = torch.linspace(1, 2, len(b))
                return [dora(a, b, magnitude), lora(a, b), dora(2 * a, b, magnitude + 1)]
            return [lora(a, b)]

        bias = torch.linspace(-1, 1, max(len(weight), 1))
        scale = ia3(torch.full((len(bias),), 1.5), on_bias=True)
        edits = [
            TensorEdit(weight, steps, f"w{number}"),
            TensorEdit(bias, lambda scale=scale: [scale], f"b{number}", torch.float64),
        ]
        right.append(
            [
                edit_tensor(weight, steps(), "w"),
                edit_tensor(bias, [scale], "b", dtype=torch.float64),
            ]
        )

        def done(made: list[Tensor], number: int = number) -> None:
            assert number not in found
            found[number] = [value.clone() for value in made]

        groups.append((edits, done))

    edit_tensors(groups, borrowed=borrowed, threads=3)

    assert len(found) == len(right)
    for number, wanted in enumerate(right):
        for one, other in zip(found[number], wanted, strict=True):
            assert one.dtype == other.dtype and torch.equal(one, other), number


def test_a_refused_edit_hands_no_part_of_its_group_over(monkeypatch: pytest.MonkeyPatch) -> None:
    many_blocks(monkeypatch)
    weight, a, b = factors(200, 90, 4, 10)
    bad = torch.tensor([1.0, math.inf])
    handed = []
    with pytest.raises(Refusal, match="bad"):
        edit_tensors(
            [
                (
                    [
                        TensorEdit(weight, lambda: [lora(a, b)], "good"),
                        TensorEdit(bad, lambda: [ia3(torch.ones(2), on_bias=True)], "bad"),
                    ],
                    handed.append,
                )
            ]
        )
    assert not handed
