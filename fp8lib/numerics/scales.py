"""The four calibration modes: blocks of weights in, one BF16 scale per 128x128 block out.

    max         amax / 448
    rms         k * rms / 448, doubled until nothing saturates
    percentile  p-th percentile of |w| / 448; what lies above is clipped
    mse         the BF16 scale with the least (activation-weighted) squared error

E4M3 is floating point, so a scale's exponent hardly matters and clipping never pays: on 128x128
Gaussian blocks plain `max` reaches cosine 0.99965, clipping at 3 rms 0.99945, and no scale at all more
than 0.99966. What is left to choose is the scale's phase: where its mantissa puts the eight rounding
steps of an octave among the weights. `rms` takes the phase from the bulk of the block instead of from
its one largest weight; `mse` tries every phase there is.

`mse.py` explains how. Everything that decides a scale is either exact or an elementwise float32 operation in
a fixed order, so that device, piece size and number of workers change no byte.
"""

import torch

from fp8lib.numerics.blocks import BLOCK, blocks
from fp8lib.numerics.e4m3 import MAX, SCALE_DTYPE, SMALLEST_SCALE, expand_columns, quantize
from fp8lib.numerics.exact import (
    blocked_copy,
    divide,
    leading_power,
    magnitude_bits,
    pairwise_sum,
    power_of_two,
)
from fp8lib.numerics.modes import Calibration
from fp8lib.numerics.mse import mse_scales, per_block_column


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
    padded = _pad_to_blocks(weights)
    if calibration.mode != "max" and activation is not None:
        activation = torch.nn.functional.pad(activation, (0, padded.shape[1] - columns))
    # Padding is zeros, which change no maximum, no sum, no upper order statistic and no error.
    codes = magnitude_bits(padded)
    amax = _block_amax(padded, codes)
    if calibration.mode == "max":
        scales = divide(amax, MAX)
    elif calibration.mode == "rms":
        scales = _rms_scales(padded, amax, _block_sizes(weights), calibration, activation)
    elif calibration.mode == "percentile":
        scales = divide(_percentile(padded, codes, _block_sizes(weights), calibration.percentile), MAX)
    else:
        scales = mse_scales(padded, codes, amax, calibration.mse_grid_size, activation)
    scales = torch.where(amax == 0, 1.0, scales.clamp(min=SMALLEST_SCALE))
    # `where` keeps NaN and infinity of a broken block visible whatever the mode made of them.
    return torch.where(amax.isfinite(), scales, amax).to(SCALE_DTYPE), amax


# --- pieces that several modes share -----------------------------------------------------------


def _pad_to_blocks(weights: torch.Tensor) -> torch.Tensor:
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


def _block_amax(weights: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Largest |w| of each block, float32 [Rb, Cb]; NaN where a block holds one."""
    rows, columns = weights.shape
    exact = weights.dtype == torch.bfloat16
    magnitude = codes if exact else weights.abs()
    per_column = magnitude.view(rows // BLOCK, BLOCK, columns).amax(dim=1)
    amax = per_column.view(rows // BLOCK, columns // BLOCK, BLOCK).amax(dim=2)
    return (amax.view(torch.bfloat16) if exact else amax).float()


# --- rms ---------------------------------------------------------------------------------------


def _rms_scales(
    weights: torch.Tensor,
    amax: torch.Tensor,
    sizes: tuple[torch.Tensor, torch.Tensor],
    calibration: Calibration,
    activation: torch.Tensor | None,
) -> torch.Tensor:
    """k * rms / 448 per block, rounded to BF16 and doubled as needed, float32 [Rb, Cb]."""
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
    scales = divide(calibration.rms_factor * mean.sqrt(), MAX) * unit
    scales = scales.clamp(min=SMALLEST_SCALE).bfloat16().float()
    if calibration.rms_saturate:
        return scales
    scales = scales.double()  # up to 2^245 below amax, which float32 does not hold
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
