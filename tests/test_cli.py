"""What the command line shows: help, plan, progress, summary, verdict, exit code."""

import calendar
import fcntl
import json
import os
import pty
import re
import struct
import termios
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tqdm import tqdm

import forked
from conftest import Result
from fp8lib import Fp8Error, __version__
from fp8lib.numerics.e4m3 import dequantize
from fp8lib.numerics.modes import MODES, Calibration
from fp8lib.numerics.served import requantize
from safetensors_by_hand import read_header
from tiny_checkpoints import tensors

ESCAPE = "\033["
FP8 = torch.float8_e4m3fn
SMALL = ("text", {"num_hidden_layers": 1, "hidden_size": 128, "intermediate_size": 128, "mtp": False})


@pytest.fixture
def small(checkpoint: Callable) -> Path:
    """The smallest of checkpoints: one linear-attention layer, 5 matrices to quantize, a single file."""
    kind, arguments = SMALL
    return checkpoint(kind, **arguments)


# --- before torch ------------------------------------------------------------------------------


@pytest.fixture
def without(tmp_path: Path) -> Callable[..., dict[str, str]]:
    """`without("torch")`: an environment in which importing these modules ends the process."""

    def make(*modules: str) -> dict[str, str]:
        folder = tmp_path / "poison"
        folder.mkdir()
        for module in modules:
            (folder / f"{module}.py").write_text(f"raise SystemExit('{module} was imported')")
        return {"PYTHONPATH": str(folder)}

    return make


QUICK = {
    "help": (["--help"], 0),
    "version": (["--version"], 0),
    "a typo": (["--input_dir", "IN", "--output_dir", "OUT", "--calib_moed", "max"], 2),
    "a value out of range": (["--input_dir", "IN", "--output_dir", "OUT", "--calib_percentile", "0"], 2),
    "a missing flag": ([], 2),
    "a missing directory": (["--input_dir", "NOWHERE", "--output_dir", "OUT"], 2),
    "a dry run": (["--input_dir", "IN", "--dry_run"], 0),
}


@pytest.mark.parametrize(("arguments", "rc"), QUICK.values(), ids=QUICK)
def test_what_needs_no_tensor_data_needs_no_torch(
    arguments: list[str], rc: int, small: Path, tmp_path: Path, run: Callable, without: Callable
) -> None:
    place = {"IN": small, "OUT": tmp_path / "out", "NOWHERE": tmp_path / "nowhere"}
    result = run(*(place.get(word, word) for word in arguments), env=without("torch", "transformers"))
    assert "was imported" not in result.err
    assert result.rc == rc, result.err


def test_quantizing_needs_no_transformers(
    small: Path, tmp_path: Path, run: Callable, without: Callable
) -> None:
    result = run("--input_dir", small, "--output_dir", tmp_path / "out", env=without("transformers"))
    assert result.rc == 0, result.err


# --- help and version --------------------------------------------------------------------------

GROUPS = {
    "input and output": ["--input_dir", "--output_dir", "--overwrite"],
    "calibration": [
        "--calib_mode", "--scale_format", "--rms_factor", "--rms_saturate", "--calib_percentile",
        "--mse_grid_size",
        "--activation_stats",
    ],
    "hardware": ["--device"],
    "verification": ["--verify_samples", "--skip_verify", "--seed"],
    "other": ["--dry_run", "--debug", "--quiet", "--version"],
}  # fmt: skip
DEFAULTS = {
    "--calib_mode": "rms",
    "--scale_format": "ue8m0",
    "--rms_factor": "3.0",
    "--calib_percentile": "99.9",
    "--mse_grid_size": "128",
    "--device": "auto",
    "--verify_samples": "5",
    "--seed": "0",
}


def test_help_groups_the_flags_and_tells_their_defaults(run: Callable) -> None:
    result = run("--help")
    assert (result.rc, result.err) == (0, "")
    groups: dict[str, dict[str, str]] = {}
    for line in result.out.splitlines():
        if line.endswith(":") and not line.startswith(" "):
            members = groups.setdefault(line[:-1], {})
        elif match := re.match(r"  (--\w+)", line):
            flag = match[1]
            members[flag] = line
        elif groups and line.startswith("   "):
            members[flag] += line
    for group, flags in GROUPS.items():
        assert [flag for flag in groups[group] if flag in flags] == flags  # later issues add more
    for flag, default in DEFAULTS.items():
        [text] = [members[flag] for members in groups.values() if flag in members]
        assert f"({default}" in " ".join(text.split()), text
    assert max(map(len, result.out.splitlines())) <= 80


def test_version(run: Callable) -> None:
    result = run("--version")
    assert (result.rc, result.out) == (0, f"quantize_fp8.py {__version__}\n")


# --- dry run -----------------------------------------------------------------------------------


