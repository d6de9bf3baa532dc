"""The proof by running: the base with its adapters unmerged, against the merged folder as any user
loads it.

Bounds are not chosen but measured in the same run, all in float32. Merging in float32 must give the
adapter's outputs but for the noise of float32, which is measured by moving every weight of that
model by one unit in its last place. Merging in memory at the stored dtype tells what rounding the
weights must do to the outputs; the folder must show that, and nothing else. The control's merge
finds its layers by the tree of modules, the folder's by the names of tensors.

A quantized model is run on the float32 values of its codes and scales. A merge in memory does not
fold into scales, so where such layers are edited there is no control: what rounding may do is
measured by moving every weight of the quantized layers by the largest rounding error of what is
written. So too a GGUF file; there the floats move that the merge rounds, in a copy of the file,
since a scale can have fewer bits than its dtype and an element can be a difference.

One model is in memory at a time; logits wait on the disk.
"""

from __future__ import annotations

import gc
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infold.checkpoint.adapter import open_adapter
from infold.checkpoint.shards import open_checkpoint
from infold.errors import CorruptFile, Refusal
from infold.extras import require
from infold.machine import device_of
from infold.plan.build import plan_merge
from infold.plan.choice import Choice
from infold.plan.edits import Decoded
from infold.tuners.loading import (
    attach_all,
    calm,
    config_of,
    gguf_file,
    load_model,
    model_folder,
    positions_of,
    tokenizer_of,
)
from infold.tuners.quantized import widen
from infold.verify.folder import read_claims
from infold.verify.logits import Distance, cross_entropy, margin
from infold.verify.moved import PRECISION, factors_of, write_moved
from infold.verify.prompts import Questions, read_questions
from infold.verify.verdict import Check, Continuation, Difference, Outputs

__all__ = ["prove_outputs"]

PathLike = str | os.PathLike[str]

# Float32 noise comes from every operation, not from the weights alone: on models of 2 to 30 layers
# it is 0.4 to 2 times what a unit in the weights' last place does. A wrong merge is 1,000s.
NOISE = 16
# The largest of a few thousand draws varies; the control is the same rounding, so twice is ample.
ROUNDING = 2


def prove_outputs(
    base: PathLike,
    adapters: Sequence[PathLike],
    merged: PathLike,
    *,
    prompts: PathLike | None = None,
    text: PathLike | None = None,
    new_tokens: int = 32,
    device: str = "cpu",
    progress: Callable[[int, int, float | None], None] | None = None,
) -> Outputs:
    """Run base with adapters, the controls and the merged folder, and compare their logits.

    prompts: a file, one prompt a line. text: a file, whose perplexity is measured. Both have
    defaults. progress: called with (passes done, passes in all, None).
    Models are folders, or GGUF files (or folders of one), which transformers decodes.
    Needs memory for one model in float32, and disk for three times the logits, and for a copy of a
    GGUF file.
    Raises Refusal before a model is loaded for what cannot be run, and where transformers cannot
    load a model or the adapters do not fit; StorageFailure as `merge` does.
    """
    started = time.perf_counter()
    require("train", "transformers")
    where = device_of(device)
    if new_tokens < 1:
        raise Refusal(f"{new_tokens} new tokens: at least 1 is needed to compare continuations")
    base_folder = gguf_file(base) or model_folder(base, quantized=True)
    merged_folder = gguf_file(merged) or model_folder(merged, quantized=True)
    if base_folder.is_file() != merged_folder.is_file():
        raise Refusal(
            f"{os.fspath(merged)}: base and merged must both be GGUF files, or both be folders"
        )
    choice = _conversion(merged)
    tokenizer = tokenizer_of(base_folder)
    limit = positions_of(config_of(base_folder)) or 1 << 20
    questions = read_questions(prompts, text, tokenizer, limit, new_tokens)
    with tempfile.TemporaryDirectory(prefix="infold-outputs-") as folder, calm():
        run = _Run(Path(folder), where, questions, new_tokens, progress)
        run.adapter_mode(base_folder, adapters)
        run.control(base_folder, adapters, choice)
        run.merged(merged_folder)
    checks = _checks(run)
    notes = _notes(run, all(check.ok for check in checks))
    return Outputs(
        ok=all(check.ok for check in checks),
        checks=checks,
        differences=run.differences,
        perplexity=run.perplexity,
        tokens=sum(map(len, questions.windows)),
        continuations=tuple(_compare(run, tokenizer)),
        notes=tuple(notes),
        device=str(where),
        seconds=round(time.perf_counter() - started, 3),
    )


