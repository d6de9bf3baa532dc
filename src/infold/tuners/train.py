"""A training from its arguments to the adapter on the disk.

While it runs, everything lies in `.NAME.training/` beside the output NAME:

    lock            held (flock) by the running training
    identity.json   what is being trained: settings, digests of base and data
    loss.jsonl      the losses so far
    checkpoints/    checkpoint-STEP folders, each complete: adapter, optimizer, random numbers

At the end the adapter is staged and renamed as a merge is, and that folder goes. Data and settings
are checked as a whole before the model is loaded.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3

from infold.checkpoint.files import exists, locate, read_bytes, read_object
from infold.checkpoint.place import check_adapter_place, check_name
from infold.checkpoint.shards import refuse_unfinished
from infold.checkpoint.staging import Staging
from infold.disk import new_folders, remove_empty, storage_errors, write_whole
from infold.errors import Refusal
from infold.extras import needs, require
from infold.tuners.loading import calm
from infold.tuners.prepare import SMALL, Prepared, prepare
from infold.tuners.record import RECORD, Training, loss_picture
from infold.tuners.settings import TrainSettings
from infold.tuners.tokens import Collator, Tokens
from infold.version import __version__

__all__ = ["train_adapter"]

PathLike = str | os.PathLike[str]
Progress = Callable[[int, int, "float | None"], None]
_WEIGHTS = (".safetensors", ".bin", ".index.json")


def train_adapter(
    base: PathLike,
    data: PathLike,
    out: PathLike,
    settings: TrainSettings,
    *,
    resume: bool = False,
    force: bool = False,
    progress: Progress | None = None,
    prepared: Callable[[Prepared], None] | None = None,
) -> Training:
    """Train an adapter of `base` on `data` and write it to the new folder `out`.

    resume: continue from the last checkpoint of an interrupted training. force: start anew, and
    replace an adapter that is there. progress: called with (steps done, steps in all, last loss).
    prepared: called once data and settings are found good, before the model is loaded.
    Raises Refusal (bad data or settings: all offenders; nothing was trained) or StorageFailure.
    """
    started = time.monotonic()
    path = Path(os.path.abspath(out))
    main = int(os.environ.get("RANK", "0")) == 0
    require("train", "transformers", "accelerate")
    _check_output(path, resume, force)
    ready = prepare(base, data, settings)
    draft = _draft(base, path, ready, settings)
    if resume and exists(path):
        return _finished(path, draft)
    if prepared:
        prepared(ready)
    with _run_folder(path, draft.identity, resume, force, main) as run:
        return _train(base, path, settings, ready, draft, run, resume, force, progress, started)


# --- before the model is loaded -------------------------------------------------------------------


def _check_output(path: Path, resume: bool, force: bool) -> None:
    if resume and force:
        raise Refusal("--resume continues and --force starts anew: give one of them")
    check_name(path, _run_place(path))
    if not resume:
        check_adapter_place(path, force)


def _draft(base: PathLike, path: Path, ready: Prepared, settings: TrainSettings) -> Training:
    """The record as far as it is known before the training."""
    return Training(
        infold=__version__,
        out=str(path),
        base={"path": _told(base), "digest": _base_digest(ready.folder)},
        data=ready.data,
        task=ready.task,
        settings=settings.to_dict(),
        classes=ready.classes,
        parameters=0,
        all_parameters=0,
        steps=0,
        epochs=0.0,
        losses={},
        versions=_versions(),
        device="",
        targets=[],
        processes=int(os.environ.get("WORLD_SIZE", "1")),
        resumed_step=None,
        seconds=0.0,
        notes=ready.notes,
    )


def _base_digest(folder: Path) -> str:
    """Over config.json and the names and sizes of the weights: reading those would take minutes."""
    digest = blake3(read_bytes(folder / "config.json"))
    for file in sorted(folder.iterdir()):
        if file.name.endswith(_WEIGHTS):
            digest.update(f"{file.name} {file.stat().st_size}\n".encode())
    return digest.hexdigest()


def _finished(path: Path, draft: Training) -> Training:
    """The record of a training that is complete: there is nothing to continue."""
    if not exists(path / RECORD):
        raise Refusal(f"{path}: exists already and is no training of infold; choose another name")
    record = Training.from_json(read_object(path / RECORD))
    _same(path, record.identity, draft.identity, "was trained with")
    return replace(record, notes=[*record.notes, "was complete already; nothing was trained"])


def _same(path: Path, before: Mapping[str, Any], now: Mapping[str, Any], what: str) -> None:
    plain = json.loads(json.dumps(now))
    other = [
        f"  {key}: {before.get(key)!r} there, {plain.get(key)!r} now"
        for key in sorted({*before, *plain})
        if before.get(key) != plain.get(key)
    ]
    if other:
        raise Refusal(
            "\n".join(
                [
                    f"{path}: {what} other settings, so --resume would mix two trainings; repeat "
                    "them, or start anew with --force",
                    *other,
                ]
            )
        )


# --- the folder of a running training -------------------------------------------------------------


def _run_place(path: Path) -> Path:
    return path.parent / f".{path.name}.training"


@contextmanager
def _run_folder(
    path: Path, identity: dict[str, Any], resume: bool, force: bool, main: bool
) -> Iterator[Path]:
    """The folder of the running training, locked and checked by the main process."""
    run = _run_place(path)
    if not main:
        yield run
        return
    made, lock, mine = new_folders(run), -1, False
    try:
        with storage_errors(run):
            run.mkdir(parents=True, exist_ok=True)
            fresh = not os.path.lexists(run / "lock")
            lock = os.open(run / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                told = f"{path}: another training is writing this output right now"
                raise Refusal(told) from None
            except OSError:  # no locks on this file system, say
                if fresh:
                    with suppress(OSError):
                        os.unlink(run / "lock")
                raise
            mine = True
            _open_run(run, path, identity, resume, force)
        yield run
    except Exception:
        if mine and not any((run / "checkpoints").glob("checkpoint-*")):
            shutil.rmtree(run, ignore_errors=True)  # nothing in it that could be continued
        remove_empty([run, *made])
        raise
    finally:
        if lock >= 0:
            os.close(lock)


def _open_run(run: Path, path: Path, identity: dict[str, Any], resume: bool, force: bool) -> None:
    started = sorted((run / "checkpoints").glob("checkpoint-*"))
    if started and not (resume or force):
        raise Refusal(
            f"{path}: an interrupted training of it is in {run}; continue it with --resume, or "
            "start anew with --force"
        )
    if started and resume:
        _same(path, read_object(run / "identity.json"), identity, "the interrupted training has")
        return
    for entry in run.iterdir():
        if entry.name != "lock":
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    write_whole(run / "identity.json", json.dumps(identity, indent=1).encode())


# --- with the model -------------------------------------------------------------------------------


def _train(
    base: PathLike,
    path: Path,
    settings: TrainSettings,
    ready: Prepared,
    draft: Training,
    run: Path,
    resume: bool,
    force: bool,
    progress: Progress | None,
    started: float,
) -> Training:
    with calm():  # what transformers imports may talk too
        from transformers import set_seed

        from infold.tuners.trainer import AdapterTrainer, Journal, entries, last_checkpoint

    checkpoints = run / "checkpoints"
    with calm():
        args = _arguments(settings, ready, checkpoints)
        with args.main_process_first():  # by then it has checked an interrupted training, or
            pass  # cleared it away: earlier, the processes could read different checkpoints
        checkpoint = last_checkpoint(checkpoints)
        args.eval_on_start = bool(ready.eval_rows) and checkpoint is None  # the base's loss
        set_seed(settings.seed)
        with _warnings_kept(draft.notes) as notes:
            model = _model(base, ready, settings, checkpoint)
        if resume and checkpoint is None:
            notes.append("no checkpoint to continue from: this is a training from its beginning")
        trainable, total = model.get_nb_trainable_parameters()
        if settings.packing:
            _check_packing(model, ready)
        trainer = AdapterTrainer(
            model=model,
            args=args,
            folder=checkpoints,
            data_collator=Collator(ready.pad_id, settings.packing),
            train_dataset=ready.rows,
            eval_dataset=ready.eval_rows or None,
            callbacks=[Journal(run / "loss.jsonl", progress)],
            **(_accuracy() if ready.task == "SEQ_CLS" else {}),
        )
        _no_printing(trainer)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        history = entries(trainer.state.log_history)
        if ready.eval_rows and not (history and "eval_loss" in history[-1]):
            trainer.evaluate()
            history = entries(trainer.state.log_history)
        trainer.save_model(str(run / "adapter"))
        trainer.accelerator.wait_for_everyone()
    names = model.peft_config["default"].target_modules
    names = [names] if isinstance(names, str) else [*names, *(settings.parameters or ())]
    record = replace(
        draft,
        parameters=trainable,
        all_parameters=total,
        steps=trainer.state.global_step,
        epochs=round(float(trainer.state.epoch or 0), 4),
        losses=_losses(history),
        device=args.device.type,
        targets=sorted(names),
        notes=notes,
        resumed_step=int(checkpoint.name.rpartition("-")[2]) if checkpoint else None,
        seconds=round(time.monotonic() - started, 3),
    )
    if trainer.args.should_save:
        record = _publish(path, run, record, history, force)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    return record


@contextmanager
def _warnings_kept(notes: Iterable[str]) -> Iterator[list[str]]:
    """The notes, and from the end on what infold itself warned of inside, such as experts that no
    target reaches. `calm` would drop that with what the libraries say."""
    own, kept = Path(__file__).parent, list(notes)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield kept
    told = (str(one.message) for one in caught if own in Path(one.filename).parents)
    kept += dict.fromkeys(told)


def _arguments(settings: TrainSettings, ready: Prepared, folder: Path) -> Any:
    from transformers import TrainingArguments

    every = settings.eval_every
    steps = settings.steps or _steps(settings, len(ready.rows))
    checkpointing: dict[str, Any] = (
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": _NOT_REENTRANT}
        if settings.gradient_checkpointing
        else {}
    )
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=settings.epochs,
        max_steps=settings.steps or -1,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant_with_warmup"
        if settings.schedule == "constant"
        else settings.schedule,
        warmup_steps=round(settings.warmup * steps),
        weight_decay=settings.weight_decay,
        seed=settings.seed,
        use_cpu=_on_cpu(),
        bf16=settings.bf16,
        torch_compile=settings.compile,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps" if settings.save_every else "epoch",
        save_steps=settings.save_every or 500,
        eval_strategy="no" if not ready.eval_rows else "steps" if every else "epoch",
        eval_steps=every,
        prediction_loss_only=ready.task != "SEQ_CLS",
        label_names=["labels"],
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        log_level_replica="error",
        **checkpointing,
    )


_NOT_REENTRANT = {"use_reentrant": False}  # the other kind needs inputs that require a gradient


def _on_cpu() -> bool:
    asked = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    return asked or not (torch.cuda.is_available() or torch.backends.mps.is_available())


def _steps(settings: TrainSettings, rows: int) -> int:
    batch = settings.batch_size * settings.accumulate * int(os.environ.get("WORLD_SIZE", "1"))
    return max(1, int(settings.epochs * -(-rows // batch)))


def _model(
    base: PathLike, ready: Prepared, settings: TrainSettings, checkpoint: Path | None
) -> Any:
    """The base with an adapter: a new one, or that of a checkpoint."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from infold.tuners import IA3Config, LoraConfig, attach, load
    from infold.tuners.targets import find_targets

    folder = locate(base, (*SMALL, "*.safetensors", "*.bin"))
    refuse_unfinished(folder)
    new: list[str] = []
    dtype = torch.bfloat16 if settings.bf16 else torch.float32
    if ready.task == "SEQ_CLS":
        names = dict(enumerate(ready.classes))
        model, report = AutoModelForSequenceClassification.from_pretrained(
            folder,
            dtype=dtype,
            num_labels=len(names),
            id2label=names,
            label2id={name: number for number, name in names.items()},
            output_loading_info=True,
        )
        model.config.pad_token_id = ready.pad_id
        new = _new_modules(model, report["missing_keys"])
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.config._name_or_path = model.name_or_path = os.fspath(base)
    model.config.use_cache = False  # a cache would also hide the borders of packed examples
    if checkpoint is not None:
        return load(model, checkpoint, trainable=True)
    targets = list(settings.targets) if settings.targets else None
    inner = list(settings.feedforward) if settings.feedforward else None
    if targets is None and inner is None:
        found = find_targets(model, "ia3" if settings.method == "ia3" else "lora")
        targets, inner = list(found.modules), list(found.feedforward)
    common: dict[str, Any] = {
        "task_type": ready.task,
        "target_modules": targets,
        "modules_to_save": new or None,
    }
    if settings.method == "ia3":
        return attach(model, IA3Config(feedforward_modules=inner, **common))
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=2 * settings.rank if settings.alpha is None else settings.alpha,
        lora_dropout=settings.dropout,
        use_dora=settings.method == "dora",
        trainable_token_indices=ready.trained or None,
        target_parameters=list(settings.parameters) if settings.parameters else None,
        **common,
    )
    return attach(model, config)


