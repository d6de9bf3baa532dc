"""The output's SHA-256 depends on base and adapters alone: not on threads, memory, block and tile
sizes, the split into shards, the BLAS, the processor's instructions, or the process's settings.
The tensors of a model in memory get the same bytes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import handmade
import infold
from handmade import digests
from infold.adapters import METHODS
from infold.edit import Step, edit_tensor, steps
from infold.edit import tensor as in_memory
from infold.edit.blocks import Block
from infold.formats import dense
from infold.merge import apply, chain, prepare, stream

MIB = 1 << 20
LINEAR = {"layers.0.q_proj": (700, 1300), "layers.0.v_proj": (513, 771), "layers.1.q_proj": (64, 9)}
TABLE = {"embed_tokens": (3001, 96)}
GPT = {"h.0.attn.c_attn": (780, 260), "h.0.attn.c_proj": (260, 260), "h.0.mlp.c_fc": (1040, 260)}
LONG = {"wide.q_proj": (3, 70_003)}


def weights(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Linear layers and an embedding, with values whose products fill all bits."""
    numbers = torch.Generator().manual_seed(7)
    made = {
        f"{m}.weight": (torch.randn(*s, generator=numbers) * 0.05).to(dtype)
        for m, s in {**LINEAR, **TABLE, **LONG}.items()
    }
    made |= {f"{m}.bias": torch.randn(s[0], generator=numbers).to(dtype) for m, s in LINEAR.items()}
    made["layers.0.conv.weight"] = torch.randn(48, 20, 3, 5, generator=numbers).to(dtype)
    made["norm.weight"] = torch.randn(1001, generator=numbers).to(dtype)
    return made


def conv1d_weights(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """GPT-2's, stored as (in, out)."""
    numbers = torch.Generator().manual_seed(8)
    return {
        f"{m}.weight": (torch.randn(s[1], s[0], generator=numbers) * 0.05).to(dtype)
        for m, s in GPT.items()
    }


def table_adapter(path: Path, dora: bool) -> Path:
    """LoRA or DoRA on an embedding, as PEFT writes it."""
    numbers = torch.Generator().manual_seed(9)
    (vocabulary, width), rank = TABLE["embed_tokens"], 8
    tensors = {
        "embed_tokens.lora_embedding_A": torch.randn(rank, vocabulary, generator=numbers),
        "embed_tokens.lora_embedding_B": torch.randn(width, rank, generator=numbers) * 0.01,
    }
    if dora:
        magnitude = 1 + torch.rand(width, generator=numbers)
        tensors["embed_tokens.lora_magnitude_vector"] = magnitude
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 12, "use_dora": dora}
    return handmade.adapter_folder(path, tensors, config)


def conv_adapter(path: Path) -> Path:
    """LoRA on a convolution."""
    numbers = torch.Generator().manual_seed(10)
    tensors = {
        "layers.0.conv.lora_A.weight": torch.randn(6, 20, 3, 5, generator=numbers) * 0.1,
        "layers.0.conv.lora_B.weight": torch.randn(48, 6, 1, 1, generator=numbers) * 0.1,
    }
    return handmade.adapter_folder(path, tensors, {"peft_type": "LORA", "r": 6, "lora_alpha": 7})


def ia3_adapter(path: Path) -> Path:
    numbers = torch.Generator().manual_seed(11)
    vectors = {
        "layers.0.q_proj": 0.5 + torch.rand(700, 1, generator=numbers),
        "layers.0.v_proj": 0.5 + torch.rand(1, 771, generator=numbers),
        "wide.q_proj": 0.5 + torch.rand(1, 70_003, generator=numbers),
    }
    return handmade.ia3(path, vectors, feedforward_modules=["v_proj", "wide.q_proj"])


@dataclass
class Case:
    """One base, its adapters, and what their merge is known to give."""

    base: Path
    adapters: list[Path]
    expected: dict[str, str] = field(default_factory=dict)


