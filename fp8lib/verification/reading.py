"""Reads values back from the disk, to be measured or compared."""

import torch

from fp8lib.checkpoint.headers import ITEM_SIZE
from fp8lib.checkpoint.layout import Extent
from fp8lib.numerics.e4m3 import DTYPE
from fp8lib.streaming.lanes import DTYPES, Files, Lane, Way

PIECE = 1024 * 1024
"""Weights that are measured at a time; the same everywhere, because sums of floats depend on it."""
AT_A_TIME = {"cpu": PIECE, "cuda": 15 * PIECE}
"""Weights that are read at a time, and copied to the device. On a CPU they stay in a core's cache; pinned
buffers come in powers of two, which 16 pieces and the pages around them would just exceed."""


def read_values(
    lane: Lane, files: Files, buffer: str, extent: Extent, start: int, count: int, *, written: bool = False
) -> torch.Tensor:
    """Values of an extent, [count] in the lane's host buffer of that name.

    Args:
        lane: of the calling thread.
        files: to read from.
        buffer: name of it.
        extent: in which they are.
        start: offset of the first in the file.
        count: how many.
        written: by the run that reads them: they come from the disk and not from the page cache.
    """
    dtype = DTYPE if extent.dtype == "F8_E4M3" else DTYPES[extent.dtype]
    way = Way.DISK if written else Way.CACHE if lane.device.type == "cpu" else Way.NEAREST
    return lane.read(buffer, files, extent.path, start, count * ITEM_SIZE[extent.dtype], way).view(dtype)
