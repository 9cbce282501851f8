"""Which tensors: the two sets, `--keep_bf16` and `--quantize`, whole fusion groups, resuming, statistics."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

import collect_activation_stats
from fp8lib.calibration.statistics_file import Statistics
from fp8lib.checkpoint.directory import open_checkpoint
from fp8lib.checkpoint.plan import Plan, make_plan
from fp8lib.checkpoint.rules import Selection
from tiny_checkpoints import build, logits, mean_kl, tensors

LAYER = "model.language_model.layers"
SMALL = {"std": 0.015}
"""Smaller weights than the builder's, so that mean KL tells right from wrong: see tests/test_layouts.py."""


def planned(folder: Path, *arguments: object, **selection: object) -> Plan:
    return make_plan(open_checkpoint(folder), Selection(*arguments, **selection))


def fp8(folder: Path, **selection: object) -> set[str]:
    """Names of the modules that become FP8."""
    return {m.weight.name.removesuffix(".weight") for m in planned(folder, **selection).matrices}


def listed(output: Path) -> list[str]:
    config = json.loads((output / "config.json").read_text())
    return config["quantization_config"]["modules_to_not_convert"]


# --- the sets ----------------------------------------------------------------------------------


def test_official_adds_out_proj_and_shared_experts_and_nothing_else(checkpoint: Callable) -> None:
    source = checkpoint("moe")
    projections = [f"mlp.shared_expert.{p}_proj" for p in ("gate", "up", "down")]
    layers = [*(f"{LAYER}.{i}" for i in range(4)), "mtp.layers.0"]
    shared = [f"{layer}.{projection}" for layer in layers for projection in projections]
    out = [f"{LAYER}.{i}.linear_attn.out_proj" for i in range(3)]  # layer 3 and mtp's have full attention
    assert fp8(source, eligibility="official") - fp8(source) == {*shared, *out}
    assert fp8(source) < fp8(source, eligibility="official")


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [("moe", {"num_experts_per_tok": 8}), ("moe", {"num_experts_per_tok": 8, "experts": "per_expert"}),
     ("dense", {}), ("moe_text", {"num_experts_per_tok": 8}), ("text", {"tied": True})],
    ids=["moe", "moe, per expert", "dense", "moe text", "text, tied"],
)  # fmt: skip
def test_transformers_loads_the_official_set(
    kind: str, arguments: dict, checkpoint: Callable, quantized: Callable
) -> None:
    source = checkpoint(kind, **SMALL, **arguments)
    output = quantized(source, "--eligibility", "official")
    codes = {name for name, t in tensors(output).items() if t.dtype == torch.float8_e4m3fn}
    assert {n.removesuffix(".weight") for n in codes} == fp8(source, eligibility="official")
    assert not any("out_proj" in n or ".shared_expert." in n for n in listed(output))
    tokens = torch.randint(0, 256, (2, 64), generator=torch.Generator().manual_seed(0))
    # `logits` asserts that no tensor is missing and none unexpected. Bound: as in tests/test_layouts.py.
    assert mean_kl(logits(source, tokens), logits(output, tokens)) < 2e-3


def test_reasons_say_what_the_releases_do(checkpoint: Callable) -> None:
    kept = {k.tensor.name: k.reason for k in planned(checkpoint("moe")).kept}
    followed = (
        "FP8 in the official releases; kept, because the toolkit that this tool follows measured large "
        "absolute errors in it on fine-tunes"
    )
    assert kept[f"{LAYER}.0.linear_attn.out_proj.weight"] == f"linear attention output: {followed}"
    assert kept[f"{LAYER}.0.mlp.shared_expert.up_proj.weight"] == f"shared expert: {followed}"
    official = {k.tensor.name for k in planned(checkpoint("moe"), "official").kept}
    assert f"{LAYER}.0.mlp.shared_expert_gate.weight" in official & kept.keys()


# --- patterns ----------------------------------------------------------------------------------


def test_naming_one_member_keeps_the_whole_group_and_says_so(
    checkpoint: Callable, cli: Callable, tmp_path: Path
) -> None:
    source = checkpoint("moe")
    flags = ("--keep_bf16", f"{LAYER}.1.mlp.experts.3.up_proj", "--keep_bf16", f"{LAYER}.3.*.q_proj")
    result = cli("--input_dir", source, "--output_dir", tmp_path / "out", *flags)
    assert result.rc == 0, result.err
    gone = fp8(source) - {n.removesuffix(".weight") for n, t in tensors(tmp_path / "out").items()
                          if t.dtype == torch.float8_e4m3fn}  # fmt: skip
    experts = {f"{LAYER}.1.mlp.experts.{e}.{p}_proj" for e in range(8) for p in ("gate", "up", "down")}
    assert gone == experts | {f"{LAYER}.3.self_attn.{p}_proj" for p in "qkv"}
    assert (
        f"--keep_bf16 '{LAYER}.3.*.q_proj' takes 1 fusion groups whole, such as {LAYER}.3.self_attn.qkv_proj"
        in result.err
    )
    assert f"{LAYER}.1.mlp.experts: engines load each as one" in result.err
    # Kept experts stay in the input's layout, and are listed as their layer's, not one by one.
    assert f"{LAYER}.1.mlp.experts.gate_up_proj" in tensors(tmp_path / "out")
    assert [n for n in listed(tmp_path / "out") if ".experts" in n] == [f"{LAYER}.1.mlp.experts"]


