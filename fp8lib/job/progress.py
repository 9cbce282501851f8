"""A run's progress: a bar over input bytes, or a line for each shard."""

import os
import sys
from contextlib import AbstractContextManager

from tqdm import tqdm


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
