"""What a verification found, as values. Needs no PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Check", "Continuation", "Difference", "Offender", "Outputs", "Verdict"]


@dataclass(frozen=True)
class Offender:
    """One thing that is not as it must be.

    what: its kind, such as "edited tensor", "unedited tensor", "missing file", "digest".
    where: the name of the tensor or of the file.
    detail: how it differs: how many elements, the first of them, what was stored and expected.
    """

    what: str
    where: str
    detail: str


@dataclass(frozen=True)
class Difference:
    """Two models over the same positions.

    largest, mean: of |logit difference|. kl, largest_kl: KL(first ‖ second) of one position in
    nats, mean and largest. agreement: the share of positions whose most probable token is the same.
    widest: the largest gap, in logits, between the first model's two best tokens at a position
    where the second has another best. positions: how many.
    """

    largest: float
    mean: float
    kl: float
    largest_kl: float
    agreement: float
    widest: float
    positions: int


@dataclass(frozen=True)
class Check:
    """One bound. what: in words. measured, bound: numbers of one unit; ok: measured <= bound."""

    what: str
    measured: float
    bound: float
    ok: bool


@dataclass(frozen=True)
class Continuation:
    """What both models make of a prompt, greedily.

    adapter, merged: texts. tokens: how many the adapter's model made. differs_at: the number of
    the first token that differs, from 0 on, or None. margin: there, by how many logits the token of
    the adapter's model led its second best; 0 where nothing differs.
    """

    prompt: str
    adapter: str
    merged: str
    tokens: int
    differs_at: int | None
    margin: float


@dataclass(frozen=True)
class Outputs:
    """What running the models found. All of it was computed in float32.

    checks: the bounds, each with what was measured. differences: the Difference of two models, by
    name: "merged" (adapter mode and the merged folder), "predicted" (adapter mode and the control,
    merged in memory and rounded to the stored dtype), "control" (the control and the merged
    folder), "arithmetic" (adapter mode and the control merged in float32), "unit" (that one, and
    it with every weight moved by a unit in float32's last place), "effect" (adapter mode and base).
    Of a quantized model there is no control: "predicted" is what the largest rounding error of a
    scale, in every weight of the quantized layers, does to the control merged in float32.
    perplexity: of base, adapter and merged on the text. tokens: of that text.
    continuations: greedy ones. notes: what deserves a look. device: what computed.
    kind, version: of this record.
    """

    ok: bool
    checks: tuple[Check, ...]
    differences: dict[str, Difference]
    perplexity: dict[str, float]
    tokens: int
    continuations: tuple[Continuation, ...]
    notes: tuple[str, ...]
    device: str
    seconds: float
    kind: str = "outputs"
    version: int = 1


@dataclass(frozen=True)
class Verdict:
    """What `infold.verify` found. JSON-ready by `dataclasses.asdict`.

    ok: whether there is no offender.
    tensors: how many there should be. identical: unedited and byte-equal to the base's.
    recomputed: edited and equal to what was computed anew.
    undecided: elements so near to a rounding boundary that either neighbour is right.
    files: side files that are as they must be.
    offenders: every difference. seconds: how long it took.
    outputs: what running the models found, where it was asked for; its failures are not offenders.
    """

    ok: bool
    tensors: int
    identical: int
    recomputed: int
    undecided: int
    files: int
    offenders: tuple[Offender, ...]
    seconds: float
    outputs: Outputs | None = None
