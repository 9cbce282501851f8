#!/usr/bin/env python3
"""End to end: quantize_fp8.py as a user runs it, against `cp` of the same shards.

Makes a checkpoint of the real shapes, then times, in turn, `cp` and every mode, whole processes, into the
same directory, with the input in the page cache if it fits there: it is read before each of them. Every round
begins with the next of them, so that none always runs behind the same other. Medians are printed.

    python benchmarks/bench_quantize.py --folder /data/bench
    python benchmarks/bench_quantize.py --folder /data/bench --model 35B-A3B --shards 14 --device cuda
    python benchmarks/bench_quantize.py --folder /data/bench --growth
    python benchmarks/bench_quantize.py --folder /data/bench --modes rms --ranks 1,2
"""

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checkpoints
import machine
from fp8lib.checkpoint.directory import open_checkpoint
from fp8lib.checkpoint.plan import make_plan

QUANTIZE = Path(__file__).resolve().parent.parent / "quantize_fp8.py"
PEER = """
import json, sys
from llmcompressor import model_free_ptq
model_free_ptq(model_stub=sys.argv[1], save_directory=sys.argv[2], scheme="FP8_BLOCK",
               ignore=json.loads(sys.argv[3]), device=sys.argv[4], max_workers=int(sys.argv[5]))
"""
FLOOR = """
import sys, torch
from pathlib import Path
from fp8lib.checkpoint.directory import open_checkpoint
from fp8lib.checkpoint.plan import make_plan
from fp8lib.numerics.blocks import blocks
from fp8lib.streaming.pipeline import process
from fp8lib.streaming.shard_job import CUDA_PIECE, Settings
from fp8lib.streaming.units import divide
def nothing(matrix, rows, first):
    scales = torch.ones(blocks(len(rows)), blocks(matrix.columns), dtype=torch.bfloat16)
    return rows.view(-1).view(torch.uint8)[: rows.numel()].view(rows.shape), scales
nothing.stacked = lambda parts, rows: nothing(parts[0][0], rows, 0)
source, output, checksums = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "True"
output.mkdir()
at_once = 4 if checksums else 1
settings = Settings(nothing, torch.device("cpu"), 4, checksums, CUDA_PIECE, CUDA_PIECE, 16, at_once)
for _ in process(divide(list(make_plan(open_checkpoint(source)).shards), 1, True), output, settings):
    pass
"""
"""The I/O of a run with a GPU and nothing else: the same pieces, readers and writers, no arithmetic."""


def main() -> None:
    parser = machine.parser(__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="scratch space; 3 times the model's size")
    models = ["benchmark", *checkpoints.MODELS]
    parser.add_argument("--model", choices=models, default="benchmark", help="benchmark: 1.9 B parameters")
    parser.add_argument("--layers", type=int, help="instead of the model's own number")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--modes", default="max,rms,mse,percentile", help="(%(default)s)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--growth", action="store_true", help="1, 2, 4 and 8 layers instead of all modes")
    parser.add_argument(
        "--ranks", default="", help="also torchrun with so many processes, such as 1,2; and its start alone"
    )
    parser.add_argument(
        "--peer", action="store_true", help="also llm-compressor's model_free_ptq, if installed"
    )
    parser.add_argument("--also", default="", help="one more flag for every run, such as --also=--checksums")
    parser.add_argument(
        "--floor", action="store_true", help="also the same reads and writes without any arithmetic"
    )
    parser.add_argument("--json", type=Path, help="also write the results here")
    flags = parser.parse_args()
    flags.folder = flags.folder.resolve()

    shape = checkpoints.BENCHMARK if flags.model == "benchmark" else checkpoints.MODELS[flags.model]
    if flags.layers:
        shape = replace(shape, layers=flags.layers)
    hardware = ["--device", flags.device, *(["--workers", str(flags.workers)] if flags.workers else [])]
    hardware += [flags.also] if flags.also else []
    rows = (_growth if flags.growth else _modes)(flags, shape, hardware)
    where = machine.describe()
    print(machine.heading(where) + "\n")
    print(machine.table(rows))
    machine.save(flags.json, where, rows)


