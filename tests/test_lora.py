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
import peft_adapters
import tiny_checkpoints
from forked import At
from fp8lib.streaming import shard_job

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


@pytest.mark.parametrize("case", CASES)
def test_the_output_is_that_of_the_model_that_peft_merged(
    case: str, adapted: Callable, quantized: Callable, tmp_path: Path
) -> None:
    base, adapters, auto = adapted(case)
    fused = CASES[case][0].get("experts") != "per_expert"
    merged = peft_adapters.merge(base, adapters, tmp_path / "merged", auto=auto, fused=fused)
    expected, found = bits(quantized(merged)), bits(quantized(base, *lora(adapters)))
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


# --- one run after another, and cut another way ---------------------------------------------------


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


def test_manifest_and_config_name_the_fingerprint_of_each_adapter(
    adapted: Callable, quantized: Callable
) -> None:
    base, adapters, _ = adapted("dense")
    folder = quantized(base, *lora(adapters))
    parts = ("adapter_config.json", "adapter_model.safetensors")
    expected = [hashlib.sha256(b"".join((a / p).read_bytes() for p in parts)).hexdigest() for a in adapters]
    assert json.loads((folder / MANIFEST).read_text())["settings"]["adapters"] == expected
    config = json.loads((folder / CONFIG).read_text())
    assert config["quantization_config"]["producer"]["adapters"] == expected
    assert "adapters" not in json.loads((quantized(base) / MANIFEST).read_text())["settings"]


def test_ranks_with_other_adapters_than_rank_0_refuse(adapted: Callable) -> None:
    """A machine that was not given the adapter has no such key in its terms."""
    from argparse import Namespace

    from fp8lib import Fp8Error
    from fp8lib.job.quantizing import _check_agreement

    class Ranks:
        rank, attempt = 1, "x"

    for mine, theirs in (
        ({}, {"adapters": ["a"]}),
        ({"adapters": ["a"]}, {}),
        ({"adapters": ["a"]}, {"adapters": ["b"]}),
    ):
        with pytest.raises(Fp8Error, match="rank 1 has other adapters than rank 0"):
            _check_agreement(Namespace(input_dir=Path("in")), mine, theirs, Ranks())


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
    base = checkpoint("text", mtp=False, num_hidden_layers=1, vocab_size=80_000)  # 41 MB each
    settings = {"target_modules": ["lm_head", "embed_tokens"], "r": 2, "lora_alpha": 4}
    adapter = peft_adapters.make(base, tmp_path / "adapter", **settings)
    common = ["--input_dir", base, "--workers", 1]
    plain = forked.run(*common, "--output_dir", tmp_path / "plain")
    merged = forked.run(*common, "--output_dir", tmp_path / "merged", "--lora_dir", adapter)
    assert (plain.rc, merged.rc) == (0, 0), merged.err
    # Pieces of 1 M weights: 2 MB in, 3 x 2 MB out, 0.5 MB of product, 0.6 MB of factors. A whole one has 41.
    assert merged.grown - plain.grown < 20 << 20
