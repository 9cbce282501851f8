"""What can be done about weights that are not GOOD, from what was measured when it was tried. No files here.

A recommendation names what to type, what it changes for the worst of the weights it was tried on, and for how
many of these the zone. Whatever would make another weight's zone worse is not recommended.
"""

import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from fp8lib.checkpoint.layout import Matrix
from fp8lib.checkpoint.rules import fusion_group
from fp8lib.checkpoint.untrusted import printable
from fp8lib.numerics.modes import PHASES, Calibration
from fp8lib.terminal import size
from fp8lib.verification.health import BANDS, COSINE, Band, Measurement, Zone, zone_of

METRICS = {"cosine": "cosine", "mean_abs": "mean abs err", "max_abs": "max abs err"}
"""What a person calls a band's metric."""
PATTERNS = 8
"""`--keep_bf16` flags that a recommendation spells out."""
AS_THEY_ARE = "for engines that take scales as they are (docs/formats.md)"


# --- what would FAIL ---------------------------------------------------------------------------


class Failure(NamedTuple):
    """A weight that would FAIL: its name, its cosine, and what is outside its hard limit."""

    name: str
    cosine: float
    text: str


def failure_of(m: Measurement) -> Failure | None:
    """What to say of a weight that would FAIL; None for any other."""
    if zone_of(m) is not Zone.FAIL:
        return None
    if m.output is not None:
        return Failure(m.name, m.cosine, "changes its outputs more than rounding to nearest")
    band = _worst_band(m)
    value = getattr(m, band.metric)
    return Failure(m.name, m.cosine, f"{METRICS[band.metric]} {value:.4g}, limit {band.hard:g}")


def reason_of(failures: Sequence[Failure]) -> str:
    """Why a fusion group is kept: its worst weight, and how many more would FAIL."""
    worst = min(failures, key=lambda f: (COSINE.badness(f.cosine), f.name))
    more = f" and {len(failures) - 1} more" if failures[1:] else ""
    return f"would FAIL: {printable(worst.name)} ({worst.text}){more}"


def _worst_band(m: Measurement) -> Band:
    """The first of the bands that give a weight its zone."""
    return max(BANDS, key=lambda band: band.zone(getattr(m, band.metric)))


# --- what would help ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Alternative:
    """Another way to choose scales, and the flags that ask for it."""

    calibration: Calibration
    flags: str


@dataclass(frozen=True, slots=True)
class Tried:
    """A weight as it is in the files, and what each alternative would make of it."""

    now: Measurement
    then: tuple[Measurement, ...]

    @property
    def zone(self) -> Zone:
        return zone_of(self.now)


def alternatives(used: Calibration | None, given: Calibration) -> list[Alternative]:
    """What to try, the same scale format first.

    Args:
        used: how the scales were chosen; None if nobody knows.
        given: the flags' calibration, with the files' scale format.
    """
    formats = sorted(("ue8m0", "bf16"), key=lambda each: each != given.scale_format)
    found = []
    for scale_format in formats:
        for mode in ("mse", "rms", "max"):
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


def recommend(
    tried: Sequence[Tried],
    others: Sequence[Tried],
    options: Sequence[Alternative],
    scale_format: str,
    flagged: int,
    quantized: Iterable[Matrix],
) -> list[str]:
    """Recommendations, in words.

    Args:
        tried: weights that are not GOOD, worst first.
        others: GOOD ones that an alternative must leave so.
        options: what was tried on all of them, in the order of `Tried.then`.
        scale_format: of the files.
        flagged: weights that are not GOOD; those beyond `tried` were not tried.
        quantized: every FP8 weight, for what keeping one costs.
    """
    if not tried:
        return []
    scope = f" (tried on the {len(tried)} worst of {flagged})" if flagged > len(tried) else ""
    best: list[tuple[int, int]] = []  # (gain, number of the option)
    for same_format in (True, False):
        gains = [
            (_gain(number, tried, others), -number)
            for number, option in enumerate(options)
            if (option.calibration.scale_format == scale_format) is same_format
        ]
        gain, number = max(gains, default=(0, 0))
        if gain > max((g for g, _ in best), default=0):
            best.append((gain, -number))
    found = []
    for _, number in best:
        option = options[number]
        condition = f"; {AS_THEY_ARE}" if option.calibration.scale_format == "bf16" != scale_format else ""
        found.append(f"{option.flags}: {_changes(number, tried)}{scope}{condition}")
    left = [t for t in tried if all(zone_of(t.then[number]) >= t.zone for _, number in best)]
    return found + _keep(left, quantized, scope)


def _gain(number: int, tried: Sequence[Tried], others: Sequence[Tried]) -> int:
    """Zones by which an alternative helps, in all; 0 if it makes any weight's zone worse."""
    steps = [t.zone - zone_of(t.then[number]) for t in (*tried, *others)]
    return 0 if min(steps) < 0 else sum(steps)


def _changes(number: int, tried: Sequence[Tried]) -> str:
    """What an alternative changes: for each change of zone its worst weight's figure, and how many."""
    changes: dict[tuple[Zone, Zone], list[Tried]] = {}
    for t in tried:
        if (after := zone_of(t.then[number])) < t.zone:
            changes.setdefault((t.zone, after), []).append(t)
    texts = []
    for (before, after), members in sorted(changes.items(), reverse=True):
        t = members[0]
        band = _worst_band(t.now)
        was, now = (getattr(m, band.metric) for m in (t.now, t.then[number]))
        figures = f"{METRICS[band.metric]} {_figure(band, was)} -> {_figure(band, now)}"
        count = f"{len(members)} tensor{'s' if members[1:] else ''}"
        texts.append(f"{figures}, {before.name} -> {after.name} ({count})")
    return "; ".join(texts)


def _figure(band: Band, value: float) -> str:
    return f"{value:.6f}" if band is COSINE else f"{value:.3g}"


def _keep(left: Sequence[Tried], quantized: Iterable[Matrix], scope: str) -> list[str]:
    """Flags that keep the groups of weights that no setting helps, and what that costs."""
    groups = sorted({group for t in left if (group := fusion_group(t.now.name))})
    if not groups:
        return []
    cost = kept_bytes(groups, quantized)
    total = size(sum(cost.values()))
    flags = " ".join(f"--keep_bf16 {shlex.quote(_pattern(group))}" for group in groups[:PATTERNS])
    tensors = f"{len(left)} tensor{'s' if left[1:] else ''} that no setting helps"
    if not groups[PATTERNS:]:
        return [f"{flags}: {tensors}; {total} more{scope}"]
    failing = sum(t.zone is Zone.FAIL for t in left)
    rest = f", and so on for {len(groups) - PATTERNS} more groups"
    every = "; --keep_failing finds and keeps all groups that FAIL" if failing else ""
    return [f"{flags}{rest}: {tensors}; {total} more{scope}{every}"]


def _pattern(name: str) -> str:
    """A pattern that matches a name and nothing else."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def kept_bytes(groups: Collection[str], quantized: Iterable[Matrix]) -> Mapping[str, int]:
    """Bytes that the output grows by when fusion groups are kept, by group."""
    found = dict.fromkeys(groups, 0)
    for m in quantized:
        if (group := fusion_group(m.weight.name)) in found:
            found[group] += m.rows * m.input_row_bytes - m.weight.nbytes - m.scale.nbytes
    return found
