"""Commands that serve a directory, from the tensor-parallel table."""

import pytest

from fp8lib.checkpoint.tensor_parallel import EXPERT_PARALLELISM, Size
from fp8lib.verification.loading import serving_commands

GB = 1_000_000_000
NARROW = f"moe_intermediate_size 512 / 8 = 64 is no multiple of 128; {EXPERT_PARALLELISM}"


def sizes(total: int, **refusals: dict[str, str]) -> list[Size]:
    """Weights of so many GB on 1 to 16 GPUs; `refusals` by `n8` for 8 ranks."""
    return [Size(n, refusals.get(f"n{n}", {}), total * GB // n) for n in (1, 2, 4, 8, 16)]


@pytest.mark.parametrize(
    ("total", "ranks"),
    [(38, 1), (60, 1), (61, 2), (129, 4), (408, 8), (2000, 16)],  # 60 GB: three fourths of 80
)
def test_the_smallest_number_of_gpus_that_leaves_room_for_the_cache(total: int, ranks: int) -> None:
    vllm, sglang = serving_commands(sizes(total), "fp8")
    assert vllm == f"vllm serve fp8 --tensor-parallel-size {ranks}"
    assert sglang == f"python -m sglang.launch_server --model-path fp8 --tp {ranks}"


def test_expert_parallelism_where_narrow_experts_are_all_that_is_in_the_way() -> None:
    table = sizes(408, n8={"SGLang": NARROW}, n16={"vLLM": NARROW, "SGLang": NARROW})
    vllm, sglang = serving_commands(table, "fp8")
    assert vllm.endswith("--tensor-parallel-size 8")
    assert sglang.endswith("--tp 8 --ep 8")


def test_no_command_for_an_engine_that_loads_no_size() -> None:
    never = {f"n{n}": {"vLLM": "num_attention_heads 3"} for n in (1, 2, 4, 8, 16)}
    assert [command.split()[0] for command in serving_commands(sizes(38, **never), "fp8")] == ["python"]
    assert serving_commands("num_attention_heads", "fp8") == []
