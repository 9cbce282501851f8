"""Sums over a piece of a matrix: what `measure.py` makes its figures of.

Two ways to the same. A piece of BF16 weights whose codes are all the nearest is counted, magnitude by
magnitude (`numerics/magnitudes.py`), and the sums are taken over the counts: half the time of going through
the weights once for each sum. All others, F16 and F32 weights among them, go through the weights.
"""

import numpy as np
import torch

from fp8lib.numerics.best import best_powers, best_scales, errors_again, not_nearest
from fp8lib.numerics.blocks import BLOCK
from fp8lib.numerics.e4m3 import SMALLEST_SCALE, dequantize
from fp8lib.numerics.exact import blocked_magnitudes, magnitude_bits
from fp8lib.numerics.magnitudes import (
    ABSOLUTE,
    ALIGNED,
    COUNT,
    ENERGY,
    LOST,
    RESTORED,
    SHARE,
    TOP,
    UNITS,
    ZEROED,
    histogram,
    largest_under_powers,
    magnitudes,
    rounded,
    smaller_half,
    sums,
    sums_under_powers,
)
from fp8lib.numerics.scales import pad_to_blocks
from fp8lib.numerics.served import SURVIVES, covering_scale, requantize, requantized

# Squares of values outside leave float32; such pieces are measured in float64.
_FLOAT32_SQUARES = (1e-15, 1e15)


