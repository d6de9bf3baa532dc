"""Broken safetensors headers: each is refused by name, soon, and nothing is left behind."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

import handmade
from hostile.conftest import Refused

FILE = "model.safetensors"


def entry(**changes: Any) -> dict[str, Any]:
    """A good entry for four F32 elements, with some fields exchanged."""
    return {"dtype": "F32", "shape": [4], "data_offsets": [0, 16], **changes}


BROKEN: dict[str, tuple[Any, int, str]] = {
    # name of the test: (header, bytes of data, what the message tells)
    "an array": ([], 0, "not a JSON object"),
    "a number": (b"17", 0, "not a JSON object"),
    "no JSON": (b"{'a': 1}", 0, "not valid JSON"),
    "nothing": (b"", 0, "not valid JSON"),
    "invalid UTF-8": (b'{"a\xff": 1}', 0, "not valid JSON"),
    "UTF-16": ("{}".encode("utf-16"), 0, "not valid JSON"),
    "a NaN literal": (b'{"a": NaN}', 0, "NaN is not JSON"),
    "an Infinity literal": (b'{"a": -Infinity}', 0, "-Infinity is not JSON"),
    "a lone surrogate": (b'{"\\ud800": {}}', 0, "is not printable text"),
    "a name that is a line of its own": ({"a\n  proven": entry()}, 16, "is not printable text"),
    "a name that moves the cursor": ({"a\x1b[2K": entry()}, 16, "is not printable text"),
    "a name of 65 components": ({"a." * 64 + "a": entry()}, 16, "has more than 64 components"),
    "a number of 5,000 digits": (b'{"a": ' + b"9" * 5000 + b"}", 0, "not valid JSON"),
    "two keys of one name": (
        b'{"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}, "a": 1}',
        0,
        "'a' stands twice",
    ),
    "two dtypes in one entry": (
        b'{"a": {"dtype": "F32", "dtype": "I8", "shape": [0], "data_offsets": [0, 0]}}',
        0,
        "'dtype' stands twice",
    ),
    "an entry that is a list": ({"a": []}, 0, "must have dtype, shape and data_offsets"),
    "an entry without a shape": ({"a": {"dtype": "F32", "data_offsets": [0, 0]}}, 0, "must have"),
    "an entry with an unknown field": ({"a": entry(strides=[1])}, 16, "and nothing else"),
    "an unknown dtype": ({"a": entry(dtype="F31")}, 16, "unknown dtype 'F31'"),
    "a dtype that is a list": ({"a": entry(dtype=["F32"])}, 16, "unknown dtype"),
    "a dtype of a megabyte": ({"a": entry(dtype="F" * (1 << 20))}, 16, "unknown dtype"),
    "metadata that is a list": ({"__metadata__": []}, 0, "__metadata__ must map"),
    "metadata that holds a number": ({"__metadata__": {"a": 1}}, 0, "__metadata__ must map"),
    "a negative dimension": ({"a": entry(shape=[-4])}, 16, "shape must be"),
    "two negative dimensions": ({"a": entry(shape=[-2, -2])}, 16, "shape must be"),
    "a dimension that is a float": ({"a": entry(shape=[4.0])}, 16, "shape must be"),
    "a dimension that is a bool": ({"a": entry(shape=[4, True])}, 16, "shape must be"),
    "a dimension that is a string": ({"a": entry(shape=["4"])}, 16, "shape must be"),
    "a dimension above 2^63": ({"a": entry(shape=[2**63])}, 16, "shape must be"),
    "a shape that is a number": ({"a": entry(shape=4)}, 16, "shape must be"),
    "a shape whose size wraps to 16": ({"a": entry(shape=[2**61, 2**61, 4])}, 16, "larger than"),
    "an impossible shape with a zero": (
        {"a": entry(shape=[2**62, 2**62, 0], data_offsets=[0, 0])},
        0,
        "larger than any file",
    ),
    "10,000 dimensions of 2^60": ({"a": entry(shape=[2**60] * 10_000)}, 16, "10,000 dimensions"),
    "fewer bytes than the shape": ({"a": entry(data_offsets=[0, 12])}, 12, "needs 16 bytes"),
    "more bytes than the shape": ({"a": entry(data_offsets=[0, 20])}, 20, "needs 16 bytes"),
    "half a byte": ({"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]}}, 1, "needs"),
    "offsets that are floats": ({"a": entry(data_offsets=[0.0, 16.0])}, 16, "data_offsets must"),
    "offsets that are bools": ({"a": entry(data_offsets=[False, 16])}, 16, "data_offsets must"),
    "negative offsets": ({"a": entry(data_offsets=[-16, 0])}, 16, "data_offsets must"),
    "offsets the wrong way round": ({"a": entry(data_offsets=[16, 0])}, 16, "needs 16 bytes"),
    "three offsets": ({"a": entry(data_offsets=[0, 16, 32])}, 16, "data_offsets must"),
    "offsets out of range": ({"a": entry(data_offsets=[2**40, 2**40 + 16])}, 16, "hole"),
    "a first tensor that starts late": ({"a": entry(data_offsets=[8, 24])}, 24, "leaves a hole"),
    "a hole": ({"a": entry(), "b": entry(data_offsets=[24, 40])}, 40, "'b' leaves a hole"),
    "an overlap": ({"a": entry(), "b": entry(data_offsets=[8, 24])}, 24, "'b' overlaps"),
    "two tensors in one place": ({"a": entry(), "b": entry()}, 16, "overlaps"),
    "bytes after the last tensor": ({"a": entry()}, 17, "bytes after the last tensor"),
    "truncated data": ({"a": entry()}, 15, "truncated"),
    "no data at all": ({"a": entry()}, 0, "truncated"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_header_is_refused_that_holds(
    case: str, base: Path, adapter: Path, refused: Refused
) -> None:
    header, count, told = BROKEN[case]
    handmade.raw_file(base / FILE, header, bytes(count))

    refused(base, adapter, str(base / FILE), told)


@pytest.mark.parametrize("case", BROKEN)
def test_the_same_header_is_refused_in_an_adapter(
    case: str, base: Path, adapter: Path, refused: Refused
) -> None:
    header, count, told = BROKEN[case]
    file = handmade.raw_file(adapter / "adapter_model.safetensors", header, bytes(count))

    refused(base, adapter, str(file), told)


def test_a_good_header_in_another_spelling_is_not_refused(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    """Spaces, odd key order and null metadata are fine: what is refused above is really broken."""
    good = (base / FILE).read_bytes()
    length = struct.unpack("<Q", good[:8])[0]
    fields = json.loads(good[8 : 8 + length])
    fields = {k: fields[k] for k in sorted(fields, reverse=True)} | {"__metadata__": None}
    for name, value in fields.items():
        if name != "__metadata__":
            fields[name] = {k: value[k] for k in ("shape", "data_offsets", "dtype")}
    text = json.dumps(fields, indent=3).encode() + b"   "
    import infold

    infold.merge(base, adapter, tmp_path / "one")
    handmade.raw_file(base / FILE, text, good[8 + length :])
    infold.merge(base, adapter, tmp_path / "two")

    one, two = ((tmp_path / n / FILE).read_bytes() for n in ("one", "two"))
    assert two[8 : 8 + len(text)] == text
    assert one[8 + length :] == two[8 + len(text) :]


@pytest.mark.parametrize("size", [0, 1, 7])
def test_a_file_shorter_than_its_length_field_is_refused(
    size: int, base: Path, adapter: Path, refused: Refused
) -> None:
    (base / FILE).write_bytes(bytes(size))

    refused(base, adapter, str(base / FILE), f"{size} bytes are too few")


def test_a_truncated_header_is_refused(base: Path, adapter: Path, refused: Refused) -> None:
    (base / FILE).write_bytes((base / FILE).read_bytes()[:100])

    refused(base, adapter, str(base / FILE), "header of", "truncated")


def test_every_truncation_of_a_file_is_refused(
    base: Path, adapter: Path, tmp_path: Path, refused: Refused
) -> None:
    whole = (base / FILE).read_bytes()
    for size in range(0, len(whole), max(1, len(whole) // 40)):
        (base / FILE).write_bytes(whole[:size])
        refused(base, adapter, str(base / FILE))
        (tmp_path / "result").rmdir()


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 100_000_001])
def test_a_header_length_beyond_any_file_is_refused(
    length: int, base: Path, adapter: Path, refused: Refused
) -> None:
    handmade.raw_file(base / FILE, {}, length=length)

    refused(base, adapter, str(base / FILE), f"header of {length:,} bytes")


def test_a_header_length_beyond_this_file_is_refused(
    base: Path, adapter: Path, refused: Refused
) -> None:
    handmade.raw_file(base / FILE, {}, length=99_000_000)

    refused(base, adapter, str(base / FILE), "header of 99,000,000 bytes in a file of 10")


def test_a_header_of_a_gigabyte_is_refused_unread(
    base: Path, adapter: Path, refused: Refused
) -> None:
    with open(base / FILE, "wb") as file:
        file.write(struct.pack("<Q", 1 << 30))
        file.truncate((1 << 30) + 8)  # sparse

    refused(base, adapter, str(base / FILE), "header of 1,073,741,824 bytes")


def test_a_header_of_zeros_within_the_limit_is_refused(
    base: Path, adapter: Path, refused: Refused
) -> None:
    with open(base / FILE, "wb") as file:
        file.write(struct.pack("<Q", 90_000_000))
        file.truncate(90_000_008)

    refused(base, adapter, str(base / FILE), "not valid JSON")


BOMBS = {
    "lists": b"[" * 200_000,
    "objects": b'{"a":' * 200_000,
    "closed lists": b"[" * 200_000 + b"]" * 200_000,
    "lists in an entry": b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
}


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize(
    "place", ["header", handmade.INDEX, "config.json", "adapter_config.json", "adapter header"]
)
def test_a_nesting_bomb_is_refused(
    bomb: str, place: str, sharded: Path, adapter: Path, refused: Refused
) -> None:
    file = (adapter if place.startswith("adapter") else sharded) / place
    if place == "header":
        file = handmade.raw_file(sharded / "model-00001-of-00002.safetensors", BOMBS[bomb])
    elif place == "adapter header":
        file = handmade.raw_file(adapter / "adapter_model.safetensors", BOMBS[bomb])
    else:
        file.write_bytes(BOMBS[bomb])

    refused(sharded, adapter, str(file), "nested too deeply")


def test_a_wide_header_stays_within_bounds(base: Path, adapter: Path, refused: Refused) -> None:
    """Millions of small values: much memory for few bytes, but not without limit."""
    handmade.raw_file(base / FILE, b'{"a":[' + b"[],[]," * 1_000_000 + b"0]}")

    refused(base, adapter, str(base / FILE), "'a': must have")


@pytest.mark.parametrize("name", [handmade.INDEX, "config.json", "adapter_config.json"])
def test_a_huge_json_file_is_refused_unread(
    name: str, sharded: Path, adapter: Path, refused: Refused
) -> None:
    file = (adapter if name.startswith("adapter") else sharded) / name
    with open(file, "wb") as stream:
        stream.truncate(8 << 30)  # sparse: nobody has to read it

    refused(sharded, adapter, str(file), "8,589,934,592 bytes; the limit")


@pytest.mark.parametrize("name", [handmade.INDEX, "config.json", "adapter_config.json"])
@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b'{"r": NaN}', b'{"r": 1, "r": 2}', b"[1]"])
def test_a_broken_json_file_is_refused(
    name: str, content: bytes, sharded: Path, adapter: Path, refused: Refused
) -> None:
    if name == "config.json" and b"NaN" in content:
        content = b"{"  # some models' configs hold NaN and Infinity; those are let through
    file = (adapter if name.startswith("adapter") else sharded) / name
    file.write_bytes(content)

    refused(sharded, adapter, str(file))


def test_a_tensor_without_elements_but_with_a_trillion_rows_takes_no_time(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    import infold

    random = torch.Generator().manual_seed(1)
    wide = torch.randn(16, 24, generator=random)
    header = {
        "q.weight": {"dtype": "F32", "shape": [16, 24], "data_offsets": [0, wide.nbytes]},
        "e.weight": {"dtype": "F32", "shape": [1 << 40, 0], "data_offsets": [wide.nbytes] * 2},
    }
    handmade.raw_file(base / FILE, header, wide.numpy().tobytes())
    vectors = {"q": torch.ones(16, 1), "e": torch.ones(1, 0)}
    scales = handmade.ia3(tmp_path / "ia3", vectors, feedforward_modules=["e"])

    infold.merge(base, scales, tmp_path / "out")

    assert (tmp_path / "out" / FILE).read_bytes() == (base / FILE).read_bytes()


def test_reading_a_file_without_permission_is_a_storage_failure(
    base: Path, adapter: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the superuser may read everything, the refusal of the system is played."""
    import infold

    real = os.open

    def denied(path: Any, *rest: Any, **more: Any) -> int:
        if str(path).endswith(FILE):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *rest, **more)

    monkeypatch.setattr(os, "open", denied)

    refused(base, adapter, str(base / FILE), "Permission denied", kind=infold.StorageFailure)
