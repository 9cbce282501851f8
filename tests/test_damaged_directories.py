"""What must fail under --verify_only besides wrong FP8 weights, and what another tool may do.

Each damage is found twice: by the manifest of this tool, and without it, as in a directory of another.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

MODEL = {
    "num_hidden_layers": 1,
    "hidden_size": 128,
    "num_experts": 4,
    "num_experts_per_tok": 1,
    "tokenizer": True,
}
ROUTER = "model.layers.0.mlp.gate.weight"
MANIFEST = "fp8_quantization.json"


@pytest.fixture(scope="module")
def original(checkpoint: Callable) -> Path:
    return checkpoint("moe_text", **MODEL)


@pytest.fixture
def finished(original: Path, quantized: Callable, copy_of: Callable) -> Path:
    return copy_of(quantized(original))


def in_tensor(name: str, value: float) -> Callable[[Path], object]:
    """Fill a tensor, and leave the rest of the file as it is."""

    def fill(folder: Path) -> None:
        path = folder / "model.safetensors"
        with safe_open(path, "pt") as file:
            assert name in file.keys()  # noqa: SIM118 - it is no dict
        data = bytearray(path.read_bytes())
        length = int.from_bytes(data[:8], "little")
        begin, end = json.loads(data[8 : 8 + length])[name]["data_offsets"]
        filled = torch.full(((end - begin) // 2,), value, dtype=torch.bfloat16)
        data[8 + length + begin : 8 + length + end] = filled.view(torch.uint8).numpy().tobytes()
        path.write_bytes(data)

    return fill


def in_quantization_config(**changes: object) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] |= changes
        (folder / "config.json").write_text(json.dumps(config, indent=2))

    return change


def without_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "vocab.json"):
        (folder / name).unlink(missing_ok=True)


def not_in_the_index(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"][ROUTER]
    path.write_text(json.dumps(index))


DAMAGE = {
    "a router of NaN": (in_tensor(ROUTER, torch.nan), f"{ROUTER}: 512 of 512 values are not the input's"),
    "embeddings of zero": (in_tensor("model.embed_tokens.weight", 0), "model.embed_tokens.weight: "),
    "another method": (
        in_quantization_config(quant_method="gptq"),
        "config.json: quantization_config has quant_method gptq, but the weights need fp8",
    ),
    "other blocks": (
        in_quantization_config(weight_block_size=[64, 64]),
        "config.json: quantization_config has weight_block_size [64, 64]",
    ),
    "no blocks": (
        in_quantization_config(weight_block_size=None),
        "config.json: quantization_config has weight_block_size None",
    ),
    "another format": (in_quantization_config(fmt="e5m2"), "config.json: quantization_config has fmt e5m2"),
    "static activations": (
        in_quantization_config(activation_scheme="static"),
        "config.json: quantization_config has activation_scheme static",
    ),
    "an empty list": (in_quantization_config(modules_to_not_convert=[]), "BF16, but taken for FP8"),
    "no tokenizer": (without_tokenizer, "tokenizer.json: missing from the directory"),
    "a tensor that the index forgot": (not_in_the_index, f"{ROUTER}: in the shards but not in"),
}


@pytest.mark.parametrize("manifest", [True, False], ids=["with the manifest", "without it"])
@pytest.mark.parametrize(("damage", "line"), DAMAGE.values(), ids=DAMAGE)
def test_damage_outside_the_fp8_weights_fails_and_is_named(
    damage: Callable, line: str, manifest: bool, original: Path, finished: Path, cli: Callable
) -> None:
    damage(finished)
    if not manifest:
        (finished / MANIFEST).unlink()
    result = cli("--input_dir", original, "--output_dir", finished, "--verify_only")
    assert result.rc == 1, result.err
    assert line in " ".join(result.out.split())


def test_a_changed_setting_is_named(original: Path, finished: Path, cli: Callable) -> None:
    """Such as a rope scaling that somebody set by hand: it is not what was tested."""
    path = finished / "config.json"
    path.write_text(path.read_text().replace('"hidden_size": 128', '"hidden_size": 129'))
    result = cli("--input_dir", original, "--output_dir", finished, "--verify_only")
    assert result.rc == 1
    assert "config.json: not as it was written (hidden_size is 129, was 128)" in " ".join(result.out.split())


# --- what another tool may do ------------------------------------------------------------------


def test_another_tool_may_have_its_own_small_files_and_settings(
    original: Path, finished: Path, cli: Callable
) -> None:
    """Its README, another spelling of the config, a tokenizer that it saved again, no generation config."""
    (finished / MANIFEST).unlink()
    (finished / "generation_config.json").unlink()
    (finished / "tokenizer_config.json").write_text("{}")
    (finished / "README.md").write_text("quantized by another")
    config = json.loads((finished / "config.json").read_text())
    del config["quantization_config"]["fmt"], config["quantization_config"]["producer"]
    (finished / "config.json").write_text(json.dumps(config | {"transformers_version": "4.0"}))
    result = cli("--input_dir", original, "--output_dir", finished, "--verify_only")
    assert result.rc == 0, result.out
    assert "note: generation_config.json: missing from the directory" in result.err
    assert "note: tokenizer_config.json: differs from the input's" in result.err


def test_another_tool_may_store_kept_tensors_as_f32_but_not_change_them(
    original: Path, finished: Path, cli: Callable
) -> None:
    (finished / MANIFEST).unlink()
    path = finished / "model.safetensors"
    command = ("--input_dir", original, "--output_dir", finished, "--verify_only")
    state = load_file(path)
    state[ROUTER] = state[ROUTER].float()
    save_file(state, path)
    assert cli(*command).rc == 0
    state[ROUTER][0, 0] += 1e-6  # less than a BF16 can tell
    save_file(state, path)
    result = cli(*command)
    assert result.rc == 1
    assert f"{ROUTER}: 1 of 512 values are not the input's" in " ".join(result.out.split())


# --- how much was looked at --------------------------------------------------------------------


def test_the_summary_says_what_share_of_the_bytes_was_looked_at(
    original: Path, quantized: Callable, cli: Callable
) -> None:
    folder = quantized(original)
    command = ("--input_dir", original, "--output_dir", folder, "--verify_only", "--verify_samples")
    assert "Bytes looked at     : 100 % of the shards" in cli(*command, "all").out
    # 18 of 24 FP8 matrices of 128 x 128 are left out of one shard.
    state = load_file(folder / "model.safetensors")
    fp8 = sorted(t.numel() for t in state.values() if t.dtype == torch.float8_e4m3fn)
    size = (folder / "model.safetensors").stat().st_size
    share = float(cli(*command, len(fp8) - 1).out.split("Bytes looked at     : ")[1].split()[0])
    assert 100 * (1 - fp8[-1] / size) - 0.1 <= share <= 100 * (1 - fp8[0] / size)
