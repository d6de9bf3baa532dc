"""Measure a merge of a whole checkpoint against copying it and against PEFT.

    python benchmarks/merge.py                  # 3.1 GB; `--size 12gb`, `--size tiny`
    python benchmarks/merge.py --help

Every figure is one whole fresh process: its wall time, and the processor time and the peak memory
that the system counted for it. All cases take turns in rounds, so that a machine that slows down
slows all of them. See benchmarks/README.md.

Linux only. This file must import nothing large: a child's peak memory is counted from its fork.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import inputs
from parts import commit, installed

from infold.kernel import description

HERE = Path(__file__).resolve().parent
COPY = 'cp -r "$1" "$2" && sync "$2"/* "$2"'  # sync FILE is fsync, of a folder too
MEMORY = "256MiB"  # the budget that the lone tensor is merged in


@dataclass(frozen=True)
class Case:
    """A command, as it is shown. It runs in the cache folder."""

    name: str
    command: tuple[str, ...]
    reads: tuple[str, ...] = ()
    writes: str = ""
    rounds: int = 5
    edits: str = ""  # a folder; the command changes a copy of it, `out/edited`


@dataclass(frozen=True)
class Run:
    """One process. Times in seconds, memory in bytes."""

    wall: float
    user: float
    system: float
    memory: int  # peak, resident; mapped files count
    faults: int  # of pages that were in memory, or had to be zeroed
    others: float  # processor time that everything else took meanwhile, the kernel included

    @property
    def cpu(self) -> float:
        return self.user + self.system


class Bench:
    """The cache folder, for one benchmark at a time."""

    def __init__(self, folder: Path, touch: int) -> None:
        self.folder, self.touch = folder, touch

    @contextmanager
    def locked(self) -> Iterator[None]:
        with open(self.folder / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise SystemExit("another benchmark runs now") from None
            self.clear()
            try:
                yield
            finally:
                self.clear()

    def clear(self) -> None:
        """Remove all outputs."""
        for name in ("out", "kept"):  # `kept` outlives a run, for `agree`
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def run(self, case: Case) -> Run:
        """Prepare the machine, run the case once. The output stays, in `out`."""
        shutil.rmtree(self.folder / "out", ignore_errors=True)
        (self.folder / "out").mkdir()
        if case.edits:
            shutil.copytree(self.folder / case.edits, self.folder / "out" / "edited")
        os.sync()
        for name in case.reads:
            _read(self.folder / name)
        self._touch_memory()
        with open(self.folder / "out" / ".log", "w+") as log:
            busy = _busy()
            started = time.perf_counter()
            process = subprocess.Popen(
                _resolved(case.command),
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=_environment(),
            )
            try:
                _, status, usage = os.wait4(process.pid, 0)
            except BaseException:
                process.kill()
                process.wait()
                raise
            wall = time.perf_counter() - started
            busy = _busy() - busy
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                log.seek(0)
                print(log.read()[-4000:], file=sys.stderr)
                raise SystemExit(f"{shlex.join(case.command)}: exit code {process.returncode}")
        return Run(
            wall=round(wall, 4),
            user=round(usage.ru_utime, 4),
            system=round(usage.ru_stime, 4),
            memory=usage.ru_maxrss * 1024,
            faults=usage.ru_minflt,
            others=round(max(0.0, busy - usage.ru_utime - usage.ru_stime), 2),
        )

    def _touch_memory(self) -> None:
        """Let a child use memory and end, so that the pages it leaves behind are real ones.

        A virtual machine can give free memory back to its host, and then pays for every page when
        it is used again: sometimes, and in whichever process comes first.
        """
        count = min(self.touch, _memory()["MemFree"] - (1 << 30))
        if count > 0:
            program = f"len(bytearray(b'x') * {count})"
            subprocess.run([sys.executable, "-S", "-c", program], check=True)

    def keep(self, case: Case) -> None:
        """Keep the output of the last run until the end, for `agree`."""
        (self.folder / "kept").mkdir(exist_ok=True)
        os.rename(self.folder / case.writes, self.folder / "kept" / case.name.replace(" ", "-"))

    def agree(self, one: str, other: str) -> dict[str, object]:
        """Compare two kept outputs and remove them."""
        kept = self.folder / "kept"
        folders = [kept / name.replace(" ", "-") for name in (one, other)]
        done = subprocess.run(
            [sys.executable, str(HERE / "compare.py"), *map(str, folders)],
            stdout=subprocess.PIPE,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f"{one} and {other} made different models: {done.stdout}")
        for folder in folders:
            shutil.rmtree(folder)
        result: dict[str, object] = json.loads(done.stdout)
        return result


def _resolved(command: Sequence[str]) -> list[str]:
    """The command with this Python's programs in it."""
    first, *rest = command
    if first == "env":
        return [first, rest[0], *_resolved(rest[1:])]
    if first == "python":
        rest = [str(HERE / word) if word == "peft_merge.py" else word for word in rest]
        return [sys.executable, *rest]
    if first == "infold":
        own = Path(sys.executable).parent / "infold"
        return [str(own) if own.exists() else "infold", *rest]
    return list(command)


