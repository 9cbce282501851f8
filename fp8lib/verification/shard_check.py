"""Checks one shard that is complete on disk: the values of its scales, and the error of a sample of matrices.

What was written is read back from the disk and not from the page cache.
"""

import random
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from fp8lib.checkpoint.headers import ITEM_SIZE
from fp8lib.checkpoint.untrusted import printable
from fp8lib.numerics.blocks import BLOCK, blocks
from fp8lib.numerics.e4m3 import DTYPE
from fp8lib.streaming.lanes import DTYPES, Files, Lane, ReadAhead
from fp8lib.streaming.shard_job import Task
from fp8lib.streaming.units import row_ranges
from fp8lib.verification.health import Measurement
from fp8lib.verification.measure import Errors, combine, measure
from fp8lib.verification.pairing import Extent, Pair

if TYPE_CHECKING:  # nothing of second moments is imported where there are none
    from fp8lib.streaming.factors import Factors
    from fp8lib.verification.measure_outputs import OutputSums

PIECE = 512 * 1024
"""Weights that are measured at a time; the same everywhere, because sums of floats depend on it."""
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
        factors: of second moments, to judge matrices by their outputs; None for none.
        errors: error sums of each measured matrix, in the order of its rows.
        outputs: the same of those that are judged by their outputs.
    """

    name: str
    pairs: Sequence[Pair]
    problems: list[str]
    samples: int | None
    seed: int
    factors: "Factors | None" = None
    errors: dict[str, list[Errors]] = field(default_factory=dict)
    outputs: "dict[str, list[OutputSums]]" = field(default_factory=dict)

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
                read = ahead.submit(_read_rows, files, pair, *span)
                yield (lambda lane, r=read: measure(*map(lane.to_device, r.result()))), pieces.append
            yield from self._output_tasks(pair, files, ahead)

    def measurements(self) -> tuple[Measurement, ...]:
        """What the sampled matrices lost."""
        found = {name: combine(name, pieces) for name, pieces in self.errors.items()}
        for name, pieces in self.outputs.items():
            from fp8lib.verification.measure_outputs import combine_outputs

            found[name] = replace(found[name], output=combine_outputs(pieces))
        return tuple(found.values())

    def _output_tasks(self, pair: Pair, files: Files, ahead: ReadAhead) -> Iterator[Task]:
        """Tasks that measure a matrix by its outputs, if there are second moments for it."""
        if self.factors is None or self.factors.entry(pair.name, pair.columns) is None:
            return
        from fp8lib.verification.measure_outputs import PIECE, measure_outputs

        pieces = self.outputs.setdefault(pair.name, [])

        def measured(lane: Lane, read: Future) -> "OutputSums":
            rows = map(lane.to_device, read.result())
            return measure_outputs(*rows, self.factors(pair.name, pair.columns))

        for span in row_ranges(pair.rows, pair.columns, PIECE):
            read = ahead.submit(_read_rows, files, pair, *span)
            yield (lambda lane, r=read: measured(lane, r)), pieces.append


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
        scales = _read(lane, files, "scales", pair.scale, blocks(pair.rows), blocks(pair.columns), 0)
        if not bool((scales.isfinite() & (scales > 0)).all()):
            problems.append(
                f"{printable(pair.name)}_scale_inv: holds values that are not finite and positive"
            )
    return problems


def _read_rows(
    lane: Lane, files: Files, pair: Pair, first: int, last: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `measure` takes of rows first..last of a pair, `first` a multiple of 128, in host memory."""
    rows, columns = last - first, pair.columns
    weights = _read(lane, files, "in", pair.source, rows, columns, first)
    codes = _read(lane, files, "codes", pair.weight, rows, columns, first)
    scales = _read(lane, files, "scales", pair.scale, blocks(rows), blocks(columns), first // BLOCK)
    return weights, codes, scales


def _read(
    lane: Lane, files: Files, buffer: str, extent: Extent, rows: int, columns: int, first: int
) -> torch.Tensor:
    """Rows first..first+rows of an extent, [rows, columns] in host memory."""
    row_bytes = columns * ITEM_SIZE[extent.dtype]
    start, direct = extent.start + first * row_bytes, extent.dtype == "F8_E4M3"
    raw = lane.read(buffer, files, extent.path, start, rows * row_bytes, direct)
    dtype = DTYPE if extent.dtype == "F8_E4M3" else DTYPES[extent.dtype]
    return raw.view(dtype).view(rows, columns)
