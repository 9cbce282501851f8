"""read -> quantize -> write, in bounded pieces, overlapped.

A piece is a few hundred rows of one matrix, always whole rows of blocks. A worker thread takes a piece
through its steps: `pread` into its own buffer, the kernels, and, in a second thread of the worker's lane,
`pwrite` at the offsets the plan gave, while the worker is at its next piece. Threads are enough, because
reading, torch's kernels and writing all release the interpreter lock. On CUDA each worker has its own
stream and pinned buffers, so that copies in both directions overlap with kernels. What verification reads
back comes from the disk and not from the page cache; threads of its own read that ahead.

Memory is workers x piece, whatever the size of a tensor or a shard. Nothing a worker computes depends on
another piece, so neither the number of workers nor the size of a piece can change a byte.

The calling thread hands out pieces in order, a few per worker ahead, and is the only one that
touches progress, results and shards' beginnings and ends. Waiting for the disk to make a finished shard
durable is left to a thread of its own; meanwhile the next shard is under way.
"""

import hashlib
import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fp8lib import Fp8Error, verify
from fp8lib.checkpoint import Shard, printable
from fp8lib.direct import PAGE
from fp8lib.lanes import DTYPES, Files, Lane, ReadAhead, as_bytes, keep_freed_memory
from fp8lib.manifest import ShardResult
from fp8lib.modes import Calibration
from fp8lib.plan import Matrix, Passthrough, ShardPlan
from fp8lib.rules import BLOCK, blocks
from fp8lib.scales import quantize_blocks
from fp8lib.stats import Statistics
from fp8lib.verify import Errors, Pair
from fp8lib.writer import ShardWriter

CPU_PIECE = 1024 * 1024
"""Weights in a piece on the CPU: its float32 temporaries of 2 MB stay in a core's share of the cache."""
CUDA_PIECE = 16 * 1024 * 1024
"""Weights in a piece on CUDA: 32 MB of BF16, enough for the copy engine to reach its full rate."""
VERIFY_PIECE = 512 * 1024
"""Weights in a piece of verification; the same everywhere, because sums of floats depend on it."""
_COPY_PIECE = 4 * 1024 * 1024
_PAIRS_PER_CHECK = 64
_IN_FLIGHT = 4
"""Pieces per worker that are handed out and not settled: computed, written, and two more."""
_UNITS_PER_RANK = 20
"""With 64 ranks the busiest has 5 % more than the mean then, 8 % with 10 (benchmarks/scale.py)."""
_SMALLEST_UNIT = 16 * 1024 * 1024
"""Bytes below which dividing a shard costs more than it evens out."""

Task = tuple[Callable[[Lane], object], Callable[[object], None]]
"""What a worker does with its lane, and what the scheduling thread does with the outcome."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How shards are processed.

    Attributes:
        calibration: how scales are chosen.
        statistics: activation statistics, or None.
        device: where kernels run.
        workers: worker threads; each has one more that writes and one that reads ahead.
        verify_samples: matrices per shard to measure; None for all of them.
        verify: False skips verification altogether.
        seed: of the sample.
        checksums: compute the SHA-256 of every shard from the bytes as they are written.
        piece: weights per piece, 0 for the device's default.
    """

    calibration: Calibration
    statistics: Statistics | None
    device: torch.device
    workers: int
    verify_samples: int | None = 5
    verify: bool = True
    seed: int = 0
    checksums: bool = False
    piece: int = 0

    @property
    def piece_weights(self) -> int:
        return self.piece or (CUDA_PIECE if self.device.type == "cuda" else CPU_PIECE)


@dataclass(frozen=True, slots=True)
class Unit:
    """A shard to quantize, or one of several parts of it that different processes work on."""

    plan: ShardPlan
    part: int = 0
    parts: int = 1


@dataclass(frozen=True, slots=True)
class Written:
    """A complete shard on disk that is to be verified.

    Attributes:
        name, size: of the file.
        pairs: its FP8 weights, in the order of the file.
        problems: what is already known to be wrong with its structure.
        source: the input shard all of it was made from, if that is known.
    """

    name: str
    size: int
    pairs: tuple[Pair, ...]
    problems: tuple[str, ...]
    source: Shard | None = None


