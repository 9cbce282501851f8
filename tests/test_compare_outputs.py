"""`--compare_outputs` from the command line: what is printed, judged, written and refused."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import quantize_fp8
from fp8lib.outputs import layers

SCRIPT = Path(quantize_fp8.__file__).resolve()
FEW = ("--verify_samples", 1)


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    lines = [{"text": "Why is the sky blue? " * n, "topic": "odd" if n % 2 else "even"} for n in (1, 4, 2, 3)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.fixture(scope="session")
def model(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint("moe", tokenizer=True)


def figure(text: str, label: str) -> float:
    return float(re.search(rf"^  {re.escape(label)} *: (-?[\d.]+|nan)", text, re.MULTILINE)[1])


def spoil(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    file = folder / "model.safetensors"
    state = {key: tensor.clone() for key, tensor in load_file(file).items()}
    file.unlink()
    key = next(key for key in state if key.endswith(name) and not key.startswith("mtp."))
    save_file(state | {key: change(state[key])}, file)


def test_after_quantizing_and_with_verify_only_the_figures_are_the_same(model, prompts, tmp_path, cli):
    shared = "--input_dir", model, "--output_dir", tmp_path / "out", "--prompts_file", prompts, *FEW
    first = cli(*shared, "--compare_outputs", "--logits_out", tmp_path / "a.safetensors")
    again = cli(*shared, "--compare_outputs", "--logits_out", tmp_path / "b.safetensors", "--verify_only")
    assert first.rc == again.rc == 0, first.err + again.err
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    shown = [result.out.partition("OUTPUTS COMPARED")[2] for result in (first, again)]
    assert shown[0] == shown[1]
    for label in ("Mean    KLD", "99.9%   KLD", "Median  KLD", "Same top p", "RMS Δp", "PPL(FP8)/PPL(BF16)"):
        assert figure(shown[0], label) >= 0, label
    assert re.search(r"^  odd  .*±", shown[0], re.MULTILINE)
    assert "Not run: MTP and the vision tower." in " ".join(shown[0].split())
    results = load_file(tmp_path / "a.safetensors")
    lengths = [21 * n for n in (1, 4, 2, 3)]  # a token per byte, and a space at the end is stripped
    assert [int((results["prompt"] == p).sum()) for p in range(4)] == [n - 1 for n in lengths]
    assert abs(results["kl1"].mean() - figure(shown[0], "Mean    KLD")) < 5e-7
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors", "out"]


def test_two_directories_are_compared_in_pairs(model, prompts, quantized, cli):
    one = quantized(model)
    two = quantized(model, "--calib_mode", "percentile", "--calib_percentile", 90, "--skip_verify")
    shared = "--input_dir", model, "--verify_only", "--compare_outputs", "--prompts_file", prompts, *FEW
    result = cli(*shared, "--output_dir", one, "--against", two, "--activations", "bf16")
    pattern = r"mean KLD ([\d.]+) vs ([\d.]+), difference (-[\d.]+) ± ([\d.]+)"
    mine, theirs, difference, error = map(float, re.search(pattern, result.out).groups())
    assert abs(mine - theirs - difference) < 2e-6  # three figures rounded to 1e-6
    assert 0 < error < -difference / 2
    assert f"Closer to the original: {one}" in result.out.replace("\n", "")
    same = cli(*shared, "--output_dir", one, "--against", one)
    assert "difference 0.000000 ± 0.000000" in same.out
    assert "The two say the same." in same.out


def test_nan_in_the_fp8_model_fails_and_its_layer_is_named(model, prompts, quantized, copy_of, cli):
    spoilt = copy_of(quantized(model))
    spoil(spoilt, "layers.1.linear_attn.in_proj_a.weight", lambda t: torch.full_like(t, torch.nan))
    result = cli("--input_dir", model, "--output_dir", spoilt, "--verify_only", "--compare_outputs",
                 "--prompts_file", prompts, *FEW)  # fmt: skip
    assert result.rc == 1
    assert "NaN or infinity behind model.language_model.layers.1" in result.out
    assert result.out.rstrip().endswith("FAIL")


def test_a_much_worse_perplexity_is_a_warning(model, prompts, quantized, copy_of, cli):
    spoilt = copy_of(quantized(model))
    spoil(spoilt, "lm_head.weight", lambda t: t * 30)  # certain of what it knows nothing about
    result = cli("--input_dir", model, "--output_dir", spoilt, "--verify_only", "--compare_outputs",
                 "--prompts_file", prompts, *FEW)  # fmt: skip
    assert result.rc == 0
    assert re.search(r"Perplexity is [\d.]+ % worse than the original's, over 10 %", result.out)
    assert figure(result.out, "PPL(FP8)/PPL(BF16)") > 1.1


def test_a_broken_original_is_refused(model, prompts, quantized, copy_of, cli):
    spoilt = copy_of(model)
    spoil(spoilt, "layers.1.linear_attn.in_proj_a.weight", lambda t: torch.full_like(t, torch.nan))
    result = cli("--input_dir", spoilt, "--output_dir", quantized(model), "--verify_only",
                 "--compare_outputs", "--prompts_file", prompts, *FEW)  # fmt: skip
    assert result.rc == 2
    assert "layers.1: NaN or infinite activations, so the original itself is broken" in result.err


# --- refusals ----------------------------------------------------------------------------------


def _no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def _other_tokenizer(folder: Path) -> None:
    document = json.loads((folder / "tokenizer.json").read_text())
    vocab = document["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (folder / "tokenizer.json").write_text(json.dumps(document))


def _other_model(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_experts_per_tok"] = 3
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (_no_tokenizer, "no tokenizer in it"),
        (_other_tokenizer, "its tokenizer makes other tokens of the prompts"),
        (_other_model, "num_experts_per_tok is 3, but 2 in"),
    ],
)
def test_a_directory_of_another_model_is_refused(model, prompts, quantized, copy_of, cli, change, complaint):
    other = copy_of(quantized(model))
    change(other)
    result = cli("--input_dir", model, "--output_dir", other, "--verify_only", "--compare_outputs",
                 "--prompts_file", prompts)  # fmt: skip
    assert (result.rc, result.out) == (2, ""), "nothing is verified before"
    assert complaint in result.err
    assert result.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--prompts_file", "{tmp}/none.txt"], "none.txt: cannot be read"),
        (["--logits_out", "{tmp}/logits.json"], r"name the file \*\.safetensors"),
        (["--logits_out", "{tmp}/none/logits.safetensors"], "no such directory"),
        (["--logits_out", "{model}/logits.safetensors"], "engines would take it for weights"),
        (["--logits_out", "{tmp}/full.safetensors"], "exists and holds something else"),
        (["--against", "{tmp}/none"], "no such directory"),
        (["--dry_run"], "not allowed with argument --dry_run"),
    ],
)
def test_what_flags_name_is_checked_before_anything_is_written(
    model, prompts, tmp_path, cli, arguments, complaint
):
    (tmp_path / "full.safetensors").write_bytes(b"what somebody needs")
    arguments = [text.format(tmp=tmp_path, model=model) for text in arguments]
    shared = "--input_dir", model, "--output_dir", tmp_path / "out", "--compare_outputs"
    result = cli(*shared, "--prompts_file", prompts, *arguments)
    assert result.rc == 2
    assert re.search(complaint, result.err), result.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full.safetensors"]


def test_a_model_whose_layer_does_not_fit_is_refused(model, prompts, tmp_path, cli, monkeypatch):
    monkeypatch.setattr("fp8lib.model.memory.available", lambda device: 1_000_000)
    result = cli("--input_dir", model, "--output_dir", tmp_path / "out", "--compare_outputs",
                 "--prompts_file", prompts)  # fmt: skip
    assert result.rc == 2
    assert re.search(r"its largest layer takes [\d.]+MB to compare outputs, and 1\.00MB", result.err)


def test_prompts_with_nothing_to_predict_are_refused(model, tmp_path, cli):
    (tmp_path / "one.jsonl").write_text('{"text": "a"}\n{"text": "b"}')
    result = cli("--input_dir", model, "--output_dir", tmp_path / "out", "--compare_outputs",
                 "--prompts_file", tmp_path / "one.jsonl")  # fmt: skip
    assert "no prompt has a second token to predict" in result.err


def test_without_the_flag_its_flags_are_said_to_have_no_effect(model, tmp_path, cli):
    result = cli("--input_dir", model, "--output_dir", tmp_path / "out", "--served", "ue8m0", "--dry_run")
    assert "--served has no effect without --compare_outputs" in result.err


# --- processes ---------------------------------------------------------------------------------


def test_ranks_find_what_one_process_finds(model, prompts, quantized, tmp_path, cli):
    shared = [
        "--input_dir", model, "--output_dir", quantized(model), "--verify_only", "--compare_outputs",
        "--prompts_file", prompts, "--batch_size", 1, "--verify_samples", 1,
    ]  # fmt: skip
    alone = cli(*shared, "--logits_out", tmp_path / "alone.safetensors")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", SCRIPT,
         *map(str, shared), "--logits_out", str(tmp_path / "ranks.safetensors")],
        capture_output=True, encoding="utf-8", timeout=300, cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    assert done.returncode == alone.rc == 0, done.stderr
    one, other = (load_file(tmp_path / f"{name}.safetensors") for name in ("alone", "ranks"))
    assert one.keys() == other.keys()
    for name, values in one.items():
        # The number of threads may move a float32 sum by its last bit.
        torch.testing.assert_close(other[name], values, rtol=1e-4, atol=1e-8, msg=name)
    assert "OUTPUTS COMPARED" in done.stdout
    assert done.stdout.count("OUTPUTS COMPARED") == 1


def test_an_interrupted_comparison_leaves_no_file(model, quantized, prompts, tmp_path):
    long = tmp_path / "long.jsonl"
    long.write_text("\n".join(json.dumps({"text": "abc " * 400}) for _ in range(200)))
    process = subprocess.Popen(
        [sys.executable, SCRIPT, "--input_dir", model, "--output_dir", quantized(model), "--verify_only",
         "--compare_outputs", "--prompts_file", long, "--logits_out", tmp_path / "x.safetensors",
         "--verify_samples", "1"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8",
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    for line in process.stderr:
        if line.startswith("layer"):
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert [p.name for p in tmp_path.iterdir()] == ["long.jsonl"]


def test_help_and_quantizing_load_no_transformers(model, tmp_path, run):
    blocker = tmp_path / "transformers"
    blocker.mkdir()
    (blocker / "__init__.py").write_text("raise SystemExit('transformers was imported')")
    env = {"PYTHONPATH": str(tmp_path)}
    result = run("--input_dir", model, "--output_dir", tmp_path / "out", "--skip_verify", env=env)
    assert result.rc == 0, result.err
    shutil.rmtree(blocker)


MEASURE = """
import pathlib, sys
sys.path[:0] = [{root!r}, {tests!r}]
import torch, transformers
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe
from fp8lib.job import comparing, run
import quantize_fp8
status = pathlib.Path("/proc/self/status")
field = lambda name: int(status.read_text().partition(name + ":")[2].split()[0]) * 1024
before = field("VmRSS")
code = quantize_fp8.main(sys.argv[1:])
print("grew", field("VmHWM") - before, "code", code)
"""


def test_memory_is_one_layer_hidden_states_and_a_slice_of_the_head(tmp_path):
    """A model of 1.4 GB, whose largest layer is 60 MB: what it takes beside the libraries is a part of it."""
    from test_layerwise import write_sparse

    path = tmp_path / "large"
    write_sparse(path, num_hidden_layers=24, num_experts=64, hidden_size=512)
    config = transformers.AutoConfig.from_pretrained(path)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"text": "abcdefgh" * 8}))
    from fp8lib.checkpoint.directory import open_checkpoint

    largest = max(layers.bytes_of_layers(open_checkpoint(path)).values())
    size = (path / "model.safetensors").stat().st_size
    limit = 2 * largest + 300_000_000  # what is read and what it is made of; libraries, logits, the head
    assert size > 3 * limit / 2, "the model must be larger than the limit"
    program = MEASURE.format(root=str(SCRIPT.parent), tests=str(Path(__file__).parent))
    done = subprocess.run(
        [sys.executable, "-c", program, "--input_dir", path, "--output_dir", path.parent / "large",
         "--verify_only", "--compare_outputs", "--prompts_file", prompts, "--quiet", "--verify_samples", "1"],
        capture_output=True, encoding="utf-8", timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert "grew" in done.stdout, done.stderr
    assert config.num_hidden_layers == 24
    grew = int(done.stdout.rpartition("grew ")[2].split()[0])
    assert grew < limit, f"{grew / 1e6:.0f} MB for {size / 1e6:.0f} MB, limit {limit / 1e6:.0f} MB"
