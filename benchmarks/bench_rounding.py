#!/usr/bin/env python3
"""Second-order rounding alone: weights and second moments in memory, codes out, by number of input channels.

Cost per weight grows with the channels: each weight corrects all that come after it in its row. Rates are per
second of processor time of one thread, so that other work on the machine does not count. From them the time
for whole models is estimated, from their shapes.

    python benchmarks/bench_rounding.py
    python benchmarks/bench_rounding.py --channels 512,2048 --json results.json
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import machine
from fp8lib.numerics.modes import Calibration
from fp8lib.numerics.scales import block_scales, quantize_blocks
from fp8lib.numerics.second_order import factorize, round_rows, with_headroom
from fp8lib.streaming.lanes import keep_freed_memory
from fp8lib.streaming.second_order import CPU_PIECE
from fp8lib.streaming.units import rows_per_piece

MODELS = {
    "35B-A3B": (
        (40 * 256, 1024, 2048, 40),
        (40 * 256, 2048, 512, 40),
        (30, 8192 + 4096, 2048, 30),
        (10, 8192 + 2 * 512, 2048, 10),
        (10, 2048, 4096, 10),
    ),
    "397B-A17B": (
        (60 * 512, 2048, 4096, 60),
        (60 * 512, 4096, 1024, 60),
        (45, 12288 + 8192, 4096, 45),
        (15, 16384 + 2 * 512, 4096, 15),
        (15, 4096, 8192, 15),
    ),
}
"""Quantized weights without mtp's: (matrices, rows, columns, inputs), experts' inputs pooled."""


def main() -> None:
    parser = machine.parser(__doc__)
    parser.add_argument("--channels", default="512,1024,2048,4096,8192", help="numbers of input channels")
    parser.add_argument("--rows", type=int, default=0, help="at a time (as the pipeline takes them)")
    parser.add_argument("--repeat", type=int, default=3, help="timings, of which the least counts")
    parser.add_argument("--json", type=Path, help="also write the results here")
    flags = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    with torch.inference_mode():
        rows = [
            measure(channels, flags.rows or rows_per_piece(channels, CPU_PIECE), flags.repeat)
            for channels in map(int, flags.channels.split(","))
        ]
    where = machine.describe()
    print(machine.heading(where))
    print("per second of one core's time\n")
    print(machine.table(rows))
    rates = {row["channels"]: (row["M weights/s"], row["factor s"]) for row in rows}
    for model, shapes in MODELS.items():
        if all(columns in rates for _, _, columns, _ in shapes):
            print(f"{model}: {core_hours(shapes, rates):.1f} core-hours (estimated)")
    machine.save(flags.json, where, rows)


def measure(channels: int, rows: int, repeat: int) -> dict[str, object]:
    """A row of the table."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1024, channels, generator=generator) * torch.linspace(0.1, 3, channels)
    x += torch.randn(1024, 1, generator=generator)
    h = x.t() @ x / len(x)
    weights = torch.randn(rows, channels, generator=generator).mul_(0.02).bfloat16()
    begun = time.thread_time()
    factor = factorize(h, 0.01)
    made = time.thread_time() - begun
    scales = with_headroom(*block_scales(weights, Calibration()))
    rounding = min(_time(lambda: round_rows(weights, scales, factor)) for _ in range(repeat))
    nearest = min(_time(lambda: quantize_blocks(weights, Calibration())) for _ in range(repeat))
    return {
        "channels": channels,
        "rows": rows,
        "M weights/s": rows * channels / rounding / 1e6,
        "nearest": rows * channels / nearest / 1e6,
        "factor s": made,
    }


def _time(function) -> float:
    begun = time.thread_time()
    function()
    return time.thread_time() - begun


def core_hours(shapes: tuple, rates: dict[int, tuple[float, float]]) -> float:
    """Time of one core for a model: its weights, and a factor for each of its inputs."""
    seconds = 0.0
    for matrices, rows, columns, inputs in shapes:
        rate, factor = rates[columns]
        seconds += matrices * rows * columns / rate / 1e6 + inputs * factor
    return seconds / 3600


if __name__ == "__main__":
    main()