def in_bytes(text: str) -> float:
    """8.59GB -> 8.59e9."""
    number, prefix = re.fullmatch(r"([\d.]+)([kMG]?)B", text).groups()
    return float(number) * {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}[prefix]


def test_dry_run_tells_what_is_quantized_and_what_is_kept_and_why(
    checkpoint: Callable, cli: Callable
) -> None:
    plan = cli("--input_dir", checkpoint("moe"), "--dry_run").out
    # 4 layers and mtp's, 8 experts each; 3 layers of linear attention, full attention in 1 and in mtp.
    for line in (
        "32  model.language_model.layers.*.mlp.experts.*.gate_proj  [128, 256]",
        "32  model.language_model.layers.*.mlp.experts.*.down_proj  [256, 128]",
        "8  mtp.layers.*.mlp.experts.*.up_proj  [128, 256]",
        "3  model.language_model.layers.*.linear_attn.in_proj_qkv  [512, 256]",
        "1  model.language_model.layers.*.self_attn.q_proj  [1024, 256]",
        "1  mtp.layers.*.self_attn.o_proj  [256, 512]",
    ):
        assert re.search(rf"^ +{re.escape(line)}$", plan, re.MULTILINE), line
    for reason, name in (
        ("vision tower", "model.visual."),
        ("embedding", "model.language_model.embed_tokens.weight"),
        ("output head", "lm_head.weight"),
        ("router", "model.language_model.layers.*.mlp.gate.weight"),
        ("shared expert", "model.language_model.layers.*.mlp.shared_expert.down_proj.weight"),
        ("linear attention output", "model.language_model.layers.*.linear_attn.out_proj.weight"),
        ("norm", "input_layernorm.weight"),
        ("draft head input", "mtp.fc.weight"),
    ):
        paragraph = re.search(rf"^ +\d+ +[\d.]+[kMG]?B  {reason}.*\n(?: {{10}}.*\n)+", plan, re.MULTILINE)
        assert paragraph, reason
        assert name in re.sub(r"\s", "", paragraph[0]), paragraph[0]


@pytest.mark.parametrize(
    ("kind", "arguments", "reason"),
    [
        ("moe", {"moe_intermediate_size": 64}, "a dimension under 128"),
        ("text", {"intermediate_size": 576}, "576"),
        ("text", {"hidden_size": 192}, "192 input features"),
    ],
    ids=["small experts", "an odd MLP", "an odd hidden size"],
)
def test_dry_run_tells_why_a_shape_is_kept(
    kind: str, arguments: dict, reason: str, checkpoint: Callable, cli: Callable
) -> None:
    plan = cli("--input_dir", checkpoint(kind, **arguments), "--dry_run").out
    assert reason in plan


@pytest.mark.parametrize("experts", ["fused", "per_expert"])
def test_dry_run_foretells_counts_and_sizes(
    experts: str, checkpoint: Callable, quantized: Callable, cli: Callable
) -> None:
    source = checkpoint("moe", experts=experts, shards=3, tokenizer=True)
    result = cli("--input_dir", source, "--dry_run")
    assert (result.rc, result.err) == (0, "")
    output = quantized(source)
    state = tensors(output)
    fp8 = sum(t.dtype == FP8 for t in state.values())
    assert f"FP8 weight tensors  : {fp8}\n" in result.out
    assert f"Passthrough tensors : {len(state) - 2 * fp8}\n" in result.out
    # Three digits are printed, so they are off by half a unit in the third, at most 0.5 %.
    for path in output.glob("*.safetensors"):
        sizes = re.search(rf"{path.name}  (\S+) -> (\S+)  ", result.out)
        assert in_bytes(sizes[1]) == pytest.approx((source / path.name).stat().st_size, rel=0.005)
        assert in_bytes(sizes[2]) == pytest.approx(path.stat().st_size, rel=0.005)
    total = re.search(r"Size +: (\S+) -> (\S+)", result.out)
    before = sum(p.stat().st_size for p in source.glob("*.safetensors"))
    assert in_bytes(total[1]) == pytest.approx(before, rel=0.005)
    assert in_bytes(total[2]) == pytest.approx(sum(p.stat().st_size for p in output.rglob("*")), rel=0.005)


def test_dry_run_writes_nothing_and_reads_headers_only(
    small: Path, tmp_path: Path, copy_of: Callable, cli: Callable
) -> None:
    """A shard whose data are a hole in the file gives the same plan: its bytes are not looked at."""
    source = copy_of(small)
    shard = source / "model.safetensors"
    expected = cli("--input_dir", source, "--dry_run").out
    size = shard.stat().st_size
    _, start_of_data = read_header(shard)
    os.truncate(shard, start_of_data)
    os.truncate(shard, size)
    result = cli("--input_dir", source, "--output_dir", tmp_path / "out", "--dry_run")
    assert (result.rc, result.out) == (0, expected)
    assert not (tmp_path / "out").exists()


