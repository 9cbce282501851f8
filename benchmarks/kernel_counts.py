"""What the host asks of a CUDA device for one piece, counted on a device that is only pretended.

It needs no GPU and says nothing of time: kernels, waits, bytes. `bench_kernels.py --count` prints it, and
tests/test_kernel_counts.py holds it below bounds.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from fp8lib.checkpoint.headers import Tensor
from fp8lib.checkpoint.layout import Matrix
from fp8lib.numerics.modes import MODES, SCALE_FORMATS, Calibration
from fp8lib.streaming.convert import Conversion, Nearest, convert_batch
from fp8lib.streaming.lanes import Lane
from pretended_device import PretendedCuda


def count_all(matrices: int, rows: int, columns: int) -> list[dict[str, object]]:
    """A row for every mode and scale format, with and without activation statistics where they matter.

    Args:
        matrices: in the piece.
        rows, columns: of each.
    """
    found = []
    for scale_format in SCALE_FORMATS:
        for mode in MODES:
            calibration = Calibration(mode, scale_format=scale_format)
            importances = [None]
            if calibration.uses_activations:
                importances.append(lambda name, columns: torch.rand(columns).numpy())
            for importance in importances:
                label = f"{mode}, {scale_format}" + (", activation-weighted" if importance else "")
                row = count(Nearest(calibration, importance), matrices, rows, columns)
                found.append({"kernel": label, **row})
    return found


def count(convert: Conversion, matrices: int, rows: int, columns: int) -> dict[str, object]:
    """What one piece takes, as the pipeline has it converted, once all tables are made."""
    parts = [_matrix(number, rows, columns) for number in range(matrices)]
    weights = matrices * rows * columns
    with PretendedCuda() as cuda, torch.inference_mode():
        lane = Lane(torch.device("cuda:0"))
        with lane.as_current():
            for _ in range(2):  # the first makes what is kept for good
                cuda.counts.clear()
                cuda.waits.clear()
                cuda.peak = cuda.used
                host = lane.host("in", 2 * weights).view(torch.bfloat16)
                host.copy_(torch.randn(weights).mul_(0.02))
                codes, scales = convert_batch(convert, parts, lane.to_device(host))
                lane.to_host("codes", codes)
                lane.to_host("scales", scales)
                lane.synchronize()
        lane.stop()
    counts = cuda.counts
    return {
        "launches": counts["kernels"],
        "waits": cuda.waits.total(),
        "waits for": ", ".join(f"{n} {reason}" for reason, n in sorted(cuda.waits.items())),
        "up, bytes/weight": counts["bytes up"] / weights,
        "down, bytes/weight": counts["bytes down"] / weights,
        "touched, bytes/weight": counts["bytes touched"] / weights,
        "peak, bytes/weight": cuda.peak / weights,
    }


def _matrix(number: int, rows: int, columns: int) -> tuple[Matrix, int, int]:
    weight = Tensor(f"{number}.weight", "F8_E4M3", (rows, columns), number * rows * columns, rows * columns)
    scale = Tensor(f"{number}.weight_scale_inv", "BF16", (0, 0), 0, 0)
    return Matrix("BF16", 2 * weight.start, rows, columns, weight, scale), 0, rows
