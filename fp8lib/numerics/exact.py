"""Pieces that several modes share. Each gives the same bits on every device and for every piece size.

A sum of floats depends on the order of its terms, and a division by a Python number becomes a product with
the reciprocal on CUDA. What decides a scale must not depend on either.
"""

import torch

from fp8lib.numerics.blocks import BLOCK

_BF16_MAGNITUDE = 0x7FFF


def divide(values: torch.Tensor, divisor: float) -> torch.Tensor:
    """True division. By a Python number, CUDA multiplies with the reciprocal and rounds differently."""
    return values / torch.full((), divisor, device=values.device)


def magnitude_bits(weights: torch.Tensor) -> torch.Tensor:
    """|w| as BF16 bit patterns, int16 in the order of magnitude; F16 and F32 at their nearest BF16."""
    return weights.bfloat16().view(torch.int16) & _BF16_MAGNITUDE


def blocked_magnitudes(weights: torch.Tensor) -> torch.Tensor:
    """`magnitude_bits` of [Rb * 128, Cb * 128], block by block: int16 [Rb, Cb, 128, 128], contiguous."""
    rows, columns = weights.shape
    split = weights.bfloat16().view(torch.int16).view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    found = torch.empty_like(split.transpose(1, 2), memory_format=torch.contiguous_format)
    return torch.bitwise_and(split.transpose(1, 2), _BF16_MAGNITUDE, out=found)


def blocked_copy(values: torch.Tensor) -> torch.Tensor:
    """[rows, columns] -> [Rb, Cb, 128*128], a copy in which each block is contiguous."""
    rows, columns = values.shape
    split = values.view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    return split.transpose(1, 2).reshape(rows // BLOCK, columns // BLOCK, BLOCK * BLOCK)


def power_of_two(exponent: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """2^exponent, exactly, for exponents of normal numbers (`torch.pow` may round on some devices)."""
    if dtype == torch.float32:
        return ((exponent.to(torch.int32) + 127) << 23).view(dtype)
    return ((exponent.to(torch.int64) + 1023) << 52).view(dtype)


def covering_power(values: torch.Tensor, limit: float) -> torch.Tensor:
    """Smallest power of two, of those that are normal numbers, for which limit * power >= value.

    Args:
        values: float32, >= 0; what comes of NaN and infinity is finite and means nothing.
        limit: a positive normal float32.
    """
    exponent, fraction = divmod(torch.tensor(limit).view(torch.int32).item(), 1 << 23)
    bits = values.view(torch.int32) + ((1 << 23) - 1 - fraction)  # carries where the fraction is larger
    biased = (bits >> 23) - (exponent - 127)
    return (biased.clamp_(1, 254) << 23).view(torch.float32)


def leading_power(values: torch.Tensor) -> torch.Tensor:
    """Largest power of two not above each value >= 0; 0 for subnormal numbers, infinity for NaN."""
    if values.dtype == torch.float32:
        return (values.view(torch.int32) & 0x7F800000).view(torch.float32)
    return (values.view(torch.int64) & 0x7FF0000000000000).view(torch.float64)


def pairwise_sum(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Sum over a dimension of 2^n elements by repeated halving, in place.

    A tree of elementwise additions: the same result on every device, thread count and piece size,
    which `Tensor.sum` does not promise.
    """
    while (length := values.shape[dim]) > 1:
        low, high = values.split(length // 2, dim)
        values = low.add_(high)
    return values.squeeze(dim)
