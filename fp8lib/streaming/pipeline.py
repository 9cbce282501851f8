"""read -> quantize -> write, in bounded pieces, overlapped.

A piece is a few hundred rows of one matrix, always whole rows of blocks. A worker thread takes a piece
through its steps: `pread` into its own buffer, the kernels, and, in a second thread of the worker's lane,
`pwrite` at the offsets the plan gave, while the worker is at its next piece. Threads are enough, because
reading, torch's kernels and writing all release the interpreter lock.

On CUDA each worker has its own stream and pinned buffers, so that copies in both directions overlap with
kernels. Pieces are larger there, and small matrices that follow each other in the file make up one of them:
one read, one sequence of kernels, one write, because the host would take longer than the device over the
99 % of a mixture of experts that are matrices of a million weights. Reading is left to threads of its own,
which have many reads under way at once. A check that reads a shard back has them on a CPU, too.

Memory is pieces under way x piece, whatever the size of a tensor or a shard. Nothing a worker computes
depends on another piece, so neither the number of workers nor the size of a piece can change a byte.

The calling thread hands out pieces in order, a few per worker ahead, and is the only one that
touches progress, results and shards' beginnings and ends. Waiting for the disk to make a finished shard
durable is left to a thread of its own; meanwhile the next shard is under way.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from fp8lib.checkpoint.layout import ShardPlan
from fp8lib.streaming.devices import make_current
from fp8lib.streaming.lanes import keep_freed_memory
from fp8lib.streaming.scheduler import Done, Scheduler, ToCheck
from fp8lib.streaming.shard_job import Check, Settings
from fp8lib.streaming.sums import Sums
from fp8lib.streaming.units import Unit


def process(
    work: Iterable[Unit | ToCheck],
    output: Path,
    settings: Settings,
    on_bytes: Callable[[str, int], None] = lambda name, count: None,
    is_last_part: Callable[[Unit], bool] = lambda unit: True,
    check: Callable[[ShardPlan, Path], Check] | None = None,
    add_up: Callable[[Unit, Sums], Sums] = lambda unit, sums: sums,
) -> Iterator[Done]:
    """Quantize, write and check shards.

    Yields:
        Each shard once its file is durable, and again, `final`, when it is checked; only once, `final`,
        where there is no check. Before an error is raised, the shards that were complete by then.

    Args:
        work: what to do, in this order; taken from the iterable one by one, when a worker is free.
        output: an existing directory.
        settings: how.
        on_bytes: called in this thread with (shard's name, bytes done since the last call): of the input, or
            of the file that is only checked.
        is_last_part: called, from another thread, when a part is durable: whether it was the shard's
            last, so that this process completes the shard. Only then is it yielded.
        check: (plan, path) -> what to do with a shard that was just completed.
        add_up: called, from another thread, before `is_last_part`: adds a part's sums to those of the
            shard's other parts, and returns what they come to so far.

    Raises:
        Fp8Error: unreadable input, NaN or infinity in a weight, a full disk. No partial file is left.
    """
    keep_freed_memory()
    make_current(settings.device)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # parallelism comes from the workers
    scheduler = Scheduler(output, settings, on_bytes, is_last_part, check, add_up)
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
