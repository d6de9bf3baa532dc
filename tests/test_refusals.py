"""What cannot be merged rightly is refused by name, all of it at once, and leaves nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftConfig
from torch import Tensor
from transformers import AutoModelForCausalLM

import handmade
import infold
from infold import Refusal
from infold.checkpoint.adapter import Adapter
from infold.merge.apply import EditRun
from peft_oracle import Bench
from tiny_models import new_model

PREFIX = "base_model.model."
ROWS, COLUMNS = 6, 4
Refused = Callable[..., tuple[str, ...]]


def tree(path: Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


@pytest.fixture
def refused(bench: Bench) -> Refused:
    """Merge, and require: a Refusal with all these words, no output, no leftovers, inputs whole."""

    def check(base: Path, adapters: Path | list[Path], *words: str) -> tuple[str, ...]:
        out = bench.place("merged")
        before = tree(bench.folder)
        with pytest.raises(Refusal) as refusal:
            infold.merge(base, adapters, out)
        assert refusal.value.exit_code == 2
        message = str(refusal.value)
        for word in words:
            assert word in message, f"{word!r} is not in:\n{message}"
        assert tree(bench.folder) == before
        assert not out.exists() and not (out.parent / f".{out.name}.infold").exists()
        return refusal.value.reasons

    return check


@pytest.fixture
def base(bench: Bench) -> Path:
    """Three modules, `a`, `b` and `c`; `c` has a bias, and is a convolution of 2 groups."""
    random = torch.Generator().manual_seed(1)
    return bench.write(
        {
            "m.a.weight": torch.randn(ROWS, COLUMNS, generator=random),
            "m.b.weight": torch.randn(ROWS, COLUMNS, generator=random),
            "m.c.weight": torch.randn(4, 2, 3, generator=random),
            "m.c.bias": torch.randn(4, generator=random),
        },
        config={"model_type": "made-by-hand", "tie_word_embeddings": False},
    )


def lora(
    *modules: str, rank: int = 2, rows: int = ROWS, columns: int = COLUMNS
) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(3)
    tensors = {}
    for module in modules:
        tensors[f"{PREFIX}{module}.lora_A.weight"] = torch.randn(rank, columns, generator=random)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = torch.randn(rows, rank, generator=random)
    return tensors


def ia3(module: str, *shape: int) -> dict[str, Tensor]:
    return {f"{PREFIX}{module}.ia3_l": torch.full(shape, 1.5)}


LORA: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}


# --- configs -----------------------------------------------------------------------------------

# as PEFT writes them, for adapters that PEFT makes
MADE_BY_PEFT: dict[str, tuple[Callable[[], PeftConfig], tuple[str, ...]]] = {
    "loha": (lambda: LoHaConfig(target_modules=["q_proj"]), ("LOHA",)),
    "alora": (
        lambda: LoraConfig(
            target_modules=["q_proj"], alora_invocation_tokens=[5], task_type="CAUSAL_LM"
        ),
        ("alora_invocation_tokens", "prompt"),
    ),
    "layer replication": (
        lambda: LoraConfig(target_modules=["q_proj"], layer_replication=[(0, 2), (1, 2)]),
        ("layer_replication", "repeated layers"),
    ),
    "pissa": (
        lambda: LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"),
        ("init_lora_weights = 'pissa'", "path_initial_model_for_weight_conversion"),
    ),
    "pissa_niter_4": (
        lambda: LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa_niter_4"),
        ("init_lora_weights = 'pissa_niter_4'",),
    ),
    "olora": (
        lambda: LoraConfig(target_modules=["q_proj"], init_lora_weights="olora"),
        ("init_lora_weights = 'olora'",),
    ),
}


@pytest.mark.parametrize("name", MADE_BY_PEFT)
def test_methods_without_a_right_merge_are_refused(
    bench: Bench, refused: Refused, name: str
) -> None:
    make, words = MADE_BY_PEFT[name]
    base = bench.base(new_model("llama"))
    adapter = bench.save(bench.attach(bench.load(AutoModelForCausalLM, base), make()))
    refused(base, adapter, *words)


BAD_FIELDS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"use_qalora": True}, ("use_qalora", "QALoRA")),
    ({"arrow_config": {"top_k": 2}}, ("arrow_config", "at run time")),
    ({"kasa_config": {"beta": 1e-4}}, ("kasa_config", "SVD")),
    ({"corda_config": {"corda_method": "kpm"}}, ("corda_config",)),
    ({"lora_ga_config": {"direction": "ArB2r"}}, ("lora_ga_config",)),
    ({"use_bdlora": {"nblocks": 2}}, ("use_bdlora",)),
    ({"megatron_config": {"a": 1}}, ("megatron_config",)),
    ({"init_lora_weights": "corda"}, ("'corda'",)),
    ({"init_lora_weights": "loftq"}, ("'loftq'",)),
    ({"init_lora_weights": "lora_ga"}, ("'lora_ga'",)),
    ({"init_lora_weights": "something new"}, ("'something new'",)),
    ({"field_of_tomorrow": 3}, ("unknown field 'field_of_tomorrow' = 3",)),
    ({"bias": "some"}, ("bias = 'some'",)),
    ({"r": 0}, ("r = 0",)),
    ({"r": "2"}, ("r = '2'",)),
    ({"r": True}, ("r = True",)),
    ({"lora_alpha": float("1e999")}, ("adapter_config.json",)),  # Infinity is not JSON
    ({"lora_alpha": "2"}, ("lora_alpha = '2'",)),
    ({"rank_pattern": {"a": 0}}, ("rank_pattern",)),
    ({"alpha_pattern": {"(": 1}}, ("'('", "regular expression")),
    ({"use_dora": True, "lora_bias": True}, ("lora_bias together with use_dora",)),
    ({"modules_to_save": "head"}, ("modules_to_save must be a list",)),
    ({"peft_type": "VERA"}, ("VERA",)),
    ({"peft_type": None}, ("peft_type",)),
]


@pytest.mark.parametrize("fields, words", BAD_FIELDS, ids=[str(f) for f, _ in BAD_FIELDS])
def test_config_fields_that_change_the_result_are_refused(
    bench: Bench, refused: Refused, base: Path, fields: dict[str, Any], words: tuple[str, ...]
) -> None:
    refused(base, bench.write_adapter(lora("m.a"), **LORA | fields), *words)


@pytest.mark.parametrize("value", [None, False, [], {}, ""])
def test_an_unknown_field_without_a_value_is_no_reason(
    bench: Bench, base: Path, value: object
) -> None:
    bench.merge(base, bench.write_adapter(lora("m.a"), **LORA, field_of_tomorrow=value))


def test_all_bad_fields_are_listed(bench: Bench, refused: Refused, base: Path) -> None:
    adapter = bench.write_adapter(
        lora("m.a"),
        **LORA,
        use_qalora=True,
        arrow_config={"a": 1},
        new=1,
        init_lora_weights="pissa",
    )
    assert len(refused(base, adapter, "use_qalora", "arrow_config", "'new'", "'pissa'")) == 4


def test_alphas_are_refused_where_peft_lost_their_order(
    bench: Bench, refused: Refused, base: Path
) -> None:
    """PEFT takes the first pattern that matches, and sorts them when it saves."""
    adapter = bench.write_adapter(lora("m.a"), **LORA, alpha_pattern={"a": 3, ".*": 4})
    refused(base, adapter, "alpha_pattern")
    bench.merge(base, bench.write_adapter(lora("m.a"), **LORA, alpha_pattern={"a": 3, ".*": 3}))


def test_of_several_ranks_the_tensors_tell_the_right_one(bench: Bench, base: Path) -> None:
    one = bench.write_adapter(lora("m.a"), **LORA, rank_pattern={".*": 5, "a": 2})
    two = bench.write_adapter(lora("m.a"), **LORA)
    assert torch.equal(
        bench.merge(base, one).tensors["m.a.weight"], bench.merge(base, two).tensors["m.a.weight"]
    )


# --- tensors of the adapter --------------------------------------------------------------------


def dora(module: str, length: int = ROWS) -> dict[str, Tensor]:
    return {f"{PREFIX}{module}.lora_magnitude_vector": torch.ones(length)} | lora(module)


GROUPED = {
    f"{PREFIX}m.c.lora_A.weight": torch.ones(2, 4, 3),  # reads the inputs of both groups
    f"{PREFIX}m.c.lora_B.weight": torch.ones(4, 1, 1),
}
BIAS_OF_B = {f"{PREFIX}m.a.lora_B.bias": torch.ones(ROWS)}

BAD_TENSORS: dict[str, tuple[dict[str, Tensor], dict[str, Any], tuple[str, ...]]] = {
    "half of a pair": (
        {key: value for key, value in lora("m.a").items() if "lora_A" in key}, {},
        ("m.a.lora_A.weight", "lacks lora_B"),
    ),
    "shapes": (
        lora("m.a", rows=5) | lora("m.b", columns=7), {},
        ("lora_B [5, 2] do not make an update of m.a.weight [6, 4]", "m.b.weight [6, 4]"),
    ),
    "transposed shapes of a convolution": (lora("m.c"), {}, ("m.c.weight [4, 2, 3]",)),
    "another rank": (
        lora("m.a", rank=3) | lora("m.b"), {},
        ("m.a.lora_A.weight: rank 3 in the file, 2 by the config",),
    ),
    "rank by pattern": (lora("m.a"), {"rank_pattern": {"m.a": 4}}, ("rank 2 in the file, 4 by",)),
    "groups": (GROUPED, {}, ("m.c.lora_A.weight", "2 groups", "PEFT cannot merge")),
    "bias of B without a bias": (
        lora("m.a") | BIAS_OF_B, {"lora_bias": True},
        ("m.a.lora_B.bias: lora_bias needs a bias in the base",),
    ),
    "bias of B not in the config": (
        lora("m.a") | BIAS_OF_B, {}, ("m.a.lora_B.bias", "lora_bias is false"),
    ),
    "magnitude not in the config": (
        dora("m.a"), {}, ("m.a.lora_magnitude_vector", "use_dora is false"),
    ),
    "dora without magnitude": (
        dora("m.a") | lora("m.b"), {"use_dora": True}, ("m.b lacks lora_magnitude_vector",),
    ),
    "dora magnitude of another length": (
        dora("m.a", length=4), {"use_dora": True}, ("lora_magnitude_vector has not 6 elements",),
    ),
    "ia3 in a lora adapter": (
        lora("m.a") | ia3("m.b", ROWS, 1), {}, ("m.b.ia3_l", "no method of type LORA"),
    ),
    "two methods on one module": (
        lora("m.a") | ia3("m.a", ROWS, 1), {},
        ("m.a.ia3_l:", "m.a.lora_A.weight:", "m.a.lora_B.weight:", "no method of type LORA"),
    ),
    "a layer's and an embedding's factors on one module": (
        {k.replace("B.weight", "embedding_B"): v for k, v in lora("m.a").items()}
        | lora("m.b") | {f"{PREFIX}m.b.lora_embedding_A": torch.ones(2, 4)}, {},
        ("m.a.lora_A.weight:", "m.a.lora_embedding_B:", "m.b.lora_A.weight:", "m.b.lora_B.weight:",
         "m.b.lora_embedding_A:", "no method of type LORA"),
    ),
    "lora in an ia3 adapter": (
        ia3("m.a", ROWS, 1) | lora("m.b"), {"peft_type": "IA3"},
        ("m.b.lora_A.weight", "m.b.lora_B.weight", "no method of type IA3"),
    ),
    "ia3 of another length": (
        ia3("m.a", 5, 1) | ia3("m.b", 1, 7), {"peft_type": "IA3"},
        ("m.a.ia3_l: 5 elements", "m.b.ia3_l: 7 elements"),
    ),
    "ia3 of another shape": (
        ia3("m.a", 3, 2) | ia3("m.b", 6), {"peft_type": "IA3"},
        ("m.a.ia3_l: shape [3, 2]", "m.b.ia3_l: shape [6]"),
    ),
    "ia3 channels": (
        ia3("m.c", 1, 3, 1), {"peft_type": "IA3"}, ("m.c.ia3_l: 3 elements", "4 output channels"),
    ),
    "ia3 input channels": (
        ia3("m.c", 1, 3, 1), {"peft_type": "IA3", "feedforward_modules": ["c"]},
        ("m.c.ia3_l: 3 input channels",),
    ),
    "saved module of another shape": (
        {f"{PREFIX}m.a.weight": torch.ones(5, 4)}, {"modules_to_save": ["a"]},
        ("m.a.weight: shape [5, 4], but m.a.weight has [6, 4]",),
    ),
    "saved module that is not there": (
        {f"{PREFIX}m.head.weight": torch.ones(5, 4)}, {"modules_to_save": ["head"]},
        ("there is no m.head.weight in the base",),
    ),
    "tokens that the config does not name": (
        {f"{PREFIX}m.a.token_adapter.trainable_tokens_delta": torch.ones(2, 4)}, {},
        ("does not tell which tokens of m.a were trained",),
    ),
    "more tokens than rows": (
        {f"{PREFIX}m.a.token_adapter.trainable_tokens_delta": torch.ones(2, 4)},
        {"trainable_token_indices": {"a": [1, 6]}}, ("do not suit m.a.weight",),
    ),
    "a token twice": (
        {f"{PREFIX}m.a.token_adapter.trainable_tokens_delta": torch.ones(2, 4)},
        {"trainable_token_indices": {"a": [1, 1]}}, ("do not suit m.a.weight",),
    ),
    "no tensors": ({}, {}, ("holds no tensors",)),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_tensors_that_do_not_fit_are_refused_by_name(
    bench: Bench, refused: Refused, base: Path, name: str
) -> None:
    tensors, fields, words = BAD_TENSORS[name]
    config = fields if "peft_type" in fields else LORA | fields
    refused(base, bench.write_adapter(tensors, **config), *words)


def test_every_left_over_tensor_is_listed_with_every_other_reason(
    bench: Bench, refused: Refused, base: Path
) -> None:
    lost = [f"m.layers.{number}.q" for number in range(12)]
    tensors = lora("m.a", rank=3) | lora("m.b", rows=5) | lora(*lost) | ia3("m.c", 1, 4, 1)
    tensors |= {"strange.key": torch.ones(1)}
    two = bench.write_adapter(lora("m.z"), **LORA, field_of_tomorrow=1)
    reasons = refused(
        base,
        [bench.write_adapter(tensors, **LORA), two],
        *(f"{PREFIX}{module}.lora_{part}.weight" for module in lost for part in "AB"),
        "rank 3 in the file", "lora_B [5, 2]", "m.c.ia3_l", "strange.key", "field_of_tomorrow",
    )  # fmt: skip
    assert len(reasons) == 2 * len(lost) + 5


def test_a_square_weight_that_nothing_tells_the_layout_of_is_refused(
    bench: Bench, refused: Refused
) -> None:
    base = bench.write({"a.weight": torch.ones(4, 4), "a.bias": torch.ones(4)})
    adapter = bench.write_adapter(lora("a", rows=4, columns=4), **LORA, fan_in_fan_out=True)
    refused(base, adapter, "a.weight is square", "config.json")


def test_a_module_that_an_earlier_adapter_edited_is_not_replaced(
    bench: Bench, refused: Refused, base: Path
) -> None:
    saved = {f"{PREFIX}m.a.weight": torch.ones(ROWS, COLUMNS)}
    refused(
        base,
        [
            bench.write_adapter(lora("m.a"), **LORA),
            bench.write_adapter(saved, peft_type="IA3", modules_to_save=["a"]),
        ],
        "replaces m.a.weight, which an earlier adapter edits",
    )


# --- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_adapter_tensor_that_is_not_finite_is_named(
    bench: Bench, refused: Refused, base: Path, value: float, dtype: torch.dtype
) -> None:
    tensors = {key: tensor.to(dtype) for key, tensor in lora("m.a", "m.b").items()}
    broken = [f"{PREFIX}m.a.lora_A.weight", f"{PREFIX}m.b.lora_B.weight"]
    for key in broken:
        tensors[key][1, 1] = value
    reasons = refused(
        base, bench.write_adapter(tensors, **LORA), *broken, "NaN or inf in 1 element"
    )
    assert not any("m.a.lora_B" in reason for reason in reasons)


def test_the_values_are_looked_through_by_one_thread(
    bench: Bench, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's others spin between the pieces, which takes ten times as long as the work."""
    threads = []
    real = Adapter.pieces

    def noted(self: Adapter, name: str) -> Iterator[Tensor]:
        threads.append(torch.get_num_threads())
        return real(self, name)

    monkeypatch.setattr(Adapter, "pieces", noted)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        infold.merge(base, bench.write_adapter(lora("m.a", "m.b"), **LORA), dry_run=True)
        # the first by what looks for untrained adapters, which ends at the first value that was
        assert threads[1:] == [1] * 4 and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "dtype, large",
    [(torch.float16, 6e4), (torch.bfloat16, 3e38), (torch.float32, 3e38), (torch.float64, 1.6e308)],
)
def test_overflow_is_a_refusal_not_an_infinity(
    bench: Bench, refused: Refused, dtype: torch.dtype, large: float
) -> None:
    weight = torch.ones(ROWS, COLUMNS, dtype=dtype)
    weight[4, 3] = large
    base = bench.write({"a.weight": weight, "b.weight": weight.clone()})
    adapter = bench.write_adapter(ia3("a", ROWS, 1), peft_type="IA3")
    refused(base, adapter, "a.weight[4, 3]", "does not fit")


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("in_place", [False, True])
def test_all_tensors_that_overflow_are_told_with_their_first_element(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, threads: int, in_place: bool
) -> None:
    """The first value stops the writing, not the search: one reason for each tensor, whichever
    thread or block comes to it first."""
    from infold.merge import prepare

    monkeypatch.setattr(prepare, "_BLOCK", 256)
    monkeypatch.setattr(prepare, "_SMALLEST_BLOCK", 256)
    names = [f"m.{n}.weight" for n in range(7)]
    tensors = {name: torch.ones(64, 64, dtype=torch.float16) for name in names}
    for name, places in {
        names[1]: [(9, 5), (60, 2)], names[4]: [(63, 63)], names[6]: [(0, 0), (0, 1)]
    }.items():  # fmt: skip
        for place in places:
            tensors[name][place] = 6e4
    tensors[names[5]][8, 1] = float("nan")
    base = handmade.base_folder(bench.place("base"), tensors, shards=2)
    given: dict[str, Tensor] = {}
    for n in range(7):
        given |= ia3(f"m.{n}", 64, 1)
    adapter = bench.write_adapter(given, peft_type="IA3")
    before = tree(bench.folder)

    def progress(done: int, total: int) -> None:
        assert done <= total

    place: dict[str, Any] = {"in_place": True} if in_place else {"out": bench.place("merged")}
    with pytest.raises(Refusal) as refusal:
        infold.merge(base, adapter, threads=threads, progress=progress, **place)

    assert type(refusal.value) is Refusal and refusal.value.exit_code == 2
    reasons = refusal.value.reasons
    wrong = ("the merged value does not fit F16", "the base holds nan there")
    assert sorted(reason.split(", so")[0] for reason in reasons) == [
        f"m.1.weight[9, 5]: {wrong[0]}", f"m.4.weight[63, 63]: {wrong[0]}",
        f"m.5.weight[8, 1]: {wrong[1]}", f"m.6.weight[0, 0]: {wrong[0]}",
    ]  # fmt: skip
    assert reasons[0].endswith("check the adapter's scale, or use a base in F32")
    assert sum("check the adapter's scale" in reason for reason in reasons) == 1
    assert tree(bench.folder) == before


