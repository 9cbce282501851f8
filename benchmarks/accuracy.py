#!/usr/bin/env python3
"""What each mode loses on stated weights: the tables of docs/modes.md and docs/activation-statistics.md.

4096 x 4096 weights of standard deviation 0.02, Gaussian and heavy-tailed (Student's t, 5 degrees of
freedom), through the same kernels and the same measurement as a run.

    python benchmarks/accuracy.py

With a statistics file it measures instead what the statistics gain: Gaussian weights for every entry, and
by how much the activation-weighted modes lower the squared error of the layers' outputs against `max`.

    python benchmarks/accuracy.py --activation_stats stats.json
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import machine
from fp8lib.calibration.statistics_file import MAXIMUM, MEAN_SQUARE, Statistics
from fp8lib.checkpoint.rules import fusion_group
from fp8lib.numerics.e4m3 import dequantize
from fp8lib.numerics.modes import Calibration
from fp8lib.numerics.scales import quantize_blocks
from fp8lib.verification.measure import combine, measure

MODES = {
    "max": Calibration("max"),
    "rms": Calibration("rms"),
    "mse": Calibration("mse"),
    "percentile 99.9": Calibration("percentile"),
    "rms --rms_saturate": Calibration("rms", rms_saturate=True),
}


def weights(kind: str) -> torch.Tensor:
    """BF16 [4096, 4096] of standard deviation 0.02."""
    torch.manual_seed(0)
    if kind == "Gaussian":
        return torch.randn(4096, 4096).mul_(0.02).bfloat16()
    values = torch.distributions.StudentT(5.0).sample((4096, 4096))
    return values.mul_(0.02 / (5 / 3) ** 0.5).bfloat16()


def output_error(w: torch.Tensor, calibration: Calibration, activation: torch.Tensor | None, a) -> float:
    """Sum of a_j * (error of w_ij)^2: the squared error of the outputs for uncorrelated inputs."""
    codes, scales = quantize_blocks(w, calibration, activation)
    return float(((dequantize(codes, scales) - w.float()).double().square() * a).sum())


def gains(path: Path, rows: int = 512) -> list[dict[str, object]]:
    """Per kind of module: output error of the modes relative to `max`, on Gaussian weights."""
    document = json.loads(path.read_text())
    statistics = Statistics(path)
    ratios: dict[str, list[list[float]]] = defaultdict(list)
    torch.manual_seed(0)
    for name, entry in document.items():
        if name.startswith("__") or fusion_group(name) is None:
            continue
        columns = len(entry.get(MEAN_SQUARE) or entry[MAXIMUM])
        activation = torch.from_numpy(statistics.importance(name, columns))
        w = torch.randn(rows, columns).mul_(0.02).bfloat16()
        a = activation.double()
        base = output_error(w, Calibration("max"), None, a)
        ratios[name.split(".")[-2]].append(
            [
                output_error(w, Calibration("mse"), None, a) / base,
                output_error(w, Calibration("rms"), activation, a) / base,
                output_error(w, Calibration("mse"), activation, a) / base,
            ]
        )
    result = []
    for kind, found in sorted(ratios.items()):
        mse, rms_weighted, mse_weighted = torch.tensor(found).mean(0).tolist()
        result.append(
            {
                "module": kind,
                "entries": len(found),
                "mse, no statistics": f"{mse - 1:+.1%}",
                "rms, weighted": f"{rms_weighted - 1:+.1%}",
                "mse, weighted": f"{mse_weighted - 1:+.1%}",
            }
        )
    return result


def losses() -> list[dict[str, object]]:
    """Per kind of weights and mode: the three metrics."""
    rows = []
    for kind in ("Gaussian", "Student t, 5"):
        w = weights(kind)
        for name, calibration in MODES.items():
            m = combine(name, [measure(w, *quantize_blocks(w, calibration))])
            rows.append(
                {
                    "weights": kind,
                    "mode": name,
                    "cosine": f"{m.cosine:.6f}",
                    "mean abs err": f"{m.mean_abs:.6f}",
                    "max abs err": f"{m.max_abs:.4f}",
                    "relative to mean weight": f"{m.mean_abs / w.float().abs().mean().item():.4f}",
                }
            )
    return rows


def main() -> None:
    parser = machine.parser(__doc__)
    parser.add_argument("--activation_stats", type=Path, metavar="FILE.json")
    parser.add_argument("--json", type=Path, help="also write the results here")
    flags = parser.parse_args()
    rows = gains(flags.activation_stats) if flags.activation_stats else losses()
    where = machine.describe()
    print(machine.heading(where) + "\n")
    print(machine.table(rows))
    machine.save(flags.json, where, rows)


if __name__ == "__main__":
    main()
