"""IA³ into the scales of quantized weights: row maps, and where a vector goes."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch

from infold.adapters import METHODS, Settings
from infold.plan.edits import Operation
from infold.verify.reference import Values, reference_of

MAPS = {
    "plain": Settings(),
    "heads": Settings(view=(2, 2, 3), order=(0, 2, 1)),
    "blocks": Settings(repeat=4),
    "fused": Settings(first=5, rows=40),
    "squares": Settings(root=2),
    "all": Settings(view=(3, 2, 2), order=(2, 0, 1), root=2, first=12, rows=36, repeat=5),
}


def by_hand(vector: list[float], settings: Settings) -> list[float]:
    """The factor of each stored row, one by one."""
    if settings.order:
        grid = torch.tensor(vector, dtype=torch.float64).reshape(settings.view)
        vector = grid.permute(settings.order).reshape(-1).tolist()
    vector = [x ** (1 / settings.root) for x in vector]
    before = [1.0] * settings.first
    after = [1.0] * (max(settings.rows, len(vector)) - settings.first - len(vector))
    return [x for x in [*before, *vector, *after] for _ in range(settings.repeat)]


@pytest.mark.parametrize("name", MAPS)
def test_row_map(name: str) -> None:
    """The merge and the proof give each stored row the same element; the inverse takes it back."""
    settings = MAPS[name]
    vector = torch.rand(12, dtype=torch.float64) + 0.5
    wanted = torch.tensor(by_hand(vector.tolist(), settings), dtype=torch.float64)
    count = len(wanted)
    prepared = METHODS["ia3"].prepare({"ia3_l": vector[:, None]}, settings)
    operation = Operation("ia3", 0, "m", {"ia3_l": "k"}, settings)
    reference = reference_of(operation, {}, {"ia3_l": vector}, "F32")
    everything, columns = slice(None), slice(0, 3)

    found, bias = torch.ones(count, 3, dtype=torch.float64), torch.ones(count, dtype=torch.float64)
    prepared.weight(found, everything, columns)
    prepared.bias(bias, everything)
    some = torch.ones(count - 5, 3, dtype=torch.float64)
    prepared.weight(some, slice(3, count - 2), columns)
    few, which = torch.ones(4, 3, dtype=torch.float64), torch.tensor([count - 1, 0, 7, 7])
    prepared.weight(few, which, columns)
    stated = Values(torch.ones(count - 1, 3, dtype=torch.float64))
    reference.estimate(stated, slice(1, count), columns)
    single = Values(torch.ones(4, dtype=torch.float64))
    reference.settle(single, which, torch.zeros(4, dtype=torch.int64))

    torch.testing.assert_close(bias, wanted, rtol=1e-15, atol=0)
    assert torch.equal(found, bias[:, None].expand(-1, 3))
    assert torch.equal(some, found[3:-2])
    assert torch.equal(few, found[which])
    assert torch.equal(stated.x, found[1:])
    assert torch.equal(single.x, bias[which])
    inverse = prepared.inverse()
    assert inverse is not None
    inverse.weight(found, everything, columns)
    torch.testing.assert_close(found, torch.ones_like(found), rtol=1e-15, atol=0)


def test_row_maps_are_told_and_restored() -> None:
    """A receipt tells a row map only where there is one."""
    ia3 = METHODS["ia3"]
    assert ia3.describe(MAPS["plain"]) == {"side": "out"}
    assert ia3.describe(MAPS["fused"]) == {"side": "out", "first": 5, "rows": 40}
    assert ia3.describe(MAPS["heads"])["view"] == [2, 2, 3]
    assert Settings(**asdict(MAPS["all"])) == MAPS["all"]
