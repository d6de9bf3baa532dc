"""Adapter folders combined into one: loaded in PEFT, merged, or refused where it would be wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import infold
from forked import infold_command as run
from handmade import adapter_folder, base_folder, ia3, lora
from infold.errors import Refusal
from infold.tuners.combine import plan_combination
from infold.tuners.combine_config import config_notes
from peft_oracle import read_tensors
from test_combine_math import WEIGHTS, Layers, attach
from tiny_models import new_model, token_ids

Q, K, DOWN = "model.layers.0.q_proj", "model.layers.0.k_proj", "model.layers.1.down_proj"


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found = load_file(folder / "adapter_model.safetensors")
    return {key.removeprefix("base_model.model."): value for key, value in found.items()}


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def change_config(folder: Path, **fields: Any) -> Path:
    (folder / "adapter_config.json").write_text(json.dumps(config_of(folder) | fields))
    return folder


def update(folder: Path, module: str) -> Tensor:
    """The update B A of a combined LoRA; its scaling is 1."""
    parts = tensors_of(folder)
    return parts[f"{module}.lora_B.weight"].double() @ parts[f"{module}.lora_A.weight"].double()


def saved(model: Any, folder: Path) -> list[Path]:
    """Every adapter of a PEFT model, in a folder of its own."""
    model.save_pretrained(folder, selected_adapters=list(model.peft_config))
    return [folder / name for name in model.peft_config]


def outputs(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        result = model(ids)
    return result if isinstance(result, Tensor) else result.logits


def reloaded(base: nn.Module, folder: Path) -> Any:
    """PEFT's model from a folder, without any warning: no missing and no unexpected key."""
    from peft import PeftModel

    return PeftModel.from_pretrained(base, folder).eval()


def every_kind_of_layer() -> tuple[nn.Module, dict[str, list[str]]]:
    torch.manual_seed(0)
    return Layers(), {
        "one": ["linear", "conv1d", "table", "conv2d"],
        "two": ["linear", "table"],
        "three": ["conv1d", "linear", "conv2d"],
    }


def disjoint_llama() -> tuple[nn.Module, dict[str, list[str]]]:
    return new_model("llama"), {
        "one": ["q_proj", "down_proj"],
        "two": ["v_proj"],
        "three": ["layers.1.self_attn.q_proj", "o_proj"],
    }


def gpt2() -> tuple[nn.Module, dict[str, list[str]]]:
    return new_model("gpt2"), {
        "one": ["c_attn", "c_fc"],
        "two": ["attn.c_proj", "wpe"],
        "three": ["mlp.c_proj", "c_attn"],
    }


@pytest.mark.filterwarnings("ignore:.*density")
@pytest.mark.parametrize("kind", ["linear", "cat", "svd", "ties", "magnitude_prune_svd"])
@pytest.mark.parametrize("make", [every_kind_of_layer, disjoint_llama, gpt2])
def test_the_folder_does_in_peft_what_its_own_combination_does(
    make: Any, kind: str, tmp_path: Path, calm: None
) -> None:
    from peft import LoraConfig

    base, targets = make()
    options = {"one": dict(lora_alpha=8), "two": dict(lora_alpha=5, use_rslora=True)}
    configs = {n: LoraConfig(r=4, target_modules=targets[n], **options.get(n, {})) for n in WEIGHTS}
    model = attach(base, configs)
    folders = saved(model, tmp_path)
    density = {} if kind in ("linear", "cat", "svd") else {"density": 0.5}
    ids = token_ids(top=13)
    with model.disable_adapter():
        plain = outputs(model, ids)
    model.base_model.add_weighted_adapter(
        list(WEIGHTS), list(WEIGHTS.values()), "combined", combination_type=kind, **density
    )
    model.set_adapter("combined")
    expected = outputs(model, ids)

    infold.combine(folders, tmp_path / "out", weights=list(WEIGHTS.values()), kind=kind, **density)

    found = outputs(reloaded(model.unload(), tmp_path / "out"), ids)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)
    assert (plain - expected).abs().max() > 1e-2  # there is something to tell apart


