"""Hands pieces of shards to worker threads, in order, and sees every shard through its stages.

quantize -> commit (fsync and rename, in a thread of its own) -> check -> done
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch

from fp8lib.checkpoint.headers import Shard
from fp8lib.checkpoint.layout import ShardPlan
from fp8lib.streaming.devices import make_current
from fp8lib.streaming.lanes import Lane, ReadAhead
from fp8lib.streaming.shard_job import Check, Settings, ShardJob, Task
from fp8lib.streaming.sums import Sums
from fp8lib.streaming.units import Unit

_IN_FLIGHT = 4
"""Pieces per worker that are handed out and not settled: computed, written, and two more."""


@dataclass(frozen=True, slots=True)
class ToCheck:
    """A shard that is complete on disk and only to be checked.

    Attributes:
        name, size: of the file.
        check: what to do with it, or None.
        sources: the input shards it was made from, as far as they are known.
        hashed: where it is, to take its digest; None if that is not asked for.
        sums: what its codes and scales add up to, if that is known.
    """

    name: str
    size: int
    check: Check | None
    sources: tuple[Shard, ...] = ()
    hashed: Path | None = None
    sums: Sums | None = None


@dataclass(frozen=True, slots=True)
class Done:
    """A shard that is complete on disk.

    Attributes:
        name, size: of the file.
        sha256: of the file, or None if it was not asked for.
        sums: what its codes and scales added up to when they were written, None if that is not known.
        check: what looked at it, or None.
        final: False if the check is still to come.
    """

    name: str
    size: int
    sha256: str | None
    sums: Sums | None
    check: Check | None
    final: bool


class Scheduler:
    """Runs in one thread, which alone touches jobs and results.

    Args:
        output: directory of the output.
        settings: how shards are processed.
        on_bytes: called with (shard's name, bytes done since the last call): of the input, or of the file
            that is only checked.
        is_last_part: called from the committing thread when a part is durable.
        check: makes the check of a shard that was just completed; None for no checks.
        add_up: adds the sums of one of several parts to the others', and returns those of all so far.
    """

    def __init__(
        self,
        output: Path,
        settings: Settings,
        on_bytes: Callable[[str, int], None],
        is_last_part: Callable[[Unit], bool],
        check: Callable[[ShardPlan, Path], Check] | None,
        add_up: Callable[[Unit, Sums], Sums],
    ) -> None:
        self.output = output
        self.settings = settings
        self.on_bytes = on_bytes
        self.is_last_part = is_last_part
        self.check = check
        self.add_up = add_up
        self.workers = ThreadPoolExecutor(
            settings.workers, "worker", initializer=make_current, initargs=(settings.device,)
        )
        self.committer = ThreadPoolExecutor(1, thread_name_prefix="commit")
        readers = settings.reading_threads or settings.workers
        self.ahead = ReadAhead(settings.device, readers, _IN_FLIGHT * settings.workers + 1)
        self.handing_out: deque[tuple[ShardJob, Iterator[Task]]] = deque()
        self.in_flight: deque[tuple[ShardJob, Future, Callable[[object], None]]] = deque()
        self.committing: deque[tuple[ShardJob, Future]] = deque()
        self.durable: deque[ShardJob] = deque()
        self.jobs: list[ShardJob] = []
        self.done: deque[Done] = deque()
        self.thread = threading.local()
        self.lanes: list[Lane] = []

    def run(self, work: Iterable[Unit | ToCheck]) -> Iterator[Done]:
        """Process all of the work; yields shards as they are completed, and again when they are checked."""
        for item in work:
            if isinstance(item, Unit):
                yield from self._make_room()
                self._start(item)
                yield from self._hand_out(self.settings.shards_at_once - 1)
            else:
                yield from self._check_complete(item)
            yield from self._check_durable()
        yield from self._hand_out(0)
        while self.in_flight or self.committing or self.durable:
            yield from self._check_durable() if self.durable else self._step()
        yield from self._results()

    def stop(self, wait_for_disk: bool) -> None:
        """Let running pieces end, drop the rest, remove partial files."""
        for job in self.jobs:
            job.drop_checksum()  # or a worker would wait for bytes that do not come any more
        self.workers.shutdown(wait=True, cancel_futures=True)
        for lane in self.lanes:
            lane.stop()
        self.ahead.stop()
        self.committer.shutdown(wait=wait_for_disk, cancel_futures=not wait_for_disk)
        for job in self.jobs:
            job.close()

    def became_durable(self) -> Iterator[Done]:
        """After `stop`: shards that an error elsewhere did not keep from being completed."""
        yield from self._results()
        for job, commit in self.committing:
            if not commit.exception() and commit.result():
                yield self._done(job, final=False)

    def _step(self) -> Iterator[Done]:
        """Wait for the oldest piece or, if none is under way, the oldest commit; hand out what that ends."""
        if self.in_flight:
            self._settle_oldest()
        else:
            wait([self.committing[0][1]])
        self._collect_commits()
        yield from self._results()

    def _make_room(self) -> Iterator[Done]:
        """Wait while as many shards are half written as there are workers: a crash leaves their files."""
        most = max(self.settings.workers, 2) + self.settings.shards_at_once - 1
        while sum(job.writer is not None for job in self.jobs) >= most:
            yield from self._step()

    def _start(self, unit: Unit) -> None:
        plan = unit.plan
        job = ShardJob(plan.name, plan.size, self.settings, sources=plan.sources, unit=unit)
        self.jobs.append(job)
        job.refuse_changed()
        job.open_output(self.output)
        job.all_submitted = False
        self.handing_out.append((job, job.tasks(self.on_bytes, self.ahead)))

    def _hand_out(self, left: int) -> Iterator[Done]:
        """Hand out pieces of the shards that were started, in turn, until only so many of them have any."""
        while len(self.handing_out) > left:
            job, tasks = self.handing_out.popleft()
            if (task := next(tasks, None)) is None:
                job.all_submitted = True
                self._advance(job)
            else:
                self.handing_out.append((job, tasks))
                yield from self._submit_one(job, *task)

    def _check_complete(self, item: ToCheck) -> Iterator[Done]:
        job = ShardJob(item.name, item.size, self.settings, sources=item.sources, check=item.check)
        job.hashed, job.sums = item.hashed, item.sums
        self.jobs.append(job)
        yield from self._check(job)

    def _check_durable(self) -> Iterator[Done]:
        while self.durable:
            yield from self._check(self.durable.popleft())

    def _check(self, job: ShardJob) -> Iterator[Done]:
        """Start checking a shard that is complete on disk."""
        job.stage = "check"
        found = job.check.tasks(job.files, self.ahead) if job.check else ()
        yield from self._submit(job, chain(found, job.hash_tasks(self.ahead)))

    def _submit(self, job: ShardJob, tasks: Iterable[Task]) -> Iterator[Done]:
        job.all_submitted = False
        for task in tasks:
            yield from self._submit_one(job, *task)
        job.all_submitted = True
        self._advance(job)

    def _submit_one(self, job: ShardJob, function: Callable, then: Callable) -> Iterator[Done]:
        while len(self.in_flight) >= _IN_FLIGHT * self.settings.workers:
            yield from self._step()
        job.outstanding += 1
        self.in_flight.append((job, self.workers.submit(self._in_lane, function), then))

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
        if job.unit is None:
            self._report(job, job.files.bytes_read(self.output / job.name))
        self._advance(job)

    def _report(self, job: ShardJob, nbytes: int) -> None:
        """Tell progress how much of a shard that is only checked was looked at."""
        nbytes = min(nbytes, job.size)  # scales are read twice
        if nbytes > job.reported:
            self.on_bytes(job.name, nbytes - job.reported)
            job.reported = nbytes

    def _advance(self, job: ShardJob) -> None:
        """Move a shard to its next stage once nothing of the present one is under way."""
        if job.outstanding or not job.all_submitted:
            return
        job.refuse_changed()  # first: it would explain a NaN, and an error that no rounding makes
        if job.stage == "quantize":
            job.refuse_broken()
            job.finish_checksum()
            commit = self.committer.submit(job.make_durable, self.is_last_part, self.add_up)
            self.committing.append((job, commit))
        else:
            if job.hashed is not None:
                job.finish_checksum()
            if job.unit is None:
                self._report(job, job.size)  # a sample leaves out most of it
            self._close(job)
            self.done.append(self._done(job, final=True))

    def _collect_commits(self) -> None:
        """Take note of the shards that are durable by now."""
        while self.committing and self.committing[0][1].done():
            job, commit = self.committing.popleft()
            complete = commit.result()
            job.writer = None
            if not complete:
                self._close(job)
            elif self.check is not None:
                job.check = self.check(job.unit.plan, self.output / job.name)
                self.done.append(self._done(job, final=False))
                self.durable.append(job)
            else:
                self._close(job)
                self.done.append(self._done(job, final=True))

    def _close(self, job: ShardJob) -> None:
        self.jobs.remove(job)
        job.close()

    @staticmethod
    def _done(job: ShardJob, final: bool) -> Done:
        return Done(job.name, job.size, job.sha256, job.sums, job.check if final else None, final)

    def _results(self) -> Iterator[Done]:
        while self.done:
            yield self.done.popleft()
