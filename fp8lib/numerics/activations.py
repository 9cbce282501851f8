"""What engines make of the input of an FP8 matrix product: E4M3, one scale per token and 128 channels.

    a = max(largest |x| of the 128 channels, 1e-10)      in float32
    s = a * (1 / 448)                                    or the smallest power of two not below it
    x' = E4M3(clamp(x / s, -448, 448)) * s

This happens while the model runs (`activation_scheme: "dynamic"`). The formula is that of vLLM 0.32.0,
`_per_token_group_quant_fp8` (model_executor/layers/quantization/utils/fp8_utils.py). SGLang 0.5.23 takes
s = a / 448 and x * (1 / s): a value that lies between two codes, to the last bit, may fall to the other one.
"""

import torch

from fp8lib.numerics.blocks import BLOCK
from fp8lib.numerics.e4m3 import DTYPE, MAX, decode
from fp8lib.numerics.exact import covering_power

SMALLEST_AMAX = 1e-10
"""Engines take no group's largest activation for smaller than this."""


def as_quantized(x: torch.Tensor, *, power_of_two: bool = False) -> torch.Tensor:
    """Activations as an FP8 kernel multiplies them.

    Args:
        x: [..., channels], any float dtype; groups begin at channel 0, the last may be smaller.
        power_of_two: scales are powers of two (UE8M0), as DeepGEMM takes them in that mode.

    Returns:
        float32 of the same shape. A group that holds NaN or infinity becomes NaN.
    """
    channels = x.shape[-1]
    y = torch.nn.functional.pad(x.float(), (0, -channels % BLOCK))
    y = y.view(*x.shape[:-1], -1, BLOCK)
    amax = y.abs().amax(-1, keepdim=True)
    scale = amax.clamp(min=SMALLEST_AMAX) * (1 / MAX)
    if power_of_two:
        scale = torch.where(amax.isfinite(), covering_power(scale, 1.0), torch.nan)
    codes = (y / scale).clamp_(-MAX, MAX).to(DTYPE)
    return (decode(codes) * scale).flatten(-2)[..., :channels]
