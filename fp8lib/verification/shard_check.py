"""Checks one shard that is complete on disk: the values of its scales, and the error of a sample of matrices.

What was written is read back from the disk and not from the page cache.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from fp8lib.checkpoint.untrusted import printable
from fp8lib.numerics.blocks import BLOCK, blocks
from fp8lib.streaming.lanes import Files, Lane, ReadAhead
from fp8lib.streaming.rewrite import Merge
from fp8lib.streaming.shard_job import Task
from fp8lib.streaming.units import row_ranges
from fp8lib.verification.health import Measurement
from fp8lib.verification.measure import Errors, combine, measure
from fp8lib.verification.pairing import Pair
from fp8lib.verification.reading import PIECE, read_rows
from fp8lib.verification.restored import Restored, compare

_PAIRS_AT_A_TIME = 64
"""Matrices whose scales one task looks at."""


@dataclass(slots=True)
class ShardCheck:
    """The check of one shard, and what it has found.

    Attributes:
        name: of the shard.
        pairs: its FP8 weights with their originals, in the order of the file.
        problems: structural deviations, one line each; what is known before, and what the check adds.
        samples: matrices to measure; None for all.
        seed: of the random sample.
        merge: what adapters make of the originals, or None.
        merged: kept tensors that adapters change; a sample of them is compared, byte for byte.
        errors: error sums of each measured matrix, in the order of its rows.
    """

    name: str
    pairs: Sequence[Pair]
    problems: list[str]
    samples: int | None
    seed: int
    merge: Merge | None = None
    merged: Sequence[Restored] = ()
    errors: dict[str, list[Errors]] = field(default_factory=dict)

    def tasks(self, files: Files, ahead: ReadAhead) -> Iterator[Task]:
        """Tasks that read and measure. A tensor that is not where it should be cannot be measured."""
        if self.problems:
            return
        for first in range(0, len(self.pairs), _PAIRS_AT_A_TIME):
            batch = self.pairs[first : first + _PAIRS_AT_A_TIME]
            yield (lambda lane, b=batch: _check_scales(lane, files, b)), self.problems.extend
        for pair in sample(self.pairs, self.samples, self.seed, self.name):
            pieces = self.errors.setdefault(pair.name, [])
            for span in row_ranges(pair.rows, pair.columns, PIECE):
                read = ahead.submit(_read_rows, files, pair, *span, self.merge)
                yield (lambda lane, r=read: measure(*map(lane.to_device, r.result()))), pieces.append
        merged = sample(self.merged, self.samples, self.seed, self.name)
        yield from compare(merged, files, ahead, self.merge, self.problems)

    def measurements(self) -> tuple[Measurement, ...]:
        """What the sampled matrices lost."""
        return tuple(combine(name, pieces) for name, pieces in self.errors.items())


def sample(pairs: Sequence[Pair], count: int | None, seed: int, shard: str) -> list[Pair]:
    """Pairs to measure: `count` random ones of a shard, all of them for None, in their order.

    The same for a given seed and shard name, whatever else is in the checkpoint.
    """
    if count is None or count >= len(pairs):
        return list(pairs)
    chosen = random.Random(f"{seed}:{shard}").sample(range(len(pairs)), count)
    return [pairs[i] for i in sorted(chosen)]


def _check_scales(lane: Lane, files: Files, pairs: Sequence[Pair]) -> list[str]:
    """What is wrong with the values of some pairs' scales, one line each."""
    problems = []
    for pair in pairs:
        scales = read_rows(lane, files, "scales", pair.scale, blocks(pair.rows), blocks(pair.columns), 0)
        if not bool((scales.isfinite() & (scales > 0)).all()):
            problems.append(
                f"{printable(pair.name)}_scale_inv: holds values that are not finite and positive"
            )
    return problems


def _read_rows(
    lane: Lane, files: Files, pair: Pair, first: int, last: int, merge: Merge | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `measure` takes of rows first..last of a pair, `first` a multiple of 128, in host memory."""
    rows, columns = last - first, pair.columns
    weights = read_rows(lane, files, "in", pair.source, rows, columns, first)
    if merge is not None:
        merge(pair.name, weights, first)
    codes = read_rows(lane, files, "codes", pair.weight, rows, columns, first)
    scales = read_rows(lane, files, "scales", pair.scale, blocks(rows), blocks(columns), first // BLOCK)
    return weights, codes, scales
