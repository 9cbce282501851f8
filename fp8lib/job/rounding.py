"""`--rounding`, from the flags to the conversion, and what the manifest says of it."""

from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fp8lib.checkpoint.plan import Plan
from fp8lib.terminal import Talk

if TYPE_CHECKING:
    import torch

    from fp8lib.calibration.second_moments_file import SecondMoments


@dataclass(frozen=True, slots=True)
class SecondMomentsUse:
    """Second moments to round with, or to judge by.

    Attributes:
        moments: the file.
        damping: share of the mean diagonal that is added to it.
        covered: quantized tensors that it speaks for.
    """

    moments: "SecondMoments"
    damping: float
    covered: int

    def conversion(self, flags: Namespace, importance: "Callable | None", device: "torch.device"):
        """What becomes of the rows of weights: `streaming.second_order.SecondOrder`."""
        from fp8lib.streaming.factors import Factors
        from fp8lib.streaming.second_order import SecondOrder

        moments = self.moments
        factors = Factors(moments.entry, moments.read, moments.refuse, self.damping, device)
        return SecondOrder(flags.calibration, factors, importance)


def open_moments(flags: Namespace, weights: Iterable[tuple[str, int]]) -> SecondMomentsUse | None:
    """The second moments that the flags name, checked against (weight, columns); None for `nearest`.

    Raises:
        Fp8Error: not a file of second moments, or of another model.
    """
    if flags.rounding == "nearest":
        return None
    from fp8lib.calibration.second_moments_file import SecondMoments

    moments = SecondMoments(flags.second_moments)
    return SecondMomentsUse(moments, flags.damping, moments.check(weights))


def moments_for(flags: Namespace, plan: Plan, talk: Talk) -> SecondMomentsUse | None:
    """`open_moments` for a plan; says how many weights will be rounded to nearest all the same."""
    weights = [(m.weight.name, m.columns) for m in plan.matrices]
    use = open_moments(flags, weights)
    if use and (left := len(weights) - use.covered):
        talk.warn(f"{left} of {len(weights)} tensors have no second moments; they are rounded to nearest")
    return use


def settings(use: SecondMomentsUse | None) -> dict:
    """What decides bytes, as the manifest keeps it."""
    return {
        "rounding": f"second_order(damping={use.damping!r})" if use else "nearest",
        "second_moments": use.moments.sha256 if use else None,
    }
