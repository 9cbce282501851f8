"""Verdict, statement and recommendations: pure functions of measurements. `bands.py` has the zones."""

from collections.abc import Sequence
from dataclasses import dataclass

from fp8lib.checkpoint.untrusted import printable
from fp8lib.numerics.modes import Calibration
from fp8lib.verification import output_error
from fp8lib.verification.bands import (
    AS_GOOD_AS_BEST,
    BANDS,
    OF_LARGEST_ERROR,
    Band,
    Bands,
    Judgement,
    Reason,
    Zone,
    judge_tensor,
)
from fp8lib.verification.measurement import Measurement

NO_ROUNDING = 0.9
"""Below this a cosine is neither one of rounding nor of clipping by `mse`, which takes away half of a weight
at most: vectors whose components differ by factors from 1/2 to 1 have a cosine of 2 sqrt(1/2) / (3/2) = 0.943
at least, and rounding, which turns a vector by asin(1/16) at most, leaves 0.92."""


@dataclass(frozen=True, slots=True)
class Health:
    """What the measurements say.

    Attributes:
        verdict: worst zone of all tensors; FAIL if anything is structurally wrong.
        counts: number of tensors in each zone.
        reasons: number of tensors for each reason.
        flagged: (judgement, measurement) of every tensor that is not GOOD, worst first.
        statement: the verdict in a sentence or two.
        recommendations: what to do, in order; empty when nothing would help or nothing is wrong.
    """

    verdict: Zone
    counts: dict[Zone, int]
    reasons: dict[Reason, int]
    flagged: tuple[tuple[Judgement, Measurement], ...]
    statement: str
    recommendations: tuple[str, ...]

    @property
    def to_mend(self) -> list[tuple[Judgement, Measurement]]:
        """Of `flagged`, those on which something can be done: not the ones whose weights are large."""
        return [(j, m) for j, m in self.flagged if j.reason is not Reason.LARGE_WEIGHTS]


def judge(
    measurements: Sequence[Measurement],
    problems: Sequence[str],
    calibration: Calibration,
    finished: bool = False,
    bands: Bands = BANDS,
    damaged: Sequence[str] = (),
) -> Health:
    """Turn measurements into a verdict.

    Args:
        measurements: of the checked tensors.
        problems: structural deviations, and codes and scales that are not what the tool gives, one line each.
        calibration: how the scales were chosen.
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
    by_bands = [m for _, m in flagged if m.output is None]
    return Health(
        verdict,
        {zone: zones.count(zone) for zone in Zone},
        {reason: reasons.count(reason) for reason in Reason},
        tuple(flagged),
        statement,
        () if problems else tuple(_recommend(by_bands, calibration, bands)),
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


def _outside(measurements: Sequence[Measurement], band: Band) -> list[Measurement]:
    bad = [m for m in measurements if band.zone(getattr(m, band.metric)) is not Zone.GOOD]
    return sorted(bad, key=lambda m: band.badness(getattr(m, band.metric)))


def _recommend(measurements: Sequence[Measurement], calibration: Calibration, bands: Bands) -> list[str]:
    """What can help tensors that are not GOOD; never an improvement that no setting can bring."""
    mode, clips = calibration.mode, calibration.clips
    found = []
    damaged = [m for m in _outside(measurements, bands.cosine) if not (m.cosine >= NO_ROUNDING or clips)]
    if damaged:
        m = damaged[0]
        found.append(
            f"Tensors that are no rounding of the original: {len(damaged)}, such as {printable(m.name)} with "
            f"cosine {m.cosine:.3g}. No scale does that: the files are damaged, or not made from this "
            "--input_dir. Copy or write them again."
        )
        measurements = [m for m in measurements if m.cosine >= NO_ROUNDING]
    improvable = [m for m in measurements if m.vs_best > AS_GOOD_AS_BEST]
    if clips and mode == "rms" and measurements:
        found.append(
            "Leave out --rms_saturate: what lies above its scales is clipped, and E4M3 gains nothing from it."
        )
    elif clips and measurements:
        found.append(
            "Use --calib_mode rms or mse instead of percentile, or --calib_percentile 100: what lies "
            "above the percentile is clipped, and E4M3 gains nothing from it."
        )
    elif improvable and mode != "mse":
        m = max(improvable, key=lambda m: m.vs_best)
        found.append(
            f"Use --calib_mode mse: {len(improvable)} tensors have up to {m.vs_best:.2f} times the squared "
            f"error of the best scales ({printable(m.name)}), which it takes."
        )
    bulk = _outside(measurements, bands.bulk_error) + _outside(measurements, bands.zero_share)
    if bulk:
        m = bulk[0]
        found.append(
            f"Weights far above all others leave E4M3 no bits for these, such as in {printable(m.name)}: "
            f"the smaller half of a block is off by {m.bulk_error:.1%}, {m.zero_share:.2%} of the weights "
            "became zero. No scale changes that; keep such modules with --keep_bf16."
        )
    clipped = [m for m in _outside(measurements, bands.max_abs) if OF_LARGEST_ERROR * m.max_abs > m.amax]
    if clips and clipped:
        m = clipped[0]
        found.append(
            f"The largest error, {m.max_abs:.3g} in {printable(m.name)}, is a clipped weight "
            f"(largest weight {m.amax:.3g}); a mode that does not clip removes it."
        )
    return found
