"""A run's progress: a bar over bytes, or a line for each shard."""

import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager

from tqdm import tqdm

_NARROW = "{desc}: {percentage:3.0f}%|{bar}| {rate_fmt} {remaining}"
_WIDE = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]"
_NARROW_BELOW = 70
"""Columns below which `_WIDE` would leave a few cells for the bar."""
_BESIDE_NAME = 75
"""Columns that `_WIDE` and a bar worth the name take beside the name of a shard."""


class Progress(AbstractContextManager):
    """A bar over bytes on a terminal, a plain line per shard elsewhere; nothing if quiet.

    Args:
        total: bytes to quantize or to check.
        shards: names of all, in their order.
        todo: number of those that will be finished; the others are kept as they are.
        again: those that are kept and will be verified.
        quiet: whether to show nothing.
    """

    def __init__(
        self,
        total: int,
        shards: Sequence[str],
        todo: int,
        again: Iterable[str] = (),
        quiet: bool = False,
    ) -> None:
        # A terminal without a width, as some job runners give, cannot show a bar either.
        bar = sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0
        self._plain = not quiet and not (bar and total)
        self._numbers = {name: number for number, name in enumerate(shards, 1)}
        self._total, self._todo, self._done, self._again = total, todo, 0, frozenset(again)
        self._bar = tqdm(
            total=total,
            unit="B",
            unit_scale=True,
            disable=quiet or self._plain,
            file=sys.stderr,
            dynamic_ncols=True,
        )

    @property
    def is_done(self) -> bool:
        """Whether all shards are finished."""
        return self._done >= self._todo

    def show_all(self) -> None:
        """All bytes done."""
        self.show("", self._total)

    def show(self, shard: str, total: int) -> None:
        """Bytes done so far, and the shard under way, "" for the one before."""
        if not self._bar.disable:
            columns = self._bar.format_dict["ncols"] or 80
            self._bar.bar_format = _NARROW if columns < _NARROW_BELOW else _WIDE
            if shard:
                short = f"{self._numbers.get(shard, '?')}/{len(self._numbers)}"
                fits = len(shard) <= columns - _BESIDE_NAME
                self._bar.set_description_str(shard if fits else short, refresh=False)
        self._bar.update(total - self._bar.n)

    def finished(self, name: str) -> None:
        self._done += 1
        if self._plain:
            count = len(self._numbers)
            kept = " (kept; verified)" if name in self._again else ""
            number = count - self._todo + self._done
            print(f"[{number}/{count}] {name}{kept}", file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        self._bar.close()
