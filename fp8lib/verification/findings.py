"""What a run has found out about a directory: what summary, reports and advice are made of."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fp8lib.checkpoint.plan import Plan
from fp8lib.checkpoint.tensor_parallel import Size
from fp8lib.numerics.modes import Calibration
from fp8lib.verification.bands import BANDS, Bands
from fp8lib.verification.health import Health
from fp8lib.verification.measurement import Measurement


@dataclass(frozen=True, slots=True)
class Totals:
    """Numbers of shards, of those with structural problems, of FP8 weights and of other tensors, and of
    weights that adapters change."""

    shards: int
    failed: int
    fp8: int
    passthrough: int
    merged: int = 0

    @classmethod
    def of(cls, plan: Plan, failed: int) -> "Totals":
        """Of a run that wrote a plan."""
        fp8 = sum(len(s.matrices) for s in plan.shards)
        merged = len(plan.adapters.changes) if plan.adapters else 0
        return cls(len(plan.shards), failed, fp8, len(plan.kept), merged)


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """The facts about one directory that was made, or checked by `--verify_only`.

    Attributes:
        totals: what is in it.
        measurements: of the matrices that were checked.
        problems: structural deviations, one line each.
        calibration: how the scales were chosen, as far as known; of another tool's files only the scale
            format is known.
        label: what the summary calls the calibration.
        covered: quantized tensors with activation statistics; None if there was no file.
        loading: weights per GPU by tensor-parallel size, or the key that config.json lacks.
        finished: whether the directory was made before, perhaps by another tool (`--verify_only`).
        damaged: names of shards in which codes or scales are not what this tool gives.
        bands: those in force.
        adapters: fingerprints of what was merged before, in its order.
        kept_failing: (fusion group, why) of those that stay as they are because a weight would FAIL.
        looked_at: share of the directory's bytes that was compared, 0 to 1; None where that is unknown.
        health: the verdict; None if verification was skipped.
    """

    totals: Totals
    measurements: Sequence[Measurement]
    problems: Sequence[str]
    calibration: Calibration
    label: str
    covered: int | None
    loading: Sequence[Size] | str
    finished: bool = False
    damaged: Sequence[str] = ()
    bands: Bands = BANDS
    adapters: Sequence[str] = ()
    kept_failing: Sequence[tuple[str, str]] = ()
    looked_at: float | None = None
    health: Health | None = None

    @property
    def all_checked(self) -> bool:
        """Whether every FP8 weight was measured."""
        return len(self.measurements) == self.totals.fp8


def kind_of(name: str) -> str:
    """What modules of a kind have in common: `q_proj`, `experts.down_proj`, `shared_expert.up_proj`."""
    *path, last = name.removesuffix(".weight").split(".")
    parent = next((part for part in reversed(path) if not part.isdecimal()), "")
    return f"{parent}.{last}" if parent in ("experts", "shared_expert") else last


def by_kind(measurements: Iterable[Measurement]) -> dict[str, list[Measurement]]:
    """Measurements of each kind of module, in the order of the kinds' names."""
    found: dict[str, list[Measurement]] = {}
    for m in measurements:
        found.setdefault(kind_of(m.name), []).append(m)
    return dict(sorted(found.items()))


def quantiles(values: Iterable[float], higher_is_better: bool) -> tuple[float, float, float]:
    """Median, the value that 99 % are not worse than, and the worst; NaN is the worst.

    Of n values from the best to the worst the one at ceil(p * n), so that each is a value that is there.
    """
    sign = -1 if higher_is_better else 1
    ordered = sorted(values, key=lambda v: math.inf if math.isnan(v) else sign * v)
    p50, p99 = (ordered[math.ceil(p * len(ordered) / 100) - 1] for p in (50, 99))
    return p50, p99, ordered[-1]
