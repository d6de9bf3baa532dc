"""From a base and adapters, as headers, to a Plan; or to one Refusal that lists every offender."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from infold.checkpoint.adapter import Adapter
from infold.checkpoint.shards import INDEX, NOT_CONTENT, Checkpoint, is_bundled
from infold.errors import Refusal
from infold.formats import floats_of, format_of
from infold.formats.values import NoValues
from infold.ggml import BLOCKS
from infold.patience import patience
from infold.plan.choice import MODES, WAYS, Choice
from infold.plan.config import read_config
from infold.plan.consume import Consumer
from infold.plan.convert import (
    Conversion,
    convertible,
    original_reasons,
    to_dense,
    to_quantized,
    view,
    with_siblings,
)
from infold.plan.draft import Draft
from infold.plan.edits import Amended, BaseTensor, Edit, Plan
from infold.plan.experts import consume_parameters
from infold.plan.fold import INSTEAD
from infold.plan.gguf_consume import GgufConsumer
from infold.plan.match import group_keys
from infold.plan.origin import misfit, origin_notes
from infold.plan.output import (
    config_changes,
    index_bytes,
    json_file,
    output_shards,
    uneven_vocabulary,
    with_changes,
)
from infold.plan.quantized import rotations
from infold.plan.room import make_room
from infold.plan.saved import not_held
from infold.plan.tied import copies_of_shared, same_ends, tied_pair, unsupported_tie
from infold.plan.unconverted import unconverted_beside, unconverted_changes

__all__ = ["plan_edit", "plan_merge"]


def plan_merge(
    base: Checkpoint,
    adapters: Sequence[Adapter],
    choice: Choice | None = None,
    lossy: bool = False,
) -> Plan:
    """Decide every edit. Reads no tensor data, but for the parts of a tied pair's two ends, the
    small tensors that tell how a module is quantized, and what tells whether an adapter is new.

    choice: what is to happen to quantized modules into which an adapter does not fold. lossy:
    whether scales of four bits may be multiplied.
    Raises Refusal, listing all offenders, when anything of an adapter would be lost or guessed.
    """
    if not adapters:
        raise Refusal("no adapter given")
    with patience(", ".join(str(adapter.path) for adapter in adapters)):
        if choice is not None:
            return _converted(base, tuple(adapters), choice, lossy)
        draft, edits, changes = _decide(base, adapters, lossy)
        if draft.reasons and (draft.stuck or draft.elements):
            # what a refusal offers instead must not be refused as well
            if unknown := convertible(base)[1]:
                draft, edits, changes = _decide(base, adapters, lossy, None, unknown)
        if draft.reasons:
            raise Refusal(draft.reasons)
        return _plan(draft, base, tuple(adapters), Conversion(edits), changes)


def plan_edit(
    base: Checkpoint, adapters: Sequence[Adapter], lossy: bool = False, instead: str = ""
) -> Plan:
    """As `plan_merge`, for a verb that converts nothing. instead: what to do where a reason names
    the options that would, which this verb does not have."""
    try:
        return plan_merge(base, adapters, lossy=lossy)
    except Refusal as error:
        if not any(f"--{mode}" in reason for reason in error.reasons for mode in MODES):
            raise
        told = "--promote, --dequantize and --requantize are options of `infold merge --out`"
        plain = [reason.replace(WAYS, "").replace(INSTEAD, "") for reason in error.reasons]
        raise Refusal([*plain, f"{told}{instead}"]) from None


def _decide(
    base: Checkpoint,
    adapters: Sequence[Adapter],
    lossy: bool,
    seen: Checkpoint | None = None,
    unknown: Mapping[str, str] = MappingProxyType({}),
    ways: str = WAYS,
) -> tuple[Draft, dict[str, Edit], dict[str, object]]:
    """(draft, edits, changes of config.json). `seen`: the base as a view, see plan/convert.py."""
    draft = Draft(seen or base, tied_pair(base, adapters), lossy)
    draft.unknown, draft.ways, draft.copies = unknown, ways, copies_of_shared(base, adapters)
    draft.reasons += rotations(base)
    for number, adapter in enumerate(adapters):
        _add(draft, number, adapter)
    untied = False if draft.reasons else _settle_ties(draft, tuple(adapters), base)
    if not draft.reasons:
        make_room(draft, adapters)
    edits = _edits(draft)
    draft.reasons += uneven_vocabulary(draft.base, edits)
    changes = config_changes(draft.base, edits, untied, draft.labels)
    _need_config(draft, base, changes)
    draft.notes += origin_notes(base, adapters)
    return draft, edits, changes


def _need_config(draft: Draft, base: Checkpoint, changes: Mapping[str, object]) -> None:
    if changes and base.config is None and not draft.reasons:
        draft.reasons.append(
            f"{base.path}: the merge has to set {', '.join(changes)} in config.json, and there is "
            "none; give the folder with its config.json"
        )


def _converted(
    base: Checkpoint, adapters: tuple[Adapter, ...], choice: Choice, lossy: bool
) -> Plan:
    """The plan where some quantized modules become dense or are quantized again."""
    modules, unknown = convertible(base)
    if not modules and not unknown:
        raise Refusal(f"--{choice.mode}: {base.path} has no quantized weights")
    dtype = choice.dense_dtype(base)
    if choice.dtype in BLOCKS and not base.is_gguf:
        raise Refusal(f"--dtype {choice.dtype.lower()} is a type of GGUF, and the base is none")
    if choice.original is not None:
        if wrong := original_reasons(choice.original, modules):
            raise Refusal(wrong)
    chosen: Collection[str] = () if choice.mode == "promote" else modules
    while True:
        seen = view(base, [modules[name] for name in modules if name in chosen], dtype)
        draft, edits, changes = _decide(base, adapters, lossy, seen, unknown, "")
        stuck = [name for name in modules if name in draft.stuck and name not in chosen]
        if choice.mode != "promote" or not stuck:
            break
        chosen = with_siblings([*chosen, *stuck], modules)
    if draft.reasons:
        if choice.mode == "promote":
            draft.reasons += [f"--promote is for IA³ vectors{WAYS}"] if draft.elements else []
        raise Refusal(draft.reasons)
    touched = [name for name, module in modules.items() if module.weight in edits]
    try:
        if choice.mode == "requantize":
            conversion = to_quantized(edits, {n: modules[n] for n in touched}, choice)
        else:
            dense = with_siblings(touched, modules) if choice.mode == "dequantize" else chosen
            conversion = to_dense(edits, {n: modules[n] for n in dense}, dtype, choice)
    except NoValues as error:
        raise Refusal(f"{error}; --dequantize writes it in floats instead") from None
    beside: dict[str, dict[str, object]] = {}
    if conversion.dense and not base.is_gguf:
        try:
            changes |= unconverted_changes(base, conversion.dense)
            beside = unconverted_beside(base, conversion.dense)
        except LookupError as error:
            draft.reasons.append(f"{base.path}: {error}")
        _need_config(draft, base, changes)
    if draft.reasons:
        raise Refusal(draft.reasons)
    plan = _plan(draft, base, adapters, conversion, changes, beside)
    told = {
        "mode": choice.mode,
        "dtype": choice.dtype if choice.mode == "requantize" else dtype,
        "touched": touched,
        "beside": [name for name in conversion.dense if name not in touched],
        "original": None if choice.original is None else os.path.abspath(choice.original.path),
    }
    return replace(plan, original=choice.original, conversion=told)


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
    reasons, notes = not_held(config, keys.plain, consumer.tensors())
    draft.reasons += [f"{adapter.path}: {reason}" for reason in reasons]
    draft.notes += [f"{adapter.path}: {note}" for note in notes]
    before, elements = len(draft.reasons), len(draft.elements)
    for parameter, key in keys.plain.items():
        consumer.replacement(parameter, key, keys.copies.get(parameter))
    on_parameters = consume_parameters(consumer, keys.modules)
    others = [item for item in keys.modules.items() if item[0] not in on_parameters]
    # where a tied head has an update of its own, PEFT adds it to the trained tokens
    tokens_first = sorted(others, key=lambda m: "trainable_tokens_delta" not in m[1])
    for module, parts in tokens_first:
        consumer.operation(module, parts)
    if consumer.measured:
        draft.notes.append(
            f"{len(consumer.measured)} static scales of activations were measured without the "
            f"adapter, as they are where it is not merged ({consumer.measured[0]}, ...): values "
            "that it makes larger can be clipped there"
        )
    # what is quantized can be the right base all the same
    if len(draft.reasons) - before > len(draft.elements) - elements:
        modules = [module for module, _ in others]
        found = not modules or any(map(consumer.finds, modules))
        draft.reasons[before:before] = misfit(draft.base, adapter, modules, found)


def _settle_ties(draft: Draft, adapters: tuple[Adapter, ...], base: Checkpoint) -> bool:
    """Decide whether a tied pair stays tied. True: it is untied."""
    draft.reasons += unsupported_tie(draft, adapters, base)
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
        if state.source == BaseTensor(tensor) and not state.operations and not state.exponent:
            continue
        floats = floats_of(state.dtype, state.shape)
        if floats is None or format_of(floats.dtype, state.scales) is None:
            draft.reasons.append(
                f"{tensor}: stored as {state.dtype}; merging into such weights is not supported yet"
            )
        # what moved here from a later module acts after all that changes this one
        operations = tuple(sorted(state.operations, key=lambda op: op.moved))
        edits[tensor] = Edit(
            tensor, state.source, state.dtype, state.shape, operations, state.scales,
            state.exponent,
        )  # fmt: skip
    for tensor, data in draft.amended.items():
        edits[tensor] = Edit(tensor, Amended(tensor, data), "U8", (len(data),), ())
    return edits


def _left_out(names: Sequence[str]) -> Iterator[str]:
    """Notes on files of the base that the output does not get, by the reason."""
    reasons: dict[str, list[str]] = {}
    for name in names:
        why = "it repeats or would change the merged weights"
        if name.startswith("infold-") or is_bundled(name):
            why = "it tells of another merge, that made the base"
        elif name.rpartition("/")[2] in NOT_CONTENT:
            why = "it is no part of the model"
        reasons.setdefault(why, []).append(name)
    for why, listed in reasons.items():
        yield f"left out, since {why}: {', '.join(listed)}"


def _plan(
    draft: Draft,
    base: Checkpoint,
    adapters: tuple[Adapter, ...],
    conversion: Conversion,
    changes: dict[str, object],
    beside: Mapping[str, dict[str, object]] = MappingProxyType({}),
) -> Plan:
    """All decisions, with the files that follow from them. beside: new content of JSON files other
    than config.json, by name."""
    edits = conversion.edits
    removed = conversion.removed | draft.removed
    shards = output_shards(base, edits, removed, conversion.place, conversion.metadata)
    rewritten = {"config.json": with_changes(base.config or {}, changes)} if changes else {}
    rewritten |= {name: json_file(content) for name, content in beside.items()}
    copied = [name for name in base.side_files if name not in rewritten]
    if base.index is not None:
        if all(shard.same_layout for shard in shards):
            copied.append(INDEX)
        else:
            rewritten[INDEX] = index_bytes(base, shards)
    draft.notes += _left_out(base.left_out)
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
