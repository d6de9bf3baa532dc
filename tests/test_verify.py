"""The proof: it accepts what the merge makes, and nothing that differs in one bit."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from fractions import Fraction
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import handmade
import infold
from infold.adapters import Settings, merge
from infold.adapters.exact import slices_for
from infold.errors import CorruptFile, Refusal
from infold.verify import hints
from infold.verify.reference import LowRank
from infold.verify.rounding import LINES
from infold.verify.tensors import EditCheck
from infold.verify.values import Values
from peft_oracle import Bench

weights = import_module("infold.verify.weights")

RECEIPT = "infold-receipt.json"
Q = "model.layers.0.self_attn.q_proj.weight"
OTHER_Q = "model.layers.1.self_attn.q_proj.weight"
V_BIAS = "model.layers.0.self_attn.v_proj.bias"
NORM = "model.norm.weight"


# --- what is merged ------------------------------------------------------------------------------


def llama(dtype: torch.dtype = torch.bfloat16) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).to(dtype)


def gpt2(dtype: torch.dtype) -> GPT2LMHeadModel:
    config = GPT2Config(vocab_size=96, n_positions=32, n_embd=32, n_layer=2, n_head=4)
    return GPT2LMHeadModel(config).to(dtype)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 4)


class Convolutions(nn.Module):
    def __init__(self, groups: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(8, 12, 3, groups=groups)
        self.second = nn.Conv2d(12, 8, (1, 3))


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": "all-linear", **options})


def ia3(targets: list[str], feedforward: list[str]) -> IA3Config:
    return IA3Config(target_modules=targets, feedforward_modules=feedforward)


LLAMA_IA3 = ia3(["q_proj", "v_proj", "down_proj"], ["down_proj"])
GPT2_IA3 = ia3(["c_attn", "mlp.c_proj", "c_fc"], ["mlp.c_proj"])
PATTERNS = {"rank_pattern": {"q_proj": 2, "1.mlp.up_proj": 9}, "alpha_pattern": {"v_proj": 3}}

CASES: dict[str, tuple[Callable[[], nn.Module], list[Any]]] = {
    "lora bf16": (llama, [lora()]),
    "lora f16": (lambda: llama(torch.float16), [lora()]),
    "lora f32": (lambda: llama(torch.float32), [lora(r=16)]),
    "lora f64": (lambda: llama(torch.float64), [lora(r=3)]),
    "rank of two slices": (llama, [lora(r=17, target_modules=["q_proj", "down_proj"])]),
    "high rank": (llama, [lora(r=600, target_modules=["q_proj", "down_proj"])]),
    "rslora patterns": (llama, [lora(use_rslora=True, **PATTERNS)]),
    "rank of one": (lambda: llama(torch.float16), [lora(r=1)]),
    "ia3 bf16": (llama, [LLAMA_IA3]),
    "ia3 f16": (lambda: llama(torch.float16), [LLAMA_IA3]),
    "ia3 conv1d": (lambda: gpt2(torch.float32), [GPT2_IA3]),
    "lora conv1d": (lambda: gpt2(torch.bfloat16), [lora(target_modules=["c_attn", "c_proj"])]),
    "lora table": (lambda: gpt2(torch.float16), [lora(target_modules=["wpe", "c_fc"])]),
    "dora bf16": (llama, [lora(use_dora=True)]),
    "dora conv1d": (lambda: gpt2(torch.float16), [lora(use_dora=True, target_modules=["c_attn"])]),
    "tokens": (llama, [lora(trainable_token_indices={"embed_tokens": [3, 95, 40]})]),
    "lora bias": (llama, [lora(lora_bias=True, target_modules=["v_proj"])]),
    "saved head": (llama, [lora(modules_to_save=["lm_head"], bias="lora_only")]),
    "several": (llama, [LLAMA_IA3, lora(), lora(r=7, use_rslora=True), LLAMA_IA3]),
    "several f32": (lambda: llama(torch.float32), [lora(r=2), LLAMA_IA3, lora()]),
    "dora among others": (llama, [lora(), lora(use_dora=True), LLAMA_IA3, lora(r=2)]),
    "convolutions ia3": (lambda: Convolutions(1).bfloat16(), [ia3(["first", "second"], ["first"])]),
    "multihead attention": (Attention, [lora(target_modules=["attn"])]),
    "grouped ia3": (lambda: Convolutions(4).half(), [ia3(["first", "second"], ["first"])]),
    "convolutions lora": (lambda: Convolutions(1).half(), [lora(target_modules=["first"])]),
    "convolutions dora": (
        lambda: Convolutions(1).bfloat16(),
        [lora(use_dora=True, target_modules=["second"])],
    ),
}


def make(bench: Bench, make_model: Callable[[], nn.Module], configs: list[Any]) -> list[Path]:
    """A base, then an adapter of each config."""
    model = make_model()
    places = [bench.base(model)]
    for config in configs:
        attached = bench.attach(model, config)
        places.append(bench.save(attached))
        model = attached.unload()
    return places


@pytest.mark.parametrize("case", CASES)
def test_what_the_merge_makes_is_proven(case: str, bench: Bench) -> None:
    base, *adapters = make(bench, *CASES[case])
    merged = bench.merge(base, adapters)

    verdict = infold.verify(base, adapters, merged.path)

    assert verdict.offenders == ()
    assert verdict.ok
    edited = len(merged.receipt.edits)
    assert (verdict.recomputed, verdict.identical) == (edited, merged.receipt.tensors - edited)
    assert verdict.tensors == merged.receipt.tensors
    assert edited > 0
    assert verdict.undecided == 0
    assert json.loads(json.dumps(asdict(verdict)))["ok"] is True


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_dora_into_float32_may_leave_a_few_elements_undecided(adapter: str, bench: Bench) -> None:
    config = lora(use_dora=adapter == "dora")
    base, *adapters = make(bench, lambda: llama(torch.float32), [config])
    merged = bench.merge(base, adapters)

    verdict = infold.verify(base, adapters, merged.path)

    assert verdict.ok
    assert verdict.undecided <= (0 if adapter == "lora" else 3)


def test_a_lone_file_and_a_pickled_adapter_are_proven(bench: Bench, tmp_path: Path) -> None:
    base = bench.write({"a.lin.weight": torch.randn(24, 16).bfloat16(), "b": torch.arange(3)})
    path = bench.write_adapter({}, peft_type="LORA", r=2, lora_alpha=4)
    (path / "adapter_model.safetensors").unlink()
    parts = {"lora_A.weight": torch.randn(2, 16), "lora_B.weight": torch.randn(24, 2)}
    pickled = {f"base_model.model.a.lin.{name}": part for name, part in parts.items()}
    torch.save(pickled, path / "adapter_model.bin")
    file = base / "model.safetensors"
    merged = bench.merge(file, path)

    assert infold.verify(file, path, merged.path).ok
    assert infold.verify(None, [], merged.path).ok


@pytest.mark.parametrize("dora", [False, True])
def test_groups_of_a_convolution_have_their_own_rows_of_a(dora: bool, bench: Bench) -> None:
    base = bench.write({"a.conv.weight": torch.randn(300, 6, 3).bfloat16()}, {})
    parts = {"lora_A.weight": torch.randn(6, 6, 3), "lora_B.weight": torch.randn(300, 2, 1)}
    if dora:
        parts["lora_magnitude_vector"] = torch.rand(300, 1, 1)
    named = {f"base_model.model.a.conv.{name}": part for name, part in parts.items()}
    adapter = bench.write_adapter(named, peft_type="LORA", r=6, lora_alpha=6, use_dora=dora)
    merged = bench.merge(base, adapter)

    assert infold.verify(base, adapter, merged.path).ok


def test_negative_zeros_without_an_update(bench: Bench) -> None:
    """An update of zero is +0, and makes +0 of -0."""
    weight = torch.randn(32, 32)
    weight[::2] = -0.0
    base = bench.write({"a.lin.weight": weight.half()})
    a, b = -torch.rand(1, 32), torch.zeros(32, 1)
    adapters = [
        bench.write_adapter(
            {
                "base_model.model.a.lin.lora_A.weight": a,
                "base_model.model.a.lin.lora_B.weight": b + n,
            },
            peft_type="LORA", r=1, lora_alpha=1,
        )
        for n in (0.0, 1.0)
    ]  # fmt: skip
    (base / "config.json").write_text("{}")

    for given in ([adapters[0]], adapters):
        merged = bench.merge(base, given)
        verdict = infold.verify(base, given, merged.path)
        assert verdict.ok
        assert verdict.undecided == 0
    save_file({"a.lin.weight": weight.half()}, merged.path / "model.safetensors")
    assert not infold.verify(base, given, merged.path).ok


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dora", [False, True])
def test_updates_so_small_that_their_bounds_underflow(
    dtype: torch.dtype, dora: bool, tmp_path: Path
) -> None:
    """Only the sign of a zero is left of them, and whether it is there the contract tells."""
    numbers = torch.Generator().manual_seed(6)

    def tiny(*shape: int, least: int) -> torch.Tensor:
        powers = torch.randint(least, 0, shape, generator=numbers).double()
        return torch.randn(*shape, generator=numbers, dtype=torch.float64) * 2.0**powers

    weight = torch.zeros(16, 24)
    weight[:, ::2] = -0.0
    weight[:, 5] = 1.0  # DoRA needs a norm
    base = handmade.base_folder(tmp_path / "base", {"q.weight": weight.to(dtype)})
    parts = {
        "q.lora_A.weight": tiny(7, 24, least=-600),
        "q.lora_B.weight": tiny(16, 7, least=-600),
    }
    if dora:
        parts["q.lora_magnitude_vector"] = torch.rand(16, generator=numbers).double() + 0.5
    config = {"peft_type": "LORA", "r": 7, "lora_alpha": -3, "use_dora": dora}
    lora = handmade.adapter_folder(tmp_path / "lora", parts, config)
    scales = tiny(16, 1, least=-30)
    ia3 = handmade.ia3(tmp_path / "ia3", {"q": scales})
    infold.merge(base, [lora, ia3], tmp_path / "out")

    verdict = infold.verify(base, [lora, ia3], tmp_path / "out")

    assert verdict.ok, verdict.offenders


def test_biases_halfway_between_two_bfloat16(bench: Bench) -> None:
    """1 + 3/256 lies in the middle of 1 + 2/256 and 1 + 4/256; the even one is the latter."""
    tensors = {"a.lin.weight": torch.ones(5, 2), "a.lin.bias": torch.ones(5)}
    base = bench.write({name: value.bfloat16() for name, value in tensors.items()}, {})
    adapter = bench.write_adapter(
        {"base_model.model.a.lin.ia3_l": torch.full((5, 1), 1 + 3 / 256)}, peft_type="IA3"
    )
    merged = bench.merge(base, adapter)

    assert infold.verify(base, adapter, merged.path).ok
    assert merged.tensors["a.lin.bias"].tolist() == [1 + 4 / 256] * 5


# --- what is not right ----------------------------------------------------------------------------


class Scene:
    """A right merge, made once; each test changes a copy of the merged folder."""

    def __init__(self, folder: Path) -> None:
        bench = Bench(folder)
        self.base, *self.adapters = make(
            bench, llama, [lora(target_modules=["q_proj", "up_proj"]), LLAMA_IA3]
        )
        (self.base / "tokenizer.json").write_text('{"a": 1}')
        (self.base / "more").mkdir()
        (self.base / "more" / "notes.txt").write_text("as they are")
        self.right = bench.merge(self.base, self.adapters).path
        self.folder = folder / "changed"

    def fresh(self, receipt: bool) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.right, self.folder)
        if not receipt:
            (self.folder / RECEIPT).unlink()

    def verify(self) -> Any:
        return infold.verify(self.base, self.adapters, self.folder)

    def shard_of(self, name: str) -> Path:
        index = json.loads((self.folder / "model.safetensors.index.json").read_text())
        return self.folder / index["weight_map"][name]

    def span(self, name: str, folder: Path | None = None) -> tuple[Path, int, int]:
        """(file, begin, end) of a tensor's bytes."""
        path = (folder or self.folder) / self.shard_of(name).name
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        begin, end = json.loads(raw[8 : 8 + length])[name]["data_offsets"]
        return path, 8 + length + begin, 8 + length + end

    def bytes_of(self, name: str, folder: Path | None = None) -> bytes:
        path, begin, end = self.span(name, folder)
        return path.read_bytes()[begin:end]

    def put(self, name: str, data: bytes) -> None:
        path, begin, end = self.span(name)
        assert end - begin == len(data)
        raw = path.read_bytes()
        path.write_bytes(raw[:begin] + data + raw[end:])

    def put_tensor(self, name: str, value: Tensor) -> None:
        self.put(name, value.contiguous().view(torch.uint8).numpy().tobytes())

    def resave(self, change: Callable[[dict[str, Tensor]], None], **metadata: str) -> None:
        """Write the shard of Q anew."""
        path = self.shard_of(Q)
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, {"format": "pt", **metadata})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, calm: None) -> Scene:
    return Scene(tmp_path_factory.mktemp("scene"))


