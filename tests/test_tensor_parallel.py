"""Which tensor-parallel sizes load, and what each GPU holds: real sizes against rows worked out by hand."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

import checkpoints
from fp8lib.checkpoint.directory import open_checkpoint
from fp8lib.checkpoint.headers import Tensor
from fp8lib.checkpoint.plan import Plan, make_plan
from fp8lib.checkpoint.rules import Selection
from fp8lib.checkpoint.tensor_parallel import tensor_parallel

SHARED = "shared_expert_intermediate_size"
EXPERTS = "is no multiple of 128; use expert parallelism"


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Plan]:
    """`real(model, eligibility)`: the plan for its true headers, vision tower included, in a sparse file."""
    folder = tmp_path_factory.mktemp("real")

    @cache
    def make(model: str, eligibility: str = "toolkit") -> Plan:
        if not (folder / model).exists():
            checkpoints.write(folder / model, checkpoints.complete(model), 1, sparse=True)
        return make_plan(open_checkpoint(folder / model), Selection(eligibility))

    return make


def rows(plan: Plan) -> dict[int, dict[str, str]]:
    """Size -> why which engine does not load it."""
    return {row.ranks: row.refusals for row in tensor_parallel(plan.outputs(), plan.config())}


def both(why: str) -> dict[str, str]:
    return {"vLLM": why, "SGLang": why}


# --- the tensors of the real sizes -------------------------------------------------------------

COUNTS = {
    # model: (vision; official: tensors, FP8 weights, mtp.*; toolkit: tensors, FP8 weights)
    # 35B: the public inventory of Qwen3.6-35B-A3B-FP8. 27B: 407 FP8 weights, of Qwen's 27B FP8 release.
    # 35B toolkit: less 30 out_proj and 41 x 3 of shared experts, twice in the number of tensors.
    "35B-A3B": (333, 64_196, 31_745, 1_560, 64_196 - 153, 31_745 - 153),
    "27B": (333, 1_606, 407, 22, 1_606 - 48, 407 - 48),
    "9B": (333, 982, 207, 22, 982 - 24, 207 - 24),
    "4B": (297, 945, 207, 22, 945 - 24, 207 - 24),
    "2B": (297, 789, 157, 22, 789 - 18, 157 - 18),
    "0.8B": (153, 645, 157, 22, 645 - 18, 157 - 18),
}


@pytest.mark.parametrize(("model", "counts"), COUNTS.items(), ids=COUNTS)
def test_the_sets_have_as_many_tensors_as_the_releases(model: str, counts: tuple, real: Callable) -> None:
    vision, tensors, fp8, draft, fewer, less_fp8 = counts
    names = [t.name for t in real(model, "official").outputs()]
    assert len(names) == tensors
    assert sum(name.endswith(".weight_scale_inv") for name in names) == fp8
    assert sum(name.startswith("mtp.") for name in names) == draft
    assert sum(name.startswith("model.visual.") for name in names) == vision
    toolkit = [t.name for t in real(model).outputs()]
    assert (len(toolkit), sum(name.endswith(".weight_scale_inv") for name in toolkit)) == (fewer, less_fp8)


# --- which sizes load --------------------------------------------------------------------------

REFUSED = {
    # I = 512: 512 / 8 = 64 and 512 / 16 = 32; vLLM takes parts of 32 and 64 as smaller blocks.
    ("35B-A3B", "toolkit"): {
        8: {"SGLang": f"moe_intermediate_size 512 / 8 = 64 {EXPERTS}"},
        16: {"SGLang": f"moe_intermediate_size 512 / 16 = 32 {EXPERTS}"},
    },
    # FP8 shared experts are linears, which no engine cuts inside a block.
    ("35B-A3B", "official"): {
        8: both(f"{SHARED} 512 / 8 = 64 is no multiple of 128"),
        16: both(f"{SHARED} 512 / 16 = 32 is no multiple of 128"),
    },
    ("27B", "toolkit"): {16: both("num_attention_heads 24 / 16 is not whole")},
    ("27B", "official"): {16: both("num_attention_heads 24 / 16 is not whole")},
    ("9B", "official"): {},  # 16 heads, 12288 / 16 = 768 = 6 x 128
    ("4B", "official"): {16: both("intermediate_size 9216 / 16 = 576 is no multiple of 128")},
    ("2B", "official"): {16: both("num_attention_heads 8 / 16 is not whole")},
    ("0.8B", "toolkit"): {
        8: both("intermediate_size 3584 / 8 = 448 is no multiple of 128"),
        16: both("num_attention_heads 8 / 16 is not whole"),
    },
}


@pytest.mark.parametrize(("case", "refused"), REFUSED.items(), ids=map(" ".join, REFUSED))
def test_real_sizes(case: tuple[str, str], refused: dict, real: Callable) -> None:
    found = rows(real(*case))
    assert found == {ranks: refused.get(ranks, {}) for ranks in (1, 2, 4, 8, 16)}


@pytest.mark.parametrize("model", ["397B-A17B", "122B-A10B"])
def test_the_largest_sizes(model: str, tmp_path: Path) -> None:
    """I = 1024 in both: 1024 / 16 = 64. Four layers, one of each kind and more, say as much as all."""
    shape = checkpoints.replace(checkpoints.complete(model), layers=4, experts=16)
    checkpoints.write(tmp_path, shape, 1, sparse=True)
    checkpoint = open_checkpoint(tmp_path)
    why = f"moe_intermediate_size 1024 / 16 = 64 {EXPERTS}"
    assert rows(make_plan(checkpoint)) == {1: {}, 2: {}, 4: {}, 8: {}, 16: {"SGLang": why}}
    kept = rows(make_plan(checkpoint, Selection(keep=("*.mlp.experts",))))
    assert kept[16] == {}  # BF16 is cut anywhere
    official = rows(make_plan(checkpoint, Selection("official")))
    assert official[8] == {}
    assert official[16] == both(f"{SHARED} 1024 / 16 = 64 is no multiple of 128")


# --- weights per GPU ---------------------------------------------------------------------------


def of(name: str, *shape: int, dtype: str = "BF16") -> Tensor:
    nbytes = 1 if dtype == "F8_E4M3" else 2
    for extent in shape:
        nbytes *= extent
    return Tensor(name, dtype, shape, 0, nbytes)


def test_what_is_cut_what_is_repeated_and_what_is_whole() -> None:
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2}
    layer = "model.layers.0"
    cases = [
        (
            of(f"{layer}.self_attn.o_proj.weight", 1024, 2048, dtype="F8_E4M3"),
            [8, 4, 2, 1],
        ),  # quarters of MiB
        (of(f"{layer}.self_attn.k_proj.weight", 512, 1024), [4, 2, 2, 2]),  # 2 heads: repeated from 4 GPUs on
        (of(f"{layer}.mlp.gate.weight", 512, 1024), [4, 4, 4, 4]),  # the router is on every GPU
        (of("lm_head.weight", 1024, 1024), [8, 4, 2, 1]),
    ]
    for tensor, quarters in cases:
        found = tensor_parallel([tensor], {"text_config": heads})
        assert [row.nbytes for row in found[:4]] == [q * 2**18 for q in quarters], tensor.name


def test_one_gpu_holds_every_byte(real: Callable) -> None:
    plan = real("35B-A3B")
    one, two, *_ = tensor_parallel(plan.outputs(), plan.config())
    assert one.nbytes == sum(t.nbytes for t in plan.outputs())
    # All but routers, norms and what little of the vision tower is on every GPU.
    assert two.nbytes == pytest.approx(one.nbytes / 2, rel=2e-3)


# --- what is printed ---------------------------------------------------------------------------


def printed(text: str, label: str) -> str:
    """A row of the dry run or summary, its lines joined."""
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith(f"  {label}"))
    more = [line.strip() for line in lines[first + 1 :]]
    end = next(i for i, line in enumerate(lines[first + 1 :]) if not line.startswith(" " * 24))
    return " ".join([lines[first].partition(": ")[2], *more[:end]])


def test_dry_run_says_what_loads_and_what_official_would_save(real: Callable, cli: Callable) -> None:
    text = cli("--input_dir", real("35B-A3B").checkpoint.root, "--dry_run").out
    why = "SGLang: moe_intermediate_size 512 / {} = {} is no multiple of 128; use expert parallelism"
    assert printed(text, "Tensor parallel") == (
        f"1 2 4 (8: vLLM loads it; {why.format(8, 64)}) (16: vLLM loads it; {why.format(16, 32)})"
    )
    assert printed(text, "Weights per GPU").startswith("1: 37.8GB  2: 19.0GB  4: 9.52GB")
    # Out: 30 x 2048 x 4096, shared: 41 x 3 x 512 x 2048 weights; a byte each, less 2 per 16,384 for scales.
    saved = (30 * 2048 * 4096 + 41 * 3 * 512 * 2048) * (1 - 2 / 128**2)
    assert f"would save {saved / 1e6:.0f}MB" in printed(text, "Official set")
    assert "(512) to be a multiple of 128 times the tensor-parallel size" in printed(text, "Official set")


def test_the_summary_and_verify_only_say_it_too(
    checkpoint: Callable, quantized: Callable, cli: Callable
) -> None:
    source = checkpoint("text")
    expected = "1 (2: linear_num_key_heads 1 / 2 is not whole)"
    output = quantized(source)
    for flags in ((), ("--verify_only",)):
        text = cli("--input_dir", source, "--output_dir", output, *flags).out
        assert printed(text, "Tensor parallel").startswith(expected)
        assert printed(text, "Weights per GPU").startswith("1: ")


def test_a_config_without_heads_is_said_to_lack_them(checkpoint: Callable) -> None:
    plan = make_plan(open_checkpoint(checkpoint("text")))
    config = {k: v for k, v in plan.config().items() if k != "num_attention_heads"}
    assert tensor_parallel(plan.outputs(), config) == "num_attention_heads"
