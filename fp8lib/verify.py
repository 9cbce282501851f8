"""Re-reads what was written and measures it against the source.

Two questions, both put to the files on disk. Structure, for every tensor: is the shard what the plan
says, dtype by dtype and shape by shape, nothing missing, nothing extra, every scale finite and positive?
Error, for a random sample of matrices: how far is the dequantized weight from the original?

    cosine    <w, w'> / (|w| |w'|), computed as (|w|^2 + |w'|^2 - |w - w'|^2) / (2 |w| |w'|), which keeps
              the digits of 1 - cosine that a plain dot product in float32 loses
    mean_abs  mean of |w - w'|
    max_abs   largest |w - w'|
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fp8lib.checkpoint import ITEM_SIZE, printable, read_shard
from fp8lib.e4m3 import DTYPE, dequantize
from fp8lib.health import Measurement, max_or_nan
from fp8lib.lanes import DTYPES, Files, Lane
from fp8lib.plan import ShardPlan
from fp8lib.rules import BLOCK, blocks

# Squares of values outside leave float32; such pieces are measured in float64.
_FLOAT32_SQUARES = (1e-15, 1e15)


@dataclass(frozen=True, slots=True)
class Errors:
    """Sums over a piece of a matrix; pieces add up to the matrix.

    Attributes:
        count: weights.
        original, restored, difference: sums of squares of w, w' and w - w'.
        absolute: sum of |w - w'|.
        max_abs: largest |w - w'|.
        amax: largest |w|.
    """

    count: int
    original: float
    restored: float
    difference: float
    absolute: float
    max_abs: float
    amax: float


def measure(weights: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> Errors:
    """Error sums of rows of a matrix that start at a multiple of 128.

    Args:
        weights: [rows, columns] as in the input, BF16, F16 or F32.
        codes: float8_e4m3fn [rows, columns].
        scales: [ceil(rows/128), ceil(columns/128)], BF16 or F32.
    """
    original = weights.float()
    restored = dequantize(codes, scales)
    difference = restored - original
    amax, max_abs = _largest(original), _largest(difference)
    if not _FLOAT32_SQUARES[0] < amax < _FLOAT32_SQUARES[1]:
        original, restored, difference = original.double(), restored.double(), difference.double()
    sums = [t.mul(t).sum().double() for t in (original, restored, difference)]
    values = torch.stack([*sums, difference.abs_().sum().double(), max_abs.double(), amax.double()])
    return Errors(weights.numel(), *values.tolist())


def _largest(values: torch.Tensor) -> torch.Tensor:
    """Largest magnitude, NaN if there is one."""
    least, most = values.aminmax()
    return torch.maximum(-least, most)


def combine(name: str, pieces: Sequence[Errors]) -> Measurement:
    """The measurement of a matrix from its pieces, in the order of its rows."""
    original, restored, difference, absolute = (
        math.fsum(getattr(p, field) for p in pieces)
        for field in ("original", "restored", "difference", "absolute")
    )
    if difference == 0:
        cosine = 1.0
    elif original == 0 or restored == 0:
        cosine = 0.0
    else:
        cosine = (original + restored - difference) / (2 * math.sqrt(original) * math.sqrt(restored))
    worst = [max_or_nan(getattr(p, field) for p in pieces) for field in ("max_abs", "amax")]
    return Measurement(name, cosine, absolute / sum(p.count for p in pieces), *worst)


# --- pairs on disk -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Extent:
    """Where a matrix's bytes are: contiguous rows of `dtype` from `start` of a file on."""

    path: Path
    dtype: str
    start: int


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


def sample(pairs: Sequence[Pair], count: int | None, seed: int, shard: str) -> list[Pair]:
    """Pairs to measure: `count` random ones of a shard, all of them for None, in their order.

    The same for a given seed and shard name, whatever else is in the checkpoint.
    """
    if count is None or count >= len(pairs):
        return list(pairs)
    chosen = random.Random(f"{seed}:{shard}").sample(range(len(pairs)), count)
    return [pairs[i] for i in sorted(chosen)]


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
    return problems


def read_and_check_scales(lane: Lane, files: Files, pairs: Sequence[Pair]) -> list[str]:
    """What is wrong with the values of some pairs' scales, one line each."""
    problems = []
    for pair in pairs:
        scales = _read(lane, files, "scales", pair.scale, blocks(pair.rows), blocks(pair.columns), 0)
        if not bool((scales.isfinite() & (scales > 0)).all()):
            problems.append(
                f"{printable(pair.name)}_scale_inv: holds values that are not finite and positive"
            )
    return problems


def read_rows(
    lane: Lane, files: Files, pair: Pair, first: int, last: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `measure` takes of rows first..last of a pair, `first` a multiple of 128, in host memory."""
    rows, columns = last - first, pair.columns
    weights = _read(lane, files, "in", pair.source, rows, columns, first)
    codes = _read(lane, files, "codes", pair.weight, rows, columns, first)
    scales = _read(lane, files, "scales", pair.scale, blocks(rows), blocks(columns), first // BLOCK)
    return weights, codes, scales


def _read(
    lane: Lane, files: Files, buffer: str, extent: Extent, rows: int, columns: int, first: int
) -> torch.Tensor:
    """Rows first..first+rows of an extent, [rows, columns] in host memory."""
    row_bytes = columns * ITEM_SIZE[extent.dtype]
    # What was written is read back from the disk, not from what the kernel remembers of it.
    start, direct = extent.start + first * row_bytes, extent.dtype == "F8_E4M3"
    raw = lane.read(buffer, files, extent.path, start, rows * row_bytes, direct)
    dtype = DTYPE if extent.dtype == "F8_E4M3" else DTYPES[extent.dtype]
    return raw.view(dtype).view(rows, columns)
