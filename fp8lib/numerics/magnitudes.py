"""Counts of equal weights: a block of 16,384 BF16 weights holds some 2,000 different magnitudes.

What rounding does to a weight depends on its magnitude and its block's scale alone. So what a block loses are
sums over a histogram, with a quarter as many terms as there are weights and in float64; and with power-of-two
scales, where all blocks have the same magnitudes in units of their scale, one matrix product.

The bins are the BF16 magnitudes of 30 octaves around the scale, s * 2^-20 to s * 2^10: 448 is in the last but
one, and below 2^-10 everything becomes zero. The first bin takes zero and what is below, the last what is
above. Of Gaussian weights one in 10^7 is below and not zero.
"""

import torch

from fp8lib.numerics.blocks import BLOCK
from fp8lib.numerics.e4m3 import DTYPE, MAX, decode
from fp8lib.numerics.exact import leading_power, magnitude_bits
from fp8lib.numerics.tables import table

_OCTAVES_BELOW = 20
_COUNTED = 30 * 128
BINS = 1 + _COUNTED
TOP = 2.0**10
"""What is counted exactly is below this, in units of the scale's leading power of two."""
SHARE = 16
"""Bins whose sums are taken together: an eighth of an octave."""
_LOUD = 5
_LOUD_BINS = (10 - _LOUD) * 128
"""Bins of 2^_LOUD scales and more: the largest errors are there, unless a block has none such."""
_CPU_GROUP = 2**15 // BINS
"""Blocks that are counted at a time on a CPU: as many as a 16-bit index tells apart."""