CASES = (
    "lora r=16", "lora r=64", "lora r=16 F32", "lora r=16 F16", "dora Linear", "dora Linear F32",
    "dora Conv1D", "lora r=64 F64", "dora Linear F64", "dora Conv1D F64", "dora Embedding F64",
    "long rows F64", "three F64", "lora Embedding", "dora Embedding", "lora Conv2d", "ia3",
    "long rows", "three",
)  # fmt: skip


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    root = tmp_path_factory.mktemp("same")
    base = {
        name: handmade.base_folder(root / name, weights(dtype))
        for name, dtype in (
            ("BF16", torch.bfloat16),
            ("F16", torch.float16),
            ("F32", torch.float32),
            # rounding to few bits hides what differs in the last ones: here nothing is hidden
            ("F64", torch.float64),
        )
    }
    gpt, gpt_wide = (
        handmade.base_folder(root / f"gpt-{dtype}", conv1d_weights(dtype), {"model_type": "gpt2"})
        for dtype in (torch.bfloat16, torch.float64)
    )
    bf16 = torch.bfloat16
    r16 = handmade.lora(root / "r16", LINEAR, 16, 24, bf16)
    r64 = handmade.lora(root / "r64", LINEAR, 64, 100, torch.float32, seed=1)
    dora = handmade.lora(root / "dora", LINEAR, 16, 24, seed=2, use_dora=True)
    conv1d = handmade.lora(root / "conv1d", GPT, 16, 10, seed=3, use_dora=True)
    wide = handmade.lora(root / "wide", LONG, 16, 10, seed=4, use_dora=True)
    ia3 = ia3_adapter(root / "ia3")
    dora_table = table_adapter(root / "dora-table", True)
    made = {
        "lora r=16": Case(base["BF16"], [r16]),
        "lora r=64": Case(base["BF16"], [r64]),
        "lora r=16 F32": Case(base["F32"], [r16]),
        "lora r=16 F16": Case(base["F16"], [r16]),
        "dora Linear": Case(base["BF16"], [dora]),
        "dora Linear F32": Case(base["F32"], [dora]),
        "dora Conv1D": Case(gpt, [conv1d]),
        "lora r=64 F64": Case(base["F64"], [r64]),
        "dora Linear F64": Case(base["F64"], [dora]),
        "dora Conv1D F64": Case(gpt_wide, [conv1d]),
        "dora Embedding F64": Case(base["F64"], [dora_table]),
        "long rows F64": Case(base["F64"], [wide]),
        "three F64": Case(base["F64"], [r64, dora, ia3]),
        "lora Embedding": Case(base["BF16"], [table_adapter(root / "table", False)]),
        "dora Embedding": Case(base["BF16"], [dora_table]),
        "lora Conv2d": Case(base["BF16"], [conv_adapter(root / "conv")]),
        "ia3": Case(base["BF16"], [ia3]),
        "long rows": Case(base["BF16"], [wide]),
        "three": Case(base["BF16"], [r64, dora, ia3]),
    }
    assert tuple(made) == CASES
    for name, case in made.items():
        infold.merge(case.base, case.adapters, root / "out" / name, threads=1)
        case.expected = digests(root / "out" / name)
        assert case.expected != digests(case.base), "the merge changed something"
    return made


@dataclass
class Seen:
    """What a merge did."""

    blocks: list[Block] = field(default_factory=list)
    tiles: int = 0
    threads: set[str] = field(default_factory=set)


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch, together: bool = False) -> Iterator[Seen]:
    """Note the blocks and tiles that are computed, and by whom. `together`: let no worker go on
    before a second one has a block too."""
    seen, lock, company = Seen(), threading.Lock(), threading.Event()
    real_run, real_values = apply.EditRun.run, steps._values

    def counted_run(self: Any, raw: Any, out: Any, block: Block, *more: Any) -> Any:
        with lock:
            seen.blocks.append(block)
            seen.threads.add(threading.current_thread().name)
            if len(seen.threads) > 1:
                company.set()
        if together:
            assert company.wait(20)
        return real_run(self, raw, out, block, *more)

    def counted_values(*given: Any) -> torch.Tensor:
        with lock:
            seen.tiles += 1
        return real_values(*given)

    with monkeypatch.context() as patch:
        patch.setattr(apply.EditRun, "run", counted_run)
        patch.setattr(steps, "_values", counted_values)
        yield seen


