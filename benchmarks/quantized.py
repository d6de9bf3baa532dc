"""IA³ folded into quantized checkpoints: exactness, bytes, time, and the model that comes out.

    python benchmarks/quantized.py errors   # each format on real weights, against requantizing
    python benchmarks/quantized.py models   # SmolLM2-135M in bitsandbytes int8 and NF4, on the CPU
    python benchmarks/quantized.py speed    # the same: tokens a second of base and folded
    python benchmarks/quantized.py report   # results/quantized.json -> results/quantized.md

All parts add to `results/quantized.json`. Needs the `dev` extra; `errors` takes the formats from
`tests/quantized_bases.py`, which writes them with the packages that define them, where those run on
a CPU. `models` and `speed` make their bases once, in `quantized` of the cache
(benchmarks/README.md).
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "tests"), str(HERE)]

import smollm2  # noqa: E402
from parts import add_part, told_of, told_of_older  # noqa: E402

RECORD = HERE / "results" / "quantized.json"
ADAPTER = ROOT / "examples" / "adapters" / "ia3-reviews"
LAYERS = (0, 14, 29)
POSITIONS = 2000
REVIEWS = 1000


def add(part: str, value: Any, of: str = "") -> None:
    """Put one part into the record, which keeps the others."""
    add_part(RECORD, part, value, ("torch", "transformers", "peft", "bitsandbytes"), of)


# --- each format, on real weights ----------------------------------------------------------------


def errors(base: Path, work: Path) -> list[dict[str, Any]]:
    """Relative Frobenius errors against the exact product of the vector and the dequantized weight:
    of the fold, and of dequantizing, scaling and quantizing again with the base's own quantizer.

    rows: k_proj's vector on its rows. ff: down_proj's vector, which the fold puts into the rows of
    up_proj and requantizing into the columns of down_proj. quant: the base's own error.
    """
    import infold
    import quantized_bases

    plain = functools.partial(quantized_bases.gptq, act_order=False)
    kinds = {
        **quantized_bases.KINDS,
        "gptq": plain,
        "gptq, solved": functools.partial(plain, rounded=solve),
    }
    weights = {name: tensor for name, tensor in read(base, wanted()) if name.endswith("weight")}
    vectors = dict(read(ADAPTER, None))
    rows = []
    for kind, encode in kinds.items():
        torch.manual_seed(0)
        modules = {}
        tensors, metadata = {}, {"format": "pt"}
        for name, weight in weights.items():
            place = name.removesuffix(".weight")
            modules[place] = made = encode(weight.float())
            tensors |= {f"{place}.{part}": t.contiguous() for part, t in made.tensors.items()}
            metadata |= {f"{place}.{key}": text for key, text in made.metadata.items()}
        folder, out = work / "base", work / "out"
        for path in (folder, out):
            shutil.rmtree(path, ignore_errors=True)
        folder.mkdir(parents=True)
        config = {"hidden_act": "silu", "quantization_config": made.config}
        (folder / "config.json").write_text(json.dumps(config))
        save_file(tensors, folder / "model.safetensors", metadata)
        infold.merge(folder, adapter_of(work, vectors), out, force=True)
        after = load_file(out / "model.safetensors")
        sums: dict[str, list[float]] = {}
        for place, module in modules.items():
            part = place.rpartition(".")[2]
            if part not in ("k_proj", "up_proj", "down_proj"):
                continue
            new = module.values({name: after[f"{place}.{name}"] for name in module.tensors})
            old = module.values(module.tensors)
            side = place.replace("up_proj", "down_proj")
            vector = vectors[f"base_model.model.{side}.ia3_l"].double().flatten()
            told = {"k_proj": "rows", "up_proj": "ff", "down_proj": "ff"}[part]
            if part == "down_proj":
                assert torch.equal(new, old)
                exact = old * vector
            else:
                exact = vector[:, None] * old
                note(sums, f"{told} fold", new, exact)
            if part != "up_proj":
                again = (plain if kind.startswith("gptq, ") else encode)(exact.float())
                note(sums, f"{told} requantized", again.values(again.tensors), exact)
            note(sums, "quant", old, weights[f"{place}.weight"].double())
        changed = sum(t.nbytes for n, t in tensors.items() if not equal(t, after[n]))
        touched = sum(t.nbytes for n, t in tensors.items() if "k_proj" in n or "up_proj" in n)
        row = {"kind": kind, "changed": changed / touched}
        row |= {name: (off / size) ** 0.5 for name, (off, size) in sums.items()}
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def solve(weight: Tensor, group: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """GPTQ itself (Frantar et al., arXiv 2210.17323), for correlated activations that are made up:
    the error of each column is taken up by the columns after it. Returns codes, zeros, scales."""
    out, inputs = weight.shape
    random = torch.Generator().manual_seed(0)
    mixed = torch.randn(inputs, inputs // 8, generator=random, dtype=torch.float64)
    samples = torch.randn(4 * inputs, inputs // 8, generator=random, dtype=torch.float64)
    noise = torch.randn(4 * inputs, inputs, generator=random, dtype=torch.float64)
    seen = samples @ mixed.t() / (inputs // 8) ** 0.5 + 0.5 * noise
    hessian = seen.t() @ seen / len(seen)
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(inputs)
    inverse = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    left, most = weight.double().clone(), 2**bits - 1
    codes = torch.empty(out, inputs, dtype=torch.int32)
    scale = torch.empty(out, inputs // group, dtype=torch.float16)
    zero = torch.empty(out, inputs // group, dtype=torch.int32)
    for i in range(inputs):
        g = i // group
        if i % group == 0:
            piece = left[:, i : i + group]
            low, high = piece.amin(1).clamp(max=0), piece.amax(1).clamp(min=0)
            scale[:, g] = ((high - low) / most).clamp(min=1e-6).half()
            zero[:, g] = (-low / scale[:, g].double()).round().clamp(0, most).int()
        step = scale[:, g].double()
        codes[:, i] = ((left[:, i] / step).round() + zero[:, g]).clamp(0, most).int()
        off = (left[:, i] - step * (codes[:, i] - zero[:, g])) / inverse[i, i]
        left[:, i:] -= off[:, None] * inverse[i, i:]
    return codes, zero, scale


def wanted() -> list[str]:
    names = ["self_attn.k_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    return [f"model.layers.{layer}.{name}.weight" for layer in LAYERS for name in names]


def read(folder: Path, names: list[str] | None) -> Iterator[tuple[str, Tensor]]:
    """Some tensors of a folder, or all of them."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                if names is None or name in names:
                    yield name, file.get_tensor(name)


