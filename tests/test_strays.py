"""A *.safetensors beside a model that is no part of it is left out, or refused where it cannot be told."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

STRAYS = {
    "adapter_model.safetensors": ["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"],
    "my-lora.safetensors": ["layers.0.q.lora_A.weight", "layers.0.q.lora_B.weight"],
    "extra.safetensors": ["model.layers.0.self_attn.q_proj.weight.exp_avg"],
    "optimizer.safetensors": ["state.0.step", "state.0.exp_avg"],
    "optim_00.safetensors": ["0", "1"],
}
UNCLEAR = {
    "other.safetensors": ["encoder.weight"],
    "optimizer.safetensors": ["model.layers.0.self_attn.q_norm.second"],
}


def add(folder: Path, name: str, tensors: list[str]) -> None:
    save_file({tensor: torch.zeros(4) for tensor in tensors}, folder / name)


@pytest.mark.parametrize("name", STRAYS)
def test_what_belongs_to_no_model_is_left_out_with_a_note(
    name: str, checkpoint: Callable, copy_of: Callable, tmp_path: Path, cli: Callable
) -> None:
    folder = copy_of(checkpoint("text", num_hidden_layers=1))
    add(folder, name, STRAYS[name])
    (folder / "adapter_config.json").write_text("{}")  # transformers would load an adapter for its sake
    result = cli("--input_dir", folder, "--output_dir", tmp_path / "out")
    assert result.rc == 0, result.err
    assert f"note: {name} belongs to no model and is left out" in result.err
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {"model.safetensors"}
    assert not {name, "adapter_config.json"} & {path.name for path in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize("name", UNCLEAR)
def test_what_cannot_be_told_is_refused(
    name: str, checkpoint: Callable, copy_of: Callable, tmp_path: Path, cli: Callable
) -> None:
    folder = copy_of(checkpoint("text", num_hidden_layers=1))
    add(folder, name, UNCLEAR[name])
    result = cli("--input_dir", folder, "--output_dir", tmp_path / "out")
    assert result.rc == 2
    assert f"{name}: may belong to the model or not" in result.err
    assert not (tmp_path / "out").exists()


def test_a_file_of_model_tensors_under_another_name_is_part_of_the_model(
    checkpoint: Callable, copy_of: Callable, tmp_path: Path, cli: Callable
) -> None:
    """Some merge the draft layer back in as a file of its own."""
    folder = copy_of(checkpoint("text", num_hidden_layers=1))
    add(folder, "mtp.safetensors", ["mtp.extra_norm.weight"])
    assert cli("--input_dir", folder, "--output_dir", tmp_path / "out").rc == 0
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"]["mtp.extra_norm.weight"] == "mtp.safetensors"
