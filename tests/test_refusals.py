"""What the tool refuses: exit 2, one `error:` line that names the culprit and a way out, nothing written.

Each case starts from a good checkpoint, spoils one thing and runs the command line.
"""

import errno
import json
import math
import os
import resource
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from conftest import Result
from fp8lib import Fp8Error
from fp8lib.checkpoint.directory import open_checkpoint
from fp8lib.checkpoint.plan import make_plan
from safetensors_by_hand import edit_header, put_together, read_header

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
QKV = "model.layers.0.linear_attn.in_proj_qkv.weight"
EXPERTS = "model.layers.0.mlp.experts"
DOWN = "model.layers.0.mlp.down_proj.weight"
ONE_LAYER = {"num_hidden_layers": 1, "hidden_size": 128, "mtp": False}

# A dense text model of one linear-attention layer in two shards, and MoE ones in a single file.
DENSE = ("text", {**ONE_LAYER, "intermediate_size": 128, "shards": 2})
FUSED = ("moe_text", {**ONE_LAYER, "num_experts": 3, "num_experts_per_tok": 1})
PER_EXPERT = ("moe_text", {**FUSED[1], "experts": "per_expert"})


@pytest.fixture
def dense(checkpoint: Callable) -> Path:
    kind, arguments = DENSE
    return checkpoint(kind, **arguments)


# --- ways to spoil a checkpoint ----------------------------------------------------------------


def edit_json(path: Path, edit: Callable[[dict], object]) -> None:
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))


