"""Bands, and a tensor's zone by them.

    zone   cosine            mean abs err       max abs err    zeroed        bulk error
    GOOD   >= 0.9997         <= 0.0008          <= 0.01        <= 0.1 %      <= 1/16
    WARN   0.9995 - 0.9997   0.0008 - 0.001     0.01 - 0.02    0.1 % - 5 %   1/16 - 1/4
    FAIL   < 0.9995          > 0.001            > 0.02         > 5 %         > 1/4

The first three are those that users of Qwen FP8 checkpoints have come to expect. A tensor's zone is the worst
of its five, with two exceptions:

At the limit of E4M3. For a near-Gaussian block no scale gives more than cosine 0.99966. So a cosine between
its limits is GOOD where `vs_best` is at most 1.10: another scale would take away a tenth of the squared error
at most, that is 0.00003 of such a cosine.

Large weights. E4M3 is off by up to |w| / 17, so absolute errors grow with the weights: one weight above 0.34
may exceed the hard limit of 0.02 under any scale. Where a tensor is outside by its absolute errors only, they
are WARN and not FAIL.

A bulk error above 1/16 says that weights are subnormal, zero or clipped: all others are off by |w| / 17 at
most, and so is any set of them. Above 1/4 two bits of a number are left.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from enum import IntEnum, StrEnum

from fp8lib import Fp8Error
from fp8lib.verification.measurement import Measurement


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
ZERO_SHARE = Band("zero_share", 0.001, 0.05, higher_is_better=False)
BULK_ERROR = Band("bulk_error", 1 / 16, 1 / 4, higher_is_better=False)
FLAGS = {"cosine": "cosine", "mae": "mean_abs", "maxae": "max_abs"}
"""What `--band` calls the metrics whose limits can be set."""

AS_GOOD_AS_BEST = 1.10
"""`vs_best` up to which a tensor counts as one that no setting improves."""
OF_LARGEST_ERROR = 17
"""A weight that is neither clipped nor subnormal is this many times its error at least: 17/16, half a step of
1/8 away from its neighbours."""


@dataclass(frozen=True, slots=True)
class Bands:
    """The bands in force."""

    cosine: Band = COSINE
    mean_abs: Band = MEAN_ABS
    max_abs: Band = MAX_ABS
    zero_share: Band = ZERO_SHARE
    bulk_error: Band = BULK_ERROR

    @classmethod
    def parse(cls, texts: Iterable[str]) -> "Bands":
        """The bands that `--band` sets, such as `cosine=0.9995,0.995` (GOOD, hard limit).

        Raises:
            Fp8Error: no such metric, one given twice, or limits that make no sense.
        """
        changed: dict[str, Band] = {}
        for text in texts:
            name, _, limits = text.partition("=")
            if name not in FLAGS:
                raise Fp8Error(
                    f"--band {text!r}: give one of {', '.join(FLAGS)} and two limits, like mae=0.001,0.002"
                )
            metric = FLAGS[name]
            if metric in changed:
                raise Fp8Error(f"--band {name}: given twice")
            changed[metric] = _with_limits(getattr(BANDS, metric), text, limits)
        return replace(BANDS, **changed)

    def changed(self) -> list[str]:
        """The `--band` values that differ from the usual ones."""
        return [
            f"{name}={band.good:g},{band.hard:g}"
            for name, metric in FLAGS.items()
            if (band := getattr(self, metric)) != getattr(BANDS, metric)
        ]

    def __iter__(self) -> Iterator[Band]:
        return (getattr(self, f.name) for f in fields(self))


BANDS = Bands()


def _with_limits(band: Band, text: str, limits: str) -> Band:
    """A band with the limits `GOOD,HARD`.

    Raises:
        Fp8Error: they are no two numbers, out of range, or the wrong way round.
    """
    try:
        good, hard = map(float, limits.split(","))
    except ValueError:
        raise Fp8Error(f"--band {text!r}: give two limits, like {text.partition('=')[0]}=GOOD,HARD") from None
    largest = 1 if band.higher_is_better else math.inf
    if not (0 <= good <= largest and 0 <= hard <= largest and math.isfinite(good + hard)):
        raise Fp8Error(f"--band {text!r}: limits must be numbers from 0 {'to 1' if largest == 1 else 'on'}")
    if (hard > good) if band.higher_is_better else (hard < good):
        raise Fp8Error(f"--band {text!r}: the hard limit comes second and is the worse of the two")
    return replace(band, good=good, hard=hard)


class Reason(StrEnum):
    """Why a tensor is in its zone."""

    IN_BAND = "in_band"
    AT_LIMIT = "at_the_limit_of_e4m3"
    LARGE_WEIGHTS = "large_weights"
    OUT_OF_BAND = "out_of_band"
    OUTPUTS = "outputs"


@dataclass(frozen=True, slots=True)
class Judgement:
    """A tensor's zone and why.

    Attributes:
        zone: the worst of `zones`, or what the output error says.
        reason: why.
        zones: metric -> its zone, both exceptions applied; empty where the output error judges.
    """

    zone: Zone
    reason: Reason
    zones: dict[str, Zone]


def judge_tensor(m: Measurement, bands: Bands = BANDS) -> Judgement:
    """The zone of one tensor. See the module's docstring."""
    if (output := m.output) is not None:
        zone = Zone.GOOD if output.is_good else Zone.FAIL if output.is_bad else Zone.WARN
        return Judgement(zone, Reason.IN_BAND if zone is Zone.GOOD else Reason.OUTPUTS, {})
    zones = {band.metric: band.zone(getattr(m, band.metric)) for band in bands}
    as_good_as_best = m.vs_best <= AS_GOOD_AS_BEST
    at_limit = zones["cosine"] is Zone.WARN and as_good_as_best
    if at_limit:
        zones["cosine"] = Zone.GOOD
    absolute = ("mean_abs", "max_abs")
    large = (
        max(zones[name] for name in absolute) is not Zone.GOOD
        and all(zone is Zone.GOOD for name, zone in zones.items() if name not in absolute)
        and as_good_as_best
        and math.isfinite(m.mean_abs)
        and OF_LARGEST_ERROR * m.max_abs <= m.amax
    )
    if large:
        zones |= {name: min(zones[name], Zone.WARN) for name in absolute}
    zone = max(zones.values())
    if zone is not Zone.GOOD:
        return Judgement(zone, Reason.LARGE_WEIGHTS if large else Reason.OUT_OF_BAND, zones)
    return Judgement(zone, Reason.AT_LIMIT if at_limit else Reason.IN_BAND, zones)


def zone_of(m: Measurement, bands: Bands = BANDS) -> Zone:
    """A tensor's zone alone."""
    return judge_tensor(m, bands).zone