def _modes(flags: argparse.Namespace, shape: checkpoints.Shape, hardware: list[str]) -> list[dict]:
    source = _make(flags, shape)
    runs = {}
    for mode in flags.modes.split(","):
        runs[mode] = ["--calib_mode", mode]
    runs["rms, --skip_verify"] = ["--calib_mode", "rms", "--skip_verify"]
    runs["rms, --verify_samples all"] = ["--calib_mode", "rms", "--verify_samples", "all"]
    output = flags.folder / "out"
    commands = {name: _command(source, output, [*extra, *hardware]) for name, extra in runs.items()}
    if flags.floor:
        hashed = str(flags.also == "--checksums")
        commands["I/O floor"] = [sys.executable, "-c", FLOOR, str(source), str(output), hashed]
    for ranks in flags.ranks.split(",") if flags.ranks else ():
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks]
        command = _command(source, output, ["--calib_mode", "rms", *hardware])[1:]
        commands[f"torchrun, {ranks} ranks"] = [*torchrun, *command]
        commands[f"torchrun, {ranks} ranks, --version"] = [*torchrun, *command, "--version"]
    if flags.peer:
        device = "cpu" if flags.device == "auto" else flags.device
        # It keeps what this tool keeps, and fused experts beside: it quantizes matrices only.
        kept = make_plan(open_checkpoint(source)).config()["quantization_config"]["modules_to_not_convert"]
        workers = str(flags.workers or len(os.sched_getaffinity(0)))
        arguments = [str(source), str(output), json.dumps(kept), device, workers]
        commands["llm-compressor"] = [sys.executable, "-c", PEER, *arguments]
    return _compare(flags, source, commands, checkpoints.parameters(shape))


def _growth(flags: argparse.Namespace, shape: checkpoints.Shape, hardware: list[str]) -> list[dict]:
    rows = []
    for layers in (1, 2, 4, 8):
        grown = replace(shape, layers=layers)
        source = _make(flags, grown)
        command = _command(source, flags.folder / "out", ["--calib_mode", "rms", *hardware])
        row = _compare(flags, source, {"rms": command}, checkpoints.parameters(grown))[-1]
        rows.append({"layers": layers, "parameters": f"{checkpoints.parameters(grown) / 1e9:.2f} B", **row})
        shutil.rmtree(source)
    return rows


def _make(flags: argparse.Namespace, shape: checkpoints.Shape) -> Path:
    source = flags.folder / "in"
    shutil.rmtree(source, ignore_errors=True)
    # In a process of its own: a child's peak memory begins with what this one has, so it stays small.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        pool.apply(checkpoints.write, (source, shape, flags.shards))
    return source


def _warm(source: Path) -> None:
    """Have the input in the page cache, from which the kernel may have taken it, unless it cannot fit."""
    shards = list(source.glob("*.safetensors"))
    if sum(s.stat().st_size for s in shards) < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2:
        subprocess.run(["cat", *shards], stdout=subprocess.DEVNULL, check=True)


def _command(source: Path, output: Path, flags: list[str]) -> list[str]:
    paths = ["--input_dir", str(source), "--output_dir", str(output)]
    return [sys.executable, str(QUANTIZE), *paths, "--quiet", *flags]


def _compare(flags: argparse.Namespace, source: Path, commands: dict, parameters: int) -> list[dict]:
    """Time `cp` and every command in turn; medians as rows."""
    copy = ["cp", *map(str, sorted(source.glob("*.safetensors"))), str(flags.folder / "out")]
    everything = {"cp": copy, **commands}
    walls: dict[str, list[float]] = {name: [] for name in everything}
    cpu: dict[str, list[float]] = {name: [] for name in everything}
    peak = dict.fromkeys(everything, 0)
    for round_ in range(flags.repeat):
        names = list(everything)
        first = round_ % len(names)
        for name in names[first:] + names[:first]:
            command = everything[name]
            shutil.rmtree(flags.folder / "out", ignore_errors=True)
            if name == "cp":
                (flags.folder / "out").mkdir()
            os.sync()  # what the one before left unwritten must not slow this one
            _warm(source)
            wall, used, memory = _time(command)
            walls[name].append(wall)
            cpu[name].append(used)
            peak[name] = max(peak[name], memory)
    shutil.rmtree(flags.folder / "out", ignore_errors=True)
    baseline = statistics.median(walls["cp"])
    return [
        {
            "run": name,
            "wall s": (wall := statistics.median(walls[name])),
            "of cp": wall / baseline,
            "CPU s": statistics.median(cpu[name]),
            "M weights/s": parameters / wall / 1e6,
            "peak RSS MiB": float(peak[name] >> 20),
        }
        for name in everything
    ]


def _time(command: list[str]) -> tuple[float, float, int]:
    """(wall seconds, CPU seconds, peak resident bytes) of a process."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=QUANTIZE.parent)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    # 1: the verdict is FAIL, as it must be for `percentile`; torchrun and others mean an error by it.
    if process.returncode not in (0, 1) or (process.returncode and str(QUANTIZE) != command[1]):
        raise SystemExit(f"exit code {process.returncode}: {' '.join(command)}")
    return wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss << 10


if __name__ == "__main__":
    main()
