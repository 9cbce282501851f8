"""Every input layout, through the command line, to tensors that safetensors and transformers read.

What an output must hold is worked out here from the config alone, without asking the code under test.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tiny_checkpoints import logits, mean_kl, tensors

# Smaller weights than the builder's 0.02, so that mean KL tells right from wrong. On these models FP8
# costs up to 0.0005; a factor of two in the scales of a single in_proj_qkv, in_proj_z, v_proj, o_proj or
# dense down_proj costs 0.0028 or more (measured). The 0.002 that issue 2 asks for lies between them.
# All 8 experts vote: in BF16 the top-2 of nearly equal router logits flip at random, FP8 or not, and that
# alone is a KL of 0.001.
SMALL = {"std": 0.015}
MOE = {**SMALL, "num_experts_per_tok": 8}

LAYOUTS = {
    "moe, fused experts": ("moe", MOE),
    "moe, one tensor per expert": ("moe", {**MOE, "experts": "per_expert"}),
    "moe, fused experts in 3 shards": ("moe", {**MOE, "shards": 3}),
    "moe, one tensor per expert in 3 shards": ("moe", {**MOE, "experts": "per_expert", "shards": 3}),
    "moe, a shard for nearly every tensor": ("moe", {**MOE, "shards": 90}),
    "moe without mtp": ("moe", {**MOE, "mtp": False}),
    "moe with F32 extras": ("moe", {**MOE, "f32_extras": True}),
    "moe in F16": ("moe", {**MOE, "dtype": torch.float16}),
    "moe in F32, one tensor per expert": ("moe", {**MOE, "dtype": torch.float32, "experts": "per_expert"}),
    "moe text, fused experts": ("moe_text", MOE),
    "moe text, one tensor per expert": ("moe_text", {**MOE, "experts": "per_expert"}),
    "moe text, tied, in 2 shards without an index": (
        "moe_text",
        {**MOE, "tied": True, "shards": 2, "index": False},
    ),
    "dense": ("dense", SMALL),
    "dense, tied embeddings": ("dense", {**SMALL, "tied": True}),
    "dense without mtp": ("dense", {**SMALL, "mtp": False}),
    "dense, a single file with an index": ("dense", {**SMALL, "index": True}),
    "dense in 3 shards": ("dense", {**SMALL, "shards": 3}),
    "dense with F32 extras": ("dense", {**SMALL, "f32_extras": True}),
    "text": ("text", SMALL),
    "text, a vocabulary of 12 MB": ("text", {**SMALL, "vocab_size": 24_000}),  # copied in several pieces
    "text, tied embeddings, no mtp": ("text", {**SMALL, "tied": True, "mtp": False}),
    "text in 3 shards without an index": ("text", {**SMALL, "shards": 3, "index": False}),
    "text, the index misnames the only file": ("text", {**SMALL, "index": "misnamed"}),
    "text in F16": ("text", {**SMALL, "dtype": torch.float16}),
    "text in F32 in 2 shards": ("text", {**SMALL, "dtype": torch.float32, "shards": 2}),
}

each_layout = pytest.mark.parametrize(("kind", "arguments"), LAYOUTS.values(), ids=LAYOUTS)


def fp8_names(kind: str, has_mtp: bool) -> set[str]:
    """Names of the weights that must be FP8: 4 decoder layers, the last with full attention, and mtp's."""
    prefix = "model.layers" if kind in ("text", "moe_text") else "model.language_model.layers"
    layers = {f"{prefix}.{i}": i % 4 == 3 for i in range(4)} | ({"mtp.layers.0": True} if has_mtp else {})
    modules = []
    for layer, full_attention in layers.items():
        if full_attention:
            modules += [f"{layer}.self_attn.{p}_proj" for p in "qkvo"]
        else:
            modules += [f"{layer}.linear_attn.in_proj_qkv", f"{layer}.linear_attn.in_proj_z"]
        mlps = [f"{layer}.mlp.experts.{e}" for e in range(8)] if "moe" in kind else [f"{layer}.mlp"]
        modules += [f"{mlp}.{p}_proj" for mlp in mlps for p in ("gate", "up", "down")]
    return {f"{module}.weight" for module in modules}


