"""The four calibration modes: blocks of weights in, one scale per 128x128 block out, stored as BF16.

    max         amax / 448
    rms         k * rms / 448, doubled until nothing saturates
    percentile  p-th percentile of |w| / 448; what lies above is clipped
    mse         the scale with the least (activation-weighted) squared error

E4M3 is floating point, so a scale's exponent hardly matters and clipping never pays: on 128x128
Gaussian blocks plain `max` reaches cosine 0.99965, clipping at 3 rms 0.99945, and no scale at all more
than 0.99966. What is left to choose is the scale's phase: where its mantissa puts the eight rounding
steps of an octave among the weights. `rms` takes the phase from the bulk of the block instead of from
its one largest weight; `mse` tries every phase there is.

With the scale format `ue8m0` every scale is a power of two: what the mode asks for, rounded up, or among
these the best for `mse`. There is no phase to choose then, and modes that do not clip differ by whole
octaves alone. In return an engine that requantizes the weights to powers of two (`served.py`) changes
nothing, where it doubles the squared error of all others.

`mse.py` and `powers.py` explain how scales are searched.

Everything that decides a scale is either exact or an elementwise float32 operation in
a fixed order, so that device, piece size and number of workers change no byte.
"""

import torch

from fp8lib.numerics.blocks import BLOCK, blocks
from fp8lib.numerics.e4m3 import MAX, SCALE_DTYPE, SMALLEST_SCALE, expand_columns, quantize
from fp8lib.numerics.exact import (
    blocked_copy,
    covering_power,
    divide,
    leading_power,
    magnitude_bits,
    pairwise_sum,
    power_of_two,
)
from fp8lib.numerics.modes import Calibration
from fp8lib.numerics.mse import mse_scales, per_block_column
from fp8lib.numerics.powers import mse_powers


