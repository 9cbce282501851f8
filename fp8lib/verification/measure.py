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
    return measure_all([(weights, codes, scales)])[0]


def measure_all(pieces: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> list[Errors]:
    """What `measure` says of each of several pieces.

    Each is summed by itself, because a sum of floats depends on what is summed together. But the host waits
    for the device only twice, however many pieces there are.
    """
    values = [_difference(*piece) for piece in pieces]
    largest = torch.stack([torch.stack([_largest(t) for t in (v[2], v[0])]) for v in values]).double()
    found = []
    for of_piece, (_, amax) in zip(values, largest.tolist(), strict=True):
        wide = not _FLOAT32_SQUARES[0] < amax < _FLOAT32_SQUARES[1]
        original, restored, difference = (t.double() if wide else t for t in of_piece)
        sums = [t.mul(t).sum().double() for t in (original, restored, difference)]
        found.append(torch.stack([*sums, difference.abs_().sum().double()]))
    sums = torch.cat([torch.stack(found), largest], dim=1).tolist()
    return [
        Errors(weights.numel(), *of_piece) for (weights, _, _), of_piece in zip(pieces, sums, strict=True)
    ]


def _difference(
    weights: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(w, w', w' - w) of a piece, float32."""
    original, restored = weights.float(), dequantize(codes, scales)
    return original, restored, restored - original


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