# --- summary -----------------------------------------------------------------------------------


def fields(summary: str) -> dict[str, str]:
    """The `name : value` lines of a summary."""
    return dict(re.findall(r"^  (\w[\w ()-]*?) *: (.+)$", summary, re.MULTILINE))


def spot_checked(summary: str) -> tuple[int, dict[str, int]]:
    """Checked tensors, and how many of them are in each zone."""
    found = fields(summary)
    text = found.get("Spot-checked") or found["Checked"]
    counts = {zone: int(n) for n, zone in re.findall(r"(\d+) (GOOD|WARN|FAIL)", text)}
    return int(text.split()[0]), counts


def test_summary_counts_what_is_in_the_output(checkpoint: Callable, tmp_path: Path, cli: Callable) -> None:
    source = checkpoint("moe", shards=3)
    result = cli("--input_dir", source, "--output_dir", tmp_path / "out", "--verify_samples", 4)
    state = tensors(tmp_path / "out")
    fp8 = sum(t.dtype == FP8 for t in state.values())
    found = fields(result.out)
    assert found["Shards processed"] == "3  (0 failed)"
    assert found["FP8 weight tensors"] == str(fp8)
    assert found["Passthrough tensors"] == str(len(state) - 2 * fp8)
    checked, zones = spot_checked(result.out)
    assert checked == sum(zones.values()) == 3 * 4  # per shard
    assert "QUANTIZATION VERIFICATION SUMMARY" in result.out
    assert "VERDICT: " in result.out


