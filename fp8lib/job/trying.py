"""Passes over the input that quantize in memory, to know before writing what would FAIL, and after it what
would help."""

import math
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from fp8lib import Fp8Error
from fp8lib.calibration.statistics_file import Statistics
from fp8lib.checkpoint.headers import Shard
from fp8lib.checkpoint.layout import Matrix
from fp8lib.checkpoint.plan import Plan
from fp8lib.checkpoint.rules import fusion_group
from fp8lib.checkpoint.untrusted import printable
from fp8lib.job.progress import Progress
from fp8lib.job.ranks import Ranks
from fp8lib.numerics.modes import Calibration
from fp8lib.terminal import Talk, size
from fp8lib.verification.advice import (
    Alternative,
    Failure,
    Trials,
    Tried,
    about_unexplained,
    alternatives,
    failure_of,
    reason_of,
    unexplained,
)
from fp8lib.verification.findings import Findings
from fp8lib.verification.measurement import Measurement

_PASS = "trial"
"""What ranks call the work that comes before quantizing."""
_UNITS_PER_RANK = 20
_SMALLEST_UNIT = 16 * 1024 * 1024
"""As `streaming.units.divide`'s, but of whole matrices."""


def failing_groups(flags: Namespace, talk: Talk, ranks: Ranks, settings, plan: Plan) -> dict[str, str]:
    """Fusion groups of a plan with a member that would FAIL, and why; the same on every rank.

    Every candidate is quantized in memory, by all ranks together.

    Args:
        flags: of the run.
        talk: how to speak to the user.
        ranks: all of them.
        settings: how shards are processed: `streaming.shard_job.Settings`.
        plan: of which every matrix is a candidate.

    Raises:
        Fp8Error: NaN or infinity in a weight; every candidate would FAIL; some rank failed.
    """
    ranks.count_anew("tried bytes")
    work = _units(plan, ranks.world)
    total = sum(m.rows * m.input_row_bytes for m in plan.matrices)
    talk.warn(f"quantizing {size(total)} of weights in memory first, to see which would FAIL")
    failures = _gather(flags, ranks, settings, work, total) if ranks.is_main else None
    if failures is None:
        _help(flags, ranks, settings, work)
        kept = ranks.wait_for("kept groups")
    else:
        kept = _by_group(failures)
        ranks.publish("kept groups", kept)
    ranks.count_anew("bytes")
    if kept.keys() >= {fusion_group(m.weight.name) for m in plan.matrices}:
        raise Fp8Error(
            f"{printable(flags.input_dir)}: every weight would FAIL with {flags.calibration}; "
            "quantize it without --keep_failing or --eligibility auto to see the figures and what would help"
        )
    return kept


def _by_group(failures: Sequence[Failure]) -> dict[str, str]:
    """Why each group with a failure is kept, in the groups' order."""
    groups: dict[str, list[Failure]] = {}
    for failure in failures:
        groups.setdefault(fusion_group(failure.name), []).append(failure)
    return {group: reason_of(groups[group]) for group in sorted(groups)}


def _units(plan: Plan, ranks: int) -> list[tuple[str, Shard, list[Matrix]]]:
    """The candidates in parts for processes to take: matrices of one shard that follow each other.

    Returns:
        (label, shard of the input, matrices) of each.
    """
    total = sum(m.rows * m.input_row_bytes for m in plan.matrices)
    share = math.inf if ranks == 1 else max(total / ranks / _UNITS_PER_RANK, _SMALLEST_UNIT)
    units = []
    for shard in plan.shards:
        parts: list[list[Matrix]] = []
        held = share
        for matrix in shard.matrices:
            if held >= share:
                parts.append([])
                held = 0
            parts[-1].append(matrix)
            held += matrix.rows * matrix.input_row_bytes
        for number, part in enumerate(parts, 1):
            label = f"{shard.name} {number}/{len(parts)}" if parts[1:] else shard.name
            units.append((label, shard.source, part))
    return units


def _gather(flags: Namespace, ranks: Ranks, settings, work: Sequence, total: int) -> list[Failure]:
    """Rank 0's share of the candidates, and what all ranks find."""
    failures: list[Failure] = []
    with Progress(total, [label for label, _, _ in work], len(work), quiet=flags.quiet) as progress:

        def finished(label: str, found: Sequence) -> None:
            failures.extend(Failure(*each) for each in found)
            progress.finished(f"{label} (tried)")

        def receive() -> None:
            for label, found in ranks.new_results():
                finished(label, found)

        def on_bytes(name: str, count: int) -> None:
            if (done := ranks.progress(count)) is not None:
                progress.show(name, done)
                receive()

        for label, found in _failures(flags, ranks, settings, work, on_bytes):
            finished(label, found)
        while not (progress.is_done and ranks.all_at_work(_PASS)):
            progress.show("", ranks.look_again())
            receive()
        progress.show_all()
    return failures


def _help(flags: Namespace, ranks: Ranks, settings, work: Sequence) -> None:
    """Another rank's share of the candidates."""
    for result in _failures(flags, ranks, settings, work, lambda _, count: ranks.progress(count)):
        ranks.send_result(result)
    ranks.look()


