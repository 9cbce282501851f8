"""Factors of second moments, made once for all weights that share an input, and kept while memory allows.

Any thread may ask. Who asks first makes the factor; others that want the same wait for it. Which factors are
kept changes how long a run takes and nothing else.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future

import numpy as np
import torch

from fp8lib import Fp8Error
from fp8lib.numerics.second_order import Factor, factorize

_KEPT = 4 << 30
"""Bytes of factors that are kept beyond the one in use: 4 n^2 each, so 60 of 4096 channels or 3 of 17408."""
_LARGE = 8192
"""Channels above which one factor is made at a time: it takes 28 n^2 bytes, 8 GB for 17408."""


class Factors:
    """The factors of a run.

    Args:
        find: (weight's name, columns) -> the entry of the second moments that speaks for it, or None.
        read: entry -> float32 [n, n].
        refuse: (entry, what is wrong with it) -> the error to raise.
        damping: as `factorize`.
        device: where factors are made and used.
        kept: bytes to keep.
    """

    def __init__(
        self,
        find: Callable[[str, int], str | None],
        read: Callable[[str], np.ndarray],
        refuse: Callable[[str, str], Fp8Error],
        damping: float,
        device: torch.device,
        kept: int = _KEPT,
    ) -> None:
        self.entry = find
        self._read, self._refuse = read, refuse
        self._damping, self._device, self._limit = damping, device, kept
        self._lock, self._alone = threading.Lock(), threading.Lock()
        self._known: OrderedDict[str, Future[Factor]] = OrderedDict()

    def __call__(self, weight: str, columns: int) -> Factor | None:
        """The factor for a weight; None if its input has no second moments.

        Raises:
            Fp8Error: they are no second moments, or cannot be read.
        """
        entry = self.entry(weight, columns)
        if entry is None:
            return None
        with self._lock:
            future = self._known.get(entry)
            is_mine = future is None
            if is_mine:
                future = self._known[entry] = Future()
            self._known.move_to_end(entry)
        if is_mine:
            try:
                future.set_result(self._make(entry, columns))
            except BaseException as error:
                with self._lock:
                    del self._known[entry]
                future.set_exception(error)
                raise
            self._forget()
        factor = future.result()
        if self._device.type == "cuda":  # its memory must outlive what this thread has queued
            for tensor in (factor.order, factor.feedback, factor.innovation):
                tensor.record_stream(torch.cuda.current_stream(self._device))
        return factor

    def _make(self, entry: str, columns: int) -> Factor:
        if columns <= _LARGE:
            return self._factorize(entry)
        with self._alone:
            return self._factorize(entry)

    def _factorize(self, entry: str) -> Factor:
        try:
            factor = factorize(torch.from_numpy(self._read(entry)).to(self._device), self._damping)
        except ValueError as error:
            raise self._refuse(entry, str(error)) from None
        if self._device.type == "cuda":  # other threads have other streams
            torch.cuda.current_stream(self._device).synchronize()
        return factor

    def _forget(self) -> None:
        """Drop what was used least recently, as far as more is kept than should be."""
        with self._lock:
            made = [(entry, f.result().nbytes) for entry, f in self._known.items() if f.done()]
            total = sum(nbytes for _, nbytes in made)
            for entry, nbytes in made[:-1]:
                if total <= self._limit:
                    return
                del self._known[entry]
                total -= nbytes
