"""An adapted model: the same object, with the habits that people have from PEFT.

The model keeps its class by name, its modules, and its parameters under their names; its class
becomes a subclass, made here, that adds the methods below.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from infold.errors import Refusal
from infold.tuners import files, merging
from infold.tuners.classes import Front, put_before, take_away
from infold.tuners.config import LoraConfig, TunerConfig
from infold.tuners.embeddings import Swapped, bring
from infold.tuners.layers import Adapted, Adapter, adapt
from infold.tuners.offloading import offloaded, without_values
from infold.tuners.parameters import adapt_parameter
from infold.tuners.parts import layers_of, new_adapter
from infold.tuners.quantized import keep_gradients
from infold.tuners.rows import Rows, in_order, in_pieces, mingling, refuse, repeats
from infold.tuners.select import Selection, select
from infold.tuners.vocabulary import TokenRows, check_order
from infold.tuners.weighted import add_weighted
from infold.tuners.whole import Whole, add_whole, clashes, restore_whole

__all__ = ["AdaptedModel", "Attached", "attach", "insert", "load"]

BASE = "__base__"  # in adapter_names: a row that no adapter changes


@dataclass
class Attached:
    """What a model knows of its adapters."""

    frozen: dict[str, bool]  # parameter -> whether it was trainable before
    configs: dict[str, TunerConfig] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    enabled: bool = True
    layers: dict[str, Adapted] = field(default_factory=dict)
    whole: dict[str, Whole] = field(default_factory=dict)
    biases: dict[str, Swapped] = field(default_factory=dict)
    embeddings: dict[str, Swapped] = field(default_factory=dict)  # others than the base's
    tokens: dict[str, TokenRows] = field(default_factory=dict)
    tied: dict[str, dict[str, str]] = field(default_factory=dict)  # see Selection
    rows: Rows = field(default_factory=Rows)
    mingling: dict[str, str] | None = None  # layers that see no rows of the batch; None: not known
    merged: merging.Merged = field(default_factory=lambda: merging.Merged())
    slow: list[nn.Module] = field(default_factory=list)  # 4-bit layers kept off a kernel
    hooked: bool = False  # whether inputs require gradients because of us


def attach(model: nn.Module, config: TunerConfig, name: str = "default") -> Any:
    """Give a model an adapter, ready to be trained: `model` itself, with new methods.

    All parameters of the base are frozen; those of the adapter are float32 where the base has 16
    bits, and alone require a gradient. A second call adds a second adapter and makes it active.
    Raises Refusal where the config does not suit the model, which is then unchanged.
    """
    selection = select(model, config)
    with _adding(model, name) as adapted:
        insert(adapted, name, selection)
        adapted.set_adapter(name)
    return model


def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    name: str = "default",
    trainable: bool = False,
) -> Any:
    """Attach a saved adapter, from a folder in PEFT's layout or the Hub, and make it active.

    Raises Refusal for any tensor that has no place in the model, which is then unchanged.
    """
    with _adding(model, name) as adapted:
        files.load(adapted, path, name, trainable)
        adapted.set_adapter(name)
    return model


@contextmanager
def _adding(model: nn.Module, name: str) -> Iterator[AdaptedModel]:
    """Where adding an adapter fails inside of this, the model is what it was before."""
    fresh = not isinstance(model, AdaptedModel)
    _check_name(None if fresh else cast(AdaptedModel, model)._attached, name)
    if fresh:
        _become(model)
    adapted = cast(AdaptedModel, model)
    try:
        yield adapted
    except BaseException:
        if name in adapted._attached.configs:
            adapted.delete_adapter(name)
        if fresh:
            adapted.unload()
        raise


def _check_name(attached: Attached | None, name: str) -> None:
    if not name or "." in name or name == BASE:
        raise Refusal(f"an adapter cannot be called {name!r}: give a name without dots")
    if hasattr(nn.ModuleDict(), name):
        raise Refusal(f"an adapter cannot be called {name!r}: PyTorch's ModuleDict has that name")
    if attached is not None and name in attached.configs:
        raise Refusal(f"there is an adapter {name!r} already; delete_adapter({name!r}) removes it")


def _by_rows(cls: type[nn.Module], name: str) -> Any:
    """A method of a model that also takes `adapter_names`."""
    plain = getattr(cls, name)

    @functools.wraps(plain)  # the Trainer reads forward's signature
    def method(self: AdaptedModel, *args: Any, **kwargs: Any) -> Any:
        names, rows = kwargs.pop("adapter_names", None), self._attached.rows
        if names is not None:
            times = repeats(self, args, kwargs) if name == "generate" else 1
            with self._each_row(names, args, kwargs, times):
                return plain(self, *args, **kwargs)
        if rows.index is not None:
            with rows.one_of_many(in_order(args, kwargs)):
                return plain(self, *args, **kwargs)
        return plain(self, *args, **kwargs)

    return method


def _become(model: nn.Module) -> None:
    """Make a model an AdaptedModel without adapters."""
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    model.requires_grad_(False)
    put_before(AdaptedModel, model)
    cast(AdaptedModel, model)._attached = Attached(before)
    if getattr(model, "is_quantized", False):
        # transformers' word for it: its Trainer takes no quantized model without adapters
        model._hf_peft_config_loaded = True  # type: ignore[assignment]
    if _checkpoints(model) and not model.__dict__.get("_require_grads_hooks"):
        model.enable_input_require_grads()  # type: ignore[operator]
        cast(AdaptedModel, model)._attached.hooked = True


def _checkpoints(model: nn.Module) -> bool:
    # the second is what transformers called it until 5.20; asking for it warns
    names = ("is_activation_checkpointing", "is_gradient_checkpointing")
    name = next((n for n in names if hasattr(type(model), n)), names[1])
    return bool(getattr(model, name, False))


def insert(
    model: AdaptedModel,
    name: str,
    selection: Selection,
    loaded: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> None:
    """Add an adapter's parts to the layers of a selection; `loaded`: {path: {part: values}}.

    Interrupted, it leaves what delete_adapter takes away.
    """
    attached, config, rows = model._attached, selection.config, selection.rows
    layers = layers_of(selection)
    tied = {path: model.get_submodule(path) for path in selection.tied}
    parameters = {path: module for path, (module, _) in selection.parameters.items()}
    if problems := clashes(layers | tied | parameters, selection.whole, attached.whole):
        raise Refusal(problems)
    if problems := without_values(model, selection, _bias_names(model, selection), loaded is None):
        raise Refusal(problems)
    if isinstance(config, LoraConfig) and config.bias != "none" and attached.biases:
        other = next(iter(attached.biases))
        raise Refusal(f"bias={config.bias!r}: the adapter {other!r} trains biases already")
    if rows.tokens and attached.merged.names:
        merged = ", ".join(attached.merged.names)
        raise Refusal(f"trainable_token_indices: unmerge {merged} first")
    attached.configs[name], attached.mingling = config, None
    attached.tied[name] = selection.tied
    bring(attached.embeddings, attached.merged.names)  # a new adapter begins from the base
    if not config.inference_mode:
        attached.slow += keep_gradients(model)
    if rows.tokens:
        attached.tokens[name] = rows
    adapted: dict[str, Callable[[Rows], Adapted]] = {
        path: partial(adapt, module, path) for path, module in layers.items()
    }
    adapted |= {p: partial(adapt_parameter, *own, p) for p, own in selection.parameters.items()}
    for path, make in adapted.items():
        layer = make(attached.rows)
        attached.layers[path] = layer
        layer.adapters[name] = new_adapter(
            selection, path, layer, None if loaded is None else loaded[path]
        )
        _keep_off_fast_path(model, path, layer.holder)
    for path, module in tied.items():
        attached.layers[path] = layer = adapt(module, path, attached.rows)
        layer.adapters[name] = attached.layers[selection.tied[path]].adapters[name]
    for path, module in selection.whole.items():
        attached.whole[path] = add_whole(module, path, name, attached.rows)
    if isinstance(config, LoraConfig) and config.bias != "none":
        attached.biases[name] = _biases(model, _bias_names(model, selection))


def _keep_off_fast_path(model: nn.Module, path: str, layer: nn.Module) -> None:
    """nn.TransformerEncoderLayer can read weights without calling the layers; hooks forbid it."""
    while path:
        path = path.rpartition(".")[0]
        if isinstance(model.get_submodule(path), nn.TransformerEncoderLayer):
            if not layer._forward_pre_hooks:
                layer.register_forward_pre_hook(_nothing)
            return


def _nothing(module: nn.Module, args: Any) -> None: ...


def _take_hook(layer: nn.Module) -> None:
    for key, hook in list(layer._forward_pre_hooks.items()):
        if hook is _nothing:
            del layer._forward_pre_hooks[key]


def _biases(model: AdaptedModel, names: set[str]) -> Swapped:
    bases = {id(place.merged): place.base for place in model._attached.merged.places}
    own = {n: bases.get(id(p), p) for n, p in model.named_parameters() if n in names}
    return Swapped(own, {name: parameter.detach().clone() for name, parameter in own.items()})


def _bias_names(model: nn.Module, selection: Selection) -> set[str]:
    """The biases that an adapter trains."""
    config, layers = selection.config, selection.layers
    wanted = config.bias if isinstance(config, LoraConfig) else "none"
    return {
        name
        for name, _ in model.named_parameters()
        if name.endswith("bias")
        and ".adapters." not in name
        and wanted != "none"
        and (wanted == "all" or name.rpartition(".")[0] in layers)
    }


class AdaptedModel(Front):
    """A model with adapters, by the name of the class that it had."""

    _attached: Attached

    @classmethod
    def _look(cls, plain: type[nn.Module]) -> tuple[str, dict[str, Any]]:
        named = {"__module__": plain.__module__, "__qualname__": plain.__qualname__}
        wrapped = {n: _by_rows(plain, n) for n in ("forward", "generate") if hasattr(plain, n)}
        return plain.__name__, named | wrapped

    # --- which adapters are in force ---------------------------------------------------------

    @property
    def peft_config(self) -> dict[str, TunerConfig]:
        """Adapter name -> its config."""
        return self._attached.configs

    @property
    def active_adapters(self) -> list[str]:
        return list(self._attached.active)

    @property
    def active_adapter(self) -> str | list[str]:
        active = self.active_adapters
        return active[0] if len(active) == 1 else active

    def add_adapter(self, adapter_name: str, peft_config: TunerConfig) -> None:
        """Add an adapter without making it active."""
        selection = select(self, peft_config)
        with _adding(self, adapter_name):
            insert(self, adapter_name, selection)
            self.set_adapter(self.active_adapters or adapter_name)

    def set_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Put these adapters in force, in this order, and make them the ones that are trained."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self._known(names)
        check_order(self._attached, (*self._attached.merged.names, *names))
        self._attached.active = tuple(dict.fromkeys(names))
        self._refresh()

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside of the `with`, the model is the base, bit for bit."""
        attached = self._attached
        was = attached.enabled
        attached.enabled = False
        self._refresh()
        try:
            yield
        finally:
            attached.enabled = was
            self._refresh()

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; one that is merged is taken out of the weights first."""
        self._known([adapter_name])
        attached = self._attached
        attached.mingling = None
        left = tuple(name for name in attached.merged.names if name != adapter_name)
        attached.merged = merging.merged(self, attached.merged, left)
        if adapter_name in attached.biases:
            attached.biases.pop(adapter_name).switch(False)
        if adapter_name in attached.embeddings:
            attached.embeddings.pop(adapter_name).switch(False)
        for path, layer in list(attached.layers.items()):
            if adapter_name in layer.adapters:
                del layer.adapters[adapter_name]
            if not len(layer.adapters):
                _take_hook(layer.holder)
                layer.leave()
                del attached.layers[path]
        for path, module in list(attached.whole.items()):
            if adapter_name in module.adapters:
                del module.adapters[adapter_name]
            if not len(module.adapters):
                restore_whole(module)
                del attached.whole[path]
        for own in (attached.configs, attached.tied, attached.tokens):
            own.pop(adapter_name, None)
        attached.active = tuple(name for name in attached.active if name != adapter_name)
        self._refresh()

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str | None = None,
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
        seed: int = 0,
    ) -> None:
        """Combine adapters, each with its weight, into a new one, which is not active yet.

        It is trained if one of them is. It has the tensors that `infold combine` writes
        (docs/combine.md), which also tells the types; default: svd for LoRA, linear for IA³.
        svd_rank: default the largest rank.
        svd_clamp: cuts both factors at this quantile of their elements. density: the share of
        elements that pruning keeps, in (0, 1]. seed: for DARE. What was no sum, such as a saved
        module that is carried over, is told in a warning.
        Raises Refusal with all reasons; the model is unchanged then.
        """
        self._known(adapters)
        _check_name(self._attached, adapter_name)
        options = {
            "svd_rank": svd_rank, "svd_clamp": svd_clamp, "density": density,
            "majority_sign": majority_sign_method, "seed": seed,
        }  # fmt: skip
        add_weighted(self, adapters, weights, adapter_name, combination_type, options)

    def _known(self, names: Sequence[str]) -> None:
        strangers = [name for name in names if name not in self._attached.configs]
        if strangers:
            known = ", ".join(self._attached.configs) or "none"
            raise Refusal(f"there is no adapter {', '.join(strangers)}; there are: {known}")

    def _refresh(self) -> None:
        """Bring layers, biases, weights and gradients in line with what is active."""
        attached = self._attached
        attached.merged.show(attached.enabled)
        running = [n for n in attached.active if n not in attached.merged.names]
        for layer in attached.layers.values():
            adapters = {n: cast(Adapter, layer.adapters[n]) for n in layer.adapters}
            layer._runs = tuple(adapters[n] for n in running if n in adapters and attached.enabled)
            for name, adapter in adapters.items():
                adapter.requires_grad_(self._trains(name))
        # what is merged is in force, active or not
        used = (*attached.merged.names, *attached.active) if attached.enabled else ()
        for module in attached.whole.values():
            own = [n for n in used if n in module.adapters]
            module._in_force = own[-1] if own else None
            for name in module.adapters:
                module.adapters[name].requires_grad_(self._trains(name))
        bring(attached.embeddings, used)
        bring(attached.biases, used)
        for name, biases in attached.biases.items():
            for parameter in biases.parameters.values():
                parameter.requires_grad_(self._trains(name))

    def _trains(self, name: str) -> bool:
        config = self._attached.configs[name]
        return name in self._attached.active and not config.inference_mode

    # --- one adapter for each row ------------------------------------------------------------

    @contextmanager
    def _each_row(
        self, names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any], times: int
    ) -> Iterator[None]:
        attached = self._attached
        self._known([name for name in dict.fromkeys(names) if name != BASE])
        if attached.merged.names:
            merged = ", ".join(attached.merged.names)
            raise Refusal(f"adapter_names: {merged} is merged into the weights; unmerge it first")
        if not attached.enabled:
            raise Refusal("adapter_names inside of disable_adapter()")
        if attached.biases:
            raise Refusal("adapter_names: an adapter that trains biases has them in every row")
        own = attached.embeddings
        for name, swapped in own.items():
            if any((own.get(row) is swapped) is not swapped.on for row in names):
                raise Refusal(
                    f"adapter_names: {name} brings an embedding, which all rows share and have "
                    f"while {name} is active; give its rows a batch of their own, after "
                    f"set_adapter({name!r}), and make another adapter active for the rest"
                )
        if self.training and torch.is_grad_enabled() and _checkpoints(self):
            raise Refusal(
                "adapter_names: with activation checkpointing, layers run again in the backward "
                "pass, where nobody knows the rows any more; switch it off"
            )
        inputs = in_order(args, kwargs)
        first = next((v for v in inputs if isinstance(v, Tensor) and v.dim()), None)
        if first is not None and len(first) != len(names):
            raise Refusal(f"{len(names)} adapter_names for a batch of {len(first)}")
        if len(set(names)) > 1:
            self._check_rows(names)
        with attached.rows.chosen(names, BASE, inputs, times):
            yield

    def _check_rows(self, names: Sequence[str]) -> None:
        """Raise Refusal where these adapters are on layers that do not see the batch's rows."""
        attached = self._attached
        own: dict[str, Any] = {p: m for p, m in attached.layers.items() if m.holder is m}
        own |= attached.whole
        if attached.mingling is None:
            attached.mingling = mingling(self, own)
            attached.rows.pieces = in_pieces(self, own)
        found = attached.mingling.items()
        refuse({p: why for p, why in found if any(name in own[p].adapters for name in names)})

    # --- merging -----------------------------------------------------------------------------

    def merge_adapter(
        self, adapter_names: Sequence[str] | None = None, safe_merge: bool = True
    ) -> None:
        """Merge adapters (default: the active ones) into the weights, as `infold merge` would.

        The base's tensors are kept beside, so that unmerge_adapter restores them bit for bit.
        Raises Refusal, with the model unchanged, where a value would not be finite. safe_merge is
        there for PEFT's sake: that check is always made.
        """
        names = self.active_adapters if adapter_names is None else list(adapter_names)
        self._known(names)
        self._merge((*self._attached.merged.names, *names))

    def unmerge_adapter(self, adapter_names: Sequence[str] | None = None) -> None:
        """Take adapters (default: all that are merged) out of the weights again, exactly."""
        merged = self._attached.merged.names
        gone = merged if adapter_names is None else adapter_names
        self._known(gone)
        self._merge(name for name in merged if name not in gone)

    def _merge(self, names: Iterable[str]) -> None:
        """Have these adapters in the weights; other active ones run on top of them."""
        attached, wanted = self._attached, tuple(dict.fromkeys(names))
        check_order(attached, (*wanted, *attached.active))
        self._check_in_memory(wanted)
        attached.merged = merging.merged(self, attached.merged, wanted)
        self._refresh()

    def _check_in_memory(self, names: Sequence[str]) -> None:
        layers = self._attached.layers.items()
        own = ((p, m.holder) for p, m in layers if any(name in m.adapters for name in names))
        if problems := offloaded(own, "cannot be merged into"):
            raise Refusal(problems)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = True,
        adapter_names: Sequence[str] | None = None,
        dequantize: torch.dtype | None = None,
    ) -> Any:
        """Merge adapters (default: the active ones) for good, after those that are merged already:
        the plain model, in its own class.

        dequantize: a dtype for 4 and 8 bit layers that an adapter changes; without it a Refusal.
        The result has the bytes that `infold merge` writes. Raises Refusal as merge_adapter.
        """
        attached = self._attached
        chosen = self.active_adapters if adapter_names is None else adapter_names
        names = tuple(dict.fromkeys((*attached.merged.names, *chosen)))
        self._known(names)
        check_order(attached, names)
        self._check_in_memory(names)
        attached.merged = merging.merged(
            self, attached.merged, names, keep=False, dequantize=dequantize
        )
        for module in attached.whole.values():
            own = [n for n in names if n in module.adapters]
            module._in_force = own[-1] if own else None
        bring(attached.embeddings, names)
        bring(attached.biases, names)
        return self._plain_again(keep=True)

    def unload(self) -> Any:
        """Remove all adapters: the base again, bit for bit, in its own class."""
        attached = self._attached
        attached.merged = merging.merged(self, attached.merged, ())
        for module in attached.whole.values():
            module._in_force = None
        for swapped in (*attached.embeddings.values(), *attached.biases.values()):
            swapped.switch(False)
        return self._plain_again(keep=False)

    def _plain_again(self, keep: bool) -> nn.Module:
        attached, shared = self._attached, merging.shared_parameters(self)
        attached.merged.commit(self)
        for layer in attached.layers.values():
            _take_hook(layer.holder)
            layer.leave()
        for module in attached.whole.values():
            restore_whole(module, keep)
        merging.untie(self, shared)
        del self._attached
        self.__dict__.pop("_hf_peft_config_loaded", None)
        if attached.hooked:
            self.disable_input_require_grads()  # type: ignore[operator]
        take_away(self)
        for slow in attached.slow:
            slow.support_avx512bf16_for_cpu = True  # type: ignore[assignment]
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(attached.frozen.get(name, False))
        return self

    # --- files and figures -------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
        is_main_process: bool = True,
        save_embedding_layers: bool | str = "auto",
        **kwargs: Any,
    ) -> None:
        """Write the adapters in PEFT's layout: `default` into the folder, others into folders in
        it. state_dict: where the values come from, if not from the model (FSDP gathers one).
        save_embedding_layers: write the base's embeddings too; "auto": where embed_tokens or
        lm_head is a target, or the vocabulary was resized. Raises Refusal for PEFT's other
        options."""
        files.refuse_others("save_pretrained", kwargs)
        if not safe_serialization:
            raise Refusal("safe_serialization=False: adapters are written as safetensors only")
        if save_embedding_layers not in (True, False, "auto"):
            raise Refusal(f"save_embedding_layers={save_embedding_layers!r}: True, False or 'auto'")
        names = list(self._attached.configs if selected_adapters is None else selected_adapters)
        self._known(names)
        if is_main_process:
            files.save(self, save_directory, names, state_dict, save_embedding_layers)

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        revision: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Add a saved adapter, from a folder or the Hub, without making it active.

        revision: of a Hub id, as in `org/name@revision`. Raises Refusal for PEFT's other options.
        """
        files.refuse_others("load_adapter", kwargs)
        if revision is not None and not os.path.exists(model_id):
            model_id = f"{os.fspath(model_id)}@{revision}"
        with _adding(self, adapter_name):
            files.load(self, model_id, adapter_name, is_trainable)
            self._refresh()

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) parameters; two 4-bit weights share a byte."""
        sizes = []
        for parameter in self.parameters():
            packed = type(parameter).__name__ == "Params4bit"
            bytes_each = getattr(getattr(parameter, "quant_storage", None), "itemsize", 1)
            count = parameter.numel() * (2 * bytes_each if packed else 1)
            sizes.append((count if parameter.requires_grad else 0, count))
        return sum(one for one, _ in sizes), sum(count for _, count in sizes)

    def print_trainable_parameters(self) -> None:
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / max(total, 1)
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}"
        )