class _Run:
    """The models, one after the other, and what became of each."""

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        questions: Questions,
        new_tokens: int,
        progress: Callable[[int, int, float | None], None] | None,
    ) -> None:
        self.folder, self.device, self.questions = folder, device, questions
        self.new_tokens, self.progress = new_tokens, progress
        self.sequences: list[tuple[int, ...]] = []
        self.differences: dict[str, Difference] = {}
        self.perplexity: dict[str, float] = {}
        self.greedy: dict[str, list[list[int]]] = {}
        self.layers: list[str] = []  # of the base that are quantized
        self.step: float | None = None  # the largest rounding error, where those are edited
        self.margins: list[float] = []  # of the first token that differs, for each prompt
        self.done = 0

    # --- models ----------------------------------------------------------------------------------

    def adapter_mode(self, base: Path, adapters: Sequence[PathLike]) -> None:
        """The reference; the same with its adapters off; merged in float32; moved by a unit."""
        # transformers rounds all weights to one dtype, which is the one that is stored
        model, self.layers = self._float(base)
        model = attach_all(model, adapters)
        self.greedy["adapter"] = self._continue(model)
        asked = zip(self.questions.prompt_ids, self.greedy["adapter"], strict=True)
        self.sequences = [(*ids, *new) for ids, new in asked] + list(self.questions.windows)
        self._pass(model, "adapter", against={}, keep=True)
        with model.disable_adapter():
            self._pass(model, "base", against={"effect": "adapter"})
        model = model.merge_and_unload()
        self._pass(model, "float32", against={"arithmetic": "adapter"}, keep=True)
        _move(model.parameters())
        self._pass(model, "moved", against={"unit": "float32"})
        self._drop("float32")

    def control(self, base: Path, adapters: Sequence[PathLike], choice: Choice | None) -> None:
        """Merged in memory at the stored dtype, run in float32; of quantized layers, moved."""
        if self.layers:
            self.step = _rounding(base, adapters, choice)
        if base.is_file():
            model = attach_all(self._moved(base, adapters, choice), adapters).merge_and_unload()
        elif self.step is None:
            model = attach_all(load_model(base, self.device), adapters).merge_and_unload()
            widen(model)
            model = model.float()
        else:
            model, _ = self._float(base)
            model = attach_all(model, adapters).merge_and_unload()
            _move((model.get_submodule(path).weight for path in self.layers), self.step)
        self._pass(model, "predicted", against={"predicted": "adapter"}, keep=True)

    def _moved(self, base: Path, adapters: Sequence[PathLike], choice: Choice | None) -> Any:
        """The model of a GGUF file, the floats moved that the merge rounds."""
        checkpoint = open_checkpoint(base)
        plan = plan_merge(checkpoint, [open_adapter(path) for path in adapters], choice)
        written = {name: edit.dtype for name, edit in plan.edits.items()}
        found = {name: factors_of(edit, plan.adapters) for name, edit in plan.edits.items()}
        factors = {name: own for name, own in found.items() if own is not None}
        file = self.folder / base.name
        write_moved(base, checkpoint.shards[0].header.tensors, written, file, factors)
        model = load_model(file, self.device)
        file.unlink()
        return model

    def merged(self, folder: Path) -> None:
        model, _ = self._float(folder)
        self.greedy["merged"] = self._continue(model)
        same = self.step is None and folder.is_dir()  # weights by two ways
        control = {"control": "predicted"} if same else {}
        self._pass(model, "merged", against={"merged": "adapter", **control})
        for number, (one, two) in enumerate(zip(*self.greedy.values(), strict=True)):
            at = _first_difference(one, two)
            row = 0 if at is None else len(self.questions.prompt_ids[number]) - 1 + at
            lead = 0.0 if at is None else float(margin(self._kept("adapter", number)[row]))
            self.margins.append(lead)

    def _float(self, folder: Path) -> tuple[Any, list[str]]:
        """The model in float32, and the layers of it that are quantized."""
        model = load_model(folder, self.device)
        layers = widen(model)
        return model.float(), layers

    # --- passes ----------------------------------------------------------------------------------

    @torch.inference_mode()
    def _pass(self, model: Any, name: str, against: dict[str, str], keep: bool = False) -> None:
        """Logits of all sequences: compared with those of models before, and kept if need be."""
        distances = {what: Distance() for what in against}
        loss, count, windows = 0.0, 0, len(self.questions.windows)
        for number, ids in enumerate(self.sequences):
            row = torch.tensor(ids, device=self.device)
            logits = model(row[None], use_cache=False).logits[0].float().cpu()
            if number >= len(self.sequences) - windows:
                loss += cross_entropy(logits, row.cpu())
                count += len(ids) - 1
            for what, distance in distances.items():
                other = self._kept(against[what], number)
                if other.shape != logits.shape:
                    told = f"logits of shape {list(logits.shape)}, not {list(other.shape)}"
                    raise Refusal(f"the {name} model gives {told}: it has another vocabulary")
                distance.add(other, logits)
            if keep:
                torch.save(logits.clone(), self.folder / f"{name}-{number}.pt")
        self.perplexity[name] = _exp(loss / count)
        self.differences |= {what: distance.result() for what, distance in distances.items()}
        self._step()

    def _kept(self, name: str, number: int) -> Tensor:
        kept: Tensor = torch.load(self.folder / f"{name}-{number}.pt", weights_only=True)
        return kept

    def _drop(self, name: str) -> None:
        for file in self.folder.glob(f"{name}-*.pt"):
            file.unlink()
        gc.collect()

    @torch.inference_mode()
    def _continue(self, model: Any) -> list[list[int]]:
        """The greedy continuation of each prompt, token by token. No end of text stops it: what
        follows one is compared too."""
        made = []
        for ids in self.questions.prompt_ids:
            row = torch.tensor([ids], device=self.device)
            new: list[int] = []
            cache = None
            for _ in range(self.new_tokens):
                out = model(row, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                row = out.logits[:, -1:].argmax(-1)
                new.append(int(row))
            made.append(new)
        self._step()
        return made

    def _step(self) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, 8, None)


