"""Bands, verdict and recommendations: pure functions of measurements.

    zone   cosine            mean abs err       max abs err
    GOOD   >= 0.9997         <= 0.0008          <= 0.01
    WARN   0.9995 - 0.9997   0.0008 - 0.001     0.01 - 0.02
    FAIL   < 0.9995          > 0.001            > 0.02

A tensor's zone is the worst of its three; the verdict is the worst tensor's. The bands are those that
users of Qwen FP8 checkpoints have come to expect; two facts decide what to make of a WARN:

E4M3's relative rounding error has a floor. For a near-Gaussian block no scale gives more than cosine
0.99966, and every mode that does not clip is within 0.0001 of that. A cosine WARN there is the format.

The absolute errors grow with the weights: E4M3 is off by at most |w|/16, so a single weight above 0.32
may exceed the hard limit of 0.02 under any scale. Cosine says how good the relative precision is.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

from fp8lib.checkpoint.untrusted import printable
from fp8lib.numerics.modes import Calibration
from fp8lib.verification import output_error
from fp8lib.verification.output_error import OutputError


@dataclass(frozen=True, slots=True)
class Measurement:
    """What one FP8 tensor lost; `measure.py` has the formulas.

    Attributes:
        name: full name of the weight.
        cosine: similarity of original and dequantized weights.
        mean_abs, max_abs: absolute error, in the unit of the weights.
        amax: largest absolute value of the original.
        relative: error relative to the original, both as the norm of the whole tensor.
        served_...: the same after an engine has requantized the weights to power-of-two scales.
        requantized: weights whose value that changes.
        output: what the tensor is judged by instead, where it was rounded with its input in mind; else None.
    """

    name: str
    cosine: float
    mean_abs: float
    max_abs: float
    amax: float
    relative: float
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


class Zone(IntEnum):
    """Worse is larger."""

    GOOD = 0
    WARN = 1
    FAIL = 2


@dataclass(frozen=True, slots=True)
class Band:
    """Limits of one metric: `good` and `hard` are the worst values that are GOOD and not FAIL."""

    metric: str
    good: float
    hard: float
    higher_is_better: bool

    def badness(self, value: float) -> float:
        """Sorts values the worst first; NaN is the worst."""
        if math.isnan(value):
            return -math.inf
        return value if self.higher_is_better else -value

    def zone(self, value: float) -> Zone:
        """NaN is FAIL."""
        good, hard = self.good, self.hard
        if self.higher_is_better:
            value, good, hard = -value, -good, -hard
        return Zone.GOOD if value <= good else Zone.WARN if value <= hard else Zone.FAIL


COSINE = Band("cosine", 0.9997, 0.9995, higher_is_better=True)
MEAN_ABS = Band("mean_abs", 0.0008, 0.001, higher_is_better=False)
MAX_ABS = Band("max_abs", 0.01, 0.02, higher_is_better=False)
BANDS = (COSINE, MEAN_ABS, MAX_ABS)

FORMAT_LIMIT = 0.99966
"""Best cosine of any block scale on Gaussian weights (see `tests/test_scales.py`)."""
AT_FORMAT_LIMIT = 0.9996
"""Above this a cosine is as good as the format's limit: the unclipped modes differ by less."""
NO_ROUNDING = 0.9
"""Below this a cosine is neither one of rounding nor of clipping by `mse`, which takes away half of a weight
at most: vectors whose components differ by factors from 1/2 to 1 have a cosine of 2 sqrt(1/2) / (3/2) = 0.943
at least, and rounding, which turns a vector by asin(1/16) at most, leaves 0.92."""
AS_THEY_ARE = "takes scales as they are (docs/formats.md)"
LARGEST_RELATIVE_ERROR = 1 / 16
LARGEST_ERROR_OF_MAX = 1 / 28
"""Of a block's largest weight, in mode `max` with BF16 scales: it becomes 448, half a step there is 16."""