def edit_state(path: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a shard."""
    state = {name: tensor.clone() for name, tensor in load_file(path).items()}
    edit(state)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)


def shard_of(folder: Path, name: str) -> Path:
    return next(p for p in sorted(folder.glob("*.safetensors")) if name in load_file(p))


def in_config(**changes: object) -> Callable[[Path], object]:
    return lambda folder: edit_json(folder / "config.json", lambda config: config.update(changes))


def in_weight_map(**changes: str) -> Callable[[Path], object]:
    return lambda folder: edit_json(folder / INDEX, lambda index: index["weight_map"].update(changes))


def in_tensors(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], object]:
    """Replace a tensor, wherever it lies."""

    def edit(folder: Path) -> None:
        edit_state(shard_of(folder, name), lambda state: state.update({name: change(state[name])}))

    return edit


def without_tensor(name: str) -> Callable[[Path], object]:
    return lambda folder: edit_state(shard_of(folder, name), lambda state: state.pop(name))


def in_header(name: str, **changes: object) -> Callable[[Path], object]:
    """Change what a header says about a tensor."""

    def edit(folder: Path) -> None:
        edit_header(shard_of(folder, name), lambda header: header[name].update(changes))

    return edit


def with_bytes(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def with_tensor(shard: str, name: str, tensor: torch.Tensor) -> Callable[[Path], object]:
    return lambda folder: edit_state(folder / shard, lambda state: state.update({name: tensor}))


def link_out_of_the_directory(folder: Path) -> None:
    outside = folder.parent / "elsewhere.safetensors"
    (folder / FIRST).rename(outside)
    (folder / FIRST).symlink_to(outside)


# --- the input ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One thing spoiled: the message must hold `names` and `way_out`."""

    spoil: Callable[[Path], object]
    names: str
    way_out: str
    model: tuple[str, dict] = field(default=DENSE)


INPUTS = {
    "no such directory": Case(shutil.rmtree, "input", "no such directory"),
    "a file instead of a directory": Case(
        lambda folder: (shutil.rmtree(folder), folder.write_text("")), "input", "directory"
    ),
    "no config.json": Case(
        lambda folder: (folder / "config.json").unlink(),
        "config.json",
        "give the directory that holds the model",
    ),
    "config.json is not JSON": Case(
        lambda folder: (folder / "config.json").write_text("{'a': 1}"), "config.json", "not valid JSON"
    ),
    "config.json is a list": Case(
        lambda folder: (folder / "config.json").write_text("[]"), "config.json", "not a JSON object"
    ),
    "no safetensors": Case(
        lambda folder: [p.unlink() for p in folder.glob("*.safetensors*")], "input", "no *.safetensors file"
    ),
    "no index and a shard of the numbering is missing": Case(
        lambda folder: [(folder / name).unlink() for name in (FIRST, INDEX)],
        "00001-of-00002",
        "complete the download",
    ),
    "the index names a missing shard": Case(
        lambda folder: (folder / SECOND).unlink(), SECOND, "complete the download"
    ),
    "the index leads up and out": Case(
        in_weight_map(**{QKV: "../other/model.safetensors"}), "../other/model.safetensors", INDEX
    ),
    "the index holds an absolute path": Case(
        in_weight_map(**{QKV: "/etc/model.safetensors"}), "/etc/model.safetensors", INDEX
    ),
    "the index names no safetensors file": Case(in_weight_map(**{QKV: "weights.bin"}), "weights.bin", INDEX),
    "a shard is a link out of the directory": Case(
        link_out_of_the_directory, FIRST, "put the file itself there"
    ),
    "a shard is a pipe, which nobody writes to": Case(
        lambda folder: ((folder / SECOND).unlink(), os.mkfifo(folder / SECOND)), SECOND, "regular file"
    ),
    "a tensor of the index is not in its shard": Case(
        in_weight_map(**{"model.layers.0.extra.weight": FIRST}),
        "model.layers.0.extra.weight",
        "download both again",
    ),
    "a tensor of the index is in another shard": Case(
        in_weight_map(**{"model.norm.weight": FIRST, "model.embed_tokens.weight": SECOND}),
        "model.embed_tokens.weight",
        "download both again",
    ),
    "the index is not JSON": Case(with_bytes(INDEX, lambda raw: raw[:-9]), INDEX, "not valid JSON"),
    "the index has no weight_map": Case(
        lambda folder: edit_json(folder / INDEX, lambda index: index.pop("weight_map")), INDEX, "weight_map"
    ),
    "a shard lacks its last byte": Case(
        with_bytes(SECOND, lambda raw: raw[:-1]), SECOND, "download it again"
    ),
    "a shard is cut inside its header": Case(
        with_bytes(SECOND, lambda raw: raw[:50]), SECOND, "download it again"
    ),
    "a shard is empty": Case(with_bytes(SECOND, lambda raw: b""), SECOND, "download it again"),
    "a shard is an HTML error page": Case(
        with_bytes(SECOND, lambda raw: b"<!DOCTYPE html><html>404</html>"), SECOND, "download it again"
    ),
    "a shard is a Git LFS pointer": Case(
        with_bytes(SECOND, lambda raw: b"version https://git-lfs.github.com/spec/v1\n"),
        SECOND,
        "download it again",
    ),
    "a header is not JSON": Case(
        with_bytes(SECOND, lambda raw: raw[:8] + b"X" + raw[9:]), SECOND, "not valid JSON"
    ),
    "bytes follow the last tensor": Case(
        with_bytes(SECOND, lambda raw: raw + b"\0"), SECOND, "download it again"
    ),
    "a tensor overlaps its neighbour": Case(
        in_header("model.norm.weight", data_offsets=[0, 256]),
        SECOND,
        "overlaps its neighbour or leaves a hole",
    ),
    "a tensor has other bytes than its shape": Case(
        in_header("model.norm.weight", shape=[129]), "model.norm.weight", "do not hold"
    ),
    "a tensor has a negative dimension": Case(
        in_header("model.norm.weight", shape=[-128]), "model.norm.weight", "no valid shape"
    ),
    "metadata that is no text": Case(
        lambda folder: edit_header(
            folder / SECOND, lambda header: header.update(__metadata__={"format": "\ud800"})
        ),
        SECOND,
        "__metadata__",
    ),
    "two shards with the same tensor": Case(
        with_tensor(SECOND, "model.embed_tokens.weight", torch.zeros(1)),
        "model.embed_tokens.weight",
        "remove the stale shard",
    ),
    "a tensor with the name of a scale": Case(
        with_tensor(SECOND, f"{DOWN}_scale_inv", torch.ones(1, 1)), f"{DOWN}_scale_inv", "twice"
    ),
    "a model type that is not supported": Case(
        in_config(model_type="llama"), "'llama'", "qwen3_5, qwen3_5_moe, qwen3_5_text, qwen3_5_moe_text"
    ),
    "no model type": Case(
        lambda folder: edit_json(folder / "config.json", lambda config: config.pop("model_type")),
        "config.json",
        "qwen3_5, qwen3_5_moe, qwen3_5_text, qwen3_5_moe_text",
    ),
    "quantized already, says the config": Case(
        in_config(quantization_config={"quant_method": "fp8"}), "config.json", "give the BF16 original"
    ),
    "quantized already, says the text config": Case(
        in_config(text_config={"quantization_config": {"quant_method": "awq"}}),
        "config.json",
        "give the BF16 original",
    ),
    "quantized already, says a tensor": Case(
        in_tensors(DOWN, lambda t: t.to(torch.float8_e4m3fn)), DOWN, "give the BF16 original"
    ),
    "integers in a weight to be quantized": Case(
        in_tensors(DOWN, lambda t: t.to(torch.int8)), DOWN, "BF16, F16 and F32 can"
    ),
    "F64 in a weight to be quantized": Case(
        in_tensors(DOWN, torch.Tensor.double), DOWN, "BF16, F16 and F32 can"
    ),
    "an unknown dtype in a weight to be quantized": Case(
        in_header(DOWN, dtype="Q4_K"), DOWN, "BF16, F16 and F32 can"
    ),
    "integers in fused experts": Case(
        in_tensors(f"{EXPERTS}.down_proj", lambda t: t.to(torch.uint8)),
        f"{EXPERTS}.down_proj",
        "BF16, F16 and F32 can",
        FUSED,
    ),
    "fused experts with an odd row count": Case(
        in_tensors(f"{EXPERTS}.gate_up_proj", lambda t: t[:, :-1]),
        f"{EXPERTS}.gate_up_proj",
        "cannot be halved",
        FUSED,
    ),
    "fused experts of unequal number": Case(
        in_tensors(f"{EXPERTS}.down_proj", lambda t: t[:-1]), EXPERTS, "do not fit together", FUSED
    ),
    "fused experts of unequal size": Case(
        in_tensors(f"{EXPERTS}.gate_up_proj", lambda t: t[:, :-2]), EXPERTS, "do not fit together", FUSED
    ),
    "fused experts without down_proj": Case(
        without_tensor(f"{EXPERTS}.down_proj"), f"{EXPERTS}.down_proj", "complete the checkpoint", FUSED
    ),
    "fused experts in two dimensions": Case(
        in_tensors(f"{EXPERTS}.gate_up_proj", lambda t: t[0]), f"{EXPERTS}.gate_up_proj", "not 3-D", FUSED
    ),
    "an expert is missing": Case(
        without_tensor(f"{EXPERTS}.1.up_proj.weight"),
        f"{EXPERTS}.1.up_proj.weight",
        "complete the checkpoint",
        PER_EXPERT,
    ),
    "an expert of another size": Case(
        in_tensors(f"{EXPERTS}.2.up_proj.weight", lambda t: t[:-1]),
        f"{EXPERTS}.2.up_proj.weight",
        "first expert",
        PER_EXPERT,
    ),
    "experts both fused and single": Case(
        with_tensor("model.safetensors", f"{EXPERTS}.gate_up_proj", torch.zeros(3, 256, 128)),
        EXPERTS,
        "keep one of the two",
        PER_EXPERT,
    ),
    **{
        f"a directory named {name}": Case(
            lambda folder, name=name: (folder / name).mkdir(), name, "rename it"
        )
        for name in ("fp8_quantization.json", "SHA256SUMS")
    },
    "nothing that can be quantized": Case(
        lambda folder: edit_state(
            folder / "model.safetensors",
            lambda state: [state.pop(name) for name in list(state) if ".layers." in name],
        ),
        "input",
        "no weight in it can be quantized",
        FUSED,
    ),
}


def tree(folder: Path) -> dict[str, tuple]:
    """Everything below a directory that a run could change."""
    return {
        p.relative_to(folder).as_posix(): (
            p.lstat().st_mode,
            p.lstat().st_mtime_ns,
            p.is_file() and p.read_bytes(),
        )
        for p in folder.rglob("*")
    }


def assert_refused(result: Result, *fragments: str) -> None:
    """Exit 2, nothing on stdout, and on stderr one line with the fragments in it."""
    assert result.rc == 2, result.out + result.err
    assert result.out == ""
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1, result.err
    assert result.err.endswith("\n")
    for fragment in fragments:
        assert fragment in result.err


@pytest.mark.parametrize("output_exists", [False, True], ids=["into a new directory", "into an empty one"])
@pytest.mark.parametrize("case", INPUTS.values(), ids=INPUTS)
def test_an_input_is_refused_before_the_output_is_touched(
    case: Case, output_exists: bool, tmp_path: Path, checkpoint: Callable, copy_of: Callable, cli: Callable
) -> None:
    kind, arguments = case.model
    folder = copy_of(checkpoint(kind, **arguments))
    case.spoil(folder)
    if output_exists:
        (tmp_path / "out").mkdir()
    before = tree(tmp_path)
    result = cli("--input_dir", folder, "--output_dir", tmp_path / "out")
    assert_refused(result, case.names, case.way_out)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("model", [DENSE, FUSED, PER_EXPERT], ids=["dense", "fused", "per expert"])
def test_the_models_these_cases_start_from_are_accepted(
    model: tuple, tmp_path: Path, checkpoint: Callable, cli: Callable
) -> None:
    kind, arguments = model
    result = cli("--input_dir", checkpoint(kind, **arguments), "--output_dir", tmp_path / "out")
    assert result.rc == 0, result.err


def test_a_symlinked_directory_is_no_way_out_of_it(
    tmp_path: Path, checkpoint: Callable, cli: Callable
) -> None:
    """The directory itself may be a link; only its files must lie in it."""
    kind, arguments = DENSE
    (tmp_path / "link").symlink_to(checkpoint(kind, **arguments))
    assert cli("--input_dir", tmp_path / "link", "--output_dir", tmp_path / "out").rc == 0


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64], ids=str)
def test_a_dtype_that_cannot_be_quantized_is_no_matter_in_a_kept_tensor(
    dtype: torch.dtype, tmp_path: Path, checkpoint: Callable, copy_of: Callable, cli: Callable
) -> None:
    kind, arguments = DENSE
    folder = copy_of(checkpoint(kind, **arguments))
    in_tensors("model.embed_tokens.weight", lambda t: t.to(dtype))(folder)
    assert cli("--input_dir", folder, "--output_dir", tmp_path / "out").rc == 0
    expected = load_file(folder / FIRST)["model.embed_tokens.weight"]
    found = load_file(tmp_path / "out" / FIRST)["model.embed_tokens.weight"]
    assert found.dtype == dtype
    assert torch.equal(found, expected)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damage_to_a_header_gets_past_as_anything_but_a_refusal(
    data: st.DataObject, tmp_path: Path, checkpoint: Callable
) -> None:
    kind, arguments = FUSED
    folder = tmp_path / "fuzzed"
    if not folder.exists():
        shutil.copytree(checkpoint(kind, **arguments), folder)
    shard = folder / "model.safetensors"
    original = checkpoint(kind, **arguments) / "model.safetensors"
    raw = bytearray(original.read_bytes())
    _, length = read_header(original)
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, length - 1))] = data.draw(st.integers(0, 255))
    shard.write_bytes(raw)
    try:
        plan = make_plan(open_checkpoint(folder))
    except Fp8Error as error:
        message = str(error)
    else:  # a letter of a name, say: then the plan must still read within the file
        message = ""
        for matrix in plan.matrices:
            assert length <= matrix.start
            assert matrix.start + matrix.rows * matrix.input_row_bytes <= len(raw)
    assert message.isprintable()


