"""A GGUF base by the modules that it was converted from: names, row orders, what is fused.

llama.cpp's converters rename every tensor, and for some architectures they put rows in another
order. What an adapter knows is the module's path in transformers. The tables below tell, for each
architecture, both; one that is not in them is refused by name, for a wrong order is not an error
that anything else would notice. Source: the converters of llama.cpp and the `gguf` package.

    rotary   rows of queries and keys, [heads, 2, half] in transformers, are [heads, half, 2] here:
             that is how llama.cpp's "normal" rotary embedding pairs them. Keys go by the number of
             their own heads. Values, and all other architectures, keep their order.
    fused    rows of query_key_value, [heads, 3, size] in transformers, are [3, heads, size] here.

Rows do not cross blocks, so a row's floats lie together, whatever the type.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from infold.adapters import Settings
from infold.checkpoint.shards import Checkpoint
from infold.errors import CorruptFile, Refusal
from infold.formats import floats_of
from infold.plan.fold import INSTEAD, Part, Place, Unfoldable
from infold.plan.match import Names

__all__ = ["ARCHITECTURES", "GgufModules", "Home"]

_ATTENTION = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
}  # fmt: skip
_GATED = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
_EXPERTS = {
    "mlp.experts.{}.gate_proj": "ffn_gate_exps", "mlp.experts.{}.up_proj": "ffn_up_exps",
    "mlp.experts.{}.down_proj": "ffn_down_exps",
}  # fmt: skip
_MIXTRAL = {
    "block_sparse_moe.experts.{}.w1": "ffn_gate_exps",
    "block_sparse_moe.experts.{}.w3": "ffn_up_exps",
    "block_sparse_moe.experts.{}.w2": "ffn_down_exps",
}
_PHI3 = {
    "self_attn.qkv_proj": "attn_qkv", "self_attn.o_proj": "attn_output",
    "mlp.gate_up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
_GPT2 = {
    "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
}  # fmt: skip
_FOUR = {"mlp.dense_h_to_4h": "ffn_up", "mlp.dense_4h_to_h": "ffn_down"}
_BLOOM = {
    "self_attention.query_key_value": "attn_qkv", "self_attention.dense": "attn_output", **_FOUR
}  # fmt: skip
_NEOX = {"attention.query_key_value": "attn_qkv", "attention.dense": "attn_output", **_FOUR}


@dataclass(frozen=True)
class _Architecture:
    """How one architecture's modules are called. `{}` stands for the number of an expert."""

    names: dict[str, str]  # below a layer, in transformers -> in GGUF
    layers: str = "model.layers."
    outside: dict[str, str] = field(
        default_factory=lambda: {"model.embed_tokens": "token_embd", "lm_head": "output"}
    )
    rotary: bool = False
    fused: bool = False
    activation: str = ""  # that llama.cpp computes between up and down, where there is no gate


def _others(embedding: str, head: str = "lm_head") -> dict[str, str]:
    return {embedding: "token_embd", head: "output"}


ARCHITECTURES: dict[str, _Architecture] = {
    "llama": _Architecture({**_ATTENTION, **_GATED, **_MIXTRAL}, rotary=True),  # Mistral, Mixtral
    "qwen2": _Architecture({**_ATTENTION, **_GATED}),
    "qwen3": _Architecture({**_ATTENTION, **_GATED}),
    "qwen3moe": _Architecture({**_ATTENTION, **_EXPERTS}),
    "gemma": _Architecture({**_ATTENTION, **_GATED}),
    "gemma2": _Architecture({**_ATTENTION, **_GATED}),
    "gemma3": _Architecture({**_ATTENTION, **_GATED}),
    "phi3": _Architecture(_PHI3),
    "gpt2": _Architecture(
        _GPT2, "transformer.h.", _others("transformer.wte"), activation="gelu_new"
    ),
    "gptneox": _Architecture(
        _NEOX, "gpt_neox.layers.", _others("gpt_neox.embed_in", "embed_out"), fused=True,
        activation="gelu",
    ),
    "bloom": _Architecture(
        _BLOOM, "transformer.h.", _others("transformer.word_embeddings"), fused=True,
        activation="gelu",
    ),
    "falcon": _Architecture(
        _BLOOM, "transformer.h.", _others("transformer.word_embeddings"), fused=True,
        activation="gelu",
    ),
}  # fmt: skip
_MODEL_TYPES = {"gemma3": "gemma3_text", "qwen3moe": "qwen3_moe"}  # where the names differ
_MOST_EXPERTS = 1 << 18  # weights of experts, in all; of the largest models it is a third
_BLOCK = re.compile(r"blk\.(\d{1,5})\.(\w+)\.weight")
# Tensors of a block that have no part in what goes from one projection to the next.
_APART = frozenset(
    "attn_norm attn_norm_2 ffn_norm post_attention_norm post_ffw_norm attn_q_norm attn_k_norm "
    "ffn_gate_inp attn_rot_embd".split()
)


