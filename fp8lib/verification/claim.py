"""What is known of how a directory was made, so that codes and scales can be held against it. No torch."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fp8lib import Fp8Error
from fp8lib.checkpoint.headers import ITEM_SIZE
from fp8lib.checkpoint.untrusted import open_regular, printable
from fp8lib.numerics.blocks import blocks

if TYPE_CHECKING:
    import torch

    from fp8lib.verification.pairing import Pair

_FRACTION = {"BF16": ("<u2", 0x7F), "F16": ("<u2", 0x3FF), "F32": ("<u4", 0x7FFFFF)}


@dataclass(frozen=True, slots=True)
class Claim:
    """What codes and scales should be.

    Attributes:
        powers_of_two: the scale format: whether every scale was to be one.
        nearest: whether codes must be the nearest, but for weights that were rounded with second moments.
        scales: (weight's name, rows of it) -> the scales they must have; None if nobody knows.
    """

    powers_of_two: bool
    nearest: bool = False
    scales: "Callable[[str, torch.Tensor], torch.Tensor] | None" = None


NOTHING = Claim(powers_of_two=False)
"""Nothing is known: any scale may be, and any code."""


def are_powers_of_two(pairs: "Iterable[Pair]") -> bool:
    """Whether all scales of some FP8 weights are, by their bits; reads them until one is not.

    Raises:
        Fp8Error: a file became shorter.
    """
    for pair in pairs:
        kind, fraction = _FRACTION[pair.scale.dtype]
        wanted = blocks(pair.rows) * blocks(pair.columns) * ITEM_SIZE[pair.scale.dtype]
        with open_regular(pair.scale.path) as file:
            file.seek(pair.scale.start)
            data = file.read(wanted)
        if len(data) != wanted:
            raise Fp8Error(f"{printable(pair.scale.path)}: became shorter while it was read; restore it")
        if (np.frombuffer(data, kind) & fraction).any():
            return False
    return True
