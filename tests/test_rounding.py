"""`--rounding second_order`: what is written, how it is judged, and that nothing changes a byte of it."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file

import forked
import forked_ranks
from conftest import SCRIPT, Result
from forked import At
from forked_ranks import Rank
from fp8lib.calibration.second_moments_file import MOMENTS, SecondMoments, inputs_of, pack
from fp8lib.calibration.second_moments_writer import SecondMomentsWriter, expert_input
from fp8lib.checkpoint.directory import open_checkpoint
from fp8lib.checkpoint.headers import read_shard
from fp8lib.checkpoint.plan import Plan, make_plan
from fp8lib.numerics.e4m3 import quantize
from fp8lib.numerics.modes import Calibration
from fp8lib.numerics.scales import block_scales
from fp8lib.numerics.second_order import factorize, round_rows, with_headroom
from fp8lib.streaming import second_order
from fp8lib.verification.output_error import OutputError, statement, summary
from test_second_order import moments as correlated

SMALL = {"num_hidden_layers": 1, "hidden_size": 128, "num_experts": 4, "num_experts_per_tok": 1, "shards": 2}
MANIFEST = "fp8_quantization.json"


def plan_of(folder: Path) -> Plan:
    return make_plan(open_checkpoint(folder))


@pytest.fixture(scope="module")
def source(checkpoint: Callable) -> Path:
    return checkpoint("moe_text", **SMALL)


@pytest.fixture(scope="module")
def moments(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Second moments of correlated inputs, for all weights but mtp's; expert 2 has its own."""
    path = tmp_path_factory.mktemp("moments") / "made.second_moments.safetensors"
    inputs = inputs_of((m.weight.name, m.columns) for m in plan_of(source).matrices)
    with SecondMomentsWriter(path, inputs, {}) as writer:
        for seed, each in enumerate(inputs):
            writer.add(each.name, each.channels, pack(correlated(each.channels, seed).numpy()), 600)
            if each.experts:
                own = pack(correlated(each.channels, 99).numpy())
                writer.add(expert_input(each.name, 2), each.channels, own, 600)
        writer.commit()
    return path


@pytest.fixture(scope="module")
def rounded(quantized: Callable, source: Path, moments: Path) -> Path:
    """The output of a run with all defaults."""
    return quantized(source, *second(moments), "--verify_samples", "all")


def second(moments: Path) -> tuple[object, ...]:
    return ("--rounding", "second_order", "--second_moments", moments)