def _new_modules(model: Any, missing: Iterable[str]) -> list[str]:
    """The modules that the base does not have, such as a head, or the pooler below it.

    They begin with random values, so they are trained and saved whole: without them the adapter
    would mean nothing on another random pooler.
    """
    absent = set(missing)
    there = {name for name in model.state_dict() if name not in absent}
    found = set()
    for name in absent:
        path, _, _ = name.rpartition(".")
        while (above := path.rpartition(".")[0]) and not any(
            n.startswith(f"{above}.") for n in there
        ):
            path = above
        found.add(path)
    return sorted(found)


@torch.no_grad()
def _check_packing(model: Any, ready: Prepared) -> None:
    """Packed examples must not see each other; whether a model keeps them apart is tried."""
    ids = [i for row in ready.rows[:4] for i in row.ids][:16]
    ids = (ids * 16)[:16]
    one, two = ids[:9], ids[9:]
    packed = Tokens(ids, [-100] * 16, (0, len(one)))
    was = model.training
    model.eval()
    collate = Collator(ready.pad_id, packing=True)

    def logits(row: Tokens) -> torch.Tensor:
        batch = {k: v.to(model.device) for k, v in collate([row]).items() if k != "labels"}
        found: torch.Tensor = model(**batch, use_cache=False).logits[0].float()
        return found

    try:
        apart = torch.cat([logits(Tokens(part, [-100] * len(part))) for part in (one, two)])
        together = logits(packed)
    except (TypeError, ValueError, RuntimeError) as error:
        raise Refusal(f"--packing: {type(model).__name__} does not take it: {error}") from None
    finally:
        model.train(was)
    scale = apart.abs().max()
    if (apart - together).abs().max() > (2e-2 if model.dtype == torch.bfloat16 else 1e-3) * scale:
        raise Refusal(
            f"--packing: examples in one row see each other in {type(model).__name__}, since it "
            "takes no borders from position ids; train it without --packing"
        )


