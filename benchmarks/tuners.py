"""Measure infold's tuners against PEFT's, in memory.

    python benchmarks/tuners.py                 # about 20 minutes on 2 cores, 14 GB of memory
    python benchmarks/tuners.py --only step     # attach, step, generate, rows or merge

Writes results/tuners.md and .json, with --only results/tuners-step.md and .json.

Every comparison takes turns, in one process and in rounds, after one round to warm up; attaching
and merging, which are counted in memory too, are fresh processes. Models: SmolLM2-135M-Instruct
(examples/smollm2.py makes it) in float32, and for attaching and merging the shape of Qwen2.5-1.5B.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import inputs
import merge

HERE = Path(__file__).resolve().parent
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FIELDS: dict[str, dict[str, Any]] = {
    "lora": dict(r=16, lora_alpha=32, target_modules=LINEARS),
    "ia3": dict(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
}
TOKENS = 32  # that are generated
ROWS = 64


def attached(tool: str, method: str, model: Any, name: str = "default") -> Any:
    """A model with an adapter of either tool."""
    if tool == "PEFT":
        import peft

        kinds: Any = {"lora": peft.LoraConfig, "ia3": peft.IA3Config}
        on_meta = next(model.parameters()).is_meta
        config = kinds[method](**FIELDS[method])
        return peft.get_peft_model(model, config, low_cpu_mem_usage=on_meta)
    import infold.tuners

    kinds = {"lora": infold.tuners.LoraConfig, "ia3": infold.tuners.IA3Config}
    return infold.tuners.attach(model, kinds[method](**FIELDS[method]), name)


def smollm2() -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    path = inputs.cache().parent / "SmolLM2-135M-Instruct"
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def in_turns(cases: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each case, in rounds that each begin with another; the first does not count."""
    names = list(cases)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        shift = number % len(names)
        for name in (*names[shift:], *names[:shift]):
            begin = time.perf_counter()
            cases[name]()
            took = time.perf_counter() - begin
            if number:
                seconds[name].append(took)
            print(f"  round {number}  {name:24} {took:8.3f} s", flush=True)
    return seconds


# --- one model, in turns -------------------------------------------------------------------------


def steps(rounds: int) -> dict[str, dict[str, list[float]]]:
    """A training step: 4 rows of 128 tokens, forward, backward, AdamW."""
    import torch

    ids = torch.randint(10, 40000, (4, 128), generator=torch.Generator().manual_seed(0))
    results = {}
    for method in FIELDS:
        models = {tool: attached(tool, method, smollm2()).train() for tool in ("PEFT", "infold")}

        def step(model: Any, optimizer: Any) -> None:
            for _ in range(2):
                model(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
                optimizer.zero_grad()

        cases = {}
        for tool, model in models.items():
            trained = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(trained, lr=1e-4)
            cases[tool] = lambda m=model, o=optimizer: step(m, o)
        results[f"training step, {method}"] = in_turns(cases, rounds)
    return results


def generation(rounds: int) -> dict[str, dict[str, list[float]]]:
    """Greedy generation with the adapter beside the weights, and without one."""
    import torch

    results = {}
    for method in FIELDS:
        models = {"base": smollm2().eval()}
        models |= {t: attached(t, method, smollm2()).eval() for t in ("PEFT", "infold")}
        for batch in (1, 8):
            ids = torch.randint(10, 40000, (batch, 16), generator=torch.Generator().manual_seed(0))

            def generate(model: Any, ids: Any = ids) -> None:
                mask = torch.ones_like(ids)
                model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    max_new_tokens=TOKENS,
                    min_new_tokens=TOKENS,
                    do_sample=False,
                    pad_token_id=0,
                )

            cases = {name: lambda m=model: generate(m) for name, model in models.items()}
            results[f"generation, {method}, batch {batch}"] = in_turns(cases, rounds)
    return results


def mixed(rounds: int) -> dict[str, dict[str, list[float]]]:
    """A batch of 64 rows through one IA³ adapter, and through 64 different ones."""
    import torch

    model = attached("infold", "ia3", smollm2(), "a0")
    for number in range(1, ROWS):
        attached("infold", "ia3", model, f"a{number}")
    model.set_adapter("a0")
    model.eval()
    names = [f"a{number}" for number in range(ROWS)]
    ids = torch.randint(10, 40000, (ROWS, 32), generator=torch.Generator().manual_seed(0))
    generate = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)
    mask = torch.ones_like(ids)

    def forward(**more: Any) -> None:
        with torch.no_grad():
            model(ids, **more)

    def decode(**more: Any) -> None:
        model.generate(input_ids=ids[:, :4], attention_mask=mask[:, :4], **generate, **more)

    return {
        "forward of 64 rows, ia3": in_turns(
            {"one adapter": forward, "64 adapters": lambda: forward(adapter_names=names)}, rounds
        ),
        "generation of 64 rows, ia3": in_turns(
            {"one adapter": decode, "64 adapters": lambda: decode(adapter_names=names)}, rounds
        ),
    }


