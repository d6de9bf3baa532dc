"""Measure undo records and the time to undo, against the merge and against keeping a copy.

    python benchmarks/undo.py curve             # sizes against the size of the update, and entropy
    python benchmarks/undo.py time              # 3.1 GB; `--size 12gb`, `--size tiny`

`time` runs whole fresh processes in turns, as benchmarks/merge.py does, whose machinery it uses.
`curve` codes one tensor of normally distributed weights. Linux only.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import inputs
from merge import COPY, Bench, Case, figures, in_rounds
from parts import machine, told

HERE = Path(__file__).resolve().parent
SIDE = 2048
PACKAGES = ("infold", "torch", "numpy", "zstandard")
UPDATES = (0.001, 0.005, 0.02, 0.08, 0.16, 0.5, 1.0, 4.0)


def curve() -> list[dict[str, Any]]:
    """Bytes and entropies, as shares of the tensor's bytes, for updates and dtypes."""
    import torch
    from torch import Tensor

    from infold.adapters import METHODS, Settings
    from infold.adapters.exact import slices_for
    from infold.dtypes import TORCH_DTYPES
    from infold.edit import Step, edit_tensor
    from infold.edit.blocks import Block
    from infold.edit.residual import pack_residual
    from infold.edit.steps import Target, Workspace, backward, guess
    from infold.formats import dense

    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    integers = {2: torch.int16, 4: torch.int32}

    def folded(bits: Tensor) -> Tensor:
        """Bits into positions on the line of all floats, or positions into bits."""
        width = 8 * bits.element_size()
        return bits ^ ((bits >> (width - 1)) & ((1 << (width - 1)) - 1))

    def line(values: Tensor) -> Tensor:
        return folded(values.view(integers[values.element_size()]).view(-1))

    def measured(weight: Tensor, dtype: str, steps: list[Step]) -> dict[str, float]:
        merged = edit_tensor(weight, steps, "weight")
        back = backward(steps)
        assert back is not None
        block = Block(0, SIDE, 0, SIDE)
        near = torch.empty_like(weight)
        workspace = Workspace(torch.device("cpu"), SIDE * SIDE)
        guess(back, merged, near, block, Target("weight", dtype, dense), workspace)
        _, payload = pack_residual(weight, near)
        _, counts = (line(weight) - line(near)).unique(return_counts=True)
        return {
            "record": len(payload) / weight.nbytes,
            "stream": _entropy(counts.double() / counts.sum()) / (8 * weight.element_size()),
            "bound": _bound(weight, merged, steps) / (8 * weight.element_size()),
        }

    def _entropy(shares: Tensor) -> float:
        return float(-(shares * shares.log2()).sum())

    def _bound(weight: Tensor, merged: Tensor, steps: list[Step]) -> float:
        """Bits an element of the base has left when the merged one and the edit are known.

        All neighbours of the base's value that are merged to the same value are counted, each as
        likely as the normal distribution and the width of its rounding interval make it.
        """
        span = 400 if weight.element_size() == 2 else 60
        integer = integers[weight.element_size()]
        rows = slice(0, 256)
        home = line(weight[rows].contiguous()).view(256, SIDE).long()
        total, own = torch.zeros(256, SIDE).double(), torch.zeros(256, SIDE).double()
        for offset in range(-span, span + 1):
            other = folded((home + offset).to(integer)).view(weight.dtype)
            usable = other.isfinite()
            tried = torch.where(usable, other, 0).contiguous()
            x = tried.double()
            for step in steps:
                step.change(x, rows, slice(0, SIDE))
            same = (dense.encode(x, dense_name(weight)) == merged[rows]) & usable
            ulp = torch.ldexp(torch.ones_like(x), torch.frexp(tried.double())[1])
            density = torch.exp(-((tried.double() / inputs.SPREAD) ** 2) / 2) * ulp * same
            total += density
            own += density if offset == 0 else 0
        chosen = total > 0
        return float(-(own[chosen] / total[chosen]).log2().mean())

    def dense_name(tensor: Tensor) -> str:
        return next(name for name, dtype in TORCH_DTYPES.items() if dtype == tensor.dtype)

    lines = []
    for dtype in ("BF16", "F16", "F32"):
        weight = (normal(SIDE, SIDE) * inputs.SPREAD).to(TORCH_DTYPES[dtype])
        scale = 1 + 0.1 * normal(SIDE)
        ia3 = METHODS["ia3"].prepare({"ia3_l": scale}, Settings(side="out"))
        lines.append(
            {"dtype": dtype, "edit": "IA³, 1 ± 0.1", **measured(weight, dtype, [Step(ia3)])}
        )
        a, b = normal(16, SIDE), normal(SIDE, 16)
        size = float((b @ a).norm() / weight.double().norm())
        for update in UPDATES:
            settings = Settings(scaling=update / size, slices=slices_for(dtype, 16))
            lora = METHODS["lora"].prepare({"lora_A": a, "lora_B": b}, settings)
            found = measured(weight, dtype, [Step(lora)])
            lines.append({"dtype": dtype, "edit": f"LoRA, {update:.1%}", **found})
            print(json.dumps(lines[-1]), file=sys.stderr)
    return lines


def curve_table(lines: Sequence[dict[str, Any]]) -> str:
    rows = ["| update, of the weight's norm | | record | entropy of the residuals | bound |"]
    rows.append("|---|---|--:|--:|--:|")
    for line in lines:
        shares = " | ".join(f"{line[name]:.2%}" for name in ("record", "stream", "bound"))
        rows.append(f"| {line['edit']} | {line['dtype']} | {shares} |")
    return "\n".join(rows)


