"""What is recorded while a whole model runs: every number, every token once, and the model none the wiser."""

import re
from collections import defaultdict
from contextlib import nullcontext, suppress

import numpy as np
import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from calibration_runs import KINDS, NO_LIMIT, PAD, collect, entries_of, plan_of, prompts_of
from fp8lib import Fp8Error
from fp8lib.calibration import coverage
from fp8lib.calibration.input_statistics import InputStatistics, Sums, input_of, pack, unpack
from fp8lib.calibration.recording import Recorder
from fp8lib.model import whole_model
from fp8lib.model.prompts import Batch, make_batches
from pretended_device import PretendedCuda

LINEARS = {  # the module that sees an input first -> the weights it feeds
    "linear_attn.in_proj_qkv": ["linear_attn.in_proj_qkv", "linear_attn.in_proj_z"],
    "self_attn.q_proj": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "self_attn.o_proj": ["self_attn.o_proj"],
    "mlp.gate_proj": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.down_proj": ["mlp.down_proj"],
    "linear_attn.out_proj": ["linear_attn.out_proj"],
    "mlp.shared_expert.gate_proj": ["mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"],
    "mlp.shared_expert.down_proj": ["mlp.shared_expert.down_proj"],
}


pytestmark = pytest.mark.usefixtures("one_thread")


# --- an independent computation ----------------------------------------------------------------


@torch.no_grad()
def seen_by(
    model: transformers.PreTrainedModel, prompts: list[list[int]], prefix: str
) -> dict[str, list[np.ndarray]]:
    """Inputs of every quantized weight, token by token, by the names that the quantizer writes.

    Runs each prompt alone, catches what Linear modules and MoE blocks get, and does the routing and the
    experts' first half by hand.
    """
    caught: dict[str, list[torch.Tensor]] = defaultdict(list)
    blocks: dict[str, torch.nn.Module] = {}
    hooks = []
    for i, layer in enumerate(model.get_decoder().layers):
        for name, module in layer.named_modules():
            full = f"{prefix}layers.{i}.{name}"
            if name == "mlp" and hasattr(module, "experts"):
                blocks[full] = module
            elif name not in LINEARS:
                continue
            hooks.append(
                module.register_forward_pre_hook(
                    lambda _, args, full=full: caught[full].append(args[0].flatten(0, -2))
                )
            )
    for prompt in prompts:
        model(torch.tensor([prompt]), use_cache=False)
    for hook in hooks:
        hook.remove()
    seen: dict[str, list[np.ndarray]] = defaultdict(list)
    for full, tensors in caught.items():
        if full in blocks:
            for x in tensors:
                _route(blocks[full], x, full, seen)
            continue
        layer, name = re.fullmatch(r"(.*layers\.\d+)\.(.+)", full).groups()
        for weight in LINEARS[name]:
            seen[f"{layer}.{weight}.weight"] += [x.double().numpy() for x in tensors]
    return seen


def _route(block: torch.nn.Module, x: torch.Tensor, name: str, seen: dict[str, list[np.ndarray]]) -> None:
    scores = (x @ block.gate.weight.T).float().softmax(-1)
    chosen = scores.topk(block.gate.top_k).indices
    for e in range(block.experts.num_experts):
        mine = x[(chosen == e).any(-1)]
        gate, up = torch.nn.functional.linear(mine, block.experts.gate_up_proj[e]).chunk(2, -1)
        inner = torch.nn.functional.silu(gate) * up
        for projection, inputs in (("gate", mine), ("up", mine), ("down", inner)):
            seen[f"{name}.experts.{e}.{projection}_proj.weight"].append(inputs.double().numpy())


