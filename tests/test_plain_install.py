"""`pip install .`, without any extra, is enough for the verbs that the README gives without one."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import torch

import handmade

PROJECT = Path(__file__).parent.parent / "pyproject.toml"

# A process in which nothing can be imported that the core's dependencies do not bring.
PLAIN = """
import importlib.metadata as metadata, json, re, sys

def canonical(name): return re.sub(r"[-_.]+", "-", name).lower()

brought, wanted = {"infold"}, sys.argv.pop(1).split(",")
while wanted:
    name = wanted.pop()
    if canonical(name) in brought: continue
    try: needs = metadata.requires(name) or []
    except metadata.PackageNotFoundError: continue
    brought.add(canonical(name))
    wanted += [re.match(r"[\\w.-]+", need)[0] for need in needs if "extra ==" not in need]
owners = metadata.packages_distributions().items()
absent = {m for m, names in owners if brought.isdisjoint(map(canonical, names))}

class Absent:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name in absent: raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent)
assert {"transformers", "peft"} <= absent
from infold.cli.main import app
for words in json.loads(sys.argv.pop(1)):
    sys.argv[1:] = words
    try: app()
    except SystemExit as ended: assert not ended.code, words
"""


def core() -> list[str]:
    """The names of the core's dependencies; Python 3.10 has no TOML parser."""
    found = re.search(r"^dependencies = \[(.*?)^\]", PROJECT.read_text(), re.DOTALL | re.MULTILINE)
    assert found is not None
    return re.findall(r'"([\w-]+)', found[1])


def test_the_core_s_dependencies_are_enough(tmp_path: Path) -> None:
    weights = {"up_proj.weight": torch.randn(48, 32).bfloat16(), "norm.weight": torch.ones(32)}
    base = handmade.base_folder(tmp_path / "base", weights)
    lora = handmade.lora(tmp_path / "lora", {"up_proj": (48, 32)})
    ia3 = handmade.ia3(tmp_path / "ia3", {"up_proj": torch.rand(48, 1) + 0.5})
    merged, both = tmp_path / "merged", (lora, lora, "--weights", "0.5,0.5", "--type", "svd")
    commands = [
        ("merge", base, lora, ia3, "--out", merged, "--undo", "--quiet"),
        ("verify", base, lora, ia3, merged),
        ("verify", merged),
        ("inspect", merged),
        ("inspect", ia3, "--base", base),
        ("swap", merged, ia3, "--out", tmp_path / "swapped"),
        ("undo", merged, "--out", tmp_path / "back"),
        ("combine", *both, "--svd-rank", "4", "--out", tmp_path / "sum"),
    ]

    words = json.dumps([[str(word) for word in command] for command in commands])
    command = [sys.executable, "-c", PLAIN, ",".join(core()), words]
    ran = subprocess.run(command, capture_output=True, text=True)

    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert handmade.digests(tmp_path / "back") == handmade.digests(base)