# --- the output directory ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "output",
    [
        lambda folder: folder,
        lambda folder: folder / "fp8",
        lambda folder: folder / "a" / ".." / "fp8",
        lambda folder: folder.parent / "link_to_input",
        lambda folder: folder.parent,
    ],
    ids=["the input itself", "inside", "inside after a detour", "a link to the input", "around the input"],
)
def test_an_output_that_overlaps_the_input_is_refused(
    output: Callable, tmp_path: Path, dense: Path, copy_of: Callable, cli: Callable
) -> None:
    folder = copy_of(dense)
    (folder.parent / "link_to_input").symlink_to(folder)
    before = tree(tmp_path)
    result = cli("--input_dir", folder, "--output_dir", output(folder), "--overwrite")
    assert_refused(result, str(output(folder)), "give a separate output directory")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("flags", [(), ("--overwrite",)], ids=["without --overwrite", "with --overwrite"])
@pytest.mark.parametrize(
    "name", ["notes.txt", "config.json", "model.safetensors", "folder/notes.txt", ".hidden"]
)
def test_an_output_with_files_of_someone_else_is_refused(
    name: str, flags: tuple, tmp_path: Path, dense: Path, cli: Callable
) -> None:
    output = tmp_path / "out"
    (output / name).parent.mkdir(parents=True)
    (output / name).write_text("{}")
    before = tree(tmp_path)
    result = cli("--input_dir", dense, "--output_dir", output, *flags)
    assert_refused(result, name.split("/")[0], "give another output directory")
    assert tree(tmp_path) == before


