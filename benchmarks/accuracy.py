#!/usr/bin/env python3
"""What each mode loses on stated weights: the tables of docs/modes.md and docs/activation-statistics.md.

Gaussian and heavy-tailed weights (Student's t, 5 degrees of freedom), through the same kernels and the same
measurement as a run. Two tables: the metrics of the summary for 4096 x 4096 weights of standard deviation
0.02; and the relative error |W' - W| / |W|, in the file and as an engine serves it that requantizes the
weights to powers of two. That depends on where in its octave the weights' size lies, so it is the mean over
1024 x 1024 weights of eight sizes, an octave in equal ratios.

    python benchmarks/accuracy.py

With a statistics file it measures instead what the statistics gain: Gaussian weights for every entry, and
by how much the activation-weighted modes lower the squared error of the layers' outputs against `max`.

    python benchmarks/accuracy.py --activation_stats stats.json
"""

import json
import sys
from collections import defaultdict
from functools import partial
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import machine
from fp8lib.calibration.statistics_file import MAXIMUM, MEAN_SQUARE, Statistics
from fp8lib.checkpoint.rules import fusion_group
from fp8lib.numerics.e4m3 import dequantize
from fp8lib.numerics.modes import SCALE_FORMATS, Calibration
from fp8lib.numerics.scales import quantize_blocks
from fp8lib.verification.measure import combine, measure

bf16 = partial(Calibration, scale_format="bf16")
MODES = {
    "max": partial(Calibration, "max"),
    "rms": partial(Calibration, "rms"),
    "mse": partial(Calibration, "mse"),
    "percentile 99.9": partial(Calibration, "percentile"),
    "rms --rms_saturate": partial(Calibration, "rms", rms_saturate=True),
}
KINDS = ("Gaussian", "Student t, 5")
SIZES = 8


def weights(kind: str, n: int, deviation: float = 0.02) -> torch.Tensor:
    """BF16 [n, n] of that standard deviation."""
    torch.manual_seed(0)
    if kind == "Gaussian":
        return torch.randn(n, n).mul_(deviation).bfloat16()
    values = torch.distributions.StudentT(5.0).sample((n, n))
    return values.mul_(deviation / (5 / 3) ** 0.5).bfloat16()


def output_error(w: torch.Tensor, calibration: Calibration, activation: torch.Tensor | None, a) -> float:
    """Sum of a_j * (error of w_ij)^2: the squared error of the outputs for uncorrelated inputs."""
    codes, scales = quantize_blocks(w, calibration, activation)
    return float(((dequantize(codes, scales) - w.float()).double().square() * a).sum())


def gains(path: Path, rows: int = 512) -> list[dict[str, object]]:
    """Per kind of module: output error of the modes with BF16 scales relative to `max`, Gaussian weights."""
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
        base = output_error(w, bf16("max"), None, a)
        ratios[name.split(".")[-2]].append(
            [
                output_error(w, bf16("mse"), None, a) / base,
                output_error(w, bf16("rms"), activation, a) / base,
                output_error(w, bf16("mse"), activation, a) / base,
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
    """Per kind of weights, mode and scale format: the three metrics of the file."""
    rows = []
    for kind in KINDS:
        w = weights(kind, 4096)
        for (name, calibration), scale_format in product(MODES.items(), SCALE_FORMATS):
            pair = quantize_blocks(w, calibration(scale_format=scale_format))
            m = combine(name, [measure(w, *pair)])
            rows.append(
                {
                    "weights": kind,
                    "mode": name,
                    "scales": scale_format,
                    "cosine": f"{m.cosine:.6f}",
                    "mean abs err": f"{m.mean_abs:.6f}",
                    "max abs err": f"{m.max_abs:.4f}",
                    "relative to mean weight": f"{m.mean_abs / w.float().abs().mean().item():.4f}",
                }
            )
    return rows


def served() -> list[dict[str, object]]:
    """Per kind of weights, mode and scale format: relative error in the file and as served."""
    rows = []
    for kind in KINDS:
        for (name, calibration), scale_format in product(MODES.items(), SCALE_FORMATS):
            found = []
            for i in range(SIZES):
                w = weights(kind, 1024, 0.02 * 2 ** (i / SIZES))
                pair = quantize_blocks(w, calibration(scale_format=scale_format))
                found.append(combine(name, [measure(w, *pair)]))
            rows.append(
                {
                    "weights": kind,
                    "mode": name,
                    "scales": scale_format,
                    "in the file": f"{sum(m.relative for m in found) / SIZES:.5f}",
                    "as served": f"{sum(m.served_relative for m in found) / SIZES:.5f}",
                    "weights changed": f"{sum(m.requantized for m in found) / SIZES / w.numel():.1%}",
                }
            )
    return rows


def main() -> None:
    parser = machine.parser(__doc__)
    parser.add_argument("--activation_stats", type=Path, metavar="FILE.json")
    parser.add_argument("--json", type=Path, help="also write the results here")
    flags = parser.parse_args()
    tables = [gains(flags.activation_stats)] if flags.activation_stats else [losses(), served()]
    where = machine.describe()
    print(machine.heading(where))
    for rows in tables:
        print("\n" + machine.table(rows))
    machine.save(flags.json, where, [row for rows in tables for row in rows])


if __name__ == "__main__":
    main()