@dataclass(frozen=True, slots=True)
class Health:
    """What the measurements say.

    Attributes:
        verdict: worst zone of all tensors; FAIL if anything is structurally wrong.
        counts: number of tensors in each zone.
        flagged: (zone, measurement) of every tensor that is not GOOD, worst first.
        statement: the verdict in a sentence or two.
        recommendations: what to do, in order; empty when nothing would help or nothing is wrong.
    """

    verdict: Zone
    counts: dict[Zone, int]
    flagged: tuple[tuple[Zone, Measurement], ...]
    statement: str
    recommendations: tuple[str, ...]


def zone_of(measurement: Measurement) -> Zone:
    """A tensor's zone: the worst of its metrics, or that of its output error."""
    if (output := measurement.output) is not None:
        return Zone.GOOD if output.is_good else Zone.FAIL if output.is_bad else Zone.WARN
    return max(band.zone(getattr(measurement, band.metric)) for band in BANDS)


def judge(
    measurements: Sequence[Measurement],
    problems: Sequence[str],
    calibration: Calibration,
    finished: bool = False,
) -> Health:
    """Turn measurements into a verdict.

    Args:
        measurements: of the spot-checked tensors.
        problems: structural deviations, one line each.
        calibration: how the scales were chosen.
        finished: whether this is about a directory that was made before, perhaps from something else.
    """
    zones = [zone_of(m) for m in measurements]
    counts = {zone: zones.count(zone) for zone in Zone}
    flagged = sorted(
        ((z, m) for z, m in zip(zones, measurements, strict=True) if z is not Zone.GOOD),
        key=lambda item: (-item[0], COSINE.badness(item[1].cosine), item[1].name),
    )
    verdict = Zone.FAIL if problems else max(zones, default=Zone.GOOD)
    outputs = [m.output for m in measurements if m.output is not None]
    by_bands = [m for m in measurements if m.output is None]
    recommendations = tuple(_recommend(by_bands, calibration)) if flagged else ()
    statement = _statement(verdict, by_bands or measurements, problems, calibration.clips, finished)
    if not problems and (wrong := output_error.statement(outputs)):
        statement = wrong
    return Health(verdict, counts, tuple(flagged), statement, recommendations)


def _cosine_is_the_format(measurements: Sequence[Measurement], clips: bool) -> bool:
    """Whether every cosine below GOOD is at the limit of E4M3 rather than a matter of settings."""
    low = [m for m in measurements if COSINE.zone(m.cosine) is not Zone.GOOD]
    return bool(low) and not clips and all(m.cosine >= AT_FORMAT_LIMIT for m in low)


def _outside(measurements: Sequence[Measurement], band: Band) -> list[Measurement]:
    bad = [m for m in measurements if band.zone(getattr(m, band.metric)) is not Zone.GOOD]
    return sorted(bad, key=lambda m: band.badness(getattr(m, band.metric)))


def _damaged(measurements: Sequence[Measurement], clips: bool) -> list[Measurement]:
    """Tensors that differ from the original by more than any rounding could, the worst first."""
    return [m for m in _outside(measurements, COSINE) if not (m.cosine >= NO_ROUNDING or clips)]


def _statement(
    verdict: Zone, measurements: Sequence[Measurement], problems: Sequence[str], clips: bool, finished: bool
) -> str:
    if problems and finished:
        return (
            "The directory is not a quantization of this --input_dir. Do not deploy it. If it is the right "
            "--input_dir, the directory is damaged or was made by other rules."
        )
    if problems:
        return "The output is not what was planned. Do not deploy it; run again with --overwrite."
    if not measurements:
        return "Nothing was spot-checked."
    if verdict is Zone.GOOD:
        return "Every metric is in its GOOD band. Ready to deploy."
    absolute = _outside(measurements, MEAN_ABS) + _outside(measurements, MAX_ABS)
    if _cosine_is_the_format(measurements, clips) and not absolute:
        return (
            f"Cosine is at the limit of the format: E4M3 block scaling of near-Gaussian weights cannot "
            f"exceed about {FORMAT_LIMIT} with any scale. This is not a matter of settings. "
            "The model can be deployed."
        )
    if verdict is Zone.WARN:
        return "Usable, with metrics outside their GOOD band. Evaluate the model before deploying it."
    return "A hard limit is exceeded. Do not deploy before looking at the tensors above."


