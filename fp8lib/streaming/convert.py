"""What happens to the rows of a weight between reading and writing them.

A conversion is pure arithmetic on a device. It sees rows of a matrix that start at a multiple of 128, in any
order and from several threads at once, and must give the same bytes however the matrix is cut.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from fp8lib.checkpoint.layout import Matrix
from fp8lib.numerics.modes import Calibration
from fp8lib.numerics.scales import quantize_blocks


class Conversion(Protocol):
    """Turns rows of a weight into codes and scales."""

    def __call__(self, matrix: Matrix, rows: torch.Tensor, first: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and scales of some rows.

        Args:
            matrix: whose rows they are.
            rows: [rows, columns] as in the input, on the device of the job.
            first: number of the first of them, a multiple of 128.

        Returns:
            (float8_e4m3fn [rows, columns], bfloat16 [ceil(rows/128), ceil(columns/128)]). A block that holds
            NaN or infinity gets a scale that is not finite.
        """


@dataclass(frozen=True, slots=True)
class Nearest:
    """Rounds every weight to the nearest code under the scale that a calibration mode chooses.

    Attributes:
        calibration: how scales are chosen.
        importance: (weight's name, columns) -> float32 [columns], mean square of each input channel, or None
            for 1; None without activation statistics.
    """

    calibration: Calibration
    importance: Callable[[str, int], np.ndarray | None] | None = None

    def __call__(self, matrix: Matrix, rows: torch.Tensor, first: int) -> tuple[torch.Tensor, torch.Tensor]:
        activation = None
        if self.importance is not None:
            values = self.importance(matrix.weight.name, matrix.columns)
            if values is not None:
                activation = torch.from_numpy(values).to(rows.device, non_blocking=True)
        return quantize_blocks(rows, self.calibration, activation)
