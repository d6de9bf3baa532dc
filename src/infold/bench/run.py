"""Base, adapter mode and merged model, each in a process of its own, timed in turns.

A start launches every process anew, so that what differs between two processes of one model
(where its memory lies, or the page cache that it is mapped from) is part of the noise that the
intervals show. Who loads first changes with the start: it can compute some per cent slower for as
long as it lives. Within a start, rounds go from model to model; a round's figures are compared with
the base's of that same round.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, TypeVar

from infold.checkpoint.adapter import open_adapter
from infold.errors import Refusal, StorageFailure
from infold.extras import missing
from infold.interval import median_interval, paired_ratio
from infold.machine import device_of, processor
from infold.tuners.loading import model_folder, most_tokens
from infold.version import __version__

__all__ = ["Progress", "measure_models"]

PathLike = str | os.PathLike[str]
Progress = Callable[[int, int, float | None], None]
Samples = dict[str, dict[str, list[float]]]  # model -> metric -> one value a round, or a start
T = TypeVar("T")
_SPEED, _MEMORY = "speed", "memory"
_DTYPES = ("auto", "float32", "bfloat16", "float16")


def measure_models(
    base: PathLike,
    adapter: PathLike,
    merged: PathLike | None = None,
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    batches: Sequence[int] = (1, 4),
    rounds: int = 5,
    starts: int = 3,
    device: str = "cpu",
    dtype: str = "auto",
    modes: bool = True,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Load time, memory, prefill, first token, decoding and adapter swap, as a bench record.

    Models: the base, the base with the adapter by infold, the same by PEFT where it is installed,
    and the merged folder where one is given. Times in seconds, sizes in bytes. dtype: what all of
    them are loaded as; "auto": as stored. Without `modes`, base and merged alone.
    progress: (steps done, steps in all, None).
    All models are in memory at a time where they fit, else one: then a start is not in turns.
    Raises Refusal for what cannot be run, with all reasons where they can be told beforehand.
    """
    _check(prompt_tokens, new_tokens, batches, rounds, starts, dtype)
    device_of(device)
    folder = model_folder(base)
    adapted = str(open_adapter(adapter).path)
    models = {"base": ("plain", folder)}
    if modes:
        models["infold"] = ("infold", folder)
    if modes and find_spec("peft") is not None:
        models["PEFT"] = ("peft", folder)
    if merged is not None:
        models["merged"] = ("plain", model_folder(merged))
    notes = []
    if modes and "PEFT" not in models:
        notes.append("PEFT is not installed, so its adapter mode is not here")
    top = _vocabulary(folder, prompt_tokens + new_tokens + 1)
    given = [
        {"kind": kind, "folder": str(path), "adapter": adapted}
        | {"device": device, "dtype": dtype, "top": top}
        for kind, path in models.values()
    ]
    loads = dict(zip(models, given, strict=True))
    together = _fits(folder, len(models), device, dtype)
    if not together:
        notes.append("the models do not fit into memory together: each ran its rounds alone")
    shapes = [
        {"batch": b, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens} for b in batches
    ]
    run = _Run(shapes, rounds, len(models) * starts * (rounds + 1), progress)
    began = time.perf_counter()
    places = list(dict.fromkeys(path for _, path in models.values()))
    for start in range(starts):
        for place in _turned(places, start):
            _read_anew(place)
        if together:
            run.generation(loads, start)
        else:
            for name in loads:
                run.generation({name: loads[name]}, start)
    return {
        "kind": "bench",
        "version": 1,
        "infold": __version__,
        "device": run.facts["device"],
        "processor": processor(),
        "threads": run.facts["threads"],
        "dtype": run.facts["dtype"],
        "versions": _versions(),
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "starts": starts,
        "rounds": rounds,
        "models": {
            name: {metric: asdict(median_interval(v)) for metric, v in found.items()}
            for name, found in run.samples.items()
        },
        "comparisons": _comparisons(run.samples, starts),
        "notes": notes,
        "seconds": round(time.perf_counter() - began, 1),
    }


class _Run:
    """Collects samples over starts."""

    def __init__(
        self, shapes: list[dict[str, int]], rounds: int, steps: int, progress: Progress | None
    ) -> None:
        self.shapes, self.rounds, self.steps, self.progress = shapes, rounds, steps, progress
        self.samples: Samples = {}
        self.facts: dict[str, Any] = {}
        self.done = 0

    def generation(self, loads: dict[str, dict[str, Any]], start: int) -> None:
        """Launch the models, warm them up, and time them in turns."""
        with ExitStack() as stack:
            workers = {name: stack.enter_context(_worker(name)) for name in loads}
            for worker in workers.values():  # else the first would load while the others import
                worker.ask("ready")
            for name in _turned(list(loads), start):
                loaded = workers[name].ask("load", **loads[name])
                facts = {k: loaded.pop(k) for k in ("dtype", "threads", "device")}
                self.facts = self.facts or facts
                self._keep(name, loaded)
            for number in range(self.rounds + 1):  # the first warms up
                # there and back, so that none always follows the same neighbour
                names = _turned(list(loads), number + start)
                for name in reversed(names) if number % 2 else names:
                    self._round(name, workers[name], kept=number > 0)

    def _round(self, name: str, worker: _Worker, kept: bool) -> None:
        for shape in self.shapes:
            found = worker.ask("run", **shape)
            if kept:
                self._keep(name, {f"{k}, batch {shape['batch']}": v for k, v in found.items()})
        if name in ("infold", "PEFT"):
            swapped = worker.ask("swap")
            if kept:
                self._keep(name, swapped)
        self._step()

    def _keep(self, name: str, found: dict[str, float]) -> None:
        for metric, value in found.items():
            self.samples.setdefault(name, {}).setdefault(metric, []).append(value)

    def _step(self) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.steps, None)


