"""Measure infold on a GPU: the same bytes as on the CPU, merging, training, and what a merge buys.

    python benchmarks/gpu.py                   # about 6 minutes on one H100
    python benchmarks/gpu.py --only step       # merge, memory, step or bench
    python benchmarks/gpu.py --size tiny --device cpu      # whether it runs at all

Writes results/gpu.md and results/gpu.json after each part, and keeps the other parts of them;
--out takes another folder.

The model has Qwen2.5-1.5B's shape and random weights (benchmarks/inputs.py), which speed does not
depend on. Merges are whole processes, everything else takes turns in one process.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import deployment
import inputs
import tuners

HERE = Path(__file__).resolve().parent
Results = dict[str, dict[str, list[float]]]
TITLES = {
    "merge": "Merging the checkpoint: whole processes",
    "memory": "Merging a model that lies on the GPU",
    "step": "Training: 4 rows of 512 tokens",
    "bench": "Base, adapter mode, merged",
}


def folder(size: str, what: str) -> Path:
    return inputs.cache() / inputs.names(size)[what]


def shards(out: Path) -> dict[str, str]:
    """The digests of a merged folder's weights."""
    return dict(json.loads((out / "infold-receipt.json").read_text())["shards"])


# --- whole processes -----------------------------------------------------------------------------


def merges(size: str, device: str, rounds: int) -> tuple[Results, dict[str, bool]]:
    """Merging the checkpoint on the CPU and on the GPU, and whether the bytes are the same."""
    out, results, same = inputs.cache() / "out", Results(), {}
    for method in ("lora", "ia3"):
        base, adapter = folder(size, "base"), folder(size, method)
        infold = [sys.executable, "-m", "infold", "merge", str(base), str(adapter), "--quiet"]
        cases = {
            "infold": [*infold, "--out", str(out / "merged")],
            "infold --device": [*infold, "--out", str(out / "merged"), "--device", device],
            "PEFT": [sys.executable, str(HERE / "peft_merge.py"), str(base), str(adapter),
                     str(out / "merged")],
        }  # fmt: skip
        times: dict[str, list[float]] = {name: [] for name in cases}
        digests: dict[str, dict[str, str]] = {}
        for number in range(rounds):
            for name, command in cases.items():
                if name.startswith("PEFT") and number:
                    continue  # it is slow, and not what this part is about
                shutil.rmtree(out, ignore_errors=True)
                out.mkdir(parents=True)
                begin = time.perf_counter()
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                times[name].append(time.perf_counter() - begin)
                print(f"  {method} {name:16} {times[name][-1]:.2f} s", flush=True)
                if name.startswith("infold"):
                    digests[name] = shards(out / "merged")
        results[f"merge, {method}"] = times
        first, *others = digests.values()
        same[method] = all(first == other for other in others)
        print(f"  {method}: {'the same bytes' if same[method] else 'OTHER BYTES'}", flush=True)
    shutil.rmtree(out, ignore_errors=True)
    return results, same


# --- one process, in turns -----------------------------------------------------------------------


def load(size: str, device: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    path = folder(size, "base")
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).to(device)


def wait(device: str) -> None:
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize()


def steps(size: str, device: str, rounds: int) -> Results:
    """A training step in bfloat16: 4 rows of 512 tokens, forward, backward, AdamW."""
    import torch

    top = inputs.SIZES[size].vocab
    ids = torch.randint(10, top, (4, 512), generator=torch.Generator().manual_seed(0)).to(device)
    results: Results = {}
    for method in tuners.FIELDS:
        cases: dict[str, Callable[[], None]] = {}
        held: dict[str, list[float]] = {}
        for tool in ("PEFT", "infold"):
            model = tuners.attached(tool, method, load(size, device)).train()
            trained = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(trained, lr=1e-4)

            def step(model: Any = model, optimizer: Any = optimizer) -> None:
                for _ in range(4):
                    model(input_ids=ids, labels=ids).loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                wait(device)

            cases[tool] = step
            if device.startswith("cuda"):
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                step()
                held[tool] = [torch.cuda.max_memory_allocated() - float(before)]
        timed = tuners.in_turns(cases, rounds)
        results[f"training step, {method}"] = {
            tool: [value / 4 for value in values] for tool, values in timed.items()
        }
        if held:
            results[f"training step memory, {method}"] = held
    return results


def in_memory(size: str, device: str, rounds: int) -> Results:
    """merge_and_unload and unmerging of a model that lies on the GPU."""
    import torch

    results: Results = {}
    for method in tuners.FIELDS:
        found: dict[str, dict[str, list[float]]] = {
            name: {"PEFT": [], "infold": []} for name in ("merge", "unmerge", "merge and unload")
        }
        for number in range(rounds + 1):
            for tool in ("PEFT", "infold"):
                model = tuners.attached(tool, method, load(size, device))
                torch.manual_seed(0)
                with torch.no_grad():
                    for parameter in model.parameters():
                        if parameter.requires_grad:
                            parameter.add_(torch.randn_like(parameter), alpha=0.01)
                for name, times in found.items():
                    wait(device)
                    begin = time.perf_counter()
                    {
                        "merge": model.merge_adapter,
                        "unmerge": model.unmerge_adapter,
                        "merge and unload": model.merge_and_unload,
                    }[name]()
                    wait(device)
                    if number:
                        times[tool].append(time.perf_counter() - begin)
                del model
        results |= {f"in memory: {name}, {method}": times for name, times in found.items()}
        for name, times in found.items():
            print(f"  {method} {name}: {times}", flush=True)
    return results


