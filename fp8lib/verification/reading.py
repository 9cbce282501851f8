"""Reads rows of matrices back from the disk, to be measured."""

import torch

from fp8lib.checkpoint.headers import ITEM_SIZE
from fp8lib.checkpoint.layout import Extent
from fp8lib.numerics.e4m3 import DTYPE
from fp8lib.streaming.lanes import DTYPES, Files, Lane

PIECE = 512 * 1024
"""Weights that are measured at a time; the same everywhere, because sums of floats depend on it."""


def read_rows(
    lane: Lane,
    files: Files,
    buffer: str,
    extent: Extent,
    rows: int,
    columns: int,
    first: int,
    direct: bool = False,
) -> torch.Tensor:
    """Rows first..first+rows of an extent, [rows, columns] in the lane's host buffer of that name.

    FP8 weights are read from the disk and not from the page cache; others if `direct`.
    """
    row_bytes = columns * ITEM_SIZE[extent.dtype]
    start, direct = extent.start + first * row_bytes, direct or extent.dtype == "F8_E4M3"
    raw = lane.read(buffer, files, extent.path, start, rows * row_bytes, direct)
    dtype = DTYPE if extent.dtype == "F8_E4M3" else DTYPES[extent.dtype]
    return raw.view(dtype).view(rows, columns)
