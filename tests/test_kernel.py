"""Compiled blocks and PyTorch's: the same bits, for every method that tells its operations, every
dtype, and whatever instructions the processor has."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infold.adapters import METHODS, Settings
from infold.adapters.exact import slices_for
from infold.edit import Step, compiled, edit_tensor, steps
from infold.edit.blocks import Block, cut
from infold.edit.steps import Target, Workspace
from infold.errors import NotFinite
from infold.formats import FORMATS
from infold.kernel import library

ROOT = Path(__file__).parent.parent
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
SMALLEST = {"BF16": 2.0**-133, "F16": 2.0**-24, "F32": 2.0**-149}
LEVELS = range(library.level() + 1) if library.load() else range(0)
EITHER = (torch.tensor(torch.inf), torch.tensor(-torch.inf))
ON = pytest.mark.skipif(library.load() is None, reason="nothing is compiled here")


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64") or os.environ.get("INFOLD_KERNEL") == "off",
    reason="it is not used here",
)
def test_it_was_compiled() -> None:
    """Where the tests run there is a compiler, so none of the others may be skipped in silence."""
    assert (library.FOLDER / library.FILE).exists(), "run `python hatch_build.py`"
    made = ctypes.CDLL(str(library.FOLDER / library.FILE))
    made.infold_sources.restype = ctypes.c_char_p
    assert made.infold_sources().decode() == library.digest(), "run `python hatch_build.py`"


def a_weight(shape: tuple[int, int], dtype: str, seed: int) -> torch.Tensor:
    """Values of all magnitudes: weights as they are, zeros of both signs, subnormals."""
    numbers = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=numbers) * 0.05
    kind = torch.randint(0, 8, shape, generator=numbers)
    values[kind == 0] = 0.0
    values[kind == 1] = -0.0
    tiny = SMALLEST[dtype] * torch.randint(-300, 300, shape, generator=numbers).double()
    return torch.where(kind == 2, tiny, values.double()).to(DTYPES[dtype])


def a_step(
    method: str,
    shape: tuple[int, int],
    rank: int,
    dtype: str,
    seed: int,
    transposed: bool,
    size: float,
) -> Step:
    """One prepared method of a stored shape; one that observes has seen a weight."""
    out, inputs = shape[::-1] if transposed else shape
    numbers = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=numbers)

    told = Settings(out=out, rank=rank, scaling=2.0, slices=slices_for(dtype, rank))
    if method.startswith("ia3"):
        side = method.removeprefix("ia3 ")
        vector = 1 + 0.1 * random(out if side == "out" else inputs)
        return Step(METHODS["ia3"].prepare({"ia3_l": vector}, replace(told, side=side)), transposed)
    parts = {"lora_A": random(rank, inputs) * size, "lora_B": random(out, rank) * 0.05}
    if method == "dora":
        parts["lora_magnitude_vector"] = random(out).abs() + 0.5
    prepared = METHODS[method].prepare(parts, told)
    if method == "dora":
        prepared.recall(random(out).double().abs() + 0.1)
    return Step(prepared, transposed)


def run(
    forward: Sequence[Step], raw: torch.Tensor, block: Block, dtype: str, near: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, int | None]:
    target = Target("w", dtype, FORMATS["dense"])
    workspace = Workspace(torch.device("cpu"), 1 << 20)
    back = steps.backward(forward)
    assert back is not None
    out = torch.full_like(raw, 7.0)
    beside = torch.full_like(raw, 7.0) if near else None
    changed = steps.compute(
        forward, raw, out, block, target, workspace, back if near else (), beside
    )
    guessed = None
    if near:
        guessed = torch.full_like(raw, 7.0)
        steps.guess(back, out, guessed, block, target, workspace)
        if changed is None:
            changed = int((out.view(words(dtype)) != raw.view(words(dtype))).sum())
    return out, beside, guessed, changed


def words(dtype: str) -> torch.dtype:
    return torch.int32 if dtype == "F32" else torch.int16


def equal(a: torch.Tensor | None, b: torch.Tensor | None, dtype: str) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(a.view(words(dtype)), b.view(words(dtype)))


METHOD = st.sampled_from(["ia3 out", "ia3 in", "lora", "lora", "dora"])


@ON
@settings(max_examples=150, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 70), st.one_of(st.integers(1, 60), st.integers(240, 800))),
    methods=st.lists(METHOD, min_size=1, max_size=3),
    ranks=st.lists(st.sampled_from([1, 2, 5, 16, 17, 64]), min_size=3, max_size=3),
    dtype=st.sampled_from(sorted(DTYPES)),
    transposed=st.booleans(),
    size=st.sampled_from([1e-3, 0.05, 1.0, 30.0]),
    seed=st.integers(0, 10_000),
    near=st.booleans(),
    data=st.data(),
)
def test_the_same_bits_as_pytorch(
    shape: tuple[int, int],
    methods: list[str],
    ranks: list[int],
    dtype: str,
    transposed: bool,
    size: float,
    seed: int,
    near: bool,
    data: st.DataObject,
) -> None:
    forward = [
        a_step(method, shape, rank, dtype, seed + n, transposed != (n == 1), size)
        for n, (method, rank) in enumerate(zip(methods, ranks, strict=False))
    ]
    row, column = (data.draw(st.integers(0, n - 1)) for n in shape)
    narrow = shape[1] - column < library.WIDTH
    block = Block(row, shape[0] - row, column, shape[1] - column)
    raw = a_weight(shape, dtype, seed)[row:, column:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled.c, "load", lambda: None)
        wanted = run(forward, raw, block, dtype, near)
    for level in LEVELS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compiled.c, "level", lambda level=level: level)
            got = run(forward, raw, block, dtype, near)
        assert near or narrow == (got[3] is None)
        for ours, theirs in zip(got[:3], wanted[:3], strict=True):
            assert equal(ours, theirs, dtype), level
        if near:
            bits = int((got[0] != raw).sum()) if dtype == "F32" else wanted[3]
            assert got[3] == bits


@ON
@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_every_tie_and_neighbour_is_rounded_as_exact_arithmetic_does(dtype: str) -> None:
    """Halfway between any two neighbours, and the last bit of a float64, or a float32, to either
    side of it: what is no tie in float32 is rounded through that."""
    word = words(dtype)
    if dtype == "F32":
        numbers = torch.Generator().manual_seed(5)
        below = torch.randint(0, 0x7F7FFFFF, (1 << 16,), generator=numbers, dtype=torch.int32)
    else:
        below = torch.arange(0, 0x7F7F if dtype == "BF16" else 0x7BFF, dtype=word)
    low = below.view(DTYPES[dtype])
    high = (below + 1).view(DTYPES[dtype])
    middle = (low.double() + high.double()) / 2
    even = torch.where(below % 2 == 0, low, high)
    # x * 1 is x, so the middle comes from a vector that scales ones
    infinite = torch.full_like(middle, torch.inf)
    cases = [
        (middle, even),
        (torch.nextafter(middle, infinite), high),
        (torch.nextafter(middle, -infinite), low),
    ]
    if dtype != "F32":
        cases += [
            (torch.nextafter(middle.float(), infinite.float()).double(), high),
            (torch.nextafter(middle.float(), -infinite.float()).double(), low),
        ]
    for values, right in cases:
        for sign in (1, -1):
            step = Step(
                METHODS["ia3"].prepare({"ia3_l": sign * values}, Settings(side="in", out=1))
            )
            ones = torch.ones(1, len(values), dtype=DTYPES[dtype])
            for level in LEVELS:
                out = torch.empty_like(ones)
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(compiled.c, "level", lambda level=level: level)
                    whole = (slice(0, 1), slice(0, len(values)))
                    assert compiled.edit([step], [], ones, out, None, *whole) is not None
                assert equal(out[0], sign * right, dtype), (level, sign)


@ON
@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_every_guess_near_a_tie_is_the_one_of_pytorch(dtype: str) -> None:
    """The way back is rounded to float32 first, and what does not fit then becomes 0."""
    word = words(dtype)
    largest = {"BF16": 0x7F7F, "F16": 0x7BFF, "F32": 0x7F7FFFFF}[dtype]
    below = torch.arange(max(0, largest - 0x7F7F), largest + 1, dtype=torch.int64)
    low = below.to(word).view(DTYPES[dtype]).double()
    middle = low + torch.diff(low, prepend=low[:1] - (low[1] - low[0])) / 2
    values = torch.cat([middle, *(torch.nextafter(middle, far * middle) for far in (0, 2))])
    values = torch.cat([values, *(torch.nextafter(values.float(), far) for far in EITHER)])
    values = torch.cat([values, -values]).double()
    step = Step(METHODS["ia3"].prepare({"ia3_l": values}, Settings(side="in", out=1)))
    ones = torch.ones(1, len(values), dtype=DTYPES[dtype])
    target, block = Target("w", dtype, FORMATS["dense"]), Block(0, 1, 0, len(values))
    workspace = Workspace(torch.device("cpu"), 1 << 20)
    found = []
    for level in (None, *LEVELS):
        out = torch.empty_like(ones)
        with pytest.MonkeyPatch.context() as patch:
            if level is None:
                patch.setattr(compiled.c, "load", lambda: None)
            patch.setattr(compiled.c, "level", lambda level=level: level)
            steps.guess([step], ones, out, block, target, workspace)
        found.append(out.view(word))
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert (found[0] == 0).any()  # some did not fit


@ON
@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan, "overflow"])
def test_what_is_not_finite_is_left_to_pytorch_which_refuses_it(
    dtype: str, bad: float | str
) -> None:
    raw = torch.ones(9, 300, dtype=DTYPES[dtype])
    vector = torch.ones(300)
    if isinstance(bad, str):
        raw[7, 299] = torch.finfo(raw.dtype).max
        vector[299] = 1.5
    else:
        raw[7, 299] = bad
    step = Step(METHODS["ia3"].prepare({"ia3_l": vector}, Settings(side="in", out=9)))
    for level in LEVELS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compiled.c, "level", lambda level=level: level)
            whole = (slice(0, 9), slice(0, 300))
            assert compiled.edit([step], [], raw, torch.empty_like(raw), None, *whole) is None
            with pytest.raises(NotFinite, match=r"w\[7, 299\]"):
                edit_tensor(raw, [step], "w")


@ON
@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_what_just_fits_is_stored_and_what_just_does_not_is_refused(dtype: str) -> None:
    """The midpoint between the largest number and the next that there would be rounds up."""
    largest = torch.finfo(DTYPES[dtype]).max
    below = torch.tensor([largest], dtype=DTYPES[dtype]).view(words(dtype)) - 1
    middle = largest + (largest - below.view(DTYPES[dtype]).double()) / 2
    cases = [(middle, False), (torch.nextafter(middle, middle * 0), True)]
    if dtype != "F32":
        below = torch.nextafter(middle.float(), torch.zeros(1))
        above = torch.nextafter(middle.float(), torch.full((1,), torch.inf))
        cases += [(below.double(), True), (above.double(), False)]
    for level in LEVELS:
        for value, fits in cases:
            scale = torch.cat([torch.ones(19).double(), -value])
            step = Step(METHODS["ia3"].prepare({"ia3_l": scale}, Settings(side="in", out=1)))
            ones = torch.ones(1, 20, dtype=DTYPES[dtype])
            out = torch.empty_like(ones)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(compiled.c, "level", lambda level=level: level)
                done = compiled.edit([step], [], ones, out, None, slice(0, 1), slice(0, 20))
            assert (done is not None) == fits
            assert not fits or out[0, 19] == -largest


@ON
@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_a_way_back_that_is_not_finite_leads_to_zero(dtype: str) -> None:
    """As PyTorch's does: the record keeps the rest."""
    raw = a_weight((9, 300), dtype, 3)
    raw[2, 5:9] = torch.tensor([torch.inf, -torch.inf, torch.nan, 1.0]).to(raw.dtype)
    vector = torch.linspace(-2, 2, 300)
    vector[8], vector[100] = torch.finfo(DTYPES[dtype]).max, torch.nan
    step = Step(METHODS["ia3"].prepare({"ia3_l": vector}, Settings(side="in", out=9)))
    target, block = Target("w", dtype, FORMATS["dense"]), Block(0, 9, 0, 300)
    workspace = Workspace(torch.device("cpu"), 1 << 20)
    found = []
    for off in (True, *LEVELS):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compiled.c, "level", lambda off=off: off)
            if off is True:
                patch.setattr(compiled.c, "load", lambda: None)
            guessed = torch.full_like(raw, 7.0)
            steps.guess([step], raw, guessed, block, target, workspace)
            found.append(guessed)
    assert all(equal(found[0], other, dtype) for other in found[1:])
    assert found[0][2, 5:8].tolist() == [0, 0, 0] and not found[0].isnan().any()


