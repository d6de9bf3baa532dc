"""Training: the same bytes again and after a kill, packing, tasks, refusals, the command line."""

from __future__ import annotations

import errno
import fcntl
import inspect
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaForCausalLM,
)

import infold
from forked import infold_command, trained
from infold.deploy.server import free_port
from infold.errors import Refusal
from infold.tuners import IA3Config, LoraConfig, attach, load, trainer
from infold.tuners.data import read_data
from infold.tuners.tokens import Collator, Tokens, encode, pack
from infold.tuners.trainer import Journal
from training import save_base, sums, write_jsonl

HERE = Path(__file__).parent
QUICK: dict[str, Any] = dict(steps=6, batch_size=4, lr=1e-2)
pytestmark = pytest.mark.usefixtures("calm")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("train") / "base")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "sums.jsonl", sums(22))


def adapter_bytes(folder: Path) -> tuple[bytes, ...]:
    names = ("adapter_config.json", "adapter_model.safetensors", "loss.jsonl")
    return tuple((folder / name).read_bytes() for name in names)


# --- the same bytes -------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"method": "lora", "dropout": 0.2}, {"method": "ia3"}])
def test_a_seed_gives_the_same_bytes_again(
    options: dict[str, Any], base: Path, data: Path, tmp_path: Path
) -> None:
    made = []
    for name, seed in (("one", 5), ("two", 5), ("other", 6)):
        infold.train(base, data, tmp_path / name, **QUICK, **options, seed=seed)
        made.append(adapter_bytes(tmp_path / name))

    assert made[0] == made[1]
    assert made[0][1] != made[2][1] and made[0][2] != made[2][2]


@pytest.mark.parametrize(
    ("killed", "options"),
    [
        # a step inside of an epoch, with random dropout and evaluations before and after
        (5, {"method": "dora", "dropout": 0.3, "save_every": 2, "eval_split": 0.2, "epochs": 2}),
        # between two epochs, several passes for a step
        (4, {"method": "ia3", "accumulate": 2, "epochs": 3, "schedule": "cosine"}),
    ],
)
def test_a_killed_training_continues_to_the_same_bytes(
    killed: int,
    options: dict[str, Any],
    base: Path,
    data: Path,
    tmp_path: Path,
) -> None:
    options = options | {"batch_size": 4, "lr": 1e-2}
    out = tmp_path / "out"
    ran = trained(HERE / "train_child.py", base, data, out, json.dumps(options), killed)

    assert ran.returncode == -signal.SIGKILL, ran.stderr
    assert not out.exists() and (tmp_path / ".out.training").exists()
    with pytest.raises(Refusal, match=r"interrupted training of it is in .*--resume"):
        infold.train(base, data, out, **options)
    with pytest.raises(Refusal, match=r"other settings(.|\n)*seed: 0 there, 1 now"):
        infold.train(base, data, out, **options, seed=1, resume=True)
    assert not out.exists()

    resumed = infold.train(base, data, out, **options, resume=True)
    infold.train(base, data, tmp_path / "whole", **options)

    assert resumed.resumed_step and resumed.resumed_step <= killed
    assert adapter_bytes(out) == adapter_bytes(tmp_path / "whole")
    assert not (tmp_path / ".out.training").exists()


def test_resume_of_a_complete_training_does_nothing(base: Path, data: Path, tmp_path: Path) -> None:
    first = infold.train(base, data, tmp_path / "out", **QUICK, resume=True)
    assert [note for note in first.notes if note.startswith("no checkpoint to continue from")]
    before = adapter_bytes(tmp_path / "out")

    again = infold.train(base, data, tmp_path / "out", **QUICK, resume=True)

    assert "nothing was trained" in again.notes[-1] and again.losses == first.losses
    assert adapter_bytes(tmp_path / "out") == before
    with pytest.raises(Refusal, match="was trained with other settings"):
        infold.train(base, data, tmp_path / "out", **QUICK, rank=2, resume=True)


def test_checkpoints_hold_the_adapter_alone(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[str]] = {}

    def progress(done: int, total: int, loss: float | None) -> None:
        folder = tmp_path / ".out.training" / "checkpoints"
        for path in folder.glob("checkpoint-*"):
            seen[path.name] = sorted(p.name for p in path.iterdir())

    infold.train(base, data, tmp_path / "out", **QUICK, save_every=2, progress=progress)

    files = ["adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "rng_state.pth",
             "scheduler.pt", "trainer_state.json"]  # fmt: skip
    assert seen == {"checkpoint-2": files, "checkpoint-4": files}


