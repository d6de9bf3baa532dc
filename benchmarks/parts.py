"""Records that are made part by part, maybe on several machines: each part tells where it ran."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MACHINES = "machines"  # key of a record: by part, as `machine` describes it
_OLDER = "machine"  # of records from before: of whatever part ran last


def add_part(file: Path, part: str, value: Any, packages: Sequence[str], of: str = "") -> None:
    """Put one part into a JSON record, which keeps the others, and where it was measured.

    of: what of the part was measured now, where it is not all of it.
    """
    record = json.loads(file.read_text()) if file.exists() else {}
    record[part] = value
    name = f"{part}, {of}" if of else part
    record.setdefault(MACHINES, {})[name] = machine(packages)
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(record, indent=1) + "\n")


def machine(packages: Sequence[str]) -> dict[str, Any]:
    """Where and with what something was measured; the load is that of the last five minutes."""
    # merge.py imports this file, and must stay small
    from infold.kernel import description
    from infold.machine import processor

    return {
        "cpu": processor(),
        "processors": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[1], 1),
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "python": platform.python_version(),
        **{name: installed(name) for name in packages},
        "blocks": description(),
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def commit() -> str | None:
    """That of the code which is measured; None outside of a checkout."""
    found = _git("rev-parse", "--short=12", "HEAD")
    pages = (":!results", ":!../examples/*.md")  # what benchmarks and examples write
    changed = _git("status", "--porcelain", "--", "../src", "../examples", ".", *pages)
    return f"{found} with changes" if found and changed else found or None


def _git(*words: str) -> str:
    command = ["git", "-C", str(HERE), *words]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


def installed(package: str) -> str | None:
    """The version of a package; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def told_of(record: Mapping[str, Any], part: str) -> list[str]:
    """Lines on where a part was measured: one, or one for each of its pieces; none where an older
    record does not tell."""
    mine = {
        name.removeprefix(part).removeprefix(", "): where
        for name, where in record.get(MACHINES, {}).items()
        if name == part or name.startswith(f"{part}, ")
    }
    lines = []
    for what, where in mine.items():
        lines += [told(where, what), ""]
    return lines


def told(where: Mapping[str, Any], what: str = "") -> str:
    """What `machine` found, in a sentence. what: of the measurement was made there."""
    versions = ", ".join(
        f"{name} {value}"
        for name, value in where.items()
        if value and name not in ("cpu", "processors", "load", "system", "commit", "date")
    )
    return (
        f"Measured{f' ({what})' if what else ''} on {where['cpu']}, {where['processors']} "
        f"processors, load {where['load']}, {where['system']}: {versions}; commit "
        f"{where['commit'] or 'unknown'}, {where['date']}."
    )


def told_of_older(record: Mapping[str, Any], parts: Sequence[str]) -> list[str]:
    """Lines on parts from before each of them told its own machine; none where all do."""
    older = [part for part in parts if part in record and not told_of(record, part)]
    if not older or _OLDER not in record:
        return []
    where = ", ".join(f"{name} {value}" for name, value in record[_OLDER].items())
    loads = record.get("load", {})
    names = ", ".join(f"{p} (load {loads[p]})" if p in loads else p for p in older)
    return [f"Not told for each of these parts: {names}; the last that ran had {where}.", ""]
