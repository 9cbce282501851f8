"""Bands, verdict and statement: what is said is true."""

import math
import re
from itertools import product

import numpy as np
import pytest
import torch

from fp8lib import Fp8Error
from fp8lib.numerics.modes import SCALE_FORMATS, Calibration
from fp8lib.numerics.scales import quantize_blocks
from fp8lib.verification.bands import (
    BANDS,
    COSINE,
    MAX_ABS,
    MEAN_ABS,
    Bands,
    Reason,
    Zone,
    judge_tensor,
    zone_of,
)
from fp8lib.verification.health import Health, judge
from fp8lib.verification.measure import combine, measure
from fp8lib.verification.measurement import Measurement, max_or_nan

GOOD, WARN, FAIL = Zone.GOOD, Zone.WARN, Zone.FAIL
FLAG = re.compile(r"--\w+")


def measured(name: str = "model.layers.0.mlp.up_proj.weight", **changes: float) -> Measurement:
    """A tensor whose every metric is GOOD, but for the changes."""
    metrics = {"cosine": 0.9998, "mean_abs": 0.0004, "max_abs": 0.004, "relative": 0.02}
    served = {f"served_{metric}": value for metric, value in metrics.items()}
    others = {"weights": 16384, "amax": 0.1, "vs_best": 1.0, "zero_share": 0.0, "bulk_error": 0.026}
    counts = {"not_nearest": 0, "other_scales": 0, "requantized": 0}
    return Measurement(name, **{**metrics, **served, **others, **counts, **changes})


def low(cosine: float, name: str = "model.layers.0.mlp.up_proj.weight", **changes: float) -> Measurement:
    """A tensor with a cosine that another scale would improve."""
    return measured(name, cosine=cosine, vs_best=1.2, **changes)


def calibrated(mode: str, clips: bool = False, scale_format: str = "bf16") -> Calibration:
    """A calibration of that mode; `percentile` clips below 100, `rms` where it saturates, others never."""
    return Calibration(mode, rms_saturate=clips, percentile=99.9 if clips else 100, scale_format=scale_format)


AT_THE_LIMIT = measured(cosine=0.99965)
"""What every near-Gaussian tensor looks like in every mode that does not clip."""


def health_of(*measurements: Measurement) -> Health:
    return judge(measurements, [])


def of_weights(weights: torch.Tensor, calibration: Calibration) -> Measurement:
    codes, scales = quantize_blocks(weights, calibration)
    return combine("w", [measure(weights, codes, scales, powers_of_two=calibration.powers_of_two)])


# --- bands -------------------------------------------------------------------------------------

JUST = 1e-9


@pytest.mark.parametrize(
    ("band", "value", "zone"),
    [
        (COSINE, 1.0, GOOD),
        (COSINE, 0.9997, GOOD),
        (COSINE, 0.9997 - JUST, WARN),
        (COSINE, 0.9995, WARN),
        (COSINE, 0.9995 - JUST, FAIL),
        (COSINE, 0.0, FAIL),
        (COSINE, -1.0, FAIL),
        (MEAN_ABS, 0.0, GOOD),
        (MEAN_ABS, 0.0008, GOOD),
        (MEAN_ABS, 0.0008 + JUST, WARN),
        (MEAN_ABS, 0.001, WARN),
        (MEAN_ABS, 0.001 + JUST, FAIL),
        (MEAN_ABS, math.inf, FAIL),
        (MAX_ABS, 0.0, GOOD),
        (MAX_ABS, 0.01, GOOD),
        (MAX_ABS, 0.01 + JUST, WARN),
        (MAX_ABS, 0.02, WARN),
        (MAX_ABS, 0.02 + JUST, FAIL),
        (MAX_ABS, math.inf, FAIL),
    ],
)
def test_a_limit_belongs_to_the_better_zone(band, value: float, zone: Zone):
    assert band.zone(value) is zone


@pytest.mark.parametrize("band", BANDS, ids=lambda band: band.metric)
def test_nan_is_fail(band):
    assert band.zone(math.nan) is FAIL
    assert zone_of(measured(**{band.metric: math.nan})) is FAIL


def test_bands_cover_five_metrics_of_a_measurement():
    metrics = ["cosine", "mean_abs", "max_abs", "zero_share", "bulk_error"]
    assert [band.metric for band in BANDS] == metrics
    assert all(hasattr(measured(), metric) for metric in metrics)


