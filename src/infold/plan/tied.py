"""Input embedding and output head that share one tensor in memory.

An edit of one end only must untie them; equal edits of both ends leave them tied.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import ExitStack

import torch
from torch import Tensor

from infold.checkpoint.adapter import Adapter
from infold.checkpoint.shards import Checkpoint, read_exactly
from infold.plan.draft import Draft, State
from infold.plan.edits import Operation, Replacement
from infold.plan.layouts import (
    HEADS,
    INPUT_EMBEDDINGS,
    is_end,
    is_tied,
    leaf,
    numeric,
    other_ends,
    vocabularies,
)

__all__ = ["copies_of_shared", "same_ends", "tied_pair", "unsupported_tie"]


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
_SHARED = "shared"  # the embedding of both stacks of an encoder-decoder
# Further parts that are tied, or make of a model what has more than two ends
_OTHER_PARTS = (_SHARED, "decoder", "embed_audio_tokens", "embedding_projection")
_MORE = "additional_embedding"  # rows of Idefics' embedding that lie in a tensor of their own

# Classes without a head over the vocabulary, so without a tie. Unknown ones may have it.
_HEADLESS = re.compile(
    r"(?<!Chat)(?<!Bark)(?<!EncoderDecoder)(?<!Pix2StructText)Model$"
    r"|Classification$|QuestionAnswering|MultipleChoice$|NextSentencePrediction$|Regression$"
    r"|(?<!GraniteSpeech5)ForCTC$|ForXVector$|Segmentation$|Detection$|Retrieval$|Encoder$|WithProjection$|Embedding$"
)
_CLASSIFYING = {"SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"}


def tied_pair(base: Checkpoint, adapters: Iterable[Adapter]) -> tuple[str, str] | None:
    """(input embedding, head) that share one tensor in memory; the head may be missing on disk.

    A head that is on disk and differs is not tied, whatever the config tells: transformers 5 sees
    it so too. The two are compared only if an adapter may touch them.
    """
    pair = _pair_by_names(base)
    if pair is None or pair[1] not in base.where:
        return pair
    ends = {*INPUT_EMBEDDINGS, *HEADS, *map(leaf, pair)}
    touched = any(not ends.isdisjoint(key.split(".")) for a in adapters for key in a.tensors)
    return None if touched and not _equal_on_disk(base, *pair) else pair


def _pair_by_names(base: Checkpoint) -> tuple[str, str] | None:
    tied, kinds = is_tied(base), _kinds(base)
    if tied is False or (kinds and not _generates(kinds)):
        return None
    if (base.config or {}).get("is_encoder_decoder") or any(leaf(n) == _MORE for n in base.where):
        return None
    for ends in other_ends(base):
        embedding, head = (f"{module}.weight" for module in ends)
        if embedding in base.where:
            return None if tied is None and head in base.where else (embedding, head)
    embeddings = [n for n in base.where if n.endswith(".weight") and leaf(n) in INPUT_EMBEDDINGS]
    if len(embeddings) != 1:
        return None
    heads = [n for n in base.where if n.endswith(".weight") and leaf(n) in HEADS]
    if heads:
        if tied is None or len(heads) > 1:
            return None  # a head of its own, and no config that ties it
        return embeddings[0], heads[0]
    above = tuple(embeddings[0].split(".")[:-2])
    body = next((body for body in _BODIES if above[-len(body) :] == body), ())
    above = above[: len(above) - len(body)]
    if above and not body:
        return None  # an unknown place: see `unsupported_tie`
    return embeddings[0], ".".join((*above, "lm_head", "weight"))


def copies_of_shared(base: Checkpoint, adapters: Iterable[Adapter]) -> dict[str, tuple[str, ...]]:
    """The table that an encoder and a decoder share -> the tensors that repeat it: transformers
    takes them for one only while they are equal. None are looked for if no adapter touches it."""
    if not any(_SHARED in key.split(".") for adapter in adapters for key in adapter.tensors):
        return {}
    ends = (*INPUT_EMBEDDINGS, *(() if is_tied(base) is False else HEADS))
    names = [name for name in base.where if name.endswith(".weight")]
    others = [name for name in names if leaf(name) in ends]
    return {
        name: tuple(other for other in others if _equal_on_disk(base, name, other))
        for name in names
        if leaf(name) == _SHARED
    }


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


def unsupported_tie(draft: Draft, adapters: tuple[Adapter, ...], base: Checkpoint) -> list[str]:
    """Reasons to refuse an edit of an embedding whose other users cannot be untied from it.

    Masked language models tie their decoder, encoder-decoder models several embeddings and often a
    scale of the logits (T5). A classifier made from such a model does not use the tied head. Of
    other models it may be unknown where the head is. `base` has the bytes of the draft's.
    """
    kinds = _kinds(base)
    if draft.pair or not is_tied(base):
        return []
    masked = any("MaskedLM" in kind or "PreTraining" in kind for kind in kinds)
    several = bool((base.config or {}).get("is_encoder_decoder"))
    reasons = []
    tables = _tables(draft.base)
    for tensor in tables:
        state = draft.states.get(tensor)
        if state is None:
            continue
        touching = {op.adapter for op in state.operations if op.method != "trainable_tokens"}
        if isinstance(state.source, Replacement):
            touching.add(state.source.adapter)
        if not touching:
            continue
        tasks = {adapters[number].config.get("task_type") for number in touching}
        headless = "text_decoder" not in tensor and _headless(kinds)
        if not several and (tasks <= _CLASSIFYING or (headless and not masked)):
            continue
        if not several and not masked and _apart(draft.base, base, tensor, tables):
            continue
        reasons.append(
            f"{tensor}: is tied to other parts of {', '.join(kinds) or 'this model'}, and "
            "untying them is not supported for this architecture; give a base whose config sets "
            "tie_word_embeddings to false and that has its head on disk, or train without it"
        )
    return reasons


def _headless(kinds: list[str]) -> bool:
    """Whether no class of the model has a head over the vocabulary."""
    return bool(kinds) and not _generates(kinds) and all(map(_HEADLESS.search, kinds))


def _tables(base: Checkpoint) -> list[str]:
    """Tensors that may be tied: by their names, or outside of all layers with a row for each token,
    whatever they are called."""
    sizes = set(vocabularies(base.config or {}))
    found = []
    for name in base.where:
        module = name.removesuffix(".weight")
        known = is_end(base, name) or (module != name and leaf(name) in _OTHER_PARTS)
        shape = base.info(name).shape
        rows = len(shape) == 2 and shape[0] in sizes and not numeric(module.rpartition(".")[0])
        if known or rows:
            found.append(name)
    return found


def _apart(seen: Checkpoint, base: Checkpoint, tensor: str, tables: list[str]) -> bool:
    """Whether embedding and head are both on disk, and `tensor` is neither's copy: no tie, whatever
    the config tells. `seen`: the base with quantized modules as dense ones."""
    rows = seen.info(tensor).shape[:1]
    others = [n for n in tables if n != tensor and seen.info(n).shape[:1] == rows]
    if not any(_is_head(tensor) or _is_head(other) for other in others):
        return False
    stored = [n for n in others if n in base.where and tensor in base.where]
    return not any(_equal_on_disk(base, tensor, other) for other in stored)


def _is_head(name: str) -> bool:
    """Whether a table of tokens is an output head, by its name: it is no embedding."""
    last = (name if name.endswith(".weight") else f"{name}.weight").split(".")[-2]
    return last in HEADS or not (last in ("wte", "wpe", "w", "shared") or "emb" in last.lower())


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