def blocks_of(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(prepare, "_BLOCK", count)
    monkeypatch.setattr(prepare, "_SMALLEST_BLOCK", min(count, 1 << 16))


@pytest.mark.parametrize("name", CASES)
def test_any_number_of_threads_gives_the_same_bytes(
    name: str, cases: dict[str, Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = cases[name]
    blocks_of(monkeypatch, 20_000)
    for threads in (1, 2, 5):
        many = name != "lora Conv2d"  # which is one block
        with watched(monkeypatch, together=many and threads > 1) as seen:
            infold.merge(case.base, case.adapters, tmp_path / str(threads), threads=threads)

        assert digests(tmp_path / str(threads)) == case.expected
        if many:
            assert len(seen.blocks) > 10
            assert threads == 1 or len(seen.threads) > 1


@pytest.mark.parametrize("name", CASES)
def test_any_memory_budget_gives_the_same_bytes(
    name: str, cases: dict[str, Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = cases[name]
    with pytest.raises(infold.Refusal, match="is too little") as refused:
        infold.merge(case.base, case.adapters, tmp_path / "x", max_memory=MIB, threads=1)
    least = int(re.findall(r"needs (\d+) MiB", str(refused.value))[0])
    sizes = set()
    for budget, threads in ((least, 1), (least + 4, 1), (256, 1), (1024, 1), (1024, 5), (256, 5)):
        with watched(monkeypatch) as seen:
            out = tmp_path / f"{budget}-{threads}"
            infold.merge(case.base, case.adapters, out, max_memory=budget * MIB, threads=threads)

        assert digests(out) == case.expected
        sizes.add(max(block.count for block in seen.blocks))
    assert least <= 64
    if name != "lora Conv2d":  # which is one block
        assert len(sizes) > 1, "the budgets made a difference to the blocks"


@pytest.mark.parametrize("name", CASES)
def test_blocks_and_tiles_of_odd_sizes_give_the_same_bytes(
    name: str,
    either: bool,
    cases: dict[str, Case],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = cases[name]
    whole = (1 << 19, steps.TILE, steps.TILE_COLUMNS)
    sizes = (
        (70_001, 5_003, 301),  # blocks, tiles, columns of a tile
        (9_999, 1_000_000, 1_000_000),
        (1 << 22, 77_777, 257),
        (1 << 22, 4_099, 4_097),
        (300_000, 65_537, 63),
    )
    counts = set()
    for number, (block, tile, columns) in enumerate((whole, *sizes)):
        blocks_of(monkeypatch, block)
        monkeypatch.setattr(steps, "TILE", tile)
        monkeypatch.setattr(steps, "TILE_COLUMNS", columns)
        with watched(monkeypatch) as seen:
            infold.merge(case.base, case.adapters, tmp_path / str(number), threads=2)

        assert digests(tmp_path / str(number)) == case.expected, (block, tile, columns)
        counts.add((len(seen.blocks), seen.tiles))
    assert len(counts) >= (3 if either else 2), "the sizes made a difference to the work"


@pytest.mark.parametrize("name", ["lora r=16", "dora Linear F64", "long rows F64"])
def test_the_smallest_blocks_and_tiles_give_the_same_bytes(
    name: str,
    either: bool,
    cases: dict[str, Case],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    blocks_of(monkeypatch, 1_301)  # a row and a bit; a long row in pieces of five leaves
    monkeypatch.setattr(steps, "TILE", 499)
    monkeypatch.setattr(stream, "COPY_PIECE", 1_001)
    monkeypatch.setattr(stream, "HASH_PIECE", 997)
    monkeypatch.setattr(chain, "HASH_PIECE", 997)
    with watched(monkeypatch) as seen:
        infold.merge(cases[name].base, cases[name].adapters, tmp_path / "out", threads=3)

    assert digests(tmp_path / "out") == cases[name].expected
    assert len(seen.blocks) > 150
    assert seen.tiles > 300 or not either


@pytest.mark.parametrize("undo", [False, True], ids=["", "undo"])
@pytest.mark.parametrize("name", [n for n in CASES if not n.endswith(("F64", "F32", "F16"))])
@pytest.mark.usefixtures("by_pytorch")
def test_columns_that_are_settled_from_float64_keep_their_bytes(
    name: str, undo: bool, cases: dict[str, Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elements that may be rounded twice are settled later, by the numbers of their columns."""
    case = cases[name]
    for number, every in enumerate((1, 3)):
        settled: list[int] = []

        def finish(
            staged: Any, out: Any, every: int = every, settled: list[int] = settled
        ) -> torch.Tensor:
            chosen = torch.arange(0, staged.shape[1], every)
            settled.append(len(chosen))
            columns = torch.cat([chosen, dense.midpoints(staged)]).unique()
            out.copy_(staged)
            out[:, columns] = torch.nan  # what the first rounding made of them does not count
            return columns

        monkeypatch.setattr(dense, "finish", finish)
        monkeypatch.setattr(steps, "TILE", 30_011)
        blocks_of(monkeypatch, 60_000)  # less than a long row
        out = tmp_path / str(number)
        infold.merge(case.base, case.adapters, out, undo=undo)

        assert digests(out).items() >= case.expected.items()
        assert settled
        if undo:
            infold.undo(out, tmp_path / f"{number}-back")
            assert digests(tmp_path / f"{number}-back") == digests(case.base)


@pytest.mark.parametrize("name", ["three F64", "dora Embedding F64", "lora r=16 F32"])
def test_one_shard_or_many_hold_the_same_tensor_bytes(
    name: str, cases: dict[str, Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = cases[name]
    infold.merge(case.base, case.adapters, tmp_path / "one")
    one = load_file(tmp_path / "one" / "model.safetensors")
    config = json.loads((case.base / "config.json").read_text())
    for shards in (2, 5):
        split = handmade.base_folder(
            tmp_path / f"split-{shards}",
            load_file(case.base / "model.safetensors"),
            config,
            shards=shards,
        )
        infold.merge(split, case.adapters, tmp_path / str(shards), threads=3)
        many: dict[str, torch.Tensor] = {}
        for file in (tmp_path / str(shards)).glob("*.safetensors"):
            many |= load_file(file)

        assert many.keys() == one.keys()
        for tensor, value in one.items():
            assert torch.equal(_bits(value), _bits(many[tensor])), tensor


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("name", ["lora r=64", "dora Linear F64", "three"])
def test_the_dtype_of_the_factors_counts_only_by_their_values(
    name: str, cases: dict[str, Case], tmp_path: Path
) -> None:
    """bfloat16 factors, and the same values in F32 and F64, merge to the same bytes."""
    outs = []
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        adapters = []
        for number, adapter in enumerate(cases[name].adapters):
            tensors = load_file(adapter / "adapter_model.safetensors")
            copy = tmp_path / f"{dtype}-{number}"
            copy.mkdir()
            (copy / "adapter_config.json").write_bytes(
                (adapter / "adapter_config.json").read_bytes()
            )
            save_file(
                {k: v.bfloat16().to(dtype) for k, v in tensors.items()},
                copy / "adapter_model.safetensors",
            )
            adapters.append(copy)
        infold.merge(cases[name].base, adapters, tmp_path / f"out-{dtype}")
        outs.append(digests(tmp_path / f"out-{dtype}"))

    assert outs[0] == outs[1] == outs[2]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def flushing() -> Iterator[None]:
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@contextmanager
def coarse() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


SETTINGS = {
    "without mkldnn": lambda: torch.backends.mkldnn.flags(enabled=False),
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default dtype bfloat16": lambda: default_dtype(torch.bfloat16),
    "flushing denormals": flushing,
    "coarse float32 products": coarse,
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "anomaly mode": lambda: torch.autograd.set_detect_anomaly(True, check_nan=True),
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", ["lora r=64", "dora Linear F64", "three"])
def test_the_settings_of_the_process_do_not_change_the_bytes(
    setting: str, name: str, cases: dict[str, Case], tmp_path: Path
) -> None:
    with SETTINGS[setting]():
        infold.merge(cases[name].base, cases[name].adapters, tmp_path / "out", threads=2)

    assert digests(tmp_path / "out") == cases[name].expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_subnormal_weights_and_factors_survive_a_process_that_flushes_them(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    smallest = torch.finfo(dtype).smallest_normal
    numbers = torch.Generator().manual_seed(2)
    tiny = (torch.randn(64, 96, generator=numbers, dtype=torch.float64) * smallest / 4).to(dtype)
    base = handmade.base_folder(tmp_path / "base", {"q_proj.weight": tiny})
    adapter = handmade.lora(tmp_path / "adapter", {"q_proj": (64, 96)}, 4, smallest / 8)
    infold.merge(base, adapter, tmp_path / "plain")

    with flushing():
        infold.merge(base, adapter, tmp_path / "flushing")

    assert digests(tmp_path / "flushing") == digests(tmp_path / "plain")
    merged = load_file(tmp_path / "plain" / "model.safetensors")["q_proj.weight"]
    assert not torch.equal(_bits(merged), _bits(tiny))
    assert (merged.double().abs() < smallest).any() and merged.any()


ENVIRONMENTS = {
    "no vector instructions": {"ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "1"},
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2", "MKL_NUM_THREADS": "3"},
    "compatible MKL": {"MKL_CBWR": "COMPATIBLE", "OMP_NUM_THREADS": "5", "MKL_DYNAMIC": "FALSE"},
}


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_other_instructions_and_another_blas_give_the_same_bytes(
    name: str, cases: dict[str, Case], tmp_path: Path
) -> None:
    given = [
        (str(case.base), [str(a) for a in case.adapters], str(tmp_path / title))
        for title, case in cases.items()
    ]
    child = Path(__file__).with_name("same_bytes_child.py")
    done = subprocess.run(
        [sys.executable, str(child), json.dumps(given)],
        env={**os.environ, **ENVIRONMENTS[name]},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)

    for title, case in cases.items():
        assert digests(tmp_path / title) == case.expected, f"{title} on {told['capability']}"
    numbers = torch.Generator().manual_seed(0)
    one, two = (torch.randn(300, 300, generator=numbers) for _ in range(2))
    if name == "no vector instructions" and torch.backends.cpu.get_cpu_capability() != "DEFAULT":
        assert told["capability"] == "DEFAULT"
        assert told["ordinary"] != (one @ two).sum(1).tolist(), "an ordinary product does change"


@pytest.mark.parametrize("name", CASES)
def test_cuda_gives_the_same_bytes_as_the_cpu(
    name: str, cases: dict[str, Case], tmp_path: Path
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch sees no CUDA device")
    for threads in (1, 3):
        out = tmp_path / str(threads)
        infold.merge(cases[name].base, cases[name].adapters, out, device="cuda", threads=threads)
        assert digests(out) == cases[name].expected


# --- in memory -----------------------------------------------------------------------------------


def edited(case: Case, device: str = "cpu", threads: int | None = None) -> dict[str, torch.Tensor]:
    """The tensors that a merge edits, edited in memory."""
    plan = prepare.open_plan(case.base, case.adapters)
    base = load_file(case.base / "model.safetensors")
    result = {}
    for name, edit in plan.edits.items():
        prepared = []
        for op in edit.operations:
            parts = {p: plan.adapters[op.adapter].read(k).to(device) for p, k in op.parts.items()}
            method = METHODS[op.method].prepare(parts, op.settings)
            prepared.append(Step(method, op.transposed, op.on_bias))
        stored = base[name].to(device)
        result[name] = edit_tensor(stored, prepared, name, threads=threads).cpu()
        assert torch.equal(_bits(stored.cpu()), _bits(base[name])), "the input stays as it was"
    return result


def assert_merged(case: Case, found: dict[str, torch.Tensor], tmp_path: Path) -> None:
    base = load_file(case.base / "model.safetensors")
    infold.merge(case.base, case.adapters, tmp_path / "on-disk")
    merged = load_file(tmp_path / "on-disk" / "model.safetensors")
    assert found and digests(tmp_path / "on-disk") == case.expected
    for name, value in found.items():
        assert torch.equal(_bits(value), _bits(merged[name])), name
    assert any(not torch.equal(_bits(value), _bits(base[name])) for name, value in found.items())


@pytest.mark.parametrize("name", CASES)
def test_tensors_in_memory_get_the_bytes_of_the_merged_checkpoint(
    name: str,
    either: bool,
    cases: dict[str, Case],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert_merged(cases[name], edited(cases[name]), tmp_path / "whole")
    monkeypatch.setattr(in_memory, "_BLOCK", 9_999)
    monkeypatch.setattr(in_memory, "_SMALLEST_BLOCK", 777)
    monkeypatch.setattr(in_memory, "_crew", in_memory._Crew())  # whose buffers are of that size
    monkeypatch.setattr(steps, "TILE", 1_999)
    with watched(monkeypatch) as seen:
        assert_merged(cases[name], edited(cases[name], threads=5), tmp_path / "cut")
    assert seen.tiles > 20 or not either


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_settings_of_the_process_do_not_change_the_bytes_in_memory(
    setting: str, cases: dict[str, Case], tmp_path: Path
) -> None:
    for name in ("lora r=64", "dora Linear F64", "three"):
        with SETTINGS[setting]():
            found = edited(cases[name], threads=2)
        assert_merged(cases[name], found, tmp_path / name)


@pytest.mark.parametrize("name", CASES)
def test_cuda_gives_the_same_bytes_in_memory(
    name: str, cases: dict[str, Case], tmp_path: Path
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch sees no CUDA device")
    assert_merged(cases[name], edited(cases[name], "cuda"), tmp_path)
    with torch.cuda.stream(torch.cuda.Stream()):
        assert_merged(cases[name], edited(cases[name], "cuda"), tmp_path / "other")
