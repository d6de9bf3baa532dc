"""Records as one page: HTML that needs no script and no network, or Markdown."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from importlib.resources import files
from math import prod
from typing import Any

from infold.conversion import conversion_text
from infold.errors import CorruptFile
from infold.extras import require
from infold.report.records import Records
from infold.sizes import bytes_text

__all__ = ["render_html", "render_markdown", "shown"]

Rows = list[tuple[str, ...]]
_WORD = 14  # characters; longer words may break anywhere, so that no table is wider than a phone
_SURE = 0.9  # an interval of less is told with its probability
_BENCH = "Speed and memory"
_OTHER = "this record tells of another merge than the one that lies here; make it again"
_BOUNDS = ("measured", "bound")
_MALFORMED = (KeyError, TypeError, ValueError, AttributeError, IndexError)


@dataclass(frozen=True)
class _Block:
    """A part of the page: its table, and the (caption, SVG) that stand before it."""

    title: str
    heads: tuple[str, ...]
    rows: Rows
    drawn: list[tuple[str, str]] = field(default_factory=list)


def render_html(records: Records, others: Collection[str] = ()) -> str:
    """The page as HTML. others: the kinds of records that tell of another merge, which is shown.

    Raises Refusal without the extra `report`, CorruptFile for odd records.
    """
    require("report", "jinja2", "matplotlib")
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    from infold.report.pictures import bars, conversion_pictures, pictures

    told = [_Block(title, heads, rows) for _, title, heads, rows in _sections(records, others)]
    drawn = _checked(records, "update", pictures)
    if "receipt" in records:
        drawn |= _checked(records, "receipt", conversion_pictures)
    blocks = [*told[:1], *(_Block(title, (), [], found) for title, found in drawn.items())]
    blocks += told[1:]
    if found := "bench" not in others and _checked(records, "bench", bars):
        at = next((n for n, block in enumerate(blocks) if block.title == _BENCH), len(blocks))
        rest = blocks[at] if at < len(blocks) else _Block(_BENCH, (), [])
        blocks[at : at + 1] = [replace(rest, drawn=found)]
    text = files("infold.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    made = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return made.from_string(text).render(
        title=_title(records),
        longest=_WORD,
        blocks=[
            replace(block, drawn=[(caption, Markup(svg)) for caption, svg in block.drawn])
            for block in blocks
        ],
    )


def render_markdown(records: Records, others: Collection[str] = ()) -> str:
    """The page as Markdown, without the pictures; as `render_html` else."""
    lines = [f"# {_title(records)}"]
    for _, title, heads, rows in _sections(records, others):
        lines += ["", f"## {title}", "", _row(heads), _row(["---"] * len(heads))]
        lines += [_row(row) for row in rows]
    return "\n".join(lines) + "\n"


def shown(records: Records, html: bool) -> list[str]:
    """The kinds of records that the page tells of, sorted. Only HTML has pictures."""
    kinds = [kind for kind, *_ in _sections(records)]
    update = records.get("update", {})
    if html and (update.get("scales") or update.get("tensors")):
        kinds.append("update")
    return sorted({*kinds})


def _row(cells: list[str] | tuple[str, ...]) -> str:
    return "| " + " | ".join(c.replace("|", "\\|").replace("\n", " ") for c in cells) + " |"


def _title(records: Records) -> str:
    named = records.get("deployment", {}).get("model_info", {})
    name = named.get("name") if isinstance(named, dict) else None
    return str(name) if name else "A merge"


def _sections(
    records: Records, others: Collection[str] = ()
) -> list[tuple[str, str, tuple[str, ...], Rows]]:
    """Kind, title, column heads and rows of each table, in the order of the page."""
    makers: tuple[tuple[str, str, tuple[str, ...], Callable[[Mapping[str, Any]], Rows]], ...] = (
        ("receipt", "What was merged", ("", ""), _receipt),
        ("update", "Without a picture", ("", ""), _undrawn),
        ("training", "Training", ("", ""), _training),
        ("deployment", "Measured, and needed", ("", ""), _deployment),
        ("bench", _BENCH, _bench_heads(records), _bench),
        ("outputs", "Consistency", ("", "outputs", "measured", "bound"), _outputs),
        ("smoke", "Served", ("", ""), _smoke),
        ("checklist", "Checklist", ("", "box", "evidence", "by"), _checklist),
    )
    found = []
    for kind, title, heads, make in makers:
        if kind in records and (rows := _checked(records, kind, make)):
            if kind in others:
                rows = [("FAIL", _OTHER, *[""] * (len(heads) - 2)), *rows]
            found.append((kind, title, heads, rows))
    return found


def _checked(records: Records, kind: str, make: Callable[[Mapping[str, Any]], Any]) -> Any:
    try:
        return make(records.get(kind, {}))
    except _MALFORMED as error:
        raise CorruptFile(
            f"the {kind} record is not one that infold writes: {type(error).__name__} {error}"
        ) from None


def _receipt(r: Mapping[str, Any]) -> Rows:
    rows: Rows = [("base", _place(r["base"]["path"]))]
    rows += [("adapter", f"{_place(a['path'])} ({a['method']})") for a in r["adapters"]]
    told = [(e["unchanged"], _elements(e)) for e in r["edits"] if e["unchanged"] is not None]
    count = sum(elements for _, elements in told)
    same = sum(share * elements for share, elements in told)
    whose = "the last run's" if r.get("resumed_bytes") else "their"
    survived = f"; {1 - same / count:.1%} of {whose} elements moved" if count else ""
    converted = conversion_text(r)
    return [
        *rows,
        ("tensors", f"{r['tensors']:,}, {len(r['edits']):,} edited{survived}"),
        ("size", f"{bytes_text(r['bytes'])}, {bytes_text(r['edited_bytes'])} edited"),
        *([("converted", converted)] if converted else []),
        (
            "run",
            f"{r['seconds']:.1f} s on {r['device']}, peak memory {bytes_text(r['peak_memory'])}",
        ),
        ("infold", r["infold"]),
        *(("note", note) for note in r["notes"]),
    ]


def _elements(edit: Mapping[str, Any]) -> int:
    """What `unchanged` is a share of: of a quantized tensor its scales."""
    return int(edit["rounding"]["scales"]) if "rounding" in edit else prod(edit["shape"])


def _undrawn(r: Mapping[str, Any]) -> Rows:
    return [("note", note) for note in r["notes"]]


def _place(path: str) -> str:
    """The last name of a path, which says nothing of the machine; Hub ids as they are."""
    return path.rstrip("/").rpartition("/")[2] if path.startswith("/") else path


def _training(r: Mapping[str, Any]) -> Rows:
    losses = [(k.replace("_", " "), f"{v:.4f}") for k, v in r["losses"].items() if v is not None]
    return [("steps", f"{r['steps']:,}"), ("parameters", f"{r['parameters']:,}"), *losses]


def _deployment(r: Mapping[str, Any]) -> Rows:
    figures, memory = r["performance_metrics"], r["deployment_requirements"]["gpu_memory"]
    rows: Rows = []
    if figures["measured"]:
        rate, first = figures["decode_tokens_per_second"], figures["first_token_seconds"]
        rows += [
            ("device", figures["device"]),
            ("decoding", f"{rate['median']:.1f} tokens/s ({rate['low']:.1f} to "
             f"{rate['high']:.1f})"),
            ("first token", f"{first['median']:.3f} s ({first['low']:.3f} to "
             f"{first['high']:.3f})"),
            ("loading", f"{figures['load_seconds']:.2f} s"),
        ]  # fmt: skip
    else:
        rows.append(("measured", f"nothing: {figures['why']}"))
    if memory["total_bytes"] is not None:
        told = f"{bytes_text(memory['total_bytes'])} at {memory['context']:,} tokens"
        rows.append(("memory", f"{told}: weights and {memory['kv_cache_formula']}"))
    return rows


def _bench_heads(records: Records) -> tuple[str, ...]:
    compared = records.get("bench", {}).get("comparisons", [])
    models = dict.fromkeys(str(c.get("model", "merged")) for c in compared if isinstance(c, dict))
    return ("over the base's; more is worse", *models)


def _bench(r: Mapping[str, Any]) -> Rows:
    """A row for each metric, a cell for each model: the ratio to the base, and its interval."""
    compared = r.get("comparisons", [])
    models = dict.fromkeys(str(c.get("model", "merged")) for c in compared)
    rows: dict[str, dict[str, str]] = {}
    for c in compared:
        told = f"{c['ratio']:.3f} ({c['low']:.3f} to {c['high']:.3f})"
        if (coverage := c.get("coverage", 1)) < _SURE:  # of load and memory, one value a start
            told = f"{told}, of {coverage:.0%}" if coverage else f"{c['ratio']:.3f}, one value"
        rows.setdefault(c["metric"], {})[str(c.get("model", "merged"))] = told
    return [(metric, *(cells.get(model, "") for model in models)) for metric, cells in rows.items()]


def _outputs(r: Mapping[str, Any]) -> Rows:
    """Each bound of `infold verify --outputs`, and what was found beside them."""
    rows: Rows = [
        ("PASS" if c["ok"] else "FAIL", c["what"], *(_told(c[n], ".2e") for n in _BOUNDS))
        for c in r["checks"]
    ]
    merged, pairs = r["differences"]["merged"], r["continuations"]
    same = sum(pair["differs_at"] is None for pair in pairs)
    shown = ("base", "adapter", "merged")
    found = ", ".join(f"{name} {_told(r['perplexity'][name], '.4f')}" for name in shown)
    found = f"perplexity over {r['tokens']:,} tokens: {found}"
    return [
        *rows,
        ("", f"same best token, of {merged['positions']:,}", f"{merged['agreement']:.2%}", ""),
        ("", "same greedy continuation, token by token", f"{same} of {len(pairs)}", ""),
        ("", found, "", ""),
        *(("", f"note: {note}", "", "") for note in r["notes"]),
    ]


def _told(value: float | None, form: str) -> str:
    """A number; null, where there was none that JSON has."""
    return "not finite" if value is None else format(value, form)


def _smoke(r: Mapping[str, Any]) -> Rows:
    latency, memory = r["latency_seconds"], r["memory_bytes"]
    return [
        ("server", f"{r['server']}, ready after {r['ready_seconds']} s"),
        ("asked", r["prompt"]),
        ("served answer", r["served"]),
        ("in process", "the same" if r["same"] else r["local"]),
        ("requests", f"{r['requests']} over {r['seconds']} s"),
        ("latency", f"median {latency['median']} s, p95 {latency['p95']} s"),
        ("memory", f"{bytes_text(memory['first'])} to {bytes_text(memory['last'])}"),
        ("stable", "yes" if r["stable"] else "; ".join(r["problems"])),
    ]


def _checklist(r: Mapping[str, Any]) -> Rows:
    """Each box with its evidence, and the command that makes it."""
    return [
        (box["status"], box["title"], box["evidence"], _command(box.get("command", "")))
        for box in r["boxes"]
    ]


def _command(text: str) -> str:
    """A command, its paths without what they say of the machine."""
    return shlex.join(map(_place, shlex.split(text)))
