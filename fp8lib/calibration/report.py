"""What a calibration run shows: progress while it runs, and the closing summary."""

import sys
import textwrap
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from statistics import median

from tqdm import tqdm

from fp8lib.calibration.coverage import ENOUGH, Coverage
from fp8lib.health import Zone
from fp8lib.ranks import Ranks
from fp8lib.report import WIDTH, Printer


class Progress(AbstractContextManager):
    """A bar over prompts with the tokens per second; a line now and then where there is no terminal.

    Args:
        total: prompts of all ranks, times layers if they pass through one layer at a time.
        label: shown in front.
        quiet: show nothing.
        ranks: whose progress this is.
    """

    _INTERVAL = 5.0  # seconds between lines

    def __init__(self, total: int, label: str, quiet: bool, ranks: Ranks) -> None:
        self._plain = not quiet and not sys.stderr.isatty()
        self._label, self._ranks = label, ranks
        self._mine = self._tokens = self._done = 0
        self._started = time.monotonic()
        self._shown = self._started - self._INTERVAL  # the first line at once, as a sign of life
        self._bar = tqdm(
            total=total,
            desc=label,
            unit=" prompts",
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {n}/{total} [{elapsed}<{remaining}{postfix}]",
            disable=quiet or self._plain,
            file=sys.stderr,
            dynamic_ncols=True,
        )
        self._total = total

    def label(self, text: str) -> None:
        """Say what is going on now."""
        self._label = text
        self._bar.set_description_str(text, refresh=False)

    def advance(self, prompts: int, tokens: int) -> None:
        """Some prompts are done here; `tokens` passed through the model for them.

        Raises:
            Fp8Error: another rank failed.
        """
        self._mine += prompts
        self._tokens += tokens
        if (done := self._ranks.progress(prompts)) is not None:
            self._show(done)

    def show(self) -> None:
        """What all ranks have done by now."""
        self._show(self._ranks.look())

    def _show(self, done: int) -> None:
        now = time.monotonic()
        tokens = self._tokens * done / max(self._mine, 1)  # others' prompts are as long as this one's
        rate = f"{tokens / max(now - self._started, 1e-9):,.0f} tokens/s"
        self._bar.set_postfix_str(rate, refresh=False)
        self._bar.update(done - self._done)
        last = done == self._total != self._done
        self._done = done
        if self._plain and (now - self._shown > self._INTERVAL or last):
            self._shown = now
            print(f"{self._label}: {done}/{self._total}, {rate}", file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        self._bar.close()


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
