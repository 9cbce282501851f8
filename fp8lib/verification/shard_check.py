"""Checks one shard that is complete on disk: the values of its scales, the error of a sample of matrices, the
bytes of tensors that are kept, and whether codes and scales still add up to what was written.

What was written is read back from the disk and not from the page cache.
"""

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING

import torch

from fp8lib.checkpoint.headers import ITEM_SIZE
from fp8lib.checkpoint.untrusted import printable
from fp8lib.numerics.blocks import BLOCK, blocks
from fp8lib.numerics.sums import sum_codes, sum_scales
from fp8lib.streaming.lanes import Files, Lane, ReadAhead
from fp8lib.streaming.rewrite import Merge, merge_batch
from fp8lib.streaming.shard_job import Task
from fp8lib.streaming.sums import Origin, Sums
from fp8lib.streaming.units import row_ranges
from fp8lib.verification.claim import NOTHING, Claim
from fp8lib.verification.kept import KeptCheck
from fp8lib.verification.measure import Errors, combine, measure_all
from fp8lib.verification.measurement import Measurement
from fp8lib.verification.pairing import Extent, Kept, Pair
from fp8lib.verification.reading import AT_A_TIME, PIECE, read_values
from fp8lib.verification.restored import Restored, compare

if TYPE_CHECKING:  # nothing of second moments is imported where there are none
    from fp8lib.streaming.factors import Factors
    from fp8lib.verification.measure_outputs import OutputSums

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
        claim: what codes and scales should be.
        factors: of second moments, to judge matrices by their outputs; None for none.
        merge: what adapters make of the originals, or None.
        merged: kept tensors that adapters change, to compare byte for byte.
        kept: tensors to compare with the input.
        origin: where the codes and scales of a shard in this tool's layout begin, to add them up; else None.
        header_bytes: length of the header, which was compared before.
        errors: error sums of each measured matrix, in the order of its rows.
        outputs: the same of those that are judged by their outputs.
        sums: of the codes and scales that were read.
        looked_at: bytes of the shard that were.
    """

    name: str
    pairs: Sequence[Pair]
    problems: list[str]
    samples: int | None
    seed: int
    claim: Claim = NOTHING
    factors: "Factors | None" = None
    merge: Merge | None = None
    merged: Sequence[Restored] = ()
    kept: Sequence[Kept] = ()
    origin: Origin | None = None
    header_bytes: int = 0
    errors: dict[str, list[Errors]] = field(default_factory=dict)
    outputs: "dict[str, list[OutputSums]]" = field(default_factory=dict)
    sums: Sums = field(default_factory=Sums)
    looked_at: int = 0
    _kept_check: KeptCheck | None = None

    def tasks(self, files: Files, ahead: ReadAhead) -> Iterator[Task]:
        """Tasks that read and measure. A tensor that is not where it should be cannot be measured."""
        if self.problems:
            return
        for first in range(0, len(self.pairs), _PAIRS_AT_A_TIME):
            batch = self.pairs[first : first + _PAIRS_AT_A_TIME]
            yield (lambda lane, b=batch: _check_scales(lane, files, b, self.origin)), self._add_scales
        self._kept_check = KeptCheck(self.kept)
        yield from self._kept_check.tasks(files, ahead)
        sampled = sample(self.pairs, self.samples, self.seed, self.name)
        self.looked_at = self.header_bytes + sum(kept.nbytes for kept in self.kept)
        self.looked_at += sum(_scale_bytes(pair) for pair in self.pairs)
        self.looked_at += sum(pair.rows * pair.columns for pair in sampled)
        origin = self.origin if len(sampled) == len(self.pairs) else None
        pieces = ((p, *span) for p in sampled for span in row_ranges(p.rows, p.columns, PIECE))
        for batch in _batches(pieces, AT_A_TIME[ahead.device.type]):
            read = ahead.submit(_read_rows, files, batch, self.merge)
            task = partial(_measure, batch=batch, read=read, claim=self.claim, origin=origin)
            yield task, partial(self._add, batch)
        yield from self._output_tasks(sampled, files, ahead)
        self.looked_at += sum(each.nbytes for each in self.merged)
        yield from compare(self.merged, files, ahead, self.merge, self.problems)

    def _add(self, batch: list["_Rows"], found: tuple[list[Errors], int]) -> None:
        for (pair, _, _), errors in zip(batch, found[0], strict=True):
            self.errors.setdefault(pair.name, []).append(errors)
        self.sums += Sums(codes=found[1])

    def _add_scales(self, found: tuple[list[str], int]) -> None:
        self.problems += found[0]
        self.sums += Sums(scales=found[1])

    def found_problems(self, written: Sums | None) -> tuple[str, ...]:
        """All deviations, one line each.

        Args:
            written: what the shard's codes and scales added up to when they were written, if that is known.
        """
        found = list(self.problems)
        if self._kept_check is None:  # the structure was wrong, and nothing was read
            return tuple(found)
        found += self._kept_check.problems()
        if written is not None and self.origin is not None:
            changed = ["scales"] * (self.sums.scales != written.scales)
            if len(self.errors) == len(self.pairs) and self.sums.codes != written.codes:
                changed.insert(0, "FP8 weights")
            if changed:
                found.append(
                    f"{self.name}: its {' and '.join(changed)} are not those that were written; copy the "
                    "file again, or write it again"
                )
        return tuple(found)

    def measurements(self) -> tuple[Measurement, ...]:
        """What the sampled matrices lost."""
        found = {name: combine(name, pieces) for name, pieces in self.errors.items()}
        for name, pieces in self.outputs.items():
            from fp8lib.verification.measure_outputs import combine_outputs

            found[name] = replace(found[name], output=combine_outputs(pieces))
        return tuple(found.values())

    def damage(self, measurements: Sequence[Measurement]) -> list[str]:
        """What in the shard is not what it should be, by its measurements: at most one line."""
        by_codes = [m for m in measurements if self.claim.nearest and m.output is None and m.not_nearest]
        by_scales = [m for m in measurements if m.other_scales]
        if not (wrong := by_codes + by_scales):
            return []
        codes, scales = sum(m.not_nearest for m in by_codes), sum(m.other_scales for m in by_scales)
        counts = " and ".join(f"{n:,} {what}" for n, what in ((codes, "codes"), (scales, "scales")) if n)
        tensors = f"in {len({m.name for m in wrong})} tensors, such as {printable(wrong[0].name)}"
        return [f"{printable(self.name)}: {counts} are not what this tool gives, {tensors}"]

    def _output_tasks(self, pairs: list[Pair], files: Files, ahead: ReadAhead) -> Iterator[Task]:
        """Tasks that measure by their outputs those matrices for which there are second moments."""
        if self.factors is None:
            return
        from fp8lib.verification.measure_outputs import AT_A_TIME, PIECE, measure_outputs

        def entry(piece: _Rows) -> str | None:
            return self.factors.entry(piece[0].name, piece[0].columns)

        def measured(lane: Lane, batch: list[_Rows], read: Future) -> "list[OutputSums]":
            pair = batch[0][0]
            return measure_outputs(_pieces(lane, batch, read), self.factors(pair.name, pair.columns))

        def add(batch: list[_Rows], found: "list[OutputSums]") -> None:
            for (pair, _, _), sums in zip(batch, found, strict=True):
                self.outputs.setdefault(pair.name, []).append(sums)

        pieces = ((p, *span) for p in pairs for span in row_ranges(p.rows, p.columns, PIECE))
        for key, alike in groupby(pieces, entry):
            if key is None:
                continue
            for batch in _batches(alike, AT_A_TIME[ahead.device.type], whole_blocks=True):
                read = ahead.submit(_read_rows, files, batch, self.merge)
                yield partial(measured, batch=batch, read=read), partial(add, batch)


def sample(pairs: Sequence[Pair], count: int | None, seed: int, shard: str) -> list[Pair]:
    """Pairs to measure: `count` random ones of a shard, all of them for None, in their order.

    The same for a given seed and shard name, whatever else is in the checkpoint.
    """
    if count is None or count >= len(pairs):
        return list(pairs)
    chosen = random.Random(f"{seed}:{shard}").sample(range(len(pairs)), count)
    return [pairs[i] for i in sorted(chosen)]


def _check_scales(
    lane: Lane, files: Files, pairs: Sequence[Pair], origin: Origin | None
) -> tuple[list[str], int]:
    """What is wrong with the values of some pairs' scales, one line each; and what these add up to."""
    problems, total = [], 0
    for pair in pairs:
        count = blocks(pair.rows) * blocks(pair.columns)
        scales = read_values(lane, files, "scales", pair.scale, pair.scale.start, count)
        if not bool((scales.isfinite() & (scales > 0)).all()):
            problems.append(
                f"{printable(pair.name)}_scale_inv: holds values that are not finite and positive"
            )
        if origin is not None:
            total += int(sum_scales(scales.view(torch.uint8), pair.scale.start - origin.scales))
    return problems, total