def test_an_output_that_is_a_file_is_refused(tmp_path: Path, dense: Path, cli: Callable) -> None:
    (tmp_path / "out").write_text("precious")
    result = cli("--input_dir", dense, "--output_dir", tmp_path / "out")
    assert_refused(result, str(tmp_path / "out"), "not a directory")
    assert (tmp_path / "out").read_text() == "precious"


def test_an_output_below_a_file_is_refused(tmp_path: Path, dense: Path, cli: Callable) -> None:
    (tmp_path / "file").write_text("precious")
    result = cli("--input_dir", dense, "--output_dir", tmp_path / "file" / "out")
    assert_refused(result, str(tmp_path / "file"))


def test_an_earlier_run_with_other_settings_is_refused_without_overwrite(
    tmp_path: Path, dense: Path, cli: Callable
) -> None:
    output = tmp_path / "out"
    assert cli("--input_dir", dense, "--output_dir", output).rc == 0
    before = tree(output)
    result = cli("--input_dir", dense, "--output_dir", output, "--calib_mode", "max")
    assert_refused(result, str(output), "--overwrite")
    assert tree(output) == before


def test_overwrite_replaces_what_a_run_wrote_and_nothing_else(
    tmp_path: Path, checkpoint: Callable, quantized: Callable, cli: Callable
) -> None:
    kind, arguments = DENSE
    first, second = checkpoint(kind, **arguments), checkpoint(kind, **{**arguments, "shards": 1})
    output = tmp_path / "out"
    assert cli("--input_dir", first, "--output_dir", output).rc == 0
    (output / "notes.txt").write_text("mine")
    (output / "folder").mkdir()
    (output / "folder" / "model.safetensors").write_text("mine too")
    assert cli("--input_dir", second, "--output_dir", output, "--overwrite").rc == 0
    found = {name: content for name, (_, _, content) in tree(output).items() if content is not False}
    assert found.pop("notes.txt") == b"mine"
    assert found.pop("folder/model.safetensors") == b"mine too"
    fresh = tree(quantized(second))
    assert found == {name: content for name, (_, _, content) in fresh.items()}  # no shard of the first


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json.bak"])
def test_overwrite_refuses_to_replace_a_file_that_no_run_wrote(
    name: str, tmp_path: Path, checkpoint: Callable, copy_of: Callable, cli: Callable
) -> None:
    kind, arguments = DENSE
    output = tmp_path / "out"
    assert cli("--input_dir", checkpoint(kind, **arguments), "--output_dir", output).rc == 0
    (output / name).write_text("mine")
    second = copy_of(checkpoint(kind, **{**arguments, "shards": 1, "tokenizer": True}))
    (second / "config.json.bak").write_text("{}")
    before = tree(tmp_path)
    result = cli("--input_dir", second, "--output_dir", output, "--overwrite")
    assert_refused(result, name, "not written by this tool")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", [".notes.partial", ".model.safetensors.download.partial"])
