"""The statistics file as it is written: both formats, read back by the quantizer's own reader."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from fp8lib import Fp8Error
from fp8lib.calibration import statistics_writer
from fp8lib.calibration.statistics_file import SUFFIXES, Statistics
from fp8lib.calibration.statistics_writer import Entry, StatisticsWriter

PROVENANCE = {"model_type": "qwen3_5_moe", "prompts": 39, "prompts_file": "frågor.jsonl"}
EXPERTS = "model.language_model.layers.0.mlp.experts"
NAMES = [
    "model.language_model.layers.0.self_attn.o_proj.weight",
    *(f"{EXPERTS}.{e}.{p}_proj.weight" for e in range(2) for p in ("gate", "up", "down")),
]


def write_statistics(path: Path, entries: dict[str, Entry], provenance: dict) -> None:
    weights = [(name, entry.maximum.size) for name, entry in entries.items()]
    with StatisticsWriter(path, weights, provenance) as writer:
        for name, entry in entries.items():
            writer.add(name, entry)
        writer.commit()


def some_entries() -> dict[str, Entry]:
    """Values of every size that activations have; a gate_proj and its up_proj have the same."""
    draw = np.random.default_rng(0)
    entries = {}
    for i, name in enumerate(NAMES):
        values = np.exp(draw.normal(-6, 6, 256)).astype(np.float32)
        values[:2] = 0, 3.4e38
        entries[name] = Entry(values, values[::-1].copy(), i)
        if ".up_proj" in name:
            entries[name] = entries[name.replace(".up_proj", ".gate_proj")]
    return entries


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_quantizer_reads_what_is_written(tmp_path, suffix):
    path = tmp_path / f"calib{suffix}"
    entries = some_entries()
    write_statistics(path, entries, PROVENANCE)
    read = Statistics(path)
    for name, entry in entries.items():
        # six digits: rounding is half a unit of the sixth, 5e-6 of the value at most
        rtol = 5e-6 if suffix == ".json" else 0
        np.testing.assert_allclose(read.importance(name, 256), entry.mean_square, rtol=rtol)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_json_holds_lists_counts_and_where_they_come_from(tmp_path):
    path = tmp_path / "calib.json"
    entries = some_entries()
    write_statistics(path, entries, PROVENANCE)
    document = json.loads(path.read_text(encoding="utf-8"))
    assert document.pop("__metadata__") == PROVENANCE
    assert list(document) == NAMES
    for i, name in enumerate(NAMES):
        assert set(document[name]) == {"tokens", "input_channel_max", "input_channel_mean_square"}
        assert document[name]["tokens"] == i - (".up_proj" in name)
        np.testing.assert_allclose(document[name]["input_channel_max"], entries[name].maximum, rtol=5e-6)


def test_safetensors_hold_the_same_under_the_names_with_the_statistic_behind(tmp_path):
    path = tmp_path / "calib.safetensors"
    entries = some_entries()
    write_statistics(path, entries, PROVENANCE)
    tensors = load_file(path)  # the library's own reader checks the header
    assert len(tensors) == 3 * len(NAMES)
    for name, entry in entries.items():
        np.testing.assert_array_equal(tensors[f"{name}.input_channel_max"], entry.maximum)
        np.testing.assert_array_equal(tensors[f"{name}.input_channel_mean_square"], entry.mean_square)
        assert tensors[f"{name}.tokens"].item() == entry.tokens
    with safe_open(path, framework="numpy") as file:
        assert file.metadata() == {k: str(v) for k, v in PROVENANCE.items()}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_large_mixture_of_experts_is_thinned_without_loss_to_the_quantizer(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(statistics_writer, "THIN_ABOVE", 1000)
    path = tmp_path / f"calib{suffix}"
    entries = some_entries()
    write_statistics(path, entries, PROVENANCE)
    if suffix == ".json":
        document = json.loads(path.read_text(encoding="utf-8"))
        assert set(document) == {"__metadata__", *(n for n in NAMES if ".up_proj" not in n)}
        assert set(document[f"{EXPERTS}.0.gate_proj.weight"]) == {"tokens", "input_channel_mean_square"}
        assert "input_channel_max" in document[NAMES[0]]  # no expert's
    read = Statistics(path)
    for name, entry in entries.items():
        np.testing.assert_allclose(read.importance(name, 256), entry.mean_square, rtol=5e-6)


def test_a_35b_file_stays_under_300_mb(tmp_path, monkeypatch):
    """By the length of what is written: 40 layers of 256 experts, hidden 2048, I = 512."""
    draw = np.random.default_rng(0)
    # Mean squares of normed hidden states lie around e^-4, those of inner activations around e^-7.
    entries = {}
    for e in range(16):
        for projection, channels, middle in (("gate", 2048, -4), ("up", 2048, -4), ("down", 512, -7)):
            values = np.exp(draw.normal(middle, 1.2, channels)).astype(np.float32)
            entries[f"{EXPERTS}.{e}.{projection}_proj.weight"] = Entry(values, values, 1000)
    assert (
        2 * (40 * 256 / 16) * sum(e.mean_square.size for e in entries.values()) > statistics_writer.THIN_ABOVE
    )
    monkeypatch.setattr(statistics_writer, "THIN_ABOVE", 0)
    write_statistics(tmp_path / "calib.json", entries, {})
    assert (tmp_path / "calib.json").stat().st_size * (40 * 256 / 16) < 300e6


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_older_file_stays_whole_when_writing_fails(tmp_path, suffix, monkeypatch):
    path = tmp_path / f"calib{suffix}"
    path.write_text("older")

    def full(self, offset: int, data: bytes) -> None:
        raise Fp8Error("the disk is full")

    monkeypatch.setattr(statistics_writer.ShardWriter, "write", full)
    with pytest.raises(Fp8Error, match="full"):
        write_statistics(path, some_entries(), PROVENANCE)
    assert path.read_text() == "older"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_interrupted_write_leaves_nothing(tmp_path, suffix, monkeypatch):
    path = tmp_path / f"calib{suffix}"
    write = statistics_writer.ShardWriter.write
    calls = []

    def interrupted(self, offset: int, data: bytes) -> None:
        calls.append(offset)
        if len(calls) == 3:
            raise KeyboardInterrupt
        write(self, offset, data)

    monkeypatch.setattr(statistics_writer.ShardWriter, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_statistics(path, some_entries(), PROVENANCE)
    assert list(tmp_path.iterdir()) == []


def test_a_weight_without_an_entry_leaves_no_hole(tmp_path):
    path, entries = tmp_path / "calib.safetensors", some_entries()
    weights = [(name, 256) for name in (*NAMES, "mtp.layers.0.mlp.down_proj.weight")]
    with StatisticsWriter(path, weights, PROVENANCE) as writer:
        for name in reversed(NAMES):
            writer.add(name, entries[name])
        writer.commit()
    tensors = load_file(path)
    assert len(tensors) == 3 * len(NAMES)
    np.testing.assert_array_equal(tensors[f"{NAMES[0]}.input_channel_max"], entries[NAMES[0]].maximum)


def test_without_a_commit_there_is_no_file(tmp_path):
    with StatisticsWriter(tmp_path / "calib.json", [(NAMES[0], 256)], PROVENANCE) as writer:
        writer.add(NAMES[0], some_entries()[NAMES[0]])
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_removed(tmp_path):
    path = tmp_path / "calib.json"
    (tmp_path / ".calib.json.0123abcd.partial").write_text("half")
    other = tmp_path / ".calib.json.backup.partial"
    other.write_text("not ours")
    write_statistics(path, some_entries(), PROVENANCE)
    assert sorted(tmp_path.iterdir()) == [other, path]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_two_runs_that_write_the_same_file_leave_one_of_theirs(tmp_path, suffix):
    path, entries = tmp_path / f"calib{suffix}", some_entries()
    write_statistics(path, entries, {"run": 1})
    expected = path.read_bytes()
    weights = [(name, 256) for name in entries]
    with StatisticsWriter(path, weights, {"run": 1}) as one, StatisticsWriter(path, weights, {}) as other:
        for name, entry in entries.items():
            one.add(name, entry)
            other.add(name, entry)
        other.commit()
        one.commit()
    assert path.read_bytes() == expected
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