@pytest.mark.parametrize(
    ("changes", "zone"),
    [
        ({}, GOOD),
        ({"cosine": 0.9996, "vs_best": 1.2}, WARN),
        ({"mean_abs": 0.0009}, WARN),
        ({"max_abs": 0.015}, WARN),
        ({"cosine": 0.9996, "max_abs": 0.03}, FAIL),
        ({"cosine": 0.9, "mean_abs": 0.0009}, FAIL),
        ({"mean_abs": 0.002, "vs_best": 1.2}, FAIL),
        ({"zero_share": 0.001}, GOOD),
        ({"zero_share": 0.02}, WARN),
        ({"zero_share": 0.06}, FAIL),
        ({"bulk_error": 0.1}, WARN),
        ({"bulk_error": 1.0}, FAIL),
        ({"amax": 100.0, "vs_best": 5.0}, GOOD),  # no metrics
    ],
)
def test_a_tensors_zone_is_that_of_its_worst_metric(changes: dict, zone: Zone):
    assert zone_of(measured(**changes)) is zone


def test_all_zero_tensor_reproduced_exactly_is_good():
    zeros = torch.zeros(256, 128, dtype=torch.bfloat16)
    assert zone_of(of_weights(zeros, Calibration())) is GOOD


@pytest.mark.parametrize("values", [[math.nan, 1.0], [1.0, math.nan], [math.nan]])
def test_the_worst_of_values_with_nan_is_nan(values: list[float]):
    assert math.isnan(max_or_nan(values))


def test_the_worst_of_numbers_is_the_largest():
    assert max_or_nan(iter([1.0, 3.0, 2.0])) == 3.0


# --- verdict -----------------------------------------------------------------------------------


def test_verdict_is_the_worst_tensors_zone():
    good, warn, fail = measured(), low(0.9996), low(0.9)
    assert health_of(good, good).verdict is GOOD
    assert health_of(good, warn, good).verdict is WARN
    assert health_of(fail, warn, good).verdict is FAIL


def test_counts_add_up_per_zone():
    health = health_of(measured(), measured(), low(0.9996), measured(cosine=math.nan))
    assert health.counts == {GOOD: 2, WARN: 1, FAIL: 1}


def test_flagged_are_all_that_are_not_good_the_worst_first():
    tensors = {
        "a": low(0.9996, "a"),
        "b": measured("b"),
        "c": low(0.7, "c"),
        "d": measured("d", max_abs=1.0),
        "e": low(0.9, "e"),
        "f": low(0.9996, "f"),
    }
    health = health_of(*tensors.values())
    assert [(j.zone, m.name) for j, m in health.flagged] == [
        (FAIL, "c"), (FAIL, "e"), (FAIL, "d"), (WARN, "a"), (WARN, "f"),
    ]  # fmt: skip
    assert all(m is tensors[m.name] for _, m in health.flagged)


def test_a_tensor_that_could_not_be_measured_is_flagged_before_all_others():
    tensors = [measured("a", cosine=0.9), measured("nan", cosine=math.nan), measured("b", cosine=0.5)]
    for order in ([0, 1, 2], [1, 0, 2], [2, 0, 1]):
        health = health_of(*(tensors[i] for i in order))
        assert [m.name for _, m in health.flagged] == ["nan", "b", "a"]


def test_structural_problem_is_fail_whatever_the_numbers_say():
    health = judge([measured()], ["x.weight: missing from model.safetensors"])
    assert health.verdict is FAIL
    assert "Do not deploy" in health.statement
    assert "--overwrite" in health.statement
    assert health.recommendations == ()  # nothing is wrong with the settings


def test_structural_problem_is_fail_without_any_measurement():
    assert judge([], ["x"]).verdict is FAIL


def test_nothing_measured_says_so():
    health = health_of()
    assert health.verdict is GOOD
    assert health.statement == "Nothing was spot-checked."
    assert health.recommendations == ()


# --- at the limit of E4M3 ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "zone", "reason"),
    [
        ({"cosine": 0.99965}, GOOD, Reason.AT_LIMIT),
        ({"cosine": 0.9995, "vs_best": 1.10}, GOOD, Reason.AT_LIMIT),
        ({"cosine": 0.99965, "vs_best": 1.11}, WARN, Reason.OUT_OF_BAND),
        ({"cosine": 0.99965, "vs_best": math.nan}, WARN, Reason.OUT_OF_BAND),
        ({"cosine": 0.9994}, FAIL, Reason.OUT_OF_BAND),  # the hard limit stays
        ({"cosine": 0.9997}, GOOD, Reason.IN_BAND),
        ({"cosine": 0.99965, "bulk_error": 0.1}, WARN, Reason.OUT_OF_BAND),
    ],
)
def test_a_low_cosine_that_no_scale_improves_is_good(changes: dict, zone: Zone, reason: Reason):
    found = judge_tensor(measured(**changes))
    assert (found.zone, found.reason) == (zone, reason)


