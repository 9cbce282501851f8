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

from fp8lib.checkpoint import printable, read_shard
from fp8lib.e4m3 import dequantize
from fp8lib.health import Measurement, max_or_nan
from fp8lib.plan import Matrix, ShardPlan

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
    absolute = difference.abs()
    amax, max_abs = original.abs().max(), absolute.max()
    if not _FLOAT32_SQUARES[0] < amax < _FLOAT32_SQUARES[1]:
        original, restored, difference = original.double(), restored.double(), difference.double()
    sums = [t.mul(t).sum().double() for t in (original, restored, difference)]
    values = torch.stack([*sums, absolute.sum().double(), max_abs.double(), amax.double()])
    return Errors(weights.numel(), *values.tolist())


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


def sample(plan: ShardPlan, count: int | None, seed: int) -> list[Matrix]:
    """Matrices of a shard to measure: `count` random ones, or all of them for None.

    The same for a given seed and shard name, whatever else is in the checkpoint.
    """
    if count is None or count >= len(plan.matrices):
        return list(plan.matrices)
    chosen = random.Random(f"{seed}:{plan.name}").sample(range(len(plan.matrices)), count)
    return [plan.matrices[i] for i in sorted(chosen)]


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
        elif (tensor.dtype, tensor.shape, tensor.start) != (
            expected.dtype,
            expected.shape,
            expected.start,
        ):
            problems.append(
                f"{printable(expected.name)}: {tensor.dtype} {list(tensor.shape)} in {shard.name}, "
                f"planned {expected.dtype} {list(expected.shape)}"
            )
    problems += [f"{printable(name)}: in {shard.name} but not in the plan" for name in found]
    return problems


def scale_problem(name: str, scales: torch.Tensor) -> str | None:
    """What is wrong with a matrix's scales, if anything."""
    if not bool((scales.isfinite() & (scales > 0)).all()):
        return f"{printable(name)}_scale_inv: holds values that are not finite and positive"
    return None
