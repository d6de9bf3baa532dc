"""LoRA on parameters, above all on the experts of a layer: PEFT's `target_parameters`."""

from __future__ import annotations

import copy
import json
import math
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLora
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig, Qwen3MoeConfig

import infold
from crash_child import Runner, prepare
from handmade import RECEIPT, digests
from infold.adapters import METHODS, Settings, merge
from infold.adapters.experts import pieces
from infold.checkpoint.adapter import Adapter, AdapterTensor
from infold.errors import Refusal
from infold.merge.prepare import _part_bytes, _shared_bytes, open_plan
from infold.tuners import LoraConfig, attach, load
from peft_oracle import Bench, assert_close, assert_differs, read_tensors, shuffle
from tiny_models import GROUPED, TOKENS, token_ids
from training import SIZE, save_base, sums, write_jsonl

pytestmark = [  # PEFT's, of which the second is not true of parameters
    pytest.mark.filterwarnings("ignore:.*target_parameters.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*did not match any targeted module:RuntimeWarning"),
]

MODELS = {
    # on disk a weight for each expert: w1, w2, w3, and under another name than in memory
    "mixtral": MixtralConfig(**GROUPED, **TOKENS, num_local_experts=4),
    # gate_proj, up_proj, down_proj; the second layer has no experts
    "qwen3_moe": Qwen3MoeConfig(
        **GROUPED, **TOKENS, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=24,
        mlp_only_layers=[1],
    ),
    # one tensor on disk too, (experts, in, out), gate and up interleaved
    "gpt_oss": GptOssConfig(**GROUPED, **TOKENS, num_local_experts=4, num_experts_per_tok=2),
}  # fmt: skip
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
CONFIGS: dict[str, dict[str, Any]] = {
    "both": dict(target_parameters=BOTH, r=3, lora_alpha=7),
    "beside modules": dict(
        target_modules=["q_proj"], target_parameters=["down_proj"], r=2, use_rslora=True
    ),
    "patterns": dict(
        target_modules=[], target_parameters=["gate.weight", *BOTH], r=2,
        rank_pattern={"experts.gate_up_proj": 4}, alpha_pattern={"gate_up_proj": 5},
    ),
}  # fmt: skip
CASES = [
    (kind, name)
    for kind in MODELS
    for name in CONFIGS
    if not (kind == "gpt_oss" and name == "patterns")  # its router is called `router`
]
IDS = token_ids()


def new_model(kind: str) -> Any:
    torch.manual_seed(0)
    config = copy.deepcopy(MODELS[kind])
    config.experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).eval()
    shuffle(model.named_parameters(), 1)
    return model


def fields_of(name: str) -> dict[str, Any]:
    return copy.deepcopy(CONFIGS[name])


def trained(model: Any) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


# --- against PEFT --------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_files_go_both_ways(bench: Bench, kind: str, name: str) -> None:
    base = new_model(kind)
    theirs = bench.attach(copy.deepcopy(base), PeftLora(**fields_of(name)))
    folder = bench.save(theirs)
    before, wanted = logits(base), logits(theirs)

    model = load(copy.deepcopy(base), folder)
    assert_close(logits(model), wanted, 1e-6)
    assert_differs(before, wanted)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)

    ours = attach(copy.deepcopy(base), LoraConfig(**fields_of(name))).eval()
    shapes = sorted(tuple(p.shape) for _, p in trained(ours))
    assert shapes == sorted(tuple(p.shape) for n, p in theirs.named_parameters() if "lora_" in n)
    assert torch.equal(logits(ours), before)
    assert {n for n, _ in base.named_parameters()} < {n for n, _ in ours.named_parameters()}
    shuffle(trained(ours), 3)
    ours.save_pretrained(bench.folder / "ours")
    again = PeftModel.from_pretrained(copy.deepcopy(base), bench.folder / "ours").eval()
    assert_close(logits(again), logits(ours), 1e-6)


