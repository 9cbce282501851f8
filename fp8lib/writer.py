"""One output shard: header first, then bytes at known offsets; temporary file, fsync, rename.

Nothing of a shard is held in memory, and pieces may come in any order and from any thread. Under its own
name a file is always complete: until `commit` it is `.<name>.partial`, which no engine looks at.
"""

import errno
import os
from pathlib import Path

from fp8lib import Fp8Error
from fp8lib.checkpoint import printable

PARTIAL_PREFIX, PARTIAL_SUFFIX = ".", ".partial"


def partial_path(path: Path) -> Path:
    """Where a file is written until it is complete."""
    return path.with_name(f"{PARTIAL_PREFIX}{path.name}{PARTIAL_SUFFIX}")


def is_partial(name: str) -> bool:
    """Whether a file name is one that `partial_path` makes."""
    return name.startswith(PARTIAL_PREFIX) and name.endswith(PARTIAL_SUFFIX)


class ShardWriter:
    """Writes one file by offsets.

    Args:
        path: the final name.
        header: the file's first bytes.
        size: length of the complete file.
        shared: other processes write other parts of the same file; leave what they wrote.

    Raises:
        Fp8Error: the file cannot be created or there is no room for it; so do the methods.
    """

    def __init__(self, path: Path, header: bytes, size: int, *, shared: bool = False) -> None:
        self.path = path
        self.partial = partial_path(path)
        self._fd = -1
        with refusing_disk_errors(path):
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | (0 if shared else os.O_TRUNC)
            self._fd = os.open(self.partial, flags, 0o666)  # less the umask, as any new file
            os.ftruncate(self._fd, size)
        self.write(0, header)

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Write all of `data` at `offset`."""
        write_at(self._fd, offset, data, self.path)

    def sync(self) -> None:
        """Make what was written so far durable."""
        with refusing_disk_errors(self.path):
            os.fsync(self._fd)

    def commit(self) -> None:
        """Give the file its name, once everything in it is durable."""
        self.sync()
        self.release()
        with refusing_disk_errors(self.path):
            self.partial.rename(self.path)
            sync_directory(self.path.parent)

    def release(self) -> None:
        """Close the file, leaving it partial for whoever writes its last part."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def abandon(self) -> None:
        """Remove what was written so far."""
        self.release()
        self.partial.unlink(missing_ok=True)


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
        Fp8Error: it cannot be read or written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with refusing_disk_errors(source):
        file = source.open("rb")
    with file:
        writer = ShardWriter(path, b"", os.fstat(file.fileno()).st_size)
        try:
            offset = 0
            while chunk := file.read(1 << 20):
                writer.write(offset, chunk)
                offset += len(chunk)
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


def sync_directory(folder: Path) -> None:
    """Make renames in a directory durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class refusing_disk_errors:  # noqa: N801 - reads as a statement, like contextlib.suppress
    """Turns an OSError into an Fp8Error that names the file and the way out."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, OSError):
            return
        way_out = {
            errno.ENOSPC: "the disk is full; free some space and run the same command again",
            errno.EDQUOT: "your disk quota is used up; free some space and run the same command again",
            errno.EFBIG: "larger than this file system or `ulimit -f` allows",
            errno.EROFS: "the file system is read-only",
            errno.EACCES: "permission denied",
        }.get(error.errno, error.strerror or str(error))
        raise Fp8Error(f"{printable(self.path)}: {way_out}") from error
