"""Measures output errors of pieces of a matrix, and adds them up: `output_error.py` has the formulas."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fp8lib.numerics.e4m3 import dequantize, quantize
from fp8lib.numerics.second_order import Factor, output_error, round_rows
from fp8lib.verification.output_error import OutputError

PIECE = 2 * 1024 * 1024
"""Weights that are summed at a time; the same everywhere, because sums of floats depend on it."""
AT_A_TIME = {"cpu": 0, "cuda": 15 * PIECE}
"""Weights of pieces that are rounded again together; 0 for each by itself. A column takes a dozen calls,
however few the rows: on CUDA 2 M weights would take as long as 30 M, whose temporaries are 2 GB. 15, and not
16, as in `shard_check.AT_A_TIME`."""


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
    pieces: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], factor: Factor
) -> list[OutputSums]:
    """Sums of each of several pieces whose weights have the same input.

    Args:
        pieces: arguments of `measure.measure`; a multiple of 128 rows in each but the last.
        factor: of the input's second moments.
    """
    heights = [len(weights) for weights, _, _ in pieces]
    weights, codes, scales = (_below(t) for t in zip(*pieces, strict=True))
    original = weights.double()
    plain = dequantize(quantize(weights, scales, saturate=True), scales)
    differences = (original, original - dequantize(codes, scales), original - plain)
    by_row = [output_error(each, factor) for each in differences]
    again = round_rows(weights, scales, factor)
    by_row.append((again.view(torch.uint8) != codes.view(torch.uint8)).sum(dim=1).double())
    sums = torch.stack([torch.stack([rows.sum() for rows in each.split(heights)]) for each in by_row], dim=1)
    return [
        OutputSums(w.numel(), signal, found, nearest, int(different))
        for (w, _, _), (signal, found, nearest, different) in zip(pieces, sums.tolist(), strict=True)
    ]


def _below(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    if len(parts) == 1:
        return parts[0]
    return torch.cat([part.view(torch.uint8) for part in parts]).view(parts[0].dtype)


def combine_outputs(pieces: Sequence[OutputSums]) -> OutputError:
    """A matrix's output error from its pieces, in the order of its rows."""
    signal, found, nearest = (
        math.fsum(getattr(p, field) for p in pieces) for field in ("signal", "found", "nearest")
    )
    count, different = sum(p.count for p in pieces), sum(p.different for p in pieces)
    unit = signal or 1.0  # a matrix of zeros
    return OutputError(found / unit, nearest / unit, 1 - different / count)
