"""Damage to an FP8 directory, wherever it is: verification finds it, and looks at the disk to find it."""

import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fp8lib.streaming import direct

LAYER = "model.layers.0"
TALL = f"{LAYER}.mlp.down_proj.weight"
"""1,179,648 weights, more than are measured at a time, and a last row of blocks of 28 rows."""
ROWS, COLUMNS = 1180, 1024
EXPERTS = 24
"""72 matrices in another layer: more than one task looks at the scales of."""
FP8_BYTES = ROWS * COLUMNS + EXPERTS * 3 * 128 * 128


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damage") / "in"
    folder.mkdir()
    generator = torch.Generator().manual_seed(3)

    def weight(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.01).bfloat16()

    experts = "model.layers.1.mlp.experts"
    state = {
        TALL: weight(ROWS, COLUMNS),
        f"{experts}.gate_up_proj": weight(EXPERTS, 256, 128),
        f"{experts}.down_proj": weight(EXPERTS, 128, 128),
        "model.norm.weight": weight(8),
    }
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_5_moe_text"}))
    return folder


@pytest.fixture(scope="module")
def sound(original: Path, cli: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "out"
    flags = ("--verify_samples", "all", "--calib_mode", "max")
    assert cli("--input_dir", original, "--output_dir", folder, *flags).rc == 0
    return folder


@pytest.fixture
def verify(original: Path, sound: Path, cli: Callable, tmp_path: Path) -> Callable:
    """`verify(change, *flags)`: the run on a copy whose tensors were changed."""

    def call(change: Callable[[dict[str, torch.Tensor]], object], *flags: object) -> object:
        folder = shutil.copytree(sound, tmp_path / "fp8", dirs_exist_ok=True)
        state = {name: tensor.clone() for name, tensor in load_file(sound / "model.safetensors").items()}
        change(state)
        save_file(state, folder / "model.safetensors")
        (folder / "fp8_quantization.json").unlink(missing_ok=True)  # another program wrote the shard
        return cli("--input_dir", original, "--output_dir", folder, "--verify_only", *flags)

    return call


def flip(name: str, row: int, column: int) -> Callable[[dict[str, torch.Tensor]], object]:
    """Turn a code into plus or minus 448, whichever is farther from what it was."""

    def change(state: dict[str, torch.Tensor]) -> None:
        state[name][row, column] = -448.0 if state[name][row, column].float() > 0 else 448.0

    return change


def test_what_is_sound_is_good(verify: Callable) -> None:
    assert verify(lambda state: None, "--verify_samples", "all").rc == 0


@pytest.mark.parametrize("column", [0, 127, 128, COLUMNS - 1])
@pytest.mark.parametrize("row", [0, 511, 512, 600, 1023, 1024, 1152, ROWS - 1])
def test_one_wrong_code_anywhere_in_a_matrix_fails(row: int, column: int, verify: Callable) -> None:
    """448 times its scale is the block's largest weight at least, 0.03: beyond the limit of 0.02."""
    result = verify(flip(TALL, row, column), "--verify_samples", "all")
    assert result.rc == 1
    assert TALL in result.out


@pytest.mark.parametrize("row", range(-(-ROWS // 128)))
def test_scales_of_any_row_of_blocks_that_are_those_of_another_fail(row: int, verify: Callable) -> None:
    def change(state: dict[str, torch.Tensor]) -> None:
        state[f"{TALL}_scale_inv"][row] *= 4

    assert verify(change, "--verify_samples", "all").rc == 1


@pytest.mark.parametrize("expert", [0, 1, EXPERTS - 1])
@pytest.mark.parametrize("projection", ["gate_proj", "up_proj", "down_proj"])
def test_an_expert_in_anothers_place_fails(projection: str, expert: int, verify: Callable) -> None:
    def change(state: dict[str, torch.Tensor]) -> None:
        others = (expert, (expert + 1) % EXPERTS)
        name, other = (f"model.layers.1.mlp.experts.{e}.{projection}.weight" for e in others)
        for suffix in ("", "_scale_inv"):
            state[name + suffix] = state[other + suffix].clone()

    result = verify(change, "--verify_samples", "all")
    assert result.rc == 1
    assert f"experts.{expert}.{projection}" in result.out


@pytest.mark.parametrize("value", [0.0, -0.001, torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("which", [0, -1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_scale_that_no_weight_can_have_fails_though_its_matrix_is_not_sampled(
    dtype: torch.dtype, which: int, value: float, verify: Callable
) -> None:
    spoiled = [f"model.layers.1.mlp.experts.{EXPERTS - 1}.{p}_proj.weight" for p in ("down", "gate", "up")]
    spoiled += [TALL, "model.layers.1.mlp.experts.0.down_proj.weight"]

    def change(state: dict[str, torch.Tensor]) -> None:
        for name in spoiled:
            scales = state[f"{name}_scale_inv"].to(dtype)
            scales.view(-1)[which] = value
            state[f"{name}_scale_inv"] = scales

    result = verify(change, "--verify_samples", 1)
    assert result.rc == 1
    text = " ".join(result.out.split())
    assert all(f"{name}_scale_inv: " in text for name in spoiled)


# --- the disk, not what the kernel remembers ------------------------------------------------------


@pytest.fixture
def read_directly(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], tuple[int, int]]:
    """`read_directly(path)`: (bytes read past the page cache, all bytes read) of a file so far."""
    reads: list[tuple[str, int, bool]] = []
    preadv = os.preadv

    def noted(descriptor: int, buffers: list, offset: int, *rest: int) -> int:
        count = preadv(descriptor, buffers, offset, *rest)
        is_direct = bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)
        reads.append((os.readlink(f"/proc/self/fd/{descriptor}"), count, is_direct))
        return count

    monkeypatch.setattr(os, "preadv", noted)

    def total(path: Path) -> tuple[int, int]:
        of_file = [(count, is_direct) for name, count, is_direct in reads if name == str(path.resolve())]
        return sum(count for count, is_direct in of_file if is_direct), sum(count for count, _ in of_file)

    return total


def takes_direct(folder: Path) -> bool:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        return direct.takes_direct(descriptor)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("how", ["after writing", "--verify_only"])
def test_fp8_weights_are_read_back_from_the_disk(
    how: str, original: Path, sound: Path, cli: Callable, tmp_path: Path, read_directly: Callable
) -> None:
    if not takes_direct(tmp_path):
        pytest.skip("this file system takes no direct reads")
    folder = sound if how == "--verify_only" else tmp_path / "out"
    flags = ("--verify_only",) if how == "--verify_only" else ()
    arguments = ("--input_dir", original, "--output_dir", folder, "--verify_samples", "all", *flags)
    assert cli(*arguments).rc == 0
    past_cache, all_bytes = read_directly(folder / "model.safetensors")
    # All of the experts and all but the last 28 rows of the other, which are no whole row of blocks; scales
    # are 1/8192 of it, and both are read with what the page cache may hold.
    assert past_cache >= FP8_BYTES - 28 * COLUMNS - 4096
    assert all_bytes < FP8_BYTES * 1.01
    # The input is read once; nobody has written it just now.
    assert read_directly(original / "model.safetensors")[0] == 0
