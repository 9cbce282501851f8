"""Where a shard's checksums begin, and what they add up to (`numerics/sums.py`). No torch."""

from collections.abc import Iterable
from dataclasses import dataclass

from fp8lib.checkpoint.headers import Tensor
from fp8lib.checkpoint.layout import SCALE_SUFFIX

_MASK = 2**64 - 1


@dataclass(frozen=True, slots=True)
class Sums:
    """Checksums of the codes and the scales of a shard or a part of it, from 0 to 2^64 - 1."""

    codes: int = 0
    scales: int = 0

    def __add__(self, other: "Sums") -> "Sums":
        return Sums((self.codes + other.codes) & _MASK, (self.scales + other.scales) & _MASK)

    def halves(self) -> list[int]:
        """Numbers below 2^32 that a shared counter of 64 bits can add up for 2^31 parts."""
        return [half for n in (self.codes, self.scales) for half in (n >> 32, n & 0xFFFFFFFF)]

    @classmethod
    def of_halves(cls, halves: Iterable[int]) -> "Sums":
        """What parts add up to, from the sums of their `halves`."""
        a, b, c, d = halves
        return cls(((a << 32) + b) & _MASK, ((c << 32) + d) & _MASK)


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a shard's codes and its scales begin in the file; positions are counted from there."""

    codes: int
    scales: int

    @classmethod
    def of(cls, tensors: Iterable[Tensor]) -> "Origin":
        """Of a shard in this tool's layout, from its tensors; 0 where there are none."""
        codes, scales = [], []
        for tensor in tensors:
            if tensor.dtype == "F8_E4M3":
                codes.append(tensor.start)
            elif tensor.name.endswith(SCALE_SUFFIX):
                scales.append(tensor.start)
        return cls(min(codes, default=0), min(scales, default=0))
