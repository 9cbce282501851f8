"""What can be done about weights that are not GOOD, from what was measured when it was tried. No files here.

A recommendation names what to type, what that changes for the worst of the weights it was tried on, and for
how many the zone. Whatever would make the zone of another weight worse is not recommended.
"""

import shlex
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from fp8lib.checkpoint.layout import Matrix
from fp8lib.checkpoint.rules import fusion_group
from fp8lib.checkpoint.untrusted import printable
from fp8lib.numerics.modes import PHASES, SCALE_FORMATS, Calibration
from fp8lib.terminal import size
from fp8lib.verification.bands import BANDS, COSINE, Band, Bands, Reason, Zone, judge_tensor, zone_of
from fp8lib.verification.measurement import Measurement

METRICS = {
    "cosine": "cosine",
    "mean_abs": "mean abs err",
    "max_abs": "max abs err",
    "zero_share": "weights that become zero",
    "bulk_error": "error of the smaller half of a block",
}
"""What a person calls a band's metric."""
_SHARES = ("zero_share", "bulk_error")
"""Metrics that are shown in percent."""
PATTERNS = 8
"""`--keep_bf16` flags that a recommendation spells out."""
AS_THEY_ARE = "for engines that take scales as they are (docs/formats.md)"
NO_ROUNDING = 0.9
"""Below this a cosine is neither one of rounding nor of clipping by `mse`, which takes away half of a weight
at most: vectors whose components differ by factors from 1/2 to 1 have a cosine of 2 sqrt(1/2) / (3/2) = 0.943
at least, and rounding, which turns a vector by asin(1/16) at most, leaves 0.92."""


# --- what would FAIL ---------------------------------------------------------------------------


class Failure(NamedTuple):
    """A weight that would FAIL: its name, its cosine, and what is outside its hard limit."""

    name: str
    cosine: float
    text: str


def failure_of(m: Measurement, bands: Bands = BANDS) -> Failure | None:
    """What to say of a weight that would FAIL; None for any other."""
    if zone_of(m, bands) is not Zone.FAIL:
        return None
    if m.output is not None:
        return Failure(m.name, m.cosine, "changes its outputs more than rounding to nearest")
    band = _worst_band(m, bands)
    value = _figure(band, getattr(m, band.metric))
    return Failure(m.name, m.cosine, f"{METRICS[band.metric]} {value}, limit {_figure(band, band.hard)}")


def reason_of(failures: Sequence[Failure]) -> str:
    """Why a fusion group is kept: its worst weight, and how many more would FAIL."""
    worst = min(failures, key=lambda f: (COSINE.badness(f.cosine), f.name))
    more = f" and {len(failures) - 1} more" if failures[1:] else ""
    return f"would FAIL: {printable(worst.name)} ({worst.text}){more}"


def _worst_band(m: Measurement, bands: Bands) -> Band:
    """The first of the bands that give a weight its zone."""
    zones = judge_tensor(m, bands).zones
    return max(bands, key=lambda band: zones[band.metric])


def _figure(band: Band, value: float) -> str:
    if band.metric in _SHARES:
        return f"{value:.3%}"
    return f"{value:.6f}" if band.metric == "cosine" else f"{value:.3g}"


# --- damage ------------------------------------------------------------------------------------


def unexplained(flagged: Iterable[Measurement], used: Calibration | None) -> list[Measurement]:
    """Weights of a directory that was made before, of which no setting is the cause, the worst first.

    Args:
        flagged: weights that are not GOOD.
        used: how their scales were chosen; None if nobody knows.
    """
    clips = used is not None and used.clips
    found = [
        m
        for m in flagged
        if not (m.cosine >= NO_ROUNDING or clips) or (used is None and m.output is None and m.not_nearest)
    ]
    return sorted(found, key=lambda m: (COSINE.badness(m.cosine), m.name))


def about_unexplained(found: Sequence[Measurement]) -> str:
    """What to say of them: no calibration mode is advised for damaged files."""
    m, codes = found[0], sum(m.not_nearest for m in found)
    if m.cosine >= NO_ROUNDING:
        return (
            f"Tensors with codes that are not the nearest under their scales: {len(found)}, such as "
            f"{printable(m.name)} ({codes:,} codes in all). They were rounded in another way, or the files "
            "are damaged. If in doubt, copy or write them again."
        )
    return (
        f"Tensors that are no rounding of the original: {len(found)}, such as {printable(m.name)} with "
        f"cosine {m.cosine:.3g}. No scale does that: the files are damaged, or not made from this "
        "--input_dir. Copy or write them again."
    )


# --- what would help ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Alternative:
    """Another way to choose scales, and what to type for it."""

    calibration: Calibration
    flags: str


@dataclass(frozen=True, slots=True)
class Tried:
    """A weight as it is in the files, and what each alternative would make of it."""

    now: Measurement
    then: tuple[Measurement, ...]


def alternatives(used: Calibration | None, given: Calibration) -> list[Alternative]:
    """What to try: the same scale format first, then the same mode. None of them clips.

    Args:
        used: how the scales were chosen; None if nobody knows.
        given: the same, or the flags with the files' scale format.
    """
    found = []
    for scale_format in sorted(SCALE_FORMATS, key=lambda each: each != given.scale_format):
        for mode in sorted(("mse", "rms", "max"), key=lambda each: used is None or each != used.mode):
            new = replace(given, mode=mode, scale_format=scale_format, rms_saturate=False)
            if mode == given.mode:
                new = replace(new, rms_factor=3.0, mse_grid_size=PHASES)
            if used is None or str(new) != str(used):
                found.append(Alternative(new, _flags(used, new)))
    return found


