"""E4M3, BF16 and block scales once more: float64 NumPy, written from the formats' definitions.

Tests compare fp8lib with this. It shares no code with fp8lib and makes no attempt to be fast.
"""

from collections.abc import Iterator

import numpy as np
import torch

BLOCK = 128
SMALLEST_NORMAL = 2.0**-126


def decode(codes: np.ndarray) -> np.ndarray:
    """uint8 E4M3 codes -> float64 values: sign, 4 exponent bits of bias 7, 3 mantissa bits."""
    sign = np.where(codes & 0x80, -1.0, 1.0)
    exponent, fraction = (codes >> 3 & 0xF).astype(int), (codes & 7) / 8.0
    normal = (1 + fraction) * np.exp2(exponent - 7.0)
    values = sign * np.where(exponent == 0, fraction * 2.0**-6, normal)
    return np.where(codes & 0x7F == 0x7F, np.nan, values)  # no infinity, and the top code is NaN


FINITE = decode(np.arange(0x7F, dtype=np.uint8))
"""The 127 finite values from 0 to 448; the index is the code, so even indices have an even mantissa."""
MIDPOINTS = (FINITE[1:] + FINITE[:-1]) / 2


def nearest(quotients: np.ndarray) -> np.ndarray:
    """E4M3 by looking it up: nearest of the enumerated values, ties to the even code, saturating."""
    magnitude = np.abs(quotients)
    down = np.searchsorted(MIDPOINTS, magnitude, side="left")  # a tie stays below the midpoint
    up = np.searchsorted(MIDPOINTS, magnitude, side="right")  # a tie goes above it
    return np.copysign(FINITE[np.where(down % 2 == 0, down, up)], quotients)


def rounded(quotients: np.ndarray) -> np.ndarray:
    """`nearest` by arithmetic, three times as fast; `test_e4m3.py` shows that they agree."""
    magnitude = np.abs(quotients)
    octave = np.maximum(np.frexp(magnitude)[1] - 1, -6)
    step = np.exp2(octave - 3.0)
    return np.copysign(np.minimum(np.rint(magnitude / step) * step, 448.0), quotients)


def to_bf16(values: np.ndarray) -> np.ndarray:
    """Nearest BF16 number (8 significant bits, ties to even), float64; for normal numbers."""
    mantissa, exponent = np.frexp(values)
    return np.ldexp(np.rint(mantissa * 256), exponent - 8)


def bf16_scales(low: float, high: float) -> np.ndarray:
    """Every positive normal BF16 number in [low, high], ascending, float64."""
    bits = np.arange(0x0080, 0x7F80, dtype=np.uint32)
    scales = (bits << 16).view(np.float32).astype(np.float64)
    return scales[(scales >= low) & (scales <= high)]


def numpy64(tensor: torch.Tensor) -> np.ndarray:
    """A tensor's values in float64, E4M3 decoded by `decode`."""
    if tensor.dtype == torch.float8_e4m3fn:
        return decode(tensor.cpu().view(torch.uint8).numpy())
    return tensor.cpu().double().numpy()


def tiles(matrix: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
    """(block row, block column, the block's real elements)."""
    rows, columns = matrix.shape
    for i in range(-(-rows // BLOCK)):
        for j in range(-(-columns // BLOCK)):
            yield i, j, matrix[i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK]


def per_element(scales: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """[Rb, Cb] -> the scale of each element of a matrix of that shape."""
    i, j = np.indices(shape, sparse=True)
    return scales[i // BLOCK, j // BLOCK]


def quotients(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """values / scales as engines and quantizers divide: in float32. Returned in float64."""
    with np.errstate(over="ignore"):
        return (values.astype(np.float32) / scales.astype(np.float32)).astype(np.float64)


def losses(block: np.ndarray, importance: np.ndarray | None, scales: np.ndarray) -> np.ndarray:
    """sum_j a_j sum_i (w'_ij - w_ij)^2 of a block under each of the scales, float64.

    Equal magnitudes have equal errors: each is rounded once and counts with the sum of its a_j.
    """
    a = np.ones(block.shape[1]) if importance is None else importance
    magnitude, which = np.unique(np.abs(block), return_inverse=True)
    weight = np.bincount(which.ravel(), np.broadcast_to(a, block.shape).ravel())
    error = rounded(quotients(magnitude, scales[:, None])) * scales[:, None] - magnitude
    return np.square(error) @ weight


def least_loss(block: np.ndarray, importance: np.ndarray | None = None) -> float:
    """Brute force: the least loss of all BF16 scales from half to four times amax/448."""
    amax = np.abs(block).max()
    return losses(block, importance, bf16_scales(amax / 896, amax / 112)).min()
