"""Recommendations: measured on the tensors themselves, and what they promise is what following them gives."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import quantize_fp8
from fp8lib.job import trying
from fp8lib.numerics.modes import Calibration
from fp8lib.verification import advice
from fp8lib.verification.advice import Trials, Tried, alternatives, unexplained
from fp8lib.verification.bands import Bands
from test_health import measured

MANIFEST = "fp8_quantization.json"
SPOILED = "model.layers.0.mlp.down_proj"
BF16 = ("--scale_format", "bf16")
CLIPPING = ("--rms_saturate", *BF16)

KINDS = {
    # (the weight that is made large, flags of the first run, what is recommended)
    "another mode": (
        0.4,
        BF16,
        "--calib_mode mse: max abs err 0.0156 -> 0.00525, WARN -> GOOD (1 tensor)",
    ),
    "another scale format": (
        0.3,
        (),
        "--scale_format bf16: max abs err 0.0117 -> 0.00903, WARN -> GOOD (1 tensor); for engines that take "
        "scales as they are (docs/formats.md)",
    ),
    "no clipping": (None, CLIPPING, "without --rms_saturate: cosine "),
    "keeping": (
        1e5,  # all others of its block become 0, whatever the scale
        (),
        # 256 x 512 weights, of which each takes a byte more; 2 x 4 scales of 2 bytes are saved: 131,056.
        f"--keep_bf16 {SPOILED}: 1 tensor that no setting helps; 131kB more; --keep_failing finds and keeps "
        "every group that FAILs",
    ),
}


@pytest.fixture(scope="module")
def source(checkpoint: Callable, once: Callable) -> Callable[[float | None], Path]:
    """`source(size)`: a model of one layer, in which one weight has that size, or none has."""
    healthy = checkpoint("text", mtp=False, num_hidden_layers=1)

    def make(size: float | None) -> Path:
        def spoil(folder: Path) -> None:
            for file in healthy.iterdir():
                (folder / file.name).write_bytes(file.read_bytes())
            state = load_file(healthy / "model.safetensors")
            # Weights of this test's own, so that the figures above hold whatever the builder draws.
            weights = 0.02 * torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
            weights[0, 0] = size
            state[f"{SPOILED}.weight"] = weights.bfloat16()
            save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

        return once("one large weight", size, spoil) if size else healthy

    return make


def recommended(text: str) -> list[str]:
    """The recommendations of a summary, one line each."""
    _, _, rest = text.partition("CALIBRATION RECOMMENDATIONS\n")
    lines = " ".join(rest.partition("====")[0].split())
    return [part.strip() for part in re.split(r"(?:^| )\d\. ", lines) if part.strip()]


def follow(flags: tuple[str, ...], text: str) -> list[str]:
    """The flags of the next run."""
    change, _, _ = text.partition(": ")
    change, _, left_out = change.partition("without ")
    return [flag for flag in flags if flag != left_out] + shlex.split(change)


@pytest.mark.parametrize("kind", KINDS)
def test_following_a_recommendation_gives_what_it_promised(
    kind: str, source: Callable, tmp_path: Path, cli: Callable
) -> None:
    size, flags, expected = KINDS[kind]
    arguments = "--input_dir", source(size), "--verify_samples", "all"
    first = cli(*arguments, "--output_dir", tmp_path / "first", *flags)
    text = recommended(first.out)[0]
    assert text.startswith(expected)
    assert "other settings on" in first.err
    second = cli(*arguments, "--output_dir", tmp_path / "second", *follow(flags, text))
    assert second.rc == 0, second.err
    assert re.search(r" 0 WARN .* 0 FAIL\)", second.out)
    assert recommended(second.out) == []
    # The figure it promised is the one that the second run measured.
    by_name = {m["name"]: m for m in measurements(tmp_path / "second")}
    if kind == "keeping":
        assert f"{SPOILED}.weight" not in by_name
        grown = sum(sizes(tmp_path / "second")) - sum(sizes(tmp_path / "first"))
        assert grown == pytest.approx(131_056, abs=4096), "but for padding"
    for promised in re.findall(r"-> (0\.\d+), \w+ -> GOOD", text):
        field, digits = ("cosine", ".6f") if "cosine" in text else ("max_abs", ".3g")
        assert promised in {f"{m[field]:{digits}}" for m in by_name.values()}


def measurements(folder: Path) -> list[dict]:
    shards = json.loads((folder / MANIFEST).read_text())["shards"].values()
    return [m for shard in shards for m in shard["measurements"]]


def sizes(folder: Path) -> list[int]:
    return [file.stat().st_size for file in folder.glob("*.safetensors")]


def test_verify_only_says_the_same_and_names_both_flags_where_nobody_knows_the_mode(
    source: Callable, quantized: Callable, copy_of: Callable, cli: Callable
) -> None:
    size, flags, expected = KINDS["another mode"]
    output = copy_of(quantized(source(size), *flags, "--verify_samples", "all"))
    arguments = (
        "--input_dir",
        source(size),
        "--output_dir",
        output,
        "--verify_only",
        "--verify_samples",
        "all",
    )
    assert recommended(cli(*arguments).out) == [expected]
    (output / MANIFEST).unlink()
    assert recommended(cli(*arguments).out) == [expected.replace("mse:", "mse --scale_format bf16:")]


def test_damaged_files_of_another_tool_are_called_that_and_get_no_mode(
    source: Callable, quantized: Callable, copy_of: Callable, cli: Callable
) -> None:
    output = copy_of(quantized(source(None)))
    (output / MANIFEST).unlink()
    state = load_file(output / "model.safetensors")
    state[f"{SPOILED}.weight"].view(torch.uint8)[7, 7] = 0x7E  # 448: an error of many steps
    save_file(state, output / "model.safetensors", metadata={"format": "pt"})
    result = cli(
        "--input_dir", source(None), "--output_dir", output, "--verify_only", "--verify_samples", "all"
    )
    [text] = recommended(result.out)
    assert f"such as {SPOILED}.weight (1 codes in all)" in text
    assert "copy or write them again" in text
    assert "--" not in text


def test_only_the_worst_are_tried_and_the_text_says_so(
    source: Callable, tmp_path: Path, cli: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trying, "_MOST", 2)
    result = cli(
        "--input_dir", source(None), "--output_dir", tmp_path / "out", *CLIPPING, "--verify_samples", "all"
    )
    [text] = recommended(result.out)
    assert "(2 tensors); tried on the worst 2 of " in text


def test_at_least_one_is_tried_however_large(source: Callable, quantized: Callable) -> None:
    a, b = measured("a"), measured("b")
    matrix = type("Matrix", (), {"rows": 1 << 20, "columns": 1 << 20})
    assert trying._affordable([(a, matrix), (b, matrix)]) == [a]


# --- choosing and wording ----------------------------------------------------------------------

WARN, FAIL = (
    measured("model.layers.1.self_attn.q_proj.weight", max_abs=0.015, vs_best=1.5),
    measured("model.layers.0.mlp.up_proj.weight", max_abs=0.05, vs_best=1.5),
)
GOOD = measured()
USED = Calibration("rms", scale_format="bf16")
OPTIONS = alternatives(USED, USED)


def trials(*tried: Tried, others: tuple[Tried, ...] = (), **changes: object) -> list[str]:
    found = {"scale_format": "bf16", "flagged": len(tried), **changes}
    return Trials(tried, others, OPTIONS, **found).recommendations(())


def then(now: object, **by_flags: object) -> Tried:
    """A weight and what each mode makes of it with BF16 scales: what is given, or no change."""
    modes = [o.calibration.mode if o.calibration.scale_format == "bf16" else "" for o in OPTIONS]
    return Tried(now, tuple(by_flags.get(mode, now) for mode in modes))


def test_alternatives_are_all_that_do_not_clip_and_never_what_was_used() -> None:
    assert [o.flags for o in OPTIONS] == [
        "--calib_mode mse", "--calib_mode max", "--scale_format ue8m0",
        "--calib_mode mse --scale_format ue8m0", "--calib_mode max --scale_format ue8m0",
    ]  # fmt: skip
    clipping = Calibration("rms", rms_factor=2, rms_saturate=True)
    assert alternatives(clipping, clipping)[0].flags == "--rms_factor 3 without --rms_saturate"
    coarse = Calibration("mse", mse_grid_size=4, scale_format="bf16")
    assert alternatives(coarse, coarse)[0].flags == "--mse_grid_size 128"
    unknown = alternatives(None, Calibration())
    assert [o.flags for o in unknown[:3]] == [
        f"--calib_mode {m} --scale_format ue8m0" for m in ("mse", "rms", "max")
    ]
    assert not any(o.calibration.clips for o in (*OPTIONS, *unknown, *alternatives(clipping, clipping)))


def test_only_what_changes_a_zone_is_recommended() -> None:
    better = measured(WARN.name, max_abs=0.011, vs_best=1.2)
    assert "mse" not in " ".join(trials(then(WARN, mse=better)))
    [text] = trials(then(WARN, mse=better, max=GOOD))
    assert text == "--calib_mode max: max abs err 0.015 -> 0.004, WARN -> GOOD (1 tensor)"


def test_each_change_of_zone_has_its_figure_and_count() -> None:
    [text] = trials(then(FAIL, mse=WARN), then(FAIL, mse=GOOD), then(WARN, mse=GOOD), then(WARN, mse=GOOD))
    assert text == (
        "--calib_mode mse: max abs err 0.05 -> 0.015, FAIL -> WARN (1 tensor); max abs err 0.05 -> 0.004, "
        "FAIL -> GOOD (1 tensor); max abs err 0.015 -> 0.004, WARN -> GOOD (2 tensors)"
    )


def test_what_makes_any_other_weight_worse_is_not_recommended() -> None:
    helped, harmed = then(WARN, mse=GOOD), then(GOOD, mse=WARN)
    assert "--calib_mode mse" in trials(helped)[0]
    assert all("--calib_mode" not in text for text in trials(helped, others=(harmed,)))
    assert all("--calib_mode" not in text for text in trials(helped, then(WARN, mse=FAIL)))


def test_a_weight_that_is_only_large_is_not_told_to_be_kept() -> None:
    large = measured(max_abs=0.03, amax=1.0)
    assert trials(then(large)) == []


def test_the_bands_in_force_decide() -> None:
    bands = Bands.parse(["maxae=0.02,0.03"])
    assert trials(then(WARN, mse=GOOD), bands=bands) == []


def test_many_groups_are_counted_behind_the_first() -> None:
    many = [then(measured(f"model.layers.{i}.mlp.down_proj.weight", bulk_error=1.0)) for i in range(12)]
    [text] = trials(*many)
    assert text.count("--keep_bf16") == advice.PATTERNS
    assert "12 tensors that no setting helps" in text
    assert "4 more such groups" in text
    assert "--keep_failing" in text


def test_flags_that_are_recommended_exist_and_names_cannot_write_to_the_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        quantize_fp8.parse(["--help"])
    known = set(re.findall(r"--\w+", capsys.readouterr().out))
    hostile = "bad\x1b[31m\n.layers.0.mlp.down_proj.weight"
    texts = trials(then(measured(hostile, bulk_error=1.0)), then(WARN, mse=GOOD))
    texts += [o.flags for o in OPTIONS] + [advice.about_unexplained([measured(hostile, cosine=0.5)])]
    assert set(re.findall(r"--\w+", " ".join(texts))) <= known
    assert not {"\x1b", "\n"} & set("".join(texts))


@pytest.mark.parametrize("cosine", [float("nan"), -1.0, 0.0, 0.89])
def test_what_no_rounding_explains_is_found_whatever_the_mode(cosine: float) -> None:
    worst = measured("worst", cosine=cosine)
    assert unexplained([WARN, worst], USED) == [worst]
    assert "such as worst" in advice.about_unexplained([worst])


def test_modes_that_clip_may_explain_any_cosine_and_codes_count_where_nobody_knows_the_mode() -> None:
    assert unexplained([measured(cosine=0.5)], Calibration("rms", rms_saturate=True)) == []
    odd = measured("odd", not_nearest=3)
    assert unexplained([odd], USED) == []  # exact codes are checked where the tool is known
    assert unexplained([odd], None) == [odd]
