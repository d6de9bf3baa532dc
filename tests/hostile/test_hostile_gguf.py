"""Broken GGUF files: each is refused by name, soon, and nothing is left behind."""

from __future__ import annotations

import os
import random
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ggufs
import handmade
import infold
from hostile.conftest import Refused

U32, F32, BOOL, STRING, ARRAY, U64 = 4, 6, 7, 8, 9, 10
Q8_0, DENSE = 8, 0


def text(value: str | bytes, length: int | None = None) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(
    name: str | bytes = "blk.0.attn_v.weight",
    shape: tuple[int, ...] = (32, 4),
    kind: int = Q8_0,
    offset: int = 0,
    dimensions: int | None = None,
) -> bytes:
    """`shape` as GGUF has it, the fastest dimension first."""
    count = len(shape) if dimensions is None else dimensions
    return (
        text(name)
        + struct.pack(f"<I{len(shape)}Q", count, *shape)
        + struct.pack("<IQ", kind, offset)
    )


LLAMA = key("general.architecture", STRING, text("llama"))
GOOD = dict(keys=[LLAMA], tensors=[tensor()], data=136)


def raw(
    *,
    keys: list[bytes] = [LLAMA],  # noqa: B006
    tensors: list[bytes] = [],  # noqa: B006
    data: int = 0,
    magic: bytes = b"GGUF",
    version: bytes = struct.pack("<I", 3),
    counts: tuple[int, int] | None = None,
    align: int = 32,
    after: bytes = b"",
) -> bytes:
    """A file; `data`: bytes of its data area."""
    told = counts or (len(tensors), len(keys))
    head = magic + version + struct.pack("<QQ", *told) + b"".join([*keys, *tensors])
    return head + b"\0" * (-len(head) % align if tensors or data else 0) + b"\1" * data + after


def array(kind: int, count: int, content: bytes = b"") -> bytes:
    return key("tokens", ARRAY, struct.pack("<IQ", kind, count) + content)


def alignment(value: int) -> bytes:
    return key("general.alignment", U32, struct.pack("<I", value))


