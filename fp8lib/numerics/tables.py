"""Tables of constants that kernels of all threads and streams read."""

from collections.abc import Callable
from functools import wraps
from threading import Lock

import torch


def table(build: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Make `build(*key)` into `get(*key, device)`, which builds each table once and keeps it for good.

    `build` works on the CPU and the copy to the device comes last. `Tensor.to` waits for that copy, so
    whoever gets the table, in whatever stream, gets it complete; a kernel queued behind the copy would
    have changed it later. One thread builds while the others wait: `functools.cache` lets all of them
    build and keeps the last one's table, and the memory of the others' is given to somebody else while
    kernels still read it.
    """
    made: dict[tuple, torch.Tensor] = {}
    lock = Lock()

    @wraps(build)
    def get(*key_and_device: object) -> torch.Tensor:
        found = made.get(key_and_device)
        if found is None:
            with lock:
                found = made.get(key_and_device)
                if found is None:
                    *key, device = key_and_device
                    found = made[key_and_device] = build(*key).to(device)
        return found

    return get