@pytest.mark.parametrize("kind", MODELS)
def test_twenty_steps_have_the_losses_of_peft(bench: Bench, kind: str) -> None:
    base = new_model(kind)
    folder = bench.save(get_peft_model(copy.deepcopy(base), PeftLora(**fields_of("both"))))
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), folder, is_trainable=True)
    model = load(copy.deepcopy(base), folder, trainable=True)

    wanted, found = losses(theirs), losses(model)

    assert wanted[-1] < 0.98 * wanted[0]
    assert found == pytest.approx(wanted, abs=1e-5)


def losses(model: Any) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW((p for _, p in trained(model)), lr=1e-2, eps=1e-6)
    found = []
    for _ in range(20):
        loss = model(IDS, labels=IDS).loss
        found.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return found


# --- merging -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_disk_and_memory_merge_to_the_same_bytes(
    bench: Bench, kind: str, name: str, dtype: torch.dtype
) -> None:
    base = new_model(kind).to(dtype)
    base.save_pretrained(bench.folder / "base")
    model = attach(base, LoraConfig(**fields_of(name))).eval()
    shuffle(trained(model), 2)
    model.save_pretrained(bench.folder / "adapter")
    before = {n: p.clone() for n, p in model.state_dict().items()}
    wanted = logits(model)

    for _ in range(3):
        model.merge_adapter()
        if dtype == torch.float32:
            assert_close(logits(model), wanted, 1e-5)
        model.unmerge_adapter()
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    on_disk = bench.merge(bench.folder / "base", bench.folder / "adapter")
    plain = model.merge_and_unload()

    assert type(plain).__name__ == type(new_model(kind)).__name__
    assert not [n for n, _ in plain.named_modules() if "adapters" in n]
    plain.save_pretrained(bench.folder / "memory")
    in_memory = read_tensors(bench.folder / "memory")
    assert in_memory.keys() == on_disk.tensors.keys()
    assert all(torch.equal(in_memory[n], t) for n, t in on_disk.tensors.items())
    verdict = infold.verify(bench.folder / "base", [bench.folder / "adapter"], on_disk.path)
    assert verdict.ok, verdict.offenders


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_the_merged_folder_is_peft_s_model(bench: Bench, kind: str, name: str) -> None:
    base = new_model(kind)
    base.save_pretrained(bench.folder / "base")
    merged = bench.prove(
        AutoModelForCausalLM, bench.folder / "base", PeftLora(**fields_of(name)), {"input_ids": IDS}
    )
    adapter = next(bench.folder.glob("adapter-*"))
    verdict = infold.verify(bench.folder / "base", [adapter], merged.path)
    assert verdict.ok, verdict.offenders


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_a_wrong_merge_is_found_and_a_right_one_undone(bench: Bench, kind: str) -> None:
    base = new_model(kind).to(torch.bfloat16)
    base.save_pretrained(bench.folder / "base")
    adapter = bench.save(bench.attach(base, PeftLora(**fields_of("both"))))
    other = bench.place("other")
    other.mkdir()
    config = json.loads((adapter / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 21}))
    shutil.copy(adapter / "adapter_model.safetensors", other)
    merged = bench.folder / "merged"
    infold.merge(bench.folder / "base", other, merged, undo=True)

    verdict = infold.verify(bench.folder / "base", [adapter], merged)
    assert not verdict.ok
    assert any("the update is scaled by alpha, not" in str(o) for o in verdict.offenders)
    infold.undo(merged, bench.folder / "back")
    before, after = read_tensors(bench.folder / "base"), read_tensors(bench.folder / "back")
    assert all(torch.equal(before[n], after[n]) for n in before)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_swaps_edits_in_place_and_little_memory_give_the_same_bytes(
    bench: Bench, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare({"block": 1024}, monkeypatch.setattr)  # and small steps
    model = new_model(kind).to(torch.bfloat16)
    base, place = bench.folder / "base", bench.folder / "place"
    model.save_pretrained(base)
    one, two = (
        bench.save(bench.attach(copy.deepcopy(model), PeftLora(**fields_of(name))))
        for name in ("both", "beside modules")
    )
    plain, wanted = read_tensors(base), bench.merge(base, two).tensors
    shutil.copytree(base, place)

    def holds(expected: dict[str, Tensor]) -> None:
        found = read_tensors(place)
        assert found.keys() == expected.keys()
        assert not [n for n in found if not torch.equal(found[n], expected[n])]

    infold.merge(place, one, in_place=True, max_memory="32MiB", threads=2)
    holds(bench.merge(base, one).tensors)
    infold.swap(place, two, in_place=True, max_memory="32MiB", threads=1)
    holds(wanted)
    infold.swap(place, one, bench.folder / "other", max_memory="32MiB", threads=1)
    infold.undo(place, in_place=True)
    holds(plain)
    infold.undo(bench.folder / "other", bench.folder / "back")
    place = bench.folder / "back"
    holds(plain)


@pytest.mark.parametrize(("kind", "block"), [("mixtral", 128), ("gpt_oss", 512)])
def test_a_killed_merge_of_experts_goes_on_in_the_middle_of_them(
    bench: Bench, kind: str, block: int, runner: Runner
) -> None:
    """On disk a weight for each expert, or one tensor of all; cut into blocks, and more threads."""
    model = new_model(kind).to(torch.bfloat16)
    base, out = bench.folder / "base", bench.folder / "out"
    model.save_pretrained(base)
    adapter = bench.save(bench.attach(model, PeftLora(**fields_of("both"))))
    infold.merge(base, adapter, bench.folder / "expected")
    expected = digests(bench.folder / "expected")
    edited = edited_ranges(base / "model.safetensors", bench.folder / "expected" / RECEIPT)
    merge = {"base": base, "adapter": adapter, "keep": 512, "block": block}
    calls = runner.ask(**merge, out=bench.folder / "calls")["calls"]
    resumed = set()
    for at in range(4, calls, 7):
        killed = runner.ask(**merge, out=out, at=at, how="kill in the middle")
        assert killed["status"] == "killed", killed
        if not out.exists():
            done = runner.ask(**merge, threads=3, out=out)
            assert done["status"] == "done", done
            resumed.add(done["resumed"])
        assert digests(out) == expected, f"killed at call {at}"
        shutil.rmtree(out)

    assert sum(begin < at < end for at in resumed for begin, end in edited) > 4


def edited_ranges(shard: Path, receipt: Path) -> list[tuple[int, int]]:
    """Begin and end, in a shard, of the tensors that a merge edited."""
    names = {edit["tensor"] for edit in json.loads(receipt.read_text())["edits"]}
    data = shard.read_bytes()
    header = json.loads(data[8 : (start := 8 + int.from_bytes(data[:8], "little"))])
    return [
        (start + begin, start + end)
        for name in names
        for begin, end in [header[name]["data_offsets"]]
    ]


def test_of_experts_that_are_alone_each_reads_its_own_part(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of the 3 E weights of a layer needs 1 / E of the adapter's tensors."""
    new_model("mixtral").save_pretrained(bench.folder / "base")
    adapter = bench.save(bench.attach(new_model("mixtral"), PeftLora(**fields_of("both"))))
    size = sum(t.nbytes for t in load_file(adapter / "adapter_model.safetensors").values())
    read = []
    real = Adapter._stretch

    def noted(self: Adapter, info: AdapterTensor, begin: int, end: int) -> Tensor:
        read.append(end - begin)
        return real(self, info, begin, end)

    monkeypatch.setattr(Adapter, "_stretch", noted)
    infold.merge(bench.folder / "base", adapter, bench.folder / "out", threads=1)
    assert sum(read) < 2.6 * size  # once for NaN, and `gate_up_proj`'s lora_A for w1 and for w3
    read.clear()
    verdict = infold.verify(bench.folder / "base", [adapter], bench.folder / "out")
    assert verdict.ok and 0 < sum(read) < 2 * size

    plan = open_plan(bench.folder / "base", [adapter])
    largest = max(math.prod(t.shape) for n, t in plan.adapters[0].tensors.items() if "lora_B" in n)
    assert _shared_bytes(plan) == 3 * 4 * largest
    down = "model.layers.0.block_sparse_moe.experts.3.w2.weight"
    assert _part_bytes(plan, down) == (3 * 24 + 16 * 3) * (4 + 2 * 8)


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("shape", [(3, 5, 7), (1, 4, 4), (9, 2, 3)])
def test_any_cut_gives_the_same_update(shape: tuple[int, int, int], flipped: bool) -> None:
    experts, rows, width = shape
    out, inputs = (width, rows) if flipped else (rows, width)
    generator = torch.Generator().manual_seed(1)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    parts = {"lora_A": normal(experts * 2, inputs), "lora_B": normal(out, 2 * experts)}
    settings = Settings(scaling=0.7, slices=2, experts=experts, width=width, flipped=flipped)
    weight = normal(experts, rows * width)
    wanted = merge("lora", weight, None, parts, settings).weight
    left, right = parts["lora_B"].view(out, 2, experts), parts["lora_A"].view(experts, 2, inputs)
    plain = 0.7 * torch.einsum("ore,eri->eio" if flipped else "ore,eri->eoi", left, right)
    assert_close(wanted, weight.double() + plain.flatten(1))

    for step in (1, 2, 5, 8, 11):
        prepared = METHODS["lora"].prepare(parts, settings)
        back, x = prepared.inverse(), weight.double()
        for number in range(experts):
            for begin in range(0, rows * width, step):
                place = slice(number, number + 1), slice(begin, min(begin + step, rows * width))
                part = x[place].contiguous()
                prepared.weight(part, *place)
                x[place] = part
        assert torch.equal(x, wanted)
        back.weight(x, slice(None), slice(None))
        assert_close(x, weight.double(), 1e-12)


@pytest.mark.parametrize(("start", "stop"), [(0, 30), (3, 4), (2, 17), (10, 20), (9, 21), (5, 5)])
def test_pieces_are_all_elements_once(start: int, stop: int) -> None:
    seen = [
        row * 10 + column
        for _, rows, columns in pieces(start, stop, 10)
        for row in range(rows.start, rows.stop)
        for column in range(columns.start, columns.stop)
    ]
    assert seen == list(range(start, stop))
    places = [here for here, _, _ in pieces(start, stop, 10)]
    assert [i for p in places for i in range(p.start, p.stop)] == list(range(stop - start))


# --- habits and refusals -------------------------------------------------------------------------


def test_a_plain_weight_can_be_named_too(bench: Bench) -> None:
    """PEFT takes any matrix; of modules it is the same as naming the module."""

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(6, 10))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.table.t()

    torch.manual_seed(0)
    base, x = nn.Sequential(Table(), nn.Linear(6, 4)), torch.randn(3, 10)
    names = dict(target_modules=[], target_parameters=["0.table", "1.weight"])
    theirs = bench.attach(copy.deepcopy(base), PeftLora(**names))
    folder = bench.save(theirs)
    model = load(copy.deepcopy(base), folder)

    wanted = theirs(x)
    assert_close(model(x), wanted, 1e-6)
    assert_close(model.merge_and_unload()(x), wanted, 1e-6)
    path = bench.place("base")
    path.mkdir()
    save_file(dict(base.state_dict()), path / "model.safetensors")
    base.load_state_dict(bench.merge(path, folder).tensors)
    assert_close(base(x), wanted, 1e-6)


def test_copies_pickles_and_several_adapters(tmp_path: Path, calm: None) -> None:
    model = attach(new_model("mixtral"), LoraConfig(**fields_of("both")), "a").eval()
    shuffle(trained(model), 1)
    model.add_adapter("b", LoraConfig(target_parameters=["gate_up_proj"], r=2))
    model.set_adapter("b")
    shuffle(trained(model), 2)
    model.set_adapter(["a", "b"])
    wanted = logits(model)

    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), wanted)
        shuffle(other.named_parameters(), 5)
    assert torch.equal(logits(model), wanted)
    model.save_pretrained(tmp_path)
    again = load(load(new_model("mixtral"), tmp_path / "a", "a"), tmp_path / "b", "b")
    again.set_adapter(["a", "b"])
    assert torch.equal(logits(again), wanted)
    model.merge_adapter()
    assert_close(logits(model), wanted)
    model.delete_adapter("a")
    again.set_adapter("b")
    assert_close(logits(model), logits(again))
    assert not any(".adapters.down_proj" in name for name, _ in model.named_modules())
    model.unload()
    assert torch.equal(logits(model), logits(new_model("mixtral")))


