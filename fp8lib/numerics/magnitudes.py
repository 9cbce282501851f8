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
_CPU_GROUP = 2**15 // BINS
"""Blocks that are counted at a time on a CPU: as many as a 16-bit index tells apart."""


def histogram(weights: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How often each magnitude is in each block.

    Args:
        weights: [Rb * 128, Cb * 128]; F16 and F32 count as their nearest BF16.
        scales: [Rb, Cb], BF16 or F32.

    Returns:
        (int64 [Rb * Cb, BINS], int32 [Rb * Cb, 1]: the BF16 bits that bin 1 stands for; bin b stands for
        b - 1 more).
    """
    (row_blocks, column_blocks), count, device = scales.shape, scales.numel(), weights.device
    power = magnitude_bits(leading_power(scales.float())).to(torch.int32)
    first = (power - (_OCTAVES_BELOW << 7)).clamp_(1, 0x7F80 - _COUNTED).view(-1, 1)
    on_cpu = device.type == "cpu"
    group = min(_CPU_GROUP if on_cpu else count, count)
    base = (first.view(-1, 1, 1) - 1).to(torch.int16 if on_cpu else torch.int32)
    offsets = (torch.arange(count, dtype=base.dtype, device=device) % group * BINS).view(-1, 1, 1)
    index = torch.empty(row_blocks, column_blocks, BLOCK, BLOCK, dtype=base.dtype, device=device)
    split = magnitude_bits(weights).view(row_blocks, BLOCK, column_blocks, BLOCK).transpose(1, 2)
    torch.maximum(split, base.view(row_blocks, column_blocks, 1, 1), out=index)
    index = index.view(count, BLOCK, BLOCK).sub_(base).clamp_(max=BINS - 1).add_(offsets)
    if not on_cpu:  # `bincount` waits for the device
        counts = torch.zeros(count * BINS, dtype=torch.int64, device=device)
        ones = torch.ones((), dtype=torch.int64, device=device).expand(index.numel())
        return counts.scatter_add_(0, index.view(-1).long(), ones).view(count, BINS), first
    parts = index.view(-1).split(group * BLOCK * BLOCK)
    counts = [torch.bincount(part, minlength=len(part) // BLOCK // BLOCK * BINS) for part in parts]
    return torch.cat(counts).view(count, BINS), first


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
    """|v - r| of the bins of a block whose scale is 1, float32 [1, BINS - 1]."""
    return _unit(torch.device("cpu"))[..., ABSOLUTE].reshape(1, -1).float()


def sums_under_powers(counts: torch.Tensor, powers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of `terms` over the weights of blocks under power-of-two scales.

    Args:
        counts: int64 [n, BINS].
        powers: float32 [n, 1].

    Returns:
        (float64 [n, m, 6]: of each m-th of the bins but the first; float64 [n]: largest |v - r|).
    """
    unit = _unit(counts.device)
    shares = counts[:, 1:].double().view(len(counts), -1, SHARE)
    found = torch.bmm(shares.transpose(0, 1), unit).transpose(0, 1)
    s = powers.double().unsqueeze(-1)
    one = torch.ones_like(s)
    units = torch.cat([s * s, s * s, s, s * s, one, one], dim=-1)
    max_abs = _largest(counts, _unit_errors(counts.device))
    return found * units, max_abs.double() * powers.double().view(-1)


def sums(
    counts: torch.Tensor, values: torch.Tensor, restored: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for any scales, from the magnitudes and what became of them: float32 [n, BINS - 1]."""
    times = counts[:, 1:].double()
    found = [(times * term).view(len(counts), -1, SHARE).sum(dim=2) for term in terms(values, restored)]
    return torch.stack(found, dim=-1), _largest(counts, (values - restored).abs_()).double()


def _largest(counts: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Largest value of the bins that are not empty, [n]."""
    return torch.where(counts[:, 1:] > 0, values, 0.0).amax(dim=1)


def smaller_half(counts: torch.Tensor) -> torch.Tensor:
    """Which shares of the bins hold the smaller half of a block's weights, the median's included.

    Args:
        counts: [n, m], of weights that are not zero.

    Returns:
        bool [n, m].
    """
    up_to = counts.cumsum(dim=1)
    return (up_to - counts) * 2 < up_to[:, -1:]
