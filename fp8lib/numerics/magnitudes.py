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
from fp8lib.numerics.tables import table

_BF16_EXPONENT = 0x7F80
_OCTAVES_BELOW = 20
_COUNTED = 30 * 128
BINS = 1 + _COUNTED
TOP = 2.0**10
"""What is counted exactly is below this, in units of the scale's leading power of two."""
ALIGNED = 2.0 ** (_OCTAVES_BELOW - 126), 2.0 ** (_OCTAVES_BELOW - 126 + 224)
"""Between these scales the bins begin _OCTAVES_BELOW octaves below them, elsewhere where BF16 does."""
SHARE = 16
"""Bins whose sums are taken together: an eighth of an octave."""
_CPU_SUMMED = 16
"""Blocks whose terms are made at a time on a CPU: what stays in a core's cache."""
_LOUD = 5
_LOUD_BINS = (10 - _LOUD) * 128
"""Bins of 2^_LOUD scales and more: the largest errors are there, unless a block has none such."""
_CPU_GROUP = 2**15 // BINS
"""Blocks that are counted at a time on a CPU: as many as a 16-bit index tells apart."""


def histogram(magnitudes: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How often each magnitude is in each block.

    Args:
        magnitudes: `blocked_magnitudes` of weights, int16 [Rb, Cb, 128, 128]; may be overwritten.
        scales: [Rb, Cb], BF16 or F32.

    Returns:
        (float64 [Rb * Cb, BINS], int32 [Rb * Cb, 1]: the BF16 bits that bin 1 stands for; bin b stands for
        b - 1 more).
    """
    count, device = scales.numel(), magnitudes.device
    on_cpu = device.type == "cpu"
    exponent = (scales.float().view(torch.int32) >> 16) & _BF16_EXPONENT
    first = (exponent - (_OCTAVES_BELOW << 7)).clamp_(SHARE, 0x7F80 - _COUNTED)
    base = (first - 1).to(torch.int16 if on_cpu else torch.int32).view(*scales.shape, 1, 1)
    index = magnitudes if on_cpu else torch.empty_like(magnitudes, dtype=base.dtype)
    torch.maximum(magnitudes, base, out=index)
    group = _CPU_GROUP if on_cpu else count
    offsets = torch.arange(count, dtype=base.dtype, device=device).remainder_(group).mul_(BINS).view_as(base)
    torch.minimum(index, base + (BINS - 1), out=index).add_(offsets - base)
    if on_cpu:
        parts = index.view(-1).split(group * BLOCK * BLOCK)
        found = [torch.bincount(part, minlength=len(part) // BLOCK // BLOCK * BINS) for part in parts]
        counts = torch.cat(found, out=torch.empty(count * BINS, dtype=torch.float64))
    else:  # `bincount` waits for the device
        counts = torch.zeros(count * BINS, dtype=torch.int64, device=device)
        ones = torch.ones((), dtype=torch.int64, device=device).expand(index.numel())
        counts = counts.scatter_add_(0, index.view(-1).long(), ones).double()
    return counts.view(count, BINS), first.view(-1, 1)


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


ENERGY, LOST, RESTORED, ABSOLUTE, ZEROED, COUNT = range(6)
"""The order of `terms`."""
UNITS = (2, 2, 2, 1, 0, 0)
"""By which power of the scale each of them grows, where weights and scale grow together."""


def terms(values: torch.Tensor, restored: torch.Tensor) -> list[torch.Tensor]:
    """What is summed for every weight: v^2, (v - r)^2, r^2, |v - r|, whether r is 0, and 1; float64."""
    v, r = values.double(), restored.double()
    d = (v - r).abs_()
    return [v * v, d * d, r * r, d, (r == 0).double(), torch.ones_like(v)]


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


def sums_under_powers(counts: torch.Tensor) -> torch.Tensor:
    """Sums of `terms` over the weights of blocks under scales that are powers of two.

    Args:
        counts: float64 [n, BINS].

    Returns:
        float64 [n, m, 6], of each m-th of the bins but the first; their UNITS are powers of the scales, which
        must be ALIGNED.
    """
    shares = counts[:, 1:].view(len(counts), -1, SHARE)
    return torch.bmm(shares.transpose(0, 1), _unit(counts.device)).transpose(0, 1)


def largest_under_powers(counts: torch.Tensor, powers: torch.Tensor) -> torch.Tensor:
    """Largest |v - r| under power-of-two scales, float32 [n, 1], of each block or at least of all of them.

    Args:
        counts: float64 [n, BINS].
        powers: float32 [n, 1], ALIGNED.
    """
    errors = _unit_errors(counts.device)
    if counts.device.type == "cpu":
        # A weight below 2^_LOUD scales is off by a 32nd of that at most: hardly ever by the most.
        largest = _largest(counts[:, -_LOUD_BINS:], errors[:, -_LOUD_BINS:]) * powers
        if largest.amax() >= 2.0 ** (_LOUD - 5) * powers.amax():
            return largest
    return _largest(counts[:, 1:], errors) * powers


def sums(
    counts: torch.Tensor, values: torch.Tensor, restored: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same two for any scales, from the magnitudes and what became of them: float32 [n, BINS - 1]."""
    if counts.device.type == "cpu" and len(counts) > _CPU_SUMMED:
        split = (part.split(_CPU_SUMMED) for part in (counts, values, restored))
        found, largest = zip(*map(sums, *split), strict=True)
        return torch.cat(found), torch.cat(largest)
    times = counts[:, 1:]
    found = [(times * term).view(len(counts), -1, SHARE).sum(dim=2) for term in terms(values, restored)]
    return torch.stack(found, dim=-1), _largest(times, (values - restored).abs_())


def _largest(counts: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Largest value of the bins that are not empty, [n, 1]; as many values as counts."""
    return torch.where(counts > 0, values, 0.0).amax(dim=1, keepdim=True)


def smaller_half(counts: torch.Tensor) -> torch.Tensor:
    """Which shares of the bins hold the smaller half of a block's weights, the median's included.

    Args:
        counts: float64 [n, m], of weights that are not zero.

    Returns:
        bool [n, m].
    """
    up_to = counts.cumsum(dim=1)
    return (up_to - counts) * 2 < up_to[:, -1:]