@pytest.mark.parametrize(
    ("flags", "shown"),
    [
        ([], "rms(k=3), ue8m0"),
        (["--rms_factor", "2.5", "--rms_saturate"], "rms(k=2.5, saturate), ue8m0"),
        (["--calib_mode", "max", "--scale_format", "bf16"], "max, bf16"),
        (["--calib_mode", "percentile", "--calib_percentile", "99.99"], "percentile(p=99.99), ue8m0"),
        (
            ["--calib_mode", "mse", "--mse_grid_size", "16", "--scale_format", "bf16"],
            "mse(phases=16), bf16",
        ),
        (["--calib_mode", "mse"], "mse, ue8m0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_summary_names_the_calibration(
    flags: list, shown: str, small: Path, tmp_path: Path, cli: Callable
) -> None:
    result = cli("--input_dir", small, "--output_dir", tmp_path / "out", *flags)
    assert fields(result.out)["Calibration"] == shown


@pytest.mark.parametrize("mode", ["rms", "mse", "percentile"])
def test_summary_shows_the_errors_of_the_files_on_disk(
    mode: str, checkpoint: Callable, tmp_path: Path, cli: Callable
) -> None:
    source, output = checkpoint("text", shards=2), tmp_path / "out"
    result = cli(
        "--input_dir", source, "--output_dir", output, "--calib_mode", mode, "--verify_samples", "all"
    )
    original, state = tensors(source), tensors(output)
    cosine, mean_abs, max_abs = [], [], []
    for name in (name for name, t in state.items() if t.dtype == FP8):
        scales = state[f"{name}_scale_inv"].double()
        w = original[name].double()
        restored = state[name].double() * scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
        cosine.append((torch.sum(w * restored) / (w.norm() * restored.norm())).item())
        mean_abs.append((w - restored).abs().mean().item())
        max_abs.append((w - restored).abs().max().item())
    expected = {
        "cosine sim": sum(cosine) / len(cosine),
        "mean abs err": sum(mean_abs) / len(mean_abs),
        "worst cosine": min(cosine),
        "worst MAE": max(mean_abs),
        "worst MaxAE": max(max_abs),
    }
    shown = dict(re.findall(r"^  (cosine sim|mean abs err|worst \w+) +([\d.]+)", result.out, re.MULTILINE))
    for metric, value in expected.items():
        # 6 decimals are printed; the tool measures in float32, whose sums are right to 1e-6 of them.
        assert float(shown[metric]) == pytest.approx(value, abs=1.5e-6), metric


def test_summary_shows_the_errors_as_served_where_engines_change_the_files(
    checkpoint: Callable, tmp_path: Path, cli: Callable
) -> None:
    source, output = checkpoint("text", shards=2), tmp_path / "out"
    flags = ("--scale_format", "bf16", "--verify_samples", "all")
    result = cli("--input_dir", source, "--output_dir", output, *flags)
    original, state = tensors(source), tensors(output)
    found: dict[str, list] = {"relative error": [], "cosine sim": [], "worst MaxAE": []}
    changed = 0
    for name in (name for name, t in state.items() if t.dtype == FP8):
        w, codes, scales = original[name].double(), state[name], state[f"{name}_scale_inv"]
        pair = [dequantize(codes, scales), dequantize(*requantize(codes, scales))]
        changed += int((pair[0] != pair[1]).sum())
        errors = [restored.double() - w for restored in pair]
        found["relative error"].append([(e.norm() / w.norm()).item() for e in errors])
        found["cosine sim"].append(
            [torch.cosine_similarity(w.flatten(), (w + e).flatten(), 0) for e in errors]
        )
        found["worst MaxAE"].append([e.abs().max().item() for e in errors])
    assert fields(result.out)["As served (UE8M0)"] == f"{changed:,} of the checked weights change"
    shown = dict(
        re.findall(r"^    (relative error|cosine sim|worst MaxAE) +([\d. ]+)$", result.out, re.MULTILINE)
    )
    for label, values in found.items():
        expected = np.max(values, axis=0) if label == "worst MaxAE" else np.mean(values, axis=0)
        assert [float(v) for v in shown[label].split()] == pytest.approx(expected.tolist(), abs=1.5e-6)
    assert "vLLM on Hopper" in result.out
    assert "--scale_format ue8m0" in result.out


@pytest.mark.parametrize(("samples", "per_shard"), [("1", 1), ("7", 7), ("all", None), ("999", None)])
def test_verify_samples_is_a_number_per_shard_or_all(
    samples: str, per_shard: int | None, checkpoint: Callable, tmp_path: Path, cli: Callable
) -> None:
    source = checkpoint("text", shards=2)
    result = cli("--input_dir", source, "--output_dir", tmp_path / "out", "--verify_samples", samples)
    assert result.rc == 0, result.err
    in_all = int(fields(result.out)["FP8 weight tensors"])
    assert spot_checked(result.out)[0] == (in_all if per_shard is None else 2 * per_shard)
    assert (
        ("Checked" in fields(result.out))
        == bool(re.search("^  kind ", result.out, re.M))
        == (per_shard is None)
    )


def test_skip_verify_says_so_and_passes_no_verdict(
    checkpoint: Callable, tmp_path: Path, cli: Callable
) -> None:
    kind, arguments = SMALL
    hopeless = checkpoint(kind, **arguments, std=1.0)  # FAIL where it is looked at, see below
    result = cli("--input_dir", hopeless, "--output_dir", tmp_path / "out", "--skip_verify")
    assert result.rc == 0
    assert fields(result.out)["Spot-checked"].startswith("0 ")
    assert "NOT VERIFIED" in result.out
    assert not re.search("GOOD|WARN|FAIL|VERDICT:", result.out)


def sample_of(output: Path) -> dict[str, set[str]]:
    """Names of the tensors that were measured in each shard."""
    shards = json.loads((output / "fp8_quantization.json").read_text())["shards"]
    return {name: {m["name"] for m in shard["measurements"]} for name, shard in shards.items()}


def test_the_seed_chooses_the_sample(checkpoint: Callable, quantized: Callable) -> None:
    source = checkpoint("moe", shards=3)
    default, zero, one = (
        sample_of(quantized(source, *flags)) for flags in ([], ["--seed", 0], ["--seed", 1])
    )
    assert default == zero
    # 5 of more than 30 in each of three shards: by chance alike in one seed of 10^15.
    assert zero != one
    assert all(len(names) == 5 for names in zero.values())


CLIPPING = ("--rms_saturate", "--scale_format", "bf16")
"""Gaussian weights FAIL under it: cosine 0.99945."""


@pytest.mark.parametrize(
    ("std", "flags", "rc", "verdict"),
    [
        (0.02, (), 0, "GOOD"),
        (0.02, ("--strict",), 0, "GOOD"),
        (1.0, (), 0, "WARN"),  # absolute errors grow with the weights: 50 times the limit
        (1.0, ("--strict",), 1, "WARN"),
        (1.0, ("--band", "mae=1,2", "--band", "maxae=1,2", "--strict"), 0, "GOOD"),
        (0.02, CLIPPING, 1, "FAIL"),
        (0.02, (*CLIPPING, "--band", "cosine=0.995,0.99", "--band", "maxae=1,2"), 0, "GOOD"),
    ],
)
def test_exit_code_tells_fail_from_warn(
    std: float, flags: tuple, rc: int, verdict: str, checkpoint: Callable, tmp_path: Path, cli: Callable
) -> None:
    kind, arguments = SMALL
    source = checkpoint(kind, **arguments, std=std)
    result = cli("--input_dir", source, "--output_dir", tmp_path / "out", *flags)
    bands = " ".join(flags[i + 1] for i, flag in enumerate(flags) if flag == "--band")
    assert fields(result.out).get("Bands set", "") == bands
    assert result.rc == rc, result.err
    assert re.search(rf"VERDICT: \S {verdict}$", result.out, re.MULTILINE)
    checked, zones = spot_checked(result.out)
    assert checked == 5
    assert verdict == next(zone for zone in ("FAIL", "WARN", "GOOD") if zones[zone])
    assert (tmp_path / "out" / "config.json").exists()  # complete, for a person to judge


def test_weights_that_e4m3_holds_exactly_are_good(
    small: Path, tmp_path: Path, copy_of: Callable, cli: Callable
) -> None:
    source = copy_of(small)
    state = {name: tensor.clone() for name, tensor in tensors(source).items()}
    for name, tensor in state.items():
        if "proj" in name:
            tensor.copy_(tensor.sign() * 2.0**-6)
        if name.endswith("down_proj.weight"):
            tensor.zero_()
    save_file(state, source / "model.safetensors")
    # Zeros are reproduced whatever the scale. Of the others the rms is 2^-6, and 448 is 3.5 * 2^7: with
    # k = 3.5 the scale is a power of two, and the weights are, too.
    result = cli("--input_dir", source, "--output_dir", tmp_path / "out", "--rms_factor", "3.5")
    assert result.rc == 0
    assert spot_checked(result.out) == (5, {"GOOD": 5, "WARN": 0, "FAIL": 0})
    assert re.search(r"VERDICT: \S GOOD$", result.out, re.MULTILINE)
    assert "RECOMMENDATIONS" not in result.out


def test_the_worst_ten_tensors_are_listed_and_the_rest_counted(
    checkpoint: Callable, tmp_path: Path, cli: Callable
) -> None:
    result = cli(
        "--input_dir",
        checkpoint("moe"),
        "--output_dir",
        tmp_path / "out",
        "--verify_samples",
        "all",
        *CLIPPING,
    )
    checked, zones = spot_checked(result.out)
    assert sum(zones.values()) == checked > zones["FAIL"] > 100
    listed = re.findall(r"^  \S (\S+\.weight)$", result.out, re.MULTILINE)
    assert len(set(listed)) == 10
    assert f"and {zones['FAIL'] - 10} more FAIL" in result.out


def statistics(source: Path, path: Path, names: str) -> Path:
    """Activation statistics for the 2-D weights whose names match."""
    document = {
        name: {"input_channel_mean_square": [1.0] * t.shape[1]}
        for name, t in tensors(source).items()
        if t.ndim == 2 and re.search(names, name)
    }
    path.write_text(json.dumps(document))
    return path


def test_summary_counts_the_tensors_with_activation_statistics(
    checkpoint: Callable, tmp_path: Path, cli: Callable
) -> None:
    source = checkpoint("text")
    given = statistics(source, tmp_path / "stats.json", r"\.mlp\.(?:gate|up)_proj\.weight$")
    result = cli("--input_dir", source, "--output_dir", tmp_path / "out", "--activation_stats", given)
    # gate and up in 4 layers and mtp's; 29 matrices in all (test_layouts.py counts them by name).
    assert fields(result.out)["Activation stats"] == "10 of 29 tensors"
    assert "19 of 29 tensors have no activation statistics" in result.err
    without = cli("--input_dir", source, "--output_dir", tmp_path / "plain")
    assert "Activation stats" not in without.out


@pytest.mark.parametrize(
    "calibration",
    [
        *map(Calibration, MODES),
        *(Calibration(mode, scale_format="bf16") for mode in MODES),
        Calibration("rms", rms_factor=2.5, rms_saturate=True),
        Calibration("rms", rms_factor=1e-7, scale_format="bf16"),
        Calibration("percentile", percentile=99.99),
        Calibration("mse", mse_grid_size=16, scale_format="bf16"),
    ],
    ids=str,
)
def test_a_calibration_is_read_from_what_the_summary_calls_it(calibration: Calibration) -> None:
    assert Calibration.parse(str(calibration)) == calibration


@pytest.mark.parametrize("calibration", [Calibration("rms", scale_format="bf16", rms_saturate=True)])
def test_a_calibration_of_before_scale_formats_is_bf16(calibration: Calibration) -> None:
    assert Calibration.parse(str(calibration).removesuffix(", bf16")) == calibration


@pytest.mark.parametrize(
    "text",
    [
        *("", "rms(", "rms(k=three)", "entropy", "mse(phases=1e3)", "mse(phases=0)", "None"),
        *("max, e8m0", "mse(phases=16), ue8m0", "ue8m0", ", ue8m0"),
    ],
)
def test_what_is_not_a_calibration_is_refused(text: str) -> None:
    with pytest.raises(Fp8Error):
        Calibration.parse(text)


@pytest.mark.parametrize("mode", ["max", "percentile"])
def test_modes_that_ignore_statistics_say_so_once(
    mode: str, small: Path, tmp_path: Path, cli: Callable
) -> None:
    given = statistics(small, tmp_path / "stats.json", "")
    result = cli(
        "--input_dir", small, "--output_dir", tmp_path / "out",
        "--activation_stats", given, "--calib_mode", mode,
    )  # fmt: skip
    assert result.err.count("does not use the activation statistics") == 1


@pytest.mark.parametrize(
    ("flags", "noted"),
    [
        (("--calib_mode", "max", "--rms_factor", 2), ["--rms_factor", "max"]),
        (("--calib_mode", "mse", "--rms_saturate"), ["--rms_saturate", "mse"]),
        (("--calib_percentile", 99), ["--calib_percentile", "rms"]),
        (("--mse_grid_size", 16), ["--mse_grid_size", "rms"]),
    ],
    ids=str,
)
def test_a_flag_that_the_mode_does_not_look_at_is_noted(
    flags: tuple, noted: list[str], small: Path, cli: Callable
) -> None:
    result = cli("--input_dir", small, "--dry_run", *flags)
    assert result.rc == 0
    assert result.err == f"note: {noted[0]} has no effect with --calib_mode {noted[1]}\n"


def test_phases_are_noted_to_have_no_effect_on_powers_of_two(
    checkpoint: Callable, tmp_path: Path, cli: Callable
) -> None:
    flags = ("--dry_run", "--calib_mode", "mse", "--mse_grid_size", 16)
    result = cli("--input_dir", checkpoint("text"), *flags)
    assert result.err == "note: --mse_grid_size has no effect with --scale_format ue8m0\n"
    assert cli("--input_dir", checkpoint("text"), *flags, "--scale_format", "bf16").err == ""
    assert cli("--input_dir", checkpoint("text"), "--quiet", *flags).err == ""


LOUD = {
    "WARN": ("moe", {"shards": 3}, []),
    "FAIL": ("moe", {"std": 1.0}, []),
    "far beyond": ("moe", {"std": 1e4}, ["--calib_mode", "max"]),
    "clipping": ("moe", {"std": 0.05}, ["--rms_saturate", "--rms_factor", "2"]),
    "percentile": ("moe", {"std": 0.05}, ["--calib_mode", "percentile", "--calib_percentile", "99"]),
    "mse": ("dense", {"std": 1.0}, ["--calib_mode", "mse", "--scale_format", "bf16"]),
    "weights that engines take for larger": ("text", {"std": 1e-6}, []),
    "kept experts": ("moe", {"moe_intermediate_size": 64}, ["--skip_verify"]),
}


@pytest.mark.parametrize(("kind", "arguments", "flags"), LOUD.values(), ids=LOUD)
def test_no_line_of_a_summary_is_wider_than_a_terminal(
    kind: str, arguments: dict, flags: list, checkpoint: Callable, tmp_path: Path, cli: Callable
) -> None:
    source = checkpoint(kind, **arguments)
    given = ["--activation_stats", statistics(source, tmp_path / "stats.json", "_proj.weight$")]
    # Into a string, hence with ASCII marks: the wider of the two, as ≥ becomes >=.
    result = cli("--input_dir", source, "--output_dir", tmp_path / "out", *flags, *given)
    assert "SUMMARY" in result.out
    assert ">=" in result.out or "--skip_verify" in flags
    assert [line for line in result.out.splitlines() if len(line) > 80] == []


# --- streams, terminals, encodings -------------------------------------------------------------


def in_terminal(
    *arguments: object, stdout: bool, stderr: bool, env: dict[str, str], columns: int = 100
) -> Result:
    """Run with stdout, stderr or both on a pseudo-terminal."""
    master, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    name = os.ttyname(terminal)
    wanted = {"out": stdout, "err": stderr}
    started = forked.start(
        *arguments,
        streams={stream: name for stream, is_terminal in wanted.items() if is_terminal},
        before="import os; os.environ.pop('NO_COLOR', None)" if "NO_COLOR" not in env else "",
        env={"TERM": "xterm", **env},
    )
    shown = b""
    with ThreadPoolExecutor(1) as waiting:
        end = waiting.submit(started.wait)
        end.add_done_callback(lambda _: os.close(terminal))
        with suppress(OSError):  # EIO: the other end is closed
            while part := os.read(master, 65536):
                shown += part
    ended = end.result()
    os.close(master)
    screen = shown.decode()
    return Result(ended.rc, screen if stdout else ended.out, screen if stderr else ended.err)


@pytest.mark.parametrize(
    ("env", "coloured"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"NO_COLOR": ""}, True)],
    ids=["colour", "NO_COLOR", "NO_COLOR empty, which means nothing"],
)
def test_a_terminal_gets_colour_unless_no_color_is_set(
    env: dict, coloured: bool, small: Path, tmp_path: Path
) -> None:
    result = in_terminal(
        "--input_dir", small, "--output_dir", tmp_path / "out", "--quiet",
        stdout=True, stderr=False, env=env,
    )  # fmt: skip
    assert (ESCAPE in result.out) == coloured
    assert ("\033[32m✔ GOOD\033[0m" in result.out) == coloured
    assert result.err == ""


