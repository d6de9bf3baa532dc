"""What is to happen to quantized modules that an adapter does not fold into, as it is asked for."""

from __future__ import annotations

import os
from dataclasses import dataclass

from infold.checkpoint.shards import open_checkpoint
from infold.errors import Refusal
from infold.plan.choice import DTYPES, MODES, TYPES, Choice

__all__ = ["Options", "check_in_place"]


def check_in_place(force: bool, sha256: bool = False) -> None:
    """Refuse what only a new output can have."""
    given = [name for name, wanted in (("--force", force), ("--sha256", sha256)) if wanted]
    if given:
        raise Refusal(f"{', '.join(given)} with --in-place: goes with --out alone")


@dataclass(frozen=True)
class Options:
    """The options of the command line and of `infold.merge`, by their names."""

    promote: bool = False
    dequantize: bool = False
    requantize: bool = False
    dtype: str = "auto"
    base_16bit: str | os.PathLike[str] | None = None
    lossy: bool = False  # whether scales of four bits may be rounded

    def check_in_place(self) -> None:
        """Refuse what an edit in place cannot do: it changes no dtypes and no codes."""
        given = [
            f"--{name.replace('_', '-')}" for name in (*MODES, "base_16bit") if getattr(self, name)
        ]
        if given:
            raise Refusal(
                f"{', '.join(given)} with --in-place: give --out, which goes with --undo too; an "
                "edit in place changes neither dtypes nor codes"
            )

    def check(self) -> None:
        """Refuse what does not go together, whatever the base is."""
        modes = [mode for mode in MODES if getattr(self, mode)]
        if len(modes) > 1:
            told = " and ".join(f"--{mode}" for mode in modes)
            raise Refusal(f"{told} exclude each other")
        if self.dtype != "auto" and self.dtype not in {**DTYPES, **TYPES}:
            raise Refusal(f"--dtype {self.dtype}: auto, {', '.join([*DTYPES, *TYPES])}")
        if not modes:
            if self.base_16bit is not None:
                raise Refusal("--base-16bit goes with --dequantize or --requantize")
            if self.dtype != "auto":
                raise Refusal("--dtype goes with --dequantize, --requantize or --promote")
            return
        if self.requantize and self.dtype in DTYPES:
            raise Refusal(f"--dtype {self.dtype} goes with --dequantize or --promote")
        if not self.requantize and self.dtype in TYPES:
            raise Refusal(f"--dtype {self.dtype} goes with --requantize")
        if self.promote and self.base_16bit is not None:
            raise Refusal("--base-16bit goes with --dequantize or --requantize")

    def choice(self) -> Choice | None:
        """None where nothing was asked for. Raises as `check` does."""
        self.check()
        modes = [mode for mode in MODES if getattr(self, mode)]
        if not modes:
            return None
        original = None if self.base_16bit is None else open_checkpoint(self.base_16bit)
        return Choice(modes[0], {**DTYPES, **TYPES}.get(self.dtype, ""), original)
