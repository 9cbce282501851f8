"""What a stream can show: glyphs, colour, widths, sizes; and how a run speaks to its user."""

import os
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TextIO

from tqdm import tqdm

WIDTH = 64
_MARKS = {"GOOD": "✔", "WARN": "⚠", "FAIL": "✘"}
_ASCII_MARKS = {"GOOD": "+", "WARN": "!", "FAIL": "x"}
_COLOURS = {"GOOD": "32", "WARN": "33", "FAIL": "31"}
_ASCII = str.maketrans({"±": "+/-", "Δ": "d", "≥": ">=", "≤": "<=", "–": "-", "…": "...", "≈": "~"})


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
            # The reader has gone (`| head`). That is no failure.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def mark(self, zone: Enum, text: str = "") -> str:
        """The glyph of a zone (GOOD, WARN or FAIL) and a text, coloured."""
        text = f"{(_MARKS if self.unicode else _ASCII_MARKS)[zone.name]} {text}".rstrip()
        return f"\033[{_COLOURS[zone.name]}m{text}\033[0m" if self.colour else text

    def wrapped(self, text: str, first: str = "  ", rest: str = "  ") -> None:
        for line in textwrap.wrap(
            text, WIDTH + 12, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False
        ):
            self.line(line)


def size(nbytes: int) -> str:
    """Bytes for a person: 8.59 GB."""
    return tqdm.format_sizeof(nbytes, "B", 1000)


@dataclass(frozen=True, slots=True)
class Talk:
    """How a run speaks to a person: the summary or plan on `printer`, one-line notes through `warn`."""

    printer: Printer
    warn: Callable[[str], None]

    @classmethod
    def to_terminal(cls, quiet: bool) -> "Talk":
        """The summary on stdout, notes on stderr; no notes if quiet."""

        def warn(text: str) -> None:
            if not quiet:
                print(f"note: {text}", file=sys.stderr)

        return cls(Printer(sys.stdout), warn)
