"""The number format: what `quantize` writes is the nearest E4M3 number, and nothing else."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

import e4m3_reference as reference
from fp8lib.numerics import e4m3
from fp8lib.numerics.blocks import blocks
from safetensors_by_hand import take_apart

# Whole blocks, less than one, and ragged ends on either side or both.
SHAPES = [(128, 128), (256, 384), (1, 1), (70, 128), (128, 33), (129, 257), (200, 300)]


def one_block(values: np.ndarray | list[float]) -> torch.Tensor:
    """Values as a float32 matrix of one row; up to 128 of them share one block."""
    return torch.tensor(np.asarray(values, dtype=np.float32)).reshape(1, -1)


def codes_of(values: np.ndarray | list[float], scale: float = 1.0, saturate: bool = False) -> np.ndarray:
    """E4M3 codes of any number of values under one scale, uint8."""
    weights = one_block(values)
    scales = torch.full((1, blocks(weights.shape[1])), scale, dtype=torch.bfloat16)
    return e4m3.quantize(weights, scales, saturate=saturate).view(torch.uint8).numpy()[0]


def values_of(values: np.ndarray | list[float], scale: float = 1.0, saturate: bool = False) -> np.ndarray:
    """The E4M3 numbers those codes stand for, without the scale."""
    return reference.decode(codes_of(values, scale, saturate))


def random_scales(shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    """A different BF16 scale for every block of a matrix, over three octaves."""
    generator = torch.Generator().manual_seed(seed)
    size = blocks(shape[0]), blocks(shape[1])
    return (2.0 ** (torch.rand(size, generator=generator) * 3 - 10)).bfloat16()


# --- the 256 codes -----------------------------------------------------------------------------


def test_every_code_dequantizes_to_its_definition():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).reshape(1, 256)
    values = e4m3.dequantize(codes, torch.ones(1, 2, dtype=torch.bfloat16))
    expected = reference.decode(np.arange(256, dtype=np.uint8))
    assert np.array_equal(values[0].double().numpy(), expected, equal_nan=True)
    assert np.isnan(expected).sum() == 2  # one NaN per sign; 254 finite codes, no infinity


def test_constants_are_those_of_the_enumeration():
    assert e4m3.MAX == reference.FINITE[-1] == 448
    step = reference.FINITE[-1] - reference.FINITE[-2]
    assert step == 32
    assert reference.FINITE[-1] + step / 2 == e4m3.MAX_ROUNDS_TO_MAX


def test_every_finite_code_survives_a_round_trip_with_its_sign_of_zero():
    codes = np.array([c for c in range(256) if c & 0x7F != 0x7F], dtype=np.uint8)
    assert np.array_equal(codes_of(reference.decode(codes)), codes)


# --- rounding ----------------------------------------------------------------------------------


def test_halfway_values_round_to_the_even_code():
    # All 126 midpoints between neighbouring codes are float32 numbers, so every tie can be met.
    expected = [low + low % 2 for low in range(126)]
    assert list(codes_of(reference.MIDPOINTS)) == expected
    assert list(codes_of(-reference.MIDPOINTS)) == [0x80 | code for code in expected]


def test_a_hair_off_halfway_rounds_to_the_nearer_code():
    middle = reference.MIDPOINTS.astype(np.float32)
    assert list(codes_of(np.nextafter(middle, np.float32(0)))) == list(range(126))
    assert list(codes_of(np.nextafter(middle, np.float32(1000)))) == list(range(1, 127))


def test_the_two_reference_roundings_agree():
    rng = np.random.default_rng(0)
    values = np.concatenate([reference.MIDPOINTS, reference.FINITE, 2 ** rng.uniform(-14, 10, 20_000)])
    assert np.array_equal(reference.nearest(values), reference.rounded(values))


@given(st.lists(st.floats(-448, 448, width=32), min_size=1, max_size=64))
def test_any_value_within_range_becomes_the_nearest_of_the_256_codes(values: list[float]):
    found = values_of(values)
    assert np.array_equal(found, reference.nearest(np.array(values)))
    assert np.array_equal(np.signbit(found), np.signbit(values))


@pytest.mark.parametrize("value", [2.0**-10, 2.0**-30, 1e-38, 1e-45])
def test_half_the_smallest_step_and_less_rounds_to_zero(value: float):
    assert codes_of([value, -value]).tolist() == [0x00, 0x80]  # 2^-10 is a tie; 0 is the even code


def test_more_than_half_the_smallest_step_rounds_to_it():
    assert values_of([np.nextafter(np.float32(2**-10), np.float32(1))]) == [2**-9]


# --- the upper end -----------------------------------------------------------------------------


@pytest.mark.parametrize("saturate", [False, True])
@pytest.mark.parametrize("value", [448.0, 448.01, 456.0, 463.99, 464.0])
def test_up_to_464_rounds_to_448(value: float, saturate: bool):
    # 480, the next number of the pattern, is the NaN code: 464 is a tie and goes to the even 448.
    assert values_of([value, -value], saturate=saturate).tolist() == [448, -448]


@pytest.mark.parametrize("value", [464.001, 480.0, 1000.0, 3e38, np.inf])
def test_above_464_saturates_when_asked_to(value: float):
    # Without being asked it is torch's cast that decides: 448 since torch 2.12, NaN before.
    assert values_of([value, -value], saturate=True).tolist() == [448, -448]


def test_saturation_changes_nothing_within_range():
    values = np.linspace(-448, 448, 10_001)
    assert np.array_equal(codes_of(values, saturate=True), codes_of(values, saturate=False))


def test_a_quotient_beyond_float32_saturates():
    # 3e38 / 2^-126 is infinite in float32; it must still be the largest code, not NaN.
    assert values_of([3e38, -3e38], scale=2.0**-126, saturate=True).tolist() == [448, -448]


# --- scales ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_every_element_is_divided_by_the_scale_of_its_own_block(shape: tuple[int, int]):
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    scales = random_scales(shape)
    codes = e4m3.quantize(weights, scales, saturate=True)
    assert codes.shape == shape
    assert codes.dtype == torch.float8_e4m3fn
    per_element = reference.per_element(reference.numpy64(scales), shape)
    expected = reference.nearest(reference.quotients(weights.numpy(), per_element))
    assert np.array_equal(reference.numpy64(codes), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_dequantized_is_code_times_scale_exactly(shape: tuple[int, int]):
    codes = torch.randn(shape, generator=torch.Generator().manual_seed(2)).mul(100).to(torch.float8_e4m3fn)
    scales = random_scales(shape)
    restored = e4m3.dequantize(codes, scales)
    assert restored.dtype == torch.float32
    # 4 significant bits times 8 fit float32's 24: the product has no rounding.
    expected = reference.numpy64(codes) * reference.per_element(reference.numpy64(scales), shape)
    assert np.array_equal(reference.numpy64(restored), expected)


def test_scales_in_float32_dequantize_like_the_same_scales_in_bf16():
    codes = torch.randn(200, 300, generator=torch.Generator().manual_seed(3)).to(torch.float8_e4m3fn)
    scales = random_scales((200, 300))
    assert torch.equal(e4m3.dequantize(codes, scales), e4m3.dequantize(codes, scales.float()))


def test_weights_are_divided_and_not_multiplied_by_a_reciprocal():
    # scale * midpoint is exact in float32 (8 bits times 5), so the exact quotient is a tie for every
    # scale. A rounded reciprocal would push some of the ties to the wrong side.
    for bits in range(128):
        scale = (1 + bits / 128) * 2.0**-9
        expected = [low + low % 2 for low in range(126)]
        assert list(codes_of(scale * reference.MIDPOINTS, scale)) == expected, scale


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_dtype_of_the_weights_does_not_matter(dtype: torch.dtype):
    # Small integers times 2^-8 are exact in all three.
    weights = torch.randint(-128, 129, (200, 300), generator=torch.Generator().manual_seed(4)) / 256
    scales = random_scales((200, 300))
    expected = e4m3.quantize(weights.double().float(), scales, saturate=True).view(torch.uint8)
    assert torch.equal(e4m3.quantize(weights.to(dtype), scales, saturate=True).view(torch.uint8), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_float16_and_float32_weights_are_not_rounded_to_bf16_on_the_way(dtype: torch.dtype):
    # Just above the tie between 1 and 1.125; as BF16 it would be the tie, and go down to 1.
    just_above = torch.tensor([[1.0625 + 2.0**-10]], dtype=dtype)
    codes = e4m3.quantize(just_above, torch.ones(1, 1, dtype=torch.bfloat16), saturate=False)
    assert codes.float().item() == 1.125


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_inputs_are_left_as_they_were(dtype: torch.dtype):
    weights = torch.randn(130, 130, generator=torch.Generator().manual_seed(5)).to(dtype)
    scales = random_scales((130, 130))
    before = weights.clone(), scales.clone()
    codes = e4m3.quantize(weights, scales, saturate=True)
    e4m3.dequantize(codes, scales)
    assert torch.equal(weights, before[0])
    assert torch.equal(scales, before[1])


# --- on disk -----------------------------------------------------------------------------------


def test_bytes_on_disk_are_the_codes_that_engines_read_back(tmp_path: Path):
    weights = torch.randn(200, 300, generator=torch.Generator().manual_seed(6))
    scales = random_scales((200, 300))
    codes = e4m3.quantize(weights, scales, saturate=True)
    file = tmp_path / "model.safetensors"
    save_file({"weight": codes, "weight_scale_inv": scales}, file)

    with safe_open(file, framework="pt") as opened:
        read, read_scales = opened.get_tensor("weight"), opened.get_tensor("weight_scale_inv")
    assert read.dtype == torch.float8_e4m3fn
    assert torch.equal(read.view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(e4m3.dequantize(read, read_scales), e4m3.dequantize(codes, scales))

    header, data = take_apart(file)  # and without any library: one byte per weight
    raw = np.frombuffer(data[slice(*header["weight"]["data_offsets"])], dtype=np.uint8).reshape(200, 300)
    per_element = reference.per_element(reference.numpy64(scales), (200, 300))
    expected = reference.nearest(reference.quotients(weights.numpy(), per_element))
    assert np.array_equal(reference.decode(raw), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("saturate", [False, True])
def test_cuda_gives_the_same_bytes(saturate: bool):
    weights = torch.randn(1000, 700, generator=torch.Generator().manual_seed(7))
    scales = random_scales((1000, 700))
    here = e4m3.quantize(weights, scales, saturate=saturate)
    there = e4m3.quantize(weights.cuda(), scales.cuda(), saturate=saturate).cpu()
    assert torch.equal(here.view(torch.uint8), there.view(torch.uint8))
    restored = e4m3.dequantize(there.cuda(), scales.cuda()).cpu()
    assert torch.equal(e4m3.dequantize(here, scales).nan_to_num(-1), restored.nan_to_num(-1))


# --- decoding ----------------------------------------------------------------------------------


@pytest.mark.parametrize("nan", [False, True])
def test_every_code_decodes_to_what_torch_makes_of_it(nan: bool) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    if not nan:
        codes = codes[~codes.float().isnan()]
    found, expected = e4m3.decode(codes), codes.float()
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    zeros = expected == 0
    assert torch.equal(found[zeros].signbit(), expected[zeros].signbit())  # there is a -0.0


def test_decoding_nothing_gives_nothing() -> None:
    assert e4m3.decode(torch.empty(0, 128, dtype=torch.float8_e4m3fn)).shape == (0, 128)
