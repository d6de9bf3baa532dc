"""One adapter of several, module by module: PEFT's sums, and where ours differ on purpose."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from infold.adapters.combine import KINDS, combine
from infold.adapters.settings import Settings
from infold.errors import Refusal
from peft_oracle import shuffle

FACTORS = ("linear", "ties", "magnitude_prune")
BY_SVD = ("svd", "ties_svd", "magnitude_prune_svd")
RANDOM = ("dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd")
WEIGHTS = {"one": 0.7, "two": -0.4, "three": 1.5}
TARGETS = {
    "one": ["linear", "conv1d", "table", "conv2d"],
    "two": ["linear", "table"],
    "three": ["conv1d", "linear", "conv2d"],
}


class Layers(nn.Module):
    """One layer of each kind that PEFT tunes in its own way."""

    def __init__(self) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.table = nn.Embedding(13, 8)
        self.linear = nn.Linear(8, 12)
        self.conv1d = Conv1D(10, 12)  # 12 inputs, 10 outputs, stored as (in, out)
        self.conv2d = nn.Conv2d(2, 6, (3, 2), padding=1)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv1d(torch.tanh(self.linear(self.table(ids))))
        return self.conv2d(torch.stack((x, x.flip(-1)), 1))


def attach(model: nn.Module, configs: dict[str, Any]) -> Any:
    """PEFT's model with several adapters of random values."""
    from peft import get_peft_model

    shuffle(model.named_parameters(), 1)
    first, *rest = configs
    attached = get_peft_model(model, configs[first], adapter_name=first)
    for name in rest:
        attached.add_adapter(name, configs[name])
    shuffle(((n, p) for n, p in attached.named_parameters() if "lora_" in n or "ia3_" in n), 2)
    return attached.eval()


@pytest.fixture(scope="module")
def lora(calm: None) -> Any:
    from peft import LoraConfig

    options = {"one": dict(lora_alpha=8), "two": dict(lora_alpha=5, use_rslora=True)}
    return attach(
        Layers(),
        {
            name: LoraConfig(r=4, target_modules=TARGETS[name], **options.get(name, {}))
            for name in WEIGHTS
        },
    )


def factors(layer: Any, name: str) -> dict[str, Tensor] | None:
    if name in layer.lora_embedding_A:
        return {
            "lora_A": layer.lora_embedding_A[name].data,
            "lora_B": layer.lora_embedding_B[name].data,
        }
    if name in layer.lora_A:
        return {
            "lora_A": layer.lora_A[name].weight.data,
            "lora_B": layer.lora_B[name].weight.data,
        }
    return None


def product(parts: dict[str, Tensor], settings: Settings | None = None) -> Tensor:
    scaling = settings.scaling if settings else 1.0
    a, b = parts["lora_A"].double().flatten(1), parts["lora_B"].double().flatten(1)
    return b @ a * scaling


def entries_of(layer: Any) -> tuple[list[tuple[dict[str, Tensor], Settings]], list[float]]:
    entries, weights = [], []
    for name, weight in WEIGHTS.items():
        parts = factors(layer, name)
        if parts is not None:
            entries.append((parts, Settings(scaling=layer.scaling[name])))
            weights.append(weight)
    return entries, weights


def combined_by_peft(model: Any, kind: str, **options: Any) -> str:
    """The name of a new adapter in the model."""
    name = f"{kind}_{'_'.join(map(str, options.values()))}".replace(".", "")
    model.base_model.add_weighted_adapter(
        list(WEIGHTS), list(WEIGHTS.values()), name, combination_type=kind, **options
    )
    return name