def codes(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the shards, bytes that can be compared."""
    return {
        name: tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def tree(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def assert_refused(result: Result | forked.Ended, *words: str) -> None:
    assert result.rc == 2, result.out
    [error] = [line for line in result.err.splitlines() if "error" in line]
    assert all(word in error for word in words), error


# --- what is written ---------------------------------------------------------------------------


def test_every_weight_is_rounded_with_its_inputs_second_moments(source, moments, rounded) -> None:
    found, file = codes(rounded), SecondMoments(moments)
    originals = codes(source)
    nearest = 0
    for m in plan_of(source).matrices:
        name = m.weight.name
        if name in originals:
            weights = originals[name]
        else:
            experts, expert, projection, _ = name.rsplit(".", 3)
            fused = originals[f"{experts}.{'down_proj' if projection == 'down_proj' else 'gate_up_proj'}"]
            weights = fused[int(expert)]
            if projection != "down_proj":
                weights = weights.chunk(2)[projection == "up_proj"]
        scales, amax = block_scales(weights, Calibration())
        entry = file.entry(name, m.columns)
        if entry is None:
            nearest += 1
            expected = quantize(weights, scales, saturate=False)
        else:
            scales = with_headroom(scales, amax)
            expected = round_rows(weights, scales, factorize(torch.from_numpy(file.read(entry)), 0.01))
        assert torch.equal(found[f"{name}_scale_inv"], scales), name
        assert torch.equal(found[name], expected.view(torch.uint8)), name
    assert nearest == sum(m.weight.name.startswith("mtp.") for m in plan_of(source).matrices) > 0
    assert file.entry("model.layers.0.mlp.experts.2.down_proj.weight", 128).endswith("experts.2.down_proj")


def test_only_codes_and_scales_differ_from_nearest(quantized, source, rounded) -> None:
    plain, found = quantized(source), codes(rounded)
    for name, tensor in codes(plain).items():
        same = found[name].shape == tensor.shape and found[name].dtype == tensor.dtype
        assert same
        if not (name.endswith("_scale_inv") or f"{name}_scale_inv" in found):
            assert torch.equal(found[name], tensor)
    assert (plain / "config.json").read_bytes() == (rounded / "config.json").read_bytes()


def test_the_summary_says_how_much_was_gained(cli, source, moments, rounded) -> None:
    result = cli(
        "--input_dir", source, "--output_dir", rounded, "--verify_samples", "all", *second(moments)
    )  # fmt: skip
    assert result.rc == 0
    total = sum(1 for _ in plan_of(source).matrices)
    mtp = sum(m.weight.name.startswith("mtp.") for m in plan_of(source).matrices)
    assert f"second order, {total - mtp} of {total} tensors" in result.out
    [line] = [line for line in result.out.splitlines() if "Output error" in line]
    gained, worst = (
        float(line.split(": ")[1].split(word)[i].strip(" )x")) for word, i in ((" x ", 0), ("worst ", 1))
    )
    assert 0 < gained < worst <= 1
    assert f"in {total - mtp} of {total - mtp} tensors, code for code" in result.out
    assert f"{mtp} of {total} tensors have no second moments" in result.err


def test_workers_and_pieces_change_no_byte(cli, source, moments, rounded, tmp_path, monkeypatch) -> None:
    for workers, piece in ((1, 128 * 128), (3, 300 * 128)):
        monkeypatch.setattr(second_order, "CPU_PIECE", piece)
        output = tmp_path / str(workers)
        flags = ("--input_dir", source, "--output_dir", output, "--workers", workers)
        assert cli(*flags, "--verify_samples", "all", *second(moments)).rc == 0
        assert tree(output) == tree(rounded)


def test_matrices_that_are_stacked_get_the_codes_they_get_alone(source, moments) -> None:
    from fp8lib.streaming.factors import Factors

    file = SecondMoments(moments)
    factors = Factors(file.entry, file.read, file.refuse, 0.01, torch.device("cpu"), kept=1)
    convert = second_order.SecondOrder(Calibration("mse"), factors, lambda name, n: np.arange(n, dtype="f4"))
    matrices = [m for m in plan_of(source).matrices if m.columns == 128][:9]
    rows = torch.randn(128 * len(matrices), 128).mul_(0.02).bfloat16()
    together = convert.stacked([(m, 0, 128) for m in matrices], rows)
    for i, (matrix, own) in enumerate(zip(matrices, rows.split(128), strict=True)):
        codes, scales = convert(matrix, own, 0)
        assert torch.equal(codes.view(torch.uint8), together[0][128 * i :][:128].view(torch.uint8))
        assert torch.equal(scales, together[1][i : i + 1])


def test_keep_failing_tries_the_rounding_itself(source, moments, rounded, tmp_path, cli, copy_of) -> None:
    """Weights with second moments are judged by their outputs, mtp's by the bands, as in the files."""
    spoiled, name = copy_of(source), "mtp.layers.0.self_attn.o_proj.weight"
    for file in spoiled.glob("*.safetensors"):
        state = load_file(file)
        for spoil in {name, "model.layers.0.linear_attn.in_proj_z.weight"} & state.keys():
            state[spoil][0, 0] = 1000.0  # an error of 24
        save_file(state, file, metadata={"format": "pt"})
    output = tmp_path / "out"
    arguments = "--input_dir", spoiled, *second(moments), "--keep_failing", "--verify_samples", "all"
    result = cli(*arguments, "--output_dir", output)
    assert result.rc == 0, result.err
    kept = json.loads((output / MANIFEST).read_text())["settings"]["kept_groups"]
    assert kept.keys() == {name.removesuffix(".weight")}


def test_ranks_write_the_same_bytes(source, moments, rounded, tmp_path) -> None:
    ended = forked_ranks.run(
        [Rank()] * 2, "--input_dir", source, "--output_dir", tmp_path / "out",
        "--verify_samples", "all", "--quiet", *second(moments),
    )  # fmt: skip
    assert [each.rc for each in ended] == [0, 0], ended
    assert tree(tmp_path / "out") == tree(rounded)


def test_a_killed_run_is_continued_to_the_same_bytes_by_the_same_flags_alone(
    source, moments, rounded, tmp_path
) -> None:
    output = tmp_path / "out"
    flags = ("--input_dir", source, "--output_dir", output, "--verify_samples", "all", *second(moments))
    assert forked.run(*flags, at=At("rename", 3, MANIFEST)).rc < 0
    assert not (output / "config.json").exists()
    finished = json.loads((output / MANIFEST).read_text())["shards"]
    assert 0 < len(finished) <= 2
    other = tmp_path / "other.safetensors"
    arrays = load_arrays(moments)
    arrays[next(name for name in sorted(arrays) if name.endswith(MOMENTS))][:1] += 1
    save_arrays(arrays, other)
    assert_refused(forked.run(*flags[:-1], other), "second_moments")
    assert_refused(forked.run(*flags, "--damping", "0.02"), "rounding", "0.01", "0.02")
    assert_refused(forked.run(*flags[:-4]), "rounding second_order(damping=0.01), now nearest")
    assert forked.run(*flags).rc == 0
    assert tree(output) == tree(rounded)


# --- verification ------------------------------------------------------------------------------


def test_a_finished_directory_is_judged_by_outputs_if_second_moments_are_given(
    cli, source, moments, rounded
) -> None:
    flags = ("--input_dir", source, "--output_dir", rounded, "--verify_only", "--verify_samples", "all")
    result = cli(*flags, *second(moments))
    assert result.rc == 0
    assert "Output error" in result.out
    assert "Output error" not in cli(*flags).out


@pytest.mark.parametrize("spoilt", ["one code", "a tensor"])
def test_codes_that_rounding_does_not_give_are_found(
    cli, source, moments, rounded, tmp_path, spoilt: str
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    for name, data in tree(rounded).items():
        (output / name).write_bytes(data)
    file = sorted(output.glob("*.safetensors"))[0]
    tensors = load_file(file)
    name = next(n for n in sorted(tensors) if n.endswith("up_proj.weight") and not n.startswith("mtp."))
    tensor = tensors[name].view(torch.uint8)
    if spoilt == "one code":
        tensor[5, 5] ^= 1
    else:
        tensor[:] = tensor.flip(0)
    save_file(tensors, file, metadata={"format": "pt"})
    (output / MANIFEST).unlink()  # by its sums, any other code is damage
    flags = ("--input_dir", source, "--output_dir", output, "--verify_only", "--verify_samples", "all")
    result = cli(*flags, *second(moments))
    if spoilt == "one code":  # 1 of 16384, within what another processor's arithmetic explains
        assert result.rc == 0
        assert "WARN" in result.out
        assert "codes that second-order rounding does not give" in " ".join(result.out.split())
    else:
        assert result.rc == 1
        assert "more than rounding to nearest would" in " ".join(result.out.split())


def test_one_wrong_code_is_found_by_the_manifest_without_second_moments(
    cli, source, rounded, tmp_path
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    for name, data in tree(rounded).items():
        (output / name).write_bytes(data)
    shard = read_shard(sorted(output.glob("*.safetensors"))[0])
    code = next(t.start for t in shard.tensors if t.dtype == "F8_E4M3")
    data = bytearray(shard.path.read_bytes())
    data[code + 5] ^= 1
    shard.path.write_bytes(data)
    flags = ("--input_dir", source, "--output_dir", output, "--verify_only", "--verify_samples", "all")
    result = cli(*flags)
    assert result.rc == 1
    assert f"{shard.name}: its FP8 weights are not those that were written" in " ".join(result.out.split())


def test_output_errors_add_up_to_a_line() -> None:
    good, same = OutputError(0.2, 0.4, 1.0), OutputError(0.0, 0.0, 1.0)
    assert good.is_good
    assert same.is_good
    assert summary([good, OutputError(0.5, 0.5, 1.0)]) == "0.71 x of nearest (worst 1.00)"  # sqrt(1/2 * 1)
    assert statement([good, same]) is None
    worse, odd = OutputError(0.5, 0.4, 1.0), OutputError(0.2, 0.4, 0.9999)
    broken = OutputError(float("nan"), 0.4, 1.0)
    assert [each.is_bad for each in (worse, odd, broken)] == [True, False, True]
    assert not odd.is_good


# --- refusals ----------------------------------------------------------------------------------


def test_flags_that_do_not_fit_together_are_refused(cli, source, moments, tmp_path) -> None:
    flags = ("--input_dir", source, "--output_dir", tmp_path / "out")
    assert_refused(cli(*flags, "--rounding", "second_order"), "--second_moments")
    assert_refused(cli(*flags, "--second_moments", moments), "--rounding second_order")
    assert_refused(cli(*flags, *second(moments), "--damping", "0"), "--damping")
    assert not (tmp_path / "out").exists()


def test_files_of_other_models_and_no_second_moments_are_refused(
    cli, source, moments, checkpoint, tmp_path
) -> None:
    flags = ("--input_dir", source, "--output_dir", tmp_path / "out")
    other = checkpoint("moe_text")  # 256 channels instead of 128
    result = cli("--input_dir", other, "--output_dir", tmp_path / "out", *second(moments))
    assert_refused(result, "128 channels", "256", "collect second moments from this model")
    assert_refused(cli(*flags, *second(source / "model-00001-of-00002.safetensors")), "no F32 triangle")
    assert not (tmp_path / "out").exists()
    arrays = load_arrays(moments)
    name = f"model.layers.0.mlp.experts.{MOMENTS}"
    arrays[name] = -arrays[name]
    save_arrays(arrays, tmp_path / "negative.safetensors")
    result = cli(*flags, *second(tmp_path / "negative.safetensors"))
    assert_refused(result, "negative.safetensors", name, "not positive semidefinite", "collect it again")
    assert not (tmp_path / "out" / "config.json").exists()


def test_who_rounds_to_nearest_imports_nothing_of_this(source, tmp_path) -> None:
    code = """
import sys, quantize_fp8
assert quantize_fp8.main(sys.argv[1:]) == 0
ours = [name for name in sys.modules if name.startswith("fp8lib")]
found = [name for name in ours if "second" in name or "factors" in name or "outputs" in name]
assert not found, found
"""
    command = [sys.executable, "-c", code, "--input_dir", source, "--output_dir", tmp_path / "out"]
    done = subprocess.run(command, cwd=SCRIPT.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