def _accuracy() -> dict[str, Any]:
    def best(logits: Any, labels: Any) -> Any:
        return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)

    def accuracy(found: Any) -> dict[str, float]:
        return {"accuracy": float((found.predictions == found.label_ids).mean())}

    return {"preprocess_logits_for_metrics": best, "compute_metrics": accuracy}


def _no_printing(trainer: Any) -> None:
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)


# --- the result -----------------------------------------------------------------------------------


def _publish(
    path: Path, run: Path, record: Training, history: list[dict[str, Any]], force: bool
) -> Training:
    """Put adapter, curve and record under the output's name, all at once; the run's folder goes."""
    picture = loss_picture(history)
    if picture is None:
        note = f"no loss.png: matplotlib not installed; {needs('train')}"
        record = replace(record, notes=[*record.notes, note])
    with Staging(path, blake3(record.to_json().encode()).hexdigest(), force) as staging:
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            staging.copy_file(run / "adapter" / name, name)
        staging.copy_file(run / "loss.jsonl", "loss.jsonl")
        if picture is not None:
            staging.write_bytes("loss.png", picture)
        staging.write_bytes(RECORD, record.to_json().encode())
        staging.publish()
    with suppress(OSError):
        shutil.rmtree(run)
    return record


def _losses(history: list[dict[str, Any]]) -> dict[str, float | None]:
    training = [entry["loss"] for entry in history if "loss" in entry]
    held = [entry for entry in history if "eval_loss" in entry]
    return {
        "first": training[0] if training else None,
        "last": training[-1] if training else None,
        "eval_first": held[0]["eval_loss"] if held else None,  # before training: the base's
        "eval_last": held[-1]["eval_loss"] if held else None,
        "eval_accuracy": held[-1].get("eval_accuracy") if held else None,
    }


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("torch", "transformers", "accelerate")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def _told(name: PathLike) -> str:
    return os.path.abspath(name) if exists(Path(name)) else os.fspath(name)
