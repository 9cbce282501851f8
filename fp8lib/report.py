"""Prints what health says: the plan of a dry run, the summary of a run, and progress."""

import os
import sys
import textwrap
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TextIO

from tqdm import tqdm

from fp8lib.checkpoint import printable
from fp8lib.health import (
    COSINE,
    MAX_ABS,
    MEAN_ABS,
    Band,
    Health,
    Measurement,
    Zone,
    max_or_nan,
)
from fp8lib.plan import Plan

WIDTH = 64
LISTED = 10
"""WARN and FAIL tensors that are listed one by one."""

_MARKS = {Zone.GOOD: "✔", Zone.WARN: "⚠", Zone.FAIL: "✘"}
_ASCII_MARKS = {Zone.GOOD: "+", Zone.WARN: "!", Zone.FAIL: "x"}
_COLOURS = {Zone.GOOD: "32", Zone.WARN: "33", Zone.FAIL: "31"}
_ASCII = str.maketrans({"≥": ">=", "≤": "<=", "–": "-", "…": "...", "≈": "~"})


class Printer:
    """Writes to a stream what it can show: colour on a terminal, ASCII where glyphs are missing."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.colour = stream.isatty() and not os.environ.get("NO_COLOR")
        try:
            "".join((*_MARKS.values(), "≥–…")).encode(stream.encoding or "ascii")
            self.unicode = True
        except (UnicodeEncodeError, LookupError):
            self.unicode = False

    def line(self, text: str = "") -> None:
        if not self.unicode:
            text = text.translate(_ASCII).encode("ascii", "backslashreplace").decode()
        try:
            print(text, file=self.stream, flush=True)
        except BrokenPipeError:
            # Whoever was reading (`| head`) has seen enough; what was done stays done.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def mark(self, zone: Zone, text: str = "") -> str:
        """A zone's glyph and text, coloured."""
        text = f"{(_MARKS if self.unicode else _ASCII_MARKS)[zone]} {text}".rstrip()
        return f"\033[{_COLOURS[zone]}m{text}\033[0m" if self.colour else text

    def wrapped(self, text: str, first: str = "  ", rest: str = "  ") -> None:
        for line in textwrap.wrap(
            text, WIDTH + 12, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False
        ):
            self.line(line)


def size(nbytes: int) -> str:
    """Bytes for a person: 8.59 GB."""
    return tqdm.format_sizeof(nbytes, "B", 1000)


# --- progress ----------------------------------------------------------------------------------


