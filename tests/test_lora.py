"""`--lora_dir`: quantizing with adapters gives what quantizing PEFT's own merged model gives, bit for bit."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import forked
import forked_ranks
import peft_adapters
import tiny_checkpoints
from forked import At
from forked_ranks import Rank
from fp8lib.calibration.second_moments_file import inputs_of, pack
from fp8lib.calibration.second_moments_writer import SecondMomentsWriter
from fp8lib.checkpoint.adapters import open_adapters
from fp8lib.checkpoint.directory import open_checkpoint
from fp8lib.checkpoint.layout import ShardPlan
from fp8lib.checkpoint.merged_plan import with_adapters
from fp8lib.checkpoint.plan import make_plan
from fp8lib.numerics.modes import Calibration
from fp8lib.streaming import shard_job
from fp8lib.streaming.convert import Nearest
from fp8lib.streaming.merging import AdapterMerge
from fp8lib.streaming.pipeline import process
from fp8lib.streaming.shard_job import Settings
from fp8lib.streaming.units import divide
from fp8lib.verification.claim import Claim
from fp8lib.verification.pairing import planned_pairs
from fp8lib.verification.restored import planned_restored
from fp8lib.verification.shard_check import ShardCheck
from pretended_device import PretendedCuda
from test_second_order import moments as correlated

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
MANIFEST, CONFIG = "fp8_quantization.json", "config.json"

CASES = {
    # A vision-language model. Embedding, head, vision tower, a rank and an alpha of its own; then a second
    # adapter over the first, in BF16, with modules that replace, two of them neither matrix nor FP8.
    "dense": (
        {"kind": "dense"},
        [
            {
                "target_modules": ["q_proj", "in_proj_qkv", "gate_proj", "out_proj", "in_proj_a", "lm_head",
                                   "embed_tokens", "qkv"],
                "r": 8, "lora_alpha": 16, "rank_pattern": {"q_proj": 4},
                "alpha_pattern": {"layers.1.mlp.gate_proj": 5},
            },
            {
                "target_modules": ["q_proj", "up_proj"], "modules_to_save": ["norm", "conv1d", "k_proj"],
                "r": 4, "lora_alpha": 3, "use_rslora": True, "dtype": torch.bfloat16,
            },
        ],
        None,
    ),
    # Fused experts and the router, which PEFT wraps as parameters; then gate_up_proj alone, at another rank.
    "fused experts": (
        {"kind": "moe"},
        [
            {
                "target_modules": ["q_proj", "shared_expert_gate", "shared_expert.gate_proj"], "r": 4,
                "target_parameters": [*EXPERTS, "mlp.gate.weight"], "lora_alpha": 16,
            },
            {
                "target_modules": [], "target_parameters": EXPERTS[:1], "r": 2, "lora_alpha": 16,
                "rank_pattern": {"experts.gate_up_proj": 3},
            },
        ],
        None,
    ),
    # Trained as a text model on a vision-language checkpoint whose experts lie one by one.
    "text class, single experts": (
        {"kind": "moe", "experts": "per_expert", "num_hidden_layers": 1},
        [{"target_modules": "all-linear", "target_parameters": EXPERTS, "r": 4, "lora_alpha": 16}],
        "Qwen3_5MoeForCausalLM",
    ),
}  # fmt: skip


def bits(folder: Path) -> dict[str, tuple]:
    """Every tensor of a directory as something that `==` compares bit for bit."""
    return {
        name.replace("model.language_model.", "model."): (
            t.dtype,
            t.shape,
            t.view(torch.uint8).numpy().tobytes(),
        )
        for name, t in ((n, t.contiguous()) for n, t in tiny_checkpoints.tensors(folder).items())
    }


def lora(adapters: list[Path]) -> list[object]:
    return [argument for adapter in adapters for argument in ("--lora_dir", adapter)]


@pytest.fixture(scope="module")
def adapted(checkpoint: Callable, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple]:
    """`adapted(case)`: base, adapters, class they were trained as."""
    made: dict[str, tuple] = {}

    def make(case: str) -> tuple:
        if case not in made:
            arguments, settings, auto = CASES[case]
            base = checkpoint(**arguments, mtp=False)
            folder = tmp_path_factory.mktemp("adapters")
            made[case] = base, [
                peft_adapters.make(base, folder / str(i), auto=auto, seed=i, **each)
                for i, each in enumerate(settings)
            ], auto  # fmt: skip
        return made[case]

    return make


@pytest.fixture(scope="module")
def merged(adapted: Callable, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`merged(case)`: what PEFT makes of base and adapters."""
    made: dict[str, Path] = {}

    def make(case: str) -> Path:
        if case not in made:
            base, adapters, auto = adapted(case)
            fused = CASES[case][0].get("experts") != "per_expert"
            folder = tmp_path_factory.mktemp("merged")
            made[case] = peft_adapters.merge(base, adapters, folder, auto=auto, fused=fused)
        return made[case]

    return make


