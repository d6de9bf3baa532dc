"""Whether two names are of the same model: Hub ids, folders, files."""

from __future__ import annotations

import re

__all__ = ["kin", "names_a_model", "same"]

# Words that a copy's name gains or loses without its being another model.
_HARMLESS = frozenset(
    "hf safetensors bf16 fp16 fp32 f16 f32 bfloat16 float16 float32 copy local main merged sharded "
    "snapshot model gguf quantized bnb nf4 fp4 fp8 int8 int4 4bit 8bit gptq awq hqq eetq w4a16 "
    "w8a16 w8a8".split()
)
_SIZE = re.compile(r"\d+(\.\d+)?[bm]", re.IGNORECASE)  # 7B, 135M: the name of a model


def _words(name: str) -> set[str]:
    return set(re.split(r"[-_.\s/]+", name.rstrip("/").casefold())) - {""}


def _model(name: str) -> str:
    """The last component of a path or a Hub id, without the revision."""
    return name.rstrip("/").rpartition("/")[2].partition("@")[0]


def same(one: str, two: str) -> bool:
    """Whether two names differ by nothing but harmless words, or by the organisation's: some
    copies are called `org_model` or `org--model`."""
    organisation = _words(one.rpartition("/")[0]) | _words(two.rpartition("/")[0])
    return (_words(_model(one)) ^ _words(_model(two))) <= _HARMLESS | organisation


def kin(one: str, two: str) -> bool:
    """Whether both are names of models: they begin alike, or both tell a size."""
    first, second = _model(one), _model(two)
    if _SIZE.search(first) and _SIZE.search(second):
        return True
    begins = [re.split(r"[-_.\s]+", name.casefold())[0] for name in (first, second)]
    return begins[0] == begins[1] and begins[0] not in ("", "base", "checkpoint", *_HARMLESS)


def names_a_model(name: str) -> bool:
    """Whether a name is a Hub id, by its spelling: no path, and none that says nothing, such as
    `checkpoint-500`."""
    organisation, _, model = name.partition("/")
    if not model:
        model = name
    elif "/" in model or organisation in ("", ".", "..", "~"):
        return False
    first = re.split(r"[-_.\s]+", model.casefold())[0]
    silent = first == "checkpoint" or (model == name and first in ("", "base", *_HARMLESS))
    return "\\" not in name and not silent