@ON
def test_an_update_of_zero_makes_plus_zero_of_minus_zero() -> None:
    raw = torch.full((20, 40), -0.0).bfloat16()
    parts = {"lora_A": torch.randn(4, 40), "lora_B": torch.zeros(20, 4)}
    told = Settings(out=20, rank=4, scaling=2.0, slices=1)
    step = Step(METHODS["lora"].prepare(parts, told))
    for level in LEVELS:
        out = torch.full_like(raw, 7.0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compiled.c, "level", lambda level=level: level)
            assert compiled.edit([step], [], raw, out, None, slice(0, 20), slice(0, 40)) == 800
        assert not out.view(torch.int16).any()


@ON
def test_rows_that_lie_apart_and_other_memory_than_a_tensor_s_own() -> None:
    step = a_step("lora", (12, 300), 5, "BF16", 1, False, 0.05)
    raw = a_weight((12, 900), "BF16", 2)[:, 300:600]
    out, near = (torch.zeros(12, 400, dtype=torch.bfloat16)[:, 50:350] for _ in range(2))
    whole = (slice(0, 12), slice(0, 300))
    back = steps.backward([step])
    assert back is not None and compiled.edit([step], back, raw, out, near, *whole) is not None
    assert equal(edit_tensor(raw, [step], "w"), out.contiguous(), "BF16")
    bytes_ = torch.zeros(2 * raw.numel() + 1, dtype=torch.uint8)
    odd = torch.frombuffer(bytes_.numpy(), dtype=torch.bfloat16, offset=1, count=raw.numel())
    for other in (
        torch.nn.Parameter(raw.contiguous(), requires_grad=False),  # as any subclass
        raw.contiguous().t().contiguous().t(),
        odd.view(raw.shape),
        raw.to("meta"),
    ):
        assert compiled.edit([step], [], other, out, None, *whole) is None
        assert compiled.edit([step], [], raw, other, None, *whole) is None


