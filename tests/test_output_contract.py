"""What a finished output directory holds besides its quantized weights, and that it is always the same."""

import fcntl
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fp8lib import __version__
from fp8lib.calibration.statistics_file import Statistics
from fp8lib.checkpoint.directory import open_checkpoint
from fp8lib.checkpoint.layout import ShardPlan
from fp8lib.checkpoint.plan import make_plan
from fp8lib.numerics.modes import MODES, Calibration
from fp8lib.streaming import direct, writer
from fp8lib.streaming.convert import Nearest
from fp8lib.streaming.pipeline import process
from fp8lib.streaming.shard_job import Settings
from fp8lib.streaming.units import divide
from fp8lib.verification.claim import Claim
from fp8lib.verification.pairing import planned_pairs
from fp8lib.verification.shard_check import ShardCheck
from safetensors_by_hand import read_header
from tiny_checkpoints import logits, mean_kl, tensors

FP8 = torch.float8_e4m3fn
ITEM_SIZE = {"F8_E4M3": 1, "BF16": 2, "F16": 2, "F32": 4}


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def not_converted(output: Path) -> list[str]:
    return read_json(output / "config.json")["quantization_config"]["modules_to_not_convert"]


def modules(state: dict[str, torch.Tensor], *, fp8: bool) -> set[str]:
    """Modules with a weight of two dimensions or more that is FP8, or that is not."""
    return {
        name.removesuffix(".weight")
        for name, tensor in state.items()
        if name.endswith(".weight") and tensor.ndim >= 2 and (tensor.dtype == FP8) == fp8
    }


