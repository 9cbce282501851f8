"""`--dequantize`: a block-FP8 directory becomes a BF16 one, and nothing is lost on the way back."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import forked
import forked_ranks
import tiny_checkpoints
from forked import At
from forked_ranks import Rank
from fp8lib.checkpoint.dequantize_plan import make_dequantize_plan
from fp8lib.checkpoint.directory import open_checkpoint
from fp8lib.checkpoint.layout import ShardPlan
from fp8lib.numerics.e4m3 import dequantize
from fp8lib.numerics.modes import Calibration
from fp8lib.streaming import shard_job
from fp8lib.streaming.convert import Nearest
from fp8lib.streaming.pipeline import process
from fp8lib.streaming.shard_job import Settings
from fp8lib.streaming.units import divide
from fp8lib.verification.restored import RestoredCheck, planned_restored
from pretended_device import PretendedCuda

MOE = {"kind": "moe", "shards": 3, "tokenizer": True, "f32_extras": True}
CONFIG, INDEX, MANIFEST = "config.json", "model.safetensors.index.json", "fp8_quantization.json"
EXPERTS = "model.language_model.layers.0.mlp.experts"


@pytest.fixture(scope="module")
def bf16(checkpoint: Callable) -> Path:
    """What was quantized: the official BF16 layout."""
    return checkpoint(**MOE)


@pytest.fixture(scope="module")
def fp8(bf16: Path, quantized: Callable) -> Path:
    """With scales of all mantissas."""
    return quantized(bf16, "--scale_format", "bf16")


@pytest.fixture(scope="module")
def restored(fp8: Path, quantized: Callable) -> Path:
    return quantized(fp8, "--dequantize")


def product(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Code times scale in float32, rounded to BF16; edge blocks included."""
    rows, columns = codes.shape
    spread = scales.float().repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    return (codes.float() * spread).bfloat16()


