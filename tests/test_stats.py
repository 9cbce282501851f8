"""The activation-statistics file: what is read, which entry speaks for which weight, what is refused."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

from fp8lib import Fp8Error
from fp8lib.calibration.statistics_file import Statistics

WEIGHT = "model.layers.0.mlp.down_proj.weight"
EXPERTS = "model.layers.1.mlp.experts"

PUBLISHED = Path(__file__).parent / "data" / "calib_stats_0.8b_slice.json"
"""Three entries of a statistics file published for Qwen3.5-0.8B, as they are in it."""


def from_json(folder: Path, document: object) -> Statistics:
    path = folder / "stats.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return Statistics(path)


def from_safetensors(folder: Path, lists: dict[str, np.ndarray]) -> Statistics:
    path = folder / "stats.safetensors"
    save_file({name: np.asarray(values, dtype=np.float32) for name, values in lists.items()}, path)
    return Statistics(path)


def by_maximum(**entries: float) -> dict:
    """Entries whose one channel's maximum tells them apart; `importance` is its square."""
    return {name: {"input_channel_max": [value]} for name, value in entries.items()}


def refusal(folder: Path, document: object, columns: int = 2) -> str:
    """What reading a file and asking for WEIGHT's entry says."""
    with pytest.raises(Fp8Error) as refused:
        from_json(folder, document).importance(WEIGHT, columns)
    message = str(refused.value)
    assert "stats.json" in message
    assert "\n" not in message
    return message


# --- what is read ------------------------------------------------------------------------------


def test_mean_square_is_the_importance_as_it_is(tmp_path: Path):
    statistics = from_json(tmp_path, {WEIGHT: {"input_channel_mean_square": [0.5, 0, 3]}})
    importance = statistics.importance(WEIGHT, 3)
    assert importance.dtype == np.float32
    assert importance.tolist() == [0.5, 0, 3]


def test_maximum_alone_counts_with_its_square(tmp_path: Path):
    statistics = from_json(tmp_path, {WEIGHT: {"input_channel_max": [0.5, 0, 3]}})
    assert statistics.importance(WEIGHT, 3).tolist() == [0.25, 0, 9]


def test_of_both_the_mean_square_is_taken(tmp_path: Path):
    both = {"input_channel_max": [7, 7], "input_channel_mean_square": [1, 2]}
    assert from_json(tmp_path, {WEIGHT: both}).importance(WEIGHT, 2).tolist() == [1, 2]


def test_other_fields_of_an_entry_are_left_alone(tmp_path: Path):
    entry = {"tokens": 4096, "note": None, "input_channel_max": [2.0]}
    assert from_json(tmp_path, {WEIGHT: entry}).importance(WEIGHT, 1).tolist() == [4]


def test_weight_without_an_entry_has_no_importance(tmp_path: Path):
    statistics = from_json(tmp_path, {WEIGHT: {"input_channel_max": [1.0]}})
    assert statistics.importance("model.layers.1.mlp.down_proj.weight", 1) is None


def test_empty_file_speaks_for_nothing(tmp_path: Path):
    assert from_json(tmp_path, {}).check([(WEIGHT, 128)]) == 0


@pytest.mark.parametrize("key", ["__metadata__", "__provenance__"])
def test_provenance_is_not_a_weight(tmp_path: Path, key: str):
    document = {key: {"model": "Qwen/Qwen3.5-0.8B", "tokens": 4096}, WEIGHT: {"input_channel_max": [1.0]}}
    assert from_json(tmp_path, document).importance(WEIGHT, 1).tolist() == [1]


def test_check_counts_the_weights_that_have_statistics(tmp_path: Path):
    statistics = from_json(tmp_path, {WEIGHT: {"input_channel_max": [1.0, 2.0]}})
    assert statistics.check([(WEIGHT, 2), ("model.layers.5.mlp.up_proj.weight", 2), (WEIGHT, 2)]) == 2


def test_digest_is_of_the_files_bytes(tmp_path: Path):
    digests = {from_json(tmp_path, by_maximum(**{WEIGHT: value})).sha256 for value in (1.0, 1.0, 2.0)}
    assert len(digests) == 2


def test_published_statistics_of_the_0_8b_load_as_they_are():
    statistics = Statistics(PUBLISHED)
    layers = "model.language_model.layers"
    weights = [
        (f"{layers}.0.linear_attn.in_proj_qkv.weight", 1024),
        (f"{layers}.3.self_attn.q_proj.weight", 1024),
        (f"{layers}.3.self_attn.o_proj.weight", 2048),
    ]
    assert statistics.check(weights) == 3
    importance = statistics.importance(*weights[1])
    # The file says 28.875 for channel 9, its largest, and 26.25 for channel 0.
    assert importance.argmax() == 9
    assert importance[9] == 28.875**2
    assert importance[0] == 26.25**2
    assert statistics.importance(f"{layers}.3.self_attn.k_proj.weight", 1024) is None


# --- which entry speaks for which weight -------------------------------------------------------

PREFIXES = ["", "model.", "language_model.", "model.language_model.", "language_model.model."]