def bench(size: str, device: str, rounds: int) -> dict[str, Any]:
    """`infold bench` on this checkpoint."""
    import infold
    from infold.bench.run import measure_models

    found = {}
    for method in ("lora", "ia3"):
        base, adapter = folder(size, "base"), folder(size, method)
        merged = inputs.cache() / "out-bench"
        shutil.rmtree(merged, ignore_errors=True)
        infold.merge(base, adapter, merged, device=device)
        found[f"{method}, bfloat16"] = measure_models(
            base, adapter, merged, device=device, dtype="bfloat16", batches=(1, 8), rounds=rounds,
            starts=2,
        )  # fmt: skip
        shutil.rmtree(merged)
        print(f"  {method}: {deployment.verdict(found[f'{method}, bfloat16'])}", flush=True)
    return found


# --- the record ----------------------------------------------------------------------------------


def machine(device: str) -> dict[str, str]:
    import torch

    import infold

    name = torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "device": name,
        "cores": str(os.cpu_count()),
        "memory": f"{memory / 1e9:.0f} GB",
        "python": platform.python_version(),
        **{p: version(p) for p in ("torch", "transformers", "peft")},
        "infold": infold.__version__,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def page(parts: Mapping[str, Any]) -> str:
    lines = [
        "# On a GPU",
        "",
        "    python benchmarks/gpu.py",
        "",
        "A model of Qwen2.5-1.5B's shape with random weights, in bfloat16. Medians (least to "
        "greatest), seconds or MB; ratios to the first of each group: above 1 is slower, or more. "
        "LoRA: rank 16 on all linear layers. IA³: on k, v and down. Each part is a run of its own.",
    ]
    for name, part in parts.items():
        where = part["machine"]
        told = ", ".join(f"{name} {where[name]}" for name in ("torch", "transformers", "peft"))
        lines += [
            "",
            f"## {TITLES[name]}",
            "",
            f"{where['device']}, {where['cores']} cores, {where['memory']} memory; Python "
            f"{where['python']}, {told}, infold {where['infold']}; {where['date']}.",
        ]
        for method, equal in part.get("same", {}).items():
            told = "**byte-identical**" if equal else "**NOT identical**"
            lines += ["", f"{_label(method)}: the shards merged on CPU and GPU are {told}."]
        if part.get("results"):
            lines += ["", "| | of | median | ratio |", "|---|---|--:|--:|"]
        for what, cases in part.get("results", {}).items():
            lines += _rows(what, cases)
        if part.get("bench"):
            lines += deployment.tables(part["bench"])
    return "\n".join(lines) + "\n"


def _rows(what: str, cases: Mapping[str, list[float]]) -> Iterator[str]:
    first = statistics.median(next(iter(cases.values())))
    for number, (name, values) in enumerate(cases.items()):
        scale = 1e6 if "memory," in what else 1
        middle = statistics.median(values)
        spread = f"{middle / scale:.3g} ({min(values) / scale:.3g}–{max(values) / scale:.3g})"
        ratio = "" if number == 0 else f"{middle / first:.2f}"
        label = "" if number else _label(what)
        yield f"| {label} | {name} | {spread} | {ratio} |"


def _label(text: str) -> str:
    return text.replace("ia3", "IA³").replace("lora", "LoRA")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=list(TITLES), action="append")
    parser.add_argument("--size", choices=list(inputs.SIZES), default="3gb")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    given = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    inputs.make(given.size, inputs.cache(), lone=False)
    given.out.mkdir(parents=True, exist_ok=True)
    record = given.out / "gpu.json"
    parts: dict[str, Any] = json.loads(record.read_text()) if record.exists() else {}
    for name in given.only or TITLES:
        print(name, flush=True)
        part: dict[str, Any] = {"machine": machine(given.device)}
        arguments = (given.size, given.device, given.rounds)
        if name == "merge":
            part["results"], part["same"] = merges(*arguments)
        elif name == "memory":
            part["results"] = in_memory(*arguments)
        elif name == "step":
            part["results"] = steps(*arguments)
        else:
            part["bench"] = bench(*arguments)
        parts[name] = part
        record.write_text(json.dumps(parts, indent=1) + "\n")
        (given.out / "gpu.md").write_text(page(parts))
    print(page(parts))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"peak memory of this process {peak:.1f} GB")


if __name__ == "__main__":
    main()
