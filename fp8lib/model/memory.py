"""How much memory there is for a model: on the host within its container's limit, and on CUDA devices."""

import math
import os
from collections import Counter
from pathlib import Path

import torch

from fp8lib.checkpoint.directory import Checkpoint
from fp8lib.checkpoint.rules import without_prefix


def available(device: torch.device | None) -> int:
    """Free bytes of a device; of the host and all CUDA devices together for None."""
    if device is not None and device.type == "cuda":
        return torch.cuda.mem_get_info(device.index or 0)[0]
    indexes = range(torch.cuda.device_count() if device is None else 0)
    return _available_on_host() + sum(torch.cuda.mem_get_info(i)[0] for i in indexes)


def _available_on_host() -> int:
    """Bytes that can still be allocated without swapping."""
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":", 1) for line in file)
        available = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # not Linux: what the machine has
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(available, *_left_in_containers(), available)


def _left_in_containers() -> list[int]:
    """Bytes left under each memory limit of the control groups (version 2) that this process is in."""
    try:
        path = Path("/proc/self/cgroup").read_text().rpartition("0::")[2].splitlines()[0]
    except (OSError, IndexError):
        return []
    left = []
    root = Path("/sys/fs/cgroup")
    folder = root / path.lstrip("/")
    while folder.is_relative_to(root):
        try:
            limit = int((folder / "memory.max").read_text())  # ValueError for "max"
            used = int((folder / "memory.current").read_text())
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            # Cached file pages count as used and are given up when memory is needed.
            left.append(max(0, limit - used + int(statistics["inactive_file"])))
        except (OSError, ValueError, KeyError):
            pass
        folder = folder.parent
    return left


def bytes_in_bf16(checkpoint: Checkpoint) -> dict[str, int]:
    """What the text model takes in memory, by layer and by tensor that is in none."""
    parts: Counter[str] = Counter()
    for shard in checkpoint.shards:
        for tensor in shard.tensors:
            name = without_prefix(tensor.name)
            if not name.startswith("mtp.") and ".visual." not in f".{name}":
                part = ".".join(name.split(".")[:2]) if name.startswith("layers.") else name
                parts[part] += 2 * math.prod(tensor.shape)
    return parts