def _environment() -> dict[str, str]:
    """This one, offline. Compiled Python code is kept, as it is of what pip installs: to compile a
    checkout's anew for each process would cost infold a fifth of a second, and PEFT nothing."""
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "HF_HUB_OFFLINE": "1"}


def _read(path: Path) -> None:
    """Bring a folder's files into the page cache."""
    buffer = bytearray(4 << 20)
    for file in path.iterdir():
        with open(file, "rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def _busy() -> float:
    """Seconds that the processors have worked, or that the host took from them."""
    fields = Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]
    user, nice, system, _, _, irq, softirq, steal = map(int, fields)
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _memory() -> dict[str, int]:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}


def merge_cases(size: str, options: argparse.Namespace) -> list[Case]:
    """What takes turns in the rounds."""
    name = inputs.names(size)
    base = name["base"]
    cases = [
        Case(
            "cp + fsync",
            ("sh", "-c", COPY, "sh", base, "out/copy"),
            (base,),
            "out/copy",
            options.rounds,
        )
    ]
    for method in ("lora", "ia3"):
        command = ("infold", "merge", base, name[method], "--out", "out/merged", "--quiet")
        reads = (base, name[method])
        cases.append(Case(f"infold {method}", command, reads, "out/merged", options.rounds))
        for threads in options.threads:
            if threads != _default_threads():
                cases.append(
                    Case(
                        f"infold {method}, {threads} {'thread' if threads == 1 else 'threads'}",
                        (*command, "--threads", str(threads)),
                        reads,
                        "out/merged",
                        options.rounds,
                    )
                )
        slower = ("env", "INFOLD_KERNEL=off", *command)
        without = f"infold {method}, by PyTorch"
        cases.append(Case(without, slower, reads, "out/merged", options.rounds))
    if size != "12gb" and options.peft_rounds:
        cases += [
            Case(
                f"PEFT {method}",
                ("python", "peft_merge.py", base, name[method], "out/merged"),
                (base, name[method]),
                "out/merged",
                options.peft_rounds,
            )
            for method in ("lora", "ia3")
        ]
    return cases


def memory_cases(size: str, rounds: int) -> list[Case]:
    """How much memory it takes, where a tensor is much larger than the budget."""
    name = inputs.names(size)
    command = ("infold", "merge", name["lone"], name["lone lora"], "--out", "out/merged")
    return [
        Case("import torch", ("python", "-c", "import torch"), rounds=rounds),
        Case(
            "lone tensor",
            (*command, "--max-memory", MEMORY, "--quiet"),
            (name["lone"], name["lone lora"]),
            "out/merged",
            rounds,
        ),
    ]


def _default_threads() -> int:
    return min(os.cpu_count() or 1, 8)