@pytest.mark.parametrize("in_file", PREFIXES)
@pytest.mark.parametrize("in_checkpoint", PREFIXES)
def test_names_match_whatever_prefix_a_loader_adds_or_drops(tmp_path: Path, in_file: str, in_checkpoint: str):
    name = "layers.3.self_attn.q_proj.weight"
    statistics = from_json(tmp_path, by_maximum(**{in_file + name: 3.0}))
    assert statistics.importance(in_checkpoint + name, 1).tolist() == [9]


@pytest.mark.parametrize("in_file", ["mtp.", "model.mtp."])
def test_draft_layers_are_not_decoder_layers(tmp_path: Path, in_file: str):
    statistics = from_json(tmp_path, by_maximum(**{f"{in_file}layers.0.mlp.up_proj.weight": 3.0}))
    assert statistics.importance("mtp.layers.0.mlp.up_proj.weight", 1).tolist() == [9]
    assert statistics.importance("model.layers.0.mlp.up_proj.weight", 1) is None


def test_names_of_modules_match_those_of_their_weights(tmp_path: Path):
    statistics = from_json(tmp_path, by_maximum(**{"model.layers.0.mlp.down_proj": 3.0}))
    assert statistics.importance(WEIGHT, 1).tolist() == [9]


def test_layer_numbers_are_whole_numbers(tmp_path: Path):
    statistics = from_json(tmp_path, by_maximum(**{"model.layers.1.mlp.up_proj.weight": 1.0}))
    assert statistics.importance("model.layers.11.mlp.up_proj.weight", 1) is None
    assert statistics.importance("model.layers.1.mlp.up_proj.weight", 1) is not None


def test_expert_with_an_entry_uses_it(tmp_path: Path):
    own = by_maximum(**{f"{EXPERTS}.7.gate_proj.weight": 2.0, EXPERTS: 5.0})
    assert from_json(tmp_path, own).importance(f"{EXPERTS}.7.gate_proj.weight", 1).tolist() == [4]


@pytest.mark.parametrize("projection", ["gate_proj", "up_proj"])
@pytest.mark.parametrize("entry", [EXPERTS, f"{EXPERTS}.gate_up_proj"])
def test_expert_without_an_entry_uses_its_layers(tmp_path: Path, entry: str, projection: str):
    # All experts of a layer see the same hidden states.
    statistics = from_json(tmp_path, by_maximum(**{entry: 5.0}))
    assert statistics.importance(f"{EXPERTS}.7.{projection}.weight", 1).tolist() == [25]
    other_layer = EXPERTS.replace("layers.1", "layers.2")
    assert statistics.importance(f"{other_layer}.7.{projection}.weight", 1) is None


def test_experts_up_projection_uses_its_gate_projections_entry_before_its_layers(tmp_path: Path):
    # Both multiply the same hidden states: those of the tokens that were routed to this expert.
    up = f"{EXPERTS}.7.up_proj.weight"
    entries = by_maximum(**{f"{EXPERTS}.7.gate_proj.weight": 2.0, EXPERTS: 5.0})
    assert from_json(tmp_path, entries).importance(up, 1).tolist() == [4]
    assert from_json(tmp_path, {**entries, **by_maximum(**{up: 3.0})}).importance(up, 1).tolist() == [9]


def test_experts_down_projection_uses_the_layers_down_projection_only(tmp_path: Path):
    # It sees each expert's own activations, not the hidden states that the entry `experts` describes.
    down = f"{EXPERTS}.7.down_proj.weight"
    assert from_json(tmp_path, by_maximum(**{EXPERTS: 5.0})).importance(down, 1) is None
    layers = by_maximum(**{EXPERTS: 5.0, f"{EXPERTS}.down_proj": 6.0})
    assert from_json(tmp_path, layers).importance(down, 1).tolist() == [36]


def test_experts_entry_does_not_speak_for_the_shared_expert(tmp_path: Path):
    statistics = from_json(tmp_path, by_maximum(**{EXPERTS: 5.0}))
    assert statistics.importance("model.layers.1.mlp.shared_expert.up_proj.weight", 1) is None


# --- safetensors -------------------------------------------------------------------------------


def test_safetensors_holds_the_same_lists(tmp_path: Path):
    statistics = from_safetensors(
        tmp_path,
        {
            f"{WEIGHT}.input_channel_max": [3.0, 4.0],
            f"{EXPERTS}.input_channel_max": [7.0],
            f"{EXPERTS}.input_channel_mean_square": [2.0],
            "something.else": [1.0],
        },
    )
    assert statistics.importance(WEIGHT, 2).tolist() == [9, 16]
    assert statistics.importance(f"{EXPERTS}.0.up_proj.weight", 1).tolist() == [2]
    assert statistics.importance("model.layers.9.mlp.up_proj.weight", 1) is None


