"""infold deploy MERGED"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

import infold
from infold.cli.output import Failed, complain, entry
from infold.cli.progress import step_progress
from infold.errors import Refusal
from infold.sizes import bytes_text, plural


def deploy(
    merged: Annotated[
        str,
        typer.Argument(metavar="MERGED", help="A merged folder; with --smoke also a GGUF file."),
    ],
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            "-o",
            metavar="DIR",
            help="A new folder for model and bundle. Default: in place.",
        ),
    ] = None,
    context: Annotated[
        int | None, typer.Option(metavar="N", help="Tokens that GPU memory is computed for.")
    ] = None,
    licence: Annotated[
        str | None,
        typer.Option("--license", metavar="NAME", help="The licence that the model card names."),
    ] = None,
    no_measure: Annotated[
        bool, typer.Option("--no-measure", help="Do not load and measure the model.")
    ] = False,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Serve it on loopback, ask it, watch it, stop it.")
    ] = False,
    port: Annotated[
        int, typer.Option(metavar="N", help="With --smoke: the port; 0 takes a free one.")
    ] = 0,
    requests: Annotated[
        int, typer.Option(metavar="N", help="With --smoke: how many requests.")
    ] = 30,
    seconds: Annotated[
        float, typer.Option(metavar="SECONDS", help="With --smoke: the time they spread over.")
    ] = 10,
    timeout: Annotated[
        float,
        typer.Option(
            metavar="SECONDS", help="With --smoke: seconds until the server must be ready."
        ),
    ] = 300,
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="With --smoke: what is asked.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of text.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Write what a server needs, or try one.

    A bundle beside the merged model; with --smoke a real server is started, asked and stopped.

    The bundle: deployment_config.json with measured figures, a model card, serving recipes.
    """
    if smoke:
        bundled = {"--out": out, "--context": context, "--license": licence}
        given = [name for name, value in bundled.items() if value is not None]
        if given or no_measure:
            names = ", ".join([*given, *(["--no-measure"] if no_measure else [])])
            raise Refusal(f"--smoke writes no bundle, so {names} cannot be given with it")
        settings: dict[str, Any] = {"port": port, "requests": requests, "seconds": seconds}
        settings |= {"timeout": timeout} | ({} if prompt is None else {"prompt": prompt})
        _smoke(merged, settings, as_json, quiet)
        return
    with step_progress("measuring", quiet or as_json) as progress:
        done = infold.deploy(
            merged, out, context=context, license=licence, no_measure=no_measure, progress=progress
        )
    if as_json:
        print(json.dumps(done))
        return
    if quiet:
        return
    from infold.checkpoint.record import UNDO
    from infold.checkpoint.shards import KEPT_CARD, RECEIPT
    from infold.inspect.receipt import checked_receipt

    memory = done["config"]["deployment_requirements"]["gpu_memory"]
    figures = done["config"]["performance_metrics"]
    if figures["measured"]:
        rate, first = figures["decode_tokens_per_second"], figures["first_token_seconds"]
        spread = f"({rate['low']:.1f} to {rate['high']:.1f})"
        told = f"{rate['median']:.1f} tokens/s {spread}, first token after {first['median']:.3f} s "
        told += f"({first['low']:.3f} to {first['high']:.3f})"
        print(entry("measured", f"{told}, on {figures['device']}", 10))
    else:
        print(entry("measured", f"nothing: {figures['why']}", 10))
    size = memory["total_bytes"]
    needs = "unknown: " + memory["kv_cache_formula"] if size is None else bytes_text(size)
    print(entry("memory", f"{needs}, weights and cache of {memory['context']:,} tokens", 10))
    if done["kept"]:
        print(entry("kept", f"the README.md that was there is {done['kept']}", 10))
    # the model's own: not what else lies there, as a repository's .git
    receipt = checked_receipt(Path(done["out"]))
    own = {*receipt["shards"], *receipt["side_files"], RECEIPT, UNDO, KEPT_CARD} - {*done["files"]}
    there = sum((Path(done["out"]) / name).is_file() for name in own)
    told = f"{plural('file', len(done['files']))}, beside {there:,} of the merged model"
    print(entry("bundle", f"{told}, in {done['out']}", 10))


def _smoke(merged: str, settings: dict[str, Any], as_json: bool, quiet: bool) -> None:
    with step_progress("asking", quiet or as_json) as progress:
        found = infold.deploy(merged, smoke=True, **settings, progress=progress)
    if as_json:
        print(json.dumps(found))
    elif not quiet:
        latency, memory = found["latency_seconds"], found["memory_bytes"]
        print(entry("server", f"{found['server']}, ready after {found['ready_seconds']} s", 10))
        print(entry("asked", found["prompt"], 10))
        same = "the same as" if found["same"] else "unlike"
        print(entry("answered", f"{found['served']!r}, {same} the model without a server", 10))
        told = f"{found['requests']} requests over {found['seconds']} s"
        print(entry("latency", f"{told}: median {latency['median']} s, p95 {latency['p95']} s", 10))
        sizes = f"{bytes_text(memory['first'])} -> {bytes_text(memory['last'])}"
        print(entry("memory", f"{sizes}, at most {bytes_text(memory['most'])}", 10))
    if not found["ok"]:
        if not as_json:
            for problem in found["problems"]:
                complain(f"{merged}: {problem}")
        raise Failed(f"{merged}: smoke test failed")