def expected(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of an FP8 directory turned back, experts one by one."""
    found = tiny_checkpoints.tensors(folder)
    return {
        name: product(tensor, found[name + "_scale_inv"]) if tensor.dtype == torch.float8_e4m3fn else tensor
        for name, tensor in found.items()
        if not name.endswith("_scale_inv")
    }


def fuse(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same with one tensor for the experts of a layer."""
    fused = {name: tensor for name, tensor in tensors.items() if ".mlp.experts." not in name}
    for experts in {name.partition(".mlp.experts.")[0] for name in tensors.keys() - fused.keys()}:
        part = [
            {p: tensors[f"{experts}.mlp.experts.{e}.{p}_proj.weight"] for p in ("gate", "up", "down")}
            for e in range(8)
        ]
        gate_up = [torch.cat([p["gate"], p["up"]]) for p in part]
        fused[f"{experts}.mlp.experts.gate_up_proj"] = torch.stack(gate_up)
        fused[f"{experts}.mlp.experts.down_proj"] = torch.stack([p["down"] for p in part])
    return fused


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """The same names, dtypes, shapes and bits."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name].view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


def test_every_weight_is_code_times_scale_rounded_once_and_the_rest_keeps_its_bytes(
    fp8: Path, restored: Path
) -> None:
    assert_equal(tiny_checkpoints.tensors(restored), fuse(expected(fp8)))


def test_the_layout_is_that_of_the_original(bf16: Path, restored: Path) -> None:
    original, found = tiny_checkpoints.tensors(bf16), tiny_checkpoints.tensors(restored)
    assert {n: (t.dtype, t.shape) for n, t in found.items()} == {
        n: (t.dtype, t.shape) for n, t in original.items()
    }
    assert json.loads((restored / CONFIG).read_text()) == json.loads((bf16 / CONFIG).read_text())
    index = json.loads((restored / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
    for shard in restored.glob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            assert {n for n, home in index["weight_map"].items() if home == shard.name} == set(file.keys())
    small = {p.name for p in bf16.iterdir()} - {CONFIG, INDEX} - {p.name for p in bf16.glob("*.safetensors")}
    assert small
    for name in small:
        assert (restored / name).read_bytes() == (bf16 / name).read_bytes()


def test_experts_may_come_out_one_by_one(fp8: Path, quantized: Callable) -> None:
    folder = quantized(fp8, "--dequantize", "--expert_layout", "per_expert")
    assert_equal(tiny_checkpoints.tensors(folder), expected(fp8))


def test_transformers_computes_what_it_computes_from_the_fp8_directory(
    checkpoint: Callable, quantized: Callable
) -> None:
    """It dequantizes by itself where there is no GPU; the logits are the same, not only close.

    Without tensors in F32: it keeps those of an FP8 directory and rounds those of a BF16 one.
    """
    fp8 = quantized(checkpoint("moe"), "--scale_format", "bf16")
    prompt = torch.arange(24)[None]
    computed = tiny_checkpoints.logits(quantized(fp8, "--dequantize"), prompt)
    assert torch.equal(computed, tiny_checkpoints.logits(fp8, prompt))


def test_a_release_with_f32_scales_and_scattered_experts(
    fp8: Path, quantized: Callable, tmp_path: Path
) -> None:
    """Scales beside their weights or not, experts of a layer in every shard, one shard of nothing else."""
    source = tmp_path / "release"
    source.mkdir()
    tensors = tiny_checkpoints.tensors(fp8)
    for name in [n for n in tensors if n.endswith("_scale_inv")]:
        tensors[name] = tensors[name].float() * (1 + 2.0**-12)  # more digits than BF16 has
    shards: dict[str, dict] = {f"model-0000{i}-of-00004.safetensors": {} for i in (1, 2, 3, 4)}
    names = sorted(shards)
    lone = {f"{EXPERTS}.5.{p}_proj.weight" for p in ("gate", "up", "down")}
    for number, (name, tensor) in enumerate(sorted(tensors.items())):
        shards[names[3 if name in lone else number % 3]][name] = tensor
    for name, content in shards.items():
        save_file(content, source / name, metadata={"format": "pt", "made by": "somebody"})
    shutil.copy(fp8 / CONFIG, source)
    folder = quantized(source, "--dequantize")
    assert_equal(tiny_checkpoints.tensors(folder), fuse(expected(source)))
    # A fused tensor lies where its first expert does; what has nothing left is not written.
    assert sorted(p.name for p in folder.glob("*.safetensors")) == names[:3]
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    home = next(n for n, content in shards.items() if f"{EXPERTS}.0.gate_proj.weight" in content)
    assert weight_map[f"{EXPERTS}.gate_up_proj"] == home
    with safe_open(folder / home, "pt") as file:
        assert file.metadata()["made by"] == "somebody"


def test_experts_that_were_kept_are_fused_and_split_as_well(
    checkpoint: Callable, quantized: Callable
) -> None:
    """Experts of 96 rows stay BF16, in the layout that the input had."""
    sizes = {"moe_intermediate_size": 96, "num_hidden_layers": 1, "mtp": False}
    made = {layout: checkpoint("moe", experts=layout, **sizes) for layout in ("fused", "per_expert")}
    for source in made.values():
        fp8 = quantized(source)
        for layout, original in made.items():
            found = tiny_checkpoints.tensors(quantized(fp8, "--dequantize", "--expert_layout", layout))
            for name, tensor in tiny_checkpoints.tensors(original).items():
                if ".experts." in name:
                    assert torch.equal(found[name], tensor)


# --- there and back again -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_code_comes_back_under_any_scale_above_2_to_minus_124(dtype: torch.dtype) -> None:
    """All 254 finite codes, both zeros among them, under scales of every mantissa and many exponents."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F].view(torch.float8_e4m3fn)
    mantissas = torch.arange(128).float() / 128 + 1
    if dtype == torch.float32:
        mantissas = torch.cat([mantissas, mantissas * (1 + 2.0**-23), mantissas * (1 - 2.0**-24)])
    for exponent in (-124, -60, -9, 0, 100):
        scales = (mantissas[1:] * 2.0**exponent).to(dtype)  # 2^-124 itself is not above it
        weights = (codes.float()[None] * scales.float()[:, None]).bfloat16()
        again = (weights.float() / scales.float()[:, None]).to(torch.float8_e4m3fn)
        assert torch.equal(again.view(torch.uint8), codes.view(torch.uint8).expand_as(again))


def test_with_scales_that_are_powers_of_two_bf16_holds_every_weight_exactly(
    bf16: Path, quantized: Callable
) -> None:
    tensors = tiny_checkpoints.tensors(quantized(bf16, "--scale_format", "ue8m0"))
    for name, codes in tensors.items():
        if codes.dtype == torch.float8_e4m3fn:
            exact = dequantize(codes, tensors[name + "_scale_inv"])
            assert torch.equal(exact.bfloat16().float(), exact)


@pytest.mark.parametrize("mode", ["max", "rms", "mse"])
def test_quantizing_what_was_turned_back_is_the_identity_on_the_weights(
    mode: str, bf16: Path, quantized: Callable
) -> None:
    """Codes and scales may differ by octaves: a block's largest may round down to 224 times its scale."""
    flags = ("--scale_format", "ue8m0", "--calib_mode", mode)
    first = quantized(bf16, *flags)
    again = quantized(quantized(first, "--dequantize"), *flags)
    assert_equal(expected(again), expected(first))


# --- verification ---------------------------------------------------------------------------------


def test_the_summary_counts_every_code(fp8: Path, cli: Callable, tmp_path: Path) -> None:
    result = cli("--input_dir", fp8, "--output_dir", tmp_path / "out", "--dequantize")
    codes = [t for t in tiny_checkpoints.tensors(fp8).values() if t.dtype == torch.float8_e4m3fn]
    assert result.rc == 0
    assert re.search(r"VERDICT: \S GOOD$", result.out, re.MULTILINE)
    assert f"FP8 weights restored: {len(codes)}" in result.out
    assert f"Codes compared      : {sum(t.numel() for t in codes):,}" in result.out


@pytest.mark.parametrize("layout", ["fused", "per_expert"])
def test_verify_only_takes_either_layout(layout: str, fp8: Path, quantized: Callable, cli: Callable) -> None:
    folder = quantized(fp8, "--dequantize", "--expert_layout", layout)
    result = cli("--input_dir", fp8, "--output_dir", folder, "--dequantize", "--verify_only")
    assert result.rc == 0, result.err
    assert re.search(r"VERDICT: \S GOOD$", result.out, re.MULTILINE)


def spoil(change: Callable[[dict], None], folder: Path) -> Path:
    shard = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(shard)
    change(tensors)
    save_file(tensors, shard, metadata={"format": "pt"})
    return folder


def _one_weight_a_code_further(tensors: dict) -> None:
    tensors[f"{EXPERTS}.down_proj"][3, 5, 7] *= 1.25


def _one_weight_nan(tensors: dict) -> None:
    tensors[f"{EXPERTS}.down_proj"][3, 5, 7] = torch.nan


def _one_weight_gone(tensors: dict) -> None:
    del tensors[f"{EXPERTS}.down_proj"]


def _one_norm_short(tensors: dict) -> None:
    name = next(n for n in tensors if n.endswith("input_layernorm.weight"))
    tensors[name] = tensors[name][:-1].clone()


def _a_scale_left(tensors: dict) -> None:
    tensors[f"{EXPERTS}.3.down_proj.weight_scale_inv"] = torch.ones(2, 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_one_weight_a_code_further, f"{EXPERTS}.3.down_proj.weight: 1 of 32768 codes do not come back"),
        (_one_weight_nan, "1 of 32768 codes do not come back"),
        (_one_weight_gone, f"{EXPERTS}.0.down_proj.weight: missing from the directory"),
        (_one_norm_short, "expected BF16 [1, 256]"),
        (_a_scale_left, "not in the FP8 checkpoint"),
    ],
)
def test_verify_only_finds_what_is_wrong(
    change: Callable, words: str, fp8: Path, restored: Path, cli: Callable, tmp_path: Path
) -> None:
    folder = shutil.copytree(restored, tmp_path / "out")
    (folder / INDEX).unlink()
    spoil(change, folder)
    result = cli("--input_dir", fp8, "--output_dir", folder, "--dequantize", "--verify_only")
    assert result.rc == 1, result.out + result.err
    assert words in result.out


