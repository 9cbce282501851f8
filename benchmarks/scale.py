#!/usr/bin/env python3
"""The largest models, on paper: planning them, dividing them among ranks, and how long they would take.

Writes the real 397B-A17B, 122B-A10B and 35B-A3B as sparse files with true headers and runs the real
`quantize_fp8.py --dry_run` on each, a process of its own, for time and memory. Then divides the work as
`torchrun` would, by the order in which simulated ranks claim it, once all equally fast and once with rank 0
at half speed, and says how long the job takes if every rank works at the rate measured here on a small
checkpoint and all of them share one storage.

    python benchmarks/scale.py --folder /data/scratch
    python benchmarks/scale.py --folder /data/scratch --rate-gbps 8 --storage-gbps 40 --piece cuda

Assumed: as many shards, of equal size, as the BF16 releases have; GB are 10^9 bytes; a rate is of input
bytes, and storage carries input and output. Not counted: verification of the samples, torchrun's start.
"""

import heapq
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checkpoints
import machine
from fp8lib.checkpoint.directory import open_checkpoint
from fp8lib.checkpoint.layout import Matrix, Passthrough
from fp8lib.checkpoint.plan import Plan, make_plan, to_json
from fp8lib.numerics.modes import Calibration
from fp8lib.streaming import convert, devices, pipeline, shard_job, units

QUANTIZE = Path(__file__).resolve().parent.parent / "quantize_fp8.py"
PER_EXPERT = ", per expert"
"""Added to a model's name: in the layout that transformers saves, one tensor per expert."""


def main() -> None:
    parser = machine.parser(__doc__)
    parser.add_argument(
        "--folder", type=Path, required=True, help="scratch space; 3 GB for measuring the rate"
    )
    names = [*checkpoints.SHARDS, "397B-A17B" + PER_EXPERT]
    parser.add_argument("--models", default=";".join(names), help="separated by semicolons (%(default)s)")
    parser.add_argument("--ranks", default="1,2,8,64", help="(%(default)s)")
    parser.add_argument(
        "--repeat", type=int, default=3, help="of everything timed; medians count (%(default)s)"
    )
    parser.add_argument(
        "--rate-gbps", type=float, help="of one rank, in GB of input per second (measured here)"
    )
    parser.add_argument("--storage-gbps", type=float, default=10.0, help="GB/s for all ranks (%(default)s)")
    parser.add_argument(
        "--piece", choices=("cpu", "cuda"), default="cpu", help="sizes of pieces (%(default)s)"
    )
    parser.add_argument("--device", default="auto", help="to measure the rate on (%(default)s)")
    parser.add_argument("--json", type=Path, help="also write the results here")
    flags = parser.parse_args()

    where = machine.describe()
    print(machine.heading(where))
    rate = flags.rate_gbps or measure_rate(flags.folder / "rate", flags.device, flags.repeat)
    source = "given" if flags.rate_gbps else "measured here"
    ranks = [int(n) for n in flags.ranks.split(",")]
    piece = shard_job.CUDA_PIECE if flags.piece == "cuda" else shard_job.CPU_PIECE
    planning, division, prediction = [], [], []
    for name in flags.models.split(";"):
        folder = flags.folder / name.replace(", ", "-").replace(" ", "-")
        write(folder, name)
        plan = make_plan(open_checkpoint(folder))
        planning.append(measure_planning(name, folder, plan, flags.repeat))
        for n in ranks if not name.endswith(PER_EXPERT) else ():
            sizes = unit_sizes(plan, n, piece)
            division.append({"model": name, **divide(sizes, n)})
            prediction.append({"model": name, **predict(plan, sizes, n, rate, flags.storage_gbps)})
        shutil.rmtree(folder)
    storage = f"{flags.storage_gbps:g} GB/s of storage for all"
    for title, rows in (
        ("planning (quantize_fp8.py --dry_run)", planning),
        ("division", division),
        (f"wall time at {rate:.3g} GB/s per rank ({source}) and {storage}", prediction),
    ):
        print(f"\n{title}\n\n{machine.table(rows)}")
    rows = [{"table": "rate", "GB/s per rank": rate, "source": source, "storage GB/s": flags.storage_gbps}]
    for table, found in (("planning", planning), ("division", division), ("prediction", prediction)):
        rows += [{"table": table, **row} for row in found]
    machine.save(flags.json, where, rows)


def write(folder: Path, name: str) -> None:
    """The checkpoint of that name, sparse."""
    model = name.removesuffix(PER_EXPERT)
    shape = replace(checkpoints.MODELS[model], fused=model == name)
    shutil.rmtree(folder, ignore_errors=True)
    checkpoints.write(folder, shape, checkpoints.SHARDS[model], sparse=True)


# --- planning ----------------------------------------------------------------------------------


