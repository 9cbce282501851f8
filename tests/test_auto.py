"""`--eligibility auto`, `--keep_failing`: what would FAIL is known before anything is written, and kept."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import forked
import forked_ranks
from forked import At
from forked_ranks import Rank
from fp8lib.checkpoint.directory import open_checkpoint
from fp8lib.checkpoint.plan import make_plan
from fp8lib.checkpoint.rules import Selection
from fp8lib.job import trying
from fp8lib.verification import trial
from tiny_checkpoints import logits, mean_kl, tensors

MANIFEST = "fp8_quantization.json"
LAYER = "model.language_model.layers"
FAILING = {f"{LAYER}.3.self_attn.qkv_proj", f"{LAYER}.1.mlp.experts", f"{LAYER}.0.linear_attn.out_proj"}
"""Groups of what `source` spoils: a q_proj, one expert, and a module that only `official` quantizes."""
OUTLIER = 1000.0
"""E4M3 has 960 and 1024 and nothing between, times any power of two: an error of 24, which FAILs."""


@pytest.fixture(scope="module")
def source(checkpoint: Callable, once: Callable) -> Path:
    """A mixture of experts of which one q_proj, one expert of 8 and one out_proj would FAIL."""
    healthy = checkpoint("moe", shards=3, num_experts_per_tok=8)

    def spoil(folder: Path) -> None:
        for file in healthy.iterdir():
            if file.suffix != ".safetensors":
                (folder / file.name).write_bytes(file.read_bytes())
                continue
            state = load_file(file)
            for name, index in (
                (f"{LAYER}.3.self_attn.q_proj.weight", (3, 5)),
                (f"{LAYER}.1.mlp.experts.gate_up_proj", (2, 7, 9)),
                (f"{LAYER}.0.linear_attn.out_proj.weight", (1, 1)),
            ):
                if name in state:
                    state[name][index] = OUTLIER
            save_file(state, folder / file.name, metadata={"format": "pt"})

    return once("spoiled", "one q_proj, one expert, one out_proj", spoil)


@pytest.fixture(scope="module")
def chosen(source: Path, quantized: Callable) -> Path:
    """The output of `--eligibility auto`."""
    return quantized(source, "--eligibility", "auto", "--verify_samples", "all")


@pytest.fixture(scope="module")
def official(source: Path, once: Callable, cli: Callable) -> Path:
    """The output of `--eligibility official`, a FAIL."""

    def quantize(folder: Path) -> None:
        arguments = "--output_dir", folder / "out", "--eligibility", "official", "--verify_samples", "all"
        assert cli("--input_dir", source, *arguments).rc == 1

    return once("official", str(source), quantize) / "out"


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def kept_groups(folder: Path) -> dict[str, str]:
    return json.loads((folder / MANIFEST).read_text())["settings"]["kept_groups"]


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of shards of which weights were quantized in memory."""
    found: list[str] = []
    tasks = trial.Trial.tasks
    monkeypatch.setattr(
        trial.Trial, "tasks", lambda self, *rest: found.append(self.shard.name) or tasks(self, *rest)
    )
    return found


def test_auto_keeps_whole_groups_of_what_would_fail_and_transformers_loads_the_rest(
    source: Path, chosen: Path, official: Path
) -> None:
    assert kept_groups(chosen).keys() == FAILING
    found, original = tensors(chosen), tensors(source)
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
        assert found[f"{LAYER}.3.{name}.weight"].dtype == torch.bfloat16
    # All experts of the layer stay in one tensor, as in the input.
    experts = f"{LAYER}.1.mlp.experts.gate_up_proj"
    assert torch.equal(found[experts], original[experts])
    assert f"{experts}.1" not in found
    # One kept group costs no other: the same layer's others are FP8, those of `official` among them.
    for name in ("3.self_attn.o_proj", "1.mlp.shared_expert.up_proj", "1.linear_attn.out_proj"):
        assert found[f"{LAYER}.{name}.weight"].dtype == torch.float8_e4m3fn
    tokens = torch.arange(24).view(2, 12)
    reference = logits(source, tokens)
    kl = mean_kl(reference, logits(chosen, tokens)), mean_kl(reference, logits(official, tokens))
    assert kl[0] < kl[1], "what is kept has no error any more"