@torch.no_grad()
def _move(parameters: Iterable[Tensor], step: float = 2.0**-23) -> None:
    """Move every weight by a relative step, up or down, the same on every run; by itself by a unit
    in float32's last place."""
    for number, parameter in enumerate(parameters):
        numbers = torch.Generator().manual_seed(number)
        up = torch.randint(0, 2, parameter.shape, generator=numbers, dtype=torch.int8)
        parameter.mul_((1 + (up.float() * 2 - 1) * step).to(parameter.device))


def _conversion(merged: PathLike) -> Choice | None:
    """How weights that do not fold were converted, as the receipt tells it.

    Raises Refusal for what no bound here tells from a wrong merge. A receipt that cannot be read is
    an offender of the other proof.
    """
    try:
        claims = read_claims(Path(merged))
    except CorruptFile:
        return None
    told = None if claims is None else claims.conversion
    if told is None:
        return None
    instead = "prove this merge by its bytes, without --outputs"
    if told["mode"] == "requantize":
        raise Refusal(
            f"{os.fspath(merged)}: touched weights were quantized again, which moves the outputs "
            f"further than a bound could allow that still tells a wrong merge; {instead}"
        )
    if told["original"]:
        raise Refusal(
            f"{os.fspath(merged)}: touched weights come from {told['original']}, so the outputs "
            f"are not those of the quantized base with its adapters; {instead}"
        )
    return Choice(told["mode"], told["dtype"])


def _rounding(base: Path, adapters: Sequence[PathLike], choice: Choice | None) -> float | None:
    """The largest relative rounding error of what a merge writes, be it scales or weights; None
    where it edits no quantized module."""
    opened = [open_adapter(path) for path in adapters]
    edits = plan_merge(open_checkpoint(base), opened, choice, lossy=True).edits.values()
    if not any(edit.scales or isinstance(edit.source, Decoded) for edit in edits):
        return None
    return 2.0 ** -min(PRECISION[edit.dtype] for edit in edits if edit.dtype in PRECISION)


# --- what it means -------------------------------------------------------------------------------


def _checks(run: _Run) -> tuple[Check, ...]:
    found = run.differences
    unit, predicted, merged = found["unit"], found["predicted"], found["merged"]
    checks = []

    def check(what: str, measured: float, bound: float) -> None:
        checks.append(Check(what, measured, bound, measured <= bound))

    kinds = {"arithmetic": "adapter mode and its merge in float32"}
    if "control" in found:
        kinds["control"] = "the merged folder and the control, merged in memory"
    for name, what in kinds.items():
        check(f"{what}: largest logit difference", found[name].largest, NOISE * unit.largest)
        check(f"{what}: mean logit difference", found[name].mean, NOISE * unit.mean)
    what = "adapter mode and the merged folder"
    largest = ROUNDING * predicted.largest + NOISE * unit.largest
    check(f"{what}: largest logit difference", merged.largest, largest)
    mean = ROUNDING * predicted.mean + NOISE * unit.mean
    check(f"{what}: mean logit difference", merged.mean, mean)
    # a divergence grows with the square of the difference
    kl = ROUNDING**2 * predicted.kl + NOISE**2 * unit.kl
    check(f"{what}: mean KL divergence", merged.kl, kl)
    # two logits that each move by at most `largest` change places only within twice that
    check(f"{what}: lead of a best token that changed", merged.widest, 2 * largest)
    lead = max(run.margins, default=0.0)
    check(f"{what}: lead of a greedy token that changed", lead, 2 * largest)
    return tuple(checks)


def _notes(run: _Run, ok: bool) -> list[str]:
    effect, merged = run.differences["effect"], run.differences["merged"]
    if effect.largest == 0:
        return ["the adapters change no logit here, so this proves nothing about them"]
    if not ok and math.isclose(merged.mean, effect.mean, rel_tol=0.02):
        return ["the merged folder is as far from adapter mode as the base is: is it the base?"]
    if run.differences["predicted"].mean > effect.mean / 4:
        return ["rounding to the stored dtype changes the logits by over a quarter of the effect"]
    return []


def _compare(run: _Run, tokenizer: Any) -> Iterable[Continuation]:
    pairs = zip(run.greedy["adapter"], run.greedy["merged"], strict=True)
    for number, (one, two) in enumerate(pairs):
        yield Continuation(
            prompt=run.questions.prompts[number],
            adapter=tokenizer.decode(one),
            merged=tokenizer.decode(two),
            tokens=len(one),
            differs_at=_first_difference(one, two),
            margin=run.margins[number],
        )


def _first_difference(one: Sequence[int], two: Sequence[int]) -> int | None:
    return next((n for n, (a, b) in enumerate(zip(one, two, strict=True)) if a != b), None)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
