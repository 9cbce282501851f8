"""What a calibration run shows: progress while it runs, and the closing summary."""

import textwrap
from collections.abc import Mapping
from statistics import median

from fp8lib.calibration.coverage import ENOUGH, Coverage
from fp8lib.terminal import WIDTH, Printer
from fp8lib.verification.health import Zone


def print_summary(printer: Printer, coverage: Coverage, facts: Mapping[str, str]) -> None:
    """The closing summary.

    Args:
        printer: where to.
        coverage: what the statistics rest on.
        facts: what else to say about the run: label -> value.
    """

    def row(label: str, value: str) -> None:
        # Paths and tensor names stay whole, to be copied from the screen.
        for line in textwrap.wrap(value, WIDTH - 8, break_long_words=False, break_on_hyphens=False):
            printer.line(f"  {label:<20}: {line}" if label else " " * 24 + line)
            label = ""

    printer.line("=" * WIDTH)
    printer.line("  ACTIVATION STATISTICS SUMMARY")
    printer.line("-" * WIDTH)
    for label, value in facts.items():
        row(label, value)
    row("Weights recorded", f"{coverage.recorded:,} of {coverage.weights:,}")
    if coverage.layers:
        least = coverage.least_fed
        printer.line("-" * WIDTH)
        row("Experts", f"{coverage.experts:,} in {len(coverage.layers)} layers")
        row("  saw no token", f"{coverage.unseen:,}")
        row(f"  saw fewer than {ENOUGH}", f"{coverage.starved:,} (these take their layer's statistics)")
        row("Least-fed layer", least.name)
        starved = f"{least.starved} of {len(least.tokens)} experts under {ENOUGH} tokens"
        row("", f"{starved}, median {median(least.tokens):,g}")
    printer.line("-" * WIDTH)
    advice = coverage.advice()
    zone, word = (Zone.WARN, "POOR") if advice else (Zone.GOOD, "GOOD")
    printer.line(f"  COVERAGE: {printer.mark(zone, word)}")
    if advice:
        printer.wrapped(advice)
    printer.line("=" * WIDTH)
