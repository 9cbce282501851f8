"""SHA-256 of a file whose bytes come nearly in order, from several threads."""

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress


class OrderedDigest:
    """Hashes in a thread of its own: a shard's bytes one after the other, several shards at a time.

    No byte is copied. Whoever adds a buffer waits until it is hashed before the buffer is used again. That
    ends, because pieces are handed out in the order of the file: the first one that is not hashed yet
    waits for nobody. Only a shard's scales come early, 1/8192 of its weights' bytes: add a copy of them.

    Args:
        header: the file's first bytes.
    """

    def __init__(self, header: bytes) -> None:
        self._hash = hashlib.sha256(header)
        self._end = len(header)
        self._waiting: dict[int, tuple[bytes | memoryview, Future]] = {}
        self._dropped = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sha256")

    def add(self, start: int, data: bytes | memoryview) -> Future:
        """Hash `data`, which lies at `start`, when all before it is; the future is done then."""
        done: Future = Future()
        try:
            self._thread.submit(self._take, start, data, done)
        except RuntimeError:  # dropped
            done.cancel()
        return done

    def _take(self, start: int, data: bytes | memoryview, done: Future) -> None:
        self._waiting[start] = data, done
        while not self._dropped and self._end in self._waiting:
            data, done = self._waiting.pop(self._end)
            self._hash.update(data)
            self._end += len(data)
            done.set_result(None)
        if self._dropped:
            self._cancel()

    def hexdigest(self, size: int) -> str:
        """The digest of the file, all of whose `size` bytes were added."""
        self._thread.submit(int).result()  # the scales are hashed behind the last weights
        self._thread.shutdown()
        if self._end != size:
            raise AssertionError(f"{size - self._end} bytes of the file were not written")
        return self._hash.hexdigest()

    def drop(self) -> None:
        """Hash no more: whoever waits gets a `CancelledError`."""
        self._dropped = True
        with suppress(RuntimeError):  # the file was complete, and nobody waits
            self._thread.submit(self._cancel)
        self._thread.shutdown(wait=False)

    def _cancel(self) -> None:
        for _, done in self._waiting.values():
            done.cancel()
        self._waiting.clear()
