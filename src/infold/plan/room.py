"""Room in the scales of NVFP4: what an adapter makes larger than a scale can be goes one level up.

E4M3 ends at 448, and quantizers give the largest block of a weight that scale. So where a vector
makes rows larger, all blocks of the weight give a power of two to the scale of the whole, which has
float32's range: `weight_scale / 2^k` and `weight_scale_2 * 2^k` are the same weight, but for scales
2^15 times smaller than the largest, which lose bits that were theirs.

Servers load some modules as one (q, k and v; gate and up; experts), with one scale of the whole for
all, so those beside it give the same.
"""

from __future__ import annotations

from collections.abc import Sequence

from infold.adapters import METHODS
from infold.checkpoint.adapter import Adapter
from infold.formats import NoFold, Scale, e4m3
from infold.plan.convert import siblings
from infold.plan.draft import Draft

__all__ = ["make_room"]


def make_room(draft: Draft, adapters: Sequence[Adapter]) -> None:
    """Set the exponents of all block scales that could overflow, and of what makes up for them."""
    scales = _two_levels(draft)
    exponents: dict[str, int] = {}
    for name, scale in scales.items():
        needed = _needed(draft, f"{name}.{scale.part}", adapters)
        if needed:
            for module in {name, *siblings(name, scales)}:
                exponents[module] = max(needed, exponents.get(module, 0))
    for module, exponent in exponents.items():
        scale = scales[module]
        for part, power in (
            (scale.part, -exponent),
            (scale.over, -exponent if scale.below else exponent),
        ):
            state = draft.state(f"{module}.{part}")
            state.scales, state.exponent = True, power
    if exponents:
        beside = sum(not draft.states[f"{m}.{scales[m].part}"].operations for m in exponents)
        told = f", {beside} of them since servers load their weights as one with others"
        draft.notes.append(
            f"{len(exponents)} weights (NVFP4) moved a power of two from the scales of their "
            "blocks, which may have no room to grow, to their scale of the whole"
            + (told if beside else "")
        )


def _two_levels(draft: Draft) -> dict[str, Scale]:
    """Modules whose scales have a scale above them; none where no such scale is edited."""
    if not any(state.scales and state.dtype == e4m3.DTYPE for state in draft.states.values()):
        return {}
    found: dict[str, Scale] = {}
    for stored, form in draft.modules.all():
        try:
            for scale in form.scales(stored):
                if scale.over:
                    found[stored.name] = scale
        except NoFold:  # whatever is wrong with it: it is not edited
            continue
    return found


def _needed(draft: Draft, tensor: str, adapters: Sequence[Adapter]) -> int:
    """The least k >= 0 with which no scale can overflow, whatever it is now."""
    state = draft.states.get(tensor)
    peak = e4m3.LARGEST
    for op in state.operations if state else ():
        parts = {part: adapters[op.adapter].read(key) for part, key in op.parts.items()}
        peak = METHODS[op.method].bound(peak, parts, op.settings)
    exponent = 0
    while peak > e4m3.MIDDLE:
        peak, exponent = peak / 2, exponent + 1
    return exponent