def _flags(used: Calibration | None, new: Calibration) -> str:
    """What to type, and what to leave out, for a calibration instead of another."""
    parts = []
    if used is None or new.mode != used.mode:
        parts.append(f"--calib_mode {new.mode}")
    elif new.mode == "rms" and new.rms_factor != used.rms_factor:
        parts.append(f"--rms_factor {new.rms_factor:g}")
    elif new.mode == "mse" and new.mse_grid_size != used.mse_grid_size:
        parts.append(f"--mse_grid_size {new.mse_grid_size}")
    if used is None or new.scale_format != used.scale_format:
        parts.append(f"--scale_format {new.scale_format}")
    if used is not None and used.rms_saturate and new.mode == "rms":
        parts.append("without --rms_saturate")
    return " ".join(parts)


@dataclass(frozen=True, slots=True)
class Trials:
    """What was tried on which weights, and what came out.

    Attributes:
        tried: weights that are not GOOD, worst first.
        others: GOOD ones, which an alternative must leave so.
        options: in the order of `Tried.then`.
        scale_format: of the files.
        flagged: weights that are not GOOD; those beyond `tried` were not tried.
        bands: those in force.
    """

    tried: Sequence[Tried]
    others: Sequence[Tried]
    options: Sequence[Alternative]
    scale_format: str
    flagged: int
    bands: Bands = BANDS

    def recommendations(self, quantized: Iterable[Matrix]) -> list[str]:
        """What helps, in words; `quantized` is every FP8 weight, for what keeping some costs."""
        best = list(self._best())
        found = [f"{self.options[number].flags}: {self._changes(number)}" for number in best]
        found = [text + self._scope() + self._condition(n) for text, n in zip(found, best, strict=True)]
        left = [
            t
            for t in self.tried
            if judge_tensor(t.now, self.bands).reason in (Reason.OUT_OF_BAND, Reason.OUTPUTS)
            and all(self._step(t, number) <= 0 for number in best)
        ]
        return found + self._keep(left, quantized)

    def _step(self, t: Tried, number: int) -> int:
        """Zones by which an alternative improves a weight."""
        return zone_of(t.now, self.bands) - zone_of(t.then[number], self.bands)

    def _gain(self, number: int) -> int:
        """Zones by which an alternative helps, in all; 0 if it makes any weight's zone worse."""
        steps = [self._step(t, number) for t in (*self.tried, *self.others)]
        return 0 if min(steps, default=0) < 0 else sum(steps)

    def _best(self) -> Iterator[int]:
        """The best alternative of the files' scale format; that of the other, if it is still better."""
        reached = 0
        for same in (True, False):
            numbers = [
                n
                for n, option in enumerate(self.options)
                if (option.calibration.scale_format == self.scale_format) is same
            ]
            number = max(numbers, key=self._gain)  # the first of equals
            if self._gain(number) > reached:
                reached = self._gain(number)
                yield number

    def _changes(self, number: int) -> str:
        """For each change of zone: the figure of its worst weight, and how many there are."""
        changes: dict[tuple[Zone, Zone], list[Tried]] = {}
        for t in self.tried:
            zones = zone_of(t.now, self.bands), zone_of(t.then[number], self.bands)
            if zones[1] < zones[0]:
                changes.setdefault(zones, []).append(t)
        texts = []
        for (before, after), members in sorted(changes.items(), reverse=True):
            t = members[0]
            band = _worst_band(t.now, self.bands)
            was, now = (_figure(band, getattr(m, band.metric)) for m in (t.now, t.then[number]))
            change = f"{METRICS[band.metric]} {was} -> {now}, {before.name} -> {after.name}"
            texts.append(f"{change} ({_tensors(len(members))})")
        return "; ".join(texts)

    def _scope(self) -> str:
        return f"; tried on the worst {len(self.tried)} of {self.flagged}" * (self.flagged > len(self.tried))

    def _condition(self, number: int) -> str:
        to_bf16 = self.options[number].calibration.scale_format == "bf16" != self.scale_format
        return f"; {AS_THEY_ARE}" if to_bf16 else ""

    def _keep(self, left: Sequence[Tried], quantized: Iterable[Matrix]) -> list[str]:
        """The flags that keep the groups of weights that no setting helps, and what they cost."""
        groups = sorted({group for t in left if (group := fusion_group(t.now.name))})
        if not groups:
            return []
        flags = " ".join(f"--keep_bf16 {shlex.quote(_pattern(group))}" for group in groups[:PATTERNS])
        cost = size(kept_bytes(groups, quantized))
        text = f"{flags}: {_tensors(len(left))} that no setting helps; {cost} more{self._scope()}"
        if groups[PATTERNS:]:
            text += f"; {len(groups) - PATTERNS} more such groups, which the {cost} count"
        if any(zone_of(t.now, self.bands) is Zone.FAIL for t in left):
            text += "; --keep_failing finds and keeps every group that FAILs"
        return [text]


def _tensors(count: int) -> str:
    return f"{count} tensor{'' if count == 1 else 's'}"


def _pattern(name: str) -> str:
    """A pattern that matches a name and nothing else."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in printable(name))


def kept_bytes(groups: Collection[str], quantized: Iterable[Matrix]) -> int:
    """Bytes by which the output grows when fusion groups are kept."""
    return sum(
        m.rows * m.input_row_bytes - m.weight.nbytes - m.scale.nbytes
        for m in quantized
        if fusion_group(m.weight.name) in groups
    )