def _failures(
    flags: Namespace, ranks: Ranks, settings, work: Sequence, on_bytes: Callable[[str, int], None]
) -> Iterator[tuple[str, list[Failure]]]:
    """(its label, what of it would FAIL) for each unit that this rank takes."""
    from fp8lib.streaming import pipeline
    from fp8lib.streaming.scheduler import ToCheck
    from fp8lib.verification.trial import Method, Trial

    method = Method(settings.convert, flags.calibration.powers_of_two)

    def trials() -> Iterator[ToCheck]:
        for label, source, matrices in ranks.share(_PASS, work):
            trial = Trial(source, matrices, (method,), settings.merge, on_bytes)
            yield ToCheck(label, source.size, trial, (source,))

    with closing(pipeline.process(trials(), flags.input_dir, settings)) as results:
        for done in results:
            done.check.refuse_broken()
            measured = (m for (m,) in done.check.measurements().values())
            yield done.name, [f for m in measured if (f := failure_of(m, flags.bands)) is not None]


# --- what would help ---------------------------------------------------------------------------

_MOST = 32
"""Weights that are not GOOD on which alternatives are tried, and"""
_MOST_NUMBERS = 1 << 28
"""how many numbers these hold together at most, if they are several: 40 s of one core for all alternatives,
which take 30 ns per weight each with BF16 scales (measured, 8 matrices of 2048 x 4096)."""
_OTHERS = 4
"""GOOD weights of lowest cosine, and of largest error, that an alternative must leave GOOD."""

Source = tuple[Shard, Matrix]
"""A shard of the input, and a weight as a matrix of it."""


def measured_advice(
    flags: Namespace,
    talk: Talk,
    settings,
    sources: Callable[[], Iterable[Source]],
    used: Calibration | None,
    found: Findings,
) -> list[str]:
    """Try other settings on weights that are not GOOD, in memory, and say what helps.

    Args:
        flags: of the run.
        talk: how to speak to the user.
        settings: how shards are processed: `streaming.shard_job.Settings`.
        sources: gives every FP8 weight.
        used: how the scales were chosen; None if nobody knows.
        found: judged.

    Raises:
        Fp8Error: the input cannot be read.
    """
    flagged = [m for _, m in found.health.flagged]
    wrong = unexplained(flagged, used) if found.finished else []
    said = [about_unexplained(wrong)] if wrong else []
    known = {matrix.weight.name: (shard, matrix) for shard, matrix in sources()}
    others = {m.name for m in wrong}
    flagged = [m for m in flagged if m.name in known and m.name not in others and m.output is None]
    if not flagged:
        return said
    chosen = _affordable([(m, known[m.name][1]) for m in flagged[:_MOST]])
    others = _closest_to_a_limit(found)
    scale_format = "ue8m0" if found.calibration.powers_of_two else "bf16"
    options = alternatives(used, replace(used or flags.calibration, scale_format=scale_format))
    talk.warn(f"trying {len(options)} other settings on {len(chosen)} tensors that are not GOOD")
    then = _try_options(flags, settings, [known[m.name] for m in (*chosen, *others)], options)
    tried, controls = ([Tried(m, tuple(then[m.name])) for m in part] for part in (chosen, others))
    trials = Trials(tried, controls, options, scale_format, len(flagged), found.bands)
    return said + trials.recommendations(matrix for _, matrix in known.values())


def _affordable(flagged: Sequence[tuple[Measurement, Matrix]]) -> list[Measurement]:
    """The first of some weights, as many as are tried."""
    chosen, held = [], 0
    for m, matrix in flagged:
        held += matrix.rows * matrix.columns
        if chosen and held > _MOST_NUMBERS:
            break
        chosen.append(m)
    return chosen


def _closest_to_a_limit(found: Findings) -> list[Measurement]:
    """GOOD weights that another setting could make worse."""
    flagged = {m.name for _, m in found.health.flagged}
    good = [m for m in found.measurements if m.output is None and m.name not in flagged]
    by_cosine = sorted(good, key=lambda m: m.cosine)[:_OTHERS]
    by_error = sorted(good, key=lambda m: -m.max_abs)[:_OTHERS]
    return list({m.name: m for m in (*by_cosine, *by_error)}.values())


def _try_options(
    flags: Namespace, settings, sources: Sequence[Source], options: Sequence[Alternative]
) -> dict[str, list[Measurement]]:
    """What each weight would lose under each option, by its name."""
    from fp8lib.streaming import pipeline
    from fp8lib.streaming.convert import Nearest
    from fp8lib.streaming.scheduler import ToCheck
    from fp8lib.verification.trial import Method, Trial

    importance = settings.convert.importance
    if importance is None and flags.activation_stats is not None:  # of a mode that does not look at it
        importance = Statistics(flags.activation_stats).importance
    methods = [
        Method(
            Nearest(each.calibration, importance if each.calibration.uses_activations else None),
            each.calibration.powers_of_two,
        )
        for each in options
    ]
    shards: dict[Path, tuple[Shard, list[Matrix]]] = {}
    for shard, matrix in sources:
        shards.setdefault(shard.path, (shard, []))[1].append(matrix)
    work = [
        ToCheck(shard.name, shard.size, Trial(shard, matrices, methods, settings.merge), (shard,))
        for shard, matrices in shards.values()
    ]
    found: dict[str, list[Measurement]] = {}
    with closing(pipeline.process(work, flags.input_dir, settings)) as results:
        for done in results:
            found |= done.check.measurements()
    return found
