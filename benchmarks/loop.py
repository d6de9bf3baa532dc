"""The loop's merges against PEFT's: drift, disk, and speed over iterations. SmolLM2-135M-Instruct.

python benchmarks/loop.py drift     # 20 random updates of three sizes, against the float64 truth
python benchmarks/loop.py disk      # 10 iterations: adapters and one model, against 10 models
python benchmarks/loop.py speed     # 6 iterations: stacked adapters, PEFT's merge, infold
"""

import argparse
import math
import shlex
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import infold

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "examples" / name) for name in ("", "self_improvement")]
from drift import distance, tensors, updates  # noqa: E402
from parts import machine, told  # noqa: E402
from reviews import load_reviews  # noqa: E402
from smollm2 import NAME, default_cache, make_base  # noqa: E402

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK = 8
PACKAGES = ("infold", "torch", "transformers", "peft")
warnings.filterwarnings("ignore", message="Already found a `peft_config`")
warnings.filterwarnings("ignore", message="You are trying to modify a model with PEFT")


def load(folder: Path, dtype: torch.dtype):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def update_names(weights: dict[str, torch.Tensor]) -> list[str]:
    return [name for name in weights if name.split(".")[-2] in TARGETS]


def write_adapters(base: Path, folder: Path, count: int, size: float) -> list[Path]:
    """Random LoRAs; each changes each matrix by `size` of its norm."""
    weights = tensors(base)
    model = get_peft_model(load(base, torch.float32), LoraConfig(
        r=RANK, lora_alpha=RANK, target_modules=TARGETS, init_lora_weights=True))  # fmt: skip
    made = []
    for number in range(count):
        chance = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for name, module in model.named_modules():
                if not hasattr(module, "lora_A"):
                    continue
                a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
                a.normal_(generator=chance)
                b.normal_(generator=chance)
                weight = weights[name.removeprefix("base_model.model.") + ".weight"]
                b.mul_(size * weight.double().norm() / (b.double() @ a.double()).norm())
        made.append(folder / f"adapter-{number:02}")
        model.save_pretrained(made[-1])
    return made


def relative(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor], names) -> float:
    """Of all updated matrices: norm of the error over the norm of the weights."""
    return distance(found, truth, names) / math.sqrt(
        sum(truth[name].square().sum().item() for name in names)
    )


@torch.inference_mode()
def perplexity(weights: dict[str, torch.Tensor], base: Path, rows: list[list[int]]) -> float:
    """Of the rows' tokens, computed in float32 whatever the weights are kept in."""
    model = load(base, torch.float32)
    model.load_state_dict({k: v.float() for k, v in weights.items()}, strict=False)
    model.tie_weights()
    total = count = 0
    for row in rows:
        ids = torch.tensor([row])
        total += model(input_ids=ids, labels=ids).loss.item() * (len(row) - 1)
        count += len(row) - 1
    return math.exp(total / count)


