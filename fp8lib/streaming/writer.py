"""One output shard: header first, then bytes at known offsets; temporary file, fsync, rename.

Nothing of a shard is held in memory, and pieces may come in any order and from any thread. Under its own
name a file is always complete: until `commit` it is `.<name>.partial`, which no engine looks at.

The safetensors library was looked at. It writes a file in one call, from tensors that are all in memory.
"""

import ctypes
import errno
import hashlib
import os
from contextlib import suppress
from pathlib import Path

from fp8lib import Fp8Error
from fp8lib.checkpoint.untrusted import open_regular, printable
from fp8lib.streaming.direct import is_refusal, open_direct, reserve, takes_direct, whole_pages

_BACKLOG = 16 * 1024 * 1024
"""Bytes written between one look at the disk's progress and the next."""
_SYNC_FILE_RANGE_WAIT_BEFORE, _SYNC_FILE_RANGE_WRITE = 1, 2
_LONGEST_NAME = 240
"""Bytes of a file name that leave room for the affixes; file systems take 255."""


def partial_path(path: Path) -> Path:
    """Where a file is written until it is complete."""
    name = os.fsencode(path.name)
    stem = path.name if len(name) <= _LONGEST_NAME else hashlib.sha256(name).hexdigest()
    return path.with_name(f".{stem}.partial")


def refuse_unwritable(path: Path) -> None:
    """Refuse a file that could not be written later, by creating its partial file and removing it.

    Raises:
        Fp8Error: names the file and says why.
    """
    probe = partial_path(path)
    try:
        with refusing_disk_errors(path):
            probe.open("wb").close()
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)