@pytest.mark.parametrize(
    "second",
    [
        {"target_modules": r".*layers\.1\..*v_proj"},
        {"target_modules": ["v_proj"], "layers_to_transform": [1]},
    ],
)
def test_layers_that_only_one_adapter_reaches_stay_what_they_are(
    second: dict[str, Any], tmp_path: Path, calm: None
) -> None:
    """The union of these target_modules would reach modules that no adapter touches."""
    from peft import LoraConfig

    configs = {"one": LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[0])}
    configs["two"] = LoraConfig(r=2, **second)
    model = attach(new_model("llama"), configs)
    folders = saved(model, tmp_path)

    infold.combine(folders, tmp_path / "out", weights=[1, 1], kind="cat")

    config = config_of(tmp_path / "out")
    assert config["layers_to_transform"] is None
    assert config["target_modules"] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
    ]
    ids = token_ids()
    model.base_model.set_adapter(["one", "two"])
    together = outputs(model, ids)
    again = reloaded(model.unload(), tmp_path / "out")
    torch.testing.assert_close(outputs(again, ids), together, rtol=1e-5, atol=1e-5)
    assert {n for n, m in again.named_modules() if hasattr(m, "lora_A")} == {
        f"base_model.model.{name}" for name in config["target_modules"]
    }


@pytest.mark.parametrize("rslora", [False, True])
def test_cat_of_different_ranks_merges_to_what_its_adapters_merge_to(
    rslora: bool, tmp_path: Path
) -> None:
    """PEFT keeps the first adapter's use_rslora, which makes its combination sqrt(r) too large."""
    shapes = {Q: (8, 12), K: (12, 12), DOWN: (12, 20)}
    generator = torch.Generator().manual_seed(5)
    weights = {f"{m}.weight": torch.randn(s, generator=generator) for m, s in shapes.items()}
    base = base_folder(tmp_path / "base", weights)
    one = lora(tmp_path / "one", {Q: shapes[Q], K: shapes[K]}, rank=2, alpha=4, seed=1)
    change_config(one, use_rslora=rslora)
    two = lora(tmp_path / "two", {Q: shapes[Q], DOWN: shapes[DOWN]}, rank=3, alpha=6, seed=2)

    done = infold.combine([one, two], tmp_path / "out", weights=[1, 1], kind="cat")
    infold.merge(base, [one, two], tmp_path / "in-order")
    infold.merge(base, tmp_path / "out", tmp_path / "at-once")

    config = config_of(tmp_path / "out")
    assert done.modules == 3 and done.tensors == 6
    assert config["rank_pattern"] == {"down_proj": 3, "k_proj": 2}
    assert config["alpha_pattern"] == config["rank_pattern"]
    assert config["r"] == config["lora_alpha"] == 5
    in_order, at_once = read_tensors(tmp_path / "in-order"), read_tensors(tmp_path / "at-once")
    for name, value in in_order.items():
        assert not torch.equal(value, weights[name])
        torch.testing.assert_close(at_once[name], value, rtol=3e-7, atol=1e-7)