def in_rounds(
    bench: Bench, cases: Sequence[Case]
) -> tuple[dict[str, list[Run]], dict[str, dict[str, object]]]:
    """All cases in turn: one round to warm up, in which PEFT's outputs are compared with infold's,
    then as many as each case asks for. Every round begins with another case, since what ran before
    can leave its mark. Returns the measured runs and the comparisons."""
    runs: dict[str, list[Run]] = {case.name: [] for case in cases}
    pairs = {name: name.replace("PEFT", "infold") for name in runs if name.startswith("PEFT")}
    agreement = {}
    for number in range(1 + max(case.rounds for case in cases)):
        shift = number % len(cases)
        for case in (*cases[shift:], *cases[:shift]):
            if number > case.rounds:
                continue
            run = bench.run(case)
            label = f"round {number}" if number else "warm-up"
            print(
                f"{label:8} {case.name:22} {run.wall:7.2f} s  user {run.user:6.2f}  "
                f"system {run.system:6.2f}  {run.memory / 1e6:6.0f} MB  others {run.others:.1f}",
                flush=True,
            )
            if number:
                runs[case.name].append(run)
            elif case.name in pairs or case.name in pairs.values():
                bench.keep(case)
        if number == 0:
            agreement = {name: bench.agree(name, own) for name, own in pairs.items()}
    return runs, agreement


def figures(runs: Sequence[Run]) -> dict[str, dict[str, float]]:
    """Median, least and greatest of everything that was measured."""
    result = {}
    for what in ("wall", "user", "system", "cpu", "memory", "faults", "others"):
        values = [getattr(run, what) for run in runs]
        result[what] = {
            "median": round(statistics.median(values), 4),
            "min": min(values),
            "max": max(values),
        }
    return result


def machine(folder: Path) -> dict[str, object]:
    """Where and with what this was measured."""
    cpu = platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory": _memory()["MemTotal"],
        "kernel": platform.release().split("-")[0],
        "file system": _file_system(folder),
        "python": platform.python_version(),
        **{name: installed(name) for name in ("torch", "transformers", "peft")},
        "blocks": description(),
        "infold": _output(_resolved(["infold", "--version"])).split()[1],
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _file_system(folder: Path) -> str:
    best, kind = "", "unknown"
    for line in Path("/proc/mounts").read_text().splitlines():
        _, point, found, *_ = line.split()
        if len(point) >= len(best) and folder.is_relative_to(point):
            best, kind = point, found
    return kind


def _output(command: Sequence[str]) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return done.stdout.strip()


