"""Pairs a finished FP8 directory with its BF16 original, by tensor names alone.

For `--verify_only`: the FP8 directory may come from this tool, from the model's publisher or from another
tool. It may have quantized modules that the rules keep, kept some that they quantize, and store its
scales as F32.
"""

from collections.abc import Iterator

from fp8lib.checkpoint import ITEM_SIZE, Checkpoint, Shard, Tensor, printable
from fp8lib.lanes import DTYPES
from fp8lib.plan import matrices_of
from fp8lib.rules import blocks
from fp8lib.verify import Extent, Pair

SCALE_SUFFIX = "_scale_inv"


def pair_directories(
    original: Checkpoint, quantized: Checkpoint
) -> list[tuple[Shard, list[Pair], list[str]]]:
    """For each shard of the FP8 directory: its pairs, and one line per structural problem.

    A tensor of the original that is nowhere in the FP8 directory is a problem of its first shard.
    """
    sources = {t.name: t for shard in original.shards for t in shard.tensors}
    matrices = {name: rest for shard in original.shards for name, *rest in _matrices(shard)}
    present = {t.name: (shard, t) for shard in quantized.shards for t in shard.tensors}
    result = []
    for shard in quantized.shards:
        pairs, problems = [], []
        for tensor in shard.tensors:
            if tensor.name.endswith(SCALE_SUFFIX) and tensor.name not in sources:
                weight = present.get(tensor.name.removesuffix(SCALE_SUFFIX))
                if weight is None or weight[1].dtype != "F8_E4M3":
                    problems.append(f"{printable(tensor.name)}: a scale without an FP8 weight")
            elif tensor.dtype == "F8_E4M3":
                found = _pair(shard, tensor, matrices, present)
                (problems if isinstance(found, str) else pairs).append(found)
            elif problem := _problem_of_kept(tensor, sources, matrices):
                problems.append(problem)
        result.append((shard, pairs, problems))
    if not any(pairs for _, pairs, _ in result):
        result[0][2].append("no FP8 weight in it that the original has too: nothing was measured")
    result[0][2].extend(
        f"{printable(name)}: missing from the FP8 directory"
        for tensor in sources.values()
        if tensor.name not in present
        for name in ([n for n, *_ in matrices_of(tensor) if n not in present] or [tensor.name])
        if not _is_split(tensor, present)
    )
    return result


def _matrices(shard: Shard) -> Iterator[tuple[str, Extent, int, int]]:
    """(name, where, rows, columns) of every matrix of the original that could be FP8 in the other."""
    for tensor in shard.tensors:
        if tensor.dtype not in DTYPES:
            continue
        parts = matrices_of(tensor)
        if not parts and len(tensor.shape) == 2:
            parts = [(tensor.name, *tensor.shape)]
        start = tensor.start
        for name, rows, columns in parts:
            yield name, Extent(shard.path, tensor.dtype, start), rows, columns
            start += rows * columns * ITEM_SIZE[tensor.dtype]


def _is_split(tensor: Tensor, present: dict) -> bool:
    """Whether a fused tensor is there in full, expert by expert."""
    parts = matrices_of(tensor)
    return bool(parts) and all(name in present for name, *_ in parts)


def _pair(shard: Shard, tensor: Tensor, matrices: dict, present: dict) -> Pair | str:
    """An FP8 tensor's pair, or what is wrong with it."""
    name = printable(tensor.name)
    if tensor.name not in matrices:
        return f"{name}: FP8, but the original has no such matrix"
    source, rows, columns = matrices[tensor.name]
    if tensor.shape != (rows, columns):
        return f"{name}: {list(tensor.shape)}, {[rows, columns]} in the original"
    if not tensor.nbytes:
        return f"{name}: FP8, but empty"
    scale_shard, scale = present.get(tensor.name + SCALE_SUFFIX, (None, None))
    if scale is None:
        return f"{name}: FP8 without a {name}{SCALE_SUFFIX}"
    expected = (blocks(rows), blocks(columns))
    if scale.dtype not in DTYPES or scale.shape != expected:
        return f"{printable(scale.name)}: {scale.dtype} {list(scale.shape)}, expected BF16 {list(expected)}"
    return Pair(
        tensor.name,
        rows,
        columns,
        source,
        Extent(shard.path, tensor.dtype, tensor.start),
        Extent(scale_shard.path, scale.dtype, scale.start),
    )


def _problem_of_kept(tensor: Tensor, sources: dict[str, Tensor], matrices: dict) -> str | None:
    """What is wrong with a tensor that is not FP8, if anything; another float dtype is not."""
    if tensor.name in sources:
        shape = sources[tensor.name].shape
    elif tensor.name in matrices:
        shape = tuple(matrices[tensor.name][1:])
    else:
        return f"{printable(tensor.name)}: not in the original"
    if tensor.shape != shape:
        return f"{printable(tensor.name)}: {list(tensor.shape)}, {list(shape)} in the original"
    return None