def test_cat_into_bfloat16_has_nearly_the_same_bytes(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    weights = {f"{Q}.weight": torch.randn(64, 96, generator=generator).bfloat16()}
    base = base_folder(tmp_path / "base", weights)
    given = [lora(tmp_path / f"a{n}", {Q: (64, 96)}, rank=4, alpha=8, seed=n) for n in (1, 2)]

    infold.combine(given, tmp_path / "out", weights=[1, 1], kind="cat")
    infold.merge(base, given, tmp_path / "in-order")
    infold.merge(base, tmp_path / "out", tmp_path / "at-once")

    one, two = (read_tensors(tmp_path / n)[f"{Q}.weight"] for n in ("in-order", "at-once"))
    assert (one == two).float().mean() > 0.999


def test_one_module_among_its_like_has_a_pattern_of_its_own(tmp_path: Path) -> None:
    """`proj` must not take the rank of `block.proj`, whose path ends with it."""
    one = lora(tmp_path / "one", {"proj": (4, 6), "block.proj": (4, 6)}, rank=2)
    two = lora(tmp_path / "two", {"proj": (4, 6)}, rank=3)
    change_config(one, target_modules=["proj"])
    change_config(two, target_modules="proj")
    weights = {"proj.weight": torch.zeros(4, 6), "block.proj.weight": torch.zeros(4, 6)}
    base = base_folder(tmp_path / "base", weights)

    infold.combine([one, two], tmp_path / "out", weights=[1, 1], kind="cat")
    infold.merge(base, tmp_path / "out", tmp_path / "merged")

    config = config_of(tmp_path / "out")
    assert (config["r"], config["rank_pattern"]) == (5, {r"^block\.proj": 2})
    merged = read_tensors(tmp_path / "merged")
    for module in ("proj", "block.proj"):
        expected = update(tmp_path / "out", module).float()
        torch.testing.assert_close(merged[f"{module}.weight"], expected)


# --- IA³ ---------------------------------------------------------------------------------------


def scale(*shape: int, seed: int) -> Tensor:
    return 1 + 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def two_ia3(tmp_path: Path) -> tuple[Path, list[Path]]:
    """A base, and two adapters that share one of three modules."""
    generator = torch.Generator().manual_seed(5)
    shapes = {Q: (8, 12), K: (8, 12), DOWN: (12, 20)}
    weights = {f"{m}.weight": torch.randn(s, generator=generator) for m, s in shapes.items()}
    weights[f"{K}.bias"] = torch.randn(8, generator=generator)
    one = {Q: scale(8, 1, seed=1), DOWN: scale(1, 20, seed=2)}
    two = {K: scale(8, 1, seed=3), DOWN: scale(1, 20, seed=4)}
    fields = dict(feedforward_modules=["down_proj"])
    return base_folder(tmp_path / "base", weights), [
        ia3(tmp_path / "one", one, target_modules=["q_proj", "down_proj"], **fields),
        ia3(tmp_path / "two", two, target_modules=["k_proj", "down_proj"], **fields),
    ]


def test_the_product_merges_to_what_its_adapters_merge_to(
    two_ia3: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    base, given = two_ia3

    infold.combine(given, tmp_path / "out", weights=[1, 1], kind="product")
    infold.merge(base, given, tmp_path / "in-order")
    infold.merge(base, tmp_path / "out", tmp_path / "at-once")

    config = config_of(tmp_path / "out")
    assert config["target_modules"] == ["down_proj", "k_proj", "q_proj"]
    assert config["feedforward_modules"] == ["down_proj"]
    in_order, at_once = read_tensors(tmp_path / "in-order"), read_tensors(tmp_path / "at-once")
    for name, value in in_order.items():
        torch.testing.assert_close(at_once[name], value, rtol=2e-7, atol=0)


def test_linear_and_interpolate_count_an_untouched_module_as_one(
    two_ia3: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    _, given = two_ia3
    one, two = map(tensors_of, given)

    infold.combine(given, tmp_path / "sum", weights=[0.25, 0.5], kind="linear")
    infold.combine(given, tmp_path / "between", weights=[0.25, 0.5], kind="interpolate")

    total, between = tensors_of(tmp_path / "sum"), tensors_of(tmp_path / "between")
    q, k, down = (f"{module}.ia3_l" for module in (Q, K, DOWN))
    torch.testing.assert_close(total[q], 0.25 * one[q] + 0.5)
    torch.testing.assert_close(total[k], 0.5 * two[k] + 0.25)
    torch.testing.assert_close(total[down], 0.25 * one[down] + 0.5 * two[down])
    torch.testing.assert_close(between[q], 1 + 0.25 * (one[q] - 1))
    torch.testing.assert_close(between[down], 1 + 0.25 * (one[down] - 1) + 0.5 * (two[down] - 1))


def test_ia3_loads_in_peft_and_does_what_the_sum_does(tmp_path: Path, calm: None) -> None:
    from peft import IA3Config

    targets = ["k_proj", "v_proj", "down_proj"]
    config = IA3Config(target_modules=targets, feedforward_modules=["down_proj"])
    model = attach(new_model("llama"), {"one": config, "two": config})
    folders = saved(model, tmp_path)
    model.base_model.add_weighted_adapter(["one", "two"], [0.3, 0.7], "sum")
    model.set_adapter("sum")
    expected = outputs(model, token_ids())

    infold.combine(folders, tmp_path / "out", weights=[0.3, 0.7], kind="linear")

    found = outputs(reloaded(model.unload(), tmp_path / "out"), token_ids())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_feedforward_modules_are_named_one_by_one_where_the_union_would_be_wrong(
    tmp_path: Path,
) -> None:
    """`proj` is feed-forward in one adapter; `a.proj` of the other one ends so too, and is not."""
    one = ia3(tmp_path / "one", {"b.proj": scale(1, 4, seed=1)})
    two = ia3(tmp_path / "two", {"a.proj": scale(4, 1, seed=2)})
    change_config(one, target_modules=["proj"], feedforward_modules=["proj"])
    change_config(two, target_modules=["a.proj"], feedforward_modules=[])

    infold.combine([one, two], tmp_path / "out", weights=[1, 1], kind="product")

    config = config_of(tmp_path / "out")
    assert config["feedforward_modules"] == ["b.proj"]
    assert config["target_modules"] == ["a.proj", "b.proj"]


# --- what is carried over ----------------------------------------------------------------------

HEAD = {"score.weight": torch.arange(6.0).view(2, 3)}


def with_head(path: Path, seed: int, head: dict[str, Tensor], **fields: Any) -> Path:
    folder = lora(path, {Q: (4, 6)}, seed=seed, modules_to_save=["score"], **fields)
    both = tensors_of(folder) | head
    save_file(
        {f"base_model.model.{k}": v for k, v in both.items()}, folder / "adapter_model.safetensors"
    )
    return folder


def test_a_saved_module_of_one_adapter_is_carried_over_and_told(tmp_path: Path) -> None:
    one = lora(tmp_path / "one", {Q: (4, 6)}, seed=1)
    two = with_head(tmp_path / "two", 2, {"score.weight": HEAD["score.weight"].bfloat16()})

    done = infold.combine([one, two], tmp_path / "out", weights=[0.5, 0.25], kind="linear")

    kept = tensors_of(tmp_path / "out")["score.weight"]
    assert torch.equal(kept, HEAD["score.weight"].bfloat16()) and kept.dtype == torch.bfloat16
    assert config_of(tmp_path / "out")["modules_to_save"] == ["score"]
    assert any("carried over" in note and "score.weight" in note for note in done.notes)


@pytest.mark.parametrize("case", ["tokens", "head", "table"])
def test_what_is_carried_over_is_there_in_peft(case: str, tmp_path: Path, calm: None) -> None:
    """At weights of 0 and 1 the combination does what the second adapter does."""
    from peft import LoraConfig

    fields: dict[str, Any] = {
        "tokens": dict(target_modules=["v_proj"], trainable_token_indices=[3, 5]),
        "head": dict(target_modules=["v_proj"], modules_to_save=["lm_head"]),
        "table": dict(target_modules=["v_proj", "embed_tokens"]),  # PEFT saves a copy of it
    }[case]
    base = new_model("llama", tie_word_embeddings=False)
    one = attach(base, {"one": LoraConfig(r=2, target_modules=["q_proj"])})
    (first,) = saved(one, tmp_path / "first")
    two = attach(one.unload(), {"two": LoraConfig(r=2, **fields)})
    with torch.no_grad():
        for name, value in two.named_parameters():
            if "trainable_tokens_delta" in name or "modules_to_save" in name:
                value.add_(1)
    (second,) = saved(two, tmp_path / "second")
    expected = outputs(two, token_ids())

    infold.combine([first, second], tmp_path / "out", weights=[0, 1], kind="cat")

    again = reloaded(two.unload(), tmp_path / "out")
    torch.testing.assert_close(outputs(again, token_ids()), expected, rtol=1e-5, atol=1e-5)
    with again.disable_adapter():
        assert (outputs(again, token_ids()) - expected).abs().max() > 1e-2


def test_both_updates_of_multihead_attention_are_combined(tmp_path: Path, calm: None) -> None:
    from peft import LoraConfig

    attention = nn.Sequential()
    attention.attn = nn.MultiheadAttention(8, 2, batch_first=True)
    attention.forward = lambda x: attention.attn(x, x, x)[0]  # type: ignore[method-assign]
    config = LoraConfig(r=2, target_modules=["attn"])
    model = attach(attention, {"one": config, "two": config})
    folders = saved(model, tmp_path)
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    model.base_model.set_adapter("two")
    expected = outputs(model, x)

    done = infold.combine(folders, tmp_path / "out", weights=[0, 1], kind="cat")

    base = model.unload()
    assert done.modules == 2
    assert (outputs(base, x) - expected).abs().max() > 1e-2
    again = reloaded(base, tmp_path / "out")
    torch.testing.assert_close(outputs(again, x), expected, rtol=1e-5, atol=1e-5)


def test_the_same_saved_module_in_two_adapters_is_kept_once(tmp_path: Path) -> None:
    given = [with_head(tmp_path / name, 1, HEAD) for name in ("one", "two")]

    infold.combine(given, tmp_path / "out", weights=[1, 1], kind="cat")

    assert torch.equal(tensors_of(tmp_path / "out")["score.weight"], HEAD["score.weight"])


def test_a_bias_of_b_is_written_and_merged(tmp_path: Path) -> None:
    given = []
    for n, weight in (("one", 1.0), ("two", 2.0)):
        folder = lora(tmp_path / n, {Q: (4, 6)}, rank=2, alpha=4, lora_bias=True)
        bias = {f"base_model.model.{Q}.lora_B.bias": torch.full((4,), weight)}
        both = load_file(folder / "adapter_model.safetensors") | bias
        save_file(both, folder / "adapter_model.safetensors")
        given.append(folder)
    base = base_folder(
        tmp_path / "base", {f"{Q}.weight": torch.zeros(4, 6), f"{Q}.bias": torch.zeros(4)}
    )

    infold.combine(given, tmp_path / "out", weights=[0.5, 0.25], kind="svd")
    infold.merge(base, tmp_path / "out", tmp_path / "merged")

    assert read_tensors(tmp_path / "merged")[f"{Q}.bias"].tolist() == [2.0] * 4


# --- refusals ----------------------------------------------------------------------------------


def refused(given: list[Path], out: Path, kind: str = "linear", **options: Any) -> str:
    options = {"weights": [0.5] * len(given)} | options
    with pytest.raises(Refusal) as caught:
        infold.combine(given, out, kind=kind, **options)

    assert not out.exists() and not list(out.parent.glob(".*infold"))
    return str(caught.value)


def test_ranks_that_differ_name_every_module_and_the_way_out(tmp_path: Path) -> None:
    one = lora(tmp_path / "one", {Q: (4, 6), K: (4, 6)}, rank=2)
    two = lora(tmp_path / "two", {Q: (4, 6), K: (4, 6)}, rank=4)

    text = refused([one, two], tmp_path / "out")

    assert Q in text and K in text and "ranks 2, 4" in text and "use cat (exact) or svd" in text


def test_ranks_may_differ_on_different_modules(tmp_path: Path) -> None:
    one, two = lora(tmp_path / "one", {Q: (4, 6)}, rank=2), lora(tmp_path / "two", {K: (4, 6)})

    infold.combine([one, two], tmp_path / "out", weights=[1, 1], kind="linear")

    assert tensors_of(tmp_path / "out")[f"{Q}.lora_A.weight"].shape == (2, 6)
    assert tensors_of(tmp_path / "out")[f"{K}.lora_A.weight"].shape == (4, 6)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"use_dora": True}, "DoRA magnitudes cannot be combined"),
        ({"init_lora_weights": "pissa"}, "changed the base weight"),
        ({"target_parameters": ["experts.down_proj"]}, "target_parameters"),
        ({"new_field": 3}, "new_field"),
        ({"r": 16}, "rank 4 in the file, 16 by the config"),
        ({"r": "4"}, "positive integer"),
        ({"rank_pattern": {"(": 4}}, "regular expression"),
        ({"target_modules": 5}, "target_modules must be"),
        ({"peft_type": "LOHA"}, "'LOHA' cannot be combined"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying"),
    ],
)
def test_configs_that_cannot_be_combined(
    fields: dict[str, Any], words: str, tmp_path: Path
) -> None:
    one = lora(tmp_path / "one", {Q: (4, 6)})
    two = change_config(lora(tmp_path / "two", {Q: (4, 6)}), **fields)

    assert words in refused([one, two], tmp_path / "out", "cat")


