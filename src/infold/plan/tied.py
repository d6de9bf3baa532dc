"""Input embedding and output head that share one tensor in memory.

An edit of one end only must untie them; equal edits of both ends leave them tied.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack

import torch
from torch import Tensor

from infold.checkpoint.adapter import Adapter
from infold.checkpoint.shards import Checkpoint, read_exactly
from infold.plan.draft import Draft, State
from infold.plan.edits import Operation, Replacement
from infold.plan.layouts import HEADS, INPUT_EMBEDDINGS, is_tied, leaf

__all__ = ["same_ends", "tied_pair", "unsupported_tie"]


_PIECE = 1 << 20  # bytes that are compared at a time

# Where the stack that holds the embedding is mounted, seen from the place of the head.
_BODIES = (
    ("model", "language_model"),
    ("model", "text_model"),
    ("model", "decoder"),
    ("model",),
    ("transformer",),
    ("gpt_neox",),
    ("decoder",),
)


def tied_pair(base: Checkpoint, adapters: Iterable[Adapter]) -> tuple[str, str] | None:
    """(input embedding, head) that share one tensor in memory; the head may be missing on disk.

    A head that is on disk and differs is not tied, whatever the config tells: transformers 5 sees
    it so too. The two are compared only if an adapter may touch them.
    """
    pair = _pair_by_names(base)
    if pair is None or pair[1] not in base.where:
        return pair
    ends = {*INPUT_EMBEDDINGS, *HEADS}
    touched = any(not ends.isdisjoint(key.split(".")) for a in adapters for key in a.tensors)
    return None if touched and not _equal_on_disk(base, *pair) else pair


def _pair_by_names(base: Checkpoint) -> tuple[str, str] | None:
    embeddings = [n for n in base.where if n.endswith(".weight") and leaf(n) in INPUT_EMBEDDINGS]
    if len(embeddings) != 1 or is_tied(base) is False:
        return None
    kinds = _kinds(base)
    if (kinds and not _generates(kinds)) or (base.config or {}).get("is_encoder_decoder"):
        return None
    heads = [n for n in base.where if n.endswith(".weight") and leaf(n) in HEADS]
    if heads:
        if is_tied(base) is None or len(heads) > 1:
            return None  # a head of its own, and no config that ties it
        return embeddings[0], heads[0]
    above = tuple(embeddings[0].split(".")[:-2])
    body = next((body for body in _BODIES if above[-len(body) :] == body), ())
    above = above[: len(above) - len(body)]
    if above and not body:
        return None  # an unknown place: see `unsupported_tie`
    return embeddings[0], ".".join((*above, "lm_head", "weight"))


def _equal_on_disk(base: Checkpoint, one: str, two: str) -> bool:
    """Whether two tensors of the base have the same bytes."""
    infos = base.info(one), base.info(two)
    if (infos[0].dtype, infos[0].shape) != (infos[1].dtype, infos[1].shape):
        return False
    with ExitStack() as files:
        sides = []
        for name, info in zip((one, two), infos, strict=True):
            path = base.shards[base.where[name]].path
            file = files.enter_context(open(path, "rb", buffering=0))
            sides.append((file.fileno(), info.begin, path, bytearray(_PIECE)))
        for offset in range(0, infos[0].nbytes, _PIECE):
            count = min(_PIECE, infos[0].nbytes - offset)
            views = []
            for fd, begin, path, buffer in sides:
                read_exactly(fd, memoryview(buffer)[:count], begin + offset, path)
                views.append(memoryview(buffer)[:count])
            if views[0] != views[1]:
                return False
    return True


def _kinds(base: Checkpoint) -> list[str]:
    kinds = (base.config or {}).get("architectures")
    kinds = kinds if isinstance(kinds, list) else []
    return [kind for kind in kinds if isinstance(kind, str)]


def _generates(kinds: list[str]) -> bool:
    """Whether a class of the model has a language modelling head."""
    words = ("CausalLM", "LMHead", "DoubleHeads", "Conditional")
    return any(word in kind for kind in kinds for word in words)


def unsupported_tie(draft: Draft, adapters: tuple[Adapter, ...]) -> list[str]:
    """Reasons to refuse an edit of an embedding whose other users cannot be untied from it.

    Masked language models tie their decoder, encoder-decoder models several embeddings and often a
    scale of the logits (T5). A classifier made from such a model does not use the tied head.
    """
    kinds = _kinds(draft.base)
    if draft.pair or not is_tied(draft.base):
        return []
    masked = any("MaskedLM" in kind or "PreTraining" in kind for kind in kinds)
    several = (draft.base.config or {}).get("is_encoder_decoder")
    own_head = any(leaf(name) in HEADS for name in draft.base.where)
    if not masked and not several and (own_head or not _generates(kinds)):
        return []
    reasons = []
    for tensor, state in draft.states.items():
        if leaf(tensor) not in (*INPUT_EMBEDDINGS, *HEADS, "shared", "decoder"):
            continue
        touching = {op.adapter for op in state.operations if op.method != "trainable_tokens"}
        if isinstance(state.source, Replacement):
            touching.add(state.source.adapter)
        tasks = {adapters[number].config.get("task_type") for number in touching}
        if masked and tasks <= {"SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"}:
            continue
        if tensor.endswith(".weight") and touching:
            reasons.append(
                f"{tensor}: is tied to other parts of {', '.join(kinds) or 'this model'}, and "
                "untying them is not supported for this architecture"
            )
    return reasons


def same_ends(embedding: State, head: State, adapters: tuple[Adapter, ...]) -> bool:
    """Whether both ends of a tied pair get equal values, so that they can stay tied."""
    if embedding.shape != head.shape or len(embedding.operations) != len(head.operations):
        return False
    one, two = embedding.source, head.source
    if isinstance(one, Replacement) and isinstance(two, Replacement):
        tensors = [adapters[end.adapter].read(end.key) for end in (one, two) if one != two]
        if tensors and not _equal(*tensors):
            return False
    elif type(one) is not type(two):
        return False
    return all(
        _same_update(a, b, adapters)
        for a, b in zip(embedding.operations, head.operations, strict=True)
    )


def _same_update(one: Operation, two: Operation, adapters: tuple[Adapter, ...]) -> bool:
    """Whether two operations make the same change: of equal parts, or of transposed factors."""
    if one == two:
        return True
    if one.method != two.method or one.parts.keys() != two.parts.keys():
        return False
    parts, others = (
        {part: adapters[op.adapter].read(key) for part, key in op.parts.items()}
        for op in (one, two)
    )
    settings = one.settings, two.settings
    if one.transposed == two.transposed:
        return settings[0] == settings[1] and all(_equal(parts[p], others[p]) for p in parts)
    if one.method != "lora" or settings[0].scaling != settings[1].scaling:
        return False
    return _equal(parts["lora_A"], others["lora_B"].t()) and _equal(
        parts["lora_B"], others["lora_A"].t()
    )


def _equal(one: Tensor, two: Tensor) -> bool:
    return one.dtype == two.dtype and torch.equal(one, two)
