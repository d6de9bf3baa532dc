"""Which methods merge: by infold's own table, and by trying PEFT's on a small model.

Nothing here is a list of what PEFT has: its registry is read, and each type is attached to a small
random Llama, given random values, merged, and compared with what it computed before.
"""

from __future__ import annotations

import contextlib
import copy
import io
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from infold.adapters import methods_of
from infold.tuners.loading import calm

__all__ = [
    "BITFIT",
    "NOTES",
    "MethodRow",
    "attach_bitfit",
    "attach_peft",
    "method_rows",
    "peft_inputs",
    "peft_needs",
    "peft_types",
]

BITFIT = "BitFit"
# What the merged weight is, for a weight W and an input side at the right. Types that are not here
# are shown without.
_MERGED = {
    "ADAMSS": "W + B A V in clusters of rows, V the first directions of W",
    "BEFT": "the biases, moved",
    "IA3": "diag(l) W; W diag(l) in the feed-forward",
    "LORA": "W + s B A; DoRA: its rows scaled to the norm m",
    "ADALORA": "W + s B diag(e) A",
    "LOHA": "W + s (B1 A1 * B2 A2)",
    "LOKR": "W + s (C kron B A)",
    "HIRA": "W + s W * (B A)",
    "VERA": "W + diag(b) B diag(d) A, with A and B random and shared",
    "RANDLORA": "W + a sum of random pairs, scaled",
    "FROD": "U (S + diag(l)) V, U and V made of W, S sparse",
    "PVERA": "as VERA; the noise of its training is left out",
    "GLORA": "W + W * A + B; the bias, too",
    "OSF": "W with the last directions of its SVD replaced",
    "TINYLORA": "W + B R A, B and A of the SVD of W",
    "PSOFT": "W + s B (R - I) A, R orthogonal, B and A of the SVD of W",
    "PEANUT": "W + a small network of its columns",
    "SUPERTUNING": "W + a sparse matrix; Supra: + s B A",
    "DEFT": "(I - P) W + Q R, P a projection of low rank",
    "VBLORA": "W + B A, made of a shared bank of vectors",
    "UNILORA": "W + B A, projected from one vector",
    "FOURIERFT": "W + s iDFT(c)",
    "WAVEFT": "W + s iDWT(c)",
    "C3A": "W + a block-circulant matrix",
    "SHIRA": "W + a sparse matrix",
    "MISS": "W + blocks repeated over the inputs",
    "DELORA": "W + B A with normalised columns, times a bound",
    "GRALORA": "W + B A for each block of W",
    "OFT": "W R, R orthogonal in blocks",
    "BOFT": "W R, R a product of butterflies",
    "HRA": "W R, R a product of reflections",
    "ROAD": "R W, R rotates pairs of outputs",
    "LN_TUNING": "the norms' own weights, replaced",
    "TRAINABLE_TOKENS": "rows of the embedding, replaced",
    BITFIT: "the biases, replaced",
}
_VIRTUAL = "never: it adds positions, not weights"
_BOTTLENECK = "never: a non-linear layer between two others"
_ROUTED = "never: what it adds depends on the input"
# Types that are no virtual tokens, and still no one weight: whatever a tool calls merging them.
_NEVER = {
    "LILY": _ROUTED,
    "XLORA": _ROUTED,
    "SHADOW": _ROUTED,
    "POLY": "no: a weight for each task, not one",
}
# What the figures of a type leave open.
NOTES = {"XLORA": "its classifier; two LoRA adapters beside it, frozen"}
# Settings without which a type cannot be made, or not on a small model.
_SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "PROMPT_TUNING": {"num_virtual_tokens": 20},
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 20, "num_tasks": 2},
    "P_TUNING": {"num_virtual_tokens": 20, "encoder_hidden_size": 32},
    "PREFIX_TUNING": {"num_virtual_tokens": 20},
    "CARTRIDGE": {"num_virtual_tokens": 20},
    "CPT": {
        "cpt_token_ids": list(range(8)),
        "cpt_mask": [1] * 8,
        "cpt_tokens_type_mask": [1, 1, 2, 2, 3, 3, 4, 4],
    },
    "ADAPTION_PROMPT": {"adapter_len": 10, "adapter_layers": 2},
    "ADALORA": {"total_step": 100},
    "FOURIERFT": {"n_frequency": 1000},
    "WAVEFT": {"n_frequency": 1000},
    "VBLORA": {"vector_length": 16},
    "TRAINABLE_TOKENS": {"token_indices": [1, 2, 3]},
    "C3A": {"block_size": 16},
}
_TASKS = ("MULTITASK_PROMPT_TUNING", "POLY")  # each row of a batch says of which task it is
_SPREAD = 0.05  # of random values
_HIDDEN = 64
Progress = Callable[[int, int, float | None], None]


@dataclass(frozen=True)
class MethodRow:
    """One method. `infold` and `peft`: "yes", or why not; `merge`: what its merged weight is."""

    name: str
    infold: str
    peft: str
    merge: str

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


def peft_types() -> list[str]:
    """The types that the installed PEFT registers, in its order; none without PEFT."""
    if find_spec("peft") is None:
        return []
    with calm():  # what it imports talks too
        from peft import PeftType

    return [kind.value for kind in PeftType]