def test_tensors_that_fit_nowhere_are_all_listed(tmp_path: Path) -> None:
    one = lora(tmp_path / "one", {Q: (4, 6)})
    extra = {
        f"{Q}.lora_A.weight": torch.ones(4, 6),
        f"{Q}.lora_B.weight": torch.ones(4, 4),
        f"{Q}.lora_E.weight": torch.ones(4),
        f"{K}.lora_A.weight": torch.ones(4, 6),
        f"{DOWN}.lora_A.weight": torch.ones(4, 9),
        f"{DOWN}.lora_B.weight": torch.ones(4, 4),
        f"{DOWN}.ia3_l": torch.ones(4, 1),
    }
    two = adapter_folder(tmp_path / "two", extra, {"peft_type": "LORA", "r": 4, "lora_alpha": 4})

    text = refused([one, two], tmp_path / "out")

    for words in ("lora_E", f"{K} (of", "is missing", "ia3_l"):
        assert words in text


def test_modules_of_other_shapes(tmp_path: Path) -> None:
    given = [lora(tmp_path / "one", {Q: (4, 6)}), lora(tmp_path / "two", {Q: (4, 8)})]

    assert "do not belong to one module" in refused(given, tmp_path / "out")


def test_saved_modules_that_differ_and_an_update_of_a_replaced_one(tmp_path: Path) -> None:
    one = with_head(tmp_path / "one", 1, HEAD)
    two = with_head(tmp_path / "two", 2, {"score.weight": HEAD["score.weight"] + 1})
    three = lora(tmp_path / "three", {"score": (2, 3)})

    text = refused([one, two, three], tmp_path / "out")

    assert "replacements cannot be combined" in text and str(two) in text
    assert "one of them would be lost" in text and str(three) in text


