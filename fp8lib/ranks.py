"""The processes of a job: one, or as many as `torchrun` started.

There is no scheduler here. Ranks share the key-value store that torchrun already runs for them
(torch.distributed's TCPStore; no process group is made): work is claimed from a counter as ranks become
free, results and the first error are left under keys, and rank 0 speaks for all.
"""

import json
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import TypeVar

from fp8lib import Fp8Error

Work = TypeVar("Work")

_INTERVAL = 0.5
"""Seconds between a rank's looks at the store while it works."""
_LEAVING = 10.0
"""Seconds a rank waits for the others to be ready to exit with it."""


class Ranks:
    """This process among the others; alone, every method does the obvious thing without a store.

    Attributes:
        rank: 0 in the process that plans, refuses, reports and writes everything but shards.
        world: number of processes.
        local_rank, local_world: the same on this machine.
    """

    def __init__(self) -> None:
        self.rank = self.local_rank = 0
        self.world = self.local_world = 1
        self._store = None
        self._results_seen = 0
        self._bytes = self._sent_bytes = 0
        self._looked = 0.0
        if "TORCHELASTIC_RUN_ID" in os.environ:
            from torch.distributed import rendezvous

            self._store, self.rank, self.world = next(rendezvous("env://"))
            self.local_rank = int(os.environ["LOCAL_RANK"])
            self.local_world = int(os.environ["LOCAL_WORLD_SIZE"])

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def publish(self, key: str, value: object) -> None:
        """Leave a JSON value for the other ranks."""
        if self._store is not None:
            self._store.set(key, json.dumps(value))

    def wait_for(self, key: str) -> object:
        """A value that another rank publishes.

        Raises:
            Fp8Error: some rank failed meanwhile.
        """
        while not self._store.check([key]):
            self._raise_failure()
            time.sleep(_INTERVAL / 10)
        return json.loads(self._store.get(key))

    def claims(self, work: Sequence[Work]) -> Iterator[Work]:
        """The items of a list, the same on every rank, that fall to this one: the next, whenever asked."""
        if self._store is None:
            yield from work
            return
        while (position := self._store.add("claimed", 1) - 1) < len(work):
            yield work[position]

    def count(self, key: str) -> int:
        """Add one to a shared counter and return its value."""
        return 1 if self._store is None else self._store.add(key, 1)

    # Results and progress.

    def send_result(self, result: object) -> None:
        """Leave a JSON value for rank 0."""
        self._store.set(f"result/{self._store.add('results', 1)}", json.dumps(result))

    def new_results(self) -> Iterator[object]:
        """What other ranks have sent since the last call."""
        if self._store is None:
            return
        while self._results_seen < self._store.add("results", 0):
            key = f"result/{self._results_seen + 1}"
            if not self._store.check([key]):
                return  # counted but not written yet
            self._results_seen += 1
            yield json.loads(self._store.get(key))

    def progress(self, count: int) -> int | None:
        """Report bytes done; now and then returns how many all ranks have done in total.

        Raises:
            Fp8Error: some rank failed meanwhile.
        """
        self._bytes += count
        if self._store is None:
            return self._bytes
        if time.monotonic() - self._looked < _INTERVAL:
            return None
        return self.look()

    def look_again(self) -> int:
        """`look`, a moment later: for a rank that has nothing else to do."""
        time.sleep(_INTERVAL / 5)
        return self.look()

    def look(self) -> int:
        """Exchange progress with the other ranks now; returns bytes done by all.

        Raises:
            Fp8Error: some rank failed meanwhile.
        """
        if self._store is None:
            return self._bytes
        self._looked = time.monotonic()
        self._raise_failure()
        unsent, self._sent_bytes = self._bytes - self._sent_bytes, self._bytes
        return self._store.add("bytes", unsent)

    # The end.

    def fail(self, message: str) -> None:
        """Tell the other ranks why this one stops; the first to fail is heard."""
        if self._store is not None:
            with suppress(RuntimeError):  # the store may be gone with its owner
                if self._store.add("failures", 1) == 1:
                    self._store.set("failure", message)

    def leave(self) -> None:
        """Exit together: torchrun ends whoever is left when the first process has failed."""
        if self._store is None:
            return
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with suppress(RuntimeError):
            left, deadline = self._store.add("left", 1), time.monotonic() + _LEAVING
            while left < self.world and time.monotonic() < deadline:
                time.sleep(_INTERVAL / 10)
                left = self._store.add("left", 0)

    def _raise_failure(self) -> None:
        if self._store.check(["failure"]):
            raise Fp8Error(self._store.get("failure").decode())
