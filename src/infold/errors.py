"""What can go wrong, as types. Each carries the exit code of the process that ends with it.

InfoldError
├── ProofFailed     1   the merged model is not what base and adapters make
├── Refusal         2   wrong or unsupported input; lists every offender; there is no output
│   ├── CorruptFile 2   a file breaks its format's rules
│   └── NotFinite   2   a value of one tensor; a merge tells those of all tensors as one Refusal
└── StorageFailure  3   the operating system said no: space, permission, a file that went away

Any other exception is a bug in infold; the command ends with 70 then.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = [
    "CorruptFile",
    "InfoldError",
    "NotFinite",
    "ProofFailed",
    "Refusal",
    "StorageFailure",
]


class InfoldError(Exception):
    """The root of all errors that infold raises on purpose."""

    exit_code = 2


class ProofFailed(InfoldError):
    """The merged model differs from what base and adapters make."""

    exit_code = 1


class Refusal(InfoldError):
    """The input cannot be merged rightly. Lists all reasons: what, where and what to do."""

    exit_code = 2

    def __init__(self, reasons: str | Iterable[str]) -> None:
        self.reasons = (reasons,) if isinstance(reasons, str) else tuple(reasons)
        super().__init__("\n".join(self.reasons))


class CorruptFile(Refusal):
    """A file breaks its format's rules: truncated, overlapping, out of range, not JSON."""


class NotFinite(Refusal):
    """A value of `tensor` is NaN or infinite, or does not fit its dtype.

    position: (row, column) of the tensor's matrix. where, why: told of each tensor; advice: once.
    """

    def __init__(
        self, tensor: str, position: tuple[int, int], where: str, why: str, advice: str
    ) -> None:
        self.tensor, self.position, self.advice = tensor, position, advice
        self.short = f"{where}: {why}"
        super().__init__(f"{self.short}, so nothing was merged; {advice}")


class StorageFailure(InfoldError):
    """Reading or writing failed for a reason outside of the files' contents."""

    exit_code = 3