def test_kept_experts_of_a_layout_per_expert_are_listed_as_their_layers(checkpoint: Callable) -> None:
    plan = planned(checkpoint("moe", experts="per_expert"), keep=("*.1.mlp.experts.*",))
    assert [n for n in plan.modules_to_not_convert if ".experts" in n] == [f"{LAYER}.1.mlp.experts"]


def test_a_group_may_be_named_as_engines_call_it(checkpoint: Callable) -> None:
    source = checkpoint("dense")
    gone = fp8(source) - fp8(source, keep=("*.layers.3.self_attn.qkv_proj",))
    assert gone == {f"{LAYER}.3.self_attn.{p}_proj" for p in "qkv"}
    assert planned(source, keep=("*.layers.3.self_attn.qkv_proj",)).notes == ()


def test_quantize_adds_groups_of_the_official_set(checkpoint: Callable) -> None:
    source = checkpoint("moe")
    plan = planned(source, quantize=("*.2.mlp.shared_expert.gate_proj", "*.2.linear_attn.*"))
    more = {m.weight.name.removesuffix(".weight") for m in plan.matrices} - fp8(source)
    shared = {f"{LAYER}.2.mlp.shared_expert.{p}_proj" for p in ("gate", "up")}
    assert more == {*shared, f"{LAYER}.2.linear_attn.out_proj"}
    assert any("*.2.mlp.shared_expert.gate_proj" in note for note in plan.notes)
    assert not any("linear_attn" in note for note in plan.notes)  # a group of one


def test_keep_wins_over_quantize(checkpoint: Callable) -> None:
    source = checkpoint("dense")
    both = {"quantize": ("*.out_proj",), "keep": ("*.layers.0.*",)}
    assert {n for n in fp8(source, **both) if "out_proj" in n} == {
        f"{LAYER}.{i}.linear_attn.out_proj" for i in (1, 2)
    }


def test_what_is_kept_anyway_is_said_to_be(checkpoint: Callable) -> None:
    (note,) = planned(checkpoint("dense"), keep=("lm_head",)).notes
    assert note == "--keep_bf16 'lm_head' names only what is kept anyway"


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--keep_bf16", "*.layer.0.*"), "--keep_bf16 '*.layer.0.*': matches no module; names look like"),
        (("--quantize", "layers.0.*"), "matches no module"),
        (("--quantize", "lm_head"), "lm_head can never be quantized (output head"),
        (("--quantize", "*.embed_tokens"), "can never be quantized (embedding"),
        (("--quantize", "*.input_layernorm"), "can never be quantized (norm"),
        (("--quantize", "*.mlp.gate"), "can never be quantized (router"),
        (("--quantize", "model.visual.*"), "can never be quantized (vision tower"),
        (("--quantize", "*.in_proj_a"), "can never be quantized (decay and write gates"),
        (("--keep_bf16", "*"), "no weight in it can be quantized"),
        (("--eligibility", "all"), "invalid choice"),
    ],
)  # fmt: skip
def test_a_pattern_that_does_nothing_or_too_much_is_refused(
    flags: tuple, complaint: str, checkpoint: Callable, cli: Callable, tmp_path: Path
) -> None:
    result = cli("--input_dir", checkpoint("moe"), "--output_dir", tmp_path / "out", *flags)
    assert result.rc == 2
    assert complaint in result.err
    assert result.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_quantize_refuses_what_engines_cannot_serve(checkpoint: Callable, cli: Callable) -> None:
    source = checkpoint("moe", shared_expert_intermediate_size=64)
    result = cli("--input_dir", source, "--dry_run", "--quantize", "*.shared_expert.*")
    assert result.rc == 2
    assert "cannot be served in FP8 (a dimension under 128)" in result.err
    dry = cli("--input_dir", source, "--dry_run", "--eligibility", "official")
    assert dry.rc == 0
    assert "a dimension under 128" in dry.out


def test_groups_can_be_kept_for_a_reason_found_elsewhere(checkpoint: Callable) -> None:
    group = f"{LAYER}.2.mlp.experts"
    plan = planned(checkpoint("moe"), "official", kept_groups=((group, "cosine 0.98"),))
    assert {k.reason for k in plan.kept if k.tensor.name.startswith(group)} == {"cosine 0.98"}
    assert group in plan.modules_to_not_convert