@pytest.fixture(params=[True, False], ids=["receipt", "no receipt"])
def scene(made: Scene, request: pytest.FixtureRequest) -> Scene:
    made.fresh(receipt=request.param)
    return made


def found(verdict: Any, what: str) -> dict[str, str]:
    """{where: detail} of the offenders, all of a kind: the digest of a shard is none beside those
    that tell why it differs."""
    assert not verdict.ok
    assert {offender.what for offender in verdict.offenders} == {what}, verdict.offenders
    return {o.where: o.detail for o in verdict.offenders if o.what == what}


@pytest.mark.parametrize(("name", "what"), [(Q, "edited"), (V_BIAS, "edited"), (NORM, "unedited")])
@pytest.mark.parametrize("element", [0, 17, -1])
def test_one_lowest_bit(scene: Scene, name: str, what: str, element: int) -> None:
    data = bytearray(scene.bytes_of(name))
    place = element * 2 % len(data)
    data[place] ^= 1
    scene.put(name, bytes(data))

    details = found(scene.verify(), f"{what} tensor")

    assert list(details) == [name]
    assert details[name].startswith("1 of ")
    shape = load_file(scene.shard_of(name))[name].shape
    index = list(torch.unravel_index(torch.tensor(place // 2), shape))
    assert f"first {[int(i) for i in index]}: stored " in details[name]


def test_a_bit_in_every_tensor(scene: Scene) -> None:
    names = json.loads((scene.folder / "model.safetensors.index.json").read_text())["weight_map"]
    for name in names:
        data = bytearray(scene.bytes_of(name))
        data[len(data) // 4 * 2] ^= 1
        scene.put(name, bytes(data))

    verdict = scene.verify()

    wrong = {o.where for o in verdict.offenders if o.what.endswith("edited tensor")}
    assert wrong == set(names)
    assert (verdict.identical, verdict.recomputed) == (0, 0)


def test_a_swapped_pair(scene: Scene) -> None:
    one, two = scene.bytes_of(Q), scene.bytes_of(OTHER_Q)
    scene.put(Q, two)
    scene.put(OTHER_Q, one)

    details = found(scene.verify(), "edited tensor")

    assert details.keys() == {Q, OTHER_Q}
    assert f"it holds what belongs to {OTHER_Q}" in details[Q]


@pytest.mark.parametrize("tried", [1, 24])
def test_the_base_passed_off_as_merged(
    tried: int, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hints, "_TRIED", tried)  # the others are told of all the same
    for shard in scene.base.glob("*.safetensors"):
        shutil.copy(shard, scene.folder)

    details = found(scene.verify(), "edited tensor")

    receipt = json.loads((scene.right / RECEIPT).read_text())
    assert details.keys() == {edit["tensor"] for edit in receipt["edits"]}
    assert all("the edit is missing" in detail for detail in details.values())


def test_a_bias_left_unscaled(scene: Scene) -> None:
    scene.put(V_BIAS, scene.bytes_of(V_BIAS, scene.base))

    details = found(scene.verify(), "edited tensor")

    assert details.keys() == {V_BIAS}
    assert "the edit is missing" in details[V_BIAS]


def test_elements_that_are_rounded_twice(bench: Bench) -> None:
    """As if the update were rounded to bfloat16 before it is added."""
    random = torch.Generator().manual_seed(0)
    base = torch.randn(64, 48, generator=random).bfloat16()
    a, b = torch.randn(4, 48, generator=random), torch.randn(64, 4, generator=random) / 256
    given = [
        bench.write({"a.lin.weight": base}, {}),
        bench.write_adapter(
            {
                "base_model.model.a.lin.lora_A.weight": a,
                "base_model.model.a.lin.lora_B.weight": b,
            },
            peft_type="LORA", r=4, lora_alpha=4,
        ),
    ]  # fmt: skip
    merged = bench.merge(given[0], given[1]).path
    (merged / RECEIPT).unlink()
    twice = (base.float() + (b @ a).bfloat16().float()).bfloat16()
    save_file({"a.lin.weight": twice}, merged / "model.safetensors", {"format": "pt"})

    details = found(infold.verify(given[0], given[1], merged), "edited tensor")

    assert "rounded more than once" in details["a.lin.weight"]


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_values_that_are_not_finite(scene: Scene, value: float) -> None:
    weight = torch.frombuffer(bytearray(scene.bytes_of(Q)), dtype=torch.bfloat16).clone()
    weight[5] = value
    scene.put_tensor(Q, weight)

    assert found(scene.verify(), "edited tensor").keys() == {Q}


def test_a_changed_side_file(scene: Scene) -> None:
    (scene.folder / "tokenizer.json").write_text('{"a": 2}')
    (scene.folder / "more" / "notes.txt").write_text("longer than they were")

    details = found(scene.verify(), "side file")

    assert details.keys() == {"tokenizer.json", "more/notes.txt"}
    assert "from byte 6 on" in details["tokenizer.json"]


def test_a_missing_and_an_extra_file(scene: Scene) -> None:
    (scene.folder / "tokenizer.json").unlink()
    assert found(scene.verify(), "missing file").keys() == {"tokenizer.json"}

    (scene.folder / "tokenizer.json").write_text('{"a": 1}')
    (scene.folder / "more" / "extra.txt").write_text("")
    (scene.folder / "adapter_config.json").write_text("{}")
    os.mkfifo(scene.folder / "pipe")
    (scene.folder / "link").symlink_to("/")
    details = found(scene.verify(), "extra file")
    assert details.keys() == {"more/extra.txt", "adapter_config.json", "pipe", "link"}


def test_a_side_file_that_is_a_link_or_a_pipe(scene: Scene) -> None:
    for name in ("tokenizer.json", "more/notes.txt"):
        (scene.folder / name).unlink()
    (scene.folder / "tokenizer.json").symlink_to(scene.base / "tokenizer.json")
    os.mkfifo(scene.folder / "more" / "notes.txt")

    details = found(scene.verify(), "unreadable file")

    assert details.keys() == {"tokenizer.json", "more/notes.txt"}


def test_a_missing_tensor(scene: Scene) -> None:
    scene.resave(lambda tensors: tensors.pop(Q))

    assert found(scene.verify(), "missing tensor").keys() == {Q}


def test_an_extra_tensor(scene: Scene) -> None:
    scene.resave(lambda tensors: tensors.update(stowaway=torch.zeros(3)))

    assert found(scene.verify(), "extra tensor").keys() == {"stowaway"}


def test_another_dtype_or_shape(scene: Scene) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[Q] = tensors[Q].half()

    scene.resave(change)
    assert "F16 [32, 32], not BF16" in found(scene.verify(), "dtype or shape")[Q]


def test_other_metadata(scene: Scene) -> None:
    scene.resave(lambda tensors: None, note="changed")

    assert list(found(scene.verify(), "metadata")) == [scene.shard_of(Q).name]


@pytest.mark.parametrize("damage", ["missing", "truncated", "noise", "empty", "folder", "huge"])
def test_a_damaged_shard(scene: Scene, damage: str) -> None:
    path = scene.shard_of(Q)
    raw = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes(
            {
                "truncated": raw[:-1],
                "noise": bytes(range(256)) * 4,
                "empty": b"",
                "huge": b"\xff" * 8 + raw[8:],
            }[damage]
        )

    what = "missing file" if damage == "missing" else "unreadable file"
    assert found(scene.verify(), what).keys() == {path.name}


def test_a_scaling_by_alpha(made: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    config = import_module("infold.plan.config").AdapterConfig
    with monkeypatch.context() as patch:
        patch.setattr(config, "scalings", lambda self, module, rank: [12.0])
        shutil.rmtree(made.folder, ignore_errors=True)
        infold.merge(made.base, made.adapters, made.folder)
    (made.folder / RECEIPT).unlink()

    details = found(made.verify(), "edited tensor")

    assert all(".q_proj.w" in name or "up_proj" in name for name in details)
    assert len(details) == 4
    assert all("scaled by alpha, not alpha / r" in detail for detail in details.values())


def test_an_adapter_tensor_that_no_edit_uses(made: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """What would be if the plan forgot an edit: merge and proof share the plan."""
    real = weights.plan_merge

    def forgetful(*given: Any, **named: Any) -> Any:
        plan = real(*given, **named)
        plan.edits.pop(f"{V_BIAS.removesuffix('bias')}weight")
        return plan

    made.fresh(receipt=False)
    monkeypatch.setattr(weights, "plan_merge", forgetful)
    verdict = made.verify()

    assert [o.where for o in verdict.offenders] == [f"{V_BIAS.removesuffix('bias')}weight"]

    def without(*given: Any, **named: Any) -> Any:
        return _without(real(*given, **named), "up_proj.weight")

    monkeypatch.setattr(weights, "plan_merge", without)
    unused = [o.where for o in made.verify().offenders if o.what == "unused adapter tensor"]
    assert len(unused) == 4
    assert all("up_proj.lora_" in key for key in unused)


def _without(plan: Any, ending: str) -> Any:
    for name in [name for name in plan.edits if name.endswith(ending)]:
        del plan.edits[name]
    return plan


# --- the receipt ----------------------------------------------------------------------------------


def test_the_receipt_names_the_inputs(made: Scene) -> None:
    made.fresh(receipt=True)

    assert infold.verify(None, [], made.folder).ok


def test_a_digest_of_the_output_that_differs(made: Scene) -> None:
    made.fresh(receipt=True)
    receipt = json.loads((made.folder / RECEIPT).read_text())
    name = next(iter(receipt["shards"]))
    receipt["shards"][name] = "0" * 64
    receipt["shards"]["more.safetensors"] = "0" * 64
    (made.folder / RECEIPT).write_text(json.dumps(receipt))

    verdict = made.verify()

    assert [(o.what, o.where) for o in verdict.offenders] == [
        ("digest", name),
        ("digest", "more.safetensors"),
    ]


@pytest.mark.parametrize("what", ["base", "adapter"])
def test_an_input_that_changed_since(made: Scene, what: str, tmp_path: Path) -> None:
    given = [shutil.copytree(path, tmp_path / path.name) for path in (made.base, *made.adapters)]
    infold.merge(given[0], given[1:], tmp_path / "merged")
    assert infold.verify(None, [], tmp_path / "merged").ok
    where = given[0 if what == "base" else 2]
    name = made.shard_of(NORM).name if what == "base" else "adapter_model.safetensors"
    raw = bytearray((where / name).read_bytes())
    raw[-1] ^= 1
    (where / name).write_bytes(raw)

    verdict = infold.verify(None, [], tmp_path / "merged")

    told = {(o.what, o.where) for o in verdict.offenders}
    assert (f"{what} changed", name) in told


def test_a_base_that_does_not_fit_any_more_is_told_with_the_adapter(
    made: Scene, tmp_path: Path
) -> None:
    given = [shutil.copytree(path, tmp_path / path.name) for path in (made.base, *made.adapters)]
    infold.merge(given[0], given[1:], tmp_path / "merged")
    config = given[1] / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": 4', '"r": 5'))

    with pytest.raises(Refusal, match=r"adapter_config\.json: changed since the merge"):
        infold.verify(None, [], tmp_path / "merged")


def test_inputs_that_are_not_there(made: Scene, tmp_path: Path) -> None:
    made.fresh(receipt=True)
    receipt = json.loads((made.folder / RECEIPT).read_text())
    receipt["base"]["path"] = str(tmp_path / "gone")
    (made.folder / RECEIPT).write_text(json.dumps(receipt))
    with pytest.raises(Refusal, match="gone: the receipt names it, and it is not there any more"):
        infold.verify(None, [], made.folder)

    (made.folder / RECEIPT).unlink()
    with pytest.raises(Refusal, match="give base and adapters"):
        infold.verify(None, [], made.folder)
    with pytest.raises(Refusal, match=r"is neither a folder nor a \.gguf file"):
        infold.verify(made.base, made.adapters, tmp_path / "nowhere")
    with pytest.raises(Refusal, match="without a base"):
        infold.verify(None, made.adapters, made.folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"base": 3}', '{"base": {"path": 1}}', "\xff"])
def test_a_receipt_that_makes_no_sense(made: Scene, text: str) -> None:
    made.fresh(receipt=True)
    (made.folder / RECEIPT).write_bytes(text.encode("latin-1"))

    assert [o.what for o in made.verify().offenders] == ["receipt"]
    with pytest.raises(CorruptFile):
        infold.verify(None, [], made.folder)


def test_progress_counts_every_byte_and_threads_are_restored(made: Scene) -> None:
    made.fresh(receipt=True)
    told: list[tuple[int, int]] = []
    before = torch.get_num_threads()

    infold.verify(made.base, made.adapters, made.folder, progress=lambda *now: told.append(now))

    total = sum(file.stat().st_size for file in made.folder.glob("*.safetensors"))
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1] == (total, total)
    assert torch.get_num_threads() == before


# --- the arithmetic -------------------------------------------------------------------------------


def nearest(value: Fraction, precision: int, lowest: int) -> Fraction:
    """Round to nearest, ties to even, by rational arithmetic."""
    if not value:
        return value
    exponent = math.frexp(float(value))[1] - 1
    while abs(value) < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** (max(exponent, lowest) - precision + 1)
    return round(value / unit) * unit


@pytest.mark.parametrize("dtype", LINES)
def test_rounding_against_rational_arithmetic(dtype: str) -> None:
    line = LINES[dtype]
    generator = torch.Generator().manual_seed(0)
    scale = torch.randint(line.lowest - 30, line.lowest + 25, (400,), generator=generator)
    scale = scale.clamp(min=-1000, max=5 if dtype == "F8_E4M3" else None)
    values = torch.randn(400, generator=generator, dtype=torch.float64) * 2.0 ** scale.double()
    kept = torch.randn(400, generator=generator).to(line.dtype).double()
    halves = kept * (1 + 2.0**-line.precision)  # of powers of two exactly in the middle
    tiny = torch.tensor([0.0, 1.0, 1.5, 0.5, 0.75, 2.5]).double()
    tiny = tiny * 2.0 ** (line.lowest - line.precision + 1)

    for value, place in zip(
        (every := torch.cat([values, kept, halves, tiny, -tiny])).tolist(),
        line.rounded(every).tolist(),
        strict=True,
    ):
        wanted = nearest(Fraction(value), line.precision, line.lowest)
        assert Fraction(line.number(place)) == wanted, value


def test_places_are_in_order_and_neighbours_differ_by_one() -> None:
    for dtype in ("BF16", "F16"):
        line = LINES[dtype]
        every = (
            torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(line.dtype)
        )
        every = every[every.isfinite()]
        places = line.stored(every)
        order = places.argsort()

        assert torch.equal(places[order].diff(), torch.ones(len(every) - 1, dtype=torch.int64))
        assert (every[order].double().diff() >= 0).all()
        assert torch.equal(line.rounded(every.double()), places)
        assert line.finite(places).all()
    infinite = torch.tensor([math.inf, -math.inf, math.nan, 1e300], dtype=torch.float64)
    assert not LINES["BF16"].finite(LINES["BF16"].rounded(infinite)).any()


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_the_checker_takes_as_many_slices_as_the_merge(dtype: str) -> None:
    """It states the rule anew; were the two apart, a right merge would fail the proof, or the one
    element in 10,000 that they are apart at would hide among updates that none of the tests has."""
    for rank in range(1, 1030):
        mine = LowRank(torch.ones(rank, 2), torch.ones(2, rank), 1.0, dtype)
        assert mine.slices == slices_for(dtype, rank), rank


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("rank", [1, 5, 16, 17, 200])
def test_the_contract_lies_within_the_bound_and_single_elements_follow_it(
    dtype: str, rank: int
) -> None:
    generator = torch.Generator().manual_seed(rank)
    random = {"generator": generator, "dtype": torch.float64}
    weight = torch.randn(64, 300, **random)
    # rows and columns of very different sizes, some of nothing but zeros
    a = torch.randn(rank, 300, **random) * 10.0 ** torch.randint(-6, 3, (300,), generator=generator)
    b = torch.randn(64, rank, **random) * 10.0 ** torch.randint(-6, 3, (64, 1), generator=generator)
    b[3], a[:, 7] = 0, 0
    mine = LowRank(a, b, 1.7, dtype, 1, None)
    settings = Settings(scaling=1.7, slices=mine.slices)
    theirs = merge("lora", weight, None, {"lora_A": a, "lora_B": b}, settings).weight

    values = Values(weight.clone())
    mine.estimate(values, slice(0, 64), slice(0, 300))
    assert values.error is not None
    bound = values.error + values.relative * values.x.abs()
    assert ((values.x - theirs).abs() <= bound).all()

    tile = Values(weight.clone())
    mine.contract(tile, slice(0, 64), slice(0, 300))
    assert torch.equal(tile.x, theirs)
    assert tile.exact

    i, j = torch.arange(64).repeat_interleave(300), torch.arange(300).repeat(64)
    single = Values(weight.flatten())
    mine.settle(single, i, j)
    assert torch.equal(single.x, theirs.flatten())
    assert single.exact


def test_what_went_wrong_is_looked_for_in_a_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where all is wrong, every pair of tensors is tried: with whole ones that took minutes."""
    shapes = {f"layers.{n}.q": (1024, 64) for n in range(8)}
    given = {f"{name}.weight": torch.randn(*shape) for name, shape in shapes.items()}
    base = handmade.base_folder(tmp_path / "base", given)
    one, other = (handmade.lora(tmp_path / str(n), shapes, seed=n) for n in range(2))
    infold.merge(base, one, tmp_path / "out")
    sizes: list[int] = []
    check = EditCheck.check

    def noted(self: Any, merged: memoryview, *rest: Any) -> None:
        sizes.append(len(merged))
        check(self, merged, *rest)

    monkeypatch.setattr(EditCheck, "check", noted)
    verdict = infold.verify(base, other, tmp_path / "out")

    assert not verdict.ok
    whole = [size for size in sizes if size >= 1024 * 64 * 4]
    assert len(whole) == 8 and len(sizes) > 8 + 8 * 7
    assert all(size <= 4 * (1 << 12) for size in sizes if size not in whole)