def quantize_blocks(
    weights: torch.Tensor, calibration: Calibration, activation: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and codes of a weight matrix, or of any rows of it that start at a multiple of 128.

    Args:
        weights: [rows, columns], BF16, F16 or F32.
        calibration: how to choose the scales.
        activation: float32 [columns], mean square of each input channel, finite and >= 0; None for 1. Or
            [ceil(rows/128), columns], where matrices with other inputs lie below each other.

    Returns:
        (float8_e4m3fn [rows, columns], bfloat16 [ceil(rows/128), ceil(columns/128)]). A block that
        holds NaN or infinity gets a scale that is not finite: check the scales, not the weights.
    """
    scales, _ = block_scales(weights, calibration, activation)
    return quantize(weights, scales, saturate=calibration.may_clip), scales


def block_scales(
    weights: torch.Tensor, calibration: Calibration, activation: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scales alone; arguments as `quantize_blocks`.

    Returns:
        (scales bfloat16 [Rb, Cb], amax float32 [Rb, Cb]). Blocks of zeros get scale 1.
    """
    columns = weights.shape[1]
    padded = pad_to_blocks(weights)
    if calibration.mode != "max" and activation is not None:
        activation = torch.nn.functional.pad(activation, (0, padded.shape[1] - columns))
    # Padding is zeros, which change no maximum, no sum, no upper order statistic and no error.
    codes = magnitude_bits(padded)
    largest = _column_amax(padded, codes)
    amax = largest.view(len(largest), -1, BLOCK).amax(dim=2)
    if calibration.mode == "mse":
        importance = None if activation is None else per_block_column(activation)
        if calibration.powers_of_two:
            scales = mse_powers(padded, largest, amax, importance)
        else:
            scales = mse_scales(padded, codes, amax, calibration.mse_grid_size, importance)
    else:
        if calibration.mode == "max":
            scales = divide(amax, MAX)
        elif calibration.mode == "percentile":
            scales = divide(_percentile(padded, codes, _block_sizes(weights), calibration.percentile), MAX)
        else:
            scales = _saturating_rms(padded, amax, _block_sizes(weights), calibration.rms_factor, activation)
        # Exact for amax / 448: where it is above a power of two, so is the nearest float32.
        scales = covering_power(scales, 1.0) if calibration.powers_of_two else scales
        if calibration.mode == "rms" and not calibration.rms_saturate:
            scales = _doubled(scales, amax)
    scales = torch.where(amax == 0, 1.0, scales.clamp(min=SMALLEST_SCALE))
    # `where` keeps NaN and infinity of a broken block visible whatever the mode made of them.
    return torch.where(amax.isfinite(), scales, amax).to(SCALE_DTYPE), amax


# --- pieces that several modes share -----------------------------------------------------------


def pad_to_blocks(weights: torch.Tensor) -> torch.Tensor:
    """[rows, columns] with zeros below and on the right, up to whole blocks."""
    rows, columns = weights.shape
    bottom, right = -rows % BLOCK, -columns % BLOCK
    if bottom or right:
        return torch.nn.functional.pad(weights, (0, right, 0, bottom))
    return weights


def _block_sizes(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Real rows of each block row and real columns of each block column: float32 [Rb, 1], [1, Cb]."""

    def extents(n: int) -> torch.Tensor:
        starts = torch.arange(blocks(n), device=weights.device) * BLOCK
        return (n - starts).clamp(max=BLOCK).float()

    return extents(weights.shape[0])[:, None], extents(weights.shape[1])[None, :]


def _column_amax(weights: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Largest |w| of each column of each block, float32 [Rb, columns]; NaN where there is one."""
    rows, columns = weights.shape
    exact = weights.dtype == torch.bfloat16
    magnitude = codes if exact else weights.abs()
    largest = magnitude.view(rows // BLOCK, BLOCK, columns).amax(dim=1)
    return (largest.view(torch.bfloat16) if exact else largest).float()


# --- rms ---------------------------------------------------------------------------------------


def _saturating_rms(
    weights: torch.Tensor,
    amax: torch.Tensor,
    sizes: tuple[torch.Tensor, torch.Tensor],
    factor: float,
    activation: torch.Tensor | None,
) -> torch.Tensor:
    """k * rms / 448 per block, float32 [Rb, Cb]."""
    row_blocks, columns = weights.shape[0] // BLOCK, weights.shape[1]
    rows_in_block, columns_in_block = sizes
    # Squares of weights below 2^-63 or above 2^63 leave float32, so measure in units of 2^unit.
    unit = leading_power(amax).clamp_(SMALLEST_SCALE, 2.0**127)
    squares = weights.to(torch.float32, copy=True).view(row_blocks, BLOCK, columns)
    squares.div_(expand_columns(unit, columns))
    squares.mul_(squares)
    per_column = pairwise_sum(squares, dim=1)  # [Rb, columns]
    count = rows_in_block * columns_in_block
    mean = pairwise_sum(_by_block(per_column), dim=2) / count
    if activation is not None:
        importance = per_block_column(activation).float() * (activation > 0).unflatten(-1, (-1, BLOCK))
        importance = importance.view(-1, columns // BLOCK, BLOCK)  # [1 or Rb, Cb, 128]
        weight = rows_in_block * pairwise_sum(importance.clone(), dim=2)
        weighted = pairwise_sum(_by_block(per_column) * importance, dim=2)
        mean = torch.where(weighted > 0, weighted / weight, mean)  # else no weight meets a signal
    return divide(factor * mean.sqrt(), MAX) * unit


def _doubled(scales: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
    """Each scale, rounded to BF16, times the least power of two that takes amax to 448 or below, float32."""
    scales = scales.clamp(min=SMALLEST_SCALE).bfloat16().double()  # up to 2^245 below amax: not for float32
    excess = torch.frexp(amax / (MAX * scales))
    doublings = excess.exponent - (excess.mantissa == 0.5).int()
    return (scales * power_of_two(doublings.clamp(min=0), torch.float64)).float()


def _by_block(per_column: torch.Tensor) -> torch.Tensor:
    """[Rb, columns] -> a copy [Rb, Cb, 128]."""
    return per_column.reshape(per_column.shape[0], -1, BLOCK).clone()


# --- percentile --------------------------------------------------------------------------------


def _percentile(
    weights: torch.Tensor,
    codes: torch.Tensor,
    sizes: tuple[torch.Tensor, torch.Tensor],
    percentile: float,
) -> torch.Tensor:
    """Percentile of |w| per block, float32 [Rb, Cb].

    Linear interpolation between order statistics, numpy's default: the value at position
    p/100 * (n - 1) of the n sorted magnitudes.
    """
    exact = weights.dtype == torch.bfloat16
    magnitude = blocked_copy(codes if exact else weights.abs().float())
    last = (sizes[0] * sizes[1]).double() - 1
    position = last * (percentile / 100)
    below = position.floor()
    # Counted from the top, where zero padding never reaches.
    rank = (last - below).long().unsqueeze(-1)
    top = magnitude.topk(int(rank.max()) + 1, dim=-1).values
    neighbours = top.gather(-1, torch.cat([rank, (rank - 1).clamp(min=0)], dim=-1))
    low, high = (neighbours.view(torch.bfloat16) if exact else neighbours).float().unbind(-1)
    return low + (position - below).float() * (high - low)
