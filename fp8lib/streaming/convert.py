"""What happens to the rows of a weight between reading and writing them.

A conversion is pure arithmetic on a device. It sees rows of a matrix that start at a multiple of 128, in any
order and from several threads at once, and must give the same bytes however the matrix is cut.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from fp8lib.checkpoint.layout import Matrix
from fp8lib.numerics.blocks import BLOCK, blocks
from fp8lib.numerics.modes import Calibration
from fp8lib.numerics.scales import block_scales, quantize_blocks
from fp8lib.streaming.devices import copy_without_waiting
from fp8lib.streaming.units import Rows


class Conversion(Protocol):
    """Turns rows of a weight into codes and scales. It may have a method `stacked`, as `Nearest` has."""

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
        return self.stacked([(matrix, first, first + len(rows))], rows)

    def scales(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """The scales alone, of rows of the weight of that name; as `__call__` gives them."""
        values = self.importance and self.importance(name, rows.shape[1])
        activation = None if values is None else copy_without_waiting(torch.from_numpy(values), rows.device)
        return block_scales(rows, self.calibration, activation)[0]

    def stacked(self, parts: Sequence[Rows], rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and scales of rows of several matrices of equal columns, one below the other.

        Optional for a conversion: without it, matrices are converted one after the other.

        Args:
            parts: whose rows they are; a multiple of 128 of each but the last.
            rows: [rows of all parts, columns].

        Returns:
            As for one matrix, of all rows.
        """
        found = [self.importance and self.importance(m.weight.name, m.columns) for m, _, _ in parts]
        if all(values is None for values in found):
            return quantize_blocks(rows, self.calibration)
        if any(values is None for values in found):  # to weigh by 1 is not to the bit what not to weigh is
            each = rows.split([last - first for _, first, last in parts])
            done = [self.stacked([part], own) for part, own in zip(parts, each, strict=True)]
            codes, scales = zip(*done, strict=True)
            return torch.cat([c.view(torch.uint8) for c in codes]).view(codes[0].dtype), torch.cat(scales)
        # A row of activations for each row of blocks; one is enough for a single matrix.
        counts = [blocks(last - first) for _, first, last in parts]
        values = found[0] if len(found) == 1 else np.repeat(np.stack(found), counts, axis=0)
        activation = copy_without_waiting(torch.from_numpy(values), rows.device)
        return quantize_blocks(rows, self.calibration, activation)


def convert_batch(
    convert: Conversion, parts: Sequence[Rows], weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of rows of several matrices, as they lie behind each other in the output.

    Matrices of equal columns go through one sequence of kernels, if the conversion can do that.

    Args:
        convert: what is done to them.
        parts: whose rows they are.
        weights: [weights of all parts], in their order.

    Returns:
        (uint8 [bytes of all codes], uint8 [bytes of all scales]).
    """
    if len(parts) == 1:
        ((matrix, first, _),) = parts
        found = convert(matrix, weights.view(-1, matrix.columns), first)
        return tuple(t.view(torch.uint8).reshape(-1) for t in found)
    sizes = [(last - first) * matrix.columns for matrix, first, last in parts]
    rows = [w.view(-1, m.columns) for w, (m, _, _) in zip(weights.split(sizes), parts, strict=True)]
    groups = _groups(convert, parts)
    codes, scales = [None] * len(parts), [None] * len(parts)
    for group in groups:
        matrix, first, _ = parts[group[0]]
        together = weights.view(-1, matrix.columns) if len(groups) == 1 else _below(rows[i] for i in group)
        if len(group) == 1:
            found = convert(matrix, together, first)
        else:
            found = convert.stacked([parts[i] for i in group], together)
        if len(groups) == 1:
            return tuple(t.view(torch.uint8).reshape(-1) for t in found)
        heights = [len(rows[i]) for i in group]
        split = found[0].view(torch.uint8).split(heights), found[1].split([blocks(n) for n in heights])
        for i, own_codes, own_scales in zip(group, *split, strict=True):
            codes[i], scales[i] = own_codes.reshape(-1), own_scales.view(torch.uint8).reshape(-1)
    return torch.cat(codes), torch.cat(scales)


def _below(matrices: Iterable[torch.Tensor]) -> torch.Tensor:
    """Matrices of equal columns, one below the other; a copy, unless it is one."""
    matrices = list(matrices)
    return matrices[0] if len(matrices) == 1 else torch.cat(matrices)


def _groups(convert: Conversion, parts: Sequence[Rows]) -> list[list[int]]:
    """Which of some parts are converted together, by their numbers."""
    found: dict[tuple, list[int]] = {}
    for number, (matrix, first, last) in enumerate(parts):
        together = hasattr(convert, "stacked") and (last - first) % BLOCK == 0
        found.setdefault((matrix.columns, None if together else number), []).append(number)
    return list(found.values())
