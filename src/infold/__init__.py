"""infold: fold trained adapters (IA³, LoRA, DoRA) into model weights, streamed, exact, proven.

    import infold
    receipt = infold.merge("base", ["adapter"], "merged")
    verdict = infold.verify("merged")

The functions below are the command line's verbs, with the same names and defaults. PyTorch is
imported when one of them is called. Each raises InfoldError and nothing else for what is wrong
with its input or the disk: Refusal (and CorruptFile, a kind of it) or StorageFailure.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from infold.errors import CorruptFile, InfoldError, ProofFailed, Refusal, StorageFailure
from infold.version import __version__

if TYPE_CHECKING:
    from infold.loop.run import Loop
    from infold.merge.receipt import Receipt
    from infold.merge.restore import Undone
    from infold.tuners.combine import Combined
    from infold.tuners.config import IA3Config, LoraConfig
    from infold.tuners.model import attach, load
    from infold.tuners.record import Training
    from infold.verify.verdict import Offender, Verdict

__all__ = [
    "Combined",
    "CorruptFile",
    "IA3Config",
    "InfoldError",
    "Loop",
    "LoraConfig",
    "Offender",
    "ProofFailed",
    "Receipt",
    "Refusal",
    "StorageFailure",
    "Training",
    "Undone",
    "Verdict",
    "__version__",
    "attach",
    "bench",
    "checklist",
    "combine",
    "deploy",
    "inspect",
    "load",
    "merge",
    "methods",
    "report",
    "swap",
    "train",
    "undo",
    "verify",
]

# A room and its verb share a name. Importing a package for the first time binds its name here, so
# do that now (the rooms' __init__ import nothing), and let the functions below take the names.
for _room in ("merge", "verify", "inspect", "bench", "methods", "deploy", "report"):
    import_module(f"infold.{_room}")

from infold.api.merging import combine, inspect, merge, swap, undo, verify  # noqa: E402
from infold.api.production import (  # noqa: E402
    bench,
    checklist,
    deploy,
    methods,
    report,
    train,
)

_TYPES = {
    "Combined": "tuners.combine",
    "IA3Config": "tuners.config",
    "Loop": "loop.run",
    "LoraConfig": "tuners.config",
    "Offender": "verify.verdict",
    "Receipt": "merge.receipt",
    "Training": "tuners.record",
    "Undone": "merge.restore",
    "Verdict": "verify.verdict",
    "attach": "tuners.model",
    "load": "tuners.model",
}


def __getattr__(name: str) -> Any:
    """Types of results, and the tuners, loaded when they are asked for."""
    if name not in _TYPES:
        raise AttributeError(f"module 'infold' has no attribute {name!r}")
    return getattr(import_module(f"infold.{_TYPES[name]}"), name)