def adapter_of(work: Path, vectors: dict[str, Tensor]) -> Path:
    """The adapter's vectors of these layers (its v_proj is not in the base here)."""
    folder = work / "adapter"
    if not folder.exists():
        folder.mkdir(parents=True)
        kept = {
            name: tensor
            for name, tensor in vectors.items()
            if any(f".layers.{layer}." in name for layer in LAYERS) and "v_proj" not in name
        }
        save_file(kept, folder / "adapter_model.safetensors")
        shutil.copy(ADAPTER / "adapter_config.json", folder)
    return folder


def note(sums: dict[str, list[float]], name: str, found: Tensor, exact: Tensor) -> None:
    entry = sums.setdefault(name, [0.0, 0.0])
    entry[0] += float((found - exact).square().sum())
    entry[1] += float(exact.square().sum())


def equal(one: Tensor, two: Tensor) -> bool:
    raw = [t.contiguous().flatten().view(torch.uint8) for t in (one, two)]
    return torch.equal(*raw)


# --- a model through a runtime -------------------------------------------------------------------


def quantized_base(base: Path, cache: Path, kind: str) -> Path:
    """SmolLM2 as transformers saves it with bitsandbytes; made once."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    folder = cache / "quantized" / f"{base.name}-{kind}"
    if folder.exists():
        return folder
    four = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": torch.float32,
        "bnb_4bit_use_double_quant": kind == "nf4-nested",
    }
    config = BitsAndBytesConfig(**({"load_in_8bit": True} if kind == "int8" else four))
    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=config, dtype=torch.float32
    )
    work = folder.with_name(f".{folder.name}")
    model.save_pretrained(work)
    AutoTokenizer.from_pretrained(base).save_pretrained(work)
    work.rename(folder)
    return folder


def load(folder: Path, adapter: Path | None = None, dense: bool = False) -> Any:
    """A folder as transformers runs it, or with its weights dequantized to float32."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if dense:
        model = model.dequantize().float()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    return model.eval()


