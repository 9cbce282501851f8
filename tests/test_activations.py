"""Activations as engines quantize them: per token and 128 channels, E4M3, dynamic scales."""

import pytest
import torch

import outputs_reference
from fp8lib.numerics.activations import as_quantized

POWERS = pytest.mark.parametrize("power_of_two", [False, True])


@POWERS
def test_values_are_those_of_a_look_up_table(power_of_two):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 384, generator=generator) * torch.logspace(-8, 8, 40)[:, None]
    found = as_quantized(x, power_of_two=power_of_two)
    assert found.dtype == torch.float32
    assert torch.equal(found, outputs_reference.rounded_activations(x, power_of_two))


def test_tokens_and_groups_of_128_channels_have_scales_of_their_own():
    x = torch.ones(2, 256)
    x[0, 5], x[1, 200] = 448.0 * 2**20, 448.0 * 2**20
    found = as_quantized(x)
    assert found[0, :128].count_nonzero() == 1  # beside 4.7e8 a one is nothing
    assert torch.equal(found[0, 128:], x[0, 128:])
    assert torch.equal(found[1, :128], x[1, :128])


def test_a_power_of_two_scale_is_the_smallest_that_clips_nothing():
    for largest, power in ((448.0, 1.0), (449.0, 2.0), (224.0, 0.5)):
        x = torch.zeros(1, 128)
        x[0, 0], x[0, 1] = largest, 2.0**-9 * power  # the smallest step of E4M3 at this scale
        assert as_quantized(x, power_of_two=True)[0, 1] == x[0, 1], largest
        x[0, 1] /= 2  # half of it is a tie and goes to 0
        assert as_quantized(x, power_of_two=True)[0, 1] == 0, largest


@POWERS
def test_zeros_stay_zeros_and_faint_values_use_the_engines_floor(power_of_two):
    x = torch.zeros(2, 128)
    x[1, 0] = 1e-13  # a thousandth of the floor: 0.448 of 448, and E4M3 has that to 1/16
    found = as_quantized(x, power_of_two=power_of_two)
    assert not found[0].any()
    torch.testing.assert_close(found[1, 0], x[1, 0], rtol=1 / 16, atol=0)
    assert found[1, 0] == outputs_reference.rounded_activations(x, power_of_two)[1, 0]


@POWERS
@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_visible(power_of_two, broken):
    x = torch.ones(1, 256)
    x[0, 3] = broken
    found = as_quantized(x, power_of_two=power_of_two)
    assert not found[0, :128].isfinite().any()
    assert found[0, 128:].isfinite().all()


def test_channels_that_fill_no_group_are_a_group_of_their_own():
    x = torch.randn(3, 200, generator=torch.Generator().manual_seed(0))
    found = as_quantized(x)
    assert torch.equal(found[:, :128], as_quantized(x[:, :128]))
    assert torch.equal(found[:, 128:], as_quantized(torch.nn.functional.pad(x[:, 128:], (0, 56)))[:, :72])
