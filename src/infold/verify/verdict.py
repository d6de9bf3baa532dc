"""What a verification found, as values. Needs no PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Offender", "Verdict"]


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
class Verdict:
    """What `infold.verify` found. JSON-ready by `dataclasses.asdict`.

    ok: whether there is no offender.
    tensors: how many there should be. identical: unedited and byte-equal to the base's.
    recomputed: edited and equal to what was computed anew.
    undecided: elements so near to a rounding boundary that either neighbour is right.
    files: side files that are as they must be.
    offenders: every difference. seconds: how long it took.
    """

    ok: bool
    tensors: int
    identical: int
    recomputed: int
    undecided: int
    files: int
    offenders: tuple[Offender, ...]
    seconds: float