class Progress(AbstractContextManager):
    """A bar over input bytes on a terminal, a plain line per shard elsewhere; nothing if quiet.

    Args:
        total: input bytes to quantize.
        shards: to quantize or verify.
        quiet: whether to show nothing.
    """

    def __init__(self, total: int, shards: int, quiet: bool) -> None:
        # A terminal without a width, as some job runners give, cannot show a bar either.
        bar = sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0
        self._plain = not quiet and not (bar and total)  # verification alone has no input to count
        self._shards, self._done = shards, 0
        self._bar = tqdm(
            total=total,
            unit="B",
            unit_scale=True,
            disable=quiet or self._plain,
            file=sys.stderr,
            dynamic_ncols=True,
        )

    @property
    def done(self) -> int:
        """Shards finished."""
        return self._done

    def show(self, shard: str, total: int) -> None:
        """Bytes done so far, and the shard under way, "" for the one before."""
        if shard:
            self._bar.set_description_str(shard, refresh=False)
        self._bar.update(total - self._bar.n)

    def finished(self, name: str) -> None:
        self._done += 1
        if self._plain:
            print(f"[{self._done}/{self._shards}] {name}", file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        self._bar.close()


# --- dry run -----------------------------------------------------------------------------------


def print_plan(plan: Plan, printer: Printer) -> None:
    """What a run would do: what is quantized, what is kept and why, per shard, in total."""
    matrices = list(plan.matrices)
    printer.line("=" * WIDTH)
    printer.line("  QUANTIZATION PLAN (dry run, nothing written)")
    printer.line("-" * WIDTH)
    printer.line("  Quantized to FP8 E4M3, one BF16 scale per 128x128 block")
    kinds: dict[str, list] = defaultdict(list)
    for matrix in matrices:
        kinds[_kind(matrix.weight.name)].append(matrix)
    for kind, members in sorted(kinds.items()):
        shapes = Counter(f"[{m.rows}, {m.columns}]" for m in members)
        shape = next(iter(shapes)) + (" and others" if len(shapes) > 1 else "")
        printer.line(f"  {len(members):>6}  {printable(kind.removesuffix('.weight'))}  {shape}")
    printer.line("  Kept as they are")
    reasons: dict[str, list] = defaultdict(list)
    for kept in plan.kept:
        reasons[kept.reason].append(kept.tensor)
    for reason, tensors in sorted(reasons.items(), key=lambda item: -sum(t.nbytes for t in item[1])):
        total = sum(t.nbytes for t in tensors)
        printer.wrapped(reason, f"  {len(tensors):>6}  {size(total):>8}  ", " " * 20)
        names = sorted({_kind(t.name) for t in tensors})
        shown = ", ".join(map(printable, names[:4])) + (", …" if names[4:] else "")
        printer.wrapped(shown, " " * 10, " " * 10)
    printer.line("-" * WIDTH)
    for shard in plan.shards:
        printer.line(
            f"  {shard.name}  {size(shard.source.size)} -> {size(shard.size)}  "
            f"({len(shard.matrices)} FP8, {len(shard.passthrough)} kept)"
        )
    printer.line("-" * WIDTH)
    before = sum(s.source.size for s in plan.shards)
    printer.line(f"  FP8 weight tensors  : {len(matrices)}")
    printer.line(f"  Passthrough tensors : {len(plan.kept)}")
    printer.line(f"  Files copied along  : {len(plan.checkpoint.extra_files)}")
    printer.line(f"  Size                : {size(before)} -> {size(plan.output_bytes())}")
    printer.line("=" * WIDTH)


def _kind(name: str) -> str:
    """A tensor's name with its layer and expert numbers left out."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


# --- summary -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Totals:
    """Numbers of shards, FP8 weights and other tensors."""

    shards: int
    fp8: int
    passthrough: int

    @classmethod
    def of(cls, plan: Plan) -> "Totals":
        return cls(len(plan.shards), sum(len(s.matrices) for s in plan.shards), len(plan.kept))


def print_summary(
    printer: Printer,
    totals: Totals,
    failed: int,
    calibration: str,
    measurements: Sequence[Measurement],
    problems: Sequence[str],
    health: Health | None,
    covered: int | None,
) -> None:
    """The health summary.

    Args:
        printer: where to.
        totals: what was written.
        failed: shards with structural problems.
        calibration: mode and parameters.
        measurements: of the spot-checked tensors.
        problems: structural deviations.
        health: what to make of them; None if verification was skipped.
        covered: quantized tensors with activation statistics; None if there was no file.
    """
    printer.line("=" * WIDTH)
    printer.line("  QUANTIZATION VERIFICATION SUMMARY")
    printer.line(f"  Calibration         : {calibration}")
    if covered is not None:
        printer.line(f"  Activation stats    : {covered} of {totals.fp8} tensors")
    printer.line("-" * WIDTH)
    printer.line(f"  Shards processed    : {totals.shards}  ({failed} failed)")
    printer.line(f"  FP8 weight tensors  : {totals.fp8}")
    printer.line(f"  Passthrough tensors : {totals.passthrough}")
    if health is None:
        printer.line("  Spot-checked        : 0  (verification skipped)")
        printer.line("-" * WIDTH)
        printer.line("  NOT VERIFIED: --skip_verify was given.")
        printer.line("=" * WIDTH)
        return
    marks = "  ".join(printer.mark(z, f"{health.counts[z]} {z.name}") for z in Zone)
    printer.line(f"  Spot-checked        : {len(measurements)} of {totals.fp8}  ({marks})")
    if measurements:
        _print_metrics(printer, measurements)
    _print_flagged(printer, health, problems)
    printer.line("-" * WIDTH)
    printer.line(f"  VERDICT: {printer.mark(health.verdict, health.verdict.name)}")
    printer.wrapped(health.statement)
    if health.recommendations:
        printer.line()
        printer.line("  CALIBRATION RECOMMENDATIONS")
        for number, text in enumerate(health.recommendations, 1):
            printer.wrapped(text, f"  {number}. ", "     ")
    printer.line("=" * WIDTH)


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


def _print_flagged(printer: Printer, health: Health, problems: Sequence[str]) -> None:
    if problems:
        printer.line("-" * WIDTH)
        for problem in problems[:LISTED]:
            printer.line(f"  {printer.mark(Zone.FAIL)} {problem}")
        if problems[LISTED:]:
            printer.line(f"  … and {len(problems) - LISTED} more")
    if health.flagged:
        printer.line("-" * WIDTH)
        printer.line("  Not GOOD, worst first         cosine    mean abs   max abs")
        for zone, m in health.flagged[:LISTED]:
            printer.line(f"  {printer.mark(zone)} {printable(m.name)}")
            printer.line(f"{'':<32}{m.cosine:<10.6f}{m.mean_abs:<11.6f}{m.max_abs:.5f}")
        if health.flagged[LISTED:]:
            rest = Counter(z for z, _ in health.flagged[LISTED:])
            printer.line("  … and " + ", ".join(f"{n} more {z.name}" for z, n in rest.items()))
