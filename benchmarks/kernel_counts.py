"""What the host asks of a CUDA device for one piece, counted on a device that is only pretended.

It needs no GPU and says nothing of time: kernels, waits, bytes. `bench_kernels.py --count` prints it, and
tests/test_kernel_counts.py holds it below bounds.
"""

import math
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from fp8lib import Fp8Error
from fp8lib.checkpoint.headers import Tensor
from fp8lib.checkpoint.layout import Matrix
from fp8lib.numerics.blocks import blocks
from fp8lib.numerics.modes import MODES, SCALE_FORMATS, Calibration
from fp8lib.numerics.scales import quantize_blocks
from fp8lib.streaming.convert import Conversion, Nearest, convert_batch
from fp8lib.streaming.factors import Factors
from fp8lib.streaming.lanes import Lane
from fp8lib.streaming.second_order import SecondOrder
from fp8lib.verification.measure import measure_all
from fp8lib.verification.measure_outputs import measure_outputs
from pretended_device import PretendedCuda

Piece = Callable[[Lane], None]
"""What is counted: it takes a piece through a lane, up to the last wait."""


def count_all(matrices: int, rows: int, columns: int) -> list[dict[str, object]]:
    """A row for every mode and scale format, with and without activation statistics where they matter.

    Args:
        matrices: in the piece.
        rows, columns: of each.
    """
    found = []
    for scale_format, mode in product(SCALE_FORMATS, MODES):
        calibration = Calibration(mode, scale_format=scale_format)
        importances = [None, _importance] if calibration.uses_activations else [None]
        for importance in importances:
            label = f"{mode}, {scale_format}" + (", activation-weighted" if importance else "")
            piece = _conversion(Nearest(calibration, importance), matrices, rows, columns)
            found.append({"kernel": label, **count(piece, matrices * rows * columns)})
    return found


def count_others(matrices: int, rows: int, columns: int) -> list[dict[str, object]]:
    """The same for second-order rounding, and for what checks written files. Matrices share one input."""
    factors = Factors(
        lambda name, n: "input", lambda entry: _moments(columns), lambda entry, wrong: Fp8Error(wrong), 0.01,
        torch.device("cuda:0"),
    )  # fmt: skip
    size = matrices, rows, columns
    found = {"second order": _conversion(SecondOrder(Calibration(), factors, _importance), *size)}
    for scale_format in SCALE_FORMATS:
        calibration = Calibration("max", scale_format=scale_format)
        found[f"measured, {scale_format}"] = _measurement(
            calibration, partial(measure_all, powers_of_two=calibration.powers_of_two), *size
        )
    found["output errors measured"] = _measurement(
        Calibration(), lambda pieces: measure_outputs(pieces, factors("weight", columns)), *size
    )
    return [{"kernel": name, **count(piece, math.prod(size))} for name, piece in found.items()]


def count(piece: Piece, weights: int) -> dict[str, object]:
    """What one piece takes, as the pipeline has it done, once all tables and factors are made."""
    with PretendedCuda() as cuda, torch.inference_mode():
        lane = Lane(torch.device("cuda:0"))
        with lane.as_current():
            for _ in range(2):  # the first makes what is kept for good
                cuda.counts.clear()
                cuda.waits.clear()
                kept = cuda.peak = cuda.used
                piece(lane)
        lane.stop()
    counts = cuda.counts
    return {
        "launches": counts["kernels"],
        "waits": cuda.waits.total(),
        "waits for": ", ".join(f"{n} {reason}" for reason, n in sorted(cuda.waits.items())),
        "up, bytes/weight": counts["bytes up"] / weights,
        "down, bytes/weight": counts["bytes down"] / weights,
        "touched, bytes/weight": counts["bytes touched"] / weights,
        "peak, bytes/weight": (cuda.peak - kept) / weights,
    }


def _conversion(convert: Conversion, matrices: int, rows: int, columns: int) -> Piece:
    """Weights in pinned memory to codes and scales there."""
    parts = [_matrix(number, rows, columns) for number in range(matrices)]

    def piece(lane: Lane) -> None:
        host = lane.host("in", 2 * matrices * rows * columns).view(torch.bfloat16)
        host.copy_(_weights(matrices * rows * columns))
        codes, scales = convert_batch(convert, parts, lane.to_device(host))
        lane.to_host("codes", codes)
        lane.to_host("scales", scales)
        lane.synchronize()

    return piece


def _measurement(
    calibration: Calibration, measure: Callable, matrices: int, rows: int, columns: int
) -> Piece:
    """What `measure` finds about several pieces that were read together."""
    weights = _weights(matrices * rows * columns).view(-1, columns)
    found = (weights, *quantize_blocks(weights, calibration))

    def piece(lane: Lane) -> None:
        there = [_pinned(lane, *each) for each in zip(("in", "codes", "scales"), found, strict=True)]
        heights = rows, rows, blocks(rows)
        each = [t.split(height) for t, height in zip(there, heights, strict=True)]
        measure(list(zip(*each, strict=True)))

    return piece


def _pinned(lane: Lane, name: str, values: torch.Tensor) -> torch.Tensor:
    """Values as a reader has them, copied to the device."""
    host = lane.host(name, values.nbytes).view(values.dtype).view(values.shape)
    return lane.to_device(host.copy_(values))


def _weights(count: int) -> torch.Tensor:
    return torch.randn(count).mul_(0.02).bfloat16()


def _importance(name: str, columns: int) -> np.ndarray:
    return np.random.default_rng(0).random(columns, np.float32)


def _moments(n: int) -> np.ndarray:
    x = torch.randn(2 * n, n)
    return (x.T @ x / len(x)).numpy()


def _matrix(number: int, rows: int, columns: int) -> tuple[Matrix, int, int]:
    weight = Tensor(f"{number}.weight", "F8_E4M3", (rows, columns), number * rows * columns, rows * columns)
    scale = Tensor(f"{number}.weight_scale_inv", "BF16", (0, 0), 0, 0)
    return Matrix("BF16", 2 * weight.start, rows, columns, weight, scale), 0, rows
