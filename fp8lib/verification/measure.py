"""How far dequantized weights are from their original: what is measured of pieces, and what they add up to.

cosine      <w, w'> / (|w| |w'|), computed as (|w|^2 + |w'|^2 - |w - w'|^2) / (2 |w| |w'|), which keeps
            the digits of 1 - cosine that a plain dot product in float32 loses
relative    |w - w'| / |w|
mean_abs    mean of |w - w'|
max_abs     largest |w - w'|
vs_best     |w - w'|^2 over the least that block scales of the same format can give, block by block
zero_share  share of the nonzero weights that became zero
bulk_error  |w - w'| / |w| of the smaller half of a block's nonzero weights; the largest of all blocks.
            The half ends with the eighth of an octave, by BF16 bits, that the median is in

The first four twice: for the weights as they are in the file, and as an engine computes with them that
requantizes them (`numerics/served.py`).

`bulk_error` is what outliers cannot hide. One weight of 1e5 in a block leaves all others zero, and the
tensor's cosine at 1.000000. The block's cosine without its largest weight would show that, but not with two
such weights, nor with a channel of them; its smaller half is free of them, wherever they are. Faint weights
alarm nobody by themselves: most of the half's energy is that of weights near the median.

And what is exact is compared exactly: codes with what rounding to nearest gives, scales with what choosing
them again gives. `sums.py` does the sums.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch

from fp8lib.verification.measurement import Measurement, max_or_nan
from fp8lib.verification.sums import Facts, Prepared, figures, sum_up

Piece = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Weights, codes and scales; `measure` says of what shape."""


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
        amax: largest |w|.
        written: of the weights in the file.
        served: of the weights that an engine computes with.
        original: sum of squares of w.
        least: least sum of squares of w - w' that scales can give.
        bulk: largest squared relative error of the smaller half of a block.
        nonzero: weights that are not zero.
        zeroed: of these, weights that became zero.
        requantized: weights that are not the same in the file and as served.
        not_nearest: codes that are not the nearest.
        other_scales: scales that are not those which were chosen again.
    """

    count: int
    amax: float
    written: Sums
    served: Sums
    original: float
    least: float
    bulk: float
    nonzero: int
    zeroed: int
    requantized: int
    not_nearest: int
    other_scales: int


def measure(
    weights: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, *, powers_of_two: bool = False
) -> Errors:
    """Error sums of rows of a matrix that start at a multiple of 128.

    Args:
        weights: [rows, columns] as in the input, BF16, F16 or F32.
        codes: float8_e4m3fn [rows, columns].
        scales: [ceil(rows/128), ceil(columns/128)], BF16 or F32.
        powers_of_two: whether the scales were to be; `vs_best` compares with the best of these.
    """
    return measure_all([(weights, codes, scales)], powers_of_two)[0]


def measure_all(
    pieces: Sequence[Piece], powers_of_two: bool = False, chosen_again: Sequence[torch.Tensor | None] = ()
) -> list[Errors]:
    """What `measure` says of each of several pieces.

    Each is summed by itself, because a sum of floats depends on what is summed together. But the host waits
    for the device only twice, however many pieces there are, unless scales are searched.

    Args:
        pieces: what is measured.
        powers_of_two: whether the scales were to be.
        chosen_again: scales of each piece as they should be; None, or nothing at all, where nobody knows.
    """
    prepared = [Prepared(*piece, powers_of_two) for piece in pieces]
    known = _on_host([each.known for each in prepared])
    facts = [Facts(*each) for each in zip(prepared, known, strict=True)]
    chosen_again = list(chosen_again) or [None] * len(pieces)
    sums = _on_host([sum_up(*each) for each in zip(prepared, facts, chosen_again, strict=True)])
    found = []
    for (weights, _, _), about, of_piece, again in zip(pieces, facts, sums, chosen_again, strict=True):
        rest = [float(value) for value in figures(about, of_piece, again is not None)]
        served = Sums(*rest[4:8])
        counts = map(int, rest[11:])
        found.append(Errors(weights.numel(), about.amax, Sums(*rest[:4]), served, *rest[8:11], *counts))
    return found


def _on_host(tensors: Sequence[torch.Tensor]) -> list[np.ndarray]:
    """Some tensors of one dimension as arrays; the host waits for the device once."""
    if len(tensors) == 1:
        return [tensors[0].cpu().numpy()]
    ends = accumulate(map(len, tensors))
    return np.split(torch.cat(list(tensors)).cpu().numpy(), list(ends)[:-1])


def combine(name: str, pieces: Sequence[Errors]) -> Measurement:
    """The measurement of a matrix from its pieces, in the order of its rows."""
    count, original = sum(p.count for p in pieces), math.fsum(p.original for p in pieces)
    nonzero = sum(p.nonzero for p in pieces)
    lost, least = math.fsum(p.written.difference for p in pieces), math.fsum(p.least for p in pieces)
    return Measurement(
        name,
        weights=count,
        amax=max_or_nan(p.amax for p in pieces),
        vs_best=1.0 if lost == least else lost / least if least else math.inf,
        zero_share=sum(p.zeroed for p in pieces) / nonzero if nonzero else 0.0,
        bulk_error=math.sqrt(max_or_nan(p.bulk for p in pieces)),
        not_nearest=sum(p.not_nearest for p in pieces),
        other_scales=sum(p.other_scales for p in pieces),
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
