"""Sums over a piece of a matrix: what `measure.py` makes its figures of.

Two ways to the same. A piece of BF16 weights whose codes are all the nearest is counted, magnitude by
magnitude (`numerics/magnitudes.py`), and the sums are taken over the counts: half the time of going through
the weights once for each sum. All others, F16 and F32 weights among them, go through the weights.
"""

import torch

from fp8lib.numerics.best import best_scales, errors_again, not_nearest
from fp8lib.numerics.blocks import BLOCK
from fp8lib.numerics.e4m3 import dequantize
from fp8lib.numerics.exact import leading_power, magnitude_bits
from fp8lib.numerics.magnitudes import (
    ABSOLUTE,
    COUNT,
    ENERGY,
    LOST,
    RESTORED,
    SHARE,
    TOP,
    ZEROED,
    histogram,
    magnitudes,
    rounded,
    smaller_half,
    sums,
    sums_under_powers,
)
from fp8lib.numerics.scales import pad_to_blocks
from fp8lib.numerics.served import covering_scale, is_served_as_written, requantize, requantized

# Squares of values outside leave float32; such pieces are measured in float64.
_FLOAT32_SQUARES = (1e-15, 1e15)


class Prepared:
    """A piece in whole blocks, and what has to be known of it before it is summed.

    Attributes:
        weights, codes, scales: as in the files, padded.
        magnitudes: `magnitude_bits` of the weights.
        best, amax: scales with the least squared error, and the largest weight, of each block.
        counts, first: `histogram` of the weights.
        wrong: which codes are not the nearest.
        doubtful: blocks that another scale, or the nearest codes, might lose less in.
        known: largest weight, whether the counts are enough, whether engines change nothing, whether all
            scales are powers of two, the number of doubtful blocks, of weights in the first bin (on a CPU
            all, elsewhere those that are not zero), and of blocks with a code that is not the nearest;
            float32 [7].
    """

    def __init__(
        self, weights: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, powers_of_two: bool
    ) -> None:
        self.weights, self.scales = pad_to_blocks(weights), scales
        self.codes = pad_to_blocks(codes.view(torch.uint8)).view(codes.dtype)
        self.magnitudes = magnitude_bits(self.weights)
        self.best, self.amax = best_scales(self.weights, self.magnitudes, powers_of_two)
        self.counts, self.first = histogram(self.magnitudes, scales)
        self.wrong = not_nearest(self.weights, self.codes, scales)
        eight = self.wrong.view(torch.int64).view(len(scales), BLOCK, -1, BLOCK // 8)
        wrong = eight.amax(dim=(1, 3)) > 0
        self.doubtful = wrong | (self.best.float() != scales.float())
        power = leading_power(scales.float())
        sound = (scales > 0) & scales.isfinite() & (self.amax < TOP * power) & ~wrong
        countable = sound.all() & (weights.dtype == torch.bfloat16)
        same = is_served_as_written(scales)
        # On a CPU this takes more time than it saves waiting, and is rarely needed.
        on_cpu = weights.device.type == "cpu"
        facts = (self.amax.amax(), countable, same, (power == scales).all())
        zeros = self.counts[0, 0] * 0 if on_cpu else (~_is_nonzero(self.weights)).count_nonzero()
        facts += self.doubtful.sum(), self.counts[:, 0].sum() - zeros, wrong.sum()
        self.known = torch.stack([fact.float() for fact in facts])


def all_sums(piece: Prepared, known: list[float], again: torch.Tensor | None) -> torch.Tensor:
    """Everything in `measure.Errors` but the first and the largest weight, in its order: float64 [16].

    Args:
        piece: what is summed.
        known: its `known`.
        again: scales as they should be; None where nobody knows.
    """
    amax, countable, same, powers, doubtful, first, wrong = known
    if first and piece.weights.device.type == "cpu":
        first -= int((~_is_nonzero(piece.weights)).count_nonzero())
    countable = countable and not first
    chosen = piece.doubtful.view(-1).int().argsort(descending=True, stable=True)[: int(doubtful)]
    if countable:
        found = _over_counts(piece, chosen, bool(same), bool(powers))
    else:
        wide = not _FLOAT32_SQUARES[0] < amax < _FLOAT32_SQUARES[1]
        found = _over_weights(piece, chosen, bool(same), wide)
    other = torch.zeros_like(found[0])
    if again is not None:
        other = (again.float() != piece.scales.float()).sum()
    found += [piece.wrong.count_nonzero() if wrong else torch.zeros_like(other), other]
    return torch.stack([value.double() for value in found])


# --- over the counts ---------------------------------------------------------------------------


def _over_counts(piece: Prepared, chosen: torch.Tensor, same: bool, powers: bool) -> list[torch.Tensor]:
    """The sums, from the magnitudes in each block and how often they are there."""
    counts, scales = piece.counts, piece.scales.float().view(-1, 1)
    if powers:
        written, units, max_abs = sums_under_powers(counts, scales)
    else:
        values = magnitudes(piece.first)
        restored = rounded(values, scales)
        written, units, max_abs = sums(counts, values, restored)
    of_blocks = written.sum(dim=1) * units.squeeze(1)
    whole, least = of_blocks.sum(dim=0), of_blocks[:, LOST]
    in_file = _fields(whole, max_abs)
    if len(chosen):
        some, best = magnitudes(piece.first[chosen]), piece.best.float().view(-1, 1)[chosen]
        found, _, _ = sums(counts[chosen], some, rounded(some, best))
        least[chosen] = torch.minimum(least[chosen], found[..., LOST].sum(dim=1))
    quiet = smaller_half(written[..., COUNT])
    bulk = _ratio((written[..., LOST] * quiet).sum(dim=1), (written[..., ENERGY] * quiet).sum(dim=1)).amax()
    served, changed = in_file, torch.zeros_like(bulk)
    if not same:
        if powers:
            values = magnitudes(piece.first)
            restored = rounded(values, scales)
        largest = torch.where(counts[:, 1:] > 0, restored, 0.0).amax(dim=1, keepdim=True)
        again = requantized(restored, covering_scale(largest))
        sums_served, _, max_abs = sums(counts, values, again)
        served = _fields(sums_served.sum(dim=(0, 1)), max_abs)
        changed = (counts[:, 1:] * (again != restored)).sum()
    return [*in_file, *served, whole[ENERGY], least.sum(), bulk, whole[COUNT], whole[ZEROED], changed]


def _fields(whole: torch.Tensor, max_abs: torch.Tensor) -> list[torch.Tensor]:
    """The fields of `measure.Sums`, from sums of `terms` [6]."""
    return [whole[RESTORED], whole[LOST], whole[ABSOLUTE], max_abs]


def _ratio(part: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """part / whole, float64; 0 / 0 is 0."""
    return part / whole.clamp(min=torch.finfo(torch.float64).tiny)


# --- over the weights --------------------------------------------------------------------------


def _over_weights(piece: Prepared, chosen: torch.Tensor, same: bool, wide: bool) -> list[torch.Tensor]:
    """The sums, from the weights and their codes; squares are taken in float64 if `wide`."""
    original = piece.weights.float()
    written = dequantize(piece.codes, piece.scales)
    energy = _squares(original, wide)
    in_file, lost = _sums(original, written, wide)
    least = _by_block(lost).view(-1)
    if len(chosen):
        least[chosen] = torch.minimum(least[chosen], errors_again(original, piece.best, chosen))
    nonzero = _is_nonzero(piece.weights)
    zeroed = nonzero & ((piece.codes.view(torch.uint8) & 0x7F) == 0)
    quiet = _in_smaller_half(piece, nonzero)
    bulk = _ratio(_by_block(lost * quiet), _by_block(energy * quiet)).amax()
    served, changed = in_file, torch.zeros_like(least[0])
    if not same:
        requant = dequantize(*requantize(piece.codes, piece.scales))
        served, _ = _sums(original, requant, wide)
        changed = (requant != written).count_nonzero()
    whole = _by_block(energy).sum(), least.sum(), bulk
    return [*in_file, *served, *whole, nonzero.count_nonzero(), zeroed.count_nonzero(), changed]


def _sums(
    original: torch.Tensor, restored: torch.Tensor, wide: bool
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The fields of `measure.Sums`, float64, and the squared errors [rows, columns]."""
    difference = (restored - original).abs_()
    lost = _squares(difference, wide)
    absolute = _by_block(difference.double() if wide else difference).sum()
    sums = [_by_block(_squares(restored, wide)).sum(), _by_block(lost).sum(), absolute, difference.amax()]
    return sums, lost


def _squares(values: torch.Tensor, wide: bool) -> torch.Tensor:
    values = values.double() if wide else values
    return values * values


def _by_block(values: torch.Tensor) -> torch.Tensor:
    """Sum of each block of [rows, columns], float64 [Rb, Cb]."""
    columns = values.view(-1, BLOCK, values.shape[1]).sum(dim=1).double()
    return columns.view(len(columns), -1, BLOCK).sum(dim=2)


def _in_smaller_half(piece: Prepared, nonzero: torch.Tensor) -> torch.Tensor:
    """Which weights are in the smaller half of their block's nonzero ones: bool [rows, columns]."""
    counts = piece.counts.clone()
    blocked = nonzero.view(len(piece.scales), BLOCK, -1, BLOCK)
    counts[:, 0] -= BLOCK * BLOCK - blocked.sum(dim=(1, 3)).view(-1)  # what is below, but not zero
    shares = torch.cat([counts[:, :1], counts[:, 1:].view(len(counts), -1, SHARE).sum(dim=2)], dim=1)
    last = smaller_half(shares).sum(dim=1, keepdim=True)
    largest = torch.where(last < shares.shape[1], piece.first + (last - 1) * SHARE, 1 << 15)
    bits = piece.magnitudes.view(len(piece.scales), BLOCK, -1, BLOCK)
    return nonzero & (bits < largest.view(len(piece.scales), 1, -1, 1)).view(nonzero.shape)


def _is_nonzero(weights: torch.Tensor) -> torch.Tensor:
    """weights != 0, in a tenth of its time on a CPU."""
    kind = torch.int32 if weights.dtype == torch.float32 else torch.int16
    return (weights.view(kind) & torch.iinfo(kind).max) != 0