def test_a_compiled_model_and_recomputed_layers_have_the_same_gradients(calm: None) -> None:
    found = []
    for way in ("plain", "compiled", "recomputed"):
        model = attach(new_model("mixtral"), LoraConfig(**fields_of("both"))).train()
        shuffle(trained(model), 1)
        if way == "recomputed":
            model.activation_checkpointing_enable()
        run = torch.compile(model, backend="eager") if way == "compiled" else model
        run(IDS, labels=IDS).loss.backward()
        found.append([p.grad for _, p in trained(model)])
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert_close(two, one, 1e-5)


def test_rows_share_their_experts(calm: None) -> None:
    model = attach(new_model("mixtral"), LoraConfig(**fields_of("both")), "a").eval()
    model.add_adapter("b", LoraConfig(target_modules=["q_proj"]))

    with pytest.raises(Refusal, match="a changes experts or other parameters, which all rows"):
        model(IDS, adapter_names=["a", "b"])
    mixed = model(IDS, adapter_names=["__base__", "b"]).logits
    assert_close(mixed[0], logits(new_model("mixtral"))[0])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"target_parameters": ["gate_up"]},
            r"'gate_up' means no parameter.*near it: gate_up_proj",
        ),
        ({"target_parameters": BOTH, "lora_dropout": 0.1}, "lora_dropout does not go together"),
        ({"target_parameters": BOTH, "use_dora": True}, "use_dora does not go together"),
        ({"target_parameters": BOTH, "bias": "all"}, "bias does not go together"),
        ({"target_parameters": ["input_layernorm.weight"]}, "has 1 dimensions"),
        (
            {"target_modules": ["q_proj"], "target_parameters": ["q_proj.weight"]},
            "its module is one of target_modules, too",
        ),
    ],
)
def test_what_does_not_fit_is_refused(fields: dict[str, Any], message: str) -> None:
    model = new_model("mixtral")
    with pytest.raises(Refusal, match=message):
        attach(model, LoraConfig(**fields))
    assert not hasattr(model, "peft_config")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("lost", r"holds no update of model\.layers\.0\.mlp\.experts\.gate_up_proj"),
        ("shape", r"needs lora_A \[12, 16\], lora_B \[48, 12\]"),
    ],
)
def test_files_that_do_not_fit_are_refused(bench: Bench, change: str, message: str) -> None:
    folder = bench.save(bench.attach(new_model("mixtral"), PeftLora(**fields_of("both"))))
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    own = "base_model.model.model.layers.0.mlp.experts.base_layer.lora_{}.weight"
    if change == "lost":
        for part in "AB":
            del tensors[own.format(part)]
    else:
        tensors[own.format("A")] = torch.zeros(12, 15)
    save_file(tensors, file)
    model = new_model("mixtral")

    with pytest.raises(Refusal, match=message):
        load(model, folder)
    assert not hasattr(model, "peft_config")


