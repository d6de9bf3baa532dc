"""infold train BASE DATA --out DIR"""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from infold.cli.output import show_now
from infold.cli.progress import step_progress
from infold.cli.startup import lasting_imports
from infold.errors import Refusal
from infold.sizes import plural

if TYPE_CHECKING:
    from infold.tuners.prepare import Prepared
    from infold.tuners.record import Training


def train(
    base: Annotated[
        str, typer.Argument(metavar="BASE", help="The base model: a folder or a Hub id.")
    ],
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA", help="JSONL, JSON, CSV, TSV or Parquet; a folder; a Hub data set id."
        ),
    ],
    out: Annotated[
        str, typer.Option("--out", "-o", metavar="DIR", help="The adapter folder to create.")
    ],
    method: Annotated[str, typer.Option(metavar="METHOD", help="lora, dora or ia3.")] = "lora",
    task: Annotated[
        str | None,
        typer.Option(
            metavar="TASK", help="CAUSAL_LM or SEQ_CLS. Default: what base and data are made for."
        ),
    ] = None,
    epochs: Annotated[float, typer.Option(metavar="N", help="Passes over the data.")] = 3.0,
    steps: Annotated[
        int | None, typer.Option(metavar="N", help="Optimizer steps, instead of --epochs.")
    ] = None,
    batch_size: Annotated[
        int, typer.Option(metavar="N", help="Rows for each device and forward pass.")
    ] = 8,
    accumulate: Annotated[
        int, typer.Option(metavar="N", help="Forward passes for each optimizer step.")
    ] = 1,
    lr: Annotated[
        float | None,
        typer.Option(metavar="RATE", help="Learning rate. Default: 2e-4, for ia3 3e-3."),
    ] = None,
    schedule: Annotated[
        str, typer.Option(metavar="NAME", help="After the warmup: linear, cosine or constant.")
    ] = "linear",
    warmup: Annotated[
        float,
        typer.Option(metavar="SHARE", help="The fraction of the steps in which the rate rises."),
    ] = 0.03,
    weight_decay: Annotated[float, typer.Option(metavar="X", help="AdamW's weight decay.")] = 0.0,
    rank: Annotated[int, typer.Option(metavar="N", help="Rank of LoRA and DoRA.")] = 16,
    alpha: Annotated[
        float | None,
        typer.Option(metavar="X", help="Scale of LoRA and DoRA. Default: twice the rank."),
    ] = None,
    dropout: Annotated[
        float, typer.Option(metavar="SHARE", help="Dropout of LoRA and DoRA.")
    ] = 0.0,
    targets: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="Modules that get an adapter, as q_proj,v_proj. Default: by the structure.",
        ),
    ] = None,
    feedforward: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...", help="For ia3: the targets whose inputs are scaled, as down_proj."
        ),
    ] = None,
    parameters: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="For lora: parameters too, as experts.gate_up_proj,experts.down_proj.",
        ),
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(
            metavar="TOKEN,...",
            help="For lora and dora: tokens whose embeddings are trained too, as <think>,</think>.",
        ),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(metavar="N", help="Tokens of a row. Default: what the model takes."),
    ] = None,
    too_long: Annotated[
        str, typer.Option(metavar="HOW", help="Longer rows: refuse, cut (at the end) or drop.")
    ] = "refuse",
    fields: Annotated[
        str | None,
        typer.Option(
            metavar="OURS=THEIRS,...",
            help="Other field names, as prompt=question,completion=answer.",
        ),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...", help="Names of the classes 0, 1, ..., as negative,positive."
        ),
    ] = None,
    template: Annotated[
        str,
        typer.Option(metavar="TEXT", help=r"The prompt of a text/label row; \n is a line break."),
    ] = r"{text}\nLabel:",
    eval_split: Annotated[
        str | None,
        typer.Option(metavar="SHARE|FILE", help="Held-out rows: a fraction, as 0.1, or a file."),
    ] = None,
    eval_every: Annotated[
        int | None,
        typer.Option(metavar="N", help="Steps between evaluations. Default: after each epoch."),
    ] = None,
    seed: Annotated[
        int, typer.Option(metavar="N", help="Of initial values, order and dropout.")
    ] = 0,
    bf16: Annotated[
        bool, typer.Option("--bf16", help="Base and computation in bfloat16, not float32.")
    ] = False,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option("--gradient-checkpointing", help="Less memory for more computation."),
    ] = False,
    packing: Annotated[
        bool,
        typer.Option("--packing", help="Several examples in a row; they do not see each other."),
    ] = False,
    compile_model: Annotated[
        bool, typer.Option("--compile", help="Compile the model with torch.compile.")
    ] = False,
    save_every: Annotated[
        int | None,
        typer.Option(metavar="N", help="Steps between checkpoints. Default: after each epoch."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted training.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Start anew; replace an existing adapter.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of text.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Train an IA³, LoRA or DoRA adapter.

    Every row of the data is checked before the model is loaded. The adapter appears when it is
    complete; an interrupted training continues with --resume, to the same bytes. On several
    devices: accelerate launch -m infold train ...
    """
    with lasting_imports():
        from infold.tuners.settings import TrainSettings
        from infold.tuners.train import train_adapter

    main = int(os.environ.get("RANK", "0")) == 0
    say = main and not (quiet or as_json)
    try:
        settings = TrainSettings.of(
            dict(
                method=method,
                task=task,
                epochs=epochs,
                steps=steps,
                batch_size=batch_size,
                accumulate=accumulate,
                lr=lr,
                schedule=schedule,
                warmup=warmup,
                weight_decay=weight_decay,
                rank=rank,
                alpha=alpha,
                dropout=dropout,
                targets=_list(targets),
                parameters=_list(parameters),
                feedforward=_list(feedforward),
                tokens=_list(tokens),
                max_length=max_length,
                too_long=too_long,
                fields=_pairs(fields),
                labels=_list(labels),
                template=template.replace(r"\n", "\n"),
                eval_split=eval_split,
                eval_every=eval_every,
                seed=seed,
                bf16=bf16,
                gradient_checkpointing=gradient_checkpointing,
                packing=packing,
                compile=compile_model,
                save_every=save_every,
            )
        )
        told: list[str] = []

        def tell(ready: Prepared) -> None:
            _tell(ready)
            told.extend(ready.notes)

        with step_progress("training", not say) as progress:
            record = train_adapter(
                base,
                data,
                out,
                settings,
                resume=resume,
                force=force,
                progress=progress,
                prepared=tell if say else None,
            )
    except Refusal as error:
        if not main:  # every process reads the data and finds the same; one tells it
            raise SystemExit(error.exit_code) from None
        raise
    if as_json and main:
        print(json.dumps(asdict(record)))
    elif say:
        print(_result(record, told))


def _list(text: str | None) -> tuple[str, ...] | None:
    return tuple(part.strip() for part in text.split(",") if part.strip()) if text else None


def _pairs(text: str | None) -> dict[str, str] | None:
    """`prompt=question,completion=answer`."""
    if not text:
        return None
    pairs = [part.partition("=") for part in text.split(",")]
    wrong = ["".join(pair) for pair in pairs if not (pair[0].strip() and pair[2].strip())]
    if wrong:
        raise Refusal(f"--fields: {', '.join(wrong)}: write ours=theirs, as prompt=question")
    return {ours.strip(): theirs.strip() for ours, _, theirs in pairs}


def _tell(ready: Prepared) -> None:
    facts = ready.data
    held = f", {facts['eval_rows']:,} held out" if facts["eval_rows"] else ""
    packed = f", packed into {facts['packed_rows']:,}" if "packed_rows" in facts else ""
    print(
        f"data     {plural('row', facts['rows'])} ({facts['shape']}){packed}{held}; "
        f"{facts['tokens']:,} tokens, {facts['learnt_tokens']:,} learnt"
    )
    classes = f": {', '.join(ready.classes)}" if ready.classes else ""
    print(f"task     {ready.task}{classes}")
    for note in ready.notes:
        print(f"note     {note}")
    show_now()  # the training takes long


def _result(record: Training, told: Collection[str]) -> str:
    """told: the notes that were printed before."""
    losses = record.losses
    share = record.parameters / max(record.all_parameters, 1)
    lines = [
        f"adapter  {record.settings['method']} on {', '.join(record.targets)}",
        f"trained  {record.parameters:,} parameters ({share:.3%}) in "
        f"{plural('step', record.steps)}, {record.seconds:.1f} s, {record.device}"
        + (f" x {record.processes}" if record.processes > 1 else "")
        + (f", continued from step {record.resumed_step}" if record.resumed_step else ""),
    ]
    if losses["first"] is not None:
        ends = f"{losses['first']:.4f} -> {losses['last']:.4f}"
        lines.append(f"loss     {ends}, of the first and the last step")
    if losses["eval_last"] is not None:
        accuracy = losses["eval_accuracy"]
        lines.append(
            f"held out {losses['eval_first']:.4f} -> {losses['eval_last']:.4f}"
            + (f", accuracy {accuracy:.3f}" if accuracy is not None else "")
        )
    lines += [f"note     {note}" for note in record.notes if note not in told]
    return "\n".join([*lines, f"output   {Path(record.out)}"])
