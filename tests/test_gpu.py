"""What only a CUDA device can show. `benchmarks/gpu.sh` runs this and the benches, and writes one file.

The other tests with the mark `gpu` compare single functions with the CPU's; here are whole runs.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import quantize_fp8
from fp8lib.checkpoint.directory import open_checkpoint
from fp8lib.checkpoint.plan import make_plan
from fp8lib.numerics.modes import MODES, SCALE_FORMATS, Calibration
from fp8lib.numerics.scales import quantize_blocks
from fp8lib.streaming.convert import Nearest
from fp8lib.streaming.pipeline import process
from fp8lib.streaming.shard_job import CUDA_PIECE, Settings
from fp8lib.streaming.units import divide
from test_pretended_device import statistics

pytestmark = pytest.mark.gpu

SCRIPT = Path(quantize_fp8.__file__).resolve()
SOURCE = {"shards": 3, "num_hidden_layers": 4}


def written(source: Path, folder: Path, settings: Settings) -> dict[str, bytes]:
    folder.mkdir()
    work = divide(list(make_plan(open_checkpoint(source)).shards), 1, False)
    return {d.name: (folder / d.name).read_bytes() for d in process(work, folder, settings)}


@pytest.mark.parametrize("scale_format", SCALE_FORMATS)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("mode", MODES)
def test_the_bytes_of_the_cpu_in_20_processes_that_begin_cold(
    mode: str, weighted: bool, scale_format: str, tmp_path: Path, checkpoint: Callable
) -> None:
    """The first use of tables, streams and buffers, by 4 workers at once: what a race would spoil."""
    source = checkpoint("moe", **SOURCE)
    convert = Nearest(Calibration(mode, scale_format=scale_format), statistics if weighted else None)
    expected = written(source, tmp_path / "cpu", Settings(convert, torch.device("cpu"), 2))
    code = f"""
import sys; sys.path[:0] = {[str(SCRIPT.parent), str(SCRIPT.parent / "tests")]!r}
import hashlib, torch
from pathlib import Path
from fp8lib.numerics.modes import Calibration
from fp8lib.streaming.convert import Nearest
from fp8lib.streaming.shard_job import Settings
from test_gpu import statistics, written
convert = Nearest(Calibration({mode!r}, scale_format={scale_format!r}), {"statistics" if weighted else None})
settings = Settings(convert, torch.device("cuda:0"), 4, piece=100_000)
found = written(Path({str(source)!r}), Path(sys.argv[1]), settings)
print({{name: hashlib.sha256(data).hexdigest() for name, data in found.items()}})
"""
    import hashlib

    wanted = str({name: hashlib.sha256(data).hexdigest() for name, data in expected.items()})
    for number in range(20):
        command = [sys.executable, "-c", code, str(tmp_path / str(number))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == wanted, number


@pytest.mark.parametrize("mode", MODES)
def test_full_pieces_give_the_bytes_of_the_cpu(mode: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(CUDA_PIECE // 2048 // 128 * 128, 2048, generator=generator).mul_(0.02).bfloat16()
    activation = torch.rand(2048, generator=generator) ** 8
    with torch.inference_mode():
        codes, scales = quantize_blocks(weights, Calibration(mode), activation)
        there = quantize_blocks(weights.cuda(), Calibration(mode), activation.cuda())
    assert torch.equal(there[1].cpu(), scales)
    assert torch.equal(there[0].cpu().view(torch.uint8), codes.view(torch.uint8))


@pytest.mark.parametrize("mode", MODES)
def test_memory_on_the_device_is_that_of_pieces_under_way(
    mode: str, tmp_path: Path, checkpoint: Callable
) -> None:
    """Whatever the size of the checkpoint: 4 workers, pieces of 1 M weights."""
    peaks = []
    for layers in (2, 8):
        source = checkpoint("moe", shards=2, num_hidden_layers=layers)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        settings = Settings(Nearest(Calibration(mode)), torch.device("cuda:0"), 4, piece=1_000_000)
        written(source, tmp_path / str(layers), settings)
        peaks.append(torch.cuda.max_memory_allocated())
    # 64 bytes a weight is three times what the pretended device counts for `mse`, the hungriest.
    assert max(peaks) < 4 * 1_000_000 * 64 + (64 << 20), peaks


def test_pinned_buffers_take_direct_transfers(tmp_path: Path) -> None:
    """What a driver may refuse (EFAULT): then everything goes through the page cache, and this says so."""
    buffer = torch.empty(1 << 20, dtype=torch.uint8, pin_memory=True)
    assert buffer.data_ptr() % 4096 == 0
    path = tmp_path / "data"
    path.write_bytes(bytes(1 << 20))
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        pytest.skip("no direct I/O on this file system")
    assert os.preadv(descriptor, [memoryview(buffer.numpy())], 0) == 1 << 20
    os.close(descriptor)


def test_another_device_than_the_first_is_used_alone(tmp_path: Path, checkpoint: Callable) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device here")
    source = checkpoint("moe", **SOURCE)
    convert = Nearest(Calibration("mse"), statistics)
    expected = written(source, tmp_path / "cpu", Settings(convert, torch.device("cpu"), 2))
    code = f"""
import sys; sys.path[:0] = {[str(SCRIPT.parent), str(SCRIPT.parent / "tests")]!r}
import torch
from pathlib import Path
from fp8lib.numerics.modes import Calibration
from fp8lib.streaming.convert import Nearest
from fp8lib.streaming.shard_job import Settings
from test_gpu import statistics, written
settings = Settings(Nearest(Calibration("mse"), statistics), torch.device("cuda:1"), 4)
written(Path({str(source)!r}), Path({str(tmp_path / "second")!r}), settings)
torch.cuda.synchronize("cuda:1")
assert not torch._C._cuda_hasPrimaryContext(0), "a context on device 0"
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
    assert {n: (tmp_path / "second" / n).read_bytes() for n in expected} == expected


def test_two_ranks_on_two_devices_write_the_same_bytes(tmp_path: Path, checkpoint: Callable) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device here")
    source = checkpoint("moe", **SOURCE)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for folder, start in (("one", [sys.executable]), ("two", torchrun)):
        paths = ["--input_dir", str(source), "--output_dir", str(tmp_path / folder)]
        subprocess.run([*start, str(SCRIPT), *paths, "--device", "cuda", "--quiet"], check=True, timeout=300)
    for path in (tmp_path / "one").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
