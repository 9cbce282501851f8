"""The calibration modes and their parameters; `scales.py` is what they mean.

Apart from it so that a flag can be checked without importing torch.
"""

import re
from contextlib import suppress
from dataclasses import dataclass

from fp8lib import Fp8Error

MODES = ("rms", "max", "percentile", "mse")
SCALE_FORMATS = ("ue8m0", "bf16")
"""What a scale may be: a power of two, or any BF16 number. Both are stored as BF16."""
PHASES = 128
"""BF16 mantissas in an octave: the number of scales that round differently."""
LEAST_PERCENTILE = 50
"""Below it more than half of the weights would be clipped. Nobody means that; 0.999 is meant to be 99.9."""


@dataclass(frozen=True)
class Calibration:
    """How a block's scale is chosen.

    Attributes:
        mode: one of MODES.
        rms_factor: k of `rms`, > 0.
        rms_saturate: use k * rms / 448 as it is and clip what exceeds it.
        percentile: p of `percentile`, in [50, 100].
        mse_grid_size: scale phases `mse` tries per octave, 1..128; 128 is every BF16 scale. Powers of two
            have one phase, whatever it says.
        scale_format: one of SCALE_FORMATS.

    Raises:
        Fp8Error: a value out of range.
    """

    mode: str = "rms"
    rms_factor: float = 3.0
    rms_saturate: bool = False
    percentile: float = 99.9
    mse_grid_size: int = PHASES
    scale_format: str = "ue8m0"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise Fp8Error(f"--calib_mode {self.mode}: choose one of {', '.join(MODES)}")
        if not 0 < self.rms_factor <= 1e4:
            raise Fp8Error(f"--rms_factor {self.rms_factor}: must be above 0 and at most 10000")
        if not LEAST_PERCENTILE <= self.percentile <= 100:
            raise Fp8Error(
                f"--calib_percentile {self.percentile}: must be {LEAST_PERCENTILE} to 100; 99.9 means 99.9 %"
            )
        if not 1 <= self.mse_grid_size <= PHASES:
            raise Fp8Error(f"--mse_grid_size {self.mse_grid_size}: must be 1 to {PHASES}")
        if self.scale_format not in SCALE_FORMATS:
            raise Fp8Error(f"--scale_format {self.scale_format}: choose one of {', '.join(SCALE_FORMATS)}")

    @property
    def powers_of_two(self) -> bool:
        """Whether every scale is a power of two."""
        return self.scale_format == "ue8m0"

    @property
    def clips(self) -> bool:
        """Whether the mode clips weights by definition."""
        return (self.mode == "rms" and self.rms_saturate) or (
            self.mode == "percentile" and self.percentile < 100
        )

    @property
    def may_clip(self) -> bool:
        """Whether a block can be clipped; `mse` does where that gives the least error."""
        return self.clips or self.mode == "mse"

    @property
    def uses_activations(self) -> bool:
        """Whether activation statistics change the outcome."""
        return self.mode in ("rms", "mse")

    @classmethod
    def parse(cls, text: str) -> "Calibration":
        """The calibration of which this is the `str`; one without a format is of version 0.1 and `bf16`.

        Raises:
            Fp8Error: of none.
        """
        choice, _, scale_format = text.rpartition(", ")
        if scale_format not in SCALE_FORMATS:
            choice, scale_format = text, "bf16"
        mode, _, rest = choice.partition("(")
        fields = {"rms_saturate": rest.endswith(", saturate)")}
        if found := re.search(r"=([\d.e+-]+)", rest):
            name, kind = {"percentile": ("percentile", float), "mse": ("mse_grid_size", int)}.get(
                mode, ("rms_factor", float)
            )
            with suppress(ValueError):
                fields[name] = kind(found[1])
        calibration = cls(mode, **fields, scale_format=scale_format)
        if str(calibration) != f"{choice}, {scale_format}":
            raise Fp8Error(f"{text!r}: not a calibration")
        return calibration

    def __str__(self) -> str:
        # Every digit: the manifest tells by this whether a run continues another.
        factor, percentile = (str(v).removesuffix(".0") for v in (self.rms_factor, self.percentile))
        choice = {
            "max": "max",
            "rms": f"rms(k={factor}{', saturate' if self.rms_saturate else ''})",
            "percentile": f"percentile(p={percentile})",
            "mse": "mse" if self.powers_of_two else f"mse(phases={self.mse_grid_size})",
        }[self.mode]
        return f"{choice}, {self.scale_format}"