def method_rows(progress: Progress | None = None) -> list[MethodRow]:
    """A row for each type of PEFT, and for bottleneck adapters and BitFit, which it has not."""
    names = peft_types()
    rows = []
    for number, name in enumerate(names):
        merges, virtual = _tried(name)
        other = _VIRTUAL if virtual else _NEVER.get(name, "not yet")
        ours = "yes" if methods_of(name) else other
        ours = "no" if ours == "not yet" and merges.startswith("no:") else ours
        rows.append(MethodRow(name, ours, _VIRTUAL if virtual else merges, _MERGED.get(name, "")))
        if progress is not None:
            progress(number + 1, len(names), None)
    if not names:
        from infold.adapters import METHODS

        kinds = dict.fromkeys(kind for method in METHODS.values() for kind in method.PEFT_TYPES)
        rows = [MethodRow(k, "yes", "PEFT is not installed", _MERGED.get(k, "")) for k in kinds]
    biases = any("bias" in method.PEFT_TYPES["LORA"] for method in methods_of("LORA").values())
    bitfit = "yes, as LoRA with bias='all'" if biases else "not yet"
    rows.append(MethodRow(BITFIT, bitfit, bitfit, _MERGED[BITFIT]))
    rows.append(MethodRow("bottleneck adapters", _BOTTLENECK, "no such type", ""))
    return rows


def peft_needs(model: Any, name: str, folder: Path) -> dict[str, Any]:
    """Settings of a type that this model gives: of X-LoRA, which mixes trained LoRA adapters, two
    with random values, which are written to `folder`."""
    import torch

    if name != "XLORA":
        return {}
    expert = attach_peft(copy.deepcopy(model), "LORA")
    places = {number: str(folder / number) for number in ("0", "1")}  # the names that it gives them
    for place in places.values():
        for parameter in expert.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=_SPREAD)
        expert.save_pretrained(place, save_embedding_layers=False)
    return {"adapters": places, "hidden_size": model.config.get_text_config().hidden_size}


def peft_inputs(name: str, rows: int) -> dict[str, Any]:
    """What a model with an adapter of this type wants beside the tokens of so many rows."""
    import torch

    return {"task_ids": torch.zeros(rows, dtype=torch.long)} if name in _TASKS else {}


def attach_peft(model: Any, name: str, needs: Mapping[str, Any] | None = None) -> Any:
    """The model with a new adapter of PEFT's type `name`, with PEFT's defaults where it has any.

    needs: of `peft_needs`. Raises whatever PEFT raises.
    """
    import peft
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as CONFIGS

    kind: Any = peft.PeftType(name)
    settings = {**_SETTINGS.get(name, {}), **(needs or {}), "task_type": "CAUSAL_LM"}
    if name == "XLORA":
        model.config.use_cache = False  # it refuses a model that keeps keys and values
    try:
        return peft.get_peft_model(model, CONFIGS[kind](**settings))
    except ValueError as error:
        if "target_modules" not in str(error):
            raise
    chosen: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}
    return peft.get_peft_model(model, CONFIGS[kind](**settings, **chosen))


def attach_bitfit(model: Any) -> Any:
    """The model with nothing but its biases to train. Raises ValueError where it has none."""
    biases = 0
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.rpartition(".")[2] == "bias"
        biases += parameter.requires_grad
    if not biases:
        raise ValueError("this base has no biases")
    return model


def _tried(name: str) -> tuple[str, bool]:
    """Whether PEFT merges this type into what it computed before, and whether it has no merge."""
    import torch

    silence = contextlib.redirect_stderr(io.StringIO())  # some types draw bars
    with calm(), torch.random.fork_rng(devices=[]), silence:
        torch.manual_seed(0)
        try:
            model = _small()
            with tempfile.TemporaryDirectory(prefix="infold-methods-") as folder:
                needs = peft_needs(model, name, Path(folder))
                model = attach_peft(model, name, needs).eval()
        except Exception as error:  # forty types, each with errors of its own
            return f"not tried: {_line(error)}", False
        if not hasattr(model.base_model, "merge_and_unload"):
            return "no", True
        ids = torch.arange(24).reshape(2, 12)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(_SPREAD * torch.randn(parameter.shape))
            try:
                plain = _small()(ids).logits
                wanted = model(ids, **peft_inputs(name, len(ids))).logits
                got = model.merge_and_unload()(ids).logits
            except Exception as error:
                return f"no: {_line(error)}", False
        moved, apart = (wanted - plain).norm(), (got - wanted).norm()
        if not moved > 0:
            return "not tried: random values change nothing", False
        share = float(apart / moved)
        return ("yes" if share < 1e-3 else f"wrong by {share:.0%} of its update"), False


def _small() -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=_HIDDEN, intermediate_size=2 * _HIDDEN, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, bos_token_id=0, eos_token_id=1,
        attention_bias=True,  # BEFT adapts nothing else
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model: Any = LlamaForCausalLM(config)
        return model.eval()


def _line(error: Exception) -> str:
    told = (str(error).strip().splitlines() or [""])[0]
    told = told if len(told) <= 90 else told[:87] + "..."
    if not told and isinstance(error, NotImplementedError):
        return "not implemented"
    return told or type(error).__name__
