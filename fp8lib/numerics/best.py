"""The least that block scales can lose, and whether codes are the nearest: what a tensor is held against.

The least squared error of a block is that of the scale which `mse` chooses among those of the same format.
Only blocks with another scale, or with a code that is not the nearest, have to be rounded again to know it.
"""

import numpy as np
import torch

from fp8lib.numerics.blocks import BLOCK
from fp8lib.numerics.e4m3 import DTYPE, MAX, MAX_ROUNDS_TO_MAX, SMALLEST_SCALE, decode, quantize
from fp8lib.numerics.modes import Calibration
from fp8lib.numerics.scales import block_scales

_MODES = {True: Calibration("mse", scale_format="ue8m0"), False: Calibration("mse", scale_format="bf16")}


def best_scales(
    weights: torch.Tensor, magnitudes: torch.Tensor, powers_of_two: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Each block's largest weight, and scales with the least squared error: `block_scales` of mode `mse`.

    Args:
        weights: [Rb * 128, Cb * 128], BF16, F16 or F32.
        magnitudes: their `blocked_magnitudes`.
        powers_of_two: the scales' format.

    Returns:
        (float32 [Rb, Cb]; float32 [Rb, Cb], or None where `best_powers` knows them from the first).
    """
    if powers_of_two and weights.dtype == torch.bfloat16:
        return magnitudes.flatten(2).amax(dim=2).view(torch.bfloat16).float(), None
    scales, amax = block_scales(weights, _MODES[powers_of_two])
    return amax, scales.float()


def best_powers(amax: np.ndarray) -> np.ndarray:
    """Powers of two with the least squared error for blocks of BF16 weights, float64.

    Clipping one weight costs more than all the others can gain (`powers.py`), so the largest decides. On the
    host, where the launches of a dozen operations cost more than these.

    Args:
        amax: float32, each block's largest weight.
    """
    fraction, exponent = np.frexp(amax.astype(np.float64) / MAX_ROUNDS_TO_MAX)
    powers = np.ldexp(1.0, exponent - (fraction == 0.5))
    powers = np.where(amax == 0, 1.0, np.maximum(powers, SMALLEST_SCALE))
    return np.where(np.isfinite(amax), powers, np.nan)


def not_nearest(weights: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Which codes are not the nearest under the scales: on a tie the even one, above 448 it.

    Args:
        weights: [rows, columns], BF16, F16 or F32.
        codes: float8_e4m3fn [rows, columns].
        scales: [ceil(rows/128), ceil(columns/128)], BF16 or F32.

    Returns:
        bool [rows, columns]. The sign of a zero counts, too.
    """
    expected = quantize(weights, scales, saturate=True)
    return expected.view(torch.uint8) != codes.view(torch.uint8)


def errors_again(original: torch.Tensor, scales: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Squared error of some blocks when they are rounded to nearest under given scales.

    Args:
        original: [Rb * 128, Cb * 128], float32.
        scales: float32 [n], of those.
        chosen: int64 [n], numbers of blocks, row by row.

    Returns:
        float64 [n].
    """
    column_blocks = original.shape[1] // BLOCK
    split = original.view(-1, BLOCK, column_blocks, BLOCK).transpose(1, 2)
    blocks = split[chosen // column_blocks, chosen % column_blocks]
    scale = scales.view(-1, 1, 1)
    restored = decode((blocks / scale).clamp_(-MAX, MAX).to(DTYPE)).mul_(scale)
    return restored.sub_(blocks).double().square_().sum(dim=(1, 2))
