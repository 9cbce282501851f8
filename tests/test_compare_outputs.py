"""`--compare_outputs` from the command line: what is printed, judged, written and refused."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import forked
import forked_ranks
from forked_ranks import Rank
from fp8lib.checkpoint.directory import open_checkpoint
from fp8lib.job import comparing
from fp8lib.outputs import layers
from fp8lib.verification.health import Zone
from test_layerwise import write_sparse

pytestmark = pytest.mark.xdist_group("comparing")  # one server of forks for all
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
    """A figure of the summary, which is in ASCII here: the stream of `cli` has no encoding."""
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
    for label in ("Mean    KLD", "99.9%   KLD", "Median  KLD", "Same top p", "RMS dp", "PPL(FP8)/PPL(BF16)"):
        assert figure(shown[0], label) >= 0, label
    assert re.search(r"^  odd  .*\+/-", shown[0], re.MULTILINE)
    assert "Not run: MTP and the vision tower." in " ".join(shown[0].split())
    results = load_file(tmp_path / "a.safetensors")
    lengths = [21 * n for n in (1, 4, 2, 3)]  # a token per byte, and a space at the end is stripped
    assert [int((results["prompt"] == p).sum()) for p in range(4)] == [n - 1 for n in lengths]
    assert abs(results["kl1"].mean() - figure(shown[0], "Mean    KLD")) < 5e-7
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors", "out"]


def test_two_directories_are_compared_in_pairs(model, prompts, quantized, cli):
    one = quantized(model, "--skip_verify")
    two = quantized(model, "--calib_mode", "percentile", "--calib_percentile", 90, "--skip_verify")
    shared = "--input_dir", model, "--verify_only", "--compare_outputs", "--prompts_file", prompts, *FEW
    result = cli(*shared, "--output_dir", one, "--against", two, "--activations", "bf16")
    pattern = r"mean KLD ([\d.]+) vs ([\d.]+), difference (-[\d.]+) \+/- ([\d.]+)"
    mine, theirs, difference, error = map(float, re.search(pattern, result.out).groups())
    assert abs(mine - theirs - difference) < 2e-6  # three figures rounded to 1e-6
    assert 0 < error < -difference / 2
    assert f"Closer to the original: {one}" in result.out.replace("\n", "")
    same = cli(*shared, "--output_dir", one, "--against", one)
    assert "difference 0.000000 +/- 0.000000" in same.out
    assert "The two say the same." in same.out


def test_nan_in_the_fp8_model_fails_and_its_layer_is_named(model, prompts, quantized, copy_of, cli):
    spoilt = copy_of(quantized(model, "--skip_verify"))
    spoil(spoilt, "layers.1.linear_attn.in_proj_a.weight", lambda t: torch.full_like(t, torch.nan))
    result = cli("--input_dir", model, "--output_dir", spoilt, "--verify_only", "--compare_outputs",
                 "--prompts_file", prompts, *FEW)  # fmt: skip
    assert result.rc == 1
    assert "NaN or infinity behind model.language_model.layers.1" in result.out


def test_a_much_worse_perplexity_is_a_warning(model, prompts, quantized, copy_of, cli):
    spoilt = copy_of(quantized(model, "--skip_verify"))
    spoil(spoilt, "lm_head.weight", lambda t: t * 30)  # certain of what it knows nothing about
    result = cli("--input_dir", model, "--output_dir", spoilt, "--verify_only", "--compare_outputs",
                 "--prompts_file", prompts, *FEW)  # fmt: skip
    assert result.rc == 1  # for the kept tensor that is not the input's
    assert re.search(
        r"Perplexity is [\d.]+ % worse than the original's, over 10 %", " ".join(result.out.split())
    )
    assert figure(result.out, "PPL(FP8)/PPL(BF16)") > 1.1


@pytest.mark.parametrize(
    ("not_finite", "ratio", "zone"),
    [
        (None, 0.9, Zone.GOOD),
        (None, 1.1, Zone.GOOD),
        (None, 1.1001, Zone.WARN),
        (None, math.nan, Zone.WARN),
        ("layers.1", 1.0, Zone.FAIL),
    ],
)
def test_only_a_perplexity_over_10_percent_worse_and_nan_change_the_verdict(not_finite, ratio, zone):
    overall = SimpleNamespace(ppl_ratio=SimpleNamespace(value=ratio))
    found = SimpleNamespace(candidates=[SimpleNamespace(not_finite=not_finite, overall=overall)])
    assert comparing.judge(found)[0] is zone


def test_a_broken_original_is_refused(model, prompts, quantized, copy_of, cli):
    spoilt = copy_of(model)
    spoil(spoilt, "layers.1.linear_attn.in_proj_a.weight", lambda t: torch.full_like(t, torch.nan))
    result = cli("--input_dir", spoilt, "--output_dir", quantized(model, "--skip_verify"), "--verify_only",
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
    other = copy_of(quantized(model, "--skip_verify"))
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


OPTIONS = {
    "command": "quantize_fp8 with transformers",
    "env": {"OMP_NUM_THREADS": "1"},
    "before": "import torch; torch.set_num_threads(1)",
}


def test_ranks_find_what_one_process_finds(model, prompts, quantized, tmp_path):
    shared = [
        "--input_dir", model, "--output_dir", quantized(model, "--skip_verify"), "--verify_only",
        "--compare_outputs", "--prompts_file", prompts, "--batch_size", 1, *FEW,
    ]  # fmt: skip
    alone = forked.run(*shared, "--logits_out", tmp_path / "alone.safetensors", **OPTIONS)
    ranks = forked_ranks.run([Rank()] * 2, *shared, "--logits_out", tmp_path / "ranks.safetensors", **OPTIONS)
    assert [alone.rc, *(rank.rc for rank in ranks)] == [0, 0, 0], alone.err + ranks[0].err
    one, other = ((tmp_path / f"{name}.safetensors").read_bytes() for name in ("alone", "ranks"))
    assert one == other, "with the same number of threads every bit is the same"
    assert [rank.out.count("OUTPUTS COMPARED") for rank in ranks] == [1, 0]
    assert ranks[0].out.partition("OUTPUTS")[2] == alone.out.partition("OUTPUTS")[2]


def test_a_rank_with_other_prompts_is_refused(model, prompts, quantized, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("Something else.")
    ranks = forked_ranks.run(
        [Rank(), Rank(("--prompts_file", other))],
        "--input_dir", model, "--output_dir", quantized(model, "--skip_verify"), "--verify_only",
        "--compare_outputs", "--prompts_file", prompts, *FEW, **OPTIONS,
    )  # fmt: skip
    assert [rank.rc for rank in ranks] == [2, 2]
    assert "rank 1 has another prompts than rank 0" in ranks[0].err


def test_an_interrupted_comparison_leaves_no_file(model, quantized, prompts, tmp_path):
    """Ctrl-C while the second of four layers runs."""
    interrupt = """
