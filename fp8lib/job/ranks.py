"""The processes of a job: one, or as many as `torchrun` started.

There is no scheduler here. Ranks share the key-value store that torchrun already runs for them
(torch.distributed's TCPStore): work is claimed from a counter as ranks become free, results and the first
error are left under keys, and rank 0 speaks for all.

torch.distributed's process groups were looked at. Their collectives need every rank at the same point at the
same time, have no queue to claim work from, and hang until a timeout when a rank dies.

torchrun leaves two problems to its processes:

- The store outlives the ranks. After a restart (`--max-restarts`) it still holds what the last attempt left,
  and the machines of a job may count attempts differently. So rank 0 gives every attempt a new name, all keys
  begin with that name, and another rank accepts a name only after it has seen rank 0 beat under it.
- When a rank dies, torchrun ends the ranks of the same machine only. So every rank adds to a counter of its
  own, its pulse, and watches the next rank's.
"""

import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import TypeVar

from fp8lib import Fp8Error

Work = TypeVar("Work")

_INTERVAL = 0.25
"""Seconds between a rank's looks at the store, and between two beats of its pulse."""
_SILENCE = 60.0
"""Seconds after which a rank gives up another that it has heard before."""
_ABSENCE = 600.0
"""The same for one that it has never heard: machines start, and import torch, at their own speed."""
_PART = 4 << 20
"""Bytes under one key: the store takes messages up to 8 MiB."""
_LEAVING = 10.0
"""Seconds a rank waits for the others to be ready to exit with it."""