class Prepared:
    """A piece in whole blocks, and what has to be known of it before it is summed.

    Attributes:
        weights, codes, scales: as in the files, padded.
        counts, first: `histogram` of the weights.
        wrong: which codes are not the nearest.
        known: of each block the largest weight, the scale, and the scale with the least squared error, unless
            that follows from the first; then the number of weights in the first bin, on a CPU of all,
            elsewhere of those that are not zero; and whether any code is not the nearest. float32.
    """

    def __init__(
        self, weights: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, powers_of_two: bool
    ) -> None:
        self.weights, self.scales = pad_to_blocks(weights), scales
        self.codes = pad_to_blocks(codes.view(torch.uint8)).view(codes.dtype)
        magnitudes = blocked_magnitudes(self.weights)
        amax, best = best_scales(self.weights, magnitudes, powers_of_two)
        self.counts, self.first = histogram(magnitudes, scales)
        self.wrong = not_nearest(self.weights, self.codes, scales)
        first = self.counts[:, 0].sum()
        if weights.device.type != "cpu":  # on a CPU this takes more time than it saves waiting
            first = first - (~_is_nonzero(self.weights)).count_nonzero()
        blocks = [amax, scales.float(), *([] if best is None else [best])]
        wrong = self.wrong.view(torch.int64).count_nonzero()
        self.known = torch.cat([value.view(-1).float() for value in (*blocks, first, wrong)])

    def wrong_blocks(self) -> np.ndarray:
        """Which blocks have codes that are not the nearest, bool [n]; the host waits for it."""
        eight = self.wrong.view(torch.int64).view(len(self.scales), BLOCK, -1, BLOCK // 8)
        return (eight.amax(dim=(1, 3)).view(-1) > 0).cpu().numpy()


class Facts:
    """What is known of a piece, and how it is to be summed.

    Attributes:
        amax: largest weight.
        scales: float64 [n], of its blocks.
        best: float64 [n], those with the least squared error.
        in_units: whether all of them are powers of two for which there is a table.
        same: whether engines change no value.
        doubtful: int64 [d], blocks that another scale, or the nearest codes, might lose less in.
        countable: whether the counts are enough.
    """

    def __init__(self, piece: Prepared, known: np.ndarray) -> None:
        amax, scales, *searched = known[:-2].reshape(-1, piece.scales.numel())
        first, wrong = known[-2:]
        self.best = searched[0] if searched else best_powers(amax)
        fraction, exponent = np.frexp(scales)
        self.amax, self.scales = float(amax.max()), scales.astype(np.float64)
        powers, least, most = bool((fraction == 0.5).all()), scales.min(), scales.max()
        self.same = powers and bool(least >= SURVIVES)
        self.in_units = powers and bool(least >= ALIGNED[0] and most <= ALIGNED[1])
        doubtful = self.best != scales
        self.doubtful = np.flatnonzero(doubtful | piece.wrong_blocks() if wrong else doubtful)
        if first and piece.weights.device.type == "cpu":
            first -= int((~_is_nonzero(piece.weights)).count_nonzero())
        sound = (scales >= SMALLEST_SCALE) & (scales < np.inf) & (amax < np.ldexp(TOP / 2, exponent))
        exact = piece.weights.dtype == torch.bfloat16 and not wrong and not first
        self.countable = exact and bool(sound.all())


def sum_up(piece: Prepared, facts: Facts, again: torch.Tensor | None) -> torch.Tensor:
    """All sums over a piece, for `figures` to read: float64 [...], on the device.

    Args:
        piece: what is summed.
        facts: about it.
        again: scales as they should be; None where nobody knows.
    """
    if facts.countable:
        found = _over_counts(piece, facts)
    else:
        found = _over_weights(piece, facts)
        found.append(piece.wrong.count_nonzero())
    if again is not None:
        found.append((again.float() != piece.scales.float()).sum())
    return torch.cat([value.reshape(-1).double() for value in found])


def figures(facts: Facts, sums: np.ndarray, again: bool) -> list[float]:
    """Everything in `measure.Errors` but the first and the largest weight, in its order.

    Args:
        facts: about the piece.
        sums: what `sum_up` gave, on the host.
        again: whether it compared scales.
    """
    other = sums[-1] if again else 0.0
    if facts.countable:
        return [*_of_counts(facts, sums), 0.0, other]
    if facts.same:
        sums = np.concatenate([sums[:4], sums])
    return [*sums[:15], other]


def _doubtful(piece: Prepared, facts: Facts) -> tuple[torch.Tensor, torch.Tensor]:
    """The doubtful blocks, int64 [d], and their best scales, float32 [d], on the device."""
    device = piece.weights.device
    best = torch.from_numpy(facts.best[facts.doubtful]).to(device).float()
    return torch.from_numpy(facts.doubtful).to(device), best


# --- over the counts ---------------------------------------------------------------------------

_COLUMNS = 9
"""What there is of each block: sums of `terms`, the energy and the loss of its smaller half, and |v - r|."""


def _over_counts(piece: Prepared, facts: Facts) -> list[torch.Tensor]:
    """The sums, from the magnitudes in each block and how often they are there.

    Of each block _COLUMNS values, of each doubtful one the least loss, and of what is served the sums that
    `measure.Sums` has, and how many weights were changed.
    """
    counts, scales = piece.counts, piece.scales.float().view(-1, 1)
    if facts.in_units:
        written, largest = sums_under_powers(counts), largest_under_powers(counts, scales)
    else:
        values = magnitudes(piece.first)
        restored = rounded(values, scales)
        written, largest = sums(counts, values, restored)
    quiet = smaller_half(written[..., COUNT]).unsqueeze(-1)
    of_quiet = (written[..., : LOST + 1] * quiet).sum(dim=1)
    found = [torch.cat([written.sum(dim=1), of_quiet, largest], dim=1)]
    if len(facts.doubtful):
        chosen, best = _doubtful(piece, facts)
        some = magnitudes(piece.first[chosen])
        under_best, _ = sums(counts[chosen], some, rounded(some, best.view(-1, 1)))
        found.append(under_best[..., LOST].sum(dim=1))
    if not facts.same:
        if facts.in_units:
            values = magnitudes(piece.first)
            restored = rounded(values, scales)
        covered = torch.where(counts[:, 1:] > 0, restored, 0.0).amax(dim=1, keepdim=True)
        again = requantized(restored, covering_scale(covered))
        served, largest = sums(counts, values, again)
        whole = served.sum(dim=(0, 1))
        found += [whole[RESTORED], whole[LOST], whole[ABSOLUTE], largest.amax()]
        found.append((counts[:, 1:] * (again != restored)).sum())
    return found


def _of_counts(facts: Facts, sums: np.ndarray) -> list[float]:
    """The fields of `measure.Errors` from `written` to `requantized`, from what `_over_counts` gave."""
    n, d = len(facts.scales), len(facts.doubtful)
    blocks, sums = sums[: n * _COLUMNS].reshape(n, _COLUMNS), sums[n * _COLUMNS :]
    terms = blocks[:, : COUNT + 1]
    if facts.in_units:
        terms = terms * facts.scales[:, None] ** UNITS
    whole, lost = terms.sum(axis=0), terms[:, LOST].copy()
    least = lost.copy()
    least[facts.doubtful] = np.minimum(least[facts.doubtful], sums[:d])
    quiet_energy, quiet_lost = blocks[:, COUNT + 1], blocks[:, COUNT + 2]
    bulk = (quiet_lost / np.maximum(quiet_energy, np.finfo(np.float64).tiny)).max()
    in_file = [whole[RESTORED], lost.sum(), whole[ABSOLUTE], blocks[:, -1].max()]
    served, changed = (in_file, 0.0) if facts.same else (sums[d : d + 4], sums[d + 4])
    return [*in_file, *served, whole[ENERGY], least.sum(), bulk, whole[COUNT], whole[ZEROED], changed]


# --- over the weights --------------------------------------------------------------------------


def _over_weights(piece: Prepared, facts: Facts) -> list[torch.Tensor]:
    """The sums, from the weights and their codes: the fields of `measure.Errors` from `written` to
    `requantized`, without `served` if that is the same.
    """
    wide = not _FLOAT32_SQUARES[0] < facts.amax < _FLOAT32_SQUARES[1]
    original = piece.weights.float()
    written = dequantize(piece.codes, piece.scales)
    energy = _squares(original, wide)
    in_file, lost = _sums(original, written, wide)
    least = _by_block(lost).view(-1)
    if len(facts.doubtful):
        chosen, best = _doubtful(piece, facts)
        least[chosen] = torch.minimum(least[chosen], errors_again(original, best, chosen))
    nonzero = _is_nonzero(piece.weights)
    zeroed = nonzero & ((piece.codes.view(torch.uint8) & 0x7F) == 0)
    quiet = _in_smaller_half(piece, nonzero)
    energy_of_quiet = _by_block(energy * quiet).clamp(min=torch.finfo(torch.float64).tiny)
    bulk = (_by_block(lost * quiet) / energy_of_quiet).amax()
    served, changed = [], torch.zeros_like(least[0])
    if not facts.same:
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
    bits = magnitude_bits(piece.weights).view(len(piece.scales), BLOCK, -1, BLOCK)
    return nonzero & (bits < largest.view(len(piece.scales), 1, -1, 1)).view(nonzero.shape)


def _is_nonzero(weights: torch.Tensor) -> torch.Tensor:
    """weights != 0, in a tenth of its time on a CPU."""
    kind = torch.int32 if weights.dtype == torch.float32 else torch.int16
    return (weights.view(kind) & torch.iinfo(kind).max) != 0
