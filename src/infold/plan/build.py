"""From a base and adapters, as headers, to a Plan; or to one Refusal that lists every offender."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from infold.adapters import Settings
from infold.adapters.exact import slices_for
from infold.checkpoint.adapter import Adapter
from infold.checkpoint.safetensors import Header, build_header
from infold.checkpoint.shards import INDEX, Checkpoint
from infold.errors import Refusal
from infold.formats import format_of
from infold.plan.config import AdapterConfig, read_config
from infold.plan.edits import BaseTensor, Edit, Operation, OutputShard, Plan, Replacement
from infold.plan.layouts import HEADS, INPUT_EMBEDDINGS, is_conv1d, is_tied
from infold.plan.match import Names, group_keys, missing_parts

__all__ = ["plan_merge"]


def plan_merge(base: Checkpoint, adapters: Sequence[Adapter]) -> Plan:
    """Decide every edit. Reads no tensor data, but for the parts of a tied pair's two ends.

    Raises Refusal, listing all offenders, when anything of an adapter would be lost or guessed.
    """
    if not adapters:
        raise Refusal("no adapter given")
    build = _Build(base)
    for number, adapter in enumerate(adapters):
        build.add(number, adapter)
    return build.finish(tuple(adapters))


@dataclass
class _State:
    """What is known so far of one tensor of the output."""

    source: BaseTensor | Replacement
    dtype: str
    shape: tuple[int, ...]
    operations: list[Operation] = field(default_factory=list)


class _Build:
    """Collects the states of all touched tensors, and the reasons to refuse."""

    def __init__(self, base: Checkpoint) -> None:
        self.base = base
        self.names = Names(base.where)
        self.states: dict[str, _State] = {}
        self.reasons: list[str] = []
        self.notes: list[str] = []
        self.new_labels: int | None = None
        self.pair = _tied_pair(base)  # (embedding, head) that share their values, or None

    # --- one adapter -------------------------------------------------------------------------

    def add(self, number: int, adapter: Adapter) -> None:
        config, problems = read_config(adapter)
        self.reasons += problems
        if not adapter.tensors:
            self.reasons.append(f"{adapter.weights}: holds no tensors")
        if problems:
            return
        modules, plain, strange = group_keys(adapter.tensors)
        self.reasons += [
            f"{adapter.path}: {key}: not a tensor name that PEFT writes" for key in strange
        ]
        one = _One(self, number, adapter, config)
        unmatched = len(self.reasons)
        for parameter, key in plain.items():
            one.replacement(parameter, key)
        for module, parts in modules.items():
            one.operation(module, parts)
        trained_on = config.fields.get("base_model_name_or_path")
        if len(self.reasons) > unmatched and trained_on:
            self.reasons.append(
                f"{adapter.path}: was trained on {trained_on!r}: is this that base?"
            )

    def state(self, tensor: str) -> _State:
        """The state of an output tensor, begun from the base where it is new."""
        if tensor not in self.states:
            source = tensor
            if self.pair and tensor == self.pair[1] and tensor not in self.base.where:
                source = self.pair[0]
            info = self.base.info(source)
            self.states[tensor] = _State(BaseTensor(source), info.dtype, info.shape)
        return self.states[tensor]

    # --- all of them -------------------------------------------------------------------------

    def finish(self, adapters: tuple[Adapter, ...]) -> Plan:
        untied = False if self.reasons else self._settle_pair(adapters)
        edits = {}
        for tensor, state in self.states.items():
            if state.source == BaseTensor(tensor) and not state.operations:
                continue
            if format_of(state.dtype) is None:
                self.reasons.append(
                    f"{tensor}: stored as {state.dtype}; "
                    "merging into such weights is not supported yet"
                )
                continue
            edits[tensor] = Edit(
                tensor, state.source, state.dtype, state.shape, tuple(state.operations)
            )
        rewritten = {} if self.reasons else self._configs(edits, untied)
        if self.reasons:
            raise Refusal(self.reasons)
        shards = _shards(self.base, edits)
        added = {name for name in edits if name not in self.base.where}
        resized = any(
            n in self.base.where and e.shape != self.base.info(n).shape for n, e in edits.items()
        )
        copied = list(self.base.side_files)
        if self.base.index is not None:
            if added or resized:
                rewritten[INDEX] = _index(self.base, shards)
            else:
                copied.append(INDEX)
        if self.base.left_out:
            self.notes.append(
                "left out, since it repeats or would change the merged weights: "
                + ", ".join(self.base.left_out)
            )
        order = {name: None for shard in shards for name in shard.header.tensors if name in edits}
        return Plan(
            self.base,
            adapters,
            {name: edits[name] for name in order},
            shards,
            rewritten,
            tuple(sorted(name for name in copied if name not in rewritten)),
            tuple(self.notes),
        )

    def _settle_pair(self, adapters: tuple[Adapter, ...]) -> bool:
        """Decide whether a tied pair stays tied. True: it is untied."""
        if not self.pair or not any(end in self.states for end in self.pair):
            return False
        embedding, head = self.pair
        ends = self.state(embedding), self.state(head)
        if _same(ends[0], ends[1], adapters, self.base):
            if head not in self.base.where:
                del self.states[head]
            return False
        if not self.base.is_folder:
            self.reasons.append(
                f"{self.base.path}: {embedding} and {head} share a tensor and are edited "
                "differently, which needs a change to config.json: give the folder, not the file"
            )
        self.notes.append(
            f"untied: {embedding} and {head} are different now; {head} is written and "
            "tie_word_embeddings set to false"
        )
        return True

    def _configs(self, edits: dict[str, Edit], untied: bool) -> dict[str, bytes]:
        """config.json where it has to change: tie_word_embeddings, vocab_size, labels."""
        changes: dict[str, object] = {}
        if untied:
            changes["tie_word_embeddings"] = False
        for name, edit in edits.items():
            module = name.removesuffix(".weight").rsplit(".", 1)[-1]
            old = self.base.info(name).shape if name in self.base.where else edit.shape
            if edit.shape[:1] != old[:1] and module in (*INPUT_EMBEDDINGS, *HEADS):
                changes["vocab_size"] = edit.shape[0]
        if self.new_labels is not None:
            changes["id2label"] = {str(n): f"LABEL_{n}" for n in range(self.new_labels)}
            changes["label2id"] = {f"LABEL_{n}": n for n in range(self.new_labels)}
        if not changes:
            return {}
        if self.base.config is None:
            if not untied:
                wanted = ", ".join(changes)
                self.reasons.append(f"{self.base.path}: there is no config.json to set {wanted} in")
            return {}
        config = dict(self.base.config)
        text = config.get("text_config")
        for key, value in changes.items():
            if isinstance(text, dict) and key in text:
                config["text_config"] = text = {**text, key: value}
                if key not in config:
                    continue
            config[key] = value
        return {"config.json": (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()}


class _One:
    """The matching of one adapter."""

    def __init__(self, build: _Build, number: int, adapter: Adapter, config: AdapterConfig) -> None:
        self.build, self.number, self.adapter, self.config = build, number, adapter, config

    def refuse(self, key: str, why: str) -> None:
        self.build.reasons.append(f"{self.adapter.path}: {key}: {why}")

    def shape(self, key: str) -> tuple[int, ...]:
        return self.adapter.tensors[key].shape

    def find(self, parameter: str, key: str) -> str | None:
        """The output tensor for a parameter path; a tied head that is not on disk is found too."""
        try:
            name = self.build.names.find(parameter)
        except LookupError as error:
            self.refuse(key, f"{parameter} {error}")
            return None
        pair = self.build.pair
        if name is None and pair and _leaf(parameter) in HEADS and parameter.endswith(".weight"):
            return pair[1]
        return name

    def ends(self, name: str, both: bool) -> list[str]:
        """The tensors that an edit of `name` changes: both of a tied pair, or only itself."""
        pair = self.build.pair
        return list(pair) if both and pair and name in pair else [name]

    # --- plain tensors -----------------------------------------------------------------------

    def replacement(self, parameter: str, key: str) -> None:
        module = parameter.rpartition(".")[0]
        before = len(self.build.reasons)
        name = self.find(parameter, key)
        if len(self.build.reasons) > before:
            return
        if name is None:
            self._new(parameter, module, key)
            return
        saved = self.config.saves(module)
        tied = self.config.ties and not self._has_other_end(name)
        for end in self.ends(name, both=not saved or tied):
            state = self.build.state(end)
            if state.operations or isinstance(state.source, Replacement):
                if state.source == Replacement(self.number, key):
                    continue
                if not isinstance(state.source, Replacement) or state.source.adapter != self.number:
                    self.refuse(
                        key,
                        f"replaces {end}, which an earlier adapter edits: its work would be lost",
                    )
                    continue
                if end != name:
                    continue  # the other end has a tensor of its own in this adapter
            new, old = self.shape(key), state.shape
            resizes = _leaf(name) in (*INPUT_EMBEDDINGS, *HEADS) and new[1:] == old[1:]
            if new != old and not (resizes and new):
                self.refuse(key, f"shape {list(new)}, but {end} has {list(old)}")
                continue
            state.source, state.shape = Replacement(self.number, key), new

    def _has_other_end(self, name: str) -> bool:
        """Whether this adapter has a tensor of its own for the other end of the tied pair."""
        pair = self.build.pair
        if not pair or name not in pair:
            return False
        other = pair[1] if name == pair[0] else pair[0]
        modules, plain, _ = group_keys(self.adapter.tensors)
        return any(
            self._quietly(path) == other for path in (*plain, *(f"{m}.weight" for m in modules))
        )

    def _quietly(self, parameter: str) -> str | None:
        try:
            name = self.build.names.find(parameter)
        except LookupError:
            return None
        pair = self.build.pair
        if name is None and pair and _leaf(parameter) in HEADS:
            return pair[1]
        return name

    def _new(self, parameter: str, module: str, key: str) -> None:
        """A tensor that the base lacks: only a trained head may add one."""
        build = self.build
        top = module.rpartition(".")[2] if not self.config.saves(module) else module
        if not (self.config.saves(module) and self.config.adds_head) or module in build.names.all:
            self.refuse(key, f"there is no {parameter} in the base{build.names.nearest(parameter)}")
            return
        if parameter in build.states:
            self.refuse(key, f"{parameter} was already added by an earlier adapter")
            return
        shape = self.shape(key)
        dtype = _usual_dtype(build.base)
        build.states[parameter] = _State(Replacement(self.number, key), dtype, shape)
        if len(shape) == 2 and parameter.endswith(".weight"):
            build.notes.append(
                f"added: {parameter}, a trained head that the base lacks; load the result with the "
                "class of that task (such as AutoModelForSequenceClassification)"
            )
            if top.rpartition(".")[2] in ("classifier", "score", "out_proj", "qa_outputs"):
                build.new_labels = shape[0]

    # --- methods -----------------------------------------------------------------------------

    def operation(self, module: str, parts: dict[str, str]) -> None:
        key = next(iter(parts.values()))
        table = "lora_embedding_A" in parts or "lora_embedding_B" in parts
        if table:
            parts = {name.replace("lora_embedding_", "lora_"): k for name, k in parts.items()}
        if "trainable_tokens_delta" in parts and len(parts) > 1:
            delta = parts.pop("trainable_tokens_delta")
            self.operation(module, {"trainable_tokens_delta": delta})
            self.refuse(delta, "trained tokens and another method on one module are not supported")
            return
        method = self._method(parts)
        missing = missing_parts(method, parts)
        if missing:
            self.refuse(key, f"{module} lacks {', '.join(missing)} in the adapter file")
            return
        before = len(self.build.reasons)
        name = self.find(f"{module}.weight", key)
        if name is None and len(self.build.reasons) == before:
            name = self.find(f"{module}.in_proj_weight", key)
        if len(self.build.reasons) > before:
            return
        if name is None:
            quantized = (self.build.base.config or {}).get("quantization_config")
            why = (
                "the base is quantized; merging into quantized weights is not supported yet"
                if quantized
                else f"there is no module {module} in the base"
                + self.build.names.nearest(f"{module}.weight")
            )
            for part in parts.values():
                self.refuse(part, why)
            return
        make = {"ia3": self._ia3, "trainable_tokens": self._tokens}.get(method)
        made = make(module, parts, name) if make else self._lora(method, module, parts, name, table)
        if made is None:
            return
        both = method == "trainable_tokens" or (self.config.ties and not self._has_other_end(name))
        for end in self.ends(name, both):
            operation = made
            if end != name and method != "trainable_tokens":
                operation = made  # the same update for both ends of the pair
            self.build.state(end).operations.append(operation)

    def _method(self, parts: dict[str, str]) -> str:
        if "ia3_l" in parts:
            return "ia3"
        if "trainable_tokens_delta" in parts:
            return "trainable_tokens"
        if "lora_magnitude_vector" in parts or self.config.fields.get("use_dora"):
            return "dora"
        return "lora"

    def _ia3(self, module: str, parts: dict[str, str], name: str) -> Operation | None:
        key = parts["ia3_l"]
        vector, weight = self.shape(key), self.build.state(name).shape
        transposed = False
        if len(weight) == 2:
            if len(vector) != 2 or 1 not in vector:
                self.refuse(key, f"shape {list(vector)}; expected (out, 1) or (1, in)")
                return None
            side = self._linear_side(module, vector)
            length = math.prod(vector)
            fits = [weight[0] == length, weight[1] == length]  # as (rows, columns) of storage
            if not any(fits):
                self.refuse(key, f"{length} elements fit neither side of {name} {list(weight)}")
                return None
            if weight[0] != weight[1]:
                transposed = fits[1] if side == "out" else fits[0]
            elif (square := self._square(name, key)) is None:
                return None
            else:
                transposed = square
            settings = Settings(side=side, out=weight[1] if transposed else weight[0])
        elif len(weight) >= 3 and len(vector) == len(weight):
            found = self._conv_settings(module, key, vector, weight, name)
            if found is None:
                return None
            settings = found
        else:
            self.refuse(key, f"shape {list(vector)} does not suit {name} of shape {list(weight)}")
            return None
        operation = Operation("ia3", self.number, module, parts, settings, transposed)
        bias = name.removesuffix("weight") + "bias"
        if settings.side == "out" and name.endswith(".weight") and bias in self.build.base.where:
            if self.build.state(bias).shape != (settings.out,):
                shape = list(self.build.state(bias).shape)
                self.refuse(key, f"{bias} has shape {shape}, not [{settings.out}]")
                return None
            self.build.state(bias).operations.append(replace(operation, on_bias=True))
        return operation

    def _linear_side(self, module: str, vector: tuple[int, ...]) -> str:
        """(out, 1) scales outputs, (1, in) inputs; for (1, 1) the config decides."""
        if vector == (1, 1):
            return "in" if self.config.is_feedforward(module) else "out"
        return "out" if vector[1] == 1 else "in"

    def _conv_settings(
        self, module: str, key: str, vector: tuple[int, ...], weight: tuple[int, ...], name: str
    ) -> Settings | None:
        length = vector[1]
        if math.prod(vector) != length:
            self.refuse(key, f"shape {list(vector)}; expected (1, channels, 1, ...)")
            return None
        side = "in" if self.config.is_feedforward(module) else "out"
        kernel = math.prod(weight[2:])
        if side == "out":
            if length != weight[0]:
                self.refuse(key, f"{length} elements, but {name} has {weight[0]} output channels")
                return None
            return Settings(side=side, out=weight[0])
        groups, rest = divmod(length, weight[1]) if weight[1] else (0, 1)
        if rest or not groups or weight[0] % groups:
            self.refuse(key, f"{length} input channels do not suit {name} {list(weight)}")
            return None
        return Settings(side=side, kernel=kernel, groups=groups, out=weight[0])

    def _square(self, name: str, key: str) -> bool | None:
        fan = bool(self.config.fields.get("fan_in_fan_out"))
        transposed = is_conv1d(self.build.base, name, fan)
        if transposed is None:
            self.refuse(
                key,
                f"{name} is square, and nothing tells whether it is stored as (out, in) or "
                "(in, out); put the base's config.json beside its weights",
            )
        return transposed

    def _lora(
        self, method: str, module: str, parts: dict[str, str], name: str, table: bool
    ) -> Operation | None:
        key = parts["lora_A"]
        a, b = self.shape(parts["lora_A"]), self.shape(parts["lora_B"])
        state = self.build.state(name)
        weight = state.shape
        if len(a) < 2 or len(b) < 2 or len(weight) < 2:
            self.refuse(
                key, f"lora_A {list(a)}, lora_B {list(b)} do not suit {name} {list(weight)}"
            )
            return None
        rank = a[0]
        if not rank or rank != self.config.rank(module):
            self.refuse(key, f"rank {rank} in the file, {self.config.rank(module)} by the config")
            return None
        groups = rank // b[1] if b[1] and rank % b[1] == 0 else 0
        out, inner = b[0], math.prod(a[1:])
        transposed = table
        stored = (weight[0], math.prod(weight[1:]))
        if len(weight) == 2 and not table:
            fits = [stored == (out, inner), stored == (inner, out)]
            if out == inner and any(fits):
                square = self._square(name, key)
                if square is None:
                    return None
                transposed = square
            else:
                transposed = fits[1]
        logical = stored[::-1] if transposed else stored
        conv = len(weight) > 2
        problem = (
            logical != (out, inner)
            or (conv and (a[1:] != weight[1:] or math.prod(b[2:]) != 1))
            or (not conv and (len(a) != 2 or len(b) != 2))
            or groups < 1
            or (groups > 1 and (not conv or out % groups))
        )
        if problem:
            self.refuse(
                key,
                f"lora_A {list(a)} and lora_B {list(b)} do not make an update of {name} "
                f"{list(weight)}",
            )
            return None
        for part in ("lora_magnitude_vector", "lora_bias"):
            if part in parts and math.prod(self.shape(parts[part])) != out:
                self.refuse(parts[part], f"{part} has not {out} elements")
                return None
        if method == "dora" and not self.config.fields.get("use_dora"):
            self.refuse(parts["lora_magnitude_vector"], "a DoRA magnitude, but use_dora is false")
            return None
        settings = Settings(
            scaling=self.config.scaling(module),
            slices=slices_for(state.dtype, b[1]),
            groups=groups,
            out=out,
        )
        if method == "dora" and "lora_bias" in parts:
            self.refuse(parts["lora_bias"], "a bias of lora_B together with DoRA is not supported")
            return None
        operation = Operation(method, self.number, module, parts, settings, transposed)
        if "lora_bias" in parts and not self._lora_bias(operation, name, out):
            return None
        return operation

    def _lora_bias(self, operation: Operation, name: str, out: int) -> bool:
        bias = name.removesuffix("weight") + "bias"
        key = operation.parts["lora_bias"]
        if not self.config.fields.get("lora_bias"):
            self.refuse(key, "a bias of lora_B, but lora_bias is false")
            return False
        if bias not in self.build.base.where or self.build.state(bias).shape != (out,):
            self.refuse(key, f"lora_bias needs a bias in the base, and there is no fitting {bias}")
            return False
        self.build.state(bias).operations.append(replace(operation, on_bias=True))
        return True

    def _tokens(self, module: str, parts: dict[str, str], name: str) -> Operation | None:
        key = parts["trainable_tokens_delta"]
        shape, table = self.shape(key), self.build.state(name).shape
        tokens = self.config.tokens(module)
        if tokens is None:
            self.refuse(key, f"the config does not tell which tokens of {module} were trained")
            return None
        fits = len(table) == 2 and shape == (len(tokens), table[1])
        if not fits or len(set(tokens)) != len(tokens) or max(tokens, default=0) >= table[0]:
            self.refuse(
                key, f"{len(tokens)} tokens, shape {list(shape)}, do not suit {name} {list(table)}"
            )
            return None
        settings = Settings(tokens=tokens, out=table[1])
        return Operation("trainable_tokens", self.number, module, parts, settings, transposed=True)


# --- tied embeddings -------------------------------------------------------------------------


def _leaf(parameter: str) -> str:
    """The last component of a parameter's module."""
    return parameter.rpartition(".")[0].rpartition(".")[2]