@torch.inference_mode()
def logits_of(model: Any, rows: list[list[int]], count: int) -> Tensor:
    """Next-token logits of the first `count` positions of the rows, one row after the other."""
    found: list[Tensor] = []
    for row in rows:
        found.append(model(input_ids=torch.tensor([row])).logits[0].float())
        if sum(map(len, found)) >= count:
            break
    return torch.cat(found)[:count]


def compare(one: Tensor, two: Tensor) -> dict[str, float]:
    return {
        "top1": float((one.argmax(1) == two.argmax(1)).float().mean()),
        "rms": float((one - two).square().mean().sqrt()),
        "max": float((one - two).abs().max()),
    }


def timed(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started


def model_case(base: Path, cache: Path, work: Path, kind: str) -> dict[str, Any]:
    from reviews import ANSWERS, judge, load_reviews
    from transformers import AutoTokenizer

    folder = quantized_base(base, cache, kind)
    out, back = work / f"{kind}-folded", work / f"{kind}-back"
    for path in (out, back, work / "copy"):
        shutil.rmtree(path, ignore_errors=True)
    infold = [sys.executable, "-m", "infold"]
    row: dict[str, Any] = {"kind": kind, "bytes": size(folder)}
    row["copy"] = timed(["cp", "-r", str(folder), str(work / "copy")])
    row["merge"] = timed([*infold, "merge", str(folder), str(ADAPTER), "--out", str(out), "--undo"])
    row["verify"] = timed([*infold, "verify", str(folder), str(ADAPTER), str(out)])
    row["undo"] = timed([*infold, "undo", str(out), "--out", str(back)])
    receipt = json.loads((out / "infold-receipt.json").read_text())
    row |= {"seconds": receipt["seconds"], "edited": receipt["edited_bytes"]}
    row |= {"edits": len(receipt["edits"]), "record": (out / "infold-undo.bin").stat().st_size}
    row["restored"] = all(
        (back / path.name).read_bytes() == path.read_bytes()
        for path in folder.glob("*.safetensors")
    )
    tokenizer = AutoTokenizer.from_pretrained(base)
    _, held_out = load_reviews(tokenizer, held_out=REVIEWS)
    answers = [tokenizer.encode(answer)[0] for answer in ANSWERS]
    rows = [review.tokens for review in held_out[:200]]
    models = {"base": (folder, None), "adapter": (folder, ADAPTER), "folded": (out, None)}
    logits, exact, right = {}, {}, {}
    for name, (path, adapter) in models.items():
        model = load(path, adapter)
        logits[name] = logits_of(model, rows, POSITIONS)
        right[name] = judge(model, held_out, answers)
        row[f"accuracy {name}"] = sum(right[name]) / len(right[name])
        del model
        if name != "base":
            exact[name] = logits_of(load(path, adapter, dense=True), rows, POSITIONS)
        print(kind, name, row[f"accuracy {name}"], flush=True)
    row["reviews that differ"] = sum(
        a != b for a, b in zip(right["adapter"], right["folded"], strict=True)
    )
    row["runtime"] = compare(logits["adapter"], logits["folded"])
    row["base against adapter"] = compare(logits["base"], logits["adapter"])
    row["dequantized"] = compare(exact["adapter"], exact["folded"])
    row["runtime against dequantized"] = compare(logits["adapter"], exact["adapter"])
    row["std"] = float(logits["adapter"].std())
    return row


PROMPT, NEW, TURNS = 128, 32, 9  # tokens, tokens, and how often each model is timed


@torch.inference_mode()
def speed_case(base: Path, cache: Path, work: Path, kind: str) -> dict[str, Any]:
    """Tokens a second of the base, the folded base and, as control, the base loaded again.

    All three are loaded, and timed in turns that each begin with another of them.
    """
    folder, out = quantized_base(base, cache, kind), work / f"{kind}-folded"
    shutil.rmtree(out, ignore_errors=True)
    timed([sys.executable, "-m", "infold", "merge", str(folder), str(ADAPTER), "--out", str(out)])
    models = {"base": load(folder), "folded": load(out), "base again": load(folder)}
    prompt = torch.randint(1000, 40_000, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    names = list(models)
    rates: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for turn in range(TURNS + 1):
        for name in names[turn % 3 :] + names[: turn % 3]:
            began = time.perf_counter()
            models[name](prompt, logits_to_keep=1)
            first = time.perf_counter() - began
            began = time.perf_counter()
            models[name].generate(
                prompt, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0
            )
            rest = time.perf_counter() - began - first
            if turn:  # the first warms up
                rates[name].append({"prompt": PROMPT / first, "decode": (NEW - 1) / rest})
    print(kind, {n: statistics.median(r["decode"] for r in rates[n]) for n in names}, flush=True)
    return {"kind": kind, "rates": rates}


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


# --- the report ----------------------------------------------------------------------------------


def report(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    lines = [
        "# IA³ folded into quantized checkpoints",
        "",
        "    python benchmarks/quantized.py errors",
        "    python benchmarks/quantized.py models",
        "    python benchmarks/quantized.py speed",
        "",
        *told_of_older(record, ["errors", "models"]),
        "## Each format, on real weights",
        "",
        f"k_proj, up_proj and down_proj of layers {', '.join(map(str, LAYERS))} of SmolLM2-135M "
        "with the vectors of `examples/adapters/ia3-reviews`. Relative Frobenius errors against "
        "the exact product of vector and dequantized weight. *requantized*: dequantize, scale, and "
        "quantize again with the quantizer that made the base. *rows*: k_proj's vector. *ff*: "
        "down_proj's vector, which the fold puts into up_proj's rows. *quantization*: the base's "
        "own error against the weights, which are a Q4_1 file's: groups of 32 with a float zero "
        "find its grid again. *changed*: bytes of the folded modules that changed. *gptq, "
        "solved*: by the GPTQ algorithm, requantized by plain rounding; the others of four bits "
        "are rounded plainly.",
        "",
        "| format | quantization | rows: fold | requantized | ff: fold | requantized | changed |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in record.get("errors", ()):
        names = ("quant", "rows fold", "rows requantized", "ff fold", "ff requantized")
        cells = [f"{row[name]:.1e}" for name in names]
        lines.append(f"| {row['kind']} | {' | '.join(cells)} | {row['changed']:.1%} |")
    lines += [
        "",
        "On the rows requantizing is as good as the fold where plain rounding finds the codes of a "
        "plainly rounded base again: NF4, FP4, FP8, int8 by channel, scales in bfloat16. Elsewhere "
        "it loses more, most where the base's own quantizer is another one or does not use the "
        "whole range. On the input side it is a second quantization, about as large as the first, "
        "in every format. (*hqq* has eight bits here.)",
        "",
        *told_of(record, "errors"),
        "## SmolLM2-135M through bitsandbytes, on the CPU",
        "",
        "Saved by transformers, folded by `infold merge --undo`, and loaded again. *adapter*: the "
        "same base with the adapter attached by PEFT. The runtime rounds by itself: activations to "
        "eight bits in int8, and on some processors NF4's scales to bfloat16; so the same pair is "
        "also compared on weights that are dequantized to float32. Times are mostly the import of "
        "PyTorch.",
        "",
    ]
    models = record.get("models", [])
    heads = [row["kind"] for row in models]
    lines += [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]

    def line(told: str, cells: list[str]) -> None:
        lines.append(f"| {told} | {' | '.join(cells)} |")

    line("bytes of weights", [f"{row['bytes']:,}" for row in models])
    line("bytes in edited tensors", [f"{row['edited']:,} in {row['edits']}" for row in models])
    line(
        "undo record, the adapter and small side files in it",
        [f"{row['record']:,}" for row in models],
    )
    line("`cp -r`", [f"{row['copy']:.2f} s" for row in models])
    line(
        "`infold merge --undo`, of it the merge",
        [f"{row['merge']:.2f} s, {row['seconds']:.2f} s" for row in models],
    )
    line("`infold verify`", [f"{row['verify']:.2f} s" for row in models])
    line("undo gives the base bit for bit", ["yes" if r["restored"] else "NO" for r in models])
    for name in ("base", "adapter", "folded"):
        line(f"accuracy, {name}", [f"{row[f'accuracy {name}']:.3f}" for row in models])
    line(f"reviews of {REVIEWS:,} that differ", [f"{r['reviews that differ']}" for r in models])

    def pair(name: str) -> list[str]:
        found = [row.get(name) for row in models]
        return ["-" if c is None else f"{c['top1']:.4f}, {c['rms']:.1e}" for c in found]

    line(f"folded / adapter, {POSITIONS:,} positions: top-1, rms of logits", pair("runtime"))
    line("the same on weights dequantized to float32", pair("dequantized"))
    line("base / adapter (must differ)", pair("base against adapter"))
    line(
        "adapter: runtime / dequantized (the runtime's own rounding)",
        pair("runtime against dequantized"),
    )
    line("standard deviation of a logit", [f"{row['std']:.2f}" for row in models])
    if where := told_of(record, "models"):
        lines += ["", *where[:-1]]
    if speeds := record.get("speed"):
        lines += ["", *speed_table(speeds), "", *told_of(record, "speed")[:-1]]
    return "\n".join(lines) + "\n"


def speed_table(speeds: list[dict[str, Any]]) -> list[str]:
    """Medians, and the median, least and greatest quotient of the turns' pairs."""
    lines = [
        f"Tokens a second, {PROMPT} of the prompt and {NEW} greedy ones, medians of {TURNS} turns; "
        "quotients turn by turn: median (least to greatest).",
        "",
        "| | base | folded | folded / base | the base again / base |",
        "|---|--:|--:|---|---|",
    ]
    for row in speeds:
        for part, told in (("prompt", "the prompt"), ("decode", "one by one")):
            rates = {name: [turn[part] for turn in turns] for name, turns in row["rates"].items()}
            cells = [f"{statistics.median(rates[name]):.1f}" for name in ("base", "folded")]
            for name in ("folded", "base again"):
                over = [a / b for a, b in zip(rates[name], rates["base"], strict=True)]
                cells.append(f"{statistics.median(over):.3f} ({min(over):.3f} to {max(over):.3f})")
            lines.append(f"| {row['kind']}, {told} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("part", choices=["errors", "models", "speed", "report"])
    parser.add_argument("--kinds", default="int8,nf4", help="models, speed: int8, nf4, nf4-nested")
    options = parser.parse_args()
    cache = smollm2.default_cache()
    work = cache / "quantized" / f"work-{options.part}"
    work.mkdir(parents=True, exist_ok=True)
    if options.part == "errors":
        add("errors", errors(smollm2.make_base(cache), work))
    elif options.part in ("models", "speed"):
        from transformers.utils import logging

        logging.disable_progress_bar()
        kinds = options.kinds.split(",")
        case = model_case if options.part == "models" else speed_case
        known = json.loads(RECORD.read_text()).get(options.part, []) if RECORD.exists() else []
        rows = {row["kind"]: row for row in known}
        for kind in kinds:
            rows[kind] = case(smollm2.make_base(cache), cache, work, kind)
            add(options.part, list(rows.values()), kind)
    shutil.rmtree(work, ignore_errors=True)
    (HERE / "results" / "quantized.md").write_text(report(json.loads(RECORD.read_text())))


if __name__ == "__main__":
    main()
