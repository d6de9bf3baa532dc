"""Stacked experts of GGUF files: all of a layer in one tensor, quantized or dense."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ggufs
import handmade
import infold
from infold.checkpoint.gguf import read_gguf_header
from test_gguf import WIDE, matrix, one_layer, vectors

EXPERTS, INNER = 3, 64
EXPERT = "model.layers.0.block_sparse_moe.experts"
UP = "blk.0.ffn_up_exps.weight"


def mixtral(folder: Path, dtype: str) -> Path:
    sizes = (("gate", (INNER, WIDE)), ("up", (INNER, WIDE)), ("down", (WIDE, INNER)))
    stacked = {
        f"blk.0.ffn_{n}_exps.weight": np.stack(
            [matrix(*s, seed=e, size=1.0) for e in range(EXPERTS)]
        )
        for n, s in sizes
    }
    encoded = {name: ggufs.encode(values, dtype) for name, values in stacked.items()}
    return one_layer(folder, encoded, expert_count=EXPERTS)


@pytest.mark.parametrize("dtype", ["Q8_0", "Q4_1", "F16", "BF16", "F32"])
def test_experts(dtype: str, tmp_path: Path) -> None:
    """w2 of one expert scales the rows of w3 of that one, in the tensor of all of them; with w3's
    own vector and another adapter's they are one product, rounded once."""
    file = mixtral(tmp_path, dtype)
    powers = dtype in ("Q8_0", "Q4_1")
    drawn = {(e, n): vectors(3 * e + n, powers, v=INNER)["v"] for e in (0, 2) for n in range(3)}
    one = handmade.ia3(
        tmp_path / "one",
        {f"{EXPERT}.{e}.w2": drawn[e, 0].t() for e in (0, 2)}
        | {f"{EXPERT}.{e}.w3": drawn[e, 1] for e in (0, 2)},
        feedforward_modules=["w2"],
    )  # fmt: skip
    two = handmade.ia3(tmp_path / "two", {f"{EXPERT}.2.w3": drawn[2, 2]})
    merged = tmp_path / "m.gguf"

    receipt = infold.merge(file, [one, two], merged, undo=True, threads=2)

    was, now = ggufs.read(file), ggufs.read(merged)
    exact = ggufs.decode(was[UP]).astype(np.float64)
    exact[0] *= (drawn[0, 0].double() * drawn[0, 1].double()).numpy()
    exact[2] *= torch.stack([drawn[2, n].double() for n in range(3)]).prod(0).numpy()
    if dtype == "BF16":  # numpy has none: within half a place, which has 16 bits of float32's
        places = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64) * 2**16
        assert (np.abs(ggufs.decode(now[UP]) - exact) <= places / 2).all()
    else:
        kind = np.float16 if dtype == "F16" else np.float32
        assert np.array_equal(ggufs.decode(now[UP]), exact.astype(kind))
    assert all(np.array_equal(was[n][1], now[n][1]) for n in was if n != UP)
    assert receipt.edits[0]["shape"] == [EXPERTS, INNER, WIDE]
    assert infold.verify(merged).ok
    infold.undo(merged, tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == file.read_bytes()
    infold.swap(merged, two, tmp_path / "swapped.gguf")
    infold.merge(file, two, tmp_path / "wanted.gguf")
    assert (tmp_path / "swapped.gguf").read_bytes() == (tmp_path / "wanted.gguf").read_bytes()


@pytest.mark.parametrize("dtype", ["Q8_0", "F16"])
def test_a_vector_in_another_expert_is_seen(dtype: str, tmp_path: Path) -> None:
    file = mixtral(tmp_path, dtype)
    vector = vectors(0, False, v=INNER)["v"]
    right, wrong = (
        handmade.ia3(
            tmp_path / f"{e}", {f"{EXPERT}.{e}.w2": vector.t()}, feedforward_modules=["w2"]
        )
        for e in (1, 2)
    )
    infold.merge(file, wrong, tmp_path / "m.gguf")
    (tmp_path / "m.gguf.infold-receipt.json").unlink()

    verdict = infold.verify(file, right, tmp_path / "m.gguf")

    assert [offender.where for offender in verdict.offenders] == [UP]


@pytest.mark.parametrize("dtype", ["Q8_0", "F16"])
def test_what_one_expert_cannot_have_is_refused_without_a_way_that_is_none(
    dtype: str, tmp_path: Path
) -> None:
    """The inputs of w1 are those of all experts; no other type of the tensor changes that."""
    file = mixtral(tmp_path, dtype)
    vector = vectors(0, False, v=WIDE)["v"].t()
    adapter = handmade.ia3(tmp_path / "a", {f"{EXPERT}.1.w1": vector}, feedforward_modules=["w1"])

    for options in ({}, {"promote": True})[: 2 if dtype == "Q8_0" else 1]:
        with pytest.raises(infold.Refusal, match=r"safetensors checkpoint, and convert") as caught:
            infold.merge(file, adapter, tmp_path / "m.gguf", **options)
        assert "--promote" not in str(caught.value)


def test_a_row_of_any_length_is_proven_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dense experts are one row each, hundreds of megabytes in a large model."""
    from infold.verify import tensors

    pieces = []
    real = tensors.EditCheck.check

    def check(self: tensors.EditCheck, merged: memoryview, *rest: Any) -> None:
        pieces.append(len(merged))
        real(self, merged, *rest)

    monkeypatch.setattr(tensors, "BLOCK", 1000)  # no divisor of a row
    monkeypatch.setattr(tensors.EditCheck, "check", check)
    file, out = mixtral(tmp_path, "F16"), tmp_path / "m.gguf"
    vector = vectors(0, False, v=INNER)["v"]
    adapter = handmade.ia3(
        tmp_path / "a", {f"{EXPERT}.{e}.w2": vector.t().clone() for e in (0, 2)},
        feedforward_modules=["w2"],
    )  # fmt: skip
    infold.merge(file, adapter, out)

    assert infold.verify(out).ok
    assert max(pieces) == 2000 and sum(pieces) == EXPERTS * INNER * WIDE * 2

    info = read_gguf_header(out).tensors[UP]
    for element in (999, 1000, INNER * WIDE - 1, INNER * WIDE, 2 * INNER * WIDE + 12345):
        data = bytearray(out.read_bytes())
        data[info.begin + 2 * element] ^= 4
        (tmp_path / "wrong").mkdir(exist_ok=True)
        (tmp_path / "wrong" / "m.gguf").write_bytes(data)
        (wrong,) = infold.verify(file, adapter, tmp_path / "wrong" / "m.gguf").offenders
        place = [element // (INNER * WIDE), element // WIDE % INNER, element % WIDE]
        assert wrong.where == UP and f"{place}" in wrong.detail, wrong
