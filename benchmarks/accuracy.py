#!/usr/bin/env python3
"""What each mode loses on stated weights: the table of the README.

4096 x 4096 weights of standard deviation 0.02, Gaussian and heavy-tailed (Student's t, 5 degrees of
freedom), through the same kernels and the same measurement as a run.

    python benchmarks/accuracy.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import machine
from fp8lib.modes import Calibration
from fp8lib.scales import quantize_blocks
from fp8lib.verify import combine, measure

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


def main() -> None:
    flags = machine.parser(__doc__)
    flags.add_argument("--json", type=Path, help="also write the results here")
    path = flags.parse_args().json
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
    where = machine.describe()
    print(machine.heading(where) + "\n")
    print(machine.table(rows))
    machine.save(path, where, rows)


if __name__ == "__main__":
    main()