@pytest.mark.parametrize("tie", [False, True], ids=["", "tied"])
def test_tokens_are_trained_beside_the_adapter(data: Path, tmp_path: Path, tie: bool) -> None:
    base = save_base(tmp_path / "base", tie_word_embeddings=tie)
    tokenizer = AutoTokenizer.from_pretrained(base)
    prompt = json.loads(data.read_text().splitlines()[0])["prompt"]
    word = tokenizer.convert_ids_to_tokens(tokenizer(prompt).input_ids[1])
    record = infold.train(
        base, data, tmp_path / "out", **QUICK, tokens=[word, "<pad>"], save_every=2
    )

    file = load_file(tmp_path / "out" / "adapter_model.safetensors")
    rows = file["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"]
    numbers = tokenizer.convert_tokens_to_ids([word, "<pad>"])
    before = load_file(base / "model.safetensors")["model.embed_tokens.weight"][numbers]
    assert (rows[0] != before[0]).any()
    assert (rows[1] != before[1]).any().item() is tie  # a tied head scores it in every row
    assert any("in no row" in note and "<pad>" in note for note in record.notes)
    assert not [key for key in file if key.endswith("lm_head.weight")]
    merged = infold.merge(base, tmp_path / "out", tmp_path / "merged")
    table = "model.embed_tokens.weight"
    assert torch.equal(load_file(Path(merged.out) / "model.safetensors")[table][numbers], rows)


def test_tokens_that_are_none_are_refused_before_the_model_is_loaded(
    base: Path, data: Path, tmp_path: Path
) -> None:
    for options, told in (
        (dict(tokens=["<think>", "</s>"]), r"'<think>' is no token of .*add it to the tokenizer"),
        (dict(tokens=["</s>"], method="ia3"), "--tokens: is a setting of --method lora and dora"),
        (dict(rank=4, method="ia3"), "--rank: is a setting of --method lora and dora"),
        (dict(alpha=4.0, method="ia3"), "--alpha: is a setting of --method lora and dora"),
        (dict(tokens=["</s>", "</s>"]), "--tokens: has one of them twice"),
    ):
        with pytest.raises(Refusal, match=told):
            infold.train(base, data, tmp_path / "out", **options)


# --- what is computed -----------------------------------------------------------------------------


def rows_of(base: Path, data: Path) -> list[Tokens]:
    rows, _ = encode(read_data(data), AutoTokenizer.from_pretrained(base), limit=64)
    return rows


