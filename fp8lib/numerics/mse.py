"""`mse`: for every block the BF16 scale with the least (activation-weighted) squared error.

How 128 scales are tried for the price of one. A BF16 weight is 2^e * m/128 with m = 128..255, a BF16 scale
2^k * p/128 with p = 128..255. As long as w/s is a normal E4M3 number, its rounding error is 4^e * T[m, p]:
the exponents only shift it. So one pass collects h[m] = sum of a_j * 4^e per block, a histogram of 128
mantissas, and h @ T is the exact error of all 128 phases at once. T holds integers and h is rounded to 29
bits, so the float64 products are exact, and no order of summation, piece size or device can change which
phase wins.

The identity ends where weights become subnormal, 2^-12 of the block's largest and below. Each such weight
adds at most 2^-32 (in units of the block's largest power of two, squared). Where that bound could matter, or
the rounding of h could, or one channel drowns another by 2^28, `_exact_search` judges the block instead: a
histogram of all codes over 22 octaves against a table of true errors, for every scale from amax/896 to
amax/224. The low end clips, which can pay when the outlier sits in a channel that hardly matters.

Its sums are not of integers: no number of bits would hold what channels and errors span. Yet a sum of n
terms >= 0 is off by n * 2^-53 of itself at most, in whatever order it is taken: here by 2^-38, histogram and
product together. Scales whose losses are within 2^-22 of the least are compared once more, by sums that are
taken in one order everywhere and rounded to float32. A scale with the least of these is always among them,
as rounding and both ways to sum move a ratio of two losses by less than 2^-23 + 2^-36. So this search gives
the same bytes on every device, too.
"""

import torch

from fp8lib.numerics.blocks import BLOCK
from fp8lib.numerics.e4m3 import MAX, SMALLEST_SCALE
from fp8lib.numerics.exact import (
    blocked_copy,
    divide,
    leading_power,
    magnitude_bits,
    pairwise_sum,
    power_of_two,
)
from fp8lib.numerics.modes import PHASES
from fp8lib.numerics.tables import table

_BF16_EXPONENT = 0x7F80
_WINDOW = 16
_BINS = _WINDOW * PHASES
"""Octaves of the fast histogram; row 15 is the octave of the block's largest weight."""
_CPU_GROUP = 2**15 // _BINS
"""Blocks that are counted at a time on a CPU: as many as a 16-bit index tells apart."""
_SMALLEST_AMAX = 2.0 ** (_WINDOW - 127)
"""Below it the window reaches into the subnormal numbers of BF16."""
_SUBNORMAL_ROWS = 3
"""Rows 0..2, 13 octaves down and lower, may be subnormal: 2^-12 * amax vs 2 * amax/448 * 2^-6."""
_SUBNORMAL_ERROR = 2.0**14
"""Most that a subnormal weight adds to h @ T: (2^-16)^2 of a block whose top octave begins at 1, in units
of 4^-12 (the lowest row of h) times 2^-22 (the square of a sixteenth of 2^-7)."""
_NEGLIGIBLE = 5e-4
"""Share of the loss below which subnormal weights are left out; the search promises 1e-3."""
_ROUNDED_AWAY = 2.0**31
"""A least loss below this may owe more than _NEGLIGIBLE to the rounding of h: 128 bins * 1/2 * 2^14."""
_EXACT_WINDOW = 22
"""Octaves of the exact histogram. Weights 2^-21 below amax round to zero under every scale tried."""
_EXACT_BATCH = 16
"""Blocks per matrix product of the exact search."""
_NEAR = 2.0**-22
"""Losses this near to the least, relative to it, are summed once more in a fixed order."""


