#!/usr/bin/env python3
"""Turn a BF16 Qwen3.5/3.6 checkpoint into a block-wise FP8 one that vLLM and SGLang serve."""

import argparse
import io
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import NoReturn

from fp8lib import Fp8Error, __version__
from fp8lib.modes import MODES, PHASES, Calibration
from fp8lib.ranks import refuse_together

PATIENCE = 1.5
"""Seconds after a signal until the process ends, whatever a slow disk still keeps it from."""
INTERRUPTED = "interrupted; run the same command again (without --overwrite) to continue"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise Fp8Error(f"{message}; see --help")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = _Parser(
        prog="quantize_fp8.py",
        description=__doc__,
        epilog="Exit codes: 0 GOOD or WARN, 1 verification FAILed, 2 refused or failed.",
        allow_abbrev=False,
    )
    group = parser.add_argument_group("input and output")
    group.add_argument("--input_dir", type=Path, required=True, help="checkpoint to quantize")
    group.add_argument("--output_dir", type=Path, help="where the FP8 checkpoint goes; made if missing")
    group.add_argument(
        "--overwrite", action="store_true", help="replace what an earlier run wrote to --output_dir"
    )

    group.add_argument("--checksums", action="store_true", help="also write SHA256SUMS, for sha256sum -c")

    group = parser.add_argument_group("calibration")
    group.add_argument(
        "--calib_mode", choices=MODES, default="rms", help="how a block's scale is chosen (%(default)s)"
    )
    group.add_argument(
        "--rms_factor", type=float, default=3.0, metavar="K",
        help="rms: scale = K * rms / 448, doubled until nothing saturates (%(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--rms_saturate", action="store_true", help="rms: no doubling, clip what exceeds the scale"
    )
    group.add_argument(
        "--calib_percentile", type=float, default=99.9, metavar="P",
        help="percentile: scale = P-th percentile of |w| / 448 (%(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--mse_grid_size", type=int, default=PHASES, metavar="N",
        help="mse: scale phases tried per octave; %(default)s is every BF16 scale (%(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--activation_stats", type=Path, metavar="FILE",
        help="statistics from collect_activation_stats.py; rms and mse weight channels by them",
    )  # fmt: skip

    group = parser.add_argument_group("hardware")
    group.add_argument(
        "--device", default="auto", help="auto, cpu, cuda or cuda:N (auto: CUDA when there is one)"
    )
    group.add_argument("--workers", type=int, default=0, metavar="N", help="worker threads (one per core)")

    group = parser.add_argument_group("verification")
    group.add_argument(
        "--verify_samples", type=_samples, default=5, metavar="N",
        help="tensors measured per shard, or 'all' (%(default)s)",
    )  # fmt: skip
    group.add_argument("--skip_verify", action="store_true", help="write without verifying")
    group.add_argument(
        "--verify_only", action="store_true",
        help="write nothing; measure a finished --output_dir, of this tool or another, against --input_dir",
    )  # fmt: skip
    group.add_argument("--seed", type=int, default=0, help="of the random sample (%(default)s)")

    group = parser.add_argument_group("other")
    group.add_argument(
        "--dry_run", action="store_true", help="print the plan from headers alone, write nothing"
    )
    group.add_argument("--debug", action="store_true", help="show a traceback with an error")
    group.add_argument("--quiet", action="store_true", help="no progress, no notes; summary and errors only")
    group.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    options = parser.parse_args(arguments)
    if options.output_dir is None and not options.dry_run:
        parser.error("the following arguments are required: --output_dir")
    if options.skip_verify and options.verify_only:
        parser.error("argument --verify_only: not allowed with argument --skip_verify")
    if options.workers < 0:
        parser.error("argument --workers: must be 1 or more")
    return options


def _samples(text: str) -> int | None:
    if text == "all":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number from 1 on nor 'all'")
    return int(text)


# --- signals -----------------------------------------------------------------------------------


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM; `args[0]` is the signal's number."""


def _interrupt(number: int, _frame: object) -> None:
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)  # once is enough; what follows is short
    # Unless a write hangs, or Python was just where it drops exceptions (a finalizer, a weakref's callback).
    signal.signal(signal.SIGALRM, lambda *_: _give_up(number))
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    raise Interrupted(number)


