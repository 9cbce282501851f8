"""Which device a process computes on, and how many threads it takes."""

import os

import torch

from fp8lib import Fp8Error
from fp8lib.checkpoint.untrusted import printable


def choose_device(name: str, local_rank: int = 0, flag: str = "--device") -> torch.device:
    """The torch device of `auto`, `cpu`, `cuda` or `cuda:N`.

    Args:
        name: what the user asked for; `auto` is CUDA when there is one.
        flag: what to call it in messages.
        local_rank: number of this process on its machine: `cuda` and `auto` take that device.

    Raises:
        Fp8Error: not such a name, or no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{local_rank}"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise Fp8Error(f"{flag} {printable(name)}: use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and device.index >= torch.cuda.device_count():
        raise Fp8Error(
            f"{flag} {name}: there are {torch.cuda.device_count()} CUDA devices here; "
            f"use {flag} cpu or fewer ranks"
        )
    return device


def make_current(device: torch.device) -> None:
    """Make a CUDA device the calling thread's own.

    Every thread begins with device 0 as its own, and goes back to it when it leaves a stream. On a rank with
    another device that would make a context on device 0, too, half a gigabyte for every rank.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)


def copy_without_waiting(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host tensor on a device. On CUDA the copy is queued in the current stream.

    From memory that is not pinned CUDA would wait for everything in the stream first. torch's allocator of
    pinned memory does not give it away again before the copy is made.
    """
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def default_readers(device: torch.device, local_ranks: int = 1) -> int:
    """Threads that read what is to be quantized, 0 where the workers do that themselves.

    On a CPU the bytes stay in the cache of the core that goes on with them. To feed a device, several reads
    have to be under way at once: no thread alone reads as fast as a RAID of NVMe disks.
    """
    return min(max(cores_of_rank(local_ranks), 8), 16) if device.type == "cuda" else 0


def default_workers(device: torch.device, local_ranks: int = 1) -> int:
    """As many as there are cores; on CUDA what keeps a device busy."""
    cores = cores_of_rank(local_ranks)
    return min(cores, 4) if device.type == "cuda" else cores


def cores_of_rank(local_ranks: int) -> int:
    """Cores of each of so many ranks of this machine."""
    return max(len(os.sched_getaffinity(0)) // local_ranks, 1)
