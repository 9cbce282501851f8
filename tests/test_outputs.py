"""What two models say: streams, head and figures against whole models, dense logits and other formulas."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import outputs_reference
from calibration_runs import NO_LIMIT, PAD, NoProgress, prompts_of
from fp8lib import Fp8Error
from fp8lib.checkpoint.directory import open_checkpoint
from fp8lib.model.prompts import make_batches
from fp8lib.outputs import comparison, figures, head, layers
from fp8lib.outputs.comparison import Record
from fp8lib.outputs.layers import SERVINGS, Serving
from trained import held_out_prompts

LENGTHS = [24, 13, 5, 18]
KINDS = [("moe", "fused"), ("moe_text", "per_expert"), ("dense", "fused"), ("text", "fused")]
WEIGHT_ONLY = Serving(quantizes_activations=False)


pytestmark = pytest.mark.usefixtures("one_thread")


def compared(
    original: Path, *candidates: Path, serving: Serving = WEIGHT_ONLY, lengths: list[int] = LENGTHS
) -> Record:
    config = transformers.AutoConfig.from_pretrained(original).get_text_config()
    batches = make_batches(prompts_of(lengths), 2, NO_LIMIT, PAD)
    opened = [open_checkpoint(path) for path in candidates]
    device = torch.device("cpu")
    record = comparison.run(open_checkpoint(original), opened, serving, config, batches, device, NoProgress())
    return comparison.merged([record])


def by_hand(
    original: Path, candidate: Path, serving: Callable | None, requantize: bool = False
) -> dict[str, torch.Tensor]:
    """What `head.predictions` calls nll0, nll1, kl1 and top1, from whole models and dense logits."""
    reference = outputs_reference.model_of(original, original, None)
    other = outputs_reference.model_of(candidate, original, serving, requantize)
    found: dict[str, list[torch.Tensor]] = {"nll0": [], "nll1": [], "kl1": [], "top1": [], "rank1": []}
    for prompt in prompts_of(LENGTHS):
        a, b = (outputs_reference.logits(model, prompt)[:-1] for model in (reference, other))
        target = torch.tensor(prompt[1:])[:, None]
        found["nll0"].append(-a.log_softmax(-1).gather(-1, target)[:, 0])
        found["nll1"].append(-b.log_softmax(-1).gather(-1, target)[:, 0])
        found["kl1"].append(outputs_reference.kl(a, b))
        found["top1"].append(b.argmax(-1))
        found["rank1"].append((b > b.gather(-1, target)).sum(-1))
    return {name: torch.cat(parts) for name, parts in found.items()}


# --- as an engine computes it ------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "experts"), KINDS)
def test_both_streams_are_whole_models_with_dequantized_weights(checkpoint, quantized, kind, experts):
    """Every position's KL to 1 % of the smallest effect, or rather to float32: 1e-5 of it on the mean."""
    path = checkpoint(kind, experts=experts)
    record, expected = compared(path, out := quantized(path, "--skip_verify")), by_hand(path, out, None)
    for name in ("nll0", "nll1"):
        np.testing.assert_allclose(record.results[name], expected[name], atol=1e-5, err_msg=name)
    # 1/20 of the effect is what is promised; float32 keeps a thousandth, for every single position.
    np.testing.assert_allclose(record.results["kl1"], expected["kl1"], rtol=1e-3, atol=1e-9)
    assert record.results["kl1"].mean() > 1e-7, out
    np.testing.assert_array_equal(record.results["top1"], expected["top1"])
    np.testing.assert_array_equal(record.results["rank1"], expected["rank1"])


@pytest.mark.parametrize(("kind", "experts"), KINDS[:3:2])
@pytest.mark.parametrize("served", ["written", "ue8m0"])
def test_inputs_of_fp8_modules_are_rounded_as_engines_do(checkpoint, quantized, kind, experts, served):
    path = checkpoint(kind, experts=experts)
    out = quantized(path, "--skip_verify", "--scale_format", "bf16")  # whose scales are no powers of two
    power = served == "ue8m0"
    rounding = partial(outputs_reference.rounded_activations, power_of_two=power)
    record, expected = compared(path, out, serving=SERVINGS[served]), by_hand(path, out, rounding, power)
    found, wanted = record.results["kl1"], expected["kl1"].numpy()
    # A value that float32 and float64 put on two sides of a tie goes to another code, and what comes behind
    # it in the prompt sees that: a per cent or two of its KL. Where no value does, they agree to float32.
    np.testing.assert_allclose(found.mean(), wanted.mean(), rtol=0.02)
    quarter, half = np.quantile(abs(found - wanted) / wanted, [0.25, 0.5])
    assert quarter < 1e-5
    assert half < 5e-3
    unrounded = replace(SERVINGS[served], quantizes_activations=False)
    effect = abs(found - compared(path, out, serving=unrounded).results["kl1"]).mean()
    assert effect > 0.2 * wanted.mean(), "activations must have an effect"