def _tied_pair(base: Checkpoint) -> tuple[str, str] | None:
    """(input embedding, head) that share one tensor in memory; the head may be missing on disk."""
    embeddings = [n for n in base.where if n.endswith(".weight") and _leaf(n) in INPUT_EMBEDDINGS]
    if len(embeddings) != 1 or is_tied(base) is False:
        return None
    config = base.config or {}
    kinds = config.get("architectures") or []
    generative = [k for k in kinds if isinstance(k, str) and not k.endswith("Model")]
    if kinds and not any(
        "CausalLM" in k or "LMHead" in k or "Conditional" in k for k in generative
    ):
        return None
    if config.get("is_encoder_decoder"):
        return None
    above = embeddings[0].removesuffix(".weight").split(".")[:-1]
    for stem in (
        ["model", "language_model"],
        ["model"],
        ["transformer"],
        ["gpt_neox"],
        ["decoder"],
    ):
        if above[-len(stem) :] == stem:
            above = above[: -len(stem)]
            break
    head = ".".join([*above, "lm_head", "weight"])
    heads = [n for n in base.where if n.endswith(".weight") and _leaf(n) in HEADS]
    if heads:
        if is_tied(base) is None or len(heads) > 1:
            return None  # a head of its own, and no config that ties it
        head = heads[0]
    return embeddings[0], head


