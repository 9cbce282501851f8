"""How far dequantized weights are from their original: error sums of pieces, and what they add up to.

cosine    <w, w'> / (|w| |w'|), computed as (|w|^2 + |w'|^2 - |w - w'|^2) / (2 |w| |w'|), which keeps
          the digits of 1 - cosine that a plain dot product in float32 loses
mean_abs  mean of |w - w'|
max_abs   largest |w - w'|
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fp8lib.numerics.e4m3 import dequantize
from fp8lib.verification.health import Measurement, max_or_nan

# Squares of values outside leave float32; such pieces are measured in float64.
_FLOAT32_SQUARES = (1e-15, 1e15)


@dataclass(frozen=True, slots=True)
class Errors:
    """Sums over a piece of a matrix; pieces add up to the matrix.

    Attributes:
        count: weights.
        original, restored, difference: sums of squares of w, w' and w - w'.
        absolute: sum of |w - w'|.
        max_abs: largest |w - w'|.
        amax: largest |w|.
    """

    count: int
    original: float
    restored: float
    difference: float
    absolute: float
    max_abs: float
    amax: float


def measure(weights: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> Errors:
    """Error sums of rows of a matrix that start at a multiple of 128.

    Args:
        weights: [rows, columns] as in the input, BF16, F16 or F32.
        codes: float8_e4m3fn [rows, columns].
        scales: [ceil(rows/128), ceil(columns/128)], BF16 or F32.
    """
    original = weights.float()
    restored = dequantize(codes, scales)
    difference = restored - original
    amax, max_abs = _largest(original), _largest(difference)
    if not _FLOAT32_SQUARES[0] < amax < _FLOAT32_SQUARES[1]:
        original, restored, difference = original.double(), restored.double(), difference.double()
    sums = [t.mul(t).sum().double() for t in (original, restored, difference)]
    values = torch.stack([*sums, difference.abs_().sum().double(), max_abs.double(), amax.double()])
    return Errors(weights.numel(), *values.tolist())


def _largest(values: torch.Tensor) -> torch.Tensor:
    """Largest magnitude, NaN if there is one."""
    least, most = values.aminmax()
    return torch.maximum(-least, most)


def combine(name: str, pieces: Sequence[Errors]) -> Measurement:
    """The measurement of a matrix from its pieces, in the order of its rows."""
    original, restored, difference, absolute = (
        math.fsum(getattr(p, field) for p in pieces)
        for field in ("original", "restored", "difference", "absolute")
    )
    if difference == 0:
        cosine = 1.0
    elif original == 0 or restored == 0:
        cosine = 0.0
    else:
        cosine = (original + restored - difference) / (2 * math.sqrt(original) * math.sqrt(restored))
    worst = [max_or_nan(getattr(p, field) for p in pieces) for field in ("max_abs", "amax")]
    return Measurement(name, cosine, absolute / sum(p.count for p in pieces), *worst)
