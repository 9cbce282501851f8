"""The ranks of a job without torchrun: what it gives them, its variables and its store, and nothing else.

torchrun takes two seconds to import torch, and every rank it starts two more, or six with transformers.
Ranks that are forked (forked.py) are processes like those and share a store like those, in a tenth of the
time. torchrun itself is under test where it restarts ranks or ends them, and where one rank's end could
come before another's last word.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch.distributed import TCPStore

import forked


@dataclass(frozen=True)
class Rank:
    """What one rank gets beside what all get."""

    arguments: tuple = ()
    env: dict[str, str] = field(default_factory=dict)


def new_store() -> TCPStore:
    """What torchrun keeps for the ranks of a job; it outlives them."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def start(
    ranks: Sequence[Rank],
    *arguments: object,
    store: TCPStore,
    machines: int = 1,
    env: dict[str, str] | None = None,
    **options: object,
) -> list[forked.Started]:
    """Start the ranks of a job.

    Args:
        ranks: one for each rank.
        arguments: of the command line, for all of them.
        store: of `new_store`.
        machines: that the ranks say they are divided among.
        env: environment variables for all of them.
        options: of `forked.start`.
    """
    here = len(ranks) // machines
    common = {
        "WORLD_SIZE": len(ranks), "LOCAL_WORLD_SIZE": here, "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": store.port, "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": 0, **(env or {}),
    }  # fmt: skip
    started = []
    for number, rank in enumerate(ranks):
        own = {**common, "RANK": number, "LOCAL_RANK": number % here, **rank.env}
        texts = {name: str(value) for name, value in own.items()}
        started.append(forked.start(*arguments, *rank.arguments, env=texts, **options))
    return started


def run(
    ranks: Sequence[Rank], *arguments: object, timeout: float = forked.PATIENCE, **options: object
) -> list[forked.Ended]:
    """`start`, then wait for the end of each, at most `timeout` seconds."""
    store = options.pop("store", None) or new_store()
    started = start(ranks, *arguments, store=store, **options)
    try:
        return [each.wait(timeout) for each in started]
    finally:
        for each in started:
            each.kill()