def histogram(magnitudes: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How often each magnitude is in each block.

    Args:
        magnitudes: `magnitude_bits` of weights, int16 [Rb * 128, Cb * 128].
        scales: [Rb, Cb], BF16 or F32.

    Returns:
        (float64 [Rb * Cb, BINS], int32 [Rb * Cb, 1]: the BF16 bits that bin 1 stands for; bin b stands for
        b - 1 more).
    """
    (row_blocks, column_blocks), count, device = scales.shape, scales.numel(), magnitudes.device
    power = magnitude_bits(leading_power(scales.float())).to(torch.int32)
    first = (power - (_OCTAVES_BELOW << 7)).clamp_(1, 0x7F80 - _COUNTED).view(-1, 1)
    on_cpu = device.type == "cpu"
    group = min(_CPU_GROUP if on_cpu else count, count)
    base = (first.view(-1, 1, 1) - 1).to(torch.int16 if on_cpu else torch.int32)
    offsets = (torch.arange(count, dtype=base.dtype, device=device) % group * BINS).view(-1, 1, 1)
    blocked = torch.empty(row_blocks, column_blocks, BLOCK, BLOCK, dtype=base.dtype, device=device)
    split = magnitudes.view(row_blocks, BLOCK, column_blocks, BLOCK).transpose(1, 2)
    torch.maximum(split, base.view(row_blocks, column_blocks, 1, 1), out=blocked)
    index = blocked.view(count, BLOCK, BLOCK)
    torch.minimum(index, base + (BINS - 1), out=index).add_(offsets - base)
    if not on_cpu:  # `bincount` waits for the device
        counts = torch.zeros(count * BINS, dtype=torch.int64, device=device)
        ones = torch.ones((), dtype=torch.int64, device=device).expand(index.numel())
        return counts.scatter_add_(0, index.view(-1).long(), ones).double().view(count, BINS), first
    counts = torch.empty(count, BINS, dtype=torch.float64)
    for part, found in zip(index.split(group), counts.split(group), strict=True):
        found.view(-1).copy_(torch.bincount(part.view(-1), minlength=found.numel()))
    return counts, first


def magnitudes(first: torch.Tensor) -> torch.Tensor:
    """The magnitude of each bin but the first, float32 [n, BINS - 1].

    Args:
        first: int32 [n, 1], as `histogram` gives it.
    """
    bits = first + torch.arange(_COUNTED, dtype=torch.int32, device=first.device)
    return bits.to(torch.int16).view(torch.bfloat16).float()


def rounded(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Magnitudes rounded to nearest under a scale for each row: float32 [n, m], as dequantized.

    Args:
        values: float32 [n, m].
        scales: float32 [n, 1].
    """
    return decode((values / scales).clamp_(max=MAX).to(DTYPE)).mul_(scales)


ENERGY, RESTORED, ABSOLUTE, LOST, ZEROED, COUNT = range(6)
"""The order of `terms`."""


def terms(values: torch.Tensor, restored: torch.Tensor) -> list[torch.Tensor]:
    """What is summed for every weight: v^2, r^2, |v - r|, (v - r)^2, whether r is 0, and 1; float64."""
    v, r = values.double(), restored.double()
    d = (v - r).abs_()
    return [v * v, r * r, d, d * d, (r == 0).double(), torch.ones_like(v)]


@table
def _unit() -> torch.Tensor:
    """`terms` of the bins of a block whose scale is 1, float64 [m, SHARE, 6]."""
    values = magnitudes(torch.tensor([[(127 - _OCTAVES_BELOW) << 7]], dtype=torch.int32))
    found = terms(values, rounded(values, torch.ones(1, 1)))
    return torch.stack(found, dim=-1).view(-1, SHARE, len(found))


@table
def _unit_errors() -> torch.Tensor:
    """|v - r| of the bins of a block whose scale is 1, float32 [1, BINS - 1]: exact."""
    return _unit(torch.device("cpu"))[..., ABSOLUTE].reshape(1, -1).float()


def sums_under_powers(
    counts: torch.Tensor, powers: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sums of `terms` over the weights of blocks under power-of-two scales.

    Args:
        counts: float64 [n, BINS].
        powers: float32 [n, 1].

    Returns:
        (float64 [n, m, 6]: of each m-th of the bins but the first; float64 [n, 1, 6]: the units these are
        in; float64 []: largest |v - r|).
    """
    shares = counts[:, 1:].view(len(counts), -1, SHARE)
    found = torch.bmm(shares.transpose(0, 1), _unit(counts.device)).transpose(0, 1)
    s = powers.double().unsqueeze(-1)
    one = torch.ones_like(s)
    units = torch.cat([s * s, s * s, s, s * s, one, one], dim=-1)
    errors = _unit_errors(counts.device)
    if counts.device.type == "cpu":
        # A weight below 2^_LOUD scales is off by a 32nd of that at most: hardly ever by the most.
        largest = (_largest(counts[:, -_LOUD_BINS:], errors[:, -_LOUD_BINS:]) * s.view(-1)).amax()
        if largest >= 2.0 ** (_LOUD - 5) * s.amax():
            return found, units, largest
    return found, units, (_largest(counts[:, 1:], errors) * s.view(-1)).amax()


def sums(
    counts: torch.Tensor, values: torch.Tensor, restored: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same for any scales, from the magnitudes and what became of them: float32 [n, BINS - 1]."""
    times = counts[:, 1:]
    found = [(times * term).view(len(counts), -1, SHARE).sum(dim=2) for term in terms(values, restored)]
    found = torch.stack(found, dim=-1)
    return found, torch.ones_like(found[:, :1]), _largest(times, (values - restored).abs_()).amax().double()


def _largest(counts: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Largest value of the bins that are not empty, [n]; as many values as counts."""
    return torch.where(counts > 0, values, 0.0).amax(dim=1)


def smaller_half(counts: torch.Tensor) -> torch.Tensor:
    """Which shares of the bins hold the smaller half of a block's weights, the median's included.

    Args:
        counts: float64 [n, m], of weights that are not zero.

    Returns:
        bool [n, m].
    """
    up_to = counts.cumsum(dim=1)
    return (up_to - counts) * 2 < up_to[:, -1:]