def test_verify_only_compares_what_was_copied_too(
    fp8: Path, restored: Path, cli: Callable, tmp_path: Path
) -> None:
    """One value of a kept tensor, a copied file, config.json, and then the digests of it all."""
    folder = shutil.copytree(restored, tmp_path / "out")
    command = ["--input_dir", fp8, "--output_dir", folder, "--dequantize", "--verify_only"]
    assert cli(*command, "--checksums").rc == 0
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=folder, check=True)
    with safe_open(sorted(folder.glob("*.safetensors"))[0], "pt") as file:
        name = next(n for n in file.keys() if n.endswith("input_layernorm.weight"))  # noqa: SIM118
    spoil(lambda tensors: tensors[name][3].add_(1), folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / CONFIG).write_text((folder / CONFIG).read_text() + " ")
    result = cli(*command)
    assert result.rc == 1
    out = " ".join(result.out.split())
    assert f"{name}: 1 of 256 values are not the input's" in out
    assert "tokenizer.json: differs from the input's" in out
    assert "config.json: not as it was written" in out
    assert "config.json: its SHA-256 is not the one in SHA256SUMS" in out


def test_a_weight_that_only_saturates_to_its_code_is_wrong(
    fp8: Path, restored: Path, cli: Callable, tmp_path: Path
) -> None:
    """The code is 448, the largest; a million would be given it, too."""
    source, folder = shutil.copytree(fp8, tmp_path / "fp8"), shutil.copytree(restored, tmp_path / "out")
    (folder / INDEX).unlink()
    _tensors(lambda tensors: tensors[WEIGHT].view(torch.uint8)[5, 7].fill_(0x7E))(source)
    spoil(lambda tensors: tensors[f"{EXPERTS}.down_proj"][0, 5, 7].fill_(1e6), folder)
    result = cli("--input_dir", source, "--output_dir", folder, "--dequantize", "--verify_only")
    assert result.rc == 1
    assert f"{WEIGHT}: 1 of 32768 codes do not come back" in result.out


