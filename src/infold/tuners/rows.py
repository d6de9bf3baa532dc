"""An adapter for each row of a batch: which row of a layer's activations is whose.

Most layers see the batch first, and its rows in order: (rows, ...), or (rows * tokens, ...). Where
they see something else, no count of theirs tells so for certain, and rows would get the adapters of
others. Such layers are known by their place in the model, and are refused before it runs; what is
not known is refused when the number of its rows fits neither the batch nor its tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from infold.errors import Refusal
from infold.tuners.config import HEADS

__all__ = ["Rows", "in_order", "in_pieces", "mingling", "refuse", "repeats"]

WAY = "call the model once for each adapter, or leave this out of the adapters"


@dataclass
class Rows:
    """Which adapter each row of the running batch uses; shared by all layers of a model.

    names: the adapters in use. index: for each row a place in `names`, or len(names): the base.
    counts: the numbers of rows that whole rows of the batch can be in a layer. pieces: paths of the
    layers where they can be any multiple. kept: what layers made of all that without gradients, for
    the rest of this forward or generate: no later one sees it, so it cannot be out of date.
    """

    names: tuple[str, ...] = ()
    index: Tensor | None = None
    counts: frozenset[int] = frozenset()
    pieces: frozenset[str] = frozenset()
    kept: dict[Any, Any] = field(default_factory=dict)

    @contextmanager
    def chosen(
        self, names: Sequence[str], base: str, inputs: Iterable[Any], times: int = 1
    ) -> Iterator[None]:
        """While this lasts, row i of the batch uses the adapter names[i], or none if it is `base`.

        inputs: the arguments of the call. times: how often it may repeat each row in place.
        """
        used = tuple(dict.fromkeys(name for name in names if name != base))
        places = {name: number for number, name in enumerate(used)} | {base: len(used)}
        was = (self.names, self.index, self.counts, self.kept)
        self.names, self.index = used, torch.tensor([places[name] for name in names])
        counts = _counts(len(names), inputs)
        self.counts, self.kept = counts | {times * count for count in counts}, {}
        try:
            yield
        finally:
            self.names, self.index, self.counts, self.kept = was

    @contextmanager
    def one_of_many(self, inputs: Iterable[Any]) -> Iterator[None]:
        """One of the calls that generate makes, with inputs of its own."""
        assert self.index is not None
        was = self.counts
        self.counts = _counts(len(self.index), inputs)
        try:
            yield
        finally:
            self.counts = was

    def spread(self, count: int, device: torch.device, path: str) -> Tensor:
        """The index for `count` rows of activations of the module at `path`: beams and tokens
        repeat a row in place."""
        assert self.index is not None
        if self.index.device != device:
            self.index = self.index.to(device)
        if count == len(self.index):
            return self.index
        if (self.index == self.index[0]).all():
            return self.index[:1].expand(count)
        if count not in self.counts and (path not in self.pieces or count % len(self.index)):
            raise Refusal(
                f"adapter_names: {path} sees {count} rows where the batch has {len(self.index)}, "
                f"and nothing tells which is whose; {WAY}"
            )
        return self.index.repeat_interleave(count // len(self.index))


# Arguments whose first dimension is the batch, the first of which tells how often beams repeat it.
_BATCHES = (
    "input_ids", "inputs_embeds", "decoder_input_ids", "pixel_values", "input_features",
    "input_values",
)  # fmt: skip


def _counts(batch: int, inputs: Iterable[Any]) -> frozenset[int]:
    """The numbers of rows that whole rows of a batch can be: those of each tensor among the inputs
    which has them all, and the tokens in it. The tensors that tell most come first in `inputs`."""
    tensors = [own for own in inputs if isinstance(own, Tensor) and own.dim()]
    rows = next((len(own) for own in tensors if len(own) and not len(own) % batch), batch)
    found = {batch, rows}
    for own in tensors:
        if len(own) == rows:
            # floats end in channels, and those of images have no tokens
            depth = own.dim() if not own.is_floating_point() else 1 + (own.dim() == 3)
            found |= {prod(own.shape[:n]) for n in range(1, depth + 1)}
    return frozenset(found)


def in_order(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The arguments of a call, those first that are a batch for certain."""
    known = [kwargs[name] for name in _BATCHES if name in kwargs]
    return [*args, *known, *(own for name, own in kwargs.items() if name not in _BATCHES)]