def time_cases(size: str, rounds: int) -> list[Case]:
    """Merge with and without a record, undo and swap, to new folders and in place; the merged
    folders are made beforehand."""
    name = inputs.names(size)
    base = name["base"]
    cases = [Case("cp + fsync", ("sh", "-c", COPY, "sh", base, "out/copy"), (base,), "", rounds)]
    for method, other in (("lora", "ia3"), ("ia3", "lora")):
        merged = f"undo-{size}-{method}"
        merge = ("infold", "merge", base, name[method], "--out", "out/merged", "--quiet")
        undo = ("infold", "undo", merged, "--out", "out/base", "--quiet")
        swap = ("infold", "swap", merged, name[other], "--out", "out/swapped", "--quiet")
        again = ("infold", "swap", merged, name[method], "--out", "out/swapped", "--quiet")
        cases += [
            Case(f"merge {method}", merge, (base, name[method]), "", rounds),
            Case(f"merge {method} --undo", (*merge, "--undo"), (base, name[method]), "", rounds),
            Case(f"undo {method}", undo, (merged,), "", rounds),
            Case(f"swap {method} to {other}", swap, (merged, name[other]), "", rounds),
            Case(f"swap {method} to {method}", again, (merged, name[method]), "", rounds),
        ]
        for what, verb, adapters, start in (
            (f"merge {method}", "merge", (name[method],), base),
            (f"undo {method}", "undo", (), merged),
            (f"swap {method} to {other}", "swap", (name[other],), merged),
        ):
            command = ("infold", verb, "out/edited", *adapters, "--in-place", "--quiet")
            reads = ("out/edited", *adapters)
            cases.append(Case(f"{what} in place", command, reads, "", rounds, start))
    return cases


def timed(size: str, rounds: int, folder: Path, touch: int) -> dict[str, Any]:
    """Figures of all cases, and the sizes of the records."""
    subprocess.run([sys.executable, str(HERE / "inputs.py"), size], check=True)
    name = inputs.names(size)
    records = {}
    bench = Bench(folder, touch)
    with bench.locked():
        try:
            for method in ("lora", "ia3"):
                place = folder / f"undo-{size}-{method}"
                shutil.rmtree(place, ignore_errors=True)
                merge = ("merge", folder / name["base"], folder / name[method], "--undo", "--quiet")
                _infold(*merge, "--out", place)
                shown = json.loads(_infold("inspect", place, "--json"))
                edited = shown["receipt"]["edited_bytes"]
                records[method] = {**shown["undo"], "edited_bytes": edited}
            runs, _ = in_rounds(bench, time_cases(size, rounds))
        finally:
            for method in ("lora", "ia3"):
                shutil.rmtree(folder / f"undo-{size}-{method}", ignore_errors=True)
    copy = sum(file.stat().st_size for file in (folder / name["base"]).iterdir())
    return {"copy": copy, "records": records, "cases": {n: figures(r) for n, r in runs.items()}}


def _infold(*words: str | Path) -> str:
    """Its output. This process itself imports nothing large: see benchmarks/merge.py."""
    command = [sys.executable, "-m", "infold", *map(str, words)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def time_table(found: dict[str, Any]) -> str:
    cases = found["cases"]
    rows = ["| | wall | × cp | × its merge | × the dearer merge | CPU | memory |"]
    rows.append("|---|--:|--:|--:|--:|--:|--:|")
    copy = cases["cp + fsync"]["wall"]["median"]
    for name, case in cases.items():
        wall = case["wall"]["median"]
        words = name.split()
        swapped = words[1:4:2] if words[0] == "swap" else []  # from, to
        merges = [cases[f"merge {m}"]["wall"]["median"] for m in swapped or words[1:2] if m != "+"]
        own = f"{wall / merges[-1]:.2f}" if merges else ""
        dearer = f"{wall / max(merges):.2f}" if swapped else ""
        cpu, memory = case["cpu"]["median"], case["memory"]["median"]
        rows.append(
            f"| {name} | {wall:.1f} s | {wall / copy:.1f} | {own} | {dearer} | {cpu:.1f} s "
            f"| {memory / 1e6:.0f} MB |"
        )
    rows += [
        "",
        f"A copy of the base, which would do in place of a record: {found['copy']:,} bytes.",
        "",
    ]
    for method, record in found["records"].items():
        own = f"{record['share']:.2%} of the {record['edited_bytes']:,} edited bytes"
        sides = record.get("side_files")
        beside = f" and {sides:,} the side files'" if sides else ""
        rows.append(
            f"{method}: a record of {record['bytes']:,} bytes, of which "
            f"{record['adapters']:,} are the adapter's copy{beside}; the rest is {own}."
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("curve", "time"))
    parser.add_argument("--size", choices=sorted(inputs.SIZES), default="3gb")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--touch", type=int, default=8 << 30, help="bytes; see benchmarks/merge.py")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    options = parser.parse_args()
    folder = inputs.cache()
    found: dict[str, Any]
    if options.what == "curve":
        found = {"curve": curve()}
        text, name = curve_table(found["curve"]), "undo-curve"
    else:
        found = timed(options.size, options.rounds, folder, options.touch)
        text, name = time_table(found), f"undo-{options.size}"
    found["machine"] = machine(PACKAGES)  # last: it imports, and this process must stay small
    options.results.mkdir(exist_ok=True)
    (options.results / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    command = shlex.join(["python", "benchmarks/undo.py", *sys.argv[1:]])
    text = f"`{command}`\n\n{told(found['machine'])}\n\n{text}\n"
    (options.results / f"{name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
