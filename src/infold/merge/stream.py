"""Shard by shard, block by block, from the base to the staged output.

The output is cut into chunks in file order. Workers take the next chunk, read and compute it with
buffers of their own, begin to write it, and leave it to be hashed: digests need the bytes in order,
nothing else does, so whoever has the next chunk hashes it, and those that wait behind it. Each
worker has two sets of buffers, one of which may wait and be written, so memory is bounded by the
number of workers alone, and reading, computing, hashing and writing overlap. A keeper thread brings
finished stretches to the disk and into the journal meanwhile.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch

from infold.checkpoint.direct import Pace
from infold.checkpoint.inputs import InputFiles
from infold.checkpoint.staging import copy_range
from infold.disk import storage_errors
from infold.edit.blocks import Block, cut
from infold.edit.steps import Workspace
from infold.edit.threads import take_one_core
from infold.errors import NotFinite, Refusal
from infold.merge.apply import Run
from infold.merge.chain import HASH_PIECE, Chain, Keeper, Target
from infold.merge.convert import converted_runs, source_of
from infold.merge.losses import lossy
from infold.merge.recording import Recording
from infold.merge.source import Buffers, Source
from infold.plan.edits import BaseTensor, OutputShard, Plan
from infold.workers import Worker, run_all

__all__ = ["Compute", "ShardDigests", "Streamed", "chunks_of", "stream"]

COPY_PIECE = 2 << 20  # bytes of a chunk without an edit
KEEP_EVERY = 256 << 20  # bytes of a shard after which it is brought to the disk


@dataclass(frozen=True)
class ShardDigests:
    """BLAKE3 of one shard of the output and of the base's shard that it came from, by its name."""

    base: str
    output: str
    source: str


_NOTHING = torch.empty(0)


@dataclass(frozen=True, slots=True)
class _Copy:
    """A range of bytes without an edit."""

    source: int  # offset in the base's shard
    target: int  # offset in the output
    count: int


@dataclass(frozen=True, slots=True)
class _Pad:
    """Zeros between two tensors, where the layout is not the base's (GGUF)."""

    target: int  # offset in the output
    count: int


@dataclass(frozen=True, slots=True)
class Compute:
    """A block of an edited tensor."""

    run: Run
    source: Source
    number: int  # of the block in its edit
    block: Block
    target: int
    last: bool  # of its edit


@dataclass(frozen=True, slots=True)
class _Task:
    """A chunk with its place in the queue of its shard."""

    chain: Chain
    number: int
    work: _Copy | _Pad | Compute
    end: int  # offset in the output where the chunk ends


class _Stopped(Exception):
    """Another worker failed or the user interrupted."""


@dataclass(frozen=True)
class Streamed:
    """What `stream` returns. `resumed`: bytes that an earlier run left and that were right; `kept`:
    the edits with blocks among them, of which the runs have seen only the rest."""

    digests: dict[str, ShardDigests]
    runs: Mapping[str, Run]
    resumed: int
    kept: frozenset[str]


def stream(
    plan: Plan,
    staging: Target,
    *,
    threads: int,
    limit: int,
    device: torch.device,
    advance: Callable[[int], None],
    runs: Mapping[str, Run] | None = None,
    recording: Recording | None = None,
) -> Streamed:
    """Write every shard of the output. `limit` is the number of elements of a block; `advance` is
    told the bytes of output that are done; `runs` compute the edits, as a rule by their operations;
    `recording` gets what it takes to undo them.

    Raises Refusal where values are not finite, with one reason for each tensor, its first element:
    after the first of them nothing more is written, but what is left of the edits is computed.
    """
    files = InputFiles(*plan.checkpoints)
    keeper = Keeper(staging, recording)
    if runs is None:
        runs = converted_runs(plan, device)
    pool = _Pool(plan, staging, files, keeper, limit, device, advance, runs, recording, threads)
    try:
        keeper.thread.start()
        pool.run()
    finally:
        keeper.finish()
        for chain in pool.chains:
            chain.close()
        files.close()
    if keeper.error is not None:
        raise keeper.error
    if reasons := lossy(runs):
        raise Refusal(reasons)
    return Streamed(pool.digests, pool.runs, pool.resumed, pool.kept())


