"""A lane whose copies are as late as CUDA allows, and whose writer is as fast or as slow as it may be.

A copy to the host that was queued lands when somebody waits for its stream: until then the buffer holds
something else. A copy to the device reads its source when somebody waits for it: has the source changed by
then, `LateReadError` is raised, as the device would have computed with other bytes.

`drive` takes a shard through its tasks in one thread, in the order that does the most harm, so that what is
wrong shows every time and not when threads happen to meet.
"""

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future

import torch

from fp8lib.streaming.lanes import Lane
from pretended_device import PretendedCuda, Stream


class LateReadError(AssertionError):
    """The source of a queued copy was overwritten before anyone waited for the copy."""


class LateCuda(PretendedCuda):
    """A pretended device with late copies."""

    def __init__(self, *arguments: object, **more: object) -> None:
        super().__init__(*arguments, **more)
        self._queued: dict[Stream, list[Callable[[], None]]] = {}

    def uploading(self, host: torch.Tensor, stream: Stream) -> None:
        expected = _bytes(host).clone()

        def read() -> None:
            if not torch.equal(_bytes(host), expected):
                raise LateReadError(f"the source of a copy of {host.nbytes} bytes was overwritten")

        self._queued.setdefault(stream, []).append(read)

    def downloading(self, values: torch.Tensor, host: torch.Tensor, stream: Stream) -> None:
        values = _bytes(values).clone()
        _bytes(host).copy_(values.bitwise_not())
        self._queued.setdefault(stream, []).append(lambda: _bytes(host).copy_(values))

    def wait(self, reason: str, stream: Stream, times: int = 1) -> None:
        super().wait(reason, stream, times)
        for action in self._queued.pop(stream, []):
            action()


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)


class _Later(Future):
    """A future whose work is done when its result is wanted."""

    def __init__(self, work: Callable[[], object]) -> None:
        super().__init__()
        self._work = work

    def result(self, timeout: float | None = None) -> object:
        if not self.done():
            self.set_result(self._work())
        return super().result(timeout)


class SlowPool:
    """Stands for a thread that comes to its work as late as it may."""

    def submit(self, function: Callable, *arguments: object) -> Future:
        return _Later(lambda: function(*arguments))

    def shutdown(self, **_: object) -> None:
        pass


class HastyPool(SlowPool):
    """Stands for a thread that does its work at once."""

    def submit(self, function: Callable, *arguments: object) -> Future:
        later = super().submit(function, *arguments)
        later.result()
        return later


def wait_for(futures: Iterable[Future]) -> None:
    """Stands for `concurrent.futures.wait`, which would wait for a `_Later` in vain."""
    for future in futures:
        future.result()


def drive(tasks: Iterable, lane: Lane, in_flight: int, compute_late: bool) -> None:
    """What a scheduler with one worker does with tasks, in one thread.

    Args:
        tasks: of a shard, as (function, what to do with its outcome).
        lane: of the worker.
        in_flight: tasks that are handed out and not settled.
        compute_late: a task runs when it is to be settled, which leaves the most time to overwrite what it
            reads; otherwise as soon as it is handed out, which leaves the most to overwrite what it writes.
    """
    handed_out: deque[tuple[Future, Callable]] = deque()
    pool = SlowPool() if compute_late else HastyPool()

    def run(function: Callable[[Lane], object]) -> object:
        with torch.inference_mode(), lane.as_current():
            return function(lane)

    def settle() -> None:
        future, then = handed_out.popleft()
        then(future.result())

    for function, then in tasks:
        while len(handed_out) >= in_flight:
            settle()
        handed_out.append((pool.submit(run, function), then))
    while handed_out:
        settle()