def total_loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_losses_and_gradients_equal_the_unpacked_ones(
    attention: str, base: Path, data: Path
) -> None:
    rows = rows_of(base, data)
    packed = pack(rows, 60)
    assert len(packed) < len(rows) / 2
    model = LlamaForCausalLM.from_pretrained(base, attn_implementation=attention)
    model = attach(model, LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"]))
    results = []
    for batch in ([Collator(2)([row]) for row in rows], [Collator(2, packing=True)(packed)]):
        loss = sum(total_loss(model, part) for part in batch)
        model.zero_grad()
        loss.backward()
        grads = [p.grad.clone() for p in model.parameters() if p.requires_grad]
        results.append((loss, grads))

    (one, apart), (two, together) = results
    assert torch.allclose(one, two, rtol=1e-6)
    for a, b in zip(apart, together, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_packed_training_equals_unpacked_training(base: Path, data: Path, tmp_path: Path) -> None:
    """With all examples in one batch, packed or not, the steps are the same."""
    options: dict[str, Any] = dict(steps=3, batch_size=22, lr=1e-2)
    infold.train(base, data, tmp_path / "apart", **options)
    record = infold.train(base, data, tmp_path / "packed", **options, packing=True)

    assert record.data["packed_rows"] < record.data["rows"] == 22
    one, two = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("apart", "packed"))
    for key, value in one.items():
        assert torch.allclose(value, two[key], atol=1e-5), key


def test_a_model_without_borders_refuses_packing(data: Path, tmp_path: Path) -> None:
    """Bloom places tokens by an attention bias, so position ids mean nothing to it."""
    bloom = save_base(tmp_path / "bloom", "bloom")

    with pytest.raises(Refusal, match="--packing"):
        infold.train(bloom, data, tmp_path / "out", **QUICK, packing=True, max_length=64)
    assert not (tmp_path / "out").exists()


def test_gradient_checkpointing_changes_nothing(base: Path, data: Path, tmp_path: Path) -> None:
    for name, on in (("with", True), ("without", False)):
        infold.train(base, data, tmp_path / name, **QUICK, gradient_checkpointing=on)

    assert adapter_bytes(tmp_path / "with") == adapter_bytes(tmp_path / "without")


@pytest.mark.parametrize("config", [LoraConfig(r=2, init_lora_weights=False), IA3Config()])
def test_a_compiled_model_has_the_same_gradients(config: Any, base: Path, data: Path) -> None:
    batch = Collator(2)(rows_of(base, data)[:4])
    model = attach(LlamaForCausalLM.from_pretrained(base), config)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    results = []
    for run in (model, compiled):
        model.zero_grad()
        loss = run(**batch, use_cache=False).loss
        loss.backward()
        results.append([loss, *(p.grad.clone() for p in model.parameters() if p.requires_grad)])

    for one, two in zip(*results, strict=True):
        assert torch.allclose(one, two, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_logits_are_computed_only_where_something_is_learnt(
    kind: str, packing: bool, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long prompts and short answers: the losses are those of all logits, evaluation included."""
    prompts = [f"count: {'1 2 3 ' * (2 + i % 3)}" for i in range(40)]
    rows = [{"prompt": prompt, "completion": str(i % 9)} for i, prompt in enumerate(prompts)]
    long = write_jsonl(tmp_path / "long.jsonl", rows)
    how = QUICK | dict(method=kind, packing=packing, eval_split=0.2, eval_every=3, accumulate=2)
    if packing:
        how |= dict(max_length=64, batch_size=2)
    seen: list[tuple[int, int]] = []
    real = trainer.narrowed

    def watched(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found = real(batch)
        seen.append((len(found.get("logits_to_keep", ())), batch["labels"].shape[1]))
        return found

    monkeypatch.setattr(trainer, "narrowed", watched)
    infold.train(base, long, tmp_path / "narrow", **how)
    assert all(0 < kept <= width // 2 for kept, width in seen) and len(seen) > 8
    monkeypatch.setattr(trainer.AdapterTrainer, "_narrows", lambda *_: False)
    infold.train(base, long, tmp_path / "whole", **how)

    narrow, whole = (
        [json.loads(line) for line in (tmp_path / name / "loss.jsonl").read_text().splitlines()]
        for name in ("narrow", "whole")
    )
    for one, two in zip(narrow, whole, strict=True):
        assert one.keys() == two.keys()
        for key in one:
            assert one[key] == pytest.approx(two[key], rel=1e-4), key


class IgnoresShiftLabels(LlamaForCausalLM):
    """As models that shift the labels themselves."""

    def forward(self, *args: Any, labels: Any = None, **kwargs: Any) -> Any:
        kwargs.pop("shift_labels", None)
        kept = kwargs.pop("logits_to_keep", 0)
        made = super().forward(*args, labels=labels, **kwargs)
        made.logits = made.logits[:, kept] if isinstance(kept, torch.Tensor) else made.logits
        return made


def test_a_model_that_shifts_labels_itself_gets_whole_batches(base: Path, data: Path) -> None:
    own = trainer.AdapterTrainer.__new__(trainer.AdapterTrainer)
    own.args = SimpleNamespace(torch_compile=False, n_gpu=0)
    own.accelerator = SimpleNamespace(
        unwrap_model=lambda model, keep_torch_compile: model, state=SimpleNamespace()
    )
    batch = Collator(2)(rows_of(base, data)[:4])
    takes = IgnoresShiftLabels.forward
    takes.__signature__ = inspect.signature(LlamaForCausalLM.forward)  # type: ignore[attr-defined]

    assert own._narrows(LlamaForCausalLM.from_pretrained(base), batch)
    assert not own._narrows(IgnoresShiftLabels.from_pretrained(base), batch)
    llama = LlamaForCausalLM.from_pretrained(base)
    assert not own._narrows(llama, batch | {"shift_labels": batch["labels"]})
    llama.z_loss_coefficient = 0.1  # as Bamba's, of all logits
    assert not own._narrows(llama, batch)
    own.args.torch_compile = True
    assert not own._narrows(LlamaForCausalLM.from_pretrained(base), batch)


def test_bf16_trains_float32_adapters(base: Path, data: Path, tmp_path: Path) -> None:
    record = infold.train(base, data, tmp_path / "out", **QUICK, bf16=True, packing=True)

    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert record.losses["last"] < record.losses["first"]


# --- tasks ----------------------------------------------------------------------------------------

REVIEWS = [
    {"text": f"the film was {word} {i}", "label": int(word == "good")}
    for i in range(12)
    for word in ("good", "bad")
]


@pytest.mark.parametrize("kind", ["4-bit", "8-bit"])
def test_a_quantized_base_is_trained_past_its_evaluations(
    kind: str, data: Path, tmp_path: Path
) -> None:
    folder = save_base(tmp_path / "dense", hidden_size=64, intermediate_size=128)
    small = BitsAndBytesConfig(load_in_4bit=kind == "4-bit", load_in_8bit=kind == "8-bit")
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=small)
    model.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "base")

    done = infold.train(
        tmp_path / "base", data, tmp_path / "out", eval_split=0.2, eval_every=3, packing=True,
        gradient_checkpointing=True, max_length=64, **QUICK | {"steps": 9},
    )  # fmt: skip

    curve = [json.loads(line) for line in (tmp_path / "out/loss.jsonl").read_text().splitlines()]
    losses = [entry["eval_loss"] for entry in curve if "eval_loss" in entry]
    assert len(losses) == 4 and losses == sorted(losses, reverse=True)
    assert done.losses["last"] < done.losses["first"] - 0.2
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert isinstance(PeftModel.from_pretrained(base, tmp_path / "out"), PeftModel)


def test_a_causal_model_learns_to_write_the_label(base: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "r.jsonl", REVIEWS)
    with pytest.raises(Refusal, match="--labels negative,positive"):
        infold.train(base, data, tmp_path / "out", **QUICK)

    record = infold.train(
        base, data, tmp_path / "out", **QUICK, labels=("bad", "good"), eval_split=0.25
    )

    assert record.task == "CAUSAL_LM" and record.classes == ["bad", "good"]
    assert (record.data["rows"], record.data["eval_rows"]) == (18, 6)
    assert record.losses["eval_last"] < record.losses["eval_first"]


def test_another_model_gets_a_head_that_loads_anywhere(tmp_path: Path) -> None:
    """BERT's language model has no pooler: the head is worth nothing without the one it learnt."""
    bert = save_base(tmp_path / "bert", "bert")
    data = write_jsonl(tmp_path / "r.jsonl", REVIEWS)
    options: dict[str, Any] = dict(steps=75, batch_size=8, lr=1e-2, eval_split=0.25)

    record = infold.train(bert, data, tmp_path / "out", **options, labels=("bad", "good"))

    assert record.task == "SEQ_CLS" and record.losses["eval_accuracy"] == 1.0
    texts = [row["text"] for row in REVIEWS]
    batch = AutoTokenizer.from_pretrained(bert)(texts, padding=True, return_tensors="pt")
    batch.pop("token_type_ids", None)
    logits = []
    for attached in (load, PeftModel.from_pretrained):
        torch.manual_seed(len(logits))  # another pooler and head each time
        model = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2)
        with torch.no_grad():
            logits.append(attached(model, tmp_path / "out").eval()(**batch).logits)
    assert torch.allclose(*logits, atol=1e-5)
    right = [a == row["label"] for a, row in zip(logits[0].argmax(-1), REVIEWS, strict=True)]
    assert sum(right) >= 20  # of 24


def test_tasks_that_do_not_fit_are_refused(base: Path, data: Path, tmp_path: Path) -> None:
    bert = save_base(tmp_path / "bert", "bert")
    for model, options, told in (
        (bert, {}, "is made for BertForMaskedLM, which is no causal"),
        (base, {"task": "SEQ_CLS"}, "needs the fields text and label"),
        (base, {"labels": ("a", "b")}, "has no field label"),
        (base, {"max_length": 65}, "takes 64 tokens at most"),
    ):
        with pytest.raises(Refusal, match=told):
            infold.train(model, data, tmp_path / "out", **options)


# --- refusals -------------------------------------------------------------------------------------


def test_a_base_without_a_tokenizer_is_refused(base: Path, data: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(base, bare, ignore=shutil.ignore_patterns("*token*"))
    with pytest.raises(infold.Refusal, match="bare: has no tokenizer; copy the tokenizer files"):
        infold.train(bare, data, tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_bad_data_is_found_before_the_weights_are_read(data: Path, tmp_path: Path) -> None:
    hollow = save_base(tmp_path / "hollow")
    (hollow / "model.safetensors").unlink()
    long = write_jsonl(tmp_path / "d.jsonl", [{"text": "good"}, {"text": "x" * 99}, {"text": ""}])

    with pytest.raises(Refusal, match=r"d\.jsonl, line 3: field 'text' is empty"):
        infold.train(hollow, long, tmp_path / "out")
    write_jsonl(long, [{"text": "good"}, {"text": "x" * 99}])
    with pytest.raises(Refusal, match=r"d\.jsonl, line 2: has 101 tokens, 37 more than the 64"):
        infold.train(hollow, long, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d.jsonl", "hollow"]


def test_wrong_settings_are_told_together() -> None:
    with pytest.raises(Refusal) as refused:
        infold.train("b", "d", "o", method="lra", batch_size=0, eval_split=1.5, template="x")

    for told in (
        "--method: 'lra'",
        "--batch-size: 0",
        "--eval-split: 1.5",
        "--template: must hold",
    ):
        assert told in str(refused.value)
    with pytest.raises(TypeError, match="no option ranks"):
        infold.train("b", "d", "o", ranks=3)


def test_an_output_that_exists_is_replaced_only_by_force_and_only_an_adapter(
    base: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    infold.train(base, data, out, **QUICK)
    before = adapter_bytes(out)
    with pytest.raises(Refusal, match="exists already"):
        infold.train(base, data, out, **QUICK, seed=1)
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(Refusal, match=r"holds more than an adapter.*thesis\.txt"):
        infold.train(base, data, out, **QUICK, seed=1, force=True)
    assert adapter_bytes(out) == before
    (out / "thesis.txt").unlink()

    infold.train(base, data, out, **QUICK, seed=1, force=True)

    assert adapter_bytes(out) != before


def test_of_two_trainings_of_one_output_the_second_is_refused_and_changes_nothing(
    base: Path, data: Path, tmp_path: Path
) -> None:
    run = tmp_path / ".out.training"
    before: list[set[str]] = []

    def progress(done: int, *_: object) -> None:
        if done == 2:  # before there is a checkpoint
            before.append({p.name for p in run.iterdir()})
            for options in ({}, {"force": True}, {"resume": True}):
                with pytest.raises(Refusal, match="another training is writing this output"):
                    infold.train(base, data, tmp_path / "out", **QUICK, **options)
            before.append({p.name for p in run.iterdir()})

    infold.train(base, data, tmp_path / "out", **QUICK, progress=progress)

    assert before and before[0] == before[1] and "lock" in before[0]
    assert (tmp_path / "out").exists() and not run.exists()


def test_a_training_that_fails_leaves_no_new_folder(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = os.open

    def full(path: Any, *given: Any, **more: Any) -> Any:
        if os.fspath(path).endswith("/lock"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return opened(path, *given, **more)

    def fail(*_: object) -> None:
        raise ArithmeticError

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    out = tmp_path / "some" / "where" / "out"
    with monkeypatch.context() as patch, pytest.raises(infold.StorageFailure, match="no space"):
        patch.setattr("infold.tuners.train.os.open", full)
        infold.train(base, data, out, **QUICK)
    with monkeypatch.context() as patch, pytest.raises(infold.StorageFailure):
        patch.setattr(fcntl, "flock", no_locks)
        infold.train(base, data, out, **QUICK)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ArithmeticError):
        infold.train(base, data, out, **QUICK, progress=fail)
    with pytest.raises(Refusal, match=r"is 2 bytes too long: .NAME.training lies beside it"):
        infold.train(base, data, tmp_path / ("n" * 247), **QUICK)

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["adapter", "optimizer"])
def test_a_full_disk_is_no_bug(
    what: str, base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither safetensors nor PyTorch raises an OSError where nothing more can be written."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    save = torch.save

    def full() -> None:  # a write beyond the limit fails, and Python ignores the signal
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 10, limits[1]))

    def saving(*given: Any, **more: Any) -> None:
        full()
        save(*given, **more)

    def progress(done: int, *_: object) -> None:
        if done == 1 and what == "adapter":
            full()

    monkeypatch.setattr(torch, "save", saving)
    monkeypatch.setattr(Journal, "on_log", lambda *_, **__: None)  # which would fail before
    try:
        with pytest.raises(infold.StorageFailure, match=r"\.out\.training"):
            infold.train(base, data, tmp_path / "out", **QUICK, progress=progress)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_is_no_number_stops_the_training(
    base: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(Refusal, match=r"step \d+: the .* is (nan|inf); the training was stopped"):
        infold.train(base, data, tmp_path / "out", **QUICK | {"lr": 1e38})
    assert not (tmp_path / "out").exists()


# --- the command line, and several processes ------------------------------------------------------


def run(
    *words: str | Path, launch: tuple[str, ...] = ("infold",), patience: float = 120
) -> subprocess.CompletedProcess[str]:
    return ended(sys.executable, "-m", *launch, *map(str, words), patience=patience)


def ended(*command: str, patience: float = 120) -> subprocess.CompletedProcess[str]:
    """Run a command to its end. If it hangs, its processes say where, and the test fails.

    Where none of them has come to infold, the launcher hangs, and gets a second try.
    """
    for attempt in (1, 2):
        code, out, err = _tried(command, patience)
        if code is not None:
            return subprocess.CompletedProcess(command, code, out, err)
        if attempt == 2 or "infold/tuners" in err:
            pytest.fail(f"{' '.join(command)}: no end after {patience} s\n{out}\n{err}")
    raise AssertionError("unreachable")


def _tried(command: tuple[str, ...], patience: float) -> tuple[int | None, str, str]:
    """Exit status (None: it hung, and was aborted), stdout, stderr."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "1",
            "PYTHONFAULTHANDLER": "1",  # a process that is aborted prints its stacks
        },
    )
    try:
        out, err = process.communicate(timeout=patience)
    except subprocess.TimeoutExpired:
        top = psutil.Process(process.pid)
        for one in (*top.children(recursive=True), top):  # the workers first: they know more
            with suppress(psutil.NoSuchProcess):
                one.send_signal(signal.SIGABRT)
        out, err = process.communicate()
        return None, out, err
    return process.returncode, out, err


def test_the_command_line_trains(base: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("train", base, data, "--out", out, "--steps", "3", "--method", "ia3")

    ran = run(*words, "--eval-split", "0.2", "--json")

    assert ran.returncode == 0, ran.stderr
    record = json.loads(ran.stdout)
    assert record == json.loads((out / "infold-training.json").read_text())
    assert record["steps"] == 3 and record["settings"]["lr"] == 3e-3 and ran.stderr == ""
    entries = [json.loads(line) for line in (out / "loss.jsonl").read_text().splitlines()]
    assert [e["step"] for e in entries if "loss" in e] == [1, 2, 3]
    assert [e["step"] for e in entries if "eval_loss" in e] == [0, 3]


def test_the_curve_is_drawn(base: Path, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    infold.train(base, data, tmp_path / "out", **QUICK)

    assert (tmp_path / "out" / "loss.png").read_bytes()[:4] == b"\x89PNG"


def test_bad_data_ends_with_2_and_one_message(base: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "a", "completion": 1}])

    ran = infold_command("train", base, data, "--out", tmp_path / "out", kind="training")

    assert ran.returncode == 2 and ran.stdout == ""
    assert "line 1: field 'completion' must be text, not a whole number" in ran.stderr
    assert "Traceback" not in ran.stderr and not (tmp_path / "out").exists()


def parallel(kind: str) -> tuple[str, ...]:
    """accelerate launch for two processes; ACCELERATE_USE_CPU keeps them off any GPU."""
    shared = "--num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    kinds = {
        "ddp": "--multi_gpu",
        "fsdp": "--use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP",
    }
    words = f"accelerate.commands.launch {shared} --main_process_port 0 {kinds[kind]}"
    return tuple(words.split())


# three steps of 8 an epoch; with short answers too, so that some batches ask for few logits
ROWS = [
    *sums(12),
    *(
        {"prompt": f"what is {i} plus" + " two" * (6 + i % 3), "completion": f" {i % 9}"}
        for i in range(12)
    ),
]
COMMON: dict[str, Any] = {"lr": 1e-3, "epochs": 1}
TOKEN = "</s>"


def two_processes(base: Path, folder: Path, tokens: str | None = None) -> list[str | Path]:
    """Their command line: each takes half of the rows of a step."""
    folder.mkdir(exist_ok=True)
    data = write_jsonl(folder / "d.jsonl", ROWS)
    options = ["--lr", "1e-3", "--epochs", "1", "--batch-size", "4", "--json"]
    options += ["--tokens", tokens] if tokens else []
    return ["train", base, data, *options, "--out", folder / "two"]


def check_against_one_process(
    record: dict[str, Any], base: Path, folder: Path, tokens: str | None = None
) -> None:
    options: dict[str, Any] = {**COMMON, "batch_size": 8, "tokens": [tokens] if tokens else None}
    one = infold.train(base, folder / "d.jsonl", folder / "one", **options)

    assert (record["processes"], record["steps"]) == (2, one.steps) and one.processes == 1
    for when in ("first", "last"):
        assert record["losses"][when] == pytest.approx(one.losses[when], rel=1e-5)
    mine, theirs = (load_file(folder / n / "adapter_model.safetensors") for n in ("one", "two"))
    assert mine.keys() == theirs.keys()
    for key, value in mine.items():
        assert torch.allclose(value, theirs[key], atol=1e-5), key


def records(stdout: str) -> list[dict[str, Any]]:
    """What `infold train --json` printed, which one of the processes does."""
    return [json.loads(line) for line in stdout.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True)


def test_two_processes_train_what_one_does(base: Path, tmp_path: Path) -> None:
    words = two_processes(base, tmp_path)
    ran = run(*words, launch=(*parallel("ddp"), "-m", "infold"))

    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "sharded by FSDP2" not in ran.stderr
    (record,) = records(ran.stdout)
    check_against_one_process(record, base, tmp_path)


@pytest.fixture(scope="module")
def sharded(
    base: Path, tied: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str, list[list[int]]]:
    """Six trainings in two processes under one launch: a folder with what they made, what they
    printed, and the exit codes of each process. The fourth training was killed, and the fifth
    continued it."""
    folder = tmp_path_factory.mktemp("sharded")
    options = {"steps": 6, "batch_size": 2, "save_every": 2, "dropout": 0.2}

    def child(out: str, killed: int, **more: Any) -> list[str | Path]:
        words = [base, data, folder / out, json.dumps(options | more), str(killed)]
        return [HERE / "train_child.py", *words]

    trainings: list[list[str | Path]] = [
        ["infold", *two_processes(base, folder)],
        ["infold", *two_processes(tied, folder / "tokens", TOKEN)],  # which its head shares
        ["infold", *two_processes(tied, folder / "ddp", TOKEN)],
        child("out", killed=5),
        child("out", killed=0, resume=True),
        child("whole", killed=0),
    ]
    words: list[str | Path] = []
    for training in trainings:
        kind = "ddp:" if folder / "ddp" / "two" in training else ""
        words += [f"{kind}{free_port(0)}", *training, ","]
    ran = run(HERE / "fsdp_on_cpu.py", *words, launch=parallel("fsdp"), patience=240)
    assert ran.returncode == 0, ran.stderr[-3000:]
    told = ran.stderr.count("sharded by FSDP2, but for []")
    assert told == 2 * (len(trainings) - 1), ran.stderr[-3000:]
    codes = [json.loads(found) for found in re.findall("exit codes (.*)", ran.stdout)]
    return folder, ran.stdout, codes


@pytest.mark.timeout(600)
@pytest.mark.parametrize("which", [0, 1, 2], ids=["", "tokens", "tokens of replicas"])
def test_two_processes_with_a_sharded_model_train_what_one_does(
    which: int, sharded: Any, base: Path, tied: Path
) -> None:
    """And with one that each process has whole, where both ends of a tie share what is trained."""
    folder, stdout, codes = sharded

    assert [process[which] for process in codes] == [0, 0]
    record = records(stdout)[which]
    if which:
        check_against_one_process(record, tied, folder / ("tokens", "ddp")[which - 1], TOKEN)
    else:
        check_against_one_process(record, base, folder)


@pytest.mark.timeout(600)
def test_a_sharded_training_that_was_killed_continues_to_the_same_bytes(sharded: Any) -> None:
    folder, _, codes = sharded

    killed, continued, whole = zip(*(process[3:] for process in codes), strict=True)
    assert -signal.SIGKILL in killed and 0 not in killed, "the other notices, and ends too"
    assert continued == whole == (0, 0)
    record = json.loads((folder / "out" / "infold-training.json").read_text())
    assert record["resumed_step"] == 4
    assert adapter_bytes(folder / "out") == adapter_bytes(folder / "whole")