def test_disk_refuses_what_it_cannot_place(bench: Bench) -> None:
    adapter = bench.save(bench.attach(new_model("mixtral"), PeftLora(**fields_of("both"))))
    file = adapter / "adapter_model.safetensors"
    new_model("mixtral").save_pretrained(bench.folder / "base")
    tensors = load_file(file)

    # PEFT before 0.19 took the first of an expert's dimensions for its inputs
    swapped = {
        n: torch.zeros(12, 48 if "base_layer" in n else 16)
        if "lora_A" in n
        else torch.zeros(16 if "base_layer" in n else 24, 12)
        for n in tensors
    }
    save_file(swapped, file)
    with pytest.raises(Refusal, match=r"trained on experts stored as \(in, out\)"):
        infold.merge(bench.folder / "base", adapter, bench.folder / "out")
    save_file({**tensors, next(iter(tensors)): torch.zeros(12, 5)}, file)
    with pytest.raises(Refusal, match=r"make no update of .*gate_up_proj \[4, 48, 16\]"):
        infold.merge(bench.folder / "base", adapter, bench.folder / "out")
    save_file(tensors, file)
    llama = bench.base(
        AutoModelForCausalLM.from_config(MODELS["mixtral"]).model.layers[0].self_attn
    )
    with pytest.raises(Refusal, match=r"the base has no .*gate_up_proj.* of model\.layers\.0"):
        infold.merge(llama, adapter, bench.folder / "out")