def before_the_end(result: Result, output: Path) -> str:
    """Stderr without the last lines of a run, the first of which begins with the output directory."""
    return result.err.partition(f"{output}: ")[0].rstrip()


def test_a_run_ends_with_sizes_time_and_commands_to_serve_it(
    checkpoint: Callable, tmp_path: Path, cli: Callable
) -> None:
    output = tmp_path / "it's out"
    command = ("--input_dir", checkpoint("moe", shards=2), "--output_dir", output)
    first, *rest = cli(*command).err.splitlines()[-4:]
    assert re.fullmatch(rf"{re.escape(str(output))}: [\d.]+MB -> [\d.]+MB in \d+(\.\d)? s", first)
    quoted = f"'{tmp_path}/it'\"'\"'s out'"
    assert rest == [
        "To serve it on GPUs of 80GB:",
        f"  vllm serve {quoted} --tensor-parallel-size 1",
        f"  python -m sglang.launch_server --model-path {quoted} --tp 1",
    ]
    assert "vllm serve" not in cli(*command).err  # nothing was quantized


def test_a_terminal_gets_a_bar_over_bytes_and_a_file_gets_none(small: Path, tmp_path: Path) -> None:
    result = in_terminal(
        "--input_dir", small, "--output_dir", tmp_path / "out", stdout=False, stderr=True, env={}
    )
    assert result.rc == 0
    last = before_the_end(result, tmp_path / "out").rsplit("\r", 1)[-1]
    assert last.startswith("model.safetensors: 100%")
    assert "B/s" in last
    # Summary and progress do not mix, whatever happens to one of them.
    assert "SUMMARY" in result.out
    assert ESCAPE not in result.out
    assert "\r" not in result.out