def test_what_rots_before_it_is_verified_fails_the_run_and_leaves_no_config(
    fp8: Path, tmp_path: Path
) -> None:
    """The last byte of a shard is a weight's; it changes between the shard's rename and its check."""
    rot = (
        "f = os.open(path, os.O_RDWR); size = os.fstat(f).st_size; "
        "os.pwrite(f, b'\\x7f', size - 1); os.close(f)"
    )
    at = At("rename", where="model-00001", do=rot)
    ended = forked.run("--input_dir", fp8, "--output_dir", tmp_path / "out", "--dequantize", at=at)
    assert ended.rc == 1, ended.err
    assert "do not come back" in ended.out
    assert not (tmp_path / "out" / CONFIG).exists()


def test_weights_too_small_for_bf16_fail_and_the_message_says_the_way_out(
    fp8: Path, cli: Callable, tmp_path: Path
) -> None:
    """A scale of 2^-126 puts a code of 2^-9 at 2^-135, below BF16's smallest, 2^-133."""
    source = shutil.copytree(fp8, tmp_path / "fp8")

    def change(tensors: dict) -> None:
        name = next(n for n in sorted(tensors) if n.endswith("_scale_inv"))
        tensors[name].fill_(2.0**-126)
        tensors[name.removesuffix("_scale_inv")].view(torch.uint8).fill_(1)

    spoil(change, source)
    command = ["--input_dir", source, "--output_dir", tmp_path / "out", "--dequantize"]
    result = cli(*command)
    assert result.rc == 1
    assert "--skip_verify writes them all the same" in " ".join(result.out.split())
    assert cli(*command, "--overwrite", "--skip_verify").rc == 0


def test_a_scale_of_zero_over_a_block_of_zeros_is_no_fault(fp8: Path, cli: Callable, tmp_path: Path) -> None:
    source = shutil.copytree(fp8, tmp_path / "fp8")

    def change(tensors: dict) -> None:
        name = next(n for n in sorted(tensors) if n.endswith("_scale_inv"))
        tensors[name][0, 0] = 0
        tensors[name.removesuffix("_scale_inv")].view(torch.uint8)[:128, :128] = 0

    result = cli("--input_dir", spoil(change, source), "--output_dir", tmp_path / "out", "--dequantize")
    assert result.rc == 0, result.out


# --- refusals -------------------------------------------------------------------------------------


