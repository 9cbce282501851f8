"""Measurement of what was written: the three metrics against float64, the sample, the structure."""

import math
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import e4m3_reference as reference
from fp8lib import Fp8Error
from fp8lib.checkpoint.headers import read_shard
from fp8lib.checkpoint.layout import Passthrough, ShardPlan
from fp8lib.numerics.modes import Calibration
from fp8lib.numerics.scales import quantize_blocks
from fp8lib.numerics.served import requantize
from fp8lib.verification.bands import Zone, zone_of
from fp8lib.verification.measure import Errors, Sums, combine, measure
from fp8lib.verification.measurement import Measurement
from fp8lib.verification.pairing import structural_problems
from fp8lib.verification.shard_check import sample

ROOT = Path(__file__).parent.parent
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(128, 128), (512, 384), (70, 128), (128, 33), (200, 300), (1, 1)]


def gaussian(shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02


def quantized(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return quantize_blocks(weights, Calibration("max", scale_format="bf16"))


def measured(weights: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> Measurement:
    return combine("w", [measure(weights, codes, scales)])


def in_float64(weights: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> Measurement:
    """The same metrics by their definitions."""
    w = reference.numpy64(weights)
    powers = requantize(codes, scales)  # test_powers_of_two.py compares it with what engines do

    def values(codes: torch.Tensor, scales: torch.Tensor) -> np.ndarray:
        return reference.numpy64(codes) * reference.per_element(reference.numpy64(scales), w.shape)

    def metrics(restored: np.ndarray, prefix: str) -> dict[str, float]:
        error = np.abs(w - restored)
        return {
            f"{prefix}cosine": float((w * restored).sum() / (np.linalg.norm(w) * np.linalg.norm(restored))),
            f"{prefix}relative": float(np.linalg.norm(error) / np.linalg.norm(w)),
            f"{prefix}mean_abs": error.mean(),
            f"{prefix}max_abs": error.max(),
        }

    written, served = values(codes, scales), values(*powers)
    changed = int((written.astype("f") != served.astype("f")).sum())
    others = dict.fromkeys(("vs_best", "zero_share", "bulk_error"), math.nan)  # see test_figures.py
    counts = {"weights": w.size, "requantized": changed, "not_nearest": 0, "other_scales": 0}
    amax = np.abs(w).max()
    return Measurement(
        "w", amax=amax, **metrics(written, ""), **metrics(served, "served_"), **others, **counts
    )


def lossless(amax: float, weights: int) -> Measurement:
    """Of weights that are restored as they were, in the file and as served."""
    nothing = {"cosine": 1.0, "relative": 0.0, "mean_abs": 0.0, "max_abs": 0.0}
    served = {f"served_{metric}": value for metric, value in nothing.items()}
    others = {"weights": weights, "vs_best": 1.0, "zero_share": 0.0, "bulk_error": 0.0}
    counts = {"requantized": 0, "not_nearest": 0, "other_scales": 0}
    return Measurement("w", amax=amax, **nothing, **served, **others, **counts)


def assert_same(found: Measurement, expected: Measurement) -> None:
    # float32 sums of up to 200,000 terms are off by some 1e-7; it is 1 - cosine whose digits count.
    for prefix in ("", "served_"):
        metric = {
            field: (getattr(found, prefix + field), getattr(expected, prefix + field))
            for field in ("cosine", "relative", "mean_abs", "max_abs")
        }
        cosine, its = metric["cosine"]
        assert 1 - cosine == pytest.approx(1 - its, rel=1e-5, abs=1e-9)
        for field, rel in (("relative", 1e-5), ("mean_abs", 1e-5), ("max_abs", 1e-6)):
            assert metric[field][0] == pytest.approx(metric[field][1], rel=rel), prefix + field
    assert (found.amax, found.requantized) == (expected.amax, expected.requantized)


# --- the three metrics -------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_metrics_are_those_of_float64(dtype: torch.dtype, shape: tuple[int, int]):
    weights = gaussian(shape).to(dtype)
    pair = quantized(weights)
    assert_same(measured(weights, *pair), in_float64(weights, *pair))


def test_metrics_are_of_the_very_codes_and_scales_given():
    # A pair that has nothing to do with the weights: nearly orthogonal, and far off.
    weights, other = gaussian((256, 256)).bfloat16(), gaussian((256, 256), seed=1).bfloat16() * 3
    pair = quantized(other)
    found = measured(weights, *pair)
    assert_same(found, in_float64(weights, *pair))
    assert abs(found.cosine) < 0.02


def test_negated_weights_have_cosine_minus_one():
    weights = gaussian((128, 128)).bfloat16()
    assert measured(-weights, *quantized(weights)).cosine == pytest.approx(-0.99965, abs=2e-5)


def test_scales_in_float32_measure_like_the_same_in_bf16():
    weights = gaussian((200, 300)).bfloat16()
    codes, scales = quantized(weights)
    assert measured(weights, codes, scales.float()) == measured(weights, codes, scales)


def test_exact_restoration_is_cosine_one_and_no_error():
    weights = torch.full((200, 300), 0.4375).bfloat16()  # 448 * 2^-10
    assert measured(weights, *quantized(weights)) == lossless(0.4375, 60_000)


def test_all_zero_weights_restored_as_zero_are_cosine_one():
    weights = torch.zeros(200, 300, dtype=torch.bfloat16)
    assert measured(weights, *quantized(weights)) == lossless(0.0, 60_000)


def test_weights_restored_as_zero_are_cosine_zero():
    weights = gaussian((128, 128)).bfloat16()
    codes, scales = quantized(torch.zeros(128, 128, dtype=torch.bfloat16))
    found = measured(weights, codes, scales)
    magnitude = np.abs(reference.numpy64(weights))
    assert found.cosine == 0
    assert found.mean_abs == pytest.approx(magnitude.mean(), rel=1e-6)
    assert found.max_abs == found.amax == magnitude.max()
    assert zone_of(found) is Zone.FAIL


def test_zeros_restored_as_something_are_cosine_zero():
    codes, scales = quantized(gaussian((128, 128)).bfloat16())
    assert measured(torch.zeros(128, 128, dtype=torch.bfloat16), codes, scales).cosine == 0


# --- what cannot be measured -------------------------------------------------------------------


def spoiled(where: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    weights = gaussian((256, 256)).bfloat16()
    codes, scales = quantized(weights)
    if where == "weight":
        weights[200, 3] = math.nan
    elif where == "code":
        codes.view(torch.uint8)[200, 3] = 0x7F
    else:
        scales[1, 0] = math.nan
    return weights, codes, scales


@pytest.mark.parametrize("where", ["weight", "code", "scale"])
def test_nan_anywhere_makes_every_error_nan(where: str):
    found = measured(*spoiled(where))
    assert math.isnan(found.cosine)
    assert math.isnan(found.mean_abs)
    assert math.isnan(found.max_abs)
    assert zone_of(found) is Zone.FAIL


@pytest.mark.parametrize("where", ["weight", "code", "scale"])
@pytest.mark.parametrize("first", [True, False])
def test_nan_in_one_piece_is_not_lost_among_the_others(where: str, first: bool):
    weights = gaussian((256, 256)).bfloat16()
    pieces = [measure(weights, *quantized(weights)), measure(*spoiled(where))]
    found = combine("w", pieces[::-1] if first else pieces)
    assert all(map(math.isnan, (found.cosine, found.mean_abs, found.max_abs)))


@pytest.mark.parametrize("bad", [math.inf, -math.inf])
def test_infinite_weight_is_fail(bad: float):
    weights = gaussian((128, 128)).bfloat16()
    pair = quantized(weights)
    weights[5, 5] = bad
    assert zone_of(measured(weights, *pair)) is Zone.FAIL


def test_scale_of_another_magnitude_is_fail_and_not_an_overflow():
    weights = gaussian((128, 128)).bfloat16()
    codes, scales = quantized(weights)
    assert zone_of(measured(weights, codes, scales * 2.0**100)) is Zone.FAIL


# --- any magnitude -----------------------------------------------------------------------------


@pytest.mark.parametrize("power", [-100, -60, -40, 40, 60, 100, 125])
def test_metrics_scale_with_the_weights(power: int):
    # Squares of 2^-100 and 2^100 leave float32, and so do the sum of errors near 2^120.
    weights = gaussian((512, 512)).bfloat16()
    codes, scales = quantized(weights)
    plain = measured(weights, codes, scales)
    found = measured(weights * 2.0**power, codes, scales * 2.0**power)
    # As served they do so only above 1e-4, what engines take amax for at least.
    for field in ("mean_abs", "max_abs", "amax"):
        assert getattr(found, field) == pytest.approx(getattr(plain, field) * 2.0**power, rel=1e-5)
    for field in ("cosine", "relative"):
        assert getattr(found, field) == pytest.approx(getattr(plain, field), rel=1e-5)
    if power > 0:
        assert found.requantized == plain.requantized
        assert found.served_relative == pytest.approx(plain.served_relative, rel=1e-5)


# --- pieces ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [128, 256, 384])
def test_pieces_add_up_to_the_matrix(rows: int):
    weights = gaussian((710, 300)).bfloat16()
    codes, scales = quantized(weights)
    pieces = [
        measure(weights[i : i + rows], codes[i : i + rows], scales[i // 128 : (i + rows) // 128])
        for i in range(0, 640, rows)
        if i + rows <= 640
    ]
    end = len(pieces) * rows
    pieces.append(measure(weights[end:], codes[end:], scales[end // 128 :]))
    assert_same(combine("w", pieces), in_float64(weights, codes, scales))


def test_combining_keeps_the_name_and_weighs_pieces_by_their_size():
    large, small = Sums(9.0, 0.5, 3.0, 0.1), Sums(7.0, 0.5, 5.0, 0.3)
    twice = Sums(9.0, 2.0, 6.0, 0.2)
    pieces = [
        Errors(300, 2.0, large, twice, original=9.0, least=0.4, bulk=0.04, nonzero=290, zeroed=3,
               requantized=7, not_nearest=1, other_scales=0),
        Errors(100, 1.0, small, small, original=7.0, least=0.5, bulk=0.01, nonzero=10, zeroed=0,
               requantized=5, not_nearest=2, other_scales=4),
    ]  # fmt: skip
    found = combine("model.w", pieces)
    # cosine (16 + 16 - 1) / (2 * 16); 8.0 over 400 weights; the larger of each maximum
    assert (found.name, found.cosine, found.mean_abs, found.max_abs) == ("model.w", 31 / 32, 0.02, 0.3)
    assert (found.relative, found.amax, found.requantized) == (1 / 4, 2.0, 12)
    # 0.5 + 0.5 over 0.4 + 0.5; 3 of 300 that are not zero; the root of the larger; counts
    assert (found.vs_best, found.zero_share, found.bulk_error) == (1 / 0.9, 0.01, 0.2)
    assert (found.weights, found.not_nearest, found.other_scales) == (400, 3, 4)
    # as served: (16 + 16 - 2.5) / (2 * 16); 11.0 over 400
    assert (found.served_cosine, found.served_mean_abs) == (29.5 / 32, 0.0275)
    assert (found.served_max_abs, found.served_relative) == (0.3, math.sqrt(2.5) / 4)


# --- the sample --------------------------------------------------------------------------------

PAIRS = [f"pair {i}" for i in range(50)]  # whatever they are, `sample` only picks


def test_sample_has_the_size_asked_for_without_repeats_in_the_shards_order():
    chosen = sample(PAIRS, 20, seed=0, shard="a.safetensors")
    assert len(chosen) == len(set(chosen)) == 20
    assert chosen == [p for p in PAIRS if p in chosen]


def test_sample_of_none_or_of_more_than_there_are_is_everything():
    for count in (None, 50, 51, 10_000):
        assert sample(PAIRS, count, seed=0, shard="a.safetensors") == PAIRS


def test_sample_of_zero_is_empty():
    assert sample(PAIRS, 0, seed=0, shard="a.safetensors") == []


def test_sample_is_the_same_for_the_same_seed_and_shard_whatever_ran_before():
    chosen = sample(PAIRS, 5, seed=0, shard="model-00001-of-00002.safetensors")
    random.seed(7)
    sample(PAIRS, 9, seed=1, shard="model-00002-of-00002.safetensors")
    assert sample(PAIRS, 5, seed=0, shard="model-00001-of-00002.safetensors") == chosen


def test_sample_is_the_same_in_another_process():
    # Python salts the hashes of strings anew in every process; the draw must not depend on them.
    code = (
        "from fp8lib.verification.shard_check import sample\n"
        "print(sample(range(50), 5, seed=0, shard='a.safetensors'))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(sample(range(50), 5, seed=0, shard="a.safetensors"))


def test_sample_differs_from_seed_to_seed_and_from_shard_to_shard():
    # 5 of 50 can be had in 2,118,760 ways: two of six draws being equal is no accident.
    shards = ("a.safetensors", "b.safetensors")
    assert len({tuple(sample(PAIRS, 5, seed, shard)) for seed in (0, 1, 2) for shard in shards}) == 6


def test_every_pair_can_be_sampled():
    seen = {p for seed in range(200) for p in sample(PAIRS, 5, seed, "a.safetensors")}
    assert seen == set(PAIRS)  # each is left out of all 200 with probability 0.9^200, 7e-10


# --- structure ---------------------------------------------------------------------------------


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return {
        "norm.weight": torch.ones(8, dtype=torch.bfloat16),
        "q_proj.weight": gaussian((128, 256)).to(torch.float8_e4m3fn),
        "q_proj.weight_scale_inv": torch.ones(1, 2, dtype=torch.bfloat16),
    }


@pytest.fixture
def planned(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> ShardPlan:
    """A plan of a shard that holds `tensors` just as safetensors lays them out."""
    path = tmp_path / "planned" / "model.safetensors"
    path.parent.mkdir()
    save_file(tensors, path)
    shard = read_shard(path)
    outputs = list(shard.tensors)
    return ShardPlan(shard, b"", (), tuple(Passthrough(o.start, o) for o in outputs), shard.size)


def problems(tmp_path: Path, planned: ShardPlan, tensors: dict[str, torch.Tensor]) -> list[str]:
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    return structural_problems(planned, path)


def test_shard_as_planned_has_no_problems(tmp_path: Path, planned: ShardPlan, tensors: dict):
    assert problems(tmp_path, planned, tensors) == []


def test_missing_tensor_is_named(tmp_path: Path, planned: ShardPlan, tensors: dict):
    del tensors["norm.weight"]
    assert "norm.weight: missing from model.safetensors" in problems(tmp_path, planned, tensors)


def test_extra_tensor_is_named(tmp_path: Path, planned: ShardPlan, tensors: dict):
    tensors["z_proj.weight"] = torch.ones(1, dtype=torch.uint8)
    found = problems(tmp_path, planned, tensors)
    assert "z_proj.weight: in model.safetensors but not in the plan" in found


def test_other_dtype_is_named_with_both(tmp_path: Path, planned: ShardPlan, tensors: dict):
    tensors["q_proj.weight_scale_inv"] = torch.ones(1, 2, dtype=torch.float16)
    (found,) = problems(tmp_path, planned, tensors)
    assert found.startswith("q_proj.weight_scale_inv: F16 [1, 2] in model.safetensors, planned BF16 [1, 2]")


def test_other_scale_shape_is_named_with_both(tmp_path: Path, planned: ShardPlan, tensors: dict):
    tensors["q_proj.weight_scale_inv"] = torch.ones(2, 1, dtype=torch.bfloat16)
    (found,) = problems(tmp_path, planned, tensors)
    assert found.startswith("q_proj.weight_scale_inv: BF16 [2, 1] in model.safetensors, planned BF16 [1, 2]")


def test_tensor_at_another_offset_is_a_problem(tmp_path: Path, planned: ShardPlan, tensors: dict):
    first, *rest = planned.passthrough
    moved = replace(first, output=replace(first.output, start=first.output.start + 8))
    assert len(problems(tmp_path, replace(planned, passthrough=(moved, *rest)), tensors)) == 1


def test_truncated_shard_is_refused(tmp_path: Path, planned: ShardPlan):
    path = tmp_path / "model.safetensors"
    path.write_bytes(planned.source.path.read_bytes()[:-1])
    with pytest.raises(Fp8Error, match=r"model\.safetensors"):
        structural_problems(planned, path)


# --- devices -----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("size", [1.0, 2.0**-100, 2.0**100])
def test_cuda_measures_the_same(size: float):
    weights = (gaussian((710, 1300)) * size).bfloat16()
    codes, scales = quantized(weights)
    there = combine("w", [measure(weights.cuda(), codes.cuda(), scales.cuda())])
    assert_same(there, measured(weights, codes, scales))
