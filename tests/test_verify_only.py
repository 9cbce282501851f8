"""--verify_only: measures a finished FP8 directory, whoever made it, against its BF16 original."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tiny_checkpoints import tensors

FP8 = torch.float8_e4m3fn
MODEL = ("moe_text", {"num_hidden_layers": 1, "hidden_size": 128, "num_experts": 4, "num_experts_per_tok": 1,
                      "shards": 2})  # fmt: skip
MATRICES = 30
"""in_proj_qkv and in_proj_z, 4 of the draft layer's attention, and 4 experts of 3 in either layer."""
LAYER = "model.layers.0"
Z = f"{LAYER}.linear_attn.in_proj_z.weight"
OUT = f"{LAYER}.linear_attn.out_proj.weight"


@pytest.fixture(scope="module")
def original(checkpoint: Callable) -> Path:
    return checkpoint(MODEL[0], **MODEL[1])


@pytest.fixture
def finished(original: Path, quantized: Callable, tmp_path: Path) -> Path:
    """A copy of this tool's output."""
    return shutil.copytree(quantized(original), tmp_path / "fp8")


@pytest.fixture
def official(original: Path, tmp_path: Path) -> Path:
    """What a publisher's own script makes of the original: F32 scales, one file, another config."""
    folder = tmp_path / "official"
    folder.mkdir()
    state = per_expert(tensors(original))
    quantized = [name for name in state if is_linear(name)]
    for name in quantized:
        state |= quantize(name, state[name])
    write(folder, original, state)
    return folder


