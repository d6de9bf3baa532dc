"""What a receipt tells of converted weights, in the words and figures that all verbs share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["conversion_figures", "conversion_text"]


def conversion_figures(receipt: Mapping[str, Any]) -> dict[str, Any] | None:
    """{mode, dtype, touched, beside, original, largest_error, least_update} of a receipt, or None
    where nothing was converted. touched, beside: numbers of weights. original: whether it was read.

    The shares are relative to the weights, in the Frobenius norm: the largest error against the
    exact merge, the least of the adapters' own updates. None after a resumed run, which lacks some.
    """
    told = receipt.get("conversion")
    if told is None:
        return None
    edits = receipt["edits"]
    errors = [edit["error"] for edit in edits if edit.get("error") is not None]
    updates = [edit["update"] for edit in edits if edit.get("update")]
    return {
        "mode": told["mode"],
        "dtype": told["dtype"],
        "touched": len(told["touched"]),
        "beside": len(told["beside"]),
        "original": told.get("original") is not None,
        "largest_error": max(errors, default=None),
        "least_update": min(updates, default=None),
    }


def conversion_text(receipt: Mapping[str, Any]) -> str | None:
    """How quantized weights were converted, and what it cost, as one sentence without an end."""
    told = conversion_figures(receipt)
    if told is None:
        return None
    touched, error = told["touched"], told["largest_error"]
    text = f"{touched:,} quantized weight{'' if touched == 1 else 's'}"
    if told["mode"] == "requantize":
        text += f" quantized again{' as ' + told['dtype'] if told['dtype'] else ''}"
    else:
        more = f" and {told['beside']:,} that are loaded with them" if told["beside"] else ""
        text += f"{more} written as {told['dtype']}"
    text += ", their values from the unquantized original" if told["original"] else ""
    if error is None:
        return f"{text}; how far they are from the exact merge is not known of a resumed one"
    text += f"; relative error against the exact merge at most {error:.2g}"
    least = told["least_update"]
    return text if least is None else f"{text}, the adapters' own updates {least:.2g} and more"
