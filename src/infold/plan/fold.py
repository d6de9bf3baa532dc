"""Where an IA³ vector goes in a quantized base: from (module, side, vector) to stored rows.

Output side. y = l * (W x + b): the vector scales whole rows. Where every scale of a format belongs
to one row, l goes into the scales and the bias, and no code changes. (The idea's ancestors: PEQA,
arXiv 2305.14152, trains nothing but such scales; T-Few trains IA³ on the outputs of `wi_1`.)

Input side. y = W (l * x) + b: the vector scales columns, which share their scales. But it can move
to the rows of the module that makes x, and to that one's bias:

    gated feed-forward   x = act(gate(h)) * up(h)           l into up, whatever act is
    ReLU                 x = relu(up(h))                    l into up, where l >= 0
    squared ReLU         x = relu(up(h))²                   sqrt(l) into up, where l >= 0
    attention            x = sum of softmax(...) * v(h)     l into v, where each head has its own v

The partner is found by the names beside the module, the activation is what the config tells. What
stands between the two must be known, so an unknown module beside them is a reason to refuse. Only
the last of these asks for the model's type: some attentions norm their values without a weight that
would lie beside them (Gemma 4, Gemma 3n), or subtract two of them.

This knows no container. What it needs of a base is the protocol `Modules`: `plan/quantized.py` is
that of safetensors; one of GGUF answers from its own tensor names and metadata. Modules go by their
paths in memory, as adapters spell them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from infold.adapters import Settings

__all__ = ["INSTEAD", "PLAIN_VALUES", "Modules", "Part", "Place", "Unfoldable", "fold"]


class Unfoldable(ValueError):
    """A vector has no place in the base's scales. Tells why, and what else can be done."""


@dataclass(frozen=True)
class Part:
    """Rows first, first + 1, ... first + count - 1 of a module's outputs."""

    first: int
    count: int


@dataclass(frozen=True)
class Place:
    """A stored tensor, rows of which the vector multiplies: scales, dense weights, or a bias.

    settings: side "out" and the row map from the vector to the stored rows. transposed: those rows
    are the columns of the tensor's matrix. on_bias: for messages and receipts; a bias is scaled as
    any tensor is. scales: its floats are scales of a quantized weight. nested: they are quantized
    themselves now. lossy: they have four bits, and no sign.
    """

    tensor: str
    settings: Settings
    transposed: bool = False
    on_bias: bool = False
    scales: bool = False
    nested: bool = False
    lossy: bool = False


class Modules(Protocol):
    """A base by its modules, in whatever container."""

    def beside(self, module: str) -> Collection[str]:
        """The names, below the module's parent, of all that holds tensors there: of modules, and of
        what holds modules. `down_proj` of `model.layers.0.mlp.down_proj` is among them. A container
        that renames tensors lists those of `KNOWN_NAMES` that it has under another name."""

    def size(self, module: str) -> tuple[int, int] | None:
        """(outputs, inputs) of a module with a matrix, None where the base has no such module."""

    def places(self, module: str, part: Part | None) -> list[Place]:
        """All that has to be multiplied so that the module's outputs are, or a part of them; their
        bias included. The row map goes from a vector with an element for each of these outputs.

        Raises Unfoldable where such rows cannot be scaled, with a sentence that begins with the
        module: "... (GPTQ, 4 bits): why".
        """

    def activations(self, module: str) -> Collection[str]:
        """What the config calls the activation of feed-forward layers, of the part of the model
        that a module is in: several where it has several fields, empty where it tells none."""

    def limits(self) -> Collection[str]:
        """Fields of the config that are set and clamp values inside of layers."""

    def model_types(self, module: str) -> Collection[str]:
        """What transformers calls the part of the model that a module is in, and each part of that
        one that has a config."""


# A projection back to the hidden size -> (gate, up) beside it, or (fused,): gate first, then up.
_GATED: dict[str, tuple[tuple[str, ...], ...]] = {
    "down_proj": (("gate_proj", "up_proj"), ("gate_up_proj",)),
    "w2": (("w1", "w3"),),
    "wo": (("wi_0", "wi_1"),),
    "Wo": (("Wi",),),
    "c_proj": (("c_fc_0", "c_fc_1"),),
}
_PLAIN = {
    "down_proj": "up_proj",
    "wo": "wi",
    "fc2": "fc1",
    "c_proj": "c_fc",
    "dense_4h_to_h": "dense_h_to_4h",
    "fc_out": "fc_in",
    "lin2": "lin1",
}
_VALUES = {"o_proj": "v_proj", "out_proj": "v_proj", "dense": "v_proj", "o": "v"}
# Models whose attention makes its output projection's inputs by a product with the values alone,
# by transformers' forward; a test tries it on a small model of each.
PLAIN_VALUES = frozenset(
    # decoders
    "llama mistral mixtral ministral ministral3 qwen2 qwen3 qwen2_moe qwen3_moe qwen3_vl_text "
    "gemma gemma2 gemma3_text vaultgemma cohere cohere2 granite granitemoe olmo olmo2 olmo3 olmoe "
    "smollm3 stablelm starcoder2 nemotron phi phimoe glm glm4 ernie4_5 exaone4 seed_oss arcee "
    "llama4_text helium apertus opt gptj gpt_neo biogpt "
    # encoders with decoders
    "bart mbart marian pegasus plbart mvp blenderbot blenderbot-small m2m_100 nllb-moe whisper t5 "
    "mt5 umt5 longt5 switch_transformers "
    # encoders, of text, images and sound
    "bert roberta xlm-roberta xlm-roberta-xl roberta-prelayernorm camembert electra ernie esm "
    "mpnet rembert megatron-bert bert-generation data2vec-text layoutlm clip_text_model "
    "clip_vision_model siglip_text_model siglip_vision_model wav2vec2 hubert".split()
)
KNOWN_NAMES = frozenset(
    [*_PLAIN, *_PLAIN.values(), *_VALUES, *_VALUES.values()]
    + [name for down, ways in _GATED.items() for way in ways for name in (down, *way)]
)
# What may stand beside them without a part in what goes from one to the other.
_APART = frozenset(
    "self_attn self_attn_layer_norm encoder_attn encoder_attn_layer_norm final_layer_norm "
    "attention sa_layer_norm output_layer_norm "
    "q_proj k_proj q_norm k_norm q k relative_attention_bias rotary_emb".split()
)
_POWERS = {"relu": 1, "relu2": 2, "relu_squared": 2, "squared_relu": 2}  # relu(a x) = a^p relu(x)
INSTEAD = "; --promote writes this weight unquantized instead"