def test_good_at_the_limit_says_so_and_recommends_nothing():
    health = health_of(AT_THE_LIMIT, measured())
    assert health.verdict is GOOD
    assert "at the limit of E4M3" in health.statement
    assert "Ready to deploy" in health.statement
    assert (health.flagged, health.recommendations) == ((), ())
    assert health.reasons[Reason.AT_LIMIT] == health.reasons[Reason.IN_BAND] == 1


def test_good_without_tensors_at_the_limit_does_not_mention_it():
    assert health_of(measured(), measured()).statement == "Every metric is in its GOOD band. Ready to deploy."


# --- large weights -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "zone", "reason"),
    [
        (
            {"max_abs": 0.0625, "amax": 1.0625},
            WARN,
            Reason.LARGE_WEIGHTS,
        ),  # 1/17 of it: rounding at its worst
        ({"max_abs": 0.0626, "amax": 1.0625}, FAIL, Reason.OUT_OF_BAND),  # more than rounding
        ({"mean_abs": 0.5, "amax": 50.0}, WARN, Reason.LARGE_WEIGHTS),
        ({"mean_abs": 0.5, "amax": 50.0, "vs_best": 1.2}, FAIL, Reason.OUT_OF_BAND),
        ({"mean_abs": 0.5, "amax": 50.0, "cosine": 0.9996}, WARN, Reason.LARGE_WEIGHTS),
        ({"mean_abs": 0.5, "amax": 50.0, "cosine": 0.9994}, FAIL, Reason.OUT_OF_BAND),
        ({"mean_abs": 0.5, "amax": 50.0, "zero_share": 0.01}, FAIL, Reason.OUT_OF_BAND),
        ({"mean_abs": math.nan}, FAIL, Reason.OUT_OF_BAND),
        ({"mean_abs": 0.0009}, WARN, Reason.LARGE_WEIGHTS),
    ],
)
def test_absolute_errors_of_large_weights_are_warn(changes: dict, zone: Zone, reason: Reason):
    if math.isnan(changes.get("mean_abs", 0)):
        changes |= {"max_abs": math.nan}
    found = judge_tensor(measured(**changes))
    assert (found.zone, found.reason) == (zone, reason)


def test_a_verdict_of_large_weights_names_the_tensor_and_lists_nothing_to_mend():
    worst = measured("worst", max_abs=0.03, amax=0.61)
    health = health_of(measured("mild", max_abs=0.011, amax=0.35), measured(), worst)
    assert health.verdict is WARN
    assert "weights are large (up to 0.61 in worst)" in health.statement
    assert "2 tensors" in health.statement
    assert [m.name for _, m in health.flagged] == ["mild", "worst"]
    assert health.to_mend == []
    assert health.recommendations == ()


@pytest.mark.parametrize("size", [4.0, 2.0**-10])
def test_the_same_weights_times_anything_have_the_same_relative_figures(size: float):
    # 4 x 0.02 is outside of the absolute bands, 0.02 / 1024 far inside: WARN for the one, and the other is
    # judged by what does not depend on the size.
    plain, scaled = (of_weights((gaussian() * s).bfloat16(), Calibration()) for s in (1.0, size))
    for field in ("cosine", "vs_best", "bulk_error", "zero_share"):
        assert getattr(scaled, field) == pytest.approx(getattr(plain, field), rel=1e-9)
    assert zone_of(scaled) is (WARN if size > 1 else GOOD)


def test_small_weights_that_are_spoiled_fail_although_no_absolute_error_is_large():
    weights = (gaussian() * 0.001).bfloat16()
    codes, scales = quantize_blocks(weights, Calibration())
    found = combine("w", [measure(weights, codes, scales * 1.5)])
    assert found.max_abs < MAX_ABS.good
    assert zone_of(found) is FAIL


# --- limits of one's own -----------------------------------------------------------------------


def test_bands_can_be_set():
    bands = Bands.parse(["cosine=0.9995,0.995", "maxae=1,2"])
    assert (bands.cosine.good, bands.cosine.hard) == (0.9995, 0.995)
    assert bands.mean_abs == MEAN_ABS
    assert zone_of(low(0.996), bands) is WARN
    assert zone_of(low(0.996)) is FAIL
    assert zone_of(measured(max_abs=1.5), bands) is WARN
    assert bands.changed() == ["cosine=0.9995,0.995", "maxae=1,2"]
    assert Bands.parse([]) == BANDS


