"""`pip install .`, without any extra, is enough for the verbs that the README gives without one;
the others say which extra they need, before anything is written."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import torch

import handmade
import infold

PROJECT = Path(__file__).parent.parent / "pyproject.toml"

# A process in which nothing can be imported that the core's dependencies do not bring.
PLAIN = """
import importlib.metadata as metadata, json, re, sys
from importlib.machinery import PathFinder

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

class Plain(PathFinder):
    @staticmethod
    def find_spec(name, path=None, target=None):
        return None if name in absent else PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Plain
assert {"transformers", "peft"} <= absent
from infold.cli.main import app
for words in json.loads(sys.argv.pop(1)):
    sys.argv[1:], code = words, 0
    try: app()
    except SystemExit as ended: code = ended.code or 0
    print("ended with", code, flush=True)
"""


def core() -> list[str]:
    """The names of the core's dependencies; Python 3.10 has no TOML parser."""
    found = re.search(r"^dependencies = \[(.*?)^\]", PROJECT.read_text(), re.DOTALL | re.MULTILINE)
    assert found is not None
    return re.findall(r'"([\w-]+)', found[1])


def plain(*commands: tuple[object, ...]) -> tuple[list[int], str]:
    """The exit codes of some commands where no extra is installed, and what they printed."""
    words = json.dumps([[str(word) for word in command] for command in commands])
    command = [sys.executable, "-c", PLAIN, ",".join(core()), words]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    codes = re.findall(r"^ended with (\d+)$", ran.stdout, re.MULTILINE)
    return [int(code) for code in codes], ran.stdout + ran.stderr


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

    codes, told = plain(*commands)

    assert codes == [0] * len(commands), told
    assert handmade.digests(tmp_path / "back") == handmade.digests(base)


def test_verbs_that_need_an_extra_name_it_and_write_nothing(tmp_path: Path) -> None:
    """The extra as it can be installed: infold is on no index, where another's could have its name.
    A proof by outputs is refused before all bytes are read, a loop before it has a folder."""
    weights = {"up_proj.weight": torch.randn(48, 32).bfloat16()}
    base = handmade.base_folder(tmp_path / "base", weights)
    lora = handmade.lora(tmp_path / "lora", {"up_proj": (48, 32)})
    merged, data, config = (tmp_path / name for name in ("merged", "rows.jsonl", "loop.toml"))
    infold.merge(base, lora, merged)
    data.write_text('{"text": "a"}\n')
    config.write_text(
        f'base = "{base}"\nrun = "{tmp_path}/run"\niterations = 1\n'
        '[task]\nname = "arithmetic"\n[train]\nsteps = 1\n'
        '[collect]\nserver = "http://127.0.0.1:1/v1"\nserve = "none {model}"\n'
    )
    before = handmade.digests(tmp_path)
    reads_toml = sys.version_info >= (3, 11)  # else the extra brings the parser, too
    commands = {
        ("loop", config): ("train", "serve") if reads_toml else ("train",),
        ("verify", base, lora, merged, "--outputs"): ("train",),
        ("train", base, data, "--out", tmp_path / "new"): ("train",),
        ("bench", base, lora, merged): ("serve",),
        ("deploy", merged, "--smoke"): ("serve",),
        ("report", merged, "--out", tmp_path / "page.html"): ("report",),
        ("methods", "--measure", base): ("methods",),
    }

    codes, told = plain(*commands)

    assert codes == [2] * len(commands), told
    named = re.findall(r"not installed; in infold's clone: pip install '\.\[(\w+)\]'", told)
    assert named == [extra for extras in commands.values() for extra in extras], told
    assert handmade.digests(tmp_path) == before