def _leave_interrupted(interrupt: Interrupted, speaks: bool) -> NoReturn:
    if speaks:
        print(INTERRUPTED, file=sys.stderr, flush=True)
    os._exit(128 + interrupt.args[0])  # without waiting for a disk that is still writing


def _interrupt_behind(error: BaseException | None) -> Interrupted | None:
    """The interrupt that an error was made of, if it was."""
    while error is not None and not isinstance(error, Interrupted):
        error = error.__cause__ or error.__context__
    return error


def _give_up(number: int) -> NoReturn:
    with suppress(OSError):
        os.write(2, f"\n{INTERRUPTED}\n".encode())
    os._exit(128 + number)


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGINT and SIGTERM raise Interrupted; afterwards they do what they did before."""
    before = {number: signal.signal(number, _interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is _interrupt:  # under torchrun, a rank that leaves stays deaf
                signal.signal(number, handler)


# --- streams -----------------------------------------------------------------------------------


class _Lasting:
    """A standard stream that nobody may be reading any more (`| head`): what was done stays done."""

    def __init__(self, stream: io.TextIOBase) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._drop()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._drop()

    def _drop(self) -> None:
        """Let this and all that follows disappear, what is still buffered included."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


@contextmanager
def _lasting_streams() -> Iterator[None]:
    """stdout and stderr that may be closed, before (`>&-`) or while this runs, without any harm."""
    # An output file must not get the number of a closed one: libraries write their warnings to 2.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    with ExitStack() as stack:
        for name, redirect in (("stdout", redirect_stdout), ("stderr", redirect_stderr)):
            stream = getattr(sys, name) or stack.enter_context(open(os.devnull, "w"))
            lasting = stack.enter_context(redirect(_Lasting(stream)))
            stack.callback(lasting.flush)
        yield


# --- the run -----------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    with _lasting_streams(), _interruptible():
        speaks = os.environ.get("RANK", "0") == "0"  # under torchrun one rank speaks for all
        debug = begun = False
        try:
            flags = parse(arguments)
            debug = flags.debug
            calibration = _calibration(flags)
            begun = True
            return _run(flags, calibration)
        except Interrupted as interrupt:
            _leave_interrupted(interrupt, speaks)
        except Exception as error:
            # A library may turn what interrupts its import into an error of its own.
            if interrupt := _interrupt_behind(error):
                _leave_interrupted(interrupt, speaks)
            if debug:
                traceback.print_exc()
            if not begun:
                refuse_together(error)
            if speaks:
                print(f"error: {describe(error)}", file=sys.stderr)
            return 2


def describe(error: Exception) -> str:
    """One line for an error that ends the run."""
    text = one_line(str(error))
    if isinstance(error, Fp8Error):
        return text
    if isinstance(error, MemoryError) or "out of memory" in text.lower():
        return f"out of memory ({text}); use fewer --workers"
    return f"{type(error).__name__}: {text}; run again with --debug for the traceback"


def one_line(text: str) -> str:
    """The first line of a text, its control characters escaped."""
    line = next(iter(text.strip().splitlines()), "")
    return line if line.isprintable() else line.encode("unicode_escape").decode("ascii")


def _calibration(flags: argparse.Namespace) -> Calibration:
    return Calibration(
        mode=flags.calib_mode,
        rms_factor=flags.rms_factor,
        rms_saturate=flags.rms_saturate,
        percentile=flags.calib_percentile,
        mse_grid_size=flags.mse_grid_size,
    )


def _run(flags: argparse.Namespace, calibration: Calibration) -> int:
    from fp8lib import job, report
    from fp8lib.health import Zone

    def warn(text: str) -> None:
        if not flags.quiet:
            print(f"note: {text}", file=sys.stderr)

    options = job.Options(
        input_dir=flags.input_dir,
        output_dir=flags.output_dir,
        calibration=calibration,
        overwrite=flags.overwrite,
        activation_stats=flags.activation_stats,
        device=flags.device,
        workers=flags.workers,
        verify_samples=flags.verify_samples,
        verify=not flags.skip_verify,
        verify_only=flags.verify_only,
        seed=flags.seed,
        checksums=flags.checksums,
        dry_run=flags.dry_run,
        quiet=flags.quiet,
    )
    verdict = job.run(options, job.Talk(report.Printer(sys.stdout), warn))
    return 1 if verdict is Zone.FAIL else 0


if __name__ == "__main__":
    code = main()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback from the interpreter's last moments
    sys.exit(code)