class Ranks:
    """This process among the others; alone, every method does the obvious thing without a store.

    Attributes:
        rank: 0 in the process that plans, refuses, reports and writes everything but shards.
        world: number of processes.
        local_rank, local_world: the same on this machine.
        attempt: a name that all ranks of this attempt at the job have in common, and no others.

    Raises:
        Fp8Error: rank 0 does not come.
        SystemExit: the job has ended, in words or with a verdict, which another attempt would repeat.
    """

    def __init__(self) -> None:
        self.rank = self.local_rank = 0
        self.world = self.local_world = 1
        self.attempt = uuid.uuid4().hex
        self._store = None
        self._failure: str | None = None
        self._results_seen = 0
        self._sent: str | None = None
        self._bytes = self._sent_bytes = 0
        self._counter = "bytes"
        self._looked = 0.0
        if "TORCHELASTIC_RUN_ID" in os.environ:
            self._join()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    # The beginning.

    def _join(self) -> None:
        from torch.distributed import PrefixStore, rendezvous

        self._all_attempts, self.rank, self.world = next(rendezvous("env://"))
        self.local_rank = int(os.environ["LOCAL_RANK"])
        self.local_world = int(os.environ["LOCAL_WORLD_SIZE"])
        self._exit_if_over()
        if self.is_main:
            self._all_attempts.set("attempt", self.attempt)
        else:
            self.attempt = self._await_attempt()
        self._store = PrefixStore(self.attempt, self._all_attempts)
        self._gone = threading.Event()
        self._pulse = threading.Thread(target=self._keep_pulse, daemon=True)
        self._pulse.start()
        if self._store.add(f"joined/{self.rank}", 1) > 1:
            # Happens only with a static rendezvous. The work that the dead process had claimed is lost.
            self._stop_all(f"rank {self.rank} was restarted alone; use torchrun's --rdzv-backend c10d")

    def _await_attempt(self) -> str:
        """The attempt in which rank 0 is alive. All ranks of the attempt before have ended by now."""
        seen: tuple[str, int] | None = None
        for _ in range(round(_ABSENCE / _INTERVAL * 10)):
            self._exit_if_over()
            if self._all_attempts.check(["attempt"]):
                attempt = self._all_attempts.get("attempt").decode()
                now = attempt, self._all_attempts.add(f"{attempt}/pulse/0", 0)
                if seen is not None and now[0] == seen[0] and now[1] > seen[1]:
                    return attempt
                seen = now
            time.sleep(_INTERVAL / 10)
        raise Fp8Error("rank 0 has not been heard of; look at what its machine says")

    def _exit_if_over(self) -> None:
        from torch.distributed import PrefixStore

        if self._all_attempts.check(["exit code"]):
            if self._all_attempts.check(["attempt"]):  # rank 0 may be waiting for this one to leave
                PrefixStore(self._all_attempts.get("attempt").decode(), self._all_attempts).add("left", 1)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as in `leave`
            raise SystemExit(int(self._all_attempts.get("exit code")))

    def _keep_pulse(self) -> None:
        """Add to the pulse, and watch the next rank, failures and new attempts. Runs in its own thread."""
        other = (self.rank + 1) % self.world
        heard, silence = 0, 0.0
        while True:
            try:
                self._store.add(f"pulse/{self.rank}", 1)
                beats = self._store.add(f"pulse/{other}", 0)
                # Silence is counted in own beats, not by a clock: both stop while a machine is suspended.
                silence = silence + _INTERVAL if beats == heard else 0.0
                heard = beats
                if silence == (_SILENCE if heard else _ABSENCE):
                    self._stop_all(f"rank {other} has not been heard of for {silence:.0f} s")
                    self._store.add("left", 1)  # on behalf of the silent rank
                if self._store.check(["failure"]):
                    self._failure = self._store.get("failure").decode()
                elif self._all_attempts.get("attempt").decode() != self.attempt:
                    self._failure = "rank 0 was restarted"
            except RuntimeError:  # its owner is gone
                self._failure = self._failure or "torchrun's store is gone"
                return
            if self._gone.wait(_INTERVAL):
                return

    # Sharing.

    def publish(self, key: str, value: object) -> None:
        """Leave a JSON value for the other ranks."""
        if self._store is not None:
            self._store.set(key, json.dumps(value))

    def wait_for(self, key: str) -> object:
        """A value that another rank publishes.

        Raises:
            Fp8Error: some rank failed meanwhile.
        """
        return self.wait_for_first(key)[1]

    def wait_for_first(self, *keys: str) -> tuple[str, object]:
        """The first of several values that is there, the first of these keys if several are, and its key.

        Raises:
            Fp8Error: some rank failed meanwhile.
        """
        while True:
            for key in keys:
                if self._store.check([key]):
                    return key, json.loads(self._store.get(key))
            self._wait()

    def send(self, key: str, data: bytes) -> None:
        """Leave bytes for rank 0, which takes them out of the store; before that nothing else is sent.

        Raises:
            Fp8Error: some rank failed meanwhile.
        """
        self.look()
        while self._sent is not None and self._store.check([self._sent]):
            self._wait()
        parts = range(0, len(data), _PART)
        for number, start in enumerate(parts):
            self._store.set(f"{key}/{number}", data[start : start + _PART])
        self._store.set(key, str(len(parts)))
        self._sent = key

    def receive(self, key: str) -> bytes:
        """What another rank sends.

        Raises:
            Fp8Error: some rank failed meanwhile.
        """
        while not self._store.check([key]):
            self._wait()
        parts = []
        for number in range(int(self._store.get(key))):
            parts.append(self._store.get(f"{key}/{number}"))
            self._store.delete_key(f"{key}/{number}")
        self._store.delete_key(key)
        return b"".join(parts)

    def _wait(self) -> None:
        self._raise_failure()
        time.sleep(_INTERVAL / 10)

    def claims(self, work: Sequence[Work]) -> Iterator[Work]:
        """Claim items of a list, which is the same on every rank: each `next` claims the next free one."""
        yield from self.share("work", work)

    def share(self, what: str, work: Sequence[Work]) -> Iterator[Work]:
        """The same for work of another name, which comes before."""
        if self._store is None:
            yield from work
            return
        self._store.add(f"at {what}", 1)
        while (position := self._store.add(f"claimed {what}", 1) - 1) < len(work):
            yield work[position]

    def all_at_work(self, what: str = "work") -> bool:
        """Whether every rank has come as far as `claims`, or `share`, with nothing to refuse."""
        return self._store is None or self._store.add(f"at {what}", 0) == self.world

    def count(self, key: str) -> int:
        """Add one to a shared counter and return its value."""
        return 1 if self._store is None else self._store.add(key, 1)

    def add(self, key: str, number: int) -> int:
        """Add to a shared sum, which stays below 2^63, and return it."""
        return number if self._store is None else self._store.add(key, number)

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
        """Report work done, such as bytes; now and then returns how much all ranks have done in total.

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
        return self._store.add(self._counter, unsent)

    def count_anew(self, what: str) -> None:
        """Progress is that of another part of the run from now on, on every rank."""
        self._bytes = self._sent_bytes = 0
        self._counter = what

    # The end.

    def fail(self, error: Exception) -> None:
        """Tell the other ranks why this one stops; only the first failure counts.

        An Fp8Error is final: if torchrun starts the ranks again, they exit at once and print nothing.
        """
        if self._store is None or self._failure is not None:
            return
        final = isinstance(error, Fp8Error)
        lines = str(error).splitlines() or [""]
        message = lines[0] if final else f"{type(error).__name__}: {lines[0]}"
        if self.world > self.local_world:
            message = f"{socket.gethostname()}: {message}"
        self._stop_all(message, final)

    def leave(self, exit_code: int | None = None) -> None:
        """Wait for the others before exiting: torchrun kills the rest when the first process fails.

        Args:
            exit_code: of a job that came to its end. A rank that is late or restarted exits with it, too.
        """
        if self._store is None:
            return
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with suppress(RuntimeError):
            if exit_code is not None:
                self._all_attempts.set("exit code", str(exit_code))
            left, deadline = self._store.add("left", 1), time.monotonic() + _LEAVING
            while left < self.world and time.monotonic() < deadline:
                time.sleep(_INTERVAL / 10)
                left = self._store.add("left", 0)
        self._gone.set()
        self._pulse.join(_LEAVING)

    def _stop_all(self, message: str, final: bool = False) -> None:
        with suppress(RuntimeError):  # the store may be gone with its owner
            if self._store.add("failures", 1) == 1:
                if final:
                    self._all_attempts.set("exit code", "2")
                self._store.set("failure", message)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise Fp8Error(self._failure)


def refuse_together(error: Exception) -> None:
    """Report a wrong flag on all ranks together. Otherwise torchrun might kill rank 0 before it prints."""
    ranks = Ranks()
    ranks.fail(error)
    ranks.leave()