# --- every number ------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "experts", "prefix"), KINDS)
def test_every_recorded_value_is_that_of_an_independent_computation(checkpoint, kind, experts, prefix):
    path = checkpoint(kind, experts=experts)
    prompts = prompts_of([70, 33, 150])
    model = whole_model.load(path, "cpu")
    inputs, _ = collect(path, prompts, model=model)
    expected = seen_by(model, prompts, prefix)
    names = {m.weight.name for m in plan_of(path).matrices if not m.weight.name.startswith("mtp.")}
    assert expected.keys() == names
    for name in names:
        tokens = np.concatenate(expected[name])
        statistics, row = _of(inputs, name)
        assert statistics.tokens[row] == len(tokens), name
        if not len(tokens):
            continue
        # An expert's inner activations are BF16 results of matrix products of other shapes here and
        # there: single ones may round to the neighbour, 2^-8 away.
        is_inner = ".experts." in name and "down_proj" in name
        atol = np.abs(tokens).max(0) * (2**-7 if is_inner else 0)
        np.testing.assert_allclose(
            statistics.maximum[row], np.abs(tokens).max(0), rtol=0, atol=atol.max(), err_msg=name
        )
        np.testing.assert_allclose(
            statistics.mean_square[row],
            (tokens**2).mean(0),
            rtol=5e-3 if is_inner else 1e-6,
            err_msg=name,
        )


def _of(inputs: dict[str, InputStatistics], weight: str) -> tuple[InputStatistics, int]:
    name, row = input_of(weight)
    return inputs[name], row or 0


@pytest.mark.parametrize(("kind", "experts", "prefix"), KINDS)
def test_entries_are_named_like_the_tensors_the_quantizer_writes(checkpoint, kind, experts, prefix):
    path = checkpoint(kind, experts=experts)
    inputs, _ = collect(path, prompts_of([40]))
    entries = entries_of(path, inputs)
    assert sorted(entries) == sorted(
        m.weight.name for m in plan_of(path).matrices if not m.weight.name.startswith("mtp.")
    )
    assert all(name.startswith(f"{prefix}layers.") for name in entries)


def test_groups_that_the_quantizer_keeps_are_not_recorded(checkpoint):
    # in_proj_z has 3 * 96 rows: no whole blocks, so {in_proj_qkv, in_proj_z} stay BF16
    path = checkpoint("dense", linear_num_value_heads=3, linear_value_head_dim=96)
    inputs, _ = collect(path, prompts_of([40]))
    assert inputs
    assert not any("linear_attn" in name for name in inputs)


# --- every token once --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["moe", "dense"])
def test_padding_never_counts(checkpoint, kind):
    path = checkpoint(kind)
    prompts = prompts_of([90, 20, 55, 7])
    model = whole_model.load(path, "cpu")
    with torch.no_grad():
        # Were padding counted, channel 0 would show it: alone in its direction, it is sqrt(H) = 16
        # after the norm, ten times what other tokens reach.
        rows = model.get_input_embeddings().weight
        rows[PAD] = 0
        rows[PAD, 0] = 1000
    one_by_one, _ = collect(path, prompts, model=model)
    for batch_size in (2, 3, 4):
        together, _ = collect(path, prompts, model=model, batch_size=batch_size)
        assert together.keys() == one_by_one.keys()
        for name, statistics in together.items():
            _same_but_for_rounding(statistics, one_by_one[name], name)