def test_square_experts_need_to_know_their_outputs(bench: Bench) -> None:
    config = {"peft_type": "LORA", "r": 2, "target_parameters": ["experts.down_proj"]}
    tensors = {
        "base_model.model.layers.0.mlp.experts.lora_A.weight": torch.randn(6, 4),
        "base_model.model.layers.0.mlp.experts.lora_B.weight": torch.randn(4, 6),
    }
    weight = {"layers.0.mlp.experts.down_proj": torch.randn(3, 4, 4)}
    told = {"peft_version": "0.21.0"}
    update = (
        torch.einsum(
            "ore,eri->eoi",
            *(
                v.view(s)
                for v, s in zip(list(tensors.values())[::-1], [(4, 2, 3), (3, 2, 4)], strict=True)
            ),
        )
        * 4
    )  # alpha 8, rank 2

    def nested(*kinds: str) -> dict[str, Any]:
        inner = {f"{kind}_config": {"deeper": {"model_type": kind}} for kind in kinds}
        return {"model_type": "of_its_own", "text_config": "?", **inner}

    for kind, version, turned in (
        ({"model_type": "qwen3_moe"}, told, False), ({"model_type": "gpt_oss"}, told, True),
        ({"model_type": "gpt_oss"}, {}, None), ({"model_type": "qwen3_vl_moe"}, told, None),
        (nested("gpt_oss"), told, True), (nested("vision", "deepseek_v3"), told, False),
        (nested("gpt_oss", "mixtral"), told, None), (nested("unheard_of"), told, None),
        ({"model_type": ["gpt_oss"]}, told, None), (None, told, None),
    ):  # fmt: skip
        base = bench.write(weight, kind)
        adapter = bench.write_adapter(tensors, **config, **version)
        if turned is None:
            with pytest.raises(Refusal, match="has square experts, and nothing tells"):
                bench.merge(base, adapter)
            continue
        wanted = weight["layers.0.mlp.experts.down_proj"] + (update.mT if turned else update)
        assert_close(bench.merge(base, adapter).tensors["layers.0.mlp.experts.down_proj"], wanted)


