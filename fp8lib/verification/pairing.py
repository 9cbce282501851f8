"""Pairs FP8 weights on disk with the originals they came from.

The plan knows them for a shard that was written as planned. For `--verify_only` a whole directory is paired
by tensor names alone: it may come from this tool, from the model's publisher or from another tool. It may
have quantized modules that the rules keep, kept some that they quantize, and store its scales as F32.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fp8lib.checkpoint.directory import Checkpoint
from fp8lib.checkpoint.headers import ITEM_SIZE, Shard, Tensor, read_shard
from fp8lib.checkpoint.layout import SCALE_SUFFIX, Extent, Matrix, ShardPlan, matrices_of
from fp8lib.checkpoint.untrusted import printable
from fp8lib.numerics.blocks import blocks
from fp8lib.streaming.lanes import DTYPES


@dataclass(frozen=True, slots=True)
class Pair:
    """An FP8 weight with its scale, and the original it came from.

    `scale` is BF16 or F32 [ceil(rows/128), ceil(columns/128)].
    """

    name: str
    rows: int
    columns: int
    source: Extent
    weight: Extent
    scale: Extent

    @property
    def matrix(self) -> Matrix:
        """The same as something to quantize again."""
        grid = blocks(self.rows), blocks(self.columns)
        nbytes = grid[0] * grid[1] * ITEM_SIZE[self.scale.dtype]
        size = self.rows * self.columns
        weight = Tensor(self.name, self.weight.dtype, (self.rows, self.columns), self.weight.start, size)
        scale = Tensor(self.name + SCALE_SUFFIX, self.scale.dtype, grid, self.scale.start, nbytes)
        return Matrix(self.source.dtype, self.source.start, self.rows, self.columns, weight, scale)


@dataclass(frozen=True, slots=True)
class Kept:
    """A tensor that is not FP8, and the same of the input: `count` values in either."""

    name: str
    count: int
    source: Extent
    output: Extent

    @property
    def nbytes(self) -> int:
        """In the output."""
        return self.count * ITEM_SIZE[self.output.dtype]


@dataclass(frozen=True, slots=True)
class Pairing:
    """What a shard of an FP8 directory has in common with the original, and one line per deviation."""

    shard: Shard
    pairs: list[Pair]
    kept: list[Kept]
    problems: list[str]


def planned_kept(plan: ShardPlan, path: Path) -> list[Kept]:
    """The kept tensors of a shard that was written to `path` as planned."""
    return [
        Kept(
            item.output.name,
            math.prod(item.output.shape),
            Extent(plan.source.path, item.dtype or item.output.dtype, item.start),
            Extent(path, item.output.dtype, item.output.start),
        )
        for item in plan.passthrough
    ]


def planned_pairs(plan: ShardPlan, path: Path) -> list[Pair]:
    """The pairs of a shard that was written to `path` as planned."""
    return [
        Pair(
            m.weight.name,
            m.rows,
            m.columns,
            Extent(plan.source.path, m.dtype, m.start),
            Extent(path, m.weight.dtype, m.weight.start),
            Extent(path, m.scale.dtype, m.scale.start),
        )
        for m in plan.matrices
    ]


def structural_problems(plan: ShardPlan, path: Path) -> list[str]:
    """Compare a written shard's header with the plan.

    Returns:
        One line per deviation.

    Raises:
        Fp8Error: the file cannot be read or is not a valid safetensors file.
    """
    shard = read_shard(path)
    found = {t.name: t for t in shard.tensors}
    problems = []
    for expected in plan.outputs():
        tensor = found.pop(expected.name, None)
        if tensor is None:
            problems.append(f"{printable(expected.name)}: missing from {shard.name}")
        elif (tensor.dtype, tensor.shape, tensor.start) != (expected.dtype, expected.shape, expected.start):
            problems.append(
                f"{printable(expected.name)}: {tensor.dtype} {list(tensor.shape)} in {shard.name}, "
                f"planned {expected.dtype} {list(expected.shape)}"
            )
    problems += [f"{printable(name)}: in {shard.name} but not in the plan" for name in found]
    planned = hashlib.sha256(plan.header[8:]).hexdigest()
    if not problems and plan.header and shard.header_sha256 != planned:
        problems.append(f"{shard.name}: its header is not the one that was planned")
    return problems


# --- whole directories -------------------------------------------------------------------------


def pair_directories(original: Checkpoint, quantized: Checkpoint) -> list[Pairing]:
    """Pair each shard of the FP8 directory with the original.

    A tensor of the original that is nowhere in the FP8 directory is a problem of its first shard.
    """
    sources = {t.name: (shard, t) for shard in original.shards for t in shard.tensors}
    matrices = {name: rest for shard in original.shards for name, *rest in _matrices(shard)}
    present = {t.name: (shard, t) for shard in quantized.shards for t in shard.tensors}
    result = []
    for shard in quantized.shards:
        pairing = Pairing(shard, [], [], [])
        for tensor in shard.tensors:
            if tensor.name.endswith(SCALE_SUFFIX) and tensor.name not in sources:
                weight = present.get(tensor.name.removesuffix(SCALE_SUFFIX))
                if weight is None or weight[1].dtype != "F8_E4M3":
                    pairing.problems.append(f"{printable(tensor.name)}: a scale without an FP8 weight")
                continue
            if tensor.dtype == "F8_E4M3":
                found, paired = _pair(shard, tensor, matrices, present), pairing.pairs
            else:
                found, paired = _pair_kept(shard, tensor, sources, matrices), pairing.kept
            (pairing.problems if isinstance(found, str) else paired).append(found)
        result.append(pairing)
    first = result[0].problems
    if not any(pairing.pairs for pairing in result):
        first.append("no FP8 weight in it that the original has too: nothing was measured")
    first.extend(
        f"{printable(name)}: missing from the FP8 directory"
        for _, tensor in sources.values()
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


def _pair_kept(shard: Shard, tensor: Tensor, sources: dict, matrices: dict) -> Kept | str:
    """A tensor that is not FP8 with the original's, or what is wrong with it; another float dtype is not."""
    name = printable(tensor.name)
    if tensor.name in sources:
        home, other = sources[tensor.name]
        shape, source = other.shape, Extent(home.path, other.dtype, other.start)
    elif tensor.name in matrices:
        source, *shape = matrices[tensor.name]
    else:
        return f"{name}: not in the original"
    if tensor.shape != tuple(shape):
        return f"{name}: {list(tensor.shape)}, {list(shape)} in the original"
    if tensor.dtype != source.dtype and not {tensor.dtype, source.dtype} <= DTYPES.keys():
        return f"{name}: {tensor.dtype}, {source.dtype} in the original"
    return Kept(tensor.name, math.prod(shape), source, Extent(shard.path, tensor.dtype, tensor.start))
