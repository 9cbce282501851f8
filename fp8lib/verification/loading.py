"""Says what engines need to load a directory: tensor-parallel sizes and weights per GPU."""

from collections.abc import Sequence

from fp8lib.checkpoint.tensor_parallel import ENGINES, Size
from fp8lib.terminal import Printer, size

_INDENT = " " * 24


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


def _refusal(row: Size) -> str:
    """`8: why`, with the engines' names where they differ."""
    reasons = set(row.refusals.values())
    if len(row.refusals) == len(ENGINES) and len(reasons) == 1:
        return f"{row.ranks}: {reasons.pop()}"
    loads = "".join(f"{engine} loads it; " for engine in ENGINES if engine not in row.refusals)
    return f"{row.ranks}: {loads}" + "; ".join(f"{engine}: {why}" for engine, why in row.refusals.items())
