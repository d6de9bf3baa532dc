"""Writing past the page cache, and sharing blocks, give the bytes that plain writing gives."""

from __future__ import annotations

import errno
import fcntl
import itertools
import mmap
import os
import random
import struct
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import handmade
import infold
from infold.checkpoint import direct
from infold.checkpoint.direct import ALIGN, OutputFile, Pace
from infold.errors import StorageFailure
from infold.merge import chain, prepare, stream

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="O_DIRECT and FICLONERANGE")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "LEAST", ALIGN)


@pytest.fixture
def output(tmp_path: Path) -> Iterator[OutputFile]:
    path = tmp_path / "file"
    made = OutputFile(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), path, Pace())
    yield made
    made.close()


@pytest.fixture
def past_the_cache(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of every write to a descriptor with O_DIRECT."""
    counts: list[int] = []
    real = os.pwrite

    def pwrite(fd: int, data: Any, offset: int) -> int:
        done = real(fd, data, offset)
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            counts.append(done)
        return done

    monkeypatch.setattr(os, "pwrite", pwrite)
    return counts


def aligned(data: bytes, offset: int) -> memoryview:
    """The bytes, where a write to that offset can take them from."""
    begin = offset % ALIGN
    view = memoryview(mmap.mmap(-1, begin + len(data)))[begin:]
    view[:] = data
    return view


def test_pieces_of_any_place_and_length(
    output: OutputFile, small: None, past_the_cache: list[int]
) -> None:
    dice = random.Random(1)
    whole = dice.randbytes(300_001)
    cuts = sorted({0, len(whole), *(dice.randrange(len(whole)) for _ in range(30)), 8192, 40960})
    pieces = list(itertools.pairwise(cuts))
    dice.shuffle(pieces)

    def write(piece: tuple[int, int]) -> None:
        output.write(aligned(whole[slice(*piece)], piece[0]), piece[0], aligned=True)

    with ThreadPoolExecutor(4) as pool:
        told = sorted(pieces)[9][1]
        list(pool.map(write, (piece for piece in pieces if piece[1] <= told)))
        output.flush(told)
        assert output.path.read_bytes()[:told] == whole[:told]
        list(pool.map(write, (piece for piece in pieces if piece[1] > told)))
    output.flush(len(whole))

    assert output.path.read_bytes() == whole
    if not past_the_cache:
        pytest.skip("this file system has no O_DIRECT")
    assert sum(past_the_cache) > 150_000


def test_where_the_system_wants_other_pieces_they_go_the_usual_way(
    output: OutputFile, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, real = random.Random(2).randbytes(50_000), os.pwrite

    def pwrite(fd: int, view: Any, offset: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            if offset:
                raise OSError(errno.EINVAL, "unaligned")
            return real(fd, view[:8192], offset)
        return real(fd, view, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    output.write(aligned(data, 0), 0, aligned=True)
    output.flush(len(data))

    assert output.path.read_bytes() == data
    assert not output.pace.pays


def test_a_block_that_two_pieces_share_is_written_when_it_is_told_of(
    output: OutputFile, small: None, past_the_cache: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, usual, real = random.Random(3).randbytes(5 * ALIGN), [], os.pwrite

    def pwrite(fd: int, view: Any, offset: int) -> int:
        usual.append((offset, len(view)))
        return real(fd, view, offset)

    cut = 2 * ALIGN + 100
    output.write(aligned(data[:cut], 0), 0, aligned=True)
    output.write(aligned(data[cut:], cut), cut, aligned=True)
    if not past_the_cache:
        pytest.skip("this file system has no O_DIRECT")
    monkeypatch.setattr(os, "pwrite", pwrite)
    output.flush(cut)
    output.flush(len(data))
    output.flush(len(data))

    assert usual == [(2 * ALIGN, 100), (2 * ALIGN, ALIGN)]
    assert output.path.read_bytes() == data


def test_a_full_disk_is_one_clear_line(
    output: OutputFile, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pwrite(fd: int, view: Any, offset: int) -> int:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(StorageFailure, match="no space left on the disk"):
        output.write(aligned(bytes(20_000), 4096), 4096, aligned=True)


def test_a_slow_disk_gets_the_rest_through_the_cache() -> None:
    pace = Pace()
    pace.judge(direct._TRIAL // 2, 10.0)
    assert pace.pays, "one piece tells nothing"
    pace.judge(direct._TRIAL, 10.0)
    assert not pace.pays
    pace.judge(1 << 40, 0.1)
    assert not pace.pays

    fast = Pace()
    for _ in range(10):
        fast.judge(32 << 20, 0.02)
    assert fast.pays


@pytest.mark.parametrize(("offset", "count"), [(0, 8192), (5000, 20_000), (4096, 4097), (9, 4000)])
def test_a_range_is_shared_in_whole_blocks(
    offset: int, count: int, output: OutputFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a file system that shares blocks, which few test machines have: played here."""
    other = tmp_path / "source"
    data = random.Random(3).randbytes(40_000)
    other.write_bytes(data)
    shared = []

    def ioctl(fd: int, request: int, order: bytes) -> int:
        source, source_offset, length, target = struct.unpack("qQQQ", order)
        assert (fd, request) == (output.fd, 0x4020940D)
        assert not source_offset % ALIGN and not length % ALIGN and not target % ALIGN
        assert length  # 0 would mean: up to the end
        os.pwrite(fd, os.pread(source, length, source_offset), target)
        shared.append(length)
        return 0

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    with open(other, "rb") as source:
        for move in (ALIGN, 0, -ALIGN, 1):
            at = offset + move
            if at < 0:
                continue
            os.ftruncate(output.fd, 0)
            done = output.clone(source.fileno(), offset, at, count)
            fits = move != 1 and (count - -at % ALIGN) >= ALIGN
            assert done == fits
            if fits:
                assert output.path.read_bytes()[at:] == data[offset : offset + count]
    assert bool(shared) == (count > 4000)


def test_without_shared_blocks_nothing_is_written(output: OutputFile, tmp_path: Path) -> None:
    """On this file system, or by the answer that others give."""
    with open(__file__, "rb") as source, pytest.MonkeyPatch.context() as patch:

        def ioctl(*_: Any) -> int:
            raise OSError(errno.EOPNOTSUPP, "no")

        patch.setattr(fcntl, "ioctl", ioctl)
        assert not output.clone(source.fileno(), 0, 0, 4096)
        patch.undo()
        assert not output.clone(source.fileno(), 0, 0, 4096), "it is not asked again"
    assert output.path.stat().st_size == 0


def test_a_merge_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, past_the_cache: list[int]
) -> None:
    """Edited and unedited tensors, with offsets that fit no block of the disk."""
    numbers = torch.Generator().manual_seed(3)
    shapes = {"a.embed": (300, 71), "b.q_proj": (256, 133), "c.k_proj": (256, 133), "d.x": (77, 99)}
    tensors = {f"{n}.weight": torch.randn(*s, generator=numbers) for n, s in shapes.items()}
    tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    base = handmade.base_folder(tmp_path / "base", tensors, shards=1)
    adapter = handmade.lora(tmp_path / "adapter", {n: (256, 133) for n in ("b.q_proj", "c.k_proj")})
    usual = infold.merge(base, adapter, tmp_path / "usual", undo=True)
    assert not past_the_cache

    monkeypatch.setattr(direct, "LEAST", ALIGN)
    monkeypatch.setattr(prepare, "_BLOCK", 8192)
    monkeypatch.setattr(prepare, "_SMALLEST_BLOCK", 8192)
    direct_one = infold.merge(base, adapter, tmp_path / "direct", undo=True, threads=3)

    assert direct_one.shards == usual.shards
    for name in usual.shards:
        assert (tmp_path / "direct" / name).read_bytes() == (tmp_path / "usual" / name).read_bytes()
    assert infold.verify(base, [adapter], tmp_path / "direct").ok
    infold.undo(tmp_path / "direct", tmp_path / "back")
    name = next(iter(usual.shards))
    assert (tmp_path / "back" / name).read_bytes() == (base / name).read_bytes()
    if not past_the_cache:
        pytest.skip("this file system has no O_DIRECT")
    assert sum(past_the_cache) > 100_000


