"""read -> quantize -> write, in bounded pieces, overlapped.

A piece is a few hundred rows of one matrix, always whole rows of blocks. Each worker thread takes a
piece through all its steps: `pread` into its own buffer, the kernels, `pwrite` at the offsets the plan
gave. Threads are enough, because reading, torch's kernels and writing all release the interpreter lock;
while one waits for the disk another computes. On CUDA each worker has its own stream and pinned buffers,
so that copies in both directions overlap with kernels.

Memory is workers x piece, whatever the size of a tensor or a shard. Nothing a worker computes depends on
another piece, so neither the number of workers nor the size of a piece can change a byte.

The calling thread hands out pieces in order, at most two per worker ahead, and is the only one that
touches progress, results and shards' beginnings and ends; waiting for the disk to make a finished shard
durable is left to a thread of its own.
"""

import ctypes
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fp8lib import Fp8Error, verify
from fp8lib.checkpoint import printable
from fp8lib.manifest import ShardResult
from fp8lib.plan import Matrix, Passthrough, ShardPlan
from fp8lib.rules import BLOCK, blocks
from fp8lib.scales import Calibration, quantize_blocks
from fp8lib.stats import Statistics
from fp8lib.writer import ShardWriter

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}

CPU_PIECE = 512 * 1024
"""Weights in a piece on the CPU: its float32 temporaries of 2 MB stay in a core's share of the cache."""
CUDA_PIECE = 16 * 1024 * 1024
"""Weights in a piece on CUDA: 32 MB of BF16, enough for the copy engine to reach its full rate."""
VERIFY_PIECE = 512 * 1024
"""Weights in a piece of verification; fixed, because float sums depend on it."""
_COPY_PIECE = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Settings:
    """How shards are processed.

    Attributes:
        calibration: how scales are chosen.
        statistics: activation statistics, or None.
        device: where kernels run.
        workers: worker threads.
        verify_samples: matrices per shard to measure; None for all of them.
        verify: False skips verification altogether.
        seed: of the sample.
        piece: weights per piece, 0 for the device's default.
    """

    calibration: Calibration
    statistics: Statistics | None
    device: torch.device
    workers: int
    verify_samples: int | None = 5
    verify: bool = True
    seed: int = 0
    piece: int = 0


def choose_device(name: str) -> torch.device:
    """The torch device of `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        Fp8Error: not such a name, or no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise Fp8Error(f"--device {printable(name)}: use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise Fp8Error(f"--device {name}: {torch.cuda.device_count()} CUDA devices here; use --device cpu")
    return device


def default_workers(device: torch.device) -> int:
    """One per core the process may use; on CUDA no more than keep one device busy."""
    cores = len(os.sched_getaffinity(0))
    return min(cores, 4) if device.type == "cuda" else cores


def process_shards(
    shards: list[ShardPlan],
    output: Path,
    settings: Settings,
    on_bytes: Callable[[ShardPlan, int], None] = lambda shard, count: None,
    written: frozenset[str] = frozenset(),
) -> Iterator[ShardResult]:
    """Quantize, write and verify shards, yielding each result once its file is durable.

    Args:
        shards: what to do, in this order.
        output: an existing directory.
        settings: how.
        on_bytes: called in this thread with (shard, input bytes done since the last call).
        written: names of shards that are complete and only need verification.

    Raises:
        Fp8Error: unreadable input, NaN or infinity in a weight, a full disk. No partial file is left.
    """
    _keep_freed_memory()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # parallelism comes from the workers
    scheduler = _Scheduler(output, settings, on_bytes)
    try:
        yield from scheduler.run(shards, written)
    finally:
        scheduler.stop()
        torch.set_num_threads(threads)


def rows_per_piece(columns: int, weights: int) -> int:
    """Rows of a piece of about `weights` weights: a multiple of 128, at least 128."""
    return max(weights // columns // BLOCK, 1) * BLOCK


def _keep_freed_memory() -> None:
    """Let glibc keep freed buffers instead of returning them to the kernel.

    Kernels allocate their temporaries afresh for every piece. CUDA's allocator caches them; glibc maps
    and unmaps each, and the page faults cost more than the arithmetic. Elsewhere this does nothing.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, at its upper limit
        mallopt(-1, 256 << 20)  # M_TRIM_THRESHOLD


