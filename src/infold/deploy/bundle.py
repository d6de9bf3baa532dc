"""The bundle: deployment_config.json, a model card and serving recipes, beside the merged weights.

In place, each file is complete before it takes its name, and the configuration, which names the
others' digests, comes last: it is there if and only if the bundle is. Into a new folder, weights
and all are published at once, as a merge is.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from blake3 import blake3

from infold.checkpoint.files import exists, read_bytes, read_object, safe_child
from infold.checkpoint.place import check_name
from infold.checkpoint.shards import CARD, INDEX, KEPT_CARD, RECEIPT
from infold.checkpoint.staging import Staging
from infold.conversion import conversion_figures
from infold.deploy.card import MARK, model_card
from infold.deploy.facts import CONFIG, UNDO, Facts, check_deployable, read_facts
from infold.deploy.local import run_local
from infold.deploy.recipes import FOLDER, check_recipes, recipes, usage_example
from infold.disk import storage_errors, write_whole
from infold.errors import Refusal
from infold.version import __version__

__all__ = ["Bundle", "bundle_problems", "deploy_bundle", "read_config"]

_PACKAGES = ("torch", "transformers", "safetensors", "accelerate")
_CONTEXT = 4096  # tokens, where none are asked for


@dataclass(frozen=True)
class Bundle:
    """What `infold deploy` made. out: the folder. files: those written, relative to it.

    config: the content of deployment_config.json. kept: where an earlier README.md is now.
    """

    out: str
    files: tuple[str, ...]
    config: dict[str, Any]
    kept: str | None


def deploy_bundle(
    merged: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    context: int | None = None,
    licence: str | None = None,
    measured: bool = True,
    progress: Callable[[int, int, float | None], None] | None = None,
) -> Bundle:
    """Write the bundle of a merged folder into it, or with `out` a new folder that holds all of it.

    context: tokens that memory is computed for; by default the model's, at most 4096.
    licence: of the merged model; by default the one that the base's card tells.
    measured: load the model and measure it; else the figures are null, and say so.
    progress: of the measuring, called with (steps done, steps in all, None).
    Raises Refusal before anything is written, LocalFailure where the model does not run.
    """
    facts = read_facts(merged)
    if context is not None and not 0 < context <= (facts.context or context):
        raise Refusal(f"--context {context}: the model's is {facts.context or 'at least 1'}")
    length = context or min(facts.context or _CONTEXT, _CONTEXT)
    place = facts.folder if out is None else Path(out)
    facts = replace(facts, called=Path(os.path.realpath(place)).name)
    if out is not None:
        _check_place(facts, place)
    check_deployable(facts)
    files = recipes(facts, length)
    example = usage_example(facts)
    problems = check_recipes(files)
    compile(example, "usage_example", "exec")
    if problems:  # a bug of ours, or a folder name that breaks a script
        raise Refusal(problems)
    performance = _performance(facts, measured, progress)
    config = deployment_config(facts, length, performance, example, licence)
    kept = _kept(facts)
    files[CARD] = model_card(facts, config, kept is not None or exists(facts.folder / KEPT_CARD))
    config["bundle"] = {name: blake3(text.encode()).hexdigest() for name, text in files.items()}
    files[CONFIG] = json.dumps(config, indent=1, ensure_ascii=False) + "\n"
    if out is None:
        _in_place(place, files, kept)
    else:
        _publish(facts, place, files, kept)
    return Bundle(str(place), tuple(files), config, KEPT_CARD if kept else None)


def deployment_config(
    facts: Facts,
    context: int,
    performance: Mapping[str, Any],
    example: str,
    licence: str | None = None,
) -> dict[str, Any]:
    """The content of deployment_config.json: JSON-ready values. Sizes are bytes."""
    cache = facts.cache
    memory: dict[str, Any] = {
        "weights_bytes": facts.weight_bytes,
        "context": context,
        "batch": 1,
        "kv_cache_bytes": None if cache is None else cache.bytes_per_token * context,
        "kv_cache_formula": facts.cacheless if cache is None else f"{cache.formula} x context",
        "total_bytes": None
        if cache is None
        else facts.weight_bytes + cache.bytes_per_token * context,
        "not_counted": "activations, and what the runtime itself takes",
    }
    return {
        "kind": "deployment",
        "version": 1,
        "infold": __version__,
        "receipt": facts.digest,
        "model_info": {
            "name": facts.name,
            "base_model": facts.base,
            "adapters": list(facts.adapters),
            "methods": list(facts.methods),
            "merged": True,
            "architecture": facts.architecture,
            "parameters": facts.parameters,
            "dtype": facts.dtype,
            "weights_bytes": facts.weight_bytes,
            "context": facts.context,
            "licence": licence or facts.licence,
            "edited_tensors": len(facts.receipt["edits"]),
            "conversion": conversion_figures(facts.receipt),
        },
        "performance_metrics": dict(performance),
        "deployment_requirements": {
            "disk_bytes": facts.checkpoint.nbytes,
            "gpu_memory": memory,
            "python": platform.python_version(),
            "packages": {name: _installed(name) for name in _PACKAGES},
            "adapter_code": "none: ordinary weights, which load without PEFT and without infold",
        },
        "usage_example": example,
        "serving": sorted(recipes(facts, context)),
        "rollback": rollback(facts),
    }


def rollback(facts: Facts) -> dict[str, Any]:
    """How the base comes back, and the digests that tell that it is the base.

    exact: from the undo record. from_adapter: the base's name is the adapter's word. caveat: what
    the files that the command fetches may differ in from what was merged, None where in nothing.
    """
    caveat = None
    if facts.undo:
        way = f"infold undo {shlex.quote(facts.called)} --out base"
    elif facts.base_id:
        repo, _, revision = facts.base_id.partition("@")
        at = f" --revision {revision}" if revision else ""
        way = f"hf download {repo}{at} --local-dir base"
        if not facts.base_given:
            caveat = (
                f"the adapter names {facts.base_id}; what was merged was a copy of it. If that was "
                "cut into other shards, or taken at another revision, the files there are others"
            )
        elif not re.fullmatch("[0-9a-f]{40}", revision):
            caveat = (
                f"what was merged is named {facts.base_id}, which tells no commit: if the "
                "repository has changed since, the files there are others"
            )
    else:
        way = f"cp -r /path/to/{facts.base} base"
    return {
        "command": way,
        "exact": facts.undo,
        "from_adapter": facts.base_id is not None and not facts.base_given,
        "caveat": caveat,
        "base_shards_blake3": dict(facts.receipt["base"]["shards"]),
    }


def _performance(
    facts: Facts, measured: bool, progress: Callable[[int, int, float | None], None] | None
) -> dict[str, Any]:
    if not measured:
        return {"measured": False, "why": "not asked for (--no-measure)"}
    if not facts.generates:
        return {"measured": False, "why": f"{facts.architecture} is no causal language model"}
    longest = facts.context or 192  # tokens in all: of the prompt, the first one, and the new ones
    new = max(1, min(32, longest // 2 - 1))
    prompt = max(1, min(128, longest - new - 1))
    return {
        "measured": True,
        **run_local(
            "measure", facts.folder, prompt_tokens=prompt, new_tokens=new, progress=progress
        ),
    }


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _check_place(facts: Facts, place: Path) -> None:
    check_name(place)
    if os.path.lexists(place):
        raise Refusal(f"{place}: exists already; choose another name, or leave --out out")
    parents = Path(os.path.realpath(place)).parents
    if facts.folder.resolve() in parents:
        raise Refusal(f"{place}: lies in the merged folder; choose another place")
    above = next(p for p in parents if p.exists())
    free = shutil.disk_usage(above).free
    if free < facts.checkpoint.nbytes:
        raise Refusal(f"{place}: needs {facts.checkpoint.nbytes:,} bytes, only {free:,} are free")


def _kept(facts: Facts) -> bytes | None:
    """The README.md that the card would replace, if it is not a card of ours: the base's may be one
    of ours, too, by an earlier merge."""
    folder = facts.folder
    if not exists(folder / CARD):
        return None
    content = read_bytes(safe_child(folder, CARD))
    bases = facts.receipt["side_files"].get(CARD) == blake3(content).hexdigest()
    if MARK.encode() in content and not bases:
        return None
    if exists(folder / KEPT_CARD) and read_bytes(safe_child(folder, KEPT_CARD)) != content:
        raise Refusal(
            f"{folder / CARD}: was changed after {KEPT_CARD} was kept, and would be lost; move one "
            "of them away"
        )
    return content


def _in_place(folder: Path, files: Mapping[str, str], kept: bytes | None) -> None:
    with storage_errors(folder), suppress(FileNotFoundError):
        (folder / CONFIG).unlink()  # from here on the old bundle is not whole
    if kept is not None:
        write_whole(folder / KEPT_CARD, kept, 0o644)
    for name, text in files.items():  # the configuration is the last one
        mode = 0o755 if name.endswith(".sh") else 0o644
        write_whole(safe_child(folder, name), text.encode(), mode)


def _publish(facts: Facts, out: Path, files: Mapping[str, str], kept: bytes | None) -> None:
    checkpoint = facts.checkpoint
    names = [*(s.name for s in checkpoint.shards), *checkpoint.side_files, RECEIPT]
    names += [n for n in (INDEX, UNDO) if exists(facts.folder / n)]
    names += [KEPT_CARD] if kept is None and exists(facts.folder / KEPT_CARD) else []
    with Staging(out, f"deploy {facts.digest}", False, like=facts.folder) as staging:
        for name in dict.fromkeys(names):
            if name not in files:
                staging.copy_file(safe_child(facts.folder, name), name)
        if kept is not None:
            staging.write_bytes(KEPT_CARD, kept)
        for name, text in files.items():
            staging.write_bytes(name, text.encode())
            if name.endswith(".sh"):
                os.chmod(staging.output / name, 0o755)
        staging.publish()


def read_config(folder: Path) -> dict[str, Any] | None:
    """The deployment_config.json of a folder, or None. Raises CorruptFile for what is no JSON."""
    return read_object(safe_child(folder, CONFIG)) if exists(folder / CONFIG) else None


def bundle_problems(folder: Path, config: Mapping[str, Any]) -> list[str]:
    """Files of the bundle that are gone, changed, or that their interpreters would refuse."""
    named = config.get("bundle")
    if not isinstance(named, dict) or not named:
        return [f"{CONFIG} names no files"]
    problems, texts = [], {}
    for name, digest in named.items():
        path = safe_child(folder, name)
        if not exists(path):
            problems.append(f"{name} is gone")
            continue
        content = read_bytes(path)
        if blake3(content).hexdigest() != digest:
            problems.append(f"{name} was changed")
        if name.startswith(f"{FOLDER}/"):
            texts[name] = content.decode(errors="replace")
    return problems + check_recipes(texts)