def test_adapters_of_two_types(tmp_path: Path) -> None:
    given = [lora(tmp_path / "one", {Q: (4, 6)}), ia3(tmp_path / "two", {Q: torch.ones(4, 1)})]

    assert "types IA3, LORA" in refused(given, tmp_path / "out")


def test_adapters_that_disagree_on_what_is_feed_forward(tmp_path: Path) -> None:
    one = ia3(tmp_path / "one", {Q: scale(6, 1, seed=1), K: scale(4, 1, seed=1)})
    two = ia3(tmp_path / "two", {Q: scale(1, 6, seed=2), K: scale(4, 1, seed=2)})

    text = refused([one, two], tmp_path / "out")

    assert f"{Q} (of" in text and "feed-forward" in text and f"{K} (of" not in text


def test_values_that_are_not_finite_are_all_listed(tmp_path: Path) -> None:
    broken = {Q: torch.tensor([[1.0], [float("nan")]]), K: torch.tensor([[float("inf")], [1.0]])}
    given = [ia3(tmp_path / "one", broken), ia3(tmp_path / "two", {Q: torch.ones(2, 1)})]

    text = refused(given, tmp_path / "out")

    assert (
        f"{Q}.ia3_l: NaN or inf in 1 element" in text
        and f"{K}.ia3_l: NaN or inf in 1 element" in text
    )