# --- one worker --------------------------------------------------------------------------------


class _Lane:
    """What one worker thread owns: host buffers that are used again for every piece, a CUDA stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._buffers: dict[str, torch.Tensor] = {}
        self._importance: tuple[str, torch.Tensor | None] = ("", None)

    def host(self, name: str, nbytes: int) -> torch.Tensor:
        """A uint8 host buffer of this length, pinned on CUDA; valid until the name is asked for again."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < nbytes:
            buffer = torch.empty(nbytes, dtype=torch.uint8, pin_memory=self.stream is not None)
            self._buffers[name] = buffer
        return buffer[:nbytes]

    def read(self, fd: int, name: str, start: int, nbytes: int, path: Path) -> torch.Tensor:
        """Bytes of a file in the buffer `name`, uint8 [nbytes]."""
        buffer = self.host(name, nbytes)
        read_into(fd, buffer, start, path)
        return buffer

    def to_device(self, host: torch.Tensor) -> torch.Tensor:
        return host if self.stream is None else host.to(self.device, non_blocking=True)

    def to_host(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Bytes of a device tensor in host memory; on CUDA readable after `synchronize`."""
        flat = tensor.contiguous().view(torch.uint8).reshape(-1)
        if self.stream is None:
            return flat
        buffer = self.host(name, flat.numel())
        buffer.copy_(flat, non_blocking=True)
        return buffer

    def synchronize(self) -> None:
        if self.stream is not None:
            self.stream.synchronize()

    def importance(self, matrix: Matrix, statistics: Statistics | None) -> torch.Tensor | None:
        """a_j of a matrix on the device; the last one is kept, as pieces of a matrix follow each other."""
        if statistics is None:
            return None
        name = matrix.weight.name
        if self._importance[0] != name:
            values = statistics.importance(name, matrix.columns)
            on_device = None if values is None else torch.from_numpy(values).to(self.device)
            self._importance = (name, on_device)
        return self._importance[1]


def read_into(fd: int, buffer: torch.Tensor, start: int, path: Path) -> None:
    """Fill a uint8 host tensor from a file.

    Raises:
        Fp8Error: the file ends early or cannot be read.
    """
    view, done = memoryview(buffer.numpy()), 0
    while done < len(view):
        try:
            count = os.preadv(fd, [view[done:]], start + done)
        except OSError as error:
            raise Fp8Error(f"{printable(path)}: cannot be read ({error.strerror})") from None
        if count == 0:
            raise Fp8Error(f"{printable(path)}: became shorter while it was read; restore it and resume")
        done += count


def _as_bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.numpy())


# --- one shard ---------------------------------------------------------------------------------


@dataclass(slots=True)
class _Job:
    """A shard under way. Only the scheduling thread changes it, apart from `broken`."""

    plan: ShardPlan
    path: Path
    source_fd: int
    writer: ShardWriter | None
    settings: Settings
    output_fd: int = -1
    outstanding: int = 0
    all_submitted: bool = False
    broken: set[str] = field(default_factory=set)
    errors: dict[int, list] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def quantize_rows(self, lane: _Lane, matrix: Matrix, first: int, last: int) -> int:
        """Rows first..last of a matrix, from file to file. Returns the input bytes done."""
        nbytes = (last - first) * matrix.input_row_bytes
        start = matrix.start + first * matrix.input_row_bytes
        raw = lane.read(self.source_fd, "in", start, nbytes, self.plan.source.path)
        host = raw.view(_DTYPES[matrix.dtype]).view(last - first, matrix.columns)
        importance = lane.importance(matrix, self.settings.statistics)
        codes, scales = quantize_blocks(lane.to_device(host), self.settings.calibration, importance)
        codes, scales = lane.to_host("codes", codes), lane.to_host("scales", scales)
        lane.synchronize()
        if not bool(scales.view(torch.bfloat16).isfinite().all()):
            self.broken.add(matrix.weight.name)
        scale_row_bytes = 2 * blocks(matrix.columns)
        self.writer.write(matrix.weight.start + first * matrix.columns, _as_bytes(codes))
        self.writer.write(matrix.scale.start + first // BLOCK * scale_row_bytes, _as_bytes(scales))
        return nbytes

    def copy_bytes(self, lane: _Lane, item: Passthrough, first: int, last: int) -> int:
        """Bytes first..last of a tensor that is kept. Returns how many."""
        raw = lane.read(self.source_fd, "in", item.start + first, last - first, self.plan.source.path)
        self.writer.write(item.output.start + first, _as_bytes(raw))
        return last - first

    def check_scales(self, lane: _Lane, matrix: Matrix) -> str | None:
        raw = lane.read(self.output_fd, "in", matrix.scale.start, matrix.scale.nbytes, self.path)
        return verify.scale_problem(matrix.weight.name, raw.view(torch.bfloat16))

    def measure_rows(self, lane: _Lane, matrix: Matrix, first: int, last: int) -> verify.Errors:
        """Error of rows first..last of a matrix, both files read again."""
        rows, start = last - first, matrix.start + first * matrix.input_row_bytes
        row_blocks, column_blocks = blocks(rows), blocks(matrix.columns)
        scale_start = matrix.scale.start + first // BLOCK * 2 * column_blocks
        weights = lane.read(self.source_fd, "in", start, rows * matrix.input_row_bytes, self.plan.source.path)
        codes = lane.read(
            self.output_fd,
            "codes",
            matrix.weight.start + first * matrix.columns,
            rows * matrix.columns,
            self.path,
        )
        scales = lane.read(self.output_fd, "scales", scale_start, 2 * row_blocks * column_blocks, self.path)
        return verify.measure(
            lane.to_device(weights.view(_DTYPES[matrix.dtype]).view(rows, matrix.columns)),
            lane.to_device(codes.view(torch.float8_e4m3fn).view(rows, matrix.columns)),
            lane.to_device(scales.view(torch.bfloat16).view(row_blocks, column_blocks)),
        )

    def close(self) -> None:
        """Release files; removes the partial output if the shard was not committed."""
        if self.writer is not None:
            self.writer.abandon()
        for fd in (self.source_fd, self.output_fd):
            if fd >= 0:
                os.close(fd)
        self.source_fd = self.output_fd = -1

    def result(self) -> ShardResult:
        measurements = tuple(
            verify.combine(self.plan.matrices[i].weight.name, pieces)
            for i, pieces in sorted(self.errors.items())
        )
        return ShardResult(self.plan.name, self.plan.size, measurements, tuple(self.problems))


# --- all shards --------------------------------------------------------------------------------


class _Scheduler:
    """Hands pieces to worker threads, in order, and sees every shard through its stages.

    A shard is quantized, committed (fsync and rename, by a thread of its own) and verified. The next
    shard's pieces are handed out while the one before is committed and verified.
    """

    def __init__(self, output: Path, settings: Settings, on_bytes: Callable[[ShardPlan, int], None]) -> None:
        self.output = output
        self.settings = settings
        self.on_bytes = on_bytes
        self.piece = settings.piece or (CUDA_PIECE if settings.device.type == "cuda" else CPU_PIECE)
        self.workers = ThreadPoolExecutor(settings.workers, thread_name_prefix="worker")
        self.committer = ThreadPoolExecutor(1, thread_name_prefix="commit")
        self.in_flight: deque[tuple[_Job, Future, Callable[[object], None]]] = deque()
        self.committing: deque[tuple[_Job, Future]] = deque()
        self.jobs: list[_Job] = []
        self.finished: deque[_Job] = deque()
        self.lane = threading.local()

    def run(self, shards: list[ShardPlan], written: frozenset[str]) -> Iterator[ShardResult]:
        for plan in shards:
            job = self._open(plan)
            if plan.name in written:
                self.on_bytes(plan, plan.input_bytes)
                self._verify(job)
            else:
                job.writer = ShardWriter(job.path, plan.header, plan.size)
                self._submit_all(job, self._quantization(job))
            self._commit_ready()
            yield from self._results()
        while self.in_flight or self.committing:
            if self.in_flight:
                self._settle_oldest()
            self._commit_ready(wait=not self.in_flight)
            yield from self._results()

    def stop(self) -> None:
        """Let running pieces end, drop the rest, remove partial files."""
        self.workers.shutdown(wait=True, cancel_futures=True)
        self.committer.shutdown(wait=True, cancel_futures=True)
        for job in self.jobs:
            job.close()

    # Work of a shard: (function of a lane, what to do with its result in this thread).

    def _quantization(self, job: _Job) -> Iterator[tuple[Callable, Callable]]:
        def progress(count: int) -> None:
            self.on_bytes(job.plan, count)

        for item in job.plan.passthrough:
            for first in range(0, item.output.nbytes, _COPY_PIECE):
                last = min(first + _COPY_PIECE, item.output.nbytes)
                yield _bind(job.copy_bytes, item, first, last), progress
        for matrix in job.plan.matrices:
            for first, last in _pieces(matrix, self.piece):
                yield _bind(job.quantize_rows, matrix, first, last), progress

    def _verification(self, job: _Job) -> Iterator[tuple[Callable, Callable]]:
        def note(problem: str | None) -> None:
            if problem:
                job.problems.append(problem)

        for matrix in job.plan.matrices:
            yield _bind(job.check_scales, matrix), note
        position = {m.weight.name: i for i, m in enumerate(job.plan.matrices)}
        for matrix in verify.sample(job.plan, self.settings.verify_samples, self.settings.seed):
            pieces = job.errors.setdefault(position[matrix.weight.name], [])
            for first, last in _pieces(matrix, VERIFY_PIECE):
                yield _bind(job.measure_rows, matrix, first, last), pieces.append

    # Stages.

    def _open(self, plan: ShardPlan) -> _Job:
        try:
            source = os.open(plan.source.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise Fp8Error(f"{printable(plan.source.path)}: cannot be read ({error.strerror})") from None
        job = _Job(plan, self.output / plan.name, source, None, self.settings)
        self.jobs.append(job)
        return job

    def _submit_all(self, job: _Job, work: Iterator[tuple[Callable, Callable]]) -> None:
        job.all_submitted = False
        for function, then in work:
            while len(self.in_flight) >= 2 * self.settings.workers:
                self._settle_oldest()
            job.outstanding += 1
            self.in_flight.append((job, self.workers.submit(self._in_lane, function), then))
        job.all_submitted = True
        self._advance(job)

    def _in_lane(self, function: Callable) -> object:
        lane = getattr(self.lane, "value", None)
        if lane is None:
            lane = self.lane.value = _Lane(self.settings.device)
        with torch.inference_mode(), torch.cuda.stream(lane.stream):
            return function(lane)

    def _settle_oldest(self) -> None:
        job, future, then = self.in_flight.popleft()
        then(future.result())
        job.outstanding -= 1
        self._advance(job)

    def _advance(self, job: _Job) -> None:
        """Move a shard to its next stage once nothing of the present one is under way."""
        if job.outstanding or not job.all_submitted:
            return
        if job.writer is None:  # verified
            self.finished.append(job)
            return
        if job.broken:
            names = sorted(printable(name) for name in job.broken)
            shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if names[10:] else "")
            raise Fp8Error(f"{job.plan.name}: NaN or infinity in {shown}; repair the input model")
        self.committing.append((job, self.committer.submit(job.writer.commit)))

    def _commit_ready(self, wait: bool = False) -> None:
        """Start verifying shards whose files are durable by now."""
        while self.committing and (wait or self.committing[0][1].done()):
            job, future = self.committing.popleft()
            future.result()
            job.writer = None
            self._verify(job)
            wait = False

    def _verify(self, job: _Job) -> None:
        """Start measuring a shard that is complete on disk."""
        if not self.settings.verify:
            self.finished.append(job)
            return
        job.problems = verify.structural_problems(job.plan, job.path)
        job.output_fd = os.open(job.path, os.O_RDONLY | os.O_CLOEXEC)
        # What is not where the plan says cannot be measured by the plan's offsets.
        self._submit_all(job, [] if job.problems else self._verification(job))

    def _results(self) -> Iterator[ShardResult]:
        while self.finished:
            job = self.finished.popleft()
            self.jobs.remove(job)
            job.close()
            yield job.result()


def _bind(method: Callable, *arguments: object) -> Callable[[_Lane], object]:
    return lambda lane: method(lane, *arguments)


def _pieces(matrix: Matrix, weights: int) -> Iterator[tuple[int, int]]:
    step = rows_per_piece(matrix.columns, weights)
    for first in range(0, matrix.rows, step):
        yield first, min(first + step, matrix.rows)
