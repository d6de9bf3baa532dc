"""The model card: README.md of the bundle, with the front matter that the Hub reads."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

from infold.checkpoint.shards import KEPT_CARD
from infold.conversion import conversion_text
from infold.deploy.facts import UNDO, Facts
from infold.sizes import bytes_text

__all__ = ["MARK", "model_card"]

MARK = "<!-- model card by infold deploy -->"


def model_card(facts: Facts, config: Mapping[str, Any], kept: bool) -> str:
    """The card as Markdown. `config` is the content of deployment_config.json.

    kept: whether the base's card lies beside it, as README.base.md.
    """
    info, needs = config["model_info"], config["deployment_requirements"]
    memory, licence = needs["gpu_memory"], info["licence"]
    methods = ", ".join(facts.methods)
    front = [f"base_model: {json.dumps(facts.base)}", "base_model_relation: finetune"]
    front += [f"license: {json.dumps(licence)}"] if licence else []
    front += ["library_name: transformers", f"tags: [{', '.join(['merged', *facts.methods])}]"]
    converted = conversion_text(facts.receipt)
    cache = memory["kv_cache_bytes"]
    total = (
        f"{bytes_text(memory['total_bytes'])}: weights {bytes_text(memory['weights_bytes'])} and "
        f"keys and values {bytes_text(cache)} ({memory['kv_cache_formula']} = "
        f"{memory['context']:,}), batch 1; {memory['not_counted']} come on top"
        if cache is not None
        else f"weights {bytes_text(memory['weights_bytes'])}; keys and values are not counted: "
        f"{memory['kv_cache_formula']}"
    )
    rows = [
        ("base", facts.base),
        ("adapters", ", ".join(facts.adapters)),
        ("method", methods),
        ("licence", licence or "not told by the base's card; add it before you publish"),
        ("parameters", f"{_count(info['parameters'])}, stored as {info['dtype']}"),
        ("edited", f"{info['edited_tensors']} of {facts.receipt['tensors']} tensors"),
        *([("converted", converted)] if converted else []),
        ("memory", total),
        ("receipt", f"`infold-receipt.json`, BLAKE3 `{facts.digest}`"),
    ]
    table = "\n".join(f"| {name} | {_cell(text)} |" for name, text in rows)
    serving = "\n".join(f"- `{name}`" for name in config["serving"] if name.endswith(".sh"))
    blocks = [
        "---\n" + "\n".join(front) + f"\n---\n{MARK}",
        f"# {facts.name}",
        f"{facts.base} with {methods} adapters merged into its weights by infold "
        f"{facts.receipt['infold']}: ordinary weights, the same architecture, no adapter at run "
        "time.",
        f"|  |  |\n|---|---|\n{table}",
        "## Measured",
        _figures(config["performance_metrics"]),
        "## Use",
        f"```python\n{config['usage_example']}```",
        "## Serve",
        f"Each script serves the folder that it lies in, on loopback:\n\n{serving}",
        "## Check",
        f"```bash\ninfold verify {shlex.quote(facts.called)}\n```",
        "## Rollback",
        _rollback(facts, config["rollback"]),
    ]
    if kept:
        blocks.append(f"The base's own card: [{KEPT_CARD}]({KEPT_CARD}).")
    return "\n\n".join(blocks) + "\n"


def _count(parameters: int | None) -> str:
    return "packed by the quantization" if parameters is None else f"{parameters:,}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _figures(found: Mapping[str, Any]) -> str:
    if not found["measured"]:
        return f"Nothing: {found['why']}."
    first, rate = found["first_token_seconds"], found["decode_tokens_per_second"]
    rows = [
        ("loading, once", f"{found['load_seconds']:.2f} s"),
        (
            f"first token after {found['prompt_tokens']} tokens",
            f"{first['median'] * 1000:.0f} ms ({first['low'] * 1000:.0f} to "
            f"{first['high'] * 1000:.0f})",
        ),
        (
            "decoding, batch 1",
            f"{rate['median']:.1f} tokens/s ({rate['low']:.1f} to {rate['high']:.1f})",
        ),
        ("resident memory, once", bytes_text(found["resident_bytes"])),
    ]
    table = "\n".join(f"| {name} | {text} |" for name, text in rows)
    many = "" if found["threads"] == 1 else "s"
    return (
        f"On {found['device']}, {found['threads']} thread{many}, {found['dtype']}, plain "
        "transformers; "
        f"medians of {found['rounds']} rounds, in brackets intervals that hold them with "
        f"{rate['coverage']:.0%}.\n\n"
        f"|  |  |\n|---|---|\n{table}"
    )


def _rollback(facts: Facts, way: Mapping[str, Any]) -> str:
    command = f"```bash\n{way['command']}\n```"
    digests = "\n".join(f"{d}  base/{name}" for name, d in way["base_shards_blake3"].items())
    check = f"It is the base if `b3sum --check` says so of:\n\n```text\n{digests}\n```"
    if way["exact"]:
        return (
            f"`{UNDO}` holds what the merge changed. The base comes back bit for bit, cut into the "
            f"shards that it was merged from:\n\n{command}\n\n{check}"
        )
    lacking = (
        "There is no undo record here (`infold merge --undo` makes one): serve the base again."
    )
    told = f"{lacking}\n\n{command}\n\n{check}"
    if caveat := way["caveat"]:
        told += f"\n\n{caveat[0].upper()}{caveat[1:]}: "
        told += "then the copy that was merged is the base to keep."
    return told
