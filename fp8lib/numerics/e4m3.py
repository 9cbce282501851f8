"""The number format: E4M3 weights with one BF16 scale per 128x128 block.

E4M3 ("float8_e4m3fn") has 1 sign, 4 exponent and 3 mantissa bits, no infinity, and one NaN per sign:

    normal     +-(1 + f/8) * 2^e   f = 0..7, e = -6..8      so the largest is 1.75 * 2^8 = 448
    subnormal  +-f * 2^-9          f = 0..7                 so the smallest step is 2^-9

Eight values per octave: rounding to nearest is off by at most 1/16 of the value, everywhere from
2^-6 to 448, a span of 15 octaves. That is why a block scale only has to bring the block's largest
weight to 448 or below; making the scale twice as large moves every code to the next exponent and
rounds nothing differently, until weights fall among the subnormals.

A checkpoint stores `weight` (E4M3) and `weight_scale_inv` (BF16). In spite of its name the latter is
the multiplier: W ~ weight * weight_scale_inv. Scales are rounded to BF16 before the weights are
divided by them; dividing by a more precise scale than the one that is stored adds an error for nothing.

Values in (448, 464] round to 448 (round to nearest, ties to even: 480 does not exist); above 464 the
cast gives NaN or 448, as device and version of torch have it, so a caller whose scales let weights go further
must ask for saturation.
"""

import torch

from fp8lib.numerics.blocks import BLOCK

MAX = 448.0
MAX_ROUNDS_TO_MAX = 464.0
"""Largest magnitude that an unsaturated cast still takes to 448 (halfway to the missing 480)."""
SMALLEST_SCALE = 2.0**-126
"""Scales below BF16's smallest normal number are raised to it: engines may flush subnormals to zero."""

_SIGN, _MAGNITUDE = -0x8000, 0x3F80
"""Where a code's bits lie in a float16 in `decode`, as int16."""

DTYPE = torch.float8_e4m3fn
SCALE_DTYPE = torch.bfloat16


def expand_columns(per_block: torch.Tensor, columns: int) -> torch.Tensor:
    """One value per column instead of one per column block: [Rb, Cb] -> float32 [Rb, 1, columns].

    An expanded row multiplies a [Rb, 128, columns] view at full memory speed; a 4-D broadcast of the
    scales does not.
    """
    expanded = per_block.float().repeat_interleave(BLOCK, dim=1).unsqueeze(1)
    return expanded if columns % BLOCK == 0 else expanded[..., :columns]


def apply_per_block(values: torch.Tensor, per_block: torch.Tensor, op) -> torch.Tensor:
    """`op(values, scale of the block it lies in)` in place, float32 [rows, columns]; edge blocks included."""
    rows, columns = values.shape
    factors = expand_columns(per_block, columns)
    whole = rows // BLOCK * BLOCK
    op(values[:whole].view(-1, BLOCK, columns), factors[: whole // BLOCK])
    if whole < rows:
        op(values[whole:], factors[-1])
    return values


def quantize(weights: torch.Tensor, scales: torch.Tensor, *, saturate: bool) -> torch.Tensor:
    """Round weights / scale to E4M3.

    Args:
        weights: [rows, columns], BF16, F16 or F32, finite.
        scales: [ceil(rows/128), ceil(columns/128)], BF16, positive.
        saturate: clamp to +-448 first. Without it a quotient above 464 may become NaN.

    Returns:
        float8_e4m3fn [rows, columns]. The division is done in float32 and rounded once more by the
        cast, so CPU and CUDA give the same bytes.
    """
    quotient = weights.to(torch.float32, copy=True)
    apply_per_block(quotient, scales, torch.Tensor.div_)
    if saturate:
        quotient.clamp_(-MAX, MAX)
    return quotient.to(DTYPE)


def dequantize(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """What an engine computes with: codes * scale, float32 [rows, columns].

    Args:
        codes: float8_e4m3fn [rows, columns].
        scales: [ceil(rows/128), ceil(columns/128)], BF16 or F32.
    """
    return apply_per_block(decode(codes), scales, torch.Tensor.mul_)


def decode(codes: torch.Tensor) -> torch.Tensor:
    """The values of E4M3 codes: `codes.float()`, which on a CPU takes 2.7 ns a code, in 0.4.

    A float16 has one exponent bit more and seven mantissa bits more. So a code's bits, moved to where a
    float16 has its own, are the float16 2^-8 times as large, subnormals included: biases are 15 and 7.

    Args:
        codes: float8_e4m3fn of any shape.

    Returns:
        float32 of the same shape, exact; NaN for the two codes that are NaN.
    """
    if codes.device.type != "cpu":
        return codes.float()
    bits = codes.view(torch.int8).to(torch.int16)  # the sign in every bit from 7 on
    bits.bitwise_left_shift_(7).bitwise_and_(_SIGN | _MAGNITUDE)
    values = bits.view(torch.float16).float().mul_(256)
    if bits.numel() and int((bits & _MAGNITUDE).max()) == _MAGNITUDE:  # NaN, 480 by these bits
        values[values.abs() > MAX] = torch.nan
    return values