def test_the_search_for_them_has_all_workers_at_one_tensor(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model may be one large tensor. Of what is refused there its first element is told, though
    another worker comes to a later one at the same time."""
    from infold.merge import prepare, stream

    monkeypatch.setattr(prepare, "_BLOCK", 256)
    monkeypatch.setattr(prepare, "_SMALLEST_BLOCK", 256)
    tensors = {f"m.{n}.weight": torch.ones(64, 64, dtype=torch.float16) for n in range(2)}
    tensors["m.0.weight"][0, 0] = 6e4
    for row in (8, 13):  # in two blocks of four rows, which are looked at side by side
        tensors["m.1.weight"][row, 1] = 6e4
    base = handmade.base_folder(bench.place("base"), tensors)
    given = {key: part for n in range(2) for key, part in ia3(f"m.{n}", 64, 1).items()}
    adapter = bench.write_adapter(given, peft_type="IA3")
    together, released = threading.Barrier(2), list[str]()

    def compute(pool: Any, task: Any, work: Any, *rest: Any) -> None:
        if (work.run.edit.tensor, work.number) != ("m.0.weight", 0):
            pool.stopped.wait(20)
            raise stream._Stopped
        computed(pool, task, work, *rest)

    def rehearse(pool: Any, work: Any, *rest: Any) -> None:
        if work.run.edit.tensor == "m.1.weight" and work.number in (2, 3):
            together.wait(20)
        rehearsed(pool, work, *rest)

    def release(run: EditRun) -> None:
        released.append(run.edit.tensor)
        forget(run)

    computed, rehearsed = stream._Pool._compute, stream._Pool._rehearse
    forget = EditRun.release
    monkeypatch.setattr(stream._Pool, "_compute", compute)
    monkeypatch.setattr(stream._Pool, "_rehearse", rehearse)
    monkeypatch.setattr(EditRun, "release", release)
    with pytest.raises(Refusal) as refusal:
        infold.merge(base, adapter, bench.place("merged"), threads=2)

    assert [reason.split(":")[0] for reason in refusal.value.reasons] == [
        "m.0.weight[0, 0]", "m.1.weight[8, 1]"
    ]  # fmt: skip
    assert released == ["m.1.weight"]


def test_on_a_terminal_tensors_that_overflow_alike_are_told_together() -> None:
    from infold.cli.main import _together

    lines = _together([f"m.{n}.q.weight[{n}, 7]: the value does not fit F16" for n in range(30)])

    assert lines == ["m.0.q.weight[0, 7]: the value does not fit F16 (and 29 more like this)"]


def test_a_trained_copy_that_does_not_fit_the_stored_dtype_is_refused(
    bench: Bench, refused: Refused
) -> None:
    base = bench.write({"a.weight": torch.ones(ROWS, COLUMNS, dtype=torch.float16)})
    tensors = {f"{PREFIX}a.weight": torch.full((ROWS, COLUMNS), 7e4)}
    refused(base, bench.write_adapter(tensors, peft_type="IA3"), "a.weight[0, 0]", "does not fit")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_broken_value_of_the_base_is_refused_only_where_it_is_edited(
    bench: Bench, refused: Refused, dtype: torch.dtype, value: float
) -> None:
    weight = torch.ones(ROWS, COLUMNS, dtype=dtype)
    broken = weight.clone()
    broken[2, 1] = value
    base = bench.write({"a.weight": weight, "b.weight": broken})
    refused(
        base,
        bench.write_adapter(ia3("b", ROWS, 1), peft_type="IA3"),
        "b.weight[2, 1]", f"the base holds {value}",
    )  # fmt: skip
    merged = bench.merge(base, bench.write_adapter(ia3("a", ROWS, 1), peft_type="IA3"))
    assert merged.tensors["b.weight"].view(torch.uint8).equal(broken.view(torch.uint8))


STORED = {
    "fp8 e4m3": torch.ones(ROWS, COLUMNS).to(torch.float8_e4m3fn),
    "fp8 e5m2": torch.ones(ROWS, COLUMNS).to(torch.float8_e5m2),
    "int8": torch.ones(ROWS, COLUMNS, dtype=torch.int8),
    "uint8": torch.ones(ROWS, COLUMNS, dtype=torch.uint8),
    "int64": torch.ones(ROWS, COLUMNS, dtype=torch.int64),
    "bool": torch.ones(ROWS, COLUMNS, dtype=torch.bool),
}


@pytest.mark.parametrize("name", STORED)
def test_other_dtypes_pass_untouched_and_are_refused_when_touched(
    bench: Bench, refused: Refused, name: str
) -> None:
    stored = STORED[name]
    base = bench.write({"a.weight": torch.ones(ROWS, COLUMNS), "q.weight": stored})

    merged = bench.merge(base, bench.write_adapter(lora("a"), **LORA))
    assert merged.tensors["q.weight"].dtype == stored.dtype
    assert merged.tensors["q.weight"].view(torch.uint8).equal(stored.view(torch.uint8))

    refused(
        base, bench.write_adapter(lora("a", "q"), **LORA), "q.weight: stored as", "not supported"
    )


# --- outputs -----------------------------------------------------------------------------------


def test_outputs_in_around_or_instead_of_an_input_are_refused(bench: Bench, base: Path) -> None:
    adapter = bench.write_adapter(lora("m.a"), **LORA)
    before = tree(bench.folder)
    for out in (base, base / "merged", adapter, adapter / "deep" / "merged", bench.folder):
        with pytest.raises(Refusal, match="lies in or around the input"):
            infold.merge(base, adapter, out)
        with pytest.raises(Refusal, match="lies in or around the input"):
            infold.merge(base, adapter, out, force=True)
    assert tree(bench.folder) == before


def test_an_existing_output_is_kept_unless_force_is_given(bench: Bench, base: Path) -> None:
    one = bench.write_adapter(lora("m.a"), **LORA)
    two = bench.write_adapter(lora("m.b"), **LORA)
    merged = bench.merge(base, one)
    before = tree(merged.path)

    with pytest.raises(Refusal, match="exists already"):
        infold.merge(base, two, merged.path)
    assert tree(merged.path) == before

    infold.merge(base, two, merged.path, force=True)
    assert tree(merged.path) == tree(bench.merge(base, two).path) | {
        "infold-receipt.json": (merged.path / "infold-receipt.json").read_bytes()
    }


def test_a_refusal_with_force_keeps_the_old_output(bench: Bench, base: Path) -> None:
    merged = bench.merge(base, bench.write_adapter(lora("m.a"), **LORA))
    before = tree(bench.folder)
    bad = bench.write_adapter(lora("m.zz"), **LORA)
    with pytest.raises(Refusal):
        infold.merge(base, bad, merged.path, force=True)
    assert {n: b for n, b in tree(bench.folder).items() if bad.name not in n} == before


def test_force_does_not_replace_what_is_no_model(bench: Bench, base: Path) -> None:
    adapter = bench.write_adapter(lora("m.a"), **LORA)
    out = bench.place("merged")
    out.mkdir()
    (out / "thesis.txt").write_text("the only copy")
    with pytest.raises(Refusal, match=r"holds no infold-receipt\.json"):
        infold.merge(base, adapter, out, force=True)
    assert (out / "thesis.txt").read_text() == "the only copy"


def test_inputs_in_the_wrong_places_are_told_apart(
    bench: Bench, refused: Refused, base: Path
) -> None:
    adapter = bench.write_adapter(lora("m.a"), **LORA)
    refused(base, base, "adapter_config.json", "looks like a base model")
    refused(adapter, adapter, "no checkpoint")
    refused(base, [], "no adapter")


def test_a_big_endian_machine_is_refused(
    base: Path, bench: Bench, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors are read as they lie, in the machine's order: all values would be others."""
    adapter = handmade.lora(bench.place("adapter"), {"m.a": (ROWS, COLUMNS)})
    whole = bench.place("whole")
    infold.merge(base, adapter, whole)

    monkeypatch.setattr("sys.byteorder", "big")
    refused(base, adapter, "needs a little-endian machine")
    with pytest.raises(Refusal, match="needs a little-endian machine"):
        infold.verify(whole)