@pytest.mark.parametrize("flipped", [False, True])
def test_other_experts_of_the_module_tell_what_square_ones_do_not(
    bench: Bench, flipped: bool
) -> None:
    where = "layers.0.mlp.experts"
    factors = {
        ".base_layer": (torch.randn(6, 4), torch.randn(8, 6)),
        "": (torch.randn(6, 4), torch.randn(4, 6)),
    }
    tensors = {
        f"base_model.model.{where}{around}.lora_{part}.weight": value
        for around, pair in factors.items()
        for part, value in zip("AB", pair, strict=True)
    }
    base = bench.write(  # of no model that is known, by an adapter of an unknown PEFT
        {
            f"{where}.gate_up_proj": torch.randn(3, *((4, 8) if flipped else (8, 4))),
            f"{where}.down_proj": torch.randn(3, 4, 4),
        },
        {"model_type": "unheard_of"},
    )
    adapter = bench.write_adapter(tensors, peft_type="LORA", r=2, target_parameters=BOTH)
    merged = bench.merge(base, adapter)
    a, b = factors[""]
    update = 4 * torch.einsum("ore,eri->eoi", b.view(4, 2, 3), a.view(3, 2, 4))
    wanted = read_tensors(base)[f"{where}.down_proj"] + (update.mT if flipped else update)
    assert_close(merged.tensors[f"{where}.down_proj"], wanted)


