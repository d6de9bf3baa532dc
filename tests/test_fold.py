"""IA³ into the scales of quantized weights: row maps, and where a vector goes."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from infold.adapters import METHODS, Settings
from infold.plan.edits import Operation
from infold.plan.fold import Part, Place, Unfoldable, fold
from infold.plan.kinds import limits
from infold.verify.reference import reference_of
from infold.verify.values import Values

MAPS = {
    "plain": Settings(),
    "heads": Settings(view=(2, 2, 3), order=(0, 2, 1)),
    "blocks": Settings(repeat=4),
    "fused": Settings(first=5, rows=40),
    "squares": Settings(root=2),
    "all": Settings(view=(3, 2, 2), order=(2, 0, 1), root=2, first=12, rows=36, repeat=5),
}


def by_hand(vector: list[float], settings: Settings) -> list[float]:
    """The factor of each stored row, one by one."""
    if settings.order:
        grid = torch.tensor(vector, dtype=torch.float64).reshape(settings.view)
        vector = grid.permute(settings.order).reshape(-1).tolist()
    vector = [x ** (1 / settings.root) for x in vector]
    before = [1.0] * settings.first
    after = [1.0] * (max(settings.rows, len(vector)) - settings.first - len(vector))
    return [x for x in [*before, *vector, *after] for _ in range(settings.repeat)]


@pytest.mark.parametrize("name", MAPS)
def test_row_map(name: str) -> None:
    """The merge and the proof give each stored row the same element; the inverse takes it back."""
    settings = MAPS[name]
    vector = torch.rand(12, dtype=torch.float64) + 0.5
    wanted = torch.tensor(by_hand(vector.tolist(), settings), dtype=torch.float64)
    count = len(wanted)
    prepared = METHODS["ia3"].prepare({"ia3_l": vector[:, None]}, settings)
    operation = Operation("ia3", 0, "m", {"ia3_l": "k"}, settings)
    reference = reference_of(operation, {}, {"ia3_l": vector}, "F32")
    everything, columns = slice(None), slice(0, 3)

    found, bias = torch.ones(count, 3, dtype=torch.float64), torch.ones(count, dtype=torch.float64)
    prepared.weight(found, everything, columns)
    prepared.bias(bias, everything)
    some = torch.ones(count - 5, 3, dtype=torch.float64)
    prepared.weight(some, slice(3, count - 2), columns)
    few, which = torch.ones(4, 3, dtype=torch.float64), torch.tensor([count - 1, 0, 7, 7])
    prepared.weight(few, which, columns)
    stated = Values(torch.ones(count - 1, 3, dtype=torch.float64))
    reference.estimate(stated, slice(1, count), columns)
    single = Values(torch.ones(4, dtype=torch.float64))
    reference.settle(single, which, torch.zeros(4, dtype=torch.int64))

    torch.testing.assert_close(bias, wanted, rtol=1e-15, atol=0)
    assert torch.equal(found, bias[:, None].expand(-1, 3))
    assert torch.equal(some, found[3:-2])
    assert torch.equal(few, found[which])
    assert torch.equal(stated.x, found[1:])
    assert torch.equal(single.x, bias[which])
    inverse = prepared.inverse()
    assert inverse is not None
    inverse.weight(found, everything, columns)
    torch.testing.assert_close(found, torch.ones_like(found), rtol=1e-15, atol=0)


def test_row_maps_are_told_and_restored() -> None:
    """A receipt tells a row map only where there is one."""
    ia3 = METHODS["ia3"]
    assert ia3.describe(MAPS["plain"]) == {"side": "out"}
    assert ia3.describe(MAPS["fused"]) == {"side": "out", "first": 5, "rows": 40}
    assert ia3.describe(MAPS["heads"])["view"] == [2, 2, 3]
    assert Settings(**asdict(MAPS["all"])) == MAPS["all"]


@dataclass
class FakeModules:
    """A base of nothing but names and sizes."""

    sizes: dict[str, tuple[int, int]]
    kinds: tuple[str, ...] = ("silu",)
    clamps: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    types: tuple[str, ...] = ("llama",)

    def beside(self, module: str) -> set[str]:
        parent = module.rpartition(".")[0]
        names = [n.removeprefix(f"{parent}.") for n in self.sizes if n.startswith(f"{parent}.")]
        return {name.partition(".")[0] for name in names} | set(self.others)

    def size(self, module: str) -> tuple[int, int] | None:
        return self.sizes.get(module)

    def places(self, module: str, part: Part | None) -> list[Place]:
        first, rows = (part.first, self.sizes[module][0]) if part else (0, 0)
        return [Place(f"{module}.scales", Settings(first=first, rows=rows))]

    def activations(self, module: str) -> tuple[str, ...]:
        return self.kinds

    def limits(self) -> tuple[str, ...]:
        return self.clamps

    def model_types(self, module: str) -> tuple[str, ...]:
        return self.types


GATE = {"m.gate_proj": (96, 64), "m.up_proj": (96, 64), "m.down_proj": (64, 96)}
FUSED = {"m.gate_up_proj": (192, 64), "m.down_proj": (64, 96)}
EXPERT = {f"e.3.w{n}": size for n, size in ((1, (96, 64)), (2, (64, 96)), (3, (96, 64)))}
HEADS = {f"a.{n}_proj": (64, 64) for n in "qkvo"}
PAIR = {"l.fc1": (96, 64), "l.fc2": (64, 96), "l.self_attn.q_proj": (64, 64)}


def moved(base: FakeModules, module: str, vector: float = 1.0) -> Place:
    (place,) = fold(base, module, "in", lambda: torch.tensor([vector]))
    return place


@pytest.mark.parametrize(
    ("sizes", "module", "maker", "settings"),
    [
        (GATE, "m.down_proj", "m.up_proj", Settings()),
        (FUSED, "m.down_proj", "m.gate_up_proj", Settings(first=96, rows=192)),
        (EXPERT, "e.3.w2", "e.3.w3", Settings()),
        ({"m.Wi": (192, 64), "m.Wo": (64, 96)}, "m.Wo", "m.Wi", Settings(first=96, rows=192)),
        (
            {"h.c_fc_0": (96, 64), "h.c_fc_1": (96, 64), "h.c_proj": (64, 96)},
            "h.c_proj", "h.c_fc_1", Settings(),
        ),
    ],
)  # fmt: skip
def test_gated_partners(
    sizes: dict[str, tuple[int, int]], module: str, maker: str, settings: Settings
) -> None:
    """By names alone, whatever the activation, and whatever the signs."""
    for kind in ("silu", "gelu", "relu"):
        place = moved(FakeModules(sizes, (kind,)), module, -1.0)
        assert place == Place(f"{maker}.scales", settings)


def test_values_of_an_attention_that_is_known() -> None:
    """Old checkpoints have `rotary_emb.inv_freq` beside the projections."""
    for others in ((), ("rotary_emb",)):
        place = moved(FakeModules(HEADS, others=others), "a.o_proj", -1.0)
        assert place == Place("a.v_proj.scales", Settings())


def test_powers_of_relu() -> None:
    assert moved(FakeModules(PAIR, ("relu",)), "l.fc2").settings.root == 1
    assert moved(FakeModules(PAIR, ("relu2",)), "l.fc2").settings.root == 2


@pytest.mark.parametrize(
    ("base", "module", "why"),
    [
        (FakeModules(PAIR, ("gelu_new",)), "l.fc2", "gelu_new stands between l.fc1 and this"),
        (FakeModules(PAIR, ("relu", "gelu")), "l.fc2", "gelu or relu stands between"),
        (FakeModules(PAIR, ()), "l.fc2", "an activation that the config does not tell"),
        (FakeModules(PAIR, ("relu",)), "l.fc2", "negative elements"),
        (FakeModules(GATE, clamps=("swiglu_limit",)), "m.down_proj", "swiglu_limit clamps values"),
        (FakeModules(GATE, others=("ffn_sub_norm",)), "m.down_proj", "ffn_sub_norm beside it"),
        (
            FakeModules({**GATE, "m.up_proj": (192, 64)}, ()), "m.down_proj",
            "m.up_proj, which has 192 outputs, not 96",
        ),
        (
            FakeModules({"a.v_proj": (64, 64), "a.o_proj": (64, 64)}, clamps=("clip_qkv",)),
            "a.o_proj", "clip_qkv clamps",
        ),
        (
            FakeModules({"a.v_proj": (64, 64), "a.v_norm": (64, 1), "a.o_proj": (64, 64)}),
            "a.o_proj", "v_norm beside it may change its inputs",
        ),
        (FakeModules(HEADS, types=("gemma4_text",)), "a.o_proj", "attention of gemma4_text does"),
        (FakeModules(HEADS, types=("llama", "clip")), "a.o_proj", "the attention of clip does"),
        (FakeModules(HEADS, types=()), "a.o_proj", "what the attention does .* is not known"),
        (FakeModules({"a.dense": (64, 64)}), "a.dense", "which module makes its inputs is not"),
        (FakeModules({}), "a.down_proj", "there is no such module"),
    ],
)  # fmt: skip
def test_what_cannot_move(base: FakeModules, module: str, why: str) -> None:
    with pytest.raises(Unfoldable, match=why):
        moved(base, module, -1.0)


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"swiglu_limit": 7.0}, {"swiglu_limit"}),
        ({"swiglu_limits": [None, 16.0], "swiglu_limits_shared": [0, None]}, {"swiglu_limits"}),
        ({"text_config": {"swiglu_limits_shared": [0.0, 16]}}, {"swiglu_limits_shared"}),
        ({"thinker_config": {"text_config": {"clip_qkv": 8.0}}}, {"clip_qkv"}),
        ({"attn_config": {"clip_qkv": None, "clamp_kqv": 6.0}}, {"clamp_kqv"}),
        ({"mlp_up_softcap": 25.0}, {"mlp_up_softcap"}),
        ({"model_type": "vl", "text_config": {"model_type": "gpt_oss"}}, {"model_type gpt_oss"}),
        ({"model_type": "step3p5", "swiglu_limits": [None, 0, 0.0]}, set()),
        ({"clip_qkv": None, "final_logit_softcapping": 30.0, "time_step_limit": [0.0, 1.0]}, set()),
        ({"quantization_config": {"clamp": True}}, set()),
        ({"clamp_len": -1, "clamp_min_for_underflow": True}, set()),
    ],
)
def test_limits_that_a_config_tells(config: dict[str, Any], found: set[str]) -> None:
    """A vector that moved across a clamp would be another model, and nothing else notices."""
    assert limits(config) == found


def test_models_that_clamp_by_default_are_known() -> None:
    """Of every config class of transformers, by its source: a field that is missing in config.json
    has the default of its class."""
    models = Path(transformers.__file__).parent / "models"
    seen = set()
    for file in models.glob("*/configuration_*.py"):
        for told in re.split(r"^class ", file.read_text(), flags=re.MULTILINE)[1:]:
            kind = re.search(r'model_type = "(\w+)"', told)
            fields = re.findall(r"^    (\w+): [^=\n]* = ([\d.]+)$", told, flags=re.MULTILINE)
            found = {name: float(value) for name, value in fields if value.strip(".")}
            if kind and limits(found):
                seen.add(kind[1])
    assert len(seen) >= 7
    assert all(limits({"model_type": kind}) for kind in seen), seen
