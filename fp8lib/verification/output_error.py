"""Weights that were rounded with their input's second moments in mind, judged by what they change in outputs.

    output error    tr(E H E^T) / tr(W H W^T),  E = W - W',  H = mean of x x^T

Each weight by itself is farther from the original than rounding to nearest would have put it, so cosine falls
by design, and the bands of `health.py` do not apply. What is on the disk is measured beside what rounding to
nearest under the same scales would give. And the rounding is repeated: its sums are exact, so every code
should be the same again. A few of a million may differ where another machine has factored H."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

REPEATED = 0.999
"""Least share of codes that come out again: another library's factor of H changes far fewer."""


@dataclass(frozen=True, slots=True)
class OutputError:
    """What a tensor's rounding does to its outputs.

    Attributes:
        error: output error of what is on the disk.
        nearest: the same of rounding to nearest under the same scales.
        repeated: share of codes that rounding again gives.
    """

    error: float
    nearest: float
    repeated: float

    @property
    def of_nearest(self) -> float:
        """Error as a multiple of nearest's; 1 where both are 0."""
        return self.error / self.nearest if self.nearest else (math.inf if self.error else 1.0)

    @property
    def is_good(self) -> bool:
        """Not more than nearest's; all codes repeated."""
        return self.error <= self.nearest and self.repeated == 1

    @property
    def is_bad(self) -> bool:
        """More than nearest's, or other codes than rounding gives; NaN is."""
        return not (self.error <= self.nearest and self.repeated >= REPEATED)


def summary(found: Sequence[OutputError]) -> str:
    """How much was gained: `0.62 x of nearest (worst 0.97)`, the first the geometric mean."""
    ratios = [each.of_nearest for each in found]
    positive = [ratio for ratio in ratios if ratio > 0]
    mean = math.exp(math.fsum(map(math.log, positive)) / len(positive)) if positive else 0.0
    worst = math.nan if any(map(math.isnan, ratios)) else max(ratios)
    return f"{mean:.2f} x of nearest (worst {worst:.2f})"


def statement(found: Sequence[OutputError]) -> str | None:
    """What is wrong with tensors that are not good; None if all are."""
    bad = [each for each in found if not each.is_good]
    if not bad:
        return None
    if any(not each.error <= each.nearest for each in bad):
        return (
            "Tensors change their outputs more than rounding to nearest would. The files are damaged, or "
            "were made with other second moments."
        )
    return (
        "Tensors hold codes that second-order rounding does not give. A few are what another processor's "
        "arithmetic explains; else the files are damaged, or were made with other second moments."
    )