def _same_but_for_rounding(one: InputStatistics, other: InputStatistics, name: str) -> None:
    """Same tokens, through matrix products and attention kernels of other shapes: BF16 rounds apart.

    A router decides by the same rounded numbers, so a token at a tie may go to another expert.
    """
    moved = np.abs(one.tokens - other.tokens)
    assert one.tokens.sum() == other.tokens.sum(), name
    assert moved.max() <= 2, name
    same = moved == 0
    scale = other.maximum[same].max(-1, keepdims=True)
    np.testing.assert_allclose(
        one.maximum[same] / scale, other.maximum[same] / scale, atol=0.03, err_msg=name
    )
    for mine, theirs in zip(one.mean_square[same], other.mean_square[same], strict=True):
        np.testing.assert_allclose(mine.mean(), theirs.mean(), rtol=0.02, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("kind", ["moe", "dense"])
def test_generated_tokens_count_once_up_to_the_end_token(checkpoint, kind):
    path = checkpoint(kind)
    prompts = prompts_of([40, 23, 31])
    model = whole_model.load(path, "cpu")
    written = [generate(model, prompt, 12) for prompt in prompts]
    stop = written[1][4]  # ends one prompt in the middle, maybe others
    cut = [tokens[: tokens.index(stop)] if stop in tokens else tokens[:-1] for tokens in written]
    assert min(map(len, cut)) < max(map(len, cut)), "prompts must end at different times"
    whole = [prompt + tokens for prompt, tokens in zip(prompts, cut, strict=True)]
    expected, _ = collect(path, whole, model=model)
    for batch_size in (1, 3):
        inputs, generated = collect(
            path, prompts, model=model, batch_size=batch_size, max_tokens=12, stop=(stop,)
        )
        assert generated == sum(map(len, cut))
        for name, statistics in inputs.items():
            _same_but_for_rounding(statistics, expected[name], name)


@torch.no_grad()
def generate(model: transformers.PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    """Greedy decoding as transformers does it."""
    ids = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=PAD,
    )
    return ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_without_a_second_token_only_the_prompt_is_seen(checkpoint, max_tokens):
    path = checkpoint("dense")
    inputs, generated = collect(path, prompts_of([30, 12]), batch_size=2, max_tokens=max_tokens)
    assert generated == 0
    assert {int(s.tokens[0]) for s in inputs.values()} == {42}


# --- the model does not notice -----------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
def test_outputs_are_bit_identical_to_a_run_without_collection(checkpoint, implementation):
    path = checkpoint("moe")
    model = whole_model.load(path, "cpu")
    model.set_experts_implementation(implementation)
    batch = make_batches(prompts_of([60, 25]), 2, NO_LIMIT, PAD)[0]
    plain = _logits(model, batch)
    with Recorder(plan_of(path)) as recorder:
        recorder.attach(model)
        recorder.look_at(batch.mask)
        recorded = _logits(model, batch)
        assert any(".experts" in name for name in recorder.take())
    assert torch.equal(recorded, plain)
    assert torch.equal(_logits(model, batch), plain)


@torch.no_grad()
def _logits(model: transformers.PreTrainedModel, batch: Batch) -> torch.Tensor:
    return model(batch.ids, **batch.to_model("cpu"), use_cache=False).logits


def test_nothing_of_the_recorder_stays_behind(checkpoint):
    path = checkpoint("moe")
    model = whole_model.load(path, "cpu")
    before = dict(ALL_EXPERTS_FUNCTIONS)

    def mine(*args: torch.Tensor) -> torch.Tensor:
        return before["grouped_mm"](*args)

    ALL_EXPERTS_FUNCTIONS["grouped_mm"] = mine  # as a user of the library may
    try:
        with suppress(KeyboardInterrupt), Recorder(plan_of(path)) as recorder:
            recorder.attach(model)
            raise KeyboardInterrupt
        assert ALL_EXPERTS_FUNCTIONS["grouped_mm"] is mine
    finally:
        del ALL_EXPERTS_FUNCTIONS["grouped_mm"]
    assert dict(ALL_EXPERTS_FUNCTIONS) == before
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_weights_that_accelerate_offloads_are_recorded_all_the_same(checkpoint):
    from accelerate import cpu_offload

    path = checkpoint("moe")
    prompts = prompts_of([50, 20])
    model = whole_model.load(path, "cpu")
    resident, _ = collect(path, prompts, model=model, batch_size=2, max_tokens=4)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert next(model.parameters()).device.type == "meta"
    offloaded, _ = collect(path, prompts, model=model, batch_size=2, max_tokens=4)
    for name, statistics in offloaded.items():
        np.testing.assert_array_equal(statistics.mean_square, resident[name].mean_square)
        np.testing.assert_array_equal(statistics.maximum, resident[name].maximum)


class _NoWaiting(TorchDispatchMode):
    """Refuses what makes the host wait for a device: reading a value, shapes that depend on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        waits = ("_local_scalar_dense", "nonzero", "unique", "_unique2", "bincount", "masked_select", "item")
        assert name not in waits, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


def test_no_call_waits_for_the_device():
    sums, experts = Sums(1, 8, torch.device("cpu")), Sums(4, 8, torch.device("cpu"))
    x, group = torch.randn(20, 8).bfloat16(), torch.arange(20) % 4
    with _NoWaiting():
        sums.add(x)
        experts.add_grouped(x, group)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real device here")
@pytest.mark.parametrize(("capability", "waits"), [((9, 0), {}), ((8, 0), {"_grouped_mm": 1})])
def test_recording_experts_waits_at_most_for_grouped_mm(checkpoint, capability, waits):
    path = checkpoint("moe")
    modules = whole_model.load(path, "cpu").named_modules()
    experts = next(module for name, module in modules if name.endswith("mlp.experts"))
    weights = experts.gate_up_proj.detach()
    del experts.gate_up_proj
    with PretendedCuda(capability=capability) as cuda, torch.no_grad(), Recorder(plan_of(path)) as recorder:
        experts.__dict__["gate_up_proj"] = weights.to("cuda:0")
        recorder._watched[experts] = "experts"
        recorder.look_at(torch.arange(100).view(1, -1) < 85)
        x = recorder._tokens(torch.randn(100, 256).bfloat16().to("cuda:0"))
        routed = recorder._tokens((torch.arange(200) % 8).view(100, 2).to("cuda:0"))
        cuda.waits.clear()
        recorder._record_experts(experts, x, routed)
        assert dict(cuda.waits) == waits
    assert sorted(recorder._sums) == ["experts", "experts.down_proj"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real device here")
def test_leaving_out_padding_does_not_wait(checkpoint):
    with PretendedCuda() as cuda, torch.no_grad(), Recorder(plan_of(checkpoint("moe"))) as recorder:
        x = torch.randn(100, 256).bfloat16().to("cuda:0")
        cuda.waits.clear()
        recorder.look_at(torch.arange(100).view(1, -1) < 85)
        assert recorder._tokens(x).shape == (85, 256)
        assert not cuda.waits  # a copy from memory that is not pinned would be one


@pytest.mark.gpu
def test_recording_experts_waits_for_cuda_at_most_in_grouped_mm(checkpoint):
    path = checkpoint("moe")
    model = whole_model.load(path, "cuda:0")
    batch = make_batches(prompts_of([60, 25]), 2, NO_LIMIT, PAD)[0]
    with Recorder(plan_of(path)) as recorder:
        recorder.attach(model)
        recorder.look_at(batch.mask)
        x = torch.randn(85, 256, device="cuda").bfloat16()
        routed = torch.randint(0, 8, (85, 2), device="cuda")
        experts = next(iter(recorder._watched))
        recorder._kept_on[x.device] = torch.arange(85, device="cuda")
        reads_offsets_on_the_device = torch.cuda.get_device_capability()[0] in (9, 10)
        waits = (
            nullcontext() if reads_offsets_on_the_device else pytest.raises(RuntimeError, match="synchroniz")
        )
        torch.cuda.set_sync_debug_mode("error")
        try:
            with waits:
                recorder._record_experts(experts, recorder._tokens(x), recorder._tokens(routed))
        finally:
            torch.cuda.set_sync_debug_mode("default")


# --- sums --------------------------------------------------------------------------------------


def test_long_inputs_are_summed_in_pieces_and_in_float64(monkeypatch):
    monkeypatch.setattr("fp8lib.calibration.input_statistics._PIECE", 64)
    x = torch.cat([torch.full((1, 8), 256.0), torch.full((100_000, 8), 2.0**-9)]).bfloat16()
    sums = Sums(1, 8, x.device)
    sums.add(x)
    # float32 would lose every one of the small squares, 2^-34 of the large one
    exact = (256.0**2 + 100_000 * 2.0**-18) / 100_001
    np.testing.assert_allclose(sums.result().mean_square, exact, rtol=1e-7)
    assert sums.squares.unique().item() == 256.0**2 + 100_000 * 2.0**-18


def test_merged_statistics_are_those_of_one_run(checkpoint):
    path = checkpoint("moe")
    prompts = prompts_of([40, 30, 20, 25])
    model = whole_model.load(path, "cpu")
    whole, _ = collect(path, prompts, model=model)
    parts = [unpack(pack(collect(path, prompts[i::2], model=model)[0])) for i in range(2)]
    for name, statistics in whole.items():
        merged = parts[0][name].merged(parts[1][name])
        np.testing.assert_array_equal(merged.tokens, statistics.tokens)
        np.testing.assert_array_equal(merged.maximum, statistics.maximum)
        np.testing.assert_allclose(merged.squares, statistics.squares, rtol=1e-14)


# --- experts that saw too little ---------------------------------------------------------------


def test_an_expert_with_too_few_tokens_takes_its_layers_statistics(checkpoint):
    path = checkpoint("moe")
    inputs, _ = collect(path, prompts_of([200, 30]))
    name = "model.language_model.layers.0.mlp.experts"
    tokens = inputs[name].tokens
    assert (tokens < coverage.ENOUGH).any(), "the test needs a starved expert"
    assert (tokens >= coverage.ENOUGH).any(), "and a fed one"
    entries = entries_of(path, inputs)
    for e, seen in enumerate(tokens):
        for projection, key in (("gate", name), ("up", name), ("down", f"{name}.down_proj")):
            entry, statistics = entries[f"{name}.{e}.{projection}_proj.weight"], inputs[key]
            assert entry.tokens == seen
            if seen >= coverage.ENOUGH:
                expected = statistics.mean_square[e]
                maximum = statistics.maximum[e]
            else:
                expected = (statistics.mean_square * tokens[:, None]).sum(0) / tokens.sum()
                maximum = statistics.maximum.max(0)
            np.testing.assert_allclose(entry.mean_square, expected, rtol=1e-6)
            np.testing.assert_array_equal(entry.maximum, maximum)


def _coverage(*layers: tuple[int, ...], tokens: int = 5000) -> coverage.Coverage:
    named = tuple(coverage.Layer(f"layers.{i}", counts) for i, counts in enumerate(layers))
    return coverage.Coverage(10, 10, named, tokens)


def test_coverage_counts_experts_by_what_they_saw():
    found = _coverage((100, 0, 63, 64), (0, 0, 500, 1))
    assert (found.experts, found.unseen, found.starved) == (8, 3, 5)
    assert found.least_fed.name == "layers.1"


def test_poor_coverage_says_what_to_do():
    assert _coverage((100,) * 9 + (63,)).advice() is None  # one in ten is not yet poor
    advice = _coverage((100,) * 8 + (63, 0)).advice()
    assert "--prompts_file" in advice
    assert "--max_tokens" in advice
    assert "20%" in advice
    assert "--prompts_file" in _coverage(tokens=999).advice()
    assert _coverage(tokens=1000).advice() is None


# --- a broken model ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensor", "first"),
    [
        ("layers.2.linear_attn.out_proj.weight", "layers.2"),
        ("layers.3.self_attn.v_proj.weight", "layers.3"),
        ("layers.1.mlp.experts.down_proj", "layers.1"),
        ("embed_tokens.weight", "embed_tokens"),
    ],
)
def test_activations_that_are_not_finite_name_the_first_layer_that_puts_them_out(checkpoint, tensor, first):
    path = checkpoint("moe")
    model = whole_model.load(path, "cpu")
    with torch.no_grad():
        model.get_decoder().get_parameter(tensor).fill_(float("nan"))
    with pytest.raises(Fp8Error, match=rf"^(\S+\.)?{first}: NaN or infinite activations"):
        collect(path, prompts_of([30]), model=model)


def test_padding_that_is_not_finite_is_not_a_broken_model(checkpoint):
    layer = torch.nn.Identity()
    recorder = Recorder(plan_of(checkpoint("dense")))
    recorder.attach(layer, "model.layers.0")
    states = torch.tensor([[[float("inf")], [1.0]]])  # one prompt, a padded and a real token
    recorder.look_at(torch.tensor([[False, True]]))
    layer(states)
    recorder.check_finite()
    recorder.look_at(torch.tensor([[True, True]]))
    layer(states)
    with pytest.raises(Fp8Error):
        recorder.check_finite()