def test_a_partial_file_that_no_run_wrote_is_not_removed(
    name: str, tmp_path: Path, dense: Path, cli: Callable
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    cli("--input_dir", dense, "--output_dir", tmp_path / "out")
    assert (tmp_path / "out" / name).read_text() == "mine"


# --- free space --------------------------------------------------------------------------------


def test_the_space_that_is_needed_is_counted_to_the_block(
    tmp_path: Path, checkpoint: Callable, quantized: Callable, cli: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint("moe", shards=3, tokenizer=True)
    block = os.statvfs(tmp_path).f_frsize
    sizes = {p.name: p.stat().st_size for p in quantized(source).rglob("*")}
    # The manifest grows with every shard, and there are two of it while it is replaced: a bound, 700 bytes
    # for each shard's two records and each of its 5 measurements.
    manifest = 4096 + 700 * (2 * 3 + 3 * 5)
    assert sizes.pop("fp8_quantization.json") < manifest
    needed = sum(math.ceil(size / block) * block for size in [*sizes.values(), manifest, manifest])
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    result = cli("--input_dir", source, "--output_dir", tmp_path / "out")
    assert_refused(result, f"needs {needed:,} bytes", f"{needed - 1:,} are free", "free some space")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    assert cli("--input_dir", source, "--output_dir", tmp_path / "out").rc == 0


def test_a_checkpoint_larger_than_the_disk_is_refused_at_once(
    tmp_path: Path, checkpoint: Callable, copy_of: Callable, cli: Callable
) -> None:
    """A sparse shard with a true header: terabytes that take no room, and must not be read."""
    folder = copy_of(checkpoint(*FUSED[:1], **FUSED[1]))
    elements = shutil.disk_usage(tmp_path).free  # of 2 bytes: twice what is free
    header = {"model.visual.huge": {"dtype": "BF16", "shape": [elements], "data_offsets": [0, 2 * elements]}}
    huge = folder / "huge.safetensors"
    put_together(huge, header)
    try:
        os.truncate(huge, huge.stat().st_size + 2 * elements)
    except OSError as error:
        if error.errno != errno.EFBIG:
            raise
        pytest.skip("this file system has more free space than its largest file may have")
    result = cli("--input_dir", folder, "--output_dir", tmp_path / "out")
    assert_refused(result, str(tmp_path / "out"), "are free", "free some space")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="of a limit that Linux enforces on sparse files")
def test_a_file_that_may_not_grow_that_large_leaves_nothing_half_written(
    tmp_path: Path, dense: Path, run: Callable
) -> None:
    def limit() -> None:  # `ulimit -f`, as quotas and FAT file systems have
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    result = run("--input_dir", dense, "--output_dir", tmp_path / "out", preexec_fn=limit)
    assert result.rc == 2
    [error] = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert "model-0000" in error
    assert "ulimit -f" in error
    assert "Traceback" not in result.err
    left = [p.name for p in (tmp_path / "out").iterdir()]
    assert not [name for name in left if name.endswith((".partial", ".safetensors")) or name == "config.json"]


# --- flags -------------------------------------------------------------------------------------

FLAGS = {
    "a factor of 0": (("--rms_factor", "0"), "above 0"),
    "a negative factor": (("--rms_factor", "-1"), "above 0"),
    "a factor that is not a number": (("--rms_factor", "nan"), "above 0"),
    "an infinite factor": (("--rms_factor", "inf"), "above 0"),
    "a factor in words": (("--rms_factor", "three"), "three"),
    "percentile 0": (("--calib_percentile", "0"), "must be 50 to 100"),
    "a percentile above 100": (("--calib_percentile", "100.1"), "must be 50 to 100"),
    "no phases": (("--mse_grid_size", "0"), "1 to 128"),
    "more phases than there are": (("--mse_grid_size", "129"), "1 to 128"),
    "half a phase": (("--mse_grid_size", "0.5"), "0.5"),
    "a mode that does not exist": (("--calib_mode", "entropy"), "percentile"),
    "no samples": (("--verify_samples", "0"), "'all'"),
    "some samples": (("--verify_samples", "some"), "'all'"),
    "a seed in words": (("--seed", "zero"), "zero"),
    "a negative number of workers": (("--workers", "-1"), "1 or more"),
    "no workers": (("--workers", "0"), "1 or more"),
    "a device of another kind": (("--device", "tpu"), "cpu"),
    "a device in words": (("--device", "the fast one"), "cpu"),
    "a device that is absent": (("--device", "cuda:99"), "--device cpu"),
    "a typo": (("--calib_moed", "max"), "--calib_moed"),
    "an abbreviation": (("--calib_percent", "99"), "--calib_percent"),
    "a word too many": (("max",), "max"),
    "an input that is an empty word": (("--input_dir", ""), "is empty"),
    "an output that is an empty word": (("--output_dir", ""), "is empty"),
    "statistics that are an empty word": (("--activation_stats", ""), "is empty"),
    "a plan and a verification": (("--verify_only", "--dry_run"), "--dry_run"),
}


@pytest.mark.parametrize(("flags", "way_out"), FLAGS.values(), ids=FLAGS)
def test_a_flag_is_refused_before_the_output_is_touched(
    flags: tuple, way_out: str, tmp_path: Path, dense: Path, cli: Callable
) -> None:
    result = cli("--input_dir", dense, "--output_dir", tmp_path / "out", *flags)
    assert_refused(result, flags[0], way_out)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_cuda_is_refused_where_there_is_none(device: str, tmp_path: Path, dense: Path, cli: Callable) -> None:
    result = cli("--input_dir", dense, "--output_dir", tmp_path / "out", "--device", device)
    assert_refused(result, f"--device {device}", "use --device cpu")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("missing", ["--input_dir", "--output_dir"])
def test_a_directory_that_is_not_given_is_asked_for(missing: str, tmp_path: Path, cli: Callable) -> None:
    given = {"--input_dir": tmp_path / "in", "--output_dir": tmp_path / "out"}
    given.pop(missing)
    assert_refused(cli(*(word for pair in given.items() for word in pair)), missing)


# --- activation statistics ---------------------------------------------------------------------

CHANNELS = 128
GOOD_ENTRY = {"input_channel_mean_square": [1.0] * CHANNELS}


def entry(*values: float, key: str = "input_channel_mean_square") -> dict:
    """The good statistics with other first values for one tensor."""
    return {DOWN: {key: [*values, *[1.0] * (CHANNELS - len(values))]}}


STATISTICS = {
    "not JSON": ("{", "not valid JSON"),
    "not an object": ("[]", "not a JSON object"),
    "an entry without values": (json.dumps({DOWN: {"mean": [1.0]}}), "input_channel_mean_square"),
    "too few channels": (json.dumps({DOWN: {"input_channel_max": [1.0] * 127}}), DOWN),
    "too many channels": (json.dumps({DOWN: {"input_channel_max": [1.0] * 129}}), DOWN),
    "no channels": (json.dumps({DOWN: {"input_channel_max": []}}), DOWN),
    "a list in a list": (json.dumps({DOWN: {"input_channel_max": [[1.0] * CHANNELS]}}), DOWN),
    "words": (json.dumps({DOWN: {"input_channel_max": ["high"] * CHANNELS}}), "stats.json"),
    "a negative mean square": (json.dumps(entry(-1.0)), DOWN),
    "a negative maximum": (json.dumps(entry(-1.0, key="input_channel_max")), DOWN),
    "NaN": (json.dumps(entry(float("nan"))), DOWN),
    "infinity": (json.dumps(entry(float("inf"))), DOWN),
    "more than float32 holds": (json.dumps(entry(1e300)), DOWN),
    "a maximum whose square is more than float32 holds": (
        json.dumps(entry(1e30, key="input_channel_max")),
        DOWN,
    ),
    "statistics of another model": (
        json.dumps({"model.layers.7.mlp.down_proj.weight": GOOD_ENTRY}),
        "collect statistics from this model",
    ),
}


@pytest.mark.parametrize("mode", ["rms", "mse"])
@pytest.mark.parametrize(("text", "way_out"), STATISTICS.values(), ids=STATISTICS)
def test_statistics_are_refused_before_the_output_is_touched(
    text: str, way_out: str, mode: str, tmp_path: Path, dense: Path, cli: Callable
) -> None:
    path = tmp_path / "stats.json"
    path.write_text(text)
    result = cli(
        "--input_dir", dense, "--output_dir", tmp_path / "out",
        "--calib_mode", mode, "--activation_stats", path,
    )  # fmt: skip
    assert_refused(result, str(path), way_out)
    assert not (tmp_path / "out").exists()


def test_statistics_that_do_not_exist_are_refused(tmp_path: Path, dense: Path, cli: Callable) -> None:
    path = tmp_path / "stats.json"
    result = cli("--input_dir", dense, "--output_dir", tmp_path / "out", "--activation_stats", path)
    assert_refused(result, str(path), "no such file")
    assert not (tmp_path / "out").exists()


def test_good_statistics_are_accepted(tmp_path: Path, dense: Path, cli: Callable) -> None:
    """Or the cases above would be refused for another reason."""
    path = tmp_path / "stats.json"
    path.write_text(json.dumps({DOWN: GOOD_ENTRY}))
    result = cli("--input_dir", dense, "--output_dir", tmp_path / "out", "--activation_stats", path)
    assert result.rc == 0, result.err


# --- NaN and infinity --------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["rms", "max", "percentile", "mse"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_nan_and_infinity_are_named_and_leave_no_config(
    value: float, mode: str, tmp_path: Path, dense: Path, copy_of: Callable, cli: Callable
) -> None:
    folder = copy_of(dense)
    broken = ["model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp.up_proj.weight"]
    assert shard_of(folder, broken[0]) == shard_of(folder, broken[1])

    def spoil(state: dict[str, torch.Tensor]) -> None:
        for name in broken:
            state[name][-1, 3] = value

    edit_state(shard_of(folder, broken[0]), spoil)
    result = cli("--input_dir", folder, "--output_dir", tmp_path / "out", "--calib_mode", mode)
    assert result.rc == 2
    assert result.out == ""
    [error] = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert all(name in error for name in broken)
    assert "gate_proj" not in error
    assert "repair the input model" in error
    assert "Traceback" not in result.err
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_nan_in_a_fused_expert_is_named_by_its_expert(
    dtype: torch.dtype, tmp_path: Path, checkpoint: Callable, copy_of: Callable, cli: Callable
) -> None:
    folder = copy_of(checkpoint(FUSED[0], **FUSED[1], dtype=dtype))

    def spoil(state: dict[str, torch.Tensor]) -> None:
        state[f"{EXPERTS}.gate_up_proj"][2, -1, -1] = torch.nan

    edit_state(folder / "model.safetensors", spoil)
    result = cli("--input_dir", folder, "--output_dir", tmp_path / "out")
    assert result.rc == 2
    assert f"{EXPERTS}.2.up_proj.weight" in result.err
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight"])
def test_nan_or_infinity_in_a_kept_tensor_is_refused_and_named(
    name: str, value: float, tmp_path: Path, dense: Path, copy_of: Callable, cli: Callable
) -> None:
    def spoil(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[-1] = value
        return tensor

    folder = copy_of(dense)
    in_tensors(name, spoil)(folder)
    result = cli("--input_dir", folder, "--output_dir", tmp_path / "out")
    assert_refused(result, f"NaN or infinity in {name}")
    assert not (tmp_path / "out" / "config.json").exists()


# --- as a user sees it -------------------------------------------------------------------------


def test_a_refusal_is_one_line_and_no_traceback(tmp_path: Path, checkpoint: Callable, run: Callable) -> None:
    result = run("--input_dir", tmp_path / "nowhere", "--output_dir", tmp_path / "out")
    assert_refused(result, str(tmp_path / "nowhere"))


def test_debug_shows_the_traceback_and_changes_nothing_else(tmp_path: Path, run: Callable) -> None:
    result = run("--input_dir", tmp_path / "nowhere", "--output_dir", tmp_path / "out", "--debug")
    assert result.rc == 2
    assert result.out == ""
    assert "Traceback (most recent call last)" in result.err
    [error] = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert str(tmp_path / "nowhere") in error
    assert not (tmp_path / "out").exists()


def test_a_name_cannot_write_to_the_terminal(
    tmp_path: Path, dense: Path, copy_of: Callable, cli: Callable
) -> None:
    folder = copy_of(dense)
    in_config(model_type="\033[2J\nerror: all is well")(folder)
    result = cli("--input_dir", folder, "--output_dir", tmp_path / "out")
    assert_refused(result, "x1b[2J")
    assert "\033" not in result.err