def _same(embedding: _State, head: _State, adapters: tuple[Adapter, ...], base: Checkpoint) -> bool:
    """Whether both ends of a tied pair get equal values, so that they can stay tied."""
    if embedding.shape != head.shape or len(embedding.operations) != len(head.operations):
        return False
    ends = [embedding.source, head.source]
    kinds = {type(end) for end in ends}
    if len(kinds) > 1:
        return False
    if isinstance(ends[0], Replacement) and isinstance(ends[1], Replacement) and ends[0] != ends[1]:
        one, two = (
            adapters[end.adapter].read(end.key) for end in ends if isinstance(end, Replacement)
        )
        if one.dtype != two.dtype or not torch.equal(one, two):
            return False
    return all(map(_same_update(adapters), embedding.operations, head.operations))


def _same_update(adapters: tuple[Adapter, ...]) -> Callable[[Operation, Operation], bool]:
    """Whether two operations make the same change: of equal parts, or of transposed factors."""

    def same(one: Operation, two: Operation) -> bool:
        if one == two:
            return True
        if one.method != two.method or one.settings.scaling != two.settings.scaling:
            return False
        if one.method != "lora" or one.transposed == two.transposed:
            return False
        read = [
            {part: adapters[op.adapter].read(op.parts[part]) for part in ("lora_A", "lora_B")}
            for op in (one, two)
        ]
        return torch.equal(read[0]["lora_A"], read[1]["lora_B"].t()) and torch.equal(
            read[0]["lora_B"], read[1]["lora_A"].t()
        )

    return same