BAR = re.compile(r"(?P<label>.+): +(?P<percent>\d+)%\|(?P<bar>[^|]+)\| .*?(?P<rate>[\d.?]+[kMG]?B/s)")


@pytest.mark.parametrize(
    ("columns", "label"), [(50, "2/2"), (80, "2/2"), (120, "model-00002-of-00002.safetensors")]
)
def test_the_bar_keeps_its_bar_rate_and_time_at_every_width(
    columns: int, label: str, checkpoint: Callable, tmp_path: Path
) -> None:
    flags = ["--input_dir", checkpoint("text", shards=2), "--output_dir", tmp_path / "out", "--workers", 1]
    result = in_terminal(*flags, stdout=False, stderr=True, env={}, columns=columns)
    assert result.rc == 0
    progress = before_the_end(result, tmp_path / "out")
    last = progress.rsplit("\r", 1)[-1]
    found = BAR.match(last)
    assert found, last
    assert (found["label"], found["percent"]) == (label, "100")
    # A fifth of a narrow terminal; the rest is the label, the rate and a time such as 1:23:45.
    assert len(found["bar"]) >= columns / 5
    assert re.search(r"\d\d:\d\d", last)
    assert max(len(line) for line in re.split(r"[\r\n]", progress)) <= columns


def test_verifying_alone_gets_a_bar_over_the_bytes_of_the_directory(small: Path, tmp_path: Path) -> None:
    command = ("--input_dir", small, "--output_dir", tmp_path / "out")
    assert in_terminal(*command, "--skip_verify", stdout=False, stderr=True, env={}).rc == 0
    shown = (tmp_path / "out" / "model.safetensors").stat().st_size
    for flags in (["--verify_only"], []):  # the second: only verifies what the first run wrote
        result = in_terminal(*command, *flags, stdout=False, stderr=True, env={}, columns=120)
        last = result.err.rstrip().rsplit("\r", 1)[-1]
        assert result.rc == 0
        assert last.startswith("model.safetensors: 100%")
        assert f"| {tqdm.format_sizeof(shown)}/{tqdm.format_sizeof(shown)} [" in last