@pytest.mark.parametrize("case", CASES)
def test_the_output_is_that_of_the_model_that_peft_merged(
    case: str, adapted: Callable, merged: Callable, quantized: Callable
) -> None:
    base, adapters, auto = adapted(case)
    expected, found = bits(quantized(merged(case))), bits(quantized(base, *lora(adapters)))
    plain = bits(quantized(base))
    if auto is None:
        assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    # And it is not simply the base: every adapter tensor stands for a weight that has changed.
    changed = {name for name in plain if plain[name] != found[name]}
    assert len(changed) > 20
    assert all(plain[name] == found[name] for name in found.keys() - expected.keys())


def test_experts_that_an_adapter_names_one_by_one_are_merged_as_linear_layers(
    checkpoint: Callable, quantized: Callable, tmp_path: Path
) -> None:
    base = checkpoint("moe", mtp=False, num_hidden_layers=1)
    weights = tiny_checkpoints.tensors(quantized(base, "--calib_mode", "max"))
    fused = tiny_checkpoints.tensors(base)
    experts = "model.language_model.layers.0.mlp.experts"

    def model() -> torch.nn.Module:
        root = torch.nn.Module()
        for e in (1, 6):
            gate, up = fused[f"{experts}.gate_up_proj"][e].chunk(2)
            for part, weight in {
                "gate_proj": gate,
                "up_proj": up,
                "down_proj": fused[f"{experts}.down_proj"][e],
            }.items():
                parent = root
                for step in f"{experts}.{e}".split("."):
                    if not hasattr(parent, step):
                        parent.add_module(step, torch.nn.Module())
                    parent = getattr(parent, step)
                linear = torch.nn.Linear(*weight.shape[::-1], bias=False, dtype=torch.bfloat16)
                linear.weight.data = weight.clone()
                parent.add_module(part, linear)
        return root

    targets = ["gate_proj", "up_proj", "down_proj"]
    adapter = peft_adapters.make(model(), tmp_path / "adapter", target_modules=targets, r=4, lora_alpha=7)
    merged = peft.PeftModel.from_pretrained(model(), adapter).merge_and_unload()
    for name, weight in merged.state_dict().items():  # the same experts of the base, now changed
        e, part, _ = name.removeprefix(f"{experts}.").split(".")
        rows = {"gate_proj": slice(0, 128), "up_proj": slice(128, 256)}.get(part)
        if rows:
            fused[f"{experts}.gate_up_proj"][int(e), rows] = weight
        else:
            fused[f"{experts}.down_proj"][int(e)] = weight
    copy = shutil.copytree(base, tmp_path / "copy")
    save_file(fused, copy / "model.safetensors", metadata={"format": "pt"})
    expected = bits(quantized(copy, "--calib_mode", "max"))
    found = bits(quantized(base, "--calib_mode", "max", "--lora_dir", adapter))
    assert found == expected
    assert found != bits(quantized(base, "--calib_mode", "max"))
    assert weights.keys() == tiny_checkpoints.tensors(quantized(copy, "--calib_mode", "max")).keys()