@pytest.mark.parametrize(
    ("texts", "named"),
    [
        (["kl=1,2"], "one of cosine, mae, maxae"),
        (["cosine"], "two limits"),
        (["cosine=0.9"], "two limits"),
        (["mae=a,b"], "two limits"),
        (["mae=1,2,3"], "two limits"),
        (["mae=nan,1"], "from 0 on"),
        (["mae=0,inf"], "from 0 on"),
        (["mae=-1,1"], "from 0 on"),
        (["cosine=1.1,0.9"], "from 0 to 1"),
        (["cosine=0.9,0.99"], "the worse of the two"),
        (["maxae=2,1"], "the worse of the two"),
        (["mae=1,2", "mae=1,2"], "given twice"),
    ],
)
def test_bands_that_make_no_sense_are_refused(texts: list[str], named: str):
    with pytest.raises(Fp8Error, match=named):
        Bands.parse(texts)


# --- statement ---------------------------------------------------------------------------------


def test_warn_that_something_can_be_done_about_asks_for_an_evaluation():
    assert "Evaluate the model" in health_of(low(0.9996)).statement


def test_fail_says_not_to_deploy():
    assert "Do not deploy" in health_of(measured(cosine=0.99)).statement


@pytest.mark.parametrize(
    ("finished", "flags"),
    [(True, ["--input_dir"]), (False, ["--overwrite"])],
    ids=["finished", "just written"],
)
def test_damage_names_the_files_and_never_a_mode(finished: bool, flags: list[str]):
    health = judge(
        [measured(cosine=0.5, vs_best=9.0)],
        ["a.safetensors: 3 codes …"],
        finished,
        damaged=["a.safetensors", "b", "c", "d"],
    )
    assert health.verdict is FAIL
    assert "a.safetensors, b, c and 1 more" in health.statement
    assert FLAG.findall(health.statement) == flags
    assert "rite again" in health.statement
    assert health.recommendations == ()


def test_a_directory_that_was_made_earlier_is_not_told_to_be_made_by_overwriting_alone():
    health = judge([measured()], ["x.weight: missing"], finished=True)
    assert health.verdict is FAIL
    assert "not a quantization of this --input_dir" in health.statement
    assert FLAG.findall(health.statement) == ["--input_dir", "--input_dir"]


def test_structural_problem_is_said_before_anything_about_numbers():
    problem = ["x.weight: missing"]
    assert judge([AT_THE_LIMIT], problem).statement == judge([], problem).statement


# --- the numbers that the bands rest on, measured ------------------------------------------------


def student_t() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(1).standard_t(5, (512, 512)) * 0.0155)


def gaussian() -> torch.Tensor:
    return torch.randn(512, 512, generator=torch.Generator().manual_seed(1)) * 0.02


@pytest.mark.parametrize("scale_format", SCALE_FORMATS)
@pytest.mark.parametrize("mode", ["max", "rms", "mse"])
def test_gaussian_weights_are_good_in_every_mode_that_does_not_clip(mode: str, scale_format: str):
    # Down to a tensor of one block: measured minimum of 200 such tensors 0.999635, maximum 0.999668. A power
    # of two does not follow the weights' size: hence an octave of sizes.
    calibration = calibrated(mode, scale_format=scale_format)
    for size in (1, 1.2, 1.4, 1.7):
        blocks = (gaussian() * size).bfloat16().split(128)
        for block in blocks:
            found = of_weights(block[:, :128].contiguous(), calibration)
            assert 0.99963 < found.cosine < 0.99968
            assert judge_tensor(found).reason is Reason.AT_LIMIT
            # The smaller half spans fewer octaves, so a scale's phase tells more: 0.0233 to 0.0272 measured.
            assert 0.022 < found.bulk_error < 0.029


def test_gaussian_weights_of_the_usual_size_are_told_exactly_that():
    for mode, scale_format in product(("max", "rms", "mse"), SCALE_FORMATS):
        found = of_weights(gaussian().bfloat16(), calibrated(mode, scale_format=scale_format))
        health = health_of(found)
        assert health.verdict is GOOD
        assert "at the limit of E4M3" in health.statement


def test_one_huge_weight_is_seen_although_the_cosine_is_not():
    weights = gaussian().repeat(4, 4).bfloat16()
    weights[5, 7] = 1e5
    found = of_weights(weights, Calibration())
    assert found.cosine > 0.9999999
    # All others of its block are zero now: 16,383 of 4,194,304.
    assert found.zero_share == pytest.approx(16383 / 2048**2, rel=0.02)
    assert found.bulk_error == 1.0
    assert zone_of(found) is FAIL
