"""What the code does on CUDA, as far as a device that is only pretended can tell: bytes, waits, launches.

The pretence itself is tested first: each of its differences from a CPU must be seen to catch what it is for.
"""

import weakref
from argparse import Namespace
from collections.abc import Callable
from itertools import chain, product
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fp8lib import Fp8Error
from fp8lib.checkpoint.directory import open_checkpoint
from fp8lib.checkpoint.layout import ShardPlan
from fp8lib.checkpoint.plan import make_plan
from fp8lib.job import collecting
from fp8lib.numerics.activations import as_quantized
from fp8lib.numerics.modes import MODES, Calibration
from fp8lib.numerics.scales import quantize_blocks
from fp8lib.streaming.convert import Nearest
from fp8lib.streaming.devices import copy_without_waiting
from fp8lib.streaming.factors import Factors
from fp8lib.streaming.pipeline import process
from fp8lib.streaming.scheduler import ToCheck
from fp8lib.streaming.second_order import SecondOrder
from fp8lib.streaming.shard_job import Settings
from fp8lib.streaming.units import divide
from fp8lib.verification.claim import Claim
from fp8lib.verification.measure import measure, measure_all
from fp8lib.verification.pairing import planned_pairs
from fp8lib.verification.shard_check import ShardCheck
from fp8lib.verification.trial import Method, Trial
from pretended_device import PretendedCuda, RaceError
from test_scales import ALL_MODES, DTYPES, STATISTICS, mixed, three_levels, uneven_channels
from test_second_order import moments

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real device here")


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


def gaussian(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).mul_(0.02)


# --- the pretence ------------------------------------------------------------------------------


def test_tensors_of_two_devices_do_not_mix():
    with PretendedCuda(devices=2):
        here, there, other = torch.ones(3), torch.ones(3).to("cuda:0"), torch.ones(3).to("cuda:1")
        for one, another in ((here, there), (there, other)):
            with pytest.raises(RuntimeError, match="tensors on"):
                one + another
        assert (there * torch.tensor(2.0)).cpu().tolist() == [2, 2, 2]  # a single number may be anywhere


def test_dividing_by_a_number_is_multiplying_by_its_reciprocal():
    values = torch.arange(1.0, 100.0)
    with PretendedCuda():
        on_device = (values.to("cuda:0") / 448).cpu()
        exact = (values.to("cuda:0") / torch.full((), 448.0, device="cuda:0")).cpu()
    assert not torch.equal(on_device, values / 448)
    assert torch.equal(exact, values / 448)


@pytest.mark.parametrize(
    "add_up",
    [
        lambda x: torch.bincount(torch.zeros(x.numel(), dtype=torch.int64).to(x.device), x.double())[0],
        lambda x: x.view(1, -1) @ torch.ones(x.numel(), 1).to(x.device),
        lambda x: x.sum(),
    ],
    ids=["weighted bincount", "product", "sum"],
)
def test_floats_are_added_up_in_another_order_each_time(add_up: Callable):
    values = torch.randn(10_000) ** 9
    with PretendedCuda():
        found = {float(add_up(values.to("cuda:0"))) for _ in range(20)}
    assert len(found) > 1


def test_what_another_stream_has_written_must_be_waited_for():
    with PretendedCuda():
        one, other = torch.cuda.Stream("cuda:0"), torch.cuda.Stream("cuda:0")
        with torch.cuda.stream(one):
            table = torch.arange(8).to("cuda:0")  # from memory that is not pinned: complete when it returns
            doubled = 2 * table
        with torch.cuda.stream(other):
            table.add(1)
            with pytest.raises(RaceError):
                doubled.add(1)
        one.synchronize()
        with torch.cuda.stream(other):
            doubled.add(1)


def test_a_thread_that_leaves_a_stream_is_back_on_the_device_it_came_from():
    with PretendedCuda(devices=4) as cuda:
        torch.cuda.set_device("cuda:3")
        assert cuda.contexts == {3}
        with torch.cuda.stream(torch.cuda.Stream("cuda:2")):
            torch.zeros(1, device="cuda:2")
        assert cuda.contexts == {2, 3}


# --- kernels -----------------------------------------------------------------------------------