def test_the_summary_and_the_verdict_follow(
    source: Path, official: Path, tmp_path: Path, cli: Callable
) -> None:
    arguments = "--input_dir", source, "--verify_samples", "all"
    done = cli(*arguments, "--output_dir", tmp_path / "auto", "--eligibility", "auto")
    assert done.rc == 0, done.err
    assert "in memory first, to see which would FAIL" in done.err
    assert "Kept, would FAIL    : 3 groups" in done.out
    for group in FAILING:
        assert f"    {group}\n" in done.out
    # The figure is the one that the FAILed run measured.
    failing = f"{LAYER}.3.self_attn.q_proj.weight"
    [line] = [line for line in kept_groups(tmp_path / "auto").values() if failing in line]
    shards = json.loads((official / MANIFEST).read_text())["shards"].values()
    [measured] = [m for shard in shards for m in shard["measurements"] if m["name"] == failing]
    assert any(
        f"{measured[metric]:.4g}" in line for metric in ("max_abs", "zero_share") if metric in measured
    )


def test_keep_failing_does_the_same_for_the_set_in_force(source: Path, tmp_path: Path, cli: Callable) -> None:
    keep = "--keep_bf16", "*.layers.3.*"  # named, so it is not even tried
    result = cli("--input_dir", source, "--output_dir", tmp_path / "out", "--keep_failing", *keep)
    assert result.rc == 0, result.err
    assert kept_groups(tmp_path / "out").keys() == {f"{LAYER}.1.mlp.experts"}
    assert tensors(tmp_path / "out")[f"{LAYER}.1.linear_attn.out_proj.weight"].dtype == torch.bfloat16


def test_ranks_share_the_pass_and_write_the_same_bytes(source: Path, chosen: Path, tmp_path: Path) -> None:
    ended = forked_ranks.run(
        [Rank()] * 2, "--input_dir", source, "--output_dir", tmp_path / "out", "--eligibility", "auto",
        "--verify_samples", "all",
    )  # fmt: skip
    assert [each.rc for each in ended] == [0, 0], ended[0].err + ended[1].err
    assert tree(tmp_path / "out") == tree(chosen)


def test_ranks_take_parts_of_shards_that_hold_every_matrix_once(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trying, "_SMALLEST_UNIT", 1)
    plan = make_plan(open_checkpoint(source), Selection("auto"))
    units = trying._units(plan, ranks=4)
    assert [m for _, _, part in units for m in part] == list(plan.matrices)
    assert len({label for label, _, _ in units}) == len(units) > 3 * len(plan.shards)
    # 4 ranks x 20, and a unit ends with a whole matrix, of which none is larger than the largest.
    total, largest = (f(m.rows * m.columns for m in plan.matrices) for f in (sum, max))
    assert max(sum(m.rows * m.columns for m in part) for _, _, part in units) <= total / 80 + largest


def test_a_rank_with_another_set_is_refused_before_the_pass(source: Path, tmp_path: Path) -> None:
    ended = forked_ranks.run(
        [Rank(), Rank(("--calib_mode", "mse"))], "--input_dir", source, "--output_dir", tmp_path / "out",
        "--keep_failing", "--quiet",
    )  # fmt: skip
    assert [each.rc for each in ended] == [2, 2]
    assert "rank 1 has other calibration than rank 0" in ended[0].err + ended[1].err
    assert not list(tmp_path.glob("out/*.safetensors"))


def test_a_killed_run_is_continued_without_another_pass(
    source: Path, chosen: Path, tmp_path: Path, cli: Callable, tried: list[str]
) -> None:
    output = tmp_path / "out"
    arguments = "--input_dir", source, "--output_dir", output, "--verify_samples", "all"
    killed = forked.run(*arguments, "--eligibility", "auto", at=At("rename", 1, "00002-of-00003.safetensors"))
    assert killed.rc < 0
    assert kept_groups(output).keys() == FAILING, "known from the first shard on"
    for flags, complaint in (
        (("--eligibility", "official"), "begun with eligibility auto, now official"),
        (("--eligibility", "auto", "--calib_mode", "mse"), "begun with calibration rms(k=3), ue8m0, now mse"),
    ):
        refused = cli(*arguments, *flags)
        assert refused.rc == 2
        assert complaint in refused.err
    again = cli(*arguments, "--eligibility", "auto")
    assert again.rc == 0, again.err
    assert tree(output) == tree(chosen)
    assert tried == [], "neither a refusal nor the rest of the run tries anything again"