def _config(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        config["quantization_config"] |= changes
        (folder / CONFIG).write_text(json.dumps(config))

    return change


def _no_quantization(folder: Path) -> None:
    config = json.loads((folder / CONFIG).read_text())
    del config["quantization_config"]
    (folder / CONFIG).write_text(json.dumps(config))


def _tensors(change: Callable[[dict], None]) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        (folder / INDEX).unlink()
        spoil(change, folder)

    return apply


WEIGHT = f"{EXPERTS}.0.down_proj.weight"


def _nan_code(tensors: dict) -> None:
    tensors[WEIGHT].view(torch.uint8)[3, 4] = 0xFF


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (_no_quantization, "has no quantization_config"),
        (_config(quant_method="gptq"), "quant_method 'gptq'"),
        (_config(weight_block_size=[64, 64]), "only fp8 in blocks of [128, 128] can be turned back"),
        (_tensors(lambda t: t.pop(f"{WEIGHT}_scale_inv")), f"{WEIGHT}: FP8 without a {WEIGHT}_scale_inv"),
        (_tensors(lambda t: t.pop(WEIGHT)), f"{EXPERTS}.0.down_proj.weight: missing"),
        (
            _tensors(lambda t: t.update({"x_scale_inv": torch.ones(1, 1)})),
            "x_scale_inv: a scale without an FP8 weight",
        ),
        (
            _tensors(lambda t: t.update({f"{WEIGHT}_scale_inv": torch.ones(3, 1)})),
            f"{WEIGHT}_scale_inv: F32 [3, 1], expected BF16 or F32 [2, 1]",
        ),
        (
            _tensors(lambda t: t.update({f"{WEIGHT}_scale_inv": torch.ones(2, 1).half()})),
            f"{WEIGHT}_scale_inv: F16 [2, 1], expected BF16 or F32 [2, 1]",
        ),
        (
            _tensors(lambda t: t.update({WEIGHT: t[WEIGHT].float().to(torch.float8_e5m2)})),
            f"{WEIGHT}: F8_E5M2 cannot be turned back",
        ),
        (
            _tensors(lambda t: (t.pop(f"{WEIGHT}_scale_inv"), t.update({WEIGHT: t[WEIGHT].float()}))),
            "its experts are BF16 and F32, which no fused tensor can hold; use --expert_layout per_expert",
        ),
        (_tensors(_nan_code), f"NaN or infinity in {WEIGHT}; repair the input model"),
    ],
)  # fmt: skip
def test_it_refuses(make: Callable, words: str, fp8: Path, cli: Callable, tmp_path: Path) -> None:
    source = shutil.copytree(fp8, tmp_path / "fp8")
    make(source)
    result = cli("--input_dir", source, "--output_dir", tmp_path / "out", "--dequantize")
    assert (result.rc, result.out) == (2, "")
    assert words in result.err
    assert not (tmp_path / "out" / CONFIG).exists()


@pytest.mark.parametrize("flag", ["--calib_mode max", "--scale_format bf16", "--eligibility official",
    "--lora_dir adapter", "--verify_samples all", "--compare_outputs",
    "--rounding second_order --second_moments moments"])  # fmt: skip
def test_flags_that_it_cannot_follow_are_refused(flag: str, fp8: Path, cli: Callable, tmp_path: Path) -> None:
    result = cli("--input_dir", fp8, "--output_dir", tmp_path / "out", "--dequantize", *flag.split())
    assert (result.rc, result.out) == (2, "")
    assert f"argument {flag.split()[0]}: not allowed with argument --dequantize, which" in result.err


def test_a_layout_of_experts_is_only_for_turning_back(bf16: Path, cli: Callable) -> None:
    result = cli("--input_dir", bf16, "--dry_run", "--expert_layout", "per_expert")
    assert "--expert_layout has no effect without --dequantize" in result.err


# --- runs -----------------------------------------------------------------------------------------


def test_dry_run_prints_the_plan_and_writes_nothing(
    fp8: Path, restored: Path, cli: Callable, tmp_path: Path
) -> None:
    result = cli("--input_dir", fp8, "--output_dir", tmp_path / "out", "--dequantize", "--dry_run")
    assert result.rc == 0, result.err
    assert "DEQUANTIZATION PLAN (dry run, nothing written)" in result.out
    assert "32  model.language_model.layers.*.mlp.experts.*.down_proj  [256, 128]" in result.out
    assert not (tmp_path / "out").exists()
    plan = make_dequantize_plan(open_checkpoint(fp8))
    written = {p.name: p.stat().st_size for p in restored.iterdir() if p.name != MANIFEST}
    assert plan.file_sizes() == written


def same(folder: Path, whole: Path) -> bool:
    """Byte for byte, the manifest included, and not a file more."""
    names = {p.name for p in whole.iterdir()}
    return {p.name for p in folder.iterdir()} == names and all(
        (folder / name).read_bytes() == (whole / name).read_bytes() for name in names
    )


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_and_pieces_change_no_byte(
    workers: int, fp8: Path, restored: Path, cli: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_job, "CPU_PIECE", 128 * 256)
    command = ["--input_dir", fp8, "--output_dir", tmp_path / "out", "--dequantize"]
    assert cli(*command, "--workers", workers).rc == 0
    assert same(tmp_path / "out", restored)