@ON
def test_blocks_of_a_large_factor_and_of_many_terms_agree() -> None:
    """A factor that is cut for each block, and sums that are left to the BLAS."""
    for rank, rows in ((64, 40_000), (2100, 64)):
        step = a_step("lora", (rows, 48), rank, "BF16", 1, False, 0.05)
        raw = a_weight((rows, 48), "BF16", 2)
        got = edit_tensor(raw, [step], "w")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compiled.c, "load", lambda: None)
            assert torch.equal(got, edit_tensor(raw, [step], "w"))
    assert [b.rows for b in cut(40_000, 48, 1 << 20)] != [40_000]


def test_a_kernel_of_other_sources_is_not_used(tmp_path: Path) -> None:
    """An old compiled file beside newer sources is the danger of an editable install."""
    script = (
        "import sys; from pathlib import Path; from infold.kernel import library\n"
        "library.FOLDER = Path(sys.argv[1]); print(library.description())"
    )

    def described(folder: Path, kernel: str = "") -> str:
        ran = subprocess.run(
            [sys.executable, "-c", script, str(folder)],
            env={**os.environ, "INFOLD_KERNEL": kernel},
            check=True,
            capture_output=True,
            text=True,
        )
        return ran.stdout.strip()

    if library.load() is not None:
        assert described(library.FOLDER).startswith("compiled for ")
        assert described(library.FOLDER, "plain") == "compiled for any processor"
    assert described(library.FOLDER, "off") == "by PyTorch"
    for name in (*library.SOURCES, library.FILE):
        if (library.FOLDER / name).exists():
            (tmp_path / name).write_bytes((library.FOLDER / name).read_bytes())
    (tmp_path / "product.c").write_text("/* changed */")
    assert described(tmp_path) == "by PyTorch"
    (tmp_path / library.FILE).write_bytes(b"not a library")
    assert described(tmp_path) == "by PyTorch"