@pytest.mark.parametrize("calibration", ALL_MODES, ids=str)
def test_every_mode_gives_the_bytes_of_the_cpu(calibration: Calibration):
    # `three_levels` and channels of uneven size send blocks through the exact search of `mse`.
    parts = [mixed((390, 260)), uneven_channels((390, 130)), three_levels((390, 130))]
    weights = torch.cat(parts, dim=1).clamp(-6e4, 6e4)  # finite in float16
    for dtype, statistics in product(DTYPES, STATISTICS.values()):
        w, a = weights.to(dtype), statistics(520)
        codes, scales = quantize_blocks(w, calibration, a)
        with PretendedCuda(seed=3):
            found = quantize_blocks(w.to("cuda:0"), calibration, None if a is None else a.to("cuda:0"))
            found = [t.cpu() for t in found]
        assert torch.equal(found[1], scales)
        assert torch.equal(found[0].view(torch.uint8), codes.view(torch.uint8))


def test_matrices_with_other_statistics_below_each_other_give_the_bytes_of_each():
    generator = torch.Generator().manual_seed(2)
    weights = torch.cat([mixed((512, 260)), uneven_channels((512, 120))], dim=1).bfloat16()
    activations = torch.rand(4, 380, generator=generator) ** 8
    for mode in ("rms", "mse"):
        each = [
            quantize_blocks(w, Calibration(mode), a)
            for w, a in zip(weights.split(128), activations, strict=True)
        ]
        codes, scales = quantize_blocks(weights, Calibration(mode), activations)
        assert torch.equal(scales, torch.cat([s for _, s in each]))
        assert torch.equal(codes.view(torch.uint8), torch.cat([c.view(torch.uint8) for c, _ in each]))


@pytest.mark.parametrize("size", [1.0, 2.0**-100])
def test_measuring_many_pieces_waits_at_most_once_for_each(size: float):
    pieces = []
    for seed in range(5):
        weights = (gaussian(256, 300) * size).bfloat16()
        pieces.append((weights, *quantize_blocks(weights, Calibration(MODES[seed % 4]))))
    with PretendedCuda() as cuda:
        there = [tuple(t.to("cuda:0") for t in piece) for piece in pieces]
        measure_all(there, powers_of_two=True)  # tables are made once
        cuda.waits.clear()
        found = measure_all(there, powers_of_two=True)
        assert cuda.waits.total() == 2, cuda.waits
    for mine, piece in zip(found, pieces, strict=True):
        expected = measure(*piece, powers_of_two=True)
        assert (mine.count, mine.amax, mine.written.max_abs) == (
            expected.count, expected.amax, expected.written.max_abs,
        )  # fmt: skip
        # float32 sums of 76,800 terms in another order
        assert mine.written.difference == pytest.approx(expected.written.difference, rel=1e-4)


# --- a run -------------------------------------------------------------------------------------


def statistics(name: str, columns: int) -> np.ndarray | None:
    """Another row for every weight, and none for some."""
    seed = sum(map(ord, name))
    return None if seed % 7 == 0 else np.random.default_rng(seed).random(columns, np.float32) ** 4


def run(
    source: Path, folder: Path, settings: Settings, factors: Factors | None = None
) -> tuple[dict[str, bytes], list]:
    """Shards and measurements of a run."""
    folder.mkdir()
    plan = make_plan(open_checkpoint(source))

    def check(shard: ShardPlan, path: Path) -> ShardCheck:
        claim = Claim(settings.convert.calibration.powers_of_two, nearest=factors is None)
        pairs = planned_pairs(shard, path)
        return ShardCheck(shard.name, pairs, [], samples=None, seed=0, claim=claim, factors=factors)

    done = [d for d in process(divide(list(plan.shards), 1, False), folder, settings, check=check) if d.final]
    done.sort(key=lambda d: d.name)
    return {d.name: (folder / d.name).read_bytes() for d in done}, [d.check.measurements() for d in done]


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("mode", MODES)
def test_a_run_gives_the_bytes_of_the_cpu(mode: str, weighted: bool, tmp_path: Path, checkpoint: Callable):
    source = checkpoint("moe", shards=3, num_hidden_layers=1)
    convert = Nearest(Calibration(mode), statistics if weighted else None)
    expected = run(source, tmp_path / "cpu", Settings(convert, torch.device("cpu"), 2))
    with PretendedCuda(devices=4) as cuda:
        # Batches of up to 5 matrices of 128 x 256, pieces of some of them.
        settings = Settings(convert, torch.device("cuda:3"), 4, checksums=True, piece=5 * 128 * 256)
        found = run(source, tmp_path / "cuda", settings)
        assert torch.cuda.current_device() == 3  # of this thread, too
    assert found[0] == expected[0]
    for mine, theirs in zip(found[1], expected[1], strict=True):
        assert [m.name for m in mine] == [m.name for m in theirs]
        assert [m.cosine for m in mine] == pytest.approx([m.cosine for m in theirs], abs=1e-6)
    assert cuda.contexts == {3}  # none on device 0: half a gigabyte there for every rank
    assert not cuda.freed_early
    assert "copy from pageable memory" not in cuda.waits