# --- fresh processes -----------------------------------------------------------------------------


def child(job: str, tool: str, method: str) -> dict[str, float]:
    """What one fresh process measures; run by `--child`."""
    import resource

    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    if tool == "PEFT":
        import peft  # noqa: F401
    else:
        import infold.tuners  # noqa: F401

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0

    if job == "attach":
        config = Qwen2Config(
            hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, vocab_size=151936,
            num_attention_heads=12, num_key_value_heads=2, tie_word_embeddings=True,
        )  # fmt: skip
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        before = peak()
        begin = time.perf_counter()
        attached(tool, method, model)
        return {"attach": time.perf_counter() - begin, "attach memory": peak() - before}
    folder = inputs.cache() / inputs.names("3gb")["base"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for parameter in model.parameters():  # into memory of its own
        parameter.data = parameter.data.clone()
    model = attached(tool, method, model)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.01)
    found = {}
    before = peak()
    for name in ("merge_and_unload",) if job == "unload" else ("merge_adapter", "unmerge_adapter"):
        begin = time.perf_counter()
        getattr(model, name)()
        found[name] = time.perf_counter() - begin
        found[f"{name} memory"] = peak() - before
    return found


def processes(job: str, rounds: int) -> dict[str, dict[str, list[float]]]:
    results: dict[str, dict[str, list[float]]] = {}
    for number in range(rounds):
        tools = ("infold", "PEFT") if number % 2 else ("PEFT", "infold")
        for method in FIELDS:
            for tool in tools:
                command = [sys.executable, str(HERE / "tuners.py"), "--child", job, tool, method]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    sys.exit(done.stderr)
                found = json.loads(done.stdout.splitlines()[-1])
                print(f"  round {number + 1}  {tool:8} {method}  {_shown(found)}", flush=True)
                for what, value in found.items():
                    results.setdefault(f"{what}, {method}", {}).setdefault(tool, []).append(value)
    return results


def _shown(found: Mapping[str, float]) -> str:
    return "  ".join(
        f"{what} {value / 1e6:.0f} MB" if "memory" in what else f"{what} {value:.2f} s"
        for what, value in found.items()
    )


# --- the record ----------------------------------------------------------------------------------

GROUPS: dict[str, Callable[[int], dict[str, dict[str, list[float]]]]] = {
    "attach": lambda rounds: processes("attach", rounds),
    "step": steps,
    "generate": generation,
    "rows": mixed,
    "merge": lambda rounds: processes("merge", rounds) | processes("unload", rounds),
}


def to_markdown(record: Mapping[str, Any]) -> str:
    where = record["machine"]
    lines = [
        "# The tuners in memory, against PEFT's",
        "",
        f"{where['cpu']}, {where['cores']} cores, {where['memory'] / 1e9:.0f} GB memory. Python "
        f"{where['python']}, torch {where['torch']}, transformers {where['transformers']}, PEFT "
        f"{where['peft']}. infold {where['infold']}, commit {where['commit']}. {where['date']}.",
        "",
        "Medians (least to greatest); times in seconds, memory in MB over what the process had "
        "before. The first column is what the others are compared with: for ratios of time, above "
        "1 is slower. LoRA: rank 16 on all linear layers. IA³: on k, v and down.",
        "",
        "| | of | median | ratio |",
        "|---|---|--:|--:|",
    ]
    for what, cases in record["results"].items():
        first = statistics.median(next(iter(cases.values())))
        for number, (name, values) in enumerate(cases.items()):
            scale = 1e6 if "memory" in what else 1
            middle = statistics.median(values)
            spread = f"{middle / scale:.3g} ({min(values) / scale:.3g}–{max(values) / scale:.3g})"
            ratio = "" if number == 0 or not first else f"{middle / first:.2f}"
            label = what.replace("ia3", "IA³").replace("lora", "LoRA")
            lines.append(f"| {label if not number else ''} | {name} | {spread} | {ratio} |")
    lines += ["", "```", record["command"], "```", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=list(GROUPS))
    parser.add_argument("--child", nargs=3, metavar=("JOB", "TOOL", "METHOD"), help="internal")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    if options.child:
        import warnings

        warnings.simplefilter("ignore")
        print(json.dumps(child(*options.child)))
        return
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    inputs.make("3gb", inputs.cache(), lone=False)
    results: dict[str, Any] = {}
    for name, group in GROUPS.items():
        if options.only in (None, name):
            print(name, flush=True)
            results |= group(options.rounds)
    only = f" --only {options.only}" if options.only else ""
    record = {
        "machine": merge.machine(inputs.cache()),
        "command": f"python benchmarks/tuners.py --rounds {options.rounds}{only}",
        "results": results,
    }
    print(to_markdown(record))
    name = f"tuners-{options.only}" if options.only else "tuners"
    target = HERE / "results"
    (target / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    (target / f"{name}.md").write_text(to_markdown(record))


if __name__ == "__main__":
    main()