@pytest.mark.parametrize(
    "at", [At("pwrite", 30), At("rename", where="model-00002"), At("open", where=CONFIG)]
)
def test_killed_and_repeated_it_gives_the_same_bytes(
    at: At, fp8: Path, restored: Path, tmp_path: Path
) -> None:
    command = ["--input_dir", fp8, "--output_dir", tmp_path / "out", "--dequantize"]
    assert forked.run(*command, at=at).rc == -9
    assert not (tmp_path / "out" / CONFIG).exists()
    ended = forked.run(*command)
    assert ended.rc == 0, ended.err
    assert same(tmp_path / "out", restored)


def test_another_layout_does_not_continue_a_run(fp8: Path, restored: Path, cli: Callable) -> None:
    command = ["--input_dir", fp8, "--output_dir", restored]
    result = cli(*command, "--dequantize", "--expert_layout", "per_expert")
    assert (result.rc, "begun with dequantize fused, now per_expert" in result.err) == (2, True)


def test_checksums_hold(fp8: Path, cli: Callable, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    assert cli("--input_dir", fp8, "--output_dir", folder, "--dequantize", "--checksums").rc == 0
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=folder, check=True)


def test_two_ranks_write_what_one_process_writes(fp8: Path, restored: Path, tmp_path: Path) -> None:
    flags = ["--input_dir", fp8, "--output_dir", tmp_path / "out", "--dequantize", "--device", "cpu"]
    ended = forked_ranks.run([Rank()] * 2, *flags)
    assert [each.rc for each in ended] == [0, 0], ended[0].err
    assert [each.out.count("VERDICT") for each in ended] == [1, 0]
    assert same(tmp_path / "out", restored)
    ended = forked_ranks.run([Rank(), Rank(("--expert_layout", "per_expert"))], *flags, "--overwrite")
    assert [each.rc for each in ended] == [2, 2]
    assert "rank 1 has other dequantize than rank 0" in ended[0].err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real device here")
def test_a_device_gives_the_bytes_of_the_cpu(fp8: Path, restored: Path, tmp_path: Path) -> None:
    plan = make_dequantize_plan(open_checkpoint(fp8))

    def check(shard: ShardPlan, path: Path) -> RestoredCheck:
        return RestoredCheck(shard.name, planned_restored(shard, path), [])

    with PretendedCuda():
        nearest = Nearest(Calibration())
        settings = Settings(nearest, torch.device("cuda:0"), 2, checksums=True, piece=128 * 256)
        done = list(process(divide(list(plan.shards), 1, False), tmp_path, settings, check=check))
    assert not [problem for each in done if each.check for problem in each.check.problems]
    names = [shard.name for shard in plan.shards]
    assert [(tmp_path / n).read_bytes() for n in names] == [(restored / n).read_bytes() for n in names]


def test_memory_does_not_grow_with_a_tensor(tmp_path: Path) -> None:
    """Fused tensors of 4 and of 64 MB from experts one by one."""

    def make(experts: int) -> Path:
        folder = tmp_path / str(experts)
        folder.mkdir()
        tensors = {}
        for e in range(experts):
            for part, shape in {
                "gate_proj": (1024, 512),
                "up_proj": (1024, 512),
                "down_proj": (512, 1024),
            }.items():
                name = f"model.layers.0.mlp.experts.{e}.{part}.weight"
                tensors[name] = torch.zeros(shape, dtype=torch.uint8).view(torch.float8_e4m3fn)
                tensors[f"{name}_scale_inv"] = torch.ones(shape[0] // 128, shape[1] // 128)
        save_file(tensors, folder / "model.safetensors")
        quantization = {"quant_method": "fp8", "weight_block_size": [128, 128]}
        config = {"model_type": "qwen3_5_moe_text", "quantization_config": quantization}
        (folder / CONFIG).write_text(json.dumps(config))
        return folder

    grown = []
    for experts in (2, 32):
        output = tmp_path / f"out {experts}"
        ended = forked.run(
            "--input_dir", make(experts), "--output_dir", output, "--dequantize", "--workers", 1
        )
        assert ended.rc == 0, ended.err
        grown.append(ended.grown)
    assert grown[1] - grown[0] < 16 << 20
