"""Adapter folders -> one adapter folder in PEFT's layout. Every tensor is combined, carried over or
refused, and all reasons to refuse are known before anything is written."""

from __future__ import annotations

import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor

from infold.adapters.combine import check_options, check_shapes, combine, prunes
from infold.adapters.peft_config import scales_inputs
from infold.adapters.settings import Settings
from infold.checkpoint.adapter import CONFIG, WEIGHTS, Adapter, open_adapter
from infold.checkpoint.place import check_adapter_place, check_name
from infold.checkpoint.safetensors import build_header
from infold.checkpoint.staging import Staging, write_fully
from infold.disk import storage_errors
from infold.dtypes import NAMES
from infold.errors import Refusal
from infold.patience import patience
from infold.sizes import plural
from infold.tuners.combine_config import (
    combined_config,
    config_notes,
    config_problems,
    largest_rank,
    scaling,
)

__all__ = ["Combination", "Combined", "check_output", "plan_combination", "write_combination"]

PathLike = str | os.PathLike[str]

PREFIX = "base_model.model."
# ending of a key -> the method's part; an ending that contains another comes first
_ENDINGS = {
    ".lora_magnitude_vector.weight": "lora_magnitude_vector",
    ".lora_magnitude_vector": "lora_magnitude_vector",
    ".lora_embedding_A": "lora_A",
    ".lora_embedding_B": "lora_B",
    ".lora_A.weight": "lora_A",
    ".lora_B.weight": "lora_B",
    ".lora_B.bias": "lora_bias",
    ".ia3_l": "ia3_l",
}
_PARTS = {
    "lora": {"lora_A", "lora_B", "lora_bias", "lora_magnitude_vector"},
    "ia3": {"ia3_l"},
}
_TOKENS = "trainable_tokens_delta"
# PEFT's words inside of the path of a plain tensor; without them it is the base's parameter
_WRAPPERS = ("base_layer", "token_adapter", "modules_to_save", "original_module")


@dataclass
class _Keys:
    """The keys of one adapter, by what they are."""

    modules: dict[str, dict[str, str]] = field(default_factory=lambda: defaultdict(dict))
    plain: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    strange: list[str] = field(default_factory=list)


def _group(keys: Iterable[str], method: str) -> _Keys:
    """{module: {part: key}} of a method's own parts, and {parameter: keys} of all else."""
    found = _Keys()
    for key in sorted(keys):
        path = key.removeprefix(PREFIX)
        ending = next((ending for ending in _ENDINGS if path.endswith(ending)), None)
        components = path.split(".")
        if path == key or len(components) < 2:
            found.strange.append(key)
        elif ending is not None:
            parts, part = found.modules[path.removesuffix(ending)], _ENDINGS[ending]
            if part in parts or part not in _PARTS[method]:
                found.strange.append(key)
            parts.setdefault(part, key)
        elif any(c.startswith(("lora_", "ia3_")) for c in components):
            found.strange.append(key)
        else:
            found.plain[".".join(c for c in components if c not in _WRAPPERS)].append(key)
    return found