@pytest.mark.parametrize("module", TARGETS["one"])
@pytest.mark.parametrize("sign", ["total", "frequency"])
@pytest.mark.parametrize("kind", FACTORS)
def test_factors_are_those_of_peft(lora: Any, kind: str, sign: str, module: str) -> None:
    options = {} if kind == "linear" else dict(density=0.6, majority_sign_method=sign)
    name = combined_by_peft(lora, kind, **options)
    layer = lora.base_model.model.get_submodule(module)
    entries, weights = entries_of(layer)

    parts, result = combine(
        "lora", entries, weights, kind, density=options.get("density"), majority_sign=sign
    )

    assert result.scaling == layer.scaling[name] == 1.0
    for part, value in factors(layer, name).items():
        torch.testing.assert_close(parts[part], value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("module", TARGETS["one"])
def test_cat_is_the_exact_sum(lora: Any, module: str) -> None:
    layer = lora.base_model.model.get_submodule(module)
    entries, weights = entries_of(layer)

    parts, _ = combine("lora", entries, weights, "cat")

    exact = sum(w * product(*entry) for w, entry in zip(weights, entries, strict=True))
    torch.testing.assert_close(product(parts), exact, rtol=1e-6, atol=1e-6)
    theirs = factors(layer, combined_by_peft(lora, "cat"))  # the same, and zeros up to rank 12
    rank = 4 * len(entries)
    assert parts["lora_A"].shape[0] == rank
    torch.testing.assert_close(parts["lora_A"], theirs["lora_A"][:rank], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(parts["lora_B"], theirs["lora_B"][:, :rank], rtol=1e-6, atol=1e-6)
    assert not theirs["lora_A"][rank:].any()


@pytest.mark.parametrize("module", TARGETS["one"])
@pytest.mark.parametrize("rank", [3, 6])
@pytest.mark.parametrize("kind", BY_SVD)
def test_svd_makes_the_update_of_peft(lora: Any, kind: str, rank: int, module: str) -> None:
    options = {} if kind == "svd" else dict(density=0.5)
    name = combined_by_peft(lora, kind, svd_rank=rank, **options)
    layer = lora.base_model.model.get_submodule(module)
    entries, weights = entries_of(layer)

    parts, _ = combine("lora", entries, weights, kind, svd_rank=rank, **options)

    theirs = factors(layer, name)
    assert {n: p.shape for n, p in parts.items()} == {n: p.shape for n, p in theirs.items()}
    torch.testing.assert_close(product(parts), product(theirs), rtol=1e-5, atol=1e-5)
    rows = parts["lora_A"].flatten(1)  # the signs that an SVD leaves open are settled
    assert (rows.amax(1) >= -rows.amin(1)).all()


def test_svd_clamp_cuts_as_peft_does(lora: Any) -> None:
    """Up to the signs of singular vectors, which move the quantile: so with one vector."""
    layer = lora.base_model.model.linear
    entries, weights = entries_of(layer)
    whole, _ = combine("lora", entries, weights, "svd", svd_rank=2)

    parts, _ = combine("lora", entries, weights, "svd", svd_rank=2, svd_clamp=0.8)

    both = torch.cat([whole["lora_B"].flatten(), whole["lora_A"].flatten()])
    bound = torch.quantile(both, 0.8)
    for part, value in whole.items():
        torch.testing.assert_close(parts[part], value.clamp(-bound, bound))


@pytest.mark.parametrize("kind", RANDOM)
def test_dare_with_the_same_random_numbers_is_that_of_peft(kind: str, calm: None) -> None:
    from peft import LoraConfig

    config = dict(r=4, target_modules=["0"])
    model = attach(nn.Sequential(nn.Linear(9, 7)), {n: LoraConfig(**config) for n in WEIGHTS})
    layer = model.base_model.model[0]
    entries, weights = entries_of(layer)

    parts, _ = combine(
        "lora", entries, weights, kind, density=0.5, generator=torch.Generator().manual_seed(3)
    )
    name = seeded(model, kind)

    theirs = factors(layer, name)
    torch.testing.assert_close(product(parts), product(theirs), rtol=1e-5, atol=1e-5)


def seeded(model: Any, kind: str) -> str:
    """PEFT draws for the new adapter's initialisation first; begin the sequence after that."""
    tuner = model.base_model
    original = tuner.inject_adapter

    def inject(*args: Any, **options: Any) -> None:
        original(*args, **options)
        torch.manual_seed(3)

    tuner.inject_adapter = inject
    try:
        return combined_by_peft(model, kind, density=0.5)
    finally:
        tuner.inject_adapter = original


def test_dare_keeps_the_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 5, generator=generator), torch.randn(3, 2, generator=generator)
    entry = ({"lora_A": a, "lora_B": b}, Settings())

    drawn = [
        combine("lora", [entry], [1.0], "dare_linear", density=0.5, generator=generator)[0]
        for _ in range(4000)
    ]

    mean = torch.stack([parts["lora_A"] for parts in drawn]).mean(0)
    torch.testing.assert_close(mean, a, rtol=0.15, atol=0.02)
    assert {0.0} < {float(parts["lora_A"][0, 0]) for parts in drawn[:50]}


def test_a_bias_of_b_is_summed_with_weight_and_scaling() -> None:
    parts = {"lora_A": torch.ones(2, 3), "lora_B": torch.ones(4, 2)}
    with_bias = {**parts, "lora_bias": torch.arange(4.0)}

    result, _ = combine(
        "lora",
        [(with_bias, Settings(scaling=2.0)), (parts, Settings()), (with_bias, Settings())],
        [0.5, 1.0, -3.0],
        "svd",
    )

    assert torch.equal(result["lora_bias"], -2 * torch.arange(4.0))


def test_ranks_may_differ_where_the_kind_allows_it() -> None:
    generator = torch.Generator().manual_seed(0)
    entries = [
        (
            {
                "lora_A": torch.randn(r, 9, generator=generator),
                "lora_B": torch.randn(8, r, generator=generator),
            },
            Settings(scaling=0.5),
        )
        for r in (2, 5)
    ]
    exact = sum(product(*entry) for entry in entries)

    by_cat, _ = combine("lora", entries, [1, 1], "cat")
    by_svd, _ = combine("lora", entries, [1, 1], "svd", svd_rank=7)
    most, _ = combine("lora", entries, [1, 1], "svd", svd_rank=20)

    torch.testing.assert_close(product(by_cat), exact)
    torch.testing.assert_close(product(by_svd), exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(product(most), exact, rtol=1e-6, atol=1e-6)
    assert most["lora_A"].shape == (20, 9) and most["lora_B"].shape == (8, 20)
    for kind in set(KINDS["lora"]) - {"cat", "svd"}:
        if not kind.endswith("svd"):
            with pytest.raises(Refusal, match="ranks 2, 5"):
                combine("lora", entries, [1, 1], kind, density=0.5)


def test_a_wide_update_is_factored_as_well_as_a_tall_one() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, 40, generator=generator), torch.randn(6, 3, generator=generator)
    wide = ({"lora_A": a, "lora_B": b}, Settings())
    tall = ({"lora_A": b.t(), "lora_B": a.t()}, Settings())
    options = dict(density=0.7, svd_rank=2)

    one, _ = combine("lora", [wide], [1.0], "magnitude_prune_svd", **options)
    two, _ = combine("lora", [tall], [1.0], "magnitude_prune_svd", **options)

    torch.testing.assert_close(product(one), product(two).t(), rtol=1e-6, atol=1e-6)
    identity = one["lora_A"] @ one["lora_A"].t()
    torch.testing.assert_close(identity, torch.eye(2), rtol=1e-6, atol=1e-6)


def test_updates_of_zero_combine_to_zero() -> None:
    entry = ({"lora_A": torch.randn(2, 5), "lora_B": torch.zeros(4, 2)}, Settings())
    for kind in KINDS["lora"]:
        options = dict(density=0.5) if kind not in ("linear", "cat", "svd") else {}
        parts, _ = combine("lora", [entry, entry], [1.0, 2.0], kind, **options)
        assert not product(parts).any(), kind


def test_the_result_is_float32_or_wider() -> None:
    def dtype(one: torch.dtype, two: torch.dtype) -> torch.dtype:
        entries = [({"ia3_l": torch.ones(3, 1, dtype=d)}, Settings()) for d in (one, two)]
        return combine("ia3", entries, [0.5, 0.5], "linear")[0]["ia3_l"].dtype

    assert dtype(torch.bfloat16, torch.float16) == torch.float32
    assert dtype(torch.bfloat16, torch.float64) == torch.float64


# --- IA³ ---------------------------------------------------------------------------------------

numbers = st.floats(-3, 3, allow_subnormal=False)


def scales(*values: list[float]) -> list[tuple[dict[str, Tensor], Settings]]:
    return [({"ia3_l": torch.tensor(v)[:, None]}, Settings()) for v in values]


def test_ia3_linear_is_the_sum_of_peft_where_all_adapters_touch_the_module(calm: None) -> None:
    from peft import IA3Config

    config = dict(target_modules=["0", "1"], feedforward_modules=["1"])
    model = attach(
        nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)), {n: IA3Config(**config) for n in WEIGHTS}
    )
    model.base_model.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), "sum")
    for layer, side in zip(model.base_model.model, ("out", "in"), strict=True):
        entries = [({"ia3_l": layer.ia3_l[n].data}, Settings(side=side)) for n in WEIGHTS]

        parts, result = combine("ia3", entries, list(WEIGHTS.values()), "linear")

        torch.testing.assert_close(parts["ia3_l"], layer.ia3_l["sum"].data, rtol=1e-6, atol=1e-6)
        assert result.side == side