def test_what_is_merged_can_be_rounded_by_second_moments(
    adapted: Callable, merged: Callable, quantized: Callable, tmp_path: Path
) -> None:
    base, adapters, _ = adapted("dense")
    moments = tmp_path / "some.second_moments.safetensors"
    plan = make_plan(open_checkpoint(base))
    inputs = inputs_of((m.weight.name, m.columns) for m in plan.matrices)
    with SecondMomentsWriter(moments, inputs, {}) as writer:
        for seed, each in enumerate(inputs):
            writer.add(each.name, each.channels, pack(correlated(each.channels, seed).numpy()), 600)
        writer.commit()
    flags = ("--rounding", "second_order", "--second_moments", moments, "--verify_samples", "all")
    found, expected = (quantized(base, *lora(adapters), *flags), quantized(merged("dense"), *flags))
    assert bits(found) == bits(expected)
    assert bits(found) != bits(quantized(base, *lora(adapters)))
    # Judged by the outputs of the merged weights, too: with those of the base no rounding is repeated.
    shards = [json.loads((f / MANIFEST).read_text())["shards"] for f in (found, expected)]
    assert [s["measurements"] for s in shards[0].values()] == [s["measurements"] for s in shards[1].values()]


def test_outputs_are_not_compared_with_a_base_that_is_not_the_merged_model(
    adapted: Callable, cli: Callable, tmp_path: Path
) -> None:
    base, adapters, _ = adapted("dense")
    result = cli("--input_dir", base, "--output_dir", tmp_path / "out", *lora(adapters), "--compare_outputs")
    assert (result.rc, result.out) == (2, "")
    assert "--compare_outputs: not allowed with argument --lora_dir" in result.err


# --- one run after another, and cut another way ---------------------------------------------------