def test_the_emulations_own_error_is_far_below_the_smallest_effect(trained, quantized, monkeypatch):
    """On a model that learned something: mean KLD against float64 and other code, for each setting."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(trained)
    tokens = tokenizer(held_out_prompts(6, 60))["input_ids"]
    monkeypatch.setattr(f"{__name__}.prompts_of", lambda *_: tokens)
    out = quantized(trained, "--skip_verify", "--scale_format", "bf16")
    effects, errors = [], []
    for served in ("written", "ue8m0"):
        power = served == "ue8m0"
        rounding = partial(outputs_reference.rounded_activations, power_of_two=power)
        effects.append(compared(trained, out, serving=SERVINGS[served]).results["kl1"].mean())
        errors.append(abs(float(by_hand(trained, out, rounding, power)["kl1"].mean()) - effects[-1]))
    smallest = min(*effects, abs(effects[0] - effects[1]))
    assert smallest > 1e-6, "there must be an effect to measure"
    assert 20 * max(errors) < smallest, (effects, errors)


def test_vllm_on_hopper_requantizes_linears_and_not_experts(checkpoint, quantized):
    path = checkpoint("moe")
    out = quantized(path, "--skip_verify", "--scale_format", "bf16")
    device, files = torch.device("cpu"), layers.Files()
    loaded = {}
    for served, serving in SERVINGS.items():
        weights = layers.StoredWeights(open_checkpoint(out))
        source = layers.ServedLayers(weights, serving)
        config = transformers.AutoConfig.from_pretrained(path).get_text_config()
        hollow = layers.internals.hollow_model(config, device, torch.float32)
        layer = source.load(hollow.layers[0], 0, files, device)
        expert = layer.mlp.experts._projections["up_proj"].of(3)
        loaded[served] = layer.linear_attn.in_proj_qkv.weight, expert
    files.close()
    for served, (linear, expert) in {"ue8m0": (True, True), "vllm-hopper": (True, False)}.items():
        assert torch.equal(loaded[served][0], loaded["written"][0]) is not linear
        assert torch.equal(loaded[served][1], loaded["written"][1]) is not expert


def test_only_modules_that_are_fp8_in_that_directory_are_rounded(checkpoint, tmp_path):
    """A directory in BF16 throughout: whatever is asked for, it says what the original says."""
    path = checkpoint("moe")
    record = compared(path, path, serving=SERVINGS["ue8m0"])
    assert not record.results["kl1"].any()
    assert not record.layers.any()


def test_two_identical_directories_differ_by_exactly_nothing(checkpoint, quantized):
    path = checkpoint("moe")
    out = quantized(path, "--skip_verify")
    found = compared(path, out, out, serving=SERVINGS["written"])
    assert np.array_equal(found.results["kl1"], found.results["kl2"])
    assert figures.difference(found.results) == figures.Figure(0.0, 0.0)


def damage(path: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    file = path / "model.safetensors"
    state = {name: tensor.clone() for name, tensor in load_file(file).items()}
    file.unlink()
    save_file(state | change(state), file)


def test_a_damaged_expert_raises_kl_and_its_layer_is_pointed_at(checkpoint, quantized, copy_of):
    path = checkpoint("moe")
    spoilt = copy_of(quantized(path, "--skip_verify"))
    name = "model.language_model.layers.2.mlp.experts.3.down_proj.weight_scale_inv"
    damage(spoilt, lambda state: {name: state[name] * 40})
    record = compared(path, quantized(path, "--skip_verify"), spoilt)
    assert record.results["kl2"].mean() > 2 * record.results["kl1"].mean()
    opened = [open_checkpoint(p) for p in (quantized(path, "--skip_verify"), spoilt)]
    found = comparison.evaluate(record, open_checkpoint(path), opened, [None] * len(LENGTHS), {})
    from fp8lib.outputs.report import largest_rise

    assert found.layer_names[largest_rise(found.candidates[1].layers)[0]].endswith("layers.2")
    assert found.candidates[1].layers[:2] == found.candidates[0].layers[:2]


def test_the_relative_error_of_a_layer_is_a_mean_over_tokens(checkpoint, quantized):
    """Against the whole models' hidden states, padding left out."""
    path = checkpoint("text")
    out = quantized(path, "--skip_verify")
    models = [outputs_reference.model_of(p, path, None) for p in (path, out)]
    errors = [[] for _ in range(4)]
    for prompt in prompts_of(LENGTHS):
        states = []
        for model in models:
            seen = []
            hooks = [
                x.register_forward_hook(lambda *a, seen=seen: seen.append(a[2][0]))
                for x in model.model.layers
            ]
            outputs_reference.logits(model, prompt)
            states.append(seen)
            for hook in hooks:
                hook.remove()
        for layer, (a, b) in enumerate(zip(*states, strict=True)):
            errors[layer] += ((b - a).norm(dim=-1) / a.norm(dim=-1)).tolist()
    record = compared(path, out)
    found = record.layers[:, :, 0].sum(0) / record.tokens.sum()
    np.testing.assert_allclose(found, [np.mean(e) for e in errors], rtol=1e-4)


