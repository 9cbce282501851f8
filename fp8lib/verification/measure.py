"""How far dequantized weights are from their original: error sums of pieces, and what they add up to.

cosine    <w, w'> / (|w| |w'|), computed as (|w|^2 + |w'|^2 - |w - w'|^2) / (2 |w| |w'|), which keeps
          the digits of 1 - cosine that a plain dot product in float32 loses
relative  |w - w'| / |w|
mean_abs  mean of |w - w'|
max_abs   largest |w - w'|

All of it twice: for the weights as they are in the file, and as an engine computes with them that requantizes
them (`numerics/served.py`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fp8lib.numerics.e4m3 import dequantize
from fp8lib.numerics.served import is_served_as_written, requantize
from fp8lib.verification.health import Measurement, max_or_nan

# Squares of values outside leave float32; such pieces are measured in float64.
_FLOAT32_SQUARES = (1e-15, 1e15)


@dataclass(frozen=True, slots=True)
class Sums:
    """How far restored weights w' are from w.

    Attributes:
        restored, difference: sums of squares of w' and w - w'.
        absolute: sum of |w - w'|.
        max_abs: largest |w - w'|.
    """

    restored: float
    difference: float
    absolute: float
    max_abs: float


@dataclass(frozen=True, slots=True)
class Errors:
    """Sums over a piece of a matrix; pieces add up to the matrix.

    Attributes:
        count: weights.
        original: sum of squares of w.
        amax: largest |w|.
        written: of the weights in the file.
        served: of the weights that an engine computes with.
        requantized: weights that are not the same in both.
    """

    count: int
    original: float
    amax: float
    written: Sums
    served: Sums
    requantized: int


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
    originals = [weights.float() for weights, _, _ in pieces]
    known = [
        torch.stack([_largest(original), is_served_as_written(codes, scales).float()])
        for original, (_, codes, scales) in zip(originals, pieces, strict=True)
    ]
    known = torch.stack(known).tolist()
    sums = [_all_sums(*each) for each in zip(originals, pieces, known, strict=True)]
    sums = torch.stack(sums).tolist()
    return [
        Errors(original.numel(), square_sum, amax, Sums(*rest[:4]), Sums(*rest[4:8]), int(rest[8]))
        for original, (amax, _), (square_sum, *rest) in zip(originals, known, sums, strict=True)
    ]


def _all_sums(
    original: torch.Tensor, piece: tuple[torch.Tensor, torch.Tensor, torch.Tensor], known: tuple[float, float]
) -> torch.Tensor:
    """Sum of squares of w, `Sums` as written and as served, weights that are not the same: float64 [10]."""
    _, codes, scales = piece
    amax, same = known
    wide = not _FLOAT32_SQUARES[0] < amax < _FLOAT32_SQUARES[1]
    written = dequantize(codes, scales)
    square_sum, in_file = _square_sum(original, wide), _sums(original, written, wide)
    if same:
        return torch.stack([square_sum, *in_file, *in_file, torch.zeros_like(square_sum)])
    served = dequantize(*requantize(codes, scales))
    return torch.stack(
        [square_sum, *in_file, *_sums(original, served, wide), (served != written).sum().double()]
    )


def _sums(original: torch.Tensor, restored: torch.Tensor, wide: bool) -> list[torch.Tensor]:
    """The fields of `Sums`, float64; squares are taken in float64, too, if `wide`."""
    difference = restored - original
    max_abs = _largest(difference).double()
    squares = [_square_sum(t, wide) for t in (restored, difference)]
    absolute = (difference.double() if wide else difference).abs_().sum().double()
    return [*squares, absolute, max_abs]


def _square_sum(values: torch.Tensor, wide: bool) -> torch.Tensor:
    values = values.double() if wide else values
    return values.mul(values).sum().double()


def _largest(values: torch.Tensor) -> torch.Tensor:
    """Largest magnitude, NaN if there is one."""
    least, most = values.aminmax()
    return torch.maximum(-least, most)


def combine(name: str, pieces: Sequence[Errors]) -> Measurement:
    """The measurement of a matrix from its pieces, in the order of its rows."""
    count, original = sum(p.count for p in pieces), math.fsum(p.original for p in pieces)
    return Measurement(
        name,
        amax=max_or_nan(p.amax for p in pieces),
        requantized=sum(p.requantized for p in pieces),
        **_metrics(count, original, [p.written for p in pieces], ""),
        **_metrics(count, original, [p.served for p in pieces], "served_"),
    )


def _metrics(count: int, original: float, pieces: Sequence[Sums], prefix: str) -> dict[str, float]:
    """The metrics of the module's docstring, by the names that `Measurement` has for them."""
    restored, difference, absolute = (
        math.fsum(getattr(p, field) for p in pieces) for field in ("restored", "difference", "absolute")
    )
    if difference == 0:
        cosine, relative = 1.0, 0.0
    elif original == 0 or restored == 0:
        cosine, relative = 0.0, math.sqrt(difference / original) if original else math.inf
    else:
        cosine = (original + restored - difference) / (2 * math.sqrt(original) * math.sqrt(restored))
        relative = math.sqrt(difference / original)
    return {
        f"{prefix}cosine": cosine,
        f"{prefix}relative": relative,
        f"{prefix}mean_abs": absolute / count,
        f"{prefix}max_abs": max_or_nan(p.max_abs for p in pieces),
    }