def test_ia3_linear_counts_an_untouched_module_as_one() -> None:
    """PEFT would make 0.5 of two adapters that each do nothing."""
    parts, _ = combine("ia3", scales([1.0, 1.0]), [0.5], "linear", untouched=0.5)

    assert parts["ia3_l"].tolist() == [[1.0], [1.0]]


@given(st.lists(numbers, min_size=1, max_size=4))
@settings(max_examples=50, deadline=None)
def test_interpolating_identities_is_the_identity(weights: list[float]) -> None:
    entries = scales(*[[1.0, 1.0]] * len(weights))

    parts, _ = combine("ia3", entries, weights, "interpolate")

    assert parts["ia3_l"].tolist() == [[1.0], [1.0]]


@given(st.lists(st.floats(0.125, 4, width=32), min_size=2, max_size=5), numbers, numbers)
@settings(max_examples=50, deadline=None)
def test_powers_of_one_vector_add_up(vector: list[float], one: float, two: float) -> None:
    apart, _ = combine("ia3", scales(vector, vector), [one, two], "product")
    together, _ = combine("ia3", scales(vector), [one + two], "product")

    torch.testing.assert_close(apart, together, rtol=1e-5, atol=0)


@given(st.floats(-2, 2, width=32), st.floats(-2, 2, width=32), st.floats(0, 1))
@settings(max_examples=50, deadline=None)
def test_linear_and_interpolate_agree_for_weights_that_sum_to_one(
    one: float, two: float, share: float
) -> None:
    entries, weights = scales([one], [two]), [share, 1 - share]

    linear, _ = combine("ia3", entries, weights, "linear")
    between, _ = combine("ia3", entries, weights, "interpolate")

    torch.testing.assert_close(linear, between, rtol=1e-6, atol=1e-6)