def ratios(cases: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Of medians: how much longer than the copy; how many times more PEFT takes."""
    copy = cases["cp + fsync"]["wall"]["median"]
    result = {}
    for name, case in cases.items():
        result[name] = {"wall to cp": round(case["wall"]["median"] / copy, 2)}
        peft = cases.get(name.partition(",")[0].replace("infold", "PEFT"))
        if name.startswith("infold") and peft:
            for what in ("wall", "cpu", "memory"):
                result[name][f"PEFT's {what}"] = round(
                    peft[what]["median"] / case[what]["median"], 2
                )
    return result


def to_markdown(record: Mapping[str, Any]) -> str:
    """The record for readers."""
    where, cases, ratio = record["machine"], record["cases"], record["ratios"]
    lines = [
        f"# Merging a checkpoint of {_bytes(record['bytes'])}",
        "",
        f"{where['cpu']}, {where['cores']} cores, {where['memory'] / 1e9:.0f} GB memory, Linux "
        f"{where['kernel']}, {where['file system']}. Python {where['python']}, torch "
        f"{where['torch']}, transformers {where['transformers']}, PEFT {where['peft']}. "
        f"infold {where['infold']}, blocks {where['blocks']}, "
        f"commit {where['commit']}. {where['date']}.",
        "",
        "Medians (least to greatest) of whole processes that took turns, after one round to warm "
        "up. LoRA: rank 16 on all linear layers. IA³: on k, v and down. Times in seconds, memory "
        "in MB (10^6 bytes).",
        "",
        "| | rounds | wall | CPU | user | system | peak memory | wall, × cp | PEFT's wall, × | "
        "PEFT's CPU, × |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, case in cases.items():
        cells = [
            name.replace("ia3", "IA³").replace("lora", "LoRA"),
            str(len(case["runs"])),
            _range(case["wall"]),
            _range(case["cpu"]),
            f"{case['user']['median']:.2f}",
            f"{case['system']['median']:.2f}",
            f"{case['memory']['median'] / 1e6:.0f}",
            *(
                f"{ratio[name][key]:.1f}" if key in ratio[name] else ""
                for key in ("wall to cp", "PEFT's wall", "PEFT's cpu")
            ),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    others = [run["others"] / run["wall"] for case in cases.values() for run in case["runs"]]
    lines += [
        "",
        f"Without `--threads` infold used {record['threads']}. PEFT does not fsync. Everything "
        f"else on the machine, the kernel's writing included, took {statistics.median(others):.2f} "
        f"(at most {max(others):.2f}) of the {where['cores']} cores meanwhile.",
    ]
    if record["agreement"]:
        worst = max(pair["greatest relative difference"] for pair in record["agreement"].values())
        lines += [
            "",
            f"PEFT and infold made the same models: no tensor differs by more than {worst:.1e} of "
            "its norm.",
        ]
    if memory := record["memory"]:
        floor, peak = (
            memory[name]["memory"]["median"] / 1e6 for name in ("import torch", "lone tensor")
        )
        lines += [
            "",
            "## Memory",
            "",
            f"One tensor of {_bytes(record['lone bytes'])} in one file, LoRA of rank 16, "
            f"`--max-memory {MEMORY}`: peak {peak:.0f} MB. `import torch` alone takes {floor:.0f} "
            f"MB, so the merge takes {peak - floor:.0f} MB.",
        ]
    lines += ["", "## Commands", "", "All of this:", "", "```", record["command"], "```", ""]
    lines += ["Each process, in the cache folder:", "", "```"]
    lines += [shlex.join(case["command"]) for case in (cases | record["memory"]).values()]
    return "\n".join([*lines, "```", ""])


def _bytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _range(figure: Mapping[str, float]) -> str:
    return f"{figure['median']:.2f} ({figure['min']:.2f}–{figure['max']:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", choices=inputs.SIZES, default="3gb")
    parser.add_argument("--rounds", type=int, default=5, help="measured, after one to warm up")
    parser.add_argument("--peft-rounds", type=int, default=5, help="of these, with PEFT; 0: none")
    parser.add_argument("--memory-rounds", type=int, default=3, help="0: no memory section")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2], help="numbers to try")
    parser.add_argument(
        "--touch",
        type=float,
        metavar="GB",
        help="memory that a child uses before each run; default: the size and a quarter; 0: none",
    )
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder to write to")
    options = parser.parse_args()

    size = inputs.SIZES[options.size]
    folder = inputs.cache()
    # a process of its own, since torch is large
    subprocess.run([sys.executable, str(HERE / "inputs.py"), options.size], check=True)
    touch = 5 * size.nbytes // 4 if options.touch is None else int(options.touch * 1e9)
    bench = Bench(folder, touch)
    cases = merge_cases(options.size, options)
    extra = memory_cases(options.size, options.memory_rounds) if options.memory_rounds else []
    with bench.locked():
        runs, agreement = in_rounds(bench, cases)
        measured = _with_figures(cases, runs)
        memory = _with_figures(extra, in_rounds(bench, extra)[0]) if extra else {}
    record = {
        "size": options.size,
        "bytes": size.nbytes,
        "lone bytes": 2 * size.lone[0] * size.lone[1],
        "machine": machine(folder),
        "command": _command(options),
        "threads": _default_threads(),
        "touched": touch,
        "cases": measured,
        "ratios": ratios(measured),
        "agreement": agreement,
        "memory": memory,
    }
    text = to_markdown(record)
    options.results.mkdir(parents=True, exist_ok=True)
    stem = options.results / f"merge-{options.size}"
    stem.with_suffix(".json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    stem.with_suffix(".md").write_text(text)
    print(f"\n{text}")


def _command(options: argparse.Namespace) -> str:
    """What makes this record again."""
    words = ["python", "benchmarks/merge.py", "--size", options.size]
    for name in ("rounds", "peft_rounds", "memory_rounds", "touch"):
        if (value := getattr(options, name)) is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join([*words, "--threads", *map(str, options.threads)])


def _with_figures(cases: Sequence[Case], runs: Mapping[str, Sequence[Run]]) -> dict[str, Any]:
    """What the record tells of each case."""
    return {
        case.name: {
            "command": case.command,
            **figures(runs[case.name]),
            "runs": [asdict(run) for run in runs[case.name]],
        }
        for case in cases
    }


if __name__ == "__main__":
    main()