def with_single_experts(source: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors, fused expert tensors taken apart: rows 0..I are gate, I..2I are up."""
    found = {}
    for name, tensor in source.items():
        if name.endswith(".mlp.experts.gate_up_proj"):
            experts, half = name.removesuffix(".gate_up_proj"), tensor.shape[1] // 2
            for e, matrix in enumerate(tensor):
                found[f"{experts}.{e}.gate_proj.weight"] = matrix[:half]
                found[f"{experts}.{e}.up_proj.weight"] = matrix[half:]
        elif name.endswith(".mlp.experts.down_proj"):
            experts = name.removesuffix(".down_proj")
            found |= {f"{experts}.{e}.down_proj.weight": matrix for e, matrix in enumerate(tensor)}
        else:
            found[name] = tensor
    return found


def assert_same_bytes(found: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape), name
    # As bytes: NaN equals itself, and -0.0 is not 0.0.
    assert torch.equal(found.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8)), name


def assert_quantized(codes: torch.Tensor, scales: torch.Tensor, original: torch.Tensor, name: str) -> None:
    assert codes.dtype == torch.float8_e4m3fn, name
    assert codes.shape == original.shape, name
    assert scales.dtype == torch.bfloat16, name
    assert scales.shape == tuple(-(-n // 128) for n in original.shape), name
    assert (scales > 0).all(), name
    scale_of_each = scales.double().repeat_interleave(128, 0).repeat_interleave(128, 1)
    scale_of_each = scale_of_each[: original.shape[0], : original.shape[1]]
    error = (codes.double() * scale_of_each - original.double()).abs()
    # 3 mantissa bits round by at most 1/16 of a value, and by half of 2^-9 below the normal numbers.
    assert (error <= original.double().abs() / 16 + scale_of_each * 2**-10).all(), name
    # E4M3 rounds Gaussian weights by 2.6 % of their rms; only a far too large scale makes it more.
    assert error.norm() < 0.03 * original.double().norm(), name


@each_layout
def test_output_holds_exactly_the_quantized_and_the_kept_tensors(
    kind: str, arguments: dict, checkpoint: Callable, quantized: Callable
) -> None:
    source = checkpoint(kind, **arguments)
    original, output = with_single_experts(tensors(source)), tensors(quantized(source))
    fp8 = fp8_names(kind, arguments.get("mtp", True))
    assert output.keys() == original.keys() | {f"{name}_scale_inv" for name in fp8}
    for name in original:
        if name in fp8:
            assert_quantized(output[name], output[f"{name}_scale_inv"], original[name], name)
        else:
            assert_same_bytes(output[name], original[name], name)


@each_layout
def test_transformers_loads_the_output_and_computes_nearly_the_same(
    kind: str, arguments: dict, checkpoint: Callable, quantized: Callable
) -> None:
    # The layout is no part of the reference: transformers itself cannot load the careless ones.
    same_weights = {k: v for k, v in arguments.items() if k not in ("shards", "index", "experts")}
    tokens = torch.randint(0, 256, (2, 64), generator=torch.Generator().manual_seed(0))
    reference = logits(checkpoint(kind, **same_weights), tokens)
    # `logits` asserts that no tensor is missing and none unexpected, mtp.* aside.
    found = logits(quantized(checkpoint(kind, **arguments)), tokens)
    assert mean_kl(reference, found) < 2e-3  # issue 2; see SMALL for what lies on either side


SAME_MODEL = {
    "one tensor per expert": {"experts": "per_expert"},
    "one tensor per expert in 5 shards": {"experts": "per_expert", "shards": 5},
    "fused in 3 shards without an index": {"shards": 3, "index": False},
    "fused under a misnamed index": {"index": "misnamed"},
}


@pytest.mark.parametrize("arguments", SAME_MODEL.values(), ids=SAME_MODEL)
@pytest.mark.parametrize("kind", ["moe", "moe_text"])
def test_the_input_layout_of_a_model_changes_no_output_tensor(
    kind: str, arguments: dict, checkpoint: Callable, quantized: Callable
) -> None:
    fused = tensors(quantized(checkpoint(kind, **MOE)))
    other = tensors(quantized(checkpoint(kind, **MOE, **arguments)))
    assert fused.keys() == other.keys()
    for name in fused:
        assert_same_bytes(other[name], fused[name], name)


def test_fused_experts_may_lie_in_two_shards(checkpoint: Callable, quantized: Callable) -> None:
    source = checkpoint("moe", **{**MOE, "shards": 90})
    home = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    experts = "model.language_model.layers.0.mlp.experts"
    gate_up, down = home[f"{experts}.gate_up_proj"], home[f"{experts}.down_proj"]
    assert gate_up != down  # or this test shows nothing
    output = quantized(source)
    new_home = json.loads((output / "model.safetensors.index.json").read_text())["weight_map"]
    for e in range(8):
        for projection, shard in (("gate", gate_up), ("up", gate_up), ("down", down)):
            name = f"{experts}.{e}.{projection}_proj.weight"
            assert new_home[name] == new_home[f"{name}_scale_inv"] == shard


def test_gate_is_the_first_half_of_the_rows_and_up_the_second(
    tmp_path: Path, checkpoint: Callable, copy_of: Callable, cli: Callable
) -> None:
    source = copy_of(checkpoint("moe_text", num_hidden_layers=1, mtp=False))
    state = {name: tensor.clone() for name, tensor in tensors(source).items()}
    experts = "model.layers.0.mlp.experts"
    for e in range(8):
        state[f"{experts}.gate_up_proj"][e, :128] = 2.0**e
        state[f"{experts}.gate_up_proj"][e, 128:] = -(2.0**e)
    save_file(state, source / "model.safetensors")
    result = cli(
        "--input_dir", source, "--output_dir", tmp_path / "out", "--calib_mode", "max", "--skip_verify"
    )
    assert result.rc == 0, result.err
    output = tensors(tmp_path / "out")
    for e in range(8):
        for projection, expected in (("gate", 2.0**e), ("up", -(2.0**e))):
            name = f"{experts}.{e}.{projection}_proj.weight"
            assert output[name].shape == (128, 256)
            found = output[name].float() * output[f"{name}_scale_inv"].float().repeat_interleave(128, 1)
            # A constant block has code 448 and scale constant / 448, which BF16 rounds by up to 1/256.
            assert ((found / expected - 1).abs() < 1 / 256).all(), name
