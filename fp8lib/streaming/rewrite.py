"""Rows of a matrix that is written in the input's precision: turned back from FP8, merged, or moved."""

from collections.abc import Iterable
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


def merge_batch(merge: Merge, parts: Iterable[tuple[str, int, int, int]], weights: torch.Tensor) -> None:
    """Merge adapters into rows of several matrices, in place.

    Args:
        merge: what adapters make of them.
        parts: (matrix's name, columns, first row, the one behind the last), in the order of the weights.
        weights: [weights of all parts], in host memory.
    """
    for name, columns, first, last in parts:
        count = (last - first) * columns
        merge(name, weights[:count].view(-1, columns), first)
        weights = weights[count:]


def merge_bytes(merge: Merge | None, item: Rewritten, raw: torch.Tensor, first: int) -> bool:
    """Merge adapters into rows of a matrix that stays as precise as it is, in place.

    Args:
        merge: what adapters make of them, or None.
        item: the matrix.
        raw: uint8, its rows as in the input, in host memory.
        first: number of the first of them, a multiple of 128.

    Returns:
        False if what was computed is not finite.
    """
    if merge is None:
        return True
    rows = raw.view(DTYPES[item.source.dtype]).view(-1, item.columns)
    return not merge(item.name, rows, first) or _is_finite(rows)


def restore(
    lane: Lane, files: Files, item: Rewritten, raw: torch.Tensor, first: int, buffer: str
) -> tuple[torch.Tensor, bool]:
    """Rows of a matrix turned back from FP8: `code * scale` in float32, rounded once to BF16.

    Args:
        lane: of the calling thread.
        files: to read the scales from.
        item: the matrix.
        raw: uint8, the codes of the rows.
        first: number of the first of them, a multiple of 128.
        buffer: the lane's host buffer for the result.

    Returns:
        (uint8, in that buffer; False if what was computed is not finite).
    """
    codes = raw.view(DTYPE).view(-1, item.columns)
    shape = blocks(len(codes)), blocks(item.columns)
    row_bytes = shape[1] * ITEM_SIZE[item.scale.dtype]
    start = item.scale.start + first // BLOCK * row_bytes
    scales = lane.read("scales in", files, item.scale.path, start, shape[0] * row_bytes)
    scales = lane.to_device(scales.view(DTYPES[item.scale.dtype]).view(shape))
    restored = dequantize(lane.to_device(codes), scales).to(DTYPES[item.output.dtype])
    host = lane.to_host(buffer, restored)
    lane.synchronize()
    return host, _is_finite(restored)


def _is_finite(rows: torch.Tensor) -> bool:
    least, most = rows.aminmax()
    return bool(least.isfinite() & most.isfinite())