def repeats(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """How often a call of generate repeats each row: a model that hands its own inputs to another's
    generate (BLIP-2) is not called with the beams itself. Settings come from the arguments, or else
    from the model and those inside of it."""
    configs = [own for own in (*args, *kwargs.values()) if hasattr(own, "num_beams")]
    if not configs:
        configs = [getattr(module, "generation_config", None) for module in model.modules()]
    found = [1]
    for field_name in ("num_beams", "num_return_sequences"):
        given = kwargs.get(field_name)
        known = [given] if given else [getattr(config, field_name, None) for config in configs]
        found += [number for number in known if isinstance(number, int)]
    return max(found)


# --- places where rows are not those of the batch ------------------------------------------------

# Classes whose layers see (tokens, rows, channels).
_TOKENS_FIRST = frozenset(
    "LongformerSelfAttention LEDEncoderSelfAttention FSMTEncoder FSMTDecoder XLNetModel "
    "BrosRelationExtractor BridgeTowerVisionTransformer Mask2FormerMaskedAttentionDecoder "
    "OneFormerTransformerDecoder OneFormerTextTransformer MLCDAttention".split()
)
# Classes that cut each row into windows, patches or frames, which stay beside one another.
_IN_PIECES = frozenset(
    "SwinLayer Swinv2Layer DonutSwinLayer MaskFormerSwinLayer TimesformerModel".split()
)
# Names of tables that tokens are looked up in, beside the input embedding. Others look up positions
# or distances, (tokens,) or (tokens, tokens), where a number of rows says nothing.
_OF_TOKENS = re.compile(r"tok|word|wte|type|segment")
_OTHER_INPUT = re.compile(r"vision|visual|image|video|audio|speech|vit\b|vq|qformer|perceiver")


def mingling(model: nn.Module, paths: Iterable[str]) -> dict[str, str]:
    """Path -> why a module there does not see the rows of the batch, of those where that is so."""
    found = {}
    for path in paths:
        if why := _reason(_chain(model, path)):
            found[path] = why
    return found


def in_pieces(model: nn.Module, paths: Iterable[str]) -> frozenset[str]:
    """The paths of the modules that see a row of the batch as several, one after another."""
    return frozenset(
        path for path in paths if any(_is_one_of(_IN_PIECES, m) for _, m in _chain(model, path))
    )


def _chain(model: nn.Module, path: str) -> list[tuple[str, nn.Module]]:
    """(name, module) of the model, and of each module on the way to a path."""
    chain = [("", model)]
    for name in path.split("."):
        chain.append((name, chain[-1][1].get_submodule(name)))
    return chain


def _is_one_of(names: frozenset[str], module: nn.Module) -> bool:
    return not names.isdisjoint(cls.__name__ for cls in type(module).__mro__)


def refuse(found: Mapping[str, str]) -> None:
    """Raise Refusal for such modules; those that differ in a number are told as one."""
    told = {
        re.sub(r"(?<=\.)\d+(?=\.|$)|(?<=expert_)\d+", "N", path): why for path, why in found.items()
    }
    if told:
        raise Refusal(f"adapter_names: {path} {why}; {WAY}" for path, why in sorted(told.items()))


def _reason(chain: Sequence[tuple[str, nn.Module]]) -> str | None:
    """chain: of `_chain`."""
    for name, module in chain:
        if isinstance(module, nn.ModuleList | nn.ModuleDict) and "expert" in name:
            return "sees the tokens that are routed to it, not rows"
        if _is_one_of(_TOKENS_FIRST, module):
            return "sees tokens in the first dimension, and rows in the second"
        if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
            if not module.self_attn.batch_first:
                return "sees tokens in the first dimension, and rows in the second"
    if isinstance(chain[-1][1], nn.Embedding) and not _has_tokens(chain):
        return "is not known to look up tokens, and positions or distances are those of all rows"
    configs = [getattr(module, "config", None) for _, module in chain]
    for number, config in enumerate(configs):
        fields = getattr(config, "sub_configs", None) or {}
        parts = {name: type(getattr(config, name, None)) for name in fields}
        text = parts.pop("text_config", None)
        others = {kind for name, kind in parts.items() if _OTHER_INPUT.search(name)} - {text}
        inner = {type(own) for own in configs[number + 1 :] if own is not None}
        beside = text not in (None, *inner) and not _is_head(chain[number:])
        if others and (inner & others or beside):
            return "sees images or sounds, of which a row can have several or none"
    return None


def _is_head(chain: Sequence[tuple[str, nn.Module]]) -> bool:
    """chain: as `_reason` has it, from the model whose head it may be."""
    if len(chain) > 1 and chain[1][0] in (*HEADS, "qa_outputs"):
        return True
    return _end(chain[0][1], "get_output_embeddings") is chain[-1][1]


def _has_tokens(chain: Sequence[tuple[str, nn.Module]]) -> bool:
    """Whether an embedding is known to look up tokens; in a model that tells of no input embedding
    nothing is known."""
    ends = [_end(module, "get_input_embeddings") for _, module in chain[:-1]]
    table = chain[-1][1]._parameters.get("weight")
    if not any(isinstance(end, nn.Module) for end in ends):
        return True
    if any(isinstance(end, nn.Module) and end._parameters.get("weight") is table for end in ends):
        return True
    name = next((name for name, _ in reversed(chain) if name and not name.isdigit()), "")
    return _OF_TOKENS.search(name) is not None


def _end(model: nn.Module, get: str) -> Any:
    """What a model tells is its input embedding or its head; get: transformers' method for it."""
    try:
        return getattr(model, get)()
    except (AttributeError, NotImplementedError):
        return None
