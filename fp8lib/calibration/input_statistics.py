"""What a weight is multiplied with, summed up: largest magnitude and sum of squares of each input channel.

Several weights can share an input. Engines fuse q, k and v (or gate and up) into one matrix because they
do, so a fusion group has one input. The experts of a layer have one each, and `groups` of them are kept
as rows of the same arrays; their down projections have others.

Sums are float64: 10^6 tokens of squares in float32 would lose the small ones. They stay on the device of
the activations, and nothing here waits for it but `Sums.result`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from safetensors.numpy import load, save

from fp8lib.checkpoint.rules import fusion_group, one_expert_part

_PARTS = ("maximum", "squares", "tokens")
_PIECE = 1 << 22
"""Activations widened to float64 at a time: 32 MiB, however long the prompts and wide the layer."""


def input_of(weight: str) -> tuple[str, int | None]:
    """(name of the input that a quantized weight multiplies, its row there if it is an expert's)."""
    if part := one_expert_part(weight):
        experts, expert, projection = part
        return down_input(experts) if projection == "down_proj" else experts, expert
    return fusion_group(weight), None


def down_input(experts: str) -> str:
    """Name of the input of the down projections of `….mlp.experts`."""
    return f"{experts}.down_proj"


@dataclass(frozen=True, slots=True)
class InputStatistics:
    """Statistics of one input, or of the inputs of a layer's experts one by one.

    Attributes:
        maximum: float32 [groups, channels], largest |x|; zeros where no token came.
        squares: float64 [groups, channels], sum of x^2.
        tokens: int64 [groups].
    """

    maximum: np.ndarray
    squares: np.ndarray
    tokens: np.ndarray

    @property
    def mean_square(self) -> np.ndarray:
        """float32 [groups, channels]; zeros where no token came."""
        return (self.squares / np.maximum(self.tokens, 1)[:, None]).astype(np.float32)

    def row(self, group: int) -> InputStatistics:
        """One group of them."""
        rows = slice(group, group + 1)
        return InputStatistics(self.maximum[rows], self.squares[rows], self.tokens[rows])

    def pooled(self) -> InputStatistics:
        """All groups as one."""
        return InputStatistics(
            self.maximum.max(0, keepdims=True),
            self.squares.sum(0, keepdims=True),
            self.tokens.sum(keepdims=True),
        )

    def merged(self, other: InputStatistics) -> InputStatistics:
        """Statistics of the same inputs over other tokens too, as if one run had seen all of them."""
        return InputStatistics(
            np.maximum(self.maximum, other.maximum), self.squares + other.squares, self.tokens + other.tokens
        )

    def is_finite(self) -> bool:
        return bool(np.isfinite(self.maximum).all() and np.isfinite(self.squares).all())


def pack(inputs: Mapping[str, InputStatistics]) -> bytes:
    """Statistics by input as bytes, for another process."""
    return save({f"{name}.{part}": getattr(s, part) for name, s in inputs.items() for part in _PARTS})


def unpack(data: bytes) -> dict[str, InputStatistics]:
    """What was packed."""
    arrays = load(data)
    names = {key.rpartition(".")[0] for key in arrays}
    return {name: InputStatistics(*(arrays[f"{name}.{part}"] for part in _PARTS)) for name in names}


class Sums:
    """Running sums behind an `InputStatistics`, on the device of the activations."""

    def __init__(self, groups: int, channels: int, device: torch.device) -> None:
        self.maximum = torch.zeros(groups, channels, device=device)
        self.squares = torch.zeros(groups, channels, device=device, dtype=torch.float64)
        self.tokens = torch.zeros(groups, device=device, dtype=torch.int64)

    def add(self, tokens: torch.Tensor) -> None:
        """Count tokens [n, channels] as the input of the one group there is."""
        for piece in tokens.split(self._piece()):
            torch.maximum(self.maximum, piece.abs().amax(0).float(), out=self.maximum)
            self.squares += piece.double().square_().sum(0)
        self.tokens += len(tokens)

    def add_grouped(self, tokens: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
        """Count each of tokens [n, channels] as an input of its group [n].

        Returns:
            int64 [groups], how many came to each.
        """
        rows = self._piece()
        for piece, groups in zip(tokens.split(rows), group.split(rows), strict=True):
            index = groups[:, None].expand(piece.shape)
            self.maximum.scatter_reduce_(0, index, piece.abs().float(), "amax")
            self.squares.index_add_(0, groups, piece.double().square_())
        counts = torch.zeros_like(self.tokens).scatter_add_(0, group, torch.ones_like(group))
        self.tokens += counts
        return counts

    def _piece(self) -> int:
        return max(1, _PIECE // self.maximum.shape[1])

    def result(self) -> InputStatistics:
        """The statistics so far, on the host."""
        return InputStatistics(
            self.maximum.cpu().numpy(), self.squares.cpu().numpy(), self.tokens.cpu().numpy()
        )