def test_safetensors_values_are_checked_too(tmp_path: Path):
    statistics = from_safetensors(tmp_path, {f"{WEIGHT}.input_channel_max": [1.0, math.nan]})
    with pytest.raises(Fp8Error, match="negative or non-finite"):
        statistics.importance(WEIGHT, 2)
    with pytest.raises(Fp8Error, match=r"2 channels, but .* has 3"):
        statistics.importance(WEIGHT, 3)


def test_safetensors_without_any_list_is_refused(tmp_path: Path):
    with pytest.raises(Fp8Error, match="holds no input_channel_mean_square and no input_channel_max"):
        from_safetensors(tmp_path, {"model.layers.0.mlp.down_proj.weight": [1.0]})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_safetensors_of_a_dtype_that_numpy_lacks_is_refused(tmp_path: Path, dtype: torch.dtype):
    path = tmp_path / "stats.safetensors"
    save_torch({f"{WEIGHT}.input_channel_max": torch.ones(2).to(dtype)}, path)
    with pytest.raises(Fp8Error, match=r"stats\.safetensors"):
        Statistics(path).importance(WEIGHT, 2)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff" * 64, b"\x08" + bytes(7) + b"not json"])
def test_file_that_is_no_safetensors_is_refused(tmp_path: Path, content: bytes):
    path = tmp_path / "stats.safetensors"
    path.write_bytes(content)
    with pytest.raises(Fp8Error, match=r"stats\.safetensors: not valid safetensors"):
        Statistics(path)


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("values", "columns"), [([1, 2, 3], 2), ([1], 2), ([], 2)])
def test_wrong_length_is_refused_with_both_numbers(tmp_path: Path, values: list[float], columns: int):
    message = refusal(tmp_path, {WEIGHT: {"input_channel_max": values}}, columns)
    assert f"{len(values)} channels" in message
    assert f"has {columns}" in message
    assert WEIGHT in message


def test_nested_lists_are_refused(tmp_path: Path):
    refusal(tmp_path, {WEIGHT: {"input_channel_max": [[1.0, 2.0]]}})


@pytest.mark.parametrize("key", ["input_channel_max", "input_channel_mean_square"])
@pytest.mark.parametrize("bad", ["-1e-9", "NaN", "Infinity", "-Infinity", "null"])
def test_negative_and_non_finite_values_are_refused(tmp_path: Path, bad: str, key: str):
    # Python's JSON reads and writes NaN and Infinity as they stand here.
    message = refusal(tmp_path, f'{{"{WEIGHT}": {{"{key}": [1.0, {bad}]}}}}')
    assert WEIGHT in message
    assert "negative or non-finite" in message


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
def test_values_beyond_float32_are_refused(tmp_path: Path):
    assert "non-finite" in refusal(tmp_path, {WEIGHT: {"input_channel_mean_square": [1.0, 1e39]}})


def test_maxima_whose_squares_overflow_are_refused(tmp_path: Path):
    assert "overflow" in refusal(tmp_path, {WEIGHT: {"input_channel_max": [1.0, 1e30]}})


@pytest.mark.parametrize("entry", [{}, {"input_channel_max": 3.0}, {"max": [1.0]}, [1.0], 1.0, None, "text"])
def test_entry_without_either_list_is_refused_by_name(tmp_path: Path, entry: object):
    message = refusal(tmp_path, {"model.layers.2.mlp.up_proj.weight": entry})
    assert "model.layers.2.mlp.up_proj.weight has neither" in message


@pytest.mark.parametrize("values", [["a", 1.0], [{}, 1.0], [[1.0], 1.0]])
def test_lists_of_anything_but_numbers_are_refused(tmp_path: Path, values: list):
    refusal(tmp_path, {WEIGHT: {"input_channel_max": values}})


@pytest.mark.parametrize("document", ["[]", "null", '"text"', "1"])
def test_json_that_is_no_object_is_refused(tmp_path: Path, document: str):
    assert "not a JSON object" in refusal(tmp_path, document)


@pytest.mark.parametrize(
    "document",
    ["", "{", "not json", '{"a": }', '{"a": ' * 100_000, "[" * 100_000, '{"a": [' + "1" * 5000 + "]}"],
    ids=["empty", "cut off", "text", "no value", "deep objects", "deep lists", "endless number"],
)
def test_file_that_is_no_json_is_refused(tmp_path: Path, document: str):
    message = refusal(tmp_path, document)
    assert len(message) < 500


def test_file_that_is_no_text_is_refused(tmp_path: Path):
    path = tmp_path / "stats.json"
    path.write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(Fp8Error, match=r"stats\.json: not "):
        Statistics(path)


@pytest.mark.parametrize("name", ["stats.json", "stats.safetensors"])
def test_missing_file_is_refused(tmp_path: Path, name: str):
    with pytest.raises(Fp8Error, match=f"{name}: no such file"):
        Statistics(tmp_path / name)


def test_directory_is_refused(tmp_path: Path):
    with pytest.raises(Fp8Error):
        Statistics(tmp_path)


def test_names_from_the_file_cannot_write_to_the_terminal(tmp_path: Path):
    message = refusal(tmp_path, {"evil\x1b[31m\nname": 1.0})
    assert "\x1b" not in message