def mse_scales(
    weights: torch.Tensor,
    codes: torch.Tensor,
    amax: torch.Tensor,
    grid_size: int,
    activation: torch.Tensor | None,
) -> torch.Tensor:
    """Least-squares BF16 scale per block. See the module's docstring.

    Args:
        weights: [Rb * 128, Cb * 128], BF16, F16 or F32.
        codes: its `magnitude_bits`.
        amax: float32 [Rb, Cb], largest |w| of each block.
        grid_size: phases per octave.
        activation: float64 [Cb, 128], weight of each input channel; None for 1.

    Returns:
        float32 [Rb, Cb].
    """
    shape, device = amax.shape, weights.device
    importance = faint = None
    if activation is not None:
        importance, faint = _as_integers(activation)
    group = _CPU_GROUP if device.type == "cpu" else amax.numel()
    h, subnormal = _histograms(codes, amax, importance, group)
    # 2^29 per bin, so that sums of 128 products with T < 2^16 stay below 2^53: exact in any order.
    unit = leading_power(h.amax(dim=1, keepdim=True)).mul_(2.0**-28)
    losses = h.div_(unit).round_() @ _error_table(grid_size, device)
    least, phase = losses.min(dim=1, keepdim=True)
    scales = _smallest_unclipped(_mantissas(grid_size, device)[phase].view(shape), amax)

    doubt = (subnormal * (_SUBNORMAL_ERROR / _NEGLIGIBLE)).div_(unit).clamp_(min=_ROUNDED_AWAY)
    # NaN, where no channel that matters has a weight above the lowest rows, is not certain either.
    certain = (least >= doubt).view(shape) & (amax >= _SMALLEST_AMAX)
    if faint is not None:
        certain &= ~faint
    if not certain.all():
        uncertain = ~certain & amax.isfinite() & (amax > 0)
        blocked = blocked_copy(weights)[uncertain]
        if activation is not None:
            activation = activation.expand(shape[0], -1, -1)[uncertain]
        scales[uncertain] = _exact_search(blocked, amax[uncertain], grid_size, activation)
    return scales


def per_block_column(activation: torch.Tensor) -> torch.Tensor:
    """float32 [..., columns] -> float64 [..., Cb, 128] by each block's loudest, ones if that is 0.

    The unit is a power of two: only the ratios decide, and no sum of losses leaves float32.
    """
    blocked = activation.double().unflatten(-1, (-1, BLOCK))
    loudest = blocked.amax(dim=-1, keepdim=True)
    return torch.where(loudest > 0, blocked / leading_power(loudest), 1.0)