def test_second_order_rounding_and_its_measurement_are_those_of_the_cpu(tmp_path: Path, checkpoint: Callable):
    source = checkpoint("moe_text", shards=2, num_hidden_layers=1, hidden_size=128, num_experts=2)

    def process_on(name: str, piece: int) -> tuple[dict[str, bytes], list]:
        def find(weight: str, columns: int) -> str | None:
            return None if weight.startswith("mtp.") else str(columns)

        def read(entry: str) -> np.ndarray:
            return moments(int(entry)).float().numpy()

        # One factor is kept at a time: others go while kernels of other workers may still use them.
        factors = Factors(find, read, lambda entry, wrong: Fp8Error(wrong), 0.01, torch.device(name), kept=1)
        convert = SecondOrder(Calibration("mse", scale_format="bf16"), factors, statistics)
        settings = Settings(convert, torch.device(name), 2, piece=piece)
        return run(source, tmp_path / name.partition(":")[0], settings, factors)

    expected = process_on("cpu", 0)
    with PretendedCuda(devices=2) as cuda:
        found = process_on("cuda:1", 3 * 128 * 128)
    assert found[0] == expected[0]
    judged = 0
    for mine, theirs in zip(chain(*found[1]), chain(*expected[1]), strict=True):
        assert mine.name == theirs.name
        if theirs.output is None:
            continue
        judged += 1
        assert mine.output.repeated == theirs.output.repeated == 1
        # Sums of 2^21 float64 terms in another order.
        for field in ("error", "nearest"):
            assert getattr(mine.output, field) == pytest.approx(getattr(theirs.output, field), rel=1e-9)
    assert judged == 8  # in_proj_qkv, in_proj_z, three projections of two experts
    assert cuda.contexts == {1}
    assert not cuda.freed_early
    assert "copy from pageable memory" not in cuda.waits


def test_a_trial_measures_what_the_files_would_have_on_either_device(tmp_path: Path, checkpoint: Callable):
    """With second moments and without; the CPU's figures are those of its files, to the last digit."""
    source = checkpoint("moe_text", shards=2, num_hidden_layers=1, hidden_size=128, num_experts=2)
    plan = make_plan(open_checkpoint(source))

    def find(weight: str, columns: int) -> str | None:
        return None if weight.startswith("mtp.") else str(columns)

    def settings_on(name: str) -> Settings:
        def read(entry: str) -> np.ndarray:
            return moments(int(entry)).float().numpy()

        factors = Factors(find, read, lambda entry, wrong: Fp8Error(wrong), 0.01, torch.device(name))
        return Settings(SecondOrder(Calibration(), factors), torch.device(name), 2)

    def tried(settings: Settings) -> list:
        method = Method(settings.convert, powers_of_two=True)
        trials = [Trial(shard.source, shard.matrices, (method,)) for shard in plan.shards]
        work = [ToCheck(t.shard.name, t.shard.size, t, (t.shard,)) for t in trials]
        done = sorted(process(work, tmp_path, settings), key=lambda d: d.name)
        return [m for d in done for (m,) in d.check.measurements().values()]

    cpu = settings_on("cpu")
    _, files = run(source, tmp_path / "files", cpu, cpu.convert.factors)
    expected = {m.name: m for m in chain(*files)}
    assert {m.name: m.output or m for m in tried(cpu)} == {n: m.output or m for n, m in expected.items()}
    with PretendedCuda(devices=2) as cuda:
        found = tried(settings_on("cuda:1"))
    assert {m.name for m in found} == expected.keys()
    for m in found:
        assert m.max_abs == expected[m.name].max_abs
        if m.output is not None:
            assert m.output.error == pytest.approx(expected[m.name].output.error, rel=1e-9)
    assert cuda.contexts == {1}
    assert not cuda.freed_early
    assert "copy from pageable memory" not in cuda.waits


