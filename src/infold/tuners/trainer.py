"""transformers' Trainer for adapters: checkpoints that are small and whole, and a loss journal.

The loop, the distribution over devices and the optimizer are the Trainer's and accelerate's. What
differs: a checkpoint holds the adapter, not the base, also under FSDP2; it is written under another
name and renamed; where it is loaded, that happened before the model was wrapped; and logits are
computed only where something is learnt, which is a few tokens of many where answers are short.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from transformers import Trainer, TrainerCallback

from infold.disk import storage_errors
from infold.errors import Refusal, StorageFailure
from infold.tuners.tokens import IGNORED

__all__ = ["AdapterTrainer", "Journal", "entries", "last_checkpoint"]

PREFIX = "checkpoint-"
KEPT = 2  # checkpoints; the one before the last, in case the last turns out to be unreadable
_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
_TOLD = ("loss", "grad_norm", "learning_rate", "eval_loss", "eval_accuracy", "epoch", "step")


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint in a folder; each one there is complete."""
    found = [path for path in folder.glob(f"{PREFIX}*") if path.name[len(PREFIX) :].isdecimal()]
    return max(found, key=lambda path: int(path.name[len(PREFIX) :]), default=None)


def trained_values(model: nn.Module) -> dict[str, Tensor]:
    """The trained parameters by name, whole and on the CPU. All processes must call it together."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            value = parameter.detach()
            whole = value.full_tensor() if hasattr(value, "full_tensor") else value
            found[name] = whole.cpu()
    return found


def narrowed(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch, asking for the logits of those positions alone after which a token of some row is
    learnt; as it is, where these are most of them."""
    labels = batch["labels"]
    following = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    columns = (following != IGNORED).any(dim=0).nonzero().flatten()
    if not 0 < len(columns) <= labels.shape[1] // 2:
        return batch
    return {**batch, "logits_to_keep": columns, "shift_labels": following[:, columns]}


