"""From a base and adapters, as headers, to a Plan; or to one Refusal that lists every offender."""

from __future__ import annotations

from collections.abc import Sequence

from infold.checkpoint.adapter import Adapter
from infold.checkpoint.shards import INDEX, Checkpoint
from infold.errors import Refusal
from infold.formats import floats_of
from infold.plan.config import read_config
from infold.plan.consume import Consumer
from infold.plan.draft import Draft
from infold.plan.edits import BaseTensor, Edit, Plan
from infold.plan.gguf_consume import GgufConsumer
from infold.plan.match import group_keys
from infold.plan.origin import origin_notes
from infold.plan.output import (
    config_changes,
    index_bytes,
    output_shards,
    uneven_vocabulary,
    with_changes,
)
from infold.plan.tied import same_ends, tied_pair, unsupported_tie

__all__ = ["plan_merge"]


def plan_merge(base: Checkpoint, adapters: Sequence[Adapter]) -> Plan:
    """Decide every edit. Reads no tensor data, but for the parts of a tied pair's two ends.

    Raises Refusal, listing all offenders, when anything of an adapter would be lost or guessed.
    """
    if not adapters:
        raise Refusal("no adapter given")
    draft = Draft(base, tied_pair(base, adapters))
    for number, adapter in enumerate(adapters):
        _add(draft, number, adapter)
    untied = False if draft.reasons else _settle_ties(draft, tuple(adapters))
    edits = _edits(draft)
    draft.reasons += uneven_vocabulary(base, edits)
    changes = config_changes(base, edits, untied, draft.labels)
    if changes and base.config is None and not draft.reasons:
        draft.reasons.append(
            f"{base.path}: the merge has to set {', '.join(changes)} in config.json, and there is "
            "none; give the folder with its config.json"
        )
    if draft.reasons:
        raise Refusal(draft.reasons)
    draft.notes += origin_notes(base, adapters)
    return _plan(draft, tuple(adapters), edits, changes)


def _add(draft: Draft, number: int, adapter: Adapter) -> None:
    """Consume one adapter."""
    config, problems = read_config(adapter)
    draft.reasons += problems
    if not adapter.tensors:
        draft.reasons.append(f"{adapter.weights}: holds no tensors")
    if problems:
        return
    keys = group_keys(adapter.tensors)
    draft.reasons += [
        f"{adapter.path}: {key}: not a tensor name that PEFT writes" for key in keys.strange
    ]
    draft.notes += [f"not used: {key}, which holds untrained values" for key in keys.unused]
    kind = GgufConsumer if draft.base.is_gguf else Consumer
    consumer = kind(draft, number, adapter, config)
    before = len(draft.reasons)
    for parameter, key in keys.plain.items():
        consumer.replacement(parameter, key, keys.copies.get(parameter))
    # where a tied head has an update of its own, PEFT adds it to the trained tokens
    tokens_first = sorted(keys.modules.items(), key=lambda m: "trainable_tokens_delta" not in m[1])
    for module, parts in tokens_first:
        consumer.operation(module, parts)
    if consumer.measured:
        draft.notes.append(
            f"{len(consumer.measured)} static scales of activations were measured without the "
            f"adapter, as they are where it is not merged ({consumer.measured[0]}, ...): values "
            "that it makes larger can be clipped there"
        )
    if len(draft.reasons) > before:
        summary = []
        if keys.modules and not any(consumer.finds(module) for module in keys.modules):
            count = len(keys.modules)
            summary.append(
                f"{adapter.path}: none of its {count} modules is in {draft.base.path}"
                if count > 1
                else f"{adapter.path}: its only module is not in {draft.base.path}"
            )
        if trained_on := config.fields.get("base_model_name_or_path"):
            summary.append(f"{adapter.path}: was trained on {trained_on!r}: is this that base?")
        draft.reasons[before:before] = summary


def _settle_ties(draft: Draft, adapters: tuple[Adapter, ...]) -> bool:
    """Decide whether a tied pair stays tied. True: it is untied."""
    draft.reasons += unsupported_tie(draft, adapters)
    if not draft.pair or not any(end in draft.states for end in draft.pair):
        return False
    embedding, head = draft.pair
    if same_ends(draft.state(embedding), draft.state(head), adapters):
        if head not in draft.base.where:
            del draft.states[head]
        return False
    draft.notes.append(
        f"untied: {embedding} and {head} are different now; {head} is written and "
        "tie_word_embeddings set to false"
    )
    return True


def _edits(draft: Draft) -> dict[str, Edit]:
    """The states that change something, as edits by tensor of the output."""
    edits = {}
    for tensor, state in draft.states.items():
        if state.source == BaseTensor(tensor) and not state.operations:
            continue
        if floats_of(state.dtype, state.shape) is None:
            draft.reasons.append(
                f"{tensor}: stored as {state.dtype}; merging into such weights is not supported yet"
            )
        # what moved here from a later module acts after all that changes this one
        operations = tuple(sorted(state.operations, key=lambda op: op.moved))
        edits[tensor] = Edit(tensor, state.source, state.dtype, state.shape, operations)
    return edits


def _plan(
    draft: Draft, adapters: tuple[Adapter, ...], edits: dict[str, Edit], changes: dict[str, object]
) -> Plan:
    """All decisions, with the files that follow from them."""
    base = draft.base
    shards = output_shards(base, edits)
    rewritten = {"config.json": with_changes(base.config or {}, changes)} if changes else {}
    copied = [name for name in base.side_files if name not in rewritten]
    if base.index is not None:
        if all(shard.same_layout for shard in shards):
            copied.append(INDEX)
        else:
            rewritten[INDEX] = index_bytes(base, shards)
    if base.left_out:
        draft.notes.append(
            "left out, since it repeats or would change the merged weights: "
            + ", ".join(base.left_out)
        )
    order = [name for shard in shards for name in shard.header.tensors if name in edits]
    return Plan(
        base,
        adapters,
        {name: edits[name] for name in order},
        shards,
        rewritten,
        tuple(sorted(copied)),
        tuple(draft.notes),
    )