def _scale_bytes(pair: Pair) -> int:
    return blocks(pair.rows) * blocks(pair.columns) * ITEM_SIZE[pair.scale.dtype]


# --- measuring ---------------------------------------------------------------------------------

_Rows = tuple[Pair, int, int]
"""Rows of a pair: it, the first of them, a multiple of 128, and the one behind the last."""


def _batches(pieces: Iterable[_Rows], weights: int, whole_blocks: bool = False) -> Iterator[list[_Rows]]:
    """Put pieces together that follow each other in all three files, up to so many weights.

    With `whole_blocks`, only the last of a batch may have rows that make up no whole block.
    """
    batch: list[_Rows] = []
    held = 0
    for piece in pieces:
        pair, first, last = piece
        count = (last - first) * pair.columns
        if batch:
            _, start, end = batch[-1]
            fits = held + count <= weights and not (whole_blocks and (end - start) % BLOCK)
            if not (fits and _ends(*batch[-1][::2]) == _ends(pair, first)):
                yield batch
                batch, held = [], 0
        batch.append(piece)
        held += count
    if batch:
        yield batch


def _ends(pair: Pair, row: int) -> list[Extent]:
    """Where the rows before a row end in the original, in the codes and in the scales."""
    per_row = (pair.source, pair.columns), (pair.weight, pair.columns)
    found = [replace(e, start=e.start + row * n * ITEM_SIZE[e.dtype]) for e, n in per_row]
    scales = blocks(row) * blocks(pair.columns) * ITEM_SIZE[pair.scale.dtype]
    return [*found, replace(pair.scale, start=pair.scale.start + scales)]