def chunks_of(
    plan: Plan, shard: OutputShard, runs: Mapping[str, Run], files: InputFiles, limit: int
) -> Iterator[tuple[int, _Copy | _Pad | Compute]]:
    """(end, work) for every chunk after the header, in file order. In the same layout all that lies
    between the edits is copied, padding included."""
    base = plan.base.shards[shard.source].header.tensors
    end = len(shard.header.raw)  # of what was yielded or gathered
    source = target = count = 0  # the unedited bytes that were gathered so far
    if shard.same_layout:
        source = target = len(shard.header.raw)

    def flush() -> Iterator[tuple[int, _Copy]]:
        offset = 0
        while offset < count:  # cut where blocks of the disk begin
            piece = min(COPY_PIECE - (target + offset) % COPY_PIECE, count - offset)
            yield target + offset + piece, _Copy(source + offset, target + offset, piece)
            offset += piece

    def pad(begin: int, stop: int) -> Iterator[tuple[int, _Pad]]:
        if stop > begin and not shard.same_layout:
            yield stop, _Pad(begin, stop - begin)

    for name, info in shard.header.tensors.items():
        if name not in plan.edits:
            begin = base[name].begin
            if shard.same_layout:
                count = info.end - target
            elif count and source + count == begin and target + count == info.begin:
                count += info.nbytes
            else:
                yield from flush()
                yield from pad(end, info.begin)
                source, target, count = begin, info.begin, info.nbytes
            end = info.end
            continue
        if shard.same_layout:
            count = info.begin - target
        yield from flush()
        yield from pad(end, info.begin)
        end = info.end
        source, target, count = info.end, info.end, 0
        run = runs[name]
        floats = run.floats
        if not floats.rows * floats.columns:  # such a shape may still tell of very many rows
            continue
        place = source_of(plan, run, files)
        position = info.begin
        for number, block in enumerate(cut(*run.shape, floats.share(limit))):
            begin, position = position, position + block.count * floats.width
            yield position, Compute(run, place, number, block, begin, position == info.end)
    if shard.same_layout:
        count = shard.header.file_size - target
    yield from flush()
    yield from pad(end, shard.header.file_size)


