"""`mse` among powers of two: for every block the one with the least (activation-weighted) squared error.

Twice the scale rounds a normal weight to the same value and a subnormal one to the same or a coarser one, and
it saves weights from being clipped. So of the scales under which nothing is clipped the smallest is the best,
and of all those from amax/896 up only two can be: that one, u, and u/2, if it takes amax to no more than 896.
Between these two the weights decide that u/2 clips and those that are subnormal under u.

In units of u/2, with r the value a weight x is rounded to under u/2 and R under u, the loss differs by

    (r - x)^2 - (R - x)^2 = (r - R) * (r + R - 2x)      > 0 for the clipped: 464 < x <= 896, r = 448
                                                        < 0 for the subnormal: x < 2^-5, never below -2^-18

One clipped BF16 weight costs 128 at least and all subnormal weights of a block gain 1/16 at most: only
activation statistics can make clipping pay, or F16 and F32 weights that lie within 2^-10 of 464. The largest
weight of each column bounds the cost of clipping from below, and so nearly every block is decided by these
alone. For the others the sums are taken. Products and sums per column are exact in float64 (multiples of
2^-9 below 2^25 for the clipped, of 2^-41 below 2^-11 for the subnormal); the sums over a block's columns are
taken in a fixed order.
"""

import torch

from fp8lib.numerics.blocks import BLOCK
from fp8lib.numerics.e4m3 import DTYPE, MAX, MAX_ROUNDS_TO_MAX, SMALLEST_SCALE
from fp8lib.numerics.exact import blocked_copy, covering_power, pairwise_sum

_MOST_GAINED = 2.0**-18
"""By which u/2 is better for one weight at most: the square of half a subnormal step of u, 2^-9 * u."""
_BATCH = 16
"""Blocks whose sums are taken at a time: 2 MB in float64."""


def mse_powers(
    weights: torch.Tensor,
    largest: torch.Tensor,
    amax: torch.Tensor,
    importance: torch.Tensor | None,
) -> torch.Tensor:
    """Least-squares power of two per block. See the module's docstring.

    Args:
        weights: [Rb * 128, Cb * 128], BF16, F16 or F32.
        largest: float32 [Rb, Cb * 128], largest |w| of each column of a block.
        amax: float32 [Rb, Cb], largest |w| of each block.
        importance: float64 [Cb, 128], weight of each input channel; None for 1.

    Returns:
        float32 [Rb, Cb]; the larger of two that are equally good.
    """
    scales = covering_power(amax, MAX_ROUNDS_TO_MAX)
    if importance is None and weights.dtype == torch.bfloat16:
        return scales  # clipping one weight costs more than all the others can gain
    half = scales / 2
    if importance is None:
        cost = _difference(amax.unsqueeze(-1), half).sum(dim=-1)
        most_gained = _MOST_GAINED * BLOCK * BLOCK
    else:
        clipped = _difference(largest.view(*amax.shape, BLOCK), half).clamp_(min=0)
        cost = (clipped * importance).sum(dim=-1)
        most_gained = _MOST_GAINED * BLOCK * importance.sum(dim=-1)
    # Twice: sums of floats are rounded, in an order of the device's choice.
    doubtful = (amax <= MAX * scales) & (half >= SMALLEST_SCALE) & ~(cost > 2 * most_gained)
    if doubtful.any():
        blocks = blocked_copy(weights)[doubtful]
        if importance is not None:
            importance = importance.expand(*amax.shape, -1)[doubtful]
        scales[doubtful] = torch.where(
            _smaller_is_better(blocks, half[doubtful], importance), half[doubtful], scales[doubtful]
        )
    return scales


def _difference(magnitude: torch.Tensor, half: torch.Tensor) -> torch.Tensor:
    """By how much the squared error is larger under `half` than under its double, in units of half^2.

    Args:
        magnitude: float32 [..., n], >= 0.
        half: float32 [...], powers of two.

    Returns:
        float64 [..., n].
    """
    x = magnitude / half.unsqueeze(-1)
    small = x.clamp(max=MAX).to(DTYPE).double()
    large = (x / 2).clamp(max=MAX).to(DTYPE).double() * 2
    return (small - large) * (small + large - 2 * x.double())


def _smaller_is_better(
    blocks: torch.Tensor, half: torch.Tensor, importance: torch.Tensor | None
) -> torch.Tensor:
    """Whether a block's squared error is less under `half` than under its double: bool [F].

    Args:
        blocks: [F, 128 * 128] weights.
        half: float32 [F], powers of two.
        importance: float64 [F, 128], weight of each channel; None for 1.
    """
    better = torch.empty(len(blocks), dtype=torch.bool, device=blocks.device)
    for first in range(0, len(blocks), _BATCH):
        batch = slice(first, first + _BATCH)
        difference = _difference(blocks[batch].float().abs(), half[batch]).view(-1, BLOCK, BLOCK)
        gain, cost = ((sign * difference).clamp(min=0).sum(dim=1) for sign in (-1, 1))  # exact in any order
        if importance is not None:
            gain, cost = gain * importance[batch], cost * importance[batch]
        better[batch] = pairwise_sum(gain, dim=1) > pairwise_sum(cost, dim=1)
    return better