# --- the head ----------------------------------------------------------------------------------


def test_slices_of_the_head_and_tiles_of_positions_change_nothing(checkpoint, quantized, monkeypatch):
    path = checkpoint("text", tied=True)
    out = quantized(path, "--skip_verify")
    expected = compared(path, out).results
    monkeypatch.setattr(head, "_SLICE", 256 * 37)  # 37 tokens of 512, which it does not divide
    monkeypatch.setattr(head, "_TILE", 37 * 7)
    found = compared(path, out).results
    for name in expected:
        if name.startswith(("kl", "nll")):
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-9, err_msg=name)
        else:
            np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


def test_what_is_stored_names_prompt_and_position(checkpoint, quantized):
    path = checkpoint("text", tied=True)
    results = compared(path, quantized(path, "--skip_verify")).results
    expected = [(p, i, t) for p, ids in enumerate(prompts_of(LENGTHS)) for i, t in enumerate(ids[1:])]
    found = zip(results["prompt"], results["position"], results["token"], strict=True)
    assert list(map(tuple, map(list, found))) == expected


# --- figures -----------------------------------------------------------------------------------


def some_results(prompts: int = 7) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    prompt = np.repeat(np.arange(prompts), generator.integers(3, 40, prompts))
    count = len(prompt)
    of_prompt = generator.normal(size=prompts)[prompt]  # positions of a prompt are alike
    before = generator.gamma(2, size=count)
    kl = generator.exponential(0.01 * np.exp(of_prompt))
    return {
        "prompt": prompt,
        "nll0": before,
        "nll1": before + 0.1 * generator.normal(size=count) + 0.02 * of_prompt,
        "nll2": before + 0.1 * generator.normal(size=count),
        "kl1": kl,
        "kl2": kl + 0.001 * generator.normal(size=count) + 0.002,
        "top0": generator.integers(0, 3, count),
        "top1": generator.integers(0, 3, count),
    }


def test_figures_are_those_of_other_formulas():
    results = some_results()
    found = figures.divergence(results, 1)
    kl, change = np.sort(results["kl1"]), np.exp(-results["nll1"]) - np.exp(-results["nll0"])
    assert found.positions == len(kl)
    assert found.prompts == 7
    assert found.max_kld == kl[-1]
    for value, share in ((found.kld_999, 0.999), (found.kld_95, 0.95), (found.median_kld, 0.5)):
        place = share * (len(kl) - 1)
        low = int(place)
        expected = kl[low] + (place - low) * (kl[min(low + 1, len(kl) - 1)] - kl[low])
        np.testing.assert_allclose(value, expected, rtol=1e-12)
    close = partial(np.testing.assert_allclose, rtol=1e-12)
    close(found.mean_kld.value, sum(kl) / len(kl))
    close(found.same_top.value, sum(results["top0"] == results["top1"]) / len(kl))
    close(found.mean_dp.value, change.mean())
    close(found.rms_dp.value, np.linalg.norm(change) / len(kl) ** 0.5)
    close(found.ppl.value, np.prod(np.exp(results["nll1"] / len(kl))))
    close(found.ppl_ratio.value, found.ppl.value / found.ppl_reference.value)