def test_a_negative_scale_is_named_with_its_module(tmp_path: Path) -> None:
    given = [ia3(tmp_path / "one", {Q: torch.tensor([[-1.0], [1.0]])})]

    assert f"{Q}: the combination is NaN" in refused(given, tmp_path / "out", "product")


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("cat", {"weights": [1.0]}, "2 adapters, but 1 weight;"),
        ("product", {}, "no way to combine lora"),
        ("linear", {"density": 0.5}, "no use for a density"),
        ("linear", {"majority_sign": "frequency"}, "no use for a majority sign"),
        ("ties", {"density": 0.5, "svd_rank": 4}, "no use for an SVD rank"),
        ("cat", {"svd_clamp": 0.9}, "no use for an SVD clamp"),
        ("svd", {"svd_clamp": 0.4}, "SVD clamp 0.4 must be a quantile"),
        ("ties", {}, "needs a density"),
    ],
)
def test_options_that_are_missing_or_would_do_nothing(
    kind: str, options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    given = [lora(tmp_path / name, {Q: (4, 6)}) for name in ("one", "two")]

    assert words in refused(given, tmp_path / "out", kind, **options)


# --- the folder --------------------------------------------------------------------------------


def test_an_existing_folder_is_replaced_only_if_told_and_only_if_an_adapter(tmp_path: Path) -> None:
    one, two = lora(tmp_path / "one", {Q: (4, 6)}), lora(tmp_path / "two", {Q: (4, 6)}, seed=1)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    call = dict(weights=[1, 1], kind="cat")

    infold.combine([one, two], tmp_path / "out", **call)
    with pytest.raises(Refusal, match="--force"):
        infold.combine([one, two], tmp_path / "out", **call)
    infold.combine([one, two], tmp_path / "out", force=True, **call)
    with pytest.raises(Refusal, match=r"holds more than an adapter.*thesis\.txt"):
        infold.combine([one, two], mine, force=True, **call)
    shutil.copytree(one, mine, dirs_exist_ok=True)  # an adapter does not make the rest replaceable
    with pytest.raises(Refusal, match=r"holds more than an adapter.*thesis\.txt"):
        infold.combine([one, two], mine, force=True, **call)
    with pytest.raises(Refusal, match="in or around the adapter"):
        infold.combine([one, two], one, force=True, **call)

    assert (mine / "thesis.txt").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "one", "out", "two"]