# --- refusals ----------------------------------------------------------------------------------

PAIR = [({"lora_A": torch.ones(2, 3), "lora_B": torch.ones(4, 2)}, Settings())] * 2


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("mean", {}, "no way to combine lora"),
        ("ties", {}, "needs a density"),
        ("ties", {"density": 0.0}, "above 0"),
        ("ties", {"density": 1.5}, "at most 1"),
        ("ties", {"density": 0.5, "majority_sign": "mode"}, "'total' or 'frequency'"),
        ("svd", {"svd_rank": 0}, "at least 1"),
        ("svd", {"svd_clamp": 0.3}, "quantile"),
    ],
)
def test_options_that_make_no_sense(kind: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(Refusal, match=words):
        combine("lora", PAIR, [1.0, 1.0], kind, **options)


def test_parts_that_cannot_be_combined() -> None:
    dora = ({**PAIR[0][0], "lora_magnitude_vector": torch.ones(4)}, Settings())
    other = ({"lora_A": torch.ones(2, 5), "lora_B": torch.ones(4, 2)}, Settings())
    grouped = ({"lora_A": torch.ones(4, 1, 3), "lora_B": torch.ones(4, 2, 1)}, Settings(groups=2))

    with pytest.raises(Refusal, match="DoRA magnitudes"):
        combine("lora", [PAIR[0], dora], [1, 1], "cat")
    with pytest.raises(Refusal, match="do not belong to one module"):
        combine("lora", [PAIR[0], other], [1, 1], "cat")
    with pytest.raises(Refusal, match="grouped convolution"):
        combine("lora", [grouped], [1], "cat")
    with pytest.raises(Refusal, match="only ia3 and lora"):
        combine("dora", [dora], [1], "cat")
    with pytest.raises(Refusal, match="2 adapters and 1 weight"):
        combine("lora", PAIR, [1], "cat")
    with pytest.raises(Refusal, match="finite"):
        combine("lora", PAIR, [1, float("nan")], "cat")


def test_a_negative_scale_has_no_fractional_power() -> None:
    assert combine("ia3", scales([-2.0]), [2.0], "product")[0]["ia3_l"].item() == 4.0
    with pytest.raises(Refusal, match="use interpolate"):
        combine("ia3", scales([-2.0]), [0.5], "product")


def test_a_scale_of_inputs_and_one_of_outputs() -> None:
    one = ({"ia3_l": torch.ones(1, 1)}, Settings(side="in"))
    two = ({"ia3_l": torch.ones(1, 1)}, Settings(side="out"))

    with pytest.raises(Refusal, match="feed-forward"):
        combine("ia3", [one, two], [0.5, 0.5], "linear")
