"""What a worker thread works with: files to read from, host buffers, a device and a stream on it, a thread
that writes behind it and others that read ahead."""

import ctypes
import mmap
import os
import threading
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext, suppress
from enum import Enum, auto
from pathlib import Path

import torch

from fp8lib import Fp8Error
from fp8lib.checkpoint.headers import Shard
from fp8lib.checkpoint.layout import PAGE
from fp8lib.checkpoint.untrusted import printable
from fp8lib.streaming.devices import make_current
from fp8lib.streaming.direct import is_refusal, open_direct, takes_direct

_OUTPUTS = 3
"""Sets of output buffers of a lane: one is filled, one written, and one waits for when the disk is slow."""

_LARGEST_ITEM = 8
"""Bytes on a multiple of which any element may begin: elsewhere a buffer could not be viewed as them."""

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
"""Torch's dtype for the dtypes that weights and scales may have."""


class Way(Enum):
    """Where bytes are read from."""

    CACHE = auto()
    """The page cache, which has them or gets them."""
    DISK = auto()
    """The disk itself, past the page cache, where that is possible."""
    NEAREST = auto()
    """The page cache as far as it has them, the rest as with DISK."""


def keep_freed_memory() -> None:
    """Let glibc keep freed buffers instead of returning them to the kernel.

    Kernels allocate their temporaries afresh for every piece. CUDA's allocator caches them; glibc maps
    and unmaps each, and the page faults cost more than the arithmetic (`mse` on a CPU: 4.9 ns per weight
    instead of 1.8). Elsewhere this does nothing.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, at its upper limit
        mallopt(-1, 256 << 20)  # M_TRIM_THRESHOLD


class Files:
    """Files open for reading, each once; any thread may read from them."""

    def __init__(self) -> None:
        self._descriptors: dict[tuple[Path, bool], int] = {}
        self._read: Counter[Path] = Counter()
        self._refuses_direct: set[Path] = set()  # its descriptor stays open: others may be using it
        self._lock = threading.Lock()

    def read_into(self, buffer: torch.Tensor, path: Path, start: int) -> None:
        """Fill a uint8 host tensor with a file's bytes from `start` on.

        `pread` into a buffer that is used again: a mapped file would count as resident memory, and
        every page of it would fault.

        Raises:
            Fp8Error: the file ends early or cannot be read.
        """
        view = memoryview(buffer.numpy())
        try:
            while len(view):
                count = os.preadv(self._open(path), [view], start)
                if count == 0:
                    raise Fp8Error(
                        f"{printable(path)}: became shorter while it was read; restore it and run again"
                    )
                view, start = view[count:], start + count
                self._count(path, count)
        except OSError as error:
            raise Fp8Error(f"{printable(path)}: cannot be read ({error.strerror})") from None

    def read_pages(self, buffer: torch.Tensor, path: Path, start: int, nbytes: int, cached: bool) -> int:
        """Read past the page cache, as far as that is possible.

        Whole pages are read, which direct I/O wants: the page of a file that holds byte `start` goes to the
        beginning of the buffer.

        Args:
            buffer: uint8 host tensor that begins on a page and ends on one behind the last byte.
            path: of the file.
            start: of the bytes wanted.
            nbytes: their number.
            cached: take first what the page cache has of them.

        Returns:
            How many of the bytes wanted are in the buffer, from `start % PAGE` on.

        Raises:
            Fp8Error: the file cannot be read.
        """
        view, skip, done = memoryview(buffer.numpy()), start % PAGE, 0
        try:
            if cached and hasattr(os, "RWF_NOWAIT"):
                with suppress(OSError):  # EAGAIN: it has none of them. Another error will come again
                    done = os.preadv(self._open(path), [view[skip : skip + nbytes]], start, os.RWF_NOWAIT)
            direct = self._open_direct(path)
            while done < nbytes and direct >= 0:
                page = (skip + done) // PAGE * PAGE
                end = -(-(skip + nbytes) // PAGE) * PAGE
                count = os.preadv(direct, [view[page:end]], start - skip + page)
                if page + count <= skip + done:  # the file ends here
                    break
                done = min(page + count - skip, nbytes)
        except OSError as error:
            if not is_refusal(error):
                raise Fp8Error(f"{printable(path)}: cannot be read ({error.strerror})") from None
            self._refuses_direct.add(path)
        self._count(path, done)
        return done

    def bytes_read(self, path: Path) -> int:
        """Bytes that were read from a file so far, those read twice counted twice."""
        return self._read[path]

    def _count(self, path: Path, nbytes: int) -> None:
        with self._lock:
            self._read[path] += nbytes

    def refuse_changed(self, shard: Shard) -> None:
        """Refuse a file that is not, or no longer, the one whose header was read.

        Raises:
            Fp8Error: size or modification time differ; or it cannot be opened.
        """
        try:
            status = os.fstat(self._open(shard.path))
        except OSError as error:
            raise Fp8Error(f"{printable(shard.path)}: cannot be read ({error.strerror})") from None
        if (status.st_size, status.st_mtime_ns) != (shard.size, shard.mtime_ns):
            raise Fp8Error(
                f"{printable(shard.path)}: changed while this ran; when it is complete, start anew with "
                "--overwrite"
            )

    def _open(self, path: Path) -> int:
        with self._lock:
            if (path, False) not in self._descriptors:
                self._descriptors[path, False] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            return self._descriptors[path, False]

    def _open_direct(self, path: Path) -> int:
        """A descriptor for direct I/O, -1 where there is none."""
        plain = self._open(path)
        with self._lock:
            if path in self._refuses_direct:
                return -1
            if (path, True) not in self._descriptors:
                self._descriptors[path, True] = open_direct(path, os.O_RDONLY) if takes_direct(plain) else -1
            return self._descriptors[path, True]

    def close(self) -> None:
        with self._lock:
            for descriptor in self._descriptors.values():
                if descriptor >= 0:
                    os.close(descriptor)
            self._descriptors.clear()


class Lane:
    """One worker thread's buffers and stream; nothing in it is shared.

    Writing waits for the disk, which no worker should. So a lane has a second thread that does nothing
    else, and several sets of output buffers.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._buffers: dict[str, torch.Tensor] = {}
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._writes: deque[Future] = deque()
        self._output = 0

    def host(self, name: str, nbytes: int) -> torch.Tensor:
        """A uint8 host buffer of this length, valid until the name is asked for again.

        It begins on a page, which direct writes need, and is pinned on CUDA.
        """
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < nbytes:
            if self.stream is None:
                buffer = torch.frombuffer(mmap.mmap(-1, max(nbytes, 1)), dtype=torch.uint8)
            else:
                buffer = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
            self._buffers[name] = buffer
        return buffer[:nbytes]

    def read(
        self, name: str, files: Files, path: Path, start: int, nbytes: int, way: Way = Way.CACHE
    ) -> torch.Tensor:
        """Bytes of a file, uint8 [nbytes], somewhere in the host buffer `name`."""
        if way is Way.CACHE or start % _LARGEST_ITEM:
            found, done = self.host(name, nbytes), 0
        else:
            skip = start % PAGE
            buffer = self.host(name, nbytes + 2 * PAGE)
            found = buffer[skip : skip + nbytes]
            pages = buffer.data_ptr() % PAGE == 0
            done = files.read_pages(buffer, path, start, nbytes, way is Way.NEAREST) if pages else 0
        if done < nbytes:
            files.read_into(found[done:], path, start + done)
        return found

    def to_device(self, host: torch.Tensor) -> torch.Tensor:
        """A host tensor on the device; on CUDA the copy is queued in the lane's stream."""
        return host if self.stream is None else host.to(self.device, non_blocking=True)

    def to_host(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A device tensor's bytes in host memory, uint8; on CUDA readable after `synchronize`."""
        flat = tensor.contiguous().view(torch.uint8).reshape(-1)
        buffer = self.host(name, flat.numel())
        buffer.copy_(flat, non_blocking=True)
        return buffer

    def synchronize(self) -> None:
        """Wait for everything queued in the lane's stream."""
        if self.stream is not None:
            self.stream.synchronize()

    def as_current(self) -> AbstractContextManager:
        """Within it, kernels go to the lane's stream."""
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def next_output(self) -> int:
        """Number of the set of output buffers to fill next, waiting until it is written.

        What is in its buffers may be overwritten once this is called again for every other set.
        """
        while len(self._writes) >= _OUTPUTS:
            wait([self._writes.popleft()])
        self._output = (self._output + 1) % _OUTPUTS
        return self._output

    def write_behind(self, function: Callable, *arguments: object) -> Future:
        """Call a function that writes what is in the set of output buffers, in the lane's second thread."""
        self._writes.append(self._writer.submit(function, *arguments))
        return self._writes[-1]

    def stop(self) -> None:
        """Let the write under way end and drop the rest."""
        self._writer.shutdown(wait=True, cancel_futures=True)


class ReadAhead:
    """Reads what tasks will need, in threads that do nothing else, into buffers that take turns."""

    def __init__(self, device: torch.device, threads: int, turns: int) -> None:
        self.device = device
        self._pool = ThreadPoolExecutor(threads, "reader", initializer=make_current, initargs=(device,))
        self._lanes = deque(Lane(device) for _ in range(turns))

    def submit(self, function: Callable, *arguments: object) -> Future:
        """Call `function(lane, …)`; what it reads is valid until the last but one of `turns` more calls.

        On CUDA that includes copies to the device: whoever makes one waits for it before that.
        """
        self._lanes.rotate()
        lane = self._lanes[0]

        def read() -> object:
            with lane.as_current():
                return function(lane, *arguments)

        return self._pool.submit(read)

    def stop(self) -> None:
        """Let the reads under way end and drop the rest."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def as_bytes(host: torch.Tensor) -> memoryview:
    """A uint8 host tensor as something to write."""
    return memoryview(host.numpy())
