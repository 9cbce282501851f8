"""Prints the summary of a checkpoint that was turned back from FP8."""

from collections.abc import Sequence
from dataclasses import dataclass

from fp8lib.checkpoint.plan import Plan
from fp8lib.terminal import WIDTH, Printer
from fp8lib.verification.health import Zone
from fp8lib.verification.report import print_problems


@dataclass(frozen=True, slots=True)
class RestoredTotals:
    """Numbers of shards, failed shards, weights that were FP8, their codes, and other tensors."""

    shards: int
    failed: int
    restored: int
    codes: int
    passthrough: int

    @classmethod
    def of(cls, plan: Plan, shards: int, failed: int) -> "RestoredTotals":
        restored = [r for shard in plan.shards for r in shard.rewritten if r.scale]
        names = {o.name for shard in plan.shards for o in shard.outputs()}
        others = len(names - {r.output.name for r in restored})
        return cls(shards, failed, len(restored), sum(r.rows * r.columns for r in restored), others)


def print_restored(
    printer: Printer, totals: RestoredTotals, problems: Sequence[str], *, verified: bool
) -> None:
    """The summary.

    Args:
        printer: where to.
        totals: what was written.
        problems: one line each.
        verified: False where verification was skipped.
    """
    printer.line("=" * WIDTH)
    printer.line("  DEQUANTIZATION SUMMARY")
    printer.line("-" * WIDTH)
    printer.line(f"  Shards processed    : {totals.shards}  ({totals.failed} failed)")
    printer.line(f"  FP8 weights restored: {totals.restored}")
    printer.line(f"  Other tensors       : {totals.passthrough}")
    if not verified:
        printer.line("-" * WIDTH)
        printer.line("  NOT VERIFIED: --skip_verify was given.")
        printer.line("=" * WIDTH)
        return
    printer.line(f"  Codes compared      : {totals.codes:,}")
    print_problems(printer, problems)
    verdict = Zone.FAIL if problems else Zone.GOOD
    printer.line("-" * WIDTH)
    printer.line(f"  VERDICT: {printer.mark(verdict, verdict.name)}")
    printer.wrapped(
        "The output is not the input turned back. Do not use it; run again with --overwrite."
        if problems
        else "Quantizing the weights again with the stored scales gives every stored code."
    )
    printer.line("=" * WIDTH)