def test_shards_of_an_earlier_run_are_kept_and_not_counted_as_done_again(
    checkpoint: Callable, tmp_path: Path, cli: Callable
) -> None:
    source, out = checkpoint("text", shards=2), tmp_path / "out"
    command = ("--input_dir", source, "--output_dir", out)
    assert cli(*command).rc == 0
    (out / "model-00001-of-00002.safetensors").unlink()
    again = before_the_end(cli(*command), out).splitlines()
    kept = "note: 1 of 2 shards are there from an earlier run and kept"
    assert again == [kept, "[2/2] model-00001-of-00002.safetensors"]
    (out / "model-00001-of-00002.safetensors").unlink()
    verified = cli(*command, "--verify_samples", "all").err.splitlines()
    assert verified[0] == f"{kept}, 1 of them to be verified"
    assert "[1/2] model-00002-of-00002.safetensors (kept; verified)" in verified


def test_a_finished_directory_is_said_to_be_finished_and_when_it_was_checked(
    checkpoint: Callable, tmp_path: Path, cli: Callable
) -> None:
    command = ("--input_dir", checkpoint("text"), "--output_dir", tmp_path / "out")
    first = cli(*command)
    manifest = tmp_path / "out" / "fp8_quantization.json"
    written = manifest.read_bytes()
    os.utime(manifest, (0, calendar.timegm((2026, 3, 4, 12, 0, 0))))
    day = time.strftime("%Y-%m-%d %H:%M", time.localtime(calendar.timegm((2026, 3, 4, 12, 0, 0))))
    for _ in range(2):  # the second: looking does not move the date
        again = cli(*command)
        assert again.err == f"note: nothing to do, this is the earlier verdict, checked on {day}\n"
        assert (again.rc, again.out) == (first.rc, first.out)
        assert manifest.read_bytes() == written
    # Checked in another way, it is checked anew, today.
    assert "nothing to do" not in cli(*command, "--verify_samples", "all").err
    assert day not in cli(*command, "--verify_samples", "all").err


