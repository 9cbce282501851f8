"""What a user gets to read who gave something else than what was needed."""

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def refused(cli: Callable, tmp_path: Path) -> Callable[..., str]:
    """`refused(input, *flags)`: the error line of a run that is refused."""

    def run(source: object, *flags: object) -> str:
        result = cli("--input_dir", source, "--output_dir", tmp_path / "out", *flags)
        assert (result.rc, result.out, result.err.count("\n")) == (2, "", 1), result.err
        return result.err

    return run


def folder(path: Path, *names: str) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for name in names:
        (path / name).write_bytes(b"x")
    return path


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["adapter_config.json", "adapter_model.safetensors"], "merge the adapter first"),
        (["adapter_config.json", "adapter_model.safetensors", "config.json"], "merge the adapter first"),
        (["adapter_config.json", "adapter_model.bin"], "this as --lora_dir"),
        (["model-Q4_K_M.gguf", "config.json"], "holds GGUF (model-Q4_K_M.gguf); convert back first"),
    ],
)
def test_a_directory_of_something_else_says_what_to_do_first(
    names: list[str], said: str, tmp_path: Path, refused: Callable
) -> None:
    assert said in refused(folder(tmp_path / "given", *names))


def test_a_file_is_answered_with_its_directory(checkpoint: Callable, refused: Callable) -> None:
    model = checkpoint("text")
    said = refused(model / "model.safetensors")
    assert said.endswith(f"a file; give the directory that it is in: {model}\n")


def test_a_gguf_file_is_named_as_one(tmp_path: Path, refused: Callable) -> None:
    assert "a GGUF file; convert back first" in refused(folder(tmp_path, "m.gguf") / "m.gguf")


def test_an_id_of_the_hub_is_answered_with_the_download(refused: Callable) -> None:
    assert "hf download Qwen/Qwen3.5-27B --local-dir Qwen3.5-27B" in refused("Qwen/Qwen3.5-27B")
    assert "check the path" in refused("/nowhere/Qwen3.5-27B")


def test_a_folder_of_the_hubs_cache_is_answered_with_its_snapshot(tmp_path: Path, refused: Callable) -> None:
    cache = tmp_path / "models--Qwen--Qwen3.5-27B"
    old, new = folder(cache / "snapshots" / "aaaa"), folder(cache / "snapshots" / "bbbb")
    folder(cache / "refs")
    (cache / "refs" / "main").write_text("aaaa")
    for given in (cache, cache / "snapshots"):
        assert refused(given).endswith(f"give the snapshot in it: {old}\n")
    (cache / "refs" / "main").write_text("../../../..")  # not a snapshot, so that `main` says nothing
    old.rmdir()
    assert refused(cache).endswith(f"give the snapshot in it: {new}\n")


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--input-dir", "--input_dir"),
        ("--Output-Dir=x", "--output_dir"),
        ("--verify-only", "--verify_only"),
        ("--calib_moed", "--calib_mode"),
    ],
)
def test_a_flag_that_is_nearly_right_names_the_right_one(flag: str, meant: str, cli: Callable) -> None:
    result = cli(flag, "x")
    assert result.rc == 2
    assert f"{flag.partition('=')[0]} (did you mean {meant}?)" in result.err


def test_a_value_may_look_like_no_flag_of_ours(cli: Callable) -> None:
    assert "unrecognized arguments: --zebra" in cli("--input_dir", "x", "--output_dir", "y", "--zebra").err


@pytest.mark.parametrize("percentile", ["0.999", "49.9", "0", "-1", "nan"])
def test_a_percentile_that_is_meant_as_a_share_is_refused(percentile: str, refused: Callable) -> None:
    said = refused("anywhere", "--calib_mode", "percentile", f"--calib_percentile={percentile}")
    assert "99.9 means 99.9 %" in said


def test_flags_without_effect_are_noted_when_only_verifying(
    checkpoint: Callable, quantized: Callable, cli: Callable
) -> None:
    source = checkpoint("text")
    out = quantized(source)
    flags = ["--overwrite", "--keep_bf16", "*.layers.0.*", "--eligibility", "official"]
    command = ["--input_dir", source, "--output_dir", out, "--verify_only"]
    result = cli(*command, *flags, "--calib_mode", "mse")
    notes = [line for line in result.err.splitlines() if line.startswith("note: ")]
    named = [flag for flag in flags if flag.startswith("--")]
    assert sorted(notes[:-1]) == sorted(f"note: {f} has no effect with --verify_only" for f in named)
    assert notes[-1].startswith("note: scales were chosen by rms(k=3), ue8m0; ")
    assert "note" not in cli(*command).err


def test_flags_without_effect_are_noted_when_nothing_is_verified(
    checkpoint: Callable, tmp_path: Path, cli: Callable
) -> None:
    command = ["--input_dir", checkpoint("text"), "--output_dir", tmp_path / "out", "--skip_verify"]
    result = cli(*command, "--verify_samples", "all", "--seed", "1")
    assert [f"note: {flag} has no effect with --skip_verify" in result.err for flag in
            ("--verify_samples", "--seed")] == [True, True]  # fmt: skip
