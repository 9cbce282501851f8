"""The least that block scales can lose, and whether codes are the nearest: what a tensor is held against.

The least squared error of a block is that of the scale which `mse` chooses among those of the same format.
Only blocks with another scale, or with a code that is not the nearest, have to be rounded again to know it.
"""

import torch

from fp8lib.numerics.blocks import BLOCK
from fp8lib.numerics.e4m3 import DTYPE, MAX, decode, quantize
from fp8lib.numerics.modes import Calibration
from fp8lib.numerics.scales import block_scales

_MODES = {True: Calibration("mse", scale_format="ue8m0"), False: Calibration("mse", scale_format="bf16")}


def best_scales(
    weights: torch.Tensor, magnitudes: torch.Tensor, powers_of_two: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales with the least squared error, and each block's largest weight: `block_scales` of mode `mse`.

    `magnitudes` are the weights' `magnitude_bits`.
    """
    return block_scales(weights, _MODES[powers_of_two], magnitudes=magnitudes)


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
        scales: [Rb, Cb].
        chosen: int64 [n], numbers of blocks, row by row.

    Returns:
        float64 [n].
    """
    row_blocks, column_blocks = scales.shape
    split = original.view(row_blocks, BLOCK, column_blocks, BLOCK).transpose(1, 2)
    blocks = split[chosen // column_blocks, chosen % column_blocks]
    scale = scales.float().view(-1)[chosen].view(-1, 1, 1)
    restored = decode((blocks / scale).clamp_(-MAX, MAX).to(DTYPE)).mul_(scale)
    return restored.sub_(blocks).double().square_().sum(dim=(1, 2))
