"""A checkpoint of more shards than a process may have files open."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

import handmade

SHARDS = 400
CODE = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
import infold
base, adapter, out = sys.argv[1:]
infold.merge(base, adapter, out, threads=3)
verdict = infold.verify(base, [adapter], out)
assert verdict.ok, verdict.offenders
print(verdict.identical, verdict.recomputed)
"""


def test_more_shards_than_open_files_are_merged_and_verified(tmp_path: Path) -> None:
    weights = {f"layers.{n}.q_proj.weight": torch.full((4, 3), n + 1.0) for n in range(SHARDS)}
    base = handmade.base_folder(tmp_path / "base", weights, shards=SHARDS)
    modules = {f"layers.{n}.q_proj": torch.full((4, 1), 2.0) for n in range(0, SHARDS, 2)}
    adapter = handmade.ia3(tmp_path / "adapter", modules)

    ran = subprocess.run(
        [sys.executable, "-c", CODE, str(base), str(adapter), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=200,
    )

    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == [str(SHARDS // 2)] * 2
    merged = {
        name: tensor
        for file in (tmp_path / "out").glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
    assert merged.keys() == weights.keys()
    for number, (name, before) in enumerate(weights.items()):
        assert torch.equal(merged[name], before if number % 2 else before * 2), name