def per_expert(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors in the layout of FP8 releases."""
    result = {}
    for name, tensor in state.items():
        experts, _, part = name.rpartition(".")
        if part == "gate_up_proj":
            for e, one in enumerate(tensor):
                gate, up = one.chunk(2)
                result |= {f"{experts}.{e}.gate_proj.weight": gate, f"{experts}.{e}.up_proj.weight": up}
        elif part == "down_proj":
            result |= {f"{experts}.{e}.down_proj.weight": one for e, one in enumerate(tensor)}
        else:
            result[name] = tensor
    return result


def is_linear(name: str) -> bool:
    """What the official releases quantize."""
    part = r"(self_attn\.[qkvo]_proj|linear_attn\.in_proj_(qkv|z)|mlp(\.experts\.\d+)?\.(gate|up|down)_proj)"
    return re.search(rf"layers\.\d+\.{part}\.weight$", name) is not None


def quantize(name: str, weight: torch.Tensor, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Plain max scaling in blocks of 128, for dimensions that are multiples of it."""
    rows, columns = weight.shape
    blocks = weight.float().view(rows // 128, 128, columns // 128, 128)
    scale = (blocks.abs().amax((1, 3)) / 448).to(dtype)
    codes = (blocks / scale.float()[:, None, :, None]).clamp(-448, 448).to(FP8).view(rows, columns)
    return {name: codes, f"{name}_scale_inv": scale}


def write(folder: Path, original: Path, state: dict[str, torch.Tensor]) -> None:
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors")
    config = json.loads((original / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config))
    relist(folder)


def relist(folder: Path) -> None:
    """List what is not FP8, as publishers do: full names, and a layer's experts as one."""
    state = tensors(folder)
    kept = {n.removesuffix(".weight") for n, t in state.items() if n.endswith(".weight") and t.ndim > 1}
    kept -= {n.removesuffix(".weight") for n, t in state.items() if t.dtype == FP8}
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["modules_to_not_convert"] = sorted(
        {re.sub(r"(\.mlp\.experts)\..*", r"\1", name) for name in kept}
    )
    (folder / "config.json").write_text(json.dumps(config))


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of whichever shard of a directory holds what is changed.

    The manifest goes: it would tell at once that another program wrote the shard.
    """
    (folder / "fp8_quantization.json").unlink(missing_ok=True)
    for path in sorted(folder.glob("*.safetensors")):
        state = {k: v.clone() for k, v in load_file(path).items()}
        try:
            change(state)
        except KeyError:
            continue
        save_file({k: v.contiguous() for k, v in state.items()}, path)
        index = folder / "model.safetensors.index.json"
        if index.exists():
            document = json.loads(index.read_text())
            kept = {k: v for k, v in document["weight_map"].items() if v != path.name}
            document["weight_map"] = kept | dict.fromkeys(state, path.name)
            index.write_text(json.dumps(document))
        return
    raise AssertionError("nothing was changed")


@pytest.fixture(scope="module")
def verify(cli: Callable) -> Callable:
    """`verify(original, fp8, …)`: the run, which changes nothing."""

    def call(original: Path, folder: Path, *flags: object) -> object:
        def state() -> dict:
            return {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.rglob("*")}

        before = state()
        result = cli("--input_dir", original, "--output_dir", folder, "--verify_only", *flags)
        assert state() == before
        return result

    return call


def count(result: object, label: str) -> int:
    return int(re.search(rf"{label}\s*: (\d+)", result.out)[1])


# --- directories that are right ----------------------------------------------------------------


def test_the_output_of_this_tool(original: Path, quantized: Callable, verify: Callable) -> None:
    folder = quantized(original)
    result = verify(original, folder, "--verify_samples", "all")
    assert result.rc == 0, result.out
    assert result.err.splitlines() == [f"[{i}/2] model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    state = tensors(folder)
    fp8 = [name for name, tensor in state.items() if tensor.dtype == FP8]
    assert count(result, "FP8 weight tensors") == count(result, "Checked") == len(fp8) == MATRICES
    assert f"{MATRICES} of {MATRICES}  (" in result.out
    assert count(result, "Passthrough tensors") == len(state) - 2 * len(fp8)
    assert "rms(k=3" in result.out  # what the manifest knows


def test_it_finds_what_the_run_found(original: Path, tmp_path: Path, cli: Callable, verify: Callable) -> None:
    """The same sample for the same seed, so the same numbers; it compares what was copied, too."""

    def measured(result: object) -> list[str]:
        own = ("Calibration  ", "Bytes looked at")
        return [line for line in result.out.splitlines() if not any(word in line for word in own)]

    flags = ("--verify_samples", 3, "--seed", 11)
    made = cli("--input_dir", original, "--output_dir", tmp_path / "out", *flags)
    again = verify(original, tmp_path / "out", *flags)
    assert measured(again) == measured(made)


def test_it_writes_nothing_and_needs_no_leave_to(finished: Path, original: Path, verify: Callable) -> None:
    """It runs on a read-only directory, and beside another run: no lock, no file."""
    (finished / ".fp8_quantization.lock").touch()
    for folder in (finished, original):
        folder.chmod(0o555)
    try:
        assert verify(original, finished).rc == 0
    finally:
        for folder in (finished, original):
            folder.chmod(0o755)


def test_an_official_release_with_float32_scales(original: Path, official: Path, verify: Callable) -> None:
    result = verify(original, official, "--verify_samples", "all")
    assert result.rc == 0, result.out
    assert count(result, "FP8 weight tensors") == count(result, "Checked") == MATRICES
    assert "unknown" in result.out  # nobody knows how it was calibrated
    cosines = re.search(r"cosine sim\s+(\S+)", result.out)
    assert 0.9995 < float(cosines[1]) < 0.9998  # plain max scaling of Gaussian weights: 0.99965


def test_a_release_that_quantized_what_the_rules_keep(
    original: Path, official: Path, verify: Callable
) -> None:
    kept = [OUT, f"{LAYER}.mlp.shared_expert.down_proj.weight"]
    edit(official, lambda state: [state.update(quantize(name, state[name], torch.bfloat16)) for name in kept])
    relist(official)
    result = verify(original, official, "--verify_samples", "all")
    assert result.rc == 0, result.out
    assert count(result, "Checked") == MATRICES + len(kept)


def test_a_release_that_kept_what_the_rules_quantize(
    original: Path, official: Path, verify: Callable
) -> None:
    source = per_expert(tensors(original))
    experts = [
        f"mtp.layers.0.mlp.experts.{e}.{p}_proj.weight" for e in range(4) for p in ("gate", "up", "down")
    ]
    keep = [Z, Z.replace("_z", "_qkv"), *experts]

    def restore(state: dict[str, torch.Tensor]) -> None:
        for name in keep:
            state[name] = source[name]
            del state[f"{name}_scale_inv"]

    edit(official, restore)
    relist(official)
    result = verify(original, official, "--verify_samples", "all")
    assert result.rc == 0, result.out
    assert count(result, "Checked") == MATRICES - len(keep)


@pytest.mark.parametrize(
    ("name", "group"),
    [(Z, "in_proj_qkvz"), ("mtp.layers.0.mlp.experts.3.up_proj.weight", "mtp.layers.0.mlp.experts")],
    ids=["in_proj_z", "one expert"],
)
def test_a_release_that_kept_one_of_what_engines_load_as_one_fails(
    name: str, group: str, original: Path, official: Path, verify: Callable
) -> None:
    def restore(state: dict[str, torch.Tensor]) -> None:
        state[name] = per_expert(tensors(original))[name]
        del state[f"{name}_scale_inv"]

    edit(official, restore)
    relist(official)
    result = verify(original, official)
    assert result.rc == 1
    assert re.search(rf"vLLM 0.32.0: \S*{group} is FP8 in part", result.out)


def test_a_release_with_an_fp8_head_fails(original: Path, official: Path, verify: Callable) -> None:
    """vLLM and SGLang never quantize the head: its codes would be taken for weights."""
    edit(official, lambda state: state.update(quantize("lm_head.weight", state["lm_head.weight"])))
    relist(official)
    result = verify(original, official)
    assert result.rc == 1
    assert "vLLM 0.32.0: lm_head is FP8 in the files, but it loads them in BF16 only" in result.out


def test_kept_tensors_of_another_precision(original: Path, official: Path, verify: Callable) -> None:
    """A publisher may store norms as F32; that is no deviation."""
    edit(official, lambda state: state.update({"model.norm.weight": state["model.norm.weight"].float()}))
    assert verify(original, official).rc == 0


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"experts": "per_expert"},
        {"dtype": torch.float16},
        {"dtype": torch.float32},
        {"tied": True},
        {"shards": 1, "index": "misnamed"},
        {"shards": 4, "index": False},
    ],
    ids=str,
)  # fmt: skip
def test_every_layout_of_the_original(
    arguments: dict, checkpoint: Callable, quantized: Callable, verify: Callable
) -> None:
    source = checkpoint(MODEL[0], **{**MODEL[1], **arguments})
    result = verify(source, quantized(source), "--verify_samples", "all")
    assert result.rc == 0, result.out
    assert count(result, "Checked") == MATRICES


def test_edge_blocks(checkpoint: Callable, quantized: Callable, verify: Callable) -> None:
    source = checkpoint("text", num_hidden_layers=4, hidden_size=192, mtp=False)
    fp8 = quantized(source)
    assert {t.shape[0] % 128 for t in tensors(fp8).values() if t.dtype == FP8} == {64}  # o_proj, down_proj
    assert verify(source, fp8, "--verify_samples", "all").rc == 0


def test_without_a_manifest_and_cut_into_other_files(
    finished: Path, original: Path, verify: Callable
) -> None:
    """Somebody may merge the shards, rename them, or leave the manifest behind."""
    state = tensors(finished)
    for path in [*finished.glob("*.safetensors*"), finished / "fp8_quantization.json"]:
        path.unlink()
    save_file(state, finished / "all.safetensors")
    result = verify(original, finished, "--verify_samples", "all")
    assert result.rc == 0, result.out
    assert count(result, "Shards processed") == 1
    assert count(result, "Checked") == MATRICES


# --- directories that are wrong ----------------------------------------------------------------


def doubled(state: dict[str, torch.Tensor]) -> None:
    state[f"{Z}_scale_inv"][0, 0] *= 2


def with_nan(state: dict[str, torch.Tensor]) -> None:
    state[f"{Z}_scale_inv"][0, 0] = torch.nan


def with_zero(state: dict[str, torch.Tensor]) -> None:
    state[f"{Z}_scale_inv"][0, 0] = 0


def inverted(state: dict[str, torch.Tensor]) -> None:
    """What the name says, instead of what it means."""
    state[f"{Z}_scale_inv"] = 1 / state[f"{Z}_scale_inv"]


def swapped(state: dict[str, torch.Tensor]) -> None:
    gate, up = (f"{LAYER}.mlp.experts.2.{part}_proj.weight" for part in ("gate", "up"))
    for suffix in ("", "_scale_inv"):
        state[gate + suffix], state[up + suffix] = state[up + suffix], state[gate + suffix]


def transposed(state: dict[str, torch.Tensor]) -> None:
    name = f"{LAYER}.mlp.experts.0.down_proj.weight"
    state[name] = state[name].view(torch.uint8).T.contiguous().view(FP8)


def one_flipped_sign(state: dict[str, torch.Tensor]) -> None:
    codes = state[Z].view(torch.uint8)
    codes[5, int((codes[5] & 0x7F).argmax())] ^= 0x80


MEASURED = {
    "a scale twice as large": doubled,
    "all scales inverted": inverted,
    "gate and up of an expert swapped": swapped,
    "a weight transposed": transposed,
    "one sign flipped": one_flipped_sign,
}
STRUCTURE = {
    "a scale of NaN": (with_nan, f"{Z}_scale_inv: holds values that are not finite and positive"),
    "a scale of 0": (with_zero, f"{Z}_scale_inv: holds values that are not finite and positive"),
    "a missing weight": (lambda state: [state.pop(Z), state.pop(f"{Z}_scale_inv")], f"{Z}: missing"),
    "a missing scale": (lambda state: state.pop(f"{Z}_scale_inv"), f"{Z}: FP8 without a"),
    "a scale without its weight": (
        lambda state: state.pop(Z),
        f"{Z}_scale_inv: a scale without an FP8 weight",
    ),
    "a missing expert": (
        lambda state: [state.pop(f"{LAYER}.mlp.experts.1.up_proj.weight{s}") for s in ("", "_scale_inv")],
        f"{LAYER}.mlp.experts.1.up_proj.weight: missing",
    ),
    "a missing norm": (lambda state: state.pop("model.norm.weight"), "model.norm.weight: missing"),
    "an extra tensor": (
        lambda state: (state[Z], state.update({"model.extra.weight": torch.zeros(2)})),
        "model.extra.weight: not in the original",
    ),
    "an extra FP8 tensor": (
        lambda state: state.update({f"model.extra{x}": state[f"{Z}{x}"].clone() for x in ("", "_scale_inv")}),
        "model.extra: FP8, but the original has no such matrix",
    ),
    "another shape of a norm": (
        lambda state: state.update({"model.norm.weight": state["model.norm.weight"][:64]}),
        "model.norm.weight: [64], [128] in the original",
    ),
    "another shape of a weight": (
        lambda state: state.update({Z: state[Z].view(torch.uint8)[:128].view(FP8)}),
        f"{Z}: [128, 128], [256, 128] in the original",
    ),
    "one scale for all": (
        lambda state: state.update({f"{Z}_scale_inv": state[f"{Z}_scale_inv"].amax().reshape(1, 1)}),
        f"{Z}_scale_inv: BF16 [1, 1], expected BF16 [2, 1]",
    ),
    "integer scales": (
        lambda state: state.update({f"{Z}_scale_inv": state[f"{Z}_scale_inv"].view(torch.int16)}),
        f"{Z}_scale_inv: I16 [2, 1], expected BF16 [2, 1]",
    ),
    "a scale beside a weight that was put back": (
        lambda state: state.update({Z: state[Z].bfloat16()}),
        f"{Z}_scale_inv: a scale without an FP8 weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", MEASURED.values(), ids=MEASURED)
def test_wrong_values_fail(change: Callable, finished: Path, original: Path, verify: Callable) -> None:
    edit(finished, change)
    result = verify(original, finished, "--verify_samples", "all")
    assert result.rc == 1
    assert "VERDICT: x FAIL" in result.out


@pytest.mark.parametrize(("change", "line"), STRUCTURE.values(), ids=STRUCTURE)
def test_wrong_structure_fails_and_is_named(
    change: Callable, line: str, finished: Path, original: Path, verify: Callable
) -> None:
    edit(finished, change)
    result = verify(original, finished)
    assert result.rc == 1, result.err
    assert line in result.out
    assert "VERDICT: x FAIL" in result.out


def test_what_a_foreign_manifest_says_is_never_printed_raw(
    finished: Path, original: Path, verify: Callable
) -> None:
    path = finished / "fp8_quantization.json"
    for settings in ({"calibration": "\x1b[2Jmine"}, {"calibration": ["\x9b"]}, {"calibration": "x\ny"}, {}):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"settings": settings}))
        shown = verify(original, finished)
        assert "fp8_quantization.json: damaged" in shown.out
        assert (shown.out + shown.err).replace("\n", "").isprintable()
        assert len(shown.out.splitlines()[2]) < 80


def test_a_config_that_does_not_say_fp8_fails(finished: Path, original: Path, verify: Callable) -> None:
    shutil.copy(original / "config.json", finished / "config.json")
    result = verify(original, finished)
    assert result.rc == 1
    assert "no quantization_config" in result.out


def test_a_directory_without_fp8_weights_is_not_good(
    original: Path, tmp_path: Path, verify: Callable
) -> None:
    folder = shutil.copytree(original, tmp_path / "bf16")
    for other in (folder, original):
        result = verify(original, other)
        assert result.rc == 1
        assert "nothing was measured" in result.out


def test_another_model_fails_and_no_flag_is_said_to_help(
    finished: Path, checkpoint: Callable, verify: Callable
) -> None:
    other = checkpoint(MODEL[0], **{**MODEL[1], "seed": 1})
    result = verify(other, finished, "--verify_samples", "all")
    assert result.rc == 1
    assert "not made from this --input_dir" in " ".join(result.out.split())
    assert "--calib_mode" not in result.out
    assert "--overwrite" not in result.out


def test_an_input_of_another_shape_is_noted(finished: Path, checkpoint: Callable, verify: Callable) -> None:
    other = checkpoint(MODEL[0], **{**MODEL[1], "num_experts": 8})
    result = verify(other, finished)
    assert result.rc == 1
    assert "was not made from this input" in result.err
    assert "is not a quantization of this --input_dir" in " ".join(result.out.split())
    assert "--overwrite" not in result.out


def test_advice_is_for_the_mode_that_was_used(
    checkpoint: Callable, tmp_path: Path, cli: Callable, verify: Callable
) -> None:
    source = checkpoint(MODEL[0], **MODEL[1])
    flags = ("--calib_mode", "percentile", "--calib_percentile", "99", "--scale_format", "bf16")
    made = cli("--input_dir", source, "--output_dir", tmp_path / "out", *flags)
    assert "1. --calib_mode mse: " in made.out  # clipping is what it can mend, and the format stays
    assert advice(verify(source, tmp_path / "out").out) == advice(made.out)


def advice(summary: str) -> list[str]:
    return summary.split("VERDICT")[1].splitlines()


def test_empty_fp8_matrices_fail(original: Path, official: Path, tmp_path: Path, verify: Callable) -> None:
    """There is nothing to divide by."""
    source = shutil.copytree(original, tmp_path / "source")
    empty = {"model.a.weight": torch.zeros(0, 128), "model.b.weight": torch.zeros(128, 0)}
    edit(source, lambda state: (state[Z], state.update({k: v.bfloat16() for k, v in empty.items()})))
    scales = {f"{k}_scale_inv": torch.zeros(*(-(-n // 128) for n in v.shape)) for k, v in empty.items()}
    edit(official, lambda state: state.update({k: v.to(FP8) for k, v in empty.items()} | scales))
    result = verify(source, official, "--verify_samples", "all")
    assert result.rc == 1, result.err
    assert "model.a.weight: FP8, but empty" in result.out


# --- refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (lambda folder: (folder / "model-00002-of-00002.safetensors").unlink(), "model-00002-of-00002"),
        (
            lambda folder: os.truncate(folder / "model-00002-of-00002.safetensors", 1000),
            "model-00002-of-00002",
        ),
        (lambda folder: os.mkfifo(folder / "x.json"), "x.json"),
        (
            lambda folder: ((folder / "config.json").unlink(), os.mkfifo(folder / "config.json")),
            "config.json",
        ),
        (shutil.rmtree, "fp8"),
    ],
    ids=[
        "unfinished",
        "a shard missing",
        "a shard truncated",
        "a FIFO",
        "a FIFO for config.json",
        "nothing there",
    ],
)
def test_a_directory_that_is_not_finished_is_refused(
    spoil: Callable, named: str, finished: Path, original: Path, cli: Callable
) -> None:
    spoil(finished)
    result = cli("--input_dir", original, "--output_dir", finished, "--verify_only")
    assert (result.rc, result.out) == (2, "")
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    assert named in result.err


def test_a_run_that_is_not_finished_is_to_be_continued(
    finished: Path, original: Path, verify: Callable
) -> None:
    (finished / "config.json").unlink()
    result = verify(original, finished)
    assert result.rc == 2
    assert "repeat its command to continue it" in result.err


def test_a_damaged_manifest_does_not_keep_it_from_measuring(
    finished: Path, original: Path, verify: Callable
) -> None:
    (finished / "fp8_quantization.json").write_text("{")
    result = verify(original, finished)
    assert result.rc == 1
    assert "fp8_quantization.json: damaged" in result.out
    assert "cosine sim" in result.out


def test_it_contradicts_skip_verify(finished: Path, original: Path, cli: Callable) -> None:
    result = cli("--input_dir", original, "--output_dir", finished, "--verify_only", "--skip_verify")
    assert result.rc == 2
    assert "--skip_verify" in result.err
