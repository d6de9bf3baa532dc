"""Room in the scales of NVFP4: what an adapter makes larger than a scale can be goes one level up.

E4M3 ends at 448, and quantizers give the largest block of a weight that scale. So where a vector
makes rows larger, all blocks of the weight give a power of two to the scale of the whole, which has
float32's range: `weight_scale / 2^k` and `weight_scale_2 * 2^k` are the same weight, but for scales
2^15 times smaller than the largest, which lose bits that were theirs.

Servers load some modules as one (q, k and v; gate and up; experts), with one scale of the whole for
all, so those beside it give the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from infold.adapters import METHODS
from infold.checkpoint.adapter import Adapter
from infold.formats import NoFold, Scale, e4m3, nvfp4
from infold.plan.convert import loaded_as
from infold.plan.draft import Draft

__all__ = ["make_room"]


def make_room(draft: Draft, adapters: Sequence[Adapter]) -> None:
    """Set the exponents of all block scales that could overflow, and of what makes up for them."""
    if not any(state.scales and state.dtype == e4m3.DTYPE for state in draft.states.values()):
        return
    scales: dict[str, Scale] = {}
    broken: dict[str, str] = {}
    for stored, form in draft.modules.all():
        if form is nvfp4:
            try:
                (scales[stored.name],) = nvfp4.scales(stored)
            except NoFold as error:
                broken[stored.name] = str(error)
    needed: dict[tuple[str, ...], int] = {}  # by what is loaded as one
    for name, scale in scales.items():
        least = _needed(draft, f"{name}.{scale.part}", adapters)
        key = loaded_as(name)
        if least > needed.get(key, 0):
            needed[key] = least
    beside = count = 0
    for name, scale in scales.items():
        if exponent := needed.get(loaded_as(name), 0):
            blocks, whole = (draft.state(f"{name}.{part}") for part in (scale.part, scale.over))
            blocks.scales = whole.scales = True
            blocks.exponent = -exponent
            whole.exponent = -exponent if scale.below else exponent
            count, beside = count + 1, beside + (not blocks.operations)
    draft.reasons += [
        f"{name}: {why}, but servers load it as one with weights whose scales have to change"
        for name, why in broken.items()
        if loaded_as(name) in needed
    ]
    if count:
        told = f", {beside} of them since servers load their weights as one with others"
        draft.notes.append(
            f"{count} weights (NVFP4) moved a power of two from the scales of their blocks, which "
            "may have no room to grow, to their scale of the whole" + (told if beside else "")
        )


def _needed(draft: Draft, tensor: str, adapters: Sequence[Adapter]) -> int:
    """A k >= 0 with which no scale can overflow, whatever it is now."""
    state = draft.states.get(tensor)
    peak = e4m3.LARGEST
    for op in state.operations if state else ():
        parts = {part: adapters[op.adapter].read(key) for part, key in op.parts.items()}
        peak = METHODS[op.method].bound(peak, parts, op.settings)
    if not e4m3.MIDDLE < peak < math.inf:  # what is not finite is refused later
        return 0
    return math.ceil(math.log2(peak / e4m3.MIDDLE))