TWO = ("blk.0.attn_v.weight", "blk.0.attn_q.weight")
BROKEN: dict[str, tuple[bytes, str]] = {
    # name of the test: (file, what the message tells)
    "nothing": (b"", "0 bytes are too few"),
    "a few bytes": (b"GGUF\3\0\0\0", "8 bytes are too few"),
    "another magic": (raw(magic=b"GGML"), "does not begin with GGUF"),
    "safetensors inside": (struct.pack("<Q", 300) + b" " * 300, "does not begin with GGUF"),
    "version 1": (raw(version=struct.pack("<I", 1)), "GGUF version 1; infold reads 2 and 3"),
    "version 4": (raw(version=struct.pack("<I", 4)), "GGUF version 4"),
    "big-endian": (raw(version=struct.pack(">I", 3)), "big-endian"),
    "more keys than there are": (raw(counts=(0, 2)), "its header needs"),
    "a billion keys": (raw(counts=(0, 10**9)), "1,000,000,000 keys; the limit"),
    "2^63 tensors": (raw(counts=(1 << 63, 1)), "tensors and 1 keys; the limit"),
    "a million tensors that are not there": (raw(counts=(1 << 20, 1)), "its header needs"),
    "a key twice": (raw(keys=[LLAMA, LLAMA]), "'general.architecture' stands twice"),
    "a key without a name": (raw(keys=[key("", BOOL, b"\1")]), "is not printable text"),
    "a key that is not UTF-8": (raw(keys=[key(b"\xff\xfe", BOOL, b"\1")]), "not printable text"),
    "a key with a NUL": (raw(keys=[key("a\0b", BOOL, b"\1")]), "not printable text"),
    "a key of 2^60 bytes": (raw(keys=[text("a", 1 << 60)]), "its header needs"),
    "a key of a megabyte": (raw(keys=[key("a" * (1 << 20), BOOL, b"\1")]), "a key of 1,048,576"),
    "a value of an unknown type": (raw(keys=[key("a", 13, b"\0" * 8)]), "the unknown type 13"),
    "a value of type 2^32 - 1": (raw(keys=[key("a", 2**32 - 1, b"")]), "unknown type 4294967295"),
    "a text of 2^63 bytes": (raw(keys=[key("a", STRING, text("", 1 << 63))]), "its header needs"),
    "an array of arrays": (raw(keys=[array(ARRAY, 1)]), "an array of the unknown type 9"),
    "2^60 numbers": (raw(keys=[array(U32, 1 << 60)]), "its header needs"),
    "2^62 doubles, which wrap": (raw(keys=[array(12, 1 << 61)]), "its header needs"),
    "2^61 strings": (raw(keys=[array(STRING, 1 << 61)]), "strings, which do not fit"),
    "a string that ends elsewhere": (
        raw(keys=[array(STRING, 2, text("a") + text("b", 1 << 50))]), "its header needs",
    ),
    "an alignment of 0": (raw(keys=[alignment(0)]), "general.alignment = 0 is not a power"),
    "an alignment of 24": (raw(keys=[alignment(24)]), "general.alignment = 24"),
    "an alignment of 2^31": (raw(keys=[alignment(1 << 31)]), "general.alignment"),
    "an alignment that is text": (
        raw(keys=[key("general.alignment", STRING, text("32"))]), "general.alignment = '32'",
    ),
    "a tensor twice": (
        raw(tensors=[tensor(), tensor(offset=160)], data=320), "attn_v.weight' stands twice",
    ),
    "a tensor without a name": (raw(tensors=[tensor(name="")], data=136), "not printable text"),
    "a tensor of 65 components": (
        raw(tensors=[tensor(name="a." * 64 + "a")], data=136), "has more than 64 components",
    ),
    "five dimensions": (
        raw(tensors=[tensor(shape=(32, 1, 1, 1, 1))], data=34), "5 dimensions; the limit is 4",
    ),
    "a billion dimensions": (
        raw(tensors=[tensor(dimensions=10**9)], data=136), "1,000,000,000 dimensions",
    ),
    "an unknown type": (raw(tensors=[tensor(kind=99)], data=136), "has the type 99"),
    "a type that ggml dropped": (raw(tensors=[tensor(kind=4)], data=136), "has the type 4"),
    "rows that are no whole blocks": (
        raw(tensors=[tensor(shape=(33, 4))], data=200), "rows of 33 elements are no whole blocks",
    ),
    "a size that wraps to 0": (
        raw(tensors=[tensor(shape=(1 << 32, 1 << 32))], data=0), "larger than any file",
    ),
    "a size that wraps to 136": (
        raw(tensors=[tensor(shape=(1 << 60, 16, 16))], data=136), "larger than any file",
    ),
    "an impossible shape with a zero": (
        raw(tensors=[tensor(shape=(1 << 62, 1 << 62, 0), kind=DENSE)]), "larger than any file",
    ),
    "an offset near 2^64": (raw(tensors=[tensor(offset=2**64 - 64)], data=136), "beyond any file"),
    "an offset that is not aligned": (
        raw(tensors=[tensor(offset=16)], data=160), "does not begin at a multiple of 32",
    ),
    "a first tensor that starts late": (raw(tensors=[tensor(offset=32)], data=168), "a hole"),
    "a hole": (
        raw(tensors=[tensor(TWO[0]), tensor(TWO[1], offset=192)], data=352), "leaves a hole",
    ),
    "an overlap": (
        raw(tensors=[tensor(TWO[0]), tensor(TWO[1], offset=128)], data=352), "overlaps",
    ),
    "two at one place": (raw(tensors=[tensor(TWO[0]), tensor(TWO[1])], data=136), "overlaps"),
    "data that is cut off": (raw(tensors=[tensor()], data=135), "the file is truncated"),
    "bytes after the last tensor": (
        raw(tensors=[tensor()], data=161), "has bytes after the last tensor",
    ),
    "a file after the file": (raw(tensors=[tensor()], data=160, after=raw()), "has bytes after"),
    "a part of nothing": (
        raw(keys=[LLAMA, key("split.count", U32, struct.pack("<I", 2)),
                  key("split.no", U32, struct.pack("<I", 2))], tensors=[tensor()], data=136),
        "split.no = 2 of split.count = 2",
    ),
    "parts that are not named": (
        raw(keys=[LLAMA, key("split.count", U32, struct.pack("<I", 2))],
            tensors=[tensor()], data=136),
        "is one of 2 parts; give the first",
    ),
}  # fmt: skip


@pytest.fixture
def scales(tmp_path: Path) -> Path:
    return handmade.ia3(
        tmp_path / "scales", {"model.layers.0.self_attn.v_proj": torch.full((4, 1), 2.0)}
    )


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def test_the_good_file_is_good(tmp_path: Path, scales: Path) -> None:
    """Else the broken ones may be refused for another reason."""
    for size in (136, 160):  # with padding at the end, and without
        file = write(tmp_path / f"{size}.gguf", raw(**{**GOOD, "data": size}))
        infold.merge(file, scales, tmp_path / f"{size}-merged.gguf")
        assert infold.verify(tmp_path / f"{size}-merged.gguf").ok


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused(
    name: str, tmp_path: Path, scales: Path, refused: Refused
) -> None:
    data, told = BROKEN[name]
    file = write(tmp_path / "base" / "model.gguf", data)

    refused(file, scales, str(file), told, kind=infold.Refusal)


def test_a_large_vocabulary_takes_no_memory(tmp_path: Path, scales: Path, refused: Refused) -> None:
    """Three million empty strings, and then something broken."""
    keys = [LLAMA, array(STRING, 3_000_000, b"\0" * 24_000_000), key("a", 13, b"")]
    file = write(tmp_path / "model.gguf", raw(keys=keys))

    refused(file, scales, "the unknown type 13")