@dataclass(frozen=True)
class _Maker:
    """What makes a module's inputs. power: of what happens in between, 0 where it is linear."""

    module: str
    part: Part | None = None
    power: int = 0


def fold(base: Modules, module: str, side: str, vector: Callable[[], Tensor]) -> list[Place]:
    """All stored rows that `vector` multiplies, so that the module's outputs are scaled (side
    "out"), or its inputs ("in").

    `vector` reads the values: they are asked for only where their signs matter. Several vectors on
    one row multiply, which is the caller's business; one that has moved acts after everything else
    on its new place.

    Raises Unfoldable, with a sentence for the user, who is told the module beside it.
    """
    size = base.size(module)
    if size is None:
        raise Unfoldable("there is no such module in the base")
    if side == "out":
        return base.places(module, None)
    maker = _maker(base, module, size[1])
    if maker.power and bool((vector() < 0).any()):
        raise Unfoldable(
            f"the vector has negative elements, and ReLU stands between {maker.module} and this "
            f"module{INSTEAD}"
        )
    try:
        places = base.places(maker.module, maker.part)
    except Unfoldable as error:
        raise Unfoldable(f"its vector belongs to the rows of {error}") from None
    if maker.power < 2:
        return places
    return [replace(p, settings=replace(p.settings, root=maker.power)) for p in places]


def _maker(base: Modules, module: str, count: int) -> _Maker:
    """What makes the inputs of a module, of which there are `count`."""
    path, _, name = module.rpartition(".")
    prefix = f"{path}." if path else ""
    beside = set(base.beside(module))
    for names in _GATED.get(name, ()):
        if beside.issuperset(names):
            _refuse_between(base, beside - {name, *names})
            maker = prefix + names[-1]
            fused = len(names) == 1
            _check_size(base, maker, 2 * count if fused else count)
            return _Maker(maker, Part(count, count) if fused else None)
    if (up := _PLAIN.get(name)) in beside:
        _refuse_between(base, beside - {name, up})
        _check_size(base, prefix + up, count)
        return _Maker(prefix + up, power=_power(base, prefix + up))
    if (value := _VALUES.get(name)) in beside:
        _refuse_between(base, beside - {name, value})
        return _values(base, prefix + value, count)
    above = path.removesuffix("output")  # BERT and its kin
    if name == "dense" and path != above:
        value, up = f"{above}self.value", f"{above}intermediate.dense"
        if base.size(value) is not None:
            return _values(base, value, count)
        if base.size(up) is not None:
            _check_size(base, up, count)
            return _Maker(up, power=_power(base, up))
    raise Unfoldable(
        f"which module makes its inputs is not known, so its vector cannot be moved there{INSTEAD}"
    )


def _refuse_between(base: Modules, strangers: set[str]) -> None:
    """Refuse where something may stand between the module and the maker of its inputs."""
    if limits := sorted(base.limits()):
        raise Unfoldable(
            f"the config's {', '.join(limits)} clamps values, maybe those between this "
            f"module and the maker of its inputs{INSTEAD}"
        )
    if strangers := strangers - _APART:
        raise Unfoldable(
            f"{', '.join(sorted(strangers))} beside it may change its inputs, so its "
            f"vector cannot be moved before that{INSTEAD}"
        )


def _check_size(base: Modules, maker: str, outputs: int) -> None:
    size = base.size(maker)
    if size is None or size[0] != outputs:
        found = "no matrix" if size is None else f"{size[0]} outputs"
        raise Unfoldable(
            f"its inputs should come from {maker}, which has {found}, not {outputs}{INSTEAD}"
        )


def _power(base: Modules, maker: str) -> int:
    """1 for ReLU, 2 for its square."""
    kinds = set(base.activations(maker))
    if len(kinds) == 1 and kinds <= _POWERS.keys():
        return _POWERS[kinds.pop()]
    told = " or ".join(sorted(kinds)) or "an activation that the config does not tell"
    raise Unfoldable(
        f"{told} stands between {maker} and this module without a gate, so its vector has no place "
        f"in scales{INSTEAD}"
    )


def _values(base: Modules, value: str, count: int) -> _Maker:
    """The values of an attention, where each head has its own."""
    kinds = set(base.model_types(value))
    unknown = kinds - PLAIN_VALUES
    if unknown or not kinds:
        told = f"of {', '.join(sorted(unknown))} " if unknown else ""
        raise Unfoldable(
            f"what the attention {told}does with the rows of {value} is not known here (maybe a "
            f"norm without a weight), so its vector cannot be moved there{INSTEAD}"
        )
    if limits := sorted(base.limits()):
        raise Unfoldable(f"the config's {', '.join(limits)} clamps values{INSTEAD}")
    size = base.size(value)
    if size is None or size[0] != count:
        raise Unfoldable(
            f"several of its inputs share a row of {value} (grouped heads), so its "
            f"vector cannot be moved there{INSTEAD}"
        )
    return _Maker(value)