class _Pool:
    """Workers over the tasks of all shards. The first failure stops all; where it is a value that
    is not finite, they go on to look for others."""

    def __init__(
        self,
        plan: Plan,
        staging: Target,
        files: InputFiles,
        keeper: Keeper,
        limit: int,
        device: torch.device,
        advance: Callable[[int], None],
        runs: Mapping[str, Run],
        recording: Recording | None,
        threads: int,
    ) -> None:
        self.plan, self.staging, self.files, self.keeper = plan, staging, files, keeper
        self.limit, self.device, self.advance = limit, device, advance
        self.runs, self.recording = runs, recording
        self.threads, self.pace = threads, Pace()
        self.writers = ThreadPoolExecutor(threads, "infold-writer")
        self.chains: list[Chain] = []
        self.digests: dict[str, ShardDigests] = {}
        self.resumed = 0
        self.left: list[Compute] = []  # blocks of scales that an earlier run has written
        self.tasks = self._tasks()
        self.lock = threading.Lock()
        self.hashed = threading.Condition()  # a chunk more
        self.stopped = threading.Event()
        self.error: BaseException | None = None
        self.seen: set[tuple[str, int]] = set()  # tensors, and blocks of them that were computed
        self.earlier: set[str] = set()  # tensors of which an earlier run has written blocks
        self.refused: dict[str, NotFinite] = {}  # the first of each tensor
        self.reasons: list[str] = []  # what else is refused where those are looked for

    def _tasks(self) -> Iterator[_Task]:
        """All chunks in file order. A shard is opened when its first chunk is asked for."""
        for shard in self.plan.shards:
            chain = Chain(self.plan, shard, self.staging, self.files, self.pace)
            self.chains.append(chain)
            if chain.kept:
                self.resumed += chain.kept
            self.advance(chain.start)
            chunks = list(chunks_of(self.plan, shard, self.runs, self.files, self.limit))
            todo = [chunk for chunk in chunks if chunk[0] > chain.start]
            done = [work for end, work in chunks if end <= chain.start]
            cut_elsewhere = todo and not self._starts_at(todo[0], chain.start)
            if cut_elsewhere or not self._recorded(done):
                # other blocks than now, or some without their way back: begin this shard anew
                chain.forget()
                chain.kept = 0
                self.resumed -= chain.start
                self.advance(-chain.start)
                chain.start = chain.resume(None)
                self.advance(chain.start)
                todo, done = chunks, []
            kept = [work for work in done if isinstance(work, Compute)]
            self.seen.update((work.run.edit.tensor, work.number) for work in kept)
            self.earlier.update(work.run.edit.tensor for work in kept)
            self.left += [
                work
                for work in kept
                if work.run.forward is not None and work.run.forward.loss is not None
            ]
            if not todo:
                self._finish(chain)
            for number, (end, work) in enumerate(todo):
                yield _Task(chain, number, work, end)

    @staticmethod
    def _starts_at(first: tuple[int, _Copy | _Pad | Compute], position: int) -> bool:
        return first[1].target == position

    def _recorded(self, done: Sequence[_Copy | _Pad | Compute]) -> bool:
        """Whether the record has all blocks that an earlier run left."""
        if self.recording is None:
            return True
        blocks = [(w.run, w.number) for w in done if isinstance(w, Compute)]
        return all(self.recording.has(run, number) for run, number in blocks)

    def _finish(self, chain: Chain) -> None:
        """All of a shard is hashed, and will be written now."""
        size = chain.shard.header.file_size
        chain.written(size)
        progress = chain.progress(size)
        self.digests[chain.shard.name] = ShardDigests(
            progress.base, progress.output, self.plan.base.shards[chain.shard.source].name
        )
        self.keeper.give(chain, progress)

    def run(self) -> None:
        workers = [Worker(self._work, f"infold-{n}") for n in range(self.threads)]
        run_all(workers, self.stopped.set)
        self.writers.shutdown(wait=False)  # each worker has waited for its own
        if self.refused and self.error is None and self.keeper.error is None:
            self._survey()
        if self.error is not None:
            raise self.error
        if self.refused:
            raise self._refusal()
        if self.keeper.error is None:
            assert len(self.digests) == len(self.plan.shards)
            self._count_again()

    def _count_again(self) -> None:
        """Blocks that an earlier run has written: nothing more is known of how they came out."""
        workspace, buffers = Workspace(self.device, self.limit), Buffers()
        for work in self.left:
            self._rehearse(work, workspace, buffers)
            if work.last:
                work.run.release()

    def _rehearse(self, work: Compute, workspace: Workspace, buffers: Buffers) -> None:
        """Compute a block that is not written."""
        run, block = work.run, work.block
        run.prepare(workspace, partial(work.source.read, buffers=buffers), self.limit)
        raw = work.source.read(block, buffers) if run.reads else _NOTHING
        out = torch.empty(block.rows, block.columns, dtype=run.stored)
        run.run(raw.to(self.device), out, block, workspace)

    def kept(self) -> frozenset[str]:
        """The edits with blocks that an earlier run has written and that were not counted again."""
        again = {work.run.edit.tensor for work in self.left}
        return frozenset(self.earlier - again)

    def _survey(self) -> None:
        """Look for values that are not finite in the blocks that were not computed yet, a block at
        a time: one large tensor that is left has all workers. Of each tensor the first block that
        is refused tells, and those after it need no look."""
        left: Counter[str] = Counter()  # blocks of each tensor
        refused: dict[str, tuple[int, Refusal]] = {}

        def blocks() -> Iterator[Compute]:
            for edit in self._unseen():
                left[edit[0].run.edit.tensor] = len(edit)
                yield from edit

        def look(one: Compute, workspace: Workspace, buffers: Buffers) -> None:
            name = one.run.edit.tensor
            try:
                if name not in refused or one.number < refused[name][0]:
                    self._rehearse(one, workspace, buffers)
            except Refusal as error:
                with self.lock:
                    if name not in refused or one.number < refused[name][0]:
                        refused[name] = one.number, error
            with self.lock:
                left[name] -= 1
                last = not left[name]
            if last:
                one.run.release()
            self.advance(one.block.count * one.run.floats.width)

        def work() -> None:
            take_one_core()
            buffers = Buffers()
            try:
                workspace = Workspace(self.device, self.limit)
                while not self.stopped.is_set():
                    with self.lock:
                        one = next(todo, None)
                    if one is None:
                        return
                    look(one, workspace, buffers)
            except BaseException as error:
                self._fail(error)

        todo = blocks()
        self.stopped.clear()
        run_all([Worker(work, f"infold-{n}") for n in range(self.threads)], self.stopped.set)
        for name in sorted(refused, key=self._order()):
            if isinstance(error := refused[name][1], NotFinite):
                self._refuse(error)
            else:
                self.reasons += error.reasons

    def _unseen(self) -> Iterator[list[Compute]]:
        """The blocks of each edit that were not computed, up to where it is known to be refused."""
        for shard in self.plan.shards:
            blocks: dict[str, list[Compute]] = {}
            for _, work in chunks_of(self.plan, shard, self.runs, self.files, self.limit):
                if not isinstance(work, Compute):
                    continue
                name, place = work.run.edit.tensor, (work.block.row, work.block.column)
                known = self.refused.get(name)
                beyond = known is not None and known.position < place
                if not beyond and (name, work.number) not in self.seen:
                    blocks.setdefault(name, []).append(work)
            yield from blocks.values()

    def _order(self) -> Callable[[str], tuple[int, str]]:
        """The place of a tensor in the output, by its name."""
        numbers = {name: number for number, name in enumerate(self.plan.edits)}
        return lambda name: (numbers.get(name, -1), name)

    def _refuse(self, error: NotFinite) -> None:
        with self.lock:
            known = self.refused.get(error.tensor)
            if known is None or error.position < known.position:
                self.refused[error.tensor] = error

    def _refusal(self) -> Refusal:
        """All of them, in the order of the output; what to do stands at the first of each kind."""
        told: set[str] = set()
        reasons = []
        for name in sorted(self.refused, key=self._order()):
            error = self.refused[name]
            reasons.append(error.short if error.advice in told else str(error))
            told.add(error.advice)
        return Refusal([*reasons, *self.reasons])

    def _work(self) -> None:
        take_one_core()
        buffers, others = Buffers(), Buffers()
        try:
            workspace = Workspace(self.device, self.limit)
            while not self.stopped.is_set() and self.keeper.error is None:
                with self.lock:
                    task = next(self.tasks, None)
                if task is None:
                    return
                buffers, others = others, buffers
                self._free(buffers)
                if isinstance(task.work, _Copy):
                    self._copy(task, task.work, buffers)
                elif isinstance(task.work, _Pad):
                    self._pad(task, task.work, buffers)
                else:
                    self._compute(task, task.work, workspace, buffers)
        except _Stopped:
            pass
        except BaseException as error:
            self._fail(error)
        finally:
            for one in (buffers, others):
                try:
                    one.written()
                except BaseException as error:
                    self._fail(error)

    def _fail(self, error: BaseException) -> None:
        if isinstance(error, NotFinite):
            self._refuse(error)
        else:
            with self.lock:
                self.error = self.error or error
        self.stopped.set()

    def _pad(self, task: _Task, work: _Pad, buffers: Buffers) -> None:
        zeros = memoryview(bytes(work.count))
        if self.staging.writes:
            task.chain.target.write(zeros, work.target)
        self._leave(task, buffers, lambda: task.chain.hash(zeros, zeros))

    def _copy(self, task: _Task, work: _Copy, buffers: Buffers) -> None:
        chain, count = task.chain, work.count
        if not self.staging.writes or chain.target.goes_direct(count):
            data = buffers.view("in", count, work.target)
            shared = self._share(chain, work)
            self.files.read(chain.source_path, data, work.source)
            if not shared:
                self._write(chain, data, work.target, buffers)
            self._leave(task, buffers, lambda: chain.hash(data, data))
            return
        if not self._share(chain, work):
            with self.files.use(chain.source_path) as source, storage_errors(chain.path):
                copy_range(source, chain.target.fd, work.source, work.target, count)

        def hash_pieces() -> None:
            for offset in range(0, count, HASH_PIECE):
                piece = buffers.view("in", min(HASH_PIECE, count - offset))
                self.files.read(chain.source_path, piece, work.source + offset)
                chain.hash(piece, piece)

        self._leave(task, buffers, hash_pieces)

    def _share(self, chain: Chain, work: _Copy) -> bool:
        """Whether the output has the range now without a copy."""
        if not self.staging.writes:
            return False
        with self.files.use(chain.source_path) as source:
            return chain.target.clone(source, work.source, work.target, work.count)

    def _compute(self, task: _Task, work: Compute, workspace: Workspace, buffers: Buffers) -> None:
        chain, run, block = task.chain, work.run, work.block
        self.seen.add((run.edit.tensor, work.number))
        run.prepare(workspace, lambda piece: work.source.read(piece, buffers), self.limit)
        raw = work.source.read(block, buffers) if run.reads else _NOTHING
        written = buffers.view("out", block.count * run.floats.width, work.target)
        out = work.source.room(run.floats, block, written)
        recording = self.recording
        near = None if recording is None else recording.near(run, block, workspace)
        before = run.run(raw.to(self.device), out, block, workspace, near)
        work.source.fill(run.floats, out, written, buffers)
        if recording is not None and before is not None:
            recording.add(run, work.number, before, near)
        base = buffers.view("in", len(written))
        if chain.in_step and run.edit.source != BaseTensor(run.edit.tensor):
            # the values came from elsewhere, but the base's own bytes belong to its digest
            self.files.read(chain.source_path, base, work.target)
        self._write(chain, written, work.target, buffers)

        def hash_block() -> None:
            chain.hash(base, written)
            if work.last:  # all others of the edit are hashed
                run.release()

        self._leave(task, buffers, hash_block)

    def _free(self, buffers: Buffers) -> None:
        """Wait until what lies in a worker's buffers is hashed and written."""
        while buffers.waits:
            if self.stopped.is_set() or self.keeper.error is not None:
                raise _Stopped
            with self.hashed:
                self.hashed.wait_for(lambda: not buffers.waits, 0.2)
        buffers.written()
        buffers.writing = None

    def _leave(self, task: _Task, buffers: Buffers, hash_it: Callable[[], None]) -> None:
        """Leave a chunk to be hashed when all before it are. The buffers are free afterwards."""

        def work() -> None:
            hash_it()
            self._hashed(task, buffers)
            with self.hashed:
                buffers.waits = False
                self.hashed.notify_all()

        buffers.waits = True
        task.chain.leave(task.number, work)

    def _hashed(self, task: _Task, buffers: Buffers) -> None:
        """A chunk is hashed, in its turn."""
        chain = task.chain
        if buffers.writing is not None:
            chain.writes = [w for w in chain.writes if not w.done() or w.exception()]
            chain.writes.append(buffers.writing)
        if task.end == chain.shard.header.file_size:
            self._finish(chain)
        elif task.end - chain.kept >= KEEP_EVERY:
            chain.written(task.end)
            chain.kept = task.end
            if chain.in_step:
                self.keeper.give(chain, chain.progress(task.end))
        self.advance(task.end - task.work.target)

    def _write(self, chain: Chain, data: memoryview, place: int, buffers: Buffers) -> None:
        """Write `data`, which lies aligned in one of the buffers; they know until when.

        Past the page cache the disk does the work, and this thread can go on meanwhile.
        """
        if not self.staging.writes:
            return
        if chain.target.goes_direct(len(data)):
            buffers.writing = self.writers.submit(chain.target.write, data, place, True)
        else:
            chain.target.write(data, place)
