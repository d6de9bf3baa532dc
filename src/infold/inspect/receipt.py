"""A receipt as `infold inspect` shows it: every field there, and of its kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from infold.checkpoint.files import safe_child
from infold.checkpoint.shards import RECEIPT, companion, read_receipt
from infold.errors import CorruptFile

__all__ = ["checked_receipt"]

_TEXTS = {"": str}  # an object of texts, by any names
# field -> its type; a dict tells the fields of an object, a list of one the kind of its elements
_FIELDS: dict[str, Any] = {
    "infold": str,
    "base": {"path": str, "shards": _TEXTS},
    "adapters": [{"path": str, "method": str, "files": _TEXTS}],
    "shards": _TEXTS,
    "edits": [
        {
            "tensor": str, "dtype": str, "shape": [int], "source": {},
            "operations": [{"method": str, "adapter": int}], "unchanged": (int, float, type(None)),
        }
    ],
    "tensors": int,
    "bytes": int,
    "edited_bytes": int,
    "notes": [str],
    "seconds": (int, float),
    "peak_memory": int,
    "threads": int,
    "device": str,
}  # fmt: skip
_CONVERSION = {"mode": str, "dtype": str, "touched": [str], "beside": [str]}


def checked_receipt(folder: Path) -> dict[str, Any]:
    """The receipt of a merged model. Raises CorruptFile for one that infold does not write."""
    path = companion(folder, RECEIPT)
    safe_child(path.parent, path.name)
    receipt = read_receipt(folder)
    problems = _problems(receipt, _FIELDS, "") or _strangers(receipt)
    if receipt.get("conversion") is not None:  # older receipts do not have it
        problems += _problems(receipt["conversion"], _CONVERSION, "conversion")
    if problems:
        told = "; ".join(problems[:5]) + ("; ..." if len(problems) > 5 else "")
        raise CorruptFile(f"{path}: is not a receipt that infold writes: {told}")
    return receipt


def _problems(value: Any, kind: Any, where: str) -> list[str]:
    """How a value differs from its kind."""
    place = where or "it"
    if isinstance(kind, dict):
        if not isinstance(value, dict):
            return [f"{place} is no object"]
        if "" in kind:
            kind = dict.fromkeys(value, kind[""])
        lacking = [f"{where}{'.' if where else ''}{name}" for name in kind if name not in value]
        found = [f"lacks {', '.join(lacking)}"] if lacking else []
        for name, inner in kind.items():
            if name in value:
                found += _problems(value[name], inner, f"{where}.{name}" if where else name)
        return found
    if isinstance(kind, list):
        if not isinstance(value, list):
            return [f"{place} is no list"]
        return [
            told
            for number, element in enumerate(value)
            for told in _problems(element, kind[0], f"{where}[{number}]")
        ]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        return [f"{place} is {str(value)[:40]!r}"]
    return []


def _strangers(receipt: dict[str, Any]) -> list[str]:
    """Edits by adapters that the receipt does not name, or from nowhere."""
    count = len(receipt["adapters"])
    found = []
    for number, edit in enumerate(receipt["edits"]):
        source = edit["source"]
        whole = any(isinstance(source.get(n), str) for n in ("base", "key", "original", "decoded"))
        if "decoded" in source or "requantized" in source:
            told = (source.get("format", ""), source.get("requantized", ""))
            whole = whole and all(isinstance(text, str) for text in told)
            shares = (edit.get("error"), edit.get("update"))
            whole = whole and all(isinstance(share, int | float | None) for share in shares)
        numbers = [op["adapter"] for op in edit["operations"]]
        if "key" in source:
            numbers.append(source.get("adapter"))
        if not whole or any(type(n) is not int or not 0 <= n < count for n in numbers):
            found.append(f"edits[{number}] is made from nothing that it names")
        for op in edit["operations"]:
            side, scaling = op.get("side", ""), op.get("scaling", 1)
            if not isinstance(side, str) or not isinstance(scaling, int | float):
                found.append(f"edits[{number}] has an operation that no method makes")
    return found