def measure_planning(name: str, folder: Path, plan: Plan, repeat: int) -> dict[str, object]:
    """Time and memory of the real dry run, the interpreter's start included."""
    command = [sys.executable, str(QUANTIZE), "--input_dir", str(folder), "--dry_run"]
    runs = [_run(command) for _ in range(repeat)]
    files = list(folder.iterdir())
    return {
        "model": name,
        "B weights": checkpoints.parameters(checkpoints.MODELS[name.removesuffix(PER_EXPERT)]) / 1e9,
        "shards": len(plan.shards),
        "GB apparent": sum(f.stat().st_size for f in files) / 1e9,
        "MB on disk": sum(f.stat().st_blocks * 512 for f in files) / 1e6,
        "matrices": sum(1 for _ in plan.matrices),
        "tensors out": sum(len(list(s.outputs())) for s in plan.shards),
        "GB out": plan.output_bytes() / 1e9,
        "index MB": len(to_json(plan.index())) / 1e6,
        "wall s": statistics.median(wall for wall, _, _ in runs),
        "CPU s": statistics.median(cpu for _, cpu, _ in runs),
        "peak RSS MiB": max(memory for _, _, memory in runs) / 2**20,
    }


def _run(command: list[str]) -> tuple[float, float, int]:
    """(wall seconds, CPU seconds, peak resident bytes) of a process."""
    # Started by a small process: Linux counts what the parent held at the fork as the child's peak.
    done = subprocess.run([sys.executable, "-c", _TIME, *command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    wall, cpu, peak = map(float, done.stdout.split())
    return wall, cpu, int(peak) << 10


_TIME = """
import resource, subprocess, sys, time
start = time.perf_counter()
subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=True)
wall, usage = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
print(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss)
"""


# --- dividing ----------------------------------------------------------------------------------


def claim(sizes: Sequence[int], speeds: Sequence[float]) -> tuple[list[int], float]:
    """Units taken in order, each by the rank that is free first.

    Args:
        sizes: of the units, in bytes.
        speeds: of the ranks, in bytes per second.

    Returns:
        Bytes that fell to each rank, and the second in which the last of them is done.
    """
    free = [(0.0, rank) for rank in range(len(speeds))]
    taken = [0] * len(speeds)
    for size in sizes:
        now, rank = heapq.heappop(free)
        taken[rank] += size
        heapq.heappush(free, (now + size / speeds[rank], rank))
    return taken, max(now for now, _ in free)


def unit_sizes(plan: Plan, ranks: int, piece: int) -> list[int]:
    """Input bytes of every unit of work, in the order in which they are claimed."""
    sizes = []
    of_shards = groupby(units.divide(list(plan.shards), ranks, whole=False), lambda unit: unit.plan.name)
    for _, group in of_shards:
        parts = list(group)
        found = units.all_pieces(parts[0].plan, piece)
        sizes += [sum(_nbytes(*one) for one in units.share(unit, found)) for unit in parts]
    return sizes


def _nbytes(item: Matrix | Passthrough, first: int, last: int) -> int:
    """Input bytes of a piece."""
    return last - first if isinstance(item, Passthrough) else (last - first) * item.input_row_bytes


def divide(sizes: Sequence[int], ranks: int) -> dict[str, object]:
    """How evenly units fall to ranks of equal speed, and what one slow rank costs."""
    taken, _ = claim(sizes, [1.0] * ranks)
    speeds = [0.5] + [1.0] * (ranks - 1)
    _, end = claim(sizes, speeds)
    return {
        "ranks": ranks,
        "units": len(sizes),
        "largest unit GB": max(sizes) / 1e9,
        "busiest / mean": max(taken) * ranks / sum(sizes),
        "rank 0 at half speed: time / best": end * sum(speeds) / sum(sizes),
    }


def predict(plan: Plan, sizes: Sequence[int], ranks: int, rate: float, storage: float) -> dict[str, object]:
    """Wall time of the job: of its busiest rank, or of the storage if that takes longer."""
    _, busiest = claim(sizes, [rate * 1e9] * ranks)
    disk = (sum(sizes) + sum(shard.size for shard in plan.shards)) / (storage * 1e9)
    return {
        "ranks": ranks,
        "computing s": busiest,
        "storage s": disk,
        "wall s": max(busiest, disk),
        "limit": "storage" if disk > busiest else "ranks",
    }


# --- the rate ----------------------------------------------------------------------------------


def measure_rate(folder: Path, device: str, repeat: int) -> float:
    """GB of input per second of one process with all its workers, the input in the page cache."""
    shutil.rmtree(folder, ignore_errors=True)
    checkpoints.write(folder / "in", replace(checkpoints.BENCHMARK, layers=2), 4)
    plan = make_plan(open_checkpoint(folder / "in"))
    target = devices.choose_device(device)
    settings = shard_job.Settings(convert.Nearest(Calibration()), target, devices.default_workers(target))
    rates = []
    for _ in range(repeat):
        shutil.rmtree(folder / "out", ignore_errors=True)
        (folder / "out").mkdir()
        os.sync()  # what the one before left unwritten must not slow this one
        start = time.perf_counter()
        for _ in pipeline.process(units.divide(list(plan.shards), 1, whole=False), folder / "out", settings):
            pass
        rates.append(sum(s.input_bytes for s in plan.shards) / (time.perf_counter() - start) / 1e9)
    shutil.rmtree(folder)
    return statistics.median(rates)


if __name__ == "__main__":
    main()
