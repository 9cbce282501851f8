"""Compares tensors that keep their values with the input, byte by byte.

A publisher may store a norm as F32 that the input holds as BF16, and `--kept_dtype` makes the reverse. Then
the input's values, rounded to the other dtype as any cast does, are what must be there.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future

import numpy as np
import torch

from fp8lib.checkpoint.headers import ITEM_SIZE
from fp8lib.checkpoint.untrusted import printable
from fp8lib.streaming.lanes import DTYPES, Files, Lane, ReadAhead, Way
from fp8lib.streaming.shard_job import Task
from fp8lib.streaming.units import COPY_PIECE
from fp8lib.verification.pairing import Kept


class KeptCheck:
    """Compares some kept tensors, and counts what differs.

    Args:
        kept: to compare.
    """

    def __init__(self, kept: Sequence[Kept]) -> None:
        self._kept = kept
        self._different: dict[str, int] = {}

    def tasks(self, files: Files, ahead: ReadAhead) -> Iterator[Task]:
        """Tasks that read both in bounded pieces."""
        for kept in self._kept:
            step = COPY_PIECE // max(ITEM_SIZE[kept.source.dtype], ITEM_SIZE[kept.output.dtype])
            for first in range(0, kept.count, step):
                count = min(step, kept.count - first)
                read = ahead.submit(_read, files, kept, first, count)

                def compare(_: Lane, kept: Kept = kept, read: Future = read) -> int:
                    return _different(kept, *read.result())

                yield compare, lambda found, name=kept.name: self._add(name, found)

    def _add(self, name: str, found: int) -> None:
        if found:
            self._different[name] = self._different.get(name, 0) + found

    def problems(self) -> list[str]:
        """One line for each tensor that is not the input's."""
        counts = {kept.name: kept.count for kept in self._kept if kept.name in self._different}
        return [
            f"{printable(name)}: {self._different[name]:,} of {count:,} values are not the input's"
            for name, count in counts.items()
        ]


def _read(lane: Lane, files: Files, kept: Kept, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes of the same values in both files, uint8; the output's from the disk itself."""
    found = []
    for buffer, extent, way in (("in", kept.source, Way.CACHE), ("kept", kept.output, Way.DISK)):
        size = ITEM_SIZE[extent.dtype]
        found.append(lane.read(buffer, files, extent.path, extent.start + first * size, count * size, way))
    return tuple(found)


def _different(kept: Kept, source: torch.Tensor, output: torch.Tensor) -> int:
    """How many values are not those of the input."""
    before, after = kept.source.dtype, kept.output.dtype
    if before != after:
        source = source.view(DTYPES[before]).to(DTYPES[after]).view(torch.uint8)
    if np.array_equal(source.numpy(), output.numpy()):  # torch.equal takes five times as long over bytes
        return 0
    size = ITEM_SIZE[after]
    return int((source.view(-1, size) != output.view(-1, size)).any(1).sum())
