"""One adapter's tensors -> edits of a GGUF base. As `plan/consume.py`, but that modules go by other
names there, rows can have another order, and most weights are quantized."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from infold.adapters import Settings
from infold.checkpoint.adapter import Adapter
from infold.formats import format_of
from infold.plan.config import AdapterConfig
from infold.plan.consume import Consumer
from infold.plan.draft import Draft
from infold.plan.edits import Operation
from infold.plan.fold import INSTEAD, Unfoldable
from infold.plan.gguf import GgufModules

__all__ = ["GgufConsumer"]

_INSTEAD = "; merge into the safetensors checkpoint, and convert the result"


class GgufConsumer(Consumer):
    """Turns every tensor of one adapter into edits of a GGUF file, or into a reason to refuse.

    Raises Refusal for a file of an unknown architecture.
    """

    instead = _INSTEAD

    def __init__(self, draft: Draft, number: int, adapter: Adapter, config: AdapterConfig) -> None:
        super().__init__(draft, number, adapter, config)
        self.gguf = GgufModules(draft.base)

    def tensors(self) -> Collection[str]:
        return {f"{module}.weight" for module in self.gguf.homes}

    def finds(self, module: str) -> bool:
        try:
            return self.gguf.find(module) is not None
        except LookupError:
            return False

    def replacement(self, parameter: str, key: str, copy: str | None = None) -> None:
        for one in (key, copy):
            if one is not None:
                self.refuse(one, f"a whole tensor is not put into a GGUF file{_INSTEAD}")

    def _update(self, module: str, method: str, parts: dict[str, str], table: bool) -> None:
        key = next(iter(parts.values()))
        try:
            path = self.gguf.find(module)
        except LookupError as error:
            self.refuse(key, f"{module} {error}")
            return
        if path is None:
            nearest = self.gguf.names.nearest(f"{module}.weight")
            why = f"there is no module {module} in the base{nearest}"
            if module.endswith("lm_head"):
                why = f"the base has no head of its own (output.weight){_INSTEAD}"
            for part in parts.values():
                self.refuse(part, why)
            return
        if self.twice(path, method, key):
            return
        home = self.gguf.homes[path]
        dense = format_of(self.draft.base.info(home.weight).dtype) is not None
        if method == "ia3" and home.name != "token_embd":
            self._vector(module, path, parts, dense and home.expert is None)
        elif method in ("ia3", "trainable_tokens") or (home.layer < 0 and self._shared()):
            self.refuse(key, f"{method} on {home.weight}, which may also be the head{_INSTEAD}")
        elif home.expert is not None:
            self.refuse(key, f"{home.weight} holds all experts as one tensor{_INSTEAD}")
        elif home.scale in self.draft.base.where:
            # of all its outputs: no matter to rows, but an update of elements would be scaled too
            self.refuse(key, f"{home.scale} is a factor of all that {home.weight} gives{_INSTEAD}")
        elif not dense:
            dtype = self.draft.base.info(home.weight).dtype
            self.draft.elements.add(home.weight)
            self.refuse(
                key,
                f"{home.weight} is quantized ({dtype}), and {method} changes single elements, "
                f"which its scales cannot tell{self._ways(home.weight)}",
            )
        else:
            made = self._lora(method, module, parts, home.weight, table)
            if made is not None:
                self.draft.state(home.weight).operations.append(made)

    def _shared(self) -> bool:
        """Whether embedding and head are one tensor, or are to get the same update."""
        return "output.weight" not in self.draft.base.where or self.config.ties

    def _vector(self, module: str, path: str, parts: dict[str, str], dense: bool) -> None:
        """IA³: into rows; but a dense weight can have its inputs scaled where they are."""
        key, home = parts["ia3_l"], self.gguf.homes[path]
        vector, weight = self.shape(key), home.weight
        if not (dense and len(vector) == 2 and self._linear_side(module, vector) == "in"):
            # one expert of several has no columns of its own, whatever the tensor becomes
            way = INSTEAD if home.expert is None else _INSTEAD
            self._fold(self.gguf, module, path, parts, weight, way)
            return
        size = self.gguf.size(path)
        if self._side(module, key, size, weight) and size is not None:
            settings = Settings(side="in", out=size[0])
            operation = Operation("ia3", self.number, module, parts, settings)
            self.draft.state(weight).operations.append(operation)

    def _transposed(self, name: str, key: str) -> bool:
        return False  # converters store every matrix as (out, in)

    def _ordered(self, settings: Settings, module: str) -> Settings:
        path = self.gguf.find(module)
        try:
            order = self.gguf.order(path) if path is not None else Settings()
        except Unfoldable as error:
            self.draft.reasons.append(f"{self.adapter.path}: {error}")
            return settings
        return replace(settings, view=order.view, order=order.order)
