"""Which adapters are refused, and in what words; where an adapter's tensors are found."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fp8lib import Fp8Error
from fp8lib.checkpoint.adapters import LowRank, Replacement, open_adapters
from fp8lib.checkpoint.directory import open_checkpoint

PEFT = "base_model.model.model.language_model.layers.0"
Q = f"{PEFT}.linear_attn.in_proj_qkv"
EXPERTS = f"{PEFT}.mlp.experts"
SETTINGS = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}


def write(folder: Path, tensors: dict[str, torch.Tensor], **settings: object) -> Path:
    """An adapter as PEFT writes it."""
    folder.mkdir(exist_ok=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(SETTINGS | settings))
    return folder


def pair(module: str, rows: int, columns: int, rank: int = 4) -> dict[str, torch.Tensor]:
    return {
        f"{module}.lora_A.weight": torch.ones(rank, columns),
        f"{module}.lora_B.weight": torch.ones(rows, rank),
    }


@pytest.fixture(scope="module")
def base(checkpoint: Callable) -> Path:
    return checkpoint("moe", num_hidden_layers=1, mtp=False)


GOOD = pair(Q, 512, 256)


@pytest.mark.parametrize(
    ("tensors", "settings", "words"),
    [
        # A tensor that meets no weight, or one of another shape.
        (pair(f"{PEFT}.self_attn.q_proj", 512, 256), {}, "q_proj.lora_A.weight: meets no weight"),
        (pair(EXPERTS.replace("layers.0", "layers.7"), 8, 8), {}, "meets no weight of the checkpoint"),
        ({**GOOD, "base_model.model.lm_head.extra": torch.ones(2)}, {}, "lm_head.extra: meets no weight"),
        (pair(Q, 512, 128), {}, "makes [512, 128] of rank 4, but model.language_model.layers.0"),
        (pair(Q, 511, 256), {}, "in_proj_qkv.weight is [512, 256]"),
        ({**GOOD, f"{Q}.lora_B.weight": torch.ones(512, 3)}, {}, "makes [512, 256] of rank 4"),
        (pair(EXPERTS, 200, 256, 32), {}, "8 experts of [256, 256] and [256, 128]"),
        (pair(EXPERTS, 256, 256, 33), {}, "of rank 33, but there are 8 experts"),
        ({"base_model.model.lm_head.weight": torch.ones(3, 256)}, {}, "but lm_head.weight is [512, 256]"),
        ({f"{EXPERTS}.down_proj": torch.ones(4, 256, 128)}, {}, "4 experts, not as many as the checkpoint"),
        (pair(f"{PEFT}.linear_attn.conv1d", 512, 4), {}, "conv1d.weight is [512, 1, 4]"),
        # Two of a kind, half of a pair, nothing at all.
        ({**GOOD, f"{Q}.base_layer.lora_A.weight": torch.ones(4, 256),
          f"{Q}.base_layer.lora_B.weight": torch.ones(512, 4)}, {}, "a second time"),
        ({f"{Q}.lora_A.weight": torch.ones(4, 256)}, {}, "the other of lora_A and lora_B is missing"),
        ({}, {}, "changes nothing"),
        # Not PEFT's, or what is not merged here.
        (pair("model.layers.0.linear_attn.in_proj_qkv", 512, 256), {}, "so PEFT did not write it"),
        ({**GOOD, f"{Q}.lora_B.bias": torch.ones(512)}, {}, "lora_bias is not merged here"),
        ({**GOOD, f"{Q}.lora_magnitude_vector": torch.ones(512)}, {}, "DoRA is not merged here"),
        ({**GOOD, f"{Q}.lora_E.weight": torch.ones(4)}, {}, "a kind of tensor that is not merged here"),
        ({**GOOD, f"{PEFT}.x.token_adapter.trainable_tokens_delta": torch.ones(4)}, {}, "not merged here"),
        (GOOD, {"use_dora": True}, "use_dora is set, which is not done here: DoRA rescales each merged row"),
        (GOOD, {"layer_replication": [[0, 1]]}, "layer_replication is set"),
        (GOOD, {"init_lora_weights": "pissa_niter_4"}, "has changed the base weights, too"),
        (GOOD, {"peft_type": "IA3"}, "peft_type 'IA3'; only LORA adapters are merged here"),
        (GOOD, {"peft_type": None}, "peft_type 'None'"),
        # Settings that do not fit.
        (GOOD, {"r": 8}, "rank 4 for model.language_model.layers.0.linear_attn.in_proj_qkv, 8 by"),
        (GOOD, {"r": 0}, "r '0' is not a rank"),
        (GOOD, {"lora_alpha": "many"}, "lora_alpha 'many' is not a number"),
        (GOOD, {"rank_pattern": {"(a+)+$": 4}}, "rank_pattern '(a+)+$' is no plain pattern"),
        (GOOD, {"alpha_pattern": {"(": 4}}, "alpha_pattern '(' is no plain pattern"),
        (GOOD, {"alpha_pattern": [1]}, "alpha_pattern is not a map"),
        (GOOD, {"target_parameters": "x"}, "target_parameters is not a list of names"),
        ({f"{Q}.lora_A.weight": torch.ones(4, 256, dtype=torch.int8),
          f"{Q}.lora_B.weight": torch.ones(512, 4)}, {}, "is I8; BF16, F16 and F32 can be merged"),
    ],
)  # fmt: skip
def test_it_is_refused(
    tensors: dict, settings: dict, words: str, base: Path, cli: Callable, tmp_path: Path
) -> None:
    adapter = write(tmp_path / "adapter", tensors, **settings)
    result = cli("--input_dir", base, "--dry_run", "--lora_dir", adapter)
    assert (result.rc, result.out) == (2, "")
    assert words in result.err
    assert str(adapter) in result.err


def test_a_directory_without_an_adapter_is_refused(base: Path, cli: Callable, tmp_path: Path) -> None:
    def error(folder: Path) -> str:
        result = cli("--input_dir", base, "--dry_run", "--lora_dir", folder)
        assert result.rc == 2
        return result.err

    assert "no such directory; give the one that holds adapter_config.json" in error(tmp_path / "nothing")
    assert "adapter_config.json: no such file" in error(base)
    adapter = write(tmp_path / "adapter", GOOD)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    assert "adapter_model.bin: a pickle, which can run code when it is loaded" in error(adapter)
    (adapter / "adapter_model.bin").rename(adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text("[]")
    assert "adapter_config.json: not a JSON object" in error(adapter)


@pytest.mark.parametrize("module", ["lm_head", "model.language_model.embed_tokens"])
def test_tied_embeddings_are_refused(
    module: str, checkpoint: Callable, cli: Callable, tmp_path: Path
) -> None:
    """PEFT would untie them, or change both; neither is what was trained."""
    tied = checkpoint("dense", tied=True, num_hidden_layers=1, mtp=False)
    adapter = write(tmp_path / "adapter", pair(f"base_model.model.{module}", 512, 256))
    result = cli("--input_dir", tied, "--dry_run", "--lora_dir", adapter)
    assert result.rc == 2
    assert "which this model ties together; untie them first" in result.err


# --- names ----------------------------------------------------------------------------------------


def changes(base: Path, folder: Path, tensors: dict, **settings: object) -> dict:
    return dict(open_adapters([write(folder, tensors, **settings)], open_checkpoint(base)).changes)


@pytest.mark.parametrize("experts", ["fused", "per_expert"])
@pytest.mark.parametrize("prefix", ["model.language_model.layers", "model.layers"])
def test_names_of_either_class_and_either_layout_of_experts(
    prefix: str, experts: str, checkpoint: Callable, tmp_path: Path
) -> None:
    base = checkpoint("moe", num_hidden_layers=1, mtp=False, experts=experts)
    stack = f"base_model.model.{prefix}.0.mlp.experts"
    tensors = pair(f"base_model.model.{prefix}.0.linear_attn.in_proj_qkv", 512, 256)
    tensors |= pair(f"{stack}.base_layer", 256, 256, 32) | pair(stack, 256, 128, 32)
    found = changes(base, tmp_path / "a", tensors)
    home = "model.language_model.layers.0"
    assert found[f"{home}.linear_attn.in_proj_qkv.weight"][0].kind == "linear"
    parts = {"gate_proj": 0, "up_proj": 128, "down_proj": 0}
    for e in range(8):
        for part, first in parts.items():
            [change] = found[f"{home}.mlp.experts.{e}.{part}.weight"]
            assert (change.kind, change.experts, change.expert, change.first_row) == (
                "parameter",
                8,
                e,
                first,
            )
            assert change.a.name == f"{stack}.{'' if part == 'down_proj' else 'base_layer.'}lora_A.weight"
            assert change.scaling == 2.0  # 8 / 4: the rank is an expert's
    assert len(found) == 1 + 24


def test_single_experts_of_an_adapter_meet_fused_ones(base: Path, tmp_path: Path) -> None:
    found = changes(base, tmp_path / "a", pair(f"{EXPERTS}.5.up_proj", 128, 256))
    [(name, (change,))] = found.items()
    assert name == "model.language_model.layers.0.mlp.experts.5.up_proj.weight"
    assert (change.kind, change.experts) == ("linear", 1)


def test_scaling_follows_patterns_and_rslora(base: Path, tmp_path: Path) -> None:
    def scaling(**settings: object) -> float:
        [(change,)] = changes(base, tmp_path / "a", GOOD, **settings).values()
        return change.scaling

    assert scaling() == 8 / 4
    assert scaling(use_rslora=True) == 8 / 4**0.5
    assert scaling(alpha_pattern={"in_proj_qkv": 3}) == 3 / 4
    assert scaling(alpha_pattern={r"layers\.0\..*qkv": 3, "in_proj_qkv": 5}) == 3 / 4  # the first that fits
    assert scaling(alpha_pattern={"proj_qkv": 3}) == 8 / 4  # of a whole name only
    assert scaling(r=16, rank_pattern={"in_proj_qkv": 4}) == 8 / 4


def test_what_replaces_an_expert_stack_replaces_every_expert(base: Path, tmp_path: Path) -> None:
    found = changes(base, tmp_path / "a", {f"{EXPERTS}.down_proj": torch.ones(8, 256, 128).bfloat16()})
    assert len(found) == 8
    starts = [change.start for (change,) in found.values() if isinstance(change, Replacement)]
    assert [b - a for a, b in pairwise(starts)] == [2 * 256 * 128] * 7


def test_a_replacement_comes_before_what_is_added(base: Path, tmp_path: Path) -> None:
    """PEFT saves the embedding beside its factors when it was targeted."""
    module = "base_model.model.model.language_model.embed_tokens"
    tensors = {
        f"{module}.base_layer.weight": torch.ones(512, 256),
        f"{module}.lora_embedding_A": torch.ones(4, 512),
        f"{module}.lora_embedding_B": torch.ones(256, 4),
    }
    [(first, second)] = changes(base, tmp_path / "a", tensors).values()
    assert isinstance(first, Replacement)
    assert isinstance(second, LowRank)
    assert second.kind == "embedding"


def test_an_empty_stack_of_2_to_the_40_experts_costs_nothing(base: Path, tmp_path: Path) -> None:
    adapter = write(tmp_path / "a", GOOD)
    path = adapter / "adapter_model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    header[f"{EXPERTS}.down_proj"] = {"dtype": "BF16", "shape": [2**40, 0, 128], "data_offsets": [end, end]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    with pytest.raises(Fp8Error, match="experts, not as many"):
        open_adapters([adapter], open_checkpoint(base))
