"""Rows of a matrix that is written in the input's precision: turned back from FP8, merged, or moved."""

from typing import Protocol

import torch

from fp8lib.checkpoint.headers import ITEM_SIZE
from fp8lib.checkpoint.layout import Rewritten
from fp8lib.numerics.blocks import BLOCK, blocks
from fp8lib.numerics.e4m3 import DTYPE, dequantize
from fp8lib.streaming.lanes import DTYPES, Files, Lane


class Merge(Protocol):
    """What adapters make of rows of the input."""

    def __call__(self, name: str, rows: torch.Tensor, first: int) -> bool:
        """Change rows in place, on the CPU, in any order and from several threads at once.

        Args:
            name: of the matrix.
            rows: [rows, columns] as in the input, in host memory.
            first: number of the first of them, a multiple of 128.

        Returns:
            Whether an adapter has anything to do with this matrix.
        """


def rewrite(
    lane: Lane, files: Files, item: Rewritten, first: int, last: int, merge: Merge | None, buffer: str
) -> tuple[torch.Tensor, bool]:
    """Rows first..last of a matrix as the output holds them; `first` is a multiple of 128.

    What was FP8 is `code * scale` in float32, rounded once to BF16.

    Returns:
        (uint8, in the lane's host buffer of that name; False if what was computed is not finite).
    """
    count, nbytes = last - first, (last - first) * item.input_row_bytes
    raw = lane.read("in", files, item.source.path, item.source.start + first * item.input_row_bytes, nbytes)
    if item.scale is None:
        rows = raw.view(DTYPES[item.source.dtype]).view(count, item.columns)
        if merge is None or not merge(item.name, rows, first):
            return lane.to_host(buffer, rows), True  # a copy, which may hold what it likes
        return lane.to_host(buffer, rows), _is_finite(rows)
    shape = blocks(count), blocks(item.columns)
    row_bytes = shape[1] * ITEM_SIZE[item.scale.dtype]
    start = item.scale.start + first // BLOCK * row_bytes
    scales = lane.read("scales in", files, item.scale.path, start, shape[0] * row_bytes)
    codes = lane.to_device(raw.view(DTYPE).view(count, item.columns))
    values = dequantize(codes, lane.to_device(scales.view(DTYPES[item.scale.dtype]).view(shape)))
    restored = values.to(DTYPES[item.output.dtype])
    host = lane.to_host(buffer, restored)
    lane.synchronize()
    return host, _is_finite(restored)


def _is_finite(rows: torch.Tensor) -> bool:
    least, most = rows.aminmax()
    return bool(least.isfinite() & most.isfinite())