class ShardWriter:
    """Writes one file by offsets.

    Where the file system takes it, whole pages go to the disk directly (see fp8lib.direct).

    Args:
        path: the final name.
        header: the file's first bytes.
        size: length of the complete file.
        shared: other processes write other parts of the same file; leave what they wrote.
        name: of the temporary file's own, where others may be writing a file of the same name.

    Raises:
        Fp8Error: the file cannot be created or there is no room for it; so do the methods.
    """

    def __init__(
        self, path: Path, header: bytes, size: int, *, shared: bool = False, name: str | None = None
    ) -> None:
        self.path = path
        self.partial = partial_path(path.with_name(name) if name else path)
        self._fd = self._direct = -1
        self._handed_over = self._refuses_direct = False
        self._unsent = 0
        # O_NOFOLLOW: a symlink of that name must not lead the bytes somewhere else. Not O_RDWR: NFS would
        # write back whole pages then, over what another machine wrote next to a part.
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | (0 if shared else os.O_TRUNC)
        with refusing_disk_errors(path):
            self._fd = os.open(self.partial, flags, 0o666)  # less the umask, as any new file
        try:
            with refusing_disk_errors(path):
                os.ftruncate(self._fd, size)
                if size and takes_direct(self._fd) and reserve(self._fd, size):
                    self._direct = open_direct(self.partial, os.O_WRONLY)
            self.write(0, header)
        except BaseException:
            self.abandon()
            raise

    def fileno(self) -> int:
        """The temporary file's descriptor."""
        return self._fd

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Write all of `data` at `offset`."""
        data = memoryview(data)
        pages = self._write_directly(offset, data)
        offset, data = offset + pages, data[pages:]
        write_at(self._fd, offset, data, self.path)
        self._unsent += len(data)  # a thread's may go uncounted when two meet: it is a rough measure
        if self._unsent >= _BACKLOG:
            self._unsent = 0
            with refusing_disk_errors(self.path):
                keep_pace(self._fd)

    def _write_directly(self, offset: int, data: memoryview) -> int:
        """Write the whole pages that `data` begins with past the page cache; returns their bytes."""
        pages = 0 if self._direct < 0 or self._refuses_direct else whole_pages(data, offset)
        try:
            write_at(self._direct, offset, data[:pages], self.path)
        except Fp8Error as error:
            if not is_refusal(error.__cause__):
                raise
            self._refuses_direct = True  # the descriptor stays open: other threads may be using it
            return 0
        return pages

    def hand_over(self) -> None:
        """Make this part durable and leave the file to whoever writes the last; `abandon` spares it now."""
        self._sync_and_close()
        self._handed_over = True

    def commit(self) -> None:
        """Give the file its name, once everything in it is durable."""
        self._sync_and_close()
        with refusing_disk_errors(self.path):
            self.partial.rename(self.path)
            sync_directory(self.path.parent)

    def _sync_and_close(self) -> None:
        if self._fd >= 0:
            with refusing_disk_errors(self.path):
                os.fsync(self._fd)
            self._close()

    def _close(self) -> None:
        for descriptor in (self._direct, self._fd):
            if descriptor >= 0:
                with refusing_disk_errors(self.path):
                    os.close(descriptor)
        self._fd = self._direct = -1

    def abandon(self) -> None:
        """Remove what was written so far, as far as the disk still lets one."""
        with suppress(Fp8Error):
            self._close()
        if not self._handed_over:
            with suppress(OSError):
                self.partial.unlink()


def write_file(path: Path, data: bytes) -> None:
    """Write a small file durably: complete under its own name, or not there.

    Raises:
        Fp8Error: it cannot be written.
    """
    writer = ShardWriter(path, data, len(data))
    try:
        writer.commit()
    except BaseException:
        writer.abandon()
        raise


def copy_file(source: Path, path: Path) -> None:
    """Copy a file's bytes, following a symlink, with the mode a new file gets.

    Raises:
        Fp8Error: it cannot be read or written, or changes meanwhile.
    """
    with refusing_disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    with open_regular(source) as file:
        size = os.fstat(file.fileno()).st_size
        writer = ShardWriter(path, b"", size)
        try:
            offset = 0
            with refusing_disk_errors(source):
                while chunk := file.read(1 << 20):
                    writer.write(offset, chunk)
                    offset += len(chunk)
            if offset != size:
                raise Fp8Error(f"{printable(source)}: changed while it was copied; run again")
            writer.commit()
        except BaseException:
            writer.abandon()
            raise


def write_at(fd: int, offset: int, data: bytes | memoryview, path: Path) -> None:
    """pwrite all of `data`; `path` is for the message.

    Raises:
        Fp8Error: the disk is full or fails.
    """
    view = memoryview(data).cast("B")
    with refusing_disk_errors(path):
        while len(view):
            written = os.pwrite(fd, view, offset)
            view, offset = view[written:], offset + written


def keep_pace(descriptor: int) -> None:
    """Send to the disk what was written, and wait for what was sent the last time.

    The kernel would gather gigabytes and leave them to `fsync`, which no signal interrupts: with 500 MB
    to go on a disk of 20 MB/s, a process ended 22 s after Ctrl-C; like this, after 1 s (measured). A disk
    that keeps up has finished by now, and nobody waits.

    Raises:
        OSError: the disk is full or fails; `fsync` would not say so again.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    flags = _SYNC_FILE_RANGE_WAIT_BEFORE | _SYNC_FILE_RANGE_WRITE
    if hasattr(libc, "sync_file_range"):  # Linux
        failed = libc.sync_file_range(descriptor, ctypes.c_int64(0), ctypes.c_int64(0), ctypes.c_uint(flags))
        if failed and (number := ctypes.get_errno()) in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
            raise OSError(number, os.strerror(number))


def sync_directory(folder: Path) -> None:
    """Make renames in a directory durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems do not know it for directories
            raise
    finally:
        os.close(descriptor)


class refusing_disk_errors:  # noqa: N801 - reads as a statement, like contextlib.suppress
    """Turns an OSError into an Fp8Error that names the file and the way out."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, OSError):
            return
        reason = error.strerror or str(error)
        way_out = {
            errno.ENOSPC: "the disk is full; free some space and run again to continue",
            errno.EDQUOT: "your disk quota is used up; free some space and run again to continue",
            errno.EFBIG: "larger than this file system or `ulimit -f` allows",
            errno.EROFS: "the file system is read-only; choose another place",
            errno.EACCES: "permission denied; choose another place",
            errno.EPERM: "not permitted; choose another place",
            errno.ELOOP: "a symlink is in the way; remove it",
            errno.EIO: "the disk failed (Input/output error); look at it, or choose another place",
            errno.EMFILE: "too many open files; raise `ulimit -n` or use fewer --workers",
        }.get(error.errno, f"{reason}; choose another place")
        raise Fp8Error(f"{printable(self.path)}: {way_out}") from error
