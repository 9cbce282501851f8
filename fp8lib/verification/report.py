"""Prints the summary of a run."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from fp8lib.checkpoint.untrusted import printable
from fp8lib.terminal import WIDTH, Printer
from fp8lib.verification import output_error
from fp8lib.verification.bands import BANDS, Band, Bands, Reason, Zone, judge_tensor
from fp8lib.verification.findings import Findings, by_kind, quantiles
from fp8lib.verification.health import Health
from fp8lib.verification.loading import print_loading
from fp8lib.verification.measurement import Measurement, max_or_nan

REQUANTIZED = (
    "Some engines quantize the weights again while they load them, with power-of-two scales: vLLM on Hopper "
    "all but the routed experts, SGLang on Blackwell (docs/formats.md). With --scale_format ue8m0 that "
    "changes nothing."
)
FLOOR = (
    "Engines that quantize the weights again while they load them (docs/formats.md) take no block's largest "
    "weight for smaller than 0.0001; below that their scales are larger than those in the files."
)
LISTED = 10
"""WARN and FAIL tensors that are listed one by one."""


def print_summary(printer: Printer, found: Findings) -> None:
    """The summary, verdict and advice included."""
    _print_totals(printer, found)
    _print_kept(printer, found.kept_failing)
    print_loading(printer, found.loading)
    health, measurements = found.health, found.measurements
    if health is None:
        printer.line("  Spot-checked        : 0  (verification skipped)")
        printer.line("-" * WIDTH)
        printer.line("  NOT VERIFIED: --skip_verify was given.")
        printer.line("=" * WIDTH)
        return
    marks = "  ".join(printer.mark(z, f"{health.counts[z]} {z.name}") for z in Zone)
    checked = f"{'Checked' if found.all_checked else 'Spot-checked':<20}"
    printer.line(f"  {checked}: {len(measurements)} of {found.totals.fp8}  ({marks})")
    if found.looked_at is not None:
        printer.line(f"  Bytes looked at     : {_share(found.looked_at)} of the shards")
    if outputs := [m.output for m in measurements if m.output is not None]:
        printer.line(f"  Output error        : {output_error.summary(outputs)}")
        repeated = sum(each.repeated == 1 for each in outputs)
        printer.line(f"  Rounding repeated   : in {repeated} of {len(outputs)} tensors, code for code")
    by_bands = [m for m in measurements if m.output is None]
    if by_bands:
        _print_codes(printer, found)
        _print_metrics(printer, by_bands, found.bands)
    if measurements:
        _print_served(printer, measurements, found.calibration.powers_of_two)
    if by_bands and found.all_checked:
        _print_kinds(printer, by_bands)
    print_problems(printer, found.problems)
    _print_flagged(printer, health)
    _print_verdict(printer, health)


def _share(share: float) -> str:
    """100 % only for all of it."""
    return "100 %" if share == 1 else f"{math.floor(share * 1000) / 10:.1f} %"


def _print_verdict(printer: Printer, health: Health) -> None:
    printer.line("-" * WIDTH)
    printer.line(f"  VERDICT: {printer.mark(health.verdict, health.verdict.name)}")
    printer.wrapped(health.statement)
    if health.recommendations:
        printer.line()
        printer.line("  CALIBRATION RECOMMENDATIONS")
        for number, text in enumerate(health.recommendations, 1):
            printer.wrapped(text, f"  {number}. ", "     ")
    printer.line("=" * WIDTH)


def _print_totals(printer: Printer, found: Findings) -> None:
    totals = found.totals
    printer.line("=" * WIDTH)
    printer.line("  QUANTIZATION VERIFICATION SUMMARY")
    printer.line(f"  Calibration         : {found.label}")
    if found.covered is not None:
        printer.line(f"  Activation stats    : {found.covered} of {totals.fp8} tensors")
    if totals.merged:
        printer.line(f"  Adapters merged     : into {totals.merged} weights")
    printer.line("-" * WIDTH)
    printer.line(f"  Shards processed    : {totals.shards}  ({totals.failed} failed)")
    printer.line(f"  FP8 weight tensors  : {totals.fp8}")
    printer.line(f"  Passthrough tensors : {totals.passthrough}")


def _print_kept(printer: Printer, kept: Sequence[tuple[str, str]]) -> None:
    """The first fusion groups that stay as they are because they would FAIL, and why."""
    if kept:
        printer.line(f"  Kept, would FAIL    : {len(kept)} groups of weights that engines load as one")
        for group, why in kept[:LISTED]:
            printer.line(f"    {printable(group)}")
            printer.wrapped(printable(why), "      ", "      ")
        if kept[LISTED:]:
            printer.line(f"    … and {len(kept) - LISTED} more, in fp8_quantization.json")


_TYPICAL = {
    "cosine": "0.9997–1.0000",
    "mean_abs": "0.0002–0.0008",
    "max_abs": "0.002–0.01",
    "zero_share": "0–0.001",
    "bulk_error": "0.02–0.05",
}
"""Of sound models, in their GOOD bands."""


def _print_metrics(printer: Printer, measurements: Sequence[Measurement], bands: Bands) -> None:
    printer.line("-" * WIDTH)
    printer.line(f"  {'metric':<14}{'mean value':<12}{'typical range':<15}{'band':<12}hard limit")
    printer.line("  " + "-" * (WIDTH - 2))
    judged = [judge_tensor(m, bands).zones for m in measurements]
    rows = (
        ("cosine sim", bands.cosine, _mean),
        ("mean abs err", bands.mean_abs, _mean),
        ("worst cosine", bands.cosine, None),
        ("worst MAE", bands.mean_abs, None),
        ("worst MaxAE", bands.max_abs, None),
        ("worst zeroed", bands.zero_share, None),
        ("worst bulk", bands.bulk_error, None),
    )
    for label, band, combined in rows:
        values = [getattr(m, band.metric) for m in measurements]
        value = combined(values) if combined else _worst(band, values)
        worst = max(zones[band.metric] for zones in judged)  # by the rules that tensors are judged by
        _print_metric(printer, label, band, value, min(worst, band.zone(value)))
    best = [m.vs_best for m in measurements]
    printer.line(f"  {'vs best':<14}{_mean(best):<12.4f}worst {max_or_nan(best):.4f}")


def _print_metric(printer: Printer, label: str, band: Band, value: float, zone: Zone) -> None:
    sign = "≥" if band.higher_is_better else "≤"
    usual = band == getattr(BANDS, band.metric)
    range_ = _TYPICAL[band.metric] if usual else f"{sign} {band.good:g}"
    # Padded by what is visible: colour codes take no room on the screen.
    mark = printer.mark(zone, zone.name) + " " * (10 - len(zone.name))
    printer.line(f"  {label:<14}{value:<12.6f}{range_:<15}{mark}{sign} {band.hard:g}")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _worst(band: Band, values: Sequence[float]) -> float:
    return -max_or_nan(-v for v in values) if band.higher_is_better else max_or_nan(values)


def _print_codes(printer: Printer, found: Findings) -> None:
    """How many codes are the nearest, and tensors that are GOOD because no scale is better."""
    by_bands = [m for m in found.measurements if m.output is None]
    wrong, count = sum(m.not_nearest for m in by_bands), sum(m.weights for m in by_bands)
    printer.line(f"  Codes not nearest   : {wrong:,} of {count:,}")
    if limit := found.health.reasons[Reason.AT_LIMIT]:
        printer.line(f"  At the limit of E4M3: {limit} of {len(by_bands)} tensors")
    if changed := found.bands.changed():
        printer.line(f"  Bands set           : {' '.join(changed)}")


def _print_kinds(printer: Printer, measurements: Sequence[Measurement]) -> None:
    """p50, p99 and worst cosine for each kind of module; of `n` values p99 is the one at ceil(0.99 n)."""
    kinds = by_kind(measurements)
    width = max(map(len, kinds))
    printer.line("-" * WIDTH)
    printer.line(f"  {'':<{width}}        {'cosine':<30}max abs")
    printer.line(f"  {'kind':<{width}}  {'n':<6}{'p50':<10}{'p99':<10}{'worst':<10}worst")
    for kind, own in kinds.items():
        p50, p99, worst = quantiles([m.cosine for m in own], higher_is_better=True)
        largest = max_or_nan(m.max_abs for m in own)
        values = "".join(f"{value:<10.6f}" for value in (p50, p99, worst))
        printer.line(f"  {kind:<{width}}  {len(own):<6}{values}{largest:.5f}")


def _print_served(printer: Printer, measurements: Sequence[Measurement], powers_of_two: bool) -> None:
    """What becomes of the errors in engines that requantize the weights."""
    count, changed = len(measurements), sum(m.requantized for m in measurements)
    printer.line("-" * WIDTH)
    if not changed:
        printer.line("  As served (UE8M0)   : as written, in every weight that was checked")
        return
    printer.line(f"  As served (UE8M0)   : {changed:,} of the checked weights change")
    printer.line(f"    {'metric':<18}{'as written':<14}as served")

    def row(label: str, field: str, combined: Callable[[Iterable[float]], float]) -> None:
        values = (combined(getattr(m, prefix + field) for m in measurements) for prefix in ("", "served_"))
        printer.line(f"    {label:<18}" + "".join(f"{value:<14.6f}" for value in values).rstrip())

    row("relative error", "relative", lambda values: sum(values) / count)
    row("cosine sim", "cosine", lambda values: sum(values) / count)
    row("worst cosine", "cosine", lambda values: -max_or_nan(-v for v in values))
    row("worst MAE", "mean_abs", max_or_nan)
    row("worst MaxAE", "max_abs", max_or_nan)
    printer.wrapped(FLOOR if powers_of_two else REQUANTIZED, "    ", "    ")


def print_problems(printer: Printer, problems: Sequence[str]) -> None:
    """The first structural deviations, one line each."""
    if problems:
        printer.line("-" * WIDTH)
        for problem in problems[:LISTED]:
            printer.line(f"  {printer.mark(Zone.FAIL)} {problem}")
        if problems[LISTED:]:
            printer.line(f"  … and {len(problems) - LISTED} more")


def _print_flagged(printer: Printer, health: Health) -> None:
    if flagged := health.to_mend:
        printer.line("-" * WIDTH)
        printer.line("  Not GOOD, worst first         cosine    mean abs   max abs")
        for judgement, m in flagged[:LISTED]:
            printer.line(f"  {printer.mark(judgement.zone)} {printable(m.name)}")
            printer.line(f"{'':<32}{m.cosine:<10.6f}{m.mean_abs:<11.6f}{m.max_abs:.5f}")
        if flagged[LISTED:]:
            rest = Counter(j.zone for j, _ in flagged[LISTED:])
            printer.line("  … and " + ", ".join(f"{n} more {z.name}" for z, n in rest.items()))
