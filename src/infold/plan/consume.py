"""One adapter's tensors -> edits of the draft. Each is consumed, or named in a reason to refuse."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace

import torch

from infold.adapters import Settings, methods_of
from infold.adapters.exact import slices_for
from infold.checkpoint.adapter import Adapter
from infold.formats import Quantized, Stored
from infold.plan.config import AdapterConfig
from infold.plan.draft import Draft, State
from infold.plan.edits import Operation, Replacement
from infold.plan.fold import INSTEAD, Modules, Unfoldable, fold
from infold.plan.layouts import HEADS, is_conv1d, is_end, leaf
from infold.plan.match import group_keys
from infold.plan.output import usual_dtype
from infold.plan.quantized import words_of

__all__ = ["Consumer"]


class Consumer:
    """Turns every tensor of one adapter into an edit of the draft, or into a reason to refuse."""

    instead = ""  # how a message goes on, where no option helps

    def __init__(self, draft: Draft, number: int, adapter: Adapter, config: AdapterConfig) -> None:
        self.draft, self.number, self.adapter, self.config = draft, number, adapter, config
        self.used: dict[tuple[str, str], str] = {}  # (tensor, method) -> key that was there first
        self.measured: list[str] = []  # static scales of activations that the adapter changes

    def refuse(self, key: str, why: str) -> None:
        self.draft.reasons.append(f"{self.adapter.path}: {key}: {why}")

    def shape(self, key: str) -> tuple[int, ...]:
        return self.adapter.tensors[key].shape

    def twice(self, name: str, method: str, key: str) -> bool:
        """Whether another key of this adapter came to the same tensor; then it is refused."""
        for end in self._with_copies(name):
            first = self.used.setdefault((end, method), key)
            if first != key:
                self.refuse(key, f"means {end}, and so does {first}; one of them would be lost")
                return True
        return False

    def find(self, parameter: str, key: str) -> str | None:
        """The output tensor for a parameter path; more than one is a reason to refuse."""
        try:
            return self._look(parameter)
        except LookupError as error:
            self.refuse(key, f"{parameter} {error}")
            return None

    def _look(self, parameter: str) -> str | None:
        """The output tensor for a parameter path; a tied head that is not on disk is found too."""
        name, pair = self.draft.names.find(parameter), self.draft.pair
        if name is None and pair and parameter.endswith(".weight"):
            usual = leaf(parameter) in HEADS and leaf(pair[1]) in HEADS
            return pair[1] if usual or f".{parameter}".endswith(f".{pair[1]}") else None
        return name

    def ends(self, name: str, both: bool) -> list[str]:
        """The tensors that an edit of `name` changes: both of a tied pair, or itself with what
        repeats it."""
        pair = self.draft.pair
        return list(pair) if both and pair and name in pair else self._with_copies(name)

    def _with_copies(self, name: str) -> list[str]:
        return [name, *self.draft.copies.get(name, ())]

    # --- plain tensors -----------------------------------------------------------------------

    def replacement(self, parameter: str, key: str, copy: str | None = None) -> None:
        """A whole tensor of the adapter takes the place of the base's. `copy` must be equal."""
        module = parameter.rpartition(".")[0]
        if copy and not torch.equal(self.adapter.read(key), self.adapter.read(copy)):
            self.refuse(copy, f"differs from {key}; which of them was trained?")
            return
        before = len(self.draft.reasons)
        name = self.find(parameter, key)
        if len(self.draft.reasons) > before:
            return
        if name is None:
            self._new(parameter, module, key)
            return
        if self.twice(name, "replacement", key):
            return
        saved = self.config.saves(module)
        tied = self.config.ties and not self._has_other_end(name)
        for end in self.ends(name, both=not saved or tied):
            state = self.draft.state(end)
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
            resizes = is_end(self.draft.base, name) and new[1:] == old[1:]
            if new != old and not (resizes and new):
                self.refuse(key, f"shape {list(new)}, but {end} has {list(old)}")
                continue
            state.source, state.shape = Replacement(self.number, key), new

    def _has_other_end(self, name: str, part: str | None = None) -> bool:
        """Whether this adapter has a tensor (this part) of its own for a tied pair's other end."""
        pair = self.draft.pair
        if not pair or name not in pair:
            return False
        other = pair[1] if name == pair[0] else pair[0]
        keys = group_keys(self.adapter.tensors)
        paths = [f"{module}.weight" for module, p in keys.modules.items() if part in (None, *p)]
        if part is None:
            paths += keys.plain
        return any(self._quietly(path) == other for path in paths)

    def tensors(self) -> Collection[str]:
        """The base's tensors as adapters spell them, with a tied head that is not on disk."""
        return {*self.draft.base.where, *(self.draft.pair or ())}

    def finds(self, module: str) -> bool:
        """Whether the base has a weight for a module of the adapter."""
        path = module.replace(".base_layer", "")
        if self.quantized(path) is not None:
            return True
        return any(self._quietly(f"{path}.{name}") for name in ("weight", "in_proj_weight"))

    def _quietly(self, parameter: str) -> str | None:
        try:
            return self._look(parameter)
        except LookupError:
            return None

    def _new(self, parameter: str, module: str, key: str) -> None:
        """A tensor that the base lacks: only a trained head may add one."""
        draft = self.draft
        if not (self.config.saves(module) and self.config.adds_head) or module in draft.names.all:
            self.refuse(key, f"there is no {parameter} in the base{draft.names.nearest(parameter)}")
            return
        if parameter in draft.states:
            self.refuse(key, f"{parameter} was already added by an earlier adapter")
            return
        shape = self.shape(key)
        dtype = usual_dtype(draft.base)
        draft.states[parameter] = State(Replacement(self.number, key), dtype, shape)
        if len(shape) == 2 and parameter.endswith(".weight"):
            draft.notes.append(
                f"added: {parameter}, a trained head that the base lacks; load the result with the "
                "class of that task (such as AutoModelForSequenceClassification)"
            )
            if module.rpartition(".")[2] in ("classifier", "score", "out_proj", "qa_outputs"):
                draft.labels = shape[0]

    # --- methods -----------------------------------------------------------------------------

    def operation(self, module: str, parts: dict[str, str]) -> None:
        """The update of one module."""
        if (found := self._method(module, parts)) is not None:
            self._update(module, *found)

    def _method(
        self, module: str, parts: dict[str, str]
    ) -> tuple[str, dict[str, str], bool] | None:
        """Method, its parts by their usual names, and whether they are an embedding's."""
        key, kind, told = next(iter(parts.values())), self.config.peft_type, parts
        methods = methods_of(kind)
        owners = [name for name, m in methods.items() if m.owns(parts, self.config.fields)]
        method = owners[0] if owners else ""
        table = mixed = False
        if owners:
            names = methods[method].TABLE
            tables = {p in names for p in told if names.get(p, p) in names.values()}
            table, mixed = True in tables, len(tables) > 1
            parts = {names.get(part, part): k for part, k in told.items()}
        if len(owners) != 1 or mixed or not parts.keys() <= set(methods[method].PARTS):
            for other in told.values():
                self.refuse(other, f"{', '.join(told)} on one module: no method of type {kind}")
            return None
        missing = [part for part in methods[method].REQUIRED if part not in parts]
        if missing:
            self.refuse(key, f"{module} lacks {', '.join(missing)} in the adapter file")
            return None
        return method, parts, table

    def _update(self, module: str, method: str, parts: dict[str, str], table: bool) -> None:
        key, before = next(iter(parts.values())), len(self.draft.reasons)
        path = module.replace(".base_layer", "")  # the output projection of MultiheadAttention
        if (quantized := self.quantized(path)) is not None:
            self.into_scales(method, module, path, parts, *quantized)
            return
        name = self.find(f"{path}.weight", key)
        if name is None and method == "lora" and len(self.draft.reasons) == before:
            name = self.find(f"{path}.in_proj_weight", key)
        if len(self.draft.reasons) > before:
            return
        if name is None:
            nearest = self.draft.names.nearest(f"{path}.weight")
            why = f"there is no module {path} in the base{nearest}"
            if way := self.draft.modules.config.get("quant_method"):
                why += f"; the base is quantized ({way}), maybe in a way that infold does not know"
            for part in parts.values():
                self.refuse(part, why)
            return
        if self.twice(name, method, key):
            return
        make = {"ia3": self._ia3, "trainable_tokens": self._tokens}.get(method)
        made = make(module, parts, name) if make else self._lora(method, module, parts, name, table)
        if made is None:
            return
        for end in self.ends(name, both=self._ties(method, name)):
            self.draft.state(end).operations.append(made)

    def quantized(self, path: str) -> tuple[Stored, Quantized] | None:
        """A quantized module; None where there is no such one, or where `find` will refuse it."""
        try:
            return self.draft.modules.find(path)
        except LookupError:
            return None

    def into_scales(
        self,
        method: str,
        module: str,
        path: str,
        parts: dict[str, str],
        stored: Stored,
        form: Quantized,
    ) -> None:
        """An adapter's update of a quantized module."""
        key = next(iter(parts.values()))
        if method != "ia3":
            self.draft.elements.add(stored.name)
            self.refuse(
                key,
                f"{stored.name} is quantized ({words_of(form, stored)}), and {method} changes "
                f"single elements, which its scales cannot tell{self._ways(stored.name)}",
            )
            return
        if self.twice(stored.name, method, key):
            return
        if self._fold(self.draft.modules, module, path, parts, stored.name):
            self.measured += self.draft.modules.measured(path)

    def _side(self, module: str, key: str, size: tuple[int, int] | None, name: str) -> str | None:
        """The side of an IA³ vector for a matrix of this size; what does not suit is refused."""
        vector = self.shape(key)
        if size is None or len(vector) != 2 or 1 not in vector:
            self.refuse(key, f"shape {list(vector)}; expected (out, 1) or (1, in)")
            return None
        side = self._linear_side(module, vector)
        expected = size[0 if side == "out" else 1]
        if math.prod(vector) != expected:
            told = f"{math.prod(vector)} elements, but {name} has {expected} {side}puts"
            self.refuse(key, told)
            return None
        return side

    def _fold(
        self,
        modules: Modules,
        module: str,
        path: str,
        parts: dict[str, str],
        name: str,
        way: str = INSTEAD,
    ) -> bool:
        """An IA³ vector on whatever stored rows it belongs to. way: what else can be done, as a
        message tells it."""
        key = parts["ia3_l"]
        try:
            side = self._side(module, key, modules.size(path), name)
            if side is None:
                return False
            places = fold(modules, path, side, lambda: self.adapter.read(key))
        except (Unfoldable, LookupError) as error:
            self.draft.stuck.add(name)
            told, why = str(error), self.draft.unknown.get(name)
            if why is not None:  # so that no option helps
                told = told.removesuffix(INSTEAD)
                told += f"{'' if why in told else f'; and {why}'}{self.instead}"
            self.refuse(key, told.replace(INSTEAD, way))
            return False
        if any(place.lossy for place in places):
            if below := int((self.adapter.read(key) < 0).sum()):
                self.draft.stuck.add(name)
                told = f"{below} elements are negative" if below > 1 else "one element is negative"
                self.refuse(key, f"{told}, and kernels read the scales of {name} without a sign")
                return False
        for place in places:
            if place.nested:
                self.draft.unnest(place.tensor)
            state = self.draft.state(place.tensor)
            state.scales = state.scales or place.scales
            state.operations.append(
                Operation(
                    "ia3", self.number, module, parts, place.settings, place.transposed,
                    place.on_bias, side == "in",
                )
            )  # fmt: skip
        return True

    def _ways(self, module: str) -> str:
        """How a message goes on that tells of a quantized module: what else can be done."""
        told = self.draft.unknown.get(module)
        return f"; and {told}{self.instead}" if told else self.draft.ways

    def _ties(self, method: str, name: str) -> bool:
        """Whether PEFT makes the same update at both ends of a tied pair."""
        pair = self.draft.pair
        if method == "trainable_tokens":
            own = self._has_other_end(name, "trainable_tokens_delta")
            return pair is not None and name == pair[0] and not own
        return self.config.ties and not self._has_other_end(name)

    def _ia3(self, module: str, parts: dict[str, str], name: str) -> Operation | None:
        key = parts["ia3_l"]
        vector, weight = self.shape(key), self.draft.state(name).shape
        transposed = False
        if len(weight) == 2:
            if len(vector) != 2 or 1 not in vector:
                self.refuse(key, f"shape {list(vector)}; expected (out, 1) or (1, in)")
                return None
            side = self._linear_side(module, vector)
            length = math.prod(vector)
            stored = self._transposed(name, key)
            if stored is None:
                return None
            transposed = stored
            logical = weight[::-1] if transposed else weight
            expected = logical[0 if side == "out" else 1]
            if length != expected:
                self.refuse(key, f"{length} elements, but {name} has {expected} {side}puts")
                return None
            settings = Settings(side=side, out=logical[0])
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
        if settings.side == "out" and name.endswith(".weight") and bias in self.draft.base.where:
            if self.draft.state(bias).shape != (settings.out,):
                shape = list(self.draft.state(bias).shape)
                self.refuse(key, f"{bias} has shape {shape}, not [{settings.out}]")
                return None
            self.draft.state(bias).operations.append(
                replace(operation, on_bias=True, transposed=False)
            )
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

    def _transposed(self, name: str, key: str) -> bool | None:
        """How a matrix is stored; a tied head that is not on disk is a Linear."""
        if name not in self.draft.base.where:
            return False
        fan = bool(self.config.fields.get("fan_in_fan_out"))
        transposed = is_conv1d(self.draft.base, name, fan)
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
        state = self.draft.state(name)
        weight = state.shape
        if len(a) < 2 or len(b) < 2 or len(weight) < 2:
            self.refuse(
                key, f"lora_A {list(a)}, lora_B {list(b)} do not suit {name} {list(weight)}"
            )
            return None
        rank = a[0]
        scaling = self.scaling(module, key, rank)
        if scaling is None:
            return None
        groups = rank // b[1] if b[1] and rank % b[1] == 0 else 0
        out, inner = b[0], math.prod(a[1:])
        transposed = table
        stored = (weight[0], math.prod(weight[1:]))
        if len(weight) == 2 and not table:
            layout = self._transposed(name, key)
            if layout is None:
                return None
            transposed = layout
        logical = stored[::-1] if transposed else stored
        conv = len(weight) > 2
        problem = (
            logical != (out, inner)
            or (conv and (a[1:] != weight[1:] or math.prod(b[2:]) != 1))
            or (not conv and (len(a) != 2 or len(b) != 2))
            or groups < 1
            or (groups > 1 and (not conv or out % groups))
        )
        if groups > 1 and conv and a[1] == weight[1] * groups:
            self.refuse(
                key,
                f"a convolution of {groups} groups: PEFT trains updates that cross groups, which "
                "no weight of it can hold; PEFT cannot merge them either",
            )
            return None
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
            scaling=scaling,
            slices=slices_for(state.dtype, b[1]),
            groups=groups,
            out=out,
        )
        settings = self._ordered(settings, module)
        if ".base_layer" in module:
            if not self.config.doubles:
                self.refuse(
                    key,
                    "was written by a PEFT newer than 0.21; whether that adds this update twice "
                    "in training, as earlier ones do, is not known",
                )
                return None
            self.draft.notes.append(f"{name}: PEFT adds this update twice, so the merge does too")
        operation = Operation(method, self.number, module, parts, settings, transposed)
        if "lora_bias" in parts and not self._lora_bias(operation, name, out):
            return None
        return operation

    def scaling(self, module: str, key: str, rank: int) -> float | None:
        """The scaling of a LoRA whose file has this rank."""
        ranks, scalings = self.config.ranks(module), self.config.scalings(module, rank or 1)
        if not rank or rank not in ranks:
            self.refuse(key, f"rank {rank} in the file, {ranks[0]} by the config")
            return None
        if len(scalings) > 1:
            self.refuse(key, "several of alpha_pattern match; PEFT lost their order on saving")
            return None
        return scalings[0]

    def _ordered(self, settings: Settings, module: str) -> Settings:
        """The settings with the order of the stored rows, where that is not the module's own."""
        return settings

    def _lora_bias(self, operation: Operation, name: str, out: int) -> bool:
        bias = name.removesuffix("weight") + "bias"
        key = operation.parts["lora_bias"]
        if not self.config.fields.get("lora_bias"):
            self.refuse(key, "a bias of lora_B, but lora_bias is false")
            return False
        if ".base_layer" in operation.module or not name.endswith(".weight"):
            self.refuse(key, "lora_bias of MultiheadAttention, which PEFT uses in part only")
            return False
        if bias not in self.draft.base.where or self.draft.state(bias).shape != (out,):
            self.refuse(key, f"lora_bias needs a bias in the base, and there is no fitting {bias}")
            return False
        self.draft.state(bias).operations.append(replace(operation, on_bias=True, transposed=False))
        return True

    def _tokens(self, module: str, parts: dict[str, str], name: str) -> Operation | None:
        key = parts["trainable_tokens_delta"]
        shape, table = self.shape(key), self.draft.state(name).shape
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
        state = self.draft.state(name)
        earlier = {op.adapter for op in state.operations} - {self.number}
        if isinstance(state.source, Replacement):
            earlier |= {state.source.adapter} - {self.number}
        if earlier:
            self.refuse(
                key,
                f"replaces rows of {name}, which an earlier adapter edits: its work would be lost",
            )
            return None
        settings = Settings(tokens=tokens, out=table[1])
        return Operation("trainable_tokens", self.number, module, parts, settings, transposed=True)