# --- files of the output -----------------------------------------------------------------------


def _usual_dtype(base: Checkpoint) -> str:
    """The dtype of most of the base's elements, among those that can be written."""
    count: Counter[str] = Counter()
    for shard in base.shards:
        for info in shard.header.tensors.values():
            if format_of(info.dtype):
                count[info.dtype] += info.nbytes
    return count.most_common(1)[0][0] if count else "F32"


def _shards(base: Checkpoint, edits: dict[str, Edit]) -> tuple[OutputShard, ...]:
    """The output's files: the base's own headers, but where a tensor is added or resized."""
    added = [name for name in edits if name not in base.where]
    home = len(base.shards) - 1
    result = []
    for number, shard in enumerate(base.shards):
        header: Header = shard.header
        resized = any(n in edits and edits[n].shape != t.shape for n, t in header.tensors.items())
        mine = added if number == home else []
        if resized or mine:
            entries = [
                (n, t.dtype, edits[n].shape if n in edits else t.shape)
                for n, t in header.tensors.items()
            ]
            entries += [(n, edits[n].dtype, edits[n].shape) for n in mine]
            header = build_header(entries, header.metadata)
        result.append(OutputShard(shard.name, header, number, header is shard.header))
    return tuple(result)


def _index(base: Checkpoint, shards: tuple[OutputShard, ...]) -> bytes:
    """The index with the new tensors, and the sizes that it told before brought up to date."""
    assert base.index is not None
    tensors = [(n, t, s.name) for s in shards for n, t in s.header.tensors.items()]
    metadata = dict(base.index.get("metadata") or {})
    metadata["total_size"] = sum(t.nbytes for _, t, _ in tensors)
    if "total_parameters" in metadata:
        metadata["total_parameters"] = sum(math.prod(t.shape) for _, t, _ in tensors)
    where = {n: s for n, _, s in sorted(tensors, key=lambda item: item[0])}
    index = {**base.index, "metadata": metadata, "weight_map": where}
    return (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode()
