"""Progress of prompts through a model: a bar with the tokens per second, or a line now and then."""

import sys
import time
from contextlib import AbstractContextManager
from typing import Protocol

from tqdm import tqdm

_WIDE = "{{desc}}: {{percentage:3.0f}}%|{{bar}}| {{n}}/{{total}} {unit} [{{elapsed}}<{{remaining}}, {rate}]"
_NARROW = "{{desc}}: {{percentage:3.0f}}%|{{bar}}| {rate} {{remaining}}"
_NARROW_BELOW = 100
"""Columns below which `_WIDE` would leave a few cells for the bar."""


class Counter(Protocol):
    """Adds up what all processes of a run have done; `job.ranks.Ranks` is one."""

    def progress(self, count: int) -> int | None:
        """Report work done; now and then returns the total."""

    def look(self) -> int:
        """The total by now."""


class Progress(AbstractContextManager):
    """A bar over prompts with the tokens per second; a line now and then where there is no terminal.

    Args:
        total: prompts of all ranks, times layers if they pass through one layer at a time.
        label: shown in front.
        quiet: show nothing.
        ranks: whose progress this is.
        unit: what is counted.
    """

    _INTERVAL = 5.0  # seconds between lines

    def __init__(self, total: int, label: str, quiet: bool, ranks: Counter, unit: str = "prompts") -> None:
        self._plain = not quiet and not sys.stderr.isatty()
        self._label, self._ranks, self._unit = label, ranks, unit
        self._mine = self._tokens = self._done = 0
        self._started = time.monotonic()
        self._shown = self._started - self._INTERVAL  # the first line at once, as a sign of life
        self._bar = tqdm(
            total=total,
            desc=label,
            bar_format=_WIDE.format(unit=unit, rate="? tokens/s"),
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
        if not self._bar.disable:
            form = _NARROW if (self._bar.format_dict["ncols"] or 80) < _NARROW_BELOW else _WIDE
            self._bar.bar_format = form.format(unit=self._unit, rate=rate)
        self._bar.update(done - self._done)
        last = done == self._total != self._done
        self._done = done
        if self._plain and (now - self._shown > self._INTERVAL or last):
            self._shown = now
            print(f"{self._label}: {done}/{self._total} {self._unit}, {rate}", file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        self._bar.close()