def test_a_manifest_without_the_decision_is_not_continued(
    source: Path, chosen: Path, tmp_path: Path, cli: Callable, copy_of: Callable, tried: list[str]
) -> None:
    output = copy_of(chosen)
    document = json.loads((output / MANIFEST).read_text())
    document["settings"]["kept_groups"] = {"a": 1}
    (output / MANIFEST).write_text(json.dumps(document))
    refused = cli("--input_dir", source, "--output_dir", output, "--eligibility", "auto")
    assert refused.rc == 2
    assert "begun with kept_groups" in refused.err
    assert tried == []


def test_what_adapters_make_of_weights_is_tried(checkpoint: Callable, tmp_path: Path, cli: Callable) -> None:
    source, name = checkpoint("text", mtp=False, num_hidden_layers=1), "model.layers.0.mlp.down_proj"
    a, b = torch.zeros(1, 512), torch.zeros(256, 1)
    a[0, 3], b[5, 0] = OUTLIER, 1.0  # together they add it to one weight
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    factors = {f"base_model.model.{name}.lora_{x}.weight": t for x, t in (("A", a), ("B", b))}
    save_file(factors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["down_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    for flags, kept in (((), set()), (("--lora_dir", adapter), {name})):
        output = tmp_path / f"out{len(flags)}"
        result = cli("--input_dir", source, "--output_dir", output, "--keep_failing", *flags)
        assert result.rc == 0, result.err
        assert kept_groups(output).keys() == kept
    assert tensors(output)[f"{name}.weight"][5, 3] == OUTLIER, "merged, and kept in BF16"


def test_a_dry_run_reads_headers_alone_and_says_what_a_run_would_read(
    source: Path, cli: Callable, tried: list[str]
) -> None:
    result = cli("--input_dir", source, "--dry_run", "--eligibility", "auto")
    assert result.rc == 0, result.err
    assert "in memory first; groups of which a weight would FAIL" in " ".join(result.out.split())
    assert tried == []


def test_a_healthy_model_is_quantized_as_the_official_set(
    checkpoint: Callable, quantized: Callable, tmp_path: Path, cli: Callable
) -> None:
    healthy = checkpoint("dense")
    auto = cli("--input_dir", healthy, "--output_dir", tmp_path / "out", "--eligibility", "auto")
    assert auto.rc == 0, auto.err
    assert "Kept, would FAIL" not in auto.out
    found, expected = tree(tmp_path / "out"), tree(quantized(healthy, "--eligibility", "official"))
    assert {n for n in found if found[n] != expected[n]} == {MANIFEST}


def test_refusals_before_and_after_the_pass(
    checkpoint: Callable, copy_of: Callable, tmp_path: Path, cli: Callable, tried: list[str]
) -> None:
    arguments = "--output_dir", tmp_path / "out", "--eligibility", "auto"
    folder = copy_of(checkpoint("text", mtp=False, num_hidden_layers=4))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    foreign = cli("--input_dir", folder, "--output_dir", tmp_path / "full", "--keep_failing")
    assert (foreign.rc, tried) == (2, []), "the output directory is looked at first"
    assert "mine.txt was not written by this tool" in foreign.err

    file = folder / "model.safetensors"
    state = load_file(file)
    broken = dict(
        state, **{"model.layers.3.self_attn.k_proj.weight": torch.full((256, 256), math.nan).bfloat16()}
    )
    save_file(broken, file, metadata={"format": "pt"})
    result = cli("--input_dir", folder, *arguments)
    assert result.rc == 2
    assert "NaN or infinity in model.layers.3.self_attn.k_proj.weight; repair the input" in result.err
    assert not (tmp_path / "out").exists(), "nothing is made before the pass has ended"

    # Every group of a layer is spoiled, and so is everything.
    for name, tensor in state.items():
        if tensor.dim() == 2 and ".layers." in name:
            tensor[0, 0] = OUTLIER
    save_file(state, file, metadata={"format": "pt"})
    result = cli("--input_dir", folder, *arguments)
    assert result.rc == 2
    assert "every weight would FAIL with rms(k=3), ue8m0" in result.err
