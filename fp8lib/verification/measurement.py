"""What one FP8 weight lost: the record that is measured, judged, kept in the manifest and reported."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from fp8lib.verification.output_error import OutputError


@dataclass(frozen=True, slots=True)
class Measurement:
    """What one FP8 tensor lost; `measure.py` has the formulas.

    Attributes:
        name: full name of the weight.
        weights: how many there are.
        cosine: similarity of original and dequantized weights.
        mean_abs, max_abs: absolute error, in the unit of the weights.
        amax: largest absolute value of the original.
        relative: error relative to the original, both as the norm of the whole tensor.
        vs_best: squared error over the least that any block scale of the format gives; at least 1.
        zero_share: share of the original's nonzero weights that became zero, 0 to 1.
        bulk_error: largest relative error of the quieter half of a block's rows, or of its columns.
        not_nearest: codes that are not what rounding to nearest gives under the scales at hand.
        other_scales: scales that choosing them again does not give; 0 where that could not be done.
        served_...: the same after an engine has requantized the weights to power-of-two scales.
        requantized: weights whose value that changes.
        output: what the tensor is judged by instead, where it was rounded with its input in mind; else None.
    """

    name: str
    weights: int
    cosine: float
    mean_abs: float
    max_abs: float
    amax: float
    relative: float
    vs_best: float
    zero_share: float
    bulk_error: float
    not_nearest: int
    other_scales: int
    served_cosine: float
    served_mean_abs: float
    served_max_abs: float
    served_relative: float
    requantized: int
    output: OutputError | None = None


def max_or_nan(values: Iterable[float]) -> float:
    """Largest value, NaN if there is one: `max` would drop it or not, depending on the order."""
    values = list(values)
    return math.nan if any(map(math.isnan, values)) else max(values)
