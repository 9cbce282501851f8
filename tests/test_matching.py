"""Each engine's own matching of `modules_to_not_convert`: its traps, and what the tool does about them."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

from fp8lib import Fp8Error
from fp8lib.checkpoint import matching, plan
from fp8lib.checkpoint.directory import open_checkpoint
from fp8lib.checkpoint.matching import mismatches, sglang_skips, transformers_skips, vllm_skips
from fp8lib.checkpoint.plan import make_plan

VL = "model.language_model.layers"
VLLM_VL = "language_model.model.layers"

# --- the engines' traps ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("listed", "module", "vllm", "sglang", "hf"),
    [
        # vLLM wants exact names, SGLang whole components, transformers a beginning or an end.
        ("layers.1.mlp.gate", "layers.1.mlp.gate_up_proj", False, False, False),
        ("layers.1.mlp.gate", "layers.1.mlp.gate_proj", False, False, False),
        ("layers.1.mlp.down_proj", "layers.11.mlp.down_proj", False, False, False),
        ("layers.1.mlp", "layers.1.mlp.down_proj", False, True, True),
        ("mlp.down_proj", "layers.1.mlp.down_proj", False, True, True),
        ("n_proj", "layers.1.mlp.down_proj", False, False, True),
        ("layers.1.self_attn.qkv_proj", "layers.1.self_attn.qkv_proj", True, False, True),
        ("model.layers.1.mlp.experts", "model.layers.1.mlp.experts", True, True, True),
        ("model.layers.1.mlp.experts.7.up_proj", "model.layers.1.mlp.experts", True, True, False),
        ("model.layers.1.mlp.shared_expert", "model.layers.1.mlp.experts", False, False, False),
        ("visual.", "visual.blocks.0.attn.proj", False, True, True),
        ("visual.", "model.visual.blocks.0.attn.proj", False, True, False),
        ("model.visual", "model.visual.blocks.0.attn.proj", False, True, True),
        ("model.layers.0.mlp.down_proj", "mtp.layers.0.mlp.down_proj", False, True, False),
        ("model.language_model.layers.0.mlp.down_proj", "mtp.layers.0.mlp.down_proj", False, False, False),
    ],
)
def test_what_one_entry_skips(listed: str, module: str, vllm: bool, sglang: bool, hf: bool) -> None:
    found = [skips([listed])(module) for skips in (vllm_skips, sglang_skips, transformers_skips)]
    assert found == [vllm, sglang, hf]


def test_both_engines_refuse_a_fused_module_that_is_listed_in_part() -> None:
    listed = ["layers.1.self_attn.q_proj", "layers.1.self_attn.k_proj"]
    assert vllm_skips(listed)("layers.1.self_attn.qkv_proj") is None
    assert sglang_skips(listed)("layers.1.self_attn.qkv_proj") is None
    both = [*listed, "layers.1.self_attn.v_proj"]
    assert vllm_skips(both)("layers.1.self_attn.qkv_proj") is True
    assert sglang_skips(both)("layers.1.self_attn.qkv_proj") is True


LISTS = {
    "of the plan": [],
    "one expert": [f"{VL}.2.mlp.experts.3.gate_proj", "model.layers.2.mlp.experts.3.gate_proj"],
    "all experts of a layer": [f"{VL}.1.mlp.experts", "model.layers.1.mlp.experts"],
    "a bare visual.": ["visual."],
    "parents": [f"{VL}.1.mlp", "model.visual", "model.layers.1.mlp"],
    "a short name": ["mlp.gate", "gate_proj", "in_proj_a"],
}


@pytest.mark.parametrize("more", LISTS.values(), ids=LISTS)
@pytest.mark.parametrize("of_text", [False, True], ids=["its own class", "as text only"])
@pytest.mark.parametrize("kind", ["moe", "dense", "moe_text"])
def test_the_model_of_transformers_is_what_transformers_does(
    kind: str, of_text: bool, more: list[str], checkpoint: Callable
) -> None:
    """Which modules transformers itself replaces by FP8 ones, on a model without weights."""
    planned = make_plan(open_checkpoint(checkpoint(kind)))
    listed = [*planned.modules_to_not_convert, *more]
    config = transformers.AutoConfig.from_pretrained(checkpoint(kind))
    name = config.architectures[0]
    if of_text:
        config, name = config.get_text_config(), name.replace("ForConditionalGeneration", "ForCausalLM")
    with torch.device("meta"):
        model = getattr(transformers, name)(config)
    convertible = [
        n for n, m in model.named_modules() if type(m) is torch.nn.Linear or n.endswith(".experts")
    ]
    quantization = transformers.FineGrainedFP8Config(
        weight_block_size=(128, 128), modules_to_not_convert=list(listed), dequantize=False
    )
    FineGrainedFP8HfQuantizer(quantization, pre_quantized=True)._process_model_before_weight_loading(model)
    classes = {n: type(m).__name__ for n, m in model.named_modules()}
    converted = {n for n in convertible if classes[n].startswith("FP8")}

    modules = matching._states(planned.outputs(), planned.checkpoint.config)
    engine = "transformers 5.23.0" + ", text only" * (of_text or kind.endswith("text"))
    (loader,) = [one for one in matching.loaders(planned.checkpoint.config, modules) if one.engine == engine]
    skips = loader.matcher([loader.rename(entry) for entry in listed])
    assert converted == {n for n in convertible if not skips(n)}
    # And every module it could convert is one that the check looks at.
    known = {m for m in modules if loader.can_be_fp8.fullmatch(m) and not loader.absent.fullmatch(m)}
    assert {loader.place(m) for m in known} == set(convertible)


# --- every plan is held against them -----------------------------------------------------------


@pytest.mark.parametrize("spoil", ["forget", "add"])
def test_a_plan_that_an_engine_would_misread_is_refused(
    spoil: str, checkpoint: Callable, monkeypatch: pytest.MonkeyPatch, cli: Callable, tmp_path: Path
) -> None:
    right = plan._modules_to_not_convert

    def wrong(*arguments: object) -> tuple[str, ...]:
        listed = right(*arguments)
        return listed[1:] if spoil == "forget" else (*listed, f"{VL}.0.mlp.experts.5.up_proj")

    monkeypatch.setattr(plan, "_modules_to_not_convert", wrong)
    with pytest.raises(Fp8Error, match="would be misread: "):
        make_plan(open_checkpoint(checkpoint("moe")))
    result = cli("--input_dir", checkpoint("moe"), "--output_dir", tmp_path / "out")
    assert result.rc == 2
    assert not (tmp_path / "out").exists()


def test_names_of_a_vision_language_checkpoint_under_a_text_only_class(checkpoint: Callable) -> None:
    """What transformers saves of a vision-language checkpoint that it loaded as text only."""
    planned = make_plan(open_checkpoint(checkpoint("moe")))
    tensors = [t for t in planned.outputs() if ".visual." not in t.name]
    config = {
        **planned.config(),
        "architectures": ["Qwen3_5MoeForCausalLM"],
        "model_type": "qwen3_5_moe_text",
    }
    assert mismatches(tensors, config) == []
    engines = [one.engine for one in matching.loaders(config, [t.name for t in tensors])]
    assert engines == ["vLLM 0.32.0", "transformers 5.23.0, text only"]


# --- directories of other tools ----------------------------------------------------------------


def relisted(folder: Path, change: Callable[[list[str]], object]) -> Path:
    config = json.loads((folder / "config.json").read_text())
    listed = config["quantization_config"]["modules_to_not_convert"]
    config["quantization_config"]["modules_to_not_convert"] = change(listed)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


WRONG_LISTS = {
    "nothing is listed": (lambda names: [], "BF16, but taken for FP8"),
    "no list": (lambda names: None, "BF16, but taken for FP8"),
    "lm_head is forgotten": (
        lambda names: [n for n in names if n != "lm_head"],
        "transformers 5.23.0: lm_head is BF16, but taken for FP8",
    ),
    "a bare visual.": (
        lambda names: [*(n for n in names if "visual" not in n), "visual."],
        "transformers 5.23.0: model.visual.",
    ),
    "one expert": (
        lambda names: [*names, f"{VL}.0.mlp.experts.5.up_proj"],
        f"vLLM 0.32.0: {VLLM_VL}.0.mlp.experts is FP8, but taken for BF16 because of "
        f"{VL}.0.mlp.experts.5.up_proj",
    ),
    "a part of a fused module": (
        lambda names: [*names, f"{VL}.3.self_attn.q_proj"],
        f"SGLang 0.5.23: {VL}.3.self_attn.qkv_proj is only in part in modules_to_not_convert",
    ),
    "a pattern": (lambda names: [*names, "re:.*experts.*"], "list full names"),
    "no names": (lambda names: [*names, 5], "no list of names"),
}


@pytest.mark.parametrize(("change", "complaint"), WRONG_LISTS.values(), ids=WRONG_LISTS)
def test_verify_only_fails_a_list_that_an_engine_misreads(
    change: Callable,
    complaint: str,
    checkpoint: Callable,
    quantized: Callable,
    copy_of: Callable,
    cli: Callable,
) -> None:
    source = checkpoint("moe")
    folder = relisted(copy_of(quantized(source)), change)
    result = cli("--input_dir", source, "--output_dir", folder, "--verify_only")
    assert result.rc == 1
    assert complaint in result.out
    assert re.search(r"VERDICT: . FAIL", result.out)
    assert "cosine sim" in result.out  # the weights are measured all the same


def test_ignored_layers_come_first_for_the_engines_that_know_them(checkpoint: Callable) -> None:
    planned = make_plan(open_checkpoint(checkpoint("text")))
    config = planned.config()
    config["quantization_config"]["ignored_layers"] = ["lm_head"]
    assert {line.split()[0] for line in mismatches(planned.outputs(), config)} == {"vLLM", "SGLang"}