def _turned(names: list[T], turn: int) -> list[T]:
    turn %= len(names)
    return names[turn:] + names[:turn]


class _Worker:
    """A model's process; `ask` blocks until it answers."""

    def __init__(self, name: str, process: subprocess.Popen[str], errors: IO[str]) -> None:
        self.name, self.process, self.errors = name, process, errors

    def ask(self, what: str, **given: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"what": what} | given) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it died; why stands in its errors
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.errors.seek(0)
            lines = self.errors.read().strip().splitlines()
            code = self.process.returncode
            if code == -9:
                why = "it was killed, as the system does when memory runs out"
            else:
                why = lines[-1] if lines else f"exit code {code}"
            raise StorageFailure(f"{self.name}: the process of this model ended: {why}")
        found: dict[str, Any] = json.loads(line)
        if "refused" in found:
            raise Refusal([f"{self.name}: {reason}" for reason in found["refused"]])
        return found


@contextmanager
def _worker(name: str) -> Iterator[_Worker]:
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "infold.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, **quiet},
            start_new_session=True,  # an interrupt is ours to handle
        )
        try:
            yield _Worker(name, process, errors)
        finally:
            process.kill()
            process.communicate()


def _comparisons(samples: Samples, starts: int) -> list[dict[str, Any]]:
    """Every model over the base; more is worse, so rates are turned into seconds a token."""
    base, found = samples["base"], []
    for name, metrics in samples.items():
        for metric in metrics if name != "base" else ():
            if metric not in base:
                continue
            values, others = metrics[metric], base[metric]
            what = _MEMORY if "bytes" in metric else "load" if metric.startswith("load") else _SPEED
            told = metric
            if metric.startswith("decode_tokens_per_second"):
                told = metric.replace("decode_tokens_per_second", "decode_seconds_per_token")
                values, others = [1 / v for v in values], [1 / v for v in others]
            ratio = paired_ratio(values, others, starts)
            found.append(
                {
                    "model": name,
                    "what": what,
                    "metric": told.replace("_", " "),
                    "ratio": ratio.median,
                    "low": ratio.low,
                    "high": ratio.high,
                    "coverage": ratio.coverage,
                    "within_noise": ratio.holds_one,
                }
            )
    return found


def _check(
    prompt_tokens: int,
    new_tokens: int,
    batches: Sequence[int],
    rounds: int,
    starts: int,
    dtype: str,
) -> None:
    counts = {"prompt tokens": prompt_tokens, "new tokens": new_tokens}
    counts |= {"rounds": rounds, "starts": starts}
    wrong = [f"{value} {name}: at least 1 is needed" for name, value in counts.items() if value < 1]
    wrong += [f"a batch of {b}: at least 1 is needed" for b in batches if b < 1]
    if not batches:
        wrong.append("no batch size: give at least one")
    if len(set(batches)) != len(batches):
        wrong.append(f"batch sizes {', '.join(map(str, batches))}: one is given twice")
    if dtype not in _DTYPES:
        wrong.append(f"dtype {dtype}: give {', '.join(_DTYPES)}")
    wrong += missing("serve", "transformers", "psutil")
    if wrong:
        raise Refusal(wrong)


def _vocabulary(folder: Path, tokens: int) -> int:
    """How many tokens the model knows. Raises Refusal where it does not take that many in a row."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config()
        longest = most_tokens(config)
        if longest is not None and longest < tokens:
            raise Refusal(
                f"{folder}: takes {longest:,} tokens; --prompt-tokens and --new-tokens make "
                f"{tokens:,} with the first one"
            )
        return int(config.vocab_size)
    except (ValueError, OSError, KeyError, ImportError, TypeError, AttributeError) as error:
        raise Refusal(f"{folder}: transformers cannot read the config: {error}") from None


def _read_anew(folder: Path) -> None:
    """Bring the weights into the page cache as any other reading does.

    Where they lie there as they were written, in small pages, or not at all, loading takes longer,
    and a model that is mapped from there computes some per cent slower.
    """
    for path in folder.glob("*.safetensors"):
        with open(path, "rb", buffering=0) as file:
            if hasattr(os, "posix_fadvise"):
                os.fsync(file.fileno())  # what is not written yet cannot be forgotten
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while file.read(8 << 20):
                pass


def _fits(folder: Path, count: int, device: str, dtype: str) -> bool:
    """Whether all models fit together, by the files' sizes and with half as much again."""
    size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    size *= 2 if dtype == "float32" else 1
    if device.startswith("cuda"):
        import torch

        free = torch.cuda.mem_get_info(torch.device(device))[0]
    else:
        import psutil

        free = psutil.virtual_memory().available
    return size * 1.5 * count < free


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("torch", "transformers", "peft"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
