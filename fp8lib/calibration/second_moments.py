"""Sums of x x^T over the tokens that a weight's input sees: what the second-moments file is made of.

A product of two BF16 numbers is exact in float32, where those of 256 tokens are added up; such sums are added
in float64. They stay on the device of the activations: n^2 float64 for an input of n channels."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from fp8lib.calibration.second_moments_file import pack
from fp8lib.calibration.second_moments_writer import expert_input

_AT_A_TIME = 256
"""Tokens whose products are added up in float32, to 24 bits less the 8 of the count at worst."""
TOKENS_PER_CHANNEL = 8
"""From so many tokens per channel on an expert's own H is used. The eigenvalues of a sample's H lie
(1 +- 1/sqrt(t))^2 about the true ones with t of them (Marchenko and Pastur): from 0.42 to 1.83 of them at
8."""


@dataclass(frozen=True, slots=True)
class Moments:
    """Sums of one input.

    Attributes:
        name: of the input, or of one expert's.
        channels: n.
        sums: float64 [n (n + 1) / 2], upper triangle of the sum of x x^T.
        tokens: in the sum.
        is_own: whether the input is one expert's.
    """

    name: str
    channels: int
    sums: np.ndarray
    tokens: int

    is_own: bool = False

    @property
    def mean(self) -> np.ndarray:
        """Upper triangle of H, float32; zero where no token came."""
        return (self.sums / max(self.tokens, 1)).astype(np.float32)

    @property
    def is_enough(self) -> bool:
        """Whether an expert's own are worth having."""
        return self.tokens >= TOKENS_PER_CHANNEL * self.channels

    def to_bytes(self) -> bytes:
        """For another process."""
        return self.tokens.to_bytes(8, "little") + self.sums.tobytes()

    def merged(self, data: bytes) -> "Moments":
        """As if what another process summed had been summed here, too."""
        tokens = self.tokens + int.from_bytes(data[:8], "little")
        return replace(self, sums=self.sums + np.frombuffer(data, np.float64, offset=8), tokens=tokens)


class MomentSums:
    """Running sums of the inputs a model's modules see.

    Args:
        own: names of inputs whose experts get sums of their own.
    """

    def __init__(self, own: frozenset[str] = frozenset()) -> None:
        self._own = own
        self._sums: dict[str, torch.Tensor] = {}
        self._tokens: dict[str, torch.Tensor] = {}

    def add(self, name: str, tokens: torch.Tensor) -> None:
        """Count tokens [n, channels] of an input."""
        sums = self._of(name, 1, tokens)
        _add_products(sums[0], tokens)
        self._tokens[name] += len(tokens)

    def add_grouped(self, name: str, tokens: torch.Tensor, came: torch.Tensor) -> None:
        """Count tokens [n, channels], ordered by expert, of which `came` [experts] are each expert's."""
        if name not in self._own:
            self.add(name, tokens)
            return
        sums = self._of(name, len(came), tokens)
        for expert, own in enumerate(tokens.split(came.tolist())):  # waits for the device
            _add_products(sums[expert], own)
        self._tokens[name] += came

    def take(self) -> Iterator[Moments]:
        """Sums since the last call, one input after the other, on the host; a pooled one before its experts'.

        Which come, and in which order, depends on the model alone and not on the tokens.
        """
        for name in sorted(self._sums):
            sums, tokens = self._sums.pop(name), self._tokens.pop(name)
            channels = sums.shape[-1]
            pooled = sums[0] if len(sums) == 1 else sums.sum(0)
            yield Moments(name, channels, pack(pooled.cpu().numpy()), int(tokens.sum()))
            if name in self._own:
                for expert, (own, count) in enumerate(zip(sums, tokens.tolist(), strict=True)):
                    own = pack(own.cpu().numpy())
                    yield Moments(expert_input(name, expert), channels, own, count, is_own=True)

    def _of(self, name: str, groups: int, tokens: torch.Tensor) -> torch.Tensor:
        if name not in self._sums:
            n, device = tokens.shape[1], tokens.device
            self._sums[name] = torch.zeros(groups, n, n, dtype=torch.float64, device=device)
            self._tokens[name] = torch.zeros(groups, dtype=torch.int64, device=device)
        return self._sums[name]


def _add_products(sums: torch.Tensor, tokens: torch.Tensor) -> None:
    """sums += tokens^T tokens, float64 [n, n]."""
    for piece in tokens.split(_AT_A_TIME):
        if piece.device.type == "cpu":
            piece = piece.float()
            sums += piece.t() @ piece
        else:  # where float32 may mean TF32, and float64 costs little beside the model's own arithmetic
            piece = piece.double()
            sums.addmm_(piece.t(), piece)