def test_the_same_seed_gives_the_same_bytes_whatever_else_is_combined(tmp_path: Path) -> None:
    wide = {m: (8, 12) for m in (K, Q)}
    both = [lora(tmp_path / f"both{n}", wide, seed=n) for n in (1, 2)]
    call = dict(weights=[1, 1], kind="dare_ties", density=0.5)
    for name, seed in (("first", 3), ("again", 3), ("other", 4)):
        infold.combine(both, tmp_path / name, seed=seed, **call)
    only = []
    for folder in both:
        half = {k: v for k, v in tensors_of(folder).items() if k.startswith(Q)}
        fields = config_of(folder)
        only.append(adapter_folder(tmp_path / f"only-{folder.name}", half, fields))
    infold.combine(only, tmp_path / "only", seed=3, **call)

    first, again, other = (tensors_of(tmp_path / n) for n in ("first", "again", "other"))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)
    assert all(torch.equal(first[k], v) for k, v in tensors_of(tmp_path / "only").items())
    dropped = [first[f"{module}.lora_A.weight"] == 0 for module in (Q, K)]
    assert not torch.equal(*dropped)  # each module has random numbers of its own
    with safe_open(tmp_path / "first" / "adapter_model.safetensors", "pt") as file:
        recipe = json.loads(file.metadata()["infold.combine"])
    assert recipe["seed"] == 3 and recipe["type"] == "dare_ties" and recipe["density"] == 0.5