def test_errors_are_those_of_drawing_prompts_again():
    """The bootstrap over prompts, which assumes no formula; with 60 prompts the two agree to some percent."""
    results = some_results(60)
    found = figures.divergence(results, 1)
    generator = np.random.default_rng(1)
    rows = [np.flatnonzero(results["prompt"] == p) for p in range(60)]
    drawn = {"mean_kld": [], "rms_dp": [], "ppl_ratio": [], "same_top": []}
    for _ in range(1500):
        chosen = np.concatenate([rows[p] for p in generator.integers(0, 60, 60)])
        again = {name: values[chosen] for name, values in results.items()}
        figure = figures.divergence(again, 1)
        for name, values in drawn.items():
            values.append(getattr(figure, name).value)
    for name, values in drawn.items():
        # 1500 draws leave 2 % of noise, the linearization some more.
        np.testing.assert_allclose(getattr(found, name).error, np.std(values), rtol=0.12, err_msg=name)


def test_a_paired_difference_is_known_far_better_than_each_of_the_two():
    results = some_results(30)
    found, alone = figures.difference(results), figures.divergence(results, 1).mean_kld
    np.testing.assert_allclose(found.value, (results["kl1"] - results["kl2"]).mean(), rtol=1e-12)
    assert found.error < alone.error / 5


def test_one_prompt_has_no_error():
    assert figures.divergence(some_results(1), 1).mean_kld.error is None


def test_the_result_is_json(checkpoint, quantized):
    path = checkpoint("text", tied=True)
    record = compared(path, quantized(path, "--skip_verify"))
    record.results["kl1"][0] = np.nan
    opened = [open_checkpoint(quantized(path, "--skip_verify"))]
    found = comparison.evaluate(record, open_checkpoint(path), opened, ["a", "b", "a", None], {"x": "y"})
    document = json.loads(json.dumps(found.to_json(), allow_nan=False))
    candidate = document["candidates"][0]
    assert candidate["overall"]["mean_kld"] == {"value": "nan", "error": "nan"}
    assert candidate["by_topic"].keys() == {"a", "b"}
    assert candidate["by_topic"]["b"]["positions"] == LENGTHS[1] - 1
    assert sum(candidate["histogram"]) == sum(LENGTHS) - len(LENGTHS) - 1, "all but the NaN"
    assert len(candidate["histogram"]) == len(document["histogram_edges_nats"]) + 1
    assert len(candidate["layers"]) == len(document["layer_names"]) == 4


# --- directories that engines could not read ---------------------------------------------------


def _without_scale(state: dict[str, torch.Tensor]) -> None:
    del state[next(name for name in state if name.endswith("q_proj.weight_scale_inv"))]


def _with_one_scale(state: dict[str, torch.Tensor]) -> None:
    name = next(name for name in state if name.endswith("q_proj.weight_scale_inv"))
    state[name] = state[name][:1, :1].clone()


def _with_a_bf16_expert(state: dict[str, torch.Tensor]) -> None:
    name = next(name for name in state if name.endswith("layers.0.mlp.experts.5.up_proj.weight"))
    state[name] = state[name].float().bfloat16()


def _without_an_expert(state: dict[str, torch.Tensor]) -> None:
    del state[next(name for name in state if name.endswith("layers.0.mlp.experts.5.up_proj.weight"))]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (_without_scale, r"q_proj\.weight: FP8 without a .*weight_scale_inv"),
        (_with_one_scale, r"q_proj\.weight_scale_inv: BF16 \[1, 1\] where blocks of 128x128 have \[8, 2\]"),
        (_with_a_bf16_expert, r"experts\.5\.up_proj\.weight: BF16, but F8_E4M3 in the layer's first expert"),
        (_without_an_expert, r"layers\.0\.mlp\.experts\.5\.up_proj\.weight: missing"),
    ],
)
def test_a_directory_that_engines_could_not_read_is_refused(
    checkpoint, quantized, copy_of, change, complaint
):
    path = checkpoint("moe")
    spoilt = copy_of(quantized(path, "--skip_verify"))
    (spoilt / "model.safetensors.index.json").unlink()
    file = spoilt / "model.safetensors"
    state = {name: tensor.clone() for name, tensor in load_file(file).items()}
    file.unlink()
    change(state)
    save_file(state, file)
    with pytest.raises(Fp8Error, match=complaint):
        compared(path, spoilt, lengths=[5])