def _read_rows(lane: Lane, files: Files, batch: list[_Rows], merge: Merge | None) -> tuple[torch.Tensor, ...]:
    """Weights, merged, codes and scales of a batch, in host memory."""
    pair, first, _ = batch[0]
    source, weight, scale = (extent.start for extent in _ends(pair, first))
    count = sum((last - first) * pair.columns for pair, first, last in batch)
    scales = sum(blocks(last - first) * blocks(pair.columns) for pair, first, last in batch)
    weights = read_values(lane, files, "in", pair.source, source, count)
    if merge is not None:
        merge_batch(merge, ((p.name, p.columns, *span) for p, *span in batch), weights)
    return (
        weights,
        read_values(lane, files, "codes", pair.weight, weight, count, written=True),
        read_values(lane, files, "scales", pair.scale, scale, scales),
    )


def _measure(
    lane: Lane, batch: list[_Rows], read: Future, claim: Claim, origin: Origin | None
) -> tuple[list[Errors], int]:
    """The errors of each piece of a batch, and what their codes add up to, if there is an origin."""
    pieces, again = _pieces(lane, batch, read), ()
    if claim.scales is not None:
        again = [claim.scales(pair.name, own[0]) for (pair, _, _), own in zip(batch, pieces, strict=True)]
    errors = measure_all(pieces, claim.powers_of_two, again)
    if origin is None:
        return errors, 0
    sums = [
        sum_codes(codes.view(torch.uint8).view(-1), pair.weight.start + first * pair.columns - origin.codes)
        for (pair, first, _), (_, codes, _) in zip(batch, pieces, strict=True)
    ]
    return errors, int(torch.stack(sums).sum())


def _pieces(lane: Lane, batch: list[_Rows], read: Future) -> list[tuple[torch.Tensor, ...]]:
    """Weights, codes and scales of each piece of a batch, on the device."""
    weights, codes, scales = map(lane.to_device, read.result())
    pieces = []
    for pair, first, last in batch:
        rows, columns = last - first, pair.columns
        shape, scale_shape = (rows, columns), (blocks(rows), blocks(columns))
        own = (weights, shape), (codes, shape), (scales, scale_shape)
        pieces.append(tuple(t[: math.prod(s)].view(s) for t, s in own))
        weights, codes, scales = (t[math.prod(s) :] for t, s in own)
    return pieces
