"""infold swap MERGED ADAPTER... --out DIR"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from infold.api.paths import settle_first
from infold.cli.merge import done_text
from infold.cli.output import complain
from infold.cli.place import check_words, one_place
from infold.cli.progress import byte_progress
from infold.cli.startup import lasting_imports


def swap(
    merged: Annotated[
        str,
        typer.Argument(metavar="MERGED", help="A merged folder or .gguf file with an undo record."),
    ],
    adapters: Annotated[
        list[str],
        typer.Argument(metavar="ADAPTER...", help="What to merge into its base instead."),
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
    lossy: Annotated[
        bool,
        typer.Option("--lossy", help="Round scales of four bits (NVFP4), and tell the error."),
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
    force: Annotated[
        bool, typer.Option("--force", help="Replace an output of an earlier merge.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of text.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Exchange the adapters of a merged model, without its base.

    Undo and merge in one pass: the output is what merging the base with the new adapters gives,
    byte for byte, with an undo record of its own.
    """
    from infold.merge.options import check_in_place

    place = one_place(out, in_place)
    if in_place:
        check_in_place(force)
    say = not (quiet or as_json)
    check_words(adapters, merged, out, force=force, device=device, max_memory=max_memory)
    with lasting_imports():
        from infold.merge.inplace import swap_in_place
        from infold.merge.restore import open_swap, swap_checkpoint

    if not in_place:
        settle_first(merged)
        prepared = open_swap(
            merged, adapters, place, max_memory=max_memory, device=device, threads=threads,
            force=force, lossy=lossy,
        )  # fmt: skip
    with byte_progress("swapping", not say) as progress:
        if in_place:
            receipt = swap_in_place(
                merged, adapters, max_memory=max_memory, device=device, threads=threads,
                lossy=lossy, progress=progress,
                told=lambda settled: complain(f"{merged}: {settled}"),
            )  # fmt: skip
        else:
            receipt = swap_checkpoint(prepared, progress=progress, names=adapters)
    if as_json:
        print(json.dumps(asdict(receipt)))
    elif say:
        print(done_text(receipt, place or merged))