@pytest.mark.parametrize(
    ("shape", "targets", "message"),
    [
        ((3, 4, 4), 5, "target_parameters must be a list of names"),
        ((3, 4, 4), True, "target_parameters must be a list of names"),
        ((3, 4, 4), [["down_proj"]], "target_parameters must be a list of names"),
        ((2, 3, 4, 4), ["down_proj"], "make no update of down_proj"),
        ((0, 4, 4), ["down_proj"], "make no update of down_proj"),
        ((4,), ["down_proj"], "make no update of down_proj"),
    ],
)
def test_what_is_no_experts_is_refused(
    bench: Bench, shape: tuple[int, ...], targets: Any, message: str
) -> None:
    base = bench.write({"mlp.experts.down_proj": torch.ones(shape)}, {"model_type": "mixtral"})
    own = "base_model.model.mlp.experts.lora_{}.weight"
    tensors = {own.format("A"): torch.randn(6, 4), own.format("B"): torch.randn(4, 6)}
    adapter = bench.write_adapter(tensors, peft_type="LORA", r=2, target_parameters=targets)
    with pytest.raises(Refusal, match=message):
        infold.merge(base, adapter, bench.folder / "out")


def test_more_parameters_of_a_module_than_can_be_told_apart_are_refused(bench: Bench) -> None:
    names = [f"p{number}" for number in range(12)]  # half a billion orders
    base = bench.write({f"m.{name}": torch.ones(4, 4) for name in names})
    tensors = {}
    for around in range(12):
        own = "base_model.model.m" + ".base_layer" * around + ".lora_{}.weight"
        tensors |= {own.format("A"): torch.randn(2, 4), own.format("B"): torch.randn(5, 2)}
    adapter = bench.write_adapter(tensors, peft_type="LORA", r=2, target_parameters=names)
    with pytest.raises(Refusal, match="12 updates of 12 parameters of m; infold tells apart at mo"):
        infold.merge(base, adapter, bench.folder / "out")


def test_inspect_tells_which_tensors_an_update_of_experts_edits(bench: Bench) -> None:
    new_model("mixtral").save_pretrained(bench.folder / "base")
    adapter = bench.save(bench.attach(new_model("mixtral"), PeftLora(**fields_of("both"))))

    found = infold.inspect(adapter, base=bench.folder / "base")

    edits = {module["module"]: module["edits"] for module in found["modules"]}
    own = "model.layers.1.block_sparse_moe.experts"
    gates = [f"{own}.{n}.{name}.weight" for n in range(4) for name in ("w1", "w3")]
    assert sorted(edits["model.layers.1.mlp.experts.base_layer"]) == gates
    downs = [f"{own}.{n}.w2.weight" for n in range(4)]
    assert sorted(edits["model.layers.1.mlp.experts"]) == downs


def test_experts_are_trained_and_the_training_resumes(tmp_path: Path, calm: None) -> None:
    base = save_base(tmp_path / "base")  # for its tokenizer
    torch.manual_seed(0)
    config = MixtralConfig(**SIZE, num_key_value_heads=2, num_local_experts=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    data = write_jsonl(tmp_path / "data.jsonl", sums(12))
    options = dict(batch_size=4, lr=1e-2, save_every=2, parameters=BOTH, rank=2)

    def interrupt(done: int, steps: int, loss: float | None) -> None:
        if done == 3:
            raise KeyboardInterrupt

    record = infold.train(base, data, tmp_path / "whole", steps=6, **options)
    with pytest.raises(KeyboardInterrupt):
        infold.train(base, data, tmp_path / "other", steps=6, progress=interrupt, **options)
    again = infold.train(base, data, tmp_path / "other", steps=6, resume=True, **options)

    assert again.resumed_step == 2 and record.targets == sorted([*BOTH, "q_proj", "v_proj"])
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("whole", "other")]
    assert files[0].read_bytes() == files[1].read_bytes()
    updates = [v for k, v in load_file(files[0]).items() if "experts" in k and "lora_B" in k]
    assert len(updates) == 4 and all(update.abs().max() > 0 for update in updates)
    infold.merge(base, tmp_path / "whole", tmp_path / "merged")
    assert infold.verify(base, [tmp_path / "whole"], tmp_path / "merged").ok
    with pytest.raises(Refusal, match="--parameters: is a setting of --method lora"):
        infold.train(base, data, tmp_path / "no", method="ia3", parameters=BOTH)