def test_nothing_is_told_to_the_journal_before_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: None, past_the_cache: list[int]
) -> None:
    """Hashing does not wait for the disk; the keeper must."""
    tensors = {f"{n}.weight": torch.ones(256, 64).bfloat16() for n in ("b.q_proj", "c.k_proj")}
    base = handmade.base_folder(tmp_path / "base", tensors, shards=1)
    adapter = handmade.lora(tmp_path / "adapter", {n: (256, 64) for n in ("b.q_proj", "c.k_proj")})
    monkeypatch.setattr(prepare, "_BLOCK", 8192)
    monkeypatch.setattr(prepare, "_SMALLEST_BLOCK", 8192)
    monkeypatch.setattr(stream, "KEEP_EVERY", 1)
    done: list[int] = []
    ends: list[tuple[int, list[int]]] = []
    early: list[bytes] = []  # of the file, as far as is told
    write, give = OutputFile.write, chain.Keeper.give

    def slow(self: OutputFile, view: memoryview, offset: int, aligned: bool = False) -> None:
        time.sleep(0.05)
        write(self, view, offset, aligned)
        done.append(offset + len(view))

    def noted(self: Any, shard: Any, progress: Any) -> None:
        ends.append((progress.position, list(done)))
        early.append(shard.path.read_bytes()[: progress.position])
        give(self, shard, progress)

    monkeypatch.setattr(OutputFile, "write", slow)
    monkeypatch.setattr(chain.Keeper, "give", noted)
    infold.merge(base, adapter, tmp_path / "out", threads=2)

    assert len(ends) > 3
    assert [end for end, written in ends if end not in written] == []
    (file,) = (tmp_path / "out").glob("*.safetensors")
    assert all(file.read_bytes().startswith(begin) for begin in early)
    if not past_the_cache:
        pytest.skip("this file system has no O_DIRECT")
