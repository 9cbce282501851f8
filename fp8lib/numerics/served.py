"""What engines make of block-FP8 weights where they requantize them to power-of-two scales (UE8M0).

    w  = code * scale                                   in float32
    sf = 2^ceil(log2(max(largest |w| of a block, 1e-4) / 448))
    w' = E4M3(w * (1 / sf)) * sf

vLLM 0.32.0 does so while it loads, in `requant_weight_ue8m0_inplace`
(model_executor/layers/quantization/utils/fp8_utils.py) by `per_block_cast_to_fp8` (utils/deep_gemm.py).
SGLang 0.5.23 does so in `requant_weight_ue8m0` (srt/layers/quantization/fp8_utils.py), with w rounded to BF16
first. docs/formats.md says on which devices, for which layers.

A power of two survives: w' = w for every weight of a block whose scale is one, unless it is below 2^-22, what
1e-4 / 448 is rounded up to. For sf is no larger than such a scale, and every multiple code * scale that is no
larger than 448 * sf is a code * sf, too.

vLLM takes `torch.log2` of a float32, SGLang rounds its bits up, as is done here. That is the same unless the
quotient is within some 2^-20 of a power of two and not one; code * scale has 12 bits with a BF16 scale, and
no such product is that close to 448 * 2^k.
"""

import torch

from fp8lib.numerics.blocks import BLOCK
from fp8lib.numerics.e4m3 import DTYPE, MAX, apply_per_block, decode, dequantize
from fp8lib.numerics.exact import covering_power, divide

SMALLEST_AMAX = 1e-4
"""Engines take no block's largest weight for smaller than this."""
SURVIVES = 2.0**-22
"""What SMALLEST_AMAX / 448 is rounded up to: powers of two from here on are left as they are."""


def requantize(
    codes: torch.Tensor, scales: torch.Tensor, *, through_bf16: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales that an engine computes with.

    Args:
        codes: float8_e4m3fn [rows, columns].
        scales: [ceil(rows/128), ceil(columns/128)], BF16, F16 or F32.
        through_bf16: as SGLang does it; without, as vLLM does.

    Returns:
        (float8_e4m3fn [rows, columns], float32 [ceil(rows/128), ceil(columns/128)], powers of two).
    """
    powers = _powers(codes, scales, through_bf16)
    weights = dequantize(codes, scales)
    if through_bf16:
        weights = weights.bfloat16().float()
    return apply_per_block(weights, 1 / powers, torch.Tensor.mul_).to(DTYPE), powers


def _powers(codes: torch.Tensor, scales: torch.Tensor, through_bf16: bool) -> torch.Tensor:
    """The engine's scale for each block, float32 [ceil(rows/128), ceil(columns/128)]."""
    # Multiplying and rounding are monotonic: the largest code gives the largest weight.
    amax = decode(_largest_code(codes)) * scales.float()
    if through_bf16:
        amax = amax.bfloat16().float()
    return covering_scale(amax)


def covering_scale(amax: torch.Tensor) -> torch.Tensor:
    """The engine's scale for a block's largest dequantized weight, float32."""
    return covering_power(divide(amax.clamp(min=SMALLEST_AMAX), MAX), 1.0)


def requantized(values: torch.Tensor, powers: torch.Tensor) -> torch.Tensor:
    """Dequantized weights as the engine has them then, float32; `powers` broadcast."""
    return decode((values * (1 / powers)).to(DTYPE)).mul_(powers)


def _largest_code(codes: torch.Tensor) -> torch.Tensor:
    """Largest magnitude of each block, float8_e4m3fn [ceil(rows/128), ceil(columns/128)]."""
    rows, columns = codes.shape
    magnitude = codes.view(torch.uint8) & 0x7F
    if rows % BLOCK or columns % BLOCK:
        magnitude = torch.nn.functional.pad(magnitude, (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocked = magnitude.view(-(-rows // BLOCK), BLOCK, -1)
    per_column = blocked.amax(dim=1)
    return per_column.view(len(per_column), -1, BLOCK).amax(dim=2).view(DTYPE)
