"""What adapters make of rows of the input: reads their factors and keeps those of the layers under way."""

import threading
from collections import OrderedDict

import torch

from fp8lib.checkpoint.adapters import Adapters, LowRank, Replacement
from fp8lib.checkpoint.headers import ITEM_SIZE, Tensor
from fp8lib.numerics.lora import merge_embedding_rows, merge_rows, unstack_experts
from fp8lib.streaming.lanes import DTYPES, Files

_CACHE_BYTES = 2 << 30
"""Of factors in memory, or a single pair if that is larger. The experts of a layer of 397B have 1.4 GB at
rank 64, in float32."""


class AdapterMerge:
    """A `rewrite.Merge`: adapters in the order they were given, each rounded before the next is added."""

    def __init__(self, adapters: Adapters) -> None:
        self._adapters = adapters
        self._lock = threading.Lock()
        self._factors: OrderedDict[tuple, tuple[torch.Tensor, torch.Tensor]] = OrderedDict()

    def __call__(self, name: str, rows: torch.Tensor, first: int) -> bool:
        changes = self._adapters.changes.get(name, ())
        for change in changes:
            if isinstance(change, Replacement):
                rows.copy_(self._replaced(change, rows, first))
                continue
            a, b = self._pair(change)
            if change.kind == "embedding":
                merge_embedding_rows(rows, first, a[0], b[0], change.scaling)
            else:
                own = b[change.expert, change.first_row :]
                merge_rows(rows, first, a[change.expert], own, change.scaling, rounded=change.rounded)
        return bool(changes)

    def _replaced(self, change: Replacement, rows: torch.Tensor, first: int) -> torch.Tensor:
        """The rows that take the place of these, in the adapter's own dtype."""
        dtype = change.tensor.dtype
        start = change.start + first * rows.shape[1] * ITEM_SIZE[dtype]
        files = Files()
        try:
            files.refuse_changed(change.shard)
            raw = torch.empty(rows.numel() * ITEM_SIZE[dtype], dtype=torch.uint8)
            files.read_into(raw, change.shard.path, start)
        finally:
            files.close()
        return raw.view(DTYPES[dtype]).view(rows.shape)

    def _pair(self, change: LowRank) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B, float32 [experts, …]; [1, …] of what is no stack of experts."""
        key = change.shard.path, change.a.start
        with self._lock:  # whoever comes second finds them read
            if key not in self._factors:
                self._factors[key] = _read_pair(change)
                while len(self._factors) > 1 and self._held() > _CACHE_BYTES:
                    self._factors.popitem(last=False)
            self._factors.move_to_end(key)
            return self._factors[key]

    def _held(self) -> int:
        return sum(factor.nbytes for pair in self._factors.values() for factor in pair)


def _read_pair(change: LowRank) -> tuple[torch.Tensor, torch.Tensor]:
    files = Files()
    try:
        files.refuse_changed(change.shard)
        a, b = (_read(files, change, tensor) for tensor in (change.a, change.b))
    finally:
        files.close()
    return unstack_experts(a, b, change.experts)


def _read(files: Files, change: LowRank, tensor: Tensor) -> torch.Tensor:
    raw = torch.empty(tensor.nbytes, dtype=torch.uint8)
    files.read_into(raw, change.shard.path, tensor.start)
    return raw.view(DTYPES[tensor.dtype]).view(tensor.shape).float()