def drift(base: Path, work: Path) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = [r.tokens for r in load_reviews(tokenizer, 200)[1]]
    start = tensors(base)
    names = update_names(start)
    lines = [
        "Distance: Frobenius norm of (weights - float64 truth) over that of the truth, over all "
        f"{len(names)} updated matrices. Perplexity: 200 film reviews, computed in float32. Each "
        f"iteration adds a random LoRA of rank {RANK} whose update of each matrix has the given "
        "share of the matrix's norm.",
        "",
        f"Perplexity of the base: {perplexity(start, base, rows):.3f}.",
        "",
        "| update | iteration | PEFT, merge on merge | infold | PEFT / infold | perplexity: truth "
        "| PEFT | infold |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for size in (0.001, 0.01, 0.1):
        folder = work / str(size)
        adapters = write_adapters(base, folder, 20, size)
        truth = {name: value.double() for name, value in start.items()}
        model = load(base, torch.bfloat16)
        for number, adapter in enumerate(adapters, 1):
            for name, update in updates(adapter).items():
                truth[name] += update
            model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
            if number not in (1, 2, 5, 10, 20):
                continue
            stacked = {k: v for k, v in model.state_dict().items() if k in truth}
            out = folder / "merged"
            infold.merge(base, adapters[:number], out, force=True)
            ours = tensors(out)
            one, two = relative(stacked, truth, names), relative(ours, truth, names)
            told = [
                perplexity({k: w[k] for k in names}, base, rows) for w in (truth, stacked, ours)
            ]
            lines.append(
                f"| {size:.1%} | {number} | {one:.2e} | {two:.2e} | {one / two:.2f} | "
                + " | ".join(f"{value:.3f}" for value in told) + " |"
            )  # fmt: skip
            print(lines[-1], flush=True)
        shutil.rmtree(folder)
    return lines


def disk(base: Path, work: Path) -> list[str]:
    adapters = write_adapters(base, work, 10, 0.01)
    infold.merge(base, adapters, work / "model")
    model = sum(p.stat().st_size for p in (work / "model").rglob("*") if p.is_file())
    each = sum(p.stat().st_size for p in adapters[0].rglob("*") if p.is_file())
    ours = model + sum(
        p.stat().st_size for a in adapters for p in a.rglob("*") if p.is_file()
    )  # fmt: skip
    return [
        f"10 iterations, LoRA of rank {RANK} on all linear layers ({each / 1e6:.1f} MB each).",
        "",
        "| kept | MB | ratio |",
        "|---|---|---|",
        f"| a full checkpoint of each iteration | {10 * model / 1e6:,.0f} | 1 |",
        f"| the adapters of all, full weights of the current | {ours / 1e6:,.0f} | "
        f"{ours / (10 * model):.2f} |",
    ]


def speed(base: Path, work: Path, rounds: int = 5) -> list[str]:
    """Each iteration: the same evaluation and collection on each of the models, in turns."""
    adapters = write_adapters(base, work, 6, 0.001)
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = [r.tokens[:48] for r in load_reviews(tokenizer, 64)[1] if len(r.tokens) >= 24]
    width = min(map(len, rows))
    held = torch.tensor([row[:width] for row in rows[:32]])
    asked = held[:8]
    stacked = None
    chained = load(base, torch.float32)
    plain = load(base, torch.float32)
    lines = [
        f"Evaluation: a forward pass over {held.shape[0]} x {width} tokens. Collection: 32 tokens "
        f"generated for {asked.shape[0]} prompts. float32; median of {rounds} rounds in turns, one "
        "more warms up. Ratio: of the base's time in the same round, median (least to greatest).",
        "",
        "| iteration | job | base, s | PEFT adapters stacked | PEFT merge_and_unload | infold |",
        "|---|---|---|---|---|---|",
    ]

    @torch.inference_mode()
    def evaluate(model) -> None:
        model(input_ids=held)

    @torch.inference_mode()
    def collect(model) -> None:
        model.generate(
            input_ids=asked, attention_mask=torch.ones_like(asked), do_sample=False,
            min_new_tokens=32, max_new_tokens=32, pad_token_id=0,
        )  # fmt: skip

    for number, adapter in enumerate(adapters, 1):
        if stacked is None:
            stacked = PeftModel.from_pretrained(load(base, torch.float32), adapter, "1")
        else:
            stacked.load_adapter(adapter, str(number))
        stacked.base_model.set_adapter([str(n) for n in range(1, number + 1)])
        chained = PeftModel.from_pretrained(chained, adapter).merge_and_unload()
        infold.merge(base, adapters[:number], work / "model", force=True)
        models = [plain, stacked.eval(), chained.eval(), load(work / "model", torch.float32)]
        for job in (evaluate, collect):
            took: list[list[float]] = []
            for turn in range(rounds + 1):
                times = [0.0] * len(models)
                for place in range(len(models)):
                    which = (place + turn) % len(models)
                    started = time.perf_counter()
                    job(models[which])
                    times[which] = time.perf_counter() - started
                took += [times] if turn else []
            cells = []
            for which in range(1, len(models)):
                ratios = [times[which] / times[0] for times in took]
                middle = statistics.median(ratios)
                cells.append(f"{middle:.2f}x ({min(ratios):.2f} to {max(ratios):.2f})")
            seconds = statistics.median(times[0] for times in took)
            lines.append(f"| {number} | {job.__name__} | {seconds:.2f} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    return lines


TITLES = {"drift": "Drift over 20 iterations", "disk": "Disk over 10 iterations",
          "speed": "Speed over 6 iterations"}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=list(TITLES))
    parser.add_argument("--results", type=Path, default=HERE / "results")
    args = parser.parse_args()
    torch.manual_seed(0)
    base = make_base(default_cache())
    with tempfile.TemporaryDirectory(dir=default_cache()) as work:
        found = {"drift": drift, "disk": disk, "speed": speed}[args.what](base, Path(work))
    head = [f"# {TITLES[args.what]}", "",
            f"    {shlex.join(['python', 'benchmarks/loop.py', *sys.argv[1:]])}", "",
            f"{NAME}, bf16. {told(machine(PACKAGES))}", ""]  # fmt: skip
    path = args.results / f"loop-{args.what}.md"
    path.write_text("\n".join([*head, *found, ""]))
    print(path)


if __name__ == "__main__":
    main()