def _as_integers(activation: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Channel weights as integers up to 2^38: 16384 of them add up exactly in float64, in any order.

    Args:
        activation: float64 [..., Cb, 128], some of each row positive.

    Returns:
        (float64 [..., Cb, 128], bool [..., Cb]: whether a channel is too faint beside the loudest of its
        block to keep ten bits).
    """
    shift = 38 - torch.frexp(activation.amax(dim=-1, keepdim=True)).exponent
    integers = torch.round(activation * power_of_two(shift, torch.float64))
    return integers, ((activation > 0) & (integers < 2**10)).any(dim=-1)


def _smallest_unclipped(mantissa: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
    """Smallest scale mantissa * 2^k that takes amax to 448 or below, float32; mantissas in [1, 2)."""
    # Whether the quotient is an ulp off does not matter: below a power of two the comparison doubles, and
    # above it no mantissa would do in the octave below.
    scales = mantissa * leading_power(amax * (1 / MAX))
    return torch.where(MAX * scales < amax, 2 * scales, scales)


# --- the histogram of mantissas ------------------------------------------------------------------


def _phases(grid_size: int) -> list[int]:
    """BF16 mantissas (with the implicit bit, 128..255) that a search of `grid_size` phases tries."""
    return [PHASES + i * PHASES // grid_size for i in range(grid_size)]


@table
def _mantissas(grid_size: int) -> torch.Tensor:
    """The phases as numbers in [1, 2), float32 [P]."""
    return torch.tensor(_phases(grid_size), dtype=torch.float32).div(PHASES)


@table
def _error_table(grid_size: int) -> torch.Tensor:
    """T[m - 128, phase]: squared rounding error of mantissa m under each phase, float64 [128, P].

    m/p lies in (1/2, 2), where E4M3's step is 1/16 below 1 and 1/8 from 1 on. Counted in sixteenths
    the error 16*m - p*k, k the quotient rounded to that step, is an integer below 256.
    """
    m = torch.arange(PHASES, 2 * PHASES, dtype=torch.float64)[:, None]
    p = torch.tensor(_phases(grid_size), dtype=torch.float64)[None, :]
    step = torch.where(m >= p, 2.0, 1.0)
    sixteenths = torch.round(16 * m / p / step) * step
    return (16 * m - p * sixteenths).square()


@table
def _octave_shifts() -> torch.Tensor:
    """log2 of 4^octave, int64 [octaves that cannot be subnormal, 1]."""
    return 2 * torch.arange(_WINDOW - _SUBNORMAL_ROWS)[:, None]


@table
def _bin_offsets(count: int, group: int, dtype: torch.dtype) -> torch.Tensor:
    """Where each of `count` blocks' histogram begins in that of its group, [count]."""
    return torch.arange(count, dtype=dtype) % group * _BINS


def _histograms(
    codes: torch.Tensor, amax: torch.Tensor, importance: torch.Tensor | None, group: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Energy of each mantissa in each block, and what cannot be told by it.

    Counting is half of what `mse` costs beside `max`. On a CPU it pays to count one block after the other,
    whose bins the innermost cache holds then.

    Args:
        codes: int16 [rows, columns], from `magnitude_bits`.
        amax: float32 [Rb, Cb].
        importance: float64 [Cb, 128] or [Rb, Cb, 128], integers; None for 1.
        group: blocks to count at a time.

    Returns:
        (float64 [Rb * Cb, 128]: h of the module's docstring, in units of row _SUBNORMAL_ROWS;
        [Rb * Cb, 1]: count of the weights, or sum of the importances, that may be subnormal).
    """
    (row_blocks, column_blocks), count, device = amax.shape, amax.numel(), codes.device
    dtype = torch.int16 if group <= _CPU_GROUP else torch.int32
    index = torch.empty(row_blocks, column_blocks, BLOCK, BLOCK, dtype=dtype, device=device)
    split = codes.view(row_blocks, BLOCK, column_blocks, BLOCK).transpose(1, 2)
    top = amax.bfloat16().view(torch.int16)[:, :, None, None] & _BF16_EXPONENT
    base = top - ((_WINDOW - 1) << 7)  # where each block's window begins
    torch.maximum(split, base, out=index)
    size = 1 << (count - 1).bit_length()  # so that few tables do for all shapes
    offsets = _bin_offsets(size, min(group, size), dtype, device)[:count]
    index.sub_(base - offsets.view(row_blocks, column_blocks, 1, 1))
    parts = index.view(-1).split(group * BLOCK * BLOCK)
    spread = [None] * len(parts)
    if importance is not None:
        columns = importance.unsqueeze(-2).expand(row_blocks, column_blocks, BLOCK, BLOCK)
        spread = columns.reshape(-1).split(group * BLOCK * BLOCK)
    counts = [
        torch.bincount(part, weight, minlength=len(part) // BLOCK // BLOCK * _BINS)
        for part, weight in zip(parts, spread, strict=True)
    ]
    counts = torch.cat(counts).view(count, _WINDOW, PHASES)
    subnormal = counts[:, :_SUBNORMAL_ROWS].sum(dim=(1, 2)).unsqueeze(1)
    octaves = counts[:, _SUBNORMAL_ROWS:]
    if importance is None:  # integers: exact in any order
        return (octaves << _octave_shifts(device)).sum(dim=1).double(), subnormal
    # Rounded, so one octave after the other, in an order that nothing can change.
    h = torch.zeros(count, PHASES, dtype=torch.float64, device=device)
    for octave, sums in enumerate(octaves.unbind(dim=1)):
        h.add_(sums, alpha=4.0**octave)
    return h, subnormal


# --- the exact search -----------------------------------------------------------------------------


@table
def _exact_candidates(grid_size: int) -> torch.Tensor:
    """Scales for a block whose largest weight is in [1, 2), ascending, float32 [4 * P]."""
    mantissa = torch.tensor(_phases(grid_size), dtype=torch.float32) / PHASES
    octaves = power_of_two(torch.arange(-10, -6), torch.float32)
    return (octaves[:, None] * mantissa).view(-1)


@table
def _exact_table(grid_size: int) -> torch.Tensor:
    """True squared error of every BF16 magnitude in 22 octaves below 2 under every candidate scale.

    float64 [1 + 22 * 128, 4 * P]; made with the cast itself, clipping and subnormals included. Row 0, all
    zeros, is for what is zero or too small for any candidate to tell from it.
    """
    octave = power_of_two(torch.arange(1 - _EXACT_WINDOW, 1), torch.float32)
    mantissa = torch.arange(PHASES, 2 * PHASES).float() / PHASES
    value = (octave[:, None] * mantissa).view(-1, 1)
    scale = _exact_candidates(grid_size, torch.device("cpu"))[None, :]
    rounded = (value / scale).clamp(max=MAX).to(torch.float8_e4m3fn).double() * scale
    return torch.nn.functional.pad((value.double() - rounded).square(), (0, 0, 1, 0))


def _exact_search(
    blocked: torch.Tensor, amax: torch.Tensor, grid_size: int, activation: torch.Tensor | None
) -> torch.Tensor:
    """The `mse` scale of blocks in which subnormal weights matter.

    Args:
        blocked: [F, 128*128] weights of F blocks.
        amax: float32 [F], positive.
        grid_size: phases per octave.
        activation: float64 [F, 128], weights of each block's channels; None for 1.

    Returns:
        float32 [F] scales between amax/896 and amax/224.
    """
    device = blocked.device
    candidates, errors = _exact_candidates(grid_size, device), _exact_table(grid_size, device)
    bins = len(errors)
    # The nearest BF16 of the largest weight, which is what is counted, lies in the table's top octave.
    unit = leading_power(amax.bfloat16().float()).clamp_(SMALLEST_SCALE, 2.0**127)
    top = amax / unit  # [1, 2), or a little less where amax was rounded up
    allowed = (candidates >= divide(top, 2 * MAX)[:, None]) & (candidates < divide(top, MAX / 2)[:, None])
    chosen = torch.empty_like(amax)
    for part in range(0, len(blocked), _EXACT_BATCH):
        batch = slice(part, part + _EXACT_BATCH)
        scaled = blocked[batch].float() / unit[batch, None]
        index = magnitude_bits(scaled).to(torch.int32) - (((128 - _EXACT_WINDOW) << 7) - 1)
        index.clamp_(0, bins - 1)
        importance = None if activation is None else activation[batch]
        losses = _losses_in_any_order(index, errors, importance).masked_fill_(~allowed[batch], torch.inf)
        least = losses.amin(dim=1, keepdim=True)
        near = losses <= least * (1 + _NEAR)
        tied = (near.sum(dim=1) > 1) & (least.squeeze(1) > 0)  # 0 is exact
        if tied.any():
            near[tied] = _least_in_order(
                index[tied], near[tied], errors, None if importance is None else importance[tied]
            )
        chosen[batch] = candidates[near.int().argmax(dim=1)]  # the first of several
    return chosen * unit


def _losses_in_any_order(
    index: torch.Tensor, errors: torch.Tensor, importance: torch.Tensor | None
) -> torch.Tensor:
    """Loss of every candidate, float64 [F, 4 * P]; off by 2^-38 of itself at most, as the order has it.

    Args:
        index: int32 [F, 128*128], each weight's row of `errors`.
        errors: `_exact_table`.
        importance: float64 [F, 128], weights of each block's channels; None for 1.
    """
    (count, _), bins = index.shape, len(errors)
    offsets = torch.arange(count, device=index.device, dtype=torch.int32)[:, None] * bins
    spread = None
    if importance is not None:
        spread = importance[:, None, :].expand(-1, BLOCK, -1).reshape(-1)
    histogram = torch.bincount((index + offsets).view(-1), spread, minlength=count * bins)
    return histogram.view(count, bins).double() @ errors


def _least_in_order(
    index: torch.Tensor, near: torch.Tensor, errors: torch.Tensor, importance: torch.Tensor | None
) -> torch.Tensor:
    """Which of some candidates have the least loss, by sums in a fixed order: bool [F, 4 * P].

    Sums are rounded to float32, which makes equal what differs by the rounding of sums alone.

    Args:
        index, errors, importance: as `_losses_in_any_order`.
        near: bool [F, 4 * P], the candidates.
    """
    losses = torch.full(near.shape, torch.inf, dtype=torch.float64, device=near.device)
    block, candidate = near.nonzero(as_tuple=True)
    for part in zip(block.split(_EXACT_BATCH), candidate.split(_EXACT_BATCH), strict=True):
        squared = errors[index[part[0]], part[1][:, None]].view(-1, BLOCK, BLOCK)
        per_channel = pairwise_sum(squared, dim=1)
        if importance is not None:
            per_channel = per_channel * importance[part[0]]
        losses[part] = pairwise_sum(per_channel, dim=1)
    least = losses.amin(dim=1, keepdim=True)
    # Sums of at most 2^15 in units of a power of two stay in float32's range; a unit of 0 is for losses of 0.
    unit = torch.where(least > 0, leading_power(least), 1.0)
    losses = (losses / unit).float()
    return losses == losses.amin(dim=1, keepdim=True)
