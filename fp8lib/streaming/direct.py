"""Direct I/O: between the disk and a buffer, past the page cache.

Filling the page cache is the expensive part of reading and writing large files: 2 GB cost 4 s of a core on
the machine of the benchmarks, four times what the kernels cost, and they push out what others have cached.
Bytes that are read directly come from the disk and not from the kernel's memory, which is what a check of
written files needs.

A direct transfer takes whole pages that are aligned in the file and in memory. No library was found that does
this for a plain file from Python: kvikio and fastsafetensors want CUDA and GPUDirect Storage.
"""

import ctypes
import errno
import os
from pathlib import Path

from fp8lib.checkpoint.layout import PAGE

_FILE_SYSTEMS = {0xEF53, 0x58465342}
"""Magic numbers of ext4, which is that of ext2 and ext3 too, and XFS. Network file systems have reasons of
their own to gather requests."""


_REFUSALS = (errno.EFAULT, errno.EINVAL, errno.EOPNOTSUPP)


def is_refusal(error: BaseException | None) -> bool:
    """Whether an error of a direct transfer only means that it cannot be direct.

    Not all memory is made of pages that a disk's driver may write to or read from. Some drivers map pinned
    buffers in such a way (EFAULT), some disks want another alignment (EINVAL).
    """
    return isinstance(error, OSError) and error.errno in _REFUSALS


def takes_direct(descriptor: int) -> bool:
    """Whether a file lies where direct I/O works and pays."""
    answer = (ctypes.c_long * 32)()
    libc = ctypes.CDLL(None)
    failed = not hasattr(libc, "fstatfs") or libc.fstatfs(descriptor, answer)
    return not failed and answer[0] in _FILE_SYSTEMS


def open_direct(path: Path, flags: int) -> int:
    """A descriptor for direct I/O, -1 where there is none."""
    try:
        return os.open(path, flags | os.O_DIRECT | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return -1


def reserve(descriptor: int, size: int) -> bool:
    """Give a file all its blocks, so that direct writes need not wait for each other; False if it cannot.

    Not `os.posix_fallocate`, which where a file system has no such call writes to every block instead, and
    reads, which a descriptor for writing does not allow.

    Raises:
        OSError: there is no room, or the disk fails.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "fallocate"):
        return False
    while libc.fallocate(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(size)):
        number = ctypes.get_errno()
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            raise OSError(number, os.strerror(number))
        if number != errno.EINTR:
            return False
    return True


def whole_pages(data: memoryview, offset: int) -> int:
    """How many of a buffer's first bytes can be transferred directly to or from an offset of a file."""
    if offset % PAGE or data.readonly or len(data) < PAGE:  # ctypes gives no address of a read-only one
        return 0
    if ctypes.addressof(ctypes.c_char.from_buffer(data)) % PAGE:
        return 0
    return len(data) - len(data) % PAGE