def divide(shards: list[ShardPlan], ranks: int, whole: bool) -> list[Unit]:
    """The work of quantizing some shards, for any number of processes to take from.

    Args:
        shards: to quantize.
        ranks: processes that will take them. For one, shards stay whole and in order. For more, the
            largest come first, and what is larger than a 20th of a rank's share is divided, so that
            the last ranks at work finish close together and one large file keeps all of them busy.
        whole: never divide a shard (a checksum needs all its bytes in one process).
    """
    if ranks == 1:
        return [Unit(shard) for shard in shards]
    share = sum(s.input_bytes for s in shards) / ranks / _UNITS_PER_RANK
    units = []
    for shard in sorted(shards, key=lambda s: (-s.input_bytes, s.name)):
        parts = 1 if whole else max(math.ceil(shard.input_bytes / max(share, _SMALLEST_UNIT)), 1)
        units += [Unit(shard, part, parts) for part in range(parts)]
    return units


def pieces(unit: Unit, weights: int) -> list[tuple[Matrix | Passthrough, int, int]]:
    """A unit's share of its shard's pieces, in the order of the output file.

    Returns:
        (matrix, first row, last) of about `weights` weights each; (tensor that is kept, first byte, last).
    """
    plan = unit.plan
    found: list = [(item, *span) for item in plan.passthrough for span in _byte_ranges(item)]
    found += [(m, *span) for m in plan.matrices for span in _row_ranges(m.rows, m.columns, weights)]
    found.sort(key=lambda piece: _output_start(*piece[:2]))
    return found[len(found) * unit.part // unit.parts : len(found) * (unit.part + 1) // unit.parts]


def _output_start(item: Matrix | Passthrough, first: int) -> int:
    if isinstance(item, Passthrough):
        return item.output.start + first
    return item.weight.start + first * item.columns


def written_as_planned(plan: ShardPlan, folder: Path) -> Written:
    """A shard that an earlier run completed, to be verified again."""
    path = folder / plan.name
    pairs, problems = verify.planned_pairs(plan, path), verify.structural_problems(plan, path)
    return Written(plan.name, plan.size, tuple(pairs), tuple(problems), plan.source)


def process(
    work: Iterable[Unit | Written],
    output: Path,
    settings: Settings,
    on_bytes: Callable[[str, int], None] = lambda name, count: None,
    is_last_part: Callable[[Unit], bool] = lambda unit: True,
) -> Iterator[ShardResult]:
    """Quantize, write and verify shards.

    Yields:
        Each shard's result once its file is durable, and again, `final`, when it is verified; once and
        `final` where that is not asked for. Before an error is raised, those of what was complete by then.

    Args:
        work: what to do, in this order; taken from the iterable one by one, when a worker is free.
        output: an existing directory.
        settings: how.
        on_bytes: called in this thread with (shard's name, input bytes done since the last call).
        is_last_part: called, from another thread, when a part is durable: whether it was the shard's
            last, so that this process completes the shard. Only then is there a result.

    Raises:
        Fp8Error: unreadable input, NaN or infinity in a weight, a full disk. No partial file is left.
    """
    keep_freed_memory()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # parallelism comes from the workers
    scheduler = _Scheduler(output, settings, on_bytes, is_last_part)
    try:
        yield from scheduler.run(work)
        scheduler.stop(wait_for_disk=True)
    except Exception:
        scheduler.stop(wait_for_disk=True)
        yield from scheduler.became_durable()
        raise
    except BaseException:  # interrupted: a slow disk must not keep the user waiting
        scheduler.stop(wait_for_disk=False)
        raise
    finally:
        torch.set_num_threads(threads)


def rows_per_piece(columns: int, weights: int) -> int:
    """Rows of a piece of about `weights` weights: a multiple of 128, at least 128."""
    return max(weights // columns // BLOCK, 1) * BLOCK


def _row_ranges(rows: int, columns: int, weights: int) -> Iterator[tuple[int, int]]:
    step = rows_per_piece(columns, weights)
    for first in range(0, rows, step):
        yield first, min(first + step, rows)


# --- one shard ---------------------------------------------------------------------------------


class _OrderedDigest:
    """SHA-256 of a file whose bytes arrive nearly in order; what is early waits in memory.

    Pieces come in the order of the file, so only a shard's scales are early, 1/8192 of its weights' bytes.
    """

    def __init__(self, header: bytes) -> None:
        self._hash = hashlib.sha256(header)
        self._end = len(header)
        self._waiting: dict[int, bytes] = {}

    def add(self, start: int, data: bytes) -> None:
        self._waiting[start] = data
        while (data := self._waiting.pop(self._end, None)) is not None:
            self._hash.update(data)
            self._end += len(data)

    def hexdigest(self, size: int) -> str:
        if self._end != size:
            raise AssertionError(f"{size - self._end} bytes of the file were not written")
        return self._hash.hexdigest()


@dataclass(slots=True)
class _Job:
    """A shard under way. Only the scheduling thread changes it, apart from `broken`."""

    name: str
    size: int
    settings: Settings
    files: Files = field(default_factory=Files)
    unit: Unit | None = None
    source: Shard | None = None
    writer: ShardWriter | None = None
    digest: _OrderedDigest | None = None
    broken: set[str] = field(default_factory=set)
    pairs: tuple[Pair, ...] = ()
    problems: list[str] = field(default_factory=list)
    measured: dict[str, list[Errors]] = field(default_factory=dict)
    outstanding: int = 0
    all_submitted: bool = False
    stage: str = "quantize"

    # Quantization.

    def quantization(self, on_bytes: Callable[[str, int], None]) -> Iterator[Task]:
        """This unit's pieces, one task each."""

        def settle(outcome: tuple[int, Future]) -> None:
            count, written = outcome
            for start, data in written.result():
                self.digest.add(start, data)
            on_bytes(self.name, count)

        for piece in pieces(self.unit, self.settings.piece_weights):
            function = self._copy if isinstance(piece[0], Passthrough) else self._quantize
            yield (lambda lane, f=function, p=piece: f(lane, *p)), settle

    def _write(self, *chunks: tuple[int, memoryview]) -> list[tuple[int, bytes]]:
        """Write (offset, data) chunks; returns copies of them if they are to be hashed."""
        for start, data in chunks:
            self.writer.write(start, data)
        return [(start, bytes(data)) for start, data in chunks] if self.digest else []

    def _quantize(self, lane: Lane, matrix: Matrix, first: int, last: int) -> tuple[int, Future]:
        """Rows first..last of a matrix, from file to file. Returns (input bytes, future of `_write`)."""
        nbytes = (last - first) * matrix.input_row_bytes
        start = matrix.start + first * matrix.input_row_bytes
        raw = lane.read("in", self.files, self.unit.plan.source.path, start, nbytes)
        host = raw.view(DTYPES[matrix.dtype]).view(last - first, matrix.columns)
        codes, scales = quantize_blocks(
            lane.to_device(host), self.settings.calibration, self._importance(lane, matrix)
        )
        output = lane.next_output()
        codes = lane.to_host(f"codes {output}", codes)
        scales = lane.to_host(f"scales {output}", scales)
        lane.synchronize()
        if not bool(scales.view(torch.bfloat16).isfinite().all()):
            self.broken.add(matrix.weight.name)
        scale_row_bytes = 2 * blocks(matrix.columns)
        return nbytes, lane.write_behind(
            self._write,
            (matrix.weight.start + first * matrix.columns, as_bytes(codes)),
            (matrix.scale.start + first // BLOCK * scale_row_bytes, as_bytes(scales)),
        )

    def _importance(self, lane: Lane, matrix: Matrix) -> torch.Tensor | None:
        if self.settings.statistics is None:
            return None
        values = self.settings.statistics.importance(matrix.weight.name, matrix.columns)
        return None if values is None else lane.to_device(torch.from_numpy(values))

    def _copy(self, lane: Lane, item: Passthrough, first: int, last: int) -> tuple[int, Future]:
        """Bytes first..last of a tensor that is kept. Returns as `_quantize`."""
        buffer, path = f"kept {lane.next_output()}", self.unit.plan.source.path
        raw = lane.read(buffer, self.files, path, item.start + first, last - first)
        return last - first, lane.write_behind(self._write, (item.output.start + first, as_bytes(raw)))

    def refuse_broken(self) -> None:
        if self.broken:
            names = sorted(map(printable, self.broken))
            shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if names[10:] else "")
            raise Fp8Error(f"{self.name}: NaN or infinity in {shown}; repair the input model")

    def refuse_changed(self) -> None:
        """Refuse an input file that is not the one that was planned for, or was written to meanwhile."""
        if self.source is not None:
            self.files.refuse_changed(self.source)

    def make_durable(self, is_last_part: Callable[[Unit], bool]) -> bool:
        """Give the output its name, if this was its last part. Runs in the committing thread."""
        if self.unit.parts > 1:
            self.writer.hand_over()  # before it is counted: what is counted must stay
            if not is_last_part(self.unit):
                return False
        self.writer.commit()
        return True

    # Verification.

    def verification(self, ahead: ReadAhead) -> Iterator[Task]:
        for first in range(0, len(self.pairs), _PAIRS_PER_CHECK):
            batch = self.pairs[first : first + _PAIRS_PER_CHECK]
            yield (
                lambda lane, b=batch: verify.read_and_check_scales(lane, self.files, b),
                self.problems.extend,
            )
        settings = self.settings
        for pair in verify.sample(self.pairs, settings.verify_samples, settings.seed, self.name):
            pieces = self.measured.setdefault(pair.name, [])
            for span in _row_ranges(pair.rows, pair.columns, VERIFY_PIECE):
                read = ahead.submit(verify.read_rows, self.files, pair, *span)
                yield (lambda lane, r=read: verify.measure(*map(lane.to_device, r.result()))), pieces.append

    # End.

    def close(self) -> None:
        """Release files; removes the partial output of a shard that was not completed."""
        if self.writer is not None:
            self.writer.abandon()
            self.writer = None
        self.files.close()

    def result(self, final: bool) -> ShardResult:
        return ShardResult(
            self.name,
            self.size,
            self.digest.hexdigest(self.size) if self.digest else None,
            tuple(verify.combine(name, pieces) for name, pieces in self.measured.items()),
            tuple(self.problems),
            final,
        )


def _byte_ranges(item: Passthrough) -> Iterator[tuple[int, int]]:
    size = item.output.nbytes
    first_page = min(-item.output.start % PAGE, size)
    if first_page:
        yield 0, first_page
    for first in range(first_page, size, _COPY_PIECE):
        yield first, min(first + _COPY_PIECE, size)


# --- all shards --------------------------------------------------------------------------------


class _Scheduler:
    """Hands pieces to worker threads, in order, and sees every shard through its stages.

    quantize -> commit (fsync and rename, by a thread of its own) -> verify -> done
    """

    def __init__(
        self,
        output: Path,
        settings: Settings,
        on_bytes: Callable[[str, int], None],
        is_last_part: Callable[[Unit], bool],
    ) -> None:
        self.output = output
        self.settings = settings
        self.on_bytes = on_bytes
        self.is_last_part = is_last_part
        self.workers = ThreadPoolExecutor(settings.workers, thread_name_prefix="worker")
        self.committer = ThreadPoolExecutor(1, thread_name_prefix="commit")
        self.ahead = ReadAhead(settings.device, settings.workers, _IN_FLIGHT * settings.workers + 1)
        self.in_flight: deque[tuple[_Job, Future, Callable[[object], None]]] = deque()
        self.committing: deque[tuple[_Job, Future]] = deque()
        self.durable: deque[_Job] = deque()
        self.jobs: list[_Job] = []
        self.done: deque[ShardResult] = deque()
        self.thread = threading.local()
        self.lanes: list[Lane] = []

    def run(self, work: Iterable[Unit | Written]) -> Iterator[ShardResult]:
        for item in work:
            if isinstance(item, Unit):
                yield from self._make_room()
                yield from self._start(item)
            else:
                yield from self._verify_written(item)
            yield from self._verify_durable()
        while self.in_flight or self.committing or self.durable:
            yield from self._verify_durable() if self.durable else self._step()
        yield from self._results()

    def stop(self, wait_for_disk: bool) -> None:
        """Let running pieces end, drop the rest, remove partial files."""
        self.workers.shutdown(wait=True, cancel_futures=True)
        for lane in self.lanes:
            lane.stop()
        self.ahead.stop()
        self.committer.shutdown(wait=wait_for_disk, cancel_futures=not wait_for_disk)
        for job in self.jobs:
            job.close()

    def became_durable(self) -> Iterator[ShardResult]:
        """After `stop`: results of shards that an error elsewhere did not keep from being completed."""
        yield from self._results()
        for job, commit in self.committing:
            if not commit.exception() and commit.result():
                yield job.result(final=False)

    def _step(self) -> Iterator[ShardResult]:
        """Wait for the oldest piece or, if none is under way, the oldest commit; hand out what that ends."""
        if self.in_flight:
            self._settle_oldest()
        else:
            wait([self.committing[0][1]])
        self._collect_commits()
        yield from self._results()

    def _make_room(self) -> Iterator[ShardResult]:
        """Wait while as many shards are half written as there are workers: a crash leaves that many files."""
        while sum(job.writer is not None for job in self.jobs) >= max(self.settings.workers, 2):
            yield from self._step()

    def _start(self, unit: Unit) -> Iterator[ShardResult]:
        plan = unit.plan
        job = _Job(plan.name, plan.size, self.settings, unit=unit, source=plan.source)
        self.jobs.append(job)
        job.refuse_changed()
        job.writer = ShardWriter(self.output / plan.name, plan.header, plan.size, shared=unit.parts > 1)
        if self.settings.checksums:
            job.digest = _OrderedDigest(plan.header)
        yield from self._submit(job, job.quantization(self.on_bytes))

    def _verify_written(self, item: Written) -> Iterator[ShardResult]:
        job = _Job(
            item.name, item.size, self.settings, source=item.source, pairs=item.pairs,
            problems=list(item.problems),
        )  # fmt: skip
        self.jobs.append(job)
        yield from self._verify(job)

    def _verify_durable(self) -> Iterator[ShardResult]:
        while self.durable:
            yield from self._verify(self.durable.popleft())

    def _verify(self, job: _Job) -> Iterator[ShardResult]:
        """Start measuring a shard that is complete on disk."""
        job.stage = "verify"
        # What is not where it should be cannot be measured.
        measurable = self.settings.verify and not job.problems
        yield from self._submit(job, job.verification(self.ahead) if measurable else ())

    def _submit(self, job: _Job, tasks: Iterable[Task]) -> Iterator[ShardResult]:
        job.all_submitted = False
        for function, then in tasks:
            while len(self.in_flight) >= _IN_FLIGHT * self.settings.workers:
                yield from self._step()
            job.outstanding += 1
            self.in_flight.append((job, self.workers.submit(self._in_lane, function), then))
        job.all_submitted = True
        self._advance(job)

    def _in_lane(self, function: Callable[[Lane], object]) -> object:
        if not hasattr(self.thread, "lane"):
            self.thread.lane = Lane(self.settings.device)
            self.lanes.append(self.thread.lane)
        with torch.inference_mode(), self.thread.lane.as_current():
            return function(self.thread.lane)

    def _settle_oldest(self) -> None:
        job, future, then = self.in_flight.popleft()
        then(future.result())
        job.outstanding -= 1
        self._advance(job)

    def _advance(self, job: _Job) -> None:
        """Move a shard to its next stage once nothing of the present one is under way."""
        if job.outstanding or not job.all_submitted:
            return
        job.refuse_changed()  # first: it would explain a NaN, and an error that no rounding makes
        if job.stage == "quantize":
            job.refuse_broken()
            commit = self.committer.submit(job.make_durable, self.is_last_part)
            self.committing.append((job, commit))
        else:
            self._close(job)
            self.done.append(job.result(final=True))

    def _collect_commits(self) -> None:
        """Take note of the shards that are durable by now."""
        while self.committing and self.committing[0][1].done():
            job, commit = self.committing.popleft()
            complete = commit.result()
            job.writer = None
            if not complete:
                self._close(job)
            elif self.settings.verify:
                path = self.output / job.name
                job.pairs = tuple(verify.planned_pairs(job.unit.plan, path))
                job.problems = verify.structural_problems(job.unit.plan, path)
                self.done.append(job.result(final=False))
                self.durable.append(job)
            else:
                self._close(job)
                self.done.append(job.result(final=True))

    def _close(self, job: _Job) -> None:
        self.jobs.remove(job)
        job.close()

    def _results(self) -> Iterator[ShardResult]:
        while self.done:
            yield self.done.popleft()
