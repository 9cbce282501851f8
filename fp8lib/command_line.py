"""What a command does beside its work: one `error:` line, exit codes, signals, streams that may be closed."""

import argparse
import errno
import gc
import io
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

from fp8lib import Fp8Error, __version__
from fp8lib.job.ranks import refuse_together

_PATIENCE = 1.5
"""Seconds after a signal until the process ends, whatever a slow disk still keeps it from."""


class Parser(argparse.ArgumentParser):
    """A script's parser, without its last group of flags, which both scripts have.

    Refuses a wrong flag the way everything else is refused.

    Args:
        prog, description, epilog: as argparse's.
    """

    def __init__(self, prog: str, description: str, epilog: str) -> None:
        super().__init__(prog=prog, description=description, epilog=epilog, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise Fp8Error(f"{message}; see --help")

    def parse_args(self, args: Sequence[str] | None = None, namespace: None = None) -> argparse.Namespace:
        """argparse's; but a flag that is nearly right is named before one that is missing."""
        args = sys.argv[1:] if args is None else args
        known = self._option_string_actions
        for flag in (arg.partition("=")[0] for arg in args if re.match(r"--[A-Za-z]", arg)):
            if flag in known:
                continue
            meant = flag.lower().replace("-", "_").replace("__", "--", 1)
            if close := [meant] if meant in known else get_close_matches(meant, known, 1, 0.8):
                self.error(f"unrecognized arguments: {_one_line(flag)} (did you mean {close[0]}?)")
        return super().parse_args(args, namespace)

    def given(self, flags: argparse.Namespace, names: Iterable[str]) -> list[str]:
        """Those of some flags, as `--name`, that do not have their default."""
        return [f"--{name}" for name in names if getattr(flags, name) != self.get_default(name)]

    def add_prompts(self) -> None:
        """The flags that choose prompts and how they run."""
        group = self.add_argument_group("prompts")
        group.add_argument(
            "--prompts_file", type=path, metavar="FILE",
            help="text with a prompt per line, or .jsonl with messages, prompt or text (built-in set)",
        )  # fmt: skip
        group.add_argument(
            "--no_chat_template", action="store_true", help="do not apply the tokenizer's chat template"
        )
        group.add_argument(
            "--max_prompt_tokens", type=positive, default=2048, metavar="N",
            help="longer prompts are cut to their first N tokens (%(default)s)",
        )  # fmt: skip
        group.add_argument(
            "--batch_size", type=positive, default=8, metavar="N",
            help="prompts that run together at most; fewer where together, with padding, they would have "
            "more than --max_prompt_tokens tokens (%(default)s)",
        )  # fmt: skip

    def add_others(self, group: argparse._ArgumentGroup | None = None) -> None:
        """The flags that every script ends with; `group` may hold some of the script's own already."""
        group = group or self.add_argument_group("other")
        group.add_argument("--debug", action="store_true", help="show a traceback with an error")
        group.add_argument(
            "--quiet", action="store_true", help="no progress, no notes; summary and errors only"
        )
        group.add_argument("--version", action="version", version=f"%(prog)s {__version__}")


def path(text: str) -> Path:
    """A flag's value as a path. An empty one, such as an unset shell variable, is refused."""
    if not text:
        raise argparse.ArgumentTypeError("is empty")
    return Path(text)


def natural(text: str) -> int:
    """A flag's value as a whole number from 0 on."""
    if not (text.isascii() and text.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 on")
    return int(text)


def positive(text: str) -> int:
    """A flag's value as a whole number from 1 on."""
    if text.startswith("-") or natural(text) == 0:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return int(text)


@dataclass(frozen=True, slots=True)
class Command:
    """A script's command line.

    Attributes:
        parse: arguments (None for the process's own) -> flags, `debug` among them; raises Fp8Error.
        run: flags -> exit code.
        interrupted: what to say after SIGINT or SIGTERM.
        out_of_memory: what to do when memory runs out.
    """

    parse: Callable[[list[str] | None], argparse.Namespace]
    run: Callable[[argparse.Namespace], int]
    interrupted: str
    out_of_memory: str

    def main(self, arguments: list[str] | None = None) -> int:
        """Run; returns the exit code.

        Raises:
            SystemExit: `--help`, `--version`, a rank of a job that has ended.
        """
        with _lasting_streams(), _interruptible(self.interrupted):
            speaks = os.environ.get("RANK", "0") == "0"  # under torchrun one rank speaks for all
            flags = None
            try:
                flags = self.parse(arguments)
                return self.run(flags)
            except _Interrupted as interrupt:
                self._leave_interrupted(interrupt, speaks)
            except Exception as error:
                # A library may turn what interrupts its import into an error of its own.
                if interrupt := _interrupt_behind(error):
                    self._leave_interrupted(interrupt, speaks)
                if flags is None:
                    refuse_together(error)
                elif flags.debug:
                    traceback.print_exc()
                if speaks:
                    print(f"error: {self._describe(error)}", file=sys.stderr)
                return 2

    def end(self) -> NoReturn:
        """Run as the process's own command line."""
        # torch has a million objects that live as long as the process. Looking for garbage among them takes
        # 0.05 s while it is imported, and 0.3 s when the interpreter ends.
        gc.set_threshold(50_000)
        code = self.main()
        gc.freeze()
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback from the interpreter's last moments
        sys.exit(code)

    def _leave_interrupted(self, interrupt: "_Interrupted", speaks: bool) -> NoReturn:
        if speaks:
            print(self.interrupted, file=sys.stderr, flush=True)
        os._exit(128 + interrupt.args[0])  # without waiting for a disk that is still writing

    def _describe(self, error: Exception) -> str:
        """One line for an error that ends the run."""
        text = _one_line(str(error))
        if isinstance(error, Fp8Error):
            return text
        if isinstance(error, ModuleNotFoundError):
            return f"{error.name} is not installed; pip install -r requirements.txt"
        if _is_out_of_memory(error):
            return f"out of memory ({text}); {self.out_of_memory}"
        return f"{type(error).__name__}: {text}; run again with --debug for the traceback"


def _is_out_of_memory(error: Exception) -> bool:
    """Whether Python, the kernel, or torch's allocators (which raise RuntimeError) had no memory to give."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    signs = ("out of memory", "can't allocate memory", "can't start new thread")
    return any(sign in str(error).lower() for sign in signs)


def _one_line(text: str) -> str:
    """The first line of a text, its control characters escaped."""
    line = next(iter(text.strip().splitlines()), "")
    return line if line.isprintable() else line.encode("unicode_escape").decode("ascii")


# --- signals -----------------------------------------------------------------------------------


class _Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM; `args[0]` is the signal's number."""


def _interrupt_behind(error: BaseException | None) -> _Interrupted | None:
    """The interrupt that an error was made of, if it was."""
    while error is not None and not isinstance(error, _Interrupted):
        error = error.__cause__ or error.__context__
    return error


@contextmanager
def _interruptible(farewell: str) -> Iterator[None]:
    """SIGINT and SIGTERM raise _Interrupted; afterwards they do what they did before."""

    def give_up(number: int) -> NoReturn:
        with suppress(OSError):
            os.write(2, f"\n{farewell}\n".encode())
        os._exit(128 + number)

    def interrupt(number: int, _frame: object) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)  # a second one would interrupt the clean-up
        # The exception may be lost: a write may hang, and Python drops exceptions raised in finalizers.
        signal.signal(signal.SIGALRM, lambda *_: give_up(number))
        signal.setitimer(signal.ITIMER_REAL, _PATIENCE)
        raise _Interrupted(number)

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is interrupt:  # under torchrun a rank that is leaving ignores both
                signal.signal(number, handler)


# --- streams -----------------------------------------------------------------------------------


class _Lasting:
    """A standard stream whose reader may have gone (`| head`). Its end does not fail the run."""

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
        """Send all further output to /dev/null, what is still buffered included."""
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