class AdapterTrainer(Trainer):
    """Trainer whose checkpoints hold adapters. Those in `folder` are complete, always."""

    def __init__(self, *args: Any, folder: Path, **kwargs: Any) -> None:
        self.folder = folder
        self.narrows: bool | None = None  # whether the model takes `narrowed` batches, once tried
        super().__init__(*args, **kwargs)
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and plugin.fsdp_version != 2:
            raise Refusal("FSDP 1 is not supported; use accelerate launch --fsdp_version 2")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        values = trained_values(model)
        if self.args.should_save:
            folder = output_dir or self.args.output_dir
            # the base is in a folder of its own, as it was: nothing here resizes a vocabulary
            model.save_pretrained(folder, state_dict=values, save_embedding_layers=False)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any
    ) -> Any:
        if self.narrows is None:  # all processes try it at the same time
            self.narrows = self._narrows(model, inputs)
        if self.narrows:
            inputs = narrowed(inputs)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _narrows(self, model: nn.Module, batch: dict[str, Tensor]) -> bool:
        """Whether the model computes the logits that it is asked for, and its loss from the labels
        that belong to those: without any label the mean loss is no number, which tells.

        Not where it is compiled: each number of logits would be compiled anew.
        """
        own = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        takes = inspect.signature(own.forward).parameters
        labels, plugin = batch["labels"], getattr(self.accelerator.state, "dynamo_plugin", None)
        compiled = self.args.torch_compile or getattr(plugin, "backend", "NO") != "NO"
        if compiled or self.args.n_gpu > 1 or "logits_to_keep" not in takes:
            return False
        # a class for each row; labels that were shifted already; a loss of all logits (Bamba's)
        of_all: float = getattr(own, "z_loss_coefficient", 0.0)
        if labels.ndim != 2 or "shift_labels" in batch or of_all:
            return False
        first = torch.zeros(1, dtype=torch.int64, device=labels.device)
        unlearnt = torch.full_like(labels[:, :1], IGNORED)
        none = {**batch, "logits_to_keep": first, "shift_labels": unlearnt}
        was = model.training
        model.eval()  # so that no random number is drawn
        try:
            with torch.no_grad():
                made = model(**none)
        except torch.OutOfMemoryError:
            raise
        except (TypeError, ValueError, RuntimeError):
            return False
        finally:
            model.train(was)
        if isinstance(made, tuple):
            return False
        return made.logits.shape[:2] == (len(labels), 1) and bool(made.loss.isnan())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing: the adapter was read from the checkpoint when the model was made."""

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.folder / ".writing")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with _disk_errors(self.folder):
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            name = f"{PREFIX}{self.state.global_step}"
            written = self.folder / ".writing" / name
            _to_disk(written)
            if (self.folder / name).exists():
                shutil.rmtree(self.folder / name)
            written.rename(self.folder / name)
            _to_disk(self.folder)
            steps = sorted(int(p.name[len(PREFIX) :]) for p in self.folder.glob(f"{PREFIX}*"))
            for step in steps[:-KEPT]:
                shutil.rmtree(self.folder / f"{PREFIX}{step}")
        self.accelerator.wait_for_everyone()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        model, optimizer, scheduler = self._parts()
        state = get_optimizer_state_dict(model, optimizer, options=_FULL)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / "optimizer.pt")
            torch.save(scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.is_fsdp_enabled or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        state = torch.load(Path(checkpoint) / "optimizer.pt", weights_only=True)
        model, optimizer, scheduler = self._parts()
        set_optimizer_state_dict(model, optimizer, state, options=_FULL)
        scheduler.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))

    def _parts(self) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
        """Model, optimizer and schedule, without what accelerate put around them."""
        optimizer: Any = self.optimizer
        assert self.model is not None
        return self.model, optimizer.optimizer, self.lr_scheduler


class Journal(TrainerCallback):
    """Writes `loss.jsonl` as the training runs, shows progress, stops where a loss is no number.

    progress: called with (steps done, steps in all, last loss).
    """

    def __init__(
        self, file: Path, progress: Callable[[int, int, float | None], None] | None
    ) -> None:
        self.file, self.progress = file, progress
        self.loss: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:  # a continued training has the checkpoint's history
            self.file.write_text("".join(map(line, entries(state.log_history))))
        self._show(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._show(state)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for entry in entries(state.log_history[-1:]):
            if state.is_world_process_zero:
                with self.file.open("a") as stream:
                    stream.write(line(entry))
            self.loss = entry.get("loss", self.loss)
            bad = [k for k in ("loss", "grad_norm") if not math.isfinite(entry.get(k, 0.0))]
            if bad:
                raise Refusal(
                    f"step {state.global_step}: the {bad[0]} is {entry[bad[0]]}; the training was "
                    "stopped. Try a smaller --lr, a longer --warmup, or without --bf16"
                )

    def _show(self, state: Any) -> None:
        if self.progress and state.is_world_process_zero:
            self.progress(state.global_step, state.max_steps, self.loss)


def entries(history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries about losses, without times: the same for each repetition of a training."""
    return [
        {key: entry[key] for key in _TOLD if key in entry}
        for entry in history
        if "loss" in entry or "eval_loss" in entry
    ]


def line(entry: dict[str, Any]) -> str:
    return json.dumps(entry) + "\n"


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """What PyTorch's writer of archives makes of a full disk is a RuntimeError."""
    try:
        with storage_errors(folder):
            yield
    except RuntimeError as error:
        if not re.search(r"inline_container|PytorchStreamWriter|iostream", str(error)):
            raise
        first = str(error).partition("\n")[0]
        raise StorageFailure(
            f"{folder}: a checkpoint could not be written; is the disk full? PyTorch says: {first}"
        ) from error


def _to_disk(folder: Path) -> None:
    """fsync a folder and the files in it: a rename must not get ahead of the bytes."""
    for path in (*(p for p in folder.rglob("*") if p.is_file()), folder):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