def test_the_draft_layer_of_a_text_only_checkpoint_is_kept_with_layer_0(checkpoint: Callable) -> None:
    """SGLang takes `model.layers.0.mlp.X` in the list for `mtp.layers.0.mlp.X` too."""
    source = checkpoint("moe_text")
    plan = planned(source, keep=("model.layers.0.mlp.experts.*",))
    kept = {k.tensor.name for k in plan.kept if ".experts." in k.tensor.name}
    assert {name.partition("layers.0")[0] for name in kept} == {"model.", "mtp."}
    assert any(note.startswith("mtp.layers.0.mlp.experts is kept too: SGLang") for note in plan.notes)
    # A vision-language checkpoint has longer names, and layer 1 no namesake.
    assert (
        "mtp.layers.0.mlp.experts"
        not in planned(
            checkpoint("moe"), keep=("*.language_model.layers.0.mlp.experts.*",)
        ).modules_to_not_convert
    )
    assert planned(source, keep=("model.layers.1.mlp.experts.*",)).notes == ()


# --- resuming ----------------------------------------------------------------------------------


def test_a_run_with_another_set_does_not_continue(
    checkpoint: Callable, quantized: Callable, copy_of: Callable, cli: Callable
) -> None:
    source = checkpoint("dense", shards=3)
    output = copy_of(quantized(source, "--keep_bf16", "*.layers.0.*", "--keep_bf16", "*.layers.1.*"))
    (output / "config.json").unlink()
    same = ("--input_dir", source, "--output_dir", output)
    for flags, complaint in (
        (("--eligibility", "official"), "begun with eligibility toolkit, now official"),
        (("--keep_bf16", "*.layers.0.*"), "begun with keep_bf16 ['*.layers.0.*', '*.layers.1.*']"),
        (("--keep_bf16", "*.layers.[01].*", "--quantize", "*.out_proj"), "begun with keep_bf16"),
    ):
        result = cli(*same, *flags)
        assert result.rc == 2
        assert complaint in result.err
    again = cli(*same, "--keep_bf16", "*.layers.1.*", "--keep_bf16", "*.layers.0.*")  # the order is nothing
    assert again.rc == 0, again.err


# --- statistics --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def statistics(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(checkpoint, statistics file collected from it)."""
    folder = tmp_path_factory.mktemp("statistics")
    build(folder / "in", "moe", tokenizer=True, num_hidden_layers=4)
    (folder / "prompts.txt").write_text("The quick brown fox jumps over the lazy dog.\n")
    arguments = ["--model_dir", folder / "in", "--output", folder / "stats.safetensors", "--quiet"]
    arguments += ["--prompts_file", folder / "prompts.txt", "--layerwise"]
    assert collect_activation_stats.main(list(map(str, arguments))) == 0
    return folder / "in", folder / "stats.safetensors"


def test_one_file_of_statistics_serves_both_sets(statistics: tuple[Path, Path]) -> None:
    source, file = statistics
    for eligibility in ("toolkit", "official"):
        found = Statistics(file)
        for matrix in planned(source, eligibility).matrices:
            if not matrix.weight.name.startswith("mtp."):  # transformers does not load it
                assert found.importance(matrix.weight.name, matrix.columns) is not None, matrix.weight.name


def test_shared_experts_see_what_the_router_sees(statistics: tuple[Path, Path]) -> None:
    """Every token passes through the shared expert, so its input is that of all experts together."""
    _, file = statistics
    with safe_open(file, "np") as entries:
        shared = f"{LAYER}.1.mlp.shared_expert"
        gate = entries.get_tensor(f"{shared}.gate_proj.weight.input_channel_mean_square")
        up = entries.get_tensor(f"{shared}.up_proj.weight.input_channel_mean_square")
        down = entries.get_tensor(f"{shared}.down_proj.weight.input_channel_mean_square")
    assert np.array_equal(gate, up)
    assert (gate.shape, down.shape) == ((256,), (128,))  # hidden size, shared_expert_intermediate_size


def test_statistics_of_before_still_serve(
    statistics: tuple[Path, Path], cli: Callable, tmp_path: Path
) -> None:
    """Files that were collected for the toolkit's set alone: what they lack is quantized without."""
    source, file = statistics
    from safetensors.numpy import load_file, save_file

    arrays = load_file(file)
    old = {n: a for n, a in arrays.items() if "out_proj" not in n and ".shared_expert." not in n}
    assert len(old) < len(arrays)
    save_file(old, tmp_path / "old.safetensors")
    flags = (
        "--calib_mode",
        "mse",
        "--activation_stats",
        tmp_path / "old.safetensors",
        "--verify_samples",
        "1",
    )
    for eligibility in ("toolkit", "official"):
        output = tmp_path / eligibility
        result = cli("--input_dir", source, "--output_dir", output, "--eligibility", eligibility, *flags)
        assert result.rc == 0, result.err
        total = sum(1 for _ in planned(source, eligibility).matrices)
        # 8 x 3 + 4 weights of mtp; in the official set 3 out_proj and 5 x 3 of shared experts too.
        missing = 28 + (18 if eligibility == "official" else 0)
        assert f"{missing} of {total} tensors have no activation statistics" in result.err