def _recommend(measurements: Sequence[Measurement], calibration: Calibration) -> list[str]:
    """Flags that can help in the mode at hand; never an improvement that no mode can bring."""
    mode, clips, powers = calibration.mode, calibration.clips, calibration.powers_of_two
    found = []
    if damaged := _damaged(measurements, clips):
        m = damaged[0]
        found.append(
            f"Tensors that are no rounding of the original: {len(damaged)}, such as {printable(m.name)} with "
            f"cosine {m.cosine:.3g}. No scale does that: the files are damaged, or not made from this "
            "--input_dir. Copy or write them again."
        )
        measurements = [m for m in measurements if m.cosine >= NO_ROUNDING]
    if clips and mode == "rms":
        found.append(
            "Leave out --rms_saturate: clipping costs more than it gains, E4M3 keeps the bulk's "
            "precision when outliers are represented."
        )
    elif clips:
        found.append(
            "Use --calib_mode rms or mse instead of percentile, or --calib_percentile 100: what lies "
            "above the percentile is clipped, and E4M3 gains nothing from it."
        )
    low = [m for m in _outside(measurements, COSINE) if m.cosine < AT_FORMAT_LIMIT]
    if powers and clips:
        low = []  # it is what clips, and that is said above
    if low and powers:
        found.append(
            f"{len(low)} tensors are below the format's limit of about {FORMAT_LIMIT} in cosine. Powers of "
            f"two leave little to choose. If your engine {AS_THEY_ARE}, try --scale_format bf16 --calib_mode "
            "mse, which takes the best of all BF16 scales for every block."
        )
    elif low and mode != "mse":
        found.append(
            f"Try --calib_mode mse: {len(low)} tensors are below the format's limit of about "
            f"{FORMAT_LIMIT} in cosine, and mse takes the best of all BF16 scales for every block."
        )
    elif low:
        found.append(
            f"{len(low)} tensors stay below cosine {AT_FORMAT_LIMIT} with the best of all scales: their "
            "blocks hold outliers far above the bulk. Another scale will not help; evaluate the model."
        )
    return found + _recommend_about_absolute_errors(measurements, calibration)


def _recommend_about_absolute_errors(
    measurements: Sequence[Measurement], calibration: Calibration
) -> list[str]:
    mode, clips, powers = calibration.mode, calibration.clips, calibration.powers_of_two
    found = []
    worst = _outside(measurements, MAX_ABS)
    bounded_by_max = [m for m in worst if m.max_abs > m.amax * LARGEST_ERROR_OF_MAX]
    if worst and clips and worst[0].max_abs > worst[0].amax * LARGEST_RELATIVE_ERROR:
        found.append(
            f"The largest error, {worst[0].max_abs:.3g} in {printable(worst[0].name)}, is a clipped weight "
            f"(largest weight {worst[0].amax:.3g}); a mode that does not clip removes it."
        )
    elif bounded_by_max and (powers or mode != "max"):
        m = bounded_by_max[0]
        flags = "--scale_format bf16 --calib_mode max" if powers else "--calib_mode max"
        condition = f" and your engine {AS_THEY_ARE}" if powers else ""
        found.append(
            f"Use {flags} if max abs err matters{condition}: it puts a block's largest weight on 448, where "
            f"rounding is off by 1/28 at most, so {printable(m.name)} would lose {m.amax / 28:.3g} at most "
            f"instead of {m.max_abs:.3g}. Cosine hardly changes."
        )
    elif worst:
        found.append(
            f"{len(worst)} tensors exceed max abs err {MAX_ABS.good}: they hold large weights "
            f"({worst[0].amax:.3g} in {printable(worst[0].name)}), and an error of 1/28 of the largest is "
            "within what any mode may make. No flag changes that; judge these tensors by their cosine."
        )
    large = _outside(measurements, MEAN_ABS)
    if large and not clips:
        found.append(
            f"{len(large)} tensors exceed mean abs err {MEAN_ABS.good}: mean error is about 2.2 % of the "
            "mean weight, so these tensors have larger weights than usual. Judge them by their cosine."
        )
    return found
