"""Checks weights that are not FP8 but were not simply copied either.

Turned back from FP8, they must give every stored code when they are quantized again with the stored
scales. They do: a code has 4 significant bits and a BF16 weight 8. Code times scale, rounded to float32
and then to BF16, is off by less than 2^-8.9 of its value, and two neighbouring codes are at least 2^-4 of
their value apart, so the weight divided by the scale is nearest to the code it came from, and 448 does not
become 464. Subnormal codes are further apart still. It fails only for weights that BF16 holds with fewer
bits, those under 2^-126; so nowhere that a block's scale is above 2^-124.

Moved, or merged with an adapter, they must have the very bytes that doing so again gives.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fp8lib.checkpoint.headers import ITEM_SIZE
from fp8lib.checkpoint.layout import Extent, ShardPlan
from fp8lib.checkpoint.untrusted import printable
from fp8lib.numerics.blocks import BLOCK, blocks
from fp8lib.numerics.e4m3 import dequantize, quantize
from fp8lib.streaming.lanes import Files, Lane, ReadAhead
from fp8lib.streaming.rewrite import Merge
from fp8lib.streaming.shard_job import Task
from fp8lib.streaming.units import row_ranges
from fp8lib.verification.kept import KeptCheck
from fp8lib.verification.pairing import Kept
from fp8lib.verification.reading import AT_A_TIME, read_values

_BF16_ROUNDING = 2.0**-8
"""Largest relative error of rounding to BF16, with a margin of two for a float32 product before it."""


@dataclass(frozen=True, slots=True)
class Restored:
    """A weight where it was and where it is now; `scale` is that of an FP8 one, None for another."""

    name: str
    rows: int
    columns: int
    source: Extent
    scale: Extent | None
    restored: Extent

    @property
    def nbytes(self) -> int:
        """Of the weight as it is now."""
        return self.rows * self.columns * ITEM_SIZE[self.restored.dtype]


@dataclass(slots=True)
class RestoredCheck:
    """The check of one shard of a checkpoint that was turned back, and what it has found.

    Attributes:
        name: of the shard.
        weights: in it that were turned back or moved; every one is read.
        problems: one line each; what is known before, and what the check adds.
        kept: tensors of it that were copied; every one is read.
        header_bytes: length of the header, which was compared before.
        looked_at: bytes of the shard that were compared.
    """

    name: str
    weights: Sequence[Restored]
    problems: list[str]
    kept: Sequence[Kept] = ()
    header_bytes: int = 0
    looked_at: int = 0
    _kept_check: KeptCheck | None = None

    def tasks(self, files: Files, ahead: ReadAhead) -> Iterator[Task]:
        """Tasks that read and compare. What is not where it should be cannot be compared."""
        if self.problems:
            return
        self.looked_at = self.header_bytes + sum(each.nbytes for each in (*self.weights, *self.kept))
        self._kept_check = KeptCheck(self.kept)
        yield from compare(self.weights, files, ahead, None, self.problems)
        yield from self._kept_check.tasks(files, ahead)

    def found_problems(self, _written: object) -> tuple[str, ...]:
        """All deviations, one line each."""
        kept = self._kept_check.problems() if self._kept_check else ()
        return (*self.problems, *kept)

    def damage(self, _: object) -> list[str]:
        """None: whatever is wrong is a problem."""
        return []

    def measurements(self) -> tuple:
        """None: what comes back in full has lost nothing, and the rest is a problem."""
        return ()


def planned_restored(plan: ShardPlan, path: Path) -> list[Restored]:
    """What was rewritten in a shard that was written to `path` as planned."""
    return [
        Restored(r.name, r.rows, r.columns, r.source, r.scale, Extent(path, r.output.dtype, r.start))
        for r in plan.rewritten
    ]


def compare(
    weights: Iterable[Restored], files: Files, ahead: ReadAhead, merge: Merge | None, problems: list[str]
) -> Iterator[Task]:
    """Tasks that read weights; a line is added to `problems` for one with wrong values.

    Args:
        weights: to read.
        files: to read from.
        ahead: what reads them.
        merge: what adapters make of the sources, or None.
        problems: to add to.
    """
    for weight in weights:
        wrong: list[int] = []
        for span in row_ranges(weight.rows, weight.columns, AT_A_TIME[ahead.device.type]):
            read = ahead.submit(_read, files, weight, *span, merge)
            yield (lambda lane, r=read: _differing(*map(lane.to_device, r.result()))), wrong.append
        # Tasks are settled in their order.
        yield (lambda lane: None), lambda _, w=weight, n=wrong: problems.extend(_describe(w, sum(n)))


def _describe(weight: Restored, wrong: int) -> list[str]:
    if not wrong:
        return []
    share = f"{printable(weight.name)}: {wrong} of {weight.rows * weight.columns}"
    if weight.scale is None:
        return [f"{share} values are not those of the input"]
    return [
        f"{share} codes do not come back; if they are below 2^-126, which BF16 cannot hold, --skip_verify "
        "writes them all the same"
    ]


def _read(
    lane: Lane, files: Files, weight: Restored, first: int, last: int, merge: Merge | None
) -> list[torch.Tensor]:
    """What `_differing` takes of rows first..last of a weight, in host memory."""
    rows, columns = last - first, weight.columns
    source = _rows(lane, files, "in", weight.source, (rows, columns), first)
    restored = _rows(lane, files, "restored", weight.restored, (rows, columns), first, written=True)
    if weight.scale is None:
        if merge is not None:
            merge(weight.name, source, first)
        return [source.to(restored.dtype), restored]
    shape = blocks(rows), blocks(columns)
    return [source, restored, _rows(lane, files, "scales", weight.scale, shape, first // BLOCK)]


def _rows(
    lane: Lane,
    files: Files,
    buffer: str,
    extent: Extent,
    shape: tuple[int, int],
    first: int,
    *,
    written: bool = False,
) -> torch.Tensor:
    """Rows of an extent from the first on, of this shape."""
    rows, columns = shape
    start = extent.start + first * columns * ITEM_SIZE[extent.dtype]
    return read_values(lane, files, buffer, extent, start, rows * columns, written=written).view(shape)


def _differing(source: torch.Tensor, restored: torch.Tensor, scales: torch.Tensor | None = None) -> int:
    """How many values of a piece are not what they should be."""
    if scales is None:
        size = source.element_size()
        same = (source.view(torch.uint8) == restored.view(torch.uint8)).view(*source.shape, size).all(dim=-1)
        return source.numel() - int(same.sum())
    codes, values = source.view(torch.uint8), dequantize(source, scales)
    near = (restored.float() - values).abs_() <= values.abs_().mul_(_BF16_ROUNDING)  # false for NaN
    # Some tools give a block of zeros a scale of 0.
    again = quantize(restored, torch.where(scales == 0, 1.0, scales), saturate=True)
    return source.numel() - int((near & (again.view(torch.uint8) == codes)).sum())
