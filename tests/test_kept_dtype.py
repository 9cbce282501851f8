"""--kept_dtype bfloat16: what is kept of an F32 or F16 input becomes BF16, but for what must be precise."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tiny_checkpoints import tensors

SMALL = {"num_hidden_layers": 4, "num_experts": 4, "num_experts_per_tok": 1, "shards": 2}
FLAGS = ("--kept_dtype", "bfloat16", "--verify_samples", "all")


@pytest.fixture(scope="module", params=[torch.float32, torch.float16], ids=["F32", "F16"])
def original(request: pytest.FixtureRequest, checkpoint: Callable) -> Path:
    return checkpoint("moe", dtype=request.param, **SMALL)


def is_precise(name: str) -> bool:
    module, _, last = name.rpartition(".")
    return last in ("A_log", "dt_bias") or module.endswith(".mlp.gate") or "norm" in module.rpartition(".")[2]


def test_kept_tensors_are_rounded_but_for_routers_norms_and_states(
    original: Path, quantized: Callable
) -> None:
    before, after = tensors(original), tensors(quantized(original, *FLAGS))
    kept = [name for name in after if name in before and after[name].dtype != torch.float8_e4m3fn]
    rounded = [name for name in kept if not is_precise(name)]
    assert any("embed_tokens" in name for name in rounded)
    assert any("visual" in name for name in rounded)
    assert all(torch.equal(after[name], before[name].bfloat16()) for name in rounded)
    precise = [name for name in kept if is_precise(name)]
    assert {"A_log", "dt_bias", "weight", "bias"} == {name.rpartition(".")[2] for name in precise}
    assert all(torch.equal(after[name], before[name]) for name in precise)
    assert all(after[name].dtype == before[name].dtype for name in precise)


def test_fp8_weights_and_scales_are_those_without_the_flag(original: Path, quantized: Callable) -> None:
    plain, rounded = tensors(quantized(original)), tensors(quantized(original, *FLAGS))
    fp8 = [name for name in plain if f"{name}_scale_inv" in plain]
    assert fp8
    for name in (each + suffix for each in fp8 for suffix in ("", "_scale_inv")):
        assert torch.equal(plain[name].view(torch.uint8), rounded[name].view(torch.uint8))


def test_config_names_the_new_dtype(original: Path, quantized: Callable) -> None:
    before, after = (
        json.loads((folder / "config.json").read_text()) for folder in (original, quantized(original, *FLAGS))
    )
    keys = [key for key in ("dtype", "torch_dtype") if key in before]
    assert keys
    assert all(after[key] == "bfloat16" for key in keys)
    assert after["text_config"]["mamba_ssm_dtype"] == "float32"
    assert "float16" not in json.dumps(after).replace("bfloat16", "")


def test_the_plan_says_the_sizes_that_are_written(original: Path, quantized: Callable, cli: Callable) -> None:
    folder = quantized(original, *FLAGS)
    plan = cli("--input_dir", original, "--kept_dtype", "bfloat16", "--dry_run").out
    written = sum(p.stat().st_size for p in folder.iterdir() if p.name != "fp8_quantization.json")
    assert f"-> {written / 1e6:.2f}MB" in plan.split("  Size ")[1].splitlines()[0]


def test_verification_compares_the_rounded_values(
    original: Path, quantized: Callable, cli: Callable, copy_of: Callable
) -> None:
    folder = copy_of(quantized(original, *FLAGS))
    command = ("--input_dir", original, "--output_dir", folder, "--verify_only", "--verify_samples", "all")
    assert cli(*command).rc == 0
    (folder / "fp8_quantization.json").unlink()  # any tool's
    assert cli(*command).rc == 0
    path = folder / "model-00001-of-00002.safetensors"
    state = load_file(path)
    name = next(name for name in state if "embed_tokens" in name)
    state[name].view(torch.int16)[3, 5] ^= 1  # the last bit of one value
    save_file(state, path)
    result = cli(*command)
    assert result.rc == 1
    assert f"{name}: 1 of {state[name].numel():,} values are not the input's" in " ".join(result.out.split())


def test_another_kept_dtype_does_not_continue_a_run(
    original: Path, quantized: Callable, cli: Callable
) -> None:
    result = cli("--input_dir", original, "--output_dir", quantized(original, *FLAGS))
    assert result.rc == 2
    assert "kept_dtype" in result.err


def test_an_f32_input_is_told_of_the_flag_and_a_bf16_one_that_it_does_nothing(
    checkpoint: Callable, cli: Callable
) -> None:
    note = cli("--input_dir", checkpoint("moe", dtype=torch.float32, **SMALL), "--dry_run").err
    assert "kept tensors stay F32" in note
    assert "--kept_dtype bfloat16 halves them" in note
    nothing = cli("--input_dir", checkpoint("text"), "--dry_run", "--kept_dtype", "bfloat16").err
    assert "--kept_dtype has no effect" in nothing


def test_a_value_too_large_for_bf16_is_refused(
    tmp_path: Path, checkpoint: Callable, copy_of: Callable, cli: Callable
) -> None:
    """The largest F32 rounds to infinity."""
    folder = copy_of(checkpoint("text", dtype=torch.float32, num_hidden_layers=1))
    path = folder / "model.safetensors"
    state = load_file(path)
    state["model.embed_tokens.weight"][7, 7] = torch.finfo(torch.float32).max
    save_file({k: v.contiguous() for k, v in state.items()}, path)
    assert cli("--input_dir", folder, "--output_dir", tmp_path / "out").rc == 0
    result = cli("--input_dir", folder, "--output_dir", tmp_path / "other", "--kept_dtype", "bfloat16")
    assert result.rc == 2
    assert "model.embed_tokens.weight" in result.err