@dataclass(frozen=True)
class Combination:
    """What will be combined: decided from headers and configs, before anything is computed."""

    adapters: Sequence[Adapter]
    weights: Sequence[float]
    method: str  # "lora" or "ia3"
    kind: str
    options: Mapping[str, Any]  # for adapters.combine
    seed: int
    modules: Mapping[str, Sequence[tuple[int, Mapping[str, str], Settings]]]
    """module -> for each adapter that touches it its number, {part: key} and settings"""
    carried: Mapping[str, Sequence[int]]  # key -> the adapters that hold this tensor, as it is
    ranks: Mapping[str, int]  # of the result's modules, for LoRA
    config: Mapping[str, Any]
    notes: Sequence[str]

    def summary(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "method": self.method,
            "type": self.kind,
            "adapters": [str(a.path) for a in self.adapters],
            "weights": list(self.weights),
            "modules": {
                module: {
                    "adapters": [number for number, _, _ in entries],
                    **({"rank": self.ranks[module]} if self.ranks else {}),
                }
                for module, entries in self.modules.items()
            },
            "carried": sorted(self.carried),
            "config": dict(self.config),
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Combined:
    """What was written."""

    out: str
    method: str
    type: str
    adapters: list[str]
    weights: list[float]
    modules: int
    tensors: int
    bytes: int
    digest: str  # BLAKE3 of adapter_model.safetensors
    notes: list[str]
    seconds: float


def plan_combination(
    adapters: Sequence[PathLike],
    weights: Sequence[float],
    kind: str,
    *,
    density: float | None = None,
    majority_sign: str = "total",
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    seed: int = 0,
) -> Combination:
    """Open the adapters and decide everything. Raises Refusal with all reasons at once."""
    if not adapters:
        raise Refusal("no adapters to combine")
    opened = [open_adapter(adapter) for adapter in adapters]
    reasons = [
        f"{adapter.path}/{CONFIG}: {problem}"
        for adapter in opened
        for problem in config_problems(adapter.config)
    ]
    types = {str(adapter.config.get("peft_type")) for adapter in opened}
    if len(types) > 1:
        reasons.append(
            f"adapters of types {', '.join(sorted(types))} do not combine into one; "
            "`infold merge` merges them one after the other"
        )
    if len(weights) != len(opened):
        reasons.append(
            f"{plural('adapter', len(opened))}, but {plural('weight', len(weights))}; one for each "
            "is needed"
        )
    if reasons:
        raise Refusal(reasons)
    method = types.pop().lower()
    options: dict[str, Any] = {
        "density": density, "majority_sign": majority_sign, "svd_rank": svd_rank,
        "svd_clamp": svd_clamp,
    }  # fmt: skip
    reasons = check_options(method, kind, weights, **options) or _idle(kind, **options)
    if reasons:
        raise Refusal(reasons)
    if kind.endswith("svd") and svd_rank is None:
        options["svd_rank"] = max(largest_rank(a.config) for a in opened)
    with patience(", ".join(str(adapter.path) for adapter in opened)):
        return _Planner(opened, method, kind).plan(weights, options, seed)


def _idle(
    kind: str,
    density: float | None,
    majority_sign: str,
    svd_rank: int | None,
    svd_clamp: float | None,
) -> list[str]:
    """Options that were given and would do nothing."""
    idle = {
        "a density": density is not None and not prunes(kind),
        "a majority sign": majority_sign != "total" and "ties" not in kind,
        "an SVD rank": svd_rank is not None and not kind.endswith("svd"),
        "an SVD clamp": svd_clamp is not None and not kind.endswith("svd"),
    }
    return [f"{kind} has no use for {name}; leave it out" for name, given in idle.items() if given]


class _Planner:
    """Sorts the tensors of all adapters; collects what cannot be combined."""

    def __init__(self, adapters: Sequence[Adapter], method: str, kind: str) -> None:
        self.adapters, self.method, self.kind = adapters, method, kind
        self.keys = [_group(adapter.tensors, method) for adapter in adapters]
        self.reasons: list[str] = []
        self.notes = config_notes([adapter.config for adapter in adapters])

    def refuse(self, number: int, key: str, why: str) -> None:
        self.reasons.append(f"{self.adapters[number].path}: {key}: {why}")

    def plan(self, weights: Sequence[float], options: dict[str, Any], seed: int) -> Combination:
        for number, keys in enumerate(self.keys):
            for key in keys.strange:
                self.refuse(number, key, f"is no tensor that combine knows in {self.method}")
        modules = self._modules()
        carried = self._carried()
        ranks, inputs = {}, {}
        for module, entries in modules.items():
            if self.method == "ia3":
                inputs[module] = entries[0][2].side == "in"
            elif self.kind.endswith("svd"):
                ranks[module] = options["svd_rank"]
            else:
                sizes = [
                    self.adapters[n].tensors[parts["lora_A"]].shape[0] for n, parts, _ in entries
                ]
                ranks[module] = sum(sizes) if self.kind == "cat" else sizes[0]
        config, problems = combined_config([a.config for a in self.adapters], ranks, inputs)
        self.reasons += problems
        if not modules and not self.reasons:
            self.reasons.append("the adapters hold nothing that could be combined")
        if self.reasons:
            raise Refusal(self.reasons)
        self._tell_of_side_files()
        return Combination(
            self.adapters, list(weights), self.method, self.kind, options, seed, modules, carried,
            ranks, config, self.notes,
        )  # fmt: skip

    def _modules(self) -> dict[str, list[tuple[int, Mapping[str, str], Settings]]]:
        found: dict[str, list[tuple[int, Mapping[str, str], Settings]]] = {}
        for module in sorted({module for keys in self.keys for module in keys.modules}):
            touching = [
                (n, keys.modules[module])
                for n, keys in enumerate(self.keys)
                if module in keys.modules
            ]
            shapes = [
                {part: self.adapters[n].tensors[key].shape for part, key in parts.items()}
                for n, parts in touching
            ]
            problems = check_shapes(self.method, self.kind, shapes)
            if len({tuple(sorted(_endings(parts))) for _, parts in touching}) > 1:
                problems.append("a table of embeddings in one adapter, a matrix in another")
            entries: list[tuple[int, Mapping[str, str], Settings]] = []
            for (number, parts), shape in zip(touching, shapes, strict=True):
                try:
                    entries.append((number, parts, self._settings(number, module, shape)))
                except LookupError as error:
                    self.refuse(number, module, str(error))
            if len({settings.side for _, _, settings in entries}) > 1:
                problems.append(
                    "its inputs are scaled by some of the adapters (feed-forward), "
                    "its outputs by others"
                )
            names = ", ".join(str(self.adapters[n].path) for n, _ in touching)
            self.reasons += [f"{module} (of {names}): {problem}" for problem in problems]
            found[module] = entries
        return {module: entries for module, entries in found.items() if entries}

    def _settings(self, number: int, module: str, shapes: Mapping[str, Sequence[int]]) -> Settings:
        """Raises LookupError with a sentence where file and config disagree."""
        config = self.adapters[number].config
        if self.method == "ia3":
            vector = tuple(shapes.get("ia3_l", ()))
            if len(vector) < 2 or math.prod(vector) not in vector:
                raise LookupError(f"ia3_l of shape {list(vector)}; expected one long dimension")
            told = scales_inputs(config, module)
            inputs = told if len(vector) != 2 or vector == (1, 1) else vector[1] != 1
            return Settings(side="in" if inputs else "out")
        a, b = shapes.get("lora_A", ()), shapes.get("lora_B", ())
        if len(a) < 2 or len(b) < 2 or not b[1]:
            return Settings()  # check_shapes has told why
        if "lora_bias" in shapes and not config.get("lora_bias"):
            raise LookupError("a bias of lora_B, but lora_bias is false in the config")
        return Settings(scaling=scaling(config, module, a[0]), groups=a[0] // b[1], out=b[0])

    def _carried(self) -> dict[str, list[int]]:
        """Tensors that replace the base's: one adapter's, or the same ones of several."""
        carried: dict[str, list[int]] = defaultdict(list)
        taken: dict[int, list[str]] = defaultdict(list)
        for parameter in sorted({p for keys in self.keys for p in keys.plain}):
            owners = [n for n, keys in enumerate(self.keys) if parameter in keys.plain]
            first = owners[0]
            for key in self.keys[first].plain[parameter]:
                carried[key] = owners
            taken[first].append(parameter)
            for number in owners[1:]:
                if not self._equal(first, number, parameter):
                    self.refuse(
                        number,
                        self.keys[number].plain[parameter][0],
                        f"replaces {parameter}, and so does {self.adapters[first].path} with other "
                        "values; replacements cannot be combined: leave it out of one of them",
                    )
            self._check_edited(parameter, owners)
        for number, parameters in taken.items():
            self.notes.append(
                f"carried over as they are (replacements have no weight), from "
                f"{self.adapters[number].path}: {', '.join(parameters)}"
            )
        return carried

    def _equal(self, one: int, two: int, parameter: str) -> bool:
        keys = self.keys[one].plain[parameter]
        return keys == self.keys[two].plain[parameter] and all(
            self.adapters[one].tensors[key].shape == self.adapters[two].tensors[key].shape
            and torch.equal(self.adapters[one].read(key), self.adapters[two].read(key))
            for key in keys
        )

    def _check_edited(self, parameter: str, owners: Sequence[int]) -> None:
        """A module that is replaced by one adapter cannot also be updated by another."""
        module, _, leaf = parameter.rpartition(".")
        for key in self.keys[owners[0]].plain[parameter]:
            if leaf not in ("weight", _TOKENS) or ".base_layer." in key:
                continue  # biases add up; what base_layer holds is the base's own
            for number, keys in enumerate(self.keys):
                if module in keys.modules and number not in owners:
                    self.refuse(
                        number,
                        module,
                        f"is updated here, but {self.adapters[owners[0]].path} replaces it by "
                        f"{key}; one of them would be lost",
                    )

    def _tell_of_side_files(self) -> None:
        for adapter in self.adapters:
            ours = {CONFIG, adapter.weights.name, "README.md"}
            left = sorted(p.name for p in adapter.path.iterdir() if p.name not in ours)
            if left:
                self.notes.append(f"not copied from {adapter.path}: {', '.join(left)}")


def _endings(parts: Mapping[str, str]) -> set[str]:
    """How the keys of the two factors end: embeddings have other ones."""
    return {"embedding" if "lora_embedding_" in key else "" for key in parts.values()}


def write_combination(plan: Combination, out: PathLike, *, force: bool = False) -> Combined:
    """Compute the combination and write it. Raises Refusal or StorageFailure; then nothing is left.

    The new tensors are float32 (float64 where an adapter is), carried ones keep their dtype.
    """
    started = time.perf_counter()
    path = check_output(plan, out, force)
    tensors = _compute(plan)
    order = sorted(tensors, key=lambda key: (-tensors[key].element_size(), key))  # keeps alignment
    entries = [(key, NAMES[tensors[key].dtype], tuple(tensors[key].shape)) for key in order]
    header = build_header(entries, {"format": "pt", "infold.combine": _recipe(plan)})
    config = (json.dumps(plan.config, indent=2, sort_keys=True) + "\n").encode()
    hasher = blake3()
    with Staging(path, f"combine {os.getpid()}", force) as staging:
        staging.write_bytes(CONFIG, config)
        with _file(staging, WEIGHTS, header.file_size) as fd:
            position = 0
            for data in _chunks(header.raw, (tensors[key] for key in order)):
                write_fully(fd, data, position)
                hasher.update(data)
                position += len(data)
        staging.publish()
    return Combined(
        out=str(path),
        method=plan.method,
        type=plan.kind,
        adapters=[str(a.path) for a in plan.adapters],
        weights=list(plan.weights),
        modules=len(plan.modules),
        tensors=len(tensors),
        bytes=header.file_size,
        digest=hasher.hexdigest(),
        notes=list(plan.notes),
        seconds=round(time.perf_counter() - started, 3),
    )


def _recipe(plan: Combination) -> str:
    """How the file was made, for its metadata."""
    told = {"type": plan.kind, "weights": list(plan.weights), **plan.options, "seed": plan.seed}
    return json.dumps({name: value for name, value in told.items() if value is not None})


@contextmanager
def _file(staging: Staging, name: str, size: int) -> Iterator[int]:
    fd = staging.open_file(name, size)
    try:
        with storage_errors(staging.output / name):
            yield fd
            os.fsync(fd)
    finally:
        os.close(fd)


def _chunks(header: bytes, tensors: Iterable[Tensor]) -> Iterator[memoryview]:
    yield memoryview(header)
    for tensor in tensors:
        if tensor.numel():
            buffer = bytearray(tensor.nbytes)
            torch.frombuffer(buffer, dtype=tensor.dtype).copy_(tensor.flatten())
            yield memoryview(buffer)


def _compute(plan: Combination) -> dict[str, Tensor]:
    """The tensors of the result; refuses what is not finite, all of it at once."""
    reasons: list[str] = []
    result: dict[str, Tensor] = {}

    def read(number: int, key: str) -> Tensor:
        value = plan.adapters[number].read(key)
        count = int((~value.isfinite()).sum())
        if count:
            told = f"NaN or inf in {plural('element', count)}"
            reasons.append(f"{plan.adapters[number].path}: {key}: {told}")
        return value

    for key, owners in plan.carried.items():
        result[key] = read(owners[0], key)
    for module, entries in plan.modules.items():
        before = len(reasons)
        given = [
            ({part: read(number, key) for part, key in parts.items()}, settings)
            for number, parts, settings in entries
        ]
        if len(reasons) > before:
            continue
        touching = {number for number, _, _ in entries}
        try:
            parts, _ = combine(
                plan.method,
                given,
                [plan.weights[number] for number, _, _ in entries],
                plan.kind,
                **plan.options,
                generator=_generator(plan.seed, module),
                untouched=sum(w for n, w in enumerate(plan.weights) if n not in touching),
            )
        except Refusal as error:
            reasons += [f"{module}: {reason}" for reason in error.reasons]
            continue
        keys = {part: key for _, owned, _ in reversed(entries) for part, key in owned.items()}
        result |= {keys[part]: value for part, value in parts.items()}
    if reasons:
        raise Refusal(reasons)
    return result


def _generator(seed: int, module: str) -> torch.Generator:
    """Random numbers of a module's own: they depend on no other module, nor on the order."""
    digest = blake3(f"{seed} {module}".encode()).digest(8)
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def check_output(plan: Combination, path: PathLike, force: bool) -> Path:
    """Where the output goes: a new name, or with force an adapter, and not in an input."""
    out = Path(os.path.abspath(path))
    check_name(out)
    real = Path(os.path.realpath(out))
    for adapter in plan.adapters:
        other = adapter.path.resolve()
        if real == other or real in other.parents or other in real.parents:
            raise Refusal(
                f"{out}: lies in or around the adapter {adapter.path}; choose another place"
            )
    check_adapter_place(out, force)
    return out