def test_forward_passes_make_their_device_the_threads_own():
    """Kernels that torch did not write are started on the thread's device, wherever their tensors are."""
    with PretendedCuda(devices=4) as cuda:
        flags = Namespace(device_map="cuda", layerwise=True)
        assert collecting._device(flags, Namespace(local_rank=3)) == torch.device("cuda:3")
        assert torch.cuda.current_device() == 3
    assert cuda.contexts == {3}


def test_activations_are_rounded_to_the_values_of_the_cpu():
    x = gaussian(64, 300) * torch.logspace(-12, 4, 64)[:, None]
    for power_of_two in (False, True):
        expected = as_quantized(x, power_of_two=power_of_two)
        with PretendedCuda():
            found = as_quantized(x.to("cuda:0"), power_of_two=power_of_two).cpu()
        assert torch.equal(found, expected)


def test_a_command_quantizes_and_compares_outputs_on_its_own_device(
    tmp_path: Path, checkpoint: Callable, cli: Callable
):
    """The whole of it, layers of transformers included. Without rounded activations, of which one between two
    codes would fall to the other now and then."""
    source, prompts = checkpoint("moe", tokenizer=True), tmp_path / "prompts.txt"
    prompts.write_text("Why is the sky blue?\nOf what is the moon?\n")
    flags = "--input_dir", source, "--compare_outputs", "--prompts_file", prompts, "--activations", "bf16"

    def compared(name: str) -> dict[str, torch.Tensor]:
        logits = tmp_path / f"{name}.safetensors"
        more = "--output_dir", tmp_path / name, "--logits_out", logits, "--device", name
        result = cli(*flags, *more, "--verify_samples", 1, "--workers", 2)
        assert result.rc == 0, result.err
        return load_file(logits)

    expected = compared("cpu")
    with PretendedCuda(devices=4) as cuda:
        found = compared("cuda:3")
    for path in (tmp_path / "cpu").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "cuda:3" / path.name).read_bytes()
    for name, values in expected.items():
        # float32's rounding, of sums in another order, through four layers
        torch.testing.assert_close(found[name], values, rtol=0, atol=2e-5, msg=name)
    assert expected["kl1"].mean() > 1e-4  # what is compared is far above that
    assert cuda.contexts == {3}
    assert not cuda.freed_early


def test_a_factor_may_be_used_and_dropped_while_another_stream_goes_on():
    def made(entry: str) -> np.ndarray:
        return moments(128, seed=len(entry)).float().numpy()

    with PretendedCuda() as cuda:
        refuse = lambda entry, wrong: Fp8Error(wrong)  # noqa: E731
        factors = Factors(lambda weight, n: weight, made, refuse, 0.01, torch.device("cuda:0"), kept=1)
        one, other = torch.cuda.Stream("cuda:0"), torch.cuda.Stream("cuda:0")
        with torch.cuda.stream(one):
            factors("first", 128)
        with torch.cuda.stream(other):
            factor = factors("first", 128)
            assert factor.feedback.add(1).shape == factor.order.add(1).shape * 2
            factor.innovation.add(1)
        with torch.cuda.stream(one):
            factors("another", 128)  # one is kept
        used = weakref.ref(factor.feedback.memory)
        del factor
        assert used() is None
        assert not cuda.freed_early


def test_activations_are_copied_without_waiting():
    values = np.random.default_rng(0).random(300, np.float32)
    with PretendedCuda() as cuda:
        found = copy_without_waiting(torch.from_numpy(values), torch.device("cuda:0"))
        assert not cuda.waits
        assert np.array_equal(found.cpu().numpy(), values)


# --- counts ------------------------------------------------------------------------------------


def test_a_batch_costs_no_more_launches_and_waits_than_a_matrix():
    """What the host does for 16 matrices is what it does for one: the reason for batches."""
    found = {}
    for matrices in (1, 4):
        weights = gaussian(matrices * 128, 256).bfloat16()
        with PretendedCuda() as cuda:
            quantize_blocks(weights.to("cuda:0"), Calibration("rms"))
        found[matrices] = cuda.counts["kernels"], cuda.waits.total()
    assert found[1] == found[4]
