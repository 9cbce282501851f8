"""The last lines of a run: where the output is, how large, how long it took, and how to serve it."""

import math
import shlex
import shutil
import sys
from pathlib import Path

from fp8lib.checkpoint.plan import Plan
from fp8lib.checkpoint.untrusted import printable
from fp8lib.terminal import size
from fp8lib.verification.findings import Findings
from fp8lib.verification.health import Zone
from fp8lib.verification.loading import GPU_BYTES, serving_commands


def print_ending(folder: Path, plan: Plan, found: Findings, seconds: float) -> None:
    """Print to stderr: times and paths differ between runs that say the same on stdout.

    Nothing of a directory that is no model, and no commands for one that FAILed.

    Args:
        folder: the output directory.
        plan: what is in it.
        found: what verification says of it.
        seconds: that the run took.
    """
    if found.problems:
        return
    before = sum(shard.source.size for shard in plan.shards)
    sizes = f"{size(before)} -> {size(plan.output_bytes())}"
    lines = [f"{printable(folder)}: {sizes} in {_duration(seconds)}"]
    columns = shutil.get_terminal_size().columns if sys.stderr.isatty() else math.inf
    commands = serving_commands(found.loading, shlex.quote(printable(folder)))
    failed = found.health is not None and found.health.verdict is Zone.FAIL
    if commands and not failed:
        lines += [
            f"To serve it on GPUs of {size(GPU_BYTES).replace('.0', '')}:",
            *(_fitted(f"  {command}", columns) for command in commands),
        ]
    print("\n".join(lines), file=sys.stderr, flush=True)


def _fitted(command: str, columns: float) -> str:
    """A command in one line, or its flags in lines of their own where the terminal is too narrow."""
    return command if len(command) <= columns else command.replace(" --", " \\\n      --")


def _duration(seconds: float) -> str:
    """For a person: 0.4 s, 12 s, 3 min 5 s, 2 h 10 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
