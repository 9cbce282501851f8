"""Measures output errors of pieces of a matrix, and adds them up: `output_error.py` has the formulas."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fp8lib.numerics.e4m3 import dequantize, quantize
from fp8lib.numerics.second_order import Factor, output_error, round_rows
from fp8lib.verification.output_error import OutputError

PIECE = 2 * 1024 * 1024
"""Weights at a time; the same everywhere, because sums of floats depend on it."""


@dataclass(frozen=True, slots=True)
class OutputSums:
    """Sums over the rows of a piece.

    Attributes:
        count: weights.
        signal: of w H w^T.
        found, nearest: of e H e^T, of what is on the disk and of rounding to nearest.
        different: codes that rounding again does not give.
    """

    count: int
    signal: float
    found: float
    nearest: float
    different: int


def measure_outputs(
    weights: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, factor: Factor
) -> OutputSums:
    """Sums of rows of a matrix that start at a multiple of 128; arguments as `measure.measure`."""
    original = weights.double()
    plain = dequantize(quantize(weights, scales, saturate=True), scales)
    differences = (original, original - dequantize(codes, scales), original - plain)
    sums = [output_error(each, factor).sum() for each in differences]
    again = round_rows(weights, scales, factor)
    different = (again.view(torch.uint8) != codes.view(torch.uint8)).sum()
    signal, found, nearest, different = torch.stack([*sums, different.double()]).tolist()
    return OutputSums(weights.numel(), signal, found, nearest, int(different))


def combine_outputs(pieces: Sequence[OutputSums]) -> OutputError:
    """A matrix's output error from its pieces, in the order of its rows."""
    signal, found, nearest = (
        math.fsum(getattr(p, field) for p in pieces) for field in ("signal", "found", "nearest")
    )
    count, different = sum(p.count for p in pieces), sum(p.different for p in pieces)
    unit = signal or 1.0  # a matrix of zeros
    return OutputError(found / unit, nearest / unit, 1 - different / count)