def test_piped_output_is_plain_text_with_a_line_per_shard(
    checkpoint: Callable, tmp_path: Path, run: Callable
) -> None:
    result = run("--input_dir", checkpoint("text", shards=2), "--output_dir", tmp_path / "out")
    assert result.rc == 0
    progress = before_the_end(result, tmp_path / "out").splitlines()
    assert progress == [f"[{i}/2] model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", result.out + result.err)
    assert "✔ GOOD" in result.out


def test_quiet_leaves_the_summary_and_nothing_else(
    checkpoint: Callable, tmp_path: Path, cli: Callable
) -> None:
    source = checkpoint("text", shards=2)
    given = statistics(source, tmp_path / "stats.json", "mlp")
    flags = ["--activation_stats", given]  # worth a note: some tensors have none
    loud = cli("--input_dir", source, "--output_dir", tmp_path / "loud", *flags)
    quiet = cli("--input_dir", source, "--output_dir", tmp_path / "quiet", *flags, "--quiet")
    assert "note: " in loud.err
    assert (quiet.rc, quiet.out, quiet.err) == (0, loud.out, "")


def test_quiet_does_not_silence_an_error(tmp_path: Path, cli: Callable) -> None:
    result = cli("--input_dir", tmp_path / "nowhere", "--output_dir", tmp_path / "out", "--quiet")
    assert (result.rc, result.err.startswith("error: ")) == (2, True)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_marks_are_ascii_where_the_encoding_lacks_the_glyphs(
    encoding: str, small: Path, tmp_path: Path
) -> None:
    env = {"PYTHONIOENCODING": encoding}
    result = forked.run("--input_dir", small, "--output_dir", tmp_path / "out", env=env)
    assert result.rc == 0, result.err
    assert result.out.isascii()
    assert "+ GOOD" in result.out
    assert ">= 0.9995" in result.out
    assert "\\u" not in result.out
    plan = forked.run("--input_dir", small, "--dry_run", env=env)
    assert plan.rc == 0, plan.err
    assert plan.out.isascii()
    assert "\\u" not in plan.out


def test_a_shard_outside_the_index_is_left_out_with_a_note(
    checkpoint: Callable, tmp_path: Path, copy_of: Callable, cli: Callable
) -> None:
    source = copy_of(checkpoint("text", shards=2))
    save_file({"model.stale": torch.zeros(1)}, source / "consolidated.safetensors")
    result = cli("--input_dir", source, "--output_dir", tmp_path / "out")
    assert result.rc == 0
    assert "note: consolidated.safetensors is not in the index" in result.err
    assert not (tmp_path / "out" / "consolidated.safetensors").exists()


def test_large_weights_are_judged_and_not_listed(checkpoint: Callable, tmp_path: Path, cli: Callable) -> None:
    kind, arguments = SMALL
    result = cli("--input_dir", checkpoint(kind, **arguments, std=1.0), "--output_dir", tmp_path / "out")
    assert "because weights are large" in " ".join(result.out.split())
    assert "Not GOOD" not in result.out
    assert "RECOMMENDATIONS" not in result.out


def test_bands_are_kept_out_of_the_bytes(small: Path, tmp_path: Path, cli: Callable) -> None:
    command = ("--input_dir", small, "--output_dir")
    cli(*command, tmp_path / "plain")
    cli(*command, tmp_path / "banded", "--band", "cosine=1,0.9999")
    names = {p.name for p in (tmp_path / "plain").iterdir()}
    assert {p.name for p in (tmp_path / "banded").iterdir()} == names
    for name in names:
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "banded" / name).read_bytes()


def test_a_band_that_makes_no_sense_is_refused(small: Path, tmp_path: Path, cli: Callable) -> None:
    result = cli("--input_dir", small, "--output_dir", tmp_path / "out", "--band", "cosine=0.9,0.99")
    assert result.rc == 2
    assert "the hard limit comes second" in result.err
    assert not (tmp_path / "out").exists()