@ON
@pytest.mark.parametrize("method", ["ia3 out", "ia3 in", "lora", "dora"])
@pytest.mark.parametrize("transposed", [False, True])
def test_factors_that_do_not_suit_the_block_are_left_to_pytorch(
    method: str, transposed: bool
) -> None:
    """C would read beyond them. A forged record can bring such factors."""
    raw = a_weight((40, 300), "BF16", 1)
    whole = (slice(0, 40), slice(0, 300))
    for shape in ((39, 299), (7, 5)):
        step = a_step(method, shape, 4, "BF16", 2, transposed, 0.05)
        with pytest.raises((RuntimeError, IndexError)):
            edit_tensor(raw, [step], "w")
        assert compiled.edit([step], [], raw, torch.empty_like(raw), None, *whole) is None


def test_it_compiles_without_what_would_change_the_roundings(tmp_path: Path) -> None:
    """Whatever $CC says; and where there is no compiler, an older file does not stay."""
    place = tmp_path / "src/infold/kernel"
    shutil.copytree(library.FOLDER, place)
    shutil.copy(ROOT / "hatch_build.py", tmp_path)

    def build(compiler: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, tmp_path / "hatch_build.py"],
            env={**os.environ, "CC": compiler},
            capture_output=True,
            text=True,
        )

    for none in ("false", "no-such-compiler", "", "'"):
        (place / library.FILE).write_bytes(b"old")
        failed = build(none)
        assert failed.returncode == 1 and failed.stderr.startswith("not compiled: "), none
        assert sorted(p.name for p in place.glob("*") if p.suffix not in (".c", ".h", ".py")) in (
            [],
            ["__pycache__"],
        )
    if not shutil.which("cc"):
        pytest.skip("there is no C compiler")
    assert build("cc -Ofast -march=native").returncode == 0
    script = (
        "import sys, torch; from pathlib import Path; from infold.kernel import library\n"
        "library.FOLDER = Path(sys.argv[1]); assert library.load()\n"
        "sys.path.insert(0, sys.argv[2]); import test_kernel as t\n"
        "for name in t.DTYPES:\n"
        "    t.test_every_tie_and_neighbour_is_rounded_as_exact_arithmetic_does(name)\n"
        "assert len(t.LEVELS)"
    )
    subprocess.run(
        [sys.executable, "-c", script, str(place), str(Path(__file__).parent)],
        env={**os.environ, "INFOLD_KERNEL": "plain" if not LEVELS else ""},
        check=True,
    )


@pytest.mark.parametrize("words", [["--version"], ["merge", "a", "b", "--dry-run"]])
def test_another_word_than_those_that_are_known_is_refused(words: list[str]) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "infold", *words],
        env={**os.environ, "INFOLD_KERNEL": "yes"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 2 and "off, or one of plain, avx2, avx512" in ran.stderr
