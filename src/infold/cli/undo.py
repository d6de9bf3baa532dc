"""infold undo MERGED --out DIR"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from infold.api.paths import settle_first
from infold.cli.output import complain, entry
from infold.cli.place import check_words, one_place
from infold.cli.progress import byte_progress
from infold.cli.startup import lasting_imports
from infold.sizes import bytes_text, plural


def undo(
    merged: Annotated[
        str,
        typer.Argument(metavar="MERGED", help="A merged folder or .gguf file with an undo record."),
    ],
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            "-o",
            metavar="PATH",
            help="The folder or .gguf file to create.",
            show_default=False,
        ),
    ] = None,
    in_place: Annotated[
        bool, typer.Option("--in-place", help="Edit MERGED itself instead.")
    ] = False,
    max_memory: Annotated[
        str,
        typer.Option(
            metavar="SIZE",
            help="Memory for buffers and factors, on top of what Python and PyTorch take.",
        ),
    ] = "1GiB",
    device: Annotated[
        str, typer.Option(metavar="DEVICE", help="Where to compute: cpu, cuda or cuda:N.")
    ] = "cpu",
    threads: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Workers. Default: one for each processor, at most 8."
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of text.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Restore the base of a merged model, byte for byte.

    Neither the base nor the adapters are needed: the record that `infold merge --undo` wrote has
    all that is not in the merged weights. A record that is damaged, or of another output, is
    refused before anything is written.
    """
    place = one_place(out, in_place)
    say = not (quiet or as_json)
    check_words([], merged, out, device=device, max_memory=max_memory)
    with lasting_imports():
        from infold.merge.inplace import undo_in_place
        from infold.merge.restore import undo_checkpoint

    if not in_place:
        settle_first(merged)
    with byte_progress("restoring", not say) as progress:
        if in_place:
            done = undo_in_place(
                merged, max_memory=max_memory, device=device, threads=threads, progress=progress,
                told=lambda settled: complain(f"{merged}: {settled}"),
            )  # fmt: skip
        else:
            done = undo_checkpoint(
                Path(merged), place, max_memory=max_memory, device=device, threads=threads,
                progress=progress,
            )  # fmt: skip
    if as_json:
        print(json.dumps(asdict(done)))
    elif say:
        speed = bytes_text(done.bytes / max(done.seconds, 1e-3))
        shards = plural("shard", len(done.shards))
        peak = bytes_text(done.peak_memory)
        print(entry("restored", f"{shards} in {done.seconds:.1f} s, {speed}/s, peak memory {peak}"))
        print(
            entry(
                "proven",
                f"{done.restored:,} of {plural('tensor', done.tensors)} had been edited or "
                "replaced, the others are copies; every shard has the base's digest",
            )
        )
        for note in done.notes:
            print(entry("note", note))
        print(entry("output", place or merged))