@dataclass(frozen=True)
class Home:
    """Where a module's weight lies: a tensor, or one of the experts in it."""

    weight: str
    name: str  # of the tensor within its block, as the tables spell it
    layer: int
    expert: int | None = None

    @property
    def bias(self) -> str:
        return self.weight.removesuffix("weight") + "bias"

    @property
    def scale(self) -> str:
        """A factor of its outputs, which llama.cpp applies where it is there, before the bias."""
        return self.weight.removesuffix("weight") + "scale"


class GgufModules:
    """What `plan/fold.py` asks of a base, answered from a GGUF file's names and metadata.

    Raises Refusal for an architecture that is not in the tables, CorruptFile for more experts than
    any model has.
    """

    def __init__(self, base: Checkpoint) -> None:
        self.base = base
        self.metadata = base.shards[0].header.metadata
        kind = self.metadata.get("general.architecture")
        if not isinstance(kind, str) or kind not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise Refusal(
                f"{base.path}: general.architecture = {kind!r}; infold does not know how llama.cpp "
                f"names and orders its rows, only those of {known}. Merge into the safetensors "
                "checkpoint instead, and convert the result"
            )
        self.kind, self.table = kind, ARCHITECTURES[kind]
        self.homes: Mapping[str, Home] = dict(self._homes())
        self.names = Names(f"{module}.weight" for module in self.homes)

    def _homes(self) -> Iterator[tuple[str, Home]]:
        below = {gguf: ours for ours, gguf in self.table.names.items()}
        experts = 0
        for module, name in self.table.outside.items():
            if f"{name}.weight" in self.base.where:
                yield module, Home(f"{name}.weight", name, -1)
        for tensor in self.base.where:
            found = _BLOCK.fullmatch(tensor)
            if found is None or found[2] not in below:
                continue
            layer, module = int(found[1]), below[found[2]]
            path = f"{self.table.layers}{layer}.{module}"
            if "{}" not in path:
                yield path, Home(tensor, found[2], layer)
                continue
            shape = self.base.info(tensor).shape
            count = shape[0] if len(shape) == 3 and all(shape) else 0  # an empty one takes no data
            experts += count
            if experts > _MOST_EXPERTS:
                raise CorruptFile(f"{self.base.path}: has more than {_MOST_EXPERTS:,} experts")
            for expert in range(count):
                yield path.format(expert), Home(tensor, found[2], layer, expert)

    def find(self, module: str) -> str | None:
        """The module's path as the tables spell it, from that in an adapter.

        None when nothing fits; raises LookupError with a sentence when more than one does.
        """
        found = self.names.find(f"{module}.weight")
        return None if found is None else found.removesuffix(".weight")

    # --- the protocol

    def beside(self, module: str) -> Collection[str]:
        home, parent = self.homes[module], module.rpartition(".")[0]
        found = {m[len(parent) + 1 :].partition(".")[0] for m in self.homes if _below(m, parent)}
        if home.layer >= 0 and home.expert is None:
            kin = home.name.partition("_")[0] + "_"  # attn_ or ffn_
            start = f"blk.{home.layer}.{kin}"
            known = {*self.table.names.values(), *_APART}
            for tensor in self.base.where:
                if tensor.startswith(start):
                    name = tensor.split(".")[2]
                    found |= set() if name in known else {name}
        return found

    def size(self, module: str) -> tuple[int, int] | None:
        home = self.homes.get(module)
        if home is None:
            return None
        shape = self.base.info(home.weight).shape
        wanted = 2 if home.expert is None else 3
        return (shape[-2], shape[-1]) if len(shape) == wanted else None

    def places(self, module: str, part: Part | None) -> list[Place]:
        home, size = self.homes[module], self.size(module)
        info = self.base.info(home.weight)
        floats = floats_of(info.dtype, info.shape)
        if size is None:
            raise Unfoldable(f"{module} ({home.weight}): shape {list(info.shape)}")
        if floats is None:
            raise Unfoldable(
                f"{module} ({home.weight}, {info.dtype}): the scales of this type are no floats "
                f"that a factor could go into{INSTEAD}"
            )
        settings = self.order(module)
        if part is not None and settings.order:
            raise Unfoldable(f"{module}: a part of its rows, which GGUF has in another order")
        first, rows = (part.first, size[0]) if part is not None else (0, 0)
        if home.expert is not None:
            first, rows = home.expert * size[0] + first, info.shape[0] * size[0]
        settings = Settings(
            view=settings.view, order=settings.order, first=first, rows=rows, repeat=floats.per_row
        )
        own = Settings(view=settings.view, order=settings.order, first=first, rows=rows)
        if home.expert is not None and floats.packing is None:  # an expert is a row of its matrix
            settings = replace(settings, out=size[0], width=size[1])
        places = [Place(home.weight, settings)]
        if home.bias in self.base.where:
            if self.base.info(home.bias).shape != ((rows or size[0]),):
                shape = list(self.base.info(home.bias).shape)
                raise Unfoldable(f"{module}, whose bias {home.bias} has the shape {shape}")
            places.append(Place(home.bias, own, on_bias=True))
        return places

    def activations(self, module: str) -> Collection[str]:
        return {self.table.activation} if self.table.activation else set()

    def limits(self) -> Collection[str]:
        return {key for key, value in self.metadata.items() if "clamp" in key and value}

    def model_types(self, module: str) -> Collection[str]:
        return {_MODEL_TYPES.get(self.kind, self.kind)}

    # --- orders

    def order(self, module: str) -> Settings:
        """The order of a module's rows, as `view` and `order` of the settings.

        Raises Unfoldable where the file does not tell it.
        """
        home, size = self.homes[module], self.size(module)
        rows = size[0] if size else 0
        if self.table.rotary and home.name in ("attn_q", "attn_k"):
            heads = self._heads(home.layer, keys=home.name == "attn_k")
            if not heads or rows % (2 * heads):
                raise Unfoldable(f"{module}: {rows} rows are not {heads} heads of an even size")
            return Settings(view=(heads, 2, rows // heads // 2), order=(0, 2, 1))
        if self.table.fused and home.name == "attn_qkv":
            heads, groups = self._heads(home.layer), self._heads(home.layer, keys=True)
            if groups == 1 != heads:  # Falcon: all queries, then the one key and the one value
                return Settings()
            if not heads or groups != heads or rows % (3 * heads):
                raise Unfoldable(
                    f"{module}: {rows} rows of {heads} heads with {groups} keys, whose order here "
                    "is not known to infold"
                )
            return Settings(view=(heads, 3, rows // heads // 3), order=(1, 0, 2))
        return Settings()

    def _heads(self, layer: int, keys: bool = False) -> int:
        """The heads of a layer; 0 where the file does not tell."""
        told = self._told("head_count", layer)
        if keys:
            told = self._told("head_count_kv", layer) or told
        return told

    def _told(self, name: str, layer: int) -> int:
        value: Any = self.metadata.get(f"{self.kind}.attention.{name}", 0)
        if isinstance(value, tuple):  # by layer
            value = value[layer] if 0 <= layer < len(value) else 0
        return value if type(value) is int and value > 0 else 0


def _below(module: str, parent: str) -> bool:
    return module.startswith(parent + ".")
