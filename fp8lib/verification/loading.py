"""Says what engines need to load a directory: tensor-parallel sizes and weights per GPU."""

from collections.abc import Sequence

from fp8lib.checkpoint.tensor_parallel import ENGINES, EXPERT_PARALLELISM, Size
from fp8lib.terminal import Printer, size

_INDENT = " " * 24
GPU_BYTES = 80_000_000_000
"""Memory of the GPUs that commands are made for."""


def print_loading(printer: Printer, sizes: Sequence[Size] | str) -> None:
    """The rows `Tensor parallel` and `Weights per GPU`.

    Args:
        printer: where to.
        sizes: what `tensor_parallel` says of the FP8 directory.
    """
    if isinstance(sizes, str):
        printer.wrapped(f"unknown: config.json has no {sizes}", "  Tensor parallel     : ", _INDENT)
        return
    everywhere = " ".join(str(s.ranks) for s in sizes if s.loads_everywhere) or "none"
    others = "".join(f" ({_refusal(s)})" for s in sizes if not s.loads_everywhere)
    printer.wrapped(everywhere + others, "  Tensor parallel     : ", _INDENT)
    held = "  ".join(f"{s.ranks}: {size(s.nbytes)}" for s in sizes if len(s.refusals) < len(ENGINES))
    printer.wrapped(held or "none", "  Weights per GPU     : ", _INDENT)


def serving_commands(sizes: Sequence[Size] | str, folder: str) -> list[str]:
    """How to serve a directory, one command per engine that loads it.

    The smallest number of GPUs is taken that leaves a fourth of their memory to the KV cache; where a whole
    number of experts on each is what helps, expert parallelism.

    Args:
        sizes: what `tensor_parallel` says of the FP8 directory.
        folder: it, as a shell needs it.
    """
    if isinstance(sizes, str):
        return []
    programs = (
        ("vLLM", f"vllm serve {folder}", "--tensor-parallel-size {}", " --enable-expert-parallel"),
        ("SGLang", f"python -m sglang.launch_server --model-path {folder}", "--tp {}", " --ep {}"),
    )
    found = []
    for engine, program, parallel, experts in programs:
        plain = [s for s in sizes if engine not in s.refusals]
        by_experts = [s for s in sizes if s.refusals.get(engine, "").endswith(EXPERT_PARALLELISM)]
        fitting = [s for s in (*plain, *by_experts) if s.nbytes <= GPU_BYTES * 3 // 4]
        chosen = fitting[0] if fitting else (plain or by_experts or [None])[-1]
        if chosen is not None:
            flags = parallel + (experts if chosen in by_experts else "")
            found.append(f"{program} {flags.replace('{}', str(chosen.ranks))}")
    return found


def _refusal(row: Size) -> str:
    """`8: why`, with the engines' names where they differ."""
    reasons = set(row.refusals.values())
    if len(row.refusals) == len(ENGINES) and len(reasons) == 1:
        return f"{row.ranks}: {reasons.pop()}"
    loads = "".join(f"{engine} loads it; " for engine in ENGINES if engine not in row.refusals)
    return f"{row.ranks}: {loads}" + "; ".join(f"{engine}: {why}" for engine, why in row.refusals.items())