def test_what_differs_is_told(tmp_path: Path) -> None:
    one = lora(tmp_path / "one", {Q: (4, 6)}, base_model_name_or_path="org/Tiny-1B")
    two = lora(tmp_path / "two", {Q: (4, 6)}, base_model_name_or_path="org/Tiny-3B")
    (two / "tokenizer.json").write_text("{}")

    notes = plan_combination([one, two], [1, 1], "linear").notes

    assert any("org/Tiny-1B, org/Tiny-3B; the result has org/Tiny-1B" in note for note in notes)
    assert any("not copied" in note and "tokenizer.json" in note for note in notes)


@pytest.mark.parametrize(
    ("one", "two", "differs"),
    [
        ("org/base", "org/chat", True),
        ("gpt2", "distilgpt2", True),
        ("google-bert/bert-base-uncased", "FacebookAI/roberta-base", True),
        ("microsoft/phi-2", "openai-community/gpt2", True),
        ("facebook/opt-125m", "EleutherAI/pythia-160m", True),
        ("/models/Tiny-1B", "org/Tiny-3B", True),
        ("gpt2", "openai-community/gpt2", False),
        ("org/Tiny-1B", "copies/Tiny-1B-bf16", False),
        ("org/chat", "/models/chat", False),
        ("org/chat", "/models/mine", False),
        ("org/chat", "./mine", False),
        ("org/chat", "runs/one/mine", False),
        ("org/chat", "checkpoint-500", False),
        ("org/chat", "runs/checkpoint-500", False),
        ("org/chat", "base", False),
        ("org/chat", "C:\\mine", False),
    ],
)
def test_adapters_of_two_bases_are_told(one: str, two: str, differs: bool) -> None:
    for order in ((one, two), (two, one)):
        notes = config_notes([{"base_model_name_or_path": name} for name in order])
        told = f"base_model_name_or_path differs: {', '.join(order)}; the result has {order[0]}"
        assert notes == ([told] if differs else [])


def test_two_bases_are_told_whatever_the_first_adapter_tells() -> None:
    (note,) = config_notes([{"base_model_name_or_path": n} for n in ("/models/x", "gpt2", "org/y")])
    assert note == "base_model_name_or_path differs: gpt2, org/y; the result has /models/x"


def test_the_command_line(tmp_path: Path) -> None:
    one, two = lora(tmp_path / "one", {Q: (4, 6)}), lora(tmp_path / "two", {Q: (4, 6), K: (4, 6)})
    words = ["combine", one, two, "--weights", "-0.5,1", "--type", "svd", "--out", tmp_path / "out"]

    planned = run(*words, "--dry-run")
    assert planned.returncode == 0 and "nothing was written" in planned.stdout
    assert f"{Q}  -0.5 x adapter 0 + 1 x adapter 1  rank 4" in planned.stdout
    assert not (tmp_path / "out").exists()
    plan = json.loads(run(*words, "--dry-run", "--json").stdout)
    options: dict[str, Any] = dict(weights=[-0.5, 1], kind="svd", dry_run=True)
    assert infold.combine([one, two], tmp_path / "out", **options) == plan
    assert not (tmp_path / "out").exists()
    assert run(*words[:-1], two, "--dry-run").returncode == 2
    with pytest.raises(Refusal, match="choose another place"):
        infold.combine([one, two], two, **options)

    layers = lora(tmp_path / "layers", {Q.replace("0", str(n)): (4, 6) for n in range(12)})
    folded = run("combine", layers, two, *words[3:], "--dry-run").stdout
    assert f"{Q.replace('0', '1-11')}  -0.5 x adapter 0  rank 4" in folded

    done = run(*words, "--json")
    assert done.returncode == 0 and done.stderr == ""
    told = json.loads(done.stdout)
    assert told["modules"] == 2 and told["weights"] == [-0.5, 1.0] and told["type"] == "svd"

    again = run(*words)
    assert again.returncode == 2 and "exists already" in again.stderr
    quiet = run(*words, "--force", "--quiet")
    assert quiet.returncode == 0 and quiet.stdout == ""
    assert run(*words[:4], "a,b", *words[5:]).returncode == 2