import os, signal, torch; torch.set_num_threads(1)
from fp8lib.model.progress import Progress
label = Progress.label
def interrupting(self, text):
    if text == "layer 2/4":
        os.kill(os.getpid(), signal.SIGINT)
    label(self, text)
Progress.label = interrupting
"""
    ended = forked.run(
        "--input_dir", model, "--output_dir", quantized(model, "--skip_verify"), "--verify_only",
        "--compare_outputs", "--prompts_file", prompts, "--logits_out", tmp_path / "x.safetensors", *FEW,
        **{**OPTIONS, "before": interrupt},
    )  # fmt: skip
    assert ended.rc == 130, ended.err
    assert "Traceback" not in ended.err
    assert not list(tmp_path.iterdir())


def test_memory_is_one_layer_hidden_states_and_a_slice_of_the_head(tmp_path):
    """What it takes beside the libraries, of a model several times as large."""
    path = tmp_path / "large"
    write_sparse(path, num_hidden_layers=24, num_experts=64, hidden_size=512)
    largest = max(layers.bytes_of_layers(open_checkpoint(path)).values())
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"text": "abcdefgh" * 8}))
    size = (path / "model.safetensors").stat().st_size
    limit = largest + 200_000_000  # what is read and what it is made of, logits, a slice of the head
    assert size > 4 * limit, "the model must be several times larger than the limit"
    # The original against itself: what is measured is the same, and zeros need no quantizing.
    ended = forked.run(
        "--input_dir", path, "--output_dir", path, "--verify_only", "--compare_outputs",
        "--prompts_file", prompts, *FEW, **OPTIONS,
    )  # fmt: skip
    assert "Mean    KLD         : 0.000000 ± n/a (one prompt)" in ended.out, ended.err
    assert ended.grown < limit, f"{ended.grown / 1e6:.0f} MB of {size / 1e6:.0f}, limit {limit / 1e6:.0f}"
