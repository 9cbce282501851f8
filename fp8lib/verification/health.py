"""Verdict and statement: pure functions of measurements. `bands.py` has the zones, `advice.py` what helps."""

from collections.abc import Sequence
from dataclasses import dataclass

from fp8lib.checkpoint.untrusted import printable
from fp8lib.verification import output_error
from fp8lib.verification.bands import (
    BANDS,
    Bands,
    Judgement,
    Reason,
    Zone,
    judge_tensor,
)
from fp8lib.verification.measurement import Measurement


@dataclass(frozen=True, slots=True)
class Health:
    """What the measurements say.

    Attributes:
        verdict: worst zone of all tensors; FAIL if anything is structurally wrong.
        counts: number of tensors in each zone.
        reasons: number of tensors for each reason.
        flagged: (judgement, measurement) of every tensor that is not GOOD, worst first.
        statement: the verdict in a sentence or two.
        recommendations: what to do, in order, if something was tried and helps; `advice.py` words them.
    """

    verdict: Zone
    counts: dict[Zone, int]
    reasons: dict[Reason, int]
    flagged: tuple[tuple[Judgement, Measurement], ...]
    statement: str
    recommendations: tuple[str, ...] = ()

    @property
    def to_mend(self) -> list[tuple[Judgement, Measurement]]:
        """Of `flagged`, those on which something can be done: not the ones whose weights are large."""
        return [(j, m) for j, m in self.flagged if j.reason is not Reason.LARGE_WEIGHTS]


def judge(
    measurements: Sequence[Measurement],
    problems: Sequence[str],
    finished: bool = False,
    bands: Bands = BANDS,
    damaged: Sequence[str] = (),
) -> Health:
    """Turn measurements into a verdict.

    Args:
        measurements: of the checked tensors.
        problems: structural deviations, and codes and scales that are not what the tool gives, one line each.
        finished: whether this is about a directory that was made before, perhaps from something else.
        bands: those in force.
        damaged: files in which codes or scales are not what the tool gives.
    """
    judged = [(judge_tensor(m, bands), m) for m in measurements]
    zones, reasons = [j.zone for j, _ in judged], [j.reason for j, _ in judged]
    flagged = sorted(
        (item for item in judged if item[0].zone is not Zone.GOOD),
        key=lambda item: (-item[0].zone, bands.cosine.badness(item[1].cosine), item[1].name),
    )
    verdict = Zone.FAIL if problems else max(zones, default=Zone.GOOD)
    statement = (
        _structure(finished, damaged) if problems else _statement(verdict, measurements, flagged, reasons)
    )
    return Health(
        verdict,
        {zone: zones.count(zone) for zone in Zone},
        {reason: reasons.count(reason) for reason in Reason},
        tuple(flagged),
        statement,
    )


def _structure(finished: bool, damaged: Sequence[str]) -> str:
    """What to make of problems."""
    if damaged and finished:
        return (
            "Codes or scales are not what rounding gives. Do not deploy it. The files are damaged, or not "
            f"made from this --input_dir. Copy or write again: {_listed(damaged)}."
        )
    if damaged:
        return (
            "What was read back from the disk is not what was computed: memory or disk are at fault. "
            f"Do not deploy it; write again with --overwrite: {_listed(damaged)}."
        )
    if finished:
        return (
            "The directory is not a quantization of this --input_dir. Do not deploy it. If it is the right "
            "--input_dir, the directory is damaged or was made by other rules."
        )
    return "The output is not what was planned. Do not deploy it; run again with --overwrite."


def _listed(files: Sequence[str], most: int = 3) -> str:
    more = f" and {len(files) - most} more" if len(files) > most else ""
    return ", ".join(map(printable, files[:most])) + more


def _statement(
    verdict: Zone,
    measurements: Sequence[Measurement],
    flagged: Sequence[tuple[Judgement, Measurement]],
    reasons: Sequence[Reason],
) -> str:
    if not measurements:
        return "Nothing was spot-checked."
    if wrong := output_error.statement([m.output for m in measurements if m.output is not None]):
        return wrong
    if verdict is Zone.GOOD and Reason.AT_LIMIT in reasons:
        return (
            "Every metric is in its GOOD band, or at the limit of E4M3, where no other scale does noticeably "
            "better. Ready to deploy."
        )
    if verdict is Zone.GOOD:
        return "Every metric is in its GOOD band. Ready to deploy."
    large = [m for j, m in flagged if j.reason is Reason.LARGE_WEIGHTS]
    if len(large) == len(flagged):
        m = max(large, key=lambda m: m.max_abs)
        return (
            f"Absolute errors are outside their bands in {len(large)} tensors, because weights are large "
            f"(up to {m.amax:.3g} in {printable(m.name)}). Relative errors are in band, and no other scale "
            f"does noticeably better. Usable; evaluate the model if such weights are a surprise."
        )
    if verdict is Zone.WARN:
        return "Usable, with metrics outside their GOOD band. Evaluate the model before deploying it."
    return "A hard limit is exceeded. Do not deploy before looking at the tensors above."
