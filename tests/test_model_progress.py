"""Progress of prompts through a model: what is counted has a name, and the bar is one at every width."""

import fcntl
import io
import os
import pty
import re
import struct
import sys
import termios
from contextlib import suppress
from typing import TextIO

import pytest

from fp8lib.model.progress import Progress


class Alone:
    """The ranks of a run of one process."""

    def __init__(self) -> None:
        self.done = 0

    def progress(self, count: int) -> int:
        self.done += count
        return self.done

    def look(self) -> int:
        return self.done


def in_terminal(monkeypatch: pytest.MonkeyPatch, columns: int) -> str:
    """The bar's last state in a terminal of so many columns."""
    master, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with os.fdopen(terminal, "w") as stream:
        run(monkeypatch, stream)
    shown = b""
    with suppress(OSError):  # EIO: the other end is closed
        while part := os.read(master, 65536):
            shown += part
    os.close(master)
    return re.split(r"[\r\n]+", shown.decode().rstrip())[-1]


def run(monkeypatch: pytest.MonkeyPatch, stream: TextIO) -> None:
    """24 layers of 32 prompts; less is shown than a terminal's buffer holds."""
    monkeypatch.setattr(sys, "stderr", stream)
    with Progress(768, "layers", False, Alone(), "prompts x layers") as progress:
        for layer in range(24):
            progress.label(f"layer {layer + 1}/24")
            progress.advance(32, 1)  # so few that the rate has no more digits than a real one
    stream.flush()


@pytest.mark.parametrize("columns", [50, 80, 120])
def test_the_bar_keeps_its_bar_rate_and_time(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    line = in_terminal(monkeypatch, columns)
    found = re.match(r"layer 24/24: 100%\|([^|]+)\| (.*)", line)
    assert found, line
    assert len(found[1]) >= columns / 7  # a bar that still moves
    assert "tokens/s" in found[2]
    assert re.search(r"\d\d:\d\d", found[2])
    assert len(line) <= columns


def test_what_is_counted_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "| 768/768 prompts x layers [" in in_terminal(monkeypatch, 120)
    run(monkeypatch, file := io.StringIO())
    assert file.getvalue().splitlines()[-1].startswith("layer 24/24: 768/768 prompts x layers, ")
