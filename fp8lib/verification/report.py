"""Prints the summary of a run."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from fp8lib.checkpoint.untrusted import printable
from fp8lib.terminal import WIDTH, Printer
from fp8lib.verification import output_error
from fp8lib.verification.findings import Findings
from fp8lib.verification.health import COSINE, MAX_ABS, MEAN_ABS, Band, Health, Measurement, Zone, max_or_nan
from fp8lib.verification.loading import print_loading

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
    printer.line(f"  Spot-checked        : {len(measurements)} of {found.totals.fp8}  ({marks})")
    if outputs := [m.output for m in measurements if m.output is not None]:
        printer.line(f"  Output error        : {output_error.summary(outputs)}")
        repeated = sum(each.repeated == 1 for each in outputs)
        printer.line(f"  Rounding repeated   : in {repeated} of {len(outputs)} tensors, code for code")
    by_bands = [m for m in measurements if m.output is None]
    if by_bands:
        _print_metrics(printer, by_bands)
    if measurements:
        _print_served(printer, measurements, found.calibration.powers_of_two)
    print_problems(printer, found.problems)
    _print_flagged(printer, health)
    _print_verdict(printer, health)


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


def _print_metrics(printer: Printer, measurements: Sequence[Measurement]) -> None:
    count = len(measurements)
    rows: list[tuple[str, Band, float, str, str]] = [
        ("cosine sim", COSINE, sum(m.cosine for m in measurements) / count, "0.9997–1.0000", "≥ 0.9995"),
        ("mean abs err", MEAN_ABS, sum(m.mean_abs for m in measurements) / count, "0.0002–0.0008", "≤ 0.001"),
        ("worst cosine", COSINE, -max_or_nan(-m.cosine for m in measurements), "0.9997–1.0000", "≥ 0.9995"),
        ("worst MAE", MEAN_ABS, max_or_nan(m.mean_abs for m in measurements), "0.0002–0.0008", "≤ 0.001"),
        ("worst MaxAE", MAX_ABS, max_or_nan(m.max_abs for m in measurements), "0.002–0.01", "≤ 0.02"),
    ]  # fmt: skip
    printer.line("-" * WIDTH)
    printer.line(f"  {'metric':<14}{'mean value':<12}{'typical range':<15}{'band':<12}hard limit")
    printer.line("  " + "-" * (WIDTH - 2))
    for label, band, value, typical, hard in rows:
        zone = band.zone(value)
        # Padded by what is visible: colour codes take no room on the screen.
        mark = printer.mark(zone, zone.name) + " " * (10 - len(zone.name))
        printer.line(f"  {label:<14}{value:<12.6f}{typical:<15}{mark}{hard}")


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
    if health.flagged:
        printer.line("-" * WIDTH)
        printer.line("  Not GOOD, worst first         cosine    mean abs   max abs")
        for zone, m in health.flagged[:LISTED]:
            printer.line(f"  {printer.mark(zone)} {printable(m.name)}")
            printer.line(f"{'':<32}{m.cosine:<10.6f}{m.mean_abs:<11.6f}{m.max_abs:.5f}")
        if health.flagged[LISTED:]:
            rest = Counter(z for z, _ in health.flagged[LISTED:])
            printer.line("  … and " + ", ".join(f"{n} more {z.name}" for z, n in rest.items()))
