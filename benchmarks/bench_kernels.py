#!/usr/bin/env python3
"""Kernels alone: BF16 weights that are in memory already, FP8 codes and scales out.

One thread per core on a CPU, each single-threaded inside torch, as the pipeline runs them. The baseline,
timed in turn with the kernels, is a plain copy of as many bytes as a kernel reads: what the memory allows.

    python benchmarks/bench_kernels.py
    python benchmarks/bench_kernels.py --device cuda --rows 8192 --columns 2048
    python benchmarks/bench_kernels.py --count

`--count` measures no time and needs no GPU: on a device that is only pretended it counts launches, waits of
the host and bytes for each piece and mode.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import machine
from fp8lib.numerics.modes import SCALE_FORMATS, Calibration
from fp8lib.numerics.scales import quantize_blocks
from fp8lib.streaming.devices import choose_device, cores_of_rank
from fp8lib.streaming.lanes import keep_freed_memory
from fp8lib.streaming.shard_job import CPU_PIECE, CUDA_PIECE
from fp8lib.streaming.units import rows_per_piece

_RESIDENT = 256 << 20
"""Bytes of weights each thread walks through."""


def main() -> None:
    parser = machine.parser(__doc__)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--columns", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=0, help="per piece (as the pipeline takes them)")
    parser.add_argument("--workers", type=int, default=0, help="threads (one per core; one on CUDA)")
    parser.add_argument("--repeat", type=int, default=7, help="timings, of which the median counts")
    parser.add_argument("--seconds", type=float, default=0.5, help="length of one timing")
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--count", action="store_true", help="count what a piece asks of a CUDA device")
    flags = parser.parse_args()
    if flags.count:
        _count(flags)
        return

    device = choose_device(flags.device)
    keep_freed_memory()
    torch.set_num_threads(1)
    cuda = device.type == "cuda"
    workers = flags.workers or (1 if cuda else cores_of_rank(1))
    rows = flags.rows or rows_per_piece(flags.columns, CUDA_PIECE if cuda else CPU_PIECE)
    weights = torch.randn(rows, flags.columns, device=device).mul_(0.02).bfloat16()
    activation = torch.rand(flags.columns, device=device) + 0.01

    work: dict[str, Callable] = {"copy": torch.Tensor.clone}
    for mode, scale_format in product(("max", "rms", "mse", "percentile"), SCALE_FORMATS):
        calibration = Calibration(mode, scale_format=scale_format)
        work[f"{mode}, {scale_format}"] = _kernel(calibration, None)
        if calibration.uses_activations:
            work[f"{mode}, {scale_format}, activation-weighted"] = _kernel(calibration, activation)

    timings: dict[str, list[float]] = {name: [] for name in work}
    with ThreadPoolExecutor(workers) as pool:
        for _ in range(flags.repeat):
            for name, function in work.items():  # in turn, so that a slow minute slows all of them
                timings[name].append(_rate(pool, workers, function, weights, flags.seconds))
    copy = statistics.median(timings.pop("copy"))
    result = [
        {
            "kernel": name,
            "M weights/s": (rate := statistics.median(rates)) / 1e6,
            "GB/s of BF16": 2 * rate / 1e9,
            "of copy": rate / copy,
        }
        for name, rates in timings.items()
    ]
    where = machine.describe()
    print(machine.heading(where))
    print(f"{device}, {workers} threads, pieces of {rows} x {flags.columns}, ", end="")
    print(f"copy {2 * copy / 1e9:.1f} GB/s read and as much written\n")
    print(machine.table(result))
    machine.save(flags.json, where, result)


def _count(flags: argparse.Namespace) -> None:
    from kernel_counts import count_all, count_others

    torch.set_num_threads(1)
    rows = flags.rows or 512
    result = count_all(2, rows, flags.columns) + count_others(2, rows, flags.columns)
    where = machine.describe()
    print(machine.heading(where))
    print(f"pretended device, pieces of 2 matrices of {rows} x {flags.columns}\n")
    print(machine.table(result))
    machine.save(flags.json, where, result)


def _kernel(calibration: Calibration, activation: torch.Tensor | None) -> Callable:
    return lambda weights: quantize_blocks(weights, calibration, activation)


def _rate(
    pool: ThreadPoolExecutor, workers: int, function: Callable, weights: torch.Tensor, seconds: float
) -> float:
    """Weights per second of all threads together."""

    def loop(_: int) -> tuple[int, float]:
        # Several pieces in turn, more than a cache holds: weights come from memory, as in a run.
        pieces = [weights.clone() for _ in range(max(1, _RESIDENT // weights.nbytes))]
        with torch.inference_mode():
            for piece in pieces[:3]:
                function(piece)
            _wait(weights)
            count, start = 0, time.perf_counter()
            while time.perf_counter() - start < seconds:
                function(pieces[count % len(pieces)])
                count += 1
                if count % 16 == 0:
                    _wait(weights)
            _wait(weights)
            return count, time.perf_counter() - start

    return sum(count * weights.numel() / elapsed for count, elapsed in pool.map(loop, range(workers)))


def _wait(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


if __name__ == "__main__":
    main()
