"""What only a CUDA device can show. `benchmarks/gpu.sh` runs this and the benches, and writes one file.

The other tests with the mark `gpu` compare single functions with the CPU's; here are whole runs.
"""

import hashlib
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import quantize_fp8
from fp8lib.checkpoint.directory import open_checkpoint
from fp8lib.checkpoint.plan import make_plan
from fp8lib.numerics.modes import MODES, SCALE_FORMATS, Calibration
from fp8lib.numerics.scales import block_scales, quantize_blocks
from fp8lib.numerics.second_order import Factor, factorize, output_error, round_rows
from fp8lib.streaming.convert import Nearest
from fp8lib.streaming.pipeline import process
from fp8lib.streaming.shard_job import CUDA_PIECE, Settings
from fp8lib.streaming.units import divide
from fp8lib.verification.output_error import REPEATED
from test_pretended_device import statistics
from test_second_order import moments

pytestmark = pytest.mark.gpu

SCRIPT = Path(quantize_fp8.__file__).resolve()
SOURCE = {"shards": 3, "num_hidden_layers": 4}


def written(source: Path, folder: Path, settings: Settings) -> dict[str, bytes]:
    folder.mkdir(parents=True)
    work = divide(list(make_plan(open_checkpoint(source)).shards), 1, False)
    return {d.name: (folder / d.name).read_bytes() for d in process(work, folder, settings)}


EVERY_WAY = list(product(MODES, SCALE_FORMATS, (None, statistics)))
STARTS = 20


def digests(source: Path, folder: Path, device: str, seed: int) -> dict[str, str]:
    """SHA-256 of every shard that every mode writes; modes come in an order of their own."""
    found, order = {}, random.Random(seed).sample(range(len(EVERY_WAY)), len(EVERY_WAY))
    for number in order:
        mode, scale_format, importance = EVERY_WAY[number]
        convert = Nearest(Calibration(mode, scale_format=scale_format), importance)
        settings = Settings(convert, torch.device(device), 4, piece=100_000)
        for name, data in written(source, folder / str(number), settings).items():
            found[f"{number} {name}"] = hashlib.sha256(data).hexdigest()
    return dict(sorted(found.items()))


def in_a_new_process(code: str, *arguments: object) -> str:
    """What statements print that see this module, `sys` and `Path`; for contexts and caches of their own."""
    paths = [str(SCRIPT.parent), str(SCRIPT.parent / "tests")]
    start = f"import sys; sys.path[:0] = {paths!r}; import torch; from test_gpu import *"
    command = [sys.executable, "-c", f"{start}\n{code}", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_bytes_of_the_cpu_in_20_processes_that_begin_cold(tmp_path: Path, checkpoint: Callable) -> None:
    """The first use of tables, streams and buffers, by 4 workers at once: what a race would spoil."""
    source = checkpoint("moe", **SOURCE)
    expected = str(digests(source, tmp_path / "cpu", "cpu", 0))
    for number in range(STARTS):
        arguments = source, tmp_path / str(number), number
        code = "print(digests(Path(sys.argv[1]), Path(sys.argv[2]), 'cuda:0', int(sys.argv[3])))"
        assert in_a_new_process(code, *arguments).strip() == expected, number
        shutil.rmtree(tmp_path / str(number))


def test_second_order_rounding_gives_the_codes_of_the_cpu() -> None:
    """All of them with the CPU's factor; with the device's own, whose last bits differ, nearly all."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(1024, 2048, generator=generator).mul_(0.02).bfloat16()
    h = moments(2048).float()
    with torch.inference_mode():
        scales, _ = block_scales(weights, Calibration())
        factor = factorize(h, 0.01)
        expected = round_rows(weights, scales, factor).view(torch.uint8)
        parts = (t.cuda() for t in (factor.order, factor.feedback, factor.innovation))
        for there in (Factor(*parts, factor.damping), factorize(h.cuda(), 0.01)):
            found = round_rows(weights.cuda(), scales.cuda(), there).cpu().view(torch.uint8)
            same = (found == expected).float().mean()
            assert same == 1 if there.feedback.cpu().equal(factor.feedback) else same > REPEATED
            before, after = output_error(weights.float(), factor), output_error(weights.cuda().float(), there)
            torch.testing.assert_close(after.cpu(), before, rtol=1e-6, atol=0)


def test_outputs_compared_are_those_of_the_cpu(tmp_path: Path, checkpoint: Callable, cli: Callable) -> None:
    source, prompts = checkpoint("moe", tokenizer=True), tmp_path / "prompts.txt"
    prompts.write_text("Why is the sky blue?\nOf what is the moon?\n")
    flags = "--input_dir", source, "--compare_outputs", "--prompts_file", prompts, "--activations", "bf16"
    found = {}
    for device in ("cpu", "cuda"):
        logits = tmp_path / f"{device}.safetensors"
        more = "--output_dir", tmp_path / device, "--logits_out", logits, "--device", device
        result = cli(*flags, *more, "--verify_samples", "all")
        assert result.rc == 0, result.err
        found[device] = load_file(logits)
    for name, values in found["cpu"].items():
        # float32's rounding, of sums in another order, through four layers
        torch.testing.assert_close(found["cuda"][name], values, rtol=0, atol=2e-5, msg=name)


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
    code = """
settings = Settings(Nearest(Calibration("mse"), statistics), torch.device("cuda:1"), 4)
written(Path(sys.argv[1]), Path(sys.argv[2]), settings)
torch.cuda.synchronize("cuda:1")
assert not torch._C._cuda_hasPrimaryContext(0), "a context on device 0"
"""
    in_a_new_process(code, source, tmp_path / "second")
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