def test_a_device_with_batches_and_readers_merges_the_same_bytes(
    adapted: Callable, quantized: Callable, tmp_path: Path
) -> None:
    """Small matrices go to the device together: each is merged by its own name, from its own first row."""
    base, adapters, _ = adapted("fused experts")
    checkpoint = open_checkpoint(base)
    merging = open_adapters(adapters, checkpoint)
    plan = with_adapters(make_plan(checkpoint), merging)
    out, merge = tmp_path / "out", AdapterMerge(merging)
    out.mkdir()

    def check(shard: ShardPlan, path: Path) -> ShardCheck:
        pairs, kept = planned_pairs(shard, path), planned_restored(shard, path)
        return ShardCheck(shard.name, pairs, [], None, 0, Claim(True), merge=merge, merged=kept)

    with PretendedCuda():
        convert = Nearest(Calibration("rms"))
        settings = Settings(convert, torch.device("cuda:0"), 2, piece=5 * 128 * 256, merge=merge)
        done = list(process(divide(list(plan.shards), 1, False), out, settings, check=check))
    assert not [problem for each in done if each.check for problem in each.check.problems]
    measured = [m.cosine for each in done if each.check for m in each.check.measurements()]
    assert min(measured) > 0.999  # against the base some are below 0.9
    assert bits(out) == bits(quantized(base, *lora(adapters)))


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_and_pieces_change_no_byte(
    workers: int, adapted: Callable, quantized: Callable, cli: Callable, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    base, adapters, _ = adapted("dense")
    monkeypatch.setattr(shard_job, "CPU_PIECE", 128 * 256)  # 128 rows of most matrices
    result = cli("--input_dir", base, "--output_dir", tmp_path / "out", *lora(adapters), "--workers", workers)
    assert result.rc == 0, result.err
    assert bits(tmp_path / "out") == bits(quantized(base, *lora(adapters)))


def test_killed_and_repeated_it_gives_the_same_bytes(
    adapted: Callable, quantized: Callable, tmp_path: Path
) -> None:
    base, adapters, _ = adapted("dense")
    command = ["--input_dir", base, "--output_dir", tmp_path / "out", *lora(adapters)]
    assert forked.run(*command, at=At("pwrite", 40)).rc == -9
    assert not (tmp_path / "out" / CONFIG).exists()
    ended = forked.run(*command)
    assert ended.rc == 0, ended.err
    assert bits(tmp_path / "out") == bits(quantized(base, *lora(adapters)))


@pytest.mark.parametrize("which", ["none", "other", "order"])
def test_another_adapter_does_not_continue_a_run(
    which: str, adapted: Callable, quantized: Callable, cli: Callable
) -> None:
    base, adapters, _ = adapted("dense")
    others = {"none": [], "other": adapters[:1], "order": adapters[::-1]}[which]
    folder = quantized(base, *lora(adapters))
    result = cli("--input_dir", base, "--output_dir", folder, *lora(others))
    assert result.rc == 2
    assert "it was begun with adapters" in result.err


def test_manifest_config_and_report_name_the_fingerprint_of_each_adapter(
    adapted: Callable, quantized: Callable, cli: Callable, tmp_path: Path
) -> None:
    base, adapters, _ = adapted("dense")
    folder = quantized(base, *lora(adapters))
    parts = ("adapter_config.json", "adapter_model.safetensors")
    expected = [hashlib.sha256(b"".join((a / p).read_bytes() for p in parts)).hexdigest() for a in adapters]
    assert json.loads((folder / MANIFEST).read_text())["settings"]["adapters"] == expected
    config = json.loads((folder / CONFIG).read_text())
    assert config["quantization_config"]["producer"]["adapters"] == expected
    report = tmp_path / "report.json"
    flags = ("--input_dir", base, "--output_dir", folder, *lora(adapters), "--report", report)
    for more in ((), ("--verify_only",)):
        assert cli(*flags, *more).rc == 0
        assert json.loads(report.read_text())["adapters"] == expected
    assert "adapters" not in json.loads((quantized(base) / MANIFEST).read_text())["settings"]


def test_two_ranks_merge_what_one_process_merges(
    adapted: Callable, quantized: Callable, tmp_path: Path
) -> None:
    base, adapters, _ = adapted("dense")
    command = ["--input_dir", base, "--output_dir", tmp_path / "out", *lora(adapters)]
    ended = forked_ranks.run([Rank()] * 2, *command, "--device", "cpu")
    assert [each.rc for each in ended] == [0, 0], ended[0].err
    assert bits(tmp_path / "out") == bits(quantized(base, *lora(adapters)))


def test_ranks_with_other_adapters_than_rank_0_refuse(adapted: Callable, tmp_path: Path) -> None:
    """One machine was not given the adapter."""
    base, adapters, _ = adapted("dense")
    command = ["--input_dir", base, "--output_dir", tmp_path / "out", "--device", "cpu"]
    ended = forked_ranks.run([Rank(tuple(lora(adapters))), Rank()], *command)
    assert [each.rc for each in ended] == [2, 2]
    assert "rank 1 has other adapters than rank 0" in ended[0].err
    assert not (tmp_path / "out" / CONFIG).exists()


def test_dry_run_counts_what_adapters_change_and_writes_nothing(
    adapted: Callable, cli: Callable, tmp_path: Path
) -> None:
    base, adapters, _ = adapted("dense")
    result = cli("--input_dir", base, "--output_dir", tmp_path / "out", *lora(adapters[:1]), "--dry_run")
    assert result.rc == 0, result.err
    # 8 targets: q_proj 1, in_proj_qkv 3, gate_proj 4, out_proj 3, in_proj_a 3, lm_head, embed_tokens, qkv 2.
    # Kept are out_proj, in_proj_a, lm_head, embed_tokens and qkv.
    assert "Adapters merged     : into 18 weights, 10 of them kept" in result.out
    assert not (tmp_path / "out").exists()


# --- verification ---------------------------------------------------------------------------------


def test_verify_only_compares_with_the_merged_weights(
    adapted: Callable, quantized: Callable, cli: Callable
) -> None:
    base, adapters, _ = adapted("dense")
    folder = quantized(base, *lora(adapters))
    command = ["--input_dir", base, "--output_dir", folder, "--verify_only", "--verify_samples", "all"]
    with_them = cli(*command, *lora(adapters))
    assert (with_them.rc, "adapters" in with_them.err) == (0, False), with_them.out
    without = cli(*command)
    assert without.rc == 1
    assert "made with the adapters" in without.err
    first_only = cli(*command, *lora(adapters[:1]))
    assert first_only.rc == 1
    assert "made with the adapters" in first_only.err


def test_verify_only_sees_a_kept_tensor_that_another_adapter_would_have_made(
    adapted: Callable, quantized: Callable, cli: Callable, tmp_path: Path
) -> None:
    """Nothing of this adapter is FP8: the errors of FP8 weights alone would all be GOOD."""
    base = adapted("dense")[0]
    settings = {"target_modules": ["lm_head"], "r": 4, "lora_alpha": 8}
    one, two = (peft_adapters.make(base, tmp_path / str(i), seed=i, **settings) for i in (1, 2))
    command = ["--input_dir", base, "--output_dir", quantized(base, "--lora_dir", one), "--verify_only"]
    assert cli(*command, "--lora_dir", one).rc == 0
    result = cli(*command, "--lora_dir", two)
    assert result.rc == 1
    assert "lm_head.weight" in result.out


def test_a_kept_tensor_that_rots_on_the_disk_is_found(
    adapted: Callable, quantized: Callable, cli: Callable, tmp_path: Path
) -> None:
    base, adapters, _ = adapted("dense")
    folder = shutil.copytree(quantized(base, *lora(adapters)), tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][7, 7] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    result = cli(
        "--input_dir",
        base,
        "--output_dir",
        folder,
        *lora(adapters),
        "--verify_only",
        "--verify_samples",
        "all",
    )
    assert result.rc == 1
    assert "1 of 131072 values are not those of the input" in " ".join(result.out.split())  # 512 x 256


def test_of_kept_experts_those_that_no_adapter_changes_are_compared_too(
    checkpoint: Callable, quantized: Callable, cli: Callable, tmp_path: Path
) -> None:
    """One expert of a fused stack is merged; the stack is no longer the input's, nor a single one's."""
    base = checkpoint("moe", mtp=False, num_hidden_layers=1)
    experts = "model.language_model.layers.0.mlp.experts"
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    prefix = f"base_model.model.{experts}.1.down_proj.lora"
    factors = {f"{prefix}_A.weight": torch.ones(2, 128), f"{prefix}_B.weight": torch.ones(256, 2)}
    save_file(factors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    flags = ["--lora_dir", adapter, "--keep_bf16", "*.mlp.experts*"]
    folder = shutil.copytree(quantized(base, *flags), tmp_path / "out")
    command = ["--input_dir", base, "--output_dir", folder, *flags[:2], "--verify_only"]
    assert cli(*command).rc == 0
    (folder / MANIFEST).unlink()
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{experts}.down_proj"][5, 7, 7] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    result = cli(*command)
    assert result.rc == 1
    assert f"{experts}.5.down_proj.weight: 1 of 32768 values" in " ".join(result.out.split())


def test_nan_in_an_adapter_is_refused(adapted: Callable, cli: Callable, tmp_path: Path) -> None:
    base, adapters, _ = adapted("dense")
    broken = shutil.copytree(adapters[0], tmp_path / "adapter")
    tensors = load_file(broken / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.lora_B.weight"][3] = torch.nan
    save_file(tensors, broken / "adapter_model.safetensors")
    result = cli("--input_dir", base, "--output_dir", tmp_path / "out", "--lora_dir", broken)
    assert result.rc == 2
    assert "NaN or infinity in lm_head.weight; repair the input model or the adapter" in result.err


def test_an_adapter_that_changes_under_a_run_is_refused(adapted: Callable, tmp_path: Path) -> None:
    base, adapters, _ = adapted("dense")
    copy = shutil.copytree(adapters[0], tmp_path / "adapter")
    touch = f"os.utime({str(copy / 'adapter_model.safetensors')!r}, (1, 1))"
    at = At("open", where=".partial", do=touch)
    ended = forked.run("--input_dir", base, "--output_dir", tmp_path / "out", "--lora_dir", copy, at=at)
    assert ended.rc == 2
    assert "adapter_model.safetensors: changed while this ran" in ended.err


def test_memory_does_not_grow_with_what_an_adapter_changes(checkpoint: Callable, tmp_path: Path) -> None:
    """Embedding and head of 10 and of 41 MB each."""
    grown = []
    for tokens in (20_000, 80_000):
        base = checkpoint("text", mtp=False, num_hidden_layers=1, vocab_size=tokens)
        settings = {"target_modules": ["lm_head", "embed_tokens"], "r": 2, "lora_alpha": 4}
        adapter = peft_adapters.make(base, tmp_path / f"adapter {tokens}", **settings)
        output = tmp_path / f"out {tokens}"
        command = ["--input_dir", base, "--output_dir", output, "--lora_dir", adapter, "--workers", 1]
        ended = forked.run(*command)
        assert ended.rc == 0, ended.err
        grown.append(ended.grown)
    # The factors alone may grow: 8 bytes for each token more, twice.
    assert grown[1] - grown[0] < 12 << 20, grown