def files(folder: Path) -> dict[str, bytes]:
    """Relative path -> bytes of every file."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# --- config.json -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["moe", "dense", "moe_text", "text"])
def test_config_is_the_inputs_with_a_quantization_config(
    kind: str, checkpoint: Callable, quantized: Callable
) -> None:
    source = checkpoint(kind)
    config = read_json(quantized(source) / "config.json")
    quantization = config.pop("quantization_config")
    assert config == read_json(source / "config.json")
    quantization.pop("modules_to_not_convert")
    assert quantization == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "producer": {"name": "quantize_fp8", "version": __version__},
    }


def test_config_keeps_what_the_tool_does_not_know(
    tmp_path: Path, checkpoint: Callable, copy_of: Callable, cli: Callable
) -> None:
    source = copy_of(checkpoint("text"))
    config = read_json(source / "config.json")
    config |= {"name": "模型 é", "nested": {"a": [1, 2.5, None]}, "quantization_config": None}
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert cli("--input_dir", source, "--output_dir", tmp_path / "out").rc == 0
    found = read_json(tmp_path / "out/config.json")
    assert found.pop("quantization_config")["quant_method"] == "fp8"
    config.pop("quantization_config")
    assert found == config


# --- modules_to_not_convert and fusion groups --------------------------------------------------

MODELS = {
    "moe": ("moe", {}),
    "moe, tied": ("moe", {"tied": True}),
    "moe, one tensor per expert": ("moe", {"experts": "per_expert", "shards": 3}),
    "moe text": ("moe_text", {}),
    "dense": ("dense", {}),
    "dense, tied, without mtp": ("dense", {"tied": True, "mtp": False}),
    "text, tied": ("text", {"tied": True}),
    "text with F32 extras": ("text", {"f32_extras": True}),
    "hidden size 192": ("text", {"hidden_size": 192}),
    "experts of 64 rows": ("moe", {"moe_intermediate_size": 64}),
}


@pytest.mark.parametrize(("kind", "arguments"), MODELS.values(), ids=MODELS)
def test_a_module_is_not_converted_if_and_only_if_its_weight_is_not_fp8(
    kind: str, arguments: dict, checkpoint: Callable, quantized: Callable
) -> None:
    output = quantized(checkpoint(kind, **arguments))
    state, listed = tensors(output), not_converted(output)
    assert listed == sorted(set(listed))
    kept = modules(state, fp8=False)
    # The two that no `.weight` in the files stands for: a tied head, and fused experts that stay fused.
    kept |= {"lm_head"} if arguments.get("tied") else set()
    kept |= {name.rsplit(".", 1)[0] for name, t in state.items() if t.ndim == 3 and ".experts." in name}
    assert set(listed) == kept


def test_modules_of_a_dense_model_that_are_not_converted(checkpoint: Callable, quantized: Callable) -> None:
    """The list in full, by hand, for a text model with an mtp layer."""
    linear = ("conv1d", "in_proj_a", "in_proj_b", "out_proj")
    expected = [f"model.layers.{i}.linear_attn.{m}" for i in range(3) for m in linear]
    expected += ["lm_head", "model.embed_tokens", "mtp.fc"]
    assert not_converted(quantized(checkpoint("text"))) == sorted(expected)


def test_modules_of_a_moe_layer_that_are_not_converted(checkpoint: Callable, quantized: Callable) -> None:
    prefix = "model.language_model.layers.0."
    listed = not_converted(quantized(checkpoint("moe")))
    shared = [f"mlp.shared_expert.{p}_proj" for p in ("down", "gate", "up")] + ["mlp.shared_expert_gate"]
    linear = [f"linear_attn.{m}" for m in ("conv1d", "in_proj_a", "in_proj_b", "out_proj")]
    of_layer_0 = [name.removeprefix(prefix) for name in listed if name.startswith(prefix)]
    assert of_layer_0 == sorted([*linear, "mlp.gate", *shared])
    # Patch embedding (5-D), position embedding, 2 blocks of 4 Linears, 2 Linears of the merger.
    assert sum(name.startswith("model.visual.") for name in listed) == 1 + 1 + 2 * 4 + 2


def rotary(head_dim: int) -> dict:
    """rope_parameters whose sections fill the rotated quarter of a head, as transformers demands."""
    half = head_dim // 8
    return {
        "rope_type": "default",
        "rope_theta": 10_000_000,
        "partial_rotary_factor": 0.25,
        "mrope_section": [half - 2 * (half // 3), half // 3, half // 3],
        "mrope_interleaved": True,
    }


PARTLY_UNSERVABLE = {
    "k and v of 64 rows keep q": (
        {"head_dim": 64, "rope_parameters": rotary(64)},
        {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"},
        {"self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "linear_attn.in_proj_z"},
    ),
    "in_proj_z of 64 rows keeps in_proj_qkv": (
        {"linear_value_head_dim": 32},
        {"linear_attn.in_proj_qkv", "linear_attn.in_proj_z"},
        {"self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"},
    ),
    "in_proj_qkv of 448 rows, no multiple of 128, keeps in_proj_z of 192": (
        {"linear_value_head_dim": 96},
        {"linear_attn.in_proj_qkv", "linear_attn.in_proj_z"},
        {"self_attn.q_proj", "mlp.gate_proj"},
    ),
    "an MLP of 576, no multiple of 128, is kept": (
        {"intermediate_size": 576},
        {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"},
        {"self_attn.q_proj", "self_attn.o_proj", "linear_attn.in_proj_z"},
    ),
    "192 input features are kept, 192 output features of an unfused module are not": (
        {"hidden_size": 192},
        {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "linear_attn.in_proj_qkv",
         "linear_attn.in_proj_z", "mlp.gate_proj", "mlp.up_proj"},
        {"self_attn.o_proj", "mlp.down_proj"},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("sizes", "kept", "fp8"), PARTLY_UNSERVABLE.values(), ids=PARTLY_UNSERVABLE)
def test_modules_that_engines_fuse_are_quantized_together_or_not_at_all(
    sizes: dict, kept: set[str], fp8: set[str], checkpoint: Callable, quantized: Callable
) -> None:
    source = checkpoint("text", **sizes, shards=20)  # a group's members lie in different shards
    output = quantized(source)
    original, state = tensors(source), tensors(output)

    def kinds(names: set[str]) -> set[str]:
        return {re.sub(r"^(?:model|mtp)\.layers\.\d+\.", "", name) for name in names}

    assert kept <= kinds(modules(state, fp8=False))
    assert fp8 <= kinds(modules(state, fp8=True))
    # In every layer alike, mtp's included.
    assert not kinds(modules(state, fp8=True)) & kinds(modules(state, fp8=False))
    for module in modules(state, fp8=False):
        assert torch.equal(state[f"{module}.weight"], original[f"{module}.weight"])
        assert f"{module}.weight_scale_inv" not in state


@pytest.mark.parametrize("experts", ["fused", "per_expert"])
def test_experts_under_128_rows_stay_in_their_input_layout(
    experts: str, checkpoint: Callable, quantized: Callable
) -> None:
    small = {"moe_intermediate_size": 64, "num_experts_per_tok": 8, "std": 0.015}
    source = checkpoint("moe", experts=experts, **small)
    output = quantized(source)
    original, state = tensors(source), tensors(output)
    of_experts = {name for name in original if ".mlp.experts." in name}
    assert of_experts == {name for name in state if ".mlp.experts." in name}
    assert all(torch.equal(state[name], original[name]) for name in of_experts)
    layers = [f"model.language_model.layers.{i}" for i in range(4)] + ["mtp.layers.0"]
    assert {f"{layer}.mlp.experts" for layer in layers} <= set(not_converted(output))
    # transformers takes the list at its word, and attention is still FP8 (test_layouts.py on the limit).
    assert modules(state, fp8=True)
    tokens = torch.arange(32)[None]
    assert mean_kl(logits(source, tokens), logits(output, tokens)) < 2e-3


def test_edge_blocks_are_not_padded_on_disk(checkpoint: Callable, quantized: Callable) -> None:
    source = checkpoint("text", hidden_size=192)
    original, state = tensors(source), tensors(quantized(source))
    name = "model.layers.3.self_attn.o_proj.weight"
    codes, scales = state[name], state[f"{name}_scale_inv"]
    assert codes.shape == (192, 512)
    assert scales.shape == (2, 4)
    restored = codes.double()
    for i in range(2):  # the second row of blocks has 64 rows
        for j in range(4):
            restored[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)] *= scales[i, j].double()
    error = restored - original[name].double()
    # E4M3 rounds Gaussian weights by 2.6 % of their rms. With a scale of another block it would be more.
    assert error.norm() < 0.03 * original[name].double().norm()


# --- shards and index --------------------------------------------------------------------------


def test_shards_keep_their_names(checkpoint: Callable, quantized: Callable) -> None:
    source = checkpoint("moe", shards=3)
    names = sorted(p.name for p in quantized(source).glob("*.safetensors"))
    assert names == sorted(p.name for p in source.glob("*.safetensors"))
    assert names == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


@pytest.mark.parametrize(
    ("arguments", "of_input"),
    [
        ({"shards": 3}, 1),
        ({"shards": 3, "index": False}, 1),
        ({"index": "misnamed"}, 1),
        ({"dtype": torch.float32}, 2),
    ],
    ids=["three shards", "no index", "misnamed index", "a single F32 file"],
)
def test_index_is_rebuilt_from_what_was_written(
    arguments: dict, of_input: int, checkpoint: Callable, quantized: Callable
) -> None:
    output = quantized(checkpoint("text", **arguments))
    home, total = {}, 0
    for path in output.glob("*.safetensors"):
        state = load_file(path)
        home |= dict.fromkeys(state, path.name)
        total += sum(t.nbytes for t in state.values())
    index = read_json(output / "model.safetensors.index.json")
    assert index == {"metadata": {"total_size": total}, "weight_map": home}


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"format": "pt", "note": "größer"}, {"format": "pt", "note": "größer"}),
        (None, {"format": "pt"}),
    ],
    ids=["kept where there is some", "format pt where there is none"],
)
def test_safetensors_metadata(
    metadata: dict | None,
    expected: dict,
    tmp_path: Path,
    checkpoint: Callable,
    copy_of: Callable,
    cli: Callable,
) -> None:
    source = copy_of(checkpoint("text"))
    save_file(load_file(source / "model.safetensors"), source / "model.safetensors", metadata)
    assert cli("--input_dir", source, "--output_dir", tmp_path / "out").rc == 0
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        assert file.metadata() == expected


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("moe", {}),
        ("moe", {"f32_extras": True, "shards": 3}),
        ("text", {"dtype": torch.float16}),
        ("text", {"hidden_size": 192}),
        # Scales of one block, 2 bytes, between kept tensors of 4 bytes an element.
        ("text", {"hidden_size": 128, "intermediate_size": 128, "dtype": torch.float32}),
    ],
    ids=["moe", "F32 extras in three shards", "F16", "edge blocks", "F32 and single blocks"],
)
def test_tensors_are_aligned_to_their_dtype_and_leave_no_holes(
    kind: str, arguments: dict, checkpoint: Callable, quantized: Callable
) -> None:
    for path in quantized(checkpoint(kind, **arguments)).glob("*.safetensors"):
        entries, data_start = read_header(path)
        assert data_start % 8 == 0  # as the safetensors library writes it
        entries.pop("__metadata__")
        end = 0
        for entry in sorted(entries.values(), key=lambda e: e["data_offsets"]):
            start, stop = entry["data_offsets"]
            assert start == end
            assert (data_start + start) % ITEM_SIZE[entry["dtype"]] == 0
            end = stop
        assert data_start + end == path.stat().st_size


def test_fp8_weights_begin_on_a_page(checkpoint: Callable, quantized: Callable) -> None:
    """So that whole rows of blocks are whole pages, which the writer sends to the disk directly."""
    for path in quantized(checkpoint("moe", shards=3)).glob("*.safetensors"):
        entries, data_start = read_header(path)
        entries.pop("__metadata__")
        starts = [data_start + e["data_offsets"][0] for e in entries.values() if e["dtype"] == "F8_E4M3"]
        assert min(starts, default=0) % 4096 == 0


@pytest.mark.parametrize("flags", [(), ("--checksums",)], ids=["plain", "checksums"])
def test_direct_writes_make_the_same_files(
    checkpoint: Callable, cli: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple
) -> None:
    source = checkpoint("moe", shards=3, vocab_size=5001)  # an embedding that fills no whole pages
    writes = []  # several threads write: `append` loses nothing, `+=` would

    def write_at(fd: int, offset: int, data: bytes | memoryview, path: Path) -> None:
        if len(data) and path.name.endswith(".safetensors"):  # nothing to write needs no file
            writes.append((len(data), bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)))
        plain_write_at(fd, offset, data, path)

    plain_write_at = writer.write_at
    monkeypatch.setattr(writer, "write_at", write_at)
    arguments = ["--input_dir", source, *flags, "--output_dir"]
    assert cli(*arguments, tmp_path / "direct").rc == 0
    share = sum(n for n, is_direct in writes if is_direct) / sum(n for n, _ in writes)
    with monkeypatch.context() as patch:
        patch.setattr(direct, "_FILE_SYSTEMS", set())
        assert cli(*arguments, tmp_path / "cached").rc == 0
    assert files(tmp_path / "direct") == files(tmp_path / "cached")
    if share == 0:
        pytest.skip("this file system takes no direct writes")
    assert share > 0.9


# --- files -------------------------------------------------------------------------------------


@contextmanager
def umask(value: int) -> Iterator[None]:
    before = os.umask(value)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)], ids=oct)
def test_every_file_has_the_mode_that_the_umask_leaves(
    mask: int, mode: int, tmp_path: Path, checkpoint: Callable, copy_of: Callable, cli: Callable
) -> None:
    source = copy_of(checkpoint("text", tokenizer=True))
    (source / "tokenizer.json").chmod(0o400)  # the mode of a copy is the output's own, too
    with umask(mask):
        assert cli("--input_dir", source, "--output_dir", tmp_path / "out").rc == 0
    modes = {p.name: oct(p.stat().st_mode & 0o777) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= modes.keys()
    assert set(modes.values()) == {oct(mode)}, modes


COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
    "merges.txt",
    "scheduler_config.json",
    "README.md",
    "LICENSE",
    "assets/figures/one.png",
    "modeling_custom.py",
)
NOT_COPIED = (
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "consolidated.00.pth",
    "model.pt",
    "model-q4.gguf",
    "tf_model.h5",
    "flax_model.msgpack",
    "onnx/model.onnx",
    "last.ckpt",
    "optimizer.pt",
    "optimizer.bin",
    "scheduler.pt",
    "rng_state_0.pth",
    "random_states_0.pkl",
    "optimizer_0/__0_0.distcp",
    "trainer_state.json",
    "training_args.bin",
    "checkpoint-500/config.json",
    "checkpoint-500/model.safetensors",
    "global_step500/mp_rank_00_model_states.pt",
    "global_step500/notes.txt",
    ".git/config",
    ".cache/huggingface/download/config.json.metadata",
    "__pycache__/modeling_custom.cpython-311.pyc",
)


def test_small_files_are_copied_and_other_weights_and_training_state_are_not(
    tmp_path: Path, checkpoint: Callable, copy_of: Callable, cli: Callable
) -> None:
    source = copy_of(checkpoint("text"))
    for i, name in enumerate((*COPIED, *NOT_COPIED)):
        path = source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\r\n\0\xff" * i)  # no text tool must touch them; the first is empty
    assert cli("--input_dir", source, "--output_dir", tmp_path / "out").rc == 0
    output = files(tmp_path / "out")
    written = {"config.json", "model.safetensors", "model.safetensors.index.json", "fp8_quantization.json"}
    assert output.keys() == written | set(COPIED)
    for name in COPIED:
        assert output[name] == (source / name).read_bytes(), name


def test_a_hub_cache_snapshot_gives_plain_files_with_the_blobs_bytes(
    tmp_path: Path, checkpoint: Callable, quantized: Callable, cli: Callable
) -> None:
    plain = checkpoint("dense", tokenizer=True, shards=2)
    repository = tmp_path / "models--Qwen--Qwen3.5-0.8B"
    snapshot, blobs = repository / "snapshots" / "0123abcd", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in plain.iterdir():
        shutil.copy(path, blobs / f"sha-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/sha-{path.name}")
    assert cli("--input_dir", snapshot, "--output_dir", tmp_path / "out").rc == 0
    assert not any(p.is_symlink() for p in (tmp_path / "out").rglob("*"))
    found, expected = files(tmp_path / "out"), files(quantized(plain))
    # The manifest knows when the input was written, which differs.
    assert found.pop("fp8_quantization.json")
    assert expected.pop("fp8_quantization.json")
    assert found == expected


def test_tensors_of_any_dtype_and_shape_pass_through(
    tmp_path: Path, checkpoint: Callable, copy_of: Callable, cli: Callable
) -> None:
    source = copy_of(checkpoint("text"))
    odd = {
        "model.scalar": torch.tensor(-0.0, dtype=torch.float64),
        "model.empty": torch.zeros(0, 4, dtype=torch.bfloat16),
        "model.flags": torch.tensor([True, False, True]),
        "model.counts": torch.tensor([[1, -1]]),
    }
    save_file(load_file(source / "model.safetensors") | odd, source / "model.safetensors")
    assert cli("--input_dir", source, "--output_dir", tmp_path / "out").rc == 0
    found = tensors(tmp_path / "out")
    for name, expected in odd.items():
        assert (found[name].dtype, found[name].shape) == (expected.dtype, expected.shape), name
        as_bytes = [t.reshape(-1).view(torch.uint8) for t in (found[name], expected)]  # NaN equals itself
        assert torch.equal(*as_bytes), name


# --- config.json comes last --------------------------------------------------------------------

_renamed: list[str] | None = None


def _note_renames(event: str, arguments: tuple) -> None:
    if _renamed is not None and event == "os.rename":  # of os.replace as well
        _renamed.append(Path(os.fsdecode(arguments[1])).name)


sys.addaudithook(_note_renames)


def test_config_is_the_last_file_to_get_its_name(tmp_path: Path, checkpoint: Callable, cli: Callable) -> None:
    global _renamed
    source = checkpoint("text", tokenizer=True, shards=3)
    _renamed = []
    try:
        assert cli("--input_dir", source, "--output_dir", tmp_path / "out").rc == 0
        order = _renamed
    finally:
        _renamed = None
    assert set(order) == files(tmp_path / "out").keys()  # or files get their names in another way
    assert order[-1] == "config.json"


def spoil(shard: Path, name: str, value: float) -> None:
    """Put a value into one element of a tensor."""
    state = {k: v.clone() for k, v in load_file(shard).items()}
    state[name][-1, -1] = value
    save_file(state, shard, {"format": "pt"})


def last_shard_and_weight(folder: Path) -> tuple[Path, str]:
    """The last shard, and a weight in it that is quantized."""
    shard = max(folder.glob("*.safetensors"))
    return shard, next(name for name in load_file(shard) if name.endswith("mlp.down_proj.weight"))


def test_a_run_that_fails_late_leaves_no_config(
    tmp_path: Path, checkpoint: Callable, copy_of: Callable, cli: Callable
) -> None:
    source, output = copy_of(checkpoint("text", tokenizer=True, shards=3)), tmp_path / "out"
    spoil(*last_shard_and_weight(source), torch.nan)
    assert cli("--input_dir", source, "--output_dir", output).rc == 2
    left = {p.name for p in output.iterdir()}
    assert "config.json" not in left
    assert "model-00001-of-00003.safetensors" in left  # so it did fail late
    assert "model-00003-of-00003.safetensors" not in left
    assert not [name for name in left if name.endswith(".partial")]


def test_overwriting_takes_the_old_config_away_first(
    tmp_path: Path, checkpoint: Callable, copy_of: Callable, cli: Callable
) -> None:
    source, output = copy_of(checkpoint("text", shards=3)), tmp_path / "out"
    assert cli("--input_dir", source, "--output_dir", output).rc == 0
    spoil(*last_shard_and_weight(source), torch.inf)
    assert cli("--input_dir", source, "--output_dir", output, "--overwrite").rc == 2
    assert not (output / "config.json").exists()


def test_continuing_an_incomplete_directory_takes_the_old_config_away_first(
    tmp_path: Path, checkpoint: Callable, copy_of: Callable, cli: Callable
) -> None:
    source, output = copy_of(checkpoint("text", shards=3)), tmp_path / "out"
    assert cli("--input_dir", source, "--output_dir", output).rc == 0
    shard, weight = last_shard_and_weight(source)
    (output / shard.name).unlink()
    status = shard.stat()
    spoil(shard, weight, torch.nan)
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))  # the same input, as far as a run can see
    assert cli("--input_dir", source, "--output_dir", output).rc == 2
    assert not (output / "config.json").exists()


# --- the same bytes, always --------------------------------------------------------------------


def statistics_file(folder: Path, source: Path) -> Path:
    """Activation statistics for every 2-D weight of a checkpoint."""
    path = folder / "stats.json"
    generator = torch.Generator().manual_seed(0)
    document = {
        name: {"input_channel_mean_square": torch.rand(t.shape[1], generator=generator).tolist()}
        for name, t in tensors(source).items()
        if t.ndim == 2 and name.endswith("_proj.weight")
    }
    path.write_text(json.dumps(document))
    return path


CALIBRATIONS = [
    *map(Calibration, MODES),
    Calibration("rms", scale_format="bf16"),
    Calibration("mse", scale_format="bf16"),
]


@pytest.mark.parametrize("calibration", CALIBRATIONS, ids=str)
def test_neither_workers_nor_repetition_change_a_byte(
    calibration: Calibration, tmp_path: Path, checkpoint: Callable, cli: Callable
) -> None:
    source = checkpoint("moe", shards=3)
    flags = ["--calib_mode", calibration.mode, "--scale_format", calibration.scale_format]
    flags += ["--activation_stats", statistics_file(tmp_path, source)]
    found = {}
    for run, workers in (("first", 1), ("again", 1), ("two", 2), ("five", 5)):
        folder = tmp_path / run
        result = cli("--input_dir", source, "--output_dir", folder, *flags, "--workers", workers)
        assert result.rc != 2, result.err  # 1 is the verdict on a mode that clips
        found[run] = files(folder)
    assert "fp8_quantization.json" in found["first"]
    assert found["first"] == found["again"] == found["two"] == found["five"]


def test_the_same_command_again_changes_nothing_and_says_the_same(
    tmp_path: Path, checkpoint: Callable, cli: Callable
) -> None:
    command = ["--input_dir", checkpoint("moe", shards=3, tokenizer=True), "--output_dir", tmp_path / "out"]
    first = cli(*command)
    assert first.rc == 0
    before = files(tmp_path / "out")
    again = cli(*command)
    assert (again.rc, again.out) == (first.rc, first.out)
    assert files(tmp_path / "out") == before


@pytest.mark.parametrize("calibration", CALIBRATIONS, ids=str)
def test_the_size_of_a_piece_changes_no_byte_and_no_measurement(
    calibration: Calibration, tmp_path: Path, checkpoint: Callable
) -> None:
    source = checkpoint("text", hidden_size=448, intermediate_size=1024)  # down_proj: [448, 1024]
    plan = make_plan(open_checkpoint(source))
    statistics = Statistics(statistics_file(tmp_path, source))

    def check(shard: ShardPlan, path: Path) -> ShardCheck:
        return ShardCheck(
            shard.name,
            planned_pairs(shard, path),
            [],
            samples=None,
            seed=0,
            claim=Claim(calibration.powers_of_two),
        )

    found = []
    for piece in (0, 1, 256 * 1024 + 1, 2**40):  # default, one row of blocks, two of them, all at once
        folder = tmp_path / str(piece)
        folder.mkdir()
        convert = Nearest(calibration, statistics.importance)
        settings = Settings(convert, torch.device("cpu"), 2, piece=piece)
        work = divide(list(plan.shards), 1, False)
        done = [each for each in process(work, folder, settings, check=check) if each.final]
        found.append((files(folder), [each.check.measurements() for each in done]))
    assert len(found[0][1][0]) == len(plan.shards[0].matrices)
    assert all(other == found[0] for other in found)


@pytest.mark.gpu
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("calibration", CALIBRATIONS, ids=str)
def test_cuda_writes_the_same_bytes_as_the_cpu(
    calibration: Calibration, weighted: bool, tmp_path: Path, checkpoint: Callable, cli: Callable
) -> None:
    source = checkpoint("moe", shards=3)
    flags = ["--calib_mode", calibration.mode, "--scale_format", calibration.scale_format]
    flags += ["--activation_stats", statistics_file(tmp_path, source)] if weighted else []
    found = []
    for device in ("cpu", "cuda"):
        folder = tmp_path / device
        result = cli("--input_dir", source, "--output_dir", folder, *flags, "--device", device)
        assert result.rc != 2, result.err  # 1 is the verdict on a mode that clips
        found.append(files(folder))
        # Measured in float32, whose sums depend on the device; the weights do not.
        found[-1].pop("fp8_quantization.json")
    assert found[0] == found[1]
