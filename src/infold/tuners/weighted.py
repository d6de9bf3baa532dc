"""Several adapters of a model in memory into one more: `infold combine`, by way of a folder.

Adapters are small, and so both ways share every rule: what combines, what is carried over, what is
refused, and the numbers.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infold.errors import Refusal
from infold.tuners import files
from infold.tuners.combine import plan_combination, write_combination
from infold.tuners.config import IA3Config

if TYPE_CHECKING:
    from infold.tuners.model import AdaptedModel

__all__ = ["add_weighted"]


def add_weighted(
    model: AdaptedModel,
    adapters: Sequence[str],
    weights: Sequence[float],
    name: str,
    kind: str | None,
    options: Mapping[str, Any],
) -> None:
    """Raises Refusal with all reasons; the model is unchanged then."""
    if kind is None:  # PEFT's own
        tuners = {type(model._attached.configs[adapter]) for adapter in adapters}
        kind = "linear" if tuners == {IA3Config} else "svd"
    with tempfile.TemporaryDirectory(prefix="infold-") as temporary:
        folder = Path(temporary)
        for adapter in adapters:  # "default" lies in the folder itself, others in one of theirs
            place = folder / adapter if adapter == "default" else folder
            files.save(model, place, [adapter], with_embeddings=False)
        try:
            plan = plan_combination([folder / a for a in adapters], weights, kind, **options)
            write_combination(plan, folder / "combined.out")
            trained = any(not model._attached.configs[a].inference_mode for a in adapters)
            model.load_adapter(folder / "combined.out", name, is_trainable=trained)
        except Refusal as refusal:
            reasons = [reason.replace(f"{folder}/", "") for reason in refusal.reasons]
            raise Refusal(reasons) from None
    for note in plan.notes:
        warnings.warn(note.replace(f"{folder}/", ""), stacklevel=3)
