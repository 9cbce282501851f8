"""Every tensor of an output against a model of it: what safetensors reads and NumPy computes, no code shared.

The pieces a worker takes are made small here, so that beginnings and ends of pieces lie everywhere.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import e4m3_reference as reference
from fp8lib.streaming import shard_job, units

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
KEPT_AS_THEY_ARE = {
    "model.norm.weight": torch.bfloat16,
    "model.layers.0.linear_attn.A_log": torch.float32,
    "model.step": torch.int64,
    "model.flags": torch.bool,
    "model.bytes": torch.uint8,
    "model.half": torch.float16,
    "model.double": torch.float64,
}


@pytest.fixture
def source(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Two shards of one layer, whose every matrix has another size and other values."""
    dtype = request.param
    folder = tmp_path / "in"
    folder.mkdir()
    generator = torch.Generator().manual_seed(1)

    def weight(*shape: int) -> torch.Tensor:
        # Rows of other magnitudes: a block that is read from elsewhere has another scale.
        rows = torch.linspace(-3, 3, shape[-2]).exp2()[:, None]
        return (torch.randn(shape, generator=generator) * 0.02 * rows).to(dtype)

    layer = "model.layers.0"
    first = {
        f"{layer}.mlp.experts.gate_up_proj": weight(3, 2 * 256, 384),
        f"{layer}.mlp.experts.down_proj": weight(3, 384, 256),
        f"{layer}.self_attn.o_proj.weight": weight(300, 128),
        "model.embed_tokens.weight": weight(101, 67),
    }
    second = {
        f"{layer}.linear_attn.in_proj_qkv.weight": weight(640, 256),
        f"{layer}.linear_attn.in_proj_z.weight": weight(256, 256),
        # Kept for where they are; both, as engines fuse the two.
        "model.visual.layers.0.mlp.gate_proj.weight": weight(128, 128),
        "model.visual.layers.0.mlp.up_proj.weight": weight(128, 128),
    }
    for i, (name, kind) in enumerate(KEPT_AS_THEY_ARE.items()):
        values = torch.randint(0, 2, (i + 1,), generator=generator)
        (first if i % 2 else second)[name] = values.to(kind)
    save_file(first, folder / "model-00001-of-00002.safetensors", {"format": "pt", "made by": "a test"})
    save_file(second, folder / "model-00002-of-00002.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_5_moe_text"}))
    return folder


def expected_weights(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The originals of what is to be FP8, by output name."""
    layer, found = "model.layers.0", {}
    for name, tensor in state.items():
        if name == f"{layer}.mlp.experts.gate_up_proj":
            for e in range(len(tensor)):
                found[f"{layer}.mlp.experts.{e}.gate_proj.weight"] = tensor[e, : tensor.shape[1] // 2]
                found[f"{layer}.mlp.experts.{e}.up_proj.weight"] = tensor[e, tensor.shape[1] // 2 :]
        elif name == f"{layer}.mlp.experts.down_proj":
            found |= {f"{layer}.mlp.experts.{e}.down_proj.weight": tensor[e] for e in range(len(tensor))}
        elif name.endswith((".o_proj.weight", ".in_proj_qkv.weight", ".in_proj_z.weight")):
            found[name] = tensor
    return found


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("source", DTYPES, indirect=True, ids=str)
@pytest.mark.parametrize("workers", [1, 3])
def test_every_tensor_of_the_output_is_what_it_should_be(
    source: Path, workers: int, tmp_path: Path, cli: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_job, "CPU_PIECE", 1)  # a row of blocks
    monkeypatch.setattr(units, "COPY_PIECE", 1000)
    flags = ("--calib_mode", "max", "--skip_verify", "--workers", workers)
    result = cli("--input_dir", source, "--output_dir", tmp_path / "out", *flags)
    assert result.rc == 0, result.err
    for path in sorted(source.glob("*.safetensors")):
        original, output = load_file(path), load_file(tmp_path / "out" / path.name)
        weights = expected_weights(original)
        kept = {n: t for n, t in original.items() if n not in weights and ".mlp.experts." not in n}
        assert output.keys() == kept.keys() | weights.keys() | {f"{name}_scale_inv" for name in weights}
        for name, tensor in kept.items():
            assert (output[name].dtype, output[name].shape) == (tensor.dtype, tensor.shape), name
            assert raw(output[name]) == raw(tensor), name
        for name, tensor in weights.items():
            codes, scales = output[name], output[f"{name}_scale_inv"]
            assert (codes.dtype, codes.shape) == (torch.float8_e4m3fn, tensor.shape), name
            assert scales.dtype == torch.bfloat16, name
            assert scales.shape == tuple(-(-n // 128) for n in tensor.shape), name
            w, s = reference.numpy64(tensor), reference.numpy64(scales)
            amax = np.array([np.abs(block).max() for *_, block in reference.tiles(w)]).reshape(s.shape)
            # A power-of-two scale may be up to twice amax/448; BF16 rounds by 1/256 at most.
            assert (s >= amax / 448 * (1 - 2**-8)).all(), name
            assert (s < amax / 448 * 2 * (1 + 2**-8)).all(), name
            quotients = reference.quotients(w, reference.per_element(s, w.shape))
            assert (reference.numpy64(codes) == reference.rounded(quotients)).all(), name
        with safe_open(path, "pt") as before, safe_open(tmp_path / "out" / path.name, "pt") as after:
            assert after.metadata() == (before.metadata() or {"format": "pt"})


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize(("row", "column"), [(0, 0), (127, 255), (128, 0), (299, 127), (299, 255)])
def test_a_weight_that_is_not_a_number_is_named_wherever_it_is(
    row: int, column: int, value: float, tmp_path: Path, cli: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_job, "CPU_PIECE", 1)
    name = "model.layers.0.mlp.down_proj.weight"
    weight = torch.full((300, 256), 2.0**-8).bfloat16()
    weight[row, column] = value
    (tmp_path / "in").mkdir()
    (tmp_path / "in/config.json").write_text(json.dumps({"model_type": "qwen3_5"}))
    save_file({name: weight}, tmp_path / "in/model.safetensors")
    result = cli("--input_dir", tmp_path / "in", "--output_dir", tmp_path / "out", "--skip_verify")
    assert result.rc == 2
    assert f"NaN or infinity in {name}" in result.err
    assert not (tmp_path / "out/config.json").exists()