def test_experts_without_elements_take_no_memory(tmp_path: Path) -> None:
    """A few bytes of file for each tensor of 65,536 experts, each a module with a name."""
    names = [f"blk.{layer}.ffn_up_exps.weight" for layer in range(3)]
    tensors = [tensor(name, (0, 0, 1 << 16), DENSE) for name in names]
    file = write(tmp_path / "model.gguf", raw(tensors=tensors))

    tracemalloc.start()
    try:
        assert infold.inspect(file)["tensors"] == 3
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
    finally:
        tracemalloc.stop()


def test_more_experts_than_any_model_has_are_refused(
    tmp_path: Path, scales: Path, refused: Refused
) -> None:
    names = [f"blk.{layer}.ffn_up_exps.weight" for layer in range(5)]
    size, int8 = 1 << 16, 24
    tensors = [tensor(name, (1, 1, size), int8, n * size) for n, name in enumerate(names)]
    file = write(tmp_path / "model.gguf", raw(tensors=tensors, data=len(names) * size))

    refused(file, scales, "has more than 262,144 experts")
    with pytest.raises(infold.CorruptFile, match="has more than 262,144 experts"):
        infold.inspect(file)


def test_a_header_beyond_the_limit(tmp_path: Path, scales: Path, refused: Refused) -> None:
    keys = [LLAMA, array(0, 8 << 30)]
    file = write(tmp_path / "model.gguf", raw(keys=keys))
    with open(file, "r+b") as stream:
        stream.truncate(16 << 30)  # sparse: nobody has to read it

    refused(file, scales, "bytes or more; the limit is 100,000,000")


@pytest.mark.parametrize("what", ["fifo", "folder", "dangling link", "device"])
def test_what_is_no_file(what: str, tmp_path: Path, scales: Path, refused: Refused) -> None:
    place = tmp_path / "base" / "model.gguf"
    place.parent.mkdir()
    make: dict[str, Callable[[], Any]] = {
        "fifo": lambda: os.mkfifo(place),
        "folder": lambda: place.mkdir(),
        "dangling link": lambda: place.symlink_to("nowhere"),
        "device": lambda: place.symlink_to("/dev/zero"),
    }
    make[what]()

    refused(place, scales, str(place), kind=infold.Refusal)


def test_a_part_that_leads_out_of_the_folder(
    tmp_path: Path, scales: Path, refused: Refused
) -> None:
    tensors = {f"blk.{n}.attn_v.weight": ggufs.encode(np.ones((4, 32)), "Q8_0") for n in range(2)}
    first = ggufs.write(tmp_path / "base" / "m.gguf", "llama", tensors, parts=2)
    second = first.with_name("m-00002-of-00002.gguf")
    shutil.move(second, tmp_path / "secret.gguf")
    second.symlink_to(tmp_path / "secret.gguf")

    refused(first, scales, "a link that leads out of the folder")


@pytest.mark.parametrize("wrong", ["missing", "another part", "fewer tensors"])
def test_parts_that_do_not_fit(wrong: str, tmp_path: Path, scales: Path, refused: Refused) -> None:
    tensors = {f"blk.{n}.attn_v.weight": ggufs.encode(np.ones((4, 32)), "Q8_0") for n in range(2)}
    first = ggufs.write(tmp_path / "base" / "m.gguf", "llama", tensors, parts=2)
    second = first.with_name("m-00002-of-00002.gguf")
    told = {"missing": "not there", "another part": "another part", "fewer tensors": "2 tensors"}
    if wrong == "missing":
        second.unlink()
    elif wrong == "another part":
        shutil.copy(first, second)
    else:
        keys = [LLAMA, key("split.count", U32, struct.pack("<I", 2)),
                key("split.no", U32, struct.pack("<I", 1))]  # fmt: skip
        second.write_bytes(raw(keys=keys))

    refused(first, scales, told[wrong])


def test_any_byte_of_a_header(tmp_path: Path, scales: Path) -> None:
    """Whatever is in it: a merge, or a refusal; and what is merged is proven."""
    good, chance = bytearray(raw(**GOOD)), random.Random(5)
    size = len(good) - 136
    for number in range(300):
        data = bytearray(good)
        for _ in range(chance.choice((1, 1, 2, 8))):
            data[chance.randrange(size)] = chance.choice((0, 1, 0x7F, 0x80, 0xFF))
        file = write(tmp_path / f"{number}.gguf", bytes(data[: chance.choice((size, len(data)))]))
        out = tmp_path / f"{number}-merged.gguf"
        try:
            infold.merge(file, scales, out)
        except infold.Refusal:
            assert not out.exists()
        else:
            assert infold.verify(file, scales, out).ok
