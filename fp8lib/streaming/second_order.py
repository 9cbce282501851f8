"""The conversion of `--rounding second_order`: scales first, then `numerics/second_order.py`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fp8lib.checkpoint.layout import Matrix
from fp8lib.numerics.e4m3 import DTYPE, quantize
from fp8lib.numerics.modes import Calibration
from fp8lib.numerics.scales import block_scales
from fp8lib.numerics.second_order import round_rows, with_headroom
from fp8lib.streaming.devices import copy_without_waiting
from fp8lib.streaming.factors import Factors

CPU_PIECE = 2 * 1024 * 1024
"""Weights in a piece on the CPU: rows enough that calls count little, 90 MB of temporaries."""
CUDA_PIECE = 64_000_000
"""The same on CUDA, where each call takes 5 us however few the rows; 3 GB of temporaries per worker. A little
less than 2^26, as `shard_job.CUDA_PIECE` is less than 2^24: pinned memory comes in powers of two."""


@dataclass(frozen=True, slots=True)
class SecondOrder:
    """Rounds weights with their input's second moments in mind, and to nearest where there are none.

    Attributes:
        calibration: how scales are chosen.
        factors: of the inputs.
        importance: as `Nearest`'s.
    """

    calibration: Calibration
    factors: Factors
    importance: Callable[[str, int], np.ndarray | None] | None = None

    @staticmethod
    def piece(device: torch.device) -> int:
        """Weights in a piece."""
        return CUDA_PIECE if device.type == "cuda" else CPU_PIECE

    def __call__(self, matrix: Matrix, rows: torch.Tensor, first: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.stacked([(matrix, first, first + len(rows))], rows)

    def stacked(
        self, parts: Sequence[tuple[Matrix, int, int]], rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and scales of rows of several matrices of equal columns, one below the other.

        Those that share an input are rounded together: a column takes a dozen calls, however many rows.

        Args:
            parts: (matrix, first row, the one behind the last); a multiple of 128 rows of each but the last.
            rows: [rows of all parts, columns].

        Returns:
            As for one matrix, of all rows.
        """
        each = rows.split([last - first for _, first, last in parts])
        chosen = [
            self.scales(matrix.weight.name, own) for (matrix, _, _), own in zip(parts, each, strict=True)
        ]
        groups: dict[str | None, list[int]] = {}
        for number, (matrix, _, _) in enumerate(parts):
            entry = self.factors.entry(matrix.weight.name, matrix.columns)
            groups.setdefault(entry, []).append(number)
        codes: list[torch.Tensor] = [None] * len(parts)
        for numbers in groups.values():
            matrix = parts[numbers[0]][0]
            factor = self.factors(matrix.weight.name, matrix.columns)
            together, scales = _below([each[i] for i in numbers]), _below([chosen[i] for i in numbers])
            if factor is None:
                found = quantize(together, scales, saturate=self.calibration.may_clip)
            else:
                found = round_rows(together, scales, factor)
            heights = [len(each[i]) for i in numbers]
            for i, own in zip(numbers, found.view(torch.uint8).split(heights), strict=True):
                codes[i] = own
        return _below(codes).view(DTYPE), _below(chosen)

    def scales(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """The scales alone, of rows of the weight of that name."""
        activation, columns = None, rows.shape[1]
        if self.importance is not None:
            values = self.importance(name, columns)
            if values is not None:
                activation = copy_without_waiting(torch.from_numpy(values), rows.device)
        scales, amax = block_scales(rows, self.calibration, activation)
        has_moments = self.factors.entry(name, columns) is not None
        return with_headroom(scales, amax) if has_moments else scales


def _below(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
